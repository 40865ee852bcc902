"""One turn of the event loop: what came in is looked at first, then all that is to be written goes out together.

uvloop writes at once. Where each answer is written between two reads, it wakes a peer on the same machine that went to
sleep after the last one, and waking costs more than answering does; across a network, reads and writes in turns
have the same code and the same tables in and out of the processor's cache. So whoever has something to write posts
itself, and is asked for it when the turn is over: before the loop waits again, so that nothing is ever late for it.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod


class Posted(ABC):
    """Has something to write. (No Protocol: the method of a class that is known is called at a tenth of the cost.)"""

    __slots__ = ()

    @abstractmethod
    def deliver(self) -> None:
        """Write it. Never raises; who is posted again meanwhile is asked again."""


class Turn:
    """For all who write by the same hand: the connections of one listener, or of one sink. ``now``: loop time at which the
    first of this turn was posted."""

    def __init__(self) -> None:
        self._posted: list[Posted] = []
        self.now = 0.0

    def post(self, one: Posted) -> None:
        """``one.deliver`` is called once when this turn is over."""
        if not self._posted:
            loop = asyncio.get_running_loop()
            self.now = loop.time()
            loop.call_soon(self._over)
        self._posted.append(one)

    def _over(self) -> None:
        posted, self._posted = self._posted, []
        for one in posted:
            try:
                one.deliver()
            except Exception as error:
                # The others' octets are not to suffer for it.
                asyncio.get_running_loop().call_exception_handler({"message": f"{one!r} could not write", "exception": error})
