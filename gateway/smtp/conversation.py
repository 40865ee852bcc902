"""Whose turn it is: the part of a ServerSession that knows no command.

Owns what may come when (points at which a client must wait, RFC 2920 §3.1), the pauses (an
open question, answers owed, the tarpit, 256 commands a turn), the way of replies through
``order.py``, refusals, and the end of the conversation. What a command means stands in
``server.py``, which builds on this class.

Invariants: replies leave in order; nothing is judged by a count that an owed answer may still
reset: the conversation waits for that answer first; after the end nothing is taken any more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

from .._parser import Command, ReadBuffer, Receiver
from ..contracts import Judgement, Login, Question, Verdict
from ..message import Client
from ..reply import Reply
from . import proxy, replies
from .auth import RESPONSE_LIMIT
from .events import Asked, ClientAsked, Event, MailAborted, Refused, Rules, Stage, TLSWanted
from .order import BAD_LINES_AT_MOST, ERRORS_AT_MOST, ERRORS_FREE, Conduct, Order

#: Commands done in one turn of the loop; the others wait for ``proceed``.
COMMANDS_A_TURN: Final = 256
#: Seconds by which the tarpit withholds a reply.
TARPIT: Final = 1.0

_TLS_HANDSHAKE: Final = b"\x16"

#: What is read now.
GREETING: Final = 0
COMMAND: Final = 1
CONTENT: Final = 2
CHUNK: Final = 3
RESPONSE: Final = 4
CLOSED: Final = 5
HANDSHAKE: Final = 6

#: What to do for each verb.
Verbs = dict[str, Callable[[Any, Command], None]]


class Conversation(ABC):
    """Feed it with ``receive``, carry out the events it gives back in their
    order, then write ``outgoing()``.

    Read after every call:
    ``paused``: stop reading (a question is open, 16 answers are owed, a tarpit runs, or an owed
    answer decides how to go on). ``more``: octets are left that can be gone on with: call
    ``proceed()`` in the next turn of the loop. ``delay``: over 0, call ``proceed()`` after that
    many seconds; until then ``outgoing()`` gives nothing. ``closing``: write ``outgoing()``, then
    close (no answer is owed any more).

    ``verdict``, ``judged`` and ``answer`` do not go on by themselves: look at ``more`` after them, too.
    ``rules`` may be replaced between two calls (but what an EHLO offered stays offered)."""

    __slots__ = (
        "_command",
        "_conduct",
        "_ended",
        "_events",
        "_fresh",
        "_lockstep",
        "_order",
        "_question",
        "_receiver",
        "_state",
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

    def __init__(self, rules: Rules, client: Client, session: str, listener: str, verbs: Verbs) -> None:
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

        # An AUTH command carries tokens that are longer than any other command.
        receiver = Receiver(normalize=rules.bare_newlines == "normalize", auth_limit=RESPONSE_LIMIT if rules.auth != "off" else 0)
        self._receiver = receiver
        # Bound once: to find it by its name costs as much as it does where there is nothing, and a mail asks six times.
        self._command: Callable[[], Command | None] = receiver.command
        self._verbs = verbs
        self._order = Order()
        self._conduct = Conduct()
        self._events: list[Event] = []
        self._state = GREETING
        self._question: Question | Login | None = None
        self._watch = True  # the next octets must be looked at before they are taken (_may_come)
        self._fresh = True  # nothing came yet
        self._ended = False  # the client sends no more
        self._lockstep = False  # HELO was said: every reply must be waited for (RFC 2920 §3.1)

    # -------------------------------------------------- what a command means

    @abstractmethod
    def _unknown(self, command: Command) -> None:
        """A verb that is not in the table."""

    @abstractmethod
    def _read_content(self) -> bool:
        """One step of DATA; False when more octets are needed."""

    @abstractmethod
    def _read_chunk(self) -> bool:
        """One step of a chunk; False when more octets are needed."""

    @abstractmethod
    def _read_response(self) -> bool:
        """One line of an AUTH exchange; False when more octets are needed."""

    @abstractmethod
    def _settle(self, question: Question, verdict: Verdict) -> None:
        """The verdict on a question that ``_ask`` asked."""

    @abstractmethod
    def _settle_login(self, judgement: Judgement) -> None:
        """The judgement on a login that an ``AuthWanted`` told."""

    @abstractmethod
    def _abort(self) -> None:
        """The transaction, if any, comes to nothing."""

    # -------------------------------------------------------- what comes in

    def start(self, early: bool = False, proxied: bool = False) -> list[Event]:
        """The greeting, or first the question whether this client may have one. ``early``: the
        client sent octets before it; ``proxied``: those are a PROXY header, for which nobody asked."""
        if early:
            self._refuse("connect", replies.NO_PROXY if proxied else replies.TOO_EARLY)
        else:
            self._welcome()
        return self._taken()

    def _welcome(self) -> None:
        """What a client hears first."""
        rules = self.rules
        if rules.shortage is not None and rules.shortage.code == 421:
            self._refuse("connect", rules.shortage)
        elif rules.client_checks:
            self._ask(ClientAsked(Question("client", self.client, self.listener), rules.client_checks))
        else:
            self._greet()

    def receive(self, data: bytes | ReadBuffer) -> list[Event]:
        """Octets of the client. After ``paused`` only what was on its way anyway."""
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
        if not isinstance(question, Question):
            return []
        self._question = None
        self._settle(question, verdict)
        self._resume()
        return self._taken()

    def judged(self, judgement: Judgement) -> list[Event]:
        """The judgement on the one open login (or on one that the end of the session closed)."""
        if not isinstance(self._question, Login):
            return []
        self._question = None
        self._settle_login(judgement)
        self._resume()
        return self._taken()

    def answer(self, number: int, reply: Reply | Sequence[Reply] | None) -> list[Event]:
        """What becomes of a finished message: one Reply (in LMTP it stands for every recipient),
        in LMTP one per recipient in order, or None to close without a word once the earlier
        replies are out. A number that is owed nothing (any more) is no error: its client is gone.
        Raises ValueError when the count of replies is off, RuntimeError for a second answer."""
        answer = [reply] if isinstance(reply, Reply) else None if reply is None else list(reply)
        order = self._order
        place = order.settle(number, answer)
        if place is None:
            return []
        if answer is not None:
            accepted = False
            for one in answer:
                if one.code < 400:
                    accepted = True
                else:
                    self._events.append(Refused("data", one, None))
            if accepted:
                self._conduct.forgive(place.mark)
        if not order.release():
            self._forsake()
        elif self._state == CLOSED:
            self.closing = not order.owed
        elif self.paused:
            self._resume()
        return self._taken()

    def eof(self) -> list[Event]:
        """The client sends no more, or the connection is lost. Answers that are owed may still
        be given; ``closing`` says when nothing is left to say."""
        if self._state == CLOSED or self._ended:
            return []
        self._ended = True
        if not (self.paused or self.more) or (self._state == HANDSHAKE and not self._order.owed):
            self._close()
        return self._taken()

    def stop(self, reply: Reply) -> list[Event]:
        """Time-out, drain: say ``reply`` (421) as soon as what is owed is out, then close."""
        if self._state == CLOSED:
            return []
        stage: Stage = "connect" if self._state == GREETING else "data" if self._state in (CONTENT, CHUNK) else "command"
        self._refuse(stage, reply, closes=True)
        return self._taken()

    # ------------------------------------------------------- what goes out

    def outgoing(self) -> bytes:
        """What may be written now, in order; ``b""`` if nothing."""
        return b"" if self.delay else self._order.take()

    @property
    def awaiting(self) -> Literal["greeting", "login", "command", "content", "answer", "handshake"]:
        """What the next step needs: our greeting or our word on a login (nobody may talk until
        then), the client's command or content, our answer, or TLS."""
        state = self._state
        if state == GREETING:
            return "greeting"
        if state == HANDSHAKE:
            return "answer" if self._order.owed else "handshake"
        if isinstance(self._question, Login):
            return "login"
        if self._question is not None or self.delay:
            return "answer"
        if state == CHUNK:
            return "content"
        if state == CONTENT:
            # While 354 waits behind an owed answer, the client waits too.
            return "answer" if self._watch and self._order.owed else "content"
        return "answer" if self._order.owed else "command"

    # ------------------------------------------------------------- the turn

    def _run(self) -> list[Event]:
        receiver = self._receiver
        verbs = self._verbs
        left = COMMANDS_A_TURN
        self.more = False
        while not self.paused:
            state = self._state
            if state == COMMAND:
                if not left:
                    self.more = receiver.pending > 0
                    break
                command = self._command()
                if command is None:
                    break
                left -= 1
                verb = command.verb
                # After HELO every reply ends a group; the octets of BDAT are part of it.
                if self._lockstep and verb != "BDAT" and not self._ends_group():
                    break
                do = verbs.get(verb)
                if do is not None:
                    do(self, command)
                elif (fault := command.fault) is not None and fault in replies.LINE_FAULTS:
                    self._malformed(fault)  # such a line has no verb
                else:
                    self._unknown(command)
                if self._watch:
                    # Nothing is left: the client must wait for our reply.
                    break
            elif state == CONTENT:
                if not self._read_content():
                    break
            elif state == CHUNK:
                if not self._read_chunk():
                    break
            elif state == RESPONSE:
                if not self._read_response():
                    break
            else:
                break
        order = self._order
        if order.owed and order.full:
            self.paused = True
        if self._ended and not (self.paused or self.more):
            self._close()
        return self._taken()

    def _taken(self) -> list[Event]:
        events = self._events
        self._events = []
        return events

    def _may_come(self, data: bytes | ReadBuffer) -> bool:
        """At points where the client must wait for us (RFC 2920 §3.1): was the wait over?"""
        if self._state == CLOSED:
            return False
        if self._state == GREETING:
            self._refuse("connect", replies.NO_PROXY if proxy.begins(_head(data)) else replies.TOO_EARLY)
            return False
        if self._order.owed or self._question is not None or self.delay or self._state == HANDSHAKE:
            self._refuse("command", replies.TOO_EARLY)
            return False
        if self._fresh:
            self._fresh = False
            if _head(data)[:1] == _TLS_HANDSHAKE:
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
        order = self._order
        self.paused = self._question is not None or self.delay > 0 or order.full or (bool(order.owed) and self._conduct.at_the_brink)

    def _resume(self) -> None:
        """Something that was waited for is here."""
        if self._state == CLOSED:
            return
        if self._state == HANDSHAKE:
            self._want_tls()
            return
        self._weigh()
        if self.paused:
            return
        self.more = self._receiver.pending > 0
        if self._ended and not self.more:
            self._close()

    def _want_tls(self) -> None:
        """The client may have TLS as soon as no answer is owed that must leave in clear."""
        self.paused = True
        if self._order.owed:
            return
        if self._ended:
            self._close()
        else:
            self._events.append(TLSWanted())

    # ------------------------------------------------ refusals and the end

    def _refuse(self, stage: Stage, reply: Reply, address: str | None = None, closes: bool = False) -> None:
        self._tell_off(Refused(stage, reply, address), closes)

    def _tell_off(self, refused: Refused, closes: bool = False) -> None:
        reply = refused.reply
        self._tell(refused)
        if closes or reply.code == 421 or reply in replies.CLOSING:
            self._close()

    def _tell(self, refused: Refused) -> None:
        self._events.append(refused)
        self._order.say(refused.reply.wire)

    def _fault(self, stage: Stage, reply: Reply, address: str | None = None) -> None:
        """Refuse, and count it where it is permanent: too many end the session."""
        if reply.permanent and not self._bear_error():
            reply = replies.TOO_MANY_ERRORS
        self._refuse(stage, reply, address)

    def _bear_error(self) -> bool:
        """Count an error; False if it was one too many."""
        count = self._conduct.error()
        if count >= ERRORS_AT_MOST:
            return False
        if count > ERRORS_FREE:
            self.delay = TARPIT
            self.paused = True
        elif self._order.owed and self._conduct.at_the_brink:
            self.paused = True
        return True

    def _bear_junk(self) -> bool:
        """Count a junk command; False if it was one too many."""
        if self._conduct.junk():
            return self._bear_error()
        if self._order.owed and self._conduct.at_the_brink:
            self.paused = True
        return True

    def _junk(self, wire: bytes) -> None:
        if self._bear_junk():
            self._order.say(wire)
        else:
            self._refuse("command", replies.TOO_MANY_ERRORS)

    def _malformed(self, fault: str) -> None:
        reply = replies.LINE_FAULTS[fault]
        if fault == "newline":
            self._conduct.bad_lines += 1
            if self._conduct.bad_lines >= BAD_LINES_AT_MOST:
                reply = replies.TOO_MANY_BAD_LINES
        self._fault("command", reply)

    def _forsake(self) -> None:
        """Nobody knows the truth about a message: nothing may be said after it."""
        for number in self._order.forsake():
            self._events.append(MailAborted(number))
        self._close()

    def _close(self) -> None:
        """Take nothing more; ``closing`` follows the last owed answer."""
        self._abort()
        self._state = CLOSED
        self._receiver.discard()
        self._question = None
        self._watch = True
        self.delay = 0.0
        self.more = False
        self.paused = False
        self.closing = not self._order.owed

    # ----------------------------------------------------------- the greeting

    def _greet(self) -> None:
        self._state = COMMAND
        self._order.say(replies.greeting(self.rules.hostname, self.rules.protocol == "lmtp").wire)

    def _turn_away(self, reply: Reply, verbs: Verbs) -> None:
        """Instead of the greeting; unless it is a 421, the client may still say ``verbs``."""
        self._state = COMMAND
        self._verbs = verbs
        self._refuse("connect", reply)

    def _ask(self, asked: Asked) -> None:
        self._question = asked.question
        self.paused = True
        self._events.append(asked)


def _head(data: bytes | ReadBuffer) -> bytes:
    return data if isinstance(data, bytes) else data.head()
