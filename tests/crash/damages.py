"""Octets of a stored spool are changed, again and again; each time all that is sound is delivered, and nothing else.

``Damages`` makes a spool of 240 messages, closed and as a process has it that still runs, and
harms a copy of it so often: a flipped bit, a zeroed sector, a file cut short, in the database, its
WAL or a content file. Then the spool is opened as a process opens it.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import struct
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gateway.message import Message
from gateway.spool import salvage
from gateway.spool.engine import PAGE_SIZE
from gateway.spool.files import Files
from tests.crash.mail import Events, keep, large, message, opened, settle

#: Seconds between words of progress.
SPEAK = 30.0


def heads(path: Path) -> list[int]:
    """Where the rows of the tables begin: their keys, the types and lengths of their columns."""
    pages = salvage.Pages(str(path), Files())
    try:
        leaves = [leaf for root in salvage.roots(pages).values() for leaf in salvage._leaves(pages, root, [])]
    finally:
        pages.close()
    octets = path.read_bytes()
    found = []
    for leaf in leaves:
        start = (leaf - 1) * PAGE_SIZE
        # In the file itself it may be no such page yet: the WAL lies over it.
        with contextlib.suppress(salvage._BadError, struct.error):
            kind, cells, _ = salvage._cells(octets[start : start + PAGE_SIZE], leaf)
            found += [start + at for at in cells if kind == salvage._LEAF]
    return found


def harm(path: Path, chance: random.Random) -> str:
    """One flipped bit, one zeroed sector, or a file that is cut short."""
    octets = bytearray(path.read_bytes())
    place = chance.randrange(len(octets))
    # Most of a database is content; what is told of it lies in few octets.
    kind = chance.choice(["flip"] * 5 + ["head"] * 3 + ["zero", "cut"])
    if kind == "head" and path.suffix == ".db" and (starts := heads(path)):
        place = min(chance.choice(starts) + chance.randrange(24), len(octets) - 1)
    if kind in ("flip", "head"):
        octets[place] ^= 1 << chance.randrange(8)
    elif kind == "zero":
        start = place // 512 * 512
        octets[start : start + 512] = bytes(len(octets[start : start + 512]))
    else:
        del octets[place:]
    path.write_bytes(octets)
    return f"{kind} at {place} of {path.name}"


def victim(folder: Path, chance: random.Random) -> Path:
    """One of its files, the database and its WAL rather than a content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return chance.choices(files, [5 if path.parent == folder else 1 for path in files])[0]


def told(mail: Message) -> tuple[Any, ...]:
    return mail.envelope, mail.client, mail.trace, mail.stored.size, mail.content


Sound = dict[tuple[str, str], tuple[tuple[int, ...], tuple[Any, ...]]]


async def filled(folder: Path, left: Path) -> tuple[Sound, Sound]:
    """A spool of 240 messages for two sinks, of which some have come and gone; ``left``: as it lies there while the
    process still has it, with a WAL. Returns what was ever stored, and what is to be found."""
    stored: Sound = {}
    chance = random.Random(0)
    async with opened(folder) as spool:
        gone = []
        for number in range(300):
            if number == 150:
                assert await spool._call(spool._engine.tidy) is not None
            content = chance.randbytes(chance.choice([10, 100, 300, 1000, 20_000] if number % 5 else [300_000 if number % 50 == 0 else 10]))
            mail = message(content, recipients=4) if len(content) < 300_000 else await large(spool, content, recipients=4)
            rows = await keep(spool, mail, "app", "out", recipients=(0, 2))
            stored.update({(mail.id, row.sink): (row.recipients, told(mail)) for row in rows})
            if number % 5 == 3:
                gone += rows
        for row in gone:
            await settle(spool, row)
        await spool._call(partial(shutil.copytree, folder, left))
    over = {(row.message_id, row.sink) for row in gone}
    return stored, {place: kept for place, kept in stored.items() if place not in over}


async def look(folder: Path, stored: Sound, what: str) -> tuple[set[tuple[str, str]], list[dict[str, Any]]]:
    """What is delivered of it, and what was told; nothing else than what was stored ever is."""
    found: set[tuple[str, str]] = set()
    events = Events()
    async with opened(folder, observer=events) as spool:
        for sink in ("app", "out"):
            for row in await spool.due(sink, 1e12, 1000):
                mail = await spool.load(row)
                if mail is not None:
                    place = (row.message_id, row.sink)
                    assert (row.recipients, told(mail)) == stored[place], what
                    assert place not in found, what
                    found.add(place)
        held = {(row.message_id, row.sink) for row in await spool.rows() if row.note.startswith("damaged")}
        assert held <= found.symmetric_difference(held), what
        await keep(spool)
    return found, events.named("damaged")


class Damages:
    """``rounds`` of them below ``folder``; use it once. What is wrong is an AssertionError that says what was done."""

    def __init__(self, folder: Path, rounds: int, seed: int, say: Callable[[str], None]) -> None:
        self.rounds = rounds
        self.done = 0
        self.lost = self.salvaged = self.unseen = self.sound = 0
        self._folder = folder
        self._seed = seed
        self._say = say
        self._started = time.monotonic()

    def __str__(self) -> str:
        done = max(1, self.done)
        return (
            f"{self.done:,} damages, seed {self._seed}, {(time.monotonic() - self._started) / 60:.0f} min: every start succeeded, 0 delivered"
            f" that was not stored; {self.salvaged:,} databases were read out page by page, {self.lost / done:.2f} of {self.sound} rows were"
            f" not delivered on average, {self.unseen} WALs ended early"
        )

    async def run(self) -> None:
        folders = [self._folder / "closed", self._folder / "left"]
        stored, sound = await filled(*folders)
        self.sound = len(sound)
        chance = random.Random(self._seed)
        spoken = time.monotonic()
        for number in range(self.rounds):
            await self._round(self._folder / str(number), chance.choice(folders), chance, stored, sound)
            self.done += 1
            if time.monotonic() - spoken > SPEAK:
                spoken = time.monotonic()
                self._say(f"{self.done:,} of {self.rounds:,} damages, {self.salvaged} read out page by page; 0 wrong")

    async def _round(self, copy: Path, folder: Path, chance: random.Random, stored: Sound, sound: Sound) -> None:
        """The copy stays where something is wrong with it."""
        shutil.copytree(folder, copy)
        path = victim(copy, chance)
        what = f"{harm(path, chance)}, GATEWAY_SEED={self._seed}, {copy.name}"
        found, events = await look(copy, stored, what)
        missing = len(sound.keys() - found)
        # Where a WAL lost its end, what it said there was never said.
        assert found <= sound.keys() or path.suffix == ".db-wal", f"settled, and back: {found - sound.keys()}: {what}"
        # The end of a WAL is no damage to anybody's eyes: a power cut makes the same.
        self.unseen += bool(missing and not events)
        assert not missing or events or path.suffix == ".db-wal", f"silent: {what}"
        if "cut" not in what:
            # A page of the table of what is owed holds up to 90 rows.
            assert missing <= 100, f"{missing} are missing: {what}: {events}"
        self.lost += missing
        self.salvaged += any("read out of it" in fields["reason"] for fields in events)
        shutil.rmtree(copy)
