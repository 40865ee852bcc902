"""The writer thread's side of the embedded spool: one SQLite connection and what is done with it.

Owns the database file, its lock, its transactions, checkpoints and free pages. Every method
runs in the one writer thread (``Writer``), one after the other; the loop's side is
``sqlite.py``. Knows nothing of tickets, deliveries or the loop.

Invariants:
- WAL, ``synchronous=FULL``: a commit is synced before it is told (DESIGN §4).
- What a COMMIT that failed had written is cut off and the cut synced before anybody hears of
  it as "known"; when that fails too, nothing is written any more (``fatal``).
- Whatever an earlier process left in the WAL is moved into the database and synced before
  the first commit: its pages may sit in the kernel's cache as clean and yet be on no disk.
- A database that SQLite finds damaged is read out (``salvage.py``) into a new one when it is
  opened, and kept beside it; what is damaged while it works ends the process for that.
- Values that are read are of any type, however they are declared: what is damaged may be anything
  (and compiled, a cast to a tuple of types is a test of each).
- The GIL is taken as seldom as can be: many rows to a statement, since each return from
  SQLite waits for the loop's thread to let go of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, cast

import apsw
import orjson
from mypy_extensions import mypyc_attr

from ..contracts import Pending, SpoolError, no_room
from ..message import Message
from .files import Files
from .records import (
    APPLICATION_ID,
    CONTENT_SUM,
    FIRST_SPLIT,
    MESSAGE_COLUMNS,
    MESSAGE_READ,
    MESSAGE_WIDTH,
    NUMBERS,
    PENDING_COLUMNS,
    PENDING_READ,
    PENDING_WIDTH,
    SCHEMA,
    SHIFT,
    UPGRADES,
    VERSION,
    Columns,
    DamagedError,
    Entry,
    Snapshot,
    Value,
    text,
    unpack_message,
    unpack_pending,
)
from .salvage import Salvaged, cut_short, salvage, scan_wal

PAGE_SIZE = 8192

#: Pages written since the last checkpoint that call for one: the WAL stays near 16 MiB.
CHECKPOINT_PAGES = 2000

#: Free pages that are kept for reuse: beyond the first number they are given back while the
#: spool works, a few with each group, beyond the second when it rests.
FREE_PAGES = 8192
FREE_PAGES_AT_REST = 1024
VACUUM_STEP = 32
VACUUM_STEP_AT_REST = 1024

#: A database up to this many octets is checked whole when it is opened; a larger one only as
#: it is read, so that a restart never waits for gigabytes.
CHECK_LIMIT = 64 * 2**20

#: Rows per statement; each number is one prepared statement.
SIZES = (64, 32, 16, 8, 4, 2, 1)

#: Rows a person's command or a wake changes in one transaction.
BATCH = 1000
#: Rows that are walked at once in search of what is overdue: a few milliseconds.
SLICE = 4096

Action = Literal["retry", "hold", "release", "drop"]

DATABASE = "spool.db"
CONTENTS = "content"
LOCK = "lock"

#: Beside the database: what was salvaged, while it is written and when it is whole; and the note
#: that it must be looked at whole when it is opened again.
SALVAGING = "spool.db.salvaging"
SALVAGED = "spool.db.salvaged"
SUSPECT = "suspect"

_DAMAGE = (apsw.CorruptError, apsw.NotADBError)


@mypyc_attr(native_class=False)
class RefusedError(Exception):
    """This entry can never be stored, whatever the disk does."""


@mypyc_attr(native_class=False)
class InUseError(SpoolError):
    """Another process has this spool."""


@dataclass
class Written:
    """What became of a group: an error (or None) per entry, content files whose message is
    gone, how long it took; ``trouble``: all was stored, but the checkpoint after it failed."""

    errors: list[Exception | None]
    files: list[str]
    seconds: float
    trouble: str | None


@dataclass
class Opened:
    next_key: int
    messages: int
    counts: dict[tuple[str, str], int]
    orphans: int
    damage: str | None


@dataclass
class Listed:
    """One row for a person. ``id``: the delivery's, ``message_id``: the message's. ``not_before``:
    its sender wants it held until then, 0 for no such wish."""

    id: str
    message_id: str
    sink: str
    state: str
    recipients: list[str]
    mail_from: str
    size: int
    attempts: int
    due: float
    received_at: float
    expires_at: float
    note: str
    priority: int = 0
    not_before: float = 0.0


@dataclass
class Loaded:
    """``content_sum`` is to be held against the file where the content lies in one."""

    message: Message | None
    content_sum: int = 0
    damage: str | None = None


def _rows(width: int, count: int) -> str:
    row = "(" + ",".join("?" * width) + ")"
    return ",".join([row] * count)


_INSERT_MESSAGES = {size: f"INSERT INTO messages ({MESSAGE_COLUMNS}) VALUES {_rows(MESSAGE_WIDTH, size)}" for size in SIZES}
_INSERT_PENDINGS = {size: f"INSERT INTO pendings ({PENDING_COLUMNS}) VALUES {_rows(PENDING_WIDTH, size)}" for size in SIZES}

# A row that a person holds stays held until a person releases it, whatever its delivery came to.
_UPDATE_PENDINGS = {
    size: f"""
UPDATE pendings SET sink = v.column2,
  state = CASE WHEN coalesce(person, 1) AND v.column3 = 'queued' THEN 'held' ELSE v.column3 END,
  person = coalesce(person, 1) AND v.column3 <> 'dead',
  priority = v.column4, due = v.column5, expires_at = v.column6, part = v.column7, attempts = v.column8, down = v.column9,
  recipients = v.column11, note = v.column12, sum = v.column13
FROM (VALUES {_rows(PENDING_WIDTH, size)}) AS v WHERE pendings.key = v.column1"""
    for size in SIZES
}

_KEYS = "(SELECT value FROM json_each(?))"
_TALLY = f"SELECT CAST(sink AS BLOB), CAST(state AS BLOB), count(*), min(key) FROM pendings WHERE key IN {_KEYS} GROUP BY sink, state"
_SURVEY = f"""
SELECT CAST(sink AS BLOB), CAST(state AS BLOB), count(*), min(key), sum(key & {NUMBERS} > 0) FROM pendings GROUP BY sink, state"""
_DELETE_PENDINGS = f"DELETE FROM pendings WHERE key IN {_KEYS}"
_WITHOUT_PENDINGS = f"""key IN {_KEYS}
  AND NOT EXISTS (SELECT 1 FROM pendings WHERE key BETWEEN messages.key << {SHIFT} AND (messages.key << {SHIFT}) | {NUMBERS})"""
_FILES_OF_SETTLED = f"SELECT CAST(file AS BLOB) FROM messages WHERE file IS NOT NULL AND {_WITHOUT_PENDINGS}"
_DELETE_SETTLED = f"DELETE FROM messages WHERE {_WITHOUT_PENDINGS}"

_DUE = f"""
SELECT {PENDING_READ}, (SELECT CAST(id AS BLOB) FROM messages WHERE key = p.key >> {SHIFT}) FROM pendings AS p
WHERE sink = ? AND state = 'queued' AND priority = ? AND due <= ? ORDER BY due LIMIT ?"""
_DOWN = f"""
SELECT {PENDING_READ}, (SELECT CAST(id AS BLOB) FROM messages WHERE key = p.key >> {SHIFT}) FROM pendings AS p INDEXED BY pendings_down
WHERE sink = ? AND state = 'queued' AND down = 1 AND due > ? LIMIT ?"""
_SLICE = "SELECT max(key) FROM (SELECT key FROM pendings NOT INDEXED WHERE key > ? ORDER BY key LIMIT ?)"
_OVERDUE = f"""
SELECT {PENDING_READ}, (SELECT CAST(id AS BLOB) FROM messages WHERE key = p.key >> {SHIFT}) FROM pendings AS p NOT INDEXED
WHERE key > ? AND key <= ? AND state = 'queued' AND expires_at <= ? ORDER BY key"""
#: Of so many rows that are read at once one is sure for each priority that waits (there may be 19).
SHARE = 32
_NEXT_PRIORITY = "SELECT max(priority) FROM pendings WHERE sink = ? AND state = 'queued' AND priority < ?"
_NEXT_DUE = "SELECT min(due) FROM pendings WHERE sink = ? AND state = 'queued' AND priority = ? AND due > ?"


class Writer:
    """The one thread that touches the database: runs what it is given, in order."""

    def __init__(self, name: str) -> None:
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, work: Callable[[], None]) -> None:
        """``work`` raises nothing."""
        self._todo.put(work)

    def stop(self) -> None:
        """Ends after what was submitted; does not wait."""
        self._todo.put(None)

    def _run(self) -> None:
        while (work := self._todo.get()) is not None:
            work()


@mypyc_attr(allow_interpreted_subclasses=True)
class Engine:
    """See the module. ``fatal`` is set once and for all when nobody knows what the last
    commit left behind: the process must exit, the next one recovers."""

    def __init__(self, folder: str, vfs: str | None, files: Files) -> None:
        self.folder = folder
        self.contents = os.path.join(folder, CONTENTS)
        self.fatal: str | None = None
        self._vfs = vfs
        self._files = files
        self._path = os.path.join(folder, DATABASE)
        self._lock: int | None = None
        self._db: apsw.Connection | None = None
        self._cursor: apsw.Cursor | None = None
        self._page_size = PAGE_SIZE
        self._settled = False
        self._pages_at_checkpoint = 0
        self._excess = 0
        self._file_count = 0
        self._next_split = FIRST_SPLIT
        self._tally: dict[tuple[str, str], int] = {}
        # No row of this sink and state has a lower key.
        self._floor: dict[tuple[str, str], int] = {}

    # ------------------------------------------------------------------ opening and closing

    def open(self) -> Opened:
        """Raises SpoolError with the way out in its text."""
        try:
            self._take_lock()
            try:
                return self._open()
            except BaseException:
                self.abandon()
                raise
        except SpoolError:
            raise
        except (apsw.Error, OSError) as error:
            raise SpoolError(f"spool {self.folder} cannot be opened: {_words(error)}", known=True) from error

    def _take_lock(self) -> None:
        lock = self._locked()
        while not self._named(lock):
            # Who had it took the whole folder away, because it was empty.
            self._files.close(lock)
            lock = self._locked()
        self._lock = lock

    def _named(self, lock: int) -> bool:
        """The file that we locked is the one that others would lock."""
        try:
            found, ours = self._files.stat(os.path.join(self.folder, LOCK)), os.fstat(lock)
        except FileNotFoundError:
            return False
        return (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)

    def _locked(self) -> int:
        missing = []
        parent = self.folder
        while not os.path.isdir(parent):
            missing.append(parent)
            parent = os.path.dirname(parent) or "."
        for folder in reversed(missing):
            self._files.mkdir(folder)
            self._files.fsync_dir(os.path.dirname(folder) or ".")
        self._files.mkdir(self.folder)
        lock = self._files.open(os.path.join(self.folder, LOCK), os.O_RDWR | os.O_CREAT)
        try:
            if not self._files.lock(lock):
                owner = self._files.read(lock, 32).decode("ascii", "replace").strip()
                raise InUseError(
                    f"spool {self.folder} is in use by process {owner or '(unknown)'}: stop that process, or give this one another spool.path",
                    known=True,
                )
            with contextlib.suppress(OSError):
                # For people only: a full disk must not keep us from delivering.
                self._files.truncate(lock, 0)
                self._files.write(lock, [b"%d\n" % os.getpid()])
        except BaseException:
            self._files.close(lock)
            raise
        return lock

    def _open(self) -> Opened:
        self._files.mkdir(self.contents)
        self._put_in_place()
        try:
            opened = self._open_database()
        except (*_DAMAGE, apsw.ConstraintError) as error:
            # What no table takes back was never stored so: a value of another type than its column's.
            return self._open_salvaged(_words(error))
        if opened is None:
            return self._open_salvaged("the WAL is damaged in its middle")
        if opened.damage is not None and self._settled:
            with contextlib.suppress(apsw.Error, OSError):
                if self._faults():
                    return self._open_salvaged(opened.damage)
        with contextlib.suppress(OSError):
            self._files.unlink(os.path.join(self.folder, SUSPECT))
        return opened

    def _open_database(self) -> Opened | None:
        """None: SQLite read only a part of the WAL, and the rest was worth something."""
        # The WAL takes its mode from the database: made here, it is 0600 whatever the umask.
        self._files.close(self._files.open(self._path, os.O_RDWR | os.O_CREAT))
        self._connect()
        self._files.fsync_dir(self.folder)
        frames, _ = self._database.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
        if cut_short(scan_wal(f"{self._path}-wal", self._files), max(0, frames)):
            return None
        try:
            self._settle()
        except _DAMAGE:
            raise
        except apsw.Error:
            # A full disk, say: rows can be read; writing waits until this has come to pass.
            self._settled = False
        damage = self._check()
        opened = self._survey()
        opened.damage = damage
        return opened

    # ------------------------------------------------------------------------------- damage

    def _open_salvaged(self, why: str) -> Opened:
        """Read out what can be read, put a new database in the place of the old, and open that."""
        if self._db is not None:
            # The WAL stays as it is: what SQLite would not read of it is read now.
            self._db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            self._db.close(True)
            self._db = self._cursor = None
        self._settled = False
        now = time.time()
        found = salvage(self._path, self._files, now)
        self._write_salvaged(found)
        kept = self._put_in_place()
        opened = self._open_database()
        if opened is None:
            raise SpoolError(f"spool {self.folder}: what was salvaged cannot be read", known=True)
        opened.damage = (
            f"{why}; {len(found.messages)} messages were read out of it, {found.aside} of what they owe is held as damaged, {found.unread}"
            f" rows and {found.pages} pages could not be read; what was there is kept as {kept}"
        )
        with contextlib.suppress(OSError):
            self._files.unlink(os.path.join(self.folder, SUSPECT))
        return opened

    def _write_salvaged(self, found: Salvaged) -> None:
        """``SALVAGED`` is there, whole and synced."""
        path = os.path.join(self.folder, SALVAGING)
        with contextlib.suppress(FileNotFoundError):
            self._files.unlink(path)
        self._files.close(self._files.open(path, os.O_RDWR | os.O_CREAT))
        db = apsw.Connection(path, vfs=self._vfs)
        try:
            for pragma in (f"page_size = {PAGE_SIZE}", "auto_vacuum = INCREMENTAL", "journal_mode = OFF", "synchronous = FULL"):
                db.execute(f"PRAGMA {pragma}").fetchall()
            db.execute(f"BEGIN; {SCHEMA} PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION}")
            db.executemany(_INSERT_MESSAGES[1], found.messages)
            db.executemany(_INSERT_PENDINGS[1], found.pendings)
            db.execute("COMMIT")
        finally:
            db.close(True)
        descriptor = self._files.open(path, os.O_RDWR)
        try:
            self._files.fsync(descriptor)
        finally:
            self._files.close(descriptor)
        kept = {row[4] for row in found.messages}
        for name in self._files.names(self.contents):
            if name not in kept:
                # Maybe the content of a message that could not be read: no orphan to be removed.
                self._files.rename(os.path.join(self.contents, name), os.path.join(self.folder, f"damaged-content-{name}"))
        self._files.rename(path, os.path.join(self.folder, SALVAGED))
        self._files.fsync_dir(self.folder)

    def _put_in_place(self) -> str:
        """Where something was salvaged: the old database goes aside, the new one takes its place. Can be
        broken off at any step and begun again. Returns the name of the old one."""
        salvaged = os.path.join(self.folder, SALVAGED)
        names = set(self._files.names(self.folder))
        if SALVAGED not in names:
            return ""
        number = 1
        # The WAL goes first: its name is free only where this was not begun before.
        while f"damaged-{number}.db" in names or (f"damaged-{number}.db-wal" in names and f"{DATABASE}-wal" in names):
            number += 1
        aside = os.path.join(self.folder, f"damaged-{number}.db")
        if f"{DATABASE}-wal" in names:
            self._files.rename(f"{self._path}-wal", f"{aside}-wal")
        if DATABASE in names:
            self._files.rename(self._path, aside)
        self._files.rename(salvaged, self._path)
        self._files.fsync_dir(self.folder)
        return os.path.basename(aside)

    def suspect(self, error: Exception) -> None:
        """Something was read that is not what was written. Nothing is written any more: the next
        process looks at all of it, and salvages what can be."""
        if self.fatal is None:
            self.fatal = f"the database is damaged: {_words(error)}"
            with contextlib.suppress(OSError):
                self._files.close(self._files.open(os.path.join(self.folder, SUSPECT), os.O_WRONLY | os.O_CREAT))

    def _connect(self) -> None:
        db = apsw.Connection(self._path, vfs=self._vfs)
        self._db = db
        self._cursor = db.cursor()
        # Before the first access: so the index of the WAL lies in memory, and no shm file is made.
        self._pragma("locking_mode = EXCLUSIVE")
        new = self._identify()
        if new:
            # An existing file has them; to ask again would write to it, even on a full disk.
            self._pragma(f"page_size = {PAGE_SIZE}")
            self._pragma("auto_vacuum = INCREMENTAL")
        if self._pragma("journal_mode = WAL") != [("wal",)]:
            raise SpoolError(f"spool {self.folder}: the file system cannot hold a WAL", known=True)
        for pragma in (
            "synchronous = FULL",
            "fullfsync = ON",
            "checkpoint_fullfsync = ON",
            "wal_autocheckpoint = 0",
            "temp_store = MEMORY",
            "cache_size = -8192",
            "cell_size_check = ON",
            "trusted_schema = OFF",
            "secure_delete = OFF",
        ):
            self._pragma(pragma)
        self._page_size = self._number("PRAGMA page_size")
        self._migrate(new)

    def _pragma(self, pragma: str) -> list[Any]:
        return self._at.execute(f"PRAGMA {pragma}").fetchall()

    def _identify(self) -> bool:
        """True: it is empty. Raises SpoolError for a file that is not ours, or not for us."""
        application = self._number("PRAGMA application_id")
        version = self._number("PRAGMA user_version")
        tables = self._number("SELECT count(*) FROM sqlite_schema")
        # A number that no version of us will reach was hit; what a newer one wrote is not for us to judge.
        if tables and (application != APPLICATION_ID or not 0 < version < VERSION + 64) and self._has_our_schema():
            raise apsw.CorruptError(f"the header says application {application:#x}, schema {version}; the tables are ours")
        if application != APPLICATION_ID and (application or tables):
            raise SpoolError(f"{self._path} is a database, but not a spool of this program", known=True)
        if version > VERSION:
            raise SpoolError(
                f"spool {self.folder} has schema {version}, this program knows up to {VERSION}: use the newer version that wrote it",
                known=True,
            )
        return not tables

    def _has_our_schema(self) -> bool:
        """Is every table and index as this version makes it?"""
        memory = apsw.Connection(":memory:")
        memory.execute(SCHEMA)
        asked = "SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY sql"
        return bool(self._at.execute(asked).fetchall() == memory.execute(asked).fetchall())

    def _migrate(self, new: bool) -> None:
        version = VERSION if new else self._number("PRAGMA user_version")
        if new:
            self._at.execute(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION}; COMMIT")
        while version < VERSION:
            self._at.execute(f"BEGIN IMMEDIATE; {UPGRADES[version]}; PRAGMA user_version = {version + 1}; COMMIT")
            version += 1

    def _check(self) -> str | None:
        """What is broken in the file, if anything; an index that does not fit its table is made
        anew. The contents of rows are checked as they are read."""
        suspect = os.path.exists(os.path.join(self.folder, SUSPECT))
        if self._number("PRAGMA page_count") * self._page_size > CHECK_LIMIT and not suspect:
            return None
        if not (told := self._faults()):
            return None
        if not self._settled:
            return told
        try:
            self._at.execute("REINDEX")
        except apsw.Error as error:
            return f"{told}; the indexes could not be made anew: {_words(error)}"
        left = self._faults()
        return f"{told}; left after the indexes were made anew: {left}" if left else f"{told}; mended: the indexes were made anew"

    def _faults(self) -> str:
        try:
            told = [text(line) for (line,) in self._at.execute("SELECT CAST(integrity_check AS BLOB) FROM pragma_integrity_check LIMIT 10")]
        except apsw.CorruptError as error:
            told = [_words(error)]
        return "" if told == ["ok"] else "; ".join(told)

    def _settle(self) -> None:
        """Everything in the WAL is in the database, synced, and the WAL is empty."""
        self._database.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        self._settled = True
        self._checkpointed()

    def _survey(self) -> Opened:
        self._tally.clear()
        further = 0
        for sink, state, count, first, more in cast("list[tuple[Any, ...]]", self._at.execute(_SURVEY).fetchall()):
            further += more
            place = (text(sink), text(state))
            if self._settled and (state not in (b"queued", b"held", b"dead") or place[0].encode() != sink):
                # Nobody would ever ask for these rows again.
                self._at.execute(
                    "UPDATE pendings SET sink = ?, state = 'held', person = 1, note = 'damaged: its sink or state was lost'"
                    " WHERE CAST(sink AS BLOB) = ? AND CAST(state AS BLOB) = ?",
                    (place[0], sink, state),
                )
                place = (place[0], "held")
            self._tally[place] = self._tally.get(place, 0) + count
            self._floor[place] = min(first, self._floor.get(place, first))
        kept = {text(name) for (name,) in self._at.execute("SELECT CAST(file AS BLOB) FROM messages WHERE file IS NOT NULL")}
        self._file_count = len(kept)
        orphans = 0
        for name in self._files.names(self.contents):
            if name not in kept:
                self._files.unlink(os.path.join(self.contents, name))
                orphans += 1
        return Opened(
            # Damage may have left what is owed without its message.
            next_key=max(
                self._number("SELECT coalesce(max(key), 0) FROM messages"),
                self._number("SELECT coalesce(max(key), 0) FROM pendings") >> SHIFT,
            )
            + 1,
            # Where each message has the one row only, the rows are counted already: one walk less before new mail is taken.
            messages=self._number("SELECT count(*) FROM messages") if further else sum(self._tally.values()),
            counts=dict(self._tally),
            orphans=orphans,
            damage=None,
        )

    def close(self) -> None:
        """The last checkpoint, the file and the lock. Raises nothing: what is committed is safe."""
        try:
            if self._db is not None and self.fatal is None:
                self._settle()
        except apsw.Error:
            pass
        self.abandon()

    def remove(self) -> bool:
        """Close it, and take the folder away where nothing is in it: under the lock, which goes last.
        False: something is. Raises nothing."""
        empty = False
        try:
            if self._db is not None and self.fatal is None and self._settled:
                empty = not self._number("SELECT EXISTS (SELECT 1 FROM messages) OR EXISTS (SELECT 1 FROM pendings)")
        except apsw.Error:
            pass
        if not empty:
            self.close()
            return False
        lock, self._lock = self._lock, None
        self.close()
        try:
            self._files.rmdir(self.contents)
            for name in (f"{DATABASE}-wal", DATABASE, LOCK):
                with contextlib.suppress(FileNotFoundError):
                    self._files.unlink(os.path.join(self.folder, name))
            self._files.rmdir(self.folder)
        except OSError:
            empty = False
        finally:
            if lock is not None:
                self._files.close(lock)
        return empty

    def abandon(self) -> None:
        if self._db is not None:
            try:
                self._db.close()
            except apsw.Error:
                self._db.close(True)
        self._db = self._cursor = None
        if self._lock is not None:
            self._files.close(self._lock)
            self._lock = None

    # -------------------------------------------------------------------------- small things

    @property
    def _database(self) -> apsw.Connection:
        if self._db is None:
            raise SpoolError("the spool is closed", known=True)
        return self._db

    @property
    def _at(self) -> apsw.Cursor:
        if self._cursor is None:
            raise SpoolError("the spool is closed", known=True)
        return self._cursor

    def _number(self, sql: str, bindings: Sequence[Value] = ()) -> int:
        return cast(int, self._at.execute(sql, bindings).fetchall()[0][0])

    def _many(self, statements: dict[int, str], rows: Sequence[Columns]) -> None:
        """Few statements for many rows: the fewer returns from SQLite, the less waiting for the GIL."""
        at, count = 0, len(rows)
        execute = self._at.execute
        for size in SIZES:
            while count - at >= size:
                execute(statements[size], list(chain.from_iterable(rows[at : at + size])))
                at += size

    # ------------------------------------------------------------------------------- writing

    def write(self, entries: list[Entry]) -> Written:
        """One transaction for all of them. Errors are told per entry: SpoolError, or RefusedError."""
        started = time.perf_counter()
        errors: list[Exception | None] = [None] * len(entries)
        files: list[str] = []
        try:
            files = self._group(entries)
        except RefusedError as refused:
            # One of them spoils it for all: each on its own.
            if len(entries) == 1:
                errors = [refused]
            else:
                for number, entry in enumerate(entries):
                    try:
                        files += self._group([entry])
                    except (SpoolError, RefusedError) as error:
                        errors[number] = error
        except SpoolError as error:
            errors = [error] * len(entries)
        seconds = time.perf_counter() - started
        return Written(errors, files, seconds, self._keep_house())

    def _group(self, entries: list[Entry]) -> list[str]:
        delta: list[tuple[str, str, int, int]] = []
        files: list[str] = []
        messages: list[Columns] = []
        pendings: list[Columns] = []
        changes: dict[int, Snapshot | None] = {}
        splitting: list[Entry] = []
        for entry in entries:
            messages += entry.messages
            pendings += entry.pendings
            changes.update(entry.changes)
            if entry.splits:
                splitting.append(entry)

        def work() -> None:
            self._insert(messages, pendings, delta)
            if changes:
                self._change(changes, splitting, delta, files)

        self._transaction(work)
        self._count(delta)
        self._file_count -= len(files)
        return files

    def _insert(self, messages: list[Columns], pendings: list[Columns], delta: list[tuple[str, str, int, int]]) -> None:
        self._many(_INSERT_MESSAGES, messages)
        self._many(_INSERT_PENDINGS, pendings)
        new: dict[tuple[Value, Value], list[int]] = {}
        for row in pendings:
            new.setdefault((row[1], row[2]), []).append(cast(int, row[0]))
        for (sink, state), keys in new.items():
            delta.append((cast(str, sink), cast(str, state), len(keys), min(keys)))
        for row in messages:
            if row[4] is not None:
                self._file_count += 1

    def _change(
        self, changes: dict[int, Snapshot | None], splitting: list[Entry], delta: list[tuple[str, str, int, int]], files: list[str]
    ) -> None:
        keys = orjson.dumps(list(changes)).decode()
        delta.extend(self._tallied(keys, -1))
        kept = [change.columns(key) for key, change in changes.items() if change is not None]
        gone = [key for key, change in changes.items() if change is None]
        if kept:
            self._many(_UPDATE_PENDINGS, kept)
            stay = orjson.dumps([row[0] for row in kept]).decode()
            delta.extend(self._tallied(stay, 1))
        for entry in splitting:
            self._split(entry, delta)
        if gone:
            self._at.execute(_DELETE_PENDINGS, (orjson.dumps(gone).decode(),))
            self._settle_messages(gone, files)

    def _settle_messages(self, gone: Iterable[int], files: list[str]) -> None:
        """Delete the messages that have lost their last row."""
        messages = (orjson.dumps(list({key >> SHIFT for key in gone})).decode(),)
        if self._file_count:
            files.extend(text(name) for (name,) in self._at.execute(_FILES_OF_SETTLED, messages))
        self._at.execute(_DELETE_SETTLED, messages)

    def _split(self, entry: Entry, delta: list[tuple[str, str, int, int]]) -> None:
        entry.split_keys = []
        for message_key, snapshot in entry.splits:
            # A person may have dropped the message meanwhile: then nothing is left to keep.
            if not self._number("SELECT EXISTS (SELECT 1 FROM messages WHERE key = ?)", (message_key,)):
                entry.split_keys.append(0)
                continue
            # A number is never given twice in the life of a process: a late mark of a dropped
            # row must not hit another.
            while True:
                key = message_key << SHIFT | self._next_split
                self._next_split = self._next_split + 1 if self._next_split < NUMBERS else FIRST_SPLIT
                if not self._number("SELECT EXISTS (SELECT 1 FROM pendings WHERE key = ?)", (key,)):
                    break
            self._many(_INSERT_PENDINGS, [snapshot.columns(key)])
            delta.append((snapshot.sink, snapshot.state, 1, key))
            entry.split_keys.append(key)

    def _tallied(self, keys: str, sign: int) -> list[tuple[str, str, int, int]]:
        """How these rows (a JSON list of keys) count: ``(sink, state, rows, lowest key)``."""
        found = cast("list[tuple[Any, ...]]", self._at.execute(_TALLY, (keys,)).fetchall())
        return [(text(sink), text(state), sign * count, key) for sink, state, count, key in found]

    def _count(self, delta: Iterable[tuple[str, str, int, int]]) -> None:
        for sink, state, change, key in delta:
            place = (sink, state)
            count = self._tally.get(place, 0) + change
            self._tally[place] = count
            if change > 0 and key < self._floor.get(place, key + 1):
                self._floor[place] = key

    def _transaction(self, work: Callable[[], None], stored: bool = False) -> None:
        """Run ``work`` and commit. Raises SpoolError, or RefusedError for what no disk would take; ``stored``: what
        it cannot take was stored before, so it is damaged."""
        if self.fatal is not None:
            raise SpoolError(self.fatal, known=True)
        execute = self._at.execute
        files = self._file_count
        try:
            if not self._settled:
                self._settle()
            execute("BEGIN IMMEDIATE")
            work()
            if self._excess > 0:
                self._vacuum(VACUUM_STEP)
        except Exception as error:
            full = self._is_full(error)
            self._file_count = files
            self._roll_back(error)
            if isinstance(error, _DAMAGE) or (stored and isinstance(error, apsw.ConstraintError)):
                self.suspect(error)
            elif isinstance(error, (apsw.ConstraintError, apsw.TooBigError, apsw.MismatchError, TypeError, ValueError, OverflowError)):
                raise RefusedError(_words(error)) from error
            raise SpoolError(f"nothing was stored: {_words(error)}", known=True, full=full) from error
        try:
            execute("COMMIT")
        except Exception as error:
            full = self._is_full(error)
            self._file_count = files
            self._prove_gone(error)
            raise SpoolError(f"nothing was stored: {_words(error)}", known=True, full=full) from error

    def _is_full(self, error: Exception) -> bool:
        """Asked right after the fault: SQLite calls ENOSPC of a write FULL, and all else (a quota, a
        sync that finds no room) an I/O error whose reason only the connection knows."""
        if isinstance(error, apsw.IOError) and self._db is not None:
            return self._db.system_errno in (errno.ENOSPC, errno.EDQUOT)
        return isinstance(error, apsw.FullError) or no_room(error)

    def _roll_back(self, cause: Exception) -> None:
        if self._db is None or not self._db.in_transaction:
            return
        try:
            self._at.execute("ROLLBACK")
        except apsw.Error as error:
            # No COMMIT was begun, so nothing can come back; but this connection is of no more use.
            self.fatal = f"a transaction could not be rolled back: {_words(error)}"
            raise SpoolError(self.fatal, known=True) from cause

    def _prove_gone(self, cause: Exception) -> None:
        """After a COMMIT that failed: frames with a commit mark may be in the WAL, and come back
        after a crash. Returns once that is impossible; else sets ``fatal`` and raises.

        First the way that trusts SQLite alone: move what is committed into the database and
        truncate the WAL. On a full disk that may fail; cutting the WAL off behind the last
        frame that counts needs no room. Either way the cut is synced and looked at."""
        try:
            if self._db is not None and self._db.in_transaction:
                self._at.execute("ROLLBACK")
            try:
                self._database.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
                self._checkpointed()
                good = 0
            except Exception:
                frames, _ = self._database.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)
                good = 32 + frames * (24 + self._page_size) if frames > 0 else 0
            wal = self._files.open(f"{self._path}-wal", os.O_RDWR)
            try:
                if self._files.size(wal) > good:
                    self._files.truncate(wal, good)
                self._files.fsync(wal)
                if self._files.size(wal) > good:
                    raise OSError(errno.EIO, "the WAL would not be cut")
            finally:
                self._files.close(wal)
        except Exception as error:
            self.fatal = f"a commit failed ({_words(cause)}) and may come back ({_words(error)})"
            raise SpoolError(self.fatal, known=False) from error

    # ------------------------------------------------------------------- checkpoints and room

    @property
    def _pages_written(self) -> int:
        return self._database.status(apsw.SQLITE_DBSTATUS_CACHE_WRITE)[0]

    def _keep_house(self) -> str | None:
        """Between groups: the WAL and the free pages stay bounded, however busy it is. A failure
        loses nothing (the WAL has it all) but is told: the WAL must not grow without end."""
        if self.fatal is not None or self._pages_written - self._pages_at_checkpoint < CHECKPOINT_PAGES:
            return None
        try:
            self._database.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
            self._checkpointed()
            self._excess = self._number("PRAGMA freelist_count") - FREE_PAGES
        except Exception as error:
            return f"checkpoint: {_words(error)}"
        return None

    def _checkpointed(self) -> None:
        self._pages_at_checkpoint = self._pages_written

    def _vacuum(self, pages: int) -> None:
        self._at.execute(f"PRAGMA incremental_vacuum({pages})").fetchall()
        self._excess -= pages

    def tidy(self) -> bool:
        """While nothing else is to be done. True: there is more to tidy. Raises SpoolError."""
        if self.fatal is not None or self._db is None:
            return False
        free = self._number("PRAGMA freelist_count")
        if free > FREE_PAGES_AT_REST:
            self._excess = 0
            self._transaction(lambda: self._vacuum(min(VACUUM_STEP_AT_REST, free - FREE_PAGES_AT_REST)))
            self._excess = 0
        if self._pages_written > self._pages_at_checkpoint:
            try:
                self._database.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
            except apsw.Error as error:
                raise SpoolError(f"checkpoint: {_words(error)}", known=True) from error
            self._checkpointed()
        return free > FREE_PAGES_AT_REST + VACUUM_STEP_AT_REST

    def probe(self) -> None:
        """Can it be written and synced again? Raises SpoolError or OSError."""

        def work() -> None:
            self._at.execute("UPDATE health SET probed = ?", (time.time(),))

        self._transaction(work)
        if trouble := self._keep_house():
            raise SpoolError(trouble, known=True)
        path = os.path.join(self.contents, ".probe")
        probe = self._files.open(path, os.O_WRONLY | os.O_CREAT)
        try:
            self._files.write(probe, [b"probe\n"])
            self._files.fsync(probe)
        finally:
            self._files.close(probe)
            self._files.unlink(path)

    # ------------------------------------------------------------------------------- reading

    def due(self, sink: str, before: float, limit: int, down: bool = False) -> tuple[list[Pending], list[tuple[int, str]]]:
        """The rows, and those found damaged ``(key, why)`` (set aside already)."""
        by_priority: list[list[Pending]] = []
        damaged: list[tuple[int, str]] = []
        share = limit // SHARE
        room = limit
        priority: int | None = 1 << 31
        while room > 0 or share:
            # One seek per priority that is in use; rows not yet due are never walked.
            ((priority,),) = cast("list[tuple[Any]]", self._at.execute(_NEXT_PRIORITY, (sink, priority)).fetchall())
            if priority is None:
                break
            read = self._at.execute(_DUE, (sink, priority, before, max(room, share))).fetchall()
            by_priority.append(self._unpacked(read, damaged))
            room -= len(by_priority[-1])
        found: list[Pending] = []
        spare = limit - sum(min(len(rows), share) for rows in by_priority)
        for rows in by_priority:
            sure = min(len(rows), share)
            more = min(len(rows) - sure, spare)
            found += rows[: sure + more]
            spare -= more
        if down and len(found) < limit:
            found += self._unpacked(self._at.execute(_DOWN, (sink, before, limit - len(found))).fetchall(), damaged)
        for key, why in damaged:
            self.set_aside([key], why)
        return found, damaged

    @staticmethod
    def _unpacked(rows: Sequence[Sequence[Any]], damaged: list[tuple[int, str]]) -> list[Pending]:
        found = []
        for *row, message_id in rows:
            key = cast(int, row[0])
            if message_id is None:
                damaged.append((key, "its message is missing"))
                continue
            try:
                found.append(unpack_pending(tuple(row), text(message_id)))
            except (DamagedError, TypeError) as error:
                damaged.append((key, str(error)))
        return found

    def overdue(self, now: float, after: int) -> tuple[list[Pending], list[tuple[int, str]], int]:
        """One slice, and the key to go on after (0: that was the last); damaged rows as in ``due``.

        No index knows this: it would cost every mail, and the walk is short where little waits."""
        if not any(count for (_sink, state), count in self._tally.items() if state == "queued"):
            return [], [], 0
        ((end,),) = cast("list[tuple[Any]]", self._at.execute(_SLICE, (after, SLICE)).fetchall())
        if end is None:
            return [], [], 0
        damaged: list[tuple[int, str]] = []
        found = self._unpacked(self._at.execute(_OVERDUE, (after, end, now)).fetchall(), damaged)
        for key, why in damaged:
            self.set_aside([key], why)
        return found, damaged, end

    def next_due(self, sink: str, after: float) -> float | None:
        earliest: float | None = None
        priority: int | None = 1 << 31
        while True:
            ((priority,),) = cast("list[tuple[Any]]", self._at.execute(_NEXT_PRIORITY, (sink, priority)).fetchall())
            if priority is None:
                return earliest
            ((due,),) = cast("list[tuple[Any]]", self._at.execute(_NEXT_DUE, (sink, priority, after)).fetchall())
            if due is not None and (earliest is None or due < earliest):
                earliest = due

    def counts(self) -> dict[tuple[str, str], tuple[int, float]]:
        result = {}
        for (sink, state), count in self._tally.items():
            if count <= 0:
                continue
            # Keys only grow: the walk goes on where it ended the last time.
            found = self._at.execute(
                "SELECT key FROM pendings NOT INDEXED WHERE key >= ? AND sink = ? AND state = ? ORDER BY key LIMIT 1",
                (self._floor.get((sink, state), 0), sink, state),
            ).fetchall()
            oldest = 0.0
            if found:
                key = cast(int, found[0][0])
                self._floor[sink, state] = key
                for (received_at,) in self._at.execute("SELECT received_at FROM messages WHERE key = ?", (key >> SHIFT,)):
                    oldest = cast(Any, received_at)
            result[sink, state] = (count, oldest)
        return result

    def load(self, keys: Sequence[int]) -> dict[int, Loaded]:
        """Messages by key. Those without a row are not there; those that are damaged, or gone
        although something is owed, say so."""
        found: dict[int, Loaded] = {}
        for key in keys:
            try:
                rows = self._at.execute(f"SELECT {MESSAGE_READ} FROM messages WHERE key = ?", (key,)).fetchall()
                if rows:
                    row = cast(Columns, rows[0])
                    found[key] = Loaded(unpack_message(row, self.contents), cast(int, row[CONTENT_SUM]))
                elif self._number(
                    f"SELECT EXISTS (SELECT 1 FROM pendings WHERE key BETWEEN ? AND ? | {NUMBERS})", (key << SHIFT, key << SHIFT)
                ):
                    found[key] = Loaded(None, damage="the message is missing")
            except (DamagedError, apsw.CorruptError, orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                found[key] = Loaded(None, damage=_words(error))
        return found

    def set_aside(self, pendings: Sequence[int], why: str) -> None:
        """Hold these rows with a note. Raises nothing: what cannot be written now is found again."""

        def work() -> None:
            keys = orjson.dumps(list(pendings)).decode()
            before = self._tallied(keys, -1)
            self._at.execute(f"UPDATE pendings SET state = 'held', person = 1, note = ? WHERE key IN {_KEYS}", (f"damaged: {why}", keys))
            delta.extend(before + self._tallied(keys, 1))

        delta: list[tuple[str, str, int, int]] = []
        try:
            self._transaction(work, stored=True)
        except (SpoolError, RefusedError):
            return
        self._count(delta)

    def set_message_aside(self, key: int, why: str) -> bool:
        """Whether anything of it is owed still: what a person dropped meanwhile is not damaged, but gone."""
        rows = self._at.execute(f"SELECT key FROM pendings WHERE key BETWEEN ? AND ? | {NUMBERS}", (key << SHIFT, key << SHIFT)).fetchall()
        if rows:
            self.set_aside([cast(int, row[0]) for row in rows], why)
        return bool(rows)

    # ---------------------------------------------------------------------------- for people

    def wake(self, sink: str, now: float) -> int:
        """One batch; fewer than BATCH: that was the last."""
        done = 0

        def work() -> None:
            nonlocal done
            self._at.execute(
                "UPDATE pendings SET due = min(due, ?), down = 0 WHERE key IN (SELECT key FROM pendings INDEXED BY pendings_down"
                " WHERE sink = ? AND down = 1 AND state = 'queued' LIMIT ?)",
                (now, sink, BATCH),
            )
            done = self._database.changes()

        self._transaction(work, stored=True)
        return done

    def select(
        self, sink: str | None, state: str | None, ids: Sequence[str] | None, after: int, limit: int
    ) -> list[tuple[int, Columns, str, Any, Any]]:
        """Rows in the order of arrival from key ``after`` on:
        ``(key, pending, message id, meta, size)``."""
        terms, bindings = ["p.key > ?"], cast("list[Value]", [after])
        if sink is not None:
            terms.append("p.sink = ?")
            bindings.append(sink)
        if state is not None:
            terms.append("p.state = ?")
            bindings.append(state)
        if ids is not None:
            ranges = []
            for id in ids:
                for key, part in self._find(id):
                    ranges.append(f"(p.key BETWEEN ? AND ? {'AND p.part = ?' if part else ''})")
                    bindings += [key << SHIFT, key << SHIFT | NUMBERS, *([part] if part else [])]
            if not ranges:
                return []
            terms.append(f"({' OR '.join(ranges)})")
        # The index helps where few match; where many do, the order of arrival is the short way.
        few = sum(count for (a, b), count in self._tally.items() if sink in (None, a) and state in (None, b)) < 10 * BATCH
        indexed = "" if few or ids is not None else "NOT INDEXED"
        rows = self._at.execute(
            f"SELECT {PENDING_READ}, CAST(m.id AS BLOB), m.meta, m.size FROM pendings AS p {indexed} LEFT JOIN messages AS m ON m.key = p.key >> {SHIFT}"
            f" WHERE {' AND '.join(terms)} ORDER BY p.key LIMIT ?",
            (*bindings, limit),
        ).fetchall()
        result = []
        for row in rows:
            message_id, meta, size = cast("tuple[Any, ...]", row[PENDING_WIDTH:])
            result.append((cast(int, row[0]), cast(Columns, row[:PENDING_WIDTH]), text(message_id), meta, size))
        return result

    def _find(self, id: str) -> list[tuple[int, int]]:
        """Message keys for a message id ``(key, 0)`` or a delivery id ``(key, part)``."""
        found = [(cast(int, row[0]), 0) for row in self._at.execute("SELECT key FROM messages WHERE id = ?", (id,)).fetchall()]
        stem, _, part = id.rpartition("_")
        if not found and stem and part.isascii() and part.isdigit():
            found = [
                (cast(int, row[0]), int(part)) for row in self._at.execute("SELECT key FROM messages WHERE id = ?", (stem,)).fetchall()
            ]
        return found

    def listed(self, sink: str | None, state: str | None, message_id: str | None, limit: int) -> list[Listed]:
        result = []
        for _, pending, id, meta, size in self.select(sink, state, None if message_id is None else [message_id], 0, limit):
            try:
                row = unpack_pending(pending, id)
                told: dict[str, Any] = orjson.loads(meta)
                addresses = [told["recipients"][number][0] for number in row.recipients]
                mail_from, received_at, not_before = told["mail_from"], told["received_at"], told["not_before"]
            except (DamagedError, ValueError, TypeError, KeyError, IndexError):
                addresses, mail_from, received_at, not_before = [], "", 0.0, 0.0
                row = Pending(id, text(pending[1]), (), cast(float, pending[4]), cast(float, pending[5]))
                row.state, row.note = cast(Any, text(pending[2])), text(pending[11])
            result.append(
                Listed(
                    row.delivery_id,
                    id,
                    row.sink,
                    row.state,
                    addresses,
                    mail_from,
                    size or 0,
                    row.attempts,
                    row.due,
                    received_at,
                    row.expires_at,
                    row.note,
                    row.priority,
                    not_before,
                )
            )
        return result

    def change(
        self, ids: Sequence[str] | None, action: Action, sink: str | None, state: str | None, now: float, after: int
    ) -> tuple[int, int, list[str]]:
        """One batch: ``(rows changed, key to go on after or 0, content files that are gone)``."""
        reach = {"retry": ("queued", "held", "dead"), "hold": ("queued",), "release": ("held",), "drop": ("queued", "held", "dead")}[action]
        rows = self.select(sink, state, ids, after, BATCH)
        # "All of this sink, now" is not meant for what its sender wants held until later: not tried, and not due.
        parked = action == "retry" and ids is None
        keys = [
            key
            for key, pending, *_ in rows
            if text(pending[2]) in reach and not (parked and pending[2] == b"queued" and not pending[7] and cast(float, pending[4]) > now)
        ]
        delta: list[tuple[str, str, int, int]] = []
        files: list[str] = []

        def work() -> None:
            told = (orjson.dumps(keys).decode(),)
            delta.extend(self._tallied(told[0], -1))
            if action == "drop":
                self._at.execute(_DELETE_PENDINGS, told)
                self._settle_messages(keys, files)
                return
            if action == "hold":
                self._at.execute(f"UPDATE pendings SET state = 'held', person = 1 WHERE key IN {_KEYS}", told)
            elif action == "release":
                self._at.execute(f"UPDATE pendings SET state = 'queued', person = 0 WHERE key IN {_KEYS}", told)
            else:
                # What had expired gets as much time again.
                self._at.execute(
                    "UPDATE pendings SET state = 'queued', person = 0, down = 0, due = ?1, expires_at = CASE WHEN expires_at > ?1"
                    " THEN expires_at ELSE ?1 + max(60.0, expires_at - coalesce("
                    f"(SELECT received_at FROM messages WHERE key = pendings.key >> {SHIFT}), expires_at)) END WHERE key IN"
                    " (SELECT value FROM json_each(?2))",
                    (now, *told),
                )
            delta.extend(self._tallied(told[0], 1))

        if keys:
            self._transaction(work, stored=True)
            self._count(delta)
            self._file_count -= len(files)
        return len(keys), rows[-1][0] if len(rows) == BATCH else 0, files

    def find_message(self, message_id: str) -> Loaded | None:
        """By message or delivery id. Raises LookupError."""
        found = self._find(message_id)
        if not found:
            raise LookupError(f"no message {message_id} in the spool")
        return self.load([found[0][0]]).get(found[0][0])


def _words(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return f"{type(error).__name__}: {text}" if isinstance(error, apsw.Error) else text
