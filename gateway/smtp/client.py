"""One SMTP or LMTP conversation toward an upstream, as a value.

Owns what we say and in which order, what each reply means, and for which recipients.
Octets in, octets and events out; knows no socket, no clock, no pool and no file. RFC 5321
(client's part), RFC 2920 (PIPELINING), RFC 3030 (BDAT), RFC 1870 (SIZE), RFC 6152
(8BITMIME), RFC 6531 (SMTPUTF8), RFC 3461 (DSN), RFC 3207 (STARTTLS), RFC 4954 (AUTH),
RFC 2033 (LMTP), RFC 9422 (LIMITS), RFC 2852 (DELIVERBY), RFC 6710 (MT-PRIORITY).

Invariants:
- Delivered is said only after a 2yz that answers the end of data. Whatever else comes (silence,
  a lost connection, a reply too many, no reply at all, a line that is none) is deferred.
- Failed is said only for a 5yz that answers MAIL, RCPT or the content, or for what this
  upstream cannot carry. A refused greeting, EHLO, STARTTLS or AUTH is a fault of ours or of the
  operators': deferred, so that a rotated password bounces nothing.
- The reply of an Outcome fits its state: 2yz, 4yz, 5yz.
- Content is carried as it is: never re-encoded; only dots are stuffed and a last line
  without CRLF is ended in DATA.
- Before TLS nothing is believed: octets that came before the handshake are an offence.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from .._parser import ReplyReceiver, stuff
from ..contracts import Outcome
from ..message import INLINE_LIMIT, Params, Recipient
from ..reply import Reply
from .extensions import DeliverBy


@dataclass(frozen=True)
class Terms:
    """How we speak to an upstream.

    ``hostname``: our name in EHLO. ``tls``: ``opportunistic`` takes STARTTLS where it is offered;
    ``required`` and ``verify`` refuse to go on without it (the certificate is judged by who does
    the handshake). ``username`` and ``password`` are sent only under TLS, unless ``clear_login``.
    ``pipelining`` and ``chunking``: use them where they are offered. ``binarymime``: BINARYMIME
    content may go to this upstream. ``final``: it is the end of the way, on this machine: REQUIRETLS
    asks for nothing more."""

    hostname: str
    lmtp: bool = False
    tls: Literal["off", "opportunistic", "required", "verify"] = "off"
    username: str | None = None
    password: str | None = None
    clear_login: bool = False
    pipelining: bool = True
    chunking: bool = True
    binarymime: bool = False
    final: bool = False


def _no_time() -> float:
    return 0.0


class Mail:
    """What is to be carried: an envelope for some recipients, and the content with our trace
    header. ``size`` in octets. ``octets`` is None where the content is handed over in pieces
    (``ClientSession.content``). ``by``: a time to deliver it by, of which ``elapsed()`` seconds are
    over. ``priority``: None where none was asked for."""

    __slots__ = ("by", "eight_bit", "elapsed", "mail_from", "octets", "params", "priority", "recipients", "size")

    def __init__(
        self,
        mail_from: str,
        params: Params,
        recipients: Sequence[Recipient],
        size: int,
        eight_bit: bool,
        octets: bytes | None,
        by: DeliverBy | None = None,
        elapsed: Callable[[], float] = _no_time,
        priority: int | None = None,
    ) -> None:
        self.mail_from = mail_from
        self.params = params
        self.recipients = recipients
        self.size = size
        self.eight_bit = eight_bit
        self.octets = octets
        self.by = by
        self.elapsed = elapsed
        self.priority = priority


class Settled:
    """The mail is done with, as far as this conversation goes: one entry per recipient. None:
    not tried, the upstream takes no more recipients in one transaction; begin anew with these
    (at least one other was tried)."""

    __slots__ = ("outcomes",)

    def __init__(self, outcomes: list[Outcome | None]) -> None:
        self.outcomes = outcomes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settled) and self.outcomes == other.outcomes

    def __hash__(self) -> int:
        return id(self)


@dataclass
class Unusable:
    """This conversation does not carry the mail, and may not have begun to: it can go to another
    host at once. ``reply`` is a 4yz that says why. ``down``: other mail would fare alike.
    ``stale``: the connection had served before and had ended, or was at its end, when this mail
    came to it: no sign against the host. ``unfit``: the host is well, but the mail has REQUIRETLS and
    the host cannot carry that; ``reply`` is a 5yz then, for where no other host can (RFC 8689 §4.2.1)."""

    reply: Reply
    down: bool
    stale: bool
    unfit: bool = False


@dataclass
class TLSWanted:
    """Do the handshake now, as a client, then call ``secured``."""


Event = Settled | Unusable | TLSWanted

# What a reply that is due answers; 0 and more: RCPT of that recipient.
_GREETING: Final = -1
_HELLO: Final = -2
_HELO: Final = -3
_STARTTLS: Final = -4
_AUTH: Final = -5
_RSET: Final = -6
_MAIL: Final = -7
_DATA: Final = -8
_CHUNK: Final = -9
_FINAL: Final = -10

# A line break or another control in an address would be a command of its own; a lone surrogate
# has no octets.
_UNSAFE: Final = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")

_NO_SMTPUTF8: Final = Reply(550, "5.6.7", "the next hop does not carry UTF-8 addresses")
_NO_8BITMIME: Final = Reply(554, "5.6.3", "the next hop does not carry 8-bit content")
_NO_BINARYMIME: Final = Reply(554, "5.6.1", "the next hop does not carry binary content")
#: RFC 2852: with mode R it may only go to who promises to keep the time.
_NO_DELIVERBY: Final = Reply(554, "5.4.7", "the next hop does not offer DELIVERBY, and the message was not to go on without")
_NOT_IN_TIME: Final = Reply(554, "5.4.7", "the time left is less than the next hop wants")
_TOO_LARGE: Final = Reply(552, "5.3.4", "the message is larger than the next hop takes")
_BAD_SENDER: Final = Reply(501, "5.1.7", "the sender's address cannot be put on a line")
_BAD_RECIPIENT: Final = Reply(501, "5.1.3", "the address cannot be put on a line")
_NOT_SECRET: Final = Reply(550, "5.7.10", "encryption needed: the message has REQUIRETLS, and there is no TLS with this host")
_NOT_VERIFIED: Final = Reply(
    550, "5.7.10", "encryption needed: the message has REQUIRETLS, and the certificate of this host was not verified"
)
_NO_REQUIRETLS: Final = Reply(550, "5.7.30", "REQUIRETLS support required: this host does not offer it")
#: Operators' faults that a server tells at MAIL: TLS or a login is missing or too weak (RFC 4954 §6).
_LOGIN_CODES: Final = frozenset((530, 534, 535, 538))


class ClientSession:
    """One conversation, from the greeting to QUIT; one mail at a time.

    The caller feeds ``receive``, and after every call writes ``outgoing()``; it looks at
    ``wants_content`` where the mail's content comes in pieces, and closes once ``closing`` is set
    and all is written. ``remote`` is what Outcomes name as who said it."""

    __slots__ = (
        "_accepted",
        "_chunking",
        "_content_reply",
        "_count",
        "_cr",
        "_dirty",
        "_dsn",
        "_due",
        "_held",
        "_login",
        "_mail",
        "_offers",
        "_out",
        "_pipelining",
        "_ready",
        "_refused",
        "_replies",
        "_sent",
        "_shaking",
        "_silent",
        "_size_limit",
        "_sized",
        "_streaming",
        "_tail",
        "_terms",
        "_tls",
        "_tls_refused",
        "_todo",
        "_utf8",
        "_verdicts",
        "_verified",
        "closing",
        "ended",
        "mail_limit",
        "recipient_limit",
        "remote",
    )

    def __init__(self, terms: Terms, remote: str) -> None:
        self._terms = terms
        self.remote = remote
        #: Write what is outgoing, then close.
        self.closing = False
        #: Why it ended, where that was before any mail was begun (or between two).
        self.ended: Unusable | None = None
        #: Mails on one connection, recipients in one transaction (LIMITS); None: nothing was said.
        self.mail_limit: int | None = None
        self.recipient_limit: int | None = None
        self._replies = ReplyReceiver()
        self._out: list[bytes] = []
        self._due: deque[int] = deque([_GREETING])
        self._todo: deque[tuple[int, bytes]] = deque()
        self._held: tuple[int, int, list[str]] | None = None
        self._offers: dict[str, str] = {}
        self._ready = False
        self._tls = False
        self._tls_refused = False
        self._verified = False
        self._shaking = False
        self._login: list[bytes] | None = None
        self._pipelining = False
        self._chunking = False
        self._dsn = False
        self._sized = False
        self._size_limit = 0
        self._utf8 = False
        self._dirty = False
        self._count = 0
        self._forget()

    def _forget(self) -> None:
        self._mail: Mail | None = None
        self._verdicts: list[Outcome | None] = []
        self._accepted: list[int] = []
        self._refused: Outcome | None = None
        self._content_reply: Reply | None = None
        self._silent = True
        self._sent = False
        self._streaming = False
        self._cr = False
        self._tail = True

    # ------------------------------------------------------------- the caller's side

    def begin(self, mail: Mail, cautious: bool = False) -> Event | None:
        """Carry ``mail``: at once where the conversation stands, else as soon as it does.

        ``cautious``: the connection has rested, the upstream may have left meanwhile; no content
        leaves before a reply came, so that a stale connection is found out at no risk."""
        if self._mail is not None or self.closing:
            raise RuntimeError("the conversation is busy or at its end")
        self._silent = True
        self._mail = mail
        self._verdicts = [None] * len(mail.recipients)
        return self._start(mail, cautious) if self._ready else None

    def receive(self, data: bytes) -> Event | None:
        """What the upstream said."""
        # By another name: a type checker would take it for settled below, and a compiler would believe that.
        over = self.closing
        if over:
            return None
        replies = self._replies
        replies.feed(data)
        if self._shaking:
            return self._injected()
        self._silent = False
        while (found := replies.reply()) is not None:
            if self._held is not None:
                return self._one_too_many(found[0], found[1])
            if not self._due:
                return self._unasked(found[0], found[1])
            kind = self._due[0]
            pending = replies.pending > 0
            if pending and self._is_last(kind):
                if kind == _STARTTLS:
                    return self._injected()
                # More has come, but nothing more was asked: before this reply is believed, see
                # what that is. Only a 421 has a right to be there (RFC 5321 §3.8).
                self._held = (kind, found[0], found[1])
                continue
            event = self._answered(kind, found[0], found[1])
            if event is not None or self.closing:
                return event
            if not pending:
                return None
        if replies.fault is not None:
            return self._nonsense(f"malformed reply ({replies.fault})")
        return None

    def content(self, octets: bytes, last: bool) -> None:
        """The next piece of a content that is handed over in pieces; only while
        ``wants_content``."""
        if not self._streaming:
            raise RuntimeError("no content is wanted")
        self._sent = True
        if self._chunking:
            self._out.append(b"BDAT %d LAST\r\n" % len(octets) if last else b"BDAT %d\r\n" % len(octets))
            self._out.append(octets)
            self._due.append(_FINAL if last else _CHUNK)
        else:
            self._dotted(octets, last)
            if last:
                self._due.append(_FINAL)
        if last:
            self._streaming = False

    def secured(self, verified: bool = False) -> None:
        """The handshake is done: greet anew (RFC 3207 §4.2, what was learned before is void).
        ``verified``: the certificate was, and it is that of the host we mean."""
        self._shaking = False
        self._tls = True
        self._verified = verified
        self._replies = ReplyReceiver()
        self._hello()

    def eof(self) -> Event | None:
        """The upstream closed, or the connection was lost."""
        return self._broken("connection lost", Reply(451, "4.4.2", "connection lost"))

    def unsafe(self, reason: str) -> Event | None:
        """The handshake showed that mail with REQUIRETLS is not for this host: ``reason`` is our word."""
        return self._unfit(Reply.untrusted(550, f"5.7.10 encryption needed: {reason}"), polite=False)

    def fits(self, mail_from: str, params: Params) -> bool:
        """This conversation, which stands, can carry mail of this kind."""
        return "REQUIRETLS" not in params or self._misfit(mail_from) is None

    def stop(self, reason: str) -> Event | None:
        """A deadline has passed, or the handshake failed: ``reason`` is our word, not theirs."""
        return self._broken(reason, Reply(451, "4.4.2" if self._ready else "4.4.1", reason))

    def quit(self) -> None:
        """Say goodbye; only between mails."""
        if not self.closing:
            self._out.append(b"QUIT\r\n")
            self.closing = True

    def outgoing(self) -> bytes:
        """What may be written now."""
        out = self._out
        if not out:
            return b""
        octets = out[0] if len(out) == 1 else b"".join(out)
        self._out = []
        return octets

    @property
    def idle(self) -> bool:
        """Ready for another mail."""
        return self._ready and self._mail is None and not self.closing

    @property
    def busy(self) -> bool:
        """A mail was begun and is not settled."""
        return self._mail is not None

    @property
    def wants_content(self) -> bool:
        """Another piece may be handed over (without PIPELINING a chunk waits for its reply)."""
        return self._streaming and (self._pipelining or not self._due)

    @property
    def awaiting(self) -> Literal["setup", "command", "content", "answer"]:
        """What a deadline is for: until the conversation stands; a reply to a command; room for
        content; the answer to the end of data."""
        if not self._ready:
            return "setup"
        if self._streaming:
            return "content"
        return "answer" if self._sent else "command"

    # ------------------------------------------------------------------------ setup

    def _hello(self) -> None:
        verb = "LHLO" if self._terms.lmtp else "EHLO"
        self._say(_HELLO, f"{verb} {self._terms.hostname}\r\n".encode())

    def _say(self, kind: int, line: bytes) -> None:
        self._out.append(line)
        self._due.append(kind)

    def _greeted(self, code: int, lines: list[str]) -> Event | None:
        if not 200 <= code < 300:
            return self._turned_away("greeting", code, lines)
        self._hello()
        return None

    def _helloed(self, kind: int, code: int, lines: list[str]) -> Event | None:
        if 200 <= code < 300:
            self._offers = _offers(lines) if kind == _HELLO else {}
            return self._settle_in()
        if kind == _HELLO and code >= 500 and not self._terms.lmtp:
            # RFC 5321 §3.2: a server that does not know EHLO is asked with HELO.
            self._say(_HELO, f"HELO {self._terms.hostname}\r\n".encode())
            return None
        return self._turned_away("hello", code, lines)

    def _settle_in(self) -> Event | None:
        """After EHLO, and after each step that follows it: TLS, login, then mail."""
        terms = self._terms
        offers = self._offers
        if terms.tls != "off" and not self._tls:
            if "STARTTLS" in offers and not self._tls_refused:
                self._say(_STARTTLS, b"STARTTLS\r\n")
                return None
            if self._demanding:
                return self._unfit(_NOT_SECRET)
            if terms.tls != "opportunistic":
                return self._leave(Reply(451, "4.7.0", "TLS is required and the upstream does not offer it"))
        if terms.username is not None and self._login is None:
            return self._log_in(terms.username, terms.password or "")
        self._ready = True
        self._pipelining = terms.pipelining and "PIPELINING" in offers
        self._chunking = terms.chunking and "CHUNKING" in offers
        self._dsn = "DSN" in offers
        self._sized = "SIZE" in offers
        self._utf8 = "SMTPUTF8" in offers
        size = offers.get("SIZE", "")
        self._size_limit = int(size[:19]) if size.isascii() and size.isdigit() else 0
        limits = _limits(offers.get("LIMITS", ""))
        self.mail_limit = limits.get("MAILMAX")
        self.recipient_limit = limits.get("RCPTMAX")
        return self._start(self._mail, False) if self._mail is not None else None

    def _starttls(self, code: int, lines: list[str]) -> Event | None:
        if code == 220:
            self._shaking = True
            return TLSWanted()
        if self._demanding:
            # "Not now" (454) is no word on what this host can do.
            return self._turned_away("STARTTLS", code, lines) if code < 500 else self._unfit(_NOT_SECRET)
        if self._terms.tls == "opportunistic" and code >= 400:
            self._tls_refused = True
            return self._settle_in()
        return self._turned_away("STARTTLS", code, lines)

    @property
    def _demanding(self) -> bool:
        """The mail that waits must not leave without TLS."""
        return self._mail is not None and "REQUIRETLS" in self._mail.params and not self._terms.final

    def _misfit(self, mail_from: str) -> Reply | None:
        """Why mail with REQUIRETLS cannot be carried here, None if it can."""
        if self._terms.final:
            return None
        if not self._tls:
            return _NOT_SECRET
        if not self._verified:
            return _NOT_VERIFIED
        # A bounce is not lost for want of the offer (RFC 8689 §5).
        return None if "REQUIRETLS" in self._offers or not mail_from else _NO_REQUIRETLS

    def _unfit(self, reply: Reply, polite: bool = True) -> Event | None:
        event = self._leave(reply, polite)
        if isinstance(event, Unusable):
            event.down, event.unfit = False, True
        return event

    def _injected(self) -> Event | None:
        self._replies.discard()
        return self._leave(Reply(451, "4.7.0", "the upstream spoke between its consent to TLS and the handshake"), polite=False)

    def _log_in(self, username: str, password: str) -> Event | None:
        if not self._tls and not self._terms.clear_login:
            return self._leave(Reply(451, "4.7.0", "the password is not sent without TLS"))
        mechanisms = self._offers.get("AUTH", "").upper().split()
        if "PLAIN" in mechanisms:
            self._login = []
            self._say(_AUTH, b"AUTH PLAIN " + b64encode(f"\0{username}\0{password}".encode()) + b"\r\n")
        elif "LOGIN" in mechanisms:
            self._login = [b64encode(username.encode()) + b"\r\n", b64encode(password.encode()) + b"\r\n"]
            self._say(_AUTH, b"AUTH LOGIN\r\n")
        else:
            return self._leave(Reply(451, "4.7.0", "the upstream offers neither AUTH PLAIN nor LOGIN"))
        return None

    def _authed(self, code: int, lines: list[str]) -> Event | None:
        if code == 235:
            return self._settle_in()
        if code == 334 and self._login:
            self._say(_AUTH, self._login.pop(0))
            return None
        return self._turned_away("AUTH", code, lines)

    # ------------------------------------------------------------------- transaction

    def _start(self, mail: Mail, cautious: bool) -> Event | None:
        offers = self._offers
        misfit = self._misfit(mail.mail_from) if mail.params and "REQUIRETLS" in mail.params else None
        if misfit is not None:
            return self._unfit(misfit)
        refusal = self._cannot_carry(mail)
        if refusal is not None:
            return self._finish_all(Outcome("failed", refusal, self.remote))
        params = mail.params
        line = f"MAIL FROM:<{mail.mail_from}>"
        if self._sized:
            line = f"{line} SIZE={mail.size}"
        if mail.eight_bit or params:
            line += self._body_said(mail)
        if self._utf8 and _international(mail):
            line += " SMTPUTF8"
        if params and "REQUIRETLS" in params and "REQUIRETLS" in offers and self._verified:
            line += " REQUIRETLS"
        if mail.by is not None and "DELIVERBY" in offers:
            line += f" BY={mail.by.said(mail.elapsed())}"
        if mail.priority is not None and "MT-PRIORITY" in offers:
            line += f" MT-PRIORITY={mail.priority}"
        if self._dsn and params:
            for key in ("RET", "ENVID"):
                if params.get(key):
                    line += f" {key}={params[key]}"
        if not _safe(line):
            return self._finish_all(Outcome("failed", _BAD_SENDER, self.remote))
        # From here on only what this mail's own commands are answered with speaks for it.
        self._silent = True
        lines = ["RSET\r\n", line + "\r\n"] if self._dirty else [line + "\r\n"]
        kinds = [_RSET, _MAIL] if self._dirty else [_MAIL]
        envelope = len(kinds)
        index = -1
        for recipient in mail.recipients:
            if self.recipient_limit is not None and len(kinds) - envelope >= self.recipient_limit:
                break
            index += 1
            line = f"RCPT TO:<{recipient.address}>"
            given = recipient.params
            if self._dsn and given:
                for key in ("NOTIFY", "ORCPT"):
                    if given.get(key):
                        line += f" {key}={given[key]}"
            if not _safe(line):
                self._verdicts[index] = Outcome("failed", _BAD_RECIPIENT, self.remote)
            else:
                kinds.append(index)
                lines.append(line + "\r\n")
        if len(kinds) == envelope:
            return self._finish(dirty=self._dirty)
        self._dirty = False
        if not self._pipelining:
            self._todo.extend(zip(kinds, [line.encode() for line in lines], strict=True))
            self._next()
            return None
        self._due.extend(kinds)
        self._out.append("".join(lines).encode())
        if not self._chunking:
            self._say(_DATA, b"DATA\r\n")
        elif mail.octets is not None and len(mail.octets) <= INLINE_LIMIT and not cautious:
            # One write for the whole transaction. If no recipient is taken, the chunk is read over
            # and refused by a server that knows BDAT (RFC 3030 §2).
            self._whole(mail.octets)
        return None

    def _body_said(self, mail: Mail) -> str:
        """The parameter BODY for content that is not plain 7-bit, or of which something was said."""
        params, offers = mail.params, self._offers
        if "BINARYMIME" in offers and (params.get("BODY") or "").upper() == "BINARYMIME":
            return " BODY=BINARYMIME"
        if "8BITMIME" in offers and (mail.eight_bit or "BODY" in params):
            return " BODY=8BITMIME" if mail.eight_bit or params["BODY"] != "7BIT" else " BODY=7BIT"
        return ""

    def _cannot_carry(self, mail: Mail) -> Reply | None:
        """What this upstream cannot carry fails here; nothing is ever re-encoded (promise 3)."""
        offers = self._offers
        # First: a UTF-8 address also makes our own trace field 8-bit.
        if not self._utf8 and _international(mail):
            return _NO_SMTPUTF8
        if mail.params and (mail.params.get("BODY") or "").upper() == "BINARYMIME":
            if not (self._terms.binarymime and self._chunking and "BINARYMIME" in offers):
                return _NO_BINARYMIME
        elif mail.eight_bit and "8BITMIME" not in offers:
            return _NO_8BITMIME
        if 0 < self._size_limit < mail.size:
            return _TOO_LARGE
        return self._too_late(mail.by, mail.elapsed()) if mail.by is not None and mail.by.returns else None

    def _too_late(self, by: DeliverBy, elapsed: float) -> Reply | None:
        """Can this upstream keep the time of mode R? A mail store delivers on the spot."""
        left = by.seconds - elapsed
        offer = self._offers.get("DELIVERBY")
        if offer is None and not self._terms.lmtp:
            return _NO_DELIVERBY
        least = (offer or "").partition(",")[0]
        wanted = int(least) if least.isascii() and least.isdigit() and len(least) <= 9 else 0
        return _NOT_IN_TIME if left <= 0 or left < wanted else None

    def _next(self) -> None:
        """Without PIPELINING: the next command of the envelope."""
        kind, line = self._todo.popleft()
        self._say(kind, line)

    def _whole(self, octets: bytes) -> None:
        """The content as one last chunk."""
        self._out.append(b"BDAT %d LAST\r\n" % len(octets))
        self._out.append(octets)
        self._due.append(_FINAL)
        self._sent = True

    def _dotted(self, octets: bytes, last: bool) -> None:
        """A piece of the content for DATA. A CR at the end of a piece waits for its LF, so that
        every piece begins at a line start or clearly inside a line."""
        if self._cr:
            octets = b"\r" + octets
            self._cr = False
        if not last and octets.endswith(b"\r"):
            octets = octets[:-1]
            self._cr = True
        if octets:
            self._out.append(stuff(octets, self._tail))
            self._tail = octets.endswith(b"\r\n")
        if last:
            self._out.append(b".\r\n" if self._tail else b"\r\n.\r\n")

    def _enveloped(self) -> Event | None:
        """All replies to MAIL and RCPT are in and no content command was sent yet."""
        mail = self._mail
        assert mail is not None
        if not self._accepted:
            return self._finish(dirty=self._refused is None)
        if not self._chunking:
            self._say(_DATA, b"DATA\r\n")
        elif mail.octets is not None:
            self._whole(mail.octets)
        else:
            self._streaming = True
        return None

    def _mailed(self, code: int, lines: list[str]) -> Event | None:
        if 200 <= code < 300:
            return self._go_on()
        if code < 400:
            return self._nonsense(f"reply {code} to MAIL")
        if code == 421:
            return self._closing_down(lines, untouched=True)
        reply = _heard(code, lines)
        if code in _LOGIN_CODES:
            self._refused = Outcome("deferred", _softened("MAIL", reply), self.remote, down=True)
        elif code == 503:
            # The upstream does not stand where we think it does.
            return self._nonsense("reply 503 to MAIL")
        else:
            self._refused = self._outcome(reply)
        self._todo.clear()
        return self._go_on()

    def _recipient(self, index: int, code: int, lines: list[str]) -> Event | None:
        if 200 <= code < 300:
            if self._refused is None:
                self._accepted.append(index)
            return self._go_on()
        if code < 400:
            return self._nonsense(f"reply {code} to RCPT")
        if code == 421:
            return self._closing_down(lines)
        reply = _heard(code, lines)
        if code == 552 and reply.enhanced in ("", "5.5.3"):
            # Too many recipients, in the words of RFC 821 (RFC 5321 §4.5.3.1.10).
            reply = Reply(452, "4.5.3", reply.text)
        if not (self._accepted and reply.code == 452 and reply.enhanced in ("", "4.5.3")):
            self._verdicts[index] = self._outcome(reply)
        return self._go_on()

    def _go_on(self) -> Event | None:
        """A reply of the envelope was in order."""
        if self._todo:
            self._next()
            return None
        return None if self._due else self._enveloped()

    def _data(self, code: int, lines: list[str]) -> Event | None:
        if code == 354:
            mail = self._mail
            assert mail is not None
            if not self._accepted:
                if self._terms.lmtp:
                    # An end of data without recipients would have no answer (RFC 2033 §4.2).
                    return self._finish(closing=True)
                # RFC 2920 §3.1: the server waits for content that has no recipient.
                self._out.append(b".\r\n")
                self._due.append(_FINAL)
            elif mail.octets is None:
                self._streaming = True
            else:
                self._sent = True
                self._dotted(mail.octets, True)
                self._due.append(_FINAL)
            return None
        if code < 400:
            return self._nonsense(f"reply {code} to DATA")
        if code == 421:
            return self._closing_down(lines)
        self._content_reply = _heard(code, lines)
        return self._finish(dirty=True)

    def _chunked(self, code: int, lines: list[str]) -> Event | None:
        if 300 <= code < 400:
            return self._nonsense(f"reply {code} to BDAT")
        if code == 421:
            return self._closing_down(lines)
        if code >= 400 and self._content_reply is None:
            self._content_reply = _heard(code, lines)
            self._streaming = False
        if self._content_reply is not None and not self._due:
            return self._finish(dirty=True)
        return None

    def _final(self, code: int, lines: list[str]) -> Event | None:
        if 300 <= code < 400:
            return self._nonsense(f"reply {code} to the end of data")
        if code == 421:
            return self._closing_down(lines)
        if not self._accepted:
            return self._finish(dirty=True)
        if self._content_reply is not None:
            # A chunk before the last one was refused already. How many answers LMTP owes now
            # is anybody's guess.
            return self._finish(dirty=True, closing=self._terms.lmtp)
        reply = _heard(code, lines)
        if not self._terms.lmtp:
            self._content_reply = reply
            return self._finish(dirty=code >= 300)
        # RFC 2033 §4.2: one reply for each accepted recipient, in the order of RCPT.
        index = self._accepted.pop(0)
        self._verdicts[index] = self._outcome(reply, index)
        if self._accepted:
            self._due.appendleft(_FINAL)
            return None
        return self._finish()

    def _outcome(self, reply: Reply, index: int | None = None) -> Outcome:
        """What a reply to a recipient's MAIL, RCPT or content makes of it."""
        if reply.code >= 500:
            return Outcome("failed", reply, self.remote)
        if reply.code >= 400:
            return Outcome("deferred", reply, self.remote)
        mail = self._mail
        notifies = False
        if self._dsn and mail is not None and index is not None:
            params = mail.recipients[index].params
            notifies = bool(params) and "NOTIFY" in params
        return Outcome("delivered", reply, self.remote, notifies=notifies, onward=self._onward())

    def _onward(self) -> Literal["", "timed", "untimed"]:
        if self._mail is None or self._mail.by is None or self._terms.lmtp:
            return ""
        return "timed" if "DELIVERBY" in self._offers else "untimed"

    def _finish(self, dirty: bool = False, closing: bool = False) -> Settled:
        verdicts = self._verdicts
        if self._refused is not None:
            verdicts = [self._refused] * len(verdicts)
        elif self._content_reply is not None:
            reply = self._content_reply
            if reply.code < 400 and not self._dsn:
                outcome = Outcome("delivered", reply, self.remote, onward=self._onward())
                for index in self._accepted:
                    verdicts[index] = outcome
            else:
                for index in self._accepted:
                    verdicts[index] = self._outcome(reply, index)
        self._dirty = dirty
        self.closing = self.closing or closing
        self._count += 1
        self._forget()
        return Settled(verdicts)

    def _finish_all(self, outcome: Outcome) -> Settled:
        """Nothing was sent of it."""
        count = len(self._verdicts)
        self._forget()
        return Settled([outcome] * count)

    # ----------------------------------------------------------------- what goes wrong

    def _is_last(self, kind: int) -> bool:
        """Is this reply the last one that we can have asked for?"""
        if len(self._due) > 1:
            return False
        return not (kind == _FINAL and self._terms.lmtp and len(self._accepted) > 1)

    def _answered(self, kind: int, code: int, lines: list[str]) -> Event | None:
        self._due.popleft()
        if kind >= 0:
            return self._recipient(kind, code, lines)
        if kind == _MAIL:
            return self._mailed(code, lines)
        if kind == _FINAL:
            return self._final(code, lines)
        if kind == _DATA:
            return self._data(code, lines)
        if kind == _CHUNK:
            return self._chunked(code, lines)
        if kind == _RSET:
            # Whatever it is worth, the answer to MAIL tells (only a 421 ends the conversation).
            return self._closing_down(lines, untouched=True) if code == 421 else self._go_on()
        if kind == _GREETING:
            return self._greeted(code, lines)
        if kind == _STARTTLS:
            return self._starttls(code, lines)
        if kind == _AUTH:
            return self._authed(code, lines)
        return self._helloed(kind, code, lines)

    def _one_too_many(self, code: int, lines: list[str]) -> Event | None:
        """A reply came on the heels of the last one that was due."""
        assert self._held is not None
        kind, first, said = self._held
        self._held = None
        if code != 421:
            return self._nonsense("a reply too many")
        if kind == _FINAL:
            event = self._answered(kind, first, said)
            self.closing = True
            return event
        return self._closing_down(lines)

    def _unasked(self, code: int, lines: list[str]) -> Event | None:
        """A reply although nothing is due: between mails, or while content is on its way."""
        if self._mail is None:
            self.closing = True
            return None
        if code == 421:
            return self._closing_down(lines)
        if self._streaming and code >= 400:
            # It will not have the rest. The end of data is never said, so nothing was taken.
            self._content_reply = _heard(code, lines)
            return self._finish(closing=True)
        return self._nonsense("a reply before the end of data")

    def _turned_away(self, where: str, code: int, lines: list[str]) -> Event | None:
        """The conversation does not come about. Nobody's mail is to blame."""
        return self._leave(_softened(where, _heard(code, lines)))

    def _leave(self, reply: Reply, polite: bool = True) -> Event | None:
        if polite:
            self._out.append(b"QUIT\r\n")
        self.closing = True
        if self._mail is None:
            self.ended = Unusable(reply, down=True, stale=False)
            return None
        self._forget()
        return Unusable(reply, down=True, stale=False)

    def _closing_down(self, lines: list[str], untouched: bool = False) -> Event | None:
        """421: the upstream closes, now and whatever was asked (RFC 5321 §3.8). ``untouched``: it
        answers RSET or MAIL, so nothing of this mail was looked at."""
        return self._end(_heard(421, lines), untouched, down=False)

    def _nonsense(self, what: str) -> Event | None:
        """After this no reply can be trusted to answer what it seems to, earlier ones neither."""
        self._verdicts = [None] * len(self._verdicts)
        self._refused = None
        self._accepted = []
        self._held = None
        reply = Reply(451, "4.5.0", f"the upstream broke the protocol: {what}")
        return self._end(reply, untouched=False, down=not self._ready)

    def _broken(self, what: str, reply: Reply) -> Event | None:
        if self.closing:
            return None
        if self._held is not None:
            return self._nonsense(f"octets after the last reply, then {what}")
        if self._sent and not self._silent:
            reply = Reply(451, "4.4.2", f"{what} after the content was sent: it may have been taken")
        # Silence from the first command on speaks of the host, anything later may be this mail's doing.
        return self._end(reply, untouched=self._silent and self._count > 0, down=self._silent or not self._ready)

    def _end(self, reply: Reply, untouched: bool, down: bool) -> Event | None:
        """The conversation is over. ``untouched``: nothing of this mail was answered."""
        self.closing = True
        if self._mail is None:
            self.ended = Unusable(reply, down, stale=False)
            return None
        stale = untouched and self._count > 0
        if not self._sent or untouched:
            self._forget()
            return Unusable(reply, down, stale)
        outcome = Outcome("deferred", reply, self.remote, down=down)
        verdicts: list[Outcome | None] = [verdict or outcome for verdict in self._verdicts]
        if self._refused is not None:
            verdicts = [self._refused] * len(verdicts)
        self._forget()
        return Settled(verdicts)


def _safe(line: str) -> bool:
    # What is printable holds nothing unsafe; what is not (a no-break space) may be safe all the same.
    return line.isprintable() or _UNSAFE.search(line) is None


def _international(mail: Mail) -> bool:
    if (mail.params and "SMTPUTF8" in mail.params) or not mail.mail_from.isascii():
        return True
    return any(not recipient.address.isascii() for recipient in mail.recipients)


def _offers(lines: list[str]) -> dict[str, str]:
    """Keywords of an EHLO reply (RFC 5321 §4.1.1.1), upper case; the first line is the name."""
    offers: dict[str, str] = {}
    for line in lines[1:]:
        keyword, _, argument = line.partition(" ")
        keyword = keyword.upper()
        if keyword.startswith("AUTH="):
            # The spelling of a draft, still said by some beside or instead of the right one.
            keyword, argument = "AUTH", f"{keyword[5:]} {argument}"
        offers[keyword] = f"{offers[keyword]} {argument}" if keyword == "AUTH" and keyword in offers else argument.strip()
    return offers


def _limits(argument: str) -> dict[str, int]:
    """``RCPTMAX=20 MAILMAX=5`` (RFC 9422 §4); what is no positive number is read over."""
    limits: dict[str, int] = {}
    for word in argument.split():
        name, _, value = word.partition("=")
        if value.isascii() and value.isdigit() and len(value) <= 9 and int(value) > 0:
            limits[name.upper()] = int(value)
    return limits


def _heard(code: int, lines: list[str]) -> Reply:
    """The upstream's words as one Reply; the enhanced code that each line repeats is said once."""
    if len(lines) == 1:
        return Reply.untrusted(code, lines[0])
    # What is kept of a reply is bounded anyway: a few lines will do.
    first, *rest = lines[:32] or [""]
    enhanced, _, _ = first.partition(" ")
    repeated = f"{enhanced} " if enhanced[:2] in ("2.", "4.", "5.") else ""
    return Reply.untrusted(code, " ".join([first, *(line.removeprefix(repeated) for line in rest)]))


def _softened(where: str, reply: Reply) -> Reply:
    """The upstream's refusal of something that is not the mail's fault, as a 4yz."""
    if reply.temporary:
        return reply
    return Reply.untrusted(451, f"4.3.0 {where} was answered with {reply}")
