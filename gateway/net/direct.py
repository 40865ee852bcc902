"""HTTP/1.1 POST with no library between the request and the socket: ``client = "direct"``.

Owns connections and what is said on them: one request at a time each, kept alive, at most ``connections``
out. An answer's octets are httptools' to take apart (llhttp, the parser of Node.js); what counts as an
answer is said here. Behind ``http.HttpClient``, whose invariants hold; ``begin`` is the same without a task.

Connections. The one that was used last is used again; one that rested for IDLE seconds, or as long as its
``Keep-Alive: timeout`` less a second, is closed instead, because receivers close such ones on their own.
One that said anything, or ended, while nothing was asked of it is never used again. A request leaves at the
end of the loop's turn; what comes before that is no answer either, and another connection carries it: the sockets themselves are
asked right before, all of one turn at once, because what a loop that was busy has not read yet would be taken for the answer. What
is still on its way then, nobody can know. Nothing is sent a second time: once a request has begun to leave, nobody
can prove that it was not carried out.

An answer is early if part of the request has not left us, or if more than UNACKNOWLEDGED octets have left that
the far system has not acknowledged (the kernel says so on Linux; elsewhere what lies in its send buffer, often
megabytes, counts as sent). So an answer that is not early says that all but the last 64 KiB have reached the far
system; that its program read them, no client can see.

What is no answer (``HttpFault``): what llhttp refuses (two lengths, a length beside chunks, a length that is
no number, folded fields, bare LF, chunks of no size …), a transfer coding other than ``chunked``, a version
other than 1.0 and 1.1, 101, heads over HEAD_LIMIT octets (interim ones, 1xx, are read over and count),
an end before the answer's own end. An answer of no length ends with the connection, under TLS with its
close_notify. Answers that stand in one read and are octet for octet the last one are not parsed again.

Deadlines are exact and have one timer for all of a client's requests.

RFC 9112 (messages), RFC 9110 §15, RFC 8305 (several addresses: aiohappyeyeballs).
"""

from __future__ import annotations

import asyncio
import base64
import errno
import fcntl
import re
import select
import socket
import ssl
import sys
import termios
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Coroutine, Sequence
from ipaddress import IPv6Address
from typing import Any, Final, cast
from urllib.parse import quote, unquote_to_bytes, urlsplit

import httptools
from aiohappyeyeballs import AddrInfoType, start_connection
from mypy_extensions import mypyc_attr

from .http import ANSWER_LIMIT, KEPT_HEADERS, Answer, Body, Headers, HttpFault, Refusal
from .tls import client_context
from .turn import Posted, Turn

#: Seconds that a connection rests at most, where its far side does not say; and where it does.
IDLE: Final = 4.0
IDLE_LIMIT: Final = 60.0
#: Octets of an answer's head, those of interim answers included.
HEAD_LIMIT: Final = 64 * 1024
#: Octets of an answer in all: chunks may be small and their extensions long.
WIRE_LIMIT: Final = 512 * 1024
#: Octets of an answer that is remembered.
KNOWN_LIMIT: Final = 4096
#: Octets up to which head and body are one object: copying is cheaper than a second one.
JOINED: Final = 32 * 1024
#: Octets that are encrypted at a time: of what lies under TLS nobody tells whether it has left.
SLICE: Final = 64 * 1024
#: Octets on their way at the end of a request that its answer may overtake: one segment of a loopback, some dozens of a wire.
UNACKNOWLEDGED: Final = 64 * 1024
#: Seconds until the next address of a name is tried beside the one before (RFC 8305 §5).
NEXT_ADDRESS: Final = 0.25
#: Seconds in which our own tasks and connections are gone after ``close``, each.
GONE: Final = 1.0

_NEVER: Final = float("inf")
_POLLIN: Final = select.POLLIN
_KEPT: Final = {name.encode(): name for name in KEPT_HEADERS}
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
#: Leaves what no value may hold not as it is: all controls but the tab.
_SOUND: Final = bytes(octet ^ 0x80 if (octet < 0x20 and octet != 0x09) or octet == 0x7F else octet for octet in range(0x100))
_HOST = re.compile(r"[a-z0-9._-]+")
#: Names that a system may read as an IPv4 address in some notation.
_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)\.?")
_REST = re.compile(rb"timeout *= *\"?([0-9]{1,6})")
_VISIBLE: Final = "!$%&'()*+,-./:;=@[]_|~"

Result = Answer | Exception
#: Is told what came of a request, with what the request was about.
Done = Callable[[Any, Result], None]


class Origin:
    """Where connections go: ``host`` as it is looked up, ``port``, ``tls``. ``idle``: the last used one last."""

    __slots__ = ("host", "idle", "port", "tls")

    def __init__(self, host: str, port: int, tls: bool) -> None:
        self.host = host
        self.port = port
        self.tls = tls
        self.idle: list[Connection] = []


class Field:
    """A header field as it was sent last: most of them come again as they were."""

    __slots__ = ("line", "start", "value")

    def __init__(self, name: str) -> None:
        self.start = f"{name}: ".encode()
        self.value = ""
        self.line = self.start + b"\r\n"


class Target:
    """A URL taken apart: its origin, and what each request to it begins with."""

    __slots__ = ("origin", "start", "url")

    def __init__(self, url: str, origin: Origin, start: bytes) -> None:
        self.url = url
        self.origin = origin
        self.start = start


@mypyc_attr(acyclic=True)
class Exchange:
    """One request on its way. ``done`` is called once, with ``about``, on the loop, after ``begin`` returned; not after
    ``withdraw``. ``head`` is all of it where ``body`` is None."""

    __slots__ = ("about", "body", "client", "connection", "deadline", "done", "head", "large", "left", "origin", "over", "task")

    def __init__(
        self,
        client: DirectClient,
        origin: Origin,
        head: bytes,
        body: Sequence[bytes] | AsyncIterable[bytes] | None,
        left: int,
        deadline: float,
        done: Done,
        about: object,
    ) -> None:
        self.client = client
        self.origin = origin
        self.head = head
        self.body = body
        self.left = left  # octets of the body, or of a request in one piece, that were not handed over yet
        self.large = left > UNACKNOWLEDGED
        self.deadline = deadline
        self.done = done
        self.about = about
        self.connection: Connection | None = None
        self.task: asyncio.Task[None] | None = None
        self.over = False

    def withdraw(self) -> None:
        """Nobody waits for it any more. What was sent was sent."""
        self.client.withdraw(self)


class Connection:
    """One connection to one origin, with at most one exchange: an ``asyncio.Protocol``."""

    __slots__ = (
        "_chunked",
        "_client",
        "_complete",
        "_fed",
        "_headed",
        "_headers",
        "_heads",
        "_interim",
        "_keeps",
        "_length",
        "_messages",
        "_parser",
        "_pieces",
        "_rest",
        "_room",
        "_size",
        "_socket",
        "_status",
        "_surplus",
        "_unsent",
        "_wrong",
        "exchange",
        "lost",
        "origin",
        "paused",
        "transport",
        "until",
    )

    def __init__(self, client: DirectClient, origin: Origin, sock: socket.socket | None = None) -> None:
        self._client = client
        self.origin = origin
        self._socket = sock
        self.transport: asyncio.Transport | None = None
        self.exchange: Exchange | None = None
        self.until = 0.0  # loop time up to which it may rest
        self.paused = False
        self.lost = False
        self._unsent = b""  # a request that goes out at the end of this turn of the loop
        self._room: asyncio.Future[None] | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._begin()

    def _begin(self) -> None:
        """Before the first octet of an answer."""
        self._fed = 0
        self._status = 0
        self._headed = False
        self._interim = False
        self._chunked = 0
        self._length: bytes | None = None
        self._headers: dict[str, str] = {}
        self._heads: list[bytes] = []
        self._messages = 0
        self._pieces: list[bytes] = []
        self._size = 0
        self._complete = False
        self._surplus = False
        self._keeps = False
        self._rest = IDLE
        self._wrong = ""

    # ---------------------------------------------------------------- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._client.opened(self)

    def data_received(self, data: bytes) -> None:
        if self.exchange is None:
            self.drop()
            return
        if self._unsent:
            self.heard()
            return
        client = self._client
        if self._fed == 0 and client.known_answer is not None and data == client.known:
            self._answered(client.known_answer, client.known_rest)
            return
        self._read(data)

    def eof_received(self) -> bool | None:
        if self.exchange is not None:
            if self._headed and self._chunked == 0 and self._length is None and _ended(self.transport):
                self._answered(self._answer(True), 0.0)
            else:
                self._fault("the connection was closed " + ("inside the answer" if self._fed else "without an answer"))
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self._parser = None
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        self._client.closed(self)
        if self.exchange is not None:
            self._fault(reason(exc) if exc is not None else "the connection was closed before the end of the answer")

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    # ------------------------------------------------------------------------ a request

    def usable(self, now: float) -> bool:
        """As far as is known: what the loop has not read yet is asked before a request leaves."""
        return not self.lost and now < self.until

    @property
    def asked(self) -> int:
        """The socket to ask whether anything has come, or an end, that the loop has not read yet: of a connection that was
        used before and has a request that did not leave. -1: none. Under TLS what came may be no more than a session
        ticket that comes late: a new connection costs less than to find out."""
        sock = self._socket
        return sock.fileno() if sock is not None and self.until > 0.0 and self._unsent else -1

    def carry(self, exchange: Exchange) -> None:
        self.exchange = exchange
        exchange.connection = self
        self._unsent = exchange.head
        self._client.leaves(self)

    def leave(self) -> None:
        """The turn is over."""
        transport, exchange = self.transport, self.exchange
        if transport is None or exchange is None or transport.is_closing():
            return  # ``connection_lost`` follows, and shall know that nothing has left
        octets, self._unsent = self._unsent, b""
        try:
            transport.write(octets)
            self._go_on(transport, exchange)
        except Exception as error:
            self.exchange = None
            self.drop()
            self._client.finish(exchange, error)

    def _go_on(self, transport: asyncio.Transport, exchange: Exchange) -> None:
        """With the body, behind the head."""
        body = exchange.body
        if body is None:
            exchange.left = 0
        elif isinstance(body, AsyncIterable):
            exchange.task = self._client.task(self._stream(exchange, body))
        elif self.origin.tls:
            exchange.task = self._client.task(self._slice(exchange, body))
        else:
            for piece in body:
                transport.write(piece)
            exchange.left = 0

    def heard(self) -> None:
        """Something has come before the request left."""
        self._fault("the far side spoke before the request")

    async def _slice(self, exchange: Exchange, body: Sequence[bytes]) -> None:
        for piece in body:
            for at in range(0, len(piece), SLICE):
                if not await self._hand(exchange, piece[at : at + SLICE]):
                    return
        exchange.task = None

    async def _stream(self, exchange: Exchange, body: AsyncIterable[bytes]) -> None:
        fault: Exception | None = None
        ended: asyncio.CancelledError | None = None
        pieces = aiter(body)
        try:
            async for piece in pieces:
                if not await self._hand(exchange, piece):
                    break
        except asyncio.CancelledError as cancelled:
            ended = cancelled
        except Exception as error:
            # Whose body it is knows what that means.
            fault = error
        # A generator that nobody goes on with keeps its file until it is collected. Not in a ``finally``: compiled,
        # whatever is handled while this waits would be taken to be handled by everybody else on the loop, too.
        if isinstance(pieces, AsyncGenerator):
            try:
                await pieces.aclose()
            except Exception as error:
                fault = fault or error
        if ended is not None:
            raise ended
        exchange.task = None
        if exchange.over:
            return
        if fault is None and exchange.left != 0:
            fault = HttpFault("the body is not as long as was said before it")
        if fault is not None:
            self.exchange = None
            self.drop()
            self._client.finish(exchange, fault)

    async def _hand(self, exchange: Exchange, piece: bytes) -> bool:
        """Write another piece of the body as there is room for it; False: no more of it."""
        while self.paused and not self.lost:
            self._room = asyncio.get_running_loop().create_future()
            await self._room
        if exchange.over or self.transport is None:
            return False
        exchange.left -= len(piece)
        if exchange.left < 0:
            return False
        if piece:
            self.transport.write(piece)
        return True

    # ------------------------------------------------------------------------ an answer

    def _read(self, data: bytes) -> None:
        exchange = self.exchange
        at = 0
        while at < len(data) and self.exchange is exchange:
            room = (WIRE_LIMIT if self._headed else HEAD_LIMIT) - self._fed
            if room <= 0:
                self._fault("the answer is too long" if self._headed else "the head of the answer is too long")
                return
            piece = data[at : at + room]
            at += len(piece)
            self._fed += len(piece)
            if not self._parse(piece):
                return
            if self._complete:
                self._whole(data, at)
            elif self._size > ANSWER_LIMIT:
                # The rest is not read, so the connection is of no more use.
                self._answered(self._answer(False), 0.0)

    def _parse(self, piece: bytes) -> bool:
        parser = self._parser
        if parser is None:
            parser = self._parser = httptools.HttpResponseParser(self)
        headed = self._headed
        if not headed:
            self._heads.append(piece)
        try:
            parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            self._wrong = self._wrong or "it switches protocols"
        except httptools.HttpParserError as error:
            if not self._complete:
                self._wrong = self._wrong or " ".join(str(error).split()) or type(error).__name__
            self._surplus = True
        if self._headed and not headed:
            self._look()
        if self._wrong:
            self._fault(f"no HTTP answer: {self._wrong}")
            return False
        return True

    def _look(self) -> None:
        """llhttp reads RTSP and ICE as well, and does not say so."""
        octets = b"".join(self._heads)
        self._heads = []
        at = 0
        for _ in range(self._messages):
            while octets[at : at + 1] in (b"\r", b"\n"):
                at += 1
            if not octets.startswith(b"HTTP/", at):
                self._wrong = self._wrong or "another protocol"
                return
            at = octets.find(b"\r\n\r\n", at) + 4

    def _whole(self, data: bytes, at: int) -> None:
        """The answer's own end was read."""
        rest = self._rest if self._keeps and not self._surplus and at == len(data) else 0.0
        answer = self._answer(self._size <= ANSWER_LIMIT)
        if rest > 0 and answer.whole and self._fed == len(data) <= KNOWN_LIMIT:
            client = self._client
            client.known, client.known_answer, client.known_rest = data, answer, rest
        self._answered(answer, rest)

    def _answer(self, whole: bool) -> Answer:
        return Answer(self._status, self._headers, b"".join(self._pieces)[:ANSWER_LIMIT], whole)

    def _answered(self, answer: Answer, rest: float) -> None:
        """``rest``: seconds for which the connection can be used again, 0: not at all."""
        exchange, transport = self.exchange, self.transport
        assert exchange is not None
        assert transport is not None
        self.exchange = None
        if exchange.left > 0 or transport.get_write_buffer_size() > 0 or (exchange.large and self._unacknowledged() > UNACKNOWLEDGED):
            answer = Answer(answer.status, answer.headers, answer.body, answer.whole, True)
            rest = 0.0
        if self._fed:
            self._begin()
        if rest > 0:
            self._client.rests(self, rest)
        else:
            self.drop()
        self._client.finish(exchange, answer)

    def _unacknowledged(self) -> int:
        """Octets that the kernel keeps because the far system has not confirmed them. An honest answer carries the
        confirmation of all that was read for it, so that 0 is what is seen."""
        sock = self._socket
        if sock is None or not sys.platform.startswith("linux"):
            return 0
        try:
            return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        except (OSError, ValueError):
            return 0

    def _fault(self, why: str) -> None:
        exchange = self.exchange
        # Of a request that waits for the end of the turn nothing has left. One that was not the first of its connection is
        # not to blame for the end of it; those that rest are few, so that this comes to an end.
        anew = exchange is not None and self._unsent != b"" and self.until > 0.0
        self.exchange = None
        self.drop()
        if exchange is None:
            return
        if anew:
            self._client.again(exchange)
        else:
            self._client.finish(exchange, HttpFault(why))

    def drop(self) -> None:
        """Break off; whose exchange it was is the caller's."""
        self.until = 0.0
        self._unsent = b""
        if self.transport is not None and not self.lost:
            self.transport.abort()

    # --------------------------------------------------------------------- httptools

    def on_message_begin(self) -> None:
        if self._headed:
            self._surplus = True
        else:
            self._messages += 1

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._headed:
            # A trailer, or the head of an answer to nothing.
            return
        name = name.lower()
        kept = _KEPT.get(name)
        if kept is not None:
            self._headers.setdefault(kept, value.decode("utf-8", "replace").strip(" \t"))
        elif name == b"content-length":
            self._length = value
        elif name == b"transfer-encoding":
            self._chunked += 1
            if self._chunked > 1 or value.strip(b" \t").lower() != b"chunked":
                self._wrong = self._wrong or "a transfer coding that is not chunked"
        elif name == b"keep-alive":
            found = _REST.search(value.lower())
            if found is not None:
                self._rest = min(float(found[1]) - 1.0, IDLE_LIMIT)

    def on_headers_complete(self) -> None:
        if self._headed:
            return
        parser = self._parser
        assert parser is not None
        status = parser.get_status_code()
        version = parser.get_http_version()
        if version not in ("1.1", "1.0") or (self._chunked and version == "1.0"):
            self._wrong = self._wrong or f"version {version}"
        elif status == 101 or not 100 <= status <= 599:
            self._wrong = self._wrong or f"status {status}"
        elif status < 200:
            self._interim = True
            if self._chunked or self._length is not None:
                self._wrong = self._wrong or f"status {status} with a body"
            self._headers = {}
            self._rest = IDLE
        else:
            self._headed = True
            self._status = status

    def on_body(self, body: bytes) -> None:
        if not self._complete:
            if self._size <= ANSWER_LIMIT:
                self._pieces.append(body)
            self._size += len(body)

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
            return
        if self._complete or not self._headed:
            return
        self._complete = True
        parser = self._parser
        assert parser is not None
        # What follows 204 and 304 is nobody's; a length there is the length of something else.
        odd = self._status in (204, 304) and (self._chunked > 0 or (self._length or b"0").strip(b"0") != b"")
        self._keeps = parser.should_keep_alive() and not odd


class DirectClient(Posted):
    """``standing``: header fields of every request. ``refusal``, ``connections``: see ``http_client``.
    Raises ValueError for a field that HTTP cannot carry. Once closed it stays so: what is begun then ends
    with an HttpFault."""

    def __init__(self, connections: int, refusal: Refusal | None = None, standing: Headers = ()) -> None:
        self._limit = connections
        self._refusal = refusal
        self._standing = standing
        self._known_fields: dict[str, Field] = {}
        self._length = 0
        self._length_line = b"content-length: 0\r\n\r\n"
        self._standing_lines = b"".join(self._lines(standing))
        self._target: Target | None = None
        self._origins: dict[tuple[str, int, bool], Origin] = {}
        self._out: set[Exchange] = set()
        self._waiting: deque[Exchange] = deque()
        self._open: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._gone: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._wake = _NEVER
        self._context: ssl.SSLContext | None = None
        self._closed = False
        self._turn = Turn()
        self._leaving: list[Connection] = []
        #: The octets of an answer that was read whole in one go, what it says, and how long its connection may rest.
        self.known = b""
        self.known_answer: Answer | None = None
        self.known_rest = 0.0

    # ------------------------------------------------------------------ the caller's side

    def begin(self, url: str, headers: Headers, body: Body, deadline: float, done: Done, about: object) -> Exchange:
        """One POST, by ``deadline`` (loop time): ``done`` gets ``about``, and its Answer, an HttpFault, or what the
        iterator of a body raised. Raises ValueError for a URL or a header that HTTP cannot carry."""
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        target = self._target
        if target is None or target.url != url:
            target = self._target = self._aim(url)
        lines = self._lines(headers)
        lines.insert(0, target.start)
        given: Sequence[bytes] | AsyncIterable[bytes] | None = None
        if isinstance(body, bytes):
            left = len(body)
            if left != self._length:
                self._length, self._length_line = left, b"content-length: %d\r\n\r\n" % left
            lines.append(self._length_line)
            if left <= JOINED:
                lines.append(body)
            else:
                given = (body,)
        else:
            left = _length(headers)
            given = body if isinstance(body, AsyncIterable) else list(body)
            if isinstance(given, list) and sum(map(len, given)) != left:
                raise ValueError("the body is not as long as its header content-length says")
            lines.append(b"\r\n")
        head = b"".join(lines)
        exchange = Exchange(self, target.origin, head, given, len(head) if given is None else left, deadline, done, about)
        now = loop.time()
        if self._closed or deadline <= now:
            fault = HttpFault("the client is closed") if self._closed else HttpFault("no answer in time", late=True)
            loop.call_soon(self.finish, exchange, fault)
            return exchange
        if deadline < self._wake:
            self._arm(deadline)
        if len(self._out) >= self._limit:
            self._waiting.append(exchange)
        else:
            self._depart(exchange, now)
        return exchange

    def leaves(self, connection: Connection) -> None:
        """Its request does, at the end of this turn."""
        if not self._leaving:
            self._turn.post(self)
        self._leaving.append(connection)

    def deliver(self) -> None:
        """The turn is over (``net.turn.Posted``). One look at all sockets costs less than one at each."""
        leaving, self._leaving = self._leaving, []
        ears = select.poll()
        for connection in leaving:
            descriptor = connection.asked
            if descriptor >= 0:
                ears.register(descriptor, _POLLIN)
        said = {descriptor for descriptor, _ in ears.poll(0)}
        for connection in leaving:
            try:
                if said and connection.asked in said:
                    connection.heard()
                else:
                    connection.leave()
            except Exception as error:
                # What one who is told raises is not to keep others' requests here.
                context = {"message": "an HTTP request's end could not be told", "exception": error}
                asyncio.get_running_loop().call_exception_handler(context)

    async def post(self, url: str, headers: Headers, body: Body, deadline: float) -> Answer:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        exchange = self.begin(url, headers, body, deadline, _tell, future)
        try:
            return await future
        finally:
            exchange.withdraw()

    def withdraw(self, exchange: Exchange) -> None:
        if not exchange.over:
            exchange.over = True
            self._stop(exchange)
            self._next()

    def withdraw_all(self) -> list[Any]:
        """What was asked and is not answered, nobody waits for any more: what that was about, those first that waited for a
        connection. What was sent was sent."""
        waiting = list(self._waiting)
        self._waiting.clear()
        given_up = [*waiting, *self._out]
        for exchange in given_up:
            exchange.over = True
            self._stop(exchange)
        return [exchange.about for exchange in given_up]

    async def close(self) -> None:
        """Requests that are out end with an HttpFault."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting = list(self._waiting)
        self._waiting.clear()
        for exchange in [*self._out, *waiting]:
            self._end(exchange, HttpFault("the client is closed"))
        for connection in list(self._open):
            connection.drop()
        if self._tasks:
            # What connects, or gives a body, has been cancelled; until it has ended it may hold a socket or a file.
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(list(self._tasks), timeout=GONE)
        if self._open:
            self._gone = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._gone], timeout=GONE)
        self._origins.clear()
        self._target = None

    # ------------------------------------------------------------------------- requests

    def _lines(self, headers: Headers) -> list[bytes]:
        known = self._known_fields
        lines: list[bytes] = []
        for name, value in headers:
            field = known.get(name)
            if field is None:
                if not _TOKEN.fullmatch(name):
                    raise ValueError(f"{name!r} is no name of a header field")
                field = known[name] = Field(name)
            if field.value != value:
                try:
                    octets = value.encode()
                except UnicodeEncodeError:
                    octets = b"\0"  # half of a surrogate pair
                if octets.translate(_SOUND) != octets:
                    raise ValueError(f"the value of the header field {name} has characters that none may hold")
                field.line = field.start + octets + b"\r\n"
                field.value = value
            lines.append(field.line)
        return lines

    def _aim(self, url: str) -> Target:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("the URL is not one of http or https with a host")
        tls = parts.scheme == "https"
        host, shown = _host(parts.hostname)
        port = parts.port if parts.port is not None else 443 if tls else 80
        if port != (443 if tls else 80):
            shown = f"{shown}:{port}"
        path = quote(parts.path or "/", safe=_VISIBLE)
        if parts.query:
            path += "?" + quote(parts.query, safe=_VISIBLE + "?")
        given = {name.lower() for name, _ in self._standing}
        start = f"POST {path} HTTP/1.1\r\nhost: {shown}\r\n".encode() + self._standing_lines
        if parts.username is not None and "authorization" not in given:
            login = unquote_to_bytes(parts.username) + b":" + unquote_to_bytes(parts.password or "")
            start = start + b"authorization: Basic " + base64.b64encode(login) + b"\r\n"
        origin = self._origins.get((host, port, tls))
        if origin is None:
            origin = self._origins[(host, port, tls)] = Origin(host, port, tls)
        return Target(url, origin, start)

    def _depart(self, exchange: Exchange, now: float) -> None:
        self._out.add(exchange)
        idle = exchange.origin.idle
        while idle:
            connection = idle.pop()
            if connection.usable(now):
                self._carry(connection, exchange)
                return
            connection.drop()
        if len(self._open) >= self._limit:
            self._make_room()
        exchange.task = self.task(self._connect(exchange))

    def again(self, exchange: Exchange) -> None:
        """Its connection ended before anything of it had left: another one carries it."""
        exchange.connection = None
        assert self._loop is not None
        self._depart(exchange, self._loop.time())

    def task(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        """One that ``close`` waits for."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _carry(self, connection: Connection, exchange: Exchange) -> None:
        try:
            connection.carry(exchange)
        except Exception as error:
            # Who began another exchange, or ended one, must not be told of this one's fault.
            connection.exchange = None
            connection.drop()
            asyncio.get_running_loop().call_soon(self.finish, exchange, error)

    def _make_room(self) -> None:
        """Connections to other origins must not add up."""
        for origin in self._origins.values():
            if origin.idle:
                origin.idle.pop(0).drop()
                return

    def finish(self, exchange: Exchange, result: Result) -> None:
        if exchange.over:
            return
        exchange.over = True
        self._out.discard(exchange)
        if exchange.task is not None:
            exchange.task.cancel()
            exchange.task = None
        try:
            if self._waiting:
                self._next()
        finally:
            exchange.done(exchange.about, result)

    def _end(self, exchange: Exchange, fault: HttpFault) -> None:
        """Break it off. What ``done`` raises must not keep others from being told."""
        self._stop(exchange)
        try:
            self.finish(exchange, fault)
        except Exception as error:
            asyncio.get_running_loop().call_exception_handler({"message": "an HTTP request's end could not be told", "exception": error})

    def _stop(self, exchange: Exchange) -> None:
        self._out.discard(exchange)
        if exchange in self._waiting:
            self._waiting.remove(exchange)
        if exchange.task is not None:
            exchange.task.cancel()
            exchange.task = None
        connection = exchange.connection
        if connection is not None and connection.exchange is exchange:
            connection.exchange = None
            connection.drop()

    def _next(self) -> None:
        while self._waiting and not self._closed and len(self._out) < self._limit:
            assert self._loop is not None
            self._depart(self._waiting.popleft(), self._loop.time())

    def _arm(self, when: float) -> None:
        loop = self._loop
        assert loop is not None
        if self._timer is not None:
            self._timer.cancel()
        self._wake = when
        self._timer = loop.call_at(when, self._sweep)

    def _sweep(self) -> None:
        """The one timer: what is due now, and when to look again."""
        loop = self._loop
        assert loop is not None
        self._timer, self._wake = None, _NEVER
        # A loop may wake us up to its resolution early.
        now = loop.time() + 0.001
        soonest = _NEVER
        for exchange in [*self._out, *self._waiting]:
            if exchange.deadline > now:
                soonest = min(soonest, exchange.deadline)
            elif not exchange.over:
                self._end(exchange, HttpFault("no answer in time", late=True))
        for origin in self._origins.values():
            for connection in list(origin.idle):
                if connection.until > now:
                    soonest = min(soonest, connection.until)
                else:
                    origin.idle.remove(connection)
                    connection.drop()
        if self._waiting:
            self._next()
        if soonest < self._wake:
            self._arm(soonest)

    # ---------------------------------------------------------------------- connections

    def opened(self, connection: Connection) -> None:
        self._open.add(connection)

    def closed(self, connection: Connection) -> None:
        self._open.discard(connection)
        idle = connection.origin.idle
        if connection in idle:
            idle.remove(connection)
        if not self._open and self._gone is not None and not self._gone.done():
            self._gone.set_result(None)

    def rests(self, connection: Connection, seconds: float) -> None:
        loop = self._loop
        assert loop is not None
        connection.until = loop.time() + seconds
        connection.origin.idle.append(connection)
        if connection.until < self._wake:
            self._arm(connection.until)

    async def _connect(self, exchange: Exchange) -> None:
        connection: Connection | None = None
        try:
            connection = await self._connected(exchange.origin)
            fault: Exception | None = HttpFault("the connection ended before the request") if connection.lost else None
        except HttpFault as error:
            fault = error
        except OSError as error:
            fault = HttpFault(reason(error))
        except Exception as error:
            fault = error
        exchange.task = None
        if fault is None and connection is not None and connection.transport is not None and connection.transport.is_closing():
            fault = HttpFault("the far side spoke or left before the request")
        if exchange.over:
            if connection is not None:
                connection.drop()
        elif fault is not None:
            self.finish(exchange, fault)
        elif connection is not None:
            self._carry(connection, exchange)

    async def _connected(self, origin: Origin) -> Connection:
        loop = asyncio.get_running_loop()
        if origin.tls and self._context is None:
            # Reading the machine's authorities takes long.
            self._context = await loop.run_in_executor(None, client_context, "verify")
        numeric = _NUMBER.fullmatch(origin.host) is not None
        host = origin.host.rstrip(".") if numeric else origin.host
        try:
            found = await loop.getaddrinfo(host, origin.port, type=socket.SOCK_STREAM)
        except OSError:
            if numeric and self._refusal is not None:
                raise HttpFault("refused by policy: the host of the URL is written in an odd way", forbidden=True) from None
            raise
        judge = _Judge(self._refusal)
        try:
            sock = await start_connection(
                cast("list[AddrInfoType]", found), happy_eyeballs_delay=NEXT_ADDRESS, interleave=1, loop=loop, socket_factory=judge.socket
            )
        except OSError:
            if judge.refused and not judge.passed:
                raise HttpFault(f"refused by policy: {judge.refused}", forbidden=True) from None
            raise
        connection = Connection(self, origin, sock)
        # From here on the socket is the loop's, whatever becomes of the connection.
        await loop.create_connection(
            lambda: cast(asyncio.Protocol, connection),
            sock=sock,
            ssl=self._context if origin.tls else None,
            server_hostname=host if origin.tls else None,
        )
        return connection


class _Judge:
    """Makes the socket for exactly one address at a time: what is refused gets none."""

    __slots__ = ("_refusal", "passed", "refused")

    def __init__(self, refusal: Refusal | None) -> None:
        self._refusal = refusal
        self.refused = ""
        self.passed = False

    def socket(self, target: AddrInfoType) -> socket.socket:
        family, kind, protocol, _, address = target
        if self._refusal is not None and (why := self._refusal(str(address[0]))) is not None:
            self.refused = self.refused or why
            raise PermissionError(errno.EACCES, f"refused by policy: {why}")
        self.passed = True
        made = socket.socket(family, kind, protocol)
        made.setblocking(False)
        if family in (socket.AF_INET, socket.AF_INET6):
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made


def _tell(future: asyncio.Future[Answer], result: Result) -> None:
    """What ``post`` waits with."""
    if future.done():
        return
    if isinstance(result, Answer):
        future.set_result(result)
    else:
        future.set_exception(result)


def _ended(transport: asyncio.Transport | None) -> bool:
    """Was the end of the connection said by who has its keys? Without TLS anybody's word will do."""
    tls = None if transport is None else transport.get_extra_info("ssl_object")
    if tls is None:
        return True
    try:
        return bool(tls.read(1) == b"")
    except ssl.SSLZeroReturnError:
        return True
    except OSError:
        return False


def _length(headers: Headers) -> int:
    for name, value in headers:
        if name.lower() == "content-length":
            return int(value)
    raise ValueError("a body in pieces needs a header content-length")


def _host(name: str) -> tuple[str, str]:
    """The host of a URL as it is looked up, and as it stands in ``host``."""
    if ":" in name:
        host = name.replace("%25", "%")
        IPv6Address(host)
        return host, f"[{host.partition('%')[0]}]"
    host = name if name.isascii() else name.encode("idna").decode()
    if not _HOST.fullmatch(host):
        raise ValueError("the host of the URL has characters that none may hold")
    return host, host


def reason(error: Exception) -> str:
    """What went wrong on a connection in a few words, without names and URLs."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        # An alert that Python has no name for has no reason, whatever the type says.
        return f"TLS: {str(getattr(error, 'reason', None) or 'protocol error').lower().replace('_', ' ')}"
    text = error.strerror if isinstance(error, OSError) else None
    if not text and isinstance(error, OSError) and error.errno:
        text = errno.errorcode.get(error.errno)
    return text or " ".join(str(error).split()) or type(error).__name__
