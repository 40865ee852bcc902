"""Target: our side of a conversation, whatever an upstream says (row O1).

The first octets choose the terms and the mails; the rest is what the upstream says, at ``WAIT``
in a read of its own. Held against the conversation as ``Walk`` reads it: nothing raises; every
mail is settled exactly once; delivered is only what has a 2yz to MAIL, to RCPT and to the true
end of data, with every octet of the content sent; failed is only what has a 5yz or was never
tried; what we say is well formed and bounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gateway.contracts import Outcome
from gateway.message import Params, Recipient
from gateway.smtp.client import ClientSession, Event, Mail, Settled, Terms, TLSWanted, Unusable

from .. import reference
from .exchange import Letter, Walk
from .inputs import WAIT, cut, stretched

TLS_KINDS: tuple[Literal["off", "opportunistic", "required", "verify"], ...] = ("off", "opportunistic", "required", "verify")
CONTENTS = (b"Subject: x\r\n\r\n.dot\r\n", b"", b"no end\r\n..", b"\xc3\xa9\r\n.\r\nx\r")
SENDERS = ("a@client.example", "", "\xfc@client.example", "a@b\r\nRCPT TO:<x@y.example>")
#: Octets that we may say, whatever we hear: a few mails of a few recipients.
MOST = 16_384


@dataclass(frozen=True)
class Plan:
    terms: Terms
    mails: list[tuple[Mail, bytes]]
    shakes: bool
    verified: bool
    ends: bool
    sizes: tuple[int, int]
    groups: list[bytes]


def _mail(number: int, kind: int, pieces: bool, secret: bool) -> tuple[Mail, bytes]:
    """A mail, and its content also where it is handed over in pieces."""
    content = CONTENTS[kind & 3]
    sender = SENDERS[kind >> 4 & 3] if kind & 64 else SENDERS[0]
    recipients = [
        Recipient(f"r{number}-{i}@app.example", f"r{number}-{i}", "app.example", {"NOTIFY": "NEVER"} if kind & 128 else {})
        for i in range(1 + (kind >> 2 & 3))
    ]
    params: Params = {"BODY": "BINARYMIME"} if kind & 3 == 3 and number else {"RET": "HDRS"} if kind & 128 else {}
    if secret:
        params["REQUIRETLS"] = None
    return Mail(sender, params, recipients, len(content), not content.isascii(), None if pieces else content), content


def plan(data: bytes) -> Plan | None:
    if len(data) < 5:
        return None
    settings, more, kind = data[0], data[1], data[2]
    terms = Terms(
        "gw.example",
        lmtp=bool(settings & 1),
        tls=TLS_KINDS[settings >> 1 & 3],
        username="user" if settings & 8 else None,
        password="pencil" if settings & 8 else None,
        clear_login=bool(more & 1),
        pipelining=not settings & 16,
        chunking=not settings & 32,
        binarymime=bool(settings & 64),
    )
    mails = [_mail(number, kind + 85 * number, bool(more & 2), bool(more & 128)) for number in range(1 + (more >> 2 & 3))]
    groups = [stretched(group) for group in data[5:].split(WAIT)]
    return Plan(terms, mails, not more & 16, bool(more & 64), bool(more & 32), (data[3] + 1, data[4] + 1), groups)


class Talk:
    """One conversation."""

    def __init__(self, made: Plan) -> None:
        self.plan = made
        self.session = ClientSession(made.terms, "up.example:25")
        self.walk = Walk(lmtp=made.terms.lmtp)
        self.waiting = [*enumerate(made.mails)]
        self._mail: Mail | None = None
        self._content = b""
        self._letters = 0
        self._said = 0
        self._heard = b""
        self._replies = 0
        self._greeted = False
        self._early = False  # we spoke on over a reply to nothing

    def run(self, *sizes: int) -> None:
        self._next()
        for group in self.plan.groups:
            for piece in cut(group, *sizes):
                if self.session.closing:
                    break
                self._hear(piece)
        if self.plan.ends:
            self._take(self.session.eof())
        else:
            self._take(self.session.stop("a deadline has passed"))
        assert self.session.closing
        assert self._mail is None, "a mail whose outcome nobody told"
        assert not self.session.busy

    def _hear(self, piece: bytes) -> None:
        self._heard += piece
        event = self.session.receive(piece)
        self._listen()
        self._take(event)
        self._next()
        while self.session.wants_content:
            self._hand_over()
        self._speak()

    def _listen(self) -> None:
        """What the upstream said so far, as the oracle reads it."""
        replies, _ = reference.replies(self._heard, 4096, 65536)
        codes = [code for code, _ in replies]
        fresh = codes[self._replies :]
        self._replies = len(codes)
        if fresh and not self._greeted:
            self._greeted = True
            fresh = fresh[1:]
        self.walk.hear(b"", fresh)

    def _speak(self) -> None:
        octets = self.session.outgoing()
        if octets and self.walk.spare:
            self._early = True
        self._said += len(octets)
        assert self._said <= MOST, "we talk and talk"
        before = len(self.walk.commands)
        self.walk.hear(octets, [])
        for said in self.walk.commands[before:]:
            assert said.fault is None, f"we say what is no command: {said}"

    def _next(self) -> None:
        while self.waiting and self._mail is None and not self.session.closing:
            number, (self._mail, self._content) = self.waiting.pop(0)
            self._letters = len(self.walk.letters)
            self._take(self.session.begin(self._mail, cautious=bool(number & 1)))
        self._speak()

    def _hand_over(self) -> None:
        middle = len(self._content) // 2
        self.session.content(self._content[:middle], last=False)
        if self.session.wants_content:
            self.session.content(self._content[middle:], last=True)

    def _take(self, event: Event | None) -> None:
        if event is None:
            return
        if isinstance(event, TLSWanted):
            self._shake()
            return
        assert self._mail is not None, f"nobody's mail: {event}"
        mail, self._mail = self._mail, None
        if isinstance(event, Unusable):
            # Mail that wants TLS all the way may have to look for another host.
            assert event.reply.temporary or (event.unfit and "REQUIRETLS" in mail.params)
            return
        assert isinstance(event, Settled)
        assert len(event.outcomes) == len(mail.recipients)
        assert any(outcome is not None for outcome in event.outcomes)
        letters = self.walk.letters[self._letters :]
        assert len(letters) <= 1, "a mail in several transactions"
        for recipient, outcome in zip(mail.recipients, event.outcomes, strict=True):
            if outcome is not None:
                self._judge(letters[0] if letters else None, recipient, outcome)

    def _shake(self) -> None:
        self._speak()
        assert self.walk.way == "tls", "TLS that the upstream did not agree to"
        if not self.plan.shakes:
            self._take(self.session.stop("the handshake failed"))
            return
        self.walk.secured()
        self._heard = b""
        self._replies = 0
        self.session.secured(verified=self.plan.verified)

    def _judge(self, letter: Letter | None, recipient: Recipient, outcome: Outcome) -> None:
        reply = outcome.reply
        assert reply.code // 100 == {"delivered": 2, "deferred": 4, "failed": 5}[outcome.state]
        if outcome.state == "delivered":
            assert letter is not None, "delivered without a transaction"
            assert not self._early, "delivered by a reply that came before its question"
            assert letter.code < 300
            assert recipient.address in letter.recipients, "delivered to somebody who was refused"
            place = letter.recipients.index(recipient.address) if self.plan.terms.lmtp else 0
            assert len(letter.finals) > place, "delivered before the end of data was answered"
            assert 200 <= letter.finals[place] < 300, f"delivered, and the answer was {letter.finals}"
            assert letter.content in (self._content, self._content + b"\r\n"), "other octets than the content's were carried"
        elif outcome.state == "failed" and letter is not None:
            codes = [
                letter.code,
                *(code for address, code in letter.tried if address == recipient.address),
                *letter.refused,
                *letter.finals,
            ]
            assert any(code >= 500 for code in codes), f"failed, and nobody said so: {codes}"


def probe(data: bytes) -> None:
    made = plan(data)
    if made is not None:
        Talk(made).run()


def check(data: bytes) -> None:
    made = plan(data)
    if made is not None:
        Talk(made).run()
        Talk(made).run(*made.sizes)
