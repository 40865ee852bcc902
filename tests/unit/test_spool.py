"""The embedded spool: what is stored is there, groups close where they should, nothing blocks."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import apsw
import pytest

from gateway.contracts import ContentFile, Mark, Pending, Row, Spool, SpoolError
from gateway.message import Client, Message
from gateway.spool import engine, sqlite
from gateway.spool.engine import Engine
from gateway.spool.files import Files
from gateway.spool.records import SHIFT, VERSION, Entry
from gateway.spool.sqlite import SqliteSpool
from tests.crash.mail import TRACE, Events, Ticket, keep, large, mark, message, opened, pending, settle, store
from tests.loops import until


def facts(mail: Message) -> tuple[Any, ...]:
    """Everything a message says, the place of its content apart."""
    stored = mail.stored
    return (
        mail.id,
        mail.envelope,
        mail.client,
        mail.received_at,
        mail.listener,
        mail.trace,
        mail.checks,
        mail.priority,
        mail.not_before,
        mail.expires_at,
        stored.read(),
        stored.size,
        stored.eight_bit,
        stored.header_size,
    )


def rows_of(folder: Path, sql: str) -> list[tuple[Any, ...]]:
    """Straight from the file of a closed spool."""
    db = apsw.Connection(str(folder / "spool.db"))
    try:
        return list(db.execute(sql))
    finally:
        db.close()


async def test_it_is_the_contract(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        promised: Spool = spool
        file: ContentFile = promised.file("0190")
        assert file.path == str(tmp_path / "content" / "0190")
        assert promised.unhealthy is None


# ------------------------------------------------------------- what is stored is there


@pytest.mark.parametrize("content", [b"", b"x\r\n", b"\x00\xff" * 3000, b"y" * 262144], ids=["empty", "small", "binary", "inline limit"])
async def test_a_message_comes_back_as_it_was(tmp_path: Path, content: bytes) -> None:
    mail = message(content, recipients=3, priority=4, not_before=12.5)
    async with opened(tmp_path) as spool:
        (row,) = await keep(spool, mail, due=17.25, expires_at=99.5, priority=4, part=2, attempts=3, note="451 4.3.0 later", down=True)
        assert row.key > 0
        assert row.message_key == row.key >> SHIFT
        loaded = await spool.load(row)
        assert loaded is not None
        assert facts(loaded) == facts(mail)
    async with opened(tmp_path) as spool:
        (again,) = await spool.due("app", 20, 10)
        assert astuple(again) == astuple(row)
        loaded = await spool.load(again)
        assert loaded is not None
        assert facts(loaded) == facts(mail)


async def test_large_content_lies_in_a_file_of_its_own_and_goes_with_its_row(tmp_path: Path) -> None:
    content = os.urandom(1 << 20)
    async with opened(tmp_path) as spool:
        mail = await large(spool, content)
        first, second = await keep(spool, mail, "app", "archive")
        assert os.listdir(tmp_path / "content") == [mail.id]
        loaded = await spool.load(first)
        assert loaded is not None
        assert facts(loaded) == facts(mail)
        assert loaded.stored.path == str(tmp_path / "content" / mail.id)
        await settle(spool, first)
        assert await spool.export(mail.id) == TRACE + content
        await settle(spool, second)
        assert await spool.load(second) is None
    assert os.listdir(tmp_path / "content") == []
    assert rows_of(tmp_path, "SELECT count(*) FROM messages") == [(0,)]


async def test_a_content_file_that_was_not_written_whole_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        mail = await large(spool, b"z" * 300_000)
        mail.stored.size += 1
        error = await store(spool, Row(mail, [pending(mail)]))
        assert error is not None
        assert error.known
        assert "300000 octets" in str(error)
        assert await spool.counts() == {}


async def test_a_discarded_file_is_gone_and_a_stored_one_is_not(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        mail = await large(spool, b"z" * 300_000)
        assert mail.stored.path is not None
        assert spool._contents is not None
        file = spool._contents.coming(mail.stored.path)
        assert file is not None
        await keep(spool, mail)
        file.discard()
        other = spool.file("other")
        written: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        other.write([b"abc"], written.set_result)
        assert await written is None
        other.discard()
    assert os.listdir(tmp_path / "content") == [mail.id]


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x\0", "a" * 101])
async def test_a_file_is_named_by_us(tmp_path: Path, name: str) -> None:
    async with opened(tmp_path) as spool:
        with pytest.raises(ValueError, match="cannot name"):
            spool.file(name)


async def test_what_cannot_be_written_down_is_refused_alone(tmp_path: Path) -> None:
    events = Events()
    async with opened(tmp_path, observer=events) as spool:
        bad, good = message(), message()
        bad.envelope.mail_from = "\ud800@x"
        tickets = [Ticket(Row(bad, [pending(bad)])), Ticket(Row(good, [pending(good)]))]
        for ticket in tickets:
            spool.store(ticket)
        first, second = [await ticket.done for ticket in tickets]
        assert first is not None
        assert first.known
        assert second is None
        assert spool.unhealthy is None
    assert len(events.named("bug")) == 1


async def test_an_id_that_is_there_already_is_refused_alone(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        await keep(spool, message(id="twice"))
        again, good = message(id="twice"), message()
        tickets = [Ticket(Row(again, [pending(again)])), Ticket(Row(good, [pending(good)]))]
        for ticket in tickets:
            spool.store(ticket)
        first, second = [await ticket.done for ticket in tickets]
        assert first is not None
        assert first.known
        assert "UNIQUE" in str(first)
        assert second is None
        assert spool.unhealthy is None
        assert (await spool.counts())["app", "queued"][0] == 2


async def test_facts_of_checks_that_json_cannot_say_do_not_cost_the_mail(tmp_path: Path) -> None:
    mail = message()
    mail.checks = {"odd": {1: b"octets"}, "client": Client("192.0.2.1", 47110)}
    async with opened(tmp_path) as spool:
        (row,) = await keep(spool, mail)
        loaded = await spool.load(row)
        assert loaded is not None
        assert loaded.checks == {
            "odd": {"1": "b'octets'"},
            # A compiled class: its port is an int only while somebody looks at it.
            "client": {"ip": "192.0.2.1", "port": 47110, "helo": "", "protocol": "SMTP", "tls": None, "user": None},
        }


# ------------------------------------------------------------------------------- groups


class Watched(Engine):
    """Remembers what it was asked for; a write waits until it may ``go_on``."""

    def __init__(self, folder: str, vfs: str | None, files: Files) -> None:
        super().__init__(folder, vfs, files)
        self.groups: list[int] = []
        self.reads: list[int] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def write(self, entries: list[Entry]) -> engine.Written:
        assert self.go_on.wait(60), "nobody lets it go on"
        self.groups.append(len(entries))
        return super().write(entries)

    def load(self, keys: Sequence[int]) -> dict[int, engine.Loaded]:
        self.reads.append(len(keys))
        return super().load(keys)


def watched(spool: SqliteSpool) -> Watched:
    assert isinstance(spool._engine, Watched)
    return spool._engine


def groups(spool: SqliteSpool) -> list[int]:
    """How many entries each transaction has, from now on."""
    sizes = watched(spool).groups
    sizes.clear()
    return sizes


async def test_what_arrives_in_one_turn_is_one_group_and_what_arrives_meanwhile_the_next(tmp_path: Path) -> None:
    async with opened(tmp_path, engine=Watched) as spool:
        sizes = groups(spool)
        mails = [message() for _ in range(30)]
        tickets = [Ticket(Row(mail, [pending(mail)])) for mail in mails]
        for ticket in tickets[:10]:
            spool.store(ticket)
        await asyncio.sleep(0)
        for ticket in tickets[10:]:
            spool.store(ticket)
        assert [ticket.closed for ticket in tickets] == [1] * 10 + [0] * 20
        assert await asyncio.gather(*(ticket.done for ticket in tickets)) == [None] * 30
        assert sizes == [10, 20]


async def test_who_was_told_by_the_last_group_is_waited_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path, engine=Watched) as spool:
        sizes = groups(spool)
        monkeypatch.setattr(sqlite, "COMPANY", 60.0)
        await asyncio.gather(keep(spool), keep(spool))
        first = asyncio.create_task(keep(spool))
        await asyncio.sleep(0.05)
        assert sizes == [2]
        await asyncio.gather(first, keep(spool))
        assert sizes == [2, 2]


async def test_who_does_not_come_again_is_not_waited_for_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path, engine=Watched) as spool:
        sizes = groups(spool)
        monkeypatch.setattr(sqlite, "COMPANY", 60.0)
        monkeypatch.setattr(sqlite, "IMPATIENT", 2)
        await asyncio.gather(keep(spool), keep(spool))
        alone = asyncio.create_task(keep(spool))
        await until(lambda: spool._company_timer is not None)
        assert spool._company_timer is not None
        spool._company_timer.cancel()
        spool._company_due()  # what the timer does; in vain: the next two groups wait for nobody
        await alone
        async with asyncio.timeout(30):
            await asyncio.gather(keep(spool), keep(spool))
            await keep(spool)
            await asyncio.gather(keep(spool), keep(spool))
        assert sizes == [2, 1, 2, 1, 2]
        first = asyncio.create_task(keep(spool))
        await asyncio.sleep(0.05)
        assert sizes == [2, 1, 2, 1, 2]
        await asyncio.gather(first, keep(spool))
        assert sizes == [2, 1, 2, 1, 2, 2]


async def test_a_backlog_of_full_groups_waits_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path, engine=Watched) as spool:
        sizes = groups(spool)
        monkeypatch.setattr(sqlite, "COMPANY", 60.0)
        mails = [message(b"x" * 200_000) for _ in range(25)]
        tickets = [Ticket(Row(mail, [pending(mail)])) for mail in mails]
        for ticket in tickets:
            spool.store(ticket)
        async with asyncio.timeout(30):
            await asyncio.gather(*(ticket.done for ticket in tickets))
        assert sizes == [10, 10, 5]


async def test_the_last_ticket_before_the_end_waits_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "COMPANY", 60.0)
    async with opened(tmp_path) as spool:
        await asyncio.gather(keep(spool), keep(spool))
        last = asyncio.create_task(keep(spool))
        await asyncio.sleep(0.01)
        assert not last.done()
        async with asyncio.timeout(30):
            await spool.close()
            await last


async def test_a_group_closes_at_two_mebibytes(tmp_path: Path) -> None:
    async with opened(tmp_path, engine=Watched) as spool:
        sizes = groups(spool)
        mails = [message(b"x" * 200_000) for _ in range(25)]
        tickets = [Ticket(Row(mail, [pending(mail)])) for mail in mails]
        for ticket in tickets:
            spool.store(ticket)
        await asyncio.gather(*(ticket.done for ticket in tickets))
        assert sizes == [10, 10, 5]


async def test_a_ticket_that_has_nothing_left_to_store_is_not_told(tmp_path: Path) -> None:
    async with opened(tmp_path, engine=Watched) as spool:
        sizes = groups(spool)
        empty = Ticket()
        spool.store(empty)
        await keep(spool)
        assert empty.closed == 1
        assert not empty.done.done()
        assert sizes == [1]


async def test_a_lone_mark_waits_50_ms_and_many_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path, engine=Watched) as spool:
        mail = message()
        rows = await keep(spool, mail, *[f"sink{n}" for n in range(300)])
        sizes = groups(spool)
        started = time.monotonic()
        await settle(spool, rows[0])
        assert time.monotonic() - started >= 0.045
        monkeypatch.setattr(sqlite, "MARK_DELAY", 60)
        for row in rows[1:256]:
            row.recipients = ()
            spool.mark(Mark(row))
        await settle(spool, rows[256])
        assert sizes == [1, 256]


async def test_marks_ride_with_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path, engine=Watched) as spool:
        (row,) = await keep(spool)
        sizes = groups(spool)
        monkeypatch.setattr(sqlite, "MARK_DELAY", 60)
        row.recipients = ()
        spool.mark(Mark(row))
        await keep(spool)
        assert sizes == [2]
        assert (await spool.counts())["app", "queued"][0] == 1


async def test_a_mark_for_a_row_that_is_being_written_queues_behind_it(tmp_path: Path) -> None:
    async with opened(tmp_path, engine=Watched) as spool:
        sizes = groups(spool)
        mail = message()
        row = pending(mail)
        ticket = Ticket(Row(mail, [row]))
        spool.store(ticket)
        await asyncio.sleep(0)
        assert ticket.closed
        assert row.key == 0
        done = settle(spool, row)
        assert list(await asyncio.wait_for(asyncio.gather(done, ticket.done), 30)) == [None, None]
        assert sizes == [1, 1]
        assert await spool.counts() == {}


async def test_a_mark_for_a_row_that_was_never_given_is_a_bug(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        mail = message()
        with pytest.raises(AssertionError, match="before its row was stored"):
            spool.mark(Mark(pending(mail)))
        ticket = Ticket(Row(mail, [row := pending(mail)]))
        spool.store(ticket)
        with pytest.raises(AssertionError, match="before its row was stored"):
            spool.mark(Mark(row))
        await ticket.done


async def test_a_mark_for_a_row_that_was_refused_comes_to_nothing(tmp_path: Path) -> None:
    """The client still has the message: neither the mark nor a bounce may live."""
    async with opened(tmp_path) as spool:
        await keep(spool, message(id="twice"))
        mail, bounce = message(id="twice"), message()
        row = pending(mail)
        ticket = Ticket(Row(mail, [row]))
        spool.store(ticket)
        await asyncio.sleep(0)
        row.recipients = ()
        follow = [Row(bounce, [pending(bounce, "out")])]
        synced = asyncio.get_running_loop().create_future()
        # At once: a turn later the spool may have refused the row already.
        spool.mark(Mark(row, synced=lambda: synced.set_result(None), follow=follow))
        await asyncio.wait_for(asyncio.gather(synced, ticket.done), 30)
        assert set(await spool.counts()) == {("app", "queued")}


async def test_several_marks_for_one_row_in_one_group_end_as_the_last(tmp_path: Path) -> None:
    async with opened(tmp_path, engine=Watched) as spool:
        one, two = await keep(spool, message(recipients=2)), await keep(spool)
        sizes = groups(spool)
        row = one[0]
        for attempt in range(1, 4):
            row.attempts, row.due, row.note = attempt, attempt * 100.0, f"451 4.0.0 try {attempt}"
            spool.mark(Mark(row))
        row.attempts = 99  # after the last mark: not written
        gone = two[0]
        gone.attempts = 1
        spool.mark(Mark(gone))
        gone.recipients = ()
        await mark(spool, gone)
        assert sizes == [5]
        (found,) = await spool.due("app", 1e12, 10)
        assert (found.key, found.attempts, found.due, found.note) == (row.key, 3, 300.0, "451 4.0.0 try 3")


async def test_a_mark_splits_and_follows_in_one_transaction(tmp_path: Path) -> None:
    """Two of three recipients fail for good: dead letter and bounce, the third is tried again."""
    async with opened(tmp_path) as spool:
        mail, bounce = message(recipients=3), message()
        (row,) = await keep(spool, mail)
        row.recipients, row.part, row.due = (1,), 2, 500.0
        dead = pending(mail, recipients=(0, 2), state="dead", note="550 5.1.1 no such user")
        follow = pending(bounce, "out")
        await mark(spool, row, splits=[dead], follow=[Row(bounce, [follow])])
        assert dead.message_key == row.message_key
        assert dead.key > row.key > 0
        assert follow.message_key > row.message_key
        assert await spool.counts() == {
            ("app", "queued"): (1, mail.received_at),
            ("app", "dead"): (1, mail.received_at),
            ("out", "queued"): (1, bounce.received_at),
        }
        await settle(spool, follow)
        listed = await spool.rows(message_id=mail.id)
        assert [(each.id, each.state, each.recipients) for each in listed] == [
            (f"{mail.id}_2", "queued", ["user1@app.example"]),
            (mail.id, "dead", ["user0@app.example", "user2@app.example"]),
        ]
        await settle(spool, row)
        loaded = await spool.load(dead)
        assert loaded is not None, "the message stays as long as a row needs it"
        await settle(spool, dead)
        assert await spool.load(dead) is None


async def test_the_number_of_a_row_is_never_used_twice(tmp_path: Path) -> None:
    """A mark that comes late for a row that a person dropped must not hit another."""
    async with opened(tmp_path) as spool:
        mail = message(recipients=2)
        (row,) = await keep(spool, mail)
        assert await spool.change([mail.id], "drop") == 1
        (other,) = await keep(spool)
        assert other.key > row.key
        dead = pending(mail, recipients=(0,), state="dead")
        row.recipients = ()
        await mark(spool, row, splits=[dead])
        assert {place: count for place, (count, _) in (await spool.counts()).items()} == {("app", "queued"): 1}
        assert [each.key for each in await spool.due("app", 1, 10)] == [other.key]


async def test_callbacks_never_come_before_the_call_returned_and_may_raise(tmp_path: Path) -> None:
    events = Events()
    async with opened(tmp_path, observer=events) as spool:
        mail = message()

        class Rude(Ticket):
            def stored(self, error: SpoolError | None) -> None:
                raise RuntimeError("rude")

        spool.store(Rude(Row(mail, [pending(mail)])))
        await keep(spool)
        assert len(events.named("bug")) == 1
    late = Ticket(Row(mail, [pending(mail)]))
    spool.store(late)
    assert not late.done.done()
    error = await late.done
    assert error is not None
    assert error.known


async def test_a_slow_disk_never_blocks_the_loop(tmp_path: Path) -> None:
    async with opened(tmp_path, engine=Watched) as spool:
        watched(spool).go_on.clear()
        mail = message()
        ticket = Ticket(Row(mail, [row := pending(mail)]))
        spool.store(ticket)
        loads = asyncio.ensure_future(spool.counts())
        for turn in range(100):
            await asyncio.sleep(0.001)
            spool.file(f"file{turn}").discard()
            if turn == 20:
                assert ticket.closed
                spool.mark(Mark(row))
        assert not ticket.done.done()
        watched(spool).go_on.set()
        assert await ticket.done is None
        await loads


async def test_after_the_end_everything_is_refused_and_nothing_raises(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        (row,) = await keep(spool)
        half = spool.file("half")
        written: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        half.write([b"abc"], written.set_result)
        assert await written is None
    half.discard()
    late: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
    spool.file("late").write([b"abc"], late.set_result)
    assert isinstance(await late, SpoolError)
    row.recipients = ()
    spool.mark(Mark(row))
    for reading in (spool.load(row), spool.due("app", 1e12, 1), spool.counts(), spool.rows()):
        with pytest.raises(SpoolError, match="closed"):
            await reading
    await spool.close()
    async with opened(tmp_path) as spool:
        assert len(await spool.due("app", 1e12, 10)) == 1
        assert os.listdir(tmp_path / "content") == []


async def test_closing_writes_what_waits(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        (row,) = await keep(spool)
        mail, big = message(), await large(spool, b"q" * 300_000)
        tickets = [Ticket(Row(each, [pending(each)])) for each in (mail, big)]
        for ticket in tickets:
            spool.store(ticket)
        row.recipients = ()
        spool.mark(Mark(row))
    assert [ticket.done.result() for ticket in tickets] == [None, None]
    assert rows_of(tmp_path, "SELECT id FROM messages ORDER BY id") == sorted([(mail.id,), (big.id,)])


# ------------------------------------------------------------------------------- the schedule


async def test_due_is_by_priority_then_time_and_only_what_is_due(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        for name, priority, due, sink, state in [
            ("late", 0, 300.0, "app", "queued"),
            ("second", 0, 200.0, "app", "queued"),
            ("first", 0, 100.0, "app", "queued"),
            ("urgent", 9, 250.0, "app", "queued"),
            ("urgent later", 9, 900.0, "app", "queued"),
            ("lazy", -9, 1.0, "app", "queued"),
            ("other", 9, 1.0, "out", "queued"),
            ("held", 9, 1.0, "app", "held"),
            ("dead", 9, 1.0, "app", "dead"),
        ]:
            await keep(spool, message(id=name), sink, priority=priority, due=due, state=state)
        assert [row.message_id for row in await spool.due("app", 250, 10)] == ["urgent", "first", "second", "lazy"]
        assert [row.message_id for row in await spool.due("app", 250, 2)] == ["urgent", "first"]
        assert [row.message_id for row in await spool.due("app", float("inf"), 3)] == ["urgent", "urgent later", "first"]
        assert await spool.next_due("app", 0) == 1.0
        assert await spool.next_due("app", 250) == 300.0
        assert await spool.next_due("app", 900) is None
        assert await spool.next_due("nobody", 0) is None


async def test_each_priority_that_waits_has_a_share_of_every_look(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        for number in range(70):
            await keep(spool, message(id=f"high {number}"), "app", priority=9, due=float(number))
        for priority in (3, 0, -9):
            for number in range(10):
                await keep(spool, message(id=f"{priority} {number}"), "app", priority=priority, due=float(number))
        await keep(spool, message(id="not yet"), "app", priority=-1, due=5000.0)

        async def look(limit: int) -> list[str]:
            return [row.message_id for row in await spool.due("app", 100.0, limit)]

        assert await look(10) == [f"high {number}" for number in range(10)], "a small look is strict"
        wanted = [f"high {number}" for number in range(58)] + ["3 0", "3 1", "0 0", "0 1", "-9 0", "-9 1"]
        assert await look(64) == wanted
        assert len(await look(96)) == 96
        assert len(await look(1000)) == 100, "all that is due, and nothing else"


async def test_what_waits_for_the_sink_can_probe_it_and_nothing_else_that_is_not_due(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        await keep(spool, message(id="held by its sender"), "app", priority=9, due=5000.0)
        await keep(spool, message(id="waits"), "app", due=4000.0, down=True, attempts=1)
        await keep(spool, message(id="waits elsewhere"), "out", due=4000.0, down=True, attempts=1)
        assert await spool.due("app", 100.0, 5) == []
        assert [row.message_id for row in await spool.due("app", 100.0, 5, down=True)] == ["waits"]
        await keep(spool, message(id="due"), "app", due=50.0)
        assert [row.message_id for row in await spool.due("app", 100.0, 5, down=True)] == ["due", "waits"]
        assert [row.message_id for row in await spool.due("app", 100.0, 1, down=True)] == ["due"]


async def test_retrying_a_whole_sink_leaves_alone_what_its_sender_wants_held(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        await keep(spool, message(id="parked"), "app", due=5000.0, expires_at=9000.0)
        await keep(spool, message(id="deferred"), "app", due=5000.0, expires_at=9000.0, attempts=1)
        await keep(spool, message(id="aside"), "app", due=5000.0, expires_at=9000.0, state="held")
        assert await spool.change(None, "retry", sink="app", now=100.0) == 2
        assert sorted(row.message_id for row in await spool.due("app", 100.0, 5)) == ["aside", "deferred"]
        assert await spool.change(["parked"], "retry", now=100.0) == 1, "a person may name it"
        assert len(await spool.due("app", 100.0, 5)) == 3


async def test_wake_makes_due_what_waits_for_its_sink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BATCH", 3)
    async with opened(tmp_path) as spool:
        for _ in range(10):
            await keep(spool, None, "app", due=5000.0, down=True)
        await keep(spool, None, "app", due=5000.0)
        await keep(spool, None, "out", due=5000.0, down=True)
        await keep(spool, None, "app", due=5000.0, down=True, state="held")
        await keep(spool, None, "app", due=40.0, down=True)
        assert await spool.wake("app", 100.0) == 11
        assert len(await spool.due("app", 100.0, 100)) == 11
        assert [row.due for row in await spool.due("app", 50.0, 100)] == [40.0], "what was due already keeps its place"
        assert await spool.wake("app", 100.0) == 0
        assert await spool.due("out", 100.0, 100) == []


async def test_counts_follow_every_change(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        mails = [message() for _ in range(4)]
        for second, mail in enumerate(mails):
            mail.received_at = 1000.0 + second
        rows = [(await keep(spool, mail))[0] for mail in mails]
        assert await spool.counts() == {("app", "queued"): (4, 1000.0)}
        await settle(spool, rows[0])
        assert await spool.counts() == {("app", "queued"): (3, 1001.0)}
        rows[2].state = "dead"
        await mark(spool, rows[2])
        rows[1].state = "dead"
        await mark(spool, rows[1])
        wanted = {("app", "queued"): (1, 1003.0), ("app", "dead"): (2, 1001.0)}
        assert await spool.counts() == wanted
    async with opened(tmp_path) as spool:
        assert await spool.counts() == wanted


async def test_many_loads_in_one_turn_are_one_read(tmp_path: Path) -> None:
    async with opened(tmp_path, engine=Watched) as spool:
        rows = [(await keep(spool))[0] for _ in range(20)]
        loaded = await asyncio.gather(*(spool.load(row) for row in rows), spool.load(rows[0]))
        assert [mail and mail.id for mail in loaded] == [row.message_id for row in [*rows, rows[0]]]
        assert watched(spool).reads == [20]


# ---------------------------------------------------------------------------- for people


async def test_a_person_holds_releases_retries_and_drops(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        (row,) = await keep(spool, message(id="one"), due=50.0)
        await keep(spool, message(id="two"), state="dead", expires_at=10.0)
        assert await spool.change(["one"], "release") == 0, "only what is held is released"
        assert await spool.change(["one"], "hold") == 1
        assert await spool.due("app", 1e12, 10) == []
        row.attempts, row.due = 1, 77.0
        await mark(spool, row)
        assert await spool.due("app", 1e12, 10) == [], "a delivery that was out does not undo it"
        assert await spool.change(["one"], "release") == 1
        assert [(each.message_id, each.due, each.attempts) for each in await spool.due("app", 1e12, 10)] == [("one", 77.0, 1)]
        assert await spool.change(None, "retry", state="dead", now=5000.0) == 1
        (two,) = [each for each in await spool.due("app", 1e12, 10) if each.message_id == "two"]
        assert two.due == 5000.0
        assert two.expires_at >= 5060.0, "it had expired: it gets time again"
        assert await spool.change(None, "drop", sink="nobody") == 0
        assert await spool.change(None, "drop", sink="app") == 2
        assert await spool.counts() == {}
    assert rows_of(tmp_path, "SELECT count(*) FROM messages") == [(0,)]


async def test_a_person_changes_more_rows_than_one_transaction_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BATCH", 7)
    async with opened(tmp_path) as spool:
        ids = [(await keep(spool))[0].message_id for _ in range(30)]
        assert await spool.change(None, "hold") == 30
        assert await spool.change(ids[:21], "retry", now=1.0) == 21
        assert {place: count for place, (count, _) in (await spool.counts()).items()} == {("app", "held"): 9, ("app", "queued"): 21}


async def test_rows_can_be_asked_for_by_sink_state_and_id(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        mail = message(b"12345", id="0190-abc", recipients=2)
        first, _ = await keep(spool, mail, "app", "out")
        await keep(spool, message(id="other"), "app", state="held", note="no such sink")
        first.recipients, first.part, first.attempts = (1,), 3, 2
        await mark(spool, first)
        assert [each.id for each in await spool.rows()] == ["0190-abc_3", "0190-abc", "other"]
        (listed,) = await spool.rows(message_id="0190-abc_3")
        assert (listed.recipients, listed.mail_from, listed.size, listed.attempts) == (["user1@app.example"], "sender@client.example", 5, 2)
        assert listed.received_at == mail.received_at
        assert [each.note for each in await spool.rows(state="held")] == ["no such sink"]
        assert len(await spool.rows(sink="app")) == 2
        assert len(await spool.rows(limit=1)) == 1
        assert await spool.rows(message_id="unknown_1") == []
        assert await spool.export("0190-abc") == TRACE + b"12345"
        assert await spool.export("0190-abc_3") == TRACE + b"12345"
        with pytest.raises(LookupError, match="no message unknown"):
            await spool.export("unknown")


# ------------------------------------------------------------------------- opening again


async def test_only_one_process_has_a_spool(tmp_path: Path) -> None:
    async with opened(tmp_path):
        other = SqliteSpool(tmp_path, observer=Events())
        with pytest.raises(SpoolError, match=f"in use by process {os.getpid()}: stop that process"):
            await other.open()
        code = (
            "import asyncio, sys\n"
            "from gateway.spool.sqlite import SqliteSpool\n"
            "from tests.crash.mail import Events\n"
            "asyncio.run(SqliteSpool(sys.argv[1], observer=Events()).open())\n"
        )
        run = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(tmp_path), stderr=subprocess.PIPE)
        _, told = await asyncio.wait_for(run.communicate(), 20)
        assert f"in use by process {os.getpid()}" in told.decode()
    async with opened(tmp_path):
        pass


async def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        await keep(spool)
    db = apsw.Connection(str(tmp_path / "spool.db"))
    db.execute(f"PRAGMA user_version = {VERSION + 1}")
    db.close()
    with pytest.raises(SpoolError, match=f"has schema {VERSION + 1}, this program knows up to {VERSION}") as caught:
        async with opened(tmp_path):
            pass
    assert caught.value.known
    assert rows_of(tmp_path, "SELECT count(*) FROM messages") == [(1,)]


async def test_an_older_schema_is_brought_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path) as spool:
        await keep(spool)
    monkeypatch.setattr(engine, "VERSION", VERSION + 2)
    monkeypatch.setattr(
        engine,
        "UPGRADES",
        {VERSION: "ALTER TABLE health ADD COLUMN extra TEXT", VERSION + 1: "UPDATE health SET extra = 'there'"},
    )
    async with opened(tmp_path) as spool:
        assert (await spool.counts())["app", "queued"][0] == 1
    assert rows_of(tmp_path, "SELECT extra FROM health") == [("there",)]
    assert rows_of(tmp_path, "PRAGMA user_version") == [(VERSION + 2,)]


async def test_a_spool_of_the_first_schema_is_brought_forward(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        mail = await large(spool, b"z" * 300_000)
        await keep(spool, mail)
    db = apsw.Connection(str(tmp_path / "spool.db"))
    db.execute("DROP INDEX messages_file; PRAGMA user_version = 1")
    db.close()
    async with opened(tmp_path) as spool:
        (row,) = await spool.due("app", 1e12, 10)
        assert await spool.load(row) is not None
    assert rows_of(tmp_path, "SELECT name FROM sqlite_schema WHERE name = 'messages_file'") == [("messages_file",)]
    assert rows_of(tmp_path, "PRAGMA user_version") == [(VERSION,)]


async def test_a_start_reads_no_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A million messages are gigabytes: new mail would wait for them (as long as it takes to check a small spool whole).
    monkeypatch.setattr(engine, "CHECK_LIMIT", 0)
    async with opened(tmp_path) as spool:
        await asyncio.gather(*(keep(spool, message(b"y" * 1500)) for _ in range(1000)))
    async with opened(tmp_path) as spool:
        assert (await spool.counts())["app", "queued"][0] == 1000
        read = spool._engine._database.status(apsw.SQLITE_DBSTATUS_CACHE_MISS)[0]
    assert read * engine.PAGE_SIZE < (tmp_path / "spool.db").stat().st_size / 4


async def test_a_database_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    db = apsw.Connection(str(tmp_path / "spool.db"))
    db.execute("CREATE TABLE theirs (x)")
    db.close()
    with pytest.raises(SpoolError, match="not a spool of this program"):
        async with opened(tmp_path):
            pass
    assert rows_of(tmp_path, "SELECT name FROM sqlite_schema") == [("theirs",)]


async def test_orphans_are_removed_and_what_is_there_is_told(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        mail = await large(spool, b"z" * 300_000)
        await keep(spool, mail)
    (tmp_path / "content" / "orphan").write_bytes(b"half a message")
    events = Events()
    async with opened(tmp_path, observer=events) as spool:
        assert os.listdir(tmp_path / "content") == [mail.id]
        (row,) = await spool.due("app", 1e12, 10)
        assert await spool.load(row) is not None
    assert events.named("recovered") == [{"messages": 1, "orphans": 1}]


async def test_messages_are_told_not_their_rows(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        first, _ = await keep(spool, message(), "app", "archive")
        await keep(spool, message())
        await settle(spool, first)
    events = Events()
    async with opened(tmp_path, observer=events) as spool:
        await keep(spool, message(), "app", "archive")
    async with opened(tmp_path, observer=events):
        pass
    assert [event["messages"] for event in events.named("recovered")] == [2, 3]


def modes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}


async def test_nobody_else_may_read_it_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        async with opened(tmp_path / "deep" / "er" / "0") as spool:
            await keep(spool, await large(spool, b"z" * 300_000))
            found = modes(tmp_path)
    finally:
        os.umask(before)
    folders = {"deep", "deep/er", "deep/er/0", "deep/er/0/content"}
    assert {path: mode for path, mode in found.items() if path in folders} == dict.fromkeys(folders, 0o700)
    files = {path: mode for path, mode in found.items() if path not in folders}
    assert {"deep/er/0/spool.db", "deep/er/0/spool.db-wal", "deep/er/0/lock"} < set(files)
    assert set(files.values()) == {0o600}


async def test_a_strict_umask_does_not_lock_us_out(tmp_path: Path) -> None:
    before = os.umask(0o777)
    try:
        async with opened(tmp_path / "0") as spool:
            (row,) = await keep(spool, await large(spool, b"z" * 300_000))
            assert await spool.load(row) is not None
    finally:
        os.umask(before)


# ---------------------------------------------------------------------------------- damage


async def test_a_damaged_message_is_set_aside_and_the_others_go_on(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        bad, good = await keep(spool, message(b"A" * 5000)), await keep(spool, message(b"B" * 5000))
    path = tmp_path / "spool.db"
    octets = path.read_bytes()
    assert octets.count(b"A" * 1000) > 0
    path.write_bytes(octets.replace(b"A" * 1000, b"A" * 999 + b"a"))
    events = Events()
    async with opened(tmp_path, observer=events) as spool:
        assert await spool.load(bad[0]) is None
        loaded = await spool.load(good[0])
        assert loaded is not None
        (listed,) = await spool.rows(state="held")
        assert listed.message_id == bad[0].message_id
        assert listed.note == "damaged: the checksum of the content does not fit"
        assert [row.key for row in await spool.due("app", 1e12, 10)] == [good[0].key]
        with pytest.raises(SpoolError, match="is damaged"):
            await spool.export(bad[0].message_id)
    (told,) = events.named("damaged")
    assert told["reason"] == "the checksum of the content does not fit"


def do_harm(path: Path, harm: str) -> None:
    octets = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(octets[:-1] if harm == "cut" else octets[:1000] + b"Z" + octets[1001:])


@pytest.mark.parametrize("harm", ["flip", "cut", "gone"])
async def test_a_damaged_content_file_is_set_aside(tmp_path: Path, harm: str) -> None:
    async with opened(tmp_path) as spool:
        mail = await large(spool, b"z" * 300_000)
        (row,) = await keep(spool, mail)
        do_harm(Path(mail.stored.path or ""), harm)
        assert await spool.load(row) is None
        (listed,) = await spool.rows()
        assert listed.state == "held"
        assert listed.note.startswith("damaged: ")


async def test_what_is_dropped_while_it_is_read_is_gone_and_not_damaged(tmp_path: Path) -> None:
    asked, dropped = threading.Event(), threading.Event()

    class Slow(Files):
        def open(self, path: str, flags: int, mode: int = 0o600) -> int:
            if "/content/" in path and flags == os.O_RDONLY:
                asked.set()
                assert dropped.wait(30)
            return super().open(path, flags, mode)

    events = Events()
    async with opened(tmp_path, observer=events, files=Slow()) as spool:
        mail = await large(spool, b"z" * 300_000)
        (row,) = await keep(spool, mail)
        loading = asyncio.ensure_future(spool.load(row))
        await until(asked.is_set)
        assert await spool.change([mail.id], "drop") == 1
        await until(lambda: not os.path.exists(mail.stored.path or ""))
        dropped.set()
        assert await loading is None
    assert not events.named("damaged")


async def test_damaged_recipients_are_never_delivered(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        await keep(spool, message(recipients=2), recipients=(0,))
    db = apsw.Connection(str(tmp_path / "spool.db"))
    db.execute("UPDATE pendings SET recipients = CAST('[1]' AS BLOB)")
    db.close()
    async with opened(tmp_path) as spool:
        assert await spool.due("app", 1e12, 10) == []
        (listed,) = await spool.rows()
        assert (listed.state, listed.note) == ("held", "damaged: the checksum of the recipients does not fit")
        assert {place: count for place, (count, _) in (await spool.counts()).items()} == {("app", "held"): 1}


async def test_a_row_whose_message_is_missing_is_set_aside(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        (row,) = await keep(spool)
        (gone,) = await keep(spool)
    db = apsw.Connection(str(tmp_path / "spool.db"))
    db.execute(f"DELETE FROM messages WHERE key = {row.message_key}")
    db.execute(f"DELETE FROM pendings WHERE key = {gone.key}")
    db.execute(f"DELETE FROM messages WHERE key = {gone.message_key}")
    db.close()
    events = Events()
    async with opened(tmp_path, observer=events) as spool:
        assert await spool.load(gone) is None
        assert events.named("damaged") == []
        assert await spool.load(row) is None
        (listed,) = await spool.rows()
        assert (listed.state, listed.note) == ("held", "damaged: the message is missing")


# --------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize("small_limits", [True, False], ids=["many checkpoints", "real limits"])
async def test_the_wal_and_free_pages_stay_bounded_under_constant_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_limits: bool
) -> None:
    """20,000 messages come and go and it never rests."""
    if small_limits:
        monkeypatch.setattr(engine, "CHECKPOINT_PAGES", 200)
        monkeypatch.setattr(engine, "FREE_PAGES", 64)
    monkeypatch.setattr(sqlite, "_WATCH", 1000.0)
    total = 20_000
    async with opened(tmp_path) as spool:
        alive: list[Pending] = []
        largest = 0
        for start in range(0, total, 500):
            mails = [message(b"x" * 1000) for _ in range(500)]
            tickets = [Ticket(Row(mail, [pending(mail)])) for mail in mails]
            for ticket in tickets:
                spool.store(ticket)
            for row in alive:
                row.recipients = ()
                spool.mark(Mark(row))
            assert set(await asyncio.gather(*(ticket.done for ticket in tickets))) == {None}
            # A backlog of half of it comes up, then goes.
            fresh = [row for ticket in tickets for row in ticket.rows[0].pendings]
            alive = [*alive, *fresh] if start < total / 2 else fresh
            if start < total / 2:
                alive = [row for row in alive if row.recipients]
            largest = max(largest, (tmp_path / "spool.db-wal").stat().st_size)
        # The limit and what one group may add to it.
        assert largest <= (engine.CHECKPOINT_PAGES + 600) * (engine.PAGE_SIZE + 24)
        free = await spool._call(spool._engine._number, "PRAGMA freelist_count")
        assert free <= engine.FREE_PAGES + 600
        assert (await spool.counts())["app", "queued"][0] == len(alive)


async def test_what_was_freed_is_given_back_at_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "FREE_PAGES_AT_REST", 16)
    monkeypatch.setattr(engine, "VACUUM_STEP_AT_REST", 64)
    monkeypatch.setattr(sqlite, "_WATCH", 0.02)
    async with opened(tmp_path) as spool:
        rows = [(await keep(spool, message(b"x" * 100_000)))[0] for _ in range(30)]
        await until(lambda: (tmp_path / "spool.db").stat().st_size > 3_000_000)
        for row in rows:
            row.recipients = ()
            spool.mark(Mark(row))
        await until(lambda: (tmp_path / "spool.db").stat().st_size <= 40 * engine.PAGE_SIZE)


async def test_what_is_due_is_never_walked(tmp_path: Path) -> None:
    """A million rows: every question of the schedule is answered from the index."""
    Files().mkdir(str(tmp_path))
    database = Engine(str(tmp_path), None, Files())
    database.open()
    try:
        fill = """
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000)
        INSERT INTO pendings SELECT i << 20, 'app', 'queued', 0, 1e9 + i, 2e9, 1, 0, i % 2, 0, CAST('[0]' AS BLOB), '', 0 FROM n"""
        database._at.execute(f"PRAGMA synchronous = OFF; {fill}; PRAGMA synchronous = FULL")

        def plan(sql: str, *bindings: Any) -> str:
            return " / ".join(str(line[3]) for line in database._at.execute(f"EXPLAIN QUERY PLAN {sql}", bindings))

        index = "USING {}INDEX pendings_due (sink=? AND state=?"
        assert index.format("") + " AND priority=? AND due<?)" in plan(engine._DUE, "app", 0, 1e9, 100)
        assert index.format("COVERING ") + " AND priority<?)" in plan(engine._NEXT_PRIORITY, "app", 9)
        assert index.format("COVERING ") + " AND priority=? AND due>?)" in plan(engine._NEXT_DUE, "app", 0, 1.0)
        database._survey()
        steps = 0

        def step() -> bool:
            nonlocal steps
            steps += 1
            return False

        # Called once per 1,000 instructions of SQLite's machine: a walk would be thousands of calls.
        database._database.set_progress_handler(step, 1000)
        assert database.due("app", 1e9, 100) == ([], [])
        assert database.next_due("app", 1e9 + 10) == 1e9 + 11
        assert database.counts() == {("app", "queued"): (1_000_000, 0.0)}
        assert steps == 0
        # What is overdue no index knows: a slice is walked, and no more.
        assert database.overdue(1.0, 0) == ([], [], engine.SLICE << SHIFT)
        assert steps < 100
        assert database.wake("app", 5.0) == engine.BATCH
    finally:
        database.abandon()


async def test_no_statement_of_the_loop_walks_a_table(tmp_path: Path) -> None:
    database = Engine(str(tmp_path), None, Files())
    database.open()
    try:
        for sql in (
            engine._TALLY,
            engine._DELETE_PENDINGS,
            engine._DELETE_SETTLED,
            engine._FILES_OF_SETTLED,
            engine._UPDATE_PENDINGS[2],
        ):
            plan = [str(line[3]) for line in database._at.execute(f"EXPLAIN QUERY PLAN {sql}", (None,) * sql.count("?"))]
            walked = [line for line in plan if line.startswith("SCAN") and "json_each" not in line and "VALUES" not in line]
            assert not walked, (sql, plan)
    finally:
        database.abandon()


async def test_what_is_overdue_is_found_in_slices_of_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "SLICE", 3)
    async with opened(tmp_path) as spool:
        assert await spool.overdue(1e9, 0) == ([], 0)
        for number in range(4):
            for sink, state, expires in [("app", "queued", 100.0), ("out", "queued", 300.0), ("app", "held", 1.0), ("app", "dead", 1.0)]:
                await keep(spool, message(id=f"{number}-{sink}-{state}"), sink, due=900.0, expires_at=expires, state=state)
        found: list[Pending] = []
        looks, after = 0, 0
        while not looks or after:
            rows, after = await spool.overdue(200.0, after)
            found += rows
            looks += 1
        assert [row.message_id for row in found] == [f"{number}-app-queued" for number in range(4)], "due or not"
        assert looks == 7
        assert (await spool.overdue(300.0, 0))[0][1].sink == "out"
