"""One TLS connection of a server, between a transport and a protocol.

Owns the handshake, the records and the two ends of a TLS connection (close_notify of either
side). Toward the network it is the transport's protocol, toward the protocol above it is the
transport, so that whoever sat on the clear connection goes on as before. Knows no SMTP, no
certificates and no clock: how long a handshake may take is the protocol's business.

The loops' own TLS is not used: asyncio's holds 256 KiB for each connection that merely waits,
uvloop's as much once a client filled it, both read on while their protocol has stopped reading,
and neither closes one direction before the other. Here what is decrypted goes up at once, nothing
is kept, and flow control is that of the transport.

RFC 8446 (TLS 1.3), RFC 5246 (TLS 1.2); RFC 8446 §6.1 for the end.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import ssl
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final, Protocol, cast

from ..message import TLS
from .binding import BoundContext

#: Octets that are given to OpenSSL at a time: its buffer grows to what it is given, and stays so.
SLICE: Final = 8 * 1024
#: Octets of plain text in one record (RFC 8446 §5.1), the most that one read gives.
RECORD: Final = 16 * 1024

#: Octets that may come after the handshake without any plain text among them: enough for a record
#: that is not whole yet, or a few changes of keys, and the end of whoever sends nothing but those.
BARREN: Final = 64 * 1024

# The state of the connection. ENDED: the client sends no more. SHUT: neither we nor, as far as
# we listen, the client; what still comes is passed on unread, to be counted.
SHAKING: Final = 0
OPEN: Final = 1
ENDED: Final = 2
SHUT: Final = 3

# Names of a subject's attributes (RFC 4514 §3); others keep OpenSSL's long name.
_SHORT = {
    "commonName": "CN",
    "localityName": "L",
    "stateOrProvinceName": "ST",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "countryName": "C",
    "streetAddress": "STREET",
    "domainComponent": "DC",
    "userId": "UID",
}


class Above(Protocol):
    """Who speaks through the connection: an ``asyncio.Protocol`` that is told of the handshake."""

    def secured(self, tls: TLS, early: bool) -> None:
        """The handshake is over. ``early``: the client sent more behind it."""

    def insecure(self, reason: str) -> None:
        """The handshake failed, or what came was no TLS any more. The client has been sent an alert
        where there is one for it; nothing will be written after it. Close the transport."""

    def data_received(self, data: bytes) -> None: ...
    def eof_received(self) -> bool | None: ...
    def connection_lost(self, exc: Exception | None) -> None: ...
    def pause_writing(self) -> None: ...
    def resume_writing(self) -> None: ...


class SecureTransport:
    """See the module. From its making on it has the transport; ``above`` is heard through
    ``secured`` or ``insecure`` first. An ``asyncio.Protocol`` and an ``asyncio.Transport`` by what it can do."""

    __slots__ = ("_above", "_barren", "_incoming", "_outgoing", "_state", "_tls", "_transport")
    __deletable__ = ("_above",)

    def __init__(self, transport: asyncio.Transport, above: Above, context: ssl.SSLContext) -> None:
        self._transport = transport
        self._above = above
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._state = SHAKING
        self._barren = 0  # octets since the last plain text
        transport.set_protocol(cast(asyncio.Protocol, self))

    # ---------------------------------------------- what the network says to us

    def data_received(self, data: bytes) -> None:
        if self._state == SHAKING or self._state == OPEN:
            if len(data) <= SLICE:
                self._barren += len(data)
                self._incoming.write(data)
                self._read()
            else:
                self._read_in_slices(memoryview(data))
        elif self._state == SHUT:
            self._above.data_received(data)

    def eof_received(self) -> bool | None:
        state = self._state
        if state == SHAKING:
            self._break("the connection ended within the handshake")
            return False
        if state == OPEN:
            # Without close_notify: what came before was whole records all the same.
            self._state = ENDED
        elif state == ENDED:
            return True
        return self._above.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        above = self._above
        self._state = SHUT
        # Two that know each other would stay until the collector comes.
        del self._above
        above.connection_lost(exc)

    def pause_writing(self) -> None:
        self._above.pause_writing()

    def resume_writing(self) -> None:
        self._above.resume_writing()

    # ------------------------------------------------------------- the records

    def _read(self) -> None:
        if self._state == SHAKING and not self._shake(False):
            return
        pieces: list[bytes] = []
        self._decipher(pieces)
        self._hand_up(pieces)

    def _read_in_slices(self, data: memoryview) -> None:
        pieces: list[bytes] = []
        for start in range(0, len(data), SLICE):
            piece = data[start : start + SLICE]
            self._barren += len(piece)
            self._incoming.write(piece)
            if self._state == SHAKING and not self._shake(start + SLICE < len(data)):
                continue
            if self._state != OPEN or not self._decipher(pieces):
                break
        self._hand_up(pieces)

    def _shake(self, more: bool) -> bool:
        """One step of the handshake; True if it is over. ``more``: this is not all that came."""
        tls = self._tls
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return False
        except ssl.SSLError as error:
            self._break(_told(error))
            return False
        self._flush()
        self._state = OPEN
        self._barren = 0
        cipher = tls.cipher()
        # The context may be another than that of the beginning, by the name that the client asked for.
        bound = tls.context.end_point if isinstance(tls.context, BoundContext) else None
        shown = tls.getpeercert()
        names = names_of_client(shown, tls.getpeercert(binary_form=True) or b"") if shown else ()
        suite = TLS(tls.version() or "", cipher[0] if cipher else "", subject(shown), bound, names)
        self._above.secured(suite, more or self._incoming.pending > 0)
        return True

    def _decipher(self, pieces: list[bytes]) -> bool:
        """Take what is whole out of the records; False: no more will come."""
        tls, incoming = self._tls, self._incoming
        try:
            while self._state == OPEN and (incoming.pending or tls.pending()):
                piece = tls.read(RECORD)
                if piece:
                    self._barren = 0
                    pieces.append(piece)
                else:
                    # close_notify. What is sent after it is none of the client's words.
                    self._state = ENDED
                    self._transport.pause_reading()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            # What came before the fault was whole.
            self._hand_up(pieces)
            pieces.clear()
            self._break(_told(error))
            return False
        if self._state == OPEN and (fault := self._abuse()):
            self._hand_up(pieces)
            pieces.clear()
            self._break(fault)
            return False
        # An answer of OpenSSL's own, to a change of keys for example.
        self._flush()
        return self._state == OPEN

    def _abuse(self) -> str:
        """What a client did with records that carry none of its words, where that is too much."""
        if self._barren > BARREN:
            return "records without content"
        # Up to TLS 1.2 the only answer of OpenSSL's own to records is "no renegotiation".
        return "renegotiation" if self._outgoing.pending and self._tls.version() != "TLSv1.3" else ""

    def _hand_up(self, pieces: list[bytes]) -> None:
        if pieces and self._state != SHUT:
            self._above.data_received(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if self._state == ENDED:
            self._above.eof_received()

    def _break(self, reason: str) -> None:
        """There is no TLS (any more): the alert, then the end."""
        if self._state == SHUT:
            return
        self._state = SHUT
        self._flush()
        self._above.insecure(reason)

    def _flush(self) -> None:
        if self._outgoing.pending and not self._transport.is_closing():
            self._transport.write(self._outgoing.read())

    # ------------------------------------------------- what the protocol may say

    def write(self, data: bytes) -> None:
        """To the client, in records. After the end nothing is written, and nothing is said of it."""
        if self._state != OPEN and self._state != ENDED:
            return
        left = memoryview(data)
        try:
            while left:
                written = self._tls.write(left)
                left = left[written:]
        except ssl.SSLError as error:
            self._break(_told(error))
            return
        self._flush()

    def can_write_eof(self) -> bool:
        return self._transport.can_write_eof()

    def write_eof(self) -> None:
        """Say close_notify, then nothing more. What the client still sends is given to ``data_received``
        as it comes, in records: it is no longer read. Raises OSError as the transport does."""
        self._say_goodbye()
        self._transport.write_eof()

    def close(self) -> None:
        """Say close_notify and close once everything is written; the client's is not waited for."""
        self._say_goodbye()
        self._transport.close()

    def _say_goodbye(self) -> None:
        if self._state == OPEN or self._state == ENDED:
            # Ours is out even if the client's has not come yet, or data stands before it.
            with suppress(ssl.SSLError):
                self._tls.unwrap()
            self._flush()
        self._state = SHUT

    def abort(self) -> None:
        self._state = SHUT
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._state != ENDED:
            self._transport.resume_reading()

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size()


def subject(certificate: Mapping[str, Any] | None) -> str | None:
    """Who a verified certificate (as ``getpeercert`` tells it) is for: its subject as RFC 4514
    writes it (``CN=app,O=Example``), or its first alternative name (``DNS:app.example``) where the
    subject is empty; None without a certificate."""
    if not certificate:
        return None
    names = [
        "+".join(f"{_SHORT.get(name, name)}={_escaped(value)}" for name, value in relative) for relative in certificate.get("subject", ())
    ]
    if names:
        return ",".join(reversed(names))
    for kind, value in certificate.get("subjectAltName", ()):
        return f"{kind}:{_escaped(value)}"
    return ""


def names_of_client(certificate: Mapping[str, Any], der: bytes) -> tuple[str, ...]:
    """What a verified certificate can be called, the surest first: ``sha256:`` and the fingerprint in hexadecimal,
    its alternative names (``DNS:``, ``email:``, ``URI:``), its subject as ``subject`` tells it."""
    names = [f"sha256:{hashlib.sha256(der).hexdigest()}"]
    for kind, value in certificate.get("subjectAltName", ()):
        if kind == "DNS":
            names.append(f"DNS:{value.lower()}")
        elif kind in ("email", "URI"):
            names.append(f"{kind}:{value}")
    if certificate.get("subject"):
        names.append(subject(certificate) or "")
    return tuple(names)


def _escaped(value: str) -> str:
    """RFC 4514 §2.4; control characters as octets in hexadecimal."""
    text = re.sub(r'[,+"\\<>;=]', r"\\\g<0>", value)
    text = re.sub(r"[\x00-\x1f\x7f]", lambda match: f"\\{ord(match[0]):02x}", text)
    if text[:1] in (" ", "#"):
        text = "\\" + text
    if len(text) > 1 and text.endswith(" "):
        text = text[:-1] + "\\ "
    return text


def _told(error: ssl.SSLError) -> str:
    """Without OpenSSL's file and line."""
    # An alert that Python has no name for has no reason, whatever the type says.
    reason = getattr(error, "verify_message", "") or getattr(error, "reason", None)
    return str(reason).lower().replace("_", " ") if reason else str(error)
