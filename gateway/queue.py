"""Time: what is due when, tries, retries, giving up, bounces, fairness.

Owns one Lane per sink: its concurrency, its backlog, its health. A failing or slow sink
never delays another, because lanes share nothing. Only a bounded window of the backlog
is in memory; the rest stays in the spool, asked for by due time. Knows no wire and no
disk: sinks and the spool are met through contracts.

A try that fails because the sink as a whole is out of reach (``Outcome.down``) takes the
lane down: new mail goes straight to the spool, one message at a time probes the sink, and
its first success makes everything that waited for it due at once.

A message that its sender wants held (``Message.not_before``) is stored with that time as its
``due`` and is in nobody's hands before, neither to probe a sink that is down nor because one came
back. Its priority orders the backlog of a lane: what is due goes in the order of priority, and of
each priority that waits a few go with every look, so that none starves. ``Pending.expires_at`` is
when the queue must act: give up, or tell the sender of a delay (``smtp/extensions.py``).

RFC 5321 §4.5.4.1 (retry strategy), RFC 3461 (what NOTIFY asks for), RFC 4865, 2852 and 6710.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Final, Literal, Protocol

from mypy_extensions import mypyc_attr

from .contracts import INTERRUPTED, Delivery, Mark, Observer, Outcome, Pending, Row, Sink, Spool, SpoolError
from .message import Client, Content, Message, Recipient
from .reply import Reply
from .smtp import bounce, extensions

#: No row is due, of a lane that owes nothing (Unix seconds).
NEVER: Final = float("inf")
#: Seconds between probes of a sink that is down: first, then doubling up to the last.
PROBE_FIRST: Final = 1.0
PROBE_LAST: Final = 60.0
#: A far side may ask for a day at most (DESIGN §6).
RETRY_AFTER_LIMIT: Final = 86400.0
#: Longest sleep of a lane (seconds).
LONGEST_SLEEP: Final = 30.0
#: Seconds of its ``rate`` that a lane which was idle, or woken late, may begin at once.
CATCH_UP: Final = 0.05
#: First tries that may wait for a place at one sink, of mail that can be stored instead.
HOPING: Final = 512
#: Rows taken from the spool at once, beyond what can start now.
WINDOW: Final = 64
#: Seconds until the spool is asked again after it could not be read.
READ_AGAIN: Final = 1.0
#: How often rows that do not come to their turn are looked at for expiry (seconds).
EXPIRY_SWEEP: Final = 60.0

#: Counts the time in which the machine sleeps, too, where the system has such a clock.
_BOOTTIME: Final[int] = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_clock_gettime: Final = time.clock_gettime


def elapsed() -> float:
    """Seconds that nobody can set."""
    return _clock_gettime(_BOOTTIME)


class Steady:
    """Unix seconds as they were when it was made, and elapsed time from then on: what is due or
    expires is not moved by a wall clock that is set while the process runs."""

    def __init__(self, wall: Callable[[], float] = time.time, since: Callable[[], float] = elapsed) -> None:
        self._since = since
        self._start = wall() - since()

    def now(self) -> float:
        return self._start + self._since()


EXPIRED: Final = Reply(554, "5.4.7", "delivery time expired")
NOT_YET: Final = Reply(451, "4.4.7", "not delivered yet")
NO_SUCH_SINK: Final = "this sink is not in the configuration"


@dataclass
class LaneSettings:
    """``concurrency``: deliveries out at once. ``on_failure``: what becomes of a recipient that
    failed for good or expired. ``rate``: deliveries begun in a second, 0 for any number.
    ``requiretls``: mail with REQUIRETLS can be left to the sink."""

    concurrency: int
    on_failure: Literal["bounce", "dead_letter"]
    relays: bool = False
    rate: float = 0.0
    requiretls: bool = True


class Waiting(Protocol):
    """Who waits for a first try (the intake's Ticket)."""

    def settled(self, pending: Pending, outcomes: Sequence[Outcome]) -> None: ...

    def untried(self, pending: Pending) -> None: ...


@dataclass
class _First:
    """A first try that waits for a place."""

    message: Message
    pending: Pending
    ticket: Waiting


class Lane:
    """One sink's share of the queue."""

    __slots__ = (
        "busy",
        "dormant",
        "down",
        "down_since",
        "earliest",
        "fresh",
        "gone",
        "hoping",
        "hurried",
        "latency",
        "looking",
        "marked",
        "next_probe",
        "out",
        "paused",
        "probe_delay",
        "ready",
        "refilling",
        "settings",
        "sink",
        "slot",
        "succeeded",
        "timer",
        "up_since",
        "waiting",
        "wake_owed",
    )

    def __init__(self, sink: Sink, settings: LaneSettings) -> None:
        self.sink = sink
        self.settings = settings
        self.out = 0
        self.slot = 0.0  # loop time before which none may begin, for the sake of its rate
        # Keys of rows that are in `ready`, out, or marked but not yet synced: never started twice.
        self.busy: set[int] = set()
        # Looks at the spool that are out, and keys whose marks were synced meanwhile: such a row may
        # have been seen as it was before.
        self.looking = 0
        self.marked: set[int] = set()
        self.ready: deque[Pending] = deque()
        # Rows that overtook others in `ready` since the spool was last looked at.
        self.hurried = 0
        self.waiting: deque[_First] = deque()
        # First tries of mail that can be stored instead, for a place that is free in time; by the id of their Pending. Their
        # tickets take them back (``withdraw``) before they are stored.
        self.hoping: OrderedDict[int, _First] = OrderedDict()
        self.fresh = False  # whose turn the last place was: of them, or of `ready`
        # No row outside `busy` is due before this (Unix seconds).
        self.earliest = NEVER
        self.refilling = False
        self.timer: asyncio.TimerHandle | None = None
        self.down = False
        self.down_since = 0.0  # loop time; of a pause too
        # Down, and nothing is there to probe the sink with before `earliest`.
        self.dormant = False
        self.up_since = 0.0  # loop time
        # Rows may wait for the sink (``Pending.down``) although the lane is not down: from before
        # the start, or of tries that outlasted an outage. The next success wakes them.
        self.wake_owed = True
        self.paused = False
        self.gone = False  # its sink is not in the configuration any more
        self.next_probe = 0.0  # loop time
        self.probe_delay = PROBE_FIRST
        self.succeeded = 0.0  # loop time of the last success
        self.latency = 0.0  # seconds, moving average of whole tries

    def free(self, now: float) -> bool:
        """May another delivery start at loop time ``now``?"""
        if self.paused:
            return False
        if self.down:
            return self.out == 0 and now >= max(self.next_probe, self.slot)
        return self.room(now)

    def room(self, now: float) -> bool:
        """Is there a place, and is it time for its next delivery, whatever is thought of the sink?"""
        return self.out < self.settings.concurrency and now >= self.slot

    def charge(self, now: float) -> None:
        """A delivery takes its place at loop time ``now``."""
        if self.settings.rate:
            self.slot = max(self.slot, now - CATCH_UP) + 1.0 / self.settings.rate


class Queue:
    """What is due when. ``retry``: seconds until the next try after the first, second … one,
    the last repeats. ``expire`` and ``hold`` in seconds. ``bounces``: the sink that carries
    bounces. ``clock``: Unix seconds, by which everything is due; it must not be set back or forth
    (``Steady``). ``wall``: what the dates of bounces go by."""

    _time: Callable[[], float]

    def __init__(
        self,
        spool: Spool,
        sinks: Mapping[str, Sink],
        lanes: Mapping[str, LaneSettings],
        *,
        retry: Sequence[float],
        expire: float,
        hold: float,
        bounces: str | None,
        hostname: str,
        observer: Observer,
        new_id: Callable[[float], str],
        clock: Callable[[], float] | None = None,
        wall: Callable[[], float] | None = None,
    ) -> None:
        self._spool = spool
        self._lanes = {name: Lane(sink, lanes[name]) for name, sink in sinks.items()}
        self._retry = tuple(retry)
        self.expire = expire
        self.hold = hold
        # Of sinks that are not in the configuration any more.
        self._former: dict[str, Lane] = {}
        self._bounces = bounces
        self._hostname = hostname
        self._observer = observer
        self._new_id = new_id
        self.clock = clock or Steady().now
        self._wall = wall or clock or time.time
        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle: asyncio.Event = asyncio.Event()
        self._sweeper: asyncio.TimerHandle | None = None
        self._sweeping = False

    # ---------------------------------------------------------------- life

    async def open(self) -> None:
        """Schedule what the spool holds. The spool is open."""
        self._loop = asyncio.get_running_loop()
        self._time = self._loop.time
        self._random = random.Random()
        found = await self._spool.counts()
        totals: dict[str, int] = {}
        for (sink, _state), (rows, _oldest) in found.items():
            totals[sink] = totals.get(sink, 0) + rows
        for sink, rows in sorted(totals.items()):
            if sink not in self._lanes:
                self._observer.event("sink_down", sink=sink, reason=f"{NO_SUCH_SINK}: {rows} messages are kept until it is")
        for lane in self._lanes.values():
            lane.earliest = 0.0
            self._pump(lane)
        self._sweeper = self._loop.call_later(EXPIRY_SWEEP, self._sweep)

    async def close(self, patience: float = 0.0) -> None:
        """Start nothing more and wait up to ``patience`` seconds for the tries that are out."""
        self._closing = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for lane in self._lanes.values():
            if lane.timer is not None:
                lane.timer.cancel()
            self._let_go(lane)
        if any(self.out().values()):
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), patience)
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def kick(self, sink: str | None = None, *, probe: bool = False, resume: bool = False) -> None:
        """Rows were changed by hand: forget what was read ahead and look again. ``probe``: try a
        sink that is down at once; ``resume``: one that is paused, too."""
        for name, lane in self._lanes.items():
            if sink is None or name == sink:
                if resume:
                    lane.paused = False
                if probe:
                    lane.next_probe = 0.0
                    lane.probe_delay = PROBE_FIRST
                lane.busy.difference_update(pending.key for pending in lane.ready)
                lane.ready.clear()
                lane.earliest = 0.0
                lane.dormant = False
                self._pump(lane)

    def go_by(
        self,
        sinks: Mapping[str, Sink],
        lanes: Mapping[str, LaneSettings],
        *,
        retry: Sequence[float],
        expire: float,
        hold: float,
        bounces: str | None,
        hostname: str,
    ) -> None:
        """From now on, as at the beginning. A lane outlives its sink: what is out at the old one is
        settled by it, what starts now goes to the new one. Rows of a sink that is gone are kept."""
        self._retry = tuple(retry)
        self.expire = expire
        self.hold = hold
        self._bounces = bounces
        self._hostname = hostname
        before = self._lanes
        self._lanes = {}
        for name, sink in sinks.items():
            # One that was put away may have deliveries out: the same row must not be tried twice at a time.
            lane = before.pop(name, None) or self._former.pop(name, None)
            if lane is None:
                lane = Lane(sink, lanes[name])
            elif lane.sink is not sink:
                lane.paused = False
                lane.next_probe = 0.0
                lane.probe_delay = PROBE_FIRST
            lane.sink, lane.settings = sink, lanes[name]
            # What the old rate would have had it wait for may be hours.
            lane.slot = min(lane.slot, self._time() + (1.0 / lane.settings.rate if lane.settings.rate else 0.0))
            lane.gone = False
            lane.earliest = 0.0
            lane.dormant = False
            self._lanes[name] = lane
        for name, lane in before.items():
            self._put_away(lane)
            self._former[name] = lane
        for lane in self._lanes.values():
            self._pump(lane)

    def _put_away(self, lane: Lane) -> None:
        """Nothing more of it starts; what is out comes back to it."""
        if lane.timer is not None:
            lane.timer.cancel()
            lane.timer = None
        lane.busy.difference_update(pending.key for pending in lane.ready)
        lane.ready.clear()
        lane.gone = True
        self._let_go(lane)
        self._observer.event("sink_down", sink=lane.sink.name, reason=f"{NO_SUCH_SINK} any more: what it is owed is kept until it is")

    def _let_go(self, lane: Lane) -> None:
        """Whoever waits for a first try waits no more."""
        while lane.waiting:
            first = lane.waiting.popleft()
            # Its client waits for the sink's own word: this is all there is of it.
            first.ticket.settled(first.pending, [INTERRUPTED] * len(first.pending.recipients))
        while lane.hoping:
            _, first = lane.hoping.popitem(last=False)
            first.ticket.untried(first.pending)

    def _tried_by(self, pending: Pending) -> Lane | None:
        """The lane that has its tries in its books, also where its sink is gone by now."""
        return self._lanes.get(pending.sink) or self._former.get(pending.sink)

    def health(self) -> dict[str, str]:
        """``"up"``, ``"down"`` or ``"paused"`` by sink."""
        return {name: "paused" if lane.paused else "down" if lane.down else "up" for name, lane in self._lanes.items()}

    def out(self) -> dict[str, int]:
        """Deliveries out now by sink."""
        return {name: lane.out for name, lane in (self._former | self._lanes).items() if lane.out or name in self._lanes}

    # ----------------------------------------------------------- first tries

    def patience(self, sink: str) -> float:
        """Seconds that a first try of this sink is worth waiting for before the message joins a
        commit group: ``hold``, or 0 where the sink is usually slower (DESIGN §4)."""
        lane = self._lanes.get(sink)
        return 0.0 if lane is None or lane.latency > self.hold else self.hold

    def first_try(self, message: Message, pending: Pending, ticket: Waiting, *, wait: bool = False) -> bool:
        """Try at once or as soon as there is a place: True, and ``ticket.settled`` is called once (maybe before
        this returns), unless ``withdraw`` takes the try back before, or ``ticket.untried`` says that it will not be. False:
        the mail has to be stored first. With ``wait`` the client waits for the sink's own word: the try starts even where
        the sink is thought down."""
        lane = self._lanes.get(pending.sink)
        if lane is None or self._closing:
            return False
        now = self._time()
        if wait:
            if not lane.waiting and lane.room(now):
                lane.charge(now)
                self._start(lane, message, pending, ticket, now)
            else:
                place = next((n for n, first in enumerate(lane.waiting) if first.pending.priority < pending.priority), len(lane.waiting))
                lane.waiting.insert(place, _First(message, pending, ticket))
                self._arm(lane)
            return True
        if lane.waiting or (message.not_before and message.not_before > self.clock()):
            return False
        backlog = bool(lane.ready) or (lane.earliest != NEVER and lane.earliest <= self.clock())
        if backlog or lane.hoping or not lane.free(now):
            if not self._hopeful(lane) or (backlog and pending.priority):
                return False  # by its priority it has its place in the backlog
            lane.hoping[id(pending)] = _First(message, pending, ticket)
            if backlog:
                self._pump(lane)
            return True
        lane.charge(now)
        self._start(lane, message, pending, ticket, now)
        return True

    def _hopeful(self, lane: Lane) -> bool:
        """No place is free for it, and one is likely to be soon enough: a commit saved is worth a moment, and whoever waits for
        us does not send more than the sink takes. What waits for a rate would wait for longer."""
        return not (lane.down or lane.paused or lane.settings.rate) and len(lane.hoping) < HOPING and lane.latency <= self.hold

    def withdraw(self, pending: Pending) -> bool:
        """Take back a first try that still waits for its place; False if it is out already."""
        lane = self._lanes.get(pending.sink)
        if lane is not None:
            if lane.hoping.pop(id(pending), None) is not None:
                return True
            for first in lane.waiting:
                if first.pending is pending:
                    lane.waiting.remove(first)
                    return True
        return False

    def adopt(self, pending: Pending) -> None:
        """A row was stored (``key`` is set) and no try of it is out: schedule it."""
        lane = self._lanes.get(pending.sink)
        if lane is None or pending.state != "queued":
            return
        if self._overtakes(lane, pending):
            lane.hurried += 1
            lane.busy.add(pending.key)
            place = next((n for n, other in enumerate(lane.ready) if other.priority < pending.priority), len(lane.ready))
            lane.ready.insert(place, pending)
            self._pump(lane)
        else:
            self._expect(lane, pending.due, pending.down)

    def _overtakes(self, lane: Lane, pending: Pending) -> bool:
        """It need not wait behind what was read ahead. So many may between two looks at the spool
        that what they overtake is sure of its turn."""
        if lane.down or lane.hurried >= WINDOW or pending.due > self.clock():
            return False
        if lane.refilling:
            return pending.priority > 0
        return bool(lane.ready) and pending.priority > lane.ready[-1].priority

    def resume(self, pending: Pending) -> None:
        """A row was stored while its first try is out: its outcome will be marked."""
        lane = self._tried_by(pending)
        if lane is not None:
            lane.busy.add(pending.key)

    # ------------------------------------------------------------- decisions

    def judge(self, message: Message, pending: Pending, outcomes: Sequence[Outcome]) -> tuple[Sequence[Pending], Sequence[Row]]:
        """What follows from one try: changes ``pending`` to what is still owed (no recipients:
        nothing) and gives back dead letters to keep and notifications to send."""
        recipients = message.envelope.recipients
        rest: list[tuple[int, Outcome]] = []
        relayed: list[tuple[Recipient, Outcome]] = []
        # One outcome for each recipient: ``Delivery.settle`` takes no other number.
        for place, index in enumerate(pending.recipients):
            outcome = outcomes[place]
            if outcome.state != "delivered":
                rest.append((index, outcome))
            elif self._notice(message, recipients[index], outcome):
                relayed.append((recipients[index], outcome))
        pending.attempts += 1
        if not rest and not relayed:
            if pending.recipients:
                pending.recipients = ()
                pending.part += 1
            return (), ()
        now = self.clock()
        expired = now >= pending.expires_at
        delayed = expired and extensions.untold(message, pending.expires_at)
        if delayed:
            pending.expires_at = message.expires_at
            expired = now >= pending.expires_at
        returned = expired and extensions.returned(message, now)
        again: list[tuple[int, Outcome]] = []
        lost: list[tuple[int, Outcome]] = []
        late: list[tuple[int, Outcome]] = []
        delay = 0.0
        down = False
        for index, outcome in rest:
            if outcome.state == "failed":
                lost.append((index, outcome))
            elif returned:
                late.append((index, Outcome("failed", _too_late(outcome.reply), outcome.remote)))
            elif expired:
                # The last answer is told, not hidden behind the expiry (RFC 3464 §2.3.4, 2.3.6).
                lost.append((index, outcome))
            else:
                again.append((index, outcome))
                pending.note = str(outcome.reply)
                down = down or outcome.down
                delay = max(delay, min(outcome.retry_after or 0.0, RETRY_AFTER_LIMIT))
        splits, follow = self._give_up(message, pending, lost, now)
        if late:
            # Who asked for it to come back is told, whatever becomes of other failures of this sink.
            dead, told = self._give_up(message, pending, late, now, bounces=True)
            splits, follow = splits + dead, follow + told
        if delayed and again:
            follow += self._delayed(message, again, now)
        if relayed:
            lane = self._tried_by(pending)
            kind: bounce.Kind = "relayed" if lane is not None and lane.settings.relays else "delivered"
            follow.append(self._report(kind, message, relayed, now))
        if len(again) < len(pending.recipients):
            pending.recipients = tuple(index for index, _outcome in again) if again else ()
            pending.part += 1
        if again:
            own = self._retry[min(pending.attempts, len(self._retry)) - 1]
            pending.due = min(now + max(delay, own * self._random.uniform(0.9, 1.1)), max(pending.expires_at, now + 1.0))
            pending.down = down
        return splits, follow

    def _notice(self, message: Message, recipient: Recipient, outcome: Outcome) -> bool:
        """Do we owe the sender word of this success (RFC 3461 §4.1, NOTIFY=SUCCESS)? Or of a
        relay that has it now, because BY asks for that or the relay knows no BY (RFC 2852)?"""
        if not (outcome.onward or recipient.params) or not message.envelope.mail_from or self._bounces not in self._lanes:
            return False
        if bool(recipient.params) and not outcome.notifies and bounce.wants(recipient, "delivered"):
            return True
        timed = extensions.deadline(message) if outcome.onward else None
        return timed is not None and bounce.traces(recipient) and (timed[1].trace or outcome.onward == "untimed")

    def _delayed(self, message: Message, again: Sequence[tuple[int, Outcome]], now: float) -> list[Row]:
        """BY with mode N is over: its sender is told, and it is tried on (RFC 2852)."""
        recipients = message.envelope.recipients
        told = [(recipients[index], outcome) for index, outcome in again if bounce.awaits(recipients[index])]
        if not told or not message.envelope.mail_from or self._bounces not in self._lanes:
            return []
        return [self._report("delayed", message, told, now)]

    def _give_up(
        self, message: Message, pending: Pending, lost: Sequence[tuple[int, Outcome]], now: float, bounces: bool = False
    ) -> tuple[list[Pending], list[Row]]:
        """Bounce, or keep as a dead letter, or be silent where NOTIFY=NEVER asked for it. ``bounces``:
        whatever ``on_failure`` says."""
        if not lost:
            return [], []
        recipients = message.envelope.recipients
        lane = self._tried_by(pending)
        bounces = (bounces or (lane is not None and lane.settings.on_failure == "bounce")) and self._bounces in self._lanes
        # RFC 5321 §4.5.5: the null reverse-path gets no notification, ever.
        if bounces and message.envelope.mail_from:
            told = [(recipients[index], outcome) for index, outcome in lost if bounce.wants(recipients[index], "failed")]
            if not told:
                return [], []
            return [], [self._report("failed", message, told, now)]
        reason = str(lost[0][1].reply)
        if lost[0][1].state != "failed":
            reason = f"{EXPIRED.text}; last: {reason}"
        self._observer.event("dead", id=message.id, sink=pending.sink, recipients=len(lost), reason=reason)
        dead = Pending(
            message_id=message.id,
            sink=pending.sink,
            recipients=tuple(index for index, _outcome in lost),
            due=now,
            expires_at=pending.expires_at,
            part=pending.part,
            attempts=pending.attempts,
            priority=pending.priority,
            state="dead",
            note=reason,
            message_key=pending.message_key,
        )
        return [dead], []

    def _report(self, kind: bounce.Kind, message: Message, told: Sequence[tuple[Recipient, Outcome]], now: float) -> Row:
        assert self._bounces is not None
        wall = self._wall()
        id = self._new_id(wall)
        redacted = message.envelope.requiretls and not self._lanes[self._bounces].settings.requiretls
        excerpt = b""
        # Its file may be gone: a person dropped it while it was out, or the disk lost it. The news is owed all the same.
        with contextlib.suppress(OSError):
            excerpt = b"".join(islice(message.stored.chunks(max(1, bounce.excerpt_size(message, kind))), 1))
        octets = bounce.report(
            kind,
            message,
            [(recipient, outcome.reply, outcome.remote) for recipient, outcome in told],
            reporting_mta=self._hostname,
            now=wall,
            message_id=f"{id}@{self._hostname}",
            excerpt=excerpt[: bounce.excerpt_size(message, kind)],
            redacted=redacted,
        )
        report = Message(
            id=id,
            envelope=bounce.envelope(message, octets, redacted=redacted),
            stored=Content(octets, eight_bit=not octets.isascii(), header_size=octets.find(b"\r\n\r\n") + 2),
            client=Client(ip=None, helo=self._hostname, protocol="LOCAL"),
            received_at=now,
            priority=message.priority,
            expires_at=now + self.expire,
        )
        self._observer.event("bounced", id=message.id, bounce_id=id, kind=kind, to=message.envelope.mail_from, recipients=len(told))
        return Row(report, [Pending(id, self._bounces, (0,), now, now + self.expire, priority=message.priority)])

    def follow_up(self, rows: Sequence[Row]) -> None:
        """New messages of ours (bounces) were stored: schedule them."""
        for row in rows:
            for pending in row.pendings:
                self.adopt(pending)

    # ----------------------------------------------------------------- tries

    def _start(self, lane: Lane, message: Message, pending: Pending, ticket: Waiting | None, now: float) -> None:
        """``now``: loop time."""
        lane.out += 1
        recipients = message.envelope.recipients
        chosen = recipients if len(pending.recipients) == len(recipients) else [recipients[index] for index in pending.recipients]
        delivery = Delivery(
            pending.delivery_id,
            message,
            chosen,
            pending.sink,
            pending.attempts + 1,
            _Try(self, lane, pending, ticket, now),
            self.clock() - message.received_at,
        )
        self._observer.tell("attempted", {"id": message.id, "delivery": delivery.id, "sink": pending.sink, "attempt": delivery.attempt})
        lane.sink.start(delivery)

    def _settled(
        self, lane: Lane, pending: Pending, ticket: Waiting | None, started: float, delivery: Delivery, outcomes: Sequence[Outcome]
    ) -> None:
        now = self._time()
        lane.out -= 1
        seconds = now - started
        lane.latency += (seconds - lane.latency) * 0.2
        self._tell(delivery, outcomes, seconds)
        self._weigh(lane, outcomes, started, now)
        if ticket is not None:
            ticket.settled(pending, outcomes)
        else:
            self.conclude(delivery.message, pending, outcomes)
        if self._closing:
            self._rest()
        elif lane.waiting or lane.hoping or lane.ready or lane.earliest != NEVER:
            self._pump(lane)

    def _rest(self) -> None:
        """Closing waits for the last place to be free."""
        if not any(self.out().values()):
            self._idle.set()

    def conclude(self, message: Message, pending: Pending, outcomes: Sequence[Outcome]) -> None:
        """A try of a stored row ended: mark what became of it."""
        lane = self._tried_by(pending)
        splits, follow = self.judge(message, pending, outcomes)
        self._spool.mark(Mark(pending, list(splits), list(follow), partial(self._marked, lane, pending, follow, self._time())))

    def _marked(self, lane: Lane | None, pending: Pending, follow: Sequence[Row], ended: float) -> None:
        """``ended``: loop time of what is marked now."""
        if lane is not None:
            if pending.down and not lane.down and ended <= lane.up_since:
                lane.wake_owed = True  # the sink came back meanwhile, and the spool woke what it knew of
            lane.busy.discard(pending.key)
            if lane.looking:
                lane.marked.add(pending.key)
            if pending.recipients and pending.state == "queued":
                self._expect(lane, pending.due, pending.down)
        self.follow_up(follow)

    def _tell(self, delivery: Delivery, outcomes: Sequence[Outcome], seconds: float) -> None:
        first = outcomes[0]
        if len(outcomes) == 1 or all(outcome is first for outcome in outcomes):
            self._tell_one(delivery, first, len(outcomes), seconds)
            return
        groups: list[tuple[Outcome, int]] = []
        for outcome in outcomes:
            for place, (known, count) in enumerate(groups):
                if known.state == outcome.state and known.reply == outcome.reply:
                    groups[place] = (known, count + 1)
                    break
            else:
                groups.append((outcome, 1))
        for outcome, count in groups:
            self._tell_one(delivery, outcome, count, seconds)

    def _tell_one(self, delivery: Delivery, outcome: Outcome, count: int, seconds: float) -> None:
        """``count`` recipients had this outcome."""
        self._observer.tell(
            outcome.state,
            {
                "id": delivery.message.id,
                "delivery": delivery.id,
                "sink": delivery.sink,
                "recipients": count,
                "remote": outcome.remote,
                "reply": str(outcome.reply),
                "attempt": delivery.attempt,
                "seconds": seconds,
            },
        )

    def _weigh(self, lane: Lane, outcomes: Sequence[Outcome], started: float, now: float) -> None:
        """What the outcomes say about the sink as a whole."""
        for outcome in outcomes:
            if not outcome.down and not outcome.pause:
                lane.succeeded = now
                if lane.paused and started < lane.down_since:
                    return  # from before the pause: says nothing about it
                if lane.down:
                    self._up(lane, now)
                elif lane.wake_owed:
                    lane.wake_owed = False
                    self._wake(lane)
                return
        outcome = outcomes[0]
        if outcome.pause:
            if not lane.paused:
                # Whoever ends the pause finds a lane that is down: it probes before all go out.
                lane.paused = lane.down = True
                lane.dormant = False
                lane.down_since = now
                self._observer.event("sink_down", sink=lane.sink.name, reason=f"paused by the far side: {outcome.reply}")
            return
        if lane.down:
            if started < max(lane.down_since, lane.next_probe):
                # No probe: it went out with the others, or was being loaded when the first of them failed.
                self._arm(lane)
                return
        elif lane.succeeded > started:
            # One message that a healthy sink chokes on must not stop the others: a success
            # that came after this try began says that the sink is up.
            lane.wake_owed = lane.wake_owed or started < lane.up_since
            return
        else:
            lane.down = True
            lane.dormant = False
            lane.down_since = now
            lane.probe_delay = PROBE_FIRST
            self._observer.event("sink_down", sink=lane.sink.name, reason=str(outcome.reply))
        wait = max(lane.probe_delay, min(outcome.retry_after or 0.0, RETRY_AFTER_LIMIT))
        lane.next_probe = now + wait * self._random.uniform(0.9, 1.1)
        lane.probe_delay = min(lane.probe_delay * 2, PROBE_LAST)
        self._arm(lane)

    def _up(self, lane: Lane, now: float) -> None:
        lane.down = lane.paused = lane.wake_owed = False
        lane.up_since = now
        lane.probe_delay = PROBE_FIRST
        lane.next_probe = 0.0
        self._observer.event("sink_up", sink=lane.sink.name)
        self._wake(lane)

    def _wake(self, lane: Lane) -> None:
        if self._closing:
            lane.wake_owed = True
        else:
            self._spawn(self._wake_rows(lane))

    async def _wake_rows(self, lane: Lane) -> None:
        try:
            woken = await self._spool.wake(lane.sink.name, self.clock())
        except SpoolError:
            lane.wake_owed = True  # the next success tries again
            return
        if woken:
            self._expect(lane, self.clock())

    # ------------------------------------------------------------- scheduling

    def _expect(self, lane: Lane, due: float, down: bool = False) -> None:
        """A row outside ``busy`` is due at ``due``. ``down``: it can probe the sink before that."""
        if down and lane.dormant:
            lane.dormant = False
            self._arm(lane)
        if due < lane.earliest:
            lane.earliest = due
            if due <= self.clock():
                self._pump(lane)
            else:
                self._arm(lane)

    def _arm(self, lane: Lane) -> None:
        """Wake the lane when something can happen next. Where only an outcome can make room,
        nothing is armed: the outcome pumps."""
        now = self._time()
        if self._closing or lane.gone or lane.out >= lane.settings.concurrency:
            return
        if lane.waiting:
            wait = 0.0  # who waits for the sink's own word is tried whatever is thought of the sink
        elif lane.paused or (lane.down and lane.out):
            return
        elif lane.down:
            wait = lane.next_probe - now
            if lane.dormant:
                if lane.earliest == NEVER:
                    return
                wait = max(wait, lane.earliest - self.clock())
        elif lane.ready:
            wait = 0.0
        elif lane.earliest == NEVER:
            return
        else:
            wait = lane.earliest - self.clock()
        wait = max(wait, lane.slot - now)
        at = now + min(max(wait, 0.01), LONGEST_SLEEP)
        if lane.timer is not None:
            if now < lane.timer.when() <= at + 0.01:
                return
            lane.timer.cancel()
        lane.timer = self._loop.call_at(at, self._timed, lane)

    def _timed(self, lane: Lane) -> None:
        # uvloop may call a moment before `when()`: what has been called is not pending any more.
        lane.timer = None
        self._pump(lane)

    def _read_again(self, lane: Lane) -> None:
        """The spool could not be read: soon again."""
        lane.earliest = min(lane.earliest, self.clock() + READ_AGAIN)
        if lane.down:
            lane.next_probe = max(lane.next_probe, self._time() + READ_AGAIN)
        self._arm(lane)

    def _pump(self, lane: Lane) -> None:
        """Start what can start; ask the spool for more where there is room."""
        if self._closing or lane.gone:
            return
        while lane.waiting and lane.room(now := self._time()):
            first = lane.waiting.popleft()
            lane.charge(now)
            self._start(lane, first.message, first.pending, first.ticket, now)
        while (lane.ready or (lane.hoping and not lane.down)) and lane.free(now := self._time()):
            lane.charge(now)
            # In turn: new mail does not keep the backlog waiting, nor does that send all new mail after it, into the spool.
            lane.fresh = not lane.ready or not (lane.fresh or lane.down or lane.ready[0].priority > 0)
            if lane.fresh and lane.hoping:
                _, first = lane.hoping.popitem(last=False)
                self._start(lane, first.message, first.pending, first.ticket, now)
            else:
                lane.out += 1  # the place is taken while the message is loaded
                self._spawn(self._carry(lane, lane.ready.popleft()))
        if lane.ready:
            self._arm(lane)
            return
        if lane.refilling:
            return
        # Those who hope for a place leave none free: what is due is read ahead all the same, or it would not have its turn.
        if (lane.free(self._time()) or (lane.hoping and not lane.down)) and (lane.down or lane.earliest <= self.clock()):
            lane.refilling = True
            self._spawn(self._refill(lane))
        else:
            self._arm(lane)

    async def _refill(self, lane: Lane) -> None:
        read = False
        try:
            await self._read_due(lane)
            read = True
        except SpoolError:
            pass  # the spool tells why, and mends itself
        finally:
            lane.refilling = False
            if not read:
                self._read_again(lane)
        # A lane that is down and for which nothing waits is probed by the next new message, or by
        # what is due next.
        if read and (lane.ready or not lane.down):
            self._pump(lane)
        elif read:
            self._arm(lane)

    async def _read_due(self, lane: Lane) -> None:
        now = self.clock()
        name = lane.sink.name
        lane.earliest = NEVER
        lane.hurried = 0
        # A probe takes a row that is due, or else one that waits for the sink.
        down = lane.down
        wanted = 1 if down else lane.settings.concurrency + WINDOW
        fresh, more = await self._look(lane, now, wanted + len(lane.busy), down)
        for pending in fresh[:wanted]:
            lane.busy.add(pending.key)
            lane.ready.append(pending)
        if lane.hurried and fresh:
            lane.ready = deque(sorted(lane.ready, key=lambda pending: -pending.priority))
        lane.dormant = down and not lane.ready
        if more or len(fresh) >= wanted:
            lane.earliest = min(lane.earliest, now)
        elif lane.dormant or not down:
            later = await self._spool.next_due(name, now)
            if later is not None:
                lane.earliest = min(lane.earliest, later)

    async def _look(self, lane: Lane, before: float, limit: int, down: bool = False) -> tuple[list[Pending], bool]:
        """Rows that are due and that nobody has in hand, and whether there may be more of them.

        The news of a mark can overtake the answer to a look that came before it: such a row is
        left out, because it is not any more what the look saw."""
        lane.looking += 1
        try:
            found = await self._spool.due(lane.sink.name, before, limit, down)
            return [pending for pending in found if pending.key not in lane.busy and pending.key not in lane.marked], len(found) >= limit
        finally:
            lane.looking -= 1
            if not lane.looking:
                lane.marked.clear()

    async def _carry(self, lane: Lane, pending: Pending) -> None:
        message = None
        read = False
        try:
            message = await self._spool.load(pending)
            read = True
        except SpoolError:
            pass  # as in _refill
        finally:
            lane.out -= 1
            if message is None or self._closing or lane.gone:
                lane.busy.discard(pending.key)
            if self._closing:
                self._rest()
            elif not read:
                self._read_again(lane)
        if self._closing or lane.gone or not read:
            return
        if message is None:
            self._pump(lane)
            return
        now = self.clock()
        over = now >= pending.expires_at and (pending.attempts > 0 or extensions.returned(message, now))
        # What its sender is only told of is tried all the same.
        if over and (now >= message.expires_at or not extensions.untold(message, pending.expires_at)):
            self._expire(message, pending)
            self._pump(lane)
            return
        self._start(lane, message, pending, None, self._time())

    def _expire(self, message: Message, pending: Pending) -> None:
        """Its time is over without another try."""
        last = _last_said(pending) or EXPIRED
        outcome = Outcome("deferred" if last.temporary else "failed", last)
        if not pending.attempts and extensions.returned(message, self.clock()):
            outcome = Outcome("deferred", EXPIRED)
        self._observer.event(
            "failed",
            id=message.id,
            delivery=pending.delivery_id,
            sink=pending.sink,
            recipients=len(pending.recipients),
            remote="",
            reply=str(EXPIRED),
            attempt=pending.attempts,
            seconds=0.0,
        )
        self.conclude(message, pending, [outcome] * len(pending.recipients))

    def _report_delay(self, message: Message, pending: Pending, now: float) -> None:
        """BY with mode N is over, and no try is about to tell what keeps it."""
        outcome = Outcome("deferred", _last_said(pending) or NOT_YET)
        pending.expires_at = message.expires_at
        follow = self._delayed(message, [(index, outcome) for index in pending.recipients], now)
        lane = self._tried_by(pending)
        self._spool.mark(Mark(pending, [], follow, partial(self._marked, lane, pending, follow, self._time())))

    def _sweep(self) -> None:
        """What does not come to its turn is given up in time all the same, or its sender told."""
        self._sweeper = self._loop.call_later(EXPIRY_SWEEP, self._sweep)
        now = self.clock()
        stuck = any(lane.down or lane.paused or lane.ready or lane.earliest <= now for lane in self._lanes.values())
        if stuck and not self._sweeping:
            self._sweeping = True
            self._spawn(self._expire_waiting())

    async def _expire_waiting(self) -> None:
        now = self.clock()
        lanes = list(self._lanes.values())
        try:
            # In hand, and maybe nowhere near their turn.
            claims = [(lane, [pending for pending in lane.ready if pending.expires_at <= now]) for lane in lanes]
            for lane, late in claims:
                if late:
                    lane.ready = deque(pending for pending in lane.ready if pending.expires_at > now)
            await self._end_waiting(claims, now)
            after, more = 0, True
            while more:
                found, after = await self._look_overdue(now, after)
                more = after > 0
                claims = [(lane, [row for row in found if row.sink == lane.sink.name and row.key not in lane.busy]) for lane in lanes]
                for lane, late in claims:
                    lane.busy.update(pending.key for pending in late)
                await self._end_waiting(claims, now)
        except SpoolError:
            pass  # the next sweep looks again
        finally:
            self._sweeping = False

    async def _look_overdue(self, now: float, after: int) -> tuple[list[Pending], int]:
        """As ``_look``, for all lanes."""
        lanes = list(self._lanes.values())
        for lane in lanes:
            lane.looking += 1
        try:
            found, after = await self._spool.overdue(now, after)
            marked = {key for lane in lanes for key in lane.marked}
            return [pending for pending in found if pending.key not in marked], after
        finally:
            for lane in lanes:
                lane.looking -= 1
                if not lane.looking:
                    lane.marked.clear()

    async def _end_waiting(self, claims: Sequence[tuple[Lane, list[Pending]]], now: float) -> None:
        """Rows that are in ``busy`` for this, and whose time was over before their turn came."""
        for lane, late in claims:
            for pending in late:
                message = None
                with contextlib.suppress(SpoolError):
                    message = await self._spool.load(pending)
                if message is None or lane.gone:
                    self._put_back(lane, pending)
                elif extensions.untold(message, pending.expires_at) and now < message.expires_at:
                    self._report_delay(message, pending, now)
                elif lane.down or lane.paused or pending.attempts > 0 or extensions.returned(message, now):
                    self._expire(message, pending)
                else:
                    # Nobody set it a time, and its sink is up: it will have its one try.
                    self._put_back(lane, pending)
            if late:
                self._pump(lane)

    def _put_back(self, lane: Lane, pending: Pending) -> None:
        lane.busy.discard(pending.key)
        self._expect(lane, pending.due, pending.down)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._loop.call_exception_handler({"message": "queue task failed", "exception": error, "task": task})


def _last_said(pending: Pending) -> Reply | None:
    """The reply that its note remembers."""
    code, _, text = pending.note.partition(" ")
    return Reply.untrusted(int(code), text) if code.isdecimal() and len(code) == 3 else None


def _too_late(last: Reply) -> Reply:
    """RFC 2852: what did not arrive in time is undeliverable, 5.4.7, whatever kept it."""
    return EXPIRED if last is EXPIRED else Reply.untrusted(554, f"5.4.7 {EXPIRED.text}; last: {last}")


@mypyc_attr(free_list_len=1)
class _Try:
    """What a delivery settles: the queue's books on it."""

    __slots__ = ("_lane", "_pending", "_queue", "_started", "_ticket")

    def __init__(self, queue: Queue, lane: Lane, pending: Pending, ticket: Waiting | None, started: float) -> None:
        self._queue = queue
        self._lane = lane
        self._pending = pending
        self._ticket = ticket
        self._started = started

    def __call__(self, delivery: Delivery, outcomes: Sequence[Outcome]) -> None:
        self._queue._settled(self._lane, self._pending, self._ticket, self._started, delivery, outcomes)
