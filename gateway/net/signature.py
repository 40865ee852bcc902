"""Standard Webhooks signatures (v1, HMAC-SHA256).

Signed is ``{id}.{timestamp}.{body}``; secrets are ``whsec_`` and base64, the key is what the
base64 decodes to. While a secret is rotated there is one signature for each.

Standard Webhooks 1.0.0; RFC 2104.
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
from collections.abc import Iterable, Sequence


class Signer:
    """``secrets``: the present one first; none: nothing is signed. Raises ValueError for one that is
    no base64."""

    def __init__(self, secrets: Iterable[str | None]) -> None:
        self._keys = [_key(secret) for secret in secrets if secret]
        self._second = 0
        self._timestamp = ("webhook-timestamp", "0")

    def headers(self, id: str, timestamp: int, body: Iterable[bytes]) -> list[tuple[str, str]]:
        """``webhook-id``, ``webhook-timestamp`` (Unix seconds of the try) and, with a secret,
        ``webhook-signature``. ``body`` is walked through once."""
        if timestamp != self._second:
            self._second, self._timestamp = timestamp, ("webhook-timestamp", str(timestamp))
        headers = [("webhook-id", id), self._timestamp]
        if self._keys:
            headers.append(("webhook-signature", " ".join(self._signatures(f"{id}.{timestamp}.".encode(), body))))
        return headers

    def _signatures(self, prefix: bytes, body: Iterable[bytes]) -> Sequence[str]:
        states = [hmac.new(key, prefix, hashlib.sha256) for key in self._keys]
        for piece in body:
            for state in states:
                state.update(piece)
        return ["v1," + binascii.b2a_base64(state.digest(), newline=False).decode() for state in states]


def _key(secret: str) -> bytes:
    try:
        key = binascii.a2b_base64(secret.removeprefix("whsec_"), strict_mode=True)
    except binascii.Error:
        key = b""
    if not key:
        raise ValueError("a secret is whsec_ followed by base64")
    return key
