"""Target: the Receiver and what stands beside it (``stuff``, ``parse_address``), against ``tests/reference.py``.

The first octets choose what is read (``READINGS``), with which limits and in which pieces; the
rest is what the client sends. ``probe``: the reader keeps its own promises. ``check``: the oracle
agrees, and as that one knows no pieces, the cut makes no difference either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from gateway._parser import Command, ReadBuffer, Receiver, parse_address, stuff

from .. import reference
from .inputs import cut, stretched

LINE_LIMITS = (40, 300, 2048, 65536)
AUTH_LIMITS = (0, 100, 12288, 12288)
#: Contents take their memory along so early that most inputs have both.
TAKEN = 16
#: What was told: commands, lines with their fault, contents, how the reading ended.
Told = list[object]


@dataclass(frozen=True)
class Plan:
    """``sizes``: of the pieces that are fed; ``lent``: in a ReadBuffer. ``chunks``: octets announced by each BDAT in turn."""

    reading: int
    normalize: bool
    binary: bool
    odd: bool
    lent: bool
    limit: int
    auth_limit: int
    sizes: tuple[int, int]
    stream: bytes

    @property
    def chunks(self) -> tuple[int, int]:
        return self.sizes[1], self.limit


def plan(data: bytes) -> Plan | None:
    if len(data) < 5:
        return None
    flags, limits = data[1], data[2]
    return Plan(
        data[0] & 7,
        bool(flags & 1),
        bool(flags & 2),
        bool(flags & 4),
        bool(flags & 8),
        LINE_LIMITS[limits & 3],
        AUTH_LIMITS[limits >> 2 & 3],
        (data[3] + 1, data[4] + 1),
        stretched(data[5:]),
    )


# --- what the parser tells ------------------------------------------------------------------


def poured(octets: bytes, buffer: ReadBuffer) -> ReadBuffer:
    """As if they had been read into it."""
    with memoryview(buffer.get_buffer(-1)) as room:
        room[: len(octets)] = octets
    buffer.filled(len(octets))
    return buffer


def heard(command: Command) -> reference.Said:
    assert command.path() == (command.address, command.local, command.domain, command.params, command.ascii)
    return reference.Said(
        verb=command.verb,
        fault=command.fault,
        argument=command.argument,
        address=command.address,
        local=command.local,
        domain=command.domain,
        source_routed=command.source_routed,
        ascii=command.ascii,
        params=command.params,
        chunk_size=command.chunk_size,
        last=command.last,
    )


def told(receiver: Receiver, octets: bytes, used: int) -> reference.Content:
    assert receiver.facts() == (
        receiver.content_fault,
        receiver.size,
        receiver.longest,
        receiver.eight_bit,
        receiver.header_size,
        receiver.header_fields,
        receiver.hops,
    )
    return reference.Content(
        octets=octets,
        fault=receiver.content_fault,
        finished=receiver.finished,
        used=used,
        eight_bit=receiver.eight_bit,
        longest=receiver.longest,
        header_size=receiver.header_size,
        header_fields=receiver.header_fields,
        hops=receiver.hops,
    )


def compare(got: reference.Content, size: int, want: reference.Content) -> None:
    """All the same; only what is handed out before a fault depends on the cuts, and is a beginning."""
    assert size == want.size, f"{size} octets, not {want.size}"
    if want.fault:
        assert want.octets.startswith(got.octets)
        got = replace(got, octets=want.octets)
    assert asdict(got) == asdict(want)


@dataclass
class Piled:
    """One content as it came, with its size as it was told."""

    content: reference.Content
    size: int


class Reader:
    """Reads one stream to its end, whatever it says: commands; behind DATA its content, behind BDAT
    its chunk, behind AUTH a line. ``only`` keeps to one way of reading."""

    def __init__(self, plan: Plan, only: str = "") -> None:
        self.plan = plan
        self.receiver = Receiver(plan.limit, plan.normalize, plan.auth_limit)
        self.buffer = ReadBuffer(len(plan.stream) or 1, TAKEN) if plan.lent else None
        self.only = only
        self.told: Told = []
        self.way = only or "command"
        self.fed = 0
        self.begun = 0
        self.left = 0
        self.last = False
        self.open = False  # chunks of a content came, its last one did not
        self.turn = 0
        self.pieces: list[bytes] = []
        if only in ("content", "chunk"):
            self.receiver.begin(plan.binary and only == "chunk")

    def read(self, pieces: Sequence[bytes]) -> Told:
        for piece in pieces:
            self.fed += len(piece)
            self.receiver.feed(piece if self.buffer is None else poured(piece, self.buffer))
            while getattr(self, f"_{self.way}")():
                pass
            pending = self.receiver.pending
            if self.way in ("command", "line"):
                assert pending < max(self.plan.limit, self.plan.auth_limit), "more is held than a line may have"
            elif not (self.only and self.receiver.finished):
                assert pending == 0, "content is held back"
        if self.way in ("content", "chunk"):
            self._pile()
        return self.told

    def _pile(self) -> None:
        # Over several chunks the octets of the wire are not counted.
        used = self.fed - self.receiver.pending - self.begun if self.way == "content" else 0
        self.told.append(Piled(told(self.receiver, b"".join(self.pieces), used), self.receiver.size))

    def _command(self) -> bool:
        command = self.receiver.command()
        if command is None:
            return False
        self.told.append(heard(command))
        if self.only or command.fault is not None:
            return True
        if command.verb == "DATA":
            self.receiver.begin()
            self.way = "content"
            self.open = False
            self.pieces = []
            self.begun = self.fed - self.receiver.pending
        elif command.verb == "BDAT":
            if not self.open:
                self.receiver.begin(self.plan.binary)
                self.pieces = []
            self.open = True
            self.way = "chunk"
            self.left, self.last = command.chunk_size, command.last
            if not self.left:
                self._chunk_over()
        elif command.verb == "AUTH":
            self.way = "line"
        return True

    def _line(self) -> bool:
        text = self.receiver.line(self.plan.auth_limit or self.plan.limit)
        if text is None:
            return False
        self.told.append((text, self.receiver.line_fault))
        self.way = self.only or "command"
        return True

    def _content(self) -> bool:
        piece = self.receiver.content()
        if piece is not None:
            assert piece, "an empty piece says nothing"
            assert self.receiver.content_fault is None, "octets were handed out together with a fault"
            self.pieces.append(piece)
        if self.receiver.finished and not self.only:
            self._pile()
            self.pieces = []
            self.way = "command"
            return True
        return piece is not None

    def _chunk(self) -> bool:
        receiver = self.receiver
        if self.only and not self.left:
            self.left = self.plan.chunks[self.turn % 2]
            self.turn += 1
        piece = receiver.chunk(self.left)
        if piece is None:
            assert receiver.taken == 0
            return False
        assert 0 < receiver.taken <= self.left
        assert piece == b"" or receiver.content_fault is None
        self.left -= receiver.taken
        self.pieces.append(piece)
        if not self.left and not self.only:
            self._chunk_over()
        return True

    def _chunk_over(self) -> None:
        if self.last:
            self.receiver.end()
            self.open = False
        self._pile()
        self.way = "command"


# --- what it should tell ----------------------------------------------------------------------


def expected(plan: Plan) -> Told:
    """What ``Reader`` must tell of the whole stream, by the oracle."""
    stream = plan.stream
    wanted: Told = []
    chunks: bytes | None = None
    while (cut := reference.first_command(stream, plan.limit, plan.auth_limit)) is not None:
        said, stream = cut
        wanted.append(said)
        if said.fault is not None:
            continue
        if said.verb == "DATA":
            content = reference.content(stream, plan.normalize)
            wanted.append(content)
            if not content.finished:
                break
            stream = stream[content.used :]
            chunks = None
        elif said.verb == "BDAT":
            size = said.chunk_size
            here, stream = stream[:size], stream[size:]
            whole = len(here) == size
            chunks = (chunks or b"") + here
            told = reference.chunks(chunks, plan.normalize, plan.binary, ended=whole and said.last)
            told.used = 0
            wanted.append(told)
            if not whole:
                break
            if said.last:
                chunks = None
        elif said.verb == "AUTH":
            line = reference.cut_line(stream, plan.auth_limit or plan.limit)
            if line is None:
                break
            wanted.append((line[0], line[1]))
            stream = line[2]
    return wanted


def agree(got: Told, wanted: Told) -> None:
    for one, other in zip(got, wanted, strict=False):
        if isinstance(one, Piled):
            assert isinstance(other, reference.Content)
            compare(one.content, one.size, other)
        else:
            assert one == other, f"{one}, not {other}"
    assert len(got) == len(wanted), f"{len(got)} things were read, not {len(wanted)}: {got[len(wanted) :]} {wanted[len(got) :]}"


# --- the ways to read -------------------------------------------------------------------------


def _expected_lines(plan: Plan) -> Told:
    return [*reference.lines(plan.stream, plan.auth_limit or plan.limit)]


def _expected_chunks(plan: Plan) -> Told:
    told = reference.chunks(plan.stream, plan.normalize, plan.binary)
    told.used = 0
    return [told]


READINGS: dict[int, tuple[str, Callable[[Plan], Told]]] = {
    0: ("", expected),
    1: ("command", lambda plan: [*reference.commands(plan.stream, plan.limit, plan.auth_limit)]),
    2: ("line", _expected_lines),
    3: ("content", lambda plan: [reference.content(plan.stream, plan.normalize)]),
    4: ("chunk", _expected_chunks),
}
STUFFING, ADDRESS = 5, 6


def _read(plan: Plan, *sizes: int) -> Told:
    return Reader(plan, READINGS[plan.reading % 7][0]).read(cut(plan.stream, *sizes))


def probe(data: bytes) -> None:
    made = plan(data)
    if made is None:
        return
    if made.reading == STUFFING:
        stuffed = stuff(made.stream, made.odd)
        assert len(stuffed) >= len(made.stream)
    elif made.reading == ADDRESS:
        parse_address(made.stream.decode("utf-8", "surrogateescape"))
    else:
        _read(made, *made.sizes)


def check(data: bytes) -> None:
    made = plan(data)
    if made is None:
        return
    if made.reading == STUFFING:
        stuffed = stuff(made.stream, made.odd)
        assert stuffed == reference.stuff(made.stream, made.odd)
        assert stuffed is made.stream or stuffed != made.stream
    elif made.reading == ADDRESS:
        text = made.stream.decode("utf-8", "surrogateescape")
        assert parse_address(text) == reference.mailbox(text)
    else:
        agree(_read(made, *made.sizes), READINGS[made.reading % 7][1](made))
