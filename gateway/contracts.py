"""What the parts promise each other. Read this to write a Sink, a Check or a Spool.

The parts of the world floor (listener, spool, sinks, checks) never import one another;
they meet here. All of it runs on one event loop and one thread, except where a
docstring says otherwise.

The life of a message in these words: a Connection gives a Transaction to the Intake,
which opens a Draft. After the end of data the Draft offers one Pending per sink to
the Queue, which starts a Delivery at the Sink. The Sink settles the Delivery with one
Outcome per recipient. What was not taken at once is kept by the Spool (a Store), and
what became of it later is marked there (a Mark).
"""

from __future__ import annotations

import asyncio
import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal, Protocol

from mypy_extensions import mypyc_attr

from .message import Client, Envelope, Message, Recipient
from .passwords import ScramKeys
from .reply import Reply
from .route import Route

# --------------------------------------------------------------------- sinks

State = Literal["delivered", "deferred", "failed"]
#: What a relay that has a message now was told of the time to deliver it by (RFC 2852).
Onward = Literal["", "timed", "untimed"]


@mypyc_attr(acyclic=True)
@dataclass(init=False)
class Outcome:
    """The result of one try for one recipient.

    ``reply``: what the far side said, or what we say in its place. ``remote``: who said it
    (``host:port``, URL, path). ``retry_after``: seconds the far side asked for. ``down``: the
    fault is the sink's, not this message's (no connection, time-out, 5xx of a webhook):
    other messages would fare alike. ``pause``: the far side wants no more (HTTP 410).
    ``notifies``: the far side took over the duty of delivery status notifications (it
    offered DSN and got NOTIFY). ``onward``: a relay that has it now was told the time to deliver it by (RFC 2852,
    ``timed``) or knows no such thing (``untimed``); "" where there is no such time or no relay."""

    state: State
    reply: Reply
    remote: str
    retry_after: float | None
    down: bool
    pause: bool
    notifies: bool
    onward: Onward

    def __init__(
        self,
        state: State,
        reply: Reply,
        remote: str = "",
        retry_after: float | None = None,
        down: bool = False,
        pause: bool = False,
        notifies: bool = False,
        onward: Onward = "",
    ) -> None:
        self.state = state
        self.reply = reply
        self.remote = remote
        self.retry_after = retry_after
        self.down = down
        self.pause = pause
        self.notifies = notifies
        self.onward = onward


@mypyc_attr(allow_interpreted_subclasses=True)
class Delivery:
    """One try to carry one message to one sink for some of its recipients.

    ``id`` is stable over tries for the same set of recipients (``webhook-id``); ``attempt``
    counts from 1; ``age``: seconds from when the message was received until this try began, whatever
    clocks were set meanwhile. The sink calls ``settle`` exactly once, on the loop, with one Outcome per
    recipient in the order of ``recipients``; it may do so before ``start`` returns."""

    __slots__ = ("_settled", "age", "attempt", "id", "message", "recipients", "sink")

    def __init__(
        self,
        id: str,
        message: Message,
        recipients: Sequence[Recipient],
        sink: str,
        attempt: int,
        settled: Callable[[Delivery, Sequence[Outcome]], None],
        age: float = 0.0,
    ) -> None:
        self.id = id
        self.message = message
        self.recipients = recipients
        self.sink = sink
        self.attempt = attempt
        self.age = age
        self._settled: Callable[[Delivery, Sequence[Outcome]], None] | None = settled

    def settle(self, outcomes: Sequence[Outcome]) -> None:
        """Raises RuntimeError when called twice, ValueError when the count is off."""
        settled = self._settled
        if settled is None:
            raise RuntimeError(f"delivery {self.id} to {self.sink} was settled twice")
        if len(outcomes) != len(self.recipients):
            raise ValueError(f"{len(outcomes)} outcomes for {len(self.recipients)} recipients")
        self._settled = None
        settled(self, outcomes)

    def settle_all(self, outcome: Outcome) -> None:
        """The same outcome for every recipient."""
        self.settle([outcome] * len(self.recipients))

    @property
    def settled(self) -> bool:
        return self._settled is None


class Sink(Protocol):
    """Carries a message one hop.

    ``start`` never raises and never blocks; it never raises for the far side's doing but
    settles with deferred or failed. It never retries and never touches the spool: the Queue
    alone knows time, and never has more than ``concurrency`` deliveries out. A sink keeps its
    own deadline: every delivery is settled by then."""

    @property
    def name(self) -> str: ...
    @property
    def carries_binary(self) -> bool:
        """It carries BINARYMIME content (RFC 3030)."""

    def start(self, delivery: Delivery) -> None: ...
    async def open(self) -> None:
        """Before the first delivery. Connects to nothing that may be down."""

    async def close(self) -> None:
        """After the last one: deliveries still out are settled as deferred."""


@mypyc_attr(allow_interpreted_subclasses=True)
class AsyncSink(ABC):
    """For sinks that are most simply a coroutine: write ``carry``, and this is a Sink.

    An exception out of ``carry`` is a bug of the sink: the delivery is deferred and the
    exception goes to the loop's exception handler."""

    carries_binary = True

    def __init__(self, name: str) -> None:
        self.name = name
        self._tasks: set[asyncio.Future[Sequence[Outcome]]] = set()

    @abstractmethod
    async def carry(self, delivery: Delivery) -> Sequence[Outcome]:
        """One Outcome per recipient, in order."""

    def start(self, delivery: Delivery) -> None:
        # The task is the subclass's own coroutine: one of ours around it would cost more, and compiled
        # coroutines throw into what they await in an older way, which not every library's awaitable knows.
        try:
            task = asyncio.ensure_future(self.carry(delivery))
        except Exception as error:  # it is no coroutine function: nothing that can be awaited, or it raised at once
            self._misbehaved(delivery, error)
            return
        self._tasks.add(task)
        task.add_done_callback(partial(self._carried, delivery))

    def _carried(self, delivery: Delivery, task: asyncio.Future[Sequence[Outcome]]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            delivery.settle_all(INTERRUPTED)
            return
        error = task.exception()
        if error is not None:
            self._misbehaved(delivery, error)
            return
        outcomes = task.result()
        try:
            whole = len(outcomes) == len(delivery.recipients) and all(isinstance(outcome, Outcome) for outcome in outcomes)
        except TypeError:
            whole = False
        if whole:
            delivery.settle(outcomes)
        else:
            self._misbehaved(
                delivery, TypeError(f"carry returned {outcomes!r:.200}: wanted is one Outcome for each of {len(delivery.recipients)}")
            )

    def _misbehaved(self, delivery: Delivery, error: BaseException) -> None:
        context = {"message": f"sink {self.name} failed on {delivery.id}", "exception": error}
        asyncio.get_running_loop().call_exception_handler(context)
        delivery.settle_all(BROKEN)

    async def open(self) -> None:
        return None

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)


DELIVERED: Final = Outcome("delivered", Reply(250, "2.0.0", "delivered"))
INTERRUPTED: Final = Outcome("deferred", Reply(451, "4.3.2", "interrupted, will be tried again"))
BROKEN: Final = Outcome("deferred", Reply(451, "4.3.0", "internal fault in the sink"))

# -------------------------------------------------------------------- checks

Stage = Literal["client", "sender", "recipient", "content"]


@dataclass
class Question:
    """What a check is asked. ``sender`` is None at the client stage, ``recipient`` only given
    at its own; ``message`` only at the content stage, with the verdicts so far in its ``checks``."""

    stage: Stage
    client: Client
    listener: str
    sender: str | None = None
    recipient: Recipient | None = None
    message: Message | None = None


@dataclass
class Verdict:
    """``reply`` refuses (4yz or 5yz), None lets pass. ``facts`` are kept in ``Message.checks``
    under the check's name and may be anything that JSON can say."""

    reply: Reply | None = None
    facts: Any = None


class Check(Protocol):
    """Judges at one or more stages. Raises nothing for the far side's doing: a service that is
    down is a Verdict as the operator chose (``on_error``)."""

    @property
    def name(self) -> str: ...
    @property
    def stages(self) -> frozenset[Stage]: ...
    async def judge(self, question: Question) -> Verdict: ...
    async def close(self) -> None: ...


# -------------------------------------------------------------------- logins


@dataclass
class Login:
    """What a client says to prove who it is. ``password`` (PLAIN, LOGIN) or ``token`` (a bearer
    token; ``user`` may be ``""`` then). With neither, SCRAM: first its keys are wanted
    (``proven`` is None), then ``proven`` says whether the proof fits them."""

    mechanism: str
    user: str
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    proven: bool | None = None


@dataclass
class Judgement:
    """``identity``: who it is. Without one ``reply`` refuses (535, or 454 for now), but where keys
    are wanted there are ``keys`` and a fresh ``nonce`` (printable ASCII without a comma), for users
    that do not exist as well. ``note``: the reason, for the log alone."""

    identity: str | None = None
    reply: Reply | None = None
    keys: ScramKeys | None = field(default=None, repr=False)
    nonce: str = ""
    note: str = ""


class Authenticator(Protocol):
    """Judges logins. Raises nothing for the far side's doing, takes as long for users that do not
    exist as for those that do, and never computes a slow hash on the loop."""

    async def judge(self, login: Login, client: Client, listener: str) -> Judgement: ...


# -------------------------------------------------------------------- intake


@dataclass(init=False)
class Transaction:
    """One mail on a connection, from MAIL on. ``number`` counts within the connection;
    ``routes`` stands beside ``envelope.recipients``. The facts of the content are set at
    its end; ``hops``: how many Received fields it has. ``submission``: header fields that are missing are supplied (RFC 6409 §8).
    ``priority`` applies, whatever was asked for (RFC 6710)."""

    number: int
    session: str
    listener: str
    client: Client
    envelope: Envelope
    routes: list[Route]
    facts: dict[str, Any]
    size: int
    eight_bit: bool
    header_size: int
    hops: int
    lmtp: bool
    submission: bool
    priority: int

    def __init__(
        self,
        number: int,
        session: str,
        listener: str,
        client: Client,
        envelope: Envelope,
        routes: list[Route] | None = None,
        facts: dict[str, Any] | None = None,
        size: int = 0,
        eight_bit: bool = False,
        header_size: int = 0,
        hops: int = 0,
        lmtp: bool = False,
        submission: bool = False,
        priority: int = 0,
    ) -> None:
        self.number = number
        self.session = session
        self.listener = listener
        self.client = client
        self.envelope = envelope
        self.routes = [] if routes is None else routes
        self.facts = {} if facts is None else facts
        self.size = size
        self.eight_bit = eight_bit
        self.header_size = header_size
        self.hops = hops
        self.lmtp = lmtp
        self.submission = submission
        self.priority = priority


#: The answer after the end of data: one Reply for SMTP, one per accepted recipient (in
#: order) for LMTP, None to close the connection without a word (nobody knows the truth).
Answer = Callable[[Reply | Sequence[Reply] | None], None]


class Draft(Protocol):
    """Content on its way in."""

    def write(self, octets: bytes) -> None: ...
    @property
    def full(self) -> bool:
        """More is buffered than should be: stop reading until ``drained`` is called (which may also come unasked)."""

    def finish(self, answer: Answer) -> None:
        """The end of data was read and the wire found nothing wrong. ``answer`` is called once."""

    def abort(self) -> None:
        """The mail will not be: forget it. Also allowed after ``finish``: the client is gone,
        the answer goes nowhere, but the message is carried if it can be."""


class Intake(Protocol):
    """What a connection leans on."""

    def begin(self, transaction: Transaction, drained: Callable[[], None]) -> Draft:
        """Recipients stand, content comes now."""

    def ask(self, question: Question, checks: Sequence[str], answer: Callable[[Verdict], None]) -> None:
        """Run these checks in order; ``answer`` gets the first refusal, or all the facts
        (a dict by check name)."""


# --------------------------------------------------------------------- spool

Keeping = Literal["queued", "held", "dead"]


@mypyc_attr(acyclic=True)
@dataclass(eq=False, init=False)
class Pending:
    """What a message still owes one sink: a row of the spool, or on its way to become one.

    ``recipients``: indexes into ``envelope.recipients``, ascending. ``part`` numbers the set of
    recipients (1, 2, …): it is raised whenever the set shrinks. ``due``, ``expires_at``: Unix
    seconds. ``key`` is 0 until the row exists; only the spool sets it and ``message_key``.
    ``note``: the last reply or reason. ``down``: it waits for its sink, not for its own delay."""

    message_id: str
    sink: str
    recipients: tuple[int, ...]
    due: float
    expires_at: float
    part: int
    attempts: int
    priority: int
    state: Keeping
    note: str
    down: bool
    key: int
    message_key: int

    def __init__(
        self,
        message_id: str,
        sink: str,
        recipients: tuple[int, ...],
        due: float,
        expires_at: float,
        part: int = 1,
        attempts: int = 0,
        priority: int = 0,
        state: Keeping = "queued",
        note: str = "",
        down: bool = False,
        key: int = 0,
        message_key: int = 0,
    ) -> None:
        self.message_id = message_id
        self.sink = sink
        self.recipients = recipients
        self.due = due
        self.expires_at = expires_at
        self.part = part
        self.attempts = attempts
        self.priority = priority
        self.state = state
        self.note = note
        self.down = down
        self.key = key
        self.message_key = message_key

    @property
    def delivery_id(self) -> str:
        return self.message_id if self.part == 1 else f"{self.message_id}_{self.part}"


@mypyc_attr(native_class=False)
class SpoolError(Exception):
    """A group could not be stored. ``known``: it is proven that nothing of it will ever come
    back (answer 45x); otherwise nobody knows (close without a reply and exit for recovery).
    ``full``: there was no room for it (452), where the fault is otherwise the disk's (451)."""

    def __init__(self, reason: str, known: bool, full: bool = False) -> None:
        super().__init__(reason)
        self.known = known
        self.full = full


def no_room(error: BaseException) -> bool:
    """Does the operating system say that the disk, or our share of it, is full?"""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@dataclass
class Row:
    """A message with what it owes: stored whole or not at all."""

    message: Message
    pendings: list[Pending]


class Store(Protocol):
    """A message that waits for the next commit group."""

    @property
    def size(self) -> int:
        """Octets it will add to the group."""

    def close(self) -> list[Row]:
        """The group closes now (on the loop): what to store. Empty: all was taken meanwhile,
        nothing is stored and ``stored`` is not called."""

    def stored(self, error: SpoolError | None) -> None:
        """On the loop, after the sync (or its failure)."""


@dataclass
class Mark:
    """What became of a stored Pending: one transaction with what follows from it.

    ``pending`` as it is to be from now on; without recipients its row is deleted, and with
    the last row of a message the message. ``splits``: further rows of the same message (dead
    letters). ``follow``: new messages (bounces). ``synced``: on the loop, once it is durable
    (a mark is kept and tried again until it is)."""

    pending: Pending
    splits: list[Pending] = field(default_factory=list)
    follow: list[Row] = field(default_factory=list)
    synced: Callable[[], None] | None = None


class Spool(Protocol):
    """The durable place. Every call is made on the loop and returns at once; the work is
    done elsewhere. Reads see everything that was synced before they were asked for."""

    @property
    def unhealthy(self) -> str | None:
        """Why nothing should be promised now; None if all is well. Costs nothing to ask."""

    async def open(self) -> None:
        """Take the lock, recover. Raises SpoolError when another process has it."""

    async def close(self) -> None: ...
    def store(self, ticket: Store) -> None:
        """Join the next group (the caller already waited for ``spool.hold``)."""

    def mark(self, mark: Mark) -> None:
        """Ride on the next group, at most 50 ms later. Queues behind the insert it speaks of."""

    def file(self, message_id: str) -> ContentFile:
        """A file of its own for large content, not yet durable."""

    async def load(self, pending: Pending) -> Message | None:
        """The message of a row; None if it is gone or was found damaged (then the row is set
        aside and reported)."""

    async def due(self, sink: str, before: float, limit: int, down: bool = False) -> list[Pending]:
        """Queued rows of one sink by priority and due time; of each priority in use at least a
        few, so that none starves. ``down``: after them those that wait for the sink, whenever
        they are due."""

    async def overdue(self, now: float, after: int) -> tuple[list[Pending], int]:
        """Queued rows of all sinks whose ``expires_at`` is over, among the next few thousand rows behind the key
        ``after`` (0: from the first on), due or not; and the key to go on after, 0 at the end."""

    async def next_due(self, sink: str, after: float) -> float | None:
        """When the earliest queued row of one sink that is due later than ``after`` is due."""

    async def counts(self) -> Mapping[tuple[str, str], tuple[int, float]]:
        """``(sink, state)`` → ``(rows, received_at of the oldest)``."""

    async def wake(self, sink: str, now: float) -> int:
        """Make every queued row of this sink that waits for the sink (``down``) due now."""


class ContentFile(Protocol):
    """Large content on disk. ``write`` hands to a thread and calls ``written`` on the loop."""

    @property
    def path(self) -> str: ...
    def write(self, pieces: list[bytes], written: Callable[[Exception | None], None]) -> None: ...
    def discard(self) -> None:
        """Close and remove it (never after its row was stored)."""


# ---------------------------------------------------------------- what it tells


class Observer(Protocol):
    """One call per business event; never blocks, never raises."""

    def event(self, event: str, /, **fields: Any) -> None: ...
    def tell(self, event: str, fields: dict[str, Any]) -> None:
        """The same, for events of every message: keywords cost more than what is made of them. ``fields`` is given away."""
