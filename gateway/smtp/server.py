"""The server's side of one SMTP conversation, as a value: bytes in, events and bytes out.

Owns the order of commands and the transaction: here a command is carried out. What is decided
about it stands in ``judge.py`` (values of parameters in ``esmtp.py``), the wording in
``replies.py``, the order of replies and the count of offences in ``order.py``. Knows no socket,
clock, task or file, and keeps no content: pieces go out as the parser hands them over.

Invariants: one reply per command, in order; nothing is said before the true end of content;
between two points at which a client must wait, the outcome does not depend on how the bytes
were cut. Nothing is judged by a count that an owed answer may still reset: the session waits
for that answer first.

RFC 5321, 2033 (LMTP), 2920 (PIPELINING), 3030 (CHUNKING, BINARYMIME), 1870 (SIZE),
3207 (STARTTLS), 6152 (8BITMIME), 6531 (SMTPUTF8), 2034 (ENHANCEDSTATUSCODES), 3461 (DSN), 9422 (LIMITS), 8689 (REQUIRETLS),
4954 (AUTH; the mechanisms stand in ``auth.py``), 4865, 2852 and 6710 (``extensions.py``). XCLIENT and XFORWARD: Postfix.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from .._parser import Command
from ..contracts import Judgement, Login, Question, Transaction, Verdict
from ..message import TLS, Client, Envelope
from ..reply import Reply
from ..route import Route
from . import auth, extensions, judge, replies, xclient
from .conversation import CHUNK, COMMAND, CONTENT, HANDSHAKE, RESPONSE, Conversation, Verbs
from .esmtp import may_log_in, offered
from .events import (
    Asked,
    AuthWanted,
    ClientAsked,
    ClientNamed,
    Event,
    LoggedIn,
    LoginRefused,
    MailAborted,
    MailContent,
    MailFinished,
    MailStarted,
    RecipientAsked,
    Refused,
    Rules,
    SenderAsked,
    Stage,
    TLSWanted,
)

__all__ = [
    "Asked",
    "AuthWanted",
    "ClientAsked",
    "ClientNamed",
    "Event",
    "LoggedIn",
    "LoginRefused",
    "MailAborted",
    "MailContent",
    "MailFinished",
    "MailStarted",
    "RecipientAsked",
    "Refused",
    "Rules",
    "SenderAsked",
    "ServerSession",
    "Stage",
    "TLSWanted",
]

_HTTP: Final = frozenset({"GET", "POST", "CONNECT", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "PRI"})

#: Failed logins with which a session ends.
LOGINS_AT_MOST: Final = 3

_OK: Final = replies.OK.wire
_SENDER_OK: Final = replies.SENDER_OK.wire
_RECIPIENT_OK: Final = replies.RECIPIENT_OK.wire
_CHUNK_OK: Final = replies.CHUNK_OK.wire
_START_CONTENT: Final = replies.START_CONTENT.wire


class ServerSession(Conversation):
    """One conversation from the greeting to the end; how to drive it says ``Conversation``."""

    __slots__ = (
        "_begun",
        "_chunk_last",
        "_chunk_left",
        "_chunk_refusal",
        "_chunk_total",
        "_exchange",
        "_facts",
        "_failures",
        "_forwarded",
        "_greeted",
        "_implied",
        "_number",
        "_route",
        "_spoken_for",
        "_spurned",
        "_transaction",
        "_trusted",
    )

    def __init__(self, rules: Rules, client: Client, session: str, listener: str, trusted: bool = False) -> None:
        """``trusted``: whoever is connected may speak for others (XCLIENT, XFORWARD)."""
        super().__init__(rules, client, session, listener, _verbs(rules, client))
        self._facts: dict[str, Any] | None = None  # of the client checks
        self._trusted = trusted
        self._forwarded: xclient.Attributes | None = None  # XFORWARD, for the next transaction
        self._greeted = False  # HELO, EHLO or LHLO was said
        self._exchange: auth.Mechanism | None = None  # of the AUTH that is under way
        self._failures = 0  # logins that failed
        self._implied = False  # the client is who its certificate stands for, without having logged in
        self._spoken_for = False  # XCLIENT was said: the certificate is not the client's
        self._number = 0
        self._transaction: Transaction | None = None
        self._begun = False  # MailStarted was said, and neither its end nor its abort
        self._spurned = False  # what comes may only follow from a refusal of ours
        self._route: Route | None = None  # of the recipient in question

        self._chunk_left = 0
        self._chunk_last = False
        self._chunk_total = -1  # octets that BDAT announced in this transaction, -1: no chunk was taken
        self._chunk_refusal: Reply | None = None

    # ------------------------------------------------------------- verdicts

    def _settle(self, question: Question, verdict: Verdict) -> None:
        if question.stage == "client":
            self._settle_client(verdict)
        elif question.stage == "sender":
            self._settle_sender(question, verdict)
        else:
            self._settle_recipient(question, verdict)

    def _settle_client(self, verdict: Verdict) -> None:
        if isinstance(verdict.facts, dict):
            self._facts = verdict.facts
        if verdict.reply is None:
            self._greet()
        else:
            self._turn_away(verdict.reply, _TURNED_AWAY)

    def _settle_sender(self, question: Question, verdict: Verdict) -> None:
        transaction = self._transaction
        assert transaction is not None  # its MAIL asked, and nothing ran since
        if verdict.reply is not None:
            self._transaction = None
            self._spurned = True
            self._fault("mail", verdict.reply, question.sender)
            return
        if isinstance(verdict.facts, dict):
            transaction.facts.setdefault("checks", {}).update(verdict.facts)
        self._spurned = False
        self._order.say(_sender_ok(transaction))

    def _settle_recipient(self, question: Question, verdict: Verdict) -> None:
        transaction, route, recipient = self._transaction, self._route, question.recipient
        self._route = None
        assert transaction is not None  # its RCPT asked, and nothing ran since
        assert route is not None
        assert recipient is not None
        if isinstance(verdict.facts, dict) and verdict.facts:
            # One fact for each recipient that was asked about.
            checks = transaction.facts.setdefault("checks", {})
            for name, facts in verdict.facts.items():
                known = checks.get(name)
                checks[name] = {**(known if isinstance(known, dict) else {}), recipient.address: facts}
        if verdict.reply is not None:
            self._spurned = True
            self._refuse("recipient", verdict.reply, recipient.address)
            return
        transaction.envelope.recipients.append(recipient)
        transaction.routes.append(route)
        self._order.say(_RECIPIENT_OK)

    # ------------------------------------------------------------------- TLS

    def secure(self, early: bool = False) -> list[Event]:
        """The answer to TLSWanted. When this is written, the next octets of the client are its
        handshake, and ``secured`` follows; none of them is given to ``receive``. ``early``: octets
        are there before our 220, so they cannot be (row T1)."""
        if self._state == HANDSHAKE:
            if early:
                self._refuse("command", replies.TOO_EARLY)
            else:
                self._order.say(replies.TLS_READY.wire)
        return self._taken()

    def secured(self, tls: TLS) -> None:
        """The handshake is over, after ``secure`` or, with implicit TLS, before ``start``. Whatever
        the client said in clear is forgotten (RFC 3207 §4.2); its offences still count."""
        self.client = replace(self.client, helo="", protocol="SMTP", user=None, tls=tls)
        user = self._certified()
        self._implied = user is not None and self.rules.certificate_identity == "implied"
        if user is not None and self._implied:
            self.client = replace(self.client, user=user)
            self._events.append(LoggedIn("certificate", user))
        if self._state != HANDSHAKE:
            return
        self._receiver.discard()
        self._verbs = _verbs(self.rules, self.client)
        self._greeted = self._lockstep = self._spurned = False
        self._exchange = self._forwarded = None
        self._state = COMMAND
        self._weigh()

    def _starttls(self, command: Command) -> None:
        if not self._ends_group():
            return
        refusal = judge.starttls(self.rules, self.client, self._transaction, command)
        if refusal is not None:
            self._fault("command", refusal)
            return
        self._state = HANDSHAKE
        self._want_tls()

    def _tls_first(self, command: Command) -> None:
        """In clear where TLS is demanded."""
        verb = command.verb
        if verb in ("DATA", "AUTH", "HELO") and not self._ends_group():
            return
        if verb == "MAIL":
            # What comes pipelined behind it are no errors of their own.
            self._spurned = True
            self._fault("mail", replies.TLS_NEEDED, command.address)
        elif verb == "RCPT" and self._spurned:
            self._refuse("recipient", replies.TLS_NEEDED, command.address)
        elif verb == "DATA":
            self._refuse_contentless(replies.TLS_NEEDED)
        else:
            self._fault("command", replies.TLS_NEEDED)

    # ------------------------------------------- commands outside the mail

    def _unknown(self, command: Command) -> None:
        verb = command.verb
        if self._verbs is _TURNED_AWAY:
            self._fault("command", replies.TURNED_AWAY)
        elif verb in _HTTP or ":" in verb:
            # Another protocol, or the header of a mail: whatever follows is no command either.
            self._refuse("command", replies.NOT_SMTP)
        else:
            self._fault("command", replies.UNKNOWN)

    def _helo(self, command: Command) -> None:
        self._hello(command, esmtp=False)

    def _ehlo(self, command: Command) -> None:
        self._hello(command, esmtp=True)

    def _hello(self, command: Command, esmtp: bool) -> None:
        if not self._ends_group():
            return
        refusal = judge.hello(command)
        if refusal is not None:
            self._fault("command", refusal)
            return
        self._reset()
        self._greeted = True
        self._lockstep = not esmtp
        self.client = replace(self.client, helo=command.argument, protocol=self._protocol(utf8=False))
        rules = self.rules
        if esmtp:
            client = self.client
            speaker = self._trusted and (client.tls is not None or rules.tls != "required")
            keywords = offered(rules, client)
            self._order.say(replies.offer(rules.hostname, rules.message_size, rules.recipients, keywords, speaker, self._mechanisms()))
        else:
            self._order.say(replies.greeted(rules.hostname).wire)

    def _wrong_hello(self, command: Command) -> None:
        if self._ends_group():
            self._fault("command", replies.LMTP_ONLY if self.rules.protocol == "lmtp" else replies.SMTP_ONLY)

    def _protocol(self, utf8: bool) -> str:
        """The ``with`` keyword of Received (RFC 3848, RFC 6531 §4.3); an A says that AUTH was used."""
        if self._lockstep:
            return "SMTP"
        kind = "LMTP" if self.rules.protocol == "lmtp" else "SMTP"
        name = f"UTF8{kind}" if utf8 else "LMTP" if kind == "LMTP" else "ESMTP"
        client = self.client
        return f"{name}{'S' if client.tls is not None else ''}{'A' if client.user is not None and not self._implied else ''}"

    def _noop(self, command: Command) -> None:
        self._junk(_OK)

    def _rset(self, command: Command) -> None:
        if command.fault is not None:
            self._fault("command", replies.NO_ARGUMENT)
            return
        self._reset()
        self._junk(_OK)

    def _vrfy(self, command: Command) -> None:
        # The same for everybody: no route is consulted, so nothing can be found out.
        if command.fault is None:
            self._junk(replies.VRFY.wire)
        else:
            self._fault("command", replies.ARGUMENT_NEEDED)

    def _help(self, command: Command) -> None:
        self._junk(replies.HELP.wire)

    def _quit(self, command: Command) -> None:
        if command.fault is not None:
            self._fault("command", replies.NO_ARGUMENT)
            return
        self._order.say(replies.QUIT.wire)
        self._close()

    def _not_offered(self, command: Command) -> None:
        self._fault("command", replies.NOT_OFFERED)

    def _may_speak_for_others(self) -> bool:
        if self._transaction is None and self._trusted:
            return True
        self._fault("command", replies.NO_XCLIENT if self._transaction is None else replies.IN_TRANSACTION)
        return False

    def _xclient(self, command: Command) -> None:
        if not self._may_speak_for_others():
            return
        told = xclient.named(command.argument)
        if isinstance(told, Reply):
            self._fault("command", told)
            return
        # Another client, another conversation. What was said with it stays (XCLIENT_README).
        self._reset()
        self._facts = None
        self.client = xclient.changed(self.client, told)
        self._spoken_for = True
        self._implied = False
        self._greeted = bool(self.client.helo)
        self._lockstep = False
        self._events.append(ClientNamed(self.client, told.get("NAME") or ""))
        self._welcome()

    def _xforward(self, command: Command) -> None:
        if not self._may_speak_for_others():
            return
        told = xclient.forwarded(command.argument)
        if isinstance(told, Reply):
            self._fault("command", told)
            return
        self._forwarded = {**(self._forwarded or {}), **told}
        self._order.say(_OK)

    def _proxy(self, command: Command) -> None:
        self._refuse("command", replies.NO_PROXY)

    # ------------------------------------------------------------------ AUTH

    def _mechanisms(self) -> tuple[str, ...]:
        """Those that this client may use now."""
        if not may_log_in(self.rules, self.client):
            return ()
        return auth.offered(self.rules.mechanisms, self._end_point(), self._certified())

    def _certified(self) -> str | None:
        """The user for whom the client's certificate stands."""
        tls = self.client.tls
        return None if tls is None or self._spoken_for else judge.certified(self.rules, tls)

    def _end_point(self) -> bytes | None:
        tls = self.client.tls
        return None if tls is None else tls.end_point

    def _auth(self, command: Command) -> None:
        if not self._ends_group():
            return
        # Who is somebody by a certificate alone may still log in, as anybody.
        client = replace(self.client, user=None) if self._implied else self.client
        refusal = judge.auth(self.rules, client, self._greeted and not self._lockstep, self._transaction, command)
        if refusal is not None:
            self._fault("auth" if self.rules.auth != "off" else "command", refusal)
            return
        name, blank, initial = command.argument.partition(" ")
        self._exchange = auth.mechanism(name, self.rules.mechanisms, self._end_point(), self._certified())
        if self._exchange is None:
            self._fault("auth", replies.AUTH_MECHANISM)
        elif blank:
            # "=" is an initial response of no octets (RFC 4954 §4).
            self._respond(b"" if initial == "=" else auth.decoded(initial.encode()))
        else:
            self._step(self._exchange.respond(None))

    def _read_response(self) -> bool:
        receiver = self._receiver
        line = receiver.line(auth.RESPONSE_LIMIT + 2)
        if line is None:
            return False
        fault = receiver.line_fault
        if fault in ("newline", "flood"):
            # A bare LF ended this line: what stands behind it is the next command, however it was cut.
            self._state = COMMAND
            self._malformed(fault)
        elif self._ends_group():
            self._state = COMMAND
            if fault is not None:
                self._fault("auth", replies.AUTH_TOO_LONG)
            elif self._exchange is not None and self._exchange.refusal is not None:
                # What a mechanism wants said before a refusal changes nothing in it.
                self._refuse_login(self._exchange.refusal, self._exchange.note)
            elif line == b"*":
                self._fault("auth", replies.AUTH_CANCELLED)
            else:
                self._respond(auth.decoded(line))
        return True

    def _respond(self, response: bytes | None) -> None:
        """None: it was no base64."""
        assert self._exchange is not None  # AUTH began it
        if response is None:
            self._fault("auth", replies.AUTH_BASE64)
        else:
            self._step(self._exchange.respond(response))

    def _step(self, step: auth.Step) -> None:
        exchange = self._exchange
        assert exchange is not None  # the step is its own
        if isinstance(step, bytes):
            self._state = RESPONSE
            self._order.say(replies.challenge(step))
        elif isinstance(step, Login):
            self._question = step
            self.paused = True
            self._events.append(AuthWanted(step))
        elif isinstance(step, Reply):
            if step.code == auth.REFUSED.code:
                self._refuse_login(step, "")
            else:
                self._fault("auth", step)
        else:
            self._implied = False
            client = replace(self.client, user=step.identity)
            self.client = client
            self.client = replace(client, protocol=self._protocol(utf8=False))
            self._failures = 0
            self._events.append(LoggedIn(exchange.name, step.identity))
            self._order.say(replies.LOGGED_IN.wire)

    def _settle_login(self, judgement: Judgement) -> None:
        exchange = self._exchange
        assert exchange is not None  # its login was asked about
        step = exchange.judged(judgement)
        if isinstance(step, Reply):
            self._refuse_login(step, judgement.note)
        else:
            self._step(step)

    def _refuse_login(self, reply: Reply, note: str) -> None:
        exchange = self._exchange
        assert exchange is not None  # it claimed what is refused
        self._failures += 1
        if self._failures >= LOGINS_AT_MOST:
            reply = replies.TOO_MANY_LOGINS
        elif reply.permanent and not self._bear_error():
            reply = replies.TOO_MANY_ERRORS
        self._tell_off(LoginRefused("auth", reply, None, exchange.name, exchange.user, note))

    # -------------------------------------------------------------- envelope

    def _reset(self) -> None:
        self._abort()
        self._spurned = False
        self._forwarded = None

    def _abort(self) -> None:
        """The transaction, if any, comes to nothing."""
        transaction = self._transaction
        if transaction is not None:
            self._abandon(transaction)
            self._transaction = None
        self._chunk_total = -1

    def _abandon(self, transaction: Transaction) -> None:
        """No content will be handed out any more, but the transaction still wants its reply."""
        if self._begun:
            self._begun = False
            self._events.append(MailAborted(transaction.number))

    def _mail(self, command: Command) -> None:
        rules = self.rules
        client = self.client
        params = command.params
        refusal = judge.mail(rules, client, self._greeted, self._transaction, command, params)
        if refusal is not None:
            if self._transaction is None:
                # The RCPT and DATA that come pipelined behind it are no errors of their own.
                self._spurned = True
            self._fault("mail", refusal, command.address)
            return
        address = command.address or ""
        if params and "SMTPUTF8" in params:
            client = replace(client, protocol=self._protocol(utf8=True))
        self._number = number = self._number + 1
        transaction = Transaction(number, self.session, self.listener, client, Envelope(address, params, []))
        transaction.lmtp = rules.protocol == "lmtp"
        transaction.submission = rules.protocol == "submission"
        if params and "MT-PRIORITY" in params:
            transaction.priority = rules.extensions.priority(params, client)
        if self._facts:
            transaction.facts["checks"] = dict(self._facts)
        if self._forwarded is not None:
            transaction.facts["forwarded"] = {name.lower(): value for name, value in self._forwarded.items() if value is not None}
            self._forwarded = None
        self._transaction = transaction
        if rules.sender_checks:
            self._ask(SenderAsked(Question("sender", client, self.listener, sender=address), rules.sender_checks))
        else:
            self._spurned = False
            self._order.say(_sender_ok(transaction))

    def _rcpt(self, command: Command) -> None:
        transaction = self._transaction
        rules = self.rules
        address, local, domain, params, ascii = command.path()
        refusal = judge.rcpt(rules, transaction, self._chunk_total >= 0, command.fault, params)
        if refusal is not None:
            if transaction is None and self._spurned:
                self._refuse("recipient", refusal, address)
            else:
                self._fault("recipient", refusal, address)
            return
        assert transaction is not None  # or rcpt() had refused
        route = judge.recipient(rules, transaction, ascii, address or "", local, domain)
        if isinstance(route, Reply):
            # Not an error of the client's: lists have dead addresses.
            self._spurned = True
            self._refuse("recipient", route, address)
            return
        recipient = judge.named(rules, address or "", local, domain, params)
        if route.checks and rules.recipient_checks:
            names = tuple(name for name in route.checks if name in rules.recipient_checks)
            if names:
                sender = transaction.envelope.mail_from
                self._route = route
                self._ask(RecipientAsked(Question("recipient", transaction.client, self.listener, sender, recipient), names))
                return
        transaction.envelope.recipients.append(recipient)
        transaction.routes.append(route)
        self._order.say(_RECIPIENT_OK)

    # ------------------------------------------------------------------ DATA

    def _data(self, command: Command) -> None:
        if not self._ends_group():
            return
        transaction = self._transaction
        refusal = judge.data(self.rules, transaction, self._chunk_total >= 0, command)
        if refusal is not None:
            self._refuse_contentless(refusal)
            return
        assert transaction is not None  # or data() had refused
        self._receiver.begin(False)
        self._begun = True
        self._state = CONTENT
        self._events.append(MailStarted(transaction))
        self._order.say(_START_CONTENT)

    def _refuse_contentless(self, reply: Reply) -> None:
        """DATA or a chunk that cannot be; junk where it may only follow from a refusal of ours."""
        if not self._spurned:
            self._fault("data", reply)
        elif self._bear_junk():
            self._refuse("data", reply)
        else:
            self._refuse("data", replies.TOO_MANY_ERRORS)

    def _read_content(self) -> bool:
        """One step of DATA; False when more octets are needed."""
        receiver = self._receiver
        transaction = self._transaction
        assert transaction is not None  # DATA was accepted
        piece = receiver.content()
        if self._begun:
            if piece:
                if receiver.size > self.rules.message_size:
                    self._abandon(transaction)
                else:
                    self._events.append(MailContent(transaction.number, piece))
            elif receiver.content_fault is not None:
                self._abandon(transaction)
        if not receiver.finished:
            return piece is not None
        self._end_content(transaction)
        return True

    def _end_content(self, transaction: Transaction) -> None:
        """The true end of the content was read, by DATA or by the last chunk."""
        self._state = COMMAND
        fault, size, longest, eight_bit, header_size, _header_fields, hops = self._receiver.facts()
        refusal = judge.content(self.rules, fault, size, longest, hops)
        if refusal is not None:
            self._refuse_content(transaction, refusal)
        else:
            transaction.size = size
            transaction.eight_bit = eight_bit
            transaction.header_size = header_size
            transaction.hops = hops
            self._transaction = None
            self._begun = False
            self._chunk_total = -1
            self._events.append(MailFinished(transaction.number))
            self._order.owe(transaction.number, len(transaction.routes) if transaction.lmtp else 1, self._conduct.mark)
            if self._order.full or self._conduct.at_the_brink:
                self.paused = True
        if self._lockstep and self._state == COMMAND:
            self._ends_group()

    def _refuse_content(self, transaction: Transaction, reply: Reply) -> None:
        """The one reply to the whole content; in LMTP one per accepted recipient (RFC 2033 §4.2)."""
        self._abort()
        for _ in range(len(transaction.routes) - 1 if transaction.lmtp else 0):
            # Only the last one may end the session.
            self._tell(Refused("data", reply, None))
        self._fault("data", reply)

    # ------------------------------------------------------------------ BDAT

    def _bdat(self, command: Command) -> None:
        if command.fault is not None:
            # How many octets follow nobody knows: there is no way on.
            if self._ends_group():
                self._refuse("data", replies.BAD_CHUNK)
            return
        size = command.chunk_size
        limit = self.rules.message_size
        if size > 2 * limit:
            self._refuse("data", replies.chunk_over_limit(limit), closes=True)
            return
        transaction = self._transaction
        refusal = judge.chunk(self.rules, self.client, transaction, max(self._chunk_total, 0) + size)
        self._chunk_refusal = refusal
        self._chunk_left = size
        self._chunk_last = command.last
        self._state = CHUNK
        if refusal is None:
            assert transaction is not None  # or chunk() had refused
            self._begin_chunk(transaction, size)
        else:
            if transaction is not None:
                self._abandon(transaction)
            # Read over as it comes: nothing is looked for in it.
            self._receiver.begin(True)
        if not size:
            self._end_chunk()

    def _begin_chunk(self, transaction: Transaction, size: int) -> None:
        if self._chunk_total < 0:
            self._chunk_total = 0
            self._receiver.begin(transaction.envelope.binary)
            self._begun = True
            self._events.append(MailStarted(transaction))
        self._chunk_total += size

    def _read_chunk(self) -> bool:
        """One step of a chunk; False when more octets are needed."""
        receiver = self._receiver
        piece = receiver.chunk(self._chunk_left)
        if piece is None:
            return False
        self._chunk_left -= receiver.taken
        if piece and self._begun:
            transaction = self._transaction
            assert transaction is not None  # a draft was begun for it
            self._events.append(MailContent(transaction.number, piece))
        if not self._chunk_left:
            self._end_chunk()
        return True

    def _end_chunk(self) -> None:
        self._state = COMMAND
        transaction = self._transaction
        refusal = self._chunk_refusal
        receiver = self._receiver
        if refusal is not None:
            self._chunk_refusal = None
            self._refuse_chunk(transaction, refusal)
        elif self._chunk_last:
            assert transaction is not None  # the chunk was not refused
            receiver.end()
            self._end_content(transaction)
            return
        elif receiver.content_fault is None:
            self._order.say(_CHUNK_OK)
        else:
            self._abort()
            self._spurned = True
            self._fault("data", judge.content_fault(self.rules, receiver.content_fault))
        if self._lockstep and self._state == COMMAND:
            self._ends_group()

    def _refuse_chunk(self, transaction: Transaction | None, reply: Reply) -> None:
        """A chunk was read over; of a mail that had a chance it was the end."""
        if transaction is None or not transaction.routes:
            self._refuse_contentless(reply)
            return
        self._spurned = True
        if self._chunk_last:
            self._refuse_content(transaction, reply)
        else:
            self._abort()
            self._fault("data", reply)


_EVERYWHERE: Final[Verbs] = {
    "MAIL": ServerSession._mail,
    "RCPT": ServerSession._rcpt,
    "DATA": ServerSession._data,
    "BDAT": ServerSession._bdat,
    "RSET": ServerSession._rset,
    "NOOP": ServerSession._noop,
    "VRFY": ServerSession._vrfy,
    "HELP": ServerSession._help,
    "QUIT": ServerSession._quit,
    "STARTTLS": ServerSession._starttls,
    "AUTH": ServerSession._auth,
    "XCLIENT": ServerSession._xclient,
    "XFORWARD": ServerSession._xforward,
    "PROXY": ServerSession._proxy,
    **dict.fromkeys(("EXPN", "TURN", "ETRN", "ATRN", "SEND", "SOML", "SAML"), ServerSession._not_offered),
}
_SMTP: Final[Verbs] = {
    **_EVERYWHERE,
    "HELO": ServerSession._helo,
    "EHLO": ServerSession._ehlo,
    "LHLO": ServerSession._wrong_hello,
}
_LMTP: Final[Verbs] = {
    **_EVERYWHERE,
    "LHLO": ServerSession._ehlo,
    "HELO": ServerSession._wrong_hello,
    "EHLO": ServerSession._wrong_hello,
}
#: In clear where TLS is demanded: all but these is refused (RFC 3207 §4). What follows BDAT is read
#: over all the same, and a proxy or another protocol is told what it always is.
_WELCOME_IN_CLEAR: Final = ("EHLO", "LHLO", "NOOP", "QUIT", "STARTTLS", "BDAT", "PROXY")
_SMTP_BEFORE_TLS: Final[Verbs] = {verb: do if verb in _WELCOME_IN_CLEAR else ServerSession._tls_first for verb, do in _SMTP.items()}
_LMTP_BEFORE_TLS: Final[Verbs] = {verb: do if verb in _WELCOME_IN_CLEAR else ServerSession._tls_first for verb, do in _LMTP.items()}


def _sender_ok(transaction: Transaction) -> bytes:
    params = transaction.envelope.mail_params
    if params and extensions.priority_changed(params, transaction.priority):
        return replies.priority_changed(transaction.priority).wire
    return _SENDER_OK


def _verbs(rules: Rules, client: Client) -> Verbs:
    if rules.tls == "required" and client.tls is None:
        return _LMTP_BEFORE_TLS if rules.protocol == "lmtp" else _SMTP_BEFORE_TLS
    return _LMTP if rules.protocol == "lmtp" else _SMTP


#: A client that was refused at the door.
_TURNED_AWAY: Final[Verbs] = {"QUIT": ServerSession._quit}
