"""Daemon threads for work that blocks: disks, pipes, long computations, foreign functions.

The standard pool is joined when the interpreter ends, so one thread that hangs in a dead
mount or in somebody's function would keep a drained gateway from leaving. These do not.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
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

    def _serve(self) -> None:
        while (work := self._works.get()) is not None:
            work.run()
            del work
            self._idle.release()

    def close(self) -> None:
        """Threads end after the work they have; none is waited for."""
        for _ in range(self._started):
            self._works.put(None)
