"""What the gateway tells: one line per business event, and the numbers behind ``/metrics``.

``Telemetry`` is the only place that counts and the only one that writes the event log
(DESIGN §6). It never blocks and never raises: lines wait for a thread of its own that writes
them; where nobody reads the pipe, at most ``BACKLOG`` lines wait, further ones are dropped and
counted, and a ``dropped`` line says so once there is room again.

Whatever comes out of mail is hostile: every value is escaped, long ones are cut, so that one
event is one line and no terminal is steered by it. Labels of metrics never hold an address
and never take more than ``MOST_LABELS`` values.

Counters are plain ints in dicts; ``exposition.py`` shows them.
"""

from __future__ import annotations

import json
import os
import re
import select
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import orjson
from mypy_extensions import mypyc_attr

#: Lines that wait while nobody reads.
BACKLOG: Final = 8192
#: Octets of a line from which on its values are cut.
LONG_LINE: Final = 1024
#: Characters that are kept of a value in a long line; ``bug`` keeps its traceback.
LONG_VALUE = 200
LONG_TRACE = 8000
#: Items that are kept of a list in a long line.
MOST_ITEMS = 10
#: Values that one metric takes for its labels; what comes later is counted as ``other``.
MOST_LABELS: Final = 200
#: Octets of lines that are written at once.
WRITE_MOST = 64 * 1024
#: Seconds the writing thread gathers lines, so that a busy gateway wakes it seldom.
GATHER = 0.02

#: Escaped besides what JSON escapes: DEL and C1 controls, line and paragraph separators, marks
#: that turn the direction of text.
_TREACHEROUS = re.compile("[\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]")
_PLAIN_WORD = re.compile(r"[A-Za-z0-9.:/@<>\[\]+_-]+")
_ENHANCED = re.compile(r"\d{3}[ -]([245]\.\d{1,3}\.\d{1,3})(?: |$)")

_dumps: Final = orjson.dumps
#: Dataclasses are told as text, like all else that JSON has no words for (``sayable.py`` says why).
_AS_LINE: Final[Any] = orjson.OPT_APPEND_NEWLINE | orjson.OPT_PASSTHROUGH_DATACLASS

Labels = tuple[str, ...]
#: A moment: in milliseconds; as RFC 3339 in UTC; the beginning of every line, and of those of an event.
Instant = tuple[int, str, bytes, dict[str, bytes]]
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
#: Counted but not told: one a commit group would drown the rest.
_SILENT: Final = "committed"


class _Tally:
    """What came to one sink since somebody last asked for numbers."""

    def __init__(self) -> None:
        self.attempts = 0
        self.delivered = 0
        self.recipients = 0
        #: Of its histogram, from the first success on.
        self.cells: list[float] | None = None


@mypyc_attr(allow_interpreted_subclasses=True)
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
        self._log = log
        # What a pipe takes whole, or lines of several workers would run into one another (pipe(7)).
        self._writer = _Writer(fd, self._lost, WRITE_MOST if worker is None else select.PIPE_BUF)
        self._clock = clock
        #: The second that was last written, and how.
        self._second = (-1, "")
        #: The millisecond that was last written, and how; how lines begin in it, by event: one value, because two threads ask.
        self._instant: Instant = (-1, "", b"", {})
        self._names: dict[str, bytes] = {}
        self._stem: dict[str, Any] = {} if worker is None else {"worker": worker}
        self._counts: dict[str, dict[Labels, int]] = {name: {} if labels else {(): 0} for name, (labels, _) in COUNTERS.items()}
        self._spread: dict[str, dict[Labels, list[float]]] = {
            name: {} if labels else {(): [0.0] * (len(bounds) + 2)} for name, (labels, _, bounds) in HISTOGRAMS.items()
        }
        # What every message adds to, until somebody asks (``_fold``).
        self._connections = 0
        self._messages = 0
        self._recipients = 0
        self._octets = 0
        self._stored = 0
        self._tallies: dict[str, _Tally] = {}
        self._delivery_bounds: list[float] = list(HISTOGRAMS["gateway_delivery_seconds"][2])
        self._commit_bounds: list[float] = list(HISTOGRAMS["gateway_commit_seconds"][2])
        self._up: dict[Labels, float] = {}
        self._spool_up = 1.0
        self._gauges: dict[str, Reading] = {"gateway_sink_up": lambda: self._up, "gateway_spool_up": lambda: self._spool_up}
        self._extra: dict[str, tuple[Labels, str]] = {}
        #: How those are counted that are not told by every message (``_count``).
        self._seldom: dict[str, Callable[[dict[str, Any]], None]] = {
            "refused": self._refused,
            "authenticated": lambda fields: self._bump("gateway_authentications", (fields["mechanism"], "accepted")),
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

    def event(self, event: str, /, **fields: Any) -> None:
        """``tell``, with a keyword for each field. (None is called ``event``: compiled, a
        parameter's name is taken even before the slash.)"""
        self.tell(event, fields)

    def tell(self, event: str, fields: dict[str, Any]) -> None:
        """Count it and write its line. Never blocks, never raises: what cannot be counted or
        written as it is still becomes a line as far as it goes. ``fields`` is ours from now on."""
        try:
            self._count(event, fields)
        except Exception as error:
            fields["uncounted"] = repr(error)
        if self._log == "none" or event == _SILENT:
            return
        try:
            line = self._line(event, fields)
        except Exception as error:
            line = self._now()[2] + b'"bug","message":%s}\n' % orjson.dumps(f"cannot tell {event!a}: {type(error).__name__}")
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

    def _now(self) -> Instant:
        """Now."""
        instant, millisecond = self._instant, int(self._clock() * 1000.0)
        if instant[0] != millisecond:
            second, rest = divmod(millisecond, 1000)
            known = self._second
            if known[0] != second:
                known = self._second = (second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)))
            written = f"{known[1]}.{rest:03d}Z"
            instant = self._instant = (millisecond, written, f'{{"time":"{written}","event":'.encode(), {})
        return instant

    def _line(self, name: str, fields: dict[str, Any]) -> bytes:
        return self._json(name, fields) if self._log == "json" else self._text(name, fields)

    def _lost(self, lines: int) -> bytes:
        return self._line("dropped", {"lines": lines})

    def _json(self, name: str, fields: dict[str, Any]) -> bytes:
        """What is treacherous in it is escaped by ``_Writer``."""
        if not fields:
            return self._head(name)[:-1] + b"}\n"
        try:
            body: bytes = _dumps(fields, None, _AS_LINE)
            if len(body) > LONG_LINE:
                raise ValueError
        except (TypeError, ValueError):
            body = _dumps(_tame(fields, name), None, _AS_LINE)
        return self._head(name) + body[1:]

    def _head(self, name: str) -> bytes:
        """All of a line that comes before its fields, now."""
        instant = self._now()
        head = instant[3].get(name)
        if head is None:
            known = self._names.get(name)
            if known is None:
                stem = orjson.dumps(self._stem)[1:-1]
                known = self._names[name] = orjson.dumps(name) + (b"," + stem if stem else b"") + b","
            head = instant[3][name] = instant[2] + known
        return head

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

    def _count(self, event: str, fields: dict[str, Any]) -> None:
        if event == "delivered":
            tally = self._tally(fields["sink"])
            recipients: int = fields["recipients"]
            tally.recipients += recipients
            tally.delivered += 1
            seconds: Any = fields.get("seconds")
            if seconds is not None:
                fields["seconds"] = taken = _short(seconds)
                if tally.cells is None:
                    tally.cells = self._cells("gateway_delivery_seconds", (fields["sink"],))
                _observe(tally.cells, self._delivery_bounds, taken)
        elif event == "attempted":
            self._tally(fields["sink"]).attempts += 1
        elif event == "accepted":
            taken_by: int = fields["recipients"]
            size: int = fields["size"]
            stored: bool = fields["stored"]
            self._messages += 1
            self._recipients += taken_by
            self._octets += size
            if stored:
                self._stored += 1
        elif event == "connected":
            self._connections += 1
        else:
            count = self._seldom.get(event)
            if count is not None:
                count(fields)

    def _tally(self, sink: str) -> _Tally:
        tally = self._tallies.get(sink)
        if tally is None:
            if len(self._tallies) >= MOST_LABELS:
                self._fold()
                self._tallies.clear()
            tally = self._tallies[sink] = _Tally()
        return tally

    def _fold(self) -> None:
        """What was counted apart goes where the rest is."""
        self._bump("gateway_connections_accepted", (), self._connections)
        self._bump("gateway_messages_accepted", (), self._messages)
        self._bump("gateway_recipients_accepted", (), self._recipients)
        self._bump("gateway_octets_accepted", (), self._octets)
        self._bump("gateway_messages_stored", (), self._stored)
        self._connections = self._messages = self._recipients = self._octets = self._stored = 0
        for sink, tally in self._tallies.items():
            if tally.attempts:
                self._bump("gateway_attempts", (sink,), tally.attempts)
            if tally.delivered:
                self._bump("gateway_deliveries", (sink, "delivered"), tally.delivered)
                self._bump("gateway_recipients_carried", (sink, "delivered"), tally.recipients)
            tally.attempts = tally.delivered = tally.recipients = 0

    def _bump(self, name: str, labels: Labels = (), by: int = 1) -> None:
        counts = self._counts[name]
        if labels in counts:
            counts[labels] += by
            return
        labels = _bounded(labels, counts)
        counts[labels] = counts.get(labels, 0) + by

    def _cells(self, name: str, labels: Labels) -> list[float]:
        """Of one histogram: how many were within each bound, how many beyond, and their sum."""
        spread = self._spread[name]
        cells = spread.get(labels)
        if cells is None:
            cells = spread.setdefault(_bounded(labels, spread), [0.0] * (len(HISTOGRAMS[name][2]) + 2))
        return cells

    def _refused(self, fields: dict[str, Any]) -> None:
        match = _ENHANCED.match(str(fields.get("reply", "")))
        reason = match[1] if match else str(fields["code"])
        stage = str(fields["stage"])
        self._bump("gateway_refused", (stage, reason))
        if stage == "recipient":
            self._bump("gateway_recipients_refused", (reason,))
        if "mechanism" in fields:
            self._bump("gateway_authentications", (fields["mechanism"], "deferred" if fields["code"] == 454 else "refused"))

    def _settled(self, outcome: str, fields: dict[str, Any]) -> None:
        labels = (fields["sink"], outcome)
        self._bump("gateway_deliveries", labels)
        self._bump("gateway_recipients_carried", labels, fields["recipients"])
        if "seconds" in fields:
            fields["seconds"] = _short(fields["seconds"])

    def _sink_down(self, fields: dict[str, Any]) -> None:
        self._up[(fields["sink"],)] = 0.0
        self._bump("gateway_sink_failures", (fields["sink"],))

    def _spool_is(self, up: float) -> None:
        self._spool_up = up

    def _committed(self, fields: dict[str, Any]) -> None:
        self._counts["gateway_committed_messages"][()] += fields["count"]
        _observe(self._cells("gateway_commit_seconds", ()), self._commit_bounds, fields["seconds"])

    # ------------------------------------------------------------------ showing

    def gauge(self, name: str, read: Reading, labels: Labels = (), description: str = "") -> None:
        """Show what ``read`` returns when asked: a number, or one by labels. Names of ``GAUGES``
        have their labels there; others bring theirs."""
        if name not in GAUGES:
            self._extra[name] = (labels, description)
        self._gauges[name] = read

    def state(self) -> dict[str, Any]:
        """Every number, as JSON can say it: to be shown elsewhere (``expose``)."""
        self._fold()
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


def _short(seconds: float) -> float:
    """To the microsecond."""
    return int(seconds * 1e6) / 1e6


def _observe(cells: list[float], bounds: list[float], seconds: float) -> None:
    place = 0
    # Most are within one of the first bounds.
    while place < len(bounds) and seconds > bounds[place]:
        place += 1
    cells[place] += 1
    cells[-1] += seconds


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
        self._lines: list[bytes] = []
        self._wake = threading.Event()
        #: The thread was woken and has not looked yet: to ask an Event costs more than a line.
        self._woken = False
        self._busy = False
        self._ending = threading.Event()
        self._ended = False
        self._scribe: threading.Thread | None = None
        self._told = 0
        self.dropped = 0

    def put(self, line: bytes) -> None:
        if self._ended or len(self._lines) >= BACKLOG:
            self.dropped += 1
            return
        self._lines.append(line)
        if not self._woken:
            self._woken = True
            self._wake.set()
            if self._scribe is None:
                # A daemon: a pipe that nobody reads must not keep the process from ending.
                self._scribe = threading.Thread(target=self._run, name="event-log", daemon=True)
                self._scribe.start()

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
        if self._scribe is not None:
            self._scribe.join(timeout)
            self.dropped += len(self._lines)

    def _run(self) -> None:
        while not self._ended or self._lines:
            self._wake.wait()
            self._ending.wait(GATHER)
            # Cleared before lines are taken, and in this order: what comes in between is taken now or wakes us again.
            self._wake.clear()
            self._woken = False
            self._busy = True
            while self._lines:
                if lost := self.dropped - self._told:
                    self._told += lost
                    self._write(self._lost(lost))
                self._write(self._next())
            self._busy = False

    def _next(self) -> bytes:
        """The next lines, as many as are written at once, with nothing treacherous in them."""
        # Only this thread takes lines: those that are there stay there.
        lines = self._lines
        count = self._fitting()
        octets = b"".join(lines[:count])
        if not octets.isascii() or 0x7F in octets:
            lines[:count] = [_TREACHEROUS.sub(_escape, line.decode()).encode() for line in lines[:count]]
            count = self._fitting()
            octets = b"".join(lines[:count])
        del lines[:count]
        return octets

    def _fitting(self) -> int:
        """How many of the lines are written at once: one at the least."""
        count = size = 0
        for line in self._lines:
            size += len(line)
            if count and size > self._most:
                break
            count += 1
        return count

    def _write(self, octets: bytes) -> None:
        view = memoryview(octets)
        while view:
            try:
                written = os.write(self._fd, view)
                view = view[written:]  # not in one expression: mypyc 2.4 calls twice what stands in such a slice
            except BlockingIOError:
                # Somebody who shares the descriptor made it non-blocking.
                select.select([], [self._fd], [], 1.0)
            except OSError:
                # Nobody will ever read this (EPIPE, EBADF, EIO, no space).
                lost = bytes(view).count(b"\n")
                self.dropped += lost
                self._told += lost
                return
