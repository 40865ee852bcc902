"""The embedded spool: SQLite in one folder per worker, with group commit (DESIGN §4, §5).

Owns when a group closes and who is told what; ``engine.py`` does the writing in its thread,
``content.py`` streams large contents. Must not know queues, sinks or sessions: only tickets
(Store), marks and rows.

How a group comes about: tickets and marks gather on the loop. When the writer is idle and a
ticket waits (with as many others as the last group told or left behind, or 2 ms after it), or
the oldest mark is 50 ms old, or many marks wait, the loop closes the group:
it asks every ticket for its rows (``Store.close``) and hands them to the thread, which makes
one transaction of them. What arrives meanwhile is the next group. A message with a content
file has the file and its folder synced first, beside the others, and joins the first group
after that: its row never waits for the disk in front of small mail.

Invariants: ``Store.stored(None)`` only after the sync; keys are set on the loop after it; a
mark for a row that is being written waits for the next group; marks are kept and tried again
until they are durable. No call blocks the loop; callbacks come on the loop and never before
the call returned.

When the store fails (DESIGN §4): an error before the COMMIT, or one whose frames were proven
gone, is ``SpoolError(known=True)`` and the spool is ``unhealthy`` until a small write and sync
succeeds again (tried every second). Otherwise nobody knows: ``SpoolError(known=False)``,
``fatal`` is set for good, ``on_fatal`` is called, and the process must exit so that the next
one recovers; ``store`` refuses and marks are not written any more.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import apsw

from .._parser import crc32
from ..contracts import Mark, Observer, Pending, Row, SpoolError, Store, no_room
from ..message import Message
from .content import Contents, SpoolFile
from .engine import Action, Engine, InUseError, Listed, Loaded, RefusedError, Writer, Written
from .files import Files
from .records import FIRST_SPLIT, SHIFT, Entry, Snapshot

__all__ = ["InUseError", "Listed", "SqliteSpool"]

#: A group closes at this many octets, or tickets.
GROUP_OCTETS = 2 * 2**20
GROUP_TICKETS = 512

#: Seconds after the end of a group for which a ticket waits for those whom it told to come again, and
#: the groups that do not wait after fewer than three quarters came.
COMPANY = 0.002
IMPATIENT = 16

#: Seconds a mark waits for company, marks that need not wait, marks in one group.
MARK_DELAY = 0.05
MARKS_ENOUGH = 256
MARKS_LIMIT = 1024

#: Messages read in one go.
_LOADS = 64

#: Seconds between looks at free room, and between probes of a store that failed.
_WATCH = 1.0

#: A file system with fewer free inodes is full, where ``minimum_free`` is in octets.
_INODES = 1000

_SAFE_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")

_T = TypeVar("_T")


class _Part:
    """One ticket or mark in a group, and who is told in the end."""

    __slots__ = ("entry", "error", "files", "mark", "size", "ticket", "unsynced")

    def __init__(self, size: int, ticket: Store | None, mark: Mark | None) -> None:
        self.entry = Entry()
        self.size = size
        self.ticket = ticket
        self.mark = mark
        self.files: list[SpoolFile] = []
        self.unsynced = 0
        self.error: SpoolError | None = None


class _Marked:
    """A mark that waits; ``change`` is None where the row goes."""

    __slots__ = ("change", "mark", "since", "splits")

    def __init__(self, mark: Mark, since: float, change: Snapshot | None, splits: list[Snapshot]) -> None:
        self.mark = mark
        self.since = since
        self.change = change
        self.splits = splits


class SqliteSpool:
    """``contracts.Spool`` in ``folder`` (made if missing, 0700; one process at a time).

    ``vfs``: the name of a registered apsw VFS, None for SQLite's own. ``files``: all other file
    access. ``minimum_free``: a fraction (below 1) of disk and inodes, or octets; under it the
    spool is ``unhealthy``. ``on_fatal``: called once, on the loop, with the reason. ``engine``: what
    writes, a subclass where a test looks on."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        observer: Observer,
        vfs: str | None = None,
        files: Files | None = None,
        minimum_free: float = 0.05,
        on_fatal: Callable[[str], None] | None = None,
        engine: type[Engine] = Engine,
    ) -> None:
        self.folder = os.path.abspath(folder)
        self.fatal: str | None = None
        self.on_fatal = on_fatal
        self.minimum_free = minimum_free
        #: After ``close``: what stays, as ``counts`` tells it.
        self.left: Mapping[tuple[str, str], tuple[int, float]] = {}
        self._observer = observer
        self._files = files or Files()
        self._engine = engine(self.folder, vfs, self._files)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._writer: Writer | None = None
        self._contents: Contents | None = None
        self._next_key = 1
        self._stores: deque[Store] = deque()
        self._ready: deque[_Part] = deque()
        self._marks: deque[_Marked] = deque()
        # Rows that were given to us and are not durable yet.
        self._writing: set[Pending] = set()
        self._syncing = 0
        self._busy = False
        self._scheduled = False
        # The last group left some behind; so many tickets are worth waiting for, until then (loop
        # time); so many groups wait for nobody, because it was in vain.
        self._full = False
        self._expected = 0
        self._patient_until = 0.0
        self._impatient = 0
        self._company_timer: asyncio.TimerHandle | None = None
        self._mark_timer: asyncio.TimerHandle | None = None
        self._watch_timer: asyncio.TimerHandle | None = None
        self._trouble: str | None = None
        self._shortage: str | None = None
        # Groups since the last look; something was written since the last tidying.
        self._groups = 0
        self._used = False
        self._told_down = False
        self._closing = False
        self._idle: asyncio.Future[None] | None = None
        self._loads: dict[int, list[asyncio.Future[Message | None]]] = {}

    # ------------------------------------------------------------------ opening and closing

    async def open(self) -> None:
        """Raises SpoolError: another process has it (InUseError; its id is in the text), the schema is
        newer, the disk will not have it."""
        self._loop = asyncio.get_running_loop()
        self._writer = Writer("spool-writer")
        try:
            opened = await self._call(self._engine.open)
        except BaseException:
            self._writer.stop()
            self._writer = None
            raise
        self._contents = Contents(self._engine.contents, self._files, self._loop)
        self._next_key = opened.next_key
        if opened.damage:
            self._observer.event("damaged", folder=self.folder, reason=opened.damage)
        if opened.messages or opened.orphans:
            self._observer.event("recovered", messages=opened.messages, orphans=opened.orphans)
        self._look_at_room(await asyncio.to_thread(self._shortage_now))
        self._watch()

    async def close(self) -> None:
        """Writes what waits, then ends; marks that fail now are given up (their deliveries are
        repeated after the next start). Call it after the last store and mark: later ones are
        refused."""
        await self._end(self._engine.close)

    async def remove(self) -> bool:
        """``close``, and take the folder away where nothing is in it; False: something is, or it would not go."""
        return bool(await self._end(self._engine.remove))

    async def _end(self, last: Callable[[], _T]) -> _T | None:
        if self._writer is None or self._closing:
            return None
        self._closing = True
        loop = self._here
        for timer in (self._watch_timer, self._mark_timer, self._company_timer):
            if timer is not None:
                timer.cancel()
        self._idle = loop.create_future()
        self._wake()
        await self._idle
        if self._contents is not None:
            await self._contents.close()
        with suppress(SpoolError):
            self.left = await self._call(self._engine.counts)
        result = await self._call(last)
        self._writer.stop()
        self._writer = None
        return result

    @property
    def _here(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise SpoolError("the spool is not open", known=True)
        return self._loop

    @property
    def unhealthy(self) -> str | None:
        return self.fatal or self._trouble or self._shortage

    @property
    def shortage(self) -> str | None:
        """Why there is too little room; ``unhealthy`` may have a graver reason."""
        return self._shortage

    # -------------------------------------------------------------------------- the contract

    def store(self, ticket: Store) -> None:
        if self.fatal is not None or self._closing or self._writer is None:
            reason = self.fatal or "the spool is closed"
            self._here.call_soon(self._tell, ticket, SpoolError(reason, known=True))
            return
        self._stores.append(ticket)
        self._wake()

    def mark(self, mark: Mark) -> None:
        """Raises ValueError where it cannot be written down; AssertionError for a row that was
        never given to the spool."""
        pending = mark.pending
        assert pending.key or pending in self._writing, f"a mark for {pending.delivery_id} to {pending.sink} before its row was stored"
        change = Snapshot(pending) if pending.recipients else None
        splits = [Snapshot(split) for split in mark.splits]
        if self.fatal is not None or self._closing or self._writer is None:
            return
        self._writing.update(mark.splits)
        for row in mark.follow:
            self._writing.update(row.pendings)
        self._marks.append(_Marked(mark, self._here.time(), change, splits))
        if len(self._marks) >= MARKS_ENOUGH:
            self._wake()
        elif self._mark_timer is None:
            self._mark_timer = self._here.call_later(MARK_DELAY, self._marks_due)

    def file(self, message_id: str) -> SpoolFile:
        if self._contents is None:
            raise SpoolError("the spool is not open", known=True)
        if not _SAFE_NAME.fullmatch(message_id):
            raise ValueError(f"{message_id!r} cannot name a content file")
        return self._contents.new(message_id)

    async def load(self, pending: Pending) -> Message | None:
        """Loads asked for in one turn of the loop are one read. Raises SpoolError when the store
        cannot be read now."""
        future: asyncio.Future[Message | None] = self._here.create_future()
        if not self._loads:
            self._here.call_soon(self._read_messages)
        self._loads.setdefault(pending.message_key, []).append(future)
        return await future

    async def due(self, sink: str, before: float, limit: int, down: bool = False) -> list[Pending]:
        found, damaged = await self._call(self._engine.due, sink, before, limit, down)
        for key, why in damaged:
            self._observer.event("damaged", row=key, sink=sink, reason=why)
        return found

    async def overdue(self, now: float, after: int) -> tuple[list[Pending], int]:
        found, damaged, end = await self._call(self._engine.overdue, now, after)
        for key, why in damaged:
            self._observer.event("damaged", row=key, reason=why)
        return found, end

    async def next_due(self, sink: str, after: float) -> float | None:
        return await self._call(self._engine.next_due, sink, after)

    async def counts(self) -> Mapping[tuple[str, str], tuple[int, float]]:
        return await self._call(self._engine.counts)

    async def wake(self, sink: str, now: float) -> int:
        """A batch at a time, so that groups come in between."""
        total = 0
        while done := await self._call(self._engine.wake, sink, now):
            total += done
        return total

    # ---------------------------------------------------------------------------- for people

    async def rows(
        self, sink: str | None = None, state: str | None = None, message_id: str | None = None, limit: int = 1000
    ) -> list[Listed]:
        """In the order of arrival. ``message_id`` may be a delivery's id."""
        return await self._call(self._engine.listed, sink, state, message_id, limit)

    async def change(
        self, ids: Sequence[str] | None, action: Action, sink: str | None = None, state: str | None = None, *, now: float | None = None
    ) -> int:
        """``retry``: queued and due now, whatever it was (with as much time again if it had
        expired). ``hold``: a queued row waits for a person. ``release``: a held one goes on.
        ``drop``: gone. ``ids`` None: every row of that sink and state. Returns rows changed."""
        total = 0
        moment = time.time() if now is None else now
        groups: list[Sequence[str] | None] = [None] if ids is None else [ids[at : at + 100] for at in range(0, len(ids), 100)]
        for group in groups:
            after = 0
            while True:
                changed, after, files = await self._call(self._engine.change, group, action, sink, state, moment, after)
                total += changed
                if files and self._contents is not None:
                    self._contents.remove(files)
                if not after:
                    break
        return total

    async def export(self, message_id: str) -> bytes:
        """Trace and content. Raises LookupError, and SpoolError for a damaged message."""
        loaded = await self._call(self._engine.find_message, message_id)
        message = None if loaded is None else loaded.message
        if message is None:
            raise SpoolError(f"message {message_id} is damaged: {loaded and loaded.damage}", known=True)
        content = message.stored.read() if message.stored.path is None else await asyncio.to_thread(message.stored.read)
        return message.trace + content

    # --------------------------------------------------------------------------------- groups

    def _wake(self) -> None:
        if not self._busy and not self._scheduled:
            self._scheduled = True
            # Later in this turn: what else arrives in it shares the sync.
            self._here.call_soon(self._close_group)

    def _marks_due(self) -> None:
        self._mark_timer = None
        self._wake()

    def _close_group(self) -> None:
        self._scheduled = False
        if self._busy or self._writer is None or self._waits_for_company():
            return
        parts: list[_Part] = []
        size = 0
        while self._ready and size < GROUP_OCTETS:
            part = self._ready.popleft()
            size += part.size
            parts.append(part)
        while self._stores and len(parts) < GROUP_TICKETS:
            expected = self._stores[0].size
            if parts and size + expected > GROUP_OCTETS:
                break
            if (taken := self._take(self._stores.popleft(), expected)) is not None:
                size += expected
                parts.append(taken)
        if self._marks and (parts or self._marks_are_due()):
            self._gather_marks(parts)
        if not parts:
            self._rest()
            return
        if self._company_timer is not None:
            self._company_timer.cancel()
            self._company_timer = None
        self._full = bool(self._stores)
        self._busy = self._used = True
        self._groups += 1
        engine, loop = self._engine, self._here
        entries = [part.entry for part in parts]

        def work() -> None:
            try:
                written = engine.write(entries)
            except Exception as error:
                text = "".join(traceback.format_exception(error))
                failed = SpoolError(f"the writer failed: {error!r}", known=False)
                engine.fatal = engine.fatal or str(failed)
                loop.call_soon_threadsafe(self._written, parts, Written([failed] * len(parts), [], 0.0, None), text)
            else:
                loop.call_soon_threadsafe(self._written, parts, written, None)

        self._writer.submit(work)

    def _look_for_company(self, told: int) -> None:
        # Where more waits than one group takes, none is made larger by waiting.
        self._expected = 0 if self._full or self._impatient else told + len(self._stores)
        self._impatient = max(0, self._impatient - 1)
        self._patient_until = self._here.time() + COMPANY

    def _waits_for_company(self) -> bool:
        """As many as the last group told, or left behind, are likely to come again at once: one sync
        for all of them costs less than two for a half each."""
        if self._closing or self._ready or not self._stores or len(self._stores) >= self._expected:
            return False
        wait = self._patient_until - self._here.time()
        if wait <= 0.0:
            return False
        if self._company_timer is None:
            self._company_timer = self._here.call_later(wait, self._company_due)
        return True

    def _company_due(self) -> None:
        self._company_timer = None
        if len(self._stores) * 4 < self._expected * 3:
            self._impatient = IMPATIENT
        self._expected = 0
        self._wake()

    def _marks_are_due(self) -> bool:
        if self._trouble is not None and not self._closing:
            # They are tried again when a probe succeeds, or beside a message.
            return False
        if len(self._marks) >= MARKS_ENOUGH or self._closing:
            return True
        wait = self._marks[0].since + MARK_DELAY - self._here.time()
        if wait <= 0.001:
            return True
        if self._mark_timer is None:
            self._mark_timer = self._here.call_later(wait, self._marks_due)
        return False

    def _take(self, ticket: Store, size: int) -> _Part | None:
        """Close one ticket. None: nothing to store (yet)."""
        part = _Part(size, ticket, None)
        try:
            rows = ticket.close()
            if not rows:
                return None
            self._pack(rows, part)
        except Exception as error:
            self._bug("a message could not be written down", error)
            self._here.call_soon(self._fail, part, SpoolError(f"the message could not be written down: {error}", known=True))
            return None
        if not part.files:
            return part
        part.unsynced = len(part.files)
        self._syncing += 1
        for file in part.files:
            file.owned = True
        for row in rows:
            if row.message.stored.path is not None:
                file = self._coming(row.message.stored.path)
                file.sync(row.message.stored.size, partial(self._synced, part))
        return None

    def _pack(self, rows: list[Row], part: _Part) -> None:
        """Into ``part``; files are only named, not synced."""
        for row in rows:
            stored = row.message.stored
            key = self._next_key
            name: str | None = None
            if stored.path is not None:
                file = self._coming(stored.path)
                part.files.append(file)
                name, content_sum = file.name, file.sum
            else:
                content_sum = crc32(stored.read())
            if not row.pendings or len(row.pendings) >= FIRST_SPLIT:
                raise ValueError(f"message {row.message.id} owes {len(row.pendings)} sinks")
            part.entry.add(key, row.message, row.pendings, name, content_sum)
            self._next_key += 1
        for row in rows:
            self._writing.update(row.pendings)

    def _coming(self, path: str) -> SpoolFile:
        file = None if self._contents is None else self._contents.coming(path)
        if file is None:
            raise ValueError(f"{path} is no content file of this spool")
        return file

    def _synced(self, part: _Part, _result: Any, error: Exception | None) -> None:
        if error is not None:
            part.error = SpoolError(f"content file: {error}", known=True, full=no_room(error))
        part.unsynced -= 1
        if part.unsynced:
            return
        self._syncing -= 1
        if part.error is not None:
            self._fail(part, part.error)
            self._set_trouble(str(part.error))
        elif self.fatal is not None:
            self._fail(part, SpoolError(self.fatal, known=True))
        else:
            self._ready.append(part)
        self._wake()

    def _gather_marks(self, parts: list[_Part]) -> None:
        waiting: list[_Marked] = []
        for _ in range(min(len(self._marks), MARKS_LIMIT)):
            marked = self._marks.popleft()
            if marked.mark.pending.key:
                if (part := self._pack_mark(marked)) is not None:
                    parts.append(part)
            elif marked.mark.pending in self._writing:
                waiting.append(marked)
            else:
                # Its row was refused: the client still has the message, nothing may come of it.
                self._forget_mark(marked.mark)
        self._marks.extendleft(reversed(waiting))

    def _pack_mark(self, marked: _Marked) -> _Part | None:
        mark = marked.mark
        part = _Part(0, None, mark)
        entry = part.entry
        try:
            if mark.follow:
                self._pack(mark.follow, part)
                if part.files:
                    raise ValueError("a message that follows from another has its content in memory")
        except Exception as error:
            self._bug(f"the outcome of {mark.pending.delivery_id} could not be written down", error)
            self._forget_mark(mark)
            return None
        entry.changes.append((mark.pending.key, marked.change))
        entry.splits = [(mark.pending.message_key, split) for split in marked.splits]
        return part

    def _forget_mark(self, mark: Mark) -> None:
        self._writing.difference_update(mark.splits)
        for row in mark.follow:
            self._writing.difference_update(row.pendings)
        if mark.synced is not None:
            self._here.call_soon(self._safely, mark.synced)

    # ------------------------------------------------------------------------------- outcomes

    def _written(self, parts: list[_Part], written: Written, bug: str | None) -> None:
        self._busy = False
        self._look_for_company(sum(part.ticket is not None for part in parts))
        if bug is not None:
            self._observer.event("bug", message="the spool's writer failed", traceback=bug)
        if self._engine.fatal is not None:
            self._set_fatal(self._engine.fatal)
        if written.files and self._contents is not None:
            self._contents.remove(written.files)
        stored = 0
        again: list[_Marked] = []
        trouble = written.trouble
        for part, error in zip(parts, written.errors, strict=True):
            if error is None:
                stored += len(part.entry.messages)
                self._succeed(part)
            elif part.mark is not None:
                if isinstance(error, RefusedError):
                    self._bug(f"the outcome of {part.mark.pending.delivery_id} was refused", error)
                    self._forget_mark(part.mark)
                else:
                    trouble = str(error)
                    again.append(self._marked_again(part))
            else:
                if isinstance(error, RefusedError):
                    self._bug("a message was refused", error)
                    error = SpoolError(f"the message was refused: {error}", known=True)
                else:
                    trouble = str(error)
                assert isinstance(error, SpoolError)
                self._fail(part, error)
        if self.fatal is None and not self._closing:
            self._marks.extendleft(reversed(again))
        if trouble is not None:
            self._set_trouble(trouble)
        elif self._trouble is not None and stored:
            self._clear_trouble()
        if stored:
            self._observer.tell("committed", {"count": stored, "seconds": written.seconds})
        # What can be read now is read first, and shares the next sync.
        self._wake()

    def _marked_again(self, part: _Part) -> _Marked:
        assert part.mark is not None
        (_, change), *_ = part.entry.changes
        return _Marked(part.mark, self._here.time(), change, [snapshot for _, snapshot in part.entry.splits])

    def _succeed(self, part: _Part) -> None:
        for pending, key in part.entry.owners:
            pending.key = key
            pending.message_key = key >> SHIFT
            self._writing.discard(pending)
        for file in part.files:
            if self._contents is not None:
                self._contents.forget(file)
        if part.ticket is not None:
            self._tell(part.ticket, None)
        mark = part.mark
        if mark is not None:
            for pending, key in zip(mark.splits, part.entry.split_keys, strict=True):
                pending.key = key
                pending.message_key = mark.pending.message_key
                self._writing.discard(pending)
            if mark.synced is not None:
                self._safely(mark.synced)

    def _fail(self, part: _Part, error: SpoolError) -> None:
        for pending, _ in part.entry.owners:
            self._writing.discard(pending)
        if error.known:
            for file in part.files:
                file.owned = False
        if part.ticket is not None:
            self._tell(part.ticket, error)

    def _tell(self, ticket: Store, error: SpoolError | None) -> None:
        self._safely(ticket.stored, error)

    def _safely(self, callback: Callable[..., None], *args: Any) -> None:
        """Somebody else's code must not stop the others from being told."""
        try:
            callback(*args)
        except Exception as error:
            self._bug("a callback of the spool failed", error)

    def _bug(self, message: str, error: BaseException) -> None:
        self._observer.event("bug", message=f"{message}: {error}", traceback="".join(traceback.format_exception(error)))

    def _rest(self) -> None:
        """Nothing can be written now."""
        if self._idle is not None and not self._idle.done() and not self._syncing:
            self._idle.set_result(None)

    # --------------------------------------------------------------------------------- health

    def _set_fatal(self, reason: str) -> None:
        if self.fatal is not None:
            return
        self.fatal = reason
        self._told_down = True
        self._observer.event("spool_down", reason=reason, fatal=True)
        error = SpoolError(reason, known=True)
        # These were never written: that is known.
        for part in self._ready:
            self._here.call_soon(self._fail, part, error)
        for ticket in self._stores:
            self._here.call_soon(self._tell, ticket, error)
        self._ready.clear()
        self._stores.clear()
        self._marks.clear()
        if self.on_fatal is not None:
            self._here.call_soon(self._safely, self.on_fatal, reason)

    def _set_trouble(self, reason: str) -> None:
        if self.fatal is None:
            self._trouble = reason
            self._tell_health()

    def _clear_trouble(self) -> None:
        self._trouble = None
        self._tell_health()
        self._wake()

    def _tell_health(self) -> None:
        reason = self.unhealthy
        if reason is not None and not self._told_down:
            self._observer.event("spool_down", reason=reason, fatal=False)
        elif reason is None and self._told_down:
            self._observer.event("spool_up")
        self._told_down = reason is not None

    def _watch(self) -> None:
        """Every second: room on the disk; a probe after a failure; tidying after work."""
        if self._closing or self._contents is None or self.fatal is not None:
            return
        self._watch_timer = self._here.call_later(_WATCH, self._watch)
        self._contents.run(self._shortage_now, self._room_told)
        groups, self._groups = self._groups, 0
        if self._busy:
            return
        if self._trouble is not None:
            self._job(self._engine.probe, self._probed)
        elif self._used and not groups:
            self._used = False
            self._job(self._engine.tidy, self._tidied)

    def _probed(self, _result: Any, error: Exception | None) -> None:
        if self._engine.fatal is not None:
            self._set_fatal(self._engine.fatal)
        elif error is not None:
            self._set_trouble(str(error))
        elif self._trouble is not None:
            self._clear_trouble()

    def _tidied(self, more: Any, error: Exception | None) -> None:
        if self._engine.fatal is not None:
            self._set_fatal(self._engine.fatal)
        elif error is not None:
            self._set_trouble(str(error))
        elif more:
            self._used = True

    def _shortage_now(self) -> str | None:
        try:
            found = self._files.statvfs(self.folder)
        except OSError as error:
            return f"the disk of the spool cannot be asked: {error}"
        octets = inodes = self.minimum_free
        if self.minimum_free < 1:
            octets, inodes = self.minimum_free * found.f_blocks * found.f_frsize, self.minimum_free * found.f_files
        else:
            inodes = float(_INODES)
        if found.f_bavail * found.f_frsize < octets:
            return f"{found.f_bavail * found.f_frsize >> 20} MiB of disk are free for the spool, {int(octets) >> 20} MiB must be"
        # Some file systems make inodes as they need them, and say 0.
        if found.f_files and found.f_favail < inodes:
            return f"{found.f_favail} inodes are free for the spool, {int(inodes)} must be"
        return None

    def _room_told(self, shortage: Any, error: Exception | None) -> None:
        self._look_at_room(shortage if error is None else str(error))

    def _look_at_room(self, shortage: str | None) -> None:
        self._shortage = shortage
        self._tell_health()

    # ---------------------------------------------------------------------------------- reads

    def _job(self, work: Callable[[], _T], done: Callable[[Any, Exception | None], None]) -> None:
        """In the writer's thread, between groups; ``done(result, error)`` on the loop."""
        writer, loop = self._writer, self._here
        if writer is None:
            loop.call_soon(done, None, SpoolError("the spool is closed", known=True))
            return

        def told(result: Any, error: Exception | None) -> None:
            done(result, error)
            if self._engine.fatal is not None and self._contents is not None:
                self._set_fatal(self._engine.fatal)

        def run() -> None:
            # One call: with the first the last job may be over, and the loop with it.
            try:
                result = work()
            except Exception as error:
                if isinstance(error, (apsw.CorruptError, apsw.NotADBError)):
                    self._engine.suspect(error)
                loop.call_soon_threadsafe(told, None, _as_spool_error(error))
            else:
                loop.call_soon_threadsafe(told, result, None)

        writer.submit(run)

    async def _call(self, work: Callable[..., _T], *args: Any) -> _T:
        future: asyncio.Future[_T] = self._here.create_future()

        def done(result: Any, error: Exception | None) -> None:
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._job(lambda: work(*args), done)
        return await future

    def _read_messages(self) -> None:
        loads, self._loads = self._loads, {}
        keys = list(loads)
        for at in range(0, len(keys), _LOADS):
            some = {key: loads[key] for key in keys[at : at + _LOADS]}
            self._job(partial(self._engine.load, list(some)), partial(self._read, some))

    def _read(self, loads: dict[int, list[asyncio.Future[Message | None]]], found: Any, error: Exception | None) -> None:
        for key, futures in loads.items():
            loaded: Loaded | None = None if error is not None else found.get(key)
            if error is not None:
                _resolve(futures, None, error)
            elif loaded is None:
                _resolve(futures, None, None)
            elif loaded.message is not None and loaded.message.stored.path is not None and self._contents is not None:
                stored = loaded.message.stored
                check = partial(self._contents.check, loaded.message.stored.path, stored.size, loaded.content_sum)
                self._contents.run(check, partial(self._checked, key, loaded.message, futures))
            else:
                self._checked(key, loaded.message, futures, loaded.damage, None)

    def _checked(
        self, key: int, message: Message | None, futures: list[asyncio.Future[Message | None]], damage: Any, error: Exception | None
    ) -> None:
        if damage is None:
            _resolve(futures, message, None if error is None else _as_spool_error(error))
            return

        def aside(owed: Any, failed: Exception | None) -> None:
            if owed or failed is not None:
                self._observer.event("damaged", id=None if message is None else message.id, row=key, reason=damage)
            _resolve(futures, None, failed)

        # Before anybody asks what is due again.
        self._job(partial(self._engine.set_message_aside, key, damage), aside)


def _resolve(futures: list[asyncio.Future[Message | None]], message: Message | None, error: Exception | None) -> None:
    for future in futures:
        if future.done():
            continue
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(message)


def _as_spool_error(error: Exception) -> Exception:
    """What the disk did is a SpoolError; anything else is what it is."""
    if isinstance(error, (apsw.Error, OSError)):
        return SpoolError(f"{type(error).__name__}: {error}", known=True)
    return error
