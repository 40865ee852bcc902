"""What senders ask of the queue, on the stage: held until then (RFC 4865), delivered by then or else (RFC 2852), sooner than
others (RFC 6710). That the wire understands them: transcripts EXT-*; on a real disk: tests/integration/test_asked_live.py."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.contracts import Outcome
from gateway.queue import EXPIRY_SWEEP, LONGEST_SLEEP, WINDOW
from gateway.reply import Reply
from gateway.route import Route

from ..loops import until
from .stage import DOWN, LATER, NEVER, OK, Stage, StagedSink, breathe, patience

APP = Route(("*",), ("app",))
START = 1_800_000_000.0


def ask(stage: Stage, *recipients: str, priority: int = 0, mail_from: str = "a@client.example", notify: str = "", **params: str) -> None:
    """One message whose MAIL had these parameters (``MT_PRIORITY`` for the one with a hyphen)."""
    transaction = stage.transaction(*recipients, route=APP, mail_from=mail_from)
    transaction.envelope.mail_params = {key.replace("_", "-"): value for key, value in params.items()}
    for recipient in transaction.envelope.recipients:
        if notify:
            recipient.params["NOTIFY"] = notify
    transaction.priority = priority
    content = b"Subject: x\r\n\r\nhello\r\n"
    transaction.size, transaction.header_size = len(content), 12
    draft = stage.draft(transaction)
    draft.write(content)
    draft.finish(stage.answers.append)


async def later(stage: Stage, seconds: float, sink: str = "app") -> None:
    """So many seconds after the start, and the lane looks."""
    stage.clock.added = seconds
    stage.queue.kick(sink)
    await breathe(40)


def fields(told: bytes) -> list[str]:
    """What a report says to programs."""
    part = told.split(b"Content-Type: message/delivery-status\r\n\r\n")[1].split(b"\r\n--")[0]
    return part.decode().splitlines()


# ----------------------------------------------------------------------------- hold


@pytest.mark.parametrize("params", [{"HOLDFOR": "600"}, {"HOLDUNTIL": "2027-01-15T08:10:00Z"}])
async def test_a_hold_is_kept_to_the_second_and_acknowledged_by_the_spool(params: dict[str, Any]) -> None:
    app = StagedSink("app", OK)
    async with Stage(app, expire=3600.0) as stage:
        ask(stage, **params)
        await breathe()
        assert (stage.codes, app.seen) == ([], []), "not tried, and not promised before the commit"
        stage.spool.commit()
        [reply] = stage.answers
        assert isinstance(reply, Reply)
        assert reply.code == 250
        [(message, pending)] = stage.spool.rows.values()
        assert pending.due == message.not_before == pytest.approx(START + 600, abs=1)
        assert pending.expires_at == pytest.approx(START + 4200, abs=1), "its time runs from its release"
        [told] = [fields for name, fields in stage.told.events if name == "accepted"]
        assert told["held_until"] == message.not_before
        await later(stage, 599.0)
        assert app.seen == []
        await later(stage, 600.5)
        assert len(app.seen) == 1


async def test_a_hold_that_is_over_is_no_hold() -> None:
    app = StagedSink("app", OK)
    async with Stage(app) as stage:
        ask(stage, HOLDUNTIL="2027-01-15T07:58:00Z")
        ask(stage, HOLDFOR="0")
        await breathe()
        assert len(app.seen) == 2
        assert stage.codes == [250, 250]
        assert stage.spool.rows == {}


async def test_the_timer_alone_releases() -> None:
    app = StagedSink("app", OK)
    async with Stage(app) as stage:
        stage.spool.by_itself = True
        stage.clock.added = 599.9
        ask(stage, HOLDUNTIL="2027-01-15T08:10:00Z")
        await breathe()
        assert app.seen == []
        await until(lambda: app.seen)


async def test_a_step_of_the_clock_backward_holds_on_and_forward_releases() -> None:
    app = StagedSink("app", OK)
    async with Stage(app) as stage:
        stage.spool.by_itself = True
        ask(stage, HOLDFOR="600")
        await later(stage, -3600.0)
        lane = stage.queue._lanes["app"]
        assert app.seen == []
        assert lane.timer is not None
        assert lane.timer.when() - stage.queue._loop.time() <= LONGEST_SLEEP, "a step is noticed by then"
        stage.clock.added = 601.0
        lane.timer.cancel()
        stage.queue._timed(lane)  # what the timer does
        await breathe(20)
        assert len(app.seen) == 1


async def test_a_sink_that_is_down_is_not_probed_with_what_is_held() -> None:
    app = StagedSink("app")
    async with Stage(app, retry=(3600.0,)) as stage:
        stage.spool.by_itself = True
        ask(stage, HOLDFOR="600", priority=9)
        await breathe(20)
        ask(stage, "now@us.example")
        app.settle(DOWN)
        await breathe(20)
        assert stage.queue.health()["app"] == "down"
        for _ in range(3):
            stage.queue.kick("app", probe=True)
            await breathe(20)
            assert app.out[0].recipients[0].address == "now@us.example", "what waits for the sink is what probes it"
            app.settle(DOWN)
            await breathe(20)
        # It is back: what waited for it goes, what is held stays.
        stage.queue.kick("app", probe=True)
        await breathe(20)
        app.settle(OK)
        await breathe(40)
        assert stage.queue.health()["app"] == "up"
        assert app.out == []
        [(_message, pending)] = stage.spool.rows.values()
        assert pending.attempts == 0
        await later(stage, 601.0)
        assert len(app.out) == 1


async def test_a_lane_that_is_down_wakes_for_a_release_and_only_then() -> None:
    app = StagedSink("app")
    async with Stage(app, retry=(3600.0,)) as stage:
        stage.spool.by_itself = True
        ask(stage, HOLDFOR="600")
        await breathe(20)
        # What took the sink down is dropped by a person: nothing is left to probe with.
        ask(stage, "now@us.example")
        app.settle(DOWN)
        await breathe(20)
        (key,) = [key for key, (_message, pending) in stage.spool.rows.items() if pending.attempts]
        del stage.spool.rows[key]
        lane = stage.queue._lanes["app"]
        stage.queue.kick("app", probe=True)
        await breathe(20)
        assert lane.dormant
        assert lane.timer is not None
        lane.timer.cancel()
        stage.queue._timed(lane)  # armed for a probe, when there was something to probe with
        await breathe(20)
        assert lane.timer is not None, "the release is waited for"
        assert lane.timer.when() - stage.queue._loop.time() == pytest.approx(LONGEST_SLEEP, abs=1), "and nothing is asked until then"
        assert app.out == []
        stage.clock.added = 601.0
        stage.queue._timed(lane)
        await breathe(20)
        assert len(app.out) == 1


async def test_a_lane_with_nothing_to_probe_with_learns_of_what_comes_back() -> None:
    app = StagedSink("app")
    async with Stage(app, retry=(3600.0,)) as stage:
        ask(stage, HOLDFOR="60000")
        ask(stage, "now@us.example")
        await patience()
        stage.spool.commit()
        app.settle(DOWN)
        stage.queue.kick("app", probe=True)
        await breathe(20)
        lane = stage.queue._lanes["app"]
        assert lane.timer is not None
        lane.timer.cancel()
        stage.queue._timed(lane)
        await breathe(20)
        assert lane.dormant, "the one that could probe is not marked yet"
        stage.spool.sync_marks()
        assert lane.timer is not None
        assert lane.timer.when() - stage.queue._loop.time() < 2.0, "now it is there"
        stage.queue._timed(lane)
        await breathe(20)
        assert [delivery.recipients[0].local for delivery in app.out] == ["now"]


async def test_a_new_message_that_finds_the_sink_still_down_probes_it_further() -> None:
    app = StagedSink("app")
    async with Stage(app, retry=(3600.0,)) as stage:
        stage.spool.by_itself = True
        ask(stage, HOLDFOR="60000")
        ask(stage, "now@us.example")
        await breathe(20)
        app.settle(DOWN)
        await breathe(20)
        (key,) = [key for key, (_message, pending) in stage.spool.rows.items() if pending.attempts]
        del stage.spool.rows[key]
        stage.queue.kick("app", probe=True)
        await breathe(20)
        lane = stage.queue._lanes["app"]
        assert lane.dormant
        ask(stage, "next@us.example")
        await breathe(20)
        assert [delivery.recipients[0].local for delivery in app.out] == ["next"], "it is the probe"
        app.settle(DOWN)
        await breathe(20)
        assert not lane.dormant
        assert lane.timer is not None
        assert lane.timer.when() - stage.queue._loop.time() < 3.0


async def test_what_is_held_is_there_after_a_restart() -> None:
    app = StagedSink("app", OK)
    async with Stage(app) as stage:
        stage.spool.by_itself = True
        ask(stage, HOLDFOR="600")
        await breathe(20)
        spool = stage.spool
    again = StagedSink("app", OK)
    async with Stage(again) as stage:
        stage.spool.rows = spool.rows
        await later(stage, 300.0)
        assert again.seen == []
        await later(stage, 601.0)
        assert len(again.seen) == 1


# ----------------------------------------------------------------------- deliver by


async def test_mode_r_comes_back_at_its_time_and_is_not_tried_again() -> None:
    app, out = StagedSink("app", LATER), StagedSink("out", OK)
    async with Stage(app, out, bounces="out", retry=(50.0, 10_000.0)) as stage:
        stage.spool.by_itself = True
        ask(stage, BY="100;R", ENVID="QQ1")
        await breathe(20)
        [(_message, pending)] = stage.spool.rows.values()
        assert pending.expires_at == pytest.approx(START + 100, abs=1)
        await later(stage, 60.0)
        assert len(app.seen) == 2
        [(_message, pending)] = stage.spool.rows.values()
        assert pending.due == pytest.approx(START + 100, abs=1), "its end is waited for, not the next delay"
        await later(stage, 99.0)
        assert out.seen == []
        await later(stage, 101.0)
        assert len(app.seen) == 2, "no try after its time"
        assert stage.spool.rows == {}, "returned, although this sink keeps dead letters otherwise"
        [report] = out.seen
        said = fields(report.message.content)
        assert "Action: failed" in said
        assert "Status: 5.4.7" in said
        assert "Original-Envelope-Id: QQ1" in said
        assert any(line.startswith("Deliver-By-Date: Fri, 15 Jan 2027 08:01:4") for line in said), said
        assert any("451 4.2.0 later" in line for line in said), "what kept it is told"


async def test_mode_r_that_was_never_tried_is_returned_untried() -> None:
    app, out = StagedSink("app"), StagedSink("out", OK)
    async with Stage(app, out, bounces="out", concurrency=1) as stage:
        stage.spool.by_itself = True
        ask(stage, "slow@us.example")
        ask(stage, BY="100;R")
        ask(stage, "patient@us.example")
        await patience()
        stage.clock.added = 101.0
        app.settle(OK)
        await breathe(40)
        assert [delivery.recipients[0].address for delivery in app.seen] == ["slow@us.example", "patient@us.example"]
        [report] = out.seen
        assert "Status: 5.4.7" in fields(report.message.content)


async def test_a_try_that_began_in_time_may_end_late() -> None:
    app, out = StagedSink("app"), StagedSink("out", OK)
    async with Stage(app, out, bounces="out") as stage:
        stage.spool.by_itself = True
        ask(stage, BY="100;R")
        await breathe()
        stage.clock.added = 200.0
        app.settle(OK)
        await breathe(20)
        assert stage.codes == [250]
        assert out.seen == []


async def test_mode_r_is_returned_from_a_sink_that_is_down() -> None:
    app, out = StagedSink("app", DOWN), StagedSink("out", OK)
    async with Stage(app, out, bounces="out", retry=(3600.0,)) as stage:
        stage.spool.by_itself = True
        ask(stage, BY="100;R")
        await breathe(20)
        lane = stage.queue._lanes["app"]
        lane.paused = True
        stage.clock.added = 100.0 + EXPIRY_SWEEP
        stage.queue._sweep()
        await breathe(40)
        assert stage.spool.rows == {}
        [report] = out.seen
        assert "Status: 5.4.7" in fields(report.message.content)


@pytest.mark.parametrize("mode", ["R", "N"])
async def test_who_set_a_time_is_told_behind_a_long_queue(mode: str) -> None:
    """The sink is up, and slow; what was read ahead is not at its turn either."""
    app, out = StagedSink("app"), StagedSink("out", OK)
    async with Stage(app, out, bounces="out", concurrency=1, expire=100_000.0) as stage:
        stage.spool.by_itself = True
        for _ in range(3 * WINDOW):
            ask(stage)
        ask(stage, BY="100;" + mode)
        await patience()
        app.settle(OK)
        await breathe(20)
        ask(stage, BY="101;" + mode, MT_PRIORITY="5", priority=5)
        await breathe(20)
        assert stage.queue._lanes["app"].ready, "some are read ahead"
        stage.clock.added = 101.0 + EXPIRY_SWEEP
        for _ in range(2):
            stage.queue._sweep()
            await breathe(60)
        said = sorted(line for seen in out.seen for line in fields(seen.message.content) if line.startswith("Action: "))
        assert said == ["Action: failed" if mode == "R" else "Action: delayed"] * 2
        assert len(stage.spool.rows) == 3 * WINDOW - 1 + (0 if mode == "R" else 2)
        # And nothing that waits was lost on the way.
        app.at_once = OK
        app.settle(OK)
        await until(lambda: not stage.spool.rows)
        assert len({delivery.id for delivery in app.seen}) == len(app.seen) == 3 * WINDOW + (0 if mode == "R" else 2)


async def test_mode_r_is_returned_from_a_sink_that_is_down_with_a_long_queue() -> None:
    app, out = StagedSink("app", DOWN), StagedSink("out", OK)
    async with Stage(app, out, bounces="out", retry=(3600.0,), expire=100_000.0) as stage:
        stage.spool.by_itself = True
        for _ in range(1200):
            ask(stage)
        ask(stage, BY="100;R")
        await breathe(20)
        stage.clock.added = 100.0 + EXPIRY_SWEEP
        stage.queue._sweep()
        await breathe(60)
        [report] = out.seen
        assert "Status: 5.4.7" in fields(report.message.content)
        assert len(stage.spool.rows) == 1200


@pytest.mark.parametrize(("notify", "told"), [("", True), ("DELAY", True), ("FAILURE,DELAY", True), ("FAILURE", False), ("NEVER", False)])
async def test_mode_n_tells_of_the_delay_once_and_tries_on(notify: str, told: bool) -> None:
    app, out = StagedSink("app", LATER), StagedSink("out", OK)
    async with Stage(app, out, bounces="out", on_failure="bounce", retry=(70.0,), expire=1000.0) as stage:
        stage.spool.by_itself = True
        ask(stage, BY="100;N", notify=notify)
        await breathe(20)
        for moment in (80.0, 99.0):
            await later(stage, moment)
        assert out.seen == []
        await later(stage, 101.0)
        assert len(app.seen) == 3, "its time is a moment for a try"
        for moment in (180.0, 260.0, 340.0):
            await later(stage, moment)
        assert len(app.seen) == 6
        assert len(out.seen) == (1 if told else 0)
        if told:
            said = fields(out.seen[0].message.content)
            assert "Action: delayed" in said
            assert "Status: 4.2.0" in said
            assert any(line.startswith("Deliver-By-Date: ") for line in said)
            assert any(line.startswith("Will-Retry-Until: Fri, 15 Jan 2027 08:16:") for line in said), said
        [(_message, pending)] = stage.spool.rows.values()
        assert pending.expires_at == pytest.approx(START + 1000, abs=1)
        out.seen.clear()
        await later(stage, 1001.0)
        assert stage.spool.rows == {}
        failed = [delivery for delivery in out.seen if b"Action: failed" in delivery.message.content]
        assert len(failed) == (1 if notify in ("", "FAILURE", "FAILURE,DELAY") else 0)


async def test_mode_n_is_told_from_a_sink_that_is_paused_and_kept() -> None:
    app, out = StagedSink("app", DOWN), StagedSink("out", OK)
    async with Stage(app, out, bounces="out", retry=(3600.0,), expire=10_000.0) as stage:
        stage.spool.by_itself = True
        ask(stage, BY="100;N")
        await breathe(20)
        stage.queue._lanes["app"].paused = True
        for moment in (161.0, 222.0):
            stage.clock.added = moment
            stage.queue._sweep()
            await breathe(40)
        [(_message, pending)] = stage.spool.rows.values()
        assert pending.expires_at == pytest.approx(START + 10_000, abs=1)
        [report] = out.seen
        assert "Action: delayed" in fields(report.message.content)


async def test_mode_n_whose_time_was_over_when_it_came_is_told_by_nobody() -> None:
    app, out = StagedSink("app", LATER), StagedSink("out", OK)
    async with Stage(app, out, bounces="out", retry=(10.0,)) as stage:
        stage.spool.by_itself = True
        ask(stage, BY="-5;N")
        await breathe(20)
        await later(stage, 20.0)
        assert len(app.seen) == 2
        assert out.seen == []


async def test_the_null_sender_is_told_of_nothing() -> None:
    app, out = StagedSink("app", LATER), StagedSink("out", OK)
    async with Stage(app, out, bounces="out", retry=(10.0,)) as stage:
        stage.spool.by_itself = True
        ask(stage, BY="15;N", mail_from="")
        ask(stage, BY="15;R", mail_from="")
        await breathe(20)
        await later(stage, 20.0)
        assert out.seen == []
        assert sorted(pending.state for _message, pending in stage.spool.rows.values()) == ["dead", "queued"]


@pytest.mark.parametrize(
    ("by", "onward", "notify", "told"),
    [
        ("60;N", "untimed", "", True),
        ("60;N", "untimed", "FAILURE", True),
        ("60;N", "untimed", "NEVER", False),
        ("60;N", "timed", "", False),
        ("60;NT", "timed", "", True),
        ("60;RT", "timed", "", True),
        ("60;RT", "timed", "NEVER", False),
        ("60;R", "timed", "", False),
        ("60;NT", "", "", False),
        ("60;N", "timed", "SUCCESS", True),
    ],
)
async def test_a_relay_that_has_it_is_told_of_where_rfc_2852_wants_it(by: str, onward: Any, notify: str, told: bool) -> None:
    app, out = StagedSink("app", Outcome("delivered", Reply(250, "2.0.0", "taken"), "mx.example:25", onward=onward)), StagedSink("out", OK)
    async with Stage(app, out, bounces="out") as stage:
        stage.queue._lanes["app"].settings.relays = True
        stage.spool.by_itself = True
        ask(stage, BY=by, notify=notify)
        await breathe(40)
        assert stage.codes == [250]
        assert [b"Action: relayed" in delivery.message.content for delivery in out.seen] == [True] * told


async def test_a_hold_is_told_in_the_report() -> None:
    app, out = StagedSink("app", NEVER), StagedSink("out", OK)
    async with Stage(app, out, bounces="out", on_failure="bounce") as stage:
        stage.spool.by_itself = True
        ask(stage, HOLDFOR="600", MT_PRIORITY="5", priority=5)
        await breathe(20)
        await later(stage, 601.0)
        [report] = out.seen
        assert "Future-Release-Request: for; 600" in fields(report.message.content)
        assert report.message.priority == 5, "a report is as urgent as what it is about"


# ------------------------------------------------------------------------- priority


async def backlog(stage: Stage, app: StagedSink, priorities: list[int]) -> None:
    """The one place is taken, and so much waits behind it in the spool."""
    ask(stage, "first@us.example")
    await breathe()
    for number, priority in enumerate(priorities):
        ask(stage, f"{priority}.{number}@us.example", priority=priority, MT_PRIORITY=str(priority))
    await patience()
    stage.spool.commit()
    stage.spool.by_itself = True
    assert len(app.seen) == 1


async def drain(app: StagedSink, most: int = 1000) -> list[str]:
    """Settles one after the other; the local parts in the order of their tries."""
    for _ in range(most):
        await breathe(20)
        if not app.out:
            break
        app.settle(OK)
    return [delivery.recipients[0].local for delivery in app.seen]


async def test_the_backlog_goes_in_the_order_of_priority() -> None:
    app = StagedSink("app")
    async with Stage(app, concurrency=1) as stage:
        await backlog(stage, app, [0, -9, 9, 3, 0, -1, 9])
        assert await drain(app) == ["first", "9.2", "9.6", "3.3", "0.0", "0.4", "-1.5", "-9.1"]
        assert stage.spool.rows == {}


async def test_an_urgent_message_overtakes_what_was_read_ahead() -> None:
    app = StagedSink("app")
    async with Stage(app, concurrency=1) as stage:
        await backlog(stage, app, [0] * 20)
        app.settle(OK)
        await breathe(20)
        assert len(stage.queue._lanes["app"].ready) == 19
        ask(stage, "urgent@us.example", priority=4, MT_PRIORITY="4")
        ask(stage, "dull@us.example", priority=-4, MT_PRIORITY="-4")
        await breathe(20)
        order = await drain(app)
        assert order[2] == "urgent"
        assert order[-1] == "dull"
        assert len(order) == len(set(order)) == 23, "each once"


async def test_what_is_urgent_cannot_keep_the_rest_waiting_for_ever() -> None:
    """Urgent mail comes faster than it can go: what was read before gets its turn all the same."""
    app = StagedSink("app")
    async with Stage(app, concurrency=1) as stage:
        await backlog(stage, app, [0] * 3)
        app.settle(OK)
        await breathe(20)
        for number in range(2 * WINDOW):
            for twin in range(2):
                ask(stage, f"urgent{number}.{twin}@us.example", priority=9, MT_PRIORITY="9")
            await breathe(20)
            app.settle(OK)
        await breathe(20)
        order = [delivery.recipients[0].local for delivery in app.seen]
        assert {"0.0", "0.1", "0.2"} <= set(order), order
        assert len(stage.queue._lanes["app"].ready) <= 1 + 2 * WINDOW
        order = await drain(app)
        assert len(order) == len(set(order)) == 4 + 4 * WINDOW
        assert stage.spool.rows == {}


async def test_the_reply_the_trace_and_the_log_say_which_priority_applies() -> None:
    app = StagedSink("app", OK)
    async with Stage(app) as stage:
        ask(stage, MT_PRIORITY="7", priority=0)
        ask(stage, MT_PRIORITY="7", priority=7)
        ask(stage)
        await breathe()
        texts = [str(answer) for answer in stage.answers]
        ids = [delivery.message.id for delivery in app.seen]
        assert texts[0] == f"250 2.3.6 0 is the priority of this mail, accepted as {ids[0]}"
        assert texts[1:] == [f"250 2.0.0 accepted as {id}" for id in ids[1:]]
        clauses = [b"\r\n\tPRIORITY 0;" in app.seen[0].message.trace, b"\r\n\tPRIORITY 7;" in app.seen[1].message.trace]
        assert clauses == [True, True]
        assert b"PRIORITY" not in app.seen[2].message.trace
        assert [fields.get("priority") for name, fields in stage.told.events if name == "accepted"] == [0, 7, None]
