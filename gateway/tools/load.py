"""The load generator: what ``gateway load`` does, and what benches drive servers with.

A ``Plan`` says what is sent where; ``run`` sends it and returns a ``Report``. Every session is a
connection that has one message under way, or, where ``pipeline`` sends the next group with a body,
that one too. Without a rate each session begins its next message when the last one was answered
(closed loop: a slow server is asked less). With a rate messages are due at fixed times, whether
sessions are free or not, and the latency of each counts from when it was due: a server that stalls
is not spared what would have come meanwhile (no coordinated omission).

The octets go through ``_wire.pyx``; here is what is built once, TLS, and the totals. Refuses targets
that are not loopback or private unless told ``anywhere``, and plans without a bound.

RFC 5321, RFC 2920 (PIPELINING), RFC 3030 (BDAT), RFC 2033 (LMTP), RFC 3207, RFC 8314 (TLS), RFC 4954 (AUTH).
"""

from __future__ import annotations

import base64
import re
import resource
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .._parser import stuff
from ..net.addresses import not_public
from ._wire import Generator, Histogram

#: Seconds between two looks at the clock and at Ctrl-C.
SLICE = 0.25
#: A body's line, CRLF and all: 76 characters, as base64 has them.
LINE = b"QmVuY2htYXJrcyBhcmUgb25seSBhcyBob25lc3QgYXMgd2hhdCB0aGV5IGxlYXZlIG91dC4gICAg\r\n"[-78:]
#: Shares that are told, by the name they have in a table.
SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999, "max": 1.0}


#: What to do about what a server does not offer; ``gateway receive`` is the one that never does.
HINTS = {
    "the server does not offer STARTTLS": 'gateway receive never does; a gateway where its listener says tls = "starttls"',
    "the server does not offer AUTH": 'gateway receive never does; a gateway where its listener says auth = "offered", under TLS (--tls starttls) unless auth_without_tls',
}


class PlanError(ValueError):
    """The plan cannot be carried out as it stands; the text says why."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send. ``target``: host:port, [v6]:port or unix:/path.

    ``messages`` and ``seconds``: at least one, whichever comes first ends the run. ``sizes``: octets of
    made content, ``contents``: own content (CRLF lines); all of them take turns. ``recipients``: how many
    each message has, load+1@… and so on if more than one. ``per_connection``: messages before QUIT, 0 never.
    ``rate``: messages a second for all sessions together, 0 as fast as it goes. ``timeout``: seconds for a reply.
    ``auth``: user and password, said by AUTH PLAIN. ``ca_file`` and ``verify``: whom TLS trusts (nobody is asked
    unless said)."""

    target: str
    sessions: int = 10
    messages: int = 0
    seconds: float = 0.0
    sizes: Sequence[int] = (1024,)
    contents: Sequence[bytes] = ()
    recipients: int = 1
    per_connection: int = 0
    pipeline: bool = False
    bdat: bool = False
    lmtp: bool = False
    tls: Literal["off", "starttls", "implicit"] = "off"
    ca_file: Path | None = None
    verify: bool = False
    auth: tuple[str, str] | None = None
    rate: float = 0.0
    sender: str = "load@client.example"
    recipient: str = "load@bench.example"
    hello: str = "client.example"
    timeout: float = 60.0
    anywhere: bool = False


@dataclass(slots=True)
class Report:
    """What came of a run. ``seconds``: from the first MAIL to the last reply after data; ``cpu``: of the
    generator (its process), seconds. ``latency`` and ``setup`` (connect to the last reply before the first
    mail) are in nanoseconds. ``unsent``: were due by the rate, and found no session. ``replies``: by what they
    answered, then by code; ``texts``: one for each code from 400. ``failure``: why nothing could be sent, or ""."""

    plan: Plan
    seconds: float
    cpu: float
    begun: int
    accepted: int
    refused: int
    broken: int
    unsent: int
    connections: int
    octets: int
    latency: Histogram
    setup: Histogram
    replies: dict[str, dict[int, int]]
    texts: dict[tuple[str, int], str]
    errors: dict[str, int]
    failure: str = ""
    interrupted: bool = False

    @property
    def rate(self) -> float:
        """Messages taken a second."""
        return self.accepted / self.seconds if self.seconds else 0.0

    @property
    def due(self) -> int:
        """Messages that were begun, or should have been by the rate. The latency knows those that got an answer."""
        return self.begun + self.unsent

    @property
    def cost(self) -> float:
        """Microseconds of the generator's CPU for each message that came to its end."""
        return self.cpu / max(self.accepted + self.refused, 1) * 1e6

    @property
    def good(self) -> bool:
        """Something was sent, and every message was taken."""
        return not (self.failure or self.refused or self.broken or self.unsent) and self.accepted > 0

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``; times in milliseconds."""
        plan = {
            "target": self.plan.target,
            "sessions": self.plan.sessions,
            "sizes": [len(content) for content in contents_of(self.plan)],
            **{
                name: getattr(self.plan, name)
                for name in ("messages", "seconds", "recipients", "per_connection", "pipeline", "bdat", "lmtp", "tls", "rate")
            },
        }
        return {
            "plan": plan,
            "seconds": round(self.seconds, 6),
            "messages": {name: getattr(self, name) for name in ("begun", "accepted", "refused", "broken", "unsent")},
            "rate": round(self.rate, 1),
            "octets": self.octets,
            "connections": self.connections,
            "latency_ms": {**told(self.latency), "of": self.due},
            "setup_ms": told(self.setup),
            "replies": {stage: {str(code): count for code, count in codes.items()} for stage, codes in self.replies.items()},
            "texts": {f"{stage} {code}": text for (stage, code), text in self.texts.items()},
            "errors": self.errors,
            "cpu_seconds": round(self.cpu, 3),
            "cpu_us_per_message": round(self.cost, 2),
            "failure": self.failure,
            "interrupted": self.interrupted,
        }


def told(seen: Histogram) -> dict[str, float]:
    """Count, mean and percentiles of nanoseconds, in milliseconds."""
    if not seen.count:
        return {"count": 0}
    shares = {name: round(seen.at(share) / 1e6, 4) for name, share in SHARES.items()}
    return {"count": seen.count, "mean": round(seen.total / seen.count / 1e6, 4), **shares}


# --------------------------------------------------------------------------- what is sent


def made(size: int, recipient: str = "load@bench.example", sender: str = "load@client.example") -> bytes:
    """Content of this many octets: a header and lines of base64; without a header where there is no room."""
    header = f"From: <{sender}>\r\nTo: <{recipient}>\r\nSubject: load\r\nDate: Mon, 23 Nov 2026 00:00:00 +0000\r\n".encode()
    header += b"Message-ID: <load@client.example>\r\n\r\n"
    if len(header) + 2 > size:
        header = b"\r\n" if size >= 2 else b""
    left = size - len(header)
    body = LINE * (left // len(LINE))
    rest = left - len(body)
    # One octet cannot be a line: it goes onto the last one.
    body += b"x" * (rest - 2) + b"\r\n" if rest >= 2 else b""
    if rest == 1:
        body = body[:-2] + b"x\r\n" if body else b"x"
    return header + body


def read(path: Path) -> bytes:
    """A mail from a file, its line ends made CRLF. Raises OSError."""
    return re.sub(rb"\r\n|\r|\n", b"\r\n", path.read_bytes())


def contents_of(plan: Plan) -> list[bytes]:
    """Own contents where there are some, else made ones."""
    return list(plan.contents) or [made(size, plan.recipient, plan.sender) for size in plan.sizes]


def _mails(plan: Plan, contents: Sequence[bytes]) -> Iterator[tuple[bytes, bytes, bytes]]:
    for content in contents:
        line = f"MAIL FROM:<{plan.sender}>".encode()
        eight = line if content.isascii() else line + b" BODY=8BITMIME"
        if plan.bdat:
            body = b"BDAT %d LAST\r\n" % len(content) + content
        else:
            stuffed = stuff(content)
            body = stuffed + (b".\r\n" if not stuffed or stuffed.endswith(b"\r\n") else b"\r\n.\r\n")
        yield line + b"\r\n", eight + b"\r\n", body


def _recipients(plan: Plan) -> list[bytes]:
    local, at, domain = plan.recipient.rpartition("@")
    if plan.recipients == 1:
        return [f"RCPT TO:<{plan.recipient}>\r\n".encode()]
    return [f"RCPT TO:<{local}+{number}{at}{domain}>\r\n".encode() for number in range(1, plan.recipients + 1)]


# ------------------------------------------------------------------------------- where to


@dataclass(frozen=True, slots=True)
class Place:
    """A resolved target. ``port`` -1: ``host`` is the path of a unix socket. ``name``: as it was written."""

    host: str
    port: int
    scope: int = 0
    name: str = ""


def resolve(target: str, anywhere: bool = False) -> Place:
    """Raises PlanError for what is no address, has none, or is public without ``anywhere``."""
    if target == "unix:":
        raise PlanError(f"{target!r} names no path, as unix:/run/lmtp.sock does")
    if target.startswith("unix:"):
        return Place(target.removeprefix("unix:"), -1)
    name, _, port = target.rpartition(":")
    if not name or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise PlanError(f"{target!r} is not host:port, [v6]:port or unix:/path")
    name = name.strip("[]")
    try:
        found = socket.getaddrinfo(name, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise PlanError(f"{name!r} has no address: {error}") from None
    # As the gateway binds a name: IPv4 before IPv6.
    *_, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    host = str(address[0])
    if not anywhere and not_public(host) is None:
        raise PlanError(f"{host} is a public address: load is for your own machines; --anywhere if it is one of them")
    return Place(host.partition("%")[0], int(port), int(address[3]) if len(address) == 4 else 0, name)


# ------------------------------------------------------------------------------------ TLS


class Secured:
    """TLS of one connection, without I/O. Methods raise ssl.SSLError. ``shaken``: the handshake is over."""

    def __init__(self, context: ssl.SSLContext, name: str) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name or None)
        self.shaken = False

    def feed(self, octets: bytes) -> bytes:
        """From the network; returns what it says in clear. Carries the handshake on."""
        if octets:
            self._incoming.write(octets)
        clear = []
        try:
            if not self.shaken:
                self._tls.do_handshake()
                self.shaken = True
            while piece := self._tls.read(65536):
                clear.append(piece)
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            pass
        return b"".join(clear)

    def write(self, octets: bytes) -> None:
        """In clear, for the other side."""
        self._tls.write(octets)

    def take(self) -> bytes:
        """What must go to the network now."""
        return self._outgoing.read()


def _context(plan: Plan) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=None if plan.ca_file is None else str(plan.ca_file))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if not plan.verify and plan.ca_file is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


# ------------------------------------------------------------------------------------ run


def generator(plan: Plan) -> Generator:
    """The engine for this plan, not started. Raises PlanError for a plan that cannot be, OSError for
    files that cannot be read or descriptors that are not there."""
    if plan.messages <= 0 and plan.seconds <= 0:
        raise PlanError("a load without an end: say how many messages, or for how many seconds")
    if min(plan.messages, plan.seconds, plan.rate, plan.per_connection) < 0:
        raise PlanError("a number is below nothing")
    if plan.sessions < 1 or plan.recipients < 1 or min(plan.sizes, default=0) < 0:
        raise PlanError("at least one session and one recipient, and no size below nothing")
    if not 0 < plan.timeout <= 3600:
        raise PlanError("a reply has a time-out between 0 and 3600 seconds")
    for word in (plan.sender, plan.recipient, plan.hello):
        if any(ord(character) < 33 for character in word):
            raise PlanError(f"{word!r} has a space or a control character")
    place = resolve(plan.target, plan.anywhere)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = plan.sessions + 64
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise PlanError(f"{plan.sessions} sessions need {wanted} descriptors, and {hard} are allowed (ulimit -Hn)")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    contents = contents_of(plan)
    secure: Callable[[], Secured] | None = None
    if plan.tls != "off":
        context, name = _context(plan), place.name
        secure = lambda: Secured(context, name)  # noqa: E731 - a name would only repeat it
    login = b""
    if plan.auth is not None:
        login = b"AUTH PLAIN " + base64.b64encode("\0".join(("", *plan.auth)).encode()) + b"\r\n"
    try:
        return Generator(
            place.host,
            place.port,
            scope=place.scope,
            sessions=plan.sessions,
            mails=list(_mails(plan, contents)),
            sizes=[len(content) for content in contents],
            recipients=_recipients(plan),
            hello=f"{'LHLO' if plan.lmtp else 'EHLO'} {plan.hello}\r\n".encode(),
            auth=login,
            messages=plan.messages,
            seconds=plan.seconds,
            rate=plan.rate,
            per_connection=plan.per_connection,
            pipeline=plan.pipeline,
            bdat=plan.bdat,
            lmtp=plan.lmtp,
            secure=secure,
            implicit=plan.tls == "implicit",
            timeout=plan.timeout,
        )
    except ValueError as error:
        raise PlanError(str(error)) from None


def run(plan: Plan, progress: Callable[[Generator, float], None] | None = None) -> Report:
    """Sends it all; blocks until the last reply. ``progress`` is called a few times a second with the running
    engine and the seconds since the start. Ctrl-C begins nothing more and waits for what is out; a second one
    drops it. Raises PlanError and OSError as ``generator`` does."""
    engine = generator(plan)
    began, before = time.monotonic(), time.process_time()
    interruptions = 0
    while True:
        try:
            if not engine.turn(SLICE):
                break
            if progress is not None:
                progress(engine, time.monotonic() - began)
        except KeyboardInterrupt:
            interruptions += 1
            if interruptions > 1:
                engine.close()
                break
            engine.stop()
    failure = engine.failure
    if not failure and not engine.begun:
        causes = [f"{what}, {count:,} {'time' if count == 1 else 'times'}" for what, count in engine.errors().items()]
        failure = "no session came about: " + ("; ".join(causes) or "no time for it")
    if failure in HINTS:
        failure += f": {HINTS[failure]}"
    return Report(
        plan,
        engine.elapsed,
        time.process_time() - before,
        engine.begun,
        engine.accepted,
        engine.refused,
        engine.broken,
        engine.unsent,
        engine.connections,
        engine.octets,
        engine.latency,
        engine.setup,
        engine.replies(),
        engine.texts(),
        engine.errors(),
        failure,
        interruptions > 0,
    )
