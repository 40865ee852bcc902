"""Octets that are not what they were: found, confined, never delivered."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import apsw
import pytest

from gateway.contracts import Row, SpoolError
from gateway.spool import engine, salvage
from gateway.spool.files import Files
from gateway.spool.sqlite import SqliteSpool
from tests.crash.damages import Damages
from tests.crash.faulty import Faults, FaultyFiles, FaultyVFS
from tests.crash.mail import Events, keep, large, mark, message, opened, pending, store
from tests.loops import until

#: GATEWAY_DAMAGE makes a longer run, and `make torture` ten thousand of them.
ROUNDS = int(os.environ.get("GATEWAY_DAMAGE", "500"))


@pytest.mark.parametrize("rounds", [30, pytest.param(ROUNDS, marks=pytest.mark.long)])
async def test_what_is_damaged_is_set_aside_and_the_rest_delivered(quick_path: Path, rounds: int) -> None:
    """A start is never refused; the octets of one page are no more than the messages on that page."""
    seed = int(os.environ.get("GATEWAY_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
    print(f"GATEWAY_SEED={seed}")
    damages = Damages(quick_path, rounds, seed, print)
    await damages.run()
    print(damages)
    assert damages.done == rounds


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


def mistyped(folder: Path, change: str) -> None:
    """What flipped bits do to a row's header: a value of another type than its column takes."""
    for statement in (
        "UPDATE sqlite_schema SET sql = replace(replace(sql, ') STRICT', ')'), 'person INTEGER NOT NULL', 'person INTEGER') WHERE name = 'pendings'",
        change,
        "UPDATE sqlite_schema SET sql = replace(sql, 'person INTEGER', 'person INTEGER NOT NULL') || ' STRICT' WHERE name = 'pendings'",
    ):
        db = apsw.Connection(str(folder / "spool.db"))
        db.execute(f"PRAGMA writable_schema = ON; {statement}")
        db.close()


MISTYPED = "UPDATE pendings SET recipients = CAST(recipients AS TEXT)"


async def test_a_row_of_no_state_that_cannot_be_written_is_held(tmp_path: Path) -> None:
    """The database is no hindrance: what it does not take back is read out into a new one."""
    async with opened(tmp_path) as spool:
        hit, *sound = [(await keep(spool))[0].message_id for _ in range(3)]
    mistyped(tmp_path, f"{MISTYPED}, state = 'quewed' WHERE key < 2 << 20")
    events = Events()
    async with opened(tmp_path, observer=events) as spool:
        assert {row.message_id for row in await spool.due("app", 1e12, 10)} == set(sound)
        (held,) = [row for row in await spool.rows() if row.state == "held"]
        assert (held.message_id, held.note) == (hit, "damaged: the checksum of the recipients does not fit")
    assert "read out of it" in events.named("damaged")[0]["reason"]


async def looked_for(spool: SqliteSpool) -> None:
    await spool.due("app", 1e12, 10)


async def held(spool: SqliteSpool) -> None:
    with pytest.raises(SpoolError, match="cannot store TEXT value in BLOB column"):
        await spool.change(None, "hold")


@pytest.mark.parametrize("meet", [looked_for, held])
async def test_a_row_that_cannot_be_written_any_more_ends_the_process_and_the_next_one_salvages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meet: Callable[[SqliteSpool], Awaitable[None]]
) -> None:
    """It would be found, and not be set aside, for ever."""
    monkeypatch.setattr(engine, "CHECK_LIMIT", 0)
    async with opened(tmp_path) as spool:
        ids = [(await keep(spool))[0].message_id for _ in range(3)]
    mistyped(tmp_path, f"{MISTYPED} WHERE key < 2 << 20")
    fatal: list[str] = []
    async with opened(tmp_path, on_fatal=fatal.append) as spool:
        await meet(spool)
        await until(lambda: bool(fatal))
    async with opened(tmp_path) as spool:
        assert {row.message_id for row in await spool.due("app", 1e12, 10)} == set(ids[1:])
        assert [row.message_id for row in await spool.rows() if row.note.startswith("damaged")] == ids[:1]


async def test_a_row_of_which_nobody_knows_whether_a_person_holds_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit makes an integer of 0 or 1 a NULL; the retry is written all the same."""
    monkeypatch.setattr(engine, "CHECK_LIMIT", 0)
    async with opened(tmp_path) as spool:
        await keep(spool)
    mistyped(tmp_path, "UPDATE pendings SET person = NULL")
    async with opened(tmp_path) as spool:
        (row,) = await spool.due("app", 1e12, 10)
        row.attempts += 1
        await mark(spool, row)
        assert [(row.state, row.attempts) for row in await spool.rows()] == [("held", 1)]


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
