"""Time: retries, expiry, health of sinks, fairness, bounces (DESIGN §4, reference of the words in §6)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway.contracts import Delivery, Outcome, Pending, SpoolError
from gateway.message import Message
from gateway.queue import CATCH_UP, EXPIRED, PROBE_LAST, LaneSettings
from gateway.reply import Reply
from gateway.route import Route

from ..loops import until
from .stage import DOWN, HELD, LATER, NEVER, OK, Stage, StagedSink, breathe, patience


async def stored(stage: Stage, *recipients: str, **more: Any) -> None:
    """One message that ends up in the spool."""
    stage.send(*recipients, **more)
    await breathe()
    if stage.spool.waiting:
        stage.spool.commit()


async def settle_marks(stage: Stage) -> None:
    await breathe()
    stage.spool.sync_marks()
    await breathe()


async def test_deferred_is_tried_again_after_its_delay_and_not_before() -> None:
    sink = StagedSink("app")
    async with Stage(sink, retry=(60.0, 300.0)) as stage:
        await stored(stage)
        sink.settle(LATER)
        stage.spool.commit()
        stage.clock.added = 50.0
        stage.queue.kick()
        await breathe()
        assert len(sink.seen) == 1
        stage.clock.added = 70.0
        stage.queue.kick()
        await breathe()
        assert [delivery.attempt for delivery in sink.seen] == [1, 2]
        assert sink.seen[0].id == sink.seen[1].id, "the same recipients are the same delivery"
        sink.settle(LATER)
        await settle_marks(stage)
        [(_message, pending)] = stage.spool.rows.values()
        assert 270 <= pending.due - stage.clock() <= 330, "the second delay, with jitter"


async def test_the_last_delay_repeats() -> None:
    sink = StagedSink("app", LATER)
    async with Stage(sink, retry=(10.0, 20.0)) as stage:
        stage.spool.by_itself = True
        await stored(stage)
        for _ in range(5):
            stage.clock.added += 25.0
            stage.queue.kick()
            await breathe(20)
        assert [delivery.attempt for delivery in sink.seen] == [1, 2, 3, 4, 5, 6]


async def test_the_timer_alone_brings_the_next_try() -> None:
    sink = StagedSink("app", LATER)
    async with Stage(sink, retry=(0.05,)) as stage:
        stage.spool.by_itself = True
        await stored(stage)
        await until(lambda: len(sink.seen) >= 3)


async def test_retry_after_is_honoured_and_capped_at_a_day() -> None:
    sink = StagedSink("app")
    async with Stage(sink, expire=10 * 86400.0) as stage:
        await stored(stage)
        sink.settle(Outcome("deferred", LATER.reply, retry_after=7200.0))
        stage.spool.commit()
        [(_message, pending)] = stage.spool.rows.values()
        assert 7190 < pending.due - stage.clock() < 7210
        stage.clock.added = 7300
        stage.queue.kick()
        await breathe()
        sink.settle(Outcome("deferred", LATER.reply, retry_after=1e9))
        await settle_marks(stage)
        [(_message, pending)] = stage.spool.rows.values()
        assert 86390 < pending.due - stage.clock() < 86410


async def test_expiry_is_a_dead_letter_that_tells_the_last_answer() -> None:
    sink = StagedSink("app", LATER)
    async with Stage(sink, expire=100.0, retry=(60.0,)) as stage:
        stage.spool.by_itself = True
        await stored(stage)
        stage.clock.added = 101.0
        stage.queue.kick()
        await breathe(20)
        [(_message, pending)] = stage.spool.rows.values()
        assert pending.state == "dead"
        assert pending.note.startswith(EXPIRED.text)
        assert "451 4.2.0 later" in pending.note


async def test_the_last_try_is_at_expiry_not_after_a_whole_delay() -> None:
    sink = StagedSink("app", LATER)
    async with Stage(sink, expire=100.0, retry=(5000.0,)) as stage:
        await stored(stage)
        [(_message, pending)] = stage.spool.rows.values()
        assert pending.due <= pending.expires_at


async def test_expiry_with_bounces_is_a_bounce() -> None:
    app, out = StagedSink("app", LATER), StagedSink("out", OK)
    async with Stage(app, out, expire=100.0, on_failure="bounce", bounces="out") as stage:
        stage.spool.by_itself = True
        stage.send(route=Route(("*",), ("app",)))
        await breathe()
        stage.clock.added = 101.0
        stage.queue.kick("app")
        await breathe(30)
        assert stage.spool.rows == {}
        assert b"Status: 4.4.7" in out.seen[0].message.content


async def test_a_bounce_that_cannot_be_delivered_is_a_dead_letter() -> None:
    app, out = StagedSink("app", NEVER), StagedSink("out", NEVER)
    async with Stage(app, out, on_failure="bounce", bounces="out") as stage:
        stage.spool.by_itself = True
        stage.send(route=Route(("*",), ("app",)))
        await breathe(30)
        [(message, pending)] = stage.spool.rows.values()
        assert (message.envelope.mail_from, pending.state, pending.sink) == ("", "dead", "out")
        assert stage.codes == [250]


async def test_notify_never_silences_and_success_is_told() -> None:
    app, out = StagedSink("app"), StagedSink("out", OK)
    async with Stage(app, out, on_failure="bounce", bounces="out") as stage:
        stage.spool.by_itself = True
        transaction = stage.transaction("never@us.example", "told@us.example", route=Route(("*",), ("app",)))
        transaction.envelope.recipients[0].params["NOTIFY"] = "NEVER"
        transaction.envelope.recipients[1].params["NOTIFY"] = "SUCCESS,FAILURE"
        draft = stage.draft(transaction)
        draft.write(b"Subject: x\r\n\r\n")
        draft.finish(stage.answers.append)
        app.settle(NEVER, OK)
        assert stage.codes == [], "the notice is owed: it is stored before the 250"
        await breathe(20)
        assert stage.codes == [250]
        [delivery] = out.seen
        assert b"told@us.example" in delivery.message.content
        assert b"never@us.example" not in delivery.message.content
        assert b"Action: delivered" in delivery.message.content


async def test_a_sink_that_is_down_is_probed_by_one_and_its_return_frees_all() -> None:
    sink = StagedSink("app")
    async with Stage(sink, concurrency=5, retry=(3600.0,)) as stage:
        stage.spool.by_itself = True
        for _ in range(5):
            stage.send()
        for _ in range(5):
            sink.settle(DOWN)
        await breathe(20)
        assert stage.queue.health() == {"app": "down"}
        assert stage.told.names().count("sink_down") == 1
        stage.send()
        await breathe(20)
        assert sink.out == [], "new mail goes straight to the spool"
        assert stage.codes == [250] * 6
        await until(lambda: sink.out)
        await breathe(30)
        assert len(sink.out) == 1, "one probe at a time"
        sink.settle(OK)
        await breathe(30)
        assert stage.told.names().count("sink_up") == 1
        assert len(sink.out) == 5, "who waited for the sink is due at once"
        while sink.out:
            sink.settle(OK)
        await breathe(30)
        assert stage.spool.rows == {}


async def test_probes_back_off_and_honour_retry_after() -> None:
    sink = StagedSink("app")
    async with Stage(sink) as stage:
        stage.spool.by_itself = True
        stage.send()
        sink.settle(Outcome("deferred", DOWN.reply, down=True, retry_after=30.0))
        await breathe(20)
        lane = stage.queue._lanes["app"]
        assert 26 < lane.next_probe - asyncio.get_running_loop().time() < 34
        for _ in range(10):
            lane.next_probe = 0.0
            stage.queue._pump(lane)
            await breathe(20)
            sink.settle(DOWN)
            await breathe(20)
        assert lane.next_probe - asyncio.get_running_loop().time() <= PROBE_LAST * 1.1


async def test_tries_that_were_being_loaded_when_the_sink_went_down_are_no_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They start after it was known to be down, and fail: seven of them once put the first probe off by a minute."""
    sink = StagedSink("app")
    async with Stage(sink, concurrency=8) as stage:
        stage.spool.by_itself = True
        for _ in range(30):
            stage.send()
        await patience()
        await breathe(30)
        load, loads = stage.spool.load, 0
        read = asyncio.Event()

        async def slowly(pending: Pending) -> Message | None:
            nonlocal loads
            loads += 1
            if loads > 1:
                await read.wait()
            return await load(pending)

        monkeypatch.setattr(stage.spool, "load", slowly)
        for _ in range(8):
            sink.settle(LATER)
        await breathe(30)
        assert len(sink.out) == 1
        sink.settle(DOWN)
        assert stage.queue.health() == {"app": "down"}
        lane = stage.queue._lanes["app"]
        probe = lane.next_probe
        await asyncio.sleep(0.002)
        read.set()
        await breathe(30)
        assert len(sink.out) == 7
        while sink.out:
            sink.settle(DOWN)
        assert lane.next_probe == probe
        assert lane.timer is not None


async def test_one_message_a_healthy_sink_chokes_on_does_not_stop_the_others() -> None:
    sink = StagedSink("app")
    async with Stage(sink, concurrency=3) as stage:
        stage.send()
        stage.send()
        await asyncio.sleep(0.001)
        sink.out[1].settle_all(OK)
        del sink.out[1]
        sink.settle(DOWN)
        assert stage.queue.health() == {"app": "up"}


async def test_410_pauses_until_somebody_says_go() -> None:
    sink = StagedSink("app")
    async with Stage(sink) as stage:
        stage.spool.by_itself = True
        stage.send()
        sink.settle(Outcome("deferred", Reply(451, "4.3.0", "gone"), down=True, pause=True))
        await breathe(20)
        assert stage.queue.health() == {"app": "paused"}
        await asyncio.sleep(1.3)
        assert sink.out == []
        stage.queue.kick("app")
        await breathe(20)
        assert sink.out == [], "only who says so ends a pause"
        stage.queue.kick("app", resume=True)
        await breathe(20)
        sink.settle(OK)
        await breathe(20)
        assert stage.queue.health() == {"app": "up"}
        assert stage.spool.rows == {}


async def test_an_early_timer_does_not_end_the_probes() -> None:
    """uvloop rounds to milliseconds and may call before the timer's own ``when()``."""
    sink = StagedSink("app")
    async with Stage(sink) as stage:
        stage.spool.by_itself = True
        stage.send()
        sink.settle(DOWN)
        await breathe(20)
        lane = stage.queue._lanes["app"]
        assert lane.timer is not None
        lane.timer.cancel()
        stage.queue._timed(lane)  # long before next_probe
        assert lane.timer is not None
        assert not lane.timer.cancelled()


async def test_a_sink_that_goes_down_during_a_backlog_is_probed() -> None:
    sink = StagedSink("app")
    async with Stage(sink, concurrency=2) as stage:
        stage.spool.by_itself = True
        for _ in range(10):
            stage.send()
        await breathe(30)
        sink.settle(OK)
        await breathe(30)
        while sink.out:
            sink.settle(DOWN)
        await breathe(30)
        assert stage.queue.health() == {"app": "down"}
        await until(lambda: sink.out)
        await breathe(30)
        assert len(sink.out) == 1
        sink.settle(OK)
        await breathe(30)
        while sink.out:
            sink.settle(OK)
            await breathe(30)
        assert stage.spool.rows == {}


@pytest.mark.parametrize("broken", ["due", "load", "next_due", "wake"])
async def test_a_spool_that_cannot_be_read_for_a_moment_stops_no_lane(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = StagedSink("app")
    async with Stage(sink, concurrency=2) as stage:
        stage.spool.by_itself = True
        for _ in range(6):
            stage.send()
        while sink.out:
            sink.settle(DOWN)
        await breathe(30)
        whole = getattr(stage.spool, broken)

        async def fails(*_: object) -> object:
            monkeypatch.setattr(stage.spool, broken, whole)
            raise SpoolError("too many open files", known=True)

        monkeypatch.setattr(stage.spool, broken, fails)
        sink.at_once = OK
        stage.queue.kick("app", probe=True)
        for _ in range(40):
            await asyncio.sleep(0.1)
            if broken == "wake" and len(stage.spool.rows) < 6:
                stage.send()  # the next success wakes
            if not stage.spool.rows:
                break
        assert stage.spool.rows == {}


async def test_rows_that_waited_for_the_sink_before_the_start_are_woken_by_the_first_success() -> None:
    sink = StagedSink("app")
    async with Stage(sink, retry=(14400.0,)) as stage:
        stage.spool.by_itself = True
        for _ in range(3):
            stage.send()
        while sink.out:
            sink.settle(DOWN)
        await breathe(30)
        spool = stage.spool
    again = Stage(StagedSink("app", OK))
    again.queue._spool = again.intake.spool = spool
    again.clock.added = 1.0
    async with again:
        again.send()
        await breathe(40)
        assert spool.rows == {}


async def test_what_is_held_by_hand_is_not_sent_from_what_was_read_ahead() -> None:
    sink = StagedSink("app")
    async with Stage(sink, concurrency=1) as stage:
        stage.spool.by_itself = True
        for _ in range(10):
            stage.send()
        await patience()
        await breathe(30)
        sink.settle(OK)
        await breathe(30)
        assert stage.queue._lanes["app"].ready
        for _message, pending in stage.spool.rows.values():
            pending.state = "held"
        stage.queue.kick("app")
        sink.settle(OK)
        await breathe(30)
        assert sink.out == []


async def test_closing_does_not_wait_for_a_message_that_was_only_being_read(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = StagedSink("app")
    async with Stage(sink) as stage:
        stage.send(route=Route(("*",), ("app",)))
        sink.settle(LATER)
        stage.spool.commit()
        gate = asyncio.Event()
        whole = stage.spool.load

        async def slow(pending: Pending) -> object:
            await gate.wait()
            return await whole(pending)

        monkeypatch.setattr(stage.spool, "load", slow)
        stage.clock.added = 100.0
        stage.queue.kick()
        await breathe()
        closing = asyncio.create_task(stage.queue.close(30.0))
        await breathe()
        gate.set()
        await asyncio.wait_for(closing, 1.0)
        assert len(sink.seen) == 1


async def test_a_failing_sink_never_delays_another() -> None:
    bad, good = StagedSink("bad"), StagedSink("good", OK)
    async with Stage(bad, good, concurrency=1) as stage:
        for _ in range(20):
            stage.send(route=Route(("*",), ("bad",)))
        stage.send(route=Route(("*",), ("good",)))
        assert stage.codes == [250]


async def test_concurrency_is_never_exceeded_and_a_backlog_goes_in_order() -> None:
    sink = StagedSink("app")
    async with Stage(sink, concurrency=3) as stage:
        stage.spool.by_itself = True
        for number in range(200):
            stage.send(f"{number}@us.example")
        await patience()
        await breathe(20)
        most, order = 0, []
        while sink.out:
            most = max(most, len(sink.out))
            order.append(sink.out[0].recipients[0].local)
            sink.settle(OK)
            await breathe(20)
        assert most == 3
        assert stage.spool.rows == {}
        assert len(order) == 200
        assert [int(name) for name in order[3:]] == sorted(int(name) for name in order[3:])


class Timed(StagedSink):
    """Remembers when each delivery began (loop time)."""

    def __init__(self, name: str, at_once: Outcome | None = OK) -> None:
        super().__init__(name, at_once)
        self.begun: list[float] = []

    def start(self, delivery: Delivery) -> None:
        self.begun.append(asyncio.get_running_loop().time())
        super().start(delivery)

    def keeps(self, rate: float) -> bool:
        """No span of time saw more than its share, what a lane may catch up with and one."""
        begun = self.begun
        return all(
            last - first <= rate * (begun[last] - begun[first] + CATCH_UP) + 1.001
            for first in range(len(begun))
            for last in range(first, len(begun))
        )


async def test_a_backlog_keeps_the_rate() -> None:
    sink = Timed("app", DOWN)
    async with Stage(sink, concurrency=50, rate=200.0) as stage:
        stage.spool.by_itself = True
        for _ in range(60):
            stage.send()
        await breathe(20)
        sink.begun.clear()
        sink.at_once = OK
        stage.queue.kick(probe=True)
        await until(lambda: not stage.spool.rows)
        assert len(sink.begun) == 60
        assert sink.keeps(200.0)


async def test_new_mail_keeps_the_rate_and_waits_its_turn() -> None:
    sink = Timed("app")
    async with Stage(sink, rate=100.0) as stage:
        stage.spool.by_itself = True
        stage.send()
        assert len(sink.begun) == 1  # at once: the lane was idle
        for _ in range(30):
            stage.send()
        await until(lambda: len(sink.begun) == 31 and not stage.spool.rows)
        assert stage.codes == [250] * 31
        assert sink.keeps(100.0)


async def test_who_waits_for_the_sinks_own_word_keeps_the_rate_too() -> None:
    sink = Timed("app")
    async with Stage(sink, rate=100.0) as stage:
        for _ in range(20):
            stage.send(route=Route(("*",), ("app",), acknowledge="delivered"))
        await until(lambda: len(stage.answers) == 20)
        assert stage.codes == [250] * 20
        assert sink.keeps(100.0)


async def test_a_slow_rate_is_kept_while_the_sink_is_down() -> None:
    sink = Timed("app", DOWN)
    async with Stage(sink, rate=0.01) as stage:
        stage.spool.by_itself = True
        for _ in range(6):
            stage.send()
            stage.queue.kick(probe=True)
            await breathe(20)
        assert sink.keeps(0.01)
        assert len(sink.begun) == 1


async def test_a_rate_that_is_changed_holds_from_then_on() -> None:
    sink = Timed("app", OK)
    async with Stage(sink, rate=0.001) as stage:
        stage.spool.by_itself = True
        stage.send()
        stage.send()
        await breathe(20)
        assert len(sink.begun) == 1
        lanes = {"app": LaneSettings(2, "dead_letter", rate=0.0)}
        stage.queue.go_by(dict(stage.sinks), lanes, retry=(60.0,), expire=3600.0, hold=HELD, bounces=None, hostname="mx.example.net")
        await breathe(20)
        assert len(sink.begun) == 2, "it does not wait for a quarter of an hour that nobody wants any more"


async def test_priority_goes_first() -> None:
    sink = StagedSink("app")
    async with Stage(sink, concurrency=1) as stage:
        for number in range(4):
            stage.send(f"{number}@us.example")
        await patience()
        stage.spool.commit()
        for _message, pending in stage.spool.rows.values():
            if _message.envelope.recipients[0].local == "3":
                pending.priority = 5
        stage.spool.by_itself = True
        sink.settle(OK)
        await breathe(20)
        assert sink.out[0].recipients[0].local == "3"


async def test_what_the_spool_holds_at_start_is_tried() -> None:
    sink = StagedSink("app")
    async with Stage(sink) as stage:
        await stored(stage)
        sink.settle(LATER)
        stage.spool.commit()
        spool = stage.spool
    for _message, pending in spool.rows.values():
        pending.due = 0.0
    again = Stage(StagedSink("app", OK))
    again.queue._spool = spool
    spool.by_itself = True
    async with again:
        await breathe(20)
        assert spool.rows == {}


async def test_mail_for_a_sink_that_left_the_file_is_reported_and_kept() -> None:
    sink = StagedSink("app")
    async with Stage(sink) as stage:
        await stored(stage, route=Route(("*",), ("gone",)))
        spool = stage.spool
    again = Stage(StagedSink("app", OK), expire=1.0)
    again.queue._spool = spool
    again.clock.added = 1e6
    async with again:
        await breathe(20)
        assert len(spool.rows) == 1
        [fields] = [fields for name, fields in again.told.events if name == "sink_down"]
        assert fields["sink"] == "gone"


async def test_closing_waits_for_the_tries_that_are_out() -> None:
    sink = StagedSink("app")
    async with Stage(sink) as stage:
        await stored(stage)
        closing = asyncio.create_task(stage.queue.close(5.0))
        await breathe()
        assert not closing.done()
        sink.settle(OK)
        await closing
        assert stage.codes == [250]


async def test_a_second_settlement_is_a_fault_of_the_sink() -> None:
    sink = StagedSink("app")
    async with Stage(sink) as stage:
        await stored(stage)
        [delivery] = sink.out
        delivery.settle_all(OK)
        with pytest.raises(RuntimeError, match="settled twice"):
            delivery.settle_all(OK)


async def test_outcomes_are_per_recipient() -> None:
    sink = StagedSink("app")
    async with Stage(sink) as stage:
        stage.spool.by_itself = True
        stage.send("a@us.example", "b@us.example", "c@us.example")
        sink.settle(OK, LATER, NEVER)
        await breathe(20)
        states = sorted((pending.state, pending.recipients) for _message, pending in stage.spool.rows.values())
        assert states == [("dead", (2,)), ("queued", (1,))]
        assert sorted(name for name in stage.told.names() if name in ("delivered", "deferred", "failed")) == [
            "deferred",
            "delivered",
            "failed",
        ]
