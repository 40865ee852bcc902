"""The parser's edges by name: what broke others first, then what the contract promises.

Rows F, C, B and O1 name the table of bad input that ``docs`` and the transcripts use too.
"""

from __future__ import annotations

import ctypes
import gc
import random
import resource
import sys
import tracemalloc
import zlib
from typing import Any

import pytest

from gateway._parser import FLOOD_LIMIT, LINE_LIMIT, Command, ReadBuffer, Receiver, ReplyReceiver, crc32, parse_address, stuff
from tests import reference
from tests.fuzz.receiver import poured


def one(line: bytes) -> Command:
    receiver = Receiver()
    receiver.feed(line)
    command = receiver.command()
    assert command is not None
    assert receiver.pending == 0
    return command


def read_content(receiver: Receiver, *reads: bytes) -> bytes:
    pieces = []
    for read in reads:
        receiver.feed(read)
        while (piece := receiver.content()) is not None:
            pieces.append(piece)
    return b"".join(pieces)


def cuttings(octets: bytes) -> list[list[bytes]]:
    """Whole, octet by octet, and at every single place."""
    return [[octets], [octets[i : i + 1] for i in range(len(octets))], *([octets[:i], octets[i:]] for i in range(1, len(octets)))]


# --- the end of DATA ------------------------------------------------------------------------

#: F1: none of these ends the content; all of them make it unacceptable.
FALSE_ENDS = [
    *(b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\r.\r", b"\r.\n", b"\r.\r\n", b"\n.\r", b"\r\n.\r"),
    *(b"\r\n.\r\r\n", b"\r\r\n.\r\r\n", b"\n\n.\r\n", b"\r\n.\n\r\n", b"\n\r.\r\n", b"\r\n\n.\r\n"),
]


@pytest.mark.parametrize(
    "before", [b"", b"text", b"x" * 61, b"line\r\n", b"y" * 300 + b"\r\n"], ids=["first", "text", "61", "line", "long"]
)
@pytest.mark.parametrize("end", FALSE_ENDS, ids=repr)
def test_a_false_end_ends_nothing_and_is_a_fault(end: bytes, before: bytes) -> None:
    stream = before + end + b"text\r\nQUIT\r\n.\r\nNOOP\r\n"
    for reads in cuttings(stream) if len(stream) < 120 else [[stream], [stream[:250], stream[250:]]]:
        receiver = Receiver()
        handed = b""
        for read in reads:
            receiver.feed(read)
            while (piece := receiver.content()) is not None:
                handed += piece
        assert receiver.finished
        assert receiver.content_fault == "newline"
        assert b"QUIT" not in handed
        after = receiver.command()
        assert after is not None
        assert after.verb == "NOOP"
        assert receiver.command() is None


@pytest.mark.parametrize("octets", [b"\r\n\0.\r\n", b"\r\n.\0\r\n", b"a\0b\r\n", b"\r\0\n.\r\n", b"\r\n.\r\0\n"], ids=repr)
def test_nul_forms_end_nothing(octets: bytes) -> None:
    for reads in cuttings(octets):
        receiver = Receiver()
        read_content(receiver, *reads)
        assert not receiver.finished
        assert receiver.content_fault == "nul"
        assert read_content(receiver, b"\r\n.\r\n") == b""
        assert receiver.finished


def test_nul_before_a_true_end() -> None:
    """F4: the end is real, the NUL is a fault."""
    receiver = Receiver()
    assert read_content(receiver, b"\0\r\n.\r\n") == b""
    assert receiver.finished
    assert receiver.content_fault == "nul"


def test_nul_behind_a_true_end_belongs_to_the_next_command() -> None:
    """F4: the content is good; the NUL breaks the command line it begins."""
    receiver = Receiver()
    assert read_content(receiver, b"a\r\n.\r\n\0NOOP\r\n") == b"a\r\n"
    assert receiver.finished
    assert receiver.content_fault is None
    command = receiver.command()
    assert command is not None
    assert command.fault == "newline"


def test_an_end_as_the_first_octets_is_empty_content() -> None:
    """F5; smtp-proto never ends such a message."""
    for reads in cuttings(b".\r\n"):
        receiver = Receiver()
        assert read_content(receiver, *reads) == b""
        assert receiver.finished
        assert (receiver.size, receiver.longest, receiver.header_size, receiver.content_fault) == (0, 0, 0, None)


@pytest.mark.parametrize(
    ("wire", "said"),
    [
        (b"..x\r\n.\r\n", b".x\r\n"),
        (b".x\r\n.\r\n", b"x\r\n"),
        (b"..\r\n.\r\n", b".\r\n"),  # nodemailer loses this one when it is cut after the second dot
        (b"...\r\n.\r\n", b"..\r\n"),
        (b"a\r\n..\r\n...b\r\n.c\r\n.\r\n", b"a\r\n.\r\n..b\r\nc\r\n"),
        (b"a.\r\n.\r\n", b"a.\r\n"),
        (b"\r\n..\r\n\r\n.\r\n", b"\r\n.\r\n\r\n"),
    ],
)
def test_dots(wire: bytes, said: bytes) -> None:
    """F6, for the first line too, which smtp-proto leaves stuffed."""
    for reads in cuttings(wire):
        receiver = Receiver()
        assert read_content(receiver, *reads) == said
        assert receiver.finished
        assert receiver.content_fault is None
        assert receiver.size == len(said)
        assert receiver.pending == 0
    assert read_content(Receiver(), stuff(said) + b".\r\n") == said


@pytest.mark.parametrize("normalize", [False, True])
def test_dots_and_line_ends_at_every_place_of_a_block(normalize: bool) -> None:
    """The walk looks at 64 octets at a time: everything that spans octets must survive every border."""
    for before in range(200):
        for odd in (b".", b"..", b".\r\n..", b"\n.", b"\n.\r\n", b"\r.", b"\0", b"\xff", b"\r\n\r\n", b".\r"):
            wire = b"..\r\n" + b"x" * before + b"\r\n" + odd + b"y" * 70 + b"\r\n.z\r\n.\r\nQUIT\r\n"
            want = reference.content(wire, normalize)
            for cut in (len(wire), 4, before + 6, before + 7):
                receiver = Receiver(normalize=normalize)
                got = read_content(receiver, wire[:cut], wire[cut:])
                assert got == want.octets or (want.fault and want.octets.startswith(got))
                told = (receiver.content_fault, receiver.finished, receiver.size, receiver.longest, receiver.eight_bit, receiver.pending)
                assert told == (want.fault, True, want.size, want.longest, want.eight_bit, len(wire) - want.used)


def test_the_longest_line_may_begin_with_a_dot_at_every_place_of_a_block() -> None:
    for before in range(200):
        short = (b"x" * 10 + b"\r\n") * (before // 12) + b"x" * (before % 12) + b"\r\n"
        for length in (20, 59, 60, 61, 62, 63, 130):
            receiver = Receiver()
            receiver.feed(b"..\r\n" + short + b"." + b"y" * length + b"\r\n" + short)
            receiver.content()
            assert receiver.longest == length


def test_stuffing_at_every_place_of_a_block() -> None:
    for before in range(200):
        for odd in (b".", b"..\r\n.", b"\n.", b"\r."):
            octets = b"x" * before + b"\r\n" + odd + b"y" * 70
            assert stuff(octets) == reference.stuff(octets)


def test_what_follows_the_end_stays_pending() -> None:
    receiver = Receiver()
    receiver.feed(b"a\r\n.\r\nMAIL FROM:<>\r\n")
    assert receiver.content() == b"a\r\n"
    assert receiver.finished
    assert receiver.content() is None
    assert receiver.pending == 14
    receiver.begin()
    assert not receiver.finished
    command = receiver.command()
    assert command is not None
    assert command.verb == "MAIL"


def test_after_a_fault_nothing_is_handed_out_and_the_true_end_is_found() -> None:
    """go-smtp hands such octets on; mox and chasquid read on to the true end, as this does."""
    receiver = Receiver()
    receiver.begin()
    receiver.feed(b"good\r\n")
    assert receiver.content() == b"good\r\n"
    receiver.feed(b"also good\r\nbad\nline\r\n..x")
    assert receiver.content() is None
    assert receiver.content_fault == "newline"
    receiver.feed(b"\0\r\n.\r")
    assert receiver.content() is None
    assert not receiver.finished
    receiver.feed(b"\nRSET\r\n")
    assert receiver.content() is None
    assert receiver.finished
    assert receiver.content_fault == "newline"
    assert receiver.size == len(b"good\r\nalso good\r\nbad\nline\r\n.x\0\r\n")
    assert receiver.pending == 6


# --- normalize --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wire", "said"),
    [
        (b"a\nb\r\n.\r\n", b"a\r\nb\r\n"),
        (b"\n\n.\r\n.\r\n", b"\r\n\r\n.\r\n"),
        (b"a\n.\r\n.\r\n", b"a\r\n.\r\n"),
        (b"a\n..b\n.c\r\n.\r\n", b"a\r\n.b\r\nc\r\n"),
        (b"a\r\n.\nb\r\n.\r\n", b"a\r\n\r\nb\r\n"),
        (b"a\n.\nb\r\n.\r\n", b"a\r\n\r\nb\r\n"),
    ],
)
def test_normalize(wire: bytes, said: bytes) -> None:
    """F2: bare LF becomes CRLF, and still only CRLF.CRLF ends the content."""
    for reads in cuttings(wire):
        receiver = Receiver(normalize=True)
        assert read_content(receiver, *reads) == said
        assert receiver.finished
        assert receiver.content_fault is None
        assert receiver.pending == 0


@pytest.mark.parametrize("wire", [b"a\rb\r\n", b"a\r\r\n", b"\n.\rx\r\n"])
def test_normalize_still_refuses_a_bare_cr(wire: bytes) -> None:
    for reads in cuttings(wire + b"\r\n.\r\n"):
        receiver = Receiver(normalize=True)
        read_content(receiver, *reads)
        assert receiver.finished
        assert receiver.content_fault == "newline"


# --- zero copies --------------------------------------------------------------------------------

CLEAN = b"Subject: x\r\n\r\n" + b"".join(b"%d " % i * 12 + b"\r\n" for i in range(400))


@pytest.mark.parametrize(
    "octets", [CLEAN, b"a", b"\r\n", CLEAN + b"begun", CLEAN + b"\r", b"a\r\n", b"\xc3\xa9" * 1000, b"z" * 70000], ids=[*"abcdefgh"]
)
def test_clean_content_is_the_object_that_was_fed(octets: bytes) -> None:
    for normalize in (False, True):
        receiver = Receiver(normalize=normalize)
        receiver.begin()
        receiver.feed(octets)
        assert receiver.content() is octets
        assert receiver.pending == 0
        assert receiver.content() is None
    receiver.begin()
    receiver.feed(octets)
    assert receiver.chunk(len(octets)) is octets
    assert receiver.taken == len(octets)


def test_a_read_is_not_kept_alive_by_what_was_handed_out() -> None:
    data = bytearray(b"x" * 200000)
    data[:12] = b"a\r\n.\r\nNOOP\r\n"[:12]
    octets = bytes(data) + b"\r\n"
    before = sys.getrefcount(octets)
    receiver = Receiver()
    receiver.feed(octets)
    piece = receiver.content()
    assert piece == b"a\r\n"
    receiver.discard()
    assert sys.getrefcount(octets) == before


def test_a_begun_line_does_not_keep_the_read_alive() -> None:
    octets = b"NOOP\r\n" * 1000 + b"NOO"
    before = sys.getrefcount(octets)
    receiver = Receiver()
    receiver.feed(octets)
    while receiver.command() is not None:
        pass
    assert receiver.pending == 3
    assert sys.getrefcount(octets) == before


def test_a_read_with_dots_is_one_object() -> None:
    receiver = Receiver()
    receiver.feed(b"..a\r\n" * 1000)
    assert receiver.content() == b".a\r\n" * 1000
    assert receiver.content() is None


# --- reads into a buffer ----------------------------------------------------------------------------

CLEAN = b"Subject: x\r\n\r\n" + b"a line of clean text\r\n" * 4000


def where(octets: bytes | ReadBuffer) -> int:
    """The address of the first octet."""
    if isinstance(octets, bytes):
        return id(octets) + bytes.__basicsize__ - 1
    return ctypes.addressof(ctypes.c_char.from_buffer(octets.get_buffer(-1)))


@pytest.mark.parametrize("behind", [b"", b".\r\n", b".\r\nNOOP\r\n"])
def test_much_content_takes_the_memory_that_was_read_into(behind: bytes) -> None:
    receiver, buffer = Receiver(), ReadBuffer()
    receiver.begin()
    place = where(buffer)
    receiver.feed(poured(CLEAN + behind, buffer))
    piece = receiver.content()
    assert piece is not None
    assert where(piece) == place
    assert sys.getsizeof(piece) == sys.getsizeof(CLEAN)
    assert receiver.finished is bool(behind)
    assert receiver.pending == len(behind[3:])
    other = poured(b"x" * len(CLEAN), buffer)
    assert piece == CLEAN
    assert where(other) != place
    if behind[3:]:
        command = receiver.command()
        assert command is not None
        assert command.verb == "NOOP"


@pytest.mark.parametrize(
    "octets", [b"NOOP\r\n", b"short content\r\n.\r\n", b".\r\n", b"..stuffed\r\n" * 4000 + b".\r\n", b"bare\rCR" * 5000]
)
def test_what_does_not_take_it_gives_it_back(octets: bytes) -> None:
    receiver, buffer = Receiver(), ReadBuffer()
    receiver.begin()
    place = where(buffer)
    receiver.feed(poured(octets, buffer))
    if octets == b"NOOP\r\n":
        receiver.command()
    else:
        receiver.content()
    assert receiver.pending == 0
    assert where(buffer) == place


@pytest.mark.parametrize("lent", [CLEAN, b"MAIL FROM:<a@me.example>\r\nRCPT", b"DATA\r\n" + CLEAN])
def test_a_read_that_waits_leaves_the_buffer_to_the_next(lent: bytes) -> None:
    """A client that is not read on holds what it sent, not the whole buffer; and nobody reads into that."""
    waiting, buffer = Receiver(), ReadBuffer()
    place = where(buffer)
    waiting.feed(poured(lent, buffer))
    assert waiting.pending == len(lent)
    assert where(buffer) == place
    another = Receiver()
    another.feed(poured(b"NOOP\r\n" * 2000, buffer))
    while (command := another.command()) is not None:
        assert command.verb == "NOOP"
    waiting.begin()
    read = waiting.chunk(len(lent))
    assert read == lent
    waiting.feed(poured(b"y" * 40_000, buffer))
    assert waiting.pending == 40_000
    waiting.discard()
    assert waiting.pending == 0
    assert where(buffer) == place


def test_a_line_goes_on_from_one_read_to_the_next() -> None:
    receiver, buffer = Receiver(), ReadBuffer()
    said = []
    for octets in (b"QUIT\r\nNO", b"OP someth", b"ing\r\nRS"):
        receiver.feed(poured(octets, buffer))
        while (command := receiver.command()) is not None:
            said.append((command.verb, command.argument))
    assert said == [("QUIT", ""), ("NOOP", "something")]
    receiver.feed(b"ET\r\n")
    command = receiver.command()
    assert command is not None
    assert command.verb == "RSET"


def test_whoever_goes_with_a_read_takes_nothing_of_the_buffer() -> None:
    """Neither keeps the other: both go, in either order."""
    buffer = ReadBuffer()
    for _ in range(3):
        Receiver().feed(poured(b"NOOP", buffer))
        gone = Receiver()
        gone.feed(poured(b"QUIT\r\n", buffer))
        del gone
    receiver = Receiver()
    receiver.feed(poured(b"NOOP\r\n", buffer))
    before = sys.getrefcount(receiver)
    del buffer
    assert sys.getrefcount(receiver) == before == 2
    command = receiver.command()
    assert command is not None
    assert command.verb == "NOOP"


def test_a_buffer_says_what_it_has() -> None:
    buffer = ReadBuffer(100, 1)
    assert len(buffer) == 0
    assert buffer.head() == b""
    assert buffer.get_buffer(-1) is buffer
    with pytest.raises(ValueError, match="1 octets were not read into this"):
        buffer.filled(1)
    assert len(memoryview(buffer.get_buffer(-1))) == 100
    poured(b"x" * 99, buffer)
    assert len(buffer) == 99
    assert buffer.head() == b"x" * 64
    for wrong in (-1, 101):
        with pytest.raises(ValueError, match="were not read into this"):
            buffer.filled(wrong)
    receiver = Receiver()
    receiver.feed(buffer)
    assert len(buffer) == 0
    assert receiver.pending == 99
    receiver.feed(buffer)
    assert receiver.pending == 99
    receiver.discard()
    # The octets are back, and nothing was read into them since.
    with pytest.raises(ValueError, match="1 octets were not read into this"):
        buffer.filled(1)
    for size, taken in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="a buffer of"):
            ReadBuffer(size, taken)
    with pytest.raises(TypeError, match="str is neither bytes nor a ReadBuffer"):
        receiver.feed("text")  # type: ignore[arg-type]


# --- counters -------------------------------------------------------------------------------------


def test_a_line_of_64_mib_costs_no_memory() -> None:
    """F8: carried unchanged, read by read; ``longest`` tells."""
    receiver = Receiver()
    receiver.begin()
    read = b"x" * 2**18
    tracemalloc.start()
    for _ in range(256):
        receiver.feed(read)
        assert receiver.content() is read
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000
    assert held < 100_000
    assert receiver.longest == 2**26
    receiver.feed(b"\r\n.\r\n")
    assert receiver.content() == b"\r\n"
    assert receiver.finished
    assert receiver.longest == 2**26
    assert receiver.size == 2**26 + 2


@pytest.mark.parametrize(
    ("line", "longest"),
    [(b"a" * 998 + b"\r\n", 998), (b"a" * 999 + b"\r\n", 999), (b"." + b"." * 998 + b"\r\n", 998), (b"a" * 70, 70), (b"a\r", 1), (b"", 0)],
)
def test_longest_is_without_stuffing_and_crlf(line: bytes, longest: int) -> None:
    for before in (b"", b"b\r\n" * 50):
        receiver = Receiver()
        read_content(receiver, before + line)
        assert receiver.longest == max(longest, 1 if before else 0)


def test_header_counters() -> None:
    header = (
        b"Received: from a\r\n\tby b; Received: no\r\nRECEIVED : x\r\nReceived-SPF: pass\r\nSubject: Received: y\r\n received: folded\r\n"
    )
    octets = header + b"\r\nReceived: in the body\r\n"
    for reads in cuttings(octets):
        receiver = Receiver()
        read_content(receiver, *reads)
        assert (receiver.header_size, receiver.header_fields, receiver.hops) == (len(header), 4, 2)


@pytest.mark.parametrize("octets", [b"Received: a\r\nSubject: x\r\n\r\nbody\xff\r\n", b"a\nb\r\n", b"a\0b\r\n", b"unfinished", b""])
def test_all_facts_at_once_are_those_that_are_told_singly(octets: bytes) -> None:
    receiver = Receiver()
    for reads in cuttings(octets):
        receiver = Receiver()
        read_content(receiver, *reads)
        fault, size, longest, eight_bit, header_size, header_fields, hops = receiver.facts()
        assert (fault, size, longest, eight_bit) == (receiver.content_fault, receiver.size, receiver.longest, receiver.eight_bit)
        assert (header_size, header_fields, hops) == (receiver.header_size, receiver.header_fields, receiver.hops)


@pytest.mark.parametrize(
    "line",
    [
        "MAIL FROM:<a@b.Example> SIZE=3",
        "MAIL FROM:<>",
        'RCPT TO:<@x.example:"a b"@[192.0.2.1]> NOTIFY=NEVER',
        "RCPT TO:<postMaster>",
        "RCPT TO:<ä@Öbb.example>",
        "RCPT TO:<a@b",
        "NOOP a@b",
    ],
)
def test_a_path_at_once_is_what_is_told_singly(line: str) -> None:
    def command() -> Command:
        receiver = Receiver()
        receiver.feed(line.encode() + b"\r\n")
        found = receiver.command()
        assert found is not None
        return found

    once, singly = command(), command()
    assert once.path() == (singly.address, singly.local, singly.domain, singly.params, singly.ascii)
    assert once.params is once.path()[3]


def test_header_counters_see_what_was_unstuffed() -> None:
    receiver = Receiver()
    read_content(receiver, b".Received: a\r\n..x: y\r\n\r\n.\r\n")
    assert (receiver.header_fields, receiver.hops, receiver.header_size) == (2, 1, 20)


def test_binary_content_has_a_header_too() -> None:
    """A loop of BINARYMIME mail must be seen as any other."""
    receiver = Receiver()
    receiver.begin(binary=True)
    octets = b"Received: a\r\nReceived: b\r\n\r\n\0\n\r\xff"
    receiver.feed(octets)
    assert receiver.chunk(1000) is octets
    receiver.end()
    assert receiver.content_fault is None
    assert (receiver.hops, receiver.header_fields, receiver.size) == (2, 2, len(octets))


def test_begin_forgets_the_content_before() -> None:
    receiver = Receiver()
    read_content(receiver, b"Received: a\r\n\xff" + b"x" * 100 + b"\n\r\n.\r\n")
    assert receiver.content_fault == "newline"
    receiver.begin()
    assert (receiver.size, receiver.longest, receiver.eight_bit, receiver.header_size, receiver.header_fields, receiver.hops) == (
        0,
        0,
        False,
        0,
        0,
        0,
    )
    assert receiver.content_fault is None
    assert not receiver.finished
    assert read_content(receiver, b".\r\n") == b""
    assert receiver.finished


# --- BDAT ---------------------------------------------------------------------------------------------


def test_chunk_takes_no_more_than_its_own() -> None:
    receiver = Receiver()
    receiver.begin()
    receiver.feed(b".\r\n.\r\nRSET\r\n")
    assert receiver.chunk(6) == b".\r\n.\r\n"
    assert receiver.taken == 6
    command = receiver.command()
    assert command is not None
    assert command.verb == "RSET"
    assert receiver.chunk(5) is None
    assert receiver.taken == 0


def test_a_line_end_may_lie_across_chunks() -> None:
    receiver = Receiver()
    receiver.begin()
    receiver.feed(b"a\r")
    assert receiver.chunk(2) == b"a\r"
    receiver.feed(b"\nb\r")
    assert receiver.chunk(3) == b"\nb\r"
    assert receiver.content_fault is None
    receiver.end()
    assert receiver.content_fault == "newline"


def test_a_chunk_with_a_fault_is_taken_and_not_handed_out() -> None:
    receiver = Receiver()
    receiver.begin()
    receiver.feed(b"a\nbcdRSET\r\n")
    assert receiver.chunk(5) == b""
    assert receiver.taken == 5
    assert receiver.content_fault == "newline"
    assert receiver.pending == 6


@pytest.mark.parametrize("n", [0, -1])
def test_a_chunk_has_octets_to_come(n: int) -> None:
    receiver = Receiver()
    with pytest.raises(ValueError, match="to come"):
        receiver.chunk(n)


@pytest.mark.parametrize(
    "argument",
    [
        b"",
        b" -1",
        b" 1e9x",
        b" 99999999999999999999",
        b" 9223372036854775808",
        b" 0x10",
        b" +5",
        b" 5,",
        b" LAST",
        b" 5 LASTLY",
        b" 5 LAST LAST",
        b" 5 x",
    ],
)
def test_bdat_of_unknown_size(argument: bytes) -> None:
    """B1, and whatever else leaves it unclear what the following octets are."""
    command = one(b"BDAT" + argument + b"\r\n")
    assert (command.verb, command.fault, command.chunk_size, command.last) == ("BDAT", "chunk", 0, False)


@pytest.mark.parametrize(
    ("argument", "size", "last"),
    [
        (b"0 LAST", 0, True),
        (b"86", 86, False),
        (b"86 last", 86, True),
        (b"9223372036854775807", 2**63 - 1, False),
        (b"0", 0, False),
        (b"007", 7, False),
    ],
)
def test_bdat(argument: bytes, size: int, last: bool) -> None:
    command = one(b"bdat " + argument + b"\r\n")
    assert (command.verb, command.fault, command.chunk_size, command.last) == ("BDAT", None, size, last)


# --- command lines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [b"NOOP\n", b"NO\rOP\r\n", b"NOOP\r\r\n", b"NO\0OP\r\n", b"NOOP\t\r\n", b"NOOP \x1b[2J\r\n", b"NOOP\x7f\r\n", b"\n", b"\r\r\n"],
    ids=repr,
)
def test_controls_in_a_command(line: bytes) -> None:
    """C1: told once, at the LF; the next line is whole again."""
    for reads in cuttings(line):
        receiver = Receiver()
        for read in reads[:-1]:
            receiver.feed(read)
            assert receiver.command() is None
        receiver.feed(reads[-1] + b"QUIT\r\n")
        command = receiver.command()
        assert command is not None
        assert (command.fault, command.verb, command.argument) == ("newline", "", "")
        command = receiver.command()
        assert command is not None
        assert (command.fault, command.verb) == (None, "QUIT")


@pytest.mark.parametrize("step", [1, 100, 10**6])
def test_long_lines(step: int) -> None:
    """C2: 2,048 octets with CRLF are good, 2,049 are too long; told once."""
    assert LINE_LIMIT == 2048
    stream = b"NOOP " + b"x" * 2041 + b"\r\n" + b"NOOP " + b"y" * 2042 + b"\r\n" + b"z" * 65000 + b"\r\nQUIT\r\n"
    receiver = Receiver()
    faults = []
    for at in range(0, len(stream), step):
        receiver.feed(stream[at : at + step])
        while (command := receiver.command()) is not None:
            faults.append((command.verb, command.fault))
        assert receiver.pending < LINE_LIMIT
    assert faults == [("NOOP", None), ("", "long"), ("", "long"), ("QUIT", None)]


def test_a_flood_is_told_at_once_and_ends_reading() -> None:
    receiver = Receiver()
    told = 0
    for sent in range(1, FLOOD_LIMIT + 5000):
        receiver.feed(b"x")
        command = receiver.command()
        if command is not None:
            told += 1
            assert command.fault == "flood"
            assert sent == FLOOD_LIMIT + 1
        assert receiver.pending < LINE_LIMIT
    assert told == 1
    receiver.feed(b"\r\nNOOP\r\n")
    assert receiver.command() is None
    assert receiver.pending == 0


def test_memory_of_a_flood_is_bounded() -> None:
    receivers = [Receiver() for _ in range(100)]
    gc.collect()
    tracemalloc.start()
    for receiver in receivers:
        for _ in range(60):
            receiver.feed(b"x" * 1000)
            assert receiver.command() is None
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 100 * (LINE_LIMIT + 1000)


def test_a_small_receiver() -> None:
    """10,000 idle connections have one each."""
    assert sys.getsizeof(Receiver()) <= 256


def test_parsing_does_not_leak() -> None:
    receiver = Receiver(normalize=True)
    replies = ReplyReceiver()

    def turn() -> None:
        for _ in range(300):
            receiver.feed(
                b"MAIL FROM:<a@b.example> SIZE=1 X=\xc3\xa9\r\nRCPT TO:<\xff>\r\nRCPT TO:<a@b> A A\r\nx\ny\r\n" + b"z" * 3000 + b"\r\n"
            )
            while (command := receiver.command()) is not None:
                assert command.params is not None
            receiver.begin()
            receiver.feed(b"..a\nb\r\n" * 100 + b"\r\n.\r\nx")
            receiver.content()
            receiver.begin()
            receiver.feed(b"\0" + b"\r\n.a" * 100)
            receiver.content()
            receiver.discard()
            replies.feed(b"250-a\r\n250 \xffb\r\n2")
            assert replies.reply() is not None
            replies.discard()

    turn()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(30):
        turn()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 4 * 2**20


@pytest.mark.parametrize(
    "line", [b"NOOP \xff\r\n", b"MAIL FROM:<\xc3@b>\r\n", b"\xc0\x80\r\n", b"NOOP \xed\xa0\x80\r\n", b"NOOP \xf4\x90\x80\x80\r\n"], ids=repr
)
def test_broken_utf8(line: bytes) -> None:
    """C4: overlong forms, surrogates and code points past the last are no UTF-8."""
    command = one(line)
    assert (command.fault, command.verb, command.argument, command.ascii) == ("utf8", "", "", False)


def test_an_empty_line_is_a_command_without_a_verb() -> None:
    command = one(b"\r\n")
    assert (command.verb, command.fault, command.argument, command.ascii) == ("", None, "", True)


@pytest.mark.parametrize(
    ("line", "verb", "argument"),
    [
        (b"GET / HTTP/1.1", "GET", "/ HTTP/1.1"),
        (b"Subject: x", "SUBJECT:", "x"),
        (b"noop  a b  ", "NOOP", "a b"),
        (b"w" * 100, "W" * 64, ""),
        (b" NOOP", "", "NOOP"),
    ],
)
def test_unknown_verbs_are_told(line: bytes, verb: str, argument: str) -> None:
    command = one(line + b"\r\n")
    assert (command.verb, command.argument, command.fault, command.params) == (verb, argument, None, {})


def test_only_ascii_letters_have_a_case_in_verbs() -> None:
    assert one("ſTARTTLS\r\n".encode()).verb == "ſTARTTLS"
    assert one("é x\r\n".encode()).verb == "é"


@pytest.mark.parametrize(
    "line",
    [
        b"STARTTLS x",
        b"DATA x",
        b"RSET x",
        b"QUIT now",
        b"EHLO",
        b"HELO",
        b"EHLO a b",
        b"LHLO ",
        b"AUTH",
        b"AUTH PLAIN x y",
        b"VRFY",
        b"MAIL",
        b"MAIL FROM",
        b"RCPT TO",
        b"MAIL TO:<a@b>",
        b"RCPT FROM:<a@b>",
    ],
)
def test_arguments_that_do_not_fit(line: bytes) -> None:
    command = one(line + b"\r\n")
    assert command.fault == "syntax"
    assert command.address is None


@pytest.mark.parametrize(
    "line",
    [
        b"DATA",
        b"data ",
        b"RSET",
        b"QUIT",
        b"STARTTLS",
        b"EHLO a_b",
        b"EHLO [1.2.3.4]",
        b"NOOP",
        b"NOOP x y",
        b"HELP",
        b"VRFY a b",
        b"EXPN",
        b"AUTH PLAIN",
        b"AUTH PLAIN =",
    ],
)
def test_arguments_that_fit(line: bytes) -> None:
    assert one(line + b"\r\n").fault is None


# --- MAIL and RCPT -------------------------------------------------------------------------------------------


def mail(path: str) -> Command:
    return one(f"MAIL FROM:{path}\r\n".encode())


@pytest.mark.parametrize(
    ("path", "address", "local", "domain"),
    [
        ("<>", "", "", ""),
        ("<a@b>", "a@b", "a", "b"),
        (" <a@B.Example>", "a@B.Example", "a", "b.example"),
        ("<A.b+c=d%e!f@x-1.example>", "A.b+c=d%e!f@x-1.example", "A.b+c=d%e!f", "x-1.example"),
        ('<"a b"@c>', '"a b"@c', '"a b"', "c"),
        ('<"a\\"@\\\\>"@c>', '"a\\"@\\\\>"@c', '"a\\"@\\\\>"', "c"),
        ('<""@c>', '""@c', '""', "c"),
        ('<"u@x"@us>', '"u@x"@us', '"u@x"', "us"),
        ("<a@[192.0.2.1]>", "a@[192.0.2.1]", "a", "[192.0.2.1]"),
        ("<a@[IPv6:2001:DB8::1]>", "a@[IPv6:2001:DB8::1]", "a", "[ipv6:2001:db8::1]"),
        ("<a@[X.400:c=US;a= ]>", None, "", ""),
        ("<a@[X400:c=US;a=x]>", "a@[X400:c=US;a=x]", "a", "[x400:c=us;a=x]"),
        ("<用户@例え.Example>", "用户@例え.Example", "用户", "例え.example"),
        ("<a@BÜCHER.example>", "a@BÜCHER.example", "a", "bücher.example"),
        ("<" + "v" * 200 + "@b>", "v" * 200 + "@b", "v" * 200, "b"),
        ("<a@" + "b" * 63 + ">", "a@" + "b" * 63, "a", "b" * 63),
    ],
)
def test_paths(path: str, address: str | None, local: str, domain: str) -> None:
    command = mail(path)
    assert command.fault == (None if address is not None else "path")
    assert (command.address, command.local, command.domain) == (address, local, domain)
    assert command.ascii == path.isascii()


@pytest.mark.parametrize(
    "path",
    [
        *(
            "<a>",
            "<@>",
            "<a@>",
            "<@b>",
            "<a@b",
            "<a@b.>",
            "<a@.b>",
            "<a@b..c>",
            "<.a@b>",
            "<a.@b>",
            "<a..b@c>",
            "<a@b@c>",
            "<a b@c>",
            "<a@-b>",
            "<a@b->",
            "<a@b_c>",
        ),
        *(
            "<a@[1.2.3]>",
            "<a@[1.2.3.256]>",
            "<a@[1.2.3.04]>",
            "<a@[1.2.3.4>",
            "<a@[]>",
            "<a@[IPv6:]>",
            "<a@[IPv6:1::2::3]>",
            "<a@[:x]>",
            "<a@[x:]>",
            "<a@[x]>",
            "<a@[1.2.3.4]x>",
        ),
        *('<"a@b>', '<"a"b@c>', '<a"b"@c>', '<"a\\é"@c>', "<<a@b>>", "< a@b>", "<a@b >", "<a;b@c>x;", "<a(b@c>", "<a,b@c>", "<postmaster>"),
        *("<a@" + "b" * 64 + ">", "<a@" + "é" * 32 + ">", "<" + "a" * 253 + "@b>", "<a@" + ".".join(["b" * 63] * 4) + ">"),
        *(
            "<a\x85b@c>",
            "<a\u2028@c>",
            '<"\u2029"@c>',
            "<a@b\x9f>",
            "<@a,b:c@d>",
            "<@a:>",
            "<@a,:b@c>",
            "<@a>",
            "<@a b:c@d>",
            "<@" + "a" * 64 + ":b@c>",
        ),
    ],
)
def test_what_is_no_path(path: str) -> None:
    """C5, R1, R2."""
    for line in (f"MAIL FROM:{path}", f"RCPT TO:{path}" if path != "<postmaster>" else "RCPT TO:<>"):
        command = one(line.encode() + b"\r\n")
        assert command.fault == "path"
        assert command.address is None
        assert (command.local, command.domain, command.params, command.source_routed) == ("", "", {}, False)


@pytest.mark.parametrize("path", ["a@b", "", "a@b>", '"<a@b>"', "  <a@b>", "<a@b>x", "<>x", "<a@b>>", "<a@b>SIZE=1"])
def test_paths_without_brackets_or_with_a_tail(path: str) -> None:
    command = mail(path)
    assert command.fault == "syntax"
    assert (command.address, command.local, command.domain) == (None, "", "")


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("<" + "a" * 252 + "@b>", None),
        ("<" + "a" * 253 + "@b>", "path"),
        ("<@r:" + "a" * 249 + "@b>", None),
        ("<@r:" + "a" * 250 + "@b>", "path"),
    ],
)
def test_a_path_has_256_octets_with_its_brackets(path: str, fault: str | None) -> None:
    """RFC 5321 §4.5.3.1.3, source route and punctuation included."""
    assert len(path) == 256 + (fault is not None) or path.startswith("<@r:")
    assert mail(path).fault == fault


@pytest.mark.parametrize("route", ["@a:", "@a,@b.example:"])
def test_source_routes_are_read_over(route: str) -> None:
    command = one(f"RCPT TO:<{route}u%x@us>\r\n".encode())
    assert (command.fault, command.address, command.local, command.domain, command.source_routed) == (None, "u%x@us", "u%x", "us", True)


@pytest.mark.parametrize("path", ["<postmaster>", "<Postmaster>", "<POSTMASTER>"])
def test_postmaster_needs_no_domain(path: str) -> None:
    command = one(f"RCPT TO:{path}\r\n".encode())
    assert (command.fault, command.address, command.local, command.domain) == (None, path[1:-1], "postmaster", "")


def test_every_parameter() -> None:
    command = one(b"MAIL FROM:<a@b> SIZE=1000 BODY=BINARYMIME smtputf8 RET=HDRS ENVID=QQ+3D1 AUTH=<> mt-priority=3 X=\xc3\xa9\r\n")
    assert command.fault is None
    assert list(command.params.items()) == [
        *(
            ("SIZE", "1000"),
            ("BODY", "BINARYMIME"),
            ("SMTPUTF8", None),
            ("RET", "HDRS"),
            ("ENVID", "QQ+3D1"),
            ("AUTH", "<>"),
            ("MT-PRIORITY", "3"),
            ("X", "é"),
        ),
    ]
    assert not command.ascii
    assert one(b"RCPT TO:<a@b>  NOTIFY=SUCCESS,DELAY  ORCPT=rfc822;a+40b \r\n").params == {
        "NOTIFY": "SUCCESS,DELAY",
        "ORCPT": "rfc822;a+40b",
    }


@pytest.mark.parametrize(
    ("params", "fault"),
    [
        (" SIZE=", "parameter"),
        (" =1", "parameter"),
        (" -X=1", "parameter"),
        (" A=b=c", "parameter"),
        (" A_B", "parameter"),
        (" é", "parameter"),
        (" SIZE=1 size=1", "duplicate"),
        (" A a", "duplicate"),
        (" A A=", "parameter"),
        (" A A B=", "duplicate"),
    ],
)
def test_parameters_that_are_none(params: str, fault: str) -> None:
    command = mail("<a@b>" + params)
    assert command.fault == fault
    assert command.address == "a@b"
    assert command.params == {}


def test_two_commands_do_not_share_their_parameters() -> None:
    first, second = one(b"NOOP\r\n"), one(b"NOOP\r\n")
    first.params["X"] = None
    assert first.params == {"X": None}
    assert second.params == {}


def test_addresses() -> None:
    assert parse_address('"a b"@Example.ORG') == ('"a b"', "example.org")
    assert parse_address("postmaster") is None
    assert parse_address("") is None
    assert parse_address("<a@b>") is None
    assert parse_address("@r:a@b") is None
    assert parse_address("a@b\r\n") is None
    assert parse_address('"\t"@b') is None
    assert parse_address("\udcff@b") is None


# --- AUTH lines -----------------------------------------------------------------------------------------------


def test_lines() -> None:
    """C3: 12,288 octets with CRLF are good."""
    receiver = Receiver()
    receiver.feed(b"x" * 12286 + b"\r\n" + b"y" * 12287 + b"\r\n*\r\na\nb\r\n\xff=\r\n")
    assert receiver.line(12288) == b"x" * 12286
    assert receiver.line_fault is None
    assert (receiver.line(12288), receiver.line_fault) == (b"", "long")
    assert (receiver.line(12288), receiver.line_fault) == (b"*", None)
    assert (receiver.line(12288), receiver.line_fault) == (b"", "newline")
    assert (receiver.line(12288), receiver.line_fault) == (b"b", None)
    assert (receiver.line(12288), receiver.line_fault) == (b"\xff=", None)
    assert receiver.line(12288) is None
    receiver.feed(b"z" * (FLOOD_LIMIT + 1))
    assert (receiver.line(12288), receiver.line_fault) == (b"", "flood")
    assert receiver.line(12288) is None


# --- the caller's side of the contract ---------------------------------------------------------------------------


def test_the_caller_is_told_when_it_breaks_the_contract() -> None:
    with pytest.raises(ValueError, match="line_limit"):
        Receiver(line_limit=1)
    with pytest.raises(ValueError, match="line_limit"):
        Receiver(line_limit=FLOOD_LIMIT + 1)
    with pytest.raises(ValueError, match="limit"):
        Receiver().line(1)
    with pytest.raises(ValueError, match="limits"):
        ReplyReceiver(line_limit=4)
    wrong: list[Any] = [bytearray(b"x"), memoryview(b"x"), "x", None]
    for octets in wrong:
        with pytest.raises(TypeError):
            Receiver().feed(octets)
        with pytest.raises(TypeError):
            ReplyReceiver().feed(octets)


def test_nothing_is_there_before_it_is_fed() -> None:
    receiver = Receiver()
    receiver.feed(b"")
    assert receiver.command() is None
    assert receiver.content() is None
    assert receiver.line(100) is None
    assert receiver.chunk(1) is None
    assert receiver.pending == 0
    receiver.discard()
    receiver.feed(b"MAIL FROM:<>\r\nRCPT")
    assert receiver.pending == 18
    receiver.discard()
    assert receiver.pending == 0
    assert receiver.command() is None


# --- stuffing --------------------------------------------------------------------------------------------------------


def test_stuffing() -> None:
    assert stuff(b".") == b".."
    assert stuff(b".", line_start=False) == b"."
    assert stuff(b".a\r\n.\r\n..b\n.c\r.d\r\n") == b"..a\r\n..\r\n...b\n.c\r.d\r\n"
    assert stuff(b"") == b""
    for clean in (CLEAN, b"a", b"\n.", b"\r."):
        assert stuff(clean) is clean
    dotted = b".\r\n" * 5000
    assert stuff(dotted) == b"..\r\n" * 5000


# --- replies of an upstream ---------------------------------------------------------------------------------------------


def test_replies() -> None:
    for reads in cuttings(b"220 hi\r\n250-a\r\n250-\r\n250\r\n354 go\r\n"):
        receiver = ReplyReceiver()
        got = []
        for read in reads:
            receiver.feed(read)
            while (reply := receiver.reply()) is not None:
                got.append(reply)
        assert got == [(220, ["hi"]), (250, ["a", "", ""]), (354, ["go"])]
        assert receiver.fault is None
        assert receiver.pending == 0


@pytest.mark.parametrize(
    ("octets", "fault"),
    [
        (b"250 x\n", "newline"),
        (b"250 x\ry\r\n", "newline"),
        (b"250 x\r\r\n", "newline"),
        (b"hello\r\n", "syntax"),
        (b"\r\n", "syntax"),
        (b"25\r\n", "syntax"),
        (b"250x\r\n", "syntax"),
        (b"199 x\r\n", "syntax"),
        (b"600 x\r\n", "syntax"),
        (b"250-a\r\n251 b\r\n", "syntax"),
        (b"250-a\r\n421 b\r\n", "syntax"),
        (b"250 " + b"x" * 2**21 + b"\r\n", "long"),
        (b"250-x\r\n" * 100_000 + b"250 x\r\n", "long"),
        (b"x" * 4096, "long"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_reply(octets: bytes, fault: str) -> None:
    """O1: bounded, told, and nothing follows."""
    for step in (len(octets), 1000):
        receiver = ReplyReceiver()
        for at in range(0, len(octets), step):
            receiver.feed(octets[at : at + step])
            assert receiver.reply() is None
            assert receiver.pending <= max(65536, step)
        assert receiver.fault == fault
        receiver.feed(b"250 ok\r\n")
        assert receiver.reply() is None
        assert receiver.pending == 0


def test_a_reply_that_fills_its_limit_and_goes_on_is_long() -> None:
    """At once: what would come next cannot be part of it, however it is cut into reads."""
    octets = b"250-a\r\n" * 4 + b"250-\r\n" * 2
    for reads in cuttings(octets):
        receiver = ReplyReceiver(16, len(octets))
        for read in reads:
            assert receiver.fault is None
            receiver.feed(read)
            assert receiver.reply() is None
        assert receiver.fault == "long"


def test_a_good_reply_before_a_bad_one_is_told() -> None:
    receiver = ReplyReceiver()
    receiver.feed(b"250 ok\r\n250 bad\n")
    assert receiver.reply() == (250, ["ok"])
    assert receiver.fault is None
    assert receiver.reply() is None
    assert receiver.fault == "newline"


def test_reply_texts_are_harmless() -> None:
    receiver = ReplyReceiver()
    receiver.feed(b"550 a\0b\x1b[2J\t\x7f\xff\xc2\x85\xe2\x80\xa8 \xc3\xa9\r\n")
    assert receiver.reply() == (550, ["a?b?[2J????? é"])


def test_replies_that_came_too_early_are_pending() -> None:
    """Before TLS starts the client looks here, whether or not it has asked for a reply."""
    receiver = ReplyReceiver()
    receiver.feed(b"220 go\r\n250-injected\r\n250-mo")
    assert receiver.reply() == (220, ["go"])
    assert receiver.pending == 20
    assert receiver.reply() is None
    assert receiver.pending == 20
    receiver.discard()
    assert receiver.pending == 0
    receiver.feed(b"250 ok\r\n")
    assert receiver.reply() == (250, ["ok"])


def test_auth_lines_may_be_longer() -> None:
    for verb, length, fault in (
        ("AUTH", 100, None),
        ("auth", 101, "long"),
        ("AUTHX", 51, "long"),
        ("NOOP", 51, "long"),
        ("NOOP", 50, None),
    ):
        line = f"{verb} ".encode() + b"x" * (length - len(verb) - 3) + b"\r\n"
        assert len(line) == length
        for size in (len(line), 1, 7):
            receiver = Receiver(50, auth_limit=100)
            commands = []
            for at in range(0, len(line), size):
                receiver.feed(line[at : at + size])
                while (command := receiver.command()) is not None:
                    commands.append(command)
            assert [command.fault for command in commands] == [fault], (verb, length, size)
    for wrong in (-1, FLOOD_LIMIT + 1):
        with pytest.raises(ValueError, match="auth_limit"):
            Receiver(auth_limit=wrong)


def test_the_checksum_is_that_of_zlib_for_every_length_place_and_beginning() -> None:
    chance = random.Random(3720)
    octets = chance.randbytes(2**20 + 64)
    sizes = [*range(600), 1023, 1024, 1025, 102_400, 2**18 - 1, 2**18, 2**18 + 1, 2**20 + 5]
    for number, size in enumerate(sizes):
        at = number % 33
        piece = octets[at : at + size]
        begun = chance.getrandbits(32)
        assert crc32(piece) == zlib.crc32(piece), size
        assert crc32(piece, begun) == zlib.crc32(piece, begun), size
    for same in (b"\0", b"\xff"):
        assert crc32(same * 5000) == zlib.crc32(same * 5000)
    whole = 0
    for at in range(0, len(octets), 7777):
        whole = crc32(octets[at : at + 7777], whole)
    assert whole == zlib.crc32(octets)
    for wrong in ("text", None, 7):
        with pytest.raises(TypeError):
            crc32(wrong)  # type: ignore[arg-type]  # a damaged column may hold any of these
