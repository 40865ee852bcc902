"""The listener over real sockets: limits, deadlines, back-pressure, the end. A1–A3, P1, F10 of
the reference; what is said about commands is the session's test."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from gateway import listener as module
from gateway.contracts import Answer, Question, Transaction, Verdict
from gateway.listener import Admission, Listener, SessionIds
from gateway.net.sockets import bind, plain, spoken
from gateway.reply import Reply
from gateway.route import Route, Routes
from gateway.smtp.server import Rules

from ..loops import on_both_loops, until

OK = Reply(250, "2.0.0", "taken")


@dataclass
class Bounds:
    connections: int = 100
    connections_per_client: int = 100
    command_timeout: float = 60.0
    data_timeout: float = 60.0
    idle_timeout: float = 60.0
    handshake_timeout: float = 60.0
    minimum_rate: int = 0


class Told:
    """An Observer that remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def event(self, name: str, /, **fields: Any) -> None:
        self.tell(name, fields)

    def tell(self, event: str, fields: dict[str, Any]) -> None:
        self.events.append((event, fields))

    def named(self, name: str) -> list[dict[str, Any]]:
        return [fields for found, fields in self.events if found == name]


class Mail:
    """A Draft that keeps what it is given."""

    def __init__(self, transaction: Transaction, drained: Callable[[], None]) -> None:
        self.transaction = transaction
        self.drained = drained
        self.pieces: list[bytes] = []
        self.full = False
        self.answer: Answer | None = None
        self.aborted = False

    def write(self, octets: bytes) -> None:
        self.pieces.append(octets)

    def finish(self, answer: Answer) -> None:
        self.answer = answer

    def abort(self) -> None:
        self.aborted = True

    def say(self, reply: Reply | None) -> None:
        assert self.answer is not None
        self.answer(reply)


@dataclass
class Inbox:
    """An Intake whose answers the test gives, or ``reply`` at once."""

    reply: Reply | None = OK
    mails: list[Mail] = field(default_factory=list)
    asked: list[Question] = field(default_factory=list)
    verdicts: list[Callable[[Verdict], None]] = field(default_factory=list)

    def begin(self, transaction: Transaction, drained: Callable[[], None]) -> Mail:
        inbox = self

        class Now(Mail):
            def finish(self, answer: Answer) -> None:
                super().finish(answer)
                if inbox.reply is not None:
                    answer(inbox.reply)

        self.mails.append(Now(transaction, drained))
        return self.mails[-1]

    def ask(self, question: Question, checks: Sequence[str], answer: Callable[[Verdict], None]) -> None:
        self.asked.append(question)
        self.verdicts.append(answer)


@dataclass
class House:
    listener: Listener
    inbox: Inbox
    told: Told
    bounds: Bounds
    port: int
    clients: list[Dialled] = field(default_factory=list)

    async def dial(self, sock: socket.socket | None = None) -> Dialled:
        """A client, on this socket if there is one already."""
        if sock is None:
            client = Dialled(*await asyncio.open_connection("127.0.0.1", self.port))
        else:
            client = Dialled(*await asyncio.open_connection(sock=sock))
        self.clients.append(client)
        return client

    async def empty(self) -> None:
        await asyncio.wait_for(self.listener.gone(), 30)


class Dialled:
    """A client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def line(self) -> bytes:
        return await asyncio.wait_for(self.reader.readline(), 30)

    async def say(self, *lines: bytes) -> list[bytes]:
        """Each line, and the first line of its reply after it; a reply of several lines is read over."""
        replies = []
        for line in lines:
            self.writer.write(line + b"\r\n")
            replies.append(await self.reply())
        return replies

    async def reply(self) -> bytes:
        line = first = await self.line()
        while line[3:4] == b"-":
            line = await self.line()
        return first

    async def rest(self) -> bytes:
        return await asyncio.wait_for(self.reader.read(), 30)

    async def hello(self) -> None:
        assert (await self.line()).startswith(b"220 ")
        assert (await self.say(b"EHLO me.example"))[0].startswith(b"250")

    async def to_content(self) -> None:
        await self.hello()
        replies = await self.say(b"MAIL FROM:<a@me.example>", b"RCPT TO:<b@here.example>", b"DATA")
        assert [reply[:3] for reply in replies] == [b"250", b"250", b"354"]

    def reset(self) -> None:
        """RST instead of FIN."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()


@asynccontextmanager
async def house(bounds: Bounds | None = None, inbox: Inbox | None = None, **rules: Any) -> AsyncIterator[House]:
    bounds = bounds or Bounds()
    inbox = inbox or Inbox()
    told = Told()
    sock = bind("127.0.0.1", 0)
    routes = Routes([Route(("*@here.example",), ("app",))], "mx.example")
    listener = Listener(
        sock,
        Rules("mx.example", routes, **rules),
        inbox,
        observer=told,
        admission=Admission(bounds),
        session_ids=SessionIds(),
    )
    listener.start()
    here = House(listener, inbox, told, bounds, sock.getsockname()[1])
    try:
        yield here
    finally:
        for client in here.clients:
            client.writer.transport.abort()
        listener.close()
        await asyncio.wait_for(listener.gone(), 30)
        assert listener.admission.count == 0


class Between:
    """A protocol between the transport and a Connection: sees every read before it, and every write after it."""

    def __init__(self, connection: asyncio.Protocol, before: Callable[[bytes], None]) -> None:
        self._connection = connection
        self._before = before
        self.writes: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def connection_made(self, transport: Any) -> None:
        writes = self.writes

        class Seen:
            def __getattr__(self, name: str) -> Any:
                return getattr(transport, name)

            def write(self, octets: bytes) -> None:
                writes.append(octets)
                transport.write(octets)

        self._connection.connection_made(cast(asyncio.Transport, Seen()))

    def data_received(self, data: bytes) -> None:
        self._before(data)
        self._connection.data_received(data)


def watch(listener: Listener, patch: pytest.MonkeyPatch, before: Callable[[bytes], None]) -> list[Between]:
    """From now on this listener's connections have somebody between."""
    seen: list[Between] = []
    accepted = listener.loop.connect_accepted_socket

    async def connect(factory: Callable[[], asyncio.Protocol], sock: socket.socket) -> Any:
        seen.append(Between(factory(), before))
        return await accepted(lambda: cast(asyncio.Protocol, seen[-1]), sock)

    patch.setattr(listener.loop, "connect_accepted_socket", connect)
    return seen


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines are looked at more often than once a second."""
    monkeypatch.setattr(module, "SWEEP", 0.02)


# ------------------------------------------------------------------ one mail


@on_both_loops
async def test_a_mail_comes_through() -> None:
    async with house() as here:
        client = await here.dial()
        await client.to_content()
        replies = await client.say(b"Subject: x\r\n\r\n..dot\r\n.")
        assert replies == [b"250 2.0.0 taken\r\n"]
        assert await client.say(b"QUIT") == [b"221 2.0.0 closing the connection\r\n"]
        assert await client.rest() == b""
        (mail,) = here.inbox.mails
        assert b"".join(mail.pieces) == b"Subject: x\r\n\r\n.dot\r\n"
        (connected,) = here.told.named("connected")
        assert connected["client"] == "127.0.0.1"
        assert connected["listener"] == f"127.0.0.1:{here.port}"
        assert mail.transaction.session == connected["session"]
        await client.close()
        await here.empty()


@on_both_loops
async def test_clean_content_is_the_very_object_that_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the transport to the draft nothing is copied."""
    reads: list[bytes] = []
    async with house() as here:
        watch(here.listener, monkeypatch, reads.append)
        client = await here.dial()
        await client.to_content()
        (mail,) = here.inbox.mails
        content = b"Subject: x\r\n\r\n" + b"a line without a dot\r\n" * 200
        client.writer.write(content)
        await until(lambda: sum(map(len, mail.pieces)) == len(content))
        assert all(any(piece is read for read in reads) for piece in mail.pieces)
        assert await client.say(b".") == [b"250 2.0.0 taken\r\n"]
        assert b"".join(mail.pieces) == content


@on_both_loops
async def test_one_write_answers_a_pipelined_group(monkeypatch: pytest.MonkeyPatch) -> None:
    async with house() as here:
        seen = watch(here.listener, monkeypatch, lambda data: None)
        client = await here.dial()
        await client.hello()
        (connection,) = seen
        connection.writes.clear()
        client.writer.write(b"MAIL FROM:<a@me.example>\r\nRCPT TO:<b@here.example>\r\nRCPT TO:<c@here.example>\r\nDATA\r\n")
        for code in (b"250", b"250", b"250", b"354"):
            assert (await client.line()).startswith(code)
        assert len(connection.writes) == 1


@on_both_loops
async def test_answers_that_come_late_leave_in_order() -> None:
    async with house(inbox=Inbox(reply=None)) as here:
        client = await here.dial()
        await client.hello()
        for _ in range(2):
            client.writer.write(b"MAIL FROM:<a@me.example>\r\nRCPT TO:<b@here.example>\r\nBDAT 3 LAST\r\nx\r\n")
        for _ in range(2):
            await client.line()
        await until(lambda: len(here.inbox.mails) == 2 and here.inbox.mails[1].answer is not None)
        first, second = here.inbox.mails
        second.say(Reply(250, "2.0.0", "second"))
        await asyncio.sleep(0.05)
        first.say(Reply(250, "2.0.0", "first"))
        texts = [await client.line() for _ in range(4)]
        assert texts[0] == b"250 2.0.0 first\r\n"
        assert texts[3] == b"250 2.0.0 second\r\n"


@on_both_loops
async def test_what_is_owed_goes_out_after_the_client_stopped_sending() -> None:
    async with house(inbox=Inbox(reply=None)) as here:
        client = await here.dial()
        await client.to_content()
        client.writer.write(b"x\r\n.\r\n")
        client.writer.write_eof()
        await until(lambda: here.inbox.mails[0].answer)
        await asyncio.sleep(0.05)
        here.inbox.mails[0].say(OK)
        assert await client.rest() == OK.wire
        await here.empty()
        assert not here.inbox.mails[0].aborted


# ------------------------------------------------------------------- the checks


@on_both_loops
async def test_a_check_is_waited_for_and_reading_stops_meanwhile() -> None:
    async with house(sender_checks=("policy",)) as here:
        client = await here.dial()
        await client.hello()
        client.writer.write(b"MAIL FROM:<a@me.example>\r\nRCPT TO:<b@here.example>\r\n")
        await until(lambda: here.inbox.asked)
        client.writer.write(b"RSET\r\n")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.reader.readline(), 0.1)
        here.inbox.verdicts[0](Verdict())
        assert [(await client.line())[:3] for _ in range(3)] == [b"250"] * 3


@on_both_loops
async def test_a_client_check_comes_before_the_greeting() -> None:
    async with house(client_checks=("policy",)) as here:
        client = await here.dial()
        await until(lambda: here.inbox.asked)
        here.inbox.verdicts[0](Verdict(Reply(554, "5.7.1", "not you")))
        assert await client.line() == b"554 5.7.1 not you\r\n"
        assert here.told.named("refused")[0]["stage"] == "connect"


@on_both_loops
async def test_whoever_talks_while_the_greeting_waits_is_turned_away() -> None:
    """P1."""
    async with house(client_checks=("policy",)) as here:
        client = await here.dial()
        await until(lambda: here.inbox.asked)
        client.writer.write(b"EHLO me.example\r\n")
        assert (await client.rest()).startswith(b"554 5.5.0 ")
        await client.close()
        await here.empty()
        here.inbox.verdicts[0](Verdict())  # too late: nobody is there


# ------------------------------------------------------------------ early, gone


@on_both_loops
async def test_octets_before_the_greeting() -> None:
    """P1: they wait in the socket when the connection is taken."""
    async with house() as here:
        sock = socket.create_connection(("127.0.0.1", here.port))
        sock.sendall(b"EHLO me.example\r\nMAIL FROM:<a@me.example>\r\n")
        client = await here.dial(sock)
        told = await client.rest()
        assert told.startswith(b"554 5.5.0 ")
        assert told.count(b"\r\n") == 1


@pytest.mark.parametrize("how", ["eof", "reset"])
@pytest.mark.parametrize("wire", [b"DATA\r\n", b"BDAT 1000\r\nSubject: x\r\n"])
@on_both_loops
async def test_the_client_goes_in_the_middle_of_content(how: str, wire: bytes) -> None:
    """F10: no mail, no reply, no trace left."""
    async with house() as here:
        client = await here.dial()
        await client.hello()
        await client.say(b"MAIL FROM:<a@me.example>", b"RCPT TO:<b@here.example>")
        client.writer.write(wire)
        await until(lambda: here.inbox.mails)
        client.writer.write(b"Subject: half\r\n")
        await client.writer.drain()
        await asyncio.sleep(0.05)
        if how == "eof":
            await client.close()
        else:
            client.reset()
        await here.empty()
        (mail,) = here.inbox.mails
        assert mail.aborted
        assert mail.answer is None
        assert not here.told.named("bug")


@on_both_loops
async def test_the_client_goes_while_an_answer_is_owed() -> None:
    async with house(inbox=Inbox(reply=None)) as here:
        client = await here.dial()
        await client.to_content()
        client.writer.write(b"x\r\n.\r\n")
        await until(lambda: here.inbox.mails[0].answer)
        client.reset()
        await here.empty()
        assert here.inbox.mails[0].aborted
        here.inbox.mails[0].say(OK)  # nobody is there to hear it
        assert not here.told.named("bug")


# --------------------------------------------------------------------- limits


@on_both_loops
async def test_more_connections_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A2."""
    async with house(Bounds(connections=2)) as here:
        clients = [await here.dial() for _ in range(2)]
        for client in clients:
            assert (await client.line()).startswith(b"220 ")
        third = await here.dial()
        assert await third.rest() == module.TOO_MANY.wire
        (shed,) = here.told.named("shed")
        assert shed["reason"] == module.TOO_MANY.text
        await clients[0].close()
        await until(lambda: here.listener.admission.count < 2)
        assert (await (await here.dial()).line()).startswith(b"220 ")


@on_both_loops
async def test_loopback_is_not_counted_by_client() -> None:
    async with house(Bounds(connections_per_client=1)) as here:
        for _ in range(3):
            assert (await (await here.dial()).line()).startswith(b"220 ")


def test_connections_are_counted_by_client() -> None:
    admission = Admission(Bounds(connections_per_client=2))
    assert admission.enter("192.0.2.1") is None
    assert admission.enter("192.0.2.1") is None
    assert admission.enter("192.0.2.1") is module.TOO_MANY_OF_YOURS
    assert admission.enter("192.0.2.2") is None
    admission.leave("192.0.2.1")
    assert admission.enter("192.0.2.1") is None
    # One customer has a whole /64.
    assert admission.enter("2001:db8::1") is None
    assert admission.enter("2001:db8::2:1") is None
    assert admission.enter("2001:db8::3:1") is module.TOO_MANY_OF_YOURS
    assert admission.enter("2001:db8:0:1::1") is None
    assert admission.count == 6
    for ip in ("192.0.2.1", "192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::9", "2001:db8:0:1::2"):
        admission.leave(ip)
    assert admission.count == 0
    assert admission._clients == {}


def test_descriptors_bound_the_room() -> None:
    assert Admission(Bounds(connections=100), 10).room == 10
    assert Admission(Bounds(connections=10), 100).room == 10


@on_both_loops
async def test_no_descriptor_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A2: the client hears why, and accepting rests instead of spinning."""
    calls = 0

    class Poor:
        """The listening socket of a process that is out of descriptors, but for the spare one."""

        def __init__(self, sock: socket.socket) -> None:
            self.sock = sock
            self.poor = True

        def accept(self) -> Any:
            nonlocal calls
            calls += 1
            if self.poor and here.listener._spare is not None and not spent():
                raise OSError(errno.EMFILE, "Too many open files")
            return self.sock.accept()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.sock, name)

    def spent() -> bool:
        # The spare descriptor was given up: its number is free.
        try:
            os.fstat(-1 if here.listener._spare is None else here.listener._spare)
        except OSError:
            return True
        return False

    async with house() as here:
        poor = Poor(here.listener.sock)
        here.listener.sock = poor  # type: ignore[assignment]
        monkeypatch.setattr(module, "LONGEST_REST", 3600.0)
        here.listener._rest = 1800.0  # the next is twice as long: longer than whatever holds this test up
        client = await here.dial()
        assert await client.rest() == module.NO_MEANS.wire
        assert here.told.named("shed")[0]["reason"].startswith("cannot accept: ")
        before = calls
        second = await here.dial()
        await asyncio.sleep(0.03)
        assert calls == before
        poor.poor = False
        assert here.listener._resting is not None
        here.listener._resting.cancel()
        here.listener._rested()  # what the timer does
        assert (await second.line()).startswith(b"220 ")


# ------------------------------------------------------------------- deadlines


@on_both_loops
async def test_silence_between_commands(fast: None) -> None:
    async with house() as here:
        client = await here.dial()
        await client.hello()
        here.bounds.idle_timeout = 0.2
        assert await client.rest() == module.TIMED_OUT.wire
        assert here.told.named("refused")[-1]["code"] == 421


@on_both_loops
async def test_a_command_that_drips(fast: None) -> None:
    """A3: every octet is fresh, the command is late all the same."""
    async with house() as here:
        client = await here.dial()
        await client.hello()
        here.bounds.command_timeout = 0.3

        async def drip() -> None:
            while True:
                client.writer.write(b"N")
                await asyncio.sleep(0.02)

        task = asyncio.create_task(drip())
        assert await client.rest() == module.TIMED_OUT.wire
        task.cancel()


@on_both_loops
async def test_an_end_of_data_that_never_comes(fast: None) -> None:
    """F7."""
    async with house() as here:
        client = await here.dial()
        await client.to_content()
        here.bounds.data_timeout = 0.2
        client.writer.write(b"Subject: x\r\n\r\nbody\n.\n")
        assert await client.rest() == module.TIMED_OUT.wire
        await client.close()
        await here.empty()
        assert here.inbox.mails[0].aborted


@on_both_loops
async def test_content_that_drips(fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A3: under the least rate once the grace is over."""
    async with house(Bounds(minimum_rate=500)) as here:
        client = await here.dial()
        began = asyncio.get_running_loop().time()
        await client.to_content()

        async def drip() -> None:
            while True:
                client.writer.write(b"x")
                await asyncio.sleep(0.02)

        task = asyncio.create_task(drip())
        await until(lambda: here.inbox.mails[0].pieces)
        monkeypatch.setattr(module, "RATE_GRACE", 0.2)
        assert await client.rest() == module.TIMED_OUT.wire
        task.cancel()
        assert asyncio.get_running_loop().time() - began > 0.19, "the grace is over"
        # Less than ten, where the loop itself was late.
        assert 1 <= len(b"".join(here.inbox.mails[0].pieces)) < 100


@on_both_loops
async def test_content_that_came_fast_may_pause(fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    async with house(Bounds(minimum_rate=500)) as here:
        client = await here.dial()
        await client.to_content()
        # Paid for minutes, of which data_timeout leaves one.
        content = (b"x" * 998 + b"\r\n") * 200
        client.writer.write(content)
        await until(lambda: sum(map(len, here.inbox.mails[0].pieces)) == len(content))
        monkeypatch.setattr(module, "RATE_GRACE", 0.05)
        await asyncio.sleep(0.3)
        assert await client.say(b".") == [OK.wire]


@on_both_loops
async def test_our_own_delay_is_not_the_clients(fast: None) -> None:
    async with house(inbox=Inbox(reply=None)) as here:
        client = await here.dial()
        await client.to_content()
        client.writer.write(b"x\r\n.\r\n")
        (mail,) = here.inbox.mails
        await until(lambda: mail.answer is not None)
        here.bounds.idle_timeout = here.bounds.command_timeout = here.bounds.data_timeout = 0.1
        await asyncio.sleep(0.4)
        here.bounds.idle_timeout = here.bounds.command_timeout = here.bounds.data_timeout = 60.0
        mail.say(OK)
        assert await client.line() == OK.wire
        assert await client.say(b"NOOP") == [b"250 2.0.0 OK\r\n"]
        here.bounds.idle_timeout = 0.1
        assert await client.rest() == module.TIMED_OUT.wire


@on_both_loops
async def test_under_stress_time_outs_are_short(fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A2."""
    async with house(Bounds(connections=2)) as here:
        alone = await here.dial()
        await alone.hello()
        with monkeypatch.context() as patch:
            patch.setattr(module, "STRESS_TIMEOUT", 0.1)
            await asyncio.sleep(0.25)
            assert await alone.say(b"NOOP") == [b"250 2.0.0 OK\r\n"]
        other = await here.dial()
        await other.hello()
        monkeypatch.setattr(module, "STRESS_TIMEOUT", 0.1)
        assert await other.rest() == module.TIMED_OUT.wire


@on_both_loops
async def test_a_client_that_does_not_read(fast: None) -> None:
    """Back-pressure: what it asks is read no further than its replies go, and then it is cut."""
    async with house() as here:
        # So that the kernel does not hold megabytes between the two.
        here.listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", here.port))
        client = await here.dial(sock)
        await client.hello()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        (connection,) = here.listener.connections
        transport = connection._transport
        # Refused recipients are no errors, and each is a reply.
        client.writer.write(b"MAIL FROM:<a@me.example>\r\n")
        for _ in range(200):
            client.writer.write(b"RCPT TO:<nobody@else.example>\r\n" * 200)
        await until(lambda: connection._stuck)
        assert connection._stopped
        assert transport.get_write_buffer_size() < 512 * 1024
        here.bounds.command_timeout = 0.3
        await here.empty()
        client.reset()


# ---------------------------------------------------------------- back-pressure


@on_both_loops
async def test_each_pipelined_mail_counts_its_own_octets() -> None:
    """Small ones are not taken for one large content: its acknowledgements, and its rate, are another matter."""
    async with house() as here:
        client = await here.dial()
        await client.to_content()
        (connection,) = here.listener.connections
        group = b"x" * 998 + b"\r\n.\r\nMAIL FROM:<a@me.example>\r\nRCPT TO:<b@here.example>\r\nDATA\r\n"
        for _ in range(20):
            client.writer.write(group)
            for code in (b"250", b"250", b"250", b"354"):
                assert (await client.line()).startswith(code)
        assert connection._octets <= len(group)
        assert await client.say(b".") == [OK.wire]


@on_both_loops
async def test_a_full_draft_stops_reading() -> None:
    async with house() as here:
        client = await here.dial()
        await client.to_content()
        (mail,) = here.inbox.mails
        mail.full = True
        # Far more than a read and what sockets hold.
        line = b"x" * 998 + b"\r\n"
        for _ in range(20_000):
            client.writer.write(line)
        (connection,) = here.listener.connections
        await until(lambda: connection._stopped)
        await asyncio.sleep(0.1)
        held = sum(map(len, mail.pieces))
        assert held <= 2 * 1024 * 1024
        mail.full = False
        mail.drained()
        assert await client.say(b".") == [OK.wire]
        assert b"".join(mail.pieces) == line * 20_000


@on_both_loops
async def test_thousands_of_pipelined_commands_leave_turns_to_others() -> None:
    async with house() as here:
        busy, other = await here.dial(), await here.dial()
        await busy.hello()
        await other.hello()
        busy.writer.write(b"MAIL FROM:<a@me.example>\r\n" + b"RCPT TO:<nobody@else.example>\r\n" * 6000)
        assert await other.say(b"NOOP") == [b"250 2.0.0 OK\r\n"]
        assert (await busy.line()).startswith(b"250")
        for _ in range(6000):
            assert (await busy.line()).startswith(b"550 5.7.1 ")


@on_both_loops
async def test_the_tarpit_holds_one_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[tuple[float, Callable[[], object]]] = []

    async with house() as here:
        later = here.listener.loop.call_later

        def call_later(seconds: float, callback: Callable[..., object], *rest: Any, **more: Any) -> asyncio.TimerHandle:
            """The end of a tarpit comes when the test says so."""
            if getattr(callback, "__name__", "") == "_proceed":
                held.append((seconds, callback))
                seconds = 3600.0
            return later(seconds, callback, *rest, **more)

        monkeypatch.setattr(here.listener.loop, "call_later", call_later)
        bad, good = await here.dial(), await here.dial()
        await bad.hello()
        await good.hello()
        await bad.say(*[b"WHAT"] * 10)
        assert not held
        bad.writer.write(b"WHAT\r\n")
        answered = asyncio.ensure_future(bad.line())
        await until(lambda: held)
        assert await good.say(b"NOOP") == [b"250 2.0.0 OK\r\n"]
        await asyncio.sleep(0.05)
        assert not answered.done()
        ((seconds, proceed),) = held
        assert seconds == 1.0
        proceed()
        assert (await answered).startswith(b"500 ")


# ------------------------------------------------------------------------- bugs


@on_both_loops
async def test_a_bug_before_the_end_of_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Inbox, transaction: Transaction, drained: Callable[[], None]) -> Mail:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(Inbox, "begin", broken)
    async with house() as here:
        client = await here.dial()
        await client.hello()
        client.writer.write(b"MAIL FROM:<a@me.example>\r\nRCPT TO:<b@here.example>\r\nDATA\r\n")
        assert (await client.rest()).endswith(module.BUG.wire)
        (bug,) = here.told.named("bug")
        assert bug["message"] == "ZeroDivisionError: a fault of ours"
        assert "broken" in bug["traceback"]


@on_both_loops
async def test_a_bug_before_anything_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise ZeroDivisionError("a fault of ours")

    async with house() as here:
        monkeypatch.setattr(here.listener, "session_ids", broken)
        client = await here.dial()
        assert await client.rest() == b""
        assert here.told.named("bug")[0]["message"] == "accepting: ZeroDivisionError('a fault of ours')"
        await until(lambda: here.listener.admission.count == 0)


@on_both_loops
async def test_a_bug_after_the_end_of_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The truth is not known: no word, and the mail itself goes its way."""

    def broken(self: Mail, answer: Answer) -> None:
        raise ZeroDivisionError("a fault of ours")

    async with house() as here:
        client = await here.dial()
        await client.to_content()
        here.inbox.mails[0].finish = broken.__get__(here.inbox.mails[0])  # type: ignore[method-assign]
        client.writer.write(b"x\r\n.\r\n")
        assert await client.rest() == b""
        assert len(here.told.named("bug")) == 1


@on_both_loops
async def test_an_answer_that_nobody_knows_is_a_bare_close() -> None:
    async with house(inbox=Inbox(reply=None)) as here:
        client = await here.dial()
        await client.to_content()
        client.writer.write(b"x\r\n.\r\n")
        (mail,) = here.inbox.mails
        await until(lambda: mail.answer is not None)
        mail.say(None)
        assert await client.rest() == b""
        assert not here.told.named("bug")


# ---------------------------------------------------------------------- the end


@on_both_loops
async def test_draining() -> None:
    """No new connection; before the end of data 421; after it the answer, then the end."""
    async with house(inbox=Inbox(reply=None)) as here:
        idle, midway, owed = [await here.dial() for _ in range(3)]
        await idle.hello()
        await midway.to_content()
        midway.writer.write(b"half a line")
        await owed.to_content()
        owed.writer.write(b"x\r\n.\r\n")
        await until(lambda: here.inbox.mails[1].answer is not None)
        here.listener.drain()
        assert await idle.rest() == module.SHUTTING_DOWN.wire
        assert await midway.rest() == module.SHUTTING_DOWN.wire
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(owed.reader.readline(), 0.1)
        with pytest.raises(ConnectionRefusedError):
            await here.dial()
        here.inbox.mails[1].say(OK)
        assert await owed.rest() == OK.wire + module.SHUTTING_DOWN.wire
        for client in (idle, midway, owed):
            await client.close()
        await here.empty()
        assert here.inbox.mails[0].aborted


@on_both_loops
async def test_whoever_waits_to_be_let_in_hears_of_the_end() -> None:
    async with house() as here:
        # The kernel has taken it, we have not come to it.
        with socket.create_connection(("127.0.0.1", here.port), timeout=30) as sock:
            here.listener.drain()
            assert sock.recv(100) == module.SHUTTING_DOWN.wire


@on_both_loops
async def test_our_last_reply_is_not_lost_in_a_reset() -> None:
    """A client that goes on sending still reads why it was turned away."""
    async with house() as here:
        client = await here.dial()
        await client.line()
        client.writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n" + b"Cookie: " + b"x" * 200_000 + b"\r\n\r\n")
        await asyncio.sleep(0.2)
        assert (await client.rest())[:4] in (b"554 ", b"221 ")


@on_both_loops
async def test_a_closed_connection_does_not_stay(fast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINGER", 0.1)
    async with house() as here:
        client = await here.dial()
        await client.hello()
        await client.say(b"QUIT")
        await here.empty()  # though the client never hangs up
        await client.close()


@on_both_loops
async def test_whoever_sends_on_after_the_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINGER_OCTETS", 1000)
    async with house() as here:
        client = await here.dial()
        await client.hello()
        await client.say(b"QUIT")
        client.writer.write(b"x" * 100_000)
        await here.empty()
        await client.close()


# -------------------------------------------------------------------- addresses


def test_addresses_as_they_are_told() -> None:
    assert spoken(("127.0.0.1", 25)) == "127.0.0.1:25"
    assert spoken(("::1", 25, 0, 0)) == "[::1]:25"
    assert plain("::ffff:192.0.2.1") == "192.0.2.1"
    assert plain("fe80::1%eth0") == "fe80::1"
    assert plain("2001:db8::1") == "2001:db8::1"


def test_binding() -> None:
    with bind("localhost", 0) as sock:
        assert sock.getsockname()[0] == "127.0.0.1"
        assert not sock.getblocking()
        with pytest.raises(OSError, match="already in use"):
            bind("127.0.0.1", sock.getsockname()[1])


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 on this machine")
def test_ipv6_stands_beside_ipv4() -> None:
    faults: list[OSError] = []
    for _ in range(50):
        try:
            six = bind("::", 0)
        except OSError:
            pytest.skip("no IPv6 on this machine")
        with six:
            # Free for IPv6 is not yet free for IPv4: another port, where somebody has it.
            try:
                bind("0.0.0.0", six.getsockname()[1]).close()
            except OSError as fault:
                faults.append(fault)
            else:
                return
    pytest.fail(f"of 50 ports none for both: {faults}")


def test_session_ids_are_short_and_differ() -> None:
    ids = SessionIds()
    assert len({ids() for _ in range(1000)}) == 1000
    assert ids()[:10] != SessionIds()()[:10]
