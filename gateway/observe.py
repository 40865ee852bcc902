"""What the gateway tells: one line per business event, and the numbers behind ``/metrics``.

``Telemetry`` is the only place that counts and the only one that writes the event log
(DESIGN §6). It never blocks and never raises: lines wait for a thread of its own that writes
them; where nobody reads the pipe, at most ``BACKLOG`` lines wait, further ones are dropped and
counted, and a ``dropped`` line says so once there is room again.

Whatever comes out of mail is hostile: every value is escaped, long ones are cut, so that one
event is one line and no terminal is steered by it. Labels of metrics never hold an address
and never take more than ``MOST_LABELS`` values.

Counters are plain ints in dicts. prometheus-client is imported when somebody asks.
"""

from __future__ import annotations

import json
import os
import re
import select
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import orjson

from . import __version__

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

#: Lines that wait while nobody reads.
BACKLOG = 8192
#: Octets of a line from which on its values are cut.
LONG_LINE = 1024
#: Characters that are kept of a value in a long line; ``bug`` keeps its traceback.
LONG_VALUE = 200
LONG_TRACE = 8000
#: Items that are kept of a list in a long line.
MOST_ITEMS = 10
#: Values that one metric takes for its labels; what comes later is counted as ``other``.
MOST_LABELS = 200
#: Octets of lines that are written at once.
WRITE_MOST = 64 * 1024
#: Seconds the writing thread gathers lines, so that a busy gateway wakes it seldom.
GATHER = 0.02

#: Escaped besides what JSON escapes: DEL and C1 controls, line and paragraph separators, marks
#: that turn the direction of text.
_TREACHEROUS = re.compile("[\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]")
_PLAIN_WORD = re.compile(r"[A-Za-z0-9.:/@<>\[\]+_-]+")
_ENHANCED = re.compile(r"\d{3}[ -]([245]\.\d{1,3}\.\d{1,3})(?: |$)")

_dumps = orjson.dumps
_NEWLINE = orjson.OPT_APPEND_NEWLINE

Labels = tuple[str, ...]
Reading = Callable[[], "float | Mapping[Labels, float]"]

#: Counters: name without ``_total`` → (labels, what it counts).
COUNTERS: dict[str, tuple[Labels, str]] = {
    "gateway_connections_accepted": ((), "Connections that were taken"),
    "gateway_messages_accepted": ((), "Messages that were answered with 250 after the end of data"),
    "gateway_recipients_accepted": ((), "Recipients of accepted messages"),
    "gateway_octets_accepted": ((), "Octets of content of accepted messages"),
    "gateway_messages_stored": ((), "Accepted messages that were in the spool before their 250"),
    "gateway_recipients_refused": (("reason",), "Recipients that were refused, by enhanced code"),
    "gateway_refused": (("stage", "reason"), "Refusing replies, by stage and enhanced code"),
    "gateway_authentications": (("mechanism", "outcome"), "Logins that were judged: accepted, refused or (for now) deferred"),
    "gateway_attempts": (("sink",), "Deliveries that were started"),
    "gateway_deliveries": (("sink", "outcome"), "Results of deliveries"),
    "gateway_recipients_carried": (("sink", "outcome"), "Results of deliveries, counted by recipient"),
    "gateway_bounces": ((), "Delivery status notifications that were made"),
    "gateway_dead_letters": (("sink",), "Messages that failed for good and were kept"),
    "gateway_recovered_messages": ((), "Messages found in the spool at start"),
    "gateway_shed": (("reason",), "Work that was refused for want of means"),
    "gateway_sink_failures": (("sink",), "Times a sink went down"),
    "gateway_damaged": ((), "Rows of the spool that were found damaged and set aside"),
    "gateway_committed_messages": ((), "Messages that commit groups stored"),
    "gateway_tls_failures": (("listener",), "Connections on which TLS failed, most of them in the handshake"),
    "gateway_reloads": ((), "Times the configuration was replaced"),
    "gateway_bugs": ((), "Unexpected exceptions"),
    "gateway_log_lines_dropped": ((), "Event lines that nobody read in time"),
}
#: Histograms: name → (labels, what it measures, upper bounds in seconds).
HISTOGRAMS: dict[str, tuple[Labels, str, tuple[float, ...]]] = {
    "gateway_commit_seconds": (
        (),
        "Time a commit group took",
        (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
    ),
    "gateway_delivery_seconds": (
        ("sink",),
        "Time of deliveries that were taken",
        (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
    ),
}
#: Gauges: name → (labels, what it shows). Those of other parts are read through ``gauge``.
GAUGES: dict[str, tuple[Labels, str]] = {
    "gateway_connections": ((), "Connections that are open"),
    "gateway_queue_messages": (("sink", "state"), "Messages in the spool"),
    "gateway_queue_oldest_seconds": (("sink",), "Age of the oldest message in the spool"),
    "gateway_spool_up": ((), "1 while the spool can keep mail, 0 while new mail is refused for its sake"),
    "gateway_sink_up": (("sink",), "1 while the sink takes mail, 0 while it is down"),
}
#: Over several workers these are no sum but the largest, and the smallest.
_LARGEST = {"gateway_queue_oldest_seconds"}
_SMALLEST = {"gateway_sink_up", "gateway_spool_up"}
#: Counted but not told: one a commit group would drown the rest.
_SILENT = {"committed"}


class Telemetry:
    """The Observer of a process. ``log``: what becomes of lines; ``fd``: where they go
    (standard error). ``worker``: its number, added to each line, where there are several."""

    def __init__(
        self,
        log: Literal["json", "text", "none"] = "json",
        *,
        fd: int = 2,
        worker: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        form = {"json": self._json, "text": self._text}.get(log)
        self._form = form
        # What a pipe takes whole, or lines of several workers would run into one another (pipe(7)).
        most = WRITE_MOST if worker is None else select.PIPE_BUF
        self._writer = _Writer(fd, lambda lost: b"" if form is None else form("dropped", {"lines": lost}), most)
        self._clock = clock
        #: The millisecond that was last written, and how: one value, because two threads ask.
        self._instant = (-1, "", b"")
        self._heads: dict[str, bytes] = {}
        self._stem: dict[str, Any] = {} if worker is None else {"worker": worker}
        self._counts: dict[str, dict[Labels, int]] = {name: {} if labels else {(): 0} for name, (labels, _) in COUNTERS.items()}
        self._spread: dict[str, dict[Labels, list[float]]] = {
            name: {} if labels else {(): [0.0] * (len(bounds) + 2)} for name, (labels, _, bounds) in HISTOGRAMS.items()
        }
        # Straight to what every message touches.
        self._deliveries = self._counts["gateway_deliveries"]
        self._carried = self._counts["gateway_recipients_carried"]
        self._attempts = self._counts["gateway_attempts"]
        self._up: dict[Labels, float] = {}
        self._spool_up = 1.0
        self._gauges: dict[str, Reading] = {"gateway_sink_up": lambda: self._up, "gateway_spool_up": lambda: self._spool_up}
        self._extra: dict[str, tuple[Labels, str]] = {}
        self._tell: dict[str, Callable[[dict[str, Any]], None]] = {
            "connected": self._connected,
            "refused": self._refused,
            "authenticated": lambda fields: self._bump("gateway_authentications", (fields["mechanism"], "accepted")),
            "accepted": self._accepted,
            "attempted": self._attempted,
            "delivered": self._delivered,
            "deferred": lambda fields: self._settled("deferred", fields),
            "failed": lambda fields: self._settled("failed", fields),
            "bounced": lambda fields: self._bump("gateway_bounces"),
            "dead": lambda fields: self._bump("gateway_dead_letters", (fields["sink"],)),
            "recovered": lambda fields: self._bump("gateway_recovered_messages", (), fields["messages"]),
            "shed": lambda fields: self._bump("gateway_shed", (_cut(str(fields["reason"]), 60),)),
            "sink_down": self._sink_down,
            "sink_up": lambda fields: self._up.__setitem__((fields["sink"],), 1.0),
            "spool_down": lambda fields: self._spool_is(0.0),
            "spool_up": lambda fields: self._spool_is(1.0),
            "damaged": lambda fields: self._bump("gateway_damaged"),
            "committed": self._committed,
            "tls_failed": lambda fields: self._bump("gateway_tls_failures", (fields["listener"],)),
            "reloaded": lambda fields: self._bump("gateway_reloads"),
            "bug": lambda fields: self._bump("gateway_bugs"),
        }

    # ------------------------------------------------------------------ telling

    def event(self, name: str, /, **fields: Any) -> None:
        """Count it and write its line. Never blocks, never raises: what cannot be counted or
        written as it is still becomes a line as far as it goes."""
        try:
            count = self._tell.get(name)
            if count is not None:
                count(fields)
        except Exception as error:
            fields["uncounted"] = repr(error)
        if self._form is None or name in _SILENT:
            return
        try:
            line = self._form(name, fields)
        except Exception as error:
            line = self._now()[2] + b'"bug","message":%s}\n' % orjson.dumps(f"cannot tell {name!a}: {type(error).__name__}")
        self._writer.put(line)

    def flush(self, timeout: float = 1.0) -> bool:
        """Wait (at most so many seconds) until everything said so far is out. False: it is not."""
        return self._writer.flush(timeout)

    def close(self, timeout: float = 1.0) -> None:
        """``flush``, and end the writing thread. What is said later is dropped and counted."""
        self._writer.close(timeout)

    @property
    def dropped(self) -> int:
        """Lines that nobody read in time."""
        return self._writer.dropped

    def _now(self) -> tuple[int, str, bytes]:
        """Now, in milliseconds; as RFC 3339 in UTC; and the beginning of a line."""
        instant, millisecond = self._instant, int(self._clock() * 1000)
        if instant[0] != millisecond:
            second, rest = divmod(millisecond, 1000)
            written = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(second))}.{rest:03d}Z"
            instant = self._instant = (millisecond, written, f'{{"time":"{written}","event":'.encode())
        return instant

    def _json(self, name: str, fields: dict[str, Any]) -> bytes:
        head = self._heads.get(name)
        if head is None:
            stem = orjson.dumps(self._stem)[1:-1]
            head = self._heads[name] = orjson.dumps(name) + (b"," + stem if stem else b"") + b","
        try:
            body = _dumps(fields, None, _NEWLINE)
            if len(body) > LONG_LINE:
                raise ValueError
        except (TypeError, ValueError):
            body = _dumps(_tame(fields, name), None, _NEWLINE)
        line = self._now()[2] + head + body[1:] if fields else self._now()[2] + head[:-1] + b"}\n"
        if line.isascii() and b"\x7f" not in line:
            return line
        return _TREACHEROUS.sub(_escape, line.decode()).encode()

    def _text(self, name: str, fields: dict[str, Any]) -> bytes:
        words = [self._now()[1][11:23], f"{name:<9}"]
        trace = ""
        for key, value in _tame({**self._stem, **fields}, name).items():
            if value is None or value == "":
                continue
            if key == "traceback" and isinstance(value, str):
                trace = "".join(f"\n    {quiet(line)}" for line in value.splitlines())
                continue
            text = value if isinstance(value, str) else orjson.dumps(value).decode()
            if isinstance(value, float):
                text = f"{value:.6g}"
            elif isinstance(value, str) and not _PLAIN_WORD.fullmatch(text):
                text = json.dumps(text, ensure_ascii=False)
            words.append(f"{key}={quiet(text)}")
        return f"{' '.join(words)}{trace}\n".encode("utf-8", "backslashreplace")

    # ----------------------------------------------------------------- counting

    def _bump(self, name: str, labels: Labels = (), by: int = 1) -> None:
        counts = self._counts[name]
        if labels in counts:
            counts[labels] += by
            return
        labels = _bounded(labels, counts)
        counts[labels] = counts.get(labels, 0) + by

    def _observe(self, name: str, labels: Labels, seconds: float) -> None:
        spread, bounds = self._spread[name], HISTOGRAMS[name][2]
        cells = spread.get(labels)
        if cells is None:
            cells = spread.setdefault(_bounded(labels, spread), [0.0] * (len(bounds) + 2))
        cells[bisect_left(bounds, seconds)] += 1
        cells[-1] += seconds

    def _connected(self, fields: dict[str, Any]) -> None:
        self._counts["gateway_connections_accepted"][()] += 1

    def _refused(self, fields: dict[str, Any]) -> None:
        match = _ENHANCED.match(str(fields.get("reply", "")))
        reason = match[1] if match else str(fields["code"])
        stage = str(fields["stage"])
        self._bump("gateway_refused", (stage, reason))
        if stage == "recipient":
            self._bump("gateway_recipients_refused", (reason,))
        if "mechanism" in fields:
            self._bump("gateway_authentications", (fields["mechanism"], "deferred" if fields["code"] == 454 else "refused"))

    def _accepted(self, fields: dict[str, Any]) -> None:
        counts = self._counts
        counts["gateway_messages_accepted"][()] += 1
        counts["gateway_recipients_accepted"][()] += fields["recipients"]
        counts["gateway_octets_accepted"][()] += fields["size"]
        if fields["stored"]:
            counts["gateway_messages_stored"][()] += 1

    def _attempted(self, fields: dict[str, Any]) -> None:
        labels = (fields["sink"],)
        try:
            self._attempts[labels] += 1
        except KeyError:
            self._bump("gateway_attempts", labels)

    def _settled(self, outcome: str, fields: dict[str, Any]) -> None:
        labels = (fields["sink"], outcome)
        try:
            self._deliveries[labels] += 1
            self._carried[labels] += fields["recipients"]
        except KeyError:
            self._bump("gateway_deliveries", labels)
            self._bump("gateway_recipients_carried", labels, fields["recipients"])
        if "seconds" in fields:
            fields["seconds"] = int(fields["seconds"] * 1e6) / 1e6

    def _delivered(self, fields: dict[str, Any]) -> None:
        self._settled("delivered", fields)
        if (seconds := fields.get("seconds")) is not None:
            self._observe("gateway_delivery_seconds", (fields["sink"],), seconds)

    def _sink_down(self, fields: dict[str, Any]) -> None:
        self._up[(fields["sink"],)] = 0.0
        self._bump("gateway_sink_failures", (fields["sink"],))

    def _spool_is(self, up: float) -> None:
        self._spool_up = up

    def _committed(self, fields: dict[str, Any]) -> None:
        self._counts["gateway_committed_messages"][()] += fields["count"]
        self._observe("gateway_commit_seconds", (), fields["seconds"])

    # ------------------------------------------------------------------ showing

    def gauge(self, name: str, read: Reading, labels: Labels = (), description: str = "") -> None:
        """Show what ``read`` returns when asked: a number, or one by labels. Names of ``GAUGES``
        have their labels there; others bring theirs."""
        if name not in GAUGES:
            self._extra[name] = (labels, description)
        self._gauges[name] = read

    def state(self) -> dict[str, Any]:
        """Every number, as JSON can say it: to be shown elsewhere (``expose``)."""
        counts = {name: list(values.items()) for name, values in self._counts.items()}
        counts["gateway_log_lines_dropped"] = [((), self._writer.dropped)]
        gauges = {}
        for name, read in self._gauges.items():
            try:
                value = read()
            except Exception:
                self._bump("gateway_bugs")
                continue
            described = GAUGES.get(name) or self._extra[name]
            values = list(value.items()) if isinstance(value, Mapping) else [((), value)]
            gauges[name] = {"labels": described[0], "description": described[1], "values": values}
        return {"counts": counts, "spread": {name: list(values.items()) for name, values in self._spread.items()}, "gauges": gauges}

    def exposition(self) -> bytes:
        """The text form of Prometheus (``text/plain; version=0.0.4``)."""
        return expose([self.state()])


def expose(states: Sequence[Mapping[str, Any]]) -> bytes:
    """The text form of Prometheus for one or several processes, added up."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_collector(states))
    return generate_latest(registry)


def _collector(states: Sequence[Mapping[str, Any]]) -> Collector:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector as Base

    class Numbers(Base):
        def collect(self) -> Iterable[Metric]:
            build = GaugeMetricFamily("gateway_build_info", "1, with the version of this gateway", labels=["version"])
            build.add_metric([__version__], 1)
            yield build
            for name, (labels, description) in COUNTERS.items():
                counter = CounterMetricFamily(name, description, labels=list(labels))
                for values, number in _added(states, "counts", name, sum).items():
                    counter.add_metric(list(values), number)
                yield counter
            for name, (labels, description, bounds) in HISTOGRAMS.items():
                histogram = HistogramMetricFamily(name, description, labels=list(labels))
                for values, cells in _added(states, "spread", name, _cells).items():
                    buckets, below = [], 0.0
                    for bound, inside in zip([*bounds, float("inf")], cells[:-1], strict=True):
                        below += inside
                        buckets.append(("+Inf" if bound == float("inf") else str(bound), below))
                    histogram.add_metric(list(values), buckets, cells[-1])
                yield histogram
            shown = {name: known for state in states for name, known in state["gauges"].items()}
            for name, known in shown.items():
                gauge = GaugeMetricFamily(name, known["description"], labels=list(known["labels"]))
                combine = max if name in _LARGEST else min if name in _SMALLEST else sum
                readings = [{name: state["gauges"][name]["values"]} for state in states if name in state["gauges"]]
                for values, number in _added([{"all": reading} for reading in readings], "all", name, combine).items():
                    gauge.add_metric(list(values), number)
                yield gauge

    return Numbers()


def _added(states: Sequence[Mapping[str, Any]], kind: str, name: str, combine: Callable[[list[Any]], Any]) -> dict[Labels, Any]:
    """The values of one metric in every process, made one by label."""
    found: dict[Labels, list[Any]] = {}
    for state in states:
        for labels, value in state[kind].get(name, ()):
            found.setdefault(tuple(labels), []).append(value)
    return {labels: combine(values) for labels, values in found.items()}


def _cells(histograms: list[list[float]]) -> list[float]:
    return [sum(cell) for cell in zip(*histograms, strict=True)]


def _bounded(labels: Labels, known: Mapping[Labels, Any]) -> Labels:
    """These labels, or ``other`` where there are too many of them already."""
    return labels if labels in known or len(known) < MOST_LABELS else ("other",) * len(labels)


# --------------------------------------------------------------------- hostile values


def _escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


def quiet(text: str) -> str:
    """Fit for a terminal: controls, line ends and marks of direction become escapes."""
    return re.sub(r"[\x00-\x1f]", _escape, _TREACHEROUS.sub(_escape, text))


def _cut(text: str, limit: int) -> str:
    # What is no Unicode (lone surrogates of badly decoded octets) is shown as escapes.
    text = text[:limit] + f"… ({len(text)} characters)" if len(text) > limit else text
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _tame(fields: Mapping[Any, Any], name: str) -> dict[str, Any]:
    """The same, in a form that JSON can say and that is of bounded length."""
    return {
        _cut(str(key), 40): _tamed(value, LONG_TRACE if name == "bug" and key == "traceback" else LONG_VALUE, 2)
        for key, value in fields.items()
    }


def _tamed(value: Any, limit: int, depth: int) -> Any:
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**53 else _cut(str(value), limit)
    if isinstance(value, str):
        return _cut(value, limit)
    # The innermost level gets less, so that a tree of values stays as small as a list.
    inside = limit if depth > 1 else limit // 4
    if depth and isinstance(value, Mapping):
        return {_cut(str(key), 40): _tamed(inner, inside, depth - 1) for key, inner in list(value.items())[:MOST_ITEMS]}
    if depth and isinstance(value, (list, tuple, set, frozenset)):
        more = [f"… ({len(value) - MOST_ITEMS} more)"] if len(value) > MOST_ITEMS else []
        return [_tamed(inner, inside, depth - 1) for inner in list(value)[:MOST_ITEMS]] + more
    return _cut(str(value), limit)


# ------------------------------------------------------------------------- the pipe


class _Writer:
    """Lines on their way to a descriptor that may block: the thread waits, nobody else does.

    The descriptor is left as it is: others share it (a terminal above all), so it is never
    made non-blocking."""

    def __init__(self, fd: int, lost: Callable[[int], bytes], most: int) -> None:
        """``lost`` makes the line that says how many were dropped. ``most``: octets that are
        written at once, if there is more than one line."""
        self._fd = fd
        self._most = most
        self._lost = lost
        self._lines: deque[bytes] = deque()
        self._wake = threading.Event()
        self._busy = False
        self._ending = threading.Event()
        self._ended = False
        self._thread: threading.Thread | None = None
        self._told = 0
        self.dropped = 0

    def put(self, line: bytes) -> None:
        if self._ended or len(self._lines) >= BACKLOG:
            self.dropped += 1
            return
        self._lines.append(line)
        if not self._wake.is_set():
            self._wake.set()
            if self._thread is None:
                # A daemon: a pipe that nobody reads must not keep the process from ending.
                self._thread = threading.Thread(target=self._run, name="event-log", daemon=True)
                self._thread.start()

    def flush(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        # In this order: lines are taken while busy, so none can hide between the two.
        while self._lines or self._busy:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.001)
        return True

    def close(self, timeout: float) -> None:
        if self._ended:
            return
        self._ended = True
        self._ending.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)
            self.dropped += len(self._lines)

    def _run(self) -> None:
        while not self._ended or self._lines:
            self._wake.wait()
            self._ending.wait(GATHER)
            # Cleared before lines are taken: what comes in between wakes us again.
            self._wake.clear()
            self._busy = True
            while self._lines:
                if lost := self.dropped - self._told:
                    self._told += lost
                    self._write(self._lost(lost))
                self._write(self._next())
            self._busy = False

    def _next(self) -> bytes:
        """The next lines, as many as are written at once."""
        taken = [self._lines.popleft()]
        size = len(taken[0])
        # Only this thread takes lines: the first that is there stays there.
        while self._lines and (size := size + len(self._lines[0])) <= self._most:
            taken.append(self._lines.popleft())
        return b"".join(taken)

    def _write(self, octets: bytes) -> None:
        view = memoryview(octets)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                # Somebody who shares the descriptor made it non-blocking.
                select.select([], [self._fd], [], 1.0)
            except OSError:
                # Nobody will ever read this (EPIPE, EBADF, EIO, no space).
                lost = bytes(view).count(b"\n")
                self.dropped += lost
                self._told += lost
                return
