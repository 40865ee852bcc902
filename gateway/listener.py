"""The network side of the server: bound addresses, connections, their limits and deadlines.

Owns sockets, back-pressure and time-outs; moves bytes between a transport and a
ServerSession, and the session's events to the Intake. Knows no SMTP: what is said and when
is the session's business, what becomes of a mail the intake's.

Invariants: one write per read; nothing is read while an answer, a verdict, the disk or the
client's own reading is behind; no timer per connection (one sweep a second looks at all);
an idle connection is two small objects. A fault of ours never loses a mail: before the end
of data the client hears 421, after it the connection closes without a word (DESIGN §7).

RFC 5321 §4.5.3.2 (time-outs), RFC 2920 §3.2 (what a client may send at once).
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import ssl
import termios
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from itertools import count
from typing import Final, Protocol, cast

from mypy_extensions import mypyc_attr

from ._parser import ReadBuffer
from .contracts import Authenticator, Draft, Intake, Judgement, Login, Observer, Verdict
from .message import TLS, Client
from .net.secure import SecureTransport
from .net.sockets import BACKLOG, spoken, whence
from .net.turn import Posted, Turn
from .reply import Reply
from .route import Network
from .smtp import proxy
from .smtp.server import (
    Asked,
    AuthWanted,
    ClientNamed,
    Event,
    LoggedIn,
    LoginRefused,
    MailAborted,
    MailContent,
    MailFinished,
    MailStarted,
    Refused,
    Rules,
    ServerSession,
    TLSWanted,
)

#: Connections taken in one turn of the loop, so that those that are in get their turn too.
BATCH = 16
#: The same where several processes take from one socket: few, so that each gets its share.
SHARED_BATCH = 4
#: Seconds between looks at the deadlines of all connections.
SWEEP = 1.0
#: Seconds after which content must come at ``minimum_rate``.
RATE_GRACE = 30.0
#: Time-outs (seconds) while nearly all connections are taken.
STRESS_TIMEOUT = 10.0
#: The same for a TLS handshake.
STRESS_HANDSHAKE = 5.0
#: Share of the connections from which on a listener is under stress.
STRESS = 0.9
#: Seconds that a closed connection is still read, so that a reset does not overtake our last reply.
LINGER = 2.0
#: Octets that are read over in that time.
LINGER_OCTETS = 1024 * 1024
#: Seconds that a client may take to read our last reply.
LAST_WORD = 30.0
#: Content from this size on is acknowledged at once (TCP_QUICKACK), or a sender with Nagle stalls on it.
QUICKACK_FROM: Final = 128 * 1024
#: A read of so many octets is of a client with large mail.
LARGE_READ: Final = 32 * 1024
#: Seconds that a proxy may take to say whom it brings.
PROXY_DEADLINE = 5.0
#: Longest ``greet_delay`` while nearly all connections are taken.
STRESS_GREET_DELAY = 2.0
#: Longest rest, in seconds, while descriptors or memory lack.
LONGEST_REST = 1.0

TOO_MANY: Final = Reply(421, "4.3.2", "too many connections, try again later")
TOO_MANY_OF_YOURS: Final = Reply(421, "4.7.0", "too many connections from your address, try again later")
NO_MEANS: Final = Reply(421, "4.3.2", "out of resources, try again later")
TIMED_OUT: Final = Reply(421, "4.4.2", "time-out, closing")
NO_JUDGEMENT: Final = Judgement(reply=Reply(454, "4.7.0", "authentication is not possible now, try again later"), note="fault")
SHUTTING_DOWN: Final = Reply(421, "4.3.2", "shutting down, try again later")
BUG: Final = Reply(421, "4.3.0", "internal fault, try again later")

# What a connection waits for, as far as its deadline goes.
NEXT: Final = 0
COMMAND: Final = 1
CONTENT: Final = 2
OURS: Final = 3
STUCK: Final = 4
CLOSING: Final = 5
HANDSHAKE: Final = 6

#: 0: not here.
_QUICKACK: Final[int] = getattr(socket, "TCP_QUICKACK", 0)
_NOTHING: Final = b"\0\0\0\0"
_SCARCE: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Limits(Protocol):
    """What the listener asks of ``[limits]``; seconds, octets a second."""

    @property
    def connections(self) -> int: ...
    @property
    def connections_per_client(self) -> int: ...
    @property
    def command_timeout(self) -> float: ...
    @property
    def data_timeout(self) -> float: ...
    @property
    def idle_timeout(self) -> float: ...
    @property
    def handshake_timeout(self) -> float: ...
    @property
    def minimum_rate(self) -> int: ...


@dataclass(frozen=True)
class Door:
    """How clients of a listener come in. Replaced whole on reload, for those that come later.

    ``proxies``: networks whose peers must begin with a PROXY header. ``speakers``: networks whose
    clients may speak for others (XCLIENT, XFORWARD). ``greet_delay``: seconds before the greeting,
    in which whoever talks is turned away. A peer on a unix socket counts as 127.0.0.1."""

    proxies: Sequence[Network] = ()
    speakers: Sequence[Network] = ()
    greet_delay: float = 0.0

    def demands_header(self, ip: str | None) -> bool:
        return _among(ip, self.proxies)

    def trusts(self, ip: str | None) -> bool:
        return _among(ip, self.speakers)


def _among(ip: str | None, networks: Sequence[Network]) -> bool:
    if not networks:
        return False
    address = ip_address(ip or "127.0.0.1")
    return any(address in network for network in networks)


class Admission:
    """Who is in, over all listeners of the process: so many in all, so many of one client
    (an IPv4 address, an IPv6 /64; loopback is not counted by client)."""

    __slots__ = ("_clients", "_descriptors", "_workers", "count", "limits")

    def __init__(self, limits: Limits, descriptors: int | None = None, workers: int = 1) -> None:
        """``limits`` may be replaced at any time. ``descriptors``: connections that the process
        has descriptors for, if it is known. ``workers``: processes that share ``connections``;
        those of one client are counted in each of them alone, because nobody deals them out evenly."""
        self.limits = limits
        self.count = 0
        self._descriptors = descriptors
        self._workers = workers
        self._clients: dict[str, int] = {}

    @property
    def room(self) -> int:
        most = -(-self.limits.connections // self._workers)
        return most if self._descriptors is None else min(most, self._descriptors)

    def enter(self, ip: str) -> Reply | None:
        """``ip``: "" where it is not counted by client. None: the client is in, ``leave`` must follow. Else the reply for it."""
        if self.count >= self.room:
            return TOO_MANY
        key = by_client(ip)
        if key:
            here = self._clients.get(key, 0)
            if here >= self.limits.connections_per_client:
                return TOO_MANY_OF_YOURS
            self._clients[key] = here + 1
        self.count += 1
        return None

    def leave(self, ip: str) -> None:
        self.count -= 1
        key = by_client(ip)
        if key:
            here = self._clients[key] - 1
            if here:
                self._clients[key] = here
            else:
                del self._clients[key]

    @property
    def stress(self) -> bool:
        return self.count >= self.room * STRESS


def by_client(ip: str) -> str:
    """As whom an address is counted; "" if it is not: loopback, no address."""
    if not ip or ip.startswith("127.") or ip == "::1":
        return ""
    if ":" in ip:
        return str(IPv6Address(int(ip_address(ip)) >> 64 << 64))
    return ip


class Listener:
    """One bound address. ``name``: the real one. ``rules`` are replaced with ``go_by``. ``time``: that of the loop."""

    time: Callable[[], float]

    def __init__(
        self,
        sock: socket.socket,
        rules: Rules,
        intake: Intake,
        *,
        observer: Observer,
        admission: Admission,
        session_ids: Callable[[], str],
        shared: bool = False,
        lent: bool = False,
        door: Door | None = None,
        context: ssl.SSLContext | None = None,
        authenticator: Authenticator | None = None,
    ) -> None:
        """``shared``: other processes take connections from this socket as well. ``lent``: it was
        passed on to us, and whoever waits at our end is for the next to whom it is. ``context``: what
        handshakes begin with from now on, where the rules have TLS; may be replaced at any time, as
        may ``authenticator``; without one no rules may offer AUTH."""
        self.sock = sock
        self.door = door or Door()
        self.name = spoken(sock.getsockname())
        self.rules = rules
        self.context = context
        self.intake = intake
        self.observer = observer
        self.admission = admission
        self.connections: set[Connection] = set()
        self.session_ids = session_ids
        self.authenticator = authenticator
        self._shared = shared or lent
        self._nameless: set[asyncio.Task[None]] = set()  # whose proxy has not said yet whom it brings
        self._batch = SHARED_BATCH if shared else BATCH
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._rest = 0.0
        self._resting: asyncio.TimerHandle | None = None
        self._spare: int | None = None
        self._open = False
        self._empty = asyncio.Event()
        self.turn = Turn()
        #: What uvloop reads into, for all connections; its methods bound once, for they are called at each read.
        self.buffer = ReadBuffer()
        self.lend: Callable[[int], object] = self.buffer.get_buffer
        self.filled: Callable[[int], None] = self.buffer.filled

    # ------------------------------------------------------------------ life

    def start(self) -> None:
        """Take connections from now on."""
        self.loop = asyncio.get_running_loop()
        self.time = self.loop.time
        self._open = True
        # Given up for a moment when descriptors run out, so that a client can be told why.
        self._spare = os.open(os.devnull, os.O_RDONLY)
        self.loop.add_reader(self.sock.fileno(), self._accept)
        self._timer = self.loop.call_later(SWEEP, self._sweep)

    def stop(self) -> None:
        """Take no more; those that are in stay."""
        if not self._open:
            return
        self._open = False
        self.loop.remove_reader(self.sock.fileno())
        if self._resting is not None:
            self._resting.cancel()
        self.sock.close()
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    def go_by(self, rules: Rules, door: Door | None = None, *, context: ssl.SSLContext | None) -> None:
        """From now on these rules hold, for those that are in as well; ``door`` for those that come;
        ``context``: as at the beginning."""
        self.rules = rules
        self.context = context
        if door is not None:
            self.door = door
        for connection in self.connections:
            connection.session.rules = rules

    def drain(self, reply: Reply = SHUTTING_DOWN, *, alone: bool = False) -> None:
        """Take no more and let go those that are in, each at the first moment that loses nothing. ``alone``:
        nobody else goes on with this socket, whoever has it too."""
        if self._open and (alone or not self._shared):
            # Who waits to be let in hears it too, instead of a reset.
            with suppress(OSError):
                for _ in range(BACKLOG):
                    sock, address = self.sock.accept()
                    self._turn_away(sock, whence(address)[0], reply)
        self.stop()
        for task in tuple(self._nameless):
            task.cancel()
        for connection in tuple(self.connections):
            connection.stop(reply)

    async def gone(self) -> None:
        """Returns when no connection is left."""
        while self.connections or self._tasks:
            self._empty.clear()
            await self._empty.wait()

    def close(self) -> None:
        """Cut whoever is still there, without a word."""
        self.stop()
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        for connection in tuple(self.connections):
            connection.cut()

    # ------------------------------------------------------------- accepting

    def _accept(self) -> None:
        for _ in range(self._batch):
            try:
                sock, address = self.sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _SCARCE:
                    self._starved(error)
                    return
                # The client is gone again, or the kernel's firewall said no (accept(2)): not our fault.
                continue
            self._admit(sock, *whence(address))
        self._rest = 0.0

    def _admit(self, sock: socket.socket, ip: str, port: int) -> None:
        peer = Client(ip or None, port)
        behind = self.door.demands_header(peer.ip)
        # Those that many come through are not counted as one client.
        counted = "" if behind or self.door.trusts(peer.ip) else ip
        reply = self.admission.enter(counted)
        if reply is not None:
            self._turn_away(sock, ip, reply)
            return
        task = self.loop.create_task(self._attach(sock, peer, counted, behind))
        self._tasks.add(task)
        task.add_done_callback(self._attached)

    def _turn_away(self, sock: socket.socket, ip: str, reply: Reply) -> None:
        self.observer.event("shed", reason=reply.text, listener=self.name, client=ip)
        try:
            sock.setblocking(False)
            if self.rules.tls != "implicit":  # in clear it would not be understood there
                sock.send(reply.wire)
            # A header that nobody read would turn the close into a reset, which overtakes the reply.
            sock.recv(proxy.V2_LIMIT)
        except OSError:
            pass
        sock.close()

    async def _attach(self, sock: socket.socket, peer: Client, counted: str, behind: bool) -> None:
        """``counted``: as whom admission knows this one. ``behind``: a proxy says who it is."""
        known = True
        connection: Connection | None = None
        try:
            client = peer
            through: dict[str, str] | None = None
            if behind:
                header = await self._introduced(sock, peer)
                if header is None:
                    sock.close()
                    return
                client = header.client(peer)
                through = {"proxy": peer.ip or "", **({"authority": header.authority} if header.authority else {})}
                self.admission.leave("")
                counted = "" if self.door.trusts(client.ip) else client.ip or ""
                reply = self.admission.enter(counted)
                if reply is not None:
                    known = False
                    self._turn_away(sock, client.ip or "", reply)
                    return
            # What is in the socket now is the client's own: TLS begins here, or SMTP.
            made = connection = Connection(self, sock, client, counted, through)
            # A protocol by what it can do: a compiled class has no foreign bases.
            await self.loop.connect_accepted_socket(lambda: cast(asyncio.Protocol, made), sock)
        except BaseException as error:
            sock.close()
            # Otherwise it was reset before we came to it, or we are closing.
            if not isinstance(error, (OSError, RuntimeError, asyncio.CancelledError)):
                raise
        finally:
            if known and (connection is None or not connection.entered):
                self.admission.leave(counted)

    async def _introduced(self, sock: socket.socket, peer: Client) -> proxy.Header | None:
        """The PROXY header of this peer, and not an octet behind it is taken from the socket. None: there
        was none that could be read in time, and nothing is said to whoever that was."""
        task = asyncio.current_task()
        assert task is not None
        self._nameless.add(task)
        sock.setblocking(False)
        deadline = self.loop.time() + PROXY_DEADLINE
        held = b""
        try:
            while True:
                seen = _peeked(sock)
                if seen is None:
                    async with asyncio.timeout_at(deadline):
                        await self._readable(sock)
                    continue
                if not seen:
                    if held:
                        self._nobody(peer, "not finished")
                    return None
                header = proxy.read(held + seen)
                if header is None:
                    held += sock.recv(len(seen))
                    continue
                if header.fault is not None:
                    self._nobody(peer, header.fault)
                    return None
                sock.recv(header.size - len(held))
                return header
        except TimeoutError:
            self._nobody(peer, "late")
            return None
        except OSError:
            return None  # reset: a health check that only looks whether somebody listens
        finally:
            self._nameless.discard(task)

    async def _readable(self, sock: socket.socket) -> None:
        come = asyncio.Event()
        self.loop.add_reader(sock.fileno(), come.set)
        try:
            await come.wait()
        finally:
            self.loop.remove_reader(sock.fileno())

    def _nobody(self, peer: Client, fault: str) -> None:
        self.observer.event("shed", reason=f"PROXY header {fault}", listener=self.name, client=peer.ip)

    def _attached(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._empty.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            self.observer.event("bug", message=f"accepting: {error!r}", traceback=_trace(error))

    def _starved(self, error: OSError) -> None:
        """No descriptor or no memory for another connection: tell some why, then rest (asking
        on and on would spin)."""
        self.observer.event("shed", reason=f"cannot accept: {error.strerror}", listener=self.name)
        for _ in range(self._batch):
            if error.errno != errno.EMFILE or self._spare is None:
                break
            os.close(self._spare)
            try:
                sock, address = self.sock.accept()
            except OSError:
                self._refill()
                break
            self._turn_away(sock, whence(address)[0], NO_MEANS)
            self._refill()
        self.loop.remove_reader(self.sock.fileno())
        self._rest = min(max(self._rest * 2, 0.05), LONGEST_REST)
        self._resting = self.loop.call_later(self._rest, self._rested)

    def _refill(self) -> None:
        try:
            self._spare = os.open(os.devnull, os.O_RDONLY)
        except OSError:
            self._spare = None

    def _rested(self) -> None:
        self._resting = None
        if self._spare is None:
            self._refill()
        self.loop.add_reader(self.sock.fileno(), self._accept)

    # ---------------------------------------------------------------- logins

    def judge(self, login: Login, connection: Connection) -> None:
        """Have this login judged; the connection is told."""
        task = self.loop.create_task(self._judge(login, connection))
        self._tasks.add(task)
        task.add_done_callback(self._attached)

    async def _judge(self, login: Login, connection: Connection) -> None:
        judgement = NO_JUDGEMENT
        if self.authenticator is not None:
            try:
                judgement = await self.authenticator.judge(login, connection.session.client, self.name)
            except Exception as error:
                self.observer.event("bug", message=f"judging a login: {error!r}", traceback=_trace(error), session=connection.id)
        connection.judged(judgement)

    # ------------------------------------------------------------- deadlines

    def _sweep(self) -> None:
        self._timer = self.loop.call_later(SWEEP, self._sweep)
        now = self.loop.time()
        limits = self.admission.limits
        most = STRESS_TIMEOUT if self.admission.stress else float("inf")
        late = (
            min(limits.idle_timeout, most),
            min(limits.command_timeout, most),
            min(limits.data_timeout, most),
        )
        handshake = min(limits.handshake_timeout, STRESS_HANDSHAKE if self.admission.stress else most)
        for connection in tuple(self.connections):
            connection.look(now, late, handshake)

    def greet_delay(self, client: Client) -> float:
        """Seconds for which this client waits for its greeting. Those that speak for others are ours."""
        delay = self.door.greet_delay
        if not delay or self.door.trusts(client.ip):
            return 0.0
        return min(delay, STRESS_GREET_DELAY) if self.admission.stress else delay

    def left(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self.admission.leave(connection.counted)
        self._empty.set()


def _peeked(sock: socket.socket) -> bytes | None:
    """What is there and stays there; None: nothing yet. (A compiled coroutine must not wait while it handles an
    exception: everybody else on the loop would be taken to handle it, too.)"""
    try:
        return sock.recv(proxy.V2_LIMIT, socket.MSG_PEEK)
    except (BlockingIOError, InterruptedError):
        return None


class SessionIds:
    """Short ids of connections: unique in this process and, but for a chance of 1 in 2**40, beyond."""

    def __init__(self) -> None:
        self._prefix = os.urandom(5).hex()
        self._numbers = count(1)

    def __call__(self) -> str:
        return f"{self._prefix}{next(self._numbers):x}"


class Connection(Posted):
    """One TCP connection: bytes in, bytes out, and the clock of what it waits for. An ``asyncio.Protocol`` by what it can do."""

    __slots__ = (
        "_begun",
        "_counted",
        "_draft",
        "_ended",
        "_large",
        "_number",
        "_octets",
        "_owed",
        "_paid",
        "_phase",
        "_running",
        "_since",
        "_sock",
        "_stopped",
        "_stuck",
        "_through",
        "_timer",
        "_transport",
        "_unsent",
        "client",
        "counted",
        "entered",
        "id",
        "listener",
        "session",
    )

    _transport: asyncio.Transport

    def __init__(
        self,
        listener: Listener,
        sock: socket.socket,
        client: Client,
        counted: str,
        through: dict[str, str] | None = None,
    ) -> None:
        """``counted``: as whom admission knows it. ``through``: what a proxy brought along, to be told."""
        self.listener = listener
        self.client = client
        self.counted = counted
        self.id = listener.session_ids()
        self.session = ServerSession(listener.rules, client, self.id, listener.name, listener.door.trusts(client.ip))
        self._through = through
        self.entered = False  # connection_made was called; connection_lost will be
        self._sock = sock
        self._draft: Draft | None = None  # of the content that comes now …
        self._number = 0  # … in this transaction
        self._owed: dict[int, Draft] | None = None  # after their end of data, not answered yet
        self._running: list[Event] | None = None  # events being carried out
        self._stopped = False  # reading is paused
        self._stuck = False  # the client does not read
        self._large = False  # reads go into the listener's buffer
        self._ended = False  # the client sends no more
        self._timer: asyncio.Handle | None = None  # the end of a tarpit, or the next turn
        self._unsent = b""  # replies that go out at the end of this turn of the loop
        self._phase = OURS
        self._since = 0.0  # loop time: when this wait began; CONTENT: when octets came last
        self._begun = 0.0  # CONTENT: loop time of its begin
        self._paid = 0.0  # CONTENT: loop time until which its octets last at the least rate
        self._octets = 0  # CONTENT: that came; CLOSING: that were read over
        self._counted = 0  # CONTENT: of them those that ``_paid`` knows

    # ------------------------------------------------------ asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        listener = self.listener
        # uvloop's transports are none of asyncio's classes.
        self._transport = cast(asyncio.Transport, transport)
        self.entered = True
        listener.connections.add(self)
        told: dict[str, object] = {"session": self.id, "listener": listener.name, "client": self.client.ip}
        if self._through is not None:
            told.update(self._through)
        listener.observer.tell("connected", told)
        self._through = None
        try:
            if listener.rules.tls == "implicit":
                # What is in the socket is the handshake; who talks too early is known when that is over.
                self._shake()
                return
            early = self._early()
            self._welcome(early, early and proxy.begins(self._sock.recv(len(proxy.SIGNATURE), socket.MSG_PEEK)))
        except Exception as error:
            self._bug(error)

    def _welcome(self, early: bool, proxied: bool = False) -> None:
        """The greeting, after its delay. ``early``: there are octets before it; a client that talks
        before it is greeted is not waiting for us to agree to anything."""
        delay = 0.0 if early else self.listener.greet_delay(self.client)
        if delay:
            self._timer = self.listener.loop.call_later(delay, self._greet)
        else:
            self._run(self.session.start(early, proxied))

    def _greet(self) -> None:
        """The delay is over, and the client was silent."""
        self._timer = None
        try:
            self._run(self.session.start())
        except Exception as error:
            self._bug(error)

    def _early(self) -> bool:
        """Octets are there that nobody read yet."""
        return fcntl.ioctl(self._sock, termios.FIONREAD, _NOTHING) != _NOTHING

    @property
    def get_buffer(self) -> Callable[[int], object]:
        """See ``asyncio.BufferedProtocol``: uvloop, which asks whoever has this, then reads into the listener's buffer."""
        if not self._large:
            raise AttributeError("reads are short so far")
        return self.listener.lend

    def buffer_updated(self, nbytes: int) -> None:
        listener = self.listener
        listener.filled(nbytes)
        self._received(listener.buffer, nbytes)

    def data_received(self, data: bytes) -> None:
        self._received(data, len(data))

    def _received(self, data: bytes | ReadBuffer, size: int) -> None:
        phase = self._phase
        if phase == CONTENT:
            self._since = self.listener.time()
            self._octets += size
            if size >= LARGE_READ and not self._large and not isinstance(cast(object, self._transport), SecureTransport):
                # From now on a read is content without uvloop's copy of it. A short one costs more so: not from the beginning.
                self._large = True
                self._transport.set_protocol(cast(asyncio.Protocol, self))
        elif phase == NEXT:
            self._phase = COMMAND
        elif phase == CLOSING:
            self._octets += size
            if self._octets > LINGER_OCTETS:
                self.cut()
            return
        try:
            self._run(self.session.receive(data))
        except Exception as error:
            self._bug(error)
        if phase == NEXT and self._phase == COMMAND:
            # Begun and not whole: from here on it is waited for.
            self._since = self.listener.time()

    def eof_received(self) -> bool:
        """The client sends no more, but may still read: what is owed to it goes out first."""
        if self._phase == CLOSING:
            return False
        self._ended = True
        try:
            self._run(self.session.eof())
        except Exception as error:
            self._bug(error)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        was_closing = self._phase == CLOSING
        if self._phase == HANDSHAKE:
            self._tell_insecure("the connection was lost within the handshake")
        self._phase = CLOSING
        self._disarm()
        if not (self._ended or was_closing):
            self._ended = True
            try:
                self._run(self.session.eof())
            except Exception as error:
                self._tell(error)
        self._forget()
        self.listener.left(self)

    def pause_writing(self) -> None:
        self._stuck = True
        if self._phase == HANDSHAKE:
            return  # it goes on, and has a deadline of its own
        self._hold(True)
        self._wait(STUCK)

    def resume_writing(self) -> None:
        self._stuck = False
        if self._running is None:
            self._settle()

    # ------------------------------------------------------------------- TLS

    def _shake(self) -> None:
        """From here on the client speaks TLS; ``secured`` or ``insecure`` follows."""
        context = self.listener.context
        if context is None:
            raise RuntimeError(f"{self.listener.name} has TLS and no certificate")
        self.flush()
        self._wait(HANDSHAKE)
        self._transport = cast(asyncio.Transport, SecureTransport(self._transport, self, context))
        if self._stopped:
            self._hold(False)

    def secured(self, tls: TLS, early: bool) -> None:
        """See ``net.secure.Above``."""
        session = self.session
        self._phase = OURS
        try:
            session.secured(tls)
            self.client = session.client
            if session.awaiting == "greeting":
                self._welcome(early)
            else:
                self._settle()
        except Exception as error:
            self._bug(error)

    def insecure(self, reason: str) -> None:
        """See ``net.secure.Above``."""
        if self._phase != CLOSING:
            self._tell_insecure(reason)
            self._close()

    def _leave(self) -> None:
        """Nothing can be said within a handshake."""
        self._phase = CLOSING
        self.cut()

    def _tell_insecure(self, reason: str) -> None:
        self.listener.observer.event("tls_failed", session=self.id, listener=self.listener.name, client=self.client.ip, reason=reason)

    # ---------------------------------------------------------------- events

    def _run(self, events: list[Event]) -> None:
        """Carry out what the session tells, then do what it asks for."""
        if self._running is not None:
            # An answer that came while its question was being passed on: after what is before it.
            self._running.extend(events)
            return
        if events:
            self._running = events
            try:
                for event in events:  # grows meanwhile
                    self._carry(event)
            finally:
                self._running = None
        self._settle()

    def _carry(self, event: Event) -> None:
        listener = self.listener
        if isinstance(event, MailContent):
            if self._draft is not None:
                self._draft.write(event.octets)
        elif isinstance(event, MailStarted):
            if self._phase == CONTENT:
                # It came with the end of another mail: what is counted of that one is not its own.
                self._phase = OURS
            self._number = event.transaction.number
            self._draft = listener.intake.begin(event.transaction, Drained(self))
        elif isinstance(event, MailFinished):
            draft, self._draft = self._draft, None
            assert draft is not None
            if self._owed is None:
                self._owed = {}
            self._owed[event.number] = draft
            draft.finish(Awaited(self, event.number))
        elif isinstance(event, Refused):
            login = {"user": event.user, "mechanism": event.mechanism, "note": event.note} if isinstance(event, LoginRefused) else {}
            listener.observer.event(
                "refused",
                session=self.id,
                listener=listener.name,
                client=self.client.ip,
                stage=event.stage,
                code=event.reply.code,
                reply=str(event.reply),
                address=event.address,
                **login,
            )
        elif isinstance(event, AuthWanted):
            listener.judge(event.login, self)
        elif isinstance(event, LoggedIn):
            listener.observer.event(
                "authenticated", session=self.id, listener=listener.name, client=self.client.ip, user=event.user, mechanism=event.mechanism
            )
        elif isinstance(event, ClientNamed):
            by, self.client = self.client, event.client
            listener.observer.event(
                "introduced",
                session=self.id,
                listener=listener.name,
                client=event.client.ip,
                name=event.name,
                user=event.client.user,
                by=by.ip,
            )
        elif isinstance(event, Asked):
            listener.intake.ask(event.question, event.checks, self._judged)
        elif isinstance(event, MailAborted):
            self._abort(event.number)
        elif isinstance(event, TLSWanted):
            # Whatever is there before our 220 was not sent in answer to it.
            self._run(self.session.secure(self._early()))
        else:
            raise TypeError(f"no way to carry out {event!r}")

    def _abort(self, number: int) -> None:
        if self._draft is not None and number == self._number:
            draft, self._draft = self._draft, None
            draft.abort()
        elif self._owed and number in self._owed:
            self._owed.pop(number).abort()

    def answer(self, number: int, reply: Reply | Sequence[Reply] | None) -> None:
        """What became of a mail after its end of data."""
        owed = self._owed
        if not owed or number not in owed:
            return  # the client is gone
        del owed[number]
        try:
            self._run(self.session.answer(number, reply))
        except Exception as error:
            self._bug(error)

    def _judged(self, verdict: Verdict) -> None:
        if self._phase == CLOSING:
            return
        try:
            self._run(self.session.verdict(verdict))
        except Exception as error:
            self._bug(error)

    def judged(self, judgement: Judgement) -> None:
        """The word on the login that the session waits for."""
        if self._phase == CLOSING:
            return
        try:
            self._run(self.session.judged(judgement))
        except Exception as error:
            self._bug(error)

    def drained(self) -> None:
        """The draft can take more."""
        if self._running is None and self._phase != CLOSING:
            self._settle()

    def _proceed(self) -> None:
        self._timer = None
        try:
            self._run(self.session.proceed())
        except Exception as error:
            self._bug(error)

    # ------------------------------------------------------ what comes of it

    def _settle(self) -> None:
        """Write, close, pause, resume and set the clock as the session and its mail now want it."""
        session = self.session
        # A transport that is closing although we are not is asked only where something would begin:
        # what is written to it is dropped, and ``connection_lost`` follows.
        if self._phase >= CLOSING:
            return
        if session.delay:
            if self._timer is None:
                self._timer = self.listener.loop.call_later(session.delay, self._proceed)
            self._hold(True)
            self._phase = OURS
            return
        octets = session.outgoing()
        if octets:
            if self._unsent:
                self._unsent = self._unsent + octets
            else:
                self.listener.turn.post(self)
                self._unsent = octets
        if session.closing:
            self._close()
            return
        if session.more and self._timer is None and not self._stuck and not self._transport.is_closing():
            self._timer = self.listener.loop.call_soon(self._proceed)
        draft = self._draft
        awaiting = session.awaiting
        if awaiting == "handshake":
            if not self._transport.is_closing():
                self._shake()
            return
        # Until the greeting or our word on a login is out nobody may talk: whoever does is to be noticed.
        hold = (
            self._stuck or session.more or (session.paused and awaiting not in ("greeting", "login")) or (draft is not None and draft.full)
        )
        if hold is not self._stopped:
            self._hold(hold)
        if self._stuck:
            if self._phase != STUCK:
                self._wait(STUCK)
        elif hold or awaiting in ("greeting", "login", "answer"):
            self._phase = OURS
        elif awaiting == "content":
            if self._phase != CONTENT:
                self._wait(CONTENT)
                self._begun = self._paid = self._since
                self._octets = self._counted = 0
            elif _QUICKACK and self._octets >= QUICKACK_FROM and self._sock.family != socket.AF_UNIX:
                # A sender with Nagle stalls on a delayed acknowledgement. It does not stick: once a read.
                self._sock.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)
        elif octets:
            self._phase = NEXT
            self._since = self.listener.turn.now
        elif self._phase > COMMAND:
            self._wait(NEXT)

    def deliver(self) -> None:
        """The turn is over."""
        try:
            self.flush()
        except Exception as error:
            self._bug(error)

    def flush(self) -> None:
        """Write what is to be written."""
        octets, self._unsent = self._unsent, b""
        if octets and self._phase != CLOSING:
            self._transport.write(octets)

    def _wait(self, phase: int) -> None:
        self._phase = phase
        self._since = self.listener.time()

    def _slow(self, now: float) -> bool:
        """Content comes at less than the minimum rate."""
        limits = self.listener.admission.limits
        rate = limits.minimum_rate
        if rate <= 0:
            return False
        # What came fast pays for a pause, but for no more than data_timeout of it.
        self._paid = min(self._paid + (self._octets - self._counted) / rate, now + limits.data_timeout)
        self._counted = self._octets
        return self._paid < now > self._begun + RATE_GRACE

    def _hold(self, hold: bool) -> None:
        self._stopped = hold
        if self._transport.is_closing():
            return
        if hold:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def look(self, now: float, late: tuple[float, float, float], handshake: float) -> None:
        """Is the deadline over? ``late``: seconds by phase (NEXT, COMMAND, CONTENT); ``handshake``: for all of it."""
        phase = self._phase
        waited = now - self._since
        if phase <= CONTENT:
            if waited > late[phase] or (phase == CONTENT and self._slow(now)):
                self.stop(TIMED_OUT)
        elif phase == STUCK:
            if waited > late[COMMAND]:
                self.cut()
        elif phase == HANDSHAKE:
            if waited > handshake:
                self._tell_insecure("the handshake took too long")
                self._leave()
        elif phase == CLOSING and waited > LINGER and (waited > LAST_WORD or not self._transport.get_write_buffer_size()):
            self.cut()

    # ---------------------------------------------------------------- the end

    def stop(self, reply: Reply) -> None:
        """Say ``reply`` and close; mail after its end of data is answered before."""
        if self._phase == CLOSING:
            return
        if self._phase == HANDSHAKE:
            self._leave()
            return
        try:
            self._run(self.session.stop(reply))
        except Exception as error:
            self._bug(error)

    def cut(self) -> None:
        """Close now, whatever is still to be written."""
        self._transport.abort()

    def _close(self) -> None:
        """Our last octets are on their way. The client's may still be: a reset that answers them
        could overtake ours, so that what comes is read over until it hangs up, or for a moment."""
        self.flush()
        self._disarm()
        self._forget()
        self._octets = 0
        self._wait(CLOSING)
        if self._ended or self._transport.is_closing() or not self._transport.can_write_eof():
            self._transport.close()
            return
        try:
            self._transport.write_eof()
        except OSError:
            # asyncio's own loop says so at once where the client is gone.
            self.cut()
            return
        if self._stopped:
            self._hold(False)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _forget(self) -> None:
        drafts = list(self._owed.values()) if self._owed else []
        if self._draft is not None:
            drafts.append(self._draft)
        self._draft = self._owed = None
        for draft in drafts:
            try:
                draft.abort()
            except Exception as error:
                self._tell(error)

    def _bug(self, error: Exception) -> None:
        """Nothing here can be relied on any more. What is after its end of data gets no word,
        because the truth about it comes later."""
        self._tell(error)
        if self._phase in (CLOSING, HANDSHAKE) or self._transport.is_closing():
            self.cut()
            return
        owed = bool(self._owed)
        try:
            octets = self.session.outgoing()
        except Exception as another:
            self._tell(another)
            octets = b""
        self._unsent += octets if owed else octets + BUG.wire
        self._close()

    def _tell(self, error: Exception) -> None:
        self.listener.observer.event("bug", message=f"{type(error).__name__}: {error}", traceback=_trace(error), session=self.id)


class Drained:
    """How a draft calls for more: made anew for each, which costs less than to bind a method, and than to keep it."""

    __slots__ = ("_connection",)

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __call__(self) -> None:
        self._connection.drained()


@mypyc_attr(free_list_len=1)
class Awaited:
    """An ``Answer`` that a connection waits for."""

    __slots__ = ("_connection", "_number")

    def __init__(self, connection: Connection, number: int) -> None:
        self._connection = connection
        self._number = number

    def __call__(self, reply: Reply | Sequence[Reply] | None) -> None:
        self._connection.answer(self._number, reply)


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))
