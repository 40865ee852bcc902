"""Telemetry: lines that can be trusted, numbers that add up, and a loop that never waits."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from gateway import __version__
from gateway.exposition import expose
from gateway.message import Client
from gateway.observe import BACKLOG, COUNTERS, GAUGES, HISTOGRAMS, LONG_LINE, MOST_LABELS, Telemetry, quiet
from gateway.reply import Reply


class Pipe:
    """A telemetry that writes into a pipe; ``lines`` reads what came out and ends it."""

    def __init__(self, telemetry: Telemetry, reading: int, writing: int) -> None:
        self.telemetry = telemetry
        self._reading = reading
        self._writing = writing

    def octets(self) -> bytes:
        self.telemetry.close(30.0)
        os.close(self._writing)
        with os.fdopen(self._reading, "rb") as pipe:
            return pipe.read()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.octets().splitlines()]


def pipe(log: Any = "json", **settings: Any) -> Pipe:
    reading, writing = os.pipe()
    return Pipe(Telemetry(log, fd=writing, **settings), reading, writing)


def numbers(telemetry: Telemetry) -> dict[str, float]:
    """Every sample of one process."""
    return samples(expose([telemetry.state()]))


def samples(exposition: bytes) -> dict[str, float]:
    """Every sample as Prometheus would write its name."""
    found = {}
    for family in text_string_to_metric_families(exposition.decode()):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


ACCEPTED: dict[str, Any] = {
    "session": "s1",
    "id": "0193f1c2-7a1b-7c3d-8e4f-1a2b3c4d5e6f",
    "listener": "127.0.0.1:2525",
    "client": "192.0.2.7",
    "mail_from": "a@client.example",
    "recipients": 2,
    "size": 2841,
    "stored": True,
}
TRIED: dict[str, Any] = {
    "id": ACCEPTED["id"],
    "delivery": ACCEPTED["id"],
    "sink": "app",
    "recipients": 2,
    "remote": "127.0.0.1:25",
    "reply": "250 2.0.0 ok",
    "attempt": 1,
    "seconds": 0.0123456789,
}


# ------------------------------------------------------------------------------------- the lines


def test_one_json_line_an_event() -> None:
    out = pipe(clock=lambda: 1_795_374_480.1239)
    out.telemetry.event("accepted", **ACCEPTED)
    out.telemetry.event("ready")
    out.telemetry.event("delivered", **TRIED)
    accepted, ready, delivered = out.lines()
    assert accepted == {"time": "2026-11-22T19:08:00.123Z", "event": "accepted", **ACCEPTED}
    assert list(accepted)[:4] == ["time", "event", "session", "id"]
    assert ready == {"time": "2026-11-22T19:08:00.123Z", "event": "ready"}
    assert delivered["seconds"] == 0.012345


def test_time_goes_on() -> None:
    moments = iter([0.0, 0.9999, 1.0, 59.5, 3600.25, 3600.2504])
    out = pipe(clock=lambda: next(moments))
    for _ in range(6):
        out.telemetry.event("ready")
    assert [line["time"] for line in out.lines()] == [
        "1970-01-01T00:00:00.000Z",
        "1970-01-01T00:00:00.999Z",
        "1970-01-01T00:00:01.000Z",
        "1970-01-01T00:00:59.500Z",
        "1970-01-01T01:00:00.250Z",
        "1970-01-01T01:00:00.250Z",
    ]


def test_the_worker_is_named_where_there_are_several() -> None:
    out = pipe(worker=3)
    out.telemetry.event("ready")
    out.telemetry.event("listening", address="127.0.0.1:1")
    assert [(line["event"], line["worker"]) for line in out.lines()] == [("ready", 3), ("listening", 3)]


def test_text_for_people() -> None:
    out = pipe("text", clock=lambda: 1_795_374_480.1239)
    out.telemetry.event("accepted", **ACCEPTED | {"mail_from": "", "client": None, "stored": False})
    out.telemetry.event("refused", session="s", stage="recipient", code=550, reply=Reply(550, "5.7.1", "no route"), address='"a b"@x')
    out.telemetry.event("delivered", **TRIED)
    out.telemetry.event("bug", message="boom", traceback="Traceback:\n  File \x1b[31m\n")
    assert out.octets().decode().splitlines() == [
        f"19:08:00.123 accepted  session=s1 id={ACCEPTED['id']} listener=127.0.0.1:2525 recipients=2 size=2841 stored=false",
        '19:08:00.123 refused   session=s stage=recipient code=550 reply="550 5.7.1 no route" address="\\"a b\\"@x"',
        f"19:08:00.123 delivered id={ACCEPTED['id']} delivery={ACCEPTED['id']} sink=app recipients=2 remote=127.0.0.1:25 "
        'reply="250 2.0.0 ok" attempt=1 seconds=0.012345',
        "19:08:00.123 bug       message=boom",
        "    Traceback:",
        "      File \\u001b[31m",
    ]


def test_nothing_is_written_with_none_but_all_is_counted() -> None:
    out = pipe("none")
    out.telemetry.event("accepted", **ACCEPTED)
    assert numbers(out.telemetry)["gateway_messages_accepted_total"] == 1
    assert out.octets() == b""


def test_committed_is_counted_and_not_told() -> None:
    out = pipe()
    out.telemetry.event("committed", count=3, seconds=0.002)
    assert numbers(out.telemetry)["gateway_committed_messages_total"] == 3
    assert out.octets() == b""


HOSTILE = [
    "\x1b]0;owned\x07\x1b[2J",
    "a\r\n{\"event\":\"accepted\"}",
    "a\u2028b\u2029c",
    "\x7f\x80\x85\x9b31m",
    "\u202egnp.exe\u2066\u200b\ufeff",
    "\udc80\udcff lone",
    "\x00",
]  # fmt: skip
STEERS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\u200b\ufeff]")


@pytest.mark.parametrize("log", ["json", "text"])
@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_values_stay_values(log: str, value: str) -> None:
    out = pipe(log)
    out.telemetry.event("refused", session="s", stage="mail", code=550, reply="550 5.7.1 no", address=value)
    octets = out.octets()
    assert octets.count(b"\n") == 1
    assert not STEERS.search(octets.decode())
    if log == "json":
        assert json.loads(octets)["address"].encode("utf-8", "backslashreplace") == value.encode("utf-8", "backslashreplace")


@given(st.dictionaries(st.sampled_from(["session", "address", "reply", "helo"]), st.text(max_size=400)), st.sampled_from(["json", "text"]))
def test_whatever_is_said_is_one_line(fields: dict[str, str], log: str) -> None:
    out = pipe(log)
    out.telemetry.event("refused", stage="mail", code=550, **fields)
    octets = out.octets()
    assert octets.count(b"\n") == 1
    assert octets.endswith(b"\n")
    assert not STEERS.search(octets.decode())
    if log == "json":
        assert json.loads(octets)["event"] == "refused"


def test_legible_text_stays_legible() -> None:
    out = pipe()
    out.telemetry.event("accepted", **ACCEPTED | {"mail_from": "jürgen@bücher.example"})
    assert "jürgen@bücher.example".encode() in out.octets()


def test_long_values_are_cut_and_long_lines_stay_bounded() -> None:
    out = pipe()
    out.telemetry.event("refused", session="s", stage="mail", code=550, reply="550 no", address="ä" * 10_000)
    out.telemetry.event("odd", **{f"key{number}": "x" * 5000 for number in range(5)}, deep=[["y" * 5000] * 100] * 100)
    out.telemetry.event("bug", message="m" * 5000, traceback="t" * 7000)
    first, second, third = out.octets().splitlines()
    assert json.loads(first)["address"] == "ä" * 200 + "… (10000 characters)"
    assert json.loads(second)["key4"] == "x" * 200 + "… (5000 characters)"
    assert len(second) < 10 * LONG_LINE
    assert json.loads(third)["traceback"] == "t" * 7000
    assert json.loads(third)["message"] == "m" * 200 + "… (5000 characters)"


def test_the_faults_of_a_reload_stay_legible() -> None:
    out = pipe()
    faults = [f"routes[{number}]: {'x' * 150}" for number in range(14)]
    out.telemetry.event("reload_refused", faults=faults)
    (line,) = out.lines()
    assert line["faults"] == [*faults[:10], "… (4 more)"]


def test_what_json_cannot_say_is_said_all_the_same() -> None:
    out = pipe()
    out.telemetry.event(
        "odd",
        client=Client("192.0.2.1", 47110),
        octets=b"\xff\r\n",
        reply=Reply(250, "2.0.0", "ok"),
        big=2**70,
        none=None,
        nan=float("nan"),
        keys={1: {2}},
        path=Path("/x"),
    )
    (line,) = out.lines()
    assert line["client"].startswith("Client(ip='192.0.2.1', port=47110")
    assert line["octets"] == "b'\\xff\\r\\n'"
    assert line["reply"] == "250 2.0.0 ok"
    assert line["big"] == str(2**70)
    assert (line["none"], line["nan"], line["keys"], line["path"]) == (None, None, {"1": [2]}, "/x")


class Spiteful:
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


@pytest.mark.parametrize("log", ["json", "text", "none"])
def test_an_event_never_raises(log: str) -> None:
    out = pipe(log)
    out.telemetry.event("delivered")  # nothing that it counts by
    out.telemetry.event("accepted", recipients="many", size=None, stored=Spiteful())
    out.telemetry.event("odd", value=Spiteful())
    out.telemetry.event("refused", stage=Spiteful(), code=550)
    octets = out.octets()
    if log == "json":
        first, *_rest, last = [json.loads(line) for line in octets.splitlines()]
        assert first == {"time": first["time"], "event": "delivered", "uncounted": "KeyError('sink')"}
        assert last["event"] == "bug"
        assert last["message"] == "cannot tell 'refused': RuntimeError"
    else:
        assert octets.count(b"\n") == (4 if log == "text" else 0)


# -------------------------------------------------------------------------------------- the pipe


def test_a_full_pipe_never_blocks_and_what_is_lost_is_counted() -> None:
    out = pipe()
    telemetry = out.telemetry
    many = BACKLOG * 3
    for _ in range(many):
        telemetry.event("attempted", id="x" * 100, delivery="y" * 100, sink="app", attempt=1)
    # Nobody has read yet: the pipe is full, the backlog too, and we are still here.
    assert telemetry.dropped > 0
    assert not telemetry.flush(0.05)
    assert numbers(telemetry)["gateway_attempts_total{sink=\"app\"}"] == many  # fmt: skip
    lost = telemetry.dropped

    seen: list[dict[str, Any]] = []

    def read() -> None:
        with os.fdopen(os.dup(out._reading), "rb") as lines:
            for line in lines:
                seen.append(json.loads(line))
                if seen[-1]["event"] == "last":
                    return

    reader = threading.Thread(target=read)
    reader.start()
    assert telemetry.flush(60.0)
    telemetry.event("last")
    reader.join(60.0)
    assert sum(line["lines"] for line in seen if line["event"] == "dropped") == lost
    assert sum(line["event"] == "attempted" for line in seen) == many - lost
    assert telemetry.dropped == lost
    assert numbers(telemetry)["gateway_log_lines_dropped_total"] == lost
    assert out.octets() == b""


def test_close_does_not_wait_for_a_reader_that_never_comes() -> None:
    reading, writing = os.pipe()
    others = threading.enumerate()
    telemetry = Telemetry("text", fd=writing)
    for _ in range(4000):
        telemetry.event("ready", filler="x" * 100)
    before = time.monotonic()
    telemetry.close(0.1)
    assert time.monotonic() - before < 30
    assert telemetry.dropped > 0
    after = telemetry.dropped
    telemetry.event("ready")
    assert telemetry.dropped == after + 1
    telemetry.close(0.1)
    # The thread gets free once somebody reads.
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "event-log" and thread not in others)
    os.set_blocking(reading, False)
    while thread.is_alive():
        with suppress(BlockingIOError):
            os.read(reading, 65536)
        thread.join(0.001)
    os.close(reading)
    os.close(writing)


def test_a_reader_that_is_gone_costs_lines_and_nothing_else() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    telemetry = Telemetry(fd=writing)
    for _ in range(10):
        telemetry.event("ready")
    telemetry.close(30.0)
    assert telemetry.dropped == 10
    os.close(writing)


def test_a_descriptor_that_others_made_non_blocking() -> None:
    out = pipe()
    os.set_blocking(out._writing, False)
    for number in range(3000):
        out.telemetry.event("odd", number=number, filler="x" * 100)
    seen = 0
    with os.fdopen(os.dup(out._reading), "rb") as lines:
        for seen, line in enumerate(lines, 1):
            assert json.loads(line)["number"] == seen - 1
            if seen == 3000:
                break
    assert out.telemetry.dropped == 0
    assert os.get_blocking(out._writing) is False
    assert out.octets() == b""


def test_lines_of_several_workers_stay_whole() -> None:
    """They share a pipe, and whoever reads it is slow: writes must be such as a pipe takes whole."""
    reading, writing = os.pipe()
    workers = [Telemetry("json", fd=writing, worker=number) for number in range(4)]
    for number in range(1000):
        for worker in workers:
            worker.event("accepted", id=f"{number}" * 20, recipients=1, size=1, stored=False)
    time.sleep(0.1)  # until the pipe is full and the writers wait
    octets = bytearray()

    def read() -> None:
        while piece := os.read(reading, 3000):
            octets.extend(piece)
            time.sleep(0)

    reader = threading.Thread(target=read)
    reader.start()
    for worker in workers:
        worker.close(60)
    os.close(writing)
    reader.join()
    os.close(reading)
    lines = [json.loads(line) for line in octets.splitlines()]
    assert len(lines) == 4000
    for number in range(4):
        told = [line["id"] for line in lines if line["worker"] == number]
        assert told == [f"{count}" * 20 for count in range(1000)]


def test_flush_means_written() -> None:
    out = pipe()
    for number in range(50):
        out.telemetry.event("odd", number=number)
        if number % 8 == 0:
            assert out.telemetry.flush(30.0)
            os.set_blocking(out._reading, False)
            assert json.loads(os.read(out._reading, 1 << 20).splitlines()[-1])["number"] == number
    os.set_blocking(out._reading, True)
    assert len(out.lines()) == 1


def test_an_event_log_that_was_never_used_has_no_thread() -> None:
    before = threading.enumerate()
    telemetry = Telemetry()
    assert telemetry.flush()
    telemetry.close()
    assert set(threading.enumerate()) <= {*before}


# ------------------------------------------------------------------------------------ the numbers


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    telemetry = Telemetry("none")
    yield telemetry
    telemetry.close()


def test_every_event_counts(telemetry: Telemetry) -> None:
    tell = telemetry.event
    tell("connected", session="s", listener="l", client="192.0.2.7")
    tell("accepted", **ACCEPTED)
    tell("accepted", **ACCEPTED | {"stored": False, "recipients": 1, "size": 9})
    tell("refused", session="s", stage="recipient", code=550, reply="550 5.7.1 no route", address="x@y")
    tell("refused", session="s", stage="recipient", code=452, reply="452 4.5.3 too many", address="x@y")
    tell("refused", session="s", stage="command", code=500, reply="500 what", address=None)
    for outcome in ("delivered", "delivered", "deferred", "failed"):
        tell("attempted", id="i", delivery="i", sink="app", attempt=1)
        tell(outcome, **TRIED)
    tell("bounced", id="i", bounce_id="j", to="a@x")
    tell("dead", id="i", sink="app", recipients=1, reason="550 no")
    tell("recovered", messages=7)
    tell("shed", reason="too many connections")
    tell("sink_down", sink="app", reason="refused")
    tell("sink_down", sink="out", reason="refused")
    tell("sink_up", sink="out")
    tell("spool_down", reason="no room", fatal=False)
    tell("damaged", row=7, sink="app", reason="checksum")
    tell("committed", count=5, seconds=0.002)
    tell("committed", count=1, seconds=99.0)
    tell("reloaded")
    tell("bug", message="x", traceback="y")
    found = numbers(telemetry)
    assert {
        name: value
        for name, value in found.items()
        if value and not name.startswith(("gateway_commit_seconds", "gateway_delivery_seconds"))
    } == {
        f'gateway_build_info{{version="{__version__}"}}': 1,
        "gateway_connections_accepted_total": 1,
        "gateway_messages_accepted_total": 2,
        "gateway_recipients_accepted_total": 3,
        "gateway_octets_accepted_total": 2850,
        "gateway_messages_stored_total": 1,
        'gateway_recipients_refused_total{reason="5.7.1"}': 1,
        'gateway_recipients_refused_total{reason="4.5.3"}': 1,
        'gateway_refused_total{reason="5.7.1",stage="recipient"}': 1,
        'gateway_refused_total{reason="4.5.3",stage="recipient"}': 1,
        'gateway_refused_total{reason="500",stage="command"}': 1,
        'gateway_attempts_total{sink="app"}': 4,
        'gateway_deliveries_total{outcome="delivered",sink="app"}': 2,
        'gateway_deliveries_total{outcome="deferred",sink="app"}': 1,
        'gateway_deliveries_total{outcome="failed",sink="app"}': 1,
        'gateway_recipients_carried_total{outcome="delivered",sink="app"}': 4,
        'gateway_recipients_carried_total{outcome="deferred",sink="app"}': 2,
        'gateway_recipients_carried_total{outcome="failed",sink="app"}': 2,
        "gateway_bounces_total": 1,
        'gateway_dead_letters_total{sink="app"}': 1,
        "gateway_recovered_messages_total": 7,
        'gateway_shed_total{reason="too many connections"}': 1,
        'gateway_sink_failures_total{sink="app"}': 1,
        'gateway_sink_failures_total{sink="out"}': 1,
        'gateway_sink_up{sink="out"}': 1,
        "gateway_damaged_total": 1,
        "gateway_committed_messages_total": 6,
        "gateway_reloads_total": 1,
        "gateway_bugs_total": 1,
    }
    assert found['gateway_sink_up{sink="app"}'] == 0
    assert found["gateway_spool_up"] == 0
    tell("spool_up")
    assert numbers(telemetry)["gateway_spool_up"] == 1


def test_histograms(telemetry: Telemetry) -> None:
    for seconds in (0.0001, 0.001, 0.0011, 0.3, 99.0):
        telemetry.event("committed", count=1, seconds=seconds)
    telemetry.event("delivered", **TRIED | {"seconds": 0.0012})
    telemetry.event("failed", **TRIED | {"seconds": 0.0012})  # says nothing about how long carrying takes
    found = numbers(telemetry)
    assert [
        found[f'gateway_commit_seconds_bucket{{le="{bound}"}}'] for bound in ("0.0005", "0.001", "0.0025", "0.25", "0.5", "5.0", "+Inf")
    ] == [
        1,
        2,
        3,
        3,
        4,
        4,
        5,
    ]
    assert found["gateway_commit_seconds_count"] == 5
    assert found["gateway_commit_seconds_sum"] == pytest.approx(99.3022)
    assert found['gateway_delivery_seconds_bucket{le="0.0025",sink="app"}'] == 1
    assert found['gateway_delivery_seconds_bucket{le="0.001",sink="app"}'] == 0
    assert found['gateway_delivery_seconds_count{sink="app"}'] == 1


def test_gauges_are_read_when_asked(telemetry: Telemetry) -> None:
    open_now = [3]
    telemetry.gauge("gateway_connections", lambda: open_now[0])
    telemetry.gauge("gateway_queue_messages", lambda: {("app", "queued"): 4, ("app", "dead"): 1})
    telemetry.gauge("gateway_queue_oldest_seconds", lambda: {("app",): 12.5})
    telemetry.gauge("gateway_mine", lambda: {("x",): 7}, ("which",), "Something of mine")
    found = numbers(telemetry)
    assert found["gateway_connections"] == 3
    assert found['gateway_queue_messages{sink="app",state="queued"}'] == 4
    assert found['gateway_queue_messages{sink="app",state="dead"}'] == 1
    assert found['gateway_queue_oldest_seconds{sink="app"}'] == 12.5
    assert found['gateway_mine{which="x"}'] == 7
    open_now[0] = 4
    assert numbers(telemetry)["gateway_connections"] == 4


def test_a_gauge_that_fails_costs_itself_only(telemetry: Telemetry) -> None:
    def broken() -> float:
        raise OSError("gone")

    telemetry.gauge("gateway_connections", broken)
    telemetry.gauge("gateway_queue_oldest_seconds", lambda: {("app",): 1.0})
    found = numbers(telemetry)
    assert "gateway_connections" not in found
    assert found['gateway_queue_oldest_seconds{sink="app"}'] == 1.0
    assert numbers(telemetry)["gateway_bugs_total"] >= 1


def test_labels_are_bounded(telemetry: Telemetry) -> None:
    for number in range(MOST_LABELS + 50):
        reply = f"550 5.{number // 1000}.{number % 1000} no"
        telemetry.event("refused", session="s", stage="recipient", code=550, reply=reply, address=f"{number}@x")
        telemetry.event("delivered", **TRIED | {"sink": f"s{number}"})
    found = numbers(telemetry)
    refused = {name: value for name, value in found.items() if name.startswith("gateway_recipients_refused_total")}
    assert len(refused) == MOST_LABELS + 1
    assert refused['gateway_recipients_refused_total{reason="other"}'] == 50
    assert found['gateway_deliveries_total{outcome="other",sink="other"}'] == 50
    assert found['gateway_delivery_seconds_count{sink="other"}'] == 50
    assert not any("@" in name for name in found)


def test_workers_are_added_up() -> None:
    telemetries = [Telemetry("none"), Telemetry("none")]
    for number, telemetry in enumerate(telemetries, 1):
        for _ in range(number):
            telemetry.event("accepted", **ACCEPTED)
            telemetry.event("committed", count=1, seconds=0.002 * number)
            telemetry.event("delivered", **TRIED | {"sink": f"s{number}"})
        telemetry.event("sink_down", sink="app", reason="x")
        telemetry.gauge("gateway_connections", partial(float, number))
        telemetry.gauge("gateway_queue_oldest_seconds", partial(dict, {("app",): number * 10.0}))
    telemetries[0].event("sink_up", sink="app")
    # The states travel as JSON between processes.
    found = samples(expose([json.loads(json.dumps(telemetry.state())) for telemetry in telemetries]))
    assert found["gateway_messages_accepted_total"] == 3
    assert found["gateway_commit_seconds_count"] == 3
    assert found["gateway_commit_seconds_sum"] == pytest.approx(0.010)
    assert found['gateway_commit_seconds_bucket{le="0.0025"}'] == 1
    assert (
        found['gateway_deliveries_total{outcome="delivered",sink="s1"}'],
        found['gateway_deliveries_total{outcome="delivered",sink="s2"}'],
    ) == (1, 2)
    assert found["gateway_connections"] == 3
    assert found['gateway_queue_oldest_seconds{sink="app"}'] == 20
    assert found['gateway_sink_up{sink="app"}'] == 0
    assert samples(expose([]))[f'gateway_build_info{{version="{__version__}"}}'] == 1


def test_names_follow_the_rules_of_prometheus(telemetry: Telemetry) -> None:
    for name in (*COUNTERS, *HISTOGRAMS, *GAUGES):
        assert re.fullmatch(r"gateway_[a-z_]+[a-z]", name)
        assert not name.endswith(("_total", "_count", "_sum", "_bucket"))
    assert all(name.endswith("_seconds") for name in HISTOGRAMS)
    # Counters without labels are there from the start, at 0, so that rate() sees the first one.
    found = numbers(telemetry)
    assert all(found[f"{name}_total"] == 0 for name, (labels, _) in COUNTERS.items() if not labels)


def test_quiet() -> None:
    assert quiet("a\x1b[1m\n\u202eü") == "a\\u001b[1m\\u000a\\u202eü"


def test_logins_are_counted_by_mechanism() -> None:
    telemetry = Telemetry("none")
    telemetry.event("authenticated", session="s", listener="l", client=None, user="alice", mechanism="PLAIN")
    for code, reply in ((535, "535 5.7.8 no"), (421, "421 4.7.0 too many"), (454, "454 4.7.0 later")):
        telemetry.event(
            "refused",
            session="s",
            listener="l",
            client=None,
            stage="auth",
            code=code,
            reply=reply,
            address=None,
            user="x",
            mechanism="LOGIN",
            note="",
        )
    told = expose([telemetry.state()]).decode()
    for labels, count in (
        ('mechanism="PLAIN",outcome="accepted"', 1),
        ('mechanism="LOGIN",outcome="refused"', 2),
        ('mechanism="LOGIN",outcome="deferred"', 1),
    ):
        assert f"gateway_authentications_total{{{labels}}} {count}.0" in told
    assert 'gateway_refused_total{reason="5.7.8",stage="auth"} 1.0' in told
    telemetry.close()
