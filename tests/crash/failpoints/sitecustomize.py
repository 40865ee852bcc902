"""A process that ends itself by SIGKILL at a chosen step. On the PYTHONPATH of the test's children alone.

``FAILPOINT=NAME:COUNT:FOLDER``: when the step of that name (see ``STEPS``) is taken for the COUNT-th
time, the ids of the messages that are in flight are written to ``FOLDER/PID`` and the process is
gone. The product knows nothing of this: functions are wrapped from outside, and SQLite's file
operations go through a VFS that is made the default.

In flight is what was given to a sink and of which the spool has not said that its mark is durable,
or the intake that nothing of it was ever stored.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import threading
from typing import Any

_lock = threading.Lock()
_flying: set[tuple[str, str]] = set()


def _die(folder: str) -> None:
    # A name that is there has all its octets.
    path = os.path.join(folder, str(os.getpid()))
    with open(f"{path}.new", "w") as file:
        json.dump([message_id for message_id, _sink in _flying], file)
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


def _wrapped(module: str, owner: str, name: str, when: str, meet: Any) -> None:
    place = getattr(importlib.import_module(module), owner)
    function = getattr(place, name)

    @functools.wraps(function)
    def stepped(*args: Any, **more: Any) -> Any:
        if when == "before":
            meet()
        result = function(*args, **more)
        if when == "after":
            meet()
        return result

    setattr(place, name, stepped)


#: Every step between the end of data and the done mark, in that order: module, class, function.
STEPS = {
    "content is written": ("gateway.spool.content", "SpoolFile", "_write"),
    "the end of data was read": ("gateway.intake", "MailIntake", "receive"),
    "the first try starts": ("gateway.queue", "Queue", "_start"),
    "the ticket joins": ("gateway.spool.sqlite", "SqliteSpool", "store"),
    "the content file is synced": ("gateway.spool.content", "SpoolFile", "_sync"),
    "the ticket is closed": ("gateway.intake", "Ticket", "close"),
    "the group is written": ("gateway.spool.engine", "Engine", "_group"),
    "the group is told": ("gateway.spool.sqlite", "SqliteSpool", "_written"),
    "the answer is given": ("gateway.intake", "Ticket", "_say"),
    "the row is loaded": ("gateway.spool.engine", "Engine", "load"),
    "the sink has settled": ("gateway.queue", "Queue", "_settled"),
    "the outcome is marked": ("gateway.spool.sqlite", "SqliteSpool", "mark"),
    "rows are changed": ("gateway.spool.engine", "Engine", "_change"),
    "the mark is durable": ("gateway.queue", "Queue", "_marked"),
    "content files are removed": ("gateway.spool.files", "Files", "unlink"),
    "house is kept": ("gateway.spool.engine", "Engine", "_keep_house"),
    "the spool is tidied": ("gateway.spool.engine", "Engine", "tidy"),
}

#: And every operation of SQLite on its files.
OPERATIONS = {
    "the WAL is written": ("xWrite", "-wal"),
    "the WAL is synced": ("xSync", "-wal"),
    "the database is written": ("xWrite", ".db"),
    "the database is synced": ("xSync", ".db"),
    "the WAL is cut": ("xTruncate", "-wal"),
}


#: Those that come but now and then.
RARE = frozenset({"the spool is tidied", "the WAL is cut", "content files are removed", "the database is synced", "the row is loaded"})


def _watch_flights() -> None:
    from gateway import intake, queue

    start, marked, accept = queue.Queue._start, queue.Queue._marked, intake.Ticket._accept

    def started(self: Any, lane: Any, message: Any, pending: Any, ticket: Any) -> None:
        _flying.add((message.id, pending.sink))
        start(self, lane, message, pending, ticket)

    def done(self: Any, lane: Any, pending: Any, follow: Any, ended: float) -> None:
        _flying.discard((pending.message_id, pending.sink))
        marked(self, lane, pending, follow, ended)

    def accepted(self: Any, stored: bool) -> None:
        if not stored:
            for pending in self._pendings:
                _flying.discard((self.message.id, pending.sink))
        accept(self, stored)

    queue.Queue._start = started  # type: ignore[method-assign]  # this is what the file is for
    queue.Queue._marked = done  # type: ignore[method-assign]
    intake.Ticket._accept = accepted  # type: ignore[method-assign]


def _make_default(function: str, suffix: str, when: str, meet: Any) -> None:
    import apsw

    class File(apsw.VFSFile):
        def __init__(self, name: Any, flags: list[int]) -> None:
            path = name.filename() if isinstance(name, apsw.URIFilename) else (name or "")
            self._meets = path.endswith(suffix)
            super().__init__("", name, flags)

        def _step(self, name: str, *args: Any) -> None:
            meets = self._meets and name == function
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
            super().__init__("failpoint", "", makedefault=True)

        def xOpen(self, name: Any, flags: list[int]) -> File:  # noqa: N802 - SQLite's name
            return File(name, flags)

    # Lives as long as the process.
    globals()["_system"] = System()


def _install(told: str) -> None:
    name, when, count, folder = told.split(":", 3)
    meet = _Counter(int(count), folder)
    _watch_flights()
    if name in STEPS:
        _wrapped(*STEPS[name], when, meet)
    else:
        _make_default(*OPERATIONS[name], when, meet)


if "FAILPOINT" in os.environ:
    _install(os.environ["FAILPOINT"])
