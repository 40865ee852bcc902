"""The PROXY protocol, versions 1 and 2: what a load balancer says about the client before it speaks.

Owns the grammar of the header and what it means: octets in, a Header out. Knows no socket,
clock or list of trusted networks; who may send a header, and how long it may take, is the
listener's business. A header that is none is a Header with a fault, never an exception.

Invariants: what is told does not depend on how the octets were cut; nothing behind the header
is looked at (its ``size`` says where it ends, so that TLS or SMTP begins there); no octet that
a proxy passed on reaches a reply, a header field or a log unjudged.

The PROXY protocol, W. Tarreau, HAProxy (doc/proxy-protocol.txt): §2.1 version 1, §2.2 version 2.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from typing import Final, Literal

from ..message import TLS, Client

#: Octets of a version 1 header at most, CRLF included (§2.1).
V1_LIMIT: Final = 107
#: Octets of a version 2 header that we read at most: addresses, TLS facts and a client certificate fit.
V2_LIMIT: Final = 4096
#: The first octets of version 2: no other protocol begins so.
SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"

_WORD = b"PROXY "
_FIXED = 16
_LOCAL, _PROXY = 0x20, 0x21
_UNSPECIFIED, _TCP4, _TCP6, _UNIX = 0x00, 0x11, 0x21, 0x31
_ADDRESSES = {_UNSPECIFIED: 0, _TCP4: 12, _TCP6: 36, _UNIX: 216}

_AUTHORITY, _CRC32C, _UNIQUE_ID, _SSL = 0x02, 0x03, 0x05, 0x20
_VERSION, _COMMON_NAME, _CIPHER = 0x21, 0x22, 0x23
_BY_TLS, _CERTIFICATE = 0x01, 0x02 | 0x04
_UNIQUE_ID_LIMIT = 128

_PORT = re.compile(r"0|[1-9][0-9]{0,4}")
_ADDRESS = re.compile(r"[0-9A-Fa-f:.]+")
_TOKEN = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NAME_LIMIT = 255

#: Who has no address that means anything here (a unix socket of the proxy's machine): in no network
#: but "everybody", and above all not one of our own, as a client on a unix socket of ours is.
UNKNOWN_ADDRESS: Final = "0.0.0.0"

Fault = Literal["missing", "malformed", "too long"]


@dataclass(frozen=True)
class Header:
    """What a proxy said. With a ``fault`` nothing else holds.

    ``size``: its octets. ``ip`` and ``port``: the client. ``keeps_peer``: nothing was told (LOCAL, UNKNOWN, UNSPEC: a health check), the
    client is who connected. ``tls``: between client and proxy. ``authority``: the name that the
    client asked for (SNI)."""

    size: int = 0
    fault: Fault | None = None
    keeps_peer: bool = False
    ip: str = UNKNOWN_ADDRESS
    port: int = 0
    tls: TLS | None = None
    authority: str = ""

    def client(self, peer: Client) -> Client:
        """Who speaks, when ``peer`` is who connected."""
        return peer if self.keeps_peer else replace(peer, ip=self.ip, port=self.port, tls=self.tls)


def begins(octets: bytes) -> bool:
    """Are these the first octets of a header?"""
    return octets.startswith((_WORD, SIGNATURE))


def read(octets: bytes) -> Header | None:
    """The header that these octets begin with; None while it may still become one. Never more
    than ``V2_LIMIT`` octets are needed to say which."""
    if octets.startswith(_WORD):
        return _text(octets)
    if octets.startswith(SIGNATURE):
        return _binary(octets)
    return None if _WORD.startswith(octets) or SIGNATURE.startswith(octets) else _MISSING


_MISSING = Header(fault="missing")
_MALFORMED = Header(fault="malformed")
_TOO_LONG = Header(fault="too long")


# --------------------------------------------------------------------- version 1


def _text(octets: bytes) -> Header | None:
    end = octets.find(b"\n", 0, V1_LIMIT)
    if end < 0:
        return None if len(octets) < V1_LIMIT else _TOO_LONG
    line = octets[: end + 1]
    if not line.endswith(b"\r\n"):
        return _MALFORMED
    size = len(line)
    words = line[len(_WORD) : -2].decode("latin-1").split(" ")
    if words[0] == "UNKNOWN":
        # Whatever follows is to be ignored.
        return Header(size, keeps_peer=True)
    if len(words) != 5 or words[0] not in ("TCP4", "TCP6"):
        return _MALFORMED
    family, source, destination, source_port, destination_port = words
    ip = _written(source, family)
    port = _port(source_port)
    if ip is None or port is None or _written(destination, family) is None or _port(destination_port) is None:
        return _MALFORMED
    return Header(size, ip=ip, port=port)


def _written(text: str, family: str) -> str | None:
    if not _ADDRESS.fullmatch(text):
        return None
    try:
        return str(IPv4Address(text)) if family == "TCP4" else _plain(IPv6Address(text))
    except ValueError:
        return None


def _port(text: str) -> int | None:
    return int(text) if _PORT.fullmatch(text) and int(text) <= 0xFFFF else None


def _plain(address: IPv6Address) -> str:
    """IPv4 that came through an IPv6 socket is IPv4: limits and routes know it so."""
    return str(address.ipv4_mapped or address)


# --------------------------------------------------------------------- version 2


def _binary(octets: bytes) -> Header | None:
    # In the order in which they come, so that a fault is the same however they are cut.
    if len(octets) > 12 and octets[12] not in (_LOCAL, _PROXY):
        return _MALFORMED
    if len(octets) < _FIXED:
        return None
    size = _FIXED + int.from_bytes(octets[14:_FIXED])
    if size > V2_LIMIT:
        return _TOO_LONG
    if len(octets) < size:
        return None
    if octets[12] == _LOCAL:
        return Header(size, keeps_peer=True)
    family = octets[13]
    if family not in _ADDRESSES or size < _FIXED + _ADDRESSES[family]:
        return _MALFORMED
    header = octets[:size]
    try:
        tls, authority = _extensions(header, _FIXED + _ADDRESSES[family])
    except ValueError:
        return _MALFORMED
    block = header[_FIXED:]
    if family == _TCP4:
        return Header(size, None, False, str(IPv4Address(block[:4])), int.from_bytes(block[8:10]), tls, authority)
    if family == _TCP6:
        return Header(size, None, False, _plain(IPv6Address(block[:16])), int.from_bytes(block[32:34]), tls, authority)
    return Header(size, None, family == _UNSPECIFIED, UNKNOWN_ADDRESS, 0, tls, authority)


def _values(block: bytes) -> list[tuple[int, int, bytes]]:
    """``(type, place, value)`` of each TLV. Raises ValueError where one does not fit."""
    found = []
    at = 0
    while at < len(block):
        if at + 3 > len(block):
            raise ValueError
        kind, length = block[at], int.from_bytes(block[at + 1 : at + 3])
        at += 3
        if at + length > len(block):
            raise ValueError
        found.append((kind, at, block[at : at + length]))
        at += length
    return found


def _extensions(header: bytes, start: int) -> tuple[TLS | None, str]:
    """The TLS facts and the authority. Raises ValueError for a TLV that is not what it should be."""
    tls: TLS | None = None
    authority = ""
    for kind, at, value in _values(header[start:]):
        if kind == _CRC32C:
            place = start + at
            blanked = header[:place] + bytes(len(value)) + header[place + len(value) :]
            if len(value) != 4 or crc32c(blanked) != int.from_bytes(value):
                raise ValueError
        elif kind == _AUTHORITY:
            authority = value.decode()
            if not authority.isprintable() or len(value) > _NAME_LIMIT:
                raise ValueError
        elif kind == _UNIQUE_ID:
            if len(value) > _UNIQUE_ID_LIMIT:
                raise ValueError
        elif kind == _SSL:
            tls = _secured(value)
    return tls, authority


def _secured(value: bytes) -> TLS | None:
    """``pp2_tlv_ssl``: flags, result of the verification (0: good), TLVs of its own."""
    if len(value) < 5:
        raise ValueError
    flags, verified = struct.unpack("!BI", value[:5])
    told = {kind: text for kind, _, text in _values(value[5:])}
    if not flags & _BY_TLS:
        return None
    peer = None
    if verified == 0 and flags & _CERTIFICATE:
        peer = _identity(told.get(_COMMON_NAME, b""))
    return TLS(_token(told, _VERSION), _token(told, _CIPHER), peer)


def _token(told: dict[int, bytes], kind: int) -> str:
    text = told.get(kind, b"unknown").decode("ascii")
    if not _TOKEN.fullmatch(text):
        raise ValueError
    return text


def _identity(name: bytes) -> str | None:
    """The client chose what stands in its certificate: what is not plain text is nobody's name."""
    text = name.decode("utf-8", "replace")
    return text if text and text.isprintable() and "\ufffd" not in text and len(name) <= _NAME_LIMIT else None


def _table() -> tuple[int, ...]:
    table = []
    for octet in range(256):
        value = octet
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC = _table()


def crc32c(octets: bytes) -> int:
    """CRC-32C (Castagnoli), RFC 3720 §12.1."""
    value = 0xFFFFFFFF
    for octet in octets:
        value = value >> 8 ^ _CRC[(value ^ octet) & 0xFF]
    return value ^ 0xFFFFFFFF
