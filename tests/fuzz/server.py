"""Target: the server's session, whatever a client says.

The first octets set up the listener; the rest is what the client says, and where it waits
(``WAIT``). Held against the conversation as ``Walk`` reads it (table of hostile input, global
oracle): nothing raises; every command has exactly one reply, and no content has one before its
true end; what was accepted is what was sent; what is said is bounded; and in other pieces
between the same waits, answered early or late, all comes out the same.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from gateway.contracts import Judgement, Login, Question, Verdict
from gateway.message import Client
from gateway.passwords import scram_keys
from gateway.reply import Reply
from gateway.route import Route, Routes
from gateway.senders import Senders
from gateway.smtp import replies
from gateway.smtp.events import Asked, Event
from gateway.smtp.server import Rules, ServerSession

from ..dialogue import CERTIFICATES, HOSTNAME, Driver, Mail, split_replies
from .exchange import Walk
from .inputs import WAIT, cut, stretched

ANSWERS = [Reply(250, "2.0.0", "accepted"), Reply(451, "4.3.0", "later"), Reply(550, "5.7.1", "no")] * 100
REFUSED = Reply(550, "5.7.1", "a check says no")
PROTOCOLS: tuple[Literal["smtp", "submission", "lmtp"], ...] = ("smtp", "lmtp", "submission", "smtp")
TLS_KINDS: tuple[Literal["off", "starttls", "required", "implicit"], ...] = ("off", "starttls", "required", "implicit")
AUTH_KINDS: tuple[Literal["off", "offered", "required"], ...] = ("off", "offered", "required", "off")
MECHANISMS = ("SCRAM-SHA-256", "PLAIN", "LOGIN")
SENDERS = {"user": ["a@client.example"]}
#: RFC 7677 §3: the user, and the nonce that the server adds.
KEYS = scram_keys("pencil", base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ=="), 4096)
NONCE = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
ROUTES = (
    Route(("*@app.example", f"postmaster@{HOSTNAME}"), ("app",), checks=("look",), requiretls=True),
    Route(("*@now.example",), ("app",), acknowledge="delivered"),
    Route(("*@relay.example",), ("app",), relays=True, authenticated=True),
)
#: Octets that one reply may have (RFC 5321 §4.5.3.1.5 asks for 512 a line; EHLO has many lines).
REPLY_OCTETS = 1024


@lru_cache(maxsize=256)
def rules(settings: int, more: int) -> Rules:
    return Rules(
        HOSTNAME,
        Routes(ROUTES, HOSTNAME),
        protocol=PROTOCOLS[settings & 3],
        message_size=(300, 20_000)[more >> 6 & 1],
        recipients=3,
        hops=2,
        long_lines="reject" if more & 1 else "accept",
        bare_newlines="normalize" if more & 2 else "reject",
        tls=TLS_KINDS[settings >> 2 & 3],
        auth=AUTH_KINDS[settings >> 4 & 3],
        auth_without_tls=True,
        mechanisms=MECHANISMS,
        senders=Senders(SENDERS, HOSTNAME, strict=False) if settings & 64 else None,
        binarymime=not more & 4,
        requiretls=True,
        certificates=CERTIFICATES,
        # Of the two that are smtp, one knows its clients by their certificates.
        certificate_identity="off" if settings & 3 != 3 else "external" if settings & 16 else "implied",
        client_checks=("look",) if more & 16 else (),
        sender_checks=("look",) if more & 32 else (),
        recipient_checks=frozenset({"look"}) if more & 32 else frozenset(),
    )


def judged(login: Login) -> Judgement:
    """There is one user, and a password that everybody knows."""
    if login.password is None and login.proven is None:
        return Judgement(keys=KEYS, nonce=NONCE)
    return Judgement(login.user) if login.user == "user" and (login.proven or login.password == "pencil") else Judgement()


def verdict(question: Question) -> Verdict:
    """Nobody whose sender or recipient begins with a z."""
    address = question.recipient.address if question.recipient is not None else question.sender or ""
    return Verdict(REFUSED) if address.startswith("z") else Verdict(facts={"look": {"seen": True}})


class Stage(Driver):
    """A ``Driver`` that answers checks and logins by itself, too."""

    def __init__(self, session: ServerSession, late: bool) -> None:
        super().__init__(session, ANSWERS, late)
        self._asked: Question | None = None

    def _carry(self, event: Event) -> None:
        if isinstance(event, Asked):
            assert self._asked is None, "two questions at a time"
            self._asked = event.question
        else:
            super()._carry(event)

    def _judge(self, login: Login) -> Judgement:
        return judged(login)

    def _turn(self, events: list[Event]) -> None:
        super()._turn(events)
        while self._asked is not None:
            question, self._asked = self._asked, None
            assert self.session.paused, "a check that is not waited for"
            super()._turn(self.session.verdict(verdict(question)))


@dataclass
class Heard:
    """What a group of octets came to."""

    replies: list[list[str]]
    accepted: list[Mail]
    tarpit: int
    closed: bool
    refused: int


@dataclass(frozen=True)
class Plan:
    rules: Rules
    trusted: bool
    late: bool
    sizes: tuple[int, int]
    groups: list[bytes]


def plan(data: bytes) -> Plan | None:
    if len(data) < 4:
        return None
    more = data[1]
    return Plan(
        rules(data[0] & 127, more & 0x77),
        bool(more & 8),
        bool(more & 128),
        (data[2] + 1, data[3] + 1),
        [stretched(group) for group in data[4:].split(WAIT)],
    )


def play(made: Plan, groups: list[bytes], late: bool, *sizes: int) -> list[Heard]:
    session = ServerSession(made.rules, Client("192.0.2.1", 4711), "session", "listener", made.trusted)
    stage = Stage(session, late)
    if made.rules.tls == "implicit":
        stage.shake()
    stage.start()
    heard = []
    for group in [b"", *groups]:
        for piece in cut(group, *sizes):
            if session.closing:
                break
            stage.feed(piece)
        stage.settle()
        said, stage.wire = split_replies(stage.wire)
        assert not stage.wire, "half a reply"
        heard.append(Heard(said, list(stage.accepted), stage.tarpit, session.closing, len(stage.refused)))
        if session.closing:
            break
        if session.awaiting == "handshake":
            stage.shake()
        assert not session.paused, "it waits for something that nobody owes it"
    stage.end()
    assert session.closing
    assert not stage.wire, f"an end is answered: {stage.wire!r}"
    return heard


def judge(made: Plan, heard: list[Heard]) -> None:
    """The replies against what was sent, read by the oracle."""
    greeting, *others = heard
    assert len(greeting.replies) == 1, f"a greeting of {len(greeting.replies)} replies"
    limit = RESPONSE if made.rules.auth != "off" else 0
    walk = Walk(made.rules.protocol == "lmtp", limit, made.rules.bare_newlines == "normalize", HOSTNAME)
    for octets, one in zip(made.groups, others, strict=False):
        before = walk.way
        codes = [int(reply[0][:3]) for reply in one.replies]
        for reply in one.replies:
            assert sum(map(len, reply)) <= REPLY_OCTETS, f"a reply of {sum(map(len, reply))} octets"
        walk.hear(octets, codes)
        if one.closed:
            # What ends a conversation may come in the middle of a line, but of nothing else.
            spare = walk.spare
            assert not spare or (spare in ([554], [421], [500], [552]) and walk.way == "command"), (
                f"replies to nothing: {spare} after {before}"
            )
        else:
            assert not walk.spare, f"replies to nothing: {walk.spare}"
            assert not walk.owed, "a command without a reply"
        if walk.way == "tls":
            walk.secured()
    wanted = [
        Mail(letter.sender, tuple(letter.recipients), letter.content)
        for letter in walk.letters
        if letter.content is not None and any(code < 300 for code in letter.finals)
    ]
    assert heard[-1].accepted == wanted, f"accepted {heard[-1].accepted}, not {wanted}"


RESPONSE = 12288
_TOO_EARLY = str(replies.TOO_EARLY)


def _within_waits(heard: list[Heard]) -> int:
    """How many groups held the client to its waits: behind a wait that was not kept cuts may matter (P1, P2, T1)."""
    for number, one in enumerate(heard):
        if any(reply[-1] == _TOO_EARLY for reply in one.replies):
            return number
    return len(heard)


def probe(data: bytes) -> None:
    made = plan(data)
    if made is not None:
        judge(made, play(made, made.groups, False))


def check(data: bytes) -> None:
    made = plan(data)
    if made is None:
        return
    heard = play(made, made.groups, False)
    judge(made, heard)
    count = _within_waits(heard)
    again = play(made, made.groups[: max(count - 1, 0)], made.late, *made.sizes)
    for one, other in zip(heard[:count], again, strict=True):
        assert one == other, f"whole: {one}\nin pieces: {other}"
