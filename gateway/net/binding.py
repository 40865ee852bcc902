"""What a login can be bound to: the certificate of the TLS channel it runs in.

``tls-server-end-point`` (RFC 5929 §4.1) is the hash of the server's certificate, by the hash of its
signature, but by SHA-256 where that is MD5 or SHA-1. Needs no more of DER than where the
signature's algorithm stands (RFC 5280 §4.1).
"""

from __future__ import annotations

import hashlib
import ssl
from typing import Final

#: Algorithms of signatures (their OIDs in DER) and their hash.
_HASHES: Final[dict[bytes, str]] = {
    bytes.fromhex("2a864886f70d010104"): "sha256",  # md5WithRSAEncryption
    bytes.fromhex("2a864886f70d010105"): "sha256",  # sha1WithRSAEncryption
    bytes.fromhex("2a864886f70d01010b"): "sha256",
    bytes.fromhex("2a864886f70d01010c"): "sha384",
    bytes.fromhex("2a864886f70d01010d"): "sha512",
    bytes.fromhex("2a8648ce3d0401"): "sha256",  # ecdsa-with-SHA1
    bytes.fromhex("2a8648ce3d040302"): "sha256",
    bytes.fromhex("2a8648ce3d040303"): "sha384",
    bytes.fromhex("2a8648ce3d040304"): "sha512",
}


class BoundContext(ssl.SSLContext):
    """A server's context that says what logins under it can be bound to: ``end_point`` of the one
    certificate that it shows, None where there is nothing."""

    end_point: bytes | None = None


def end_point(certificate: bytes) -> bytes | None:
    """The binding of a certificate in DER; None where it has none (an algorithm that names no one
    hash: Ed25519, RSASSA-PSS) or is no certificate."""
    try:
        inside, _ = _within(certificate, 0, 0x30)
        _, after = _within(certificate, inside, 0x30)
        algorithm, _ = _within(certificate, after, 0x30)
        start, end = _within(certificate, algorithm, 0x06)
    except (IndexError, ValueError):
        return None
    name = _HASHES.get(certificate[start:end])
    return None if name is None else hashlib.new(name, certificate).digest()


def _within(octets: bytes, at: int, tag: int) -> tuple[int, int]:
    """Where the contents of the element at ``at`` begin and end."""
    if octets[at] != tag:
        raise ValueError("another element")
    length, begin = octets[at + 1], at + 2
    if length & 0x80:
        count = length & 0x7F
        length, begin = int.from_bytes(octets[begin : begin + count], "big"), begin + count
    if begin + length > len(octets):
        raise ValueError("cut off")
    return begin, begin + length
