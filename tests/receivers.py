"""HTTP receivers for tests: one that answers by the book, and many that do not."""

from __future__ import annotations

import asyncio
import functools
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from aiohttp import web

Misbehaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Request:
    path: str
    headers: list[tuple[str, str]]
    body: bytes

    def all(self, name: str) -> list[str]:
        return [value for given, value in self.headers if given.lower() == name]

    def one(self, name: str) -> str:
        (value,) = self.all(name)
        return value


@dataclass
class Receiver:
    """An aiohttp server on a free port. ``answers`` are given in turn, the last one repeats, each once ``gate`` is open."""

    answers: list[tuple[int, dict[str, str], bytes]] = field(default_factory=lambda: [(204, {}, b"")])
    requests: list[Request] = field(default_factory=list)
    url: str = ""
    at_once: int = 0
    most_at_once: int = 0
    delay: float = 0.0
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    async def handle(self, request: web.Request) -> web.Response:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            body = await request.read()
            raw = [(name.decode(), value.decode("latin-1")) for name, value in request.raw_headers]
            self.requests.append(Request(str(request.rel_url), raw, body))
            await asyncio.sleep(self.delay)
            await self.gate.wait()
        finally:
            self.at_once -= 1
        status, headers, answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return web.Response(status=status, headers=headers, body=answer)


@asynccontextmanager
async def receiving(*answers: tuple[int, dict[str, str], bytes]) -> AsyncIterator[Receiver]:
    receiver = Receiver()
    if answers:
        receiver.answers = list(answers)
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", receiver.handle)
    # Who is still answering at the end is not waited for.
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        receiver.url = f"http://{host}:{port}/inbound"
        yield receiver
    finally:
        await runner.cleanup()


@asynccontextmanager
async def misbehaving(behaviour: Misbehaviour) -> AsyncIterator[str]:
    """The URL of a server that treats each connection like this."""
    tasks: set[asyncio.Task[None]] = set()
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await behaviour(reader, writer)
        writer.close()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        task = asyncio.get_running_loop().create_task(serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/inbound"
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in writers:
            # asyncio's transport, once it is closed, has no loop left to abort on.
            with suppress(AttributeError):
                writer.transport.abort()
        await asyncio.sleep(0)
        await server.wait_closed()


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    size = next((int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
    return head + await reader.readexactly(size)


# ------------------------------------------------ bad input W2, and some more


async def never_answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    await asyncio.sleep(60)


async def never_reads(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def drips_a_200(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)


async def drips_its_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    for octet in b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 1000:
        writer.write(bytes([octet]))
        await writer.drain()
        await asyncio.sleep(0.02)


async def endless_headers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"x-more: of the same\r\n" * 100)
        await writer.drain()


async def endless_header_line(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"HTTP/1.1 200 OK\r\nx-long: ")
    while True:
        writer.write(b"y" * 65536)
        await writer.drain()


async def floods_1xx(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    while True:
        writer.write(b"HTTP/1.1 103 Early Hints\r\nlink: <x>\r\n\r\n" * 50)
        await writer.drain()
        await asyncio.sleep(0)


async def resets_before_an_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.transport.abort()


async def closes_without_an_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)


async def resets_inside_the_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nhalf")
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.transport.abort()


async def ends_inside_the_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nhalf")
    await writer.drain()


async def ends_inside_a_chunk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n10\r\nhalf")
    await writer.drain()


async def broken_chunks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\nnonsense\r\n")
    await writer.drain()
    await asyncio.sleep(0.2)


async def speaks_smtp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"220 mail.example ESMTP\r\n")
    await writer.drain()
    await read_request(reader)


async def speaks_http_0_9(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"<html>200 OK</html>\r\n")
    await writer.drain()


async def status_of_two_digits(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"HTTP/1.1 20 OK\r\ncontent-length: 0\r\n\r\n")
    await writer.drain()


async def switches_protocols(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n")
    await writer.drain()
    await asyncio.sleep(60)


async def redirects_to_a_200(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    request = await read_request(reader)
    if request.startswith(b"POST /inbound"):
        writer.write(b"HTTP/1.1 307 Temporary Redirect\r\nlocation: /elsewhere\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
    else:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
    await writer.drain()


async def two_lengths(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 4\r\n\r\nokok")
    await writer.drain()


async def length_that_is_no_number(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\nok")
    await writer.drain()


async def resets_after_half_a_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-le")
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.transport.abort()


MISBEHAVIOURS: list[Misbehaviour] = [
    two_lengths,
    length_that_is_no_number,
    resets_after_half_a_head,
    never_answers,
    drips_a_200,
    drips_its_head,
    endless_headers,
    endless_header_line,
    floods_1xx,
    resets_before_an_answer,
    closes_without_an_answer,
    resets_inside_the_body,
    ends_inside_the_body,
    ends_inside_a_chunk,
    broken_chunks,
    speaks_smtp,
    speaks_http_0_9,
    status_of_two_digits,
]


async def answers_before_the_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As an upstream with its 250 before the dot. Shows where the body is more than sockets hold."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
    await writer.drain()
    await asyncio.sleep(60)


# Those that give a whole answer, but not one that says the mail was taken.


@functools.cache
def _bomb() -> bytes:
    packed = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join(packed.compress(bytes(1 << 20)) for _ in range(128)) + packed.flush()


async def gzip_bomb(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """130 KB on the wire, 128 MiB for whoever takes the content-encoding at its word."""
    await read_request(reader)
    bomb = await asyncio.to_thread(_bomb)
    writer.write(
        b"HTTP/1.1 503 Busy\r\ncontent-type: text/plain\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n%b" % (len(bomb), bomb)
    )
    await writer.drain()


async def endless_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"HTTP/1.1 500 Oh\r\ncontent-type: text/plain\r\n\r\n")
    while True:
        writer.write(b"no" * 32768)
        await writer.drain()


#: Connections into which something will be laid that nobody asked for.
ABOUT_TO_LAY: set[asyncio.StreamWriter] = set()


async def answers_what_was_never_asked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Keep-alive desync: a 200 on the idle connection must not answer the next request."""
    ABOUT_TO_LAY.add(writer)
    try:
        await read_request(reader)
        writer.write(b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
    finally:
        ABOUT_TO_LAY.discard(writer)
    await read_request(reader)
    await asyncio.sleep(60)


async def says_two_answers_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
    await writer.drain()
    await read_request(reader)
    await asyncio.sleep(60)


#: Every way in which a receiver of webhooks misbehaves (bad input W2).
RECEIVERS: list[Misbehaviour] = [
    *MISBEHAVIOURS,
    switches_protocols,
    redirects_to_a_200,
    gzip_bomb,
    endless_body,
    answers_what_was_never_asked,
    says_two_answers_at_once,
]
