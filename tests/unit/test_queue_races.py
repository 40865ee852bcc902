"""What may cross on the way between the queue and its spool, and timers that are early."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

import pytest
import uvloop

from gateway.contracts import Pending
from gateway.route import Route

from ..loops import until
from .stage import DOWN, LATER, NEVER, OK, Stage, StagedSink, breathe, patience


async def test_a_row_that_was_marked_while_the_spool_looked_is_not_tried_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look came first, then the mark; the news of the mark came back first."""
    sink = StagedSink("app")
    async with Stage(sink) as stage:
        stage.send("a@us.example", "b@us.example")
        await patience()
        stage.spool.commit()
        sink.settle(OK, LATER)
        look = stage.spool.due

        async def crossed(sink: str, before: float, limit: int, down: bool = False) -> list[Pending]:
            found = await look(sink, before, limit)
            stage.spool.sync_marks()
            return found

        monkeypatch.setattr(stage.spool, "due", crossed)
        stage.queue.kick()
        await breathe(20)
        assert len(sink.seen) == 1
        # What it still owes is tried when it is due, and only that.
        monkeypatch.setattr(stage.spool, "due", look)
        stage.clock.added = 70.0
        stage.queue.kick()
        await breathe(20)
        assert [[recipient.address for recipient in delivery.recipients] for delivery in sink.seen[1:]] == [["b@us.example"]]


async def test_expiry_does_not_judge_what_was_marked_while_the_spool_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = StagedSink("app")
    async with Stage(sink, expire=100.0) as stage:
        stage.send("a@us.example", "b@us.example")
        await patience()
        stage.spool.commit()
        sink.settle(OK, LATER)
        look = stage.spool.overdue

        async def crossed(now: float, after: int) -> tuple[list[Pending], int]:
            found = await look(now, after)
            stage.spool.sync_marks()
            return found

        monkeypatch.setattr(stage.spool, "overdue", crossed)
        stage.clock.added = 200.0
        stage.queue._lanes["app"].paused = True
        await stage.queue._expire_waiting()
        await breathe(20)
        monkeypatch.setattr(stage.spool, "overdue", look)
        await stage.queue._expire_waiting()
        # One of the two was carried: only the other is given up, and once.
        assert [fields["recipients"] for name, fields in stage.told.events if name == "dead"] == [1]


def test_a_timer_that_fires_early_does_not_silence_the_lane() -> None:
    """uvloop counts milliseconds: a timer may fire a fraction before its time."""

    async def story() -> Sequence[object]:
        sink = StagedSink("app", LATER)
        async with Stage(sink, retry=(0.0123,)) as stage:
            stage.spool.by_itself = True
            for _ in range(20):
                stage.send()
            await breathe()
            if stage.spool.waiting:
                stage.spool.commit()
            for wanted in range(100, 3001, 100):
                await until(partial(lambda wanted: len(sink.seen) >= wanted, wanted))
        return sink.seen

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(story())


async def test_content_that_cannot_be_read_any_more_still_bounces() -> None:
    """A person dropped it while it was out, or the disk has lost the file."""
    out, bounces = StagedSink("out"), StagedSink("bounces", OK)
    async with Stage(out, bounces, on_failure="bounce", bounces="bounces", retry=(0.01,)) as stage:
        stage.spool.by_itself = True
        stage.send(content=b"Subject: x\r\n\r\n" + b"large\r\n" * 50_000, route=Route(("*",), ("out",)))
        await patience()
        out.settle(NEVER)
        await patience()
        await breathe(20)
        assert stage.spool.rows == {}
        (report,) = bounces.seen
        assert b"Final-Recipient: rfc822;" in report.message.content


async def test_a_row_whose_mark_comes_after_its_sink_does_is_woken_by_the_next_success() -> None:
    app = StagedSink("app")
    async with Stage(app, concurrency=3, retry=(3600.0,)) as stage:
        for _ in range(3):
            stage.send()
        await patience()
        stage.spool.commit()
        app.settle(DOWN)
        app.settle(OK)
        await breathe(20)
        stage.spool.sync_marks()  # all that waited for the sink was woken before this
        await breathe(20)
        app.settle(OK)
        await breathe(20)
        assert len(app.out) == 1, "the sink is up: it need not wait for its hour"


async def test_a_message_that_a_healthy_sink_chokes_on_is_not_woken_by_each_success() -> None:
    app = StagedSink("app")
    async with Stage(app, concurrency=3, retry=(3600.0,)) as stage:
        for _ in range(3):
            stage.send()
        await patience()
        stage.spool.commit()
        choked = app.out.pop(0)
        app.settle(OK)
        choked.settle_all(DOWN)
        await breathe(20)
        stage.spool.sync_marks()
        app.settle(OK)
        await breathe(20)
        assert not app.out
