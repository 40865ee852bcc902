"""A process that ends itself by SIGKILL at a chosen step. On the PYTHONPATH of the test's children alone.

``FAILPOINT=NAME:WHEN:COUNT:FOLDER``: ``before`` or ``after`` the step of that name (``STEPS``,
``ADOPTION``, ``OPERATIONS``) is taken for the COUNT-th time, the ids of the messages that are in
flight are written to ``FOLDER/PID`` and the process is gone. The product knows nothing of this:
functions are wrapped from outside, and SQLite's file operations go through a VFS that is made the
default. What happens every few seconds or megabytes is made to happen more often (``_hurry``).

Compiled classes cannot be wrapped. A process that is to end at a function therefore runs the
``.py`` files, whatever was compiled beside them; one that is to end at an operation of SQLite runs
the product as it is built. In flight is what was given to a sink and of which the spool has not
said that its mark is durable, or the intake that nothing of it was ever stored; where the queue is
compiled that cannot be told, and ``null`` is written.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import inspect
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

_lock = threading.Lock()
_flying: set[tuple[str, str]] | None = None


class Step(NamedTuple):
    """A function, and after how many calls the process ends: between ``least`` and ``most``. ``path``: only
    those whose first argument has this in it."""

    module: str
    owner: str
    name: str
    most: int = 1
    least: int = 1
    path: str = ""


class Operation(NamedTuple):
    """What SQLite does with its files of this name; ``most`` as above."""

    name: str
    suffix: str
    most: int = 1
    least: int = 1


#: Every step between the end of data and the done mark, in that order.
STEPS = {
    "content is written": Step("gateway.spool.content", "SpoolFile", "_write", 6),
    "the end of data was read": Step("gateway.intake", "MailIntake", "receive", 500),
    "the first try starts": Step("gateway.queue", "Queue", "_start", 500),
    "the ticket joins": Step("gateway.spool.sqlite", "SqliteSpool", "store", 100),
    "the content file is synced": Step("gateway.spool.content", "SpoolFile", "_sync", 3),
    "the ticket is closed": Step("gateway.intake", "Ticket", "close", 100),
    "the group is written": Step("gateway.spool.engine", "Engine", "_group", 30),
    "the group is told": Step("gateway.spool.sqlite", "SqliteSpool", "_written", 30),
    "the answer is given": Step("gateway.intake", "Ticket", "_say", 500),
    "the row is loaded": Step("gateway.spool.engine", "Engine", "load", 5),
    "the sink has settled": Step("gateway.queue", "Queue", "_settled", 500),
    "the outcome is marked": Step("gateway.spool.sqlite", "SqliteSpool", "mark", 100),
    "rows are changed": Step("gateway.spool.engine", "Engine", "_change", 20),
    "the mark is durable": Step("gateway.queue", "Queue", "_marked", 100),
    "content files are removed": Step("gateway.spool.files", "Files", "unlink", 2, path="/content/"),
    "house is kept": Step("gateway.spool.engine", "Engine", "_keep_house", 30),
    "the spool is tidied": Step("gateway.spool.engine", "Engine", "tidy", 2),
}

#: And every operation of SQLite on its files.
OPERATIONS = {
    "the WAL is written": Operation("xWrite", "-wal", 200),
    "the WAL is synced": Operation("xSync", "-wal", 30),
    "the database is written": Operation("xWrite", ".db", 100),
    "the database is synced": Operation("xSync", ".db", 5),
    "the WAL is cut": Operation("xTruncate", "-wal"),
}

#: Every step of the adoption of a shard that nobody carries. The process' own shard is the first that it opens.
ADOPTION = {
    "the shard is opened": Step("gateway.shards", "Shards", "_opened", 2, 2),
    "its mail is scheduled": Step("gateway.queue", "Queue", "open", 2, 2),
    "the emptied shard is let go": Step("gateway.shards", "Shards", "_ended"),
    "it is removed": Step("gateway.spool.engine", "Engine", "remove"),
    "its folder of contents is removed": Step("gateway.spool.files", "Files", "rmdir", path="/content"),
    "its database is removed": Step("gateway.spool.files", "Files", "unlink", path="/spool.db"),
    "its lock is removed": Step("gateway.spool.files", "Files", "unlink", path="/lock"),
    "its folder is removed": Step("gateway.spool.files", "Files", "rmdir", 2, 2),
}


def _die(folder: str) -> None:
    # A name that is there has all its octets.
    path = os.path.join(folder, str(os.getpid()))
    with open(f"{path}.new", "w") as file:
        json.dump(None if _flying is None else [message_id for message_id, _sink in _flying], file)
    os.rename(f"{path}.new", path)
    os.kill(os.getpid(), signal.SIGKILL)


class _Counter:
    def __init__(self, count: int, folder: str) -> None:
        self._left = count
        self._folder = folder

    def __call__(self) -> None:
        with _lock:
            self._left -= 1
            if self._left == 0:
                _die(self._folder)


class _Sources(importlib.abc.MetaPathFinder):
    """The ``.py`` files of the gateway before what was compiled of them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("gateway.") or not path:
            return None
        kind = (importlib.machinery.SourceFileLoader, importlib.machinery.SOURCE_SUFFIXES)
        return importlib.machinery.FileFinder(path[0], kind).find_spec(fullname, target)


def _wrapped(step: Step, when: str, meet: Callable[[], None]) -> None:
    place = getattr(importlib.import_module(step.module), step.owner)
    function = getattr(place, step.name)

    def step_is(at: str, args: tuple[Any, ...]) -> None:
        if when == at and (not step.path or step.path in args[1]):
            meet()

    @functools.wraps(function)
    def stepped(*args: Any, **more: Any) -> Any:
        step_is("before", args)
        result = function(*args, **more)
        step_is("after", args)
        return result

    @functools.wraps(function)
    async def awaited(*args: Any, **more: Any) -> Any:
        step_is("before", args)
        result = await function(*args, **more)
        step_is("after", args)
        return result

    setattr(place, step.name, awaited if inspect.iscoroutinefunction(function) else stepped)


def _watch_flights() -> None:
    from gateway import intake, queue

    if not str(queue.__file__).endswith(".py") or not str(intake.__file__).endswith(".py"):
        return
    global _flying
    _flying = flying = set()
    start, marked, accept = queue.Queue._start, queue.Queue._marked, intake.Ticket._accept

    def started(self: Any, lane: Any, message: Any, pending: Any, ticket: Any, now: float) -> None:
        flying.add((message.id, pending.sink))
        start(self, lane, message, pending, ticket, now)

    def done(self: Any, lane: Any, pending: Any, follow: Any, ended: float) -> None:
        flying.discard((pending.message_id, pending.sink))
        marked(self, lane, pending, follow, ended)

    def accepted(self: Any, stored: bool) -> None:
        if not stored:
            for pending in self._pendings:
                flying.discard((self.message.id, pending.sink))
        accept(self, stored)

    queue.Queue._start = started  # type: ignore[method-assign]  # this is what the file is for
    queue.Queue._marked = done  # type: ignore[method-assign]
    intake.Ticket._accept = accepted  # type: ignore[method-assign]


def _make_default(operation: Operation, when: str, meet: Callable[[], None]) -> None:
    import apsw

    # By name: once ours is the default, "" would be ourselves.
    system = apsw.vfs_names()[0]

    class File(apsw.VFSFile):
        def __init__(self, name: Any, flags: list[int]) -> None:
            path = name.filename() if isinstance(name, apsw.URIFilename) else (name or "")
            self._meets = path.endswith(operation.suffix)
            super().__init__(system, name, flags)

        def _step(self, name: str, *args: Any) -> None:
            meets = self._meets and name == operation.name
            if meets and when == "before":
                meet()
            getattr(super(), name)(*args)
            if meets and when == "after":
                meet()

        def xWrite(self, data: Any, offset: int) -> None:  # noqa: N802 - SQLite's name
            self._step("xWrite", data, offset)

        def xSync(self, flags: int) -> None:  # noqa: N802 - SQLite's name
            self._step("xSync", flags)

        def xTruncate(self, newsize: int) -> None:  # noqa: N802 - SQLite's name
            self._step("xTruncate", newsize)

    class System(apsw.VFS):
        def __init__(self) -> None:
            super().__init__("failpoint", system, makedefault=True)

        def xOpen(self, name: Any, flags: list[int]) -> File:  # noqa: N802 - SQLite's name
            return File(name, flags)

    # Lives as long as the process.
    globals()["_system"] = System()


def _hurry() -> None:
    """Checkpoints, free pages and rests come every few pages and milliseconds."""
    from gateway.spool import engine, sqlite

    sqlite._WATCH = 0.05
    engine.CHECKPOINT_PAGES = 50
    engine.FREE_PAGES, engine.FREE_PAGES_AT_REST = 64, 16
    engine.VACUUM_STEP, engine.VACUUM_STEP_AT_REST = 8, 32


def _install(told: str) -> None:
    name, when, count, folder = told.split(":", 3)
    meet = _Counter(int(count), folder)
    if name in OPERATIONS:
        _make_default(OPERATIONS[name], when, meet)
    else:
        sys.meta_path.insert(0, _Sources())
        _wrapped((STEPS | ADOPTION)[name], when, meet)
    _watch_flights()
    _hurry()


if "FAILPOINT" in os.environ:
    _install(os.environ["FAILPOINT"])
