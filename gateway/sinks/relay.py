"""Relay and LMTP: mail to mail servers.

Owns connections: which host, kept warm or fresh, how long to wait. What is said on one is
``smtp.client``'s. Never retries what may have been taken, with one exception below; the
Queue alone knows when to try again.

Hosts. All of ``hosts`` are equal: a new connection goes to the one with the fewest. One that
failed (no connection, turned us away) is asked last for a while: FAILED_FIRST seconds,
doubling up to FAILED_LAST. One delivery asks each host at most once, as long as nothing of its
content has left: then it can go on elsewhere without the danger of a second copy.

Warm connections. A delivery takes the one that was used last, without a task, and goes out
in one write with its content (PIPELINING and BDAT). An upstream may close such a connection
at the very moment: no octet of reply comes then, and the delivery is tried once more on a
fresh one. After a rest of RESTED seconds, where that is likely, no content goes out before a
reply came, so nothing can be taken twice. Within that time the content may have left; that
an upstream took it and died before its first reply is possible, and is the lost reply of
promise 2: trying at once or a minute later makes the same copy, and none of them is lost.

REQUIRETLS (RFC 8689). Such mail leaves on connections whose TLS was begun with a certificate that
is good for the host's name (``hosts`` are the operator's word), to a host that offers REQUIRETLS
after it, whatever ``tls`` says of other mail; ``tls = "off"`` carries none. A host that cannot is no
worse for other mail; where none of them can, the mail fails (5.7.10, 5.7.30), and where one could not be
asked it waits. A mail store (LMTP) behind a unix socket is the end of the way and needs none of it.

Deadlines. A delivery has ``timeout`` seconds in all, and a second more for every 64 KiB
of content; within that every step has its own (RFC 5321 §4.5.3.2). While several hosts are
left, one may use up only its share before the conversation stands. One timer looks after all
connections: what is due is found up to a tenth of ``timeout``, at most a second, late.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any, BinaryIO, Final, cast

from ..config import LmtpConfig, RelayConfig
from ..contracts import BROKEN, INTERRUPTED, Delivery, Outcome
from ..message import INLINE_LIMIT, Message
from ..net.tls import client_context
from ..net.turn import Posted, Turn
from ..reply import Reply
from ..smtp import extensions
from ..smtp.client import ClientSession, Event, Mail, Settled, Terms, TLSWanted, Unusable

#: Seconds to connect to one host.
CONNECT: Final = 30.0
#: Seconds per step without a sign of life (RFC 5321 §4.5.3.2).
STEPS: Final = {"setup": 300.0, "command": 300.0, "content": 180.0, "answer": 600.0}
#: Seconds of rest after which a connection is used with caution.
RESTED: Final = 1.0
#: Mails on one connection before it is given up, so that load finds its way to all hosts.
MAILS: Final = 1000
#: Seconds for which a host that failed is asked last.
FAILED_FIRST: Final = 5.0
FAILED_LAST: Final = 60.0
#: Seconds in which a connection that we closed must be gone.
LINGER: Final = 5.0
#: Seconds without TLS toward a host whose handshake failed (``tls = "opportunistic"`` only).
CLEAR: Final = 300.0
#: What mail with REQUIRETLS hears where the file was changed since: it says now that these hosts cannot.
NOT_HERE: Final = Outcome("failed", Reply(550, "5.7.30", "REQUIRETLS support required: the sink has none"))


class Host:
    """One upstream of a sink: ``host:port``, ``[v6]:port`` or ``unix:/path``."""

    __slots__ = ("clear_until", "connections", "delay", "label", "local", "name", "path", "port", "until")

    def __init__(self, label: str) -> None:
        self.label = label
        self.path: str | None = None
        self.name, self.port = "localhost", 0
        if label.startswith("unix:"):
            self.path = label.removeprefix("unix:")
        else:
            name, _, port = label.rpartition(":")
            self.name, self.port = name.removeprefix("[").removesuffix("]"), int(port)
        #: What is sent there does not leave this machine.
        self.local = self.path is not None or self.name in ("localhost", "::1") or self.name.startswith("127.")
        self.connections = 0
        self.until = 0.0
        self.delay = 0.0
        self.clear_until = 0.0

    def final(self, lmtp: bool) -> bool:
        """It is a mail store on this machine: the way of a mail ends there."""
        return lmtp and self.path is not None

    def failed(self, now: float) -> None:
        if now >= self.until:
            self.delay = min(self.delay * 2, FAILED_LAST) or FAILED_FIRST
            self.until = now + self.delay

    def works(self) -> None:
        self.until = self.delay = 0.0


class Job:
    """One delivery on its way: what is still to be tried, and where it was tried."""

    __slots__ = ("began", "deadline", "delivery", "down", "last", "outcomes", "remote", "todo", "tried", "unfit", "unheard")

    def __init__(self, delivery: Delivery, now: float, deadline: float) -> None:
        """``now``, ``deadline``: loop time."""
        self.delivery = delivery
        self.began = now
        self.deadline = deadline
        #: By recipient; None before any host had a word on all of them.
        self.outcomes: list[Outcome | None] | None = None
        #: Recipients that are still to be tried; None: all.
        self.todo: list[int] | None = None
        self.tried: set[Host] = set()
        self.down = True
        self.last: Reply | None = None
        self.remote = ""
        self.unfit: Reply | None = None  # why the last host that cannot carry REQUIRETLS cannot
        self.unheard = False  # a host could not be asked whether it can

    def mail(self) -> Mail:
        delivery = self.delivery
        message = delivery.message
        envelope = message.envelope
        recipients = delivery.recipients
        stored, trace = message.stored, message.trace
        timed = extensions.deadline(message)
        mail = Mail(
            envelope.mail_from,
            envelope.mail_params,
            recipients if self.todo is None else [recipients[index] for index in self.todo],
            len(trace) + stored.size,
            stored.eight_bit or not trace.isascii(),
            trace + stored.read() if stored.path is None else None,
            priority=extensions.traced_priority(envelope, message.priority),
        )
        if timed is not None:
            mail.by, mail.elapsed = timed[1], self.elapsed
        return mail

    def elapsed(self) -> float:
        """Seconds since the message was received."""
        return self.delivery.age + asyncio.get_running_loop().time() - self.began

    def heard(self, outcomes: list[Outcome | None]) -> bool:
        """What a host said of those that were to be tried. False: it takes fewer in one transaction, and some are left."""
        known, todo = self.outcomes, self.todo
        if known is None or todo is None:
            known = self.outcomes = outcomes
        else:
            for index, outcome in zip(todo, outcomes, strict=True):
                known[index] = outcome
        for outcome in outcomes:
            if outcome is None:
                self.todo = [index for index, decided in enumerate(known) if decided is None]
                return False
        return True


class Pieces:
    """Content that lies in a file, our trace header first. ``read`` in a thread, one at a time; ``close`` between them."""

    __slots__ = ("_file", "_path", "_trace")

    def __init__(self, message: Message) -> None:
        assert message.stored.path is not None
        self._path = message.stored.path
        self._trace = message.trace
        self._file: BinaryIO | None = None

    def read(self) -> bytes:
        """The next piece; empty at the end. Raises OSError."""
        if self._file is None:
            self._file = open(self._path, "rb")  # noqa: SIM115 (closed by ``close``: it is read over many calls)
        octets = self._file.read(INLINE_LIMIT)
        if octets and self._trace:
            octets, self._trace = self._trace + octets, b""
        return octets

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Connection(Posted):
    """One connection to one host, with at most one job: an ``asyncio.Protocol``."""

    __slots__ = (
        "acted",
        "host",
        "job",
        "left",
        "mails",
        "paused",
        "pieces",
        "reading",
        "session",
        "setup_until",
        "shut_at",
        "sink",
        "strict",
        "transport",
    )

    def __init__(self, sink: RelaySink, host: Host, terms: Terms, strict: bool = False) -> None:
        """``strict``: TLS only with a certificate that is good for the host's name."""
        self.sink = sink
        self.host = host
        self.strict = strict
        self.session = ClientSession(terms, host.label)
        self.transport: asyncio.Transport | None = None
        self.job: Job | None = None
        self.acted = 0.0  # loop time of the last sign of life
        self.setup_until = 0.0  # loop time by which the conversation must stand
        self.mails = 0
        self.paused = False
        self.reading = False
        self.pieces: Pieces | None = None
        self.left = 0  # octets of the content that were not handed over yet
        self.shut_at = 0.0  # loop time of our close; 0 before

    # ------------------------------------------------------------- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.acted = self.sink.now()
        event = self.session.receive(data)
        if event is not None:
            self.happened(event)
        elif self.session.closing or self.pieces is not None:
            self.flush()
        else:
            self.sink.turn.post(self)

    def eof_received(self) -> bool | None:
        return None

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.acted = self.sink.now()
        self.pump()

    def connection_lost(self, exc: Exception | None) -> None:
        event = self.session.eof()
        self.sink.gone(self)
        if event is not None:
            self.happened(event)

    # ------------------------------------------------------------------------ a job

    def carry(self, job: Job) -> None:
        now = self.sink.now()
        self.job = job
        self.mails += 1
        message = job.delivery.message
        if message.stored.path is not None:
            self.pieces = Pieces(message)
            self.left = len(message.trace) + message.stored.size
        event = self.session.begin(job.mail(), cautious=now - self.acted > self.sink.rested)
        self.acted = now
        if event is None:
            self.sink.turn.post(self)
        else:
            # Not from within: many mails that this upstream cannot carry would nest as deep.
            asyncio.get_running_loop().call_soon(self.happened, event)

    def deliver(self) -> None:
        """The turn is over (``net.turn.Posted``)."""
        if self.transport is not None and not self.transport.is_closing():
            self.flush()

    def flush(self) -> None:
        octets = self.session.outgoing()
        if octets and self.transport is not None:
            self.transport.write(octets)
        if self.session.closing:
            self.shut()
        elif self.pieces is not None:
            self.pump()

    def happened(self, event: Event) -> None:
        if isinstance(event, TLSWanted):
            self.sink.spawn(self.secure())
            return
        job = self.job
        assert job is not None
        self.job = None
        self.end_content()
        if isinstance(event, Settled):
            self.sink.settled(self, job, event)
        else:
            self.shut()
            self.sink.unusable(self, job, event)

    def pump(self) -> None:
        """Hand over another piece, if the upstream and the transport want one."""
        if self.pieces is None or self.reading or self.paused or not self.session.wants_content:
            return
        self.reading = True
        read = asyncio.get_running_loop().run_in_executor(None, self.pieces.read)
        read.add_done_callback(partial(self.piece, self.pieces))

    def piece(self, pieces: Pieces, read: asyncio.Future[bytes]) -> None:
        self.reading = False
        if self.pieces is not pieces:
            # It was for a mail that ended meanwhile.
            pieces.close()
            self.pump()
            return
        if not self.session.wants_content or read.cancelled():
            return
        error = read.exception()
        octets = b"" if error is not None else read.result()
        self.left -= len(octets)
        if error is not None or self.left < 0 or (not octets and self.left > 0):
            # Without its end of data the upstream takes nothing of it.
            self.lose_content(error)
            return
        self.acted = self.sink.now()
        self.session.content(octets, last=self.left == 0)
        self.flush()

    def end_content(self) -> None:
        """No more of it is wanted."""
        if self.pieces is not None and not self.reading:
            self.pieces.close()
        self.pieces = None

    def lose_content(self, error: BaseException | None) -> None:
        job = self.drop()
        assert job is not None
        context: dict[str, object] = {"message": f"the content of {job.delivery.message.id} cannot be read as it was stored"}
        if error is not None:
            context["exception"] = error
        asyncio.get_running_loop().call_exception_handler(context)
        self.sink.finish(job, BROKEN)

    async def secure(self) -> None:
        transport, context = self.transport, self.sink.strict_context() if self.strict else self.sink.context
        itself: Any = self
        assert transport is not None
        assert context is not None
        try:
            secured = await asyncio.get_running_loop().start_tls(
                transport,
                itself,
                context,
                server_hostname=self.host.name,
                ssl_handshake_timeout=max(self.setup_until - self.sink.now(), 0.001),
            )
        except (OSError, ssl.SSLError) as error:
            if self.strict and isinstance(error, ssl.SSLError) and not isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)):
                self.lost(transport, self.session.unsafe(f"TLS handshake failed: {_reason(error)}"))
                return
            event = self.session.stop(f"TLS handshake failed: {_reason(error)}")
            if not self.strict and self.sink.opportunistic and isinstance(event, Unusable):
                # As good as a host without STARTTLS, and no reason to think less of it.
                self.host.clear_until = self.sink.now() + CLEAR
                event.stale = True
            elif self.strict and isinstance(event, Unusable):
                # Other mail may not need what failed here.
                event.down = False
            self.lost(transport, event)
            return
        if secured is None or self.session.closing:
            self.lost(secured or transport, self.session.eof())
            return
        self.transport = secured
        self.session.secured(verified=self.strict or self.sink.verifies)
        self.flush()

    # ------------------------------------------------------------------------- ends

    def lost(self, transport: asyncio.Transport, event: Event | None) -> None:
        transport.abort()
        self.sink.gone(self)
        if event is not None:
            self.happened(event)

    def overdue(self, now: float) -> None:
        """The sweep passes by."""
        session = self.session
        if self.job is None:
            if self.shut_at and now - self.shut_at >= self.sink.linger:
                self.abort()
            elif session.idle and now - self.acted >= self.sink.idle:
                session.quit()
                self.flush()
            return
        step = session.awaiting
        until = min(self.job.deadline, self.acted + STEPS[step], self.setup_until if step == "setup" else self.job.deadline)
        if now < until:
            return
        event = session.stop(f"no reply in time ({step})")
        self.abort()
        if event is not None:
            self.happened(event)

    def shut(self) -> None:
        """Say what is left to say, then close. Nothing that is said here matters to mail."""
        transport = self.transport
        if transport is not None and not transport.is_closing():
            octets = self.session.outgoing()
            if octets:
                transport.write(octets)
            # An upstream that does not read would hold this up: the sweep sees to that.
            transport.close()
            self.shut_at = self.sink.now()

    def drop(self) -> Job | None:
        """Break off, whatever the upstream may think; the job is the caller's now."""
        job, self.job = self.job, None
        self.end_content()
        self.session.stop("given up")
        self.abort()
        return job

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class RelaySink:
    """``type = "relay"``: SMTP to one of several hosts. Raises ValueError for ``mx = true``, and
    OSError or ssl.SSLError for a ``ca_file`` that cannot be used."""

    lmtp = False

    def __init__(self, name: str, config: RelayConfig | LmtpConfig, hostname: str) -> None:
        if not config.hosts:
            raise ValueError(f'sink {name}: mx = true is not offered yet; write hosts = ["mail.example.net:25"]')
        self.name = name
        self.carries_binary = config.binarymime
        self.context = client_context(config.tls, config.ca_file)
        self.opportunistic = config.tls == "opportunistic"
        self.verifies = config.tls == "verify"
        self._carries_requiretls = config.carries_requiretls
        self._ca_file = config.ca_file
        self._strict = client_context("verify", config.ca_file) if config.ca_file is not None else None
        self._concurrency = config.concurrency
        self.idle = config.idle
        self._timeout = config.timeout
        self._hosts = [Host(label) for label in config.hosts]
        self._terms = Terms(
            hostname=hostname,
            lmtp=self.lmtp,
            tls=config.tls,
            username=config.username,
            password=config.password,
            pipelining=config.pipelining,
            binarymime=config.binarymime,
        )
        self.turn = Turn()
        self._warm: list[Connection] = []
        self._connections: set[Connection] = set()
        self._dialing: set[Job] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._tick = min(max(config.timeout / 10, 0.01), 1.0)
        self._timer: asyncio.TimerHandle | None = None
        #: Connects; raises OSError. A seam for tests, as the times are.
        self.reach: Callable[[Connection], Awaitable[None]] = _open
        self.rested, self.linger = RESTED, LINGER
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._empty: asyncio.Future[None] | None = None

    async def open(self) -> None:
        self._loop = asyncio.get_running_loop()

    def start(self, delivery: Delivery) -> None:
        if self._closed:
            delivery.settle_all(INTERRUPTED)
            return
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        message = delivery.message
        now = self.now()
        job = Job(delivery, now, now + self._timeout + message.stored.size // 65536)
        if message.envelope.requiretls:
            self._start_strict(job)
            return
        while self._warm:
            connection = self._warm.pop()
            if connection.session.idle:
                connection.carry(job)
                return
        self._dial(job)

    def _start_strict(self, job: Job) -> None:
        envelope = job.delivery.message.envelope
        if not self._carries_requiretls:
            self.finish(job, NOT_HERE)
            return
        for connection in reversed(self._warm):
            if connection.session.idle and connection.session.fits(envelope.mail_from, envelope.mail_params):
                self._warm.remove(connection)
                connection.carry(job)
                return
        if self._warm and len(self._connections) >= self._concurrency:
            # Room for a connection that will do.
            unfit = self._warm.pop(0)
            if unfit.session.idle:
                unfit.session.quit()
                unfit.flush()
        self._dial(job)

    def strict_context(self) -> ssl.SSLContext:
        """For connections that must be to the right host, whatever ``tls`` says."""
        if self._strict is None:
            # Reading the machine's authorities takes long, and few sinks ever need them.
            self._strict = self.context if self.verifies and self.context is not None else client_context("verify", self._ca_file)
            assert self._strict is not None
        return self._strict

    async def close(self) -> None:
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
            # Done, though what discards each may not have been called yet (Python 3.12 waits no turn for that).
            self._tasks.clear()
        for job in list(self._dialing):
            self._dialing.discard(job)
            self.finish(job, INTERRUPTED)
        for connection in list(self._connections):
            if connection.job is not None:
                carried = connection.drop()
                assert carried is not None
                self.finish(carried, INTERRUPTED)
            else:
                connection.session.quit()
                connection.shut()
        self._warm.clear()
        if self._connections:
            self._empty = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._empty], timeout=2.0)
            for connection in list(self._connections):
                connection.abort()
            await asyncio.wait([self._empty], timeout=1.0)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ------------------------------------------------------------------ connections

    def now(self) -> float:
        assert self._loop is not None
        return self._loop.time()

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _dial(self, job: Job) -> None:
        self._dialing.add(job)
        self.spawn(self._connect(job))

    async def _connect(self, job: Job) -> None:
        try:
            connection = await self._connected(job)
        except Exception as error:
            asyncio.get_running_loop().call_exception_handler(
                {"message": f"sink {self.name} failed on {job.delivery.id}", "exception": error}
            )
            self._dialing.discard(job)
            self.finish(job, BROKEN)
            return
        self._dialing.discard(job)
        if connection is not None:
            connection.carry(job)
        else:
            self.finish(job, None)

    async def _connected(self, job: Job) -> Connection | None:
        """A connection to the best host that is left for this job; None if none is."""
        loop = asyncio.get_running_loop()
        while True:
            now = self.now()
            left = [host for host in self._hosts if host not in job.tried]
            if not left or now >= job.deadline:
                return None
            fit = [host for host in left if host.until <= now]
            host = min(fit, key=lambda host: host.connections) if fit else min(left, key=lambda host: host.until)
            until = now + (job.deadline - now) / len(left)
            final = host.final(self.lmtp)
            strict = job.delivery.message.envelope.requiretls and not final
            terms = replace(self._terms, clear_login=host.local, final=final)
            if terms.tls == "opportunistic" and host.clear_until > now and not strict:
                terms = replace(terms, tls="off")
            connection = Connection(self, host, terms, strict)
            # Counted from now on: of many that connect at once each must see the others.
            host.connections += 1
            try:
                async with asyncio.timeout_at(min(until, now + CONNECT)):
                    await self.reach(connection)
            except BaseException as error:
                host.connections -= 1
                if not isinstance(error, (OSError, UnicodeError)):
                    raise
                self._blame(job, host, Reply.untrusted(451, f"4.4.1 cannot connect to {host.label}: {_reason(error)}"), down=True)
                continue
            if (ended := connection.session.ended) is not None:
                # It spoke or was lost as it came up, before the job could reach it.
                host.connections -= 1
                connection.abort()
                self._blame(job, host, ended.reply, ended.down)
                continue
            connection.setup_until = until
            connection.acted = self.now()
            self._connections.add(connection)
            if self._timer is None:
                self._timer = loop.call_later(self._tick, self._sweep)
            return connection

    def _blame(self, job: Job, host: Host, reply: Reply, down: bool) -> None:
        host.failed(self.now())
        job.unheard = True
        job.tried.add(host)
        job.last = reply
        job.remote = host.label
        job.down = job.down and down

    def _sweep(self) -> None:
        self._timer = None
        now = self.now()
        for connection in list(self._connections):
            connection.overdue(now)
        if self._connections and self._timer is None and not self._closed:
            assert self._loop is not None
            self._timer = self._loop.call_later(self._tick, self._sweep)

    def gone(self, connection: Connection) -> None:
        """The connection is lost, whoever ended it."""
        if connection not in self._connections:
            return
        self._connections.discard(connection)
        connection.host.connections -= 1
        if connection in self._warm:
            self._warm.remove(connection)
        if not self._connections and self._empty is not None and not self._empty.done():
            self._empty.set_result(None)

    # --------------------------------------------------------------- ends of a job

    def settled(self, connection: Connection, job: Job, event: Settled) -> None:
        session = connection.session
        if session.idle:
            connection.host.works()
            limit = session.mail_limit
            if connection.mails >= MAILS or (limit is not None and connection.mails >= limit):
                session.quit()
        if not job.heard(event.outcomes):
            # The upstream takes fewer recipients in one transaction: the others follow.
            if session.idle:
                connection.carry(job)
            else:
                connection.flush()
                self._dial(job)
            return
        connection.flush()
        if session.idle:
            self._warm.append(connection)
        # All of them are decided.
        job.delivery.settle(cast("list[Outcome]", job.outcomes))

    def unusable(self, connection: Connection, job: Job, event: Unusable) -> None:
        host = connection.host
        if event.stale:
            # The connection is to blame, and a fresh one is never stale.
            job.last, job.remote = event.reply, host.label
        elif event.unfit:
            job.unfit, job.remote, job.down = event.reply, host.label, False
            job.tried.add(host)
        else:
            self._blame(job, host, event.reply, event.down)
        self._dial(job)

    def finish(self, job: Job, outcome: Outcome | None) -> None:
        """Settle; what was not decided is ``outcome``, or why no host was of use."""
        if outcome is None and job.unfit is not None and not job.unheard and len(job.tried) == len(self._hosts):
            outcome = Outcome("failed", job.unfit, job.remote)
        elif outcome is None:
            reply = job.last or Reply(451, "4.4.1", "no host answered in time")
            outcome = Outcome("deferred", reply, job.remote, down=job.down)
        known = job.outcomes
        if known is None:
            job.delivery.settle_all(outcome)
        else:
            job.delivery.settle([decided or outcome for decided in known])


class LmtpSink(RelaySink):
    """``type = "lmtp"``: a mail store (RFC 2033), one reply per recipient."""

    lmtp = True


async def _open(connection: Connection) -> None:
    loop = asyncio.get_running_loop()
    host = connection.host
    made: Any = connection
    if host.path is not None:
        await loop.create_unix_connection(lambda: made, host.path)
    else:
        await loop.create_connection(lambda: made, host.name, host.port)


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        # An alert that Python has no name for has no reason, whatever the type says.
        return getattr(error, "reason", None) or "protocol error"
    if isinstance(error, TimeoutError):
        return "timed out"
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
