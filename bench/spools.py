"""A spool with many messages in it, as a gateway leaves it behind.

``fill`` writes through the product's own spool, so that what a gateway finds is what a gateway
would have written: every message with its row, checksums and indexes.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from gateway.contracts import Pending, Row, SpoolError
from gateway.intake import new_id
from gateway.message import Client, Content, Envelope, Message, Recipient
from gateway.spool.sqlite import SqliteSpool

#: Messages that wait for their group at a time.
AHEAD = 4096
FIELDS = b"Received: from client.example by bench.example with ESMTP; Mon, 23 Nov 2026 00:00:00 +0000\r\n"


class _Silent:
    def event(self, name: str, /, **fields: Any) -> None: ...
    def tell(self, event: str, fields: dict[str, Any]) -> None: ...


class _Given:
    """A message that was promised: ``contracts.Store``."""

    def __init__(self, row: Row, done: asyncio.Semaphore) -> None:
        self._row = row
        self._done = done
        self.size = row.message.stored.size

    def close(self) -> list[Row]:
        return [self._row]

    def stored(self, error: SpoolError | None) -> None:
        if error is not None:
            raise error
        self._done.release()


async def _fill(shard: Path, sink: str, count: int, size: int, recipient: str, due: float, down: bool) -> None:
    spool = SqliteSpool(shard, observer=_Silent(), minimum_free=0)
    await spool.open()
    local, _, domain = recipient.partition("@")
    content = b"Subject: waiting\r\n\r\n" + (b"x" * 78 + b"\r\n") * (size // 80 + 1)
    places = asyncio.Semaphore(AHEAD)
    now = time.time()
    for number in range(count):
        await places.acquire()
        # They came over an hour, one after the other.
        came = now - 3600 + 3600 * number / count
        id = new_id(came)
        message = Message(
            id,
            Envelope("a@client.example", {}, [Recipient(recipient, local, domain)]),
            Content(content[:size], header_size=18),
            Client("192.0.2.1", 4711, "client.example", "ESMTP"),
            came,
            listener="127.0.0.1:2525",
            trace=FIELDS,
            expires_at=now + 5 * 86400,
        )
        pending = Pending(id, sink, (0,), due or came + 60, message.expires_at, attempts=1, note="451 4.4.1 no connection", down=down)
        spool.store(_Given(Row(message, [pending]), places))
    for _ in range(AHEAD):
        await places.acquire()
    await spool.close()


def fill(root: Path, sink: str, count: int, *, size: int = 1024, recipient: str, due: float = 0.0, down: bool = True) -> None:
    """``count`` messages of ``size`` octets for ``sink`` into the first shard of the spool in ``root``.
    ``due``: Unix seconds; 0 is a minute after each came. ``down``: they wait for the sink."""
    asyncio.run(_fill(root / "0", sink, count, size, recipient, due, down))


def forget(root: Path) -> None:
    """The kernel keeps nothing of these files in its memory: they are read from the disk again."""
    for path in (root / "0").iterdir():
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
