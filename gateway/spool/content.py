"""Large contents: a file each, streamed to disk while it comes in.

Owns ``content/``: one file per message that is over ``message.INLINE_LIMIT``, named by the
message's id. Writes, syncs and reads run in a few threads (one at a time per file), what
is told comes back on the loop. A file is nothing until ``sync`` returned and a row names
it; files that no row names are removed when the spool opens. Goes through ``Files``.

Invariant: after a write or sync that failed, this file is never synced again.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .._parser import crc32
from ..contracts import SpoolError
from .files import Files

#: Octets per read when a file is checked.
_PIECE = 1 << 20

#: Syncs of large files wait on the disk, not on us: a few at once.
THREADS = 4

#: Errors of a read that say nothing about the file.
_TRANSIENT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR})

Done = Callable[[Any, Exception | None], None]


class SpoolFile:
    """One content file (``contracts.ContentFile``). All calls on the loop."""

    def __init__(self, contents: Contents, name: str) -> None:
        self.name = name
        self.size = 0
        self.sum = 0
        self.owned = False
        self._contents = contents
        self._files = contents.files
        self._path = os.path.join(contents.folder, name)
        self._descriptor: int | None = None
        self._error: Exception | None = None
        self._made = False
        self._synced = False
        self._todo: deque[tuple[Callable[[], Any], Done]] = deque()
        self._busy = False

    @property
    def path(self) -> str:
        return self._path

    def write(self, pieces: list[bytes], written: Callable[[Exception | None], None]) -> None:
        """``written`` gets None once the pieces were taken by the kernel, else the OSError."""
        self._run(lambda: self._write(pieces), lambda _, error: written(error))

    def sync(self, size: int, done: Done) -> None:
        """File and folder on stable storage; ``size`` is what the message says."""
        self._run(lambda: self._sync(size), done)

    def discard(self) -> None:
        """Close and remove it. Once a row names it, the row decides: then this does nothing."""
        if not self.owned:
            self._contents.forget(self)
            self._run(self._discard, _nobody)

    # One after the other for this file, in whichever thread is free.

    def _run(self, work: Callable[[], Any], done: Done) -> None:
        self._todo.append((work, done))
        if not self._busy:
            self._next()

    def _next(self) -> None:
        self._busy = bool(self._todo)
        if self._todo:
            work, done = self._todo.popleft()

            def finished(result: Any, error: Exception | None) -> None:
                try:
                    done(result, error)
                finally:
                    self._next()

            self._contents.run(work, finished)

    def _write(self, pieces: list[bytes]) -> None:
        if self._error is not None:
            raise self._error
        try:
            if self._descriptor is None:
                if self._made:
                    raise ValueError(f"{self._path} is written after its end")
                self._descriptor = self._files.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                self._made = True
            self._files.write(self._descriptor, pieces)
        except Exception as error:
            self._error = error
            raise
        for piece in pieces:
            self.sum = crc32(piece, self.sum)
            self.size += len(piece)

    def _sync(self, size: int) -> None:
        if self._error is not None:
            raise self._error
        if self._synced:
            return
        try:
            if self._descriptor is None or self.size != size:
                raise ValueError(f"{self._path} has {self.size} octets, the message says {size}")
            self._files.fsync(self._descriptor)
            descriptor, self._descriptor = self._descriptor, None
            self._files.close(descriptor)
            self._files.fsync_dir(self._contents.folder)
        except Exception as error:
            self._error = error
            raise
        self._synced = True

    def _discard(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        self._error = self._error or ValueError(f"{self._path} was discarded")
        try:
            if descriptor is not None:
                self._files.close(descriptor)
        finally:
            if self._made:
                self._files.unlink(self._path)


class Contents:
    """The folder, its threads and the files that are on their way in."""

    def __init__(self, folder: str, files: Files, loop: asyncio.AbstractEventLoop) -> None:
        self.folder = folder
        self.files = files
        self._loop = loop
        self._coming: dict[str, SpoolFile] = {}
        self._closed = False
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="spool-file")

    def new(self, name: str) -> SpoolFile:
        file = SpoolFile(self, name)
        self._coming[file.path] = file
        return file

    def coming(self, path: str) -> SpoolFile | None:
        """The file under this path, if no row names it yet."""
        return self._coming.get(path)

    def forget(self, file: SpoolFile) -> None:
        self._coming.pop(file.path, None)

    def run(self, work: Callable[[], Any], done: Done) -> None:
        """``work`` in a thread, ``done(result, error)`` on the loop."""

        def finished(future: asyncio.Future[Any]) -> None:
            if not future.cancelled():
                error = future.exception()
                done(None if error else future.result(), error if isinstance(error, Exception) else None)

        if self._closed:
            self._loop.call_soon(done, None, SpoolError("the spool is closed", known=True))
            return
        self._loop.run_in_executor(self._threads, work).add_done_callback(finished)

    def remove(self, names: list[str]) -> None:
        """Their rows are gone, durably. What cannot be removed now is an orphan at the next start."""

        def work() -> None:
            for name in names:
                try:
                    self.files.unlink(os.path.join(self.folder, name))
                except OSError:
                    continue

        self.run(work, _nobody)

    def check(self, path: str, size: int, sum_: int) -> str | None:
        """What is wrong with this file, if anything. In a thread. Raises OSError for what says
        nothing about the file (no more descriptors)."""
        found = total = 0
        try:
            descriptor = self.files.open(path, os.O_RDONLY)
            try:
                while piece := self.files.read(descriptor, _PIECE):
                    found = crc32(piece, found)
                    total += len(piece)
            finally:
                self.files.close(descriptor)
        except OSError as error:
            if error.errno in _TRANSIENT:
                raise
            return f"the content file cannot be read: {error}"
        return None if (total, found) == (size, sum_) else "the checksum of the content file does not fit"

    async def close(self) -> None:
        """Waits for the threads; files that no row names stay for the next start to remove."""
        self._closed = True
        await asyncio.to_thread(self._threads.shutdown)


def _nobody(_result: Any, _error: Exception | None) -> None:
    return None
