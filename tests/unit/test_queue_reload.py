"""Sinks that go and come back by a reload while tries are out."""

from __future__ import annotations

from gateway.route import Route

from .stage import LATER, NEVER, OK, Stage, StagedSink, breathe, patience

APP = Route(("*",), ("app",))


def go_by(stage: Stage, *sinks: StagedSink) -> None:
    stage.queue.go_by(
        {sink.name: sink for sink in sinks},
        stage.lanes,
        retry=(60.0,),
        expire=3600.0,
        hold=stage.queue.hold,
        bounces="back" if "back" in stage.sinks else None,
        hostname="mx.example.net",
    )


async def test_what_was_deferred_while_its_sink_was_gone_is_tried_again() -> None:
    app, box = StagedSink("app"), StagedSink("box")
    async with Stage(app, box) as stage:
        stage.send(route=APP)
        await patience()
        stage.spool.commit()
        go_by(stage, box)
        app.settle(LATER)
        await breathe()
        stage.spool.sync_marks()
        await breathe()
        go_by(stage, app, box)
        stage.clock.added = 70.0
        stage.queue.kick()
        await breathe()
        assert [delivery.attempt for delivery in app.seen] == [1, 2]


async def test_what_was_stored_while_its_sink_was_gone_is_not_tried_twice_at_a_time() -> None:
    app, box = StagedSink("app"), StagedSink("box")
    async with Stage(app, box) as stage:
        stage.send(route=APP)
        await patience()
        assert len(app.seen) == 1
        go_by(stage, box)
        stage.spool.commit()
        assert stage.codes == [250]
        go_by(stage, app, box)
        await breathe(20)
        assert len(app.seen) == 1, "the first try is still out"
        app.settle(OK)
        await breathe()
        stage.spool.sync_marks()
        await breathe(20)
        assert len(app.seen) == 1
        assert not stage.spool.rows


async def test_what_fails_for_good_once_its_sink_is_gone_goes_by_that_sinks_word() -> None:
    app, back = StagedSink("app"), StagedSink("back")
    async with Stage(app, back, on_failure="bounce", bounces="back") as stage:
        stage.send(route=APP)
        await patience()
        stage.spool.commit()
        go_by(stage, back)
        app.settle(NEVER)
        await breathe()
        stage.spool.sync_marks()
        await breathe(20)
        assert [delivery.sink for delivery in back.seen] == ["back"]
