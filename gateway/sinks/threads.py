"""Daemon threads for work that blocks: disks, pipes, long computations, foreign functions.

The standard pool is joined when the interpreter ends, so one thread that hangs in a dead
mount or in somebody's function would keep a drained gateway from leaving. These do not.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _Work(Generic[T]):
    __slots__ = ("function", "future", "loop")

    def __init__(self, function: Callable[[], T], loop: asyncio.AbstractEventLoop) -> None:
        self.function = function
        self.loop = loop
        self.future: asyncio.Future[T] = loop.create_future()

    def run(self) -> None:
        # Nobody waits any more: a try that was given up must not be carried out later.
        if self.future.cancelled():
            return
        try:
            result = self.function()
        except BaseException as error:
            # A future refuses StopIteration, and an exit of the program is not this thread's to make.
            fault = error if isinstance(error, Exception) and not isinstance(error, StopIteration) else RuntimeError(repr(error))
            self._tell(lambda: self.future.set_exception(fault))
        else:
            self._tell(lambda: self.future.set_result(result))

    def _tell(self, settle: Callable[[], None]) -> None:
        # A closed loop refuses: then nobody is left to be told.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self._settle, settle)

    def _settle(self, settle: Callable[[], None]) -> None:
        if not self.future.done():
            settle()


class Each(AsyncIterator[T]):
    """What an iterator gives that is asked in threads. None of its items may be None."""

    def __init__(self, threads: Threads, items: Iterator[T]) -> None:
        self._threads = threads
        self._items = items
        self._lock = threading.Lock()
        self._asked = False
        self._closed = False

    async def __anext__(self) -> T:
        item = await self._threads.run(self._take)
        if item is None:
            raise StopAsyncIteration
        return item

    def _take(self) -> T | None:
        with self._lock:
            if self._closed:
                return None
            self._asked = True
        try:
            return next(self._items, None)
        finally:
            if self._answered():
                self._end()

    def _answered(self) -> bool:
        """The iterator is nobody's again; True: it was closed meanwhile."""
        with self._lock:
            self._asked = False
            return self._closed

    def close(self) -> None:
        """Give up what the iterator holds, a file above all; where a thread is asking it, that thread does so then."""
        with self._lock:
            closed, self._closed = self._closed, True
            asked = self._asked
        if not closed and not asked:
            self._end()

    def _end(self) -> None:
        if isinstance(self._items, Generator):
            self._items.close()
        # What is no generator gives its file back when nobody has it any more.
        self._items = iter(())


class Threads:
    """At most ``limit`` threads, started when they are needed."""

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._limit = limit
        self._works: queue.SimpleQueue[_Work[Any] | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._started = 0

    async def run(self, function: Callable[[], T]) -> T:
        """What ``function`` returns or raises. Cancelled before it began, it is not called at all."""
        work = _Work(function, asyncio.get_running_loop())
        if not self._idle.acquire(blocking=False) and self._started < self._limit:
            self._started += 1
            threading.Thread(target=self._serve, name=f"{self._name}-{self._started}", daemon=True).start()
        self._works.put(work)
        return await work.future

    def each(self, items: Iterator[T]) -> Each[T]:
        """What an iterator gives that blocks."""
        return Each(self, items)

    def _serve(self) -> None:
        while (work := self._works.get()) is not None:
            work.run()
            del work
            self._idle.release()

    def close(self) -> None:
        """Threads end after the work they have; none is waited for."""
        for _ in range(self._started):
            self._works.put(None)
