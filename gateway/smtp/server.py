"""The server's side of one SMTP conversation, as a value: bytes in, events and bytes out.

Owns the order of commands, the transaction, the counts of offences and the order of replies.
Knows no socket, clock, task or file, and keeps no content: pieces go out as the parser hands
them over. Wording is in ``replies.py``, values of parameters in ``esmtp.py``.

Invariants: one reply per command, in order (replies behind an answer that is still owed wait
in its slot); nothing is said before the true end of content; between two points at which a
client must wait, the outcome does not depend on how the bytes were cut. Nothing is judged by
a count that an owed answer may still reset: the session waits for that answer first.

RFC 5321, 2033 (LMTP), 2920 (PIPELINING), 3030 (CHUNKING, BINARYMIME), 1870 (SIZE),
6152 (8BITMIME), 6531 (SMTPUTF8), 2034 (ENHANCEDSTATUSCODES), 3461 (DSN), 9422 (LIMITS).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from .._parser import Command, Receiver
from ..contracts import Question, Transaction, Verdict
from ..message import Client, Envelope, Recipient
from ..reply import Reply
from ..route import Route, Routes
from . import replies
from .esmtp import mail_parameters, rcpt_parameters

#: Commands done in one turn of the loop; the others wait for ``proceed``.
COMMANDS_A_TURN: Final = 256
#: Messages after their end of data that may be unanswered at a time.
ANSWERS_OWED: Final = 16
#: Replies that may wait behind one owed answer before reading stops.
REPLIES_HELD: Final = 1024
#: Errors after which each further one is answered late, and with which we hang up.
ERRORS_FREE: Final = 10
ERRORS_AT_MOST: Final = 20
#: NOOP, RSET, VRFY and HELP after which each further one counts as an error.
JUNK_FREE: Final = 100
#: Malformed lines (C1 of the reference) with which we hang up.
BAD_LINES_AT_MOST: Final = 3
#: Seconds by which the tarpit withholds a reply.
TARPIT: Final = 1.0
#: Octets of a text line without its CRLF (RFC 5321 §4.5.3.1.6).
TEXT_LINE: Final = 998
_NAME_OCTETS = 255
_TLS_HANDSHAKE = b"\x16"
_HTTP = frozenset({"GET", "POST", "CONNECT", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "PRI"})

_OK = replies.OK.wire
_SENDER_OK = replies.SENDER_OK.wire
_RECIPIENT_OK = replies.RECIPIENT_OK.wire
_CHUNK_OK = replies.CHUNK_OK.wire
_START_CONTENT = replies.START_CONTENT.wire

# What is read now.
_GREETING, _COMMAND, _CONTENT, _CHUNK, _CLOSED = range(5)

Stage = Literal["connect", "mail", "recipient", "data", "command"]


@dataclass(slots=True)
class Rules:
    """What a listener asks of its sessions. Shared by them, replaced whole on reload;
    only ``shortage`` changes in place.

    ``message_size`` in octets. ``binarymime``: every route's sink carries it. ``client_checks``,
    ``sender_checks``: names of the checks of that stage, for all mail; ``recipient_checks``: which
    names among ``Route.checks`` speak at the recipient stage. ``shortage``: MAIL is refused with
    it, and with a 421 every new connection."""

    hostname: str
    routes: Routes
    protocol: Literal["smtp", "submission", "lmtp"] = "smtp"
    message_size: int = 25 * 2**20
    recipients: int = 1000
    hops: int = 100
    long_lines: Literal["accept", "reject"] = "accept"
    bare_newlines: Literal["reject", "normalize"] = "reject"
    tls: Literal["off", "starttls", "required", "implicit"] = "off"
    auth: Literal["off", "offered", "required"] = "off"
    binarymime: bool = True
    client_checks: tuple[str, ...] = ()
    sender_checks: tuple[str, ...] = ()
    recipient_checks: frozenset[str] = frozenset()
    shortage: Reply | None = None


# ----------------------------------------------------------------------- events


@dataclass(slots=True)
class Asked:
    """These checks must be run; the session waits for ``verdict``."""

    question: Question
    checks: tuple[str, ...]


@dataclass(slots=True)
class ClientAsked(Asked):
    """Before the greeting."""


@dataclass(slots=True)
class SenderAsked(Asked):
    """MAIL is well formed."""


@dataclass(slots=True)
class RecipientAsked(Asked):
    """RCPT has a route."""


@dataclass(slots=True)
class MailStarted:
    """The recipients stand; content comes."""

    transaction: Transaction


@dataclass(slots=True)
class MailContent:
    """The next piece of content: the parser's own object, never empty."""

    number: int
    octets: bytes


@dataclass(slots=True)
class MailFinished:
    """The content is whole and the wire is content with it; the facts of the transaction are
    set. ``answer(number, …)`` is owed."""

    number: int


@dataclass(slots=True)
class MailAborted:
    """A started mail will never finish."""

    number: int


@dataclass(slots=True)
class Refused:
    """A 4yz or 5yz was said; ``address`` as the client gave it, where there is one."""

    stage: Stage
    reply: Reply
    address: str | None


@dataclass(slots=True)
class AuthWanted:
    """The client began AUTH with this mechanism."""

    mechanism: str
    initial: bytes | None


@dataclass(slots=True)
class TLSWanted:
    """220 is the last thing said in clear; the handshake comes next."""


Event = Asked | MailStarted | MailContent | MailFinished | MailAborted | Refused | AuthWanted | TLSWanted


class _Owed:
    """The place of one answer among the replies, and what was said after it."""

    __slots__ = ("after", "count", "errors", "junk", "number", "silent", "wire")

    def __init__(self, number: int, count: int, errors: int, junk: int) -> None:
        self.number = number
        self.count = count  # replies that the answer has: recipients in LMTP, else 1
        self.errors = errors  # counted before this message: forgotten when it is accepted
        self.junk = junk
        self.wire: bytes | None = None
        self.silent = False
        self.after: list[bytes] = []


class ServerSession:
    """One conversation. Feed it with ``receive``, carry out the events it gives back in their
    order, then write ``outgoing()``.

    Read after every call:
    ``paused``: stop reading (a question is open, 16 answers are owed, a tarpit runs, or an owed
    answer decides how to go on). ``more``: octets are left that can be gone on with: call
    ``proceed()`` in the next turn of the loop. ``delay``: over 0, call ``proceed()`` after that
    many seconds; until then ``outgoing()`` gives nothing. ``closing``: write ``outgoing()``, then
    close (no answer is owed any more).

    ``verdict`` and ``answer`` do not go on by themselves: look at ``more`` after them, too."""

    __slots__ = (
        "_address",
        "_address_route",
        "_bad_lines",
        "_base_errors",
        "_base_junk",
        "_chunk_last",
        "_chunk_left",
        "_chunk_refusal",
        "_chunk_sum",
        "_ended",
        "_errors",
        "_events",
        "_facts",
        "_fresh",
        "_greeted",
        "_junk",
        "_lockstep",
        "_number",
        "_out",
        "_question",
        "_receiver",
        "_slots",
        "_spurned",
        "_started",
        "_state",
        "_tail",
        "_transaction",
        "_verbs",
        "_watch",
        "client",
        "closing",
        "delay",
        "listener",
        "more",
        "paused",
        "rules",
        "session",
    )

    def __init__(self, rules: Rules, client: Client, session: str, listener: str) -> None:
        """``session``: id for logs; ``listener``: its name. ``client`` is not changed: what EHLO
        says makes a new one, so that messages already taken keep theirs."""
        self.rules = rules
        self.client = client
        self.session = session
        self.listener = listener
        self.closing = False
        self.paused = False
        self.more = False
        self.delay = 0.0

        self._receiver = Receiver(normalize=rules.bare_newlines == "normalize")
        self._state = _GREETING
        self._verbs = _LMTP if rules.protocol == "lmtp" else _SMTP
        self._events: list[Event] = []
        self._out: list[bytes] = []
        self._slots: deque[_Owed] = deque()
        #: Where the next reply goes: ``_out``, or behind the last owed answer.
        self._tail = self._out

        #: The next octets must be looked at before they are taken (see ``_may_come``).
        self._watch = True
        self._fresh = True  # nothing came yet
        self._ended = False  # the client sends no more
        self._greeted = False  # HELO, EHLO or LHLO was said
        self._lockstep = False  # HELO: every reply must be waited for (RFC 2920 §3.1)
        self._facts: dict[str, object] = {}  # of the client checks
        self._question: Question | None = None

        self._number = 0
        self._transaction: Transaction | None = None
        self._started = False  # MailStarted was said, and neither its end nor its abort
        self._spurned = False  # what follows may only follow from a refusal of ours
        self._address = ""  # MAIL or RCPT whose question is open
        self._address_route: Route | None = None

        self._chunk_left = 0
        self._chunk_last = False
        self._chunk_sum = -1  # octets announced by BDAT so far, -1: none was said
        self._chunk_refusal: Reply | None = None

        # Totals; what counts is what came after the bases, which move up with accepted messages.
        self._errors = 0
        self._junk = 0
        self._base_errors = 0
        self._base_junk = 0
        self._bad_lines = 0

    # -------------------------------------------------------- what comes in

    def start(self, early: bool = False) -> list[Event]:
        """The greeting, or first the question whether this client may have one. ``early``: the
        client sent octets before it."""
        rules = self.rules
        if early:
            self._refuse("connect", replies.TOO_EARLY)
        elif rules.shortage is not None and rules.shortage.code == 421:
            self._refuse("connect", rules.shortage)
        elif rules.client_checks:
            self._ask(ClientAsked(Question("client", self.client, self.listener), rules.client_checks))
        else:
            self._greet()
        return self._taken()

    def receive(self, data: bytes) -> list[Event]:
        """Octets of the client. Not to be called with ``b""``; after ``paused`` only what was on
        its way anyway."""
        if self._watch and not self._may_come(data):
            return self._taken()
        self._receiver.feed(data)
        if self.paused:
            return []
        return self._run()

    def proceed(self) -> list[Event]:
        """Go on with what is pending; ends the tarpit."""
        if self.delay:
            self.delay = 0.0
            self._weigh()
        return self._run()

    def verdict(self, verdict: Verdict) -> list[Event]:
        """The answer to the one open question (or to one that the end of the session closed)."""
        question = self._question
        if question is None:
            return []
        self._question = None
        if question.stage == "client":
            self._admit_client(verdict)
        elif question.stage == "sender":
            self._settle_sender(question.sender or "", verdict)
        else:
            self._settle_recipient(question, verdict)
        self._resume()
        return self._taken()

    def answer(self, number: int, reply: Reply | Sequence[Reply] | None) -> list[Event]:
        """What becomes of a finished message: one Reply (in LMTP it stands for every recipient),
        in LMTP one per recipient in order, or None to close without a word once the earlier
        replies are out. A number that is owed nothing (any more) is no error: its client is gone.
        Raises ValueError when the count of replies is off, RuntimeError for a second answer."""
        for slot in self._slots:
            if slot.number == number:
                break
        else:
            return []
        if slot.wire is not None:
            raise RuntimeError(f"transaction {number} was answered twice")
        if reply is None:
            slot.wire = b""
            slot.silent = True
        elif isinstance(reply, Reply):
            slot.wire = reply.wire * slot.count if slot.count > 1 else reply.wire
            self._note(slot, (reply,))
        else:
            if len(reply) != slot.count:
                raise ValueError(f"{len(reply)} replies where {slot.count} are owed")
            slot.wire = b"".join([one.wire for one in reply])
            self._note(slot, reply)
        self._let_out()
        if self.paused:
            self._resume()
        return self._taken()

    def eof(self) -> list[Event]:
        """The client sends no more, or the connection is lost. Answers that are owed may still
        be given; ``closing`` says when nothing is left to say."""
        if self._state == _CLOSED or self._ended:
            return []
        self._ended = True
        if not (self.paused or self.more):
            self._end()
        return self._taken()

    def stop(self, reply: Reply) -> list[Event]:
        """Time-out, drain: say ``reply`` (421) as soon as what is owed is out, then close."""
        if self._state == _CLOSED:
            return []
        stage: Stage = "connect" if self._state == _GREETING else "data" if self._state in (_CONTENT, _CHUNK) else "command"
        self._refuse(stage, reply, closes=True)
        return self._taken()

    # ------------------------------------------------------- what goes out

    def outgoing(self) -> bytes:
        """What may be written now, in order; ``b""`` if nothing."""
        out = self._out
        if not out or self.delay:
            return b""
        wire = out[0] if len(out) == 1 else b"".join(out)
        out.clear()
        return wire

    @property
    def awaiting(self) -> Literal["greeting", "command", "content", "answer"]:
        """What the next step needs: our greeting, the client's command or content, or our answer."""
        if self._state == _GREETING:
            return "greeting"
        if self._question is not None or self.delay:
            return "answer"
        if self._state == _CHUNK:
            return "content"
        if self._state == _CONTENT:
            # While 354 waits behind an owed answer, the client waits too.
            return "answer" if self._watch and self._slots else "content"
        return "answer" if self._slots else "command"

    # ------------------------------------------------------------- the turn

    def _run(self) -> list[Event]:
        receiver = self._receiver
        verbs = self._verbs
        left = COMMANDS_A_TURN
        self.more = False
        while not self.paused:
            state = self._state
            if state == _COMMAND:
                if not left:
                    self.more = receiver.pending > 0
                    break
                command = receiver.command()
                if command is None:
                    break
                left -= 1
                verb = command.verb
                if self._lockstep and verb != "BDAT":
                    if receiver.pending:
                        self._refuse("command", replies.TOO_EARLY)
                        break
                    self._watch = True
                fault = command.fault
                if fault is not None and fault in replies.LINE_FAULTS:
                    self._malformed(fault)
                else:
                    verbs.get(verb, ServerSession._unknown)(self, command)
            elif state == _CONTENT:
                if not self._read_content():
                    break
            elif state == _CHUNK:
                if not self._read_chunk():
                    break
            else:
                break
        if self._ended and not (self.paused or self.more):
            self._end()
        return self._taken()

    def _taken(self) -> list[Event]:
        events = self._events
        if events:
            self._events = []
            return events
        return []

    def _may_come(self, data: bytes) -> bool:
        """At points where the client must wait for us (RFC 2920 §3.1): was the wait over?"""
        if self._state == _CLOSED:
            return False
        if self._state == _GREETING:
            self._refuse("connect", replies.TOO_EARLY)
            return False
        if self._slots or self._question is not None or self.delay:
            self._refuse("command", replies.TOO_EARLY)
            return False
        if self._fresh:
            self._fresh = False
            if data[:1] == _TLS_HANDSHAKE:
                self._refuse("command", replies.NOT_TLS)
                return False
        self._watch = False
        return True

    def _ends_group(self) -> bool:
        """After this command the client must wait for our reply (RFC 2920 §3.1): did it?"""
        if self._receiver.pending:
            self._refuse("command", replies.TOO_EARLY)
            return False
        self._watch = True
        return True

    def _weigh(self) -> None:
        """Whether to stop reading, anew."""
        self.paused = (
            self._question is not None
            or self.delay > 0
            or (bool(self._slots) and (len(self._slots) >= ANSWERS_OWED or len(self._tail) >= REPLIES_HELD or self._at_the_brink))
        )

    def _resume(self) -> None:
        """Something we waited for is here."""
        if self._state == _CLOSED:
            return
        self._weigh()
        if self.paused:
            return
        self.more = self._receiver.pending > 0
        if self._ended and not self.more:
            self._end()

    @property
    def _at_the_brink(self) -> bool:
        """One more error or junk command would be judged by counts that an owed answer may reset."""
        return self._errors - self._base_errors >= ERRORS_FREE or self._junk - self._base_junk >= JUNK_FREE

    # -------------------------------------------------------------- replies

    def _say(self, wire: bytes) -> None:
        tail = self._tail
        tail.append(wire)
        if self._slots and len(tail) >= REPLIES_HELD:
            self.paused = True

    def _refuse(self, stage: Stage, reply: Reply, address: str | None = None, closes: bool = False) -> None:
        self._events.append(Refused(stage, reply, address))
        self._say(reply.wire)
        if closes or reply.code == 421 or reply in replies.CLOSING:
            self._close()

    def _fault(self, stage: Stage, reply: Reply, address: str | None = None, closes: bool = False) -> None:
        """Refuse, and count it where it is permanent; too many end the session."""
        if reply.permanent and not self._bear_error():
            reply, closes = replies.TOO_MANY_ERRORS, True
        self._refuse(stage, reply, address, closes)

    def _bear_error(self) -> bool:
        """Count an error; False if it was one too many."""
        self._errors += 1
        count = self._errors - self._base_errors
        if count >= ERRORS_AT_MOST:
            return False
        if count > ERRORS_FREE:
            self.delay = TARPIT
            self.paused = True
        elif self._slots and self._at_the_brink:
            self.paused = True
        return True

    def _bear_junk(self) -> bool:
        """Count a junk command; False if it was one too many."""
        self._junk += 1
        count = self._junk - self._base_junk
        if count > JUNK_FREE:
            return self._bear_error()
        if count == JUNK_FREE and self._slots:
            self.paused = True
        return True

    def _junk_reply(self, wire: bytes) -> None:
        if self._bear_junk():
            self._say(wire)
        else:
            self._refuse("command", replies.TOO_MANY_ERRORS)

    def _owe(self, number: int, count: int) -> None:
        slot = _Owed(number, count, self._errors, self._junk)
        slots = self._slots
        slots.append(slot)
        self._tail = slot.after
        if len(slots) >= ANSWERS_OWED or self._at_the_brink:
            self.paused = True

    def _note(self, slot: _Owed, answer: Sequence[Reply]) -> None:
        """An answer is known: tell what was refused, forgive what came before what was accepted."""
        for reply in answer:
            if not reply.positive:
                self._events.append(Refused("data", reply, None))
        if any(reply.positive for reply in answer):
            self._base_errors = max(self._base_errors, slot.errors)
            self._base_junk = max(self._base_junk, slot.junk)

    def _let_out(self) -> None:
        """Move to ``_out`` what no longer stands behind an owed answer."""
        slots = self._slots
        out = self._out
        while slots:
            slot = slots[0]
            if slot.wire is None:
                return
            slots.popleft()
            if slot.silent:
                self._forsake()
                return
            out.append(slot.wire)
            out += slot.after
        self._tail = out
        if self._state == _CLOSED:
            self.closing = True

    def _forsake(self) -> None:
        """Nobody knows the truth about a message: nothing more may be said."""
        for slot in self._slots:
            self._events.append(MailAborted(slot.number))
        self._slots.clear()
        self._tail = self._out
        self._close()

    def _close(self) -> None:
        """Take nothing more; ``closing`` follows the last owed answer."""
        self._abort()
        self._state = _CLOSED
        self._receiver.discard()
        self._question = None
        self._watch = True
        self.delay = 0.0
        self.more = False
        self.paused = False
        self.closing = not self._slots

    def _end(self) -> None:
        """The client's octets are used up and no more will come."""
        if self._state != _CLOSED:
            self._close()

    # ------------------------------------------------------------- greeting

    def _greet(self) -> None:
        self._state = _COMMAND
        kind = "LMTP" if self.rules.protocol == "lmtp" else "ESMTP"
        self._say(b"220 %s %s\r\n" % (self.rules.hostname.encode(), kind.encode()))

    def _admit_client(self, verdict: Verdict) -> None:
        if isinstance(verdict.facts, dict):
            self._facts = verdict.facts
        if verdict.reply is None:
            self._greet()
            return
        # RFC 5321 §3.1: unless we say 421, the client may still say QUIT, and nothing else.
        self._state = _COMMAND
        self._verbs = _TURNED_AWAY
        self._refuse("connect", verdict.reply)

    def _ask(self, asked: Asked) -> None:
        self._question = asked.question
        self.paused = True
        self._events.append(asked)

    # ------------------------------------------- commands outside the mail

    def _malformed(self, fault: str) -> None:
        reply = replies.LINE_FAULTS[fault]
        if fault == "newline":
            self._bad_lines += 1
            if self._bad_lines >= BAD_LINES_AT_MOST:
                reply = replies.TOO_MANY_BAD_LINES
        self._fault("command", reply)

    def _unknown(self, command: Command) -> None:
        verb = command.verb
        if self._verbs is _TURNED_AWAY:
            self._fault("command", replies.TURNED_AWAY)
        elif verb in _HTTP or ":" in verb:
            # Another protocol, or the header of a mail: whatever follows is no command either.
            self._refuse("command", replies.NOT_HTTP)
        else:
            self._fault("command", replies.UNKNOWN)

    def _helo(self, command: Command) -> None:
        if self._ends_group():
            self._hello(command, esmtp=False)

    def _ehlo(self, command: Command) -> None:
        if self._ends_group():
            self._hello(command, esmtp=True)

    def _hello(self, command: Command, esmtp: bool) -> None:
        name = command.argument
        if command.fault is not None or not name or len(name.encode()) > _NAME_OCTETS:
            self._fault("command", replies.HELO_SYNTAX)
            return
        self._reset()
        self._greeted = True
        self._lockstep = not esmtp
        client = self.client
        self.client = replace(client, helo=name, protocol=self._protocol(esmtp))
        hostname = self.rules.hostname.encode()
        self._say(self._offer(hostname) if esmtp else b"250 %s\r\n" % hostname)

    def _protocol(self, esmtp: bool, utf8: bool = False) -> str:
        """The ``with`` keyword of Received (RFC 3848, RFC 6531 §4.3)."""
        if not esmtp:
            return "SMTP"
        lmtp = self.rules.protocol == "lmtp"
        name = ("UTF8LMTP" if lmtp else "UTF8SMTP") if utf8 else ("LMTP" if lmtp else "ESMTP")
        client = self.client
        return f"{name}{'S' if client.tls is not None else ''}{'A' if client.user is not None else ''}"

    def _offer(self, hostname: bytes) -> bytes:
        rules = self.rules
        return b"".join(
            (
                b"250-%s\r\n" % hostname,
                b"250-PIPELINING\r\n",
                b"250-SIZE %d\r\n" % rules.message_size,
                b"250-8BITMIME\r\n250-SMTPUTF8\r\n250-ENHANCEDSTATUSCODES\r\n250-CHUNKING\r\n",
                b"250-BINARYMIME\r\n" if rules.binarymime else b"",
                b"250-DSN\r\n",
                b"250 LIMITS RCPTMAX=%d\r\n" % rules.recipients,
            )
        )

    def _wrong_hello(self, command: Command) -> None:
        if self._ends_group():
            self._fault("command", replies.LMTP_ONLY if self.rules.protocol == "lmtp" else replies.SMTP_ONLY)

    def _noop(self, command: Command) -> None:
        self._junk_reply(_OK)

    def _rset(self, command: Command) -> None:
        if command.argument:
            self._fault("command", replies.NO_ARGUMENT)
            return
        self._reset()
        self._junk_reply(_OK)

    def _vrfy(self, command: Command) -> None:
        # The same for everybody: no route is consulted, so nothing can be found out.
        if command.argument:
            self._junk_reply(replies.VRFY.wire)
        else:
            self._fault("command", replies.ARGUMENT_NEEDED)

    def _help(self, command: Command) -> None:
        self._junk_reply(replies.HELP.wire)

    def _quit(self, command: Command) -> None:
        if command.argument:
            self._fault("command", replies.NO_ARGUMENT)
            return
        self._say(replies.QUIT.wire)
        self._close()

    def _not_offered(self, command: Command) -> None:
        self._fault("command", replies.NOT_OFFERED)

    def _security(self, command: Command) -> None:
        """STARTTLS and AUTH while neither is offered."""
        if self._ends_group():
            self._fault("command", replies.NOT_OFFERED if self._transaction is None else replies.IN_TRANSACTION)

    def _xclient(self, command: Command) -> None:
        self._fault("command", replies.NO_XCLIENT if self._transaction is None else replies.IN_TRANSACTION)

    def _proxy(self, command: Command) -> None:
        self._refuse("command", replies.NO_PROXY)

    # -------------------------------------------------------------- envelope

    def _reset(self) -> None:
        self._abort()
        self._spurned = False

    def _abort(self) -> None:
        """The transaction, if any, comes to nothing."""
        transaction = self._transaction
        if transaction is not None:
            self._abandon_draft(transaction)
            self._transaction = None
        self._chunk_sum = -1

    def _abandon_draft(self, transaction: Transaction) -> None:
        """No content will be handed out any more, but the transaction still wants its reply."""
        if self._started:
            self._started = False
            self._events.append(MailAborted(transaction.number))

    def _mail(self, command: Command) -> None:
        refusal = self._check_mail(command)
        if refusal is not None:
            if self._transaction is None:
                # The RCPT and DATA that come pipelined behind it are no errors of their own.
                self._spurned = True
            self._fault("mail", refusal, command.address)
            return
        address = command.address or ""
        rules = self.rules
        client = self.client
        params = command.params
        if "SMTPUTF8" in params:
            client = replace(client, protocol=self._protocol(not self._lockstep, utf8=True))
        self._number += 1
        transaction = Transaction(
            self._number, self.session, self.listener, client, Envelope(address, params, []), lmtp=rules.protocol == "lmtp"
        )
        if self._facts:
            transaction.facts["checks"] = dict(self._facts)
        self._transaction = transaction
        if rules.sender_checks:
            self._ask(SenderAsked(Question("sender", client, self.listener, sender=address), rules.sender_checks))
        else:
            self._spurned = False
            self._say(_SENDER_OK)

    def _check_mail(self, command: Command) -> Reply | None:
        if not self._greeted:
            return replies.SAY_LHLO if self.rules.protocol == "lmtp" else replies.SAY_HELLO
        if self._transaction is not None:
            return replies.NESTED_MAIL
        rules = self.rules
        if rules.tls == "required" and self.client.tls is None:
            return replies.TLS_NEEDED
        if rules.auth == "required" and self.client.user is None:
            return replies.AUTH_NEEDED
        if rules.shortage is not None:
            return rules.shortage
        fault = command.fault
        if fault is not None:
            return replies.MAIL_FAULTS.get(fault, replies.SENDER_SYNTAX)
        params = command.params
        if not command.ascii and "SMTPUTF8" not in params and not (command.address or "").isascii():
            return replies.UTF8_SENDER
        if params:
            return mail_parameters(params, rules.message_size, rules.binarymime)
        return None

    def _settle_sender(self, address: str, verdict: Verdict) -> None:
        transaction = self._transaction
        assert transaction is not None  # the question was asked by its MAIL, and nothing ran since
        if verdict.reply is not None:
            self._transaction = None
            self._spurned = True
            self._fault("mail", verdict.reply, address)
            return
        if isinstance(verdict.facts, dict):
            transaction.facts.setdefault("checks", {}).update(verdict.facts)
        self._spurned = False
        self._say(_SENDER_OK)

    def _rcpt(self, command: Command) -> None:
        transaction = self._transaction
        refusal = self._check_rcpt(transaction, command)
        if refusal is not None:
            if transaction is None and self._spurned:
                self._refuse("recipient", refusal, command.address)
            else:
                self._fault("recipient", refusal, command.address)
            return
        assert transaction is not None
        route = self._judge_recipient(transaction, command)
        if isinstance(route, Reply):
            # Not an error of the client's: lists have dead addresses.
            self._spurned = True
            self._refuse("recipient", route, command.address)
            return
        recipient = self._recipient(command)
        if route.checks and self.rules.recipient_checks:
            names = tuple(name for name in route.checks if name in self.rules.recipient_checks)
            if names:
                self._address_route = route
                question = Question(
                    "recipient", transaction.client, self.listener, sender=transaction.envelope.mail_from, recipient=recipient
                )
                self._ask(RecipientAsked(question, names))
                return
        transaction.envelope.recipients.append(recipient)
        transaction.routes.append(route)
        self._say(_RECIPIENT_OK)

    def _check_rcpt(self, transaction: Transaction | None, command: Command) -> Reply | None:
        """Faults of the command; merits of the recipient come after."""
        if transaction is None:
            return replies.NO_SENDER
        if self._chunk_sum >= 0:
            return replies.CHUNKS_BEGUN
        fault = command.fault
        if fault is not None:
            return replies.RCPT_FAULTS.get(fault, replies.RECIPIENT_SYNTAX)
        params = command.params
        if params:
            return rcpt_parameters(params, transaction.envelope.utf8)
        return None

    def _judge_recipient(self, transaction: Transaction, command: Command) -> Route | Reply:
        if not command.ascii and not transaction.envelope.utf8 and not (command.address or "").isascii():
            return replies.UTF8_RECIPIENT
        routes = transaction.routes
        if len(routes) >= self.rules.recipients:
            return replies.TOO_MANY_RECIPIENTS
        route = self.rules.routes.find(command.local, command.domain, transaction.client)
        if isinstance(route, Reply) or not routes or route is routes[0] or _same_promise(route, routes[0]):
            return route
        return replies.OTHER_PROMISE

    def _recipient(self, command: Command) -> Recipient:
        local, domain = command.local, command.domain
        if domain:
            return Recipient(command.address or "", local, domain, command.params)
        # <Postmaster> (RFC 5321 §4.5.1) is ours.
        hostname = self.rules.hostname
        return Recipient(f"{local}@{hostname}", local, hostname.lower(), command.params)

    def _settle_recipient(self, question: Question, verdict: Verdict) -> None:
        transaction, route, recipient = self._transaction, self._address_route, question.recipient
        self._address_route = None
        assert transaction is not None  # as in _settle_sender
        assert route is not None
        assert recipient is not None
        if verdict.reply is not None:
            self._spurned = True
            self._refuse("recipient", verdict.reply, recipient.address)
            return
        if isinstance(verdict.facts, dict):
            checks = transaction.facts.setdefault("checks", {})
            for name, facts in verdict.facts.items():
                known = checks.get(name)
                checks[name] = {**(known if isinstance(known, dict) else {}), recipient.address: facts}
        transaction.envelope.recipients.append(recipient)
        transaction.routes.append(route)
        self._say(_RECIPIENT_OK)

    # ------------------------------------------------------------------ DATA

    def _data(self, command: Command) -> None:
        if not self._ends_group():
            return
        transaction = self._transaction
        refusal = self._check_data(transaction, command)
        if refusal is not None:
            self._refuse_content_command(refusal)
            return
        assert transaction is not None
        self._receiver.begin(False)
        self._started = True
        self._state = _CONTENT
        self._events.append(MailStarted(transaction))
        self._say(_START_CONTENT)

    def _check_data(self, transaction: Transaction | None, command: Command) -> Reply | None:
        if command.argument:
            return replies.NO_ARGUMENT
        if transaction is None:
            return replies.NO_SENDER
        if self._chunk_sum >= 0:
            return replies.CHUNKS_BEGUN
        if transaction.envelope.binary:
            return replies.BINARY_BY_DATA
        return None if transaction.routes else self._no_recipients()

    def _no_recipients(self) -> Reply:
        return replies.NO_RECIPIENTS_LMTP if self.rules.protocol == "lmtp" else replies.NO_RECIPIENTS

    def _refuse_content_command(self, reply: Reply) -> None:
        """DATA or BDAT that cannot be; junk where it only follows from an earlier refusal of ours."""
        if not self._spurned:
            self._fault("data", reply)
        elif self._bear_junk():
            self._refuse("data", reply)
        else:
            self._refuse("data", replies.TOO_MANY_ERRORS)

    def _read_content(self) -> bool:
        """One step of DATA; False when more octets are needed."""
        receiver = self._receiver
        piece = receiver.content()
        transaction = self._transaction
        assert transaction is not None
        if self._started:
            if piece:
                if receiver.size > self.rules.message_size:
                    self._abandon_draft(transaction)
                else:
                    self._events.append(MailContent(transaction.number, piece))
            elif receiver.content_fault is not None:
                self._abandon_draft(transaction)
        if not receiver.finished:
            return piece is not None
        self._state = _COMMAND
        self._end_content(transaction)
        return True

    def _end_content(self, transaction: Transaction) -> None:
        """The true end of the content was read, by DATA or by the last chunk."""
        refusal = self._check_content()
        if refusal is not None:
            self._refuse_content(transaction, refusal)
        else:
            receiver = self._receiver
            transaction.size = receiver.size
            transaction.eight_bit = receiver.eight_bit
            transaction.header_size = receiver.header_size
            facts = transaction.facts
            facts["hops"] = receiver.hops
            facts["longest"] = receiver.longest
            facts["header_fields"] = receiver.header_fields
            number = transaction.number
            self._transaction = None
            self._started = False
            self._chunk_sum = -1
            self._events.append(MailFinished(number))
            self._owe(number, len(transaction.routes) if transaction.lmtp else 1)
        if self._lockstep and self._state == _COMMAND:
            self._ends_group()

    def _check_content(self) -> Reply | None:
        receiver = self._receiver
        fault = receiver.content_fault
        if fault is not None:
            return replies.CONTENT_FAULTS[fault]
        rules = self.rules
        if receiver.size > rules.message_size:
            return replies.over_limit(rules.message_size)
        if receiver.hops > rules.hops:
            return replies.LOOP
        if rules.long_lines == "reject" and receiver.longest > TEXT_LINE:
            return replies.LONG_LINE
        return None

    def _refuse_content(self, transaction: Transaction, reply: Reply) -> None:
        """The one reply to the whole content; in LMTP one per accepted recipient (RFC 2033 §4.2)."""
        count = len(transaction.routes) if transaction.lmtp else 1
        self._abort()
        if count > 1:
            self._say(reply.wire * (count - 1))
        self._fault("data", reply)

    # ------------------------------------------------------------------ BDAT

    def _bdat(self, command: Command) -> None:
        limit = self.rules.message_size
        size = 0 if command.fault is not None else command.chunk_size
        if command.fault is not None:
            # How many octets follow nobody knows: there is no way on.
            if self._ends_group():
                self._refuse("data", replies.BAD_CHUNK)
            return
        if size > 2 * limit:
            self._refuse("data", replies.chunk_over_limit(limit), closes=True)
            return
        transaction = self._transaction
        refusal = self._check_chunk(transaction, size)
        self._chunk_refusal = refusal
        self._chunk_left = size
        self._chunk_last = command.last
        self._state = _CHUNK
        if refusal is not None:
            # Read over as they come: nothing is looked for in them.
            if transaction is not None:
                self._abandon_draft(transaction)
            self._receiver.begin(True)
        else:
            assert transaction is not None
            if self._chunk_sum < 0:
                self._chunk_sum = 0
                self._receiver.begin(transaction.envelope.binary)
                self._started = True
                self._events.append(MailStarted(transaction))
            self._chunk_sum += size
        if not size:
            self._end_chunk()

    def _check_chunk(self, transaction: Transaction | None, size: int) -> Reply | None:
        if transaction is None:
            return replies.NO_SENDER
        if not transaction.routes:
            return self._no_recipients()
        if max(self._chunk_sum, 0) + size > self.rules.message_size:
            return replies.over_limit(self.rules.message_size)
        return None

    def _read_chunk(self) -> bool:
        """One step of a chunk; False when more octets are needed."""
        receiver = self._receiver
        piece = receiver.chunk(self._chunk_left)
        if piece is None:
            return False
        self._chunk_left -= receiver.taken
        if piece and self._started:
            transaction = self._transaction
            assert transaction is not None
            self._events.append(MailContent(transaction.number, piece))
        if not self._chunk_left:
            self._end_chunk()
        return True

    def _end_chunk(self) -> None:
        self._state = _COMMAND
        transaction = self._transaction
        receiver = self._receiver
        refusal = self._chunk_refusal
        if refusal is not None:
            self._end_refused_chunk(transaction, refusal)
        else:
            assert transaction is not None
            if self._chunk_last:
                receiver.end()
                self._end_content(transaction)
                return
            fault = receiver.content_fault
            if fault is None:
                self._say(_CHUNK_OK)
            else:
                self._abort()
                self._spurned = True
                self._fault("data", replies.CONTENT_FAULTS[fault])
        if self._lockstep and self._state == _COMMAND:
            self._ends_group()

    def _end_refused_chunk(self, transaction: Transaction | None, refusal: Reply) -> None:
        self._chunk_refusal = None
        if transaction is None:
            self._refuse_content_command(refusal)
            return
        if not transaction.routes:
            # Recipients may still come; chunks of this mail were never begun.
            self._refuse_content_command(refusal)
            return
        if self._chunk_last:
            self._refuse_content(transaction, refusal)
        else:
            self._abort()
            self._fault("data", refusal)
        self._spurned = True


def _same_promise(one: Route, other: Route) -> bool:
    """Both may stand in one transaction: one reply can be true for both."""
    if one.acknowledge != other.acknowledge:
        return False
    return one.acknowledge == "durable" or (one.acknowledge_timeout == other.acknowledge_timeout and one.fallback == other.fallback)


_Verbs = dict[str, Callable[[ServerSession, Command], None]]

_EVERYWHERE: _Verbs = {
    "MAIL": ServerSession._mail,
    "RCPT": ServerSession._rcpt,
    "DATA": ServerSession._data,
    "BDAT": ServerSession._bdat,
    "RSET": ServerSession._rset,
    "NOOP": ServerSession._noop,
    "VRFY": ServerSession._vrfy,
    "HELP": ServerSession._help,
    "QUIT": ServerSession._quit,
    "STARTTLS": ServerSession._security,
    "AUTH": ServerSession._security,
    "XCLIENT": ServerSession._xclient,
    "XFORWARD": ServerSession._xclient,
    "PROXY": ServerSession._proxy,
    **dict.fromkeys(("EXPN", "TURN", "ETRN", "ATRN", "SEND", "SOML", "SAML"), ServerSession._not_offered),
}
_SMTP: _Verbs = {
    **_EVERYWHERE,
    "HELO": ServerSession._helo,
    "EHLO": ServerSession._ehlo,
    "LHLO": ServerSession._wrong_hello,
}
_LMTP: _Verbs = {
    **_EVERYWHERE,
    "LHLO": ServerSession._ehlo,
    "HELO": ServerSession._wrong_hello,
    "EHLO": ServerSession._wrong_hello,
}
_TURNED_AWAY: _Verbs = {"QUIT": ServerSession._quit}
