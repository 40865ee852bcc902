"""PROXY headers, octet by octet; and the grammar of XCLIENT and XFORWARD."""

from __future__ import annotations

import struct

import pytest

from gateway.message import TLS, Client
from gateway.reply import Reply
from gateway.smtp import xclient
from gateway.smtp.proxy import SIGNATURE, UNKNOWN_ADDRESS, V1_LIMIT, V2_LIMIT, Header, begins, crc32c, read

PEER = Client("10.0.0.1", 999)
ADDRESSES4 = bytes([192, 0, 2, 7, 198, 51, 100, 1]) + struct.pack("!HH", 4711, 25)
ADDRESSES6 = bytes.fromhex("20010db8000000000000000000000009 20010db8000000000000000000000001") + struct.pack("!HH", 65535, 25)


def v2(command: int = 0x21, family: int = 0x11, block: bytes = ADDRESSES4) -> bytes:
    return SIGNATURE + bytes([command, family]) + struct.pack("!H", len(block)) + block


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def secured(flags: int, verify: int, *inner: bytes) -> bytes:
    return tlv(0x20, struct.pack("!BI", flags, verify) + b"".join(inner))


def whole(octets: bytes) -> Header:
    """What is read of these octets, however they are cut."""
    header = read(octets)
    assert header is not None
    for end in range(len(octets)):
        before = read(octets[:end])
        # A fault may be known before the end; what is told is then the same.
        assert before is None or before == header
    if header.fault is None:
        assert read(octets + b"EHLO x\r\n") == header
        assert header.size == len(octets)
    return header


# ------------------------------------------------------------------- version 1


def test_version_1() -> None:
    header = whole(b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 25\r\n")
    assert header == Header(43, ip="192.0.2.7", port=4711)
    assert header.client(PEER) == Client("192.0.2.7", 4711)


def test_version_1_of_ipv6() -> None:
    assert whole(b"PROXY TCP6 2001:DB8:0::9 ::1 0 65535\r\n").ip == "2001:db8::9"
    assert whole(b"PROXY TCP6 ::ffff:192.0.2.7 ::1 1 2\r\n").ip == "192.0.2.7"


@pytest.mark.parametrize("rest", [b"", b" ", b" ffff:f::1 ffff:f::2 65535 65535", b" what\tever \xff"])
def test_version_1_unknown(rest: bytes) -> None:
    header = whole(b"PROXY UNKNOWN" + rest + b"\r\n")
    assert header.keeps_peer
    assert header.client(PEER) is PEER


def test_the_longest_of_version_1() -> None:
    longest = b"PROXY UNKNOWN " + b"f" * (V1_LIMIT - 16) + b"\r\n"
    assert len(longest) == V1_LIMIT
    assert whole(longest).keeps_peer
    assert whole(b"PROXY UNKNOWN " + b"f" * (V1_LIMIT - 15) + b"\r\n").fault == "too long"
    assert whole(b"PROXY " + b" " * V2_LIMIT).fault == "too long"


@pytest.mark.parametrize(
    "line",
    [
        b"PROXY \r\n",
        b"PROXY TCP4\r\n",
        b"PROXY UNKNOWNX\r\n",
        b"PROXY UNKNOWN\n",
        b"PROXY tcp4 192.0.2.7 198.51.100.1 1 2\r\n",
        b"PROXY TCP5 192.0.2.7 198.51.100.1 1 2\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 1 2\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 1\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 1 2 3\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 1 2 \r\n",
        b"PROXY TCP4  192.0.2.7 198.51.100.1 1 2\r\n",
        b"PROXY TCP4 192.0.2.07 198.51.100.1 1 2\r\n",
        b"PROXY TCP4 192.0.2 198.51.100.1 1 2\r\n",
        b"PROXY TCP4 192.0.2.7 x 1 2\r\n",
        b"PROXY TCP4 ::1 ::1 1 2\r\n",
        b"PROXY TCP6 192.0.2.7 198.51.100.1 1 2\r\n",
        b"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 65536 2\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 1 -2\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 01 2\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 1_0 2\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 \xb2 2\r\n",
        b"PROXY TCP4 192.0.2.7\t198.51.100.1 1 2\r\n",
        b"PROXY TCP4 192.0.2.7 198.51.100.1 1 2\r\r\n",
    ],
)
def test_no_version_1(line: bytes) -> None:
    assert whole(line).fault == "malformed"


@pytest.mark.parametrize("octets", [b"EHLO x\r\n", b"proxy TCP4", b"PROXYTCP4", b"\r\n\r\n\r\n", b"\0", b"\x16\x03\x01", b"PROXY\tTCP4"])
def test_no_header(octets: bytes) -> None:
    assert whole(octets).fault == "missing"
    assert not begins(octets)


# ------------------------------------------------------------------- version 2


def test_version_2() -> None:
    golden = bytes.fromhex("0d0a0d0a000d0a515549540a 21 11 000c c0000207 c6336401 1267 0019")
    assert golden == v2()
    assert whole(golden) == Header(28, ip="192.0.2.7", port=4711)
    assert begins(golden)


def test_version_2_of_ipv6() -> None:
    assert whole(v2(family=0x21, block=ADDRESSES6)) == Header(52, ip="2001:db8::9", port=65535)
    mapped = bytes.fromhex("00000000000000000000ffffc0000207") + ADDRESSES6[16:]
    assert whole(v2(family=0x21, block=mapped)).ip == "192.0.2.7"


def test_version_2_of_a_unix_socket_is_nobody_of_ours() -> None:
    block = b"/run/haproxy.sock".ljust(108, b"\0") + b"/run/x".ljust(108, b"\0")
    header = whole(v2(family=0x31, block=block))
    assert header == Header(16 + 216, ip=UNKNOWN_ADDRESS)
    assert not header.keeps_peer


@pytest.mark.parametrize("octets", [v2(0x20), v2(0x20, 0), v2(0x20, 0xFF, b"\xff" * 100), v2(0x21, 0, b""), v2(0x21, 0, tlv(4, b"\0\0"))])
def test_version_2_keeps_the_peer(octets: bytes) -> None:
    """LOCAL, whatever else it says; and an address family that tells nothing."""
    header = whole(octets)
    assert header.keeps_peer
    assert header.client(PEER) is PEER


@pytest.mark.parametrize(
    "octets",
    [
        v2(0x11),  # version 1 in binary
        v2(0x31),
        v2(0x22),  # a command that is not assigned
        v2(family=0x12),  # datagrams
        v2(family=0x10),
        v2(family=0x01),
        v2(family=0x41),
        v2(block=ADDRESSES4[:11]),
        v2(family=0x21, block=ADDRESSES4),
        v2(family=0x31, block=ADDRESSES6),
        v2(block=ADDRESSES4 + b"\4"),
        v2(block=ADDRESSES4 + b"\4\0"),
        v2(block=ADDRESSES4 + b"\4\0\1"),
        v2(block=ADDRESSES4 + tlv(2, b"\xff")),
        v2(block=ADDRESSES4 + tlv(2, b"a\nb")),
        v2(block=ADDRESSES4 + tlv(2, b"a" * 256)),
        v2(block=ADDRESSES4 + tlv(5, b"a" * 129)),
        v2(block=ADDRESSES4 + tlv(3, b"\0\0\0\0")),
        v2(block=ADDRESSES4 + tlv(3, b"\0\0\0")),
        v2(block=ADDRESSES4 + tlv(0x20, b"\1\0\0\0")),
        v2(block=ADDRESSES4 + secured(1, 0, b"\x21\0\2T")),
        v2(block=ADDRESSES4 + secured(1, 0, tlv(0x21, b"TLS 1"))),
        v2(block=ADDRESSES4 + secured(1, 0, tlv(0x23, b"A\r\nB"))),
    ],
)
def test_no_version_2(octets: bytes) -> None:
    assert whole(octets).fault == "malformed"


def test_the_longest_of_version_2() -> None:
    room = V2_LIMIT - 16 - len(ADDRESSES4) - 3
    assert whole(v2(block=ADDRESSES4 + tlv(4, bytes(room)))).ip == "192.0.2.7"
    assert whole(v2(block=ADDRESSES4 + tlv(4, bytes(room + 1)))[:16]).fault == "too long"
    assert whole(SIGNATURE + b"\x20\x00\xff\xff").fault == "too long"


def test_checksum() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    # RFC 3720 §B.4
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(bytes(range(32))) == 0x46DD794E
    blank = v2(block=ADDRESSES4 + tlv(3, bytes(4)) + tlv(4, b"pad"))
    at = 16 + 12 + 3
    good = blank[:at] + crc32c(blank).to_bytes(4) + blank[at + 4 :]
    assert whole(good).ip == "192.0.2.7"
    for place in range(16, len(good)):
        broken = good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]
        header = read(broken)
        assert header is None or header.fault == "malformed" or place == 16 + 12, place
    # A checksum that is made something else is none, and then there is none to hold.


def test_what_a_proxy_says_about_tls() -> None:
    inner = (tlv(0x21, b"TLSv1.3"), tlv(0x23, b"TLS_AES_256_GCM_SHA384"), tlv(0x22, "Bücher GmbH".encode()), tlv(0x28, b"\x30\x82"))
    header = whole(v2(block=ADDRESSES4 + tlv(2, b"mx.example.net") + tlv(5, b"id") + tlv(0xEA, b"\1") + secured(7, 0, *inner)))
    assert header.authority == "mx.example.net"
    assert header.client(PEER).tls == TLS("TLSv1.3", "TLS_AES_256_GCM_SHA384", "Bücher GmbH")


@pytest.mark.parametrize(
    ("flags", "verify", "inner", "wanted"),
    [
        (0, 0, (tlv(0x21, b"TLSv1.3"),), None),
        (1, 0, (), TLS("unknown", "unknown")),
        (1, 0, (tlv(0x21, b"TLSv1.2"), tlv(0x22, b"me")), TLS("TLSv1.2", "unknown")),
        (3, 0, (tlv(0x22, b"me"),), TLS("unknown", "unknown", "me")),
        (5, 0, (tlv(0x22, b"me"),), TLS("unknown", "unknown", "me")),
        (3, 1, (tlv(0x22, b"me"),), TLS("unknown", "unknown")),
        (3, 0, (tlv(0x22, b"me\r\nX: y"),), TLS("unknown", "unknown")),
        (3, 0, (tlv(0x22, b"\xff"),), TLS("unknown", "unknown")),
        (3, 0, (tlv(0x22, b""),), TLS("unknown", "unknown")),
        (3, 0, (tlv(0x22, b"x" * 256),), TLS("unknown", "unknown")),
    ],
    ids=range(10),
)
def test_whom_a_proxy_vouches_for(flags: int, verify: int, inner: tuple[bytes, ...], wanted: TLS | None) -> None:
    assert whole(v2(block=ADDRESSES4 + secured(flags, verify, *inner))).tls == wanted


# ------------------------------------------------------------ XCLIENT, XFORWARD
# What is refused, and how, stands in transcripts/XCLIENT-syntax.smtp.


def test_xclient_attributes() -> None:
    told = xclient.named("Name=mail_1.Client.example ADDR=ipv6:2001:DB8::9 port=00025 proto=esmtp HELO=[192.0.2.7] LOGIN=b+c3+BCrger@x")
    assert told == {
        "NAME": "mail_1.Client.example",
        "ADDR": "2001:db8::9",
        "PORT": "25",
        "PROTO": "ESMTP",
        "HELO": "[192.0.2.7]",
        "LOGIN": "bürger@x",
    }
    assert isinstance(told, dict)
    client = xclient.changed(Client("10.0.0.1", 1, "old.example", "ESMTPSA", TLS("TLSv1.3", "x"), "old"), told)
    assert client == Client("2001:db8::9", 25, "[192.0.2.7]", "ESMTP", TLS("TLSv1.3", "x"), "bürger@x")


def test_xclient_keeps_only_the_address() -> None:
    old = Client("10.0.0.1", 7, "old.example", "ESMTPA", None, "old")
    assert xclient.changed(old, {"NAME": "x.example"}) == Client("10.0.0.1", 7)
    assert xclient.changed(old, {"PORT": "9"}) == Client("10.0.0.1", 9)
    assert xclient.changed(old, {"ADDR": "10.0.0.2"}) == Client("10.0.0.2", 0)
    assert xclient.changed(old, {"ADDR": None, "PORT": None}) == Client(UNKNOWN_ADDRESS, 0)


def test_an_ipv4_address_in_ipv6_is_ipv4() -> None:
    assert xclient.named("ADDR=IPV6:::ffff:192.0.2.7") == {"ADDR": "192.0.2.7"}


def test_xforward_attributes() -> None:
    told = xclient.forwarded("NAME=spike+20x ADDR=[unavailable] HELO=<x@y> IDENT=3CF;+22 SOURCE=local PROTO=QMQP")
    assert told == {"NAME": "spike?x", "ADDR": None, "HELO": "?x?y?", "IDENT": "3CF??", "SOURCE": "LOCAL", "PROTO": "QMQP"}
    assert isinstance(xclient.forwarded("NAME"), Reply)
