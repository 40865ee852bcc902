"""What tests want of event loops: to hold on whichever a program brings, and to wait for what comes about."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop

#: Seconds that such a test may take.
PATIENCE = 90.0
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


def on_both_loops(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run this coroutine once on uvloop and once on asyncio's own loop."""

    @functools.wraps(test)
    def run(loop: str, **fixtures: Any) -> None:
        async def body() -> None:
            async with asyncio.timeout(PATIENCE):
                await test(**fixtures)

        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(body())

    signature = inspect.signature(test)
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*signature.parameters.values(), inspect.Parameter("loop", inspect.Parameter.KEYWORD_ONLY)]
    )
    marked: Callable[..., None] = pytest.mark.parametrize("loop", list(LOOPS))(run)
    return marked


async def until(look: Callable[[], object]) -> None:
    """Returns when ``look`` answers something true. Raises TimeoutError after half a minute."""
    for _ in range(6000):
        if look():
            return
        await asyncio.sleep(0.005)
    raise TimeoutError("it did not come about")
