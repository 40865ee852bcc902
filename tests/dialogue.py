"""Golden dialogues: reads ``tests/transcripts/*.smtp`` and runs them, on a session or over a socket.

One story a file. Its first line is ``# RFC section: reason``. Then settings, then steps::

    @set message_size=1000          a rule of the listener (see Settings); ``auth=offered`` brings USERS
    @route *@app.example            replaces the default route; options: delivered, relay (in clear), from=10.0.0.0/8, login
    @answers 451 4.3.0 full         what the intake says to each finished message in turn (default 250)
    @set extensions=true            FUTURERELEASE (an hour), DELIVERBY (10 s), MT-PRIORITY; it is 2027-01-15T08:00:00Z
    @here why                       this one is never run over a socket, and why
    @vary form lf-dot-lf FORM=\\n.\\n   a variant: {FORM} in the steps stands for it. Each label of a
                                    group is a case of its own; several groups are multiplied

    @ehlo  @helo  @lhlo             greeting, that command and its reply
    C: MAIL FROM:<a@b>              the client sends a line; CRLF is added
    C> raw octets                   the client sends just these
    C:& / C>& …                     … in the same read as what stands before
    C!                              the client sends no more
    @tls                            the TLS handshake: after the 220 of STARTTLS, or before the greeting
    S: 250 2.1.0 sender OK          a reply, word for word; ``*`` at the end is any text,
    S: 250-first                    lines of one reply follow each other
    S!                              the server closes
    ~ 9                             so many replies were held back by the tarpit
    = a@b -> c@d, e@f               a message was accepted, and this is its content:
    | line                          (CRLF added)
    |> raw octets

An ``S:`` is a wait: what the client sends up to it is one stream that may be cut anywhere.
Escapes: ``\\r \\n \\t \\0 \\\\ \\xHH``, and ``{1000*text}`` repeats.
"""

from __future__ import annotations

import base64
import itertools
import random
import re
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Literal

from gateway.contracts import Judgement, Login
from gateway.message import TLS, Client
from gateway.passwords import account, scram_keys
from gateway.passwords import read as read_stored
from gateway.reply import Reply
from gateway.route import Route, Routes
from gateway.senders import Senders
from gateway.smtp.extensions import Extensions
from gateway.smtp.server import (
    AuthWanted,
    ClientNamed,
    Event,
    LoggedIn,
    MailAborted,
    MailContent,
    MailFinished,
    MailStarted,
    Refused,
    Rules,
    ServerSession,
    TLSWanted,
)
from gateway.users import mechanisms

FOLDER = Path(__file__).parent / "transcripts"
HOSTNAME = "mx.example.net"
#: What the handshake came to, where there is no socket.
SECURED = TLS("TLSv1.3", "TLS_AES_256_GCM_SHA384")
CERTIFIED = TLS("TLSv1.3", "TLS_AES_256_GCM_SHA384", "CN=alice", names=("DNS:alice.example", "CN=alice"))
ACCEPTED = Reply(250, "2.0.0", "accepted")
#: Who may log in where a dialogue has ``@set auth=…``: SCRAM with the example of RFC 7677, too.
USERS = {
    "alice": ["$scrypt$ln=4,r=8,p=1$c2FsdHNhbHQ$DKmzQqrK7qQQ5XWaJ1DqpQjG8ZrfhsmL5iGRM4ApY/U"],
    "user": [str(scram_keys("pencil", base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ=="), 4096))],
    "carol@app.example": ["$scrypt$ln=4,r=8,p=1$c2FsdHNhbHQ$DKmzQqrK7qQQ5XWaJ1DqpQjG8ZrfhsmL5iGRM4ApY/U"],
}
ACCOUNTS = {name: account([read_stored(text) for text in texts]) for name, texts in USERS.items()}
MECHANISMS: list[Any] = ["SCRAM-SHA-256", "PLAIN", "LOGIN"]
EXTENSIONS = Extensions(3600.0, 10.0, "authenticated", (ip_network("10.0.0.0/8"),), lambda: 1_800_000_000.0)
WANTED = frozenset(MECHANISMS)
#: Whose client certificate ``@tls`` shows where a dialogue has ``@set certificate_identity=…``.
CERTIFICATES = {"DNS:alice.example": "alice"}
SENDERS = {"alice": ["alice@app.example", "*@lists.example"], "*": ["noreply@app.example"]}


@dataclass(frozen=True)
class Settings:
    """How the listener must be set up for a dialogue; equal ones can share a server."""

    protocol: Literal["smtp", "submission", "lmtp"] = "smtp"
    message_size: int = 25 * 2**20
    recipients: int = 1000
    null_sender_recipients: int = 1000
    hops: int = 100
    long_lines: Literal["accept", "reject"] = "accept"
    bare_newlines: Literal["reject", "disconnect", "normalize"] = "reject"
    binarymime: bool = True
    dsn: bool = True
    xclient: bool = False  # the client may speak for others
    tls: Literal["off", "starttls", "required", "implicit"] = "off"
    auth: Literal["off", "offered", "required"] = "off"
    auth_without_tls: bool = True
    senders: bool = False
    certificate_identity: Literal["off", "external", "implied"] = "off"  # @tls shows a certificate of alice's
    routes: tuple[Route, ...] = (Route(("*@app.example",), ("app",), requiretls=True),)
    extensions: bool = False

    def rules(self) -> Rules:
        return Rules(
            HOSTNAME,
            Routes(self.routes, HOSTNAME),
            protocol=self.protocol,
            message_size=self.message_size,
            recipients=self.recipients,
            null_sender_recipients=self.null_sender_recipients,
            hops=self.hops,
            long_lines=self.long_lines,
            bare_newlines=self.bare_newlines,
            binarymime=self.binarymime,
            certificates=CERTIFICATES,
            certificate_identity=self.certificate_identity,
            requiretls=any(route.requiretls for route in self.routes),
            dsn=self.dsn,
            extensions=EXTENSIONS if self.extensions else Extensions(),
            tls=self.tls,
            auth=self.auth,
            auth_without_tls=self.auth_without_tls,
            mechanisms=mechanisms(ACCOUNTS, service=False, key_set=False, wanted=WANTED),
            senders=Senders(SENDERS if self.senders else {}, HOSTNAME, strict=self.protocol == "submission"),
        )


@dataclass(frozen=True)
class Mail:
    """A message that was accepted."""

    mail_from: str
    recipients: tuple[str, ...]
    content: bytes


@dataclass
class Group:
    """What the client sends between two waits, and what it then waits for. ``together``:
    ranges of ``octets`` that must not be cut. ``handshake``: TLS begins before them."""

    octets: bytes = b""
    together: list[tuple[int, int]] = field(default_factory=list)
    expected: list[list[str]] = field(default_factory=list)
    client_ends: bool = False
    server_closes: bool = False
    handshake: bool = False

    def cuts(self) -> list[int]:
        """Where it may be cut."""
        return [at for at in range(1, len(self.octets)) if not any(start < at < end for start, end in self.together)]


@dataclass
class Case:
    """One dialogue; ``name`` is the file's, with the labels of its variant."""

    name: str
    settings: Settings
    groups: list[Group]
    accepted: list[Mail]
    answers: list[Reply]
    tarpit: int
    only_here: str

    @property
    def size(self) -> int:
        return sum(len(group.octets) for group in self.groups)

    @property
    def early(self) -> bool:
        """The client talks before the greeting."""
        return bool(self.groups[0].octets)

    @property
    def implicit(self) -> bool:
        """TLS before the greeting."""
        return self.groups[0].handshake


# ---------------------------------------------------------------------- reading

_REPEAT = re.compile(r"\{(\d+)\*([^{}]*)\}")
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|.)")
_ESCAPES = {"r": "\r", "n": "\n", "t": "\t", "0": "\0", "\\": "\\"}
_HELLO = {"@ehlo": "EHLO", "@helo": "HELO", "@lhlo": "LHLO"}


def octets(text: str) -> bytes:
    """The octets that a step writes with escapes and repeats; other text is UTF-8."""
    text = _REPEAT.sub(lambda match: match[2] * int(match[1]), text)
    pieces = []
    at = 0
    for match in _ESCAPE.finditer(text):
        pieces.append(text[at : match.start()].encode())
        code = match[1]
        pieces.append(bytes([int(code[1:], 16)]) if code[0] == "x" else _ESCAPES[code].encode())
        at = match.end()
    pieces.append(text[at:].encode())
    return b"".join(pieces)


def read(path: Path) -> list[Case]:
    """Every case of a file. Raises ValueError with the place of what is not understood."""
    lines = path.read_text().splitlines()
    if not lines or not re.match(r"# (RFC|CVE|RFCs) ?\S.*: \S", lines[0]):
        raise ValueError(f"{path.name}: the first line gives the RFC section and the reason: '# RFC 5321 §4.5.2: …'")
    groups: dict[str, dict[str, dict[str, str]]] = {}
    steps = []
    for number, line in enumerate(lines, 1):
        if line.startswith("@vary "):
            _, group, label, assignment = line.split(" ", 3)
            name, _, value = assignment.partition("=")
            groups.setdefault(group, {}).setdefault(label, {})[name] = value
        elif line and not line.startswith("#"):
            steps.append((f"{path.name}:{number}", line))
    cases = []
    for chosen in itertools.product(*(variants.items() for variants in groups.values())):
        words = {name: value for _, variant in chosen for name, value in variant.items()}
        labels = "-".join(label for label, _ in chosen)
        name = f"{path.stem}[{labels}]" if labels else path.stem
        cases.append(_case(name, [(place, _fill(place, line, words)) for place, line in steps]))
    return cases


def _fill(place: str, line: str, words: dict[str, str]) -> str:
    for name in (*words, *words):  # a word may use others
        line = line.replace(f"{{{name}}}", words[name])
    if unknown := re.search(r"\{[A-Z]+\}", line):
        raise ValueError(f"{place}: no variant says what {unknown[0]} is")
    return line


def _case(name: str, steps: list[tuple[str, str]]) -> Case:
    case = Case(name, Settings(), [Group()], [], [], 0, "")
    routes: list[Route] = []
    for place, line in steps:
        mark, _, rest = line.partition(" ")
        group = case.groups[-1]
        if mark in _HELLO:
            _send(case, b"")
            case.groups[-1].expected.append(["220 *"])
            _send(case, f"{_HELLO[mark]} client.example\r\n".encode())
            case.groups[-1].expected.append(["250 *"])
        elif mark in ("C:", "C>", "C:&", "C>&"):
            _send(case, octets(rest) + (b"\r\n" if ":" in mark else b""), together=mark.endswith("&"))
        elif mark == "C!":
            _send(case, b"")
            case.groups[-1].client_ends = True
        elif mark == "S:":
            if group.expected and group.expected[-1][-1][3:4] == "-":
                group.expected[-1].append(rest)
            else:
                group.expected.append([rest])
        elif mark == "@tls":
            if group.expected or group.octets:
                case.groups.append(Group())
            case.groups[-1].handshake = True
        elif mark == "S!":
            group.server_closes = True
        elif mark == "~":
            case.tarpit = int(rest)
        elif mark == "=":
            sender, _, recipients = octets(rest).decode().partition(" -> ")
            case.accepted.append(Mail(sender.strip(), tuple(recipients.split(", ")), b""))
        elif mark in ("|", "|>"):
            last = case.accepted[-1]
            case.accepted[-1] = replace(last, content=last.content + octets(rest) + (b"" if mark == "|>" else b"\r\n"))
        elif mark == "@set":
            key, _, value = rest.partition("=")
            known = getattr(case.settings, key)
            change: dict[str, Any] = {key: value == "true" if isinstance(known, bool) else type(known)(value)}
            case.settings = replace(case.settings, **change)
        elif mark == "@route":
            pattern, *options = rest.split()
            routes.append(
                Route(
                    tuple(pattern.split(",")),
                    ("app",),
                    acknowledge="delivered" if "delivered" in options else "durable",
                    relays="relay" in options,
                    requiretls="relay" not in options,
                    authenticated="login" in options,
                    clients=tuple(ip_network(word[5:]) for word in options if word.startswith("from=")) or None,
                )
            )
            case.settings = replace(case.settings, routes=tuple(routes))
        elif mark == "@answers":
            case.answers = [_reply(text.strip()) for text in rest.split(";")]
        elif mark == "@here":
            case.only_here = rest
        else:
            raise ValueError(f"{place}: {line!r} is no step")
    return case


def _send(case: Case, data: bytes, together: bool = False) -> None:
    group = case.groups[-1]
    if group.expected or group.server_closes or group.client_ends:
        group = Group()
        case.groups.append(group)
    start = len(group.octets)
    group.octets += data
    if together:
        before = group.together[-1][0] if group.together and group.together[-1][1] == start else _last_line(group.octets[:start])
        group.together.append((before, len(group.octets)))


def _last_line(data: bytes) -> int:
    """Where the last line of ``data`` begins (its own CRLF is part of it)."""
    return data.rfind(b"\r\n", 0, max(len(data) - 2, 0)) + 2 if b"\r\n" in data[:-2] else 0


def _reply(text: str) -> Reply:
    code, enhanced, words = text.split(" ", 2)
    return Reply(int(code), enhanced, words)


def cases() -> list[Case]:
    return [case for path in sorted(FOLDER.glob("*.smtp")) for case in read(path)]


# --------------------------------------------------------------- the other side


def split_replies(wire: bytes) -> tuple[list[list[str]], bytes]:
    """Whole replies, each as its lines, and the rest."""
    replies: list[list[str]] = []
    lines: list[str] = []
    used = at = 0
    while (end := wire.find(b"\r\n", at)) >= 0:
        line = wire[at:end].decode()
        assert re.match(r"[2-5]\d\d[ -]", line), f"this is no line of a reply: {line!r}"
        lines.append(line)
        at = end + 2
        if line[3] == " ":
            replies.append(lines)
            lines = []
            used = at
    return replies, wire[used:]


def matches(pattern: list[str], reply: list[str]) -> bool:
    if len(pattern) == 1 and re.fullmatch(r"\d{3} \*", pattern[0]):
        return all(line[:3] == pattern[0][:3] for line in reply)
    return len(pattern) == len(reply) and all(
        line.startswith(wanted[:-1]) if wanted.endswith("*") else line == wanted for wanted, line in zip(pattern, reply, strict=True)
    )


def judged(login: Login) -> Judgement:
    """What is true of a login, for the users of the dialogues. The nonce is that of RFC 7677 §3."""
    known = ACCOUNTS.get(login.user)
    if login.token is None and login.password is None and login.proven is None:
        keys = known.keys if known is not None and known.keys is not None else scram_keys("none", b"saltsaltsalt", 4096)
        return Judgement(keys=keys, nonce="%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0")
    good = login.proven if login.password is None else known is not None and known.password.proves(login.password)
    return Judgement(login.user) if good and known is not None else Judgement()


class Driver:
    """Plays listener and intake for one session: carries out its events, holds it to its word.

    ``late``: finished mail is answered only when the client waits, else at once."""

    def __init__(self, session: ServerSession, answers: Sequence[Reply] = (), late: bool = False) -> None:
        self.session = session
        self.late = late
        self.wire = b""
        self.accepted: list[Mail] = []
        self.refused: list[Refused] = []
        self.named: list[ClientNamed] = []
        self.users: list[str] = []
        self.tarpit = 0
        self._answers = iter([*answers])
        self._drafts: dict[int, tuple[MailStarted, list[bytes]]] = {}
        self._finished: list[int] = []
        self._login: Login | None = None

    def start(self, early: bool = False) -> None:
        self._turn(self.session.start(early))

    def shake(self) -> None:
        """The client begins TLS, and it comes about."""
        assert self.session.awaiting in ("handshake", "greeting"), f"TLS while {self.session.awaiting} is awaited"
        shown = CERTIFIED if self.session.rules.certificate_identity != "off" else SECURED
        self.session.secured(shown)
        self._turn([])

    def feed(self, data: bytes) -> None:
        if self.session.paused:
            # A listener has stopped reading by now.
            self.settle()
        self._turn(self.session.receive(data))

    def end(self) -> None:
        self._turn(self.session.eof())

    def settle(self) -> None:
        """The client waits: answer what is owed."""
        while self._finished:
            self._turn(self._answer())

    def _turn(self, events: list[Event]) -> None:
        session = self.session
        while True:
            for event in events:
                self._carry(event)
            if self._login is not None:
                login, self._login = self._login, None
                assert session.paused, "a login that is not waited for"
                assert session.awaiting == "login"
                events = session.judged(self._judge(login))
                continue
            if session.delay:
                assert session.paused, "a tarpit that goes on reading"
                assert not session.outgoing(), "the tarpit withholds nothing"
                self.tarpit += 1
                events = session.proceed()
                assert not session.delay or session.paused
                continue
            self.wire += session.outgoing()
            if self._finished and not self.late:
                events = self._answer()
            elif session.more:
                events = session.proceed()
            else:
                break

    def _judge(self, login: Login) -> Judgement:
        return judged(login)

    def _answer(self) -> list[Event]:
        number = self._finished.pop(0)
        started, pieces = self._drafts.pop(number)
        transaction = started.transaction
        envelope = transaction.envelope
        content = b"".join(pieces)
        assert transaction.size == len(content), "the size that was told is not the content's"
        answer = next(self._answers, ACCEPTED)
        if answer.positive:
            self.accepted.append(Mail(envelope.mail_from, tuple(one.address for one in envelope.recipients), content))
        return self.session.answer(number, answer)

    def _carry(self, event: Event) -> None:
        if isinstance(event, MailStarted):
            assert event.transaction.number not in self._drafts
            assert len(event.transaction.routes) == len(event.transaction.envelope.recipients) > 0
            self._drafts[event.transaction.number] = (event, [])
        elif isinstance(event, MailContent):
            assert event.octets, "an empty piece"
            assert event.number not in self._finished, "content after its end"
            self._drafts[event.number][1].append(event.octets)
        elif isinstance(event, MailFinished):
            assert event.number in self._drafts
            self._finished.append(event.number)
        elif isinstance(event, MailAborted):
            assert event.number not in self._finished, "a finished mail was aborted"
            del self._drafts[event.number]
        elif isinstance(event, ClientNamed):
            self.named.append(event)
        elif isinstance(event, Refused):
            self.refused.append(event)
        elif isinstance(event, TLSWanted):
            assert not self._drafts, "TLS while an answer is owed"
            for following in self.session.secure():
                self._carry(following)
        elif isinstance(event, AuthWanted):
            assert self._login is None, "two logins at a time"
            self._login = event.login
        elif isinstance(event, LoggedIn):
            self.users.append(event.user)
            assert self.session.client.user == event.user
        else:
            raise AssertionError(f"nobody asked for {event}")


# ---------------------------------------------------------------------- cutting

Cut = Callable[[int, Group], list[bytes]]


def _pieces(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    edges = [0, *cuts, len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges) if start < end]


def whole(number: int, group: Group) -> list[bytes]:
    return [group.octets] if group.octets else []


def byte_by_byte(number: int, group: Group) -> list[bytes]:
    return _pieces(group.octets, group.cuts())


def once(which: int, at: int) -> Cut:
    """Only this group is cut, and only there."""
    return lambda number, group: _pieces(group.octets, [at] if number == which else [])


def at_random(chance: random.Random) -> Cut:
    def cut(number: int, group: Group) -> list[bytes]:
        size = len(group.octets)
        if size < 2:
            return whole(number, group)
        places = {chance.randrange(1, size) for _ in range(chance.randrange(min(size, 8)))}
        return _pieces(group.octets, sorted(at for at in places if not any(start < at < end for start, end in group.together)))

    return cut


#: Octets of a dialogue up to which every single cut is tried, and byte by byte.
SHORT = 1500
SMALL = 100_000
RANDOM_CUTS = 1000
SOME_CUTS = 20


def cuttings(case: Case, seed: int, every: bool = True) -> Iterator[Cut]:
    """Whole, byte by byte, at every cut; long ones, and all without ``every``, at random cuts, fewer
    where a run is dear."""
    yield whole
    if case.size <= SMALL:
        yield byte_by_byte
    if case.size <= SHORT and every:
        for number, group in enumerate(case.groups):
            for at in group.cuts():
                yield once(number, at)
    else:
        chance = random.Random(seed)
        for _ in range(min(RANDOM_CUTS if every else SOME_CUTS, max(SOME_CUTS, 10_000_000 // case.size))):
            yield at_random(chance)


# ---------------------------------------------------------------------- running


def run(case: Case, cut: Cut = whole, late: bool = False) -> None:
    """One run on a session. Raises AssertionError with the place in the dialogue."""
    session = ServerSession(case.settings.rules(), Client("192.0.2.1", 4711), "session", "listener", case.settings.xclient)
    driver = Driver(session, case.answers, late)
    if not case.early and not case.implicit:
        driver.start()
    closed = False
    for number, group in enumerate(case.groups):
        if group.handshake:
            driver.shake()
        if number == 0 and (case.early or case.implicit):
            driver.start(early=case.early)
        pieces = cut(number, group)
        for piece in pieces[:-1]:
            driver.feed(piece)
            if not group.server_closes:
                assert len(split_replies(driver.wire)[0]) < max(len(group.expected), 1), (
                    f"{case.name}: a reply before the end of what it replies to, group {number}: {driver.wire!r}"
                )
        if pieces:
            driver.feed(pieces[-1])
        if group.client_ends:
            driver.end()
        driver.settle()
        replies, rest = split_replies(driver.wire)
        driver.wire = b""
        assert not rest, f"{case.name}: half a reply: {rest!r}"
        _compare(case, number, group, replies)
        closed = closed or group.server_closes or group.client_ends
        assert session.closing == closed, f"{case.name}: closing is {session.closing} after group {number}"
    assert driver.tarpit == case.tarpit, f"{case.name}: {driver.tarpit} replies in the tarpit"
    assert driver.accepted == case.accepted, f"{case.name}: {driver.accepted}"


def _compare(case: Case, number: int, group: Group, replies: list[list[str]]) -> None:
    good = len(replies) == len(group.expected) and all(map(matches, group.expected, replies))
    assert good, f"{case.name}, group {number}: sent {group.octets[:200]!r}\n  expected {group.expected}\n  said     {replies}"


def run_live(
    case: Case,
    host: str,
    port: int,
    cut: Cut = whole,
    timeout: float = 60.0,
    accepted: Callable[[], list[Mail]] | None = None,
    certificate: Path | None = None,
) -> None:
    """The same over a socket, against a server that is set up as ``case.settings`` say: the same
    replies, word for word. ``accepted`` gives the messages that arrived, in order; without it
    nobody asks. ``certificate``: the client's, with its key. Octets that must arrive together are sent by one call."""
    assert not case.only_here, f"{case.name} is not for a socket: {case.only_here}"
    with ExitStack() as stack:
        connection: socket.socket = stack.enter_context(socket.create_connection((host, port), timeout))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire = b""
        for number, group in enumerate(case.groups):
            closed = False
            if group.handshake:
                assert not wire, f"{case.name}: said in clear before TLS: {wire!r}"
                connection = stack.enter_context(_secured(connection, certificate))
            try:
                for piece in cut(number, group):
                    connection.sendall(piece)
                if group.client_ends:
                    _end(connection)
            except (BrokenPipeError, ConnectionResetError):
                assert any(before.server_closes for before in case.groups[: number + 1]), f"{case.name}: closed at group {number}"
            replies: list[list[str]] = []
            while not closed and (len(replies) < len(group.expected) or group.server_closes or group.client_ends):
                closed, wire = _more(connection, wire)
                whole_ones, wire = split_replies(wire)
                replies += whole_ones
            _compare(case, number, group, replies)
            assert not closed or group.server_closes or group.client_ends, f"{case.name}: closed after group {number}"
            if closed:
                break
        else:
            # Nothing may be left unsaid.
            _end(connection)
            closed = False
            while not closed:
                closed, wire = _more(connection, wire)
            assert not wire, f"{case.name}: said unasked: {wire!r}"
    if accepted is not None:
        assert accepted() == case.accepted, case.name


def _secured(connection: socket.socket, certificate: Path | None) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if certificate is not None:
        context.load_cert_chain(certificate)
    return context.wrap_socket(connection)


def _end(connection: socket.socket) -> None:
    """The client sends no more. Under TLS it says so with close_notify, and the server its own at
    its end; what it still said is an error of ``unwrap``."""
    if isinstance(connection, ssl.SSLSocket):
        connection = connection.unwrap()
    connection.shutdown(socket.SHUT_WR)


def _more(connection: socket.socket, wire: bytes) -> tuple[bool, bytes]:
    try:
        data = connection.recv(65536)
    except ConnectionResetError:
        data = b""
    return not data, wire + data
