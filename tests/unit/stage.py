"""A stage for the intake and the queue: a spool whose groups close and sync when the test
says so, sinks that answer when the test says so, a clock that moves when the test says so.

Time goes by on its loop only while nothing else is left to do, and then at once: what comes before what
does not hang on how busy the machine is, and nothing is waited for.

What these parts do on a real disk and real sockets is shown elsewhere (test_spool, integration);
here the order of events is the point, and no real disk can be told when to fail.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gateway.contracts import Check, Delivery, Mark, Outcome, Pending, Row, Sink, SpoolError, Store, Transaction
from gateway.intake import MailDraft, MailIntake, new_id
from gateway.message import Client, Content, Envelope, Message, Recipient
from gateway.queue import LaneSettings, Queue
from gateway.reply import Reply
from gateway.route import Route

OK = Outcome("delivered", Reply(250, "2.0.0", "taken"))
LATER = Outcome("deferred", Reply(451, "4.2.0", "later"))
NEVER = Outcome("failed", Reply(550, "5.1.1", "never"))
DOWN = Outcome("deferred", Reply(451, "4.4.1", "no connection"), down=True)
HELD = 0.02  # seconds: spool.hold on this stage


class Told:
    """An Observer that remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def event(self, name: str, /, **fields: Any) -> None:
        self.tell(name, fields)

    def tell(self, event: str, fields: dict[str, Any]) -> None:
        self.events.append((event, fields))

    def names(self) -> list[str]:
        return [name for name, _fields in self.events]


class StagedSink:
    """Settles at once with ``at_once``, or keeps deliveries until the test settles them."""

    carries_binary = True

    def __init__(self, name: str, at_once: Outcome | None = None) -> None:
        self.name = name
        self.at_once = at_once
        self.out: list[Delivery] = []
        self.seen: list[Delivery] = []

    def start(self, delivery: Delivery) -> None:
        self.seen.append(delivery)
        if self.at_once is not None:
            delivery.settle_all(self.at_once)
        else:
            self.out.append(delivery)

    def settle(self, *outcomes: Outcome) -> None:
        delivery = self.out.pop(0)
        if len(outcomes) == 1:
            delivery.settle_all(outcomes[0])
        else:
            delivery.settle(outcomes)

    async def open(self) -> None: ...
    async def close(self) -> None: ...


class StagedFile:
    def __init__(self, path: str) -> None:
        self.path = path
        self.octets = b""
        self.gone = False
        self.fail: Exception | None = None

    def write(self, pieces: list[bytes], written: Callable[[Exception | None], None]) -> None:
        self.octets += b"".join(pieces)
        asyncio.get_running_loop().call_soon(lambda: written(self.fail))

    def discard(self) -> None:
        self.gone = True


class StagedSpool:
    """Rows in a dict; groups as the test wills."""

    def __init__(self) -> None:
        self.waiting: list[Store] = []
        self.closed: list[tuple[Store, list[Row]]] = []
        self.rows: dict[int, tuple[Message, Pending]] = {}
        self.marks: list[Mark] = []
        self.files: dict[str, StagedFile] = {}
        self.by_itself = False
        self._keys = 0

    unhealthy: str | None = None

    async def open(self) -> None: ...
    async def close(self) -> None: ...

    def store(self, ticket: Store) -> None:
        self.waiting.append(ticket)
        if self.by_itself:
            asyncio.get_running_loop().call_soon(self.commit)

    def close_group(self) -> list[Row]:
        rows: list[Row] = []
        for ticket in self.waiting:
            mine = ticket.close()
            if mine:
                self.closed.append((ticket, mine))
                rows += mine
        self.waiting = []
        return rows

    def sync(self, error: SpoolError | None = None) -> None:
        group, self.closed = self.closed, []
        for ticket, rows in group:
            if error is None:
                for row in rows:
                    self._insert(row.message, row.pendings)
            ticket.stored(error)

    def commit(self) -> None:
        self.close_group()
        self.sync()

    def _insert(self, message: Message, pendings: Sequence[Pending]) -> None:
        for pending in pendings:
            self._keys += 1
            pending.key = self._keys
            self.rows[pending.key] = (message, replace(pending))

    def mark(self, mark: Mark) -> None:
        self.marks.append(mark)
        if self.by_itself:
            asyncio.get_running_loop().call_soon(self.sync_marks)

    def sync_marks(self) -> None:
        marks, self.marks = self.marks, []
        for mark in marks:
            assert mark.pending.key, "a mark for a row that was never stored"
            message = self.rows[mark.pending.key][0]
            if mark.pending.recipients:
                self.rows[mark.pending.key] = (message, replace(mark.pending))
            else:
                del self.rows[mark.pending.key]
            self._insert(message, mark.splits)
            for row in mark.follow:
                self._insert(row.message, row.pendings)
            if mark.synced is not None:
                mark.synced()

    def file(self, message_id: str) -> StagedFile:
        return self.files.setdefault(message_id, StagedFile(f"/nowhere/{message_id}"))

    async def load(self, pending: Pending) -> Message | None:
        found = self.rows.get(pending.key)
        return found[0] if found else None

    def queued(self, sink: str) -> list[Pending]:
        rows = [pending for _message, pending in self.rows.values() if pending.sink == sink and pending.state == "queued"]
        return sorted(rows, key=lambda pending: (-pending.priority, pending.due))

    async def due(self, sink: str, before: float, limit: int, down: bool = False) -> list[Pending]:
        rows = self.queued(sink)
        found = [pending for pending in rows if pending.due <= before]
        if down:
            found += [pending for pending in rows if pending.due > before and pending.down]
        return [replace(pending) for pending in found[:limit]]

    async def overdue(self, now: float, after: int) -> tuple[list[Pending], int]:
        return [replace(row) for _message, row in self.rows.values() if row.state == "queued" and row.expires_at <= now], 0

    async def next_due(self, sink: str, after: float) -> float | None:
        return min((pending.due for pending in self.queued(sink) if pending.due > after), default=None)

    async def counts(self) -> Mapping[tuple[str, str], tuple[int, float]]:
        result: dict[tuple[str, str], tuple[int, float]] = {}
        for message, pending in self.rows.values():
            key = (pending.sink, pending.state)
            rows, oldest = result.get(key, (0, message.received_at))
            result[key] = (rows + 1, min(oldest, message.received_at))
        return result

    async def wake(self, sink: str, now: float) -> int:
        woken = 0
        for _message, pending in self.rows.values():
            if pending.sink == sink and pending.state == "queued" and pending.down:
                pending.due, pending.down = now, False
                woken += 1
        return woken


def quieten(loop: asyncio.AbstractEventLoop) -> None:
    """From now on a timer of this loop is due when all that was to happen before it has happened, and no sooner.
    Of uvloop's it is not asked: there time is the machine's."""
    of_asyncio: Any = loop
    if not hasattr(loop, "_selector") or "time" in vars(loop):
        return
    select, now = of_asyncio._selector.select, loop.time()

    def look(timeout: float | None = None) -> Any:
        nonlocal now
        # Without a timer there is a thread, or nothing, to wait for.
        events = select(None if timeout is None else 0)
        if timeout is not None and timeout > 0 and not events:
            now += timeout
        return events

    of_asyncio._selector.select = look
    of_asyncio.time = lambda: now


class Clock:
    """Unix seconds that go by with the loop's, plus what the test adds."""

    def __init__(self) -> None:
        quieten(asyncio.get_running_loop())
        self._start = asyncio.get_running_loop().time()
        self.added = 0.0

    def __call__(self) -> float:
        return 1_800_000_000.0 + asyncio.get_running_loop().time() - self._start + self.added


class Stage:
    """Everything between the wire and the far side, with the edges staged."""

    def __init__(
        self,
        *sinks: StagedSink,
        concurrency: int = 2,
        on_failure: str = "dead_letter",
        bounces: str | None = None,
        retry: Sequence[float] = (60.0, 300.0),
        expire: float = 3600.0,
        checks: Mapping[str, Check] | None = None,
        memory: int = 128 * 1024 * 1024,
        rate: float = 0.0,
        steady: Callable[[Clock], Callable[[], float]] | None = None,
    ) -> None:
        self.told = Told()
        self.spool = StagedSpool()
        self.clock = Clock()
        self.sinks = {sink.name: sink for sink in sinks}
        self.lanes = {
            name: LaneSettings(concurrency, "bounce" if on_failure == "bounce" and name != bounces else "dead_letter", rate=rate)
            for name in self.sinks
        }
        carriers: dict[str, Sink] = dict(self.sinks)
        self.queue = Queue(
            self.spool,
            carriers,
            self.lanes,
            retry=retry,
            expire=expire,
            hold=HELD,
            bounces=bounces,
            hostname="mx.example.net",
            observer=self.told,
            new_id=new_id,
            clock=self.clock if steady is None else steady(self.clock),
            wall=self.clock,
        )
        self.intake = MailIntake(
            self.queue,
            self.spool,
            checks or {},
            hostname="mx.example.net",
            expire=expire,
            observer=self.told,
            memory=memory,
            clock=self.clock,
        )
        self.answers: list[Reply | Sequence[Reply] | None] = []

    async def __aenter__(self) -> Stage:
        await self.queue.open()
        await breathe()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.intake.close()
        await self.queue.close()

    def transaction(
        self, *recipients: str, route: Route | Sequence[Route] | None = None, mail_from: str = "a@client.example", lmtp: bool = False
    ) -> Transaction:
        names = recipients or ("b@us.example",)
        if route is None:
            route = Route(("*",), tuple(self.sinks))
        routes = [route] * len(names) if isinstance(route, Route) else list(route)
        envelope = Envelope(mail_from, {}, [Recipient(name, name.partition("@")[0], name.partition("@")[2]) for name in names])
        return Transaction(1, "s1", "127.0.0.1:25", Client("192.0.2.7", 1234, "client.example", "ESMTP"), envelope, routes, lmtp=lmtp)

    def draft(self, transaction: Transaction) -> MailDraft:
        return self.intake.begin(transaction, lambda: None)

    def send(self, *recipients: str, content: bytes = b"Subject: x\r\n\r\nhello\r\n", **more: Any) -> MailDraft:
        """One message up to its end of data; the answer comes into ``answers``."""
        transaction = self.transaction(*recipients, **more)
        transaction.size, transaction.header_size = len(content), content.find(b"\r\n\r\n") + 2
        transaction.hops = content[: transaction.header_size].count(b"Received:")
        draft = self.draft(transaction)
        draft.write(content)
        draft.finish(self.answers.append)
        return draft

    @property
    def codes(self) -> list[int | list[int] | None]:
        return [
            None if answer is None else answer.code if isinstance(answer, Reply) else [reply.code for reply in answer]
            for answer in self.answers
        ]


async def breathe(turns: int = 5) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


async def patience() -> None:
    """Longer than ``spool.hold``."""
    await asyncio.sleep(HELD * 2.5)


__all__ = ["DOWN", "HELD", "LATER", "NEVER", "OK", "Content", "Stage", "StagedSink", "breathe", "patience"]
