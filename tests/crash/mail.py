"""Messages, tickets and an observer for the tests of the spool."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from gateway.contracts import Mark, Pending, Row, SpoolError
from gateway.message import TLS, Client, Content, Envelope, Message, Recipient
from gateway.spool.sqlite import SqliteSpool

TRACE = b"Received: from client.example by mx.example with ESMTP id x;\r\n\tSun, 22 Nov 2026 12:00:00 +0000\r\n"


class Events:
    """An Observer that remembers."""

    def __init__(self) -> None:
        self.all: list[tuple[str, dict[str, Any]]] = []

    def event(self, name: str, /, **fields: Any) -> None:
        self.tell(name, fields)

    def tell(self, event: str, fields: dict[str, Any]) -> None:
        self.all.append((event, fields))

    def named(self, name: str) -> list[dict[str, Any]]:
        return [fields for each, fields in self.all if each == name]


_serial = 0


def message(content: bytes = b"Subject: x\r\n\r\nbody\r\n", id: str | None = None, recipients: int = 1, **more: Any) -> Message:
    global _serial
    _serial += 1
    people = [Recipient(f"user{n}@app.example", f"user{n}", "app.example", {"NOTIFY": "FAILURE"}) for n in range(recipients)]
    return Message(
        id=id or f"0190a000-0000-7000-8000-{_serial:012d}",
        envelope=Envelope("sender@client.example", {"SIZE": "100", "SMTPUTF8": None}, people),
        stored=Content(content, eight_bit=False, header_size=12),
        client=Client("192.0.2.1", 4711, "client.example", "ESMTPS", TLS("TLSv1.3", "AES", None), "app"),
        received_at=time.time(),
        listener="127.0.0.1:2525",
        trace=TRACE,
        checks={"spf": {"result": "pass"}},
        expires_at=time.time() + 1000,
        **more,
    )


def pending(mail: Message, sink: str = "app", **more: Any) -> Pending:
    people = tuple(range(len(mail.envelope.recipients)))
    return Pending(mail.id, sink, **{"recipients": people, "due": 0.0, "expires_at": mail.expires_at, **more})


class Ticket:
    """A Store: its rows, and how it ended."""

    def __init__(self, *rows: Row, on_close: Callable[[], None] | None = None) -> None:
        self.rows = list(rows)
        self.size = sum(row.message.stored.size for row in rows)
        self.closed = 0
        self.on_close = on_close
        self.done: asyncio.Future[SpoolError | None] = asyncio.get_running_loop().create_future()

    def close(self) -> list[Row]:
        self.closed += 1
        if self.on_close is not None:
            self.on_close()
        return self.rows

    def stored(self, error: SpoolError | None) -> None:
        self.done.set_result(error)


async def store(spool: SqliteSpool, *rows: Row) -> SpoolError | None:
    ticket = Ticket(*rows)
    spool.store(ticket)
    return await asyncio.wait_for(ticket.done, 10)


async def keep(spool: SqliteSpool, mail: Message | None = None, *sinks: str, **more: Any) -> list[Pending]:
    """Store one message for these sinks, successfully."""
    mail = mail or message()
    pendings = [pending(mail, sink, **more) for sink in sinks or ("app",)]
    error = await store(spool, Row(mail, pendings))
    assert error is None, error
    return pendings


async def large(spool: SqliteSpool, content: bytes, **more: Any) -> Message:
    """A message whose content lies in a file of the spool, in two writes."""
    mail = message(**more)
    file = spool.file(mail.id)
    for piece in (content[: len(content) // 2], content[len(content) // 2 :]):
        written: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        file.write([piece], written.set_result)
        if (error := await asyncio.wait_for(written, 10)) is not None:
            file.discard()
            raise error
    mail.stored = Content(path=file.path, size=len(content), eight_bit=True, header_size=5)
    return mail


async def mark(spool: SqliteSpool, row: Pending, **more: Any) -> None:
    """Returns once the mark is durable."""
    synced = asyncio.get_running_loop().create_future()
    spool.mark(Mark(row, synced=lambda: synced.set_result(None), **more))
    await asyncio.wait_for(synced, 10)


async def settle(spool: SqliteSpool, row: Pending) -> None:
    """Everything of this row is delivered."""
    row.recipients = ()
    await mark(spool, row)


@asynccontextmanager
async def opened(folder: Path, **more: Any) -> AsyncIterator[SqliteSpool]:
    spool = SqliteSpool(folder, **{"observer": Events(), "minimum_free": 0.0, **more})
    await spool.open()
    try:
        yield spool
    finally:
        await spool.close()
