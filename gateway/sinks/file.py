"""The ``file`` sink: a Maildir, one file a delivery, CRLF kept.

Owns the order that makes a delivery durable: written in ``tmp``, synced, renamed into ``new``,
the folder synced. The name is made of our own id and the sink's name, so another try for the
same recipients replaces its file instead of adding one, and nothing of the mail becomes a path.

The file is our trace header, then the octets the client sent. Folders are 0700, files 0600.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import re
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..contracts import AsyncSink, Delivery, Outcome
from ..reply import Reply
from .threads import Threads

if TYPE_CHECKING:
    from ..config import FileConfig

#: Threads that write: more than a disk can use at once gain nothing.
THREADS = 16
#: Seconds after which a file in ``tmp`` is nobody's (the rule of Maildir).
STALE = 36 * 3600.0
#: Octets of content written at a time.
PIECE = 1024 * 1024

_FULL = {errno.ENOSPC, errno.EDQUOT}
_ODD = re.compile(r"[^A-Za-z0-9._-]")


class FileSink(AsyncSink):
    """``type = "file"``. ``open`` makes the folders and raises OSError where it may not."""

    def __init__(self, name: str, config: FileConfig, hostname: str) -> None:
        super().__init__(name)
        self._folder = Path(config.path)
        self._timeout = config.timeout
        self._suffix = f"{_ODD.sub('_', name)}.{_ODD.sub('_', hostname)}"
        self._threads = Threads(f"file-{name}", min(config.concurrency, THREADS))
        self._numbers = itertools.count()
        self._delivered = Outcome("delivered", Reply(250, "2.0.0", "filed"), str(self._folder))

    async def open(self) -> None:
        await self._threads.run(self._prepare)

    def _prepare(self) -> None:
        for folder in (self._folder, *(self._folder / name for name in ("tmp", "new", "cur"))):
            _make(folder)
        before = time.time() - STALE
        with os.scandir(self._folder / "tmp") as entries:
            for entry in entries:
                about = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(about.st_mode) and about.st_mtime < before:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(entry.path)

    async def carry(self, delivery: Delivery) -> Sequence[Outcome]:
        try:
            async with asyncio.timeout(self._timeout):
                await self._threads.run(lambda: self._write(delivery))
        except TimeoutError:
            outcome = Outcome("deferred", Reply(451, "4.3.0", "the disk is too slow"), str(self._folder), down=True)
        except OSError as error:
            code = "4.3.1" if error.errno in _FULL else "4.3.0"
            outcome = Outcome("deferred", Reply.untrusted(451, f"{code} {error.strerror}"), str(self._folder), down=True)
        else:
            outcome = self._delivered
        return [outcome] * len(delivery.recipients)

    def _write(self, delivery: Delivery) -> None:
        message = delivery.message
        name = f"{int(message.received_at)}.{delivery.id}.{self._suffix}"
        # A try that was given up may still be writing: each has a file of its own until it is whole.
        draft = self._folder / "tmp" / f"{name}.{os.getpid()}-{next(self._numbers)}"
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "wb", buffering=0) as file:
                for piece in itertools.chain((message.trace,), message.stored.chunks(PIECE)):
                    view = memoryview(piece)
                    while view:
                        view = view[file.write(view) :]
                os.fsync(file.fileno())
            os.rename(draft, self._folder / "new" / name)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(draft)
            raise
        _sync(self._folder / "new")

    async def close(self) -> None:
        await super().close()
        self._threads.close()


def _make(folder: Path) -> None:
    """The folder and those above it that are missing, durable and private."""
    if folder.is_dir():
        return
    if not folder.parent.is_dir():
        _make(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(0o700)
    _sync(folder.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
