"""HTTP POST, the only request we make: one small interface, our own client (``direct``) and two libraries behind it.

Owns pools, the total deadline, the bound on answers. Knows no mail and no status: a 2xx and a
500 are both an ``Answer``. Redirects are never followed, nothing is decompressed, no proxy is
taken from the environment.

A client can be given a judge of addresses (``refusal``). It is asked once for each connection, of
the very address that is connected to next, whether that came from a name, from a number in
any notation, or from a name that had another address a moment ago. pyreqwest has no place to look
there; aiohttp's connector takes a factory of sockets, which sees the resolved address.

Invariants: ``post`` returns by its deadline. Every fault of the transport, whatever a library
calls it, is one ``HttpFault``: the far side may or may not have had the request. A broken,
cut or late answer is a fault even if its status was read; one over ``ANSWER_LIMIT`` is an answer:
that much of it is kept, the rest is not read, and the connection is not used again. Certificates are verified by the system's store
(``SSL_CERT_FILE`` moves it).

RFC 9110, RFC 9112. The libraries are imported with the first client that needs them.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from aiohttp import AddrInfoType, ClientSession
    from pyreqwest.client import Client

#: Octets of an answer's body that are read.
ANSWER_LIMIT = 64 * 1024
#: Header fields of an answer that somebody asks for.
KEPT_HEADERS = ("retry-after", "content-type")
#: Octets in memory up to which a body is handed over whole.
WHOLE = 256 * 1024

#: What ``client`` can be in the configuration.
Kind = Literal["direct", "pyreqwest", "aiohttp"]
Headers = Sequence[tuple[str, str]]
Body = bytes | Iterable[bytes] | AsyncIterable[bytes]


class HttpFault(Exception):  # noqa: N818 (a fault by the project's word: far side, policy or closing, never a bug of ours)
    """No whole answer. ``reason``: short, without the URL. ``late``: the deadline passed.
    ``forbidden``: the address must not be connected to (our policy's word, or a firewall's on this
    machine), and nothing was sent."""

    def __init__(self, reason: str, late: bool = False, forbidden: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.late = late
        self.forbidden = forbidden


@dataclass(slots=True)
class Answer:
    """``headers``: those of ``KEPT_HEADERS`` that were given, first value each. ``body``: its first
    ``ANSWER_LIMIT`` octets, as they came. ``whole``: False where it had more; nobody looked whether it ended
    well then, and its status counts all the same. ``early``: it came before all of the request's body had left us,
    so its sender cannot have had it. ``direct`` sees that but for the last 64 KiB on Linux (its docstring says what
    elsewhere); the libraries see what they took from us, which may lie in buffers of theirs and of the kernel."""

    status: int
    headers: dict[str, str]
    body: bytes = field(repr=False)
    whole: bool = True
    early: bool = False


class HttpClient(Protocol):
    """Keeps at most ``connections`` requests out at a time, each on a connection of its own."""

    async def post(self, url: str, headers: Headers, body: Body, deadline: float) -> Answer:
        """One POST, answered by ``deadline`` (loop time), waiting for a free connection included.

        A body that is no ``bytes`` wants a ``content-length`` among the headers. Raises HttpFault;
        ValueError for a URL or a header that HTTP cannot carry."""

    async def close(self) -> None:
        """For good: what is posted afterwards is an HttpFault, and nothing is sent."""


#: Why a numeric address is not connected to; None: it may be.
Refusal = Callable[[str], str | None]


def http_client(kind: Kind, connections: int, refusal: Refusal | None = None, standing: Headers = ()) -> HttpClient:
    """A client. ``connections``: requests out at once, and (not with aiohttp) idle connections kept.
    ``standing``: header fields of every request, before its own.
    ``refusal`` judges every address before it is connected to (``addresses.not_public``); pyreqwest, which
    cannot ask it, becomes direct then."""
    if kind == "aiohttp":
        return _Aiohttp(connections, refusal, standing)
    if kind == "pyreqwest" and refusal is None:
        return _Pyreqwest(connections, standing)
    from .direct import DirectClient

    return DirectClient(connections, refusal, standing)


def shown(url: str) -> str:
    """A URL for logs and replies: without user, password and query, where secrets live."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


class _Departing:
    """A body that leaves in pieces, and how much of it has not left yet."""

    def __init__(self, body: Iterable[bytes] | AsyncIterable[bytes], headers: Headers) -> None:
        self._body = body
        #: Octets; without a length nobody can say, and none is left.
        self.left = next((int(value) for name, value in headers if name.lower() == "content-length"), 0)

    async def pieces(self) -> AsyncIterator[bytes]:
        if isinstance(self._body, AsyncIterable):
            async for piece in self._body:
                self.left -= len(piece)
                yield piece
        else:
            for piece in self._body:
                self.left -= len(piece)
                yield piece


def _slices(body: bytes) -> Iterable[bytes]:
    return (body[at : at + WHOLE] for at in range(0, len(body), WHOLE))


class _Pyreqwest:
    def __init__(self, connections: int, standing: Headers) -> None:
        from pyreqwest.client import ClientBuilder
        from pyreqwest.exceptions import PyreqwestError
        from pyreqwest.http import Url

        self._standing = standing
        self._parse_url = Url
        self._url = ("", Url("http://localhost/"))
        self._fault = PyreqwestError
        self._gate = asyncio.Semaphore(connections)
        self._closed = False
        builder = ClientBuilder().http1_only().http1_lower_case_headers().follow_redirects(False).referer(False).no_proxy()
        builder = builder.gzip(False).brotli(False).zstd(False).deflate(False)
        self._client: Client = builder.pool_max_idle_per_host(connections).build()

    async def post(self, url: str, headers: Headers, body: Body, deadline: float) -> Answer:
        try:
            async with asyncio.timeout_at(deadline), self._gate:
                return await self._exchange(url, headers, body)
        except self._fault as fault:
            if isinstance(fault, ValueError):
                raise
            # What it calls a fault of the connection happens after sending, too: the class says nothing.
            raise HttpFault(_innermost(fault)) from None
        except TimeoutError:
            raise HttpFault("no answer in time", late=True) from None

    async def _exchange(self, url: str, headers: Headers, body: Body) -> Answer:
        if self._closed:
            raise HttpFault("the client is closed")
        if self._url[0] != url:
            # A client is asked for the same URL nearly always, and taking it apart is not cheap.
            self._url = (url, self._parse_url(url))
        request = self._client.post(self._url[1]).headers([*self._standing, *headers])
        departing = None
        if isinstance(body, bytes):
            request = request.body_bytes(body)
        else:
            departing = _Departing(body, headers)
            request = request.body_stream(departing.pieces())
        async with request.build_streamed() as response:
            reader = response.body_reader
            pieces: list[bytes] = []
            size = 0
            while size <= ANSWER_LIMIT and (piece := await reader.read_chunk()) is not None:
                pieces.append(bytes(piece))
                size += len(pieces[-1])
            kept = {name: value for name in KEPT_HEADERS if (value := response.get_header(name)) is not None}
            early = departing is not None and departing.left > 0
            return Answer(response.status, kept, b"".join(pieces)[:ANSWER_LIMIT], size <= ANSWER_LIMIT, early)

    async def close(self) -> None:
        self._closed = True
        await self._client.close()


def _innermost(fault: Exception) -> str:
    """What went wrong in its own words; outer causes tell the URL, which may hold secrets."""
    causes = (getattr(fault, "details", None) or {}).get("causes") or []
    text = str(causes[-1].get("message", "")) if causes else ""
    return text if text and "://" not in text else getattr(fault, "message", type(fault).__name__)


class _Aiohttp:
    def __init__(self, connections: int, refusal: Refusal | None, standing: Headers) -> None:
        import aiohttp

        from .bounded import BoundedConnector

        self._aiohttp = aiohttp
        self._standing = standing
        self._connector = BoundedConnector
        self._refusal = refusal
        self._connections = connections
        self._gate = asyncio.Semaphore(connections)
        self._closed = False
        self._session: ClientSession | None = None

    def _open(self) -> ClientSession:
        aiohttp = self._aiohttp
        # No connection is used twice: what a peer sends on an idle one, aiohttp takes for the answer
        # to the next request, and a mail would count as delivered that nobody has.
        session: ClientSession = aiohttp.ClientSession(
            connector=self._connector(
                limit=self._connections,
                force_close=True,
                # The system's resolver, as pyreqwest has it, whatever else is installed.
                resolver=aiohttp.ThreadedResolver(),
                socket_factory=None if self._refusal is None else self._socket,
            ),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            skip_auto_headers=("accept-encoding", "content-type", "user-agent"),
        )
        return session

    def _socket(self, target: AddrInfoType) -> socket.socket:
        """For a connection to exactly this address. Raises what lets aiohttp go on to the next one."""
        family, kind, protocol, _, address = target
        if self._refusal is not None and (why := self._refusal(str(address[0]))) is not None:
            raise PermissionError(errno.EACCES, f"refused by policy: {why}")
        return socket.socket(family, kind, protocol)

    async def post(self, url: str, headers: Headers, body: Body, deadline: float) -> Answer:
        aiohttp = self._aiohttp
        if self._closed:
            raise HttpFault("the client is closed")
        if self._session is None:
            self._session = self._open()
        given = [*self._standing, *headers]
        if isinstance(body, bytes) and len(body) > WHOLE:
            given.append(("content-length", str(len(body))))
            body = _slices(body)
        try:
            async with asyncio.timeout_at(deadline), self._gate:
                return await self._exchange(self._session, url, given, body)
        except TimeoutError:
            raise HttpFault("no answer in time", late=True) from None
        except aiohttp.InvalidURL:
            if self._refusal is None:
                raise
            raise HttpFault("refused by policy: the host of the URL is written in an odd way", forbidden=True) from None
        except aiohttp.ClientConnectorError as fault:
            if isinstance(cause := fault.os_error, PermissionError):
                raise HttpFault(cause.strerror or "refused by policy", forbidden=True) from None
            raise HttpFault(_one_line(fault)) from None
        except (aiohttp.ClientError, aiohttp.http.HttpProcessingError, OSError) as fault:
            raise HttpFault(_one_line(fault)) from None

    async def _exchange(self, session: ClientSession, url: str, headers: Headers, body: Body) -> Answer:
        if self._closed:
            raise HttpFault("the client is closed")
        departing = None if isinstance(body, bytes) else _Departing(body, headers)
        sent = body if departing is None else departing.pieces()
        async with session.post(url, headers=headers, data=sent, allow_redirects=False) as response:
            pieces: list[bytes] = []
            size = 0
            async for piece in response.content.iter_any():
                pieces.append(piece)
                size += len(piece)
                if size > ANSWER_LIMIT:
                    # The rest is not read, so the connection is of no more use.
                    response.close()
                    break
            kept = {name: value for name in KEPT_HEADERS if (value := response.headers.get(name)) is not None}
            early = departing is not None and departing.left > 0
            return Answer(response.status, kept, b"".join(pieces)[:ANSWER_LIMIT], size <= ANSWER_LIMIT, early)

    async def close(self) -> None:
        self._closed = True
        if self._session is not None:
            await self._session.close()
            self._session = None


def _one_line(fault: Exception) -> str:
    text = " ".join(str(fault).split())
    return text if text and "://" not in text else type(fault).__name__
