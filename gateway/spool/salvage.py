"""What can still be read of a database that SQLite will not read any more.

Owns the way from damaged pages to rows: the database file with its WAL laid over it, the trees
of our two tables walked page by page, each record taken for itself. Every row bears checksums
of its own (``records.py``), so a damaged page costs the rows that were hit and no others; what
does not fit its sum is handed on all the same, and is set aside by whoever reads it.
Reads only; blocks. Knows nothing of SQLite's library, since that stops at the first bad page.

Which pages count: those that the tables' trees reach; where an inner page of a tree was hit,
also every leaf that neither the list of free pages nor the page map calls free. What was
deleted is never brought back from a page that is known to be free.

File format: https://www.sqlite.org/fileformat2.html (pages §1.6, cells, overflow, freelist
§1.5, pointer map §1.8, WAL §4).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite

from .files import Files
from .records import MESSAGE_WIDTH, PENDING_WIDTH, SHIFT, Columns, Value, message_sum, pending_sum

#: Where the roots of the tables may lie, if the schema cannot be read: the table of messages behind
#: the header and the first page map, the other behind it and its indexes, of which schema 1 had one less.
_GUESSED = (3, 5, 6)

_INNER, _LEAF = 5, 13
_FREE = 2
_WAL_MAGIC = (0x377F0682, 0x377F0683)
_WAL_HEADER, _FRAME_HEADER = 32, 24

#: No key is as large in the life of a spool; one that is was hit.
_KEYS = 1 << 58

#: The sink of a row that was made because what a message owes was lost: no sink has this name.
LOST = "(damaged)"


class _BadError(Exception):
    """This page or cell is not what it should be."""


@dataclass(slots=True)
class Salvaged:
    """``messages`` and ``pendings``: columns as they are inserted. ``unread``: cells of which
    nothing could be told, ``pages``: pages."""

    messages: list[Columns] = field(default_factory=list)
    pendings: list[Columns] = field(default_factory=list)
    unread: int = 0
    pages: int = 0
    aside: int = 0


@dataclass(slots=True)
class WalScan:
    """A WAL read by its frame headers alone: where the frames of its generation lie, and after
    which of them a transaction was complete."""

    page_size: int = 0
    places: list[tuple[int, int]] = field(default_factory=list)  # page number, offset of its octets
    commits: list[int] = field(default_factory=list)  # frames up to and with the one that commits


def scan_wal(path: str, files: Files) -> WalScan:
    """Raises OSError. A file that is missing or no WAL has no frames."""
    found = WalScan()
    try:
        descriptor = files.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return found
    try:
        size = files.size(descriptor)
        header = os.pread(descriptor, _WAL_HEADER, 0)
        if size < _WAL_HEADER + _FRAME_HEADER:
            return found
        magic, _, page_size = struct.unpack_from(">III", header)
        if magic not in _WAL_MAGIC or page_size not in (512 << shift for shift in range(8)):
            page_size = 8192
        found.page_size = page_size
        # Without its header a WAL is what its first frame says.
        generation = header[16:24] if _sound(header) else b""
        at = _WAL_HEADER
        while at + _FRAME_HEADER + page_size <= size:
            page, commit, salt = struct.unpack(">II8s", os.pread(descriptor, 16, at))
            generation = generation or salt
            if salt[:4] == _following(generation):
                # It was begun anew, and all that was in it is in the database; only its header is still the old one.
                return WalScan(page_size)
            if salt == generation and page:
                found.places.append((page, at + _FRAME_HEADER))
                if commit:
                    found.commits.append(len(found.places))
            else:
                # A frame of an earlier generation ends it, one whose own header was hit does not.
                following = os.pread(descriptor, 16, at + _FRAME_HEADER + page_size)
                if following[8:16] != generation:
                    break
                found.places.append((0, 0))
            at += _FRAME_HEADER + page_size
    finally:
        files.close(descriptor)
    return found


def _sound(header: bytes) -> bool:
    """Does the checksum of a WAL's header fit?"""
    words = struct.unpack("<6I" if header[3] == _WAL_MAGIC[0] & 0xFF else ">6I", header[:24])
    first = second = 0
    for word, other in zip(words[::2], words[1::2], strict=True):
        first = (first + word + second) & 0xFFFFFFFF
        second = (second + other + first) & 0xFFFFFFFF
    return struct.unpack(">II", header[24:32]) == (first, second)


def _following(generation: bytes) -> bytes:
    """The first half of the salts of the next generation."""
    return ((int.from_bytes(generation[:4], "big") + 1) & 0xFFFFFFFF).to_bytes(4, "big")


def cut_short(scan: WalScan, frames: int) -> bool:
    """SQLite read ``frames`` of this WAL. Was it stopped by damage, and not where the power went?

    A transaction is written after the one before it was synced. So of what lies behind the end
    only the last transaction can be torn: two that are complete mean that the first of them, and
    all before it, had been on the disk."""
    return sum(commit > frames for commit in scan.commits) >= 2


class Pages:
    """The database with its WAL over it, by page number from 1."""

    def __init__(self, path: str, files: Files) -> None:
        """Raises OSError."""
        self._files = files
        self._descriptors: list[int] = []
        scan = scan_wal(f"{path}-wal", files)
        self._database = self._open(path)
        self._wal = self._open(f"{path}-wal") if scan.places else -1
        header = os.pread(self._database, 100, 0)
        size = struct.unpack_from(">H", header, 16)[0] if len(header) == 100 else 0
        size = 65536 if size == 1 else size
        self.size = size if size >= 512 and size & (size - 1) == 0 else scan.page_size or 8192
        committed = scan.commits[-1] if scan.commits else 0
        self._over = {page: offset for page, offset in scan.places[:committed] if page} if self.size == scan.page_size else {}
        self.count = max(files.size(self._database) // self.size, max(self._over, default=0))

    def _open(self, path: str) -> int:
        descriptor = self._files.open(path, os.O_RDONLY)
        self._descriptors.append(descriptor)
        return descriptor

    def close(self) -> None:
        while self._descriptors:
            self._files.close(self._descriptors.pop())

    def read(self, number: int) -> bytes:
        """Raises _BadError."""
        if not 1 <= number <= self.count:
            raise _BadError(f"there is no page {number}")
        try:
            if (offset := self._over.get(number)) is not None:
                page = os.pread(self._wal, self.size, offset)
            else:
                page = os.pread(self._database, self.size, (number - 1) * self.size)
        except OSError as error:
            raise _BadError(str(error)) from error
        return page + bytes(self.size - len(page))

    def free(self) -> set[int]:
        """Pages that the list of free pages or the page map calls free."""
        found: set[int] = set()
        try:
            trunk = struct.unpack_from(">I", self.read(1), 32)[0]
            while trunk and trunk not in found:
                page = self.read(trunk)
                found.add(trunk)
                trunk, count = struct.unpack_from(">II", page)
                found.update(struct.unpack_from(f">{min(count, self.size // 4 - 2)}I", page, 8))
        except _BadError:
            pass
        entries = self.size // 5
        for map_page in range(2, self.count + 1, entries + 1):
            try:
                page = self.read(map_page)
            except _BadError:
                continue
            found.add(map_page)
            found.update(map_page + 1 + entry for entry in range(entries) if page[entry * 5] == _FREE)
        return found


def _varint(page: bytes, at: int) -> tuple[int, int]:
    """The number at ``at`` and where the next octet is. Raises _BadError."""
    value = 0
    try:
        for count in range(8):
            octet = page[at + count]
            value = value << 7 | octet & 0x7F
            if octet < 0x80:
                return value, at + count + 1
        value = value << 8 | page[at + 8]
    except IndexError:
        raise _BadError("a number runs off its page") from None
    return value - (1 << 64) if value >> 63 else value, at + 9


def _cells(page: bytes, number: int) -> tuple[int, list[int], int]:
    """Kind of a page of a table's tree, where its cells lie, and its last child."""
    start = 100 if number == 1 else 0
    kind, _, count = struct.unpack_from(">BHH", page, start)
    if kind not in (_INNER, _LEAF):
        raise _BadError(f"page {number} is no page of a table")
    head = start + (12 if kind == _INNER else 8)
    count = min(count, (len(page) - head) // 2)
    last = struct.unpack_from(">I", page, start + 8)[0] if kind == _INNER else 0
    return kind, list(struct.unpack_from(f">{count}H", page, head)), last


def _payload(pages: Pages, page: bytes, start: int) -> tuple[int, bytes, int]:
    """Key and record of a leaf's cell, its overflow pages included; how much of the leaf it fills."""
    size, at = _varint(page, start)
    key, at = _varint(page, at)
    usable = pages.size
    if not 0 < size <= pages.count * usable:
        raise _BadError("a record of no size")
    most = usable - 35
    least = (usable - 12) * 32 // 255 - 23
    local = size
    if size > most:
        local = least + (size - least) % (usable - 4)
        local = local if local <= most else least
    record = bytearray(page[at : at + local])
    if size > local:
        following = struct.unpack_from(">I", page[at + local : at + local + 4].ljust(4, b"\0"))[0]
        while following and len(record) < size:
            piece = pages.read(following)
            following = struct.unpack_from(">I", piece)[0]
            record += piece[4:]
    if len(record) < size:
        # What is there is worth more than nothing: the sums will tell.
        record += bytes(size - len(record))
    return key, bytes(record[:size]), at + local - start + (4 if size > local else 0)


def _record(record: bytes) -> list[Value]:
    """Its columns. Raises _BadError."""
    end, at = _varint(record, 0)
    kinds = []
    while at < end:
        kind, at = _varint(record, at)
        kinds.append(kind)
    at = end
    values: list[Value] = []
    value: Value
    for kind in kinds:
        size = 0
        if kind == 0:
            value = None
        elif kind in (8, 9):
            value = kind - 8
        elif kind == 7:
            size = 8
            value = struct.unpack(">d", record[at : at + 8].ljust(8, b"\0"))[0]
        elif 1 <= kind <= 6:
            size = (1, 2, 3, 4, 6, 8)[kind - 1]
            value = int.from_bytes(record[at : at + size], "big", signed=True)
        elif kind >= 12:
            size = (kind - 12) // 2
            if size > len(record):
                raise _BadError("a column is longer than its record")
            octets = record[at : at + size]
            value = octets.decode("utf-8", "replace") if kind & 1 else octets
        else:
            raise _BadError(f"there is no kind {kind} of column")
        at += size
        values.append(value)
    return values


def _leaves(pages: Pages, root: int, bad: list[str]) -> Iterator[int]:
    """The leaves below ``root`` that can be reached, and what cannot be told to be none."""
    todo, seen = [root], set[int]()
    while todo:
        number = todo.pop()
        if number in seen:
            continue
        seen.add(number)
        try:
            page = pages.read(number)
            kind, cells, last = _cells(page, number)
        except _BadError as error:
            bad.append(str(error))
            # Only its head may have been hit: its rows will tell.
            yield number
            continue
        if kind == _LEAF:
            yield number
            continue
        todo.append(last)
        todo.extend(struct.unpack_from(">I", page, at)[0] for at in cells if at + 4 <= len(page))


def roots(pages: Pages) -> dict[str, int]:
    """The roots of our two tables, by the schema; those that it does not name are missing."""
    found: dict[str, int] = {}
    for number in _leaves(pages, 1, []):
        try:
            page = pages.read(number)
            cells = _cells(page, number)[1]
        except _BadError:
            continue
        for at in cells:
            try:
                values = _record(_payload(pages, page, at)[1])
            except _BadError:
                continue
            if len(values) == 5 and values[0] == "table" and values[1] in ("messages", "pendings") and isinstance(values[3], int):
                found[str(values[1])] = values[3]
    return found


def salvage(path: str, files: Files, now: float) -> Salvaged:
    """All rows that can be told from the file at ``path``, which nobody writes to. Raises OSError."""
    found = Salvaged()
    pages = Pages(path, files)
    try:
        bad: list[str] = []
        messages: dict[int, Columns] = {}
        pendings: dict[int, Columns] = {}
        reached: set[int] = set()
        named = roots(pages)
        if len(named) < 2:
            bad.append("the schema cannot be read")
        for root in named.values() if len(named) == 2 else _GUESSED:
            for number in _leaves(pages, root, bad):
                if number not in reached:
                    reached.add(number)
                    _take(pages, number, messages, pendings, found, now)
        if bad:
            found.pages = len(bad)
            left = set(range(3, pages.count + 1)) - reached - pages.free()
            for number in sorted(left):
                _take_stray(pages, number, messages, pendings, found, now)
        _join(messages, pendings, found, now)
    finally:
        pages.close()
    return found


def _take_stray(pages: Pages, number: int, messages: dict[int, Columns], pendings: dict[int, Columns], found: Salvaged, now: float) -> None:
    try:
        kind, _, _ = _cells(pages.read(number), number)
    except _BadError:
        return
    if kind == _LEAF:
        _take(pages, number, messages, pendings, found, now)


def _take(pages: Pages, number: int, messages: dict[int, Columns], pendings: dict[int, Columns], found: Salvaged, now: float) -> None:
    """The rows of one leaf. Where its head does not fit the rest, also those that it does not name:
    they may have been deleted, so they are held for a person."""
    try:
        page = pages.read(number)
    except _BadError:
        return
    try:
        kind, cells, _ = _cells(page, number)
    except _BadError:
        kind, cells = _INNER, []
    used = 0
    for at in cells if kind == _LEAF else []:
        try:
            key, record, size = _payload(pages, page, at)
            values = _record(record)
        except _BadError:
            found.unread += 1
            continue
        used += max(4, size)
        if not 0 < key < _KEYS:
            found.unread += 1
        elif len(values) == MESSAGE_WIDTH:
            messages.setdefault(key, _message(key, values))
        elif len(values) == PENDING_WIDTH:
            pendings.setdefault(key, _pending(key, values, now))
        elif len(values) != 1:
            found.unread += 1
    if kind == _LEAF and _whole_page(page, used):
        return
    known = set(cells)
    for (at,) in struct.iter_unpack(">H", page[8:1024]):
        if at in known or not 8 < at < len(page) - 4:
            continue
        known.add(at)
        try:
            key, record, _ = _payload(pages, page, at)
            values = _record(record)
        except _BadError:
            continue
        if not 0 < key < _KEYS:
            continue
        if len(values) == MESSAGE_WIDTH:
            row = _message(key, values)
            if message_sum(key, str(row[1]), _octets(row[7]), _octets(row[8])) == row[5]:
                messages.setdefault(key, row)
        elif len(values) == PENDING_WIDTH:
            row = _pending(key, values, now)
            if not str(row[11]).startswith("damaged"):
                pendings.setdefault(key, (*row[:2], "held", *row[3:9], 1, row[10], "damaged: its page was hit", row[12]))


def _whole_page(page: bytes, used: int) -> bool:
    """Do the cells, the gaps between them and what the head says make up the page?"""
    _, gap, _, start, scraps = struct.unpack_from(">BHHHB", page)
    start = start or 65536
    for _ in range(len(page) // 4):
        if not gap or gap + 4 > len(page):
            break
        gap, size = struct.unpack_from(">HH", page, gap)
        used += size
    return bool(used + scraps == len(page) - start)


def _real(value: Value, otherwise: float) -> float:
    # SQLite stores a REAL that is whole as an integer.
    return float(value) if isinstance(value, int | float) and isfinite(value) and abs(value) < 1e15 else otherwise


def _whole(value: Value) -> int:
    return value if isinstance(value, int) else 0


def _octets(value: Value) -> bytes:
    return value if isinstance(value, bytes) else b""


def _message(key: int, values: list[Value]) -> Columns:
    """As it was, as far as the table's types allow; its sums are left as they are read."""
    id, file, content = values[1], values[4], values[9]
    return (
        key,
        id if isinstance(id, str) and id else f"damaged-{key}",
        _real(values[2], 0.0),
        _whole(values[3]),
        file if isinstance(file, str) else None,
        _whole(values[5]),
        _whole(values[6]),
        _octets(values[7]),
        _octets(values[8]),
        content if isinstance(content, bytes) else None,
    )


def _pending(key: int, values: list[Value], now: float) -> Columns:
    sink, state, note = (value if isinstance(value, str) else "" for value in (values[1], values[2], values[11]))
    priority, part, attempts = _whole(values[3]), _whole(values[6]), _whole(values[7])
    recipients, sum_ = _octets(values[10]), _whole(values[12])
    person = int(bool(values[9]))
    if pending_sum(key, sink, part, recipients) != sum_:
        state, person, note = "held", 1, "damaged: the checksum of the recipients does not fit"
    elif state not in ("queued", "held", "dead"):
        state, person, note = "held", 1, "damaged: its state was lost"
    due, expires_at = _real(values[4], now), _real(values[5], now)
    return (key, sink, state, priority, due, expires_at, part, attempts, int(bool(values[8])), person, recipients, note, sum_)


def _join(messages: dict[int, Columns], pendings: dict[int, Columns], found: Salvaged, now: float) -> None:
    """What goes together, and what lost its other half."""
    owed = {key >> SHIFT for key in pendings}
    ids: set[str] = set()
    for key, row in sorted(messages.items()):
        id = str(row[1])
        if id in ids or message_sum(key, id, _octets(row[7]), _octets(row[8])) != row[5]:
            # Two rows may not bear one id; whoever reads it sees that its sum does not fit.
            found.aside += 1
            if id in ids:
                id = f"damaged-{key}"
        ids.add(id)
        found.messages.append((key, id, *row[2:]))
        if key not in owed:
            sum_ = pending_sum(key << SHIFT, LOST, 1, b"[]")
            found.aside += 1
            found.pendings.append(
                (key << SHIFT, LOST, "held", 0, now, now, 1, 0, 0, 1, b"[]", "damaged: what it owes to whom was lost", sum_)
            )
    for key, row in sorted(pendings.items()):
        if key >> SHIFT not in messages:
            row = (*row[:2], "held", *row[3:9], 1, row[10], "damaged: its message is missing", row[12])
        found.aside += row[2] == "held" and str(row[11]).startswith("damaged")
        found.pendings.append(row)
