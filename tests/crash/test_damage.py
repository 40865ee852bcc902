"""Octets that are not what they were: found, confined, never delivered."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import apsw
import pytest

from gateway.contracts import Row, SpoolError
from gateway.message import Message
from gateway.spool import engine, salvage
from gateway.spool.files import Files
from tests.crash.faulty import Faults, FaultyFiles, FaultyVFS
from tests.crash.mail import Events, keep, large, message, opened, pending, settle, store
from tests.loops import until

#: GATEWAY_DAMAGE makes a longer run.
ROUNDS = int(os.environ.get("GATEWAY_DAMAGE", "500"))


def harm(path: Path, chance: random.Random) -> str:
    """One flipped bit, one zeroed sector, or a file that is cut short."""
    octets = bytearray(path.read_bytes())
    place = chance.randrange(len(octets))
    kind = chance.choice(["flip"] * 8 + ["zero", "cut"])
    if kind == "flip":
        octets[place] ^= 1 << chance.randrange(8)
    elif kind == "zero":
        start = place // 512 * 512
        octets[start : start + 512] = bytes(len(octets[start : start + 512]))
    else:
        del octets[place:]
    path.write_bytes(octets)
    return f"{kind} at {place} of {path.name}"


def told(mail: Message) -> tuple[Any, ...]:
    return mail.envelope, mail.client, mail.trace, mail.stored.size, mail.content


def seeded() -> tuple[random.Random, int]:
    seed = int(os.environ.get("GATEWAY_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
    print(f"GATEWAY_SEED={seed}")
    return random.Random(seed), seed


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


@pytest.mark.parametrize("rounds", [30, pytest.param(ROUNDS, marks=pytest.mark.long)])
async def test_what_is_damaged_is_set_aside_and_the_rest_delivered(quick_path: Path, rounds: int) -> None:
    """A start is never refused; the octets of one page are no more than the messages on that page."""
    folders = [quick_path / "closed", quick_path / "left"]
    stored, sound = await filled(*folders)
    chance, seed = seeded()
    lost = salvaged = unseen = 0
    for number in range(rounds):
        copy = quick_path / str(number)
        shutil.copytree(chance.choice(folders), copy)
        files = sorted(path for path in copy.rglob("*") if path.is_file() and path.name != "lock")
        path = chance.choices(files, [5 if path.parent == copy else 1 for path in files])[0]
        what = f"{harm(path, chance)}, GATEWAY_SEED={seed}, {copy.name}"
        found, events = await look(copy, stored, what)
        missing = len(sound.keys() - found)
        # Where a WAL lost its end, what it said there was never said.
        assert found <= sound.keys() or path.suffix == ".db-wal", f"settled, and back: {found - sound.keys()}: {what}"
        # The end of a WAL is no damage to anybody's eyes: a power cut makes the same.
        unseen += bool(missing and not events)
        assert not missing or events or path.suffix == ".db-wal", f"silent: {what}"
        if "cut" not in what:
            # A page of the table of what is owed holds up to 90 rows.
            assert missing <= 100, f"{missing} are missing: {what}: {events}"
        lost += missing
        salvaged += any("read out of it" in fields["reason"] for fields in events)
        shutil.rmtree(copy)
    print(
        f"of {rounds}: {salvaged} had to be read out page by page; {lost / rounds:.2f} of {len(sound)} rows were lost a round; {unseen} WALs ended early"
    )


async def test_an_index_that_does_not_fit_is_made_anew(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        for _ in range(5):
            await keep(spool)
    db = apsw.Connection(str(tmp_path / "spool.db"))
    db.execute("PRAGMA writable_schema = ON")
    (sql,) = db.execute("SELECT sql FROM sqlite_schema WHERE name = 'pendings_due'").fetchall()[0]
    # Rows that the index never hears of.
    db.execute(
        "UPDATE sqlite_schema SET sql = replace(sql, 'priority, due)', 'priority, due) WHERE sink = ''none''') WHERE name = 'pendings_due'"
    )
    db.close()
    db = apsw.Connection(str(tmp_path / "spool.db"))
    db.execute("REINDEX pendings_due; PRAGMA writable_schema = ON")
    db.execute("UPDATE sqlite_schema SET sql = ? WHERE name = 'pendings_due'", (sql,))
    db.close()
    events = Events()
    async with opened(tmp_path, observer=events) as spool:
        assert len(await spool.due("app", 1e12, 10)) == 5
    (fields,) = events.named("damaged")
    assert "mended" in fields["reason"]


async def test_a_row_of_no_state_is_held(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        await keep(spool)
    db = apsw.Connection(str(tmp_path / "spool.db"))
    db.execute("UPDATE pendings SET state = 'quewed'")
    db.close()
    async with opened(tmp_path) as spool:
        assert [(row.state, row.note) for row in await spool.rows()] == [("held", "damaged: its sink or state was lost")]
        assert {place: count for place, (count, _) in (await spool.counts()).items()} == {("app", "held"): 1}


async def test_a_file_that_is_no_database_goes_aside(tmp_path: Path) -> None:
    (tmp_path / "spool.db").write_bytes(b"not a database" * 1000)
    events = Events()
    async with opened(tmp_path, observer=events) as spool:
        await keep(spool)
    assert "damaged-1.db" in events.named("damaged")[0]["reason"]
    assert (tmp_path / "damaged-1.db").read_bytes() == b"not a database" * 1000
    async with opened(tmp_path) as spool:
        assert len(await spool.rows()) == 1


async def left_behind(folder: Path, copy: Path, count: int = 30) -> list[str]:
    """What a process that was killed leaves: everything is in the WAL. Returns the messages' ids."""
    async with opened(folder) as spool:
        ids = [(await keep(spool, message(b"x" * 3000)))[0].message_id for _ in range(count)]
        await spool._call(partial(shutil.copytree, folder, copy))
    return ids


async def test_damage_in_the_middle_of_a_wal_is_not_its_end(tmp_path: Path) -> None:
    """SQLite reads a WAL up to the first frame that does not fit; what comes after it was promised as well."""
    ids = await left_behind(tmp_path / "spool", tmp_path / "copy")
    wal = tmp_path / "copy" / "spool.db-wal"
    octets = bytearray(wal.read_bytes())
    octets[len(octets) // 3] ^= 4
    wal.write_bytes(octets)
    events = Events()
    async with opened(tmp_path / "copy", observer=events) as spool:
        found = [mail.id for row in await spool.due("app", 1e12, 100) if (mail := await spool.load(row)) is not None]
        aside = [row.message_id for row in await spool.rows() if row.message_id not in found]
    assert sorted(found + aside) == sorted(ids)
    assert len(aside) <= 1
    assert "the WAL is damaged in its middle" in events.named("damaged")[0]["reason"]
    async with opened(tmp_path / "copy") as spool:
        assert {row.message_id for row in await spool.rows()} == set(ids)


async def test_the_salvage_can_be_broken_off_anywhere(quick_path: Path) -> None:
    ids = await left_behind(quick_path / "spool", quick_path / "copy")
    database = quick_path / "copy" / "spool.db"
    with database.open("r+b") as file:
        file.truncate(3 * 8192)
    wal = quick_path / "copy" / "spool.db-wal"
    octets = bytearray(wal.read_bytes())
    octets[100] ^= 1
    wal.write_bytes(octets)
    for number in itertools.count(1):
        folder = quick_path / str(number)
        shutil.copytree(quick_path / "copy", folder)
        faults = Faults(number, 10**9)
        name = f"breaking{number}"
        vfs = FaultyVFS(name, faults)
        with contextlib.suppress(SpoolError):
            async with opened(folder, vfs=name, files=FaultyFiles(faults)):
                pass
        vfs.unregister()
        async with opened(folder) as spool:
            found = {row.message_id for row in await spool.rows()}
        assert len(found & set(ids)) >= len(ids) - 1, number
        shutil.rmtree(folder)
        if not faults.fired:
            break
    assert number > 10


async def test_what_is_damaged_while_it_works_ends_the_process_and_the_next_one_salvages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CHECK_LIMIT", 0)
    async with opened(tmp_path) as spool:
        ids = [(await keep(spool))[0].message_id for _ in range(300)]
    pages = salvage.Pages(str(tmp_path / "spool.db"), Files())
    leaf = sorted(salvage._leaves(pages, salvage.roots(pages)["pendings"], []))[0]
    pages.close()
    with (tmp_path / "spool.db").open("r+b") as file:
        # Opening reads no more than the indexes.
        file.seek((leaf - 1) * 8192)
        file.write(bytes(8192))
    fatal: list[str] = []
    async with opened(tmp_path, on_fatal=fatal.append) as spool:
        with pytest.raises(SpoolError, match="malformed"):
            await spool.due("app", 1e12, 1000)
        await until(lambda: bool(fatal))
        assert "damaged" in (spool.unhealthy or "")
        error = await store(spool, Row(mail := message(), [pending(mail)]))
        assert error is not None
        assert error.known
    events = Events()
    async with opened(tmp_path, observer=events) as spool:
        due = {row.message_id for row in await spool.due("app", 1e12, 1000)}
        held = {row.message_id for row in await spool.rows() if row.note == "damaged: what it owes to whom was lost"}
        assert due | held == set(ids)
        assert 0 < len(held) < 200, "one page"
    assert events.named("damaged")
    async with opened(tmp_path, observer=(after := Events())) as spool:
        assert len(await spool.due("app", 1e12, 1000)) == len(due)
    assert not after.named("damaged")


async def test_what_nobody_can_say_who_gets_it_is_held(tmp_path: Path) -> None:
    """The page that says what is owed is gone; the mail is not."""
    async with opened(tmp_path) as spool:
        rows = [await keep(spool) for _ in range(3)]
    pages = salvage.Pages(str(tmp_path / "spool.db"), Files())
    root = salvage.roots(pages)["pendings"]
    pages.close()
    with (tmp_path / "spool.db").open("r+b") as file:
        file.seek((root - 1) * 8192)
        file.write(bytes(8192))
    async with opened(tmp_path) as spool:
        listed = await spool.rows()
        assert {(row.message_id, row.state, row.note) for row in listed} == {
            (row.message_id, "held", "damaged: what it owes to whom was lost") for (row,) in rows
        }
        assert b"body" in await spool.export(listed[0].message_id)
        assert (await spool.counts())[salvage.LOST, "held"][0] == 3


async def test_a_schema_that_cannot_be_read_is_guessed(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        ids = {(await keep(spool))[0].message_id for _ in range(200)}
    with (tmp_path / "spool.db").open("r+b") as file:
        file.write(bytes(8192))
    async with opened(tmp_path) as spool:
        assert {row.message_id for row in await spool.due("app", 1e12, 1000)} == ids


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE pendings SET recipients = CAST('[1]' AS BLOB)",
        "UPDATE pendings SET part = 2",
        "UPDATE messages SET meta = CAST(replace(CAST(meta AS TEXT), 'user1@', 'user9@') AS BLOB)",
        "UPDATE messages SET trace = CAST(replace(CAST(trace AS TEXT), 'mx.', 'mz.') AS BLOB)",
        "UPDATE messages SET id = replace(id, '0190a000', '0190a001')",
        "UPDATE messages SET content = CAST(replace(CAST(content AS TEXT), 'body', 'bady') AS BLOB)",
    ],
)
async def test_each_column_that_decides_who_gets_what_is_summed(tmp_path: Path, change: str) -> None:
    """Well-formed all of them, and not what was stored."""
    async with opened(tmp_path) as spool:
        await keep(spool, message(recipients=2), recipients=(0,))
    db = apsw.Connection(str(tmp_path / "spool.db"))
    before = db.execute("SELECT * FROM messages, pendings").fetchall()
    db.execute(change)
    assert db.execute("SELECT * FROM messages, pendings").fetchall() != before
    db.close()
    events = Events()
    async with opened(tmp_path, observer=events) as spool:
        for row in await spool.due("app", 1e12, 10):
            assert await spool.load(row) is None
        assert [row.state for row in await spool.rows()] == ["held"]
    assert events.named("damaged")


async def test_a_content_file_is_summed(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        mail = await large(spool, b"z" * 300_000)
        await keep(spool, mail)
        (file,) = (tmp_path / "content").iterdir()
        file.write_bytes(b"z" * 299_999 + b"y")
        (row,) = await spool.due("app", 1e12, 10)
        assert await spool.load(row) is None
        assert [row_.state for row_ in await spool.rows()] == ["held"]
