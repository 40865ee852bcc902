"""The ``python`` sink: a function of the program that the gateway runs in.

The function gets a Message whose envelope names only the recipients of this delivery, and
acknowledges by returning: None is delivered, a Reply says it itself (2yz delivered, 5yz
failed, anything else deferred). Whatever it raises is its own bug: the mail is deferred, and
the loop's exception handler is told.

A coroutine function runs on the loop; a plain one in a thread, which nothing can interrupt:
when its time is up the delivery is deferred though the function may still finish.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from .. import mime
from ..contracts import DELIVERED, AsyncSink, Delivery, Outcome
from ..message import Envelope, Message, read_with
from ..reply import Reply
from .threads import Threads

if TYPE_CHECKING:
    from ..config import PythonConfig

LATE = Outcome("deferred", Reply(451, "4.4.2", "the program did not answer in time"))


class PythonSink(AsyncSink):
    """Made by the library alone: no file can name a function."""

    def __init__(self, name: str, config: PythonConfig, hostname: str) -> None:
        super().__init__(name)
        self._function: Callable[[Message], Reply | Awaitable[Reply | None] | None] = config.function
        self._timeout = config.timeout
        self._threads: Threads | None = None if _is_coroutine(config.function) else Threads(f"python-{name}", config.concurrency)
        # Message.parsed() must work in the function, whoever imported what.
        read_with(mime.parse_message)

    async def carry(self, delivery: Delivery) -> Sequence[Outcome]:
        call = partial(self._function, _own(delivery))
        deadline = asyncio.timeout(self._timeout)
        try:
            async with deadline:
                result = call() if self._threads is None else await self._threads.run(call)
                if inspect.isawaitable(result):
                    result = await result
        except TimeoutError:
            if not deadline.expired():
                raise
            return [LATE] * len(delivery.recipients)
        return [_outcome(result)] * len(delivery.recipients)

    async def close(self) -> None:
        await super().close()
        if self._threads is not None:
            self._threads.close()


def _is_coroutine(function: Callable[..., object]) -> bool:
    while isinstance(function, partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _own(delivery: Delivery) -> Message:
    """The message as this delivery has it: with its recipients and no others."""
    message = delivery.message
    envelope = message.envelope
    return dataclasses.replace(message, envelope=Envelope(envelope.mail_from, envelope.mail_params, list(delivery.recipients)))


def _outcome(result: object) -> Outcome:
    if result is None:
        return DELIVERED
    if not isinstance(result, Reply):
        raise TypeError(f"the function must return None or a Reply, not {type(result).__name__}")
    if result.code < 300:
        return Outcome("delivered", result)
    return Outcome("failed" if result.permanent else "deferred", result)
