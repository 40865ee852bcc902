"""Promise 1, line by line: what the reply after the end of data is worth (DESIGN §4)."""

from __future__ import annotations

import asyncio
import errno
import re
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from gateway.contracts import Outcome, Question, SpoolError, Verdict
from gateway.contracts import Stage as CheckStage
from gateway.intake import OWN_PASSES, new_id
from gateway.message import INLINE_LIMIT
from gateway.queue import HOPING
from gateway.reply import Reply
from gateway.route import Route
from gateway.smtp.trace import mark

from ..loops import until
from .stage import DOWN, HELD, LATER, NEVER, OK, Stage, StagedSink, breathe, patience

KNOWN = SpoolError("disk I/O error", known=True)
UNKNOWN = SpoolError("sync failed", known=False)


# ------------------------------------------------------------ acknowledge = durable


async def test_all_taken_before_the_group_closes_is_250_and_nothing_is_stored() -> None:
    async with Stage(StagedSink("app", OK), StagedSink("copy", OK)) as stage:
        stage.send()
        assert stage.codes == [250]
        assert stage.spool.waiting == []
        assert stage.spool.rows == {}


async def test_a_fast_sink_costs_no_commit() -> None:
    sink = StagedSink("app")
    async with Stage(sink) as stage:
        stage.send()
        await breathe()
        assert stage.codes == []
        assert stage.spool.waiting == [], "it must not join a group before spool.hold is over"
        sink.settle(OK)
        assert stage.codes == [250]
        await patience()
        assert stage.spool.waiting == []


async def test_a_slow_sink_joins_a_group_after_hold_and_250_follows_the_sync() -> None:
    sink = StagedSink("app")
    async with Stage(sink) as stage:
        stage.send()
        await patience()
        assert len(stage.spool.waiting) == 1
        [row] = stage.spool.close_group()
        assert [pending.recipients for pending in row.pendings] == [(0,)]
        assert stage.codes == [], "no 250 before the sync"
        stage.spool.sync()
        assert stage.codes == [250]


async def test_taken_between_joining_and_closing_needs_no_row() -> None:
    sink = StagedSink("app")
    async with Stage(sink) as stage:
        stage.send()
        await patience()
        sink.settle(OK)
        assert stage.codes == [250]
        assert stage.spool.close_group() == []
        assert stage.spool.rows == {}


async def test_the_row_names_exactly_the_pairs_that_were_not_taken() -> None:
    app, copy = StagedSink("app"), StagedSink("copy", OK)
    async with Stage(app, copy) as stage:
        stage.send("b@us.example", "c@us.example", "d@us.example")
        app.settle(OK, LATER, OK)
        [row] = stage.spool.close_group()
        assert [(pending.sink, pending.recipients, pending.part) for pending in row.pendings] == [("app", (1,), 2)]
        assert row.pendings[0].delivery_id.endswith("_2"), "fewer recipients are a new delivery"
        stage.spool.sync()
        assert stage.codes == [250]


async def test_deferred_never_releases_the_reply_and_never_changes_it() -> None:
    sink = StagedSink("app", LATER)
    async with Stage(sink) as stage:
        stage.send()
        await breathe()
        assert stage.codes == []
        stage.spool.close_group()
        assert stage.codes == []
        stage.spool.sync()
        assert stage.codes == [250]
        [(_message, pending)] = stage.spool.rows.values()
        assert (pending.state, pending.attempts) == ("queued", 1)
        assert 50 < pending.due - stage.clock() < 70


async def test_failed_is_a_dead_letter_in_the_same_transaction_as_the_mark_of_its_failure() -> None:
    async with Stage(StagedSink("app", NEVER)) as stage:
        stage.send()
        await breathe()
        assert stage.codes == [], "failed never changes the reply, and never releases it before the sync"
        stage.spool.commit()
        assert stage.codes == [250]
        [(_message, pending)] = stage.spool.rows.values()
        assert (pending.state, pending.note) == ("dead", "550 5.1.1 never")


async def test_failed_with_bounces_stores_the_bounce_and_nothing_else() -> None:
    app, out = StagedSink("app", NEVER), StagedSink("out")
    async with Stage(app, out, on_failure="bounce", bounces="out") as stage:
        stage.send(route=Route(("*",), ("app",)))
        stage.spool.commit()
        assert stage.codes == [250]
        [(bounce, pending)] = stage.spool.rows.values()
        assert bounce.envelope.mail_from == ""
        assert [recipient.address for recipient in bounce.envelope.recipients] == ["a@client.example"]
        assert pending.sink == "out"
        assert b"550 5.1.1 never" in bounce.content
        await breathe()
        assert out.seen[0].message is bounce


async def test_a_null_sender_gets_no_bounce_ever() -> None:
    async with Stage(StagedSink("app", NEVER), StagedSink("out"), on_failure="bounce", bounces="out") as stage:
        stage.send(route=Route(("*",), ("app",)), mail_from="")
        stage.spool.commit()
        [(message, pending)] = stage.spool.rows.values()
        assert (message.envelope.mail_from, pending.state) == ("", "dead")


async def test_an_outcome_during_the_commit_queues_behind_the_insert() -> None:
    sink = StagedSink("app")
    async with Stage(sink) as stage:
        stage.send()
        await patience()
        stage.spool.close_group()
        sink.settle(OK)
        assert stage.spool.marks == [], "there is no row to mark yet"
        assert stage.codes == [], "the group is closed: the reply follows its sync"
        stage.spool.sync()
        assert stage.codes == [250]
        assert len(stage.spool.marks) == 1
        stage.spool.sync_marks()
        assert stage.spool.rows == {}


async def test_until_its_mark_is_synced_a_delivery_counts_as_in_flight() -> None:
    sink = StagedSink("app")
    async with Stage(sink) as stage:
        stage.send()
        await patience()
        stage.spool.commit()
        sink.settle(OK)
        stage.queue.kick()
        await breathe()
        assert len(sink.seen) == 1, "the row is still there, and must not be tried again"
        stage.spool.sync_marks()
        stage.queue.kick()
        await breathe()
        assert len(sink.seen) == 1


@pytest.mark.parametrize("sink_is", ["down", "bound to a rate"])
async def test_hold_is_nothing_where_the_first_try_cannot_start(sink_is: str) -> None:
    sink = StagedSink("app")
    async with Stage(sink, concurrency=1, rate=1.0 if sink_is == "bound to a rate" else 0.0) as stage:
        stage.send()
        if sink_is == "down":
            sink.settle(DOWN)
            stage.spool.commit()
        before = len(stage.spool.waiting)
        stage.send()
        assert len(stage.spool.waiting) == before + 1, "it joins the next group at once"


async def test_a_first_try_waits_for_a_place_that_is_free_in_time() -> None:
    sink = StagedSink("app")
    async with Stage(sink, concurrency=1) as stage:
        for _ in range(3):
            stage.send()
        assert (len(sink.out), stage.spool.waiting) == (1, [])
        for taken in range(3):
            assert stage.codes == [250] * taken
            sink.settle(OK)
        assert stage.codes == [250] * 3
        assert len(sink.seen) == 3
        assert stage.spool.rows == {}


async def test_a_first_try_that_got_no_place_is_stored_and_tried_later() -> None:
    sink = StagedSink("app")
    async with Stage(sink, concurrency=1) as stage:
        stage.spool.by_itself = True
        stage.send("first@us.example")
        stage.send("second@us.example")
        await patience()
        await breathe(20)
        assert stage.codes == [250, 250]
        assert len(stage.spool.rows) == 2
        assert len(sink.seen) == 1, "the second waits for its place, now as a row"
        sink.settle(OK)
        await breathe(20)
        (second,) = sink.out
        assert second.recipients[0].local == "second"
        sink.settle(OK)
        await breathe(20)
        assert stage.spool.rows == {}
        assert len(sink.seen) == 2


async def test_new_mail_and_a_backlog_have_the_places_in_turn() -> None:
    sink = StagedSink("app")
    async with Stage(sink, concurrency=1) as stage:
        stage.spool.by_itself = True
        for number in range(4):
            stage.send(f"old{number}@us.example")
        await patience()
        await breathe(20)
        assert len(stage.spool.rows) == 4
        before = len(stage.codes)
        for number in range(4):
            stage.send(f"new{number}@us.example")
        for _ in range(8):
            await breathe(20)
            sink.settle(OK)
        await breathe(20)
        assert stage.spool.rows == {}
        assert len(stage.codes) == before + 4
        order = [delivery.recipients[0].local[:3] for delivery in sink.seen]
        assert sorted(order) == ["new"] * 4 + ["old"] * 4, "each once"
        assert order[1:7].count("old") == 3, order


async def test_nobody_waits_for_a_place_at_a_sink_that_went_down() -> None:
    sink = StagedSink("app")
    async with Stage(sink, concurrency=1) as stage:
        stage.spool.by_itself = True
        stage.send()
        stage.send()
        sink.settle(DOWN)
        assert len(sink.seen) == 1
        await patience()
        await breathe(20)
        assert stage.codes == [250, 250]
        assert len(sink.seen) == 1
        assert len(stage.spool.rows) == 2


async def test_who_waits_for_a_place_when_the_queue_closes_is_stored() -> None:
    sink = StagedSink("app")
    async with Stage(sink, concurrency=1) as stage:
        stage.spool.by_itself = True
        stage.send()
        stage.send()
        closing = asyncio.create_task(stage.queue.close(1.0))
        await breathe(20)
        assert stage.codes == [250]
        sink.settle(OK)
        await closing
        assert stage.codes == [250, 250]
        ((_message, row),) = stage.spool.rows.values()
        assert (row.attempts, row.note) == (0, ""), "it was never out"
        assert row.due <= stage.clock(), "whoever starts next tries it at once"


async def test_who_waits_for_places_at_sinks_that_are_removed_is_stored_for_them() -> None:
    sinks = StagedSink("app"), StagedSink("other")
    async with Stage(*sinks, concurrency=1) as stage:
        stage.spool.by_itself = True
        stage.send()
        stage.send()
        without: dict[str, Any] = {"retry": (60.0,), "expire": 3600.0, "hold": HELD, "bounces": None, "hostname": "mx.example.net"}
        stage.queue.go_by({}, {}, **without)
        await breathe(20)
        assert stage.codes == [250]
        assert [(row.attempts, row.note) for _message, row in stage.spool.rows.values()] == [(0, "")] * 2
        stage.queue.go_by(dict(stage.sinks), stage.lanes, **without)
        for sink in sinks:
            sink.settle(OK)
        await breathe(20)
        for sink in sinks:
            sink.settle(OK)
            assert (len(sink.seen), sink.out) == (2, [])
        await breathe(20)
        assert stage.codes == [250, 250]
        assert stage.spool.rows == {}


async def test_so_many_wait_for_a_place_and_no_more() -> None:
    sink = StagedSink("app")
    async with Stage(sink, concurrency=1) as stage:
        for _ in range(1 + HOPING):
            stage.send()
        assert stage.spool.waiting == []
        stage.send()
        assert len(stage.spool.waiting) == 1


async def test_hold_is_nothing_where_the_sink_is_usually_slower() -> None:
    sink = StagedSink("app")
    async with Stage(sink) as stage:
        for _ in range(2):
            stage.send()
            await patience()
            stage.spool.commit()
            await patience()
            await patience()
            sink.settle(OK)
            stage.spool.sync_marks()
        stage.send()
        assert len(stage.spool.waiting) == 1


async def test_an_error_before_the_commit_is_45x_and_nothing_is_kept() -> None:
    async with Stage(StagedSink("app", LATER)) as stage:
        stage.send()
        stage.spool.close_group()
        stage.spool.sync(KNOWN)
        assert stage.codes == [451]
        assert stage.spool.rows == {}


async def test_no_space_is_452() -> None:
    async with Stage(StagedSink("app", LATER)) as stage:
        stage.send()
        stage.spool.close_group()
        stage.spool.sync(SpoolError("nothing was stored", known=True, full=True))
        assert stage.codes == [452]


async def test_the_words_of_a_fault_decide_nothing() -> None:
    async with Stage(StagedSink("app", LATER)) as stage:
        stage.send()
        stage.spool.close_group()
        stage.spool.sync(SpoolError("the spool /var/spool/full-space: disk I/O error", known=True))
        assert stage.codes == [451]


async def test_an_unknown_commit_is_a_close_without_a_word() -> None:
    async with Stage(StagedSink("app", LATER)) as stage:
        stage.send()
        stage.spool.close_group()
        stage.spool.sync(UNKNOWN)
        assert stage.codes == [None]


@pytest.mark.parametrize(("outcome", "code"), [(OK, 250), (LATER, 451), (NEVER, 451)])
async def test_tries_that_are_out_when_the_store_fails_are_waited_for(outcome: object, code: int) -> None:
    sink = StagedSink("app")
    async with Stage(sink) as stage:
        stage.send()
        await patience()
        stage.spool.close_group()
        stage.spool.sync(KNOWN)
        assert stage.codes == []
        assert outcome in (OK, LATER, NEVER)
        sink.settle({250: OK}.get(code, LATER if outcome is LATER else NEVER))
        assert stage.codes == [code]
        assert stage.spool.rows == {}
        assert stage.spool.marks == []


async def test_an_outcome_during_the_failing_commit_counts_too() -> None:
    sink = StagedSink("app")
    async with Stage(sink) as stage:
        stage.send()
        await patience()
        stage.spool.close_group()
        sink.settle(OK)
        stage.spool.sync(KNOWN)
        assert stage.codes == [250]


async def test_a_sink_that_is_not_in_the_file_holds_its_mail() -> None:
    async with Stage(StagedSink("app", OK)) as stage:
        stage.send(route=Route(("*",), ("app", "gone")))
        stage.spool.commit()
        assert stage.codes == [250]
        [(_message, pending)] = stage.spool.rows.values()
        assert (pending.sink, pending.state) == ("gone", "queued")


# ---------------------------------------------------------- acknowledge = delivered


def delivered(*sinks: str, fallback: str = "durable", timeout: float = 5.0) -> Route:
    return Route(
        ("*",), sinks, acknowledge="delivered", acknowledge_timeout=timeout, fallback="durable" if fallback == "durable" else "refuse"
    )


async def test_delivered_all_taken_is_250() -> None:
    sink = StagedSink("app")
    async with Stage(sink) as stage:
        stage.send(route=delivered("app"))
        await patience()
        assert stage.codes == []
        assert stage.spool.waiting == [], "the sink's word is waited for, not the hold"
        sink.settle(OK)
        assert stage.codes == [250]


@pytest.mark.parametrize(("outcome", "code"), [(LATER, 451), (NEVER, 550)])
async def test_delivered_all_refused_is_the_sinks_own_reply(outcome: object, code: int) -> None:
    async with Stage(StagedSink("app", LATER if outcome is LATER else NEVER)) as stage:
        stage.send(route=delivered("app"))
        assert stage.codes == [code]
        assert stage.spool.waiting == []


async def test_delivered_mixed_commits_the_rest_and_answers_250() -> None:
    sink = StagedSink("app")
    async with Stage(sink) as stage:
        stage.send("b@us.example", "c@us.example", "d@us.example", route=delivered("app"))
        sink.settle(OK, LATER, NEVER)
        assert stage.codes == []
        [row] = stage.spool.close_group()
        assert sorted((pending.state, pending.recipients) for pending in row.pendings) == [("dead", (2,)), ("queued", (1,))]
        stage.spool.sync()
        assert stage.codes == [250]


async def test_delivered_without_a_verdict_falls_back_to_durable() -> None:
    sink = StagedSink("app")
    async with Stage(sink) as stage:
        stage.send(route=delivered("app", timeout=0.02))
        await patience()
        stage.spool.commit()
        assert stage.codes == [250]
        sink.settle(OK)
        stage.spool.sync_marks()
        assert stage.spool.rows == {}


async def test_delivered_without_a_verdict_can_refuse() -> None:
    sink = StagedSink("app")
    async with Stage(sink) as stage:
        stage.send(route=delivered("app", fallback="refuse", timeout=0.02))
        await patience()
        assert stage.codes == [451]
        sink.settle(OK)
        assert stage.spool.rows == {}
        assert stage.spool.marks == []


async def test_delivered_waits_for_a_place_in_the_lane() -> None:
    sink = StagedSink("app")
    async with Stage(sink, concurrency=1) as stage:
        stage.send(route=delivered("app"))
        stage.send(route=delivered("app"))
        assert len(sink.seen) == 1
        sink.settle(OK)
        await breathe()
        sink.settle(NEVER)
        assert stage.codes == [250, 550]


async def test_lmtp_answers_each_recipient_with_its_own_truth() -> None:
    sink = StagedSink("app")
    async with Stage(sink) as stage:
        stage.send("b@us.example", "c@us.example", "d@us.example", route=delivered("app"), lmtp=True)
        sink.settle(OK, LATER, NEVER)
        assert stage.codes == [[250, 451, 550]]
        assert stage.spool.waiting == [], "who was refused is the client's again"


async def test_lmtp_across_sinks_keeps_what_one_sink_took() -> None:
    app, archive = StagedSink("app"), StagedSink("archive", OK)
    async with Stage(app, archive) as stage:
        both, only = delivered("app", "archive"), delivered("app")
        stage.send("b@us.example", "c@us.example", route=[both, only], lmtp=True)
        app.settle(LATER, LATER)
        stage.spool.commit()
        assert stage.codes == [[250, 451]]
        [(_message, pending)] = stage.spool.rows.values()
        assert (pending.sink, pending.recipients) == ("app", (0,))


async def test_lmtp_out_of_time_who_has_a_word_hears_it() -> None:
    """Each sink's own word where there is one; 451 for those whose sink is silent, and nothing more is tried."""
    app, slow = StagedSink("app"), StagedSink("slow")
    async with Stage(app, slow) as stage:
        routes = [
            delivered("app", fallback="refuse", timeout=0.05),
            delivered("slow", fallback="refuse", timeout=0.05),
            delivered("app", fallback="refuse", timeout=0.05),
        ]
        stage.send("b@us.example", "c@us.example", "d@us.example", route=routes, lmtp=True)
        app.settle(OK, NEVER)
        await until(lambda: stage.codes)
        assert stage.codes == [[250, 451, 550]]
        slow.settle(LATER)
        await breathe()
        assert stage.spool.waiting == []
        assert not stage.spool.rows
        assert [fields["recipients"] for name, fields in stage.told.events if name == "accepted"] == [1]


async def test_lmtp_out_of_time_what_is_promised_is_kept() -> None:
    app, slow = StagedSink("app"), StagedSink("slow")
    async with Stage(app, slow) as stage:
        routes = [delivered("app", timeout=0.05), delivered("slow", timeout=0.05), delivered("app", "slow", timeout=0.05)]
        stage.send("b@us.example", "c@us.example", "d@us.example", route=routes, lmtp=True)
        app.settle(NEVER, OK)
        await until(lambda: stage.spool.waiting)
        stage.spool.commit()
        assert stage.codes == [[550, 250, 250]]
        [(_message, pending)] = stage.spool.rows.values()
        assert (pending.sink, pending.recipients) == ("slow", (1, 2))


async def test_lmtp_a_stray_large_content_goes_when_its_try_is_over() -> None:
    slow = StagedSink("slow")
    async with Stage(slow) as stage:
        route = delivered("slow", fallback="refuse", timeout=0.05)
        stage.send("b@us.example", content=b"x" * (INLINE_LIMIT + 1), route=route, lmtp=True)
        await until(lambda: stage.codes)
        assert stage.codes == [[451]]
        (file,) = stage.spool.files.values()
        assert not file.gone, "the try that is out reads it"
        slow.settle(LATER)
        await breathe()
        assert file.gone


async def test_lmtp_a_store_that_fails_changes_no_other_truth() -> None:
    app, archive = StagedSink("app"), StagedSink("archive")
    async with Stage(app, archive) as stage:
        stage.send("b@us.example", "c@us.example", route=[delivered("app", "archive"), delivered("app")], lmtp=True)
        app.settle(OK, NEVER)
        archive.settle(LATER)
        stage.spool.close_group()
        stage.spool.sync(KNOWN)
        assert stage.codes == [[451, 550]]


async def test_lmtp_durable_answers_for_everyone() -> None:
    async with Stage(StagedSink("app", OK)) as stage:
        stage.send("b@us.example", "c@us.example", lmtp=True)
        assert stage.codes == [[250, 250]]


# -------------------------------------------------------------------- the content


async def test_the_sink_gets_the_very_octets_and_our_trace_above() -> None:
    sink = StagedSink("app", OK)
    async with Stage(sink) as stage:
        content = b"Subject: x\r\n\r\n.dots\r\n..\r\n\xff\r\n"
        draft = stage.draft(stage.transaction())
        draft.write(content[:20])
        draft.write(content[20:])
        draft.finish(stage.answers.append)
        message = sink.seen[0].message
        assert message.content == content
        assert re.fullmatch(
            rb"Received: from client\.example \(\[192\.0\.2\.7\]\)\r\n"
            rb"\tby mx\.example\.net \(gateway-smtp\) with ESMTP\r\n"
            rb"\tid " + message.id.encode() + rb"\r\n\tfor <b@us\.example>;\r\n"
            rb"\t[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d \+0000\r\n",
            message.trace,
        )


async def test_the_trace_names_no_recipient_where_there_are_several() -> None:
    sink = StagedSink("app", OK)
    async with Stage(sink) as stage:
        stage.send("b@us.example", "bcc@us.example")
        assert b"us.example" not in sink.seen[0].message.trace


async def test_large_content_goes_to_one_file_and_is_forgotten_when_all_was_taken() -> None:
    sink = StagedSink("app", OK)
    async with Stage(sink) as stage:
        draft = stage.draft(stage.transaction())
        piece = b"x" * 65536
        for _ in range(10):
            draft.write(piece)
        draft.finish(stage.answers.append)
        await breathe()
        assert stage.codes == [250]
        [file] = stage.spool.files.values()
        assert file.octets == piece * 10
        assert sink.seen[0].message.stored.path == file.path
        assert file.gone
        assert stage.intake.held == 0


async def test_the_file_of_a_stored_message_stays() -> None:
    async with Stage(StagedSink("app", LATER)) as stage:
        draft = stage.draft(stage.transaction())
        draft.write(b"x" * (INLINE_LIMIT + 1))
        draft.finish(stage.answers.append)
        await breathe()
        stage.spool.commit()
        assert stage.codes == [250]
        [file] = stage.spool.files.values()
        assert not file.gone


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 452), (errno.EDQUOT, 452), (errno.EIO, 451)])
async def test_a_disk_that_takes_no_content(number: int, code: int) -> None:
    async with Stage(StagedSink("app", OK)) as stage:
        draft = stage.draft(stage.transaction())
        draft.write(b"x" * (INLINE_LIMIT + 1))
        [file] = stage.spool.files.values()
        file.fail = OSError(number, "the disk's own words")
        draft.finish(stage.answers.append)
        await breathe()
        assert stage.codes == [code]
        assert file.gone
        assert stage.intake.held == 0


async def test_reading_stops_while_the_disk_is_behind() -> None:
    drained: list[bool] = []
    async with Stage(StagedSink("app", OK)) as stage:
        draft = stage.intake.begin(stage.transaction(), lambda: drained.append(True))
        while not draft.full:
            draft.write(b"x" * 65536)
        assert not drained
        await breathe()
        assert drained
        assert not draft.full
        draft.abort()
        [file] = stage.spool.files.values()
        assert file.gone


async def test_reading_goes_on_where_another_mail_made_the_room() -> None:
    """Both stop for the budget of all; when the first is written the second fits, and nobody else tells it."""
    drained: list[str] = []
    async with Stage(StagedSink("app", OK), memory=300_000) as stage:
        drafts = {name: stage.intake.begin(stage.transaction(), partial(drained.append, name)) for name in ("first", "second")}
        for draft in drafts.values():
            draft.write(b"x" * 280_000)
        assert all(draft.full for draft in drafts.values())
        await breathe()
        assert not any(draft.full for draft in drafts.values())
        assert set(drained) == {"first", "second"}
        for draft in drafts.values():
            draft.abort()


async def test_over_the_memory_budget_small_content_goes_to_files_too() -> None:
    sink = StagedSink("app", OK)
    async with Stage(sink, memory=1000) as stage:
        stage.send(content=b"\r\n" + b"y" * 2000)
        await breathe()
        assert stage.codes == [250]
        assert sink.seen[0].message.stored.path is not None


async def test_the_memory_budget_holds_for_content_that_stands_still() -> None:
    async with Stage(StagedSink("app", OK), memory=300_000) as stage:
        drafts = []
        for _ in range(50):
            draft = stage.draft(stage.transaction())
            for _ in range(12):
                draft.write(b"x" * 20_000)
                await breathe(1)
            drafts.append(draft)
        await breathe()
        assert stage.intake.held < 300_000 + 50 * 20_000 / 10
        for draft in drafts:
            draft.abort()
        assert stage.intake.held == 0


async def test_a_functions_own_250_is_the_reply() -> None:
    said = Outcome("delivered", Reply(250, "2.1.5", "mine"))
    async with Stage(StagedSink("app", said)) as stage:
        stage.send(route=delivered("app"))
        assert stage.answers == [said.reply]


async def test_an_aborted_draft_leaves_nothing() -> None:
    async with Stage(StagedSink("app", OK)) as stage:
        draft = stage.draft(stage.transaction())
        draft.write(b"x" * 1000)
        draft.abort()
        assert stage.intake.held == 0
        assert stage.answers == []


async def test_a_message_that_went_through_here_too_often_is_a_loop() -> None:
    async with Stage(StagedSink("app", OK)) as stage:
        line = b"Received: from x " + mark("mx.example.net") + b" with ESMTP; now\r\n"
        stage.send(content=line * (OWN_PASSES - 1) + b"\r\n" + line * 9)
        stage.send(content=line * OWN_PASSES + b"\r\nbody\r\n")
        assert stage.codes == [250, 554]
        assert stage.intake.owed == 0


# --------------------------------------------------------------------- the checks


class NamedCheck:
    """Refuses subjects that contain its word; remembers what it saw before."""

    def __init__(self, name: str, word: bytes, stages: Sequence[CheckStage] = ("content",)) -> None:
        self.name = name
        self.word = word
        self.stages = frozenset(stages)
        self.saw: list[object] = []

    async def judge(self, question: Question) -> Verdict:
        await breathe(1)
        assert question.message is not None
        self.saw.append(dict(question.message.checks))
        if self.word in question.message.content:
            return Verdict(Reply(554, "5.7.1", f"{self.name} says no"), {"found": True})
        return Verdict(facts={"found": False})

    async def close(self) -> None: ...


async def test_nothing_is_tried_before_the_content_checks_pass() -> None:
    first, second = NamedCheck("first", b"bad"), NamedCheck("second", b"worse")
    sink = StagedSink("app", OK)
    async with Stage(sink, checks={"first": first, "second": second}) as stage:
        route = Route(("*",), ("app",), checks=("first", "second"))
        stage.send(content=b"Subject: bad\r\n\r\n", route=route)
        assert sink.seen == []
        await breathe(10)
        assert stage.codes == [554]
        assert sink.seen == []
        assert second.saw == [], "the first refusal ends it"
        stage.send(route=route)
        await breathe(10)
        assert stage.codes == [554, 250]
        assert second.saw == [{"first": {"found": False}}], "a check reads the verdicts before it"
        assert sink.seen[0].message.checks == {"first": {"found": False}, "second": {"found": False}}


# ------------------------------------------------------------------------- the id


def test_ids_are_version_7_unique_and_in_order_of_time() -> None:
    ids = [new_id(1_800_000_000.0 + n / 1000) for n in range(2000)]
    assert len(set(ids)) == 2000
    assert ids == sorted(ids)
    assert all(re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", id) for id in ids)


# -------------------------------------------------------------------------- ids


def test_an_id_is_a_uuid_of_its_time_and_never_the_same() -> None:
    """RFC 9562 §5.7: 48 bits of milliseconds, version 7, variant 10, and the rest is chance."""
    made = [new_id(1_700_000_000.123) for _ in range(2000)]
    known = [uuid.UUID(id) for id in made]
    assert [str(each) for each in known] == made
    assert {each.version for each in known} == {7}
    assert {each.variant for each in known} == {uuid.RFC_4122}
    assert {each.int >> 80 for each in known} == {1_700_000_000_123}
    assert len(set(made)) == len(made)
    chance = [(each.int >> 64 & 0xFFF) << 62 | each.int & (1 << 62) - 1 for each in known]
    for bit in range(74):  # each falls either way about as often: 2,000 throws, ten standard deviations
        assert 776 < sum(number >> bit & 1 for number in chance) < 1224
    assert new_id(1.0) < new_id(1.5) < new_id(2.0**37)
