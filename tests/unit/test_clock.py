"""Somebody sets the clock, an hour forth or back: nothing bounces early, nothing bursts, nothing starves.

The stage's clock is the wall's, which is set; what goes by is ``Lapse``, which nobody can set.
Dates that are told (Received, Date) follow the wall at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from email import message_from_bytes
from email.utils import parsedate_to_datetime

import pytest

from gateway.queue import Queue, Steady, elapsed
from gateway.route import Route

from ..loops import until
from .stage import DOWN, LATER, NEVER, OK, Clock, Stage, StagedSink, StagedSpool, Told, breathe, patience

HOUR = 3600.0


class Lapse:
    """Elapsed time: the loop's, and what the test lets go by."""

    def __init__(self) -> None:
        self.added = 0.0

    def __call__(self) -> float:
        return asyncio.get_running_loop().time() + self.added

    def steady(self, wall: Clock) -> Callable[[], float]:
        return Steady(wall, self).now


def only(sink: str) -> Route:
    return Route(("*",), (sink,))


def let_pass(stage: Stage, lapse: Lapse, seconds: float) -> None:
    """Time goes by for both clocks."""
    stage.clock.added += seconds
    lapse.added += seconds
    stage.queue.kick()


@pytest.fixture(params=[HOUR, -HOUR], ids=["forth", "back"])
def step(request: pytest.FixtureRequest) -> float:
    return float(request.param)


async def test_what_waits_waits_as_long_as_it_should(step: float) -> None:
    lapse = Lapse()
    sink = StagedSink("app", LATER)
    async with Stage(sink, retry=(60.0, 300.0), expire=1800.0, concurrency=100, steady=lapse.steady) as stage:
        stage.spool.by_itself = True
        for _ in range(20):
            stage.send()
        await patience()
        await breathe(20)
        assert len(sink.seen) == 20
        stage.clock.added += step
        stage.queue.kick()
        await breathe(50)
        assert len(sink.seen) == 20, "a burst"
        assert {"bounced", "dead"}.isdisjoint(stage.told.names()), "given up early"
        let_pass(stage, lapse, 50.0)
        await breathe(50)
        assert len(sink.seen) == 20, "a burst"
        let_pass(stage, lapse, 20.0)
        await breathe(50)
        assert len(sink.seen) == 40, "starved"


async def test_it_expires_by_the_time_that_went_by(step: float) -> None:
    lapse = Lapse()
    out, bounces = StagedSink("out", LATER), StagedSink("bounces", OK)
    async with Stage(out, bounces, retry=(60.0,), expire=1800.0, on_failure="bounce", bounces="bounces", steady=lapse.steady) as stage:
        stage.spool.by_itself = True
        stage.send(route=only("out"))
        await patience()
        await breathe(20)
        stage.clock.added += step
        for minute in range(1, 36):
            let_pass(stage, lapse, 60.0)
            await breathe(30)
            if minute < 30:
                assert "bounced" not in stage.told.names(), f"after {minute} minutes"
        assert stage.told.names().count("bounced") == 1
        assert len(bounces.seen) == 1
        assert 15 < len(out.seen) <= 31


async def test_a_sink_that_is_down_is_probed_as_before(step: float) -> None:
    lapse = Lapse()
    sink = StagedSink("app", DOWN)
    async with Stage(sink, retry=(60.0,), expire=1800.0, steady=lapse.steady) as stage:
        stage.spool.by_itself = True
        for _ in range(5):
            stage.send()
        await patience()
        await breathe(20)
        tried = len(sink.seen)
        stage.clock.added += step
        stage.queue.kick()
        await breathe(50)
        assert len(sink.seen) == tried, "a burst"
        sink.at_once = OK
        stage.queue.kick(probe=True)
        # Starved otherwise: one success wakes them all.
        await until(lambda: not stage.spool.rows)


async def test_new_mail_goes_out_at_once(step: float) -> None:
    lapse = Lapse()
    sink = StagedSink("app", OK)
    async with Stage(sink, steady=lapse.steady) as stage:
        stage.clock.added += step
        stage.send()
        await breathe()
        assert stage.codes == [250]
        assert len(sink.seen) == 1


@pytest.mark.parametrize("asked", ["HOLDFOR", "HOLDUNTIL"])
async def test_a_hold_that_is_asked_for_after_the_step_goes_by_the_wall(step: float, asked: str) -> None:
    lapse = Lapse()
    sink = StagedSink("app", OK)
    async with Stage(sink, steady=lapse.steady) as stage:
        stage.spool.by_itself = True
        stage.clock.added += step
        transaction = stage.transaction()
        until = datetime.fromtimestamp(stage.clock() + 600.0, UTC)
        transaction.envelope.mail_params = {asked: "600" if asked == "HOLDFOR" else f"{until:%Y-%m-%dT%H:%M:%SZ}"}
        draft = stage.draft(transaction)
        draft.write(b"Subject: x\r\n\r\nhello\r\n")
        draft.finish(stage.answers.append)
        await breathe(20)
        assert stage.codes == [250]
        let_pass(stage, lapse, 590.0)
        await breathe(20)
        assert sink.seen == []
        let_pass(stage, lapse, 20.0)
        await breathe(20)
        assert len(sink.seen) == 1


async def test_the_age_of_what_is_tried_goes_by_the_time_that_went_by(step: float) -> None:
    """What is left of BY is reckoned from it (RFC 2852)."""
    lapse = Lapse()
    sink = StagedSink("app", LATER)
    async with Stage(sink, retry=(60.0,), steady=lapse.steady) as stage:
        stage.spool.by_itself = True
        stage.send()
        await breathe(20)
        stage.clock.added += step
        let_pass(stage, lapse, 70.0)
        await breathe(20)
        assert [round(delivery.age, -1) for delivery in sink.seen] == [0.0, 70.0]


async def test_dates_follow_the_wall(step: float) -> None:
    lapse = Lapse()
    out, bounces = StagedSink("out", NEVER), StagedSink("bounces", OK)
    async with Stage(out, bounces, on_failure="bounce", bounces="bounces", steady=lapse.steady) as stage:
        stage.spool.by_itself = True
        stage.clock.added += step
        stage.send(route=only("out"))
        await patience()
        await breathe(30)
        told = stage.clock()

        def off(date: datetime) -> float:
            return abs(date.timestamp() - told)

        (tried,) = out.seen
        assert off(parsedate_to_datetime(tried.message.trace.rpartition(b";")[2].decode().strip())) < 5
        (report,) = bounces.seen
        assert off(parsedate_to_datetime(str(message_from_bytes(report.message.content)["Date"]))) < 5


def test_elapsed_time_goes_on() -> None:
    before = elapsed()
    assert elapsed() >= before
    clock = Steady().now
    assert clock() <= clock()


def test_the_queue_goes_by_it_unless_told_otherwise() -> None:
    spool, told = StagedSpool(), Told()
    queue = Queue(
        spool, {}, {}, retry=(60.0,), expire=60.0, hold=0.0, bounces=None, hostname="mx.example", observer=told, new_id=lambda now: "id"
    )
    assert isinstance(getattr(queue.clock, "__self__", None), Steady)
