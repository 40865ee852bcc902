"""The disk fails: never a false success, never a message that comes back after it was refused.

The lines of DESIGN §4's decision table that speak of the store, each by itself, then every
single operation of a small story failing in turn (as SQLite tests itself), and the power
going after every single operation.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest

from gateway.contracts import Mark, Pending, Row, SpoolError
from gateway.spool import engine, sqlite
from gateway.spool.sqlite import SqliteSpool
from tests.crash.faulty import Faults, FaultyFiles, FaultyVFS, How, Left, replay
from tests.crash.mail import Events, Ticket, keep, large, message, opened, pending, store
from tests.loops import until

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "_WATCH", 0.02)
    monkeypatch.setattr(sqlite, "MARK_DELAY", 0.002)


@dataclass
class Disk:
    """One disk that may fail, and the spool on it."""

    faults: Faults
    files: FaultyFiles
    vfs: FaultyVFS
    name: str
    events: Events = field(default_factory=Events)
    fatal: list[str] = field(default_factory=list)

    def spool(self, folder: Path, **more: Any) -> SqliteSpool:
        return SqliteSpool(
            folder,
            **{"observer": self.events, "vfs": self.name, "files": self.files, "minimum_free": 0.0, "on_fatal": self.fatal.append, **more},
        )


@pytest.fixture
def disk() -> Iterator[Disk]:
    made = new_disk()
    yield made
    made.vfs.unregister()


def new_disk(**plan: Any) -> Disk:
    faults = Faults(**plan)
    name = f"faulty{next(_numbers)}"
    return Disk(faults, FaultyFiles(faults), FaultyVFS(name, faults), name)


def fail(disk: Disk, *kinds: str, how: How = "EIO", count: int = 1, paths: tuple[str, ...] = ("",), after: int = 0) -> None:
    """From now on: the next ``count`` operations of these kinds fail, ``after`` so many that do not."""
    disk.faults.kinds = frozenset(kinds)
    disk.faults.paths = paths
    disk.faults.how = how
    disk.faults.seen = disk.faults.fired = 0
    disk.faults.first, disk.faults.count = after + 1, count


def mend(disk: Disk) -> None:
    disk.faults.first = 0


def copy_file(source: str, target: str) -> None:
    # The files of settled messages may go while they are copied.
    with suppress(FileNotFoundError):
        shutil.copy(source, target)


async def as_if_killed(spool: SqliteSpool, copy: Path) -> None:
    """A copy of the folder as it is now: between two transactions of its writer."""
    await spool._call(partial(shutil.copytree, spool.folder, copy, copy_function=copy_file))


async def after_a_crash(spool: SqliteSpool) -> dict[str, str]:
    """What a process that starts now would find (``id → state``); all of it is whole."""
    copy = Path(f"{spool.folder}-after-{next(_numbers)}")
    await as_if_killed(spool, copy)
    found: dict[str, str] = {}
    async with opened(copy) as again:
        for row in await again.rows():
            found[row.message_id] = row.state
        for sink, _ in await again.counts():
            for row_ in await again.due(sink, 1e12, 100):
                assert await again.load(row_) is not None
    shutil.rmtree(copy)
    return found


# -------------------------------------------------------------- the table, line by line


async def test_an_error_before_the_commit_is_known(tmp_path: Path, disk: Disk) -> None:
    folder = tmp_path / "spool"
    spool = disk.spool(folder)
    await spool.open()
    (row,) = await keep(spool)
    # Not one page more.
    await spool._call(spool._engine._pragma, "max_page_count = 1")
    mails = [message(b"x" * 20_000), message(b"x" * 20_000)]
    tickets = [Ticket(Row(mail, [pending(mail)])) for mail in mails]
    for ticket in tickets:
        spool.store(ticket)
    row.recipients = ()
    synced = asyncio.Event()
    spool.mark(Mark(row, synced=synced.set))
    for ticket in tickets:
        error = await ticket.done
        assert error is not None
        assert error.known
    assert "disk is full" in (spool.unhealthy or "")
    await asyncio.wait_for(synced.wait(), 60)
    assert spool.unhealthy is None, "a probe found the disk well again, and the mark was kept"
    assert await after_a_crash(spool) == {}
    assert [fields["fatal"] for fields in disk.events.named("spool_down")] == [False]
    assert len(disk.events.named("spool_up")) == 1
    await spool.close()


@pytest.mark.parametrize(
    ("kind", "path", "how", "full"),
    [
        ("write", "-wal", "ENOSPC", True),
        ("write", "-wal", "EDQUOT", True),
        ("write", "-wal", "short", True),
        ("write", "-wal", "EIO", False),
        ("sync", "-wal", "ENOSPC", True),
        ("sync", "-wal", "EDQUOT", True),
        ("sync", "-wal", "EIO", False),
        ("sync", "CONTENT", "ENOSPC", True),
        ("sync", "CONTENT", "EDQUOT", True),
        ("sync", "CONTENT", "EIO", False),
    ],
)
async def test_no_room_is_told_from_every_other_fault(tmp_path: Path, disk: Disk, kind: str, path: str, how: How, full: bool) -> None:
    """A1: 452 where the disk or a quota is full, 451 for the rest; no word of an error's text decides."""
    spool = disk.spool(tmp_path / "spool")
    await spool.open()
    mail = await large(spool, b"x" * 300_000)
    fail(disk, kind, how=how, paths=(mail.id if path == "CONTENT" else path,))
    error = await store(spool, Row(mail, [pending(mail)]))
    assert disk.faults.fired == 1
    assert error is not None
    assert (error.known, error.full) == (True, full)
    await until(lambda: spool.unhealthy is None)
    await spool.close()


@pytest.mark.parametrize("syncs", [1, 2])
async def test_a_commit_that_could_not_be_synced_leaves_nothing_behind(tmp_path: Path, disk: Disk, syncs: int) -> None:
    """Cut off by SQLite's own means, or, where it cannot sync for that either, by ours."""
    folder = tmp_path / "spool"
    spool = disk.spool(folder)
    await spool.open()
    (row,) = await keep(spool)
    fail(disk, "sync", paths=("-wal",), count=syncs)
    error = await store(spool, Row(mail := message(), [pending(mail)]))
    assert error is not None
    assert error.known
    assert disk.faults.fired == syncs
    assert await after_a_crash(spool) == {row.message_id: "queued"}
    await until(lambda: spool.unhealthy is None)
    await keep(spool)
    assert disk.fatal == []
    await spool.close()


async def test_without_the_proof_it_would_come_back(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: this is what the proof is for."""

    class Uncut(FaultyFiles):
        """Cuts nothing, and says that it did."""

        def truncate(self, descriptor: int, size: int) -> None:
            pass

        def size(self, descriptor: int) -> int:
            return 0

    folder = tmp_path / "spool"
    # No probe writes over what is to come back.
    monkeypatch.setattr(sqlite, "_WATCH", 60.0)
    spool = disk.spool(folder, files=Uncut(disk.faults))
    await spool.open()
    (row,) = await keep(spool)
    # The commit's, and that of the checkpoint that would move and cut by SQLite's own means.
    fail(disk, "sync", paths=("-wal",), count=2)
    error = await store(spool, Row(mail := message(), [pending(mail)]))
    assert error is not None
    assert error.known
    assert disk.faults.fired == 2
    assert await after_a_crash(spool) == {row.message_id: "queued", mail.id: "queued"}
    await spool.close()


@pytest.mark.parametrize("how", ["ENOSPC", "short"])
async def test_a_full_disk_refuses_and_comes_back_by_itself(tmp_path: Path, disk: Disk, how: How) -> None:
    """No room even for the checkpoint: the WAL is cut behind what counts, which needs none."""
    folder = tmp_path / "spool"
    spool = disk.spool(folder)
    await spool.open()
    (row,) = await keep(spool)
    fail(disk, "write", how=how, count=10**9)
    for _ in range(3):
        error = await store(spool, Row(mail := message(b"x" * 20_000), [pending(mail)]))
        assert error is not None
        assert error.known
        assert await after_a_crash(spool) == {row.message_id: "queued"}
    with pytest.raises(OSError, match="No space left"):
        await large(spool, b"z" * 300_000)
    row.recipients = ()
    synced = asyncio.Event()
    spool.mark(Mark(row, synced=synced.set))
    await asyncio.sleep(0.1)
    assert spool.unhealthy is not None
    assert not synced.is_set()
    mend(disk)
    await asyncio.wait_for(synced.wait(), 60)
    assert spool.unhealthy is None
    (other,) = await keep(spool)
    assert await after_a_crash(spool) == {other.message_id: "queued"}
    assert disk.fatal == []
    await spool.close()
    assert os.listdir(folder / "content") == []


async def test_when_nothing_can_be_proven_nobody_knows(tmp_path: Path, disk: Disk) -> None:
    folder = tmp_path / "spool"
    spool = disk.spool(folder)
    await spool.open()
    (row,), (kept,) = await keep(spool), await keep(spool)
    fail(disk, "sync", "truncate", count=10**9)
    mails = [message(b"x" * 1_500_000), message(b"x" * 1_500_000)]
    tickets = [Ticket(Row(mail, [pending(mail)])) for mail in mails]
    for ticket in tickets:
        spool.store(ticket)
    row.recipients = ()
    spool.mark(Mark(row))
    first, second = [await ticket.done for ticket in tickets]
    assert first is not None
    assert not first.known
    assert second is not None
    assert second.known, "it was not in the group: nothing of it was ever written"
    await until(lambda: bool(disk.fatal))
    assert disk.fatal == [spool.fatal]
    assert spool.unhealthy == spool.fatal
    found = await after_a_crash(spool)
    assert {kept.message_id} <= set(found) <= {kept.message_id, row.message_id, mails[0].id}
    mend(disk)
    await asyncio.sleep(0.1)
    error = await store(spool, Row(mail := message(), [pending(mail)]))
    assert error is not None
    assert error.known
    assert spool.fatal, "for good"
    assert [fields["fatal"] for fields in disk.events.named("spool_down")] == [True]
    assert (await spool.counts())["app", "queued"][0] == 2, "reading goes on"
    await spool.close()


def test_the_writer_says_nothing_after_its_last_answer(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """With that answer the loop may be over. What nobody knows is told by each job, the last one too."""
    closed = threading.Event()

    async def life() -> None:
        loop = asyncio.get_running_loop()
        say = loop.call_soon_threadsafe

        def slowly(callback: Callable[..., object], *args: Any, **more: Any) -> asyncio.Handle:
            handle = say(callback, *args, **more)
            if threading.current_thread().name == "spool-writer":
                closed.wait(0.3)
            return handle

        spool = disk.spool(tmp_path / "spool")
        await spool.open()
        spool._engine.fatal = "the disk took a sync and forgot it"
        monkeypatch.setattr(loop, "call_soon_threadsafe", slowly)
        await spool.close()
        assert disk.fatal

    asyncio.run(life())
    closed.set()
    for thread in threading.enumerate():
        if thread.name == "spool-writer":
            # Its traceback, if it has one, is a warning here, and so a failure.
            thread.join(10)


@pytest.mark.parametrize("kind", ["open", "write", "sync", "sync_dir"])
async def test_a_content_file_that_fails_refuses_its_message_alone(tmp_path: Path, disk: Disk, kind: str) -> None:
    folder = tmp_path / "spool"
    spool = disk.spool(folder)
    await spool.open()
    (row,) = await keep(spool)
    paths = ("content",) if kind == "sync_dir" else ("0190-big",)
    fail(disk, kind, paths=paths)
    small = message()
    ticket = Ticket(Row(small, [pending(small)]))
    if kind in ("open", "write"):
        with pytest.raises(OSError, match="Input/output"):
            await large(spool, b"z" * 300_000, id="0190-big")
        spool.store(ticket)
    else:
        mail = await large(spool, b"z" * 300_000, id="0190-big")
        big = Ticket(Row(mail, [pending(mail)]))
        spool.store(big)
        spool.store(ticket)
        error = await big.done
        assert error is not None
        assert error.known
        # The same file is never synced again: what the first sync lost, no second one finds.
        mend(disk)
        error = await store(spool, Row(mail, [pending(mail)]))
        assert error is not None
        assert "Input/output" in str(error)
        contents = spool._contents
        assert contents is not None
        coming = contents.coming(mail.stored.path or "")
        assert coming is not None
        coming.discard()
    assert await ticket.done is None
    assert await after_a_crash(spool) == {row.message_id: "queued", small.id: "queued"}
    await until(lambda: spool.unhealthy is None)
    await spool.close()
    assert os.listdir(folder / "content") == []


async def test_a_checkpoint_that_fails_is_told_and_loses_nothing(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CHECKPOINT_PAGES", 1)
    folder = tmp_path / "spool"
    spool = disk.spool(folder)
    await spool.open()
    fail(disk, "write", "sync", paths=("spool.db",), count=10**9)
    (row,) = await keep(spool)
    assert "checkpoint" in (spool.unhealthy or "")
    await asyncio.sleep(0.1)
    assert spool.unhealthy is not None, "the WAL must not grow without end"
    assert await after_a_crash(spool) == {row.message_id: "queued"}
    mend(disk)
    await until(lambda: spool.unhealthy is None)
    await spool.close()


async def test_too_little_room_is_unhealthy_until_there_is_more(tmp_path: Path, disk: Disk) -> None:
    def room(octets: int, inodes: int, all_inodes: int = 1000) -> os.statvfs_result:
        return os.statvfs_result((4096, 4096, 1000, octets, octets, all_inodes, inodes, inodes, 0, 255))

    spool = disk.spool(tmp_path / "spool", minimum_free=0.05)
    disk.files.room = room(49, 1000)
    await spool.open()
    assert "MiB of disk are free" in (spool.unhealthy or "")
    disk.files.room = room(50, 50)
    await until(lambda: spool.unhealthy is None)
    disk.files.room = room(1000, 49)
    await until(lambda: spool.unhealthy is not None)
    assert "49 inodes are free" in (spool.unhealthy or "")
    disk.files.room = room(1000, 0, 0)
    await until(lambda: spool.unhealthy is None)
    spool.minimum_free = 1001 * 4096
    await until(lambda: spool.unhealthy is not None)
    spool.minimum_free = 1000 * 4096
    disk.files.room = room(1000, 1000)
    await until(lambda: spool.unhealthy is None)
    disk.files.room = room(1000, 999)
    await until(lambda: spool.unhealthy is not None)
    disk.files.room = None
    spool.minimum_free = 0.0
    await until(lambda: spool.unhealthy is None)
    fail(disk, "statvfs", count=10**9)
    await until(lambda: "cannot be asked" in (spool.unhealthy or ""))
    health = [name for name, _ in disk.events.all if name.startswith("spool_")]
    assert health == ["spool_down", "spool_up"] * (len(health) // 2) + ["spool_down"], "told once for each turn"
    await spool.close()


async def test_a_spool_on_a_full_disk_opens_and_can_be_read(tmp_path: Path, disk: Disk) -> None:
    folder = tmp_path / "spool"
    async with opened(folder) as spool:
        (row,) = await keep(spool)
        copy = tmp_path / "copy"
        await as_if_killed(spool, copy)
    fail(disk, "write", how="ENOSPC", count=10**9)
    full = disk.spool(copy)
    await full.open()
    found = await full.due("app", 1e12, 10)
    assert [each.message_id for each in found] == [row.message_id]
    assert await full.load(found[0]) is not None
    error = await store(full, Row(mail := message(), [pending(mail)]))
    assert error is not None
    assert error.known
    mend(disk)
    await until(lambda: full.unhealthy is None)
    await keep(full)
    await full.close()


# ------------------------------------------------------------------ every operation in turn


@dataclass
class Ledger:
    """What the spool said, by message id."""

    acked: dict[str, bytes] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)
    #: Asked for, and those that were told to be durable.
    settling: set[str] = field(default_factory=set)
    settled: set[str] = field(default_factory=set)
    following: set[str] = field(default_factory=set)
    followed: set[str] = field(default_factory=set)

    def told(self, id: str, content: bytes, error: SpoolError | None) -> None:
        if error is None:
            self.acked[id] = content
        else:
            (self.refused if error.known else self.unknown).add(id)

    def check(self, found: dict[str, list[bytes]], *, complete: bool) -> None:
        """``complete``: the folder is what the spool last saw; else the power went and only what
        had been told before may be expected (the caller hands in a ledger of that moment)."""
        for id, content in self.acked.items():
            if id in self.settled:
                assert id not in found, f"{id} was settled and is back"
            elif id not in self.settling:
                assert found.get(id) == [content], f"{id} was acknowledged and is lost or torn: {found.get(id)!r}"
            else:
                assert found.get(id, [content]) == [content], f"{id} is torn"
        for id in self.refused:
            assert id not in found, f"{id} was refused and is back"
        for id in self.followed:
            assert id in found, f"{id} followed and is lost"
        known = {*self.acked, *self.unknown, *self.following}
        assert not complete or set(found) <= known, f"phantoms: {set(found) - known}"


async def story(spool: SqliteSpool, ledger: Ledger) -> None:
    """Messages small and large, for one sink and for two, marks of every kind."""

    async def one(*sinks: str, content: bytes = b"Subject: s\r\n\r\n" + b"small\r\n" * 300) -> list[Pending] | None:
        mail = message(content, recipients=2)
        rows = [pending(mail, sink) for sink in sinks]
        error = await store(spool, Row(mail, rows))
        ledger.told(mail.id, content, error)
        return None if error else rows

    async def big() -> list[Pending] | None:
        content = b"large" * 60_000
        try:
            mail = await large(spool, content)
        except OSError:
            return None
        rows = [pending(mail)]
        error = await store(spool, Row(mail, rows))
        ledger.told(mail.id, content, error)
        return None if error else rows

    async def marked(row: Pending, **more: Any) -> bool:
        synced = asyncio.Event()
        spool.mark(Mark(row, synced=synced.set, **more))
        waiting = asyncio.ensure_future(synced.wait())
        for _ in range(40):
            done, _ = await asyncio.wait([waiting], timeout=0.01)
            if done:
                return True
            if spool.fatal:
                break
        waiting.cancel()
        return False

    async def over(row: Pending, id: str) -> None:
        row.recipients = ()
        ledger.settling.add(id)
        if await marked(row):
            ledger.settled.add(id)

    a = await one("app")
    b = await one("app", "out")
    c = await big()
    d = await big()
    if a:
        await over(a[0], a[0].message_id)
    if b:
        b[0].recipients, b[0].part, b[0].attempts = (1,), 2, 1
        dead = Pending(b[0].message_id, "app", (0,), 0, 9e9, state="dead")
        bounce = message()
        ledger.following.add(bounce.id)
        if await marked(b[0], splits=[dead], follow=[Row(bounce, [pending(bounce, "out")])]):
            ledger.followed.add(bounce.id)
    if c:
        await over(c[0], c[0].message_id)
    await asyncio.gather(one("app"), one("out", content=b"x" * 50_000), one("app"))
    if d:
        d[0].attempts, d[0].due, d[0].down = 3, 99.0, True
        await marked(d[0])
    await one("app")


@asynccontextmanager
async def told(disk: Disk, folder: Path, ledger: Ledger) -> Any:
    spool = disk.spool(folder)
    try:
        await spool.open()
    except SpoolError:
        yield None
        return
    await story(spool, ledger)
    yield spool
    await spool.close()


async def contents(folder: Path) -> dict[str, list[bytes]]:
    """What is in a spool after recovery: contents by id, in whatever state."""
    found: dict[str, list[bytes]] = {}
    async with opened(folder) as spool:
        for row in await spool.rows():
            assert not row.note.startswith("damaged"), row
        for id in {row.message_id for row in await spool.rows()}:
            exported = await spool.export(id)
            found.setdefault(id, []).append(exported[exported.index(b"+0000\r\n") + 7 :])
    return found


async def every_operation(path: Path, stride: int = 1, **plan: Any) -> tuple[int, int]:
    """Runs the story with the first, second, … operation failing, until none does.
    Returns how many there were, and in how many cases nobody knew."""
    unknown = 0
    for number in itertools.count(1, stride):
        disk = new_disk(first=number, **plan)
        ledger = Ledger()
        folder = path / f"spool{number}"
        async with told(disk, folder, ledger) as spool:
            fired = disk.faults.fired
            mend(disk)
            copy = path / f"copy{number}"
            if spool is not None:
                await as_if_killed(spool, copy)
        unknown += bool(ledger.unknown)
        if copy.exists():
            ledger.check(await contents(copy), complete=True)
            shutil.rmtree(copy)
        ledger.check(await contents(folder), complete=True)
        shutil.rmtree(folder)
        disk.vfs.unregister()
        if not fired:
            assert len(ledger.acked) == 8
            assert not ledger.refused
            return number - 1, unknown
    raise AssertionError


async def test_every_seventh_operation_fails_once(quick_path: Path) -> None:
    operations, unknown = await every_operation(quick_path, stride=7)
    assert operations > 80
    assert unknown == 0, "one fault alone never leaves us without an answer"


@pytest.mark.parametrize(
    "plan",
    [
        {"how": "EIO"},
        {"how": "EIO", "count": 2},
        {"how": "EIO", "count": 4},
        {"how": "EIO", "count": 10**9},
        {"how": "ENOSPC", "count": 10**9, "kinds": frozenset({"write", "open"})},
        {"how": "EIO", "count": 10**9, "kinds": frozenset({"sync", "sync_dir"})},
        {"how": "EDQUOT"},
        {"how": "EDQUOT", "count": 10**9, "kinds": frozenset({"write", "open"})},
        {"how": "ENOSPC"},
        {"how": "short", "kinds": frozenset({"write"})},
        {"how": "short", "count": 3, "kinds": frozenset({"write"})},
    ],
    ids=[
        "once",
        "twice",
        "four times",
        "broken for good",
        "full for good",
        "no sync works",
        "over quota once",
        "over quota for good",
        "full once",
        "short once",
        "short thrice",
    ],
)
@pytest.mark.long
async def test_every_operation_fails(quick_path: Path, plan: dict[str, Any]) -> None:
    operations, unknown = await every_operation(quick_path, **plan)
    assert operations > 20
    assert unknown == 0 or plan.get("count", 1) > 1


async def every_power_cut(path: Path, stride: int, **plan: Any) -> tuple[Ledger, int]:
    """After each operation, all that a disk may hold then (``replay``). Returns what was told, and
    how many operations failed."""
    disk = new_disk(keep=True, **plan)
    folder = path / "spool"
    moments: list[tuple[int, Ledger]] = []

    class Noting(Ledger):
        def told(self, id: str, content: bytes, error: SpoolError | None) -> None:
            super().told(id, content, error)
            moments.append((len(disk.faults.log), Ledger(dict(self.acked), set(self.refused))))

    ledger = Noting()
    async with told(disk, folder, ledger):
        pass
    disk.vfs.unregister()
    log = disk.faults.log
    for number in range(1, len(log) + 1, stride):
        then = Ledger()
        for when, state in moments:
            if when <= number:
                then = state
        # What was settled later may be gone already.
        then.settling = ledger.settling
        for left in get_args(Left):
            copy = path / f"{number}-{left}"
            replay(log[:number], str(folder), copy, left)
            then.check(await contents(copy), complete=False)
            shutil.rmtree(copy)
    shutil.rmtree(folder)
    return ledger, disk.faults.fired


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.long)])
async def test_the_power_goes_after_every_operation(quick_path: Path, stride: int) -> None:
    ledger, _ = await every_power_cut(quick_path, stride)
    assert len(ledger.acked) == 8


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.long)])
async def test_the_power_goes_after_a_commit_that_failed(quick_path: Path, stride: int) -> None:
    """What was refused stays away, also where the sync that failed had written it all."""
    refused = 0
    for number in itertools.count(1, stride):
        ledger, fired = await every_power_cut(quick_path, stride, first=number, kinds=frozenset({"sync"}), paths=("-wal",))
        refused += len(ledger.refused)
        if not fired:
            break
    assert refused > 0
