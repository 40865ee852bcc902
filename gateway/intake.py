"""One message, from the end of MAIL to the reply: content, checks, first try, commit, answer.

Owns promise 1: the 250 after the end of data leaves here and nowhere else, and only when
every (recipient, sink) pair was taken or a synced row names those that were not (DESIGN §4,
the decision table; each line of it is a test in tests/unit/test_intake.py). Knows neither
sockets nor SQL.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

from mypy_extensions import mypyc_attr

from .contracts import (
    DELIVERED,
    Answer,
    Check,
    ContentFile,
    Observer,
    Outcome,
    Pending,
    Question,
    Row,
    Spool,
    SpoolError,
    Transaction,
    Verdict,
    no_room,
)
from .message import INLINE_LIMIT, Content, Message
from .queue import Queue
from .reply import Reply
from .smtp import extensions
from .smtp.submission import header_of, supplied
from .smtp.trace import mark, received

#: Times a message may have passed this very gateway before it is a loop (RFC 5321 §6.3).
OWN_PASSES: Final = 5
#: Ids for which chance is drawn at once: one system call for many.
IDS_A_DRAW: Final = 256
# What an octet becomes that begins with RFC 9562's version, or its variant.
_VERSION = bytes(octet & 0x0F | 0x70 for octet in range(256))
_VARIANT = bytes(octet & 0x3F | 0x80 for octet in range(256))
#: Octets of one draft that go to its file at a time while all drafts together are over their budget.
SPILL: Final = 16 * 1024
#: Octets that may wait for the disk before the connection stops reading.
DISK_BACKLOG: Final = 2 * 1024 * 1024

#: The recipients of a sink that carries for the one there is.
ONLY_ONE: Final = (0,)
#: Nobody has an answer of his own.
NOBODY: Final[Mapping[int, Reply]] = {}

LOOP: Final = Reply(554, "5.4.6", "routing loop: this message has passed here before")
NOT_STORED: Final = Reply(451, "4.3.0", "not stored, try again later")
NO_SPACE: Final = Reply(452, "4.3.1", "no space to store the message, try again later")
NO_VERDICT: Final = Reply(451, "4.4.7", "no answer from the next hop in time, try again later")
CHECK_FAILED: Final = Reply(451, "4.7.1", "a check could not be made, try again later")


class _Ids:
    """What ``new_id`` keeps: the millisecond it last wrote, and chance that was drawn and not used."""

    def __init__(self) -> None:
        self._millisecond = -1
        self._beginning = ""
        self._middles = ""
        self._ends = ""
        self._used = IDS_A_DRAW

    def next(self, now: float) -> str:
        if self._used == IDS_A_DRAW:
            self._draw()
        millisecond = int(now * 1000)
        if millisecond != self._millisecond:
            self._millisecond = millisecond
            when = f"{millisecond:012x}"
            self._beginning = f"{when[:8]}-{when[8:]}-"
        used = self._used
        self._used = used + 1
        return f"{self._beginning}{self._middles[10 * used : 10 * used + 10]}{self._ends[12 * used : 12 * used + 12]}"

    def _draw(self) -> None:
        """All at once what is the same for all: dashes, version and variant."""
        middles = bytearray(os.urandom(4 * IDS_A_DRAW))
        middles[::4] = middles[::4].translate(_VERSION)
        middles[2::4] = middles[2::4].translate(_VARIANT)
        self._middles = middles.hex("-", 2) + "-"
        self._ends = os.urandom(6 * IDS_A_DRAW).hex()
        self._used = 0


_IDS: Final = _Ids()


def new_id(now: float) -> str:
    """A UUIDv7 (RFC 9562 §5.7) for Unix time ``now``: sortable by time, 74 random bits."""
    return _IDS.next(now)


class MailIntake:
    """Implements ``contracts.Intake``. ``expire`` in seconds; ``memory``: octets of content that
    all drafts together may hold in memory before further ones go to files."""

    def __init__(
        self,
        queue: Queue,
        spool: Spool,
        checks: Mapping[str, Check],
        *,
        hostname: str,
        expire: float,
        observer: Observer,
        memory: int = 128 * 1024 * 1024,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.queue = queue
        self.spool = spool
        self.observer = observer
        self.clock = clock
        self.held = 0
        self.go_by(checks, hostname=hostname, expire=expire, memory=memory)
        self._patient: deque[tuple[float, Ticket]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._owed = 0

    def go_by(self, checks: Mapping[str, Check], *, hostname: str, expire: float, memory: int) -> None:
        """From now on, as at the beginning."""
        self.hostname = hostname
        self.expire = expire
        self.memory = memory
        self._checks = dict(checks)
        self._content_checks = frozenset(name for name, check in checks.items() if "content" in check.stages)
        self._mark = mark(hostname)

    # ------------------------------------------------------ contracts.Intake

    def begin(self, transaction: Transaction, drained: Callable[[], None]) -> MailDraft:
        return MailDraft(self, transaction, drained)

    def ask(self, question: Question, checks: Sequence[str], answer: Callable[[Verdict], None]) -> None:
        self._spawn(self._ask(question, checks, answer))

    async def _ask(self, question: Question, checks: Sequence[str], answer: Callable[[Verdict], None]) -> None:
        answer(await self._judge(question, checks))

    async def _judge(self, question: Question, names: Sequence[str]) -> Verdict:
        facts: dict[str, Any] = {}
        for name in names:
            check = self._checks.get(name)
            if check is None:
                return Verdict(CHECK_FAILED, facts)  # gone since this mail was let in: it comes again, by the new rules
            if question.stage not in check.stages:
                continue
            try:
                # In a task of its own: a compiled coroutine hands a cancellation on in an older way, which not
                # every awaitable that a check may lean on knows; a task's is its own affair.
                verdict = await asyncio.create_task(check.judge(question))
            except Exception as error:
                # A check promises not to raise: this is a bug of ours, and the mail must wait for its repair.
                asyncio.get_running_loop().call_exception_handler({"message": f"check {name} failed", "exception": error})
                return Verdict(CHECK_FAILED, facts)
            if verdict.facts is not None:
                facts[name] = verdict.facts
                if question.message is not None:
                    question.message.checks[name] = verdict.facts
            if verdict.reply is not None:
                return Verdict(verdict.reply, facts)
        return Verdict(None, facts)

    # ------------------------------------------------------------------ life

    @property
    def owed(self) -> int:
        """Messages after their end of data that have no answer yet."""
        return self._owed

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._patient:
            self._patient.popleft()[1].impatient()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    # ----------------------------------------------------------- for drafts

    def receive(self, draft: MailDraft, content: Content, answer: Answer) -> None:
        """The whole content is here, in memory or on disk."""
        self._owed += 1
        transaction = draft.transaction
        # What is due goes by the queue's clock, what is told by the wall's.
        wall, now = self.clock(), self.queue.clock()
        if transaction.hops >= OWN_PASSES and content.header().count(self._mark) >= OWN_PASSES:
            draft.refuse(answer, LOOP)
            return
        envelope, facts = transaction.envelope, transaction.facts
        # HOLDUNTIL is a time on the wall's.
        release = (extensions.release_of(envelope.mail_params, wall) or 0.0) - wall + now if envelope.held else 0.0
        message = Message(
            id=draft.id or new_id(wall),
            envelope=envelope,
            stored=content,
            client=transaction.client,
            received_at=now,
            listener=transaction.listener,
            checks=dict(facts["checks"]) if facts and "checks" in facts else {},
            priority=transaction.priority,
            not_before=release if release > now else 0.0,
            # Its time runs from its release; with BY and mode R it ends when the sender said.
            expires_at=max(now, release) + self.expire,
        )
        timed = extensions.deadline(message)
        if timed is not None and timed[1].returns:
            message.expires_at = min(message.expires_at, timed[0])
        priority = extensions.traced_priority(envelope, message.priority)
        message.trace = received(transaction.client, envelope, self.hostname, message.id, wall, priority)
        if transaction.submission:
            # A content that has no header has its first lines to show that.
            header = header_of(content.chunks(), content.header_size or 1024)
            message.trace += supplied(header, transaction.envelope, self.hostname, message.id, wall)
        names = self._wanted(transaction) if self._content_checks else None
        if names:
            self._spawn(self._check(draft, message, names, answer))
        else:
            Ticket(self, draft, message, answer).start()

    def _wanted(self, transaction: Transaction) -> list[str]:
        names = dict.fromkeys(name for route in transaction.routes for name in route.checks)
        return [name for name in names if name in self._content_checks]

    async def _check(self, draft: MailDraft, message: Message, names: Sequence[str], answer: Answer) -> None:
        transaction = draft.transaction
        question = Question("content", transaction.client, transaction.listener, sender=transaction.envelope.mail_from, message=message)
        verdict = await self._judge(question, names)
        if verdict.reply is not None:
            draft.refuse(answer, verdict.reply)
        else:
            Ticket(self, draft, message, answer).start()

    def release(self, draft: MailDraft) -> None:
        """The answer is out: its content no longer counts as held."""
        self._owed -= 1
        draft.let_go()

    def wait(self, ticket: Ticket, patience: float) -> None:
        """Call ``ticket.impatient`` in ``patience`` seconds (one timer for all: they wait alike)."""
        loop = self._loop
        if loop is None:
            # Kept: asking for it asks the kernel for the process's number, too, each time (CPython 3.11).
            loop = self._loop = asyncio.get_running_loop()
        due = loop.time() + patience
        self._patient.append((due, ticket))
        if self._timer is None:
            self._timer = loop.call_at(due, self._tick)

    def _tick(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        patient = self._patient
        while patient and (patient[0][0] <= now + 0.0005 or patient[0][1].over):
            patient.popleft()[1].impatient()
        if patient:
            self._timer = loop.call_at(patient[0][0], self._tick)

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            asyncio.get_running_loop().call_exception_handler({"message": "intake failed", "exception": error, "task": task})


class MailDraft:
    """Content on its way in: up to INLINE_LIMIT octets in memory, more in one file."""

    __slots__ = (
        "_answer",
        "_buffered",
        "_drained",
        "_failure",
        "_file",
        "_gone",
        "_held",
        "_intake",
        "_pieces",
        "_size",
        "_writing",
        "id",
        "transaction",
    )

    def __init__(self, intake: MailIntake, transaction: Transaction, drained: Callable[[], None]) -> None:
        self.id = ""
        self.transaction = transaction
        self._intake = intake
        self._drained = drained
        self._pieces: list[bytes] = []
        self._buffered = 0
        self._held = 0
        self._size = 0
        self._file: ContentFile | None = None
        self._writing = 0
        self._failure: Exception | None = None
        self._answer: Answer | None = None
        self._gone = False

    def write(self, octets: bytes) -> None:
        length = len(octets)
        self._pieces.append(octets)
        self._buffered += length
        self._size += length
        self._held += length
        self._intake.held += length
        if self._file is None:
            if self._size <= INLINE_LIMIT and self._intake.held <= self._intake.memory:
                return
            self.id = new_id(self._intake.clock())
            self._file = self._intake.spool.file(self.id)
        if self._buffered >= (INLINE_LIMIT if self._intake.held <= self._intake.memory else SPILL):
            self._flush()

    @property
    def full(self) -> bool:
        if not self._writing:
            return False
        return self._held > DISK_BACKLOG or self._intake.held > self._intake.memory

    def finish(self, answer: Answer) -> None:
        if self._file is None:
            pieces = self._pieces
            octets = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            self._pieces = []
            self._intake.receive(self, self._content(octets, None), answer)
            return
        self._answer = answer
        if self._buffered:
            self._flush()
        elif not self._writing:
            self._complete()

    def abort(self) -> None:
        if self._gone or self._answer is not None:
            return
        self.let_go()
        self._discard()

    def refuse(self, answer: Answer, reply: Reply) -> None:
        """After the end of data: the message will not be ours."""
        answer(reply)
        self._intake.release(self)
        self._discard()

    def forget(self) -> None:
        """Nothing was stored and nothing is owed any more: a file of ours goes."""
        self._discard()

    def let_go(self) -> None:
        self._intake.held -= self._held
        self._held = 0
        self._pieces = []

    def _discard(self) -> None:
        self._gone = True
        if self._file is not None and not self._writing:
            self._file.discard()
            self._file = None

    def _content(self, octets: bytes | None, path: str | None) -> Content:
        transaction = self.transaction
        return Content(octets, path, self._size, eight_bit=transaction.eight_bit, header_size=transaction.header_size)

    def _flush(self) -> None:
        assert self._file is not None
        pieces, length = self._pieces, self._buffered
        self._pieces, self._buffered = [], 0
        self._writing += 1
        self._file.write(pieces, lambda error: self._written(length, error))

    def _written(self, length: int, error: Exception | None) -> None:
        self._writing -= 1
        held = min(length, self._held)
        self._held -= held
        self._intake.held -= held
        if error is not None and self._failure is None:
            self._failure = error
        if self._gone:
            self._discard()
            return
        if self._answer is None:
            # Whether it was full when it stopped is not known: others may have made room since, and told nobody.
            if not self.full:
                self._drained()
        elif not self._writing:
            self._complete()

    def _complete(self) -> None:
        assert self._file is not None
        assert self._answer is not None
        if self._failure is not None:
            self._intake.observer.event("shed", reason=f"content could not be written: {self._failure}")
            self._intake._owed += 1
            self.refuse(self._answer, NO_SPACE if no_room(self._failure) else NOT_STORED)
            return
        self._intake.receive(self, self._content(None, self._file.path), self._answer)


#: A Ticket's life: the first tries are out; it waits for its group; the group is being
#: written; the truth is known.
Phase = Literal["trying", "joined", "closed", "over"]


@mypyc_attr(free_list_len=1)
class Ticket:
    """One message between the end of its data and its answer (implements ``contracts.Store``).

    ``_outcomes`` holds what came back and was not yet judged; ``_out`` counts the tries that
    are out."""

    __slots__ = (
        "_answer",
        "_delivered",
        "_draft",
        "_failed",
        "_follow",
        "_intake",
        "_kept",
        "_late",
        "_out",
        "_outcomes",
        "_pendings",
        "_phase",
        "_refused",
        "_splits",
        "_strays",
        "_timer",
        "_untried",
        "_word",
        "message",
    )

    def __init__(self, intake: MailIntake, draft: MailDraft, message: Message, answer: Answer) -> None:
        self._intake = intake
        self._draft = draft
        self.message = message
        self._answer: Answer | None = answer
        routes = draft.transaction.routes
        self._delivered = routes[0].acknowledge == "delivered"
        self._phase: Phase = "trying"
        self._untried = False
        self._outcomes: list[tuple[Pending, Sequence[Outcome]]] = []
        # Mostly there is none: an empty tuple costs nothing.
        self._splits: tuple[Pending, ...] = ()
        self._follow: tuple[Row, ...] = ()
        self._late: tuple[tuple[Pending, Sequence[Outcome]], ...] = ()
        self._word: Reply | None = None  # the 250 of the one sink whose word is the answer
        self._refused: Mapping[int, Reply] = NOBODY  # LMTP: recipients with an answer of their own
        self._strays: tuple[Pending, ...] = ()  # LMTP: Pendings whose try is out and whose outcome concerns nobody any more
        self._kept = False  # a row of this message is in the spool
        self._failed: Reply | None = None  # the store failed; this is the answer if not all was taken
        self._timer: asyncio.TimerHandle | None = None
        due, limit = max(message.received_at, message.not_before), extensions.first_limit(message)
        if len(routes) == 1 or all(route.sinks == routes[0].sinks for route in routes):
            everyone = ONLY_ONE if len(routes) == 1 else tuple(range(len(routes)))
            self._pendings = [Pending(message.id, sink, everyone, due, limit, priority=message.priority) for sink in routes[0].sinks]
        else:
            lists: dict[str, list[int]] = {}
            for index, route in enumerate(routes):
                for sink in route.sinks:
                    lists.setdefault(sink, []).append(index)
            self._pendings = [
                Pending(message.id, sink, tuple(indexes), due, limit, priority=message.priority) for sink, indexes in lists.items()
            ]
        # Those whose first try is not over: all, until told otherwise. (They compare by identity.)
        self._out = self._pendings.copy()

    @property
    def over(self) -> bool:
        return self._phase == "over"

    # ------------------------------------------------------------- first try

    def start(self) -> None:
        queue = self._intake.queue
        patience = queue.hold
        for pending in self._pendings:
            if not queue.first_try(self.message, pending, self, wait=self._delivered):
                self._in(pending)
                self._untried = True
            elif pending in self._out:
                patience = min(patience, queue.patience(pending.sink))
        if self._phase != "trying":
            return  # settled on the way
        if self._delivered:
            if self._untried:
                self._decide_delivered(timed_out=True)
            else:
                route = self._draft.transaction.routes[0]
                self._timer = asyncio.get_running_loop().call_later(route.acknowledge_timeout, self.impatient)
        elif self._untried or not self._out or patience <= 0.0:
            self._join()
        else:
            self._intake.wait(self, patience)

    def impatient(self) -> None:
        """The tries have been out for long enough."""
        self._timer = None
        if self._phase == "trying":
            if self._delivered:
                self._decide_delivered(timed_out=True)
            else:
                self._join()

    def settled(self, pending: Pending, outcomes: Sequence[Outcome]) -> None:
        """A first try came back (called by the queue, on the loop)."""
        if pending in self._strays:
            self._strays = tuple([stray for stray in self._strays if stray is not pending])
            if self._phase == "over" and not self._kept:
                self._finish_unkept()
            return
        self._in(pending)
        if self._phase == "closed":
            self._late = (*self._late, (pending, outcomes))
        elif self._phase in ("trying", "joined"):
            self._outcomes.append((pending, outcomes))
            if self._delivered and self._phase == "trying":
                if not self._out and not self._untried:
                    self._decide_delivered(timed_out=False)
                return
            self._judge()
            if self._nothing_owed():
                self._accept(stored=False)
            elif self._phase == "trying" and not self._out and not self._untried:
                self._join()
        elif self._failed is not None:
            self._late = (*self._late, (pending, outcomes))
            self._settle_failure()
        elif self._kept:
            self._intake.queue.conclude(self.message, pending, outcomes)
        else:
            self._finish_unkept()

    def untried(self, pending: Pending) -> None:
        """A first try that waited for its place will not be: the mail is stored as one that was never out."""
        self._in(pending)
        if self._phase == "trying":
            self._untried = True
            self._join()
        elif self._failed is not None:
            self._settle_failure()

    def _in(self, pending: Pending) -> None:
        """Its first try is over, or will not be."""
        if pending in self._out:
            self._out.remove(pending)

    def _judge(self) -> None:
        """Turn outcomes into what is still owed and what follows."""
        queue = self._intake.queue
        for pending, outcomes in self._outcomes:
            splits, follow = queue.judge(self.message, pending, outcomes)
            if splits:
                self._splits = (*self._splits, *splits)
            if follow:
                self._follow = (*self._follow, *follow)
        self._outcomes.clear()

    def _nothing_owed(self) -> bool:
        return not self._splits and not self._follow and not self._out and not any(pending.recipients for pending in self._pendings)

    # ------------------------------------------------ acknowledge = delivered

    def _decide_delivered(self, timed_out: bool) -> None:
        """The sinks' own word is the answer (DESIGN §4), or the fallback where it did not come."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if timed_out:
            route = self._draft.transaction.routes[0]
            for pending in self._pendings:
                if pending in self._out and self._intake.queue.withdraw(pending):
                    self._out.remove(pending)
            if self._draft.transaction.lmtp:
                self._decide_each(route.fallback == "refuse")
            elif route.fallback == "refuse":
                self._refuse(NO_VERDICT)
            else:
                self._judge()
                self._join()
            return
        refusals = self._refusals()
        count = len(self.message.envelope.recipients)
        if len(refusals) == count and not self._draft.transaction.lmtp:
            replies = list(refusals.values())
            self._refuse(next((reply for reply in replies if reply.temporary), replies[0]))
            return
        if self._draft.transaction.lmtp:
            if len(refusals) == count:
                self._refuse(list(refusals.values()))
                return
            self._drop(refusals)
        elif not refusals and len(self._pendings) == 1:
            said = self._outcomes[0][1][0]
            # A function's own Reply is the reply; elsewhere the id of the message tells more.
            if said.reply.code == 250 and not said.remote and said is not DELIVERED:
                self._word = said.reply
        self._judge()
        if self._nothing_owed():
            self._accept(stored=False)
        else:
            self._join()

    def _decide_each(self, refuse: bool) -> None:
        """LMTP, out of time: for whom every sink has spoken its word holds; for the others the fallback."""
        spoken = {id(pending) for pending, _outcomes in self._outcomes}
        silent = [pending for pending in self._pendings if id(pending) not in spoken]
        waiting = {index for pending in silent for index in pending.recipients}
        refusals = {index: reply for index, reply in self._refusals().items() if index not in waiting}
        if refuse:
            refusals |= dict.fromkeys(waiting, NO_VERDICT)
            for pending in silent:
                # The sink may take it all the same; nobody will try again.
                pending.recipients = ()
                if pending in self._out:
                    self._out.remove(pending)
                    self._strays = (*self._strays, pending)
        if len(refusals) == len(self.message.envelope.recipients):
            self._refuse([refusals[index] for index in sorted(refusals)])
            return
        self._drop(refusals)
        self._judge()
        if self._nothing_owed():
            self._accept(stored=False)
        else:
            self._join()

    def _refusals(self) -> dict[int, Reply]:
        """Recipients that no sink took, with the reply of the first that refused."""
        taken: set[int] = set()
        refused: dict[int, Reply] = {}
        for pending, outcomes in self._outcomes:
            for index, outcome in zip(pending.recipients, outcomes, strict=True):
                if outcome.state == "delivered":
                    taken.add(index)
                else:
                    refused.setdefault(index, _own_reply(outcome))
        return {index: refused[index] for index in sorted(refused) if index not in taken}

    def _drop(self, refusals: Mapping[int, Reply]) -> None:
        """These recipients are told the truth themselves (LMTP): nothing is owed for them."""
        self._refused = refusals
        kept: list[tuple[Pending, Sequence[Outcome]]] = []
        for pending, outcomes in self._outcomes:
            pairs = [(index, outcome) for index, outcome in zip(pending.recipients, outcomes, strict=True) if index not in refusals]
            if len(pairs) < len(pending.recipients):
                pending.recipients = tuple(index for index, _outcome in pairs)
                pending.part += 1
            kept.append((pending, [outcome for _index, outcome in pairs]))
        self._outcomes = kept

    # ------------------------------------------------------- contracts.Store

    def _join(self) -> None:
        queue = self._intake.queue
        for pending in self._pendings:
            if pending in self._out and queue.withdraw(pending):
                self._out.remove(pending)
        self._phase = "joined"
        self._intake.spool.store(self)

    @property
    def size(self) -> int:
        stored = self.message.stored
        return 1024 + (stored.size if stored.path is None else 0)

    def close(self) -> list[Row]:
        if self._phase != "joined":
            return []
        owed = [pending for pending in self._pendings if pending.recipients]
        owed.extend(self._splits)
        rows = list(self._follow)
        if owed:
            self._kept = True
            rows.insert(0, Row(self.message, owed))
        self._phase = "closed"
        return rows

    def stored(self, error: SpoolError | None) -> None:
        queue = self._intake.queue
        if error is None:
            if not self._kept:
                # Only notices were stored.
                queue.follow_up(self._follow)
                self._accept(stored=True)
                return
            late = {id(pending) for pending, _outcomes in self._late}
            for pending in self._pendings:
                if pending in self._out or id(pending) in late:
                    queue.resume(pending)
                elif pending.recipients:
                    queue.adopt(pending)
            queue.follow_up(self._follow)
            self._accept(stored=True)
            for pending, outcomes in self._late:
                queue.conclude(self.message, pending, outcomes)
            self._late = ()
            return
        self._kept = False
        if not error.known:
            self._say(None)
            return
        self._failed = NO_SPACE if error.full else NOT_STORED
        self._phase = "over"
        self._settle_failure()

    def _settle_failure(self) -> None:
        """The store failed before anything could be kept: tries that are out are waited for, and
        all taken is 250 all the same."""
        if self._out:
            return
        assert self._failed is not None
        taken = {id(pending) for pending, outcomes in self._late if all(outcome.state == "delivered" for outcome in outcomes)}
        everything = all(id(pending) in taken or not pending.recipients for pending in self._pendings)
        if everything and not self._splits and not self._follow:
            self._failed = None
            self._accept(stored=False)
        else:
            failed, self._failed = self._failed, None
            self._refuse(failed)

    # ---------------------------------------------------------------- answers

    def _accept(self, stored: bool) -> None:
        transaction = self._draft.transaction
        message, envelope = self.message, transaction.envelope
        told: dict[str, Any] = {
            "session": transaction.session,
            "id": message.id,
            "listener": transaction.listener,
            "client": transaction.client.ip,
            "mail_from": envelope.mail_from,
            "recipients": len(envelope.recipients) - len(self._refused),
            "size": message.stored.size,
            "stored": stored,
        }
        self._add_asked(told)
        facts = transaction.facts
        if facts and (forwarded := facts.get("forwarded")):
            # What XFORWARD said about where the mail came from: for the log alone.
            told["forwarded"] = forwarded
        self._intake.observer.tell("accepted", told)
        reply = self._word or self._accepted()
        if transaction.lmtp:
            self._say([self._refused.get(index, reply) for index in range(len(transaction.envelope.recipients))])
        else:
            self._say(reply)
        if not self._kept:
            self._finish_unkept()

    def _accepted(self) -> Reply:
        message = self.message
        if extensions.priority_changed(message.envelope.mail_params, message.priority):
            return Reply(250, "2.3.6", f"{message.priority} is the priority of this mail, accepted as {message.id}")
        return Reply.ok(f"accepted as {message.id}")

    def _add_asked(self, told: dict[str, Any]) -> None:
        """What its sender asked of the queue."""
        message = self.message
        priority = extensions.traced_priority(message.envelope, message.priority)
        if priority is not None:
            told["priority"] = priority
        if message.not_before:
            told["held_until"] = message.not_before
        timed = extensions.deadline(message)
        if timed is not None:
            told["deliver_by"] = timed[0]

    def _refuse(self, reply: Reply | Sequence[Reply]) -> None:
        if self._draft.transaction.lmtp and isinstance(reply, Reply):
            reply = [self._refused.get(index, reply) for index in range(len(self.message.envelope.recipients))]
        self._say(reply)
        self._finish_unkept()

    def _finish_unkept(self) -> None:
        """No row needs the file of a large content; the last try that reads it is over."""
        if not self._out and not self._strays:
            self._draft.forget()

    def _say(self, reply: Reply | Sequence[Reply] | None) -> None:
        self._phase = "over"
        answer, self._answer = self._answer, None
        if answer is not None:
            self._intake.release(self._draft)
            answer(reply)


def _own_reply(outcome: Outcome) -> Reply:
    """A sink's word as the client's reply: a deferral is never a 5yz, a failure never a 4yz."""
    reply = outcome.reply
    if outcome.state == "deferred" and not reply.temporary:
        return Reply.untrusted(451, f"4.0.0 {reply.text}")
    if outcome.state == "failed" and not reply.permanent:
        return Reply.untrusted(550, f"5.0.0 {reply.text}")
    return reply
