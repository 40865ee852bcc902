"""The work whose instructions ``bench.count`` counts: the hot paths, each alone and the same every time.

``python -m bench.counted [--only CASE,…] [--relay PORT] [--webhook PORT]`` does it without counting: is it right?

A case is a stage and one round of so many units on it. Every round proves what it did (replies are
compared, outcomes looked at), so that nothing is counted that did not happen.

``mail``, ``rcpt``         a line through the parser, every attribute read; ``mail, parameters``: with SIZE and BODY
``content …``              64 KiB a read of DATA through the parser, by KiB: base64, text, every line dotted (the mails of
                           ``gateway bench``, without their ends)
``session …``              a message of 1 KiB through the ServerSession alone: lock-step (four reads), pipelined
                           (one: the end of one mail and MAIL, RCPT, DATA of the next), BDAT (one: MAIL, RCPT, BDAT LAST)
``whole …``                the same through Connection, session, intake, queue, discard and event log, as they stand
                           in a gateway: 64 connections whose transport keeps what is written, a loop turn after each round
``whole, large``           a message of 100 KiB in reads of 64 KiB
``commit``, ``mark``       a message of 1 KiB stored, and its row done: groups of 64 in SQLite on a disk, both threads
``relay``                  a message of 1 KiB by a RelaySink over a warm connection, one after the other
``webhook …``              the same by a WebhookSink: raw, and standard

Not counted: the kernel, start, accepting, TLS, and the far side of a relay or webhook, which is another
process (``gateway receive``).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import socket
import tempfile
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import uvloop

from gateway import build
from gateway._parser import Receiver, stuff
from gateway.config import Config
from gateway.contracts import Delivery, Mark, Outcome, Pending, Row, Sink, SpoolError
from gateway.intake import MailIntake, new_id
from gateway.listener import Admission, Connection, Listener, SessionIds
from gateway.message import Client, Content, Envelope, Message, Recipient
from gateway.observe import Telemetry
from gateway.queue import Queue
from gateway.reply import Reply
from gateway.smtp.events import MailFinished
from gateway.smtp.server import ServerSession
from gateway.spool.sqlite import SqliteSpool
from gateway.tools.bench.corpora import READ, mails

CONNECTIONS = 64
#: Messages on each of them in one round: enough that a sweep or a turn of the log's thread is little of it.
TURNS = 4
HEADER = (
    b"From: <foo@host.example>\r\nTo: <bar@host.example>\r\nDate: Mon, 23 Nov 2026 00:00:00 +0000\r\nMessage-Id: <1@host.example>\r\n\r\n"
)
CONTENT = HEADER + (b"X" * 78 + b"\r\n") * 12
LARGE = HEADER + (b"X" * 78 + b"\r\n") * 1280
EHLO, MAIL, RCPT, DATA = b"EHLO client.example\r\n", b"MAIL FROM:<foo@host.example>\r\n", b"RCPT TO:<bar@host.example>\r\n", b"DATA\r\n"
GROUP = MAIL + RCPT + DATA
PIPELINED = CONTENT + b".\r\n" + GROUP
CHUNKED = MAIL + RCPT + b"BDAT %d LAST\r\n" % len(CONTENT) + CONTENT

CONFIG = """
hostname = "bench.example"

[[listeners]]
address = "127.0.0.1:0"

# Under valgrind all is fifty times slower, and nothing shall be late for it.
[limits]
command_timeout = "1h"
data_timeout = "1h"
minimum_rate = "1 B"

[spool]
path = "{folder}/spool"

[sinks.out]
{sink}

[[routes]]
recipients = ["*"]
clients = ["127.0.0.0/8"]
sink = "out"
"""


@dataclass(frozen=True)
class Peers:
    """Ports of the far sides: ``gateway receive smtp`` and ``http``."""

    relay: int
    webhook: int


@dataclass(frozen=True)
class Round:
    """``work`` is what counts; ``ready`` comes before it, each time."""

    work: Callable[[], Awaitable[None]]
    ready: Callable[[], Awaitable[None]] | None = None


@dataclass(frozen=True)
class Case:
    """``units``: of one round."""

    unit: str
    units: int
    stage: Callable[[Peers], AbstractAsyncContextManager[Round]]


def proven(true: bool, what: object) -> None:
    if not true:
        raise RuntimeError(f"this is not what was to be counted: {what!r}")


# ----------------------------------------------------------------- the bytes


@asynccontextmanager
async def lines(line: bytes, peers: Peers) -> AsyncIterator[Round]:
    receiver = Receiver()
    octets = line * 64

    async def work() -> None:
        for _ in range(4):
            receiver.feed(octets)
            count = 0
            while (command := receiver.command()) is not None:
                _ = command.verb, command.fault, command.address, command.local, command.domain, command.params, command.ascii
                count += 1
            proven(count == 64 and command is None, count)

    receiver.feed(line)
    first = receiver.command()
    proven(first is not None and first.fault is None and bool(first.domain), first)
    yield Round(work)


@asynccontextmanager
async def content(kind: str, peers: Peers) -> AsyncIterator[Round]:
    (mail,) = next(corpus.contents for corpus in mails() if corpus.name == kind)
    octets = stuff(mail)
    receiver = Receiver()
    receiver.begin()
    receiver.feed(b"\r\n")
    receiver.content()

    async def work() -> None:
        for _ in range(16):
            receiver.feed(octets)
            piece = receiver.content()
            proven(piece is not None and len(piece) == len(mail), kind)
        proven(not (receiver.content_fault or receiver.pending or receiver.finished), kind)

    proven(READ - 128 < len(octets) <= READ, len(octets))
    yield Round(work)


# --------------------------------------------------------------- the session


@asynccontextmanager
async def session(feed: Callable[[ServerSession], None], begin: bytes, peers: Peers) -> AsyncIterator[Round]:
    with tempfile.TemporaryDirectory() as folder:
        config = loaded(Path(folder), 'type = "discard"')
        rules = build.rules(config, config.listeners[0], config.table(), ())
    one = ServerSession(rules, Client("127.0.0.1", 4711), "s", "127.0.0.1:25")
    one.start()
    for octets in (EHLO, begin):
        one.receive(octets)
        one.outgoing()

    async def work() -> None:
        for _ in range(64):
            feed(one)

    yield Round(work)


ACCEPTED = Reply(250, "2.0.0", "accepted as 0192f1c2-0000-7000-8000-000000000000")


def lock_step(one: ServerSession) -> None:
    for octets in (MAIL, RCPT, DATA):
        one.receive(octets)
        one.outgoing()
    ended(one, CONTENT + b".\r\n")


def ended(one: ServerSession, octets: bytes) -> None:
    """The read that ends a mail; its answer goes out."""
    finished = 0
    for event in one.receive(octets):
        if isinstance(event, MailFinished):
            finished += 1
            one.answer(event.number, ACCEPTED)
    said = one.outgoing()
    proven(finished == 1 and b"250 2.0.0 accepted" in said, said)


# ----------------------------------------------------------------- the whole


class Clock:
    """Goes on by 10 µs whenever it is asked: what is done once a millisecond is done as often on any machine."""

    def __init__(self) -> None:
        self._now = time.time()

    def __call__(self) -> float:
        self._now += 1e-5
        return self._now


class Kept(asyncio.Transport):
    """A transport without a network: what is written is kept, and what is fed is read as uvloop reads it."""

    def __init__(self, out: list[bytes], connection: Connection) -> None:
        super().__init__()
        self._out = out
        self._connection = connection
        self.feed: Callable[[bytes], None] = connection.data_received
        connection.connection_made(self)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        lend = self._connection.get_buffer
        files: dict[bytes, int] = {}

        def read(octets: bytes) -> None:
            # The kernel's copy is none of ours, and is not counted.
            if octets not in files:
                files[octets] = os.memfd_create("read")
                os.write(files[octets], octets)
                weakref.finalize(self, os.close, files[octets])
            self._connection.buffer_updated(os.preadv(files[octets], [cast(bytearray, lend(-1))], 0))

        self.feed = read

    def write(self, data: bytes | bytearray | memoryview[int]) -> None:
        self._out.append(bytes(data))

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def get_write_buffer_size(self) -> int:
        return 0

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None: ...
    def close(self) -> None: ...
    def abort(self) -> None: ...


def loaded(folder: Path, sink: str) -> Config:
    file = folder / "gateway.toml"
    file.write_text(CONFIG.format(folder=folder, sink=sink))
    return Config.load(file)


@asynccontextmanager
async def whole(reads: tuple[bytes, ...], begin: bytes, peers: Peers) -> AsyncIterator[Round]:
    """Put together as ``app.py`` does it. ``reads`` come on every connection in turn, one a loop turn."""
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gateway-count-")))
        config = loaded(folder, 'type = "discard"')
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        stack.callback(os.close, log)
        clock = Clock()
        telemetry = Telemetry("json", fd=log, clock=clock)
        stack.callback(telemetry.close)
        sinks: dict[str, Sink] = {}
        faults: list[str] = []
        await build.opened_sinks(config, config.sinks, sinks, faults)
        proven(not faults, faults)
        spool = SqliteSpool(config.spool.path, observer=telemetry)
        await spool.open()
        stack.push_async_callback(spool.close)
        queue = Queue(
            spool,
            sinks,
            build.lane_settings(config),
            retry=config.retry.delays,
            expire=config.retry.expire,
            hold=config.spool.hold,
            bounces=None,
            hostname=config.hostname,
            observer=telemetry,
            new_id=new_id,
            clock=clock,
        )
        await queue.open()
        stack.push_async_callback(queue.close)
        # Until a lane has looked into the spool its first mail goes there, too.
        await asyncio.sleep(0.2)
        intake = MailIntake(queue, spool, {}, hostname=config.hostname, expire=config.retry.expire, observer=telemetry, clock=clock)
        (sock,) = build.bind_all(config)
        rules = build.rules(config, config.listeners[0], config.table(), ())
        listener = Listener(
            sock,
            rules,
            intake,
            observer=telemetry,
            admission=Admission(config.limits),
            session_ids=SessionIds(),
            door=build.door(config.listeners[0]),
        )
        listener.start()
        stack.callback(listener.close)
        out: list[bytes] = []
        transports = []
        for _ in range(CONNECTIONS):
            ours, theirs = socket.socketpair()
            stack.callback(ours.close)
            stack.callback(theirs.close)
            transport = Kept(out, Connection(listener, ours, Client("127.0.0.1", 4711), "127.0.0.1"))
            for octets in (EHLO, begin):
                transport.feed(octets)
            transports.append(transport)
        out.clear()

        async def work() -> None:
            for _ in range(TURNS):
                for octets in reads:
                    for transport in transports:
                        transport.feed(octets)
                    await asyncio.sleep(0)
                await asyncio.sleep(0)
            taken = sum([octets.find(b" accepted as ") > 0 for octets in out])
            proven(taken == CONNECTIONS * TURNS, out[-4:])
            out.clear()

        yield Round(work)


# ----------------------------------------------------------------- the spool


class Stored:
    """``contracts.Store``: a message that waits for its group."""

    def __init__(self, row: Row, done: Callable[[], None]) -> None:
        self._row = row
        self._done = done
        self.size = 1024 + row.message.stored.size

    def close(self) -> list[Row]:
        return [self._row]

    def stored(self, error: SpoolError | None) -> None:
        if error is not None:
            raise error
        self._done()


class Group:
    """So many callbacks are waited for."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._all: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done(self) -> None:
        self._left -= 1
        if not self._left:
            self._all.set_result(None)

    async def wait(self) -> None:
        await self._all


def message() -> Message:
    now = time.time()
    trace = b"Received: from client.example by bench.example with ESMTP; Mon, 23 Nov 2026 00:00:00 +0000\r\n"
    envelope = Envelope("foo@host.example", {}, [Recipient("bar@host.example", "bar", "host.example")])
    stored = Content(CONTENT, header_size=len(HEADER) - 2)
    client = Client("192.0.2.1", 4711, "client.example", "ESMTP")
    return Message(new_id(now), envelope, stored, client, now, listener="127.0.0.1:25", trace=trace, expires_at=now + 86400)


class Silent:
    def event(self, name: str, /, **fields: object) -> None: ...
    def tell(self, event: str, fields: dict[str, object]) -> None: ...


@asynccontextmanager
async def spool(marks: bool, peers: Peers) -> AsyncIterator[Round]:
    """Groups of 64 are stored, and done with; one of the two is what counts."""
    with tempfile.TemporaryDirectory(prefix="gateway-count-") as folder:
        kept = SqliteSpool(folder, observer=Silent(), minimum_free=0)
        await kept.open()
        rows: list[Row] = []

        async def make() -> None:
            rows.clear()
            for _ in range(64):
                one = message()
                owed = Pending(one.id, "out", (0,), one.received_at + 60, one.expires_at, attempts=1, note="451 4.4.1 no connection")
                rows.append(Row(one, [owed]))

        async def store() -> None:
            group = Group(len(rows))
            for row in rows:
                kept.store(Stored(row, group.done))
            await group.wait()

        async def settle() -> None:
            group = Group(len(rows))
            for row in rows:
                (owed,) = row.pendings
                proven(owed.key > 0, owed)
                owed.recipients = ()
                kept.mark(Mark(owed, synced=group.done))
            await group.wait()

        async def stored() -> None:
            proven(not await kept.counts(), "rows are left")
            await make()
            await store()

        async def gone() -> None:
            if rows:
                await settle()
            proven(not await kept.counts(), "rows are left")
            await make()

        yield Round(settle, stored) if marks else Round(store, gone)
        await kept.close()


# ----------------------------------------------------------------- the sinks


@asynccontextmanager
async def carrying(text: str, peers: Peers) -> AsyncIterator[Round]:
    with tempfile.TemporaryDirectory() as folder:
        config = loaded(Path(folder), text.format(relay=peers.relay, webhook=peers.webhook))
    sinks: dict[str, Sink] = {}
    faults: list[str] = []
    await build.opened_sinks(config, config.sinks, sinks, faults)
    proven(not faults, faults)
    sink = sinks["out"]
    messages: list[Message] = []

    async def make() -> None:
        messages[:] = (message() for _ in range(32))

    def told(settled: asyncio.Future[Sequence[Outcome]], _: Delivery, outcomes: Sequence[Outcome]) -> None:
        settled.set_result(outcomes)

    async def work() -> None:
        loop = asyncio.get_running_loop()
        for one in messages:
            settled: asyncio.Future[Sequence[Outcome]] = loop.create_future()
            sink.start(Delivery(one.id, one, one.envelope.recipients, "out", 1, partial(told, settled)))
            (outcome,) = await settled
            proven(outcome.state == "delivered", outcome)

    yield Round(work, make)
    await sink.close()


RELAY = 'type = "relay"\nhosts = ["127.0.0.1:{relay}"]\ntls = "off"'
RAW = 'type = "webhook"\nurl = "http://127.0.0.1:{webhook}/"\nformat = "raw"'
STANDARD = 'type = "webhook"\nurl = "http://127.0.0.1:{webhook}/"'

CASES = {
    "mail": Case("line", 256, partial(lines, b"MAIL FROM:<sender@example.org>\r\n")),
    "mail, parameters": Case(
        "line", 256, partial(lines, b"MAIL FROM:<bounce+1=user=example.com@lists.example.org> SIZE=1000 BODY=8BITMIME\r\n")
    ),
    "rcpt": Case("line", 256, partial(lines, b"RCPT TO:<first.last@dest.example.com>\r\n")),
    "content, base64": Case("KiB", 1024, partial(content, "base64")),
    "content, text": Case("KiB", 1024, partial(content, "text")),
    "content, dotted": Case("KiB", 1024, partial(content, "dotted")),
    "session, lock-step": Case("message", 64, partial(session, lock_step, b"")),
    "session, pipelined": Case("message", 64, partial(session, lambda one: ended(one, PIPELINED), GROUP)),
    "session, BDAT": Case("message", 64, partial(session, lambda one: ended(one, CHUNKED), b"")),
    "whole, lock-step": Case("message", CONNECTIONS * TURNS, partial(whole, (MAIL, RCPT, DATA, CONTENT + b".\r\n"), b"")),
    "whole, pipelined": Case("message", CONNECTIONS * TURNS, partial(whole, (PIPELINED,), GROUP)),
    "whole, BDAT": Case("message", CONNECTIONS * TURNS, partial(whole, (CHUNKED,), b"")),
    "whole, large": Case("message", CONNECTIONS * TURNS, partial(whole, (GROUP, LARGE[:READ], LARGE[READ:] + b".\r\n"), b"")),
    "commit": Case("message", 64, partial(spool, False)),
    "mark": Case("message", 64, partial(spool, True)),
    "relay": Case("message", 32, partial(carrying, RELAY)),
    "webhook, raw": Case("message", 32, partial(carrying, RAW)),
    "webhook, standard": Case("message", 32, partial(carrying, STANDARD)),
}

#: Rounds until caches, pools and connections are as they stay.
WARM_UP = 3


async def counted(names: list[str], peers: Peers, rounds: int, begin: Callable[[], object], end: Callable[[str], object]) -> None:
    """Each of these cases, ``rounds`` times between ``begin`` and ``end``, after a warm-up."""
    for name in names:
        async with CASES[name].stage(peers) as one:
            gc.collect()
            gc.freeze()
            for number in range(WARM_UP + rounds):
                if one.ready is not None:
                    await one.ready()
                if number >= WARM_UP:
                    begin()
                await one.work()
                if number >= WARM_UP:
                    end(name)
            gc.unfreeze()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.counted", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=";".join(CASES), help="cases, separated by semicolons")
    parser.add_argument("--relay", type=int, default=0, help="port of gateway receive smtp")
    parser.add_argument("--webhook", type=int, default=0, help="port of gateway receive http")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mark", type=Path, help="the library through which callgrind is told when to count")
    options = parser.parse_args()
    names = options.only.split(";")
    peers = Peers(options.relay, options.webhook)
    if options.mark is None:
        clock = [0.0]

        def end(name: str) -> None:
            print(f"{name}: {(time.perf_counter() - clock[0]) / CASES[name].units * 1e6:.2f} µs a {CASES[name].unit}")

        uvloop.run(counted(names, peers, options.rounds, lambda: clock.__setitem__(0, time.perf_counter()), end))
        return
    import ctypes

    library = ctypes.CDLL(str(options.mark))
    library.instrument()
    uvloop.run(counted(names, peers, options.rounds, library.begin, lambda name: library.end(name.encode())))


if __name__ == "__main__":
    main()
