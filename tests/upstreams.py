"""SMTP upstreams for tests that talk as they are told, and all the ways in which they misbehave (bad input O1).

``Rogue`` is a real server; what it says is a ``Talk``, line by line. ``UPSTREAMS`` is the table: run on the sink in
``tests/unit/test_relay.py``, and through the whole gateway in ``tests/integration/test_misbehaviour.py``.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress


class Peer:
    """An upstream's side of one connection, told line by line."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.heard: list[str] = []

    async def say(self, *lines: str) -> None:
        self.writer.write("".join(f"{line}\r\n" for line in lines).encode())
        await self.writer.drain()

    async def hear(self, verb: str = "") -> str:
        line = (await self.reader.readuntil(b"\r\n")).decode()[:-2]
        self.heard.append(line)
        assert line.startswith(verb), self.heard
        return line

    async def hello(self, *offers: str) -> None:
        """As far as the first command after EHLO."""
        await self.say("220 rogue.example")
        await self.hear("EHLO ")
        await self.say(*(f"250-{offer}" for offer in ("rogue.example", *offers)), "250 HELP")

    async def envelope(self) -> None:
        """MAIL and one RCPT are heard and taken."""
        await self.hear("MAIL ")
        await self.hear("RCPT ")
        await self.say("250 2.1.0 ok", "250 2.1.5 ok")

    async def chunk(self) -> bytes:
        verb, size, *_ = (await self.hear("BDAT ")).split()
        assert verb == "BDAT"
        return await self.reader.readexactly(int(size))

    async def dotted(self) -> bytes:
        return (await self.reader.readuntil(b"\r\n.\r\n"))[:-3]

    def reset(self) -> None:
        """Close with RST."""
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.close()

    async def silence(self) -> None:
        """Reads, and says nothing more."""
        while await self.reader.read(65536):
            pass


Talk = Callable[[Peer], Awaitable[None]]


class Rogue:
    """A server that talks as it is told: ``talks`` one for each connection in order, the last for all further ones."""

    def __init__(self, *talks: Talk, path: str | None = None) -> None:
        self.talks = talks
        self.path = path
        self.peers: list[Peer] = []
        self.bugs: list[BaseException] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        task = asyncio.current_task()
        assert task is not None
        self.tasks.append(task)
        self.peers.append(peer)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, TimeoutError, ssl.SSLError):
                await self.talks[min(len(self.peers), len(self.talks)) - 1](peer)
        except AssertionError as error:
            self.bugs.append(error)
        finally:
            peer.writer.close()
            with suppress(ConnectionError, ssl.SSLError, TimeoutError):
                await peer.writer.wait_closed()

    async def __aenter__(self) -> Rogue:
        if self.path is None:
            self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**22)
            self.address = f"127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        else:
            self.server = await asyncio.start_unix_server(self._serve, self.path)
            self.address = f"unix:{self.path}"
        return self

    async def __aexit__(self, kind: object, *rest: object) -> None:
        self.server.close()
        for peer in self.peers:
            peer.writer.close()
        await self.server.wait_closed()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        if kind is None and self.bugs:
            raise self.bugs[0]

    def heard(self, start: str) -> int:
        return sum(line.startswith(start) for peer in self.peers for line in peer.heard)


async def good(peer: Peer) -> None:
    """Offers PIPELINING and CHUNKING and takes everything."""
    await peer.hello("PIPELINING", "CHUNKING")
    await takes(peer)


async def takes(peer: Peer) -> None:
    while True:
        line = await peer.hear()
        if line.startswith("QUIT"):
            await peer.say("221 bye")
            return
        if line.startswith("BDAT"):
            await peer.reader.readexactly(int(line.split()[1]))
        await peer.say("250 2.0.0 ok")


async def endless_reply_at_once(peer: Peer) -> None:
    for _ in range(100):
        await peer.say(*["220-line"] * 1000)
    await peer.say("220 end")
    await takes(peer)


async def endless_reply_to_content(peer: Peer) -> None:
    await peer.hello("PIPELINING", "CHUNKING")
    await peer.envelope()
    await peer.chunk()
    for _ in range(100):
        await peer.say(*["250-line"] * 1000)
    await peer.say("250 end")


async def line_of_2_mib_at_once(peer: Peer) -> None:
    await peer.say("220 " + "x" * 2**21)
    await takes(peer)


async def line_of_2_mib_to_content(peer: Peer) -> None:
    await peer.hello("PIPELINING", "CHUNKING")
    await peer.envelope()
    await peer.chunk()
    await peer.say("250 " + "x" * 2**21)


async def no_line_at_all(peer: Peer) -> None:
    while True:
        peer.writer.write(b"x" * 65536)
        await peer.writer.drain()


async def bare_lf_at_once(peer: Peer) -> None:
    peer.writer.write(b"220 hi\n")
    await takes(peer)


async def bare_lf_to_content(peer: Peer) -> None:
    await peer.hello("PIPELINING", "CHUNKING")
    await peer.envelope()
    await peer.chunk()
    peer.writer.write(b"250 taken\n")
    await peer.silence()


async def code_changes(peer: Peer) -> None:
    await peer.hello("PIPELINING", "CHUNKING")
    await peer.envelope()
    await peer.chunk()
    await peer.say("250-taken", "550 or not")
    await peer.silence()


async def answers_before_the_dot(peer: Peer) -> None:
    await peer.hello("PIPELINING")
    await peer.envelope()
    await peer.hear("DATA")
    await peer.say("354 go", "250 taken")
    await peer.silence()


async def goodbye_as_greeting(peer: Peer) -> None:
    await peer.say("421 4.3.2 no")
    await peer.silence()


async def goodbye_to_mail(peer: Peer) -> None:
    await peer.hello("PIPELINING", "CHUNKING")
    await peer.hear("MAIL ")
    await peer.say("421 4.3.2 no")
    await peer.silence()


async def goodbye_to_content(peer: Peer) -> None:
    await peer.hello("PIPELINING", "CHUNKING")
    await peer.envelope()
    await peer.chunk()
    await peer.say("421 4.3.2 no")
    await peer.silence()


async def injects_behind_starttls(peer: Peer) -> None:
    await peer.hello("PIPELINING", "STARTTLS")
    await peer.hear("STARTTLS")
    await peer.say("220 go", "250 2.0.0 taken")
    await takes(peer)


async def talks_on_instead_of_a_handshake(peer: Peer) -> None:
    await peer.hello("PIPELINING", "STARTTLS")
    await peer.hear("STARTTLS")
    await peer.say("220 go")
    await peer.reader.read(1)
    await peer.say("250 no handshake")
    await takes(peer)


async def never_shakes_hands(peer: Peer) -> None:
    await peer.hello("PIPELINING", "STARTTLS")
    await peer.hear("STARTTLS")
    await peer.say("220 go")
    await peer.silence()


async def silent_from_the_start(peer: Peer) -> None:
    await peer.silence()


async def silent_after_ehlo(peer: Peer) -> None:
    await peer.say("220 hi")
    await peer.silence()


async def silent_after_the_envelope(peer: Peer) -> None:
    await peer.hello("PIPELINING")
    await peer.envelope()
    await peer.silence()


async def silent_after_the_content(peer: Peer) -> None:
    await peer.hello("PIPELINING", "CHUNKING")
    await peer.envelope()
    await peer.silence()


async def half_a_reply_to_content(peer: Peer) -> None:
    await peer.hello("PIPELINING", "CHUNKING")
    await peer.envelope()
    await peer.chunk()
    peer.writer.write(b"250 take")
    await peer.silence()


async def half_a_reply_then_the_end(peer: Peer) -> None:
    await peer.hello("PIPELINING", "CHUNKING")
    await peer.envelope()
    await peer.chunk()
    peer.writer.write(b"250 take")
    await peer.writer.drain()


async def drips_for_ever(peer: Peer) -> None:
    await peer.hello("PIPELINING", "CHUNKING")
    await peer.envelope()
    await peer.chunk()
    while True:
        await peer.say("250-not yet")
        await asyncio.sleep(0.02)


async def resets_at_once(peer: Peer) -> None:
    peer.reset()


async def resets_after_the_envelope(peer: Peer) -> None:
    await peer.hello("PIPELINING")
    await peer.envelope()
    peer.reset()


async def resets_after_the_content(peer: Peer) -> None:
    await peer.hello("PIPELINING", "CHUNKING")
    await peer.envelope()
    await peer.chunk()
    peer.reset()


async def answers_everything_twice(peer: Peer) -> None:
    await peer.hello("PIPELINING", "CHUNKING")
    await peer.hear("MAIL ")
    await peer.hear("RCPT ")
    await peer.chunk()
    await peer.say("250 MAIL", "250 MAIL", "250 RCPT", "250 RCPT", "554 content", "554 content")
    await peer.silence()


async def answers_with_354(peer: Peer) -> None:
    await peer.hello("PIPELINING", "CHUNKING")
    await peer.hear("MAIL ")
    await peer.hear("RCPT ")
    await peer.chunk()
    await peer.say("354 go", "354 go", "354 go")
    await peer.silence()


async def answers_with_no_code(peer: Peer) -> None:
    await peer.hello("PIPELINING", "CHUNKING")
    await peer.envelope()
    await peer.chunk()
    await peer.say("2500 taken", "OK taken", "999 taken")
    await peer.silence()


async def is_a_web_server(peer: Peer) -> None:
    await peer.say("HTTP/1.1 400 Bad Request", "Connection: close", "", "<html>")


async def is_noise(peer: Peer) -> None:
    peer.writer.write(os.urandom(4096).replace(b"\n", b"x") + b"\n")
    await peer.silence()


UPSTREAMS: list[Talk] = [
    endless_reply_at_once,
    endless_reply_to_content,
    line_of_2_mib_at_once,
    line_of_2_mib_to_content,
    no_line_at_all,
    bare_lf_at_once,
    bare_lf_to_content,
    code_changes,
    answers_before_the_dot,
    goodbye_as_greeting,
    goodbye_to_mail,
    goodbye_to_content,
    injects_behind_starttls,
    talks_on_instead_of_a_handshake,
    never_shakes_hands,
    silent_from_the_start,
    silent_after_ehlo,
    silent_after_the_envelope,
    silent_after_the_content,
    half_a_reply_to_content,
    half_a_reply_then_the_end,
    drips_for_ever,
    resets_at_once,
    resets_after_the_envelope,
    resets_after_the_content,
    answers_everything_twice,
    answers_with_354,
    answers_with_no_code,
    is_a_web_server,
    is_noise,
]
