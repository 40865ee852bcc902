"""The ``stdout`` sink: the body of the standard webhook, one line a delivery.

A reader that is slow or gone never blocks the loop: one thread writes, a delivery that waits
too long is deferred and its line is not written later, unless its writing had begun.
"""

from __future__ import annotations

import asyncio
import os
import select
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..contracts import AsyncSink, Delivery, Outcome
from ..mime.formats import format_named
from ..reply import Reply
from .threads import Threads

if TYPE_CHECKING:
    from ..config import StdoutConfig


class StdoutSink(AsyncSink):
    """``type = "stdout"``: writes to the descriptor that ``sys.stdout`` has when it is opened."""

    def __init__(self, name: str, config: StdoutConfig, hostname: str) -> None:
        super().__init__(name)
        self._timeout = config.timeout
        self._format = format_named("standard")
        self._threads = Threads(f"stdout-{name}", 1)
        self._descriptor = -1
        self._broken = False

    async def open(self) -> None:
        sys.stdout.flush()
        self._descriptor = sys.stdout.fileno()

    async def carry(self, delivery: Delivery) -> Sequence[Outcome]:
        try:
            async with asyncio.timeout(self._timeout):
                await self._threads.run(lambda: self._write(delivery))
        except TimeoutError:
            outcome = _deferred("4.4.2", "nobody reads standard output")
        except OSError as error:
            outcome = _deferred("4.4.1", f"standard output: {error.strerror}")
        else:
            outcome = Outcome("delivered", Reply(250, "2.0.0", "written"), "stdout")
        return [outcome] * len(delivery.recipients)

    def _write(self, delivery: Delivery) -> None:
        line = b"".join(self._format(delivery, time.time()).chunks()) + b"\n"
        if self._broken:
            # Half a line stands there: what follows must not be read as its end.
            line = b"\n" + line
        view = memoryview(line)
        while view:
            try:
                written = os.write(self._descriptor, view)
            except BlockingIOError:
                # Somebody who shares it made it non-blocking.
                select.select([], [self._descriptor], [], 1.0)
                continue
            view = view[written:]
            self._broken = bool(view)

    async def close(self) -> None:
        await super().close()
        self._threads.close()


def _deferred(code: str, text: str) -> Outcome:
    return Outcome("deferred", Reply.untrusted(451, f"{code} {text}"), "stdout", down=True)
