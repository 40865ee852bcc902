"""Mail through the real intake, queue and spool, with every file operation written down.

``Life`` is one process' life on a disk that notes what is done to it (and may fail, see
``faulty.Faults``): clients send small and large mail, sinks take it, put it off, refuse it or
are down, a person drops some; checkpoints, free pages and marks come every few milliseconds.
``Ledger`` is what the world outside saw: what was answered, what a sink took, and at which
operation of the log. ``Ledger.judge`` holds against it what a spool gives back after the power
went at some operation.

RFC 5321 §4.2.5: after 250 the mail is ours; after 4yz it must not be delivered.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from unittest import mock

from gateway import intake, queue
from gateway.contracts import DELIVERED, INTERRUPTED, Delivery, Mark, Outcome, Row, Spool, SpoolError, Store, Transaction
from gateway.intake import MailIntake, new_id
from gateway.message import Client, Envelope, Recipient
from gateway.queue import LaneSettings, Queue
from gateway.reply import Reply
from gateway.route import Route
from gateway.spool import engine, sqlite
from gateway.spool.engine import Engine
from gateway.spool.files import Files
from gateway.spool.records import PENDING_WIDTH, SHIFT, DamagedError, unpack_pending
from gateway.spool.sqlite import SqliteSpool
from tests.crash.faulty import Faults, FaultyFiles, FaultyVFS

#: Later than everything, and before it.
NEVER, BEFORE = 1 << 60, -1

LATER = Outcome("deferred", Reply(451, "4.2.0", "later"))
REFUSED = Outcome("failed", Reply(550, "5.1.1", "never"))
DOWN = Outcome("deferred", Reply(451, "4.4.1", "no connection"), down=True)

#: Every operation but the reading of a content file: one that cannot be read is damaged (test_damage.py).
WRITING = frozenset({"open", "write", "sync", "truncate", "delete", "sync_dir", "mkdir"})

#: A content of more octets goes into a file here; the gateway's own limit makes states sixteen times as large.
FILE_LIMIT = 16 * 1024

_NUMBER = re.compile(rb"X-Number: (\d+)\r\n")
_FINAL = re.compile(rb"Final-Recipient: rfc822; *r(\d+)\.(\d+)@")

Pair = tuple[str, int]


@contextlib.contextmanager
def hurried() -> Iterator[None]:
    """What happens every few seconds or megabytes happens every few milliseconds and pages."""
    with contextlib.ExitStack() as stack:
        for module, name, value in (
            (intake, "INLINE_LIMIT", FILE_LIMIT),
            (sqlite, "_WATCH", 0.02),
            (sqlite, "MARK_DELAY", 0.002),
            (engine, "CHECKPOINT_PAGES", 24),
            (engine, "FREE_PAGES", 4),
            (engine, "FREE_PAGES_AT_REST", 2),
            (engine, "VACUUM_STEP", 2),
            (engine, "VACUUM_STEP_AT_REST", 3),
            (queue, "PROBE_FIRST", 0.01),
            (queue, "PROBE_LAST", 0.02),
            (queue, "READ_AGAIN", 0.01),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield


@dataclass
class Mail:
    """One mail, and at which operation what became of it."""

    number: int
    content: bytes
    pairs: frozenset[Pair]
    sent: int
    answered: int = NEVER
    reply: str = ""  # "250", "refused" or "unknown"
    taken: dict[Pair, int] = field(default_factory=dict)
    #: The spool said that this is durably no more owed.
    settled: dict[Pair, int] = field(default_factory=dict)
    #: A bounce for this recipient was taken.
    bounced: dict[int, int] = field(default_factory=dict)
    dropped: int = NEVER


@dataclass
class Found:
    """What a recovered spool owes, by the numbers of the mails."""

    owed: dict[int, set[Pair]] = field(default_factory=dict)
    contents: dict[int, bytes] = field(default_factory=dict)
    bounces: set[tuple[int, int]] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)


@dataclass
class Ledger:
    mails: dict[int, Mail] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)  # by message id
    last: int = 0
    wrong: list[str] = field(default_factory=list)

    def judge(self, found: Found, at: int) -> list[str]:
        """What is wrong with a spool that was recovered after the power went before operation ``at``."""
        wrong = list(found.wrong)
        for number, pairs in found.owed.items():
            mail = self.mails.get(number)
            if mail is None or mail.sent > at:
                wrong.append(f"phantom: {number} was never sent")
                continue
            if found.contents[number] != mail.content:
                wrong.append(f"torn: {number} has {len(found.contents[number])} octets that are not its own")
            if mail.reply == "refused" and mail.answered <= at:
                wrong.append(f"back: {number} was refused")
            if strange := pairs - mail.pairs:
                wrong.append(f"phantom: {number} was never for {sorted(strange)}")
            if again := [pair for pair in pairs if mail.settled.get(pair, NEVER) <= at]:
                wrong.append(f"back: {number} was settled for {sorted(again)}")
        for number, mail in self.mails.items():
            if mail.answered > at or mail.reply != "250" or mail.dropped <= at:
                continue
            owed = found.owed.get(number, set())
            for pair in mail.pairs:
                index = pair[1]
                if pair in owed or mail.taken.get(pair, NEVER) <= at or mail.settled.get(pair, NEVER) == BEFORE:
                    continue
                if (number, index) in found.bounces or mail.bounced.get(index, NEVER) <= at:
                    continue
                wrong.append(f"lost: {number} was acknowledged, and nothing is known of it for {pair}")
        return wrong

    @property
    def acknowledged(self) -> int:
        return sum(mail.reply == "250" for mail in self.mails.values())

    def after(self, found: Found, at: int) -> Ledger:
        """The ledger of the process that starts on this disk: what was before the cut is past, what
        came after it never was. All that was found must be carried, whoever heard of it."""
        past = Ledger({}, dict(self.numbers), self.last)
        for number, mail in self.mails.items():
            if mail.sent > at:
                continue
            owed = found.owed.get(number, set())
            known = mail.reply if mail.answered <= at else "unknown"
            if owed:
                known = "250"
            then = Mail(number, mail.content, mail.pairs, BEFORE, BEFORE, known)
            then.taken = {pair: BEFORE for pair, when in mail.taken.items() if when <= at}
            then.bounced = {index: BEFORE for index, when in mail.bounced.items() if when <= at}
            # A bounce that is owed must arrive; everything else that is not there may not come back.
            then.settled = {
                pair: BEFORE
                for pair in mail.pairs
                if pair not in owed and ((number, pair[1]) not in found.bounces or pair[0] != "out" or mail.taken.get(pair, NEVER) <= at)
            }
            then.dropped = BEFORE if mail.dropped <= at else NEVER
            past.mails[number] = then
        return past


class _Entry:
    """A ticket of the intake, and what it stored."""

    def __init__(self, life: Life, ticket: Store) -> None:
        self._life = life
        self._ticket = ticket
        self._rows: list[Row] = []
        self._late = False

    @property
    def size(self) -> int:
        return self._ticket.size

    def close(self) -> list[Row]:
        # What was committed before may still be told after it.
        self._late = self._life.fatal
        self._rows = self._ticket.close()
        return self._rows

    def stored(self, error: SpoolError | None) -> None:
        if error is None and self._late:
            self._life.ledger.wrong.append("promised after a commit of which nobody knows")
        if error is None:
            self._life.stored(self._rows)
        self._ticket.stored(error)


class _Sink:
    """Takes, puts off, refuses or is down, at once or a little later."""

    carries_binary = True

    def __init__(self, name: str, life: Life) -> None:
        self.name = name
        self._life = life
        self._out: set[Delivery] = set()

    def start(self, delivery: Delivery) -> None:
        chance = self._life.chance
        self._out.add(delivery)
        if chance.random() < 0.2:
            self._settle(delivery)
        else:
            asyncio.get_running_loop().call_later(chance.uniform(0, 0.006), self._settle, delivery)

    def _settle(self, delivery: Delivery) -> None:
        if delivery not in self._out:
            return
        self._out.discard(delivery)
        pick = self._life.chance.random
        if pick() < 0.06:
            outcomes = [DOWN] * len(delivery.recipients)
        else:
            last = LATER if self.name == "bounces" else REFUSED
            outcomes = [DELIVERED if pick() < 0.65 else LATER if pick() < 0.6 else last for _ in delivery.recipients]
        self._life.carried(delivery, outcomes)
        delivery.settle(outcomes)

    async def open(self) -> None: ...

    async def close(self) -> None:
        for delivery in list(self._out):
            self._out.discard(delivery)
            self._life.indexes(delivery)
            delivery.settle([INTERRUPTED] * len(delivery.recipients))


class _Spool:
    """The spool as the queue and the intake see it, and what they asked of it."""

    def __init__(self, spool: SqliteSpool, life: Life) -> None:
        self._spool = spool
        self._life = life

    def __getattr__(self, name: str) -> Any:
        return getattr(self._spool, name)

    def store(self, ticket: Store) -> None:
        self._spool.store(_Entry(self._life, ticket))

    def mark(self, mark: Mark) -> None:
        self._life.marked(mark)
        self._spool.mark(mark)


class Life:
    """One process' life in ``folder``. ``image``: how it found the disk (its files are there already)."""

    def __init__(self, folder: Path, seed: object, ledger: Ledger | None = None, *, faults: Faults | None = None) -> None:
        self.folder = folder
        self.chance = random.Random(str(seed))
        self.ledger = ledger or Ledger()
        self.faults = faults or Faults()
        self.faults.keep = True
        self.fatal = False
        self._name = f"recorded-{os.getpid()}-{id(self)}"
        self._vfs = FaultyVFS(self._name, self.faults)
        self._files = FaultyFiles(self.faults)
        self._indexes: dict[tuple[str, str], set[int]] = {}

    @property
    def now(self) -> int:
        return len(self.faults.log)

    # ------------------------------------------------------------- what the parts tell

    def event(self, name: str, /, **fields: Any) -> None:
        """``contracts.Observer``."""
        self.tell(name, fields)

    def tell(self, event: str, fields: dict[str, Any]) -> None:
        if event in ("bug", "damaged"):
            self.ledger.wrong.append(f"{event}: {fields}")

    def stored(self, rows: Sequence[Row]) -> None:
        for row in rows:
            number = self._number(row.message.id, row.message.stored.read()) if row.message.envelope.mail_from else None
            if number is not None:
                mail = self.ledger.mails[number]
                owed = {(pending.sink, index) for pending in row.pendings for index in pending.recipients}
                for pair in mail.taken.keys() - owed:
                    mail.settled.setdefault(pair, self.now)

    def indexes(self, delivery: Delivery) -> list[int]:
        """Whom of its mail it is for."""
        found = [int(recipient.local.partition(".")[0][1:]) for recipient in delivery.recipients if recipient.local.startswith("r")]
        self._indexes[delivery.message.id, delivery.sink] = set(found)
        return found

    def carried(self, delivery: Delivery, outcomes: Sequence[Outcome]) -> None:
        try:
            content = delivery.message.content
        except FileNotFoundError:
            # A person dropped it while it was out.
            number = self.ledger.numbers.get(delivery.message.id, 0)
            if number not in self.ledger.mails or self.ledger.mails[number].dropped > self.now:
                self.ledger.wrong.append(f"lost: the content of {number} is gone while it is out")
            return
        if not delivery.message.envelope.mail_from:
            if outcomes[0].state == "delivered":
                for index, number in _FINAL.findall(content):
                    if (mail := self.ledger.mails.get(int(number))) is not None:
                        mail.bounced.setdefault(int(index), self.now)
            return
        number = self._number(delivery.message.id, content)
        mail = self.ledger.mails.get(number)
        if mail is None or content != mail.content:
            self.ledger.wrong.append(f"phantom or torn: {number} came to {delivery.sink}")
            return
        if mail.reply == "refused":
            self.ledger.wrong.append(f"back: {number} was refused and came to {delivery.sink}")
        indexes = self.indexes(delivery)
        for index, outcome in zip(indexes, outcomes, strict=True):
            if mail.settled.get((delivery.sink, index), NEVER) <= self.now:
                self.ledger.wrong.append(f"back: {number} was settled and came to {delivery.sink}")
            if outcome.state == "delivered":
                mail.taken.setdefault((delivery.sink, index), self.now)

    def marked(self, mark: Mark) -> None:
        pending = mark.pending
        number = self.ledger.numbers.get(pending.message_id)
        before = self._indexes.get((pending.message_id, pending.sink))
        if number is None or before is None:
            return
        gone = before - set(pending.recipients) - {index for split in mark.splits for index in split.recipients}
        told, mail = mark.synced, self.ledger.mails[number]

        def synced() -> None:
            # The spool says so of marks it could not write, too: those come back as what they were.
            for index in gone:
                mail.settled.setdefault((pending.sink, index), self.now)
            if told is not None:
                told()

        mark.synced = synced

    def _number(self, id: str, content: bytes) -> int:
        found = _NUMBER.search(content)
        number = int(found[1]) if found else 0
        self.ledger.numbers[id] = number
        return number

    # --------------------------------------------------------------------- the story

    async def run(self, mails: int = 24, clients: int = 5) -> int:
        """Sends so many mails; returns where the log ends for the outside: what is done after it is the
        clearing up of this program."""
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.ledger.wrong.append(str(context)))
        try:
            end = await self._session(mails, clients)
            if not self.fatal and self.chance.random() < 0.3:
                # The same disk, ended in order and begun again.
                end = await self._session(mails // 2, clients)
        finally:
            self._vfs.unregister()
        return end

    async def _session(self, mails: int, clients: int) -> int:
        spool = SqliteSpool(self.folder, observer=self, vfs=self._name, files=self._files, minimum_free=0.0, on_fatal=self._on_fatal)
        try:
            await spool.open()
        except SpoolError:
            # It could not start; whoever starts it again finds the disk as it is now.
            self.fatal = True
            return self.now
        sinks = {name: _Sink(name, self) for name in ("app", "out", "bounces")}
        lanes = {name: LaneSettings(4, "bounce" if name == "out" else "dead_letter") for name in sinks}
        seen = cast(Spool, _Spool(spool, self))
        due = Queue(
            seen,
            sinks,
            lanes,
            retry=(0.004, 0.01, 0.03),
            expire=60.0,
            hold=0.002,
            bounces="bounces",
            hostname="mx.example",
            observer=self,
            new_id=new_id,
        )
        taken = MailIntake(due, seen, {}, hostname="mx.example", expire=60.0, observer=self)
        await due.open()
        left = iter(range(mails))
        async with asyncio.timeout(60):
            await asyncio.gather(*(self._client(taken, left) for _ in range(clients)))
            await asyncio.sleep(self.chance.choice((0, 0.01, 0.05)))
            if self.chance.random() < 0.3 and not self.fatal:
                await self._person(spool)
        end = self.now
        drained = self.chance.random() < 0.6
        await taken.close()
        await due.close(0.05)
        for sink in sinks.values():
            await sink.close()
        await spool.close()
        return self.now if drained and not self.fatal else end

    def _on_fatal(self, _reason: str) -> None:
        self.fatal = True

    async def _person(self, spool: SqliteSpool) -> None:
        """Drops a mail, holds another."""
        with contextlib.suppress(SpoolError):
            for row in (await spool.rows(limit=6))[::3]:
                number = self.ledger.numbers.get(row.message_id)
                if row.mail_from and number:
                    mail = self.ledger.mails[number]
                    mail.dropped = min(mail.dropped, self.now)
                    await spool.change([row.message_id], "drop")
            for row in await spool.rows(limit=2):
                await spool.change([row.message_id], "hold")

    async def _client(self, taken: MailIntake, left: Iterator[int]) -> None:
        chance = self.chance
        for _ in left:
            if self.fatal:
                return
            await self._send(taken)
            if chance.random() < 0.5:
                await asyncio.sleep(chance.uniform(0, 0.005))

    async def _send(self, taken: MailIntake) -> None:
        chance = self.chance
        self.ledger.last += 1
        number = self.ledger.last
        size = chance.choice((50, 50, 1000, 1000, 5000, 9000, 15_000, 20_000, 40_000))
        content = b"X-Number: %d\r\n\r\n" % number + chance.randbytes(size // 2).hex().encode() + b"\r\n"
        names = chance.choice((("app",), ("app",), ("out",), ("app", "out")))
        count = chance.choice((1, 1, 1, 3))
        pairs = frozenset((name, index) for name in names for index in range(count))
        mail = self.ledger.mails[number] = Mail(number, content, pairs, self.now)
        people = [Recipient(f"r{index}.{number}@us.example", f"r{index}.{number}", "us.example") for index in range(count)]
        transaction = Transaction(
            1,
            "s",
            "127.0.0.1:25",
            Client("192.0.2.1", 1234, "client.example", "ESMTP"),
            Envelope("a@client.example", {}, people),
            [Route(("*",), names)] * count,
        )
        transaction.size, transaction.header_size = len(content), content.index(b"\r\n\r\n") + 2
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def answer(reply: Reply | Sequence[Reply] | None) -> None:
            mail.answered = self.now
            assert reply is None or isinstance(reply, Reply)
            mail.reply = "unknown" if reply is None else "250" if reply.code == 250 else "refused"
            if reply is not None and reply.code >= 500:
                self.ledger.wrong.append(f"{number} was answered {reply}")
            answered.set_result(None)

        draft = taken.begin(transaction, lambda: None)
        for at in range(0, len(content), 7000):
            draft.write(content[at : at + 7000])
        draft.finish(answer)
        await answered


def recover(folder: Path) -> Found:
    """What the real engine gives back of this disk: opened as a process opens it, every row read and every content summed."""
    found = Found()
    worked = Engine(str(folder), None, Files())
    try:
        opened = worked.open()
    except SpoolError as error:
        found.wrong.append(f"it does not open: {error}")
        return found
    try:
        if opened.damage:
            found.wrong.append(f"damaged: {opened.damage}")
        rows = worked.select(None, None, None, 0, 100_000)
        loaded = worked.load(sorted({key >> SHIFT for key, *_ in rows}))
        ids: dict[int, str] = {}
        for key, columns, id, _meta, _size in rows:
            try:
                pending = unpack_pending(columns[:PENDING_WIDTH], id)
            except DamagedError as error:
                found.wrong.append(f"damaged: {error}")
                continue
            message = loaded[key >> SHIFT].message
            if message is None or pending.note.startswith("damaged"):
                found.wrong.append(f"damaged: {pending.note or loaded[key >> SHIFT].damage}")
                continue
            try:
                content = message.content
            except OSError as error:
                found.wrong.append(f"lost: {error}")
                continue
            if len(content) != message.stored.size or zlib.crc32(content) != loaded[key >> SHIFT].content_sum:
                found.wrong.append(f"torn: {len(content)} octets of {id}, and {message.stored.size} were stored")
                continue
            if not message.envelope.mail_from:
                found.bounces.update((int(number), int(index)) for index, number in _FINAL.findall(content))
                continue
            match = _NUMBER.match(content)
            number = int(match[1]) if match else 0
            if ids.setdefault(number, id) != id:
                found.wrong.append(f"phantom: {number} is there as {id} and as {ids[number]}")
            found.contents[number] = content
            owed = found.owed.setdefault(number, set())
            for index in pending.recipients:
                if (pending.sink, index) in owed:
                    found.wrong.append(f"{number} is owed twice to {pending.sink}")
                owed.add((pending.sink, index))
    finally:
        worked.close()
    return found
