"""The parser and the oracle say the same, however the input was cut.

Alphabets are mostly CR, LF, dots, NUL and broken UTF-8: what has broken others. Every
input is fed whole, octet by octet and at random cuts.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway._parser import ReadBuffer, Receiver, ReplyReceiver, parse_address, stuff
from tests import reference
from tests.fuzz.receiver import compare, heard, poured, told

CUTS = st.one_of(st.just("whole"), st.just("octets"), st.lists(st.integers(0, 2**20), max_size=12))
Cuts = str | list[int]


def cut(octets: bytes, cuts: Cuts) -> list[bytes]:
    if cuts == "whole":
        return [octets]
    if cuts == "octets":
        return [octets[i : i + 1] for i in range(len(octets))]
    places = sorted({0, len(octets), *(place % (len(octets) + 1) for place in cuts if isinstance(place, int))})
    return [octets[a:b] for a, b in pairwise(places)]


#: How reads are handed over: as bytes, or in a buffer that contents of so many octets take with them.
LENT = st.sampled_from([0, 1, 40, 100_000])


def feeder(receiver: Receiver, lent: int) -> Callable[[bytes], None]:
    """Feeds what was read. The buffer serves another reader in between, and nothing of one may turn up with the other."""
    if not lent:
        return receiver.feed
    buffer, other = ReadBuffer(100_000, lent), Receiver()
    other.begin()

    def feed(read: bytes) -> None:
        other.feed(poured(b"other\r\n" * 20, buffer))
        assert other.content() == b"other\r\n" * 20
        receiver.feed(poured(read, buffer))

    return feed


def joined(*tokens: bytes, most: int = 24) -> st.SearchStrategy[bytes]:
    return st.lists(st.sampled_from(tokens), max_size=most).map(b"".join)


# --- content -------------------------------------------------------------------------------

#: Few enough tokens that ends, false ends and stuffed dots are common; runs long enough to pass any block.
WIRE = joined(
    b"\r", b"\n", b"\r\n", b".", b"..", b"\0", b"a", b"\xc3\xa9", b"\xff", b"\r\n.\r\n", b"\r\n..", b"x" * 60, b"y" * 64, b"z" * 131
)
#: Lines as they should be, with a rare fault among them: the faults fall on every place of a block.
LINES = st.lists(
    st.tuples(
        st.sampled_from([b"", b".", b"..", b"Received: ", b"\xc3\xa9", b" "]),
        st.integers(0, 150),
        st.sampled_from([b"\r\n"] * 12 + [b"\n", b"\r", b"\r\r\n", b"\0\r\n", b"\r\n.\n"]),
    ),
    max_size=40,
).map(lambda lines: b"".join(start + b"a" * n + end for start, n, end in lines))
HEADER = joined(b"Received:", b"received \t:", b"RECEIVED", b"x: y", b"\r\n", b"\r\n", b"\n", b"\r", b" ", b"\t", b".", b":", b"r", b"")
CONTENT = st.one_of(WIRE, LINES, HEADER, st.tuples(HEADER, WIRE, LINES).map(b"".join))


@given(CONTENT, st.sampled_from([b"", b"\r\n.\r\nQUIT\r\n.\r\n"]), CUTS, st.booleans(), LENT)
@example(b".\r\n", b"", "octets", False, 0)
@example(b"\n.\r\n", b"\r\n.\r\n", "whole", True, 0)
@example(b"a\n..\r\n.\nb\n.\r\nc", b"\r\n.\r\n", "whole", True, 0)
@example(b"x" * 63 + b"\r\n.y" + b"z" * 200, b"\r\n.\r\nQUIT\r\n.\r\n", "whole", False, 0)
@example(b"x" * 63 + b"\r\ny" + b"z" * 200, b"\r\n.\r\nQUIT\r\n.\r\n", "whole", False, 40)
@example(b"x" * 63 + b"\r\ny" + b"z" * 200, b"", [100], False, 1)
@settings(max_examples=800, deadline=None)
def test_content(body: bytes, end: bytes, cuts: Cuts, normalize: bool, lent: int) -> None:
    stream = body + end
    want = reference.content(stream, normalize)
    receiver = Receiver(normalize=normalize)
    receiver.begin()
    feed = feeder(receiver, lent)
    pieces: list[bytes] = []
    fed = 0
    for read in cut(stream, cuts):
        fed += len(read)
        feed(read)
        while (piece := receiver.content()) is not None:
            assert piece, "an empty piece says nothing"
            assert receiver.content_fault is None, "octets were handed out together with a fault"
            pieces.append(piece)
        if receiver.finished:
            break
        assert receiver.pending == 0
    compare(told(receiver, b"".join(pieces), fed - receiver.pending), receiver.size, want)


@given(CONTENT, CUTS, st.lists(st.integers(1, 300), max_size=10), st.booleans(), st.booleans(), LENT)
@settings(max_examples=700, deadline=None)
def test_chunks(stream: bytes, cuts: Cuts, sizes: list[int], normalize: bool, binary: bool, lent: int) -> None:
    want = reference.chunks(stream, normalize, binary, ended=True)
    receiver = Receiver(normalize=normalize)
    receiver.begin(binary=binary)
    feed = feeder(receiver, lent)
    left = len(stream)
    plan = iter(sizes)
    now = 0
    pieces: list[bytes] = []
    for read in cut(stream, cuts):
        feed(read)
        while True:
            if now == 0:
                now = min(next(plan, left), left)
            if now == 0:
                break
            piece = receiver.chunk(now)
            if piece is None:
                assert receiver.taken == 0
                break
            assert 0 < receiver.taken <= now
            assert piece == b"" or receiver.content_fault is None
            now -= receiver.taken
            left -= receiver.taken
            pieces.append(piece)
        assert receiver.pending == 0
    assert left == 0
    receiver.end()
    compare(told(receiver, b"".join(pieces), len(stream)), receiver.size, want)


@given(CONTENT, st.booleans())
@settings(max_examples=300, deadline=None)
def test_stuffing_and_back(body: bytes, line_start: bool) -> None:
    stuffed = stuff(body, line_start)
    assert stuffed == reference.stuff(body, line_start)
    if stuffed == body:
        assert stuffed is body
    # What went through a reader once is safe to send on, and comes back the same.
    once = reference.content(body + b"\r\n.\r\n", normalize=True)
    if once.fault is None:
        again = reference.content(stuff(once.octets) + b".\r\n" if once.octets else b".\r\n", normalize=False)
        assert again.octets == once.octets
        assert again.fault is None
        assert again.finished


# --- commands ------------------------------------------------------------------------------

_WORDS = st.sampled_from(
    [
        *(
            "a",
            "b.c",
            "x-y",
            "-x",
            "x-",
            "a..b",
            ".a",
            "1",
            "é",
            "例",
            "x!u",
            "u%x",
            "u+v=w",
            "postmaster",
            "Postmaster",
            "_",
            "a_b",
            "(",
            ";",
            "`",
            "$(x)",
        ),
        *('""', '"a b"', '"a\\"b"', '"u@x"', '"a', '"\\é"', '">"', '"é>"', "\x80", "\u2028", "ſ", "K", "a" * 63, "b" * 64, "c" * 120),
        *(
            "[1.2.3.4]",
            "[01.2.3.4]",
            "[256.1.1.1]",
            "[IPv6:::1]",
            "[ipv6:1:2:3:4:5:6:7:8]",
            "[IPv6:::1%x]",
            "[IPv6:::ffff:1.2.3.4]",
            "[x:y]",
            "[x:]",
            "[x-:y]",
            "[]",
            "[",
        ),
    ]
)
_GLUE = st.sampled_from(["@", "@", "@", ".", ",", ":", "", " ", "<", ">", "=", "-"])
PATHS = st.one_of(
    st.lists(st.tuples(_WORDS, _GLUE).map("".join), max_size=5).map("".join),
    st.tuples(_WORDS, st.just("@"), _WORDS).map("".join),
    st.tuples(st.just("@"), _WORDS, st.sampled_from([",@b.c:", ":", ",:"]), _WORDS, st.just("@"), _WORDS).map("".join),
    st.tuples(
        st.sampled_from(["a@", "é@", '"a b"@']),
        st.lists(st.sampled_from(["a" * 63, "b" * 60, "c", "é" * 31, "é" * 32]), min_size=1, max_size=5).map(".".join),
    ).map("".join),
)
PARAMS = st.lists(
    st.sampled_from(
        [
            "SIZE=1000",
            "size=",
            "SIZE",
            "Size=1",
            "BODY=8BITMIME",
            "body=7bit",
            "SMTPUTF8",
            "AUTH=<>",
            "X-1=é",
            "-X=1",
            "X=a=b",
            "=x",
            "RET=HDRS",
            "ORCPT=rfc822;a+40b",
            "",
            "_x",
            "é",
        ]
    ),
    max_size=4,
).map(" ".join)
MAIL = st.tuples(
    st.sampled_from(
        ["MAIL FROM:", "RCPT TO:", "mail from:", "Rcpt  tO:", "MAIL FROM :", "MAIL", "RCPT", "MAIL TO:", "RCPT TO:<@", " MAIL FROM:"]
    ),
    st.sampled_from(["<", "<", "<", " <", "  <", ""]),
    PATHS,
    st.sampled_from([">", ">", "> ", ">  ", "", ">>", ">x"]),
    PARAMS,
).map("".join)
OTHERS = st.one_of(
    st.tuples(
        st.sampled_from(
            [
                "EHLO",
                "helo",
                "LHLO",
                "DATA",
                "data",
                "RSET",
                "NOOP",
                "QUIT",
                "VRFY",
                "EXPN",
                "HELP",
                "AUTH",
                "STARTTLS",
                "ſTARTTLS",
                "BDAT",
                "bdat",
                "XYZZY",
                "É",
                "",
                "v" * 70,
            ]
        ),
        st.sampled_from(
            [
                "",
                " ",
                "  ",
                " x",
                " x y",
                " x y z",
                " x  y ",
                " é",
                " 0",
                " 00012 LAST",
                " 5 last ",
                " 5  LAST",
                " 5 LASTS",
                " -1",
                " 1e9",
                " ٣",
                " 9223372036854775807",
                " 9223372036854775808",
                " 99999999999999999999",
                " 18446744073709551617 LAST",
            ]
        ),
    ).map("".join),
)
GOOD_LINES = st.one_of(MAIL, OTHERS).map(lambda line: line.encode("utf-8", "surrogatepass"))
ENDS = st.sampled_from(
    [b"\r\n"] * 8 + [b"\n", b"\r", b"\r\r\n", b"\0\r\n", b"\t\r\n", b"\x7f\r\n", b"\xff\r\n", b"\xed\xa0\x80\r\n", b"\xc3"]
)
COMMANDS = st.one_of(
    st.lists(st.tuples(GOOD_LINES, ENDS).map(b"".join), max_size=6).map(b"".join),
    joined(b"\r", b"\n", b"\r\n", b"\0", b"MAIL FROM:<", b"RCPT TO:<", b"a@b", b">", b" ", b"\xc3\xa9", b"\xa9", b"BDAT ", b"1", b"v" * 70),
)


@given(COMMANDS, CUTS, st.sampled_from([40, 300, 2048]))
@settings(max_examples=1200, deadline=None)
def test_commands(stream: bytes, cuts: Cuts, limit: int) -> None:
    receiver = Receiver(line_limit=limit)
    got = []
    for read in cut(stream, cuts):
        receiver.feed(read)
        while (command := receiver.command()) is not None:
            got.append(heard(command))
        assert receiver.pending < limit
    assert got == reference.commands(stream, limit)


@given(COMMANDS, CUTS, st.sampled_from([10, 100, 12288]))
@settings(max_examples=150, deadline=None)
def test_lines(stream: bytes, cuts: Cuts, limit: int) -> None:
    receiver = Receiver()
    got = []
    for read in cut(stream, cuts):
        receiver.feed(read)
        while (line := receiver.line(limit)) is not None:
            got.append((line, receiver.line_fault))
    assert got == reference.lines(stream, limit)


@pytest.mark.parametrize("step", [1, 7, 1000, 65536, 200000])
@pytest.mark.parametrize("length", [2046, 2047, 65535, 65536, 65537, 65538, 100000])
@pytest.mark.parametrize("end", [b"\r\n", b"\n", b""])
def test_floods(step: int, length: int, end: bytes) -> None:
    if step == 1 and length != 65537:
        step = 13
    stream = b"x" * (length - 1) + b"\0" + end + b"NOOP\r\n"
    for octets in (stream, stream.replace(b"\0", b"y")):
        receiver = Receiver()
        got = []
        for at in range(0, len(octets), step):
            receiver.feed(octets[at : at + step])
            while (command := receiver.command()) is not None:
                got.append(heard(command))
        assert got == reference.commands(octets)


@given(PATHS)
@settings(max_examples=800, deadline=None)
def test_addresses(text: str) -> None:
    assert parse_address(text) == reference.mailbox(text)


@given(st.text(alphabet='ab.@"\\ []:é\ud800\x00\n\x7f\x85', max_size=12))
@settings(max_examples=800, deadline=None)
def test_odd_addresses(text: str) -> None:
    assert parse_address(text) == reference.mailbox(text)


@given(st.text(alphabet="0123456789abF:.", max_size=24))
@example("1:2:3:4:5:6:7::")
@example("::2:3:4:5:6:7:8")
@example("1:2:3:4:5:6:1.2.3.4")
@example("1::3:4:5:6:7:8")
@example("1::2::3")
@example("1:2:3:4::5:6:7:8")
@example("::")
@example(":::")
@example("")
@settings(max_examples=800, deadline=None)
def test_ipv6(text: str) -> None:
    assert parse_address(f"a@[IPv6:{text}]") == reference.mailbox(f"a@[IPv6:{text}]")


@given(st.ip_addresses())
@settings(max_examples=200, deadline=None)
def test_every_address_of_the_network_is_a_literal(address: object) -> None:
    text = str(address)
    tag = "IPv6:" if ":" in text else ""
    assert parse_address(f"a@[{tag}{text}]") == ("a", f"[{tag}{text}]".lower())


# --- replies --------------------------------------------------------------------------------

REPLIES = st.one_of(
    joined(
        b"250-a\r\n",
        b"250 b\r\n",
        b"250\r\n",
        b"250-\r\n",
        b"251-x\r\n",
        b"421 \xff\x01\xc3\xa9\r\n",
        b"200 x\r\n",
        b"599 x\r\n",
        b"354 \xc2\x85\xe2\x80\xa8\xef\xbf\xbd\r\n",
        most=8,
    ),
    joined(
        b"250", b"2", b"5", b"-", b" ", b"\r\n", b"\r", b"\n", b"a", b"x" * 30, b"\0", b"199 x\r\n", b"600 x\r\n", b"250_x\r\n", b"25\r\n"
    ),
)


@given(REPLIES, CUTS, st.sampled_from([(16, 40), (64, 64), (4096, 65536)]))
@settings(max_examples=800, deadline=None)
def test_replies(stream: bytes, cuts: Cuts, limits: tuple[int, int]) -> None:
    receiver = ReplyReceiver(*limits)
    got = []
    for read in cut(stream, cuts):
        receiver.feed(read)
        while (reply := receiver.reply()) is not None:
            got.append(reply)
        assert receiver.pending <= limits[1]
    assert (got, receiver.fault) == reference.replies(stream, *limits)
