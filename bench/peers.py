"""Far sides and peers for the end-to-end bench, each a process of its own.

``python -m bench.peers webhook PORT`` takes every POST and keeps nothing.
``python -m bench.peers aiosmtpd PORT`` is aiosmtpd on uvloop, taking mail and keeping nothing.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any, cast

import uvloop

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


class Webhook(asyncio.Protocol):
    """The cheapest HTTP receiver that is still right: it finds each request's end and answers it."""

    def __init__(self) -> None:
        self._buffer = b""
        self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not one by inheritance

    def data_received(self, octets: bytes) -> None:
        if self._left:
            taken = min(self._left, len(octets))
            self._left -= taken
            if self._left:
                return
            self._transport.write(ANSWER)
            octets = octets[taken:]
        self._buffer += octets
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            start = head.index(b"\r\ncontent-length:") + 17
            stop = head.find(b"\r\n", start)
            size = int(head[start : stop if stop >= 0 else end])
            there = len(self._buffer) - end - 4
            if there < size:
                self._left, self._buffer = size - there, b""
                return
            self._buffer = self._buffer[end + 4 + size :]
            self._transport.write(ANSWER)


async def webhook(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Webhook, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


class Discard:
    """An aiosmtpd hook object (its names are aiosmtpd's)."""

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802 - aiosmtpd calls it so
        return "250 taken"


async def aiosmtpd(port: int) -> None:
    from aiosmtpd.smtp import SMTP

    server = await asyncio.get_running_loop().create_server(
        lambda: SMTP(Discard(), enable_SMTPUTF8=True, hostname="peer"), "127.0.0.1", port, backlog=1024
    )
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run({"webhook": webhook, "aiosmtpd": aiosmtpd}[sys.argv[1]](int(sys.argv[2])))
