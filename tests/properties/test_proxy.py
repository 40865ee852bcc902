"""Whatever comes in place of a PROXY header: nothing raises, and the cut makes no difference."""

from __future__ import annotations

import struct

from hypothesis import example, given
from hypothesis import strategies as st

from gateway.reply import Reply
from gateway.smtp import xclient
from gateway.smtp.proxy import SIGNATURE, V1_LIMIT, V2_LIMIT, Header, begins, read

pieces = st.sampled_from([b" ", b"\r\n", b"\r", b"\n", b"TCP4", b"TCP6", b"UNKNOWN", b"10.0.0.1", b"::1", b"25", b"0", b"65536", b"\0"])
text = st.lists(st.one_of(pieces, st.binary(max_size=6)), max_size=16).map(lambda parts: b"PROXY " + b"".join(parts))


@st.composite
def binary(draw: st.DrawFn) -> bytes:
    tlvs = st.tuples(st.sampled_from([1, 2, 3, 4, 5, 0x20, 0x21, 0x22, 0x30, 0xEA]), st.binary(max_size=40)).map(
        lambda pair: struct.pack("!BH", pair[0], len(pair[1])) + pair[1]
    )
    block = draw(st.binary(max_size=230)) + b"".join(draw(st.lists(tlvs, max_size=4)))
    length = draw(st.one_of(st.just(len(block)), st.integers(0, 0xFFFF)))
    head = bytes([draw(st.sampled_from([0x20, 0x21, 0x21, 0x21, 0x22, 0x11])), draw(st.sampled_from([0, 0x11, 0x21, 0x31, 0x12, 0xFF]))])
    return SIGNATURE + head + struct.pack("!H", length) + block


octets = st.one_of(st.binary(max_size=300), text, binary(), binary().map(lambda header: header[:-1]))


@given(octets, st.lists(st.integers(0, 600), max_size=4))
@example(b"", [])
@example(SIGNATURE + b"\x21\x11\xff\xff", [12, 13])
def test_any_octets(data: bytes, cuts: list[int]) -> None:
    header = read(data)
    assert header is None or isinstance(header, Header)
    # As the listener reads: what is not yet a header was its beginning.
    seen = None
    for end in [*sorted(cut for cut in cuts if cut < len(data)), len(data)]:
        seen = read(data[:end])
        if seen is not None:
            break
    assert seen == header
    if header is None:
        assert len(data) < V2_LIMIT
        assert b"\n" not in data[:V1_LIMIT] or not data.startswith(b"PROXY ")
        return
    if header.fault is None:
        assert begins(data)
        assert 13 < header.size <= len(data)
        assert read(data[: header.size]) == header
        assert read(data[: header.size] + b"\0" * 9) == header
        assert header.ip.isascii()
        assert 0 <= header.port <= 0xFFFF
        assert header.authority == "" or header.authority.isprintable()
        if header.tls is not None:
            assert (header.tls.version + header.tls.cipher).isascii()
            assert (header.tls.peer or "").isprintable()
    else:
        assert header == Header(fault=header.fault)


words = st.sampled_from(
    ["NAME", "addr", "PORT", "PROTO", "HELO", "LOGIN", "IDENT", "SOURCE", "=", "+", "+00", "+C3+BC", "IPV6:", "[UNAVAILABLE]", " "]
)


@given(st.one_of(st.text(), st.lists(st.one_of(words, st.text(max_size=5)), max_size=12).map("".join)))
def test_any_attributes(argument: str) -> None:
    for told in (xclient.named(argument), xclient.forwarded(argument)):
        if isinstance(told, Reply):
            assert told.permanent
        else:
            assert all(value is None or (value and value.isprintable()) for value in told.values())
