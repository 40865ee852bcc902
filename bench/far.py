"""The far side: who takes what the server under measurement carries on, and counts it.

For ``relay`` an SMTP sink, for ``webhook`` an HTTP receiver; for ``durable`` a port where nobody is.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .peers import smtp_sink_command
from .stage import FAR_CORE, Failed, free_port, listens, running


@dataclass
class Far:
    """``count``: how many messages it has had so far; None where there is nobody to count.
    ``ages``: of the probes since it was last told to ``forget`` them, in ms, by name;
    ``count`` is how many."""

    port: int
    count: Callable[[], int] | None = None
    ages: Callable[[], dict[str, float]] | None = None
    forget: Callable[[], object] | None = None
    _owed: int = 0

    def settle(self, messages: int, patience: float) -> None:
        """Returns when so many more have come. Raises Failed where they do not."""
        if self.count is None:
            return
        self._owed += messages
        deadline = time.monotonic() + patience
        while (have := self.count()) < self._owed:
            if time.monotonic() > deadline:
                raise Failed(f"{self._owed - have:,} of {self._owed:,} messages did not reach the far side within {patience:.0f} s")
            time.sleep(0.003)


@contextlib.contextmanager
def _smtp(folder: Path) -> Iterator[Far]:
    port, told = free_port(), folder / "upstream.out"
    with running(smtp_sink_command(port, "-c"), FAR_CORE, folder / "upstream.log", stdout=told) as process:
        listens(port, process)

        def count() -> int:
            with told.open("rb") as file:
                file.seek(max(0, told.stat().st_size - 200))
                found = re.findall(rb"mesg=(\d+)\r", file.read())
            return int(found[-1]) if found else 0

        yield Far(port, count)


@contextlib.contextmanager
def _http(folder: Path) -> Iterator[Far]:
    port = free_port()
    command = [sys.executable, "-m", "bench.receiver", str(port)]
    with running(command, FAR_CORE, folder / "receiver.log", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        listens(port, process)

        def tell(word: bytes = b"tell") -> dict[str, Any]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(word + b"\n")
            process.stdin.flush()
            told: dict[str, Any] = json.loads(process.stdout.readline())
            return told

        def ages() -> dict[str, float]:
            told = tell()
            return {**told["ms"], "count": told["aged"]}

        yield Far(port, lambda: int(tell()["messages"]), ages, lambda: tell(b"new"))


@contextlib.contextmanager
def far_side(mode: str, folder: Path) -> Iterator[Far]:
    """Who takes it in this mode."""
    if mode == "relay":
        with _smtp(folder) as far:
            yield far
    elif mode == "webhook":
        with _http(folder) as far:
            yield far
    else:
        yield Far(free_port())
