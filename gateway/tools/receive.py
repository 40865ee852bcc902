"""Counting receivers for load tests: what ``gateway receive`` does, and what benches put behind a gateway.

An SMTP, LMTP or HTTP server that takes everything, keeps nothing and counts; where it is told so it
waits before it answers, or fails a share of what comes. An ``Order`` says how; ``run`` serves until
a bound is reached or the process is told to end, and returns a ``Tally``.

It judges nothing: every address, size and body is good. HTTP bodies need a Content-Length
(411 for others). The octets go through ``_sink.pyx``.
"""

from __future__ import annotations

import errno
import re
import resource
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.client import responses
from typing import Any, Literal

from ..net import sockets
from ._sink import Sink

#: Seconds between two looks at the clock and at whether to end.
SLICE = 0.1
#: What one connection takes in memory when all of it is touched is about 12 KiB.
CONNECTIONS = 10_000
#: Where a share can fail, by protocol.
STAGES = {
    "smtp": ("connect", "hello", "mail", "rcpt", "data", "content", "drop"),
    "lmtp": ("connect", "hello", "mail", "rcpt", "data", "content", "drop"),
    "http": ("connect", "content", "drop"),
}
#: The way out where a place cannot be listened at, TCP and unix alike.
WAYS_OUT = {
    errno.EADDRINUSE: "end who has it, or name another place (port 0: any that is free)",
    errno.EADDRNOTAVAIL: "name an address of this machine, as 127.0.0.1:2526",
    errno.EEXIST: "name another path",
}
_FAILURE = re.compile(r"([a-z]+):(\d+(?:\.\d+)?)(?:%?/([1-5]\d\d))?%?", re.ASCII)

Protocol = Literal["smtp", "lmtp", "http"]


class OrderError(ValueError):
    """The order cannot be carried out as it stands; the text says why."""


@dataclass(frozen=True, slots=True)
class Failure:
    """``share`` (0 to 1) of all fails at ``stage``: connect, hello, mail, rcpt, data, content (after it) or
    drop (after it, without an answer); HTTP knows connect, content and drop. ``code``: 0 where nothing is said.
    ``typed``: the text it was read from, for errors."""

    stage: str
    share: float
    code: int = 0
    typed: str = field(default="", compare=False)

    @classmethod
    def read(cls, text: str) -> Failure:
        """``STAGE:PERCENT/CODE``, ``drop:PERCENT``. Raises OrderError."""
        found = _FAILURE.fullmatch(text.strip())
        if found is None:
            raise OrderError(f"{text!r} is not STAGE:PERCENT/CODE, as in rcpt:10/450 or drop:5")
        if float(found[2]) > 100:
            raise OrderError(f"{text!r}: {found[2]} percent is more than all")
        return cls(found[1], float(found[2]) / 100, int(found[3] or 0), text.strip())

    def reply(self, protocol: Protocol) -> bytes:
        """The octets it is said in. Raises OrderError for a stage that the protocol has not, a code that is missing,
        that means no failure, or that nobody would hear."""
        percent = f"{self.share * 100:g}"
        typed = repr(self.typed or f"{self.stage}:{percent}" + (f"/{self.code}" if self.code else ""))
        if self.stage not in STAGES[protocol]:
            raise OrderError(f"{typed}: {protocol} has no stage {self.stage!r}, but {', '.join(STAGES[protocol])}")
        if self.stage == "drop" or (self.stage == "connect" and protocol == "http"):
            if self.code:
                raise OrderError(f"{typed}: the connection is closed without an answer, so there is no code: {self.stage}:{percent}")
            return b""
        least, example = (300, 503) if protocol == "http" else (400, 451)
        if not self.code:
            raise OrderError(f"{typed}: fail with which code? As in {self.stage}:{percent}/{example}")
        if self.code < least:
            raise OrderError(f"{typed}: {self.code} is no failure; codes go from {least} to 599, as in {self.stage}:{percent}/{example}")
        if protocol == "http":
            phrase = responses.get(self.code, "Failed")
            return f"HTTP/1.1 {self.code} {phrase}\r\ncontent-length: 0\r\n\r\n".encode()
        return f"{self.code} {self.code // 100}.0.0 failed as asked for\r\n".encode()


@dataclass(frozen=True, slots=True)
class Order:
    """``listen``: host:port (port 0: any) or unix:/path. ``messages``, ``seconds``: when to end, 0 never.
    ``delay``: seconds before each answer. ``fails``: shares of one stage add up. ``connections``: at the same time; the next ones wait."""

    protocol: Protocol = "smtp"
    listen: str = "127.0.0.1:0"
    messages: int = 0
    seconds: float = 0.0
    delay: float = 0.0
    fails: Sequence[Failure] = ()
    connections: int = CONNECTIONS
    seed: int = 1


@dataclass(slots=True)
class Tally:
    """What came. ``seconds``: from the first look that saw a message to the last that saw a new one; ``each``: how many
    came between looks a second apart; ``failed``: how often each stage failed as asked for; ``cpu``: of this process, seconds."""

    messages: int
    refused: int
    dropped: int
    recipients: int
    octets: int
    connections: int
    most_open: int
    seconds: float
    cpu: float
    each: list[int]
    failed: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        came = self.messages + self.refused + self.dropped
        return {
            "messages": self.messages,
            "refused": self.refused,
            "dropped": self.dropped,
            "recipients": self.recipients,
            "octets": self.octets,
            "connections": self.connections,
            "most_open": self.most_open,
            "seconds": round(self.seconds, 3),
            "rate": round(came / self.seconds, 1) if self.seconds else 0.0,
            "most_in_a_second": max(self.each, default=0),
            "each_second": self.each,
            "failed": self.failed,
            "cpu_seconds": round(self.cpu, 3),
            "cpu_us_per_message": round(self.cpu / came * 1e6, 2) if came else 0.0,
        }


class Receiver:
    """A receiver that listens already: ``address`` is where. A context manager; ``run`` serves."""

    def __init__(self, order: Order) -> None:
        """Raises OrderError, and OSError where it cannot listen."""
        self._order = order
        fails = [(failure.stage, failure.share, failure.reply(order.protocol)) for failure in order.fails]
        for stage in STAGES[order.protocol]:
            percent = round(100 * sum(failure.share for failure in order.fails if failure.stage == stage), 6)
            if percent > 100:
                raise OrderError(f"{stage}: its shares add up to {percent:g} percent, more than all")
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        soft, wanted = resource.getrlimit(resource.RLIMIT_NOFILE)[0], order.connections + 64
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
        self._socket = _listening(order.listen)
        self.address = sockets.spoken(self._socket.getsockname())
        try:
            self._sink = Sink(
                [self._socket.fileno()], order.protocol, connections=order.connections, delay=order.delay, fails=fails, seed=order.seed
            )
        except ValueError as error:
            self._socket.close()
            raise OrderError(str(error)) from None
        self._ended = threading.Event()

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *exception: object) -> None:
        self._sink.close()
        self._socket.close()

    def end(self) -> None:
        """``run`` returns soon. From any thread, or a signal's hook."""
        self._ended.set()

    def run(self, progress: Callable[[Tally], None] | None = None) -> Tally:
        """Serves until a bound of the order or ``end``. ``progress`` is called once a second with what came so far."""
        sink, order = self._sink, self._order
        before, cpu = time.monotonic(), time.process_time()
        first = last = 0.0
        seen = told = 0
        each: list[int] = []
        look = before + 1

        def tally() -> Tally:
            return Tally(
                sink.taken,
                sink.refused,
                sink.dropped,
                sink.recipients,
                sink.octets,
                sink.connections,
                sink.most_open,
                last - first,
                time.process_time() - cpu,
                each,
                sink.stages(),
            )

        while not self._ended.is_set():
            reached = sink.turn(SLICE, order.messages)
            now, came = time.monotonic(), sink.taken + sink.refused + sink.dropped
            if came > seen:
                first, last = first or max(now - SLICE, before), now
                seen = came
            if now >= look:
                each.append(came - told)
                told, look = came, look + 1
                if progress is not None:
                    progress(tally())
            if reached or (order.seconds and now - before >= order.seconds):
                break
        if seen > told:
            each.append(seen - told)
        return tally()


def _listening(address: str) -> socket.socket:
    unix, path = address.startswith("unix:"), address.removeprefix("unix:")
    if unix and not path:
        raise OrderError(f"{address!r} names no path, as unix:/tmp/receive.sock does")
    host, _, port = address.rpartition(":")
    if not unix and (not host or not (port.isascii() and port.isdigit()) or int(port) > 65535):
        raise OrderError(f"{address!r} is not host:port, [v6]:port or unix:/path")
    try:
        return sockets.bind_unix(path) if unix else sockets.bind(host.strip("[]"), int(port))
    except (OSError, UnicodeError) as error:
        number = error.errno if isinstance(error, OSError) else None
        if isinstance(error, (socket.gaierror, UnicodeError)):
            way = WAYS_OUT[errno.EADDRNOTAVAIL]
        elif number in (errno.EACCES, errno.EPERM):
            way = "name a folder where you may write" if unix else "name a port from 1024 on"
        elif unix:
            way = WAYS_OUT.get(number or 0, "name a short path in a folder that exists, as unix:/tmp/receive.sock")
        else:
            way = WAYS_OUT.get(number or 0, "name another place, as 127.0.0.1:2526")
        raise OSError(f"cannot listen at {address}: {getattr(error, 'strerror', None) or error}; {way}") from error
