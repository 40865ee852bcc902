"""Who sends the mail: the one place that knows the generators.

``gateway load`` does; Postfix's smtp-source, which never pipelines, is there for a cross-check. Both are
processes of their own, on a core of their own. Probes (for the time from the last dot to the far side) are
sent from here, a few among many.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import stage
from .far import Far
from .stage import OTHER_CORE, Failed, Server, program

GATEWAY = str(Path(sys.executable).with_name("gateway"))
SENDER, RECIPIENT = "a@client.example", "b@bench.example"
#: Probes a second, and the connections that share them.
PROBES, PROBERS = 200, 20


@dataclass
class Run:
    """``cpu``: seconds of the server's. ``others``: share of the server's core that went neither to it nor to nobody."""

    messages: int
    seconds: float
    cpu: float
    others: float

    @property
    def rate(self) -> float:
        return self.messages / self.seconds

    @property
    def cost(self) -> float:
        """µs of server CPU a message."""
        return self.cpu / self.messages * 1e6

    @property
    def busy(self) -> float:
        """The server's share of a core."""
        return self.cpu / self.seconds


def drive(
    server: Server,
    size: int,
    sessions: int,
    messages: int,
    *,
    reuse: bool = True,
    pipelined: bool = False,
    bdat: bool = False,
    recipients: int = 1,
    by: str = "load",
    timeout: float = 120.0,
    settle: Callable[[int], None] | None = None,
) -> Run:
    """``messages`` of ``size`` octets over ``sessions`` connections, until each has its 250 and
    ``settle(messages)`` returned. ``by``: "load" or "smtp-source". Raises Failed where one has not."""
    before, busy = stage.cpu_of(server.process.pid), stage.core_busy(stage.SERVER_CORE)
    if by == "load":
        words = ["--messages", str(messages), "--recipients", str(recipients)]
        words += [*["--per-connection", "1"] * (not reuse), *["--pipeline"] * pipelined, *["--bdat"] * bdat]
        seconds = float(_load(server, size, sessions, words, timeout)["seconds"])
    else:
        seconds = _smtp_source(server, size, sessions, messages, reuse, recipients, timeout)
    if settle is not None:
        ended = time.monotonic()
        settle(messages)
        seconds += time.monotonic() - ended
    cpu = stage.cpu_of(server.process.pid) - before
    others = (stage.core_busy(stage.SERVER_CORE) - busy - cpu) / seconds
    return Run(messages, seconds, cpu, max(0.0, others))


def _smtp_source(server: Server, size: int, sessions: int, messages: int, reuse: bool, recipients: int, timeout: float) -> float:
    command = [program("smtp-source"), *["-d"] * reuse, "-s", str(sessions), "-m", str(messages), "-l", str(size)]
    command += ["-r", str(recipients), "-f", SENDER, "-t", RECIPIENT, f"inet:127.0.0.1:{server.port}"]
    started = time.monotonic()
    done = _run(command, timeout)
    if done.returncode or done.stderr:
        raise Failed(f"smtp-source: {done.stderr.strip()[-300:] or done.returncode}")
    return time.monotonic() - started


def _load(server: Server, size: int, sessions: int, words: Sequence[str], timeout: float) -> dict[str, Any]:
    return _report(_run(_load_command(server, size, sessions, words), timeout))


def _load_command(server: Server, size: int, sessions: int, words: Sequence[str]) -> list[str]:
    command = [GATEWAY, "load", f"127.0.0.1:{server.port}", "--sessions", str(sessions), "--size", str(size)]
    return [*command, "--from", SENDER, "--to", RECIPIENT, "--json", *words]


def _run(command: Sequence[str], timeout: float) -> subprocess.CompletedProcess[str]:
    try:
        with stage.on_cores([OTHER_CORE]):
            return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise Failed(f"the messages of a run were not taken within {timeout:.0f} s") from None


def _report(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What ``gateway load`` found. Raises Failed where a message was not taken; one that found no session in time
    is no fault."""
    if not done.stdout:
        raise Failed(f"gateway load: {done.stderr.strip()[-300:]}")
    report: dict[str, Any] = json.loads(done.stdout)
    counts = report["messages"]
    if report["failure"] or counts["refused"] or counts["broken"] or not counts["accepted"]:
        why = [report["failure"], *report["texts"].values(), *(f"{what}: {count}" for what, count in report["errors"].items())]
        raise Failed(
            f"{counts['accepted']:,} of {counts['begun']:,} messages were taken; {'; '.join(dict.fromkeys(filter(None, why)))[:300]}"
        )
    return report


# ------------------------------------------------------------------- latency


def paced(server: Server, size: int, sessions: int, rate: float, seconds: float, probe: Far | None = None) -> dict[str, float]:
    """``rate`` messages a second at fixed times. Milliseconds: ``p50``, ``p99``, ``max`` of the reply after the data,
    from when MAIL was due; with a far side that reads probes, ``hook p50`` … from a probe's last dot to its arrival.
    ``unsent``: messages that found no session in time. Raises Failed."""
    if probe is not None:
        rate = max(1.0, rate - PROBES)
    command = _load_command(server, size, sessions, ["--rate", f"{rate:.0f}", "--seconds", f"{seconds:g}"])
    found: dict[str, float] = {}
    with stage.on_cores([OTHER_CORE]):
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            if probe is not None:
                assert probe.forget is not None
                assert probe.ages is not None
                probe.forget()
                count = asyncio.run(_probe(server.port, size, seconds))
                output = process.communicate(timeout=seconds + 60)
                ages = probe.ages()
                if ages.get("count", 0) < count:
                    raise Failed(f"{ages.get('count', 0)} of {count} probes came")
                found = {f"hook {name}": ages[name] for name in ("p50", "p99", "max")}
            else:
                output = process.communicate(timeout=seconds + 60)
        except subprocess.TimeoutExpired:
            raise Failed(f"the messages were not taken within {seconds + 60:.0f} s") from None
        except (OSError, asyncio.IncompleteReadError) as error:
            raise Failed(f"a probe was not taken: {error}") from None
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
    report = _report(subprocess.CompletedProcess(command, process.returncode, *output))
    told = report["latency_ms"]
    return {"p50": told["p50"], "p99": told["p99"], "max": told["max"], "unsent": report["messages"]["unsent"], **found}


async def _probe(port: int, size: int, seconds: float) -> int:
    """Sends probes, evenly; each says in its first line when its last dot went out. Answers how many went.
    Raises OSError where one was not taken."""
    begin, sent = time.monotonic() + 0.3, 0
    filler = b"\r\n" + (b"x" * 76 + b"\r\n") * (size // 78)

    async def client(at: float) -> None:
        nonlocal sent
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        expect = partial(stage.heard, reader)
        await expect(b"220")
        writer.write(b"EHLO client.example\r\n")
        await expect(b"250")
        while at < begin + seconds - 0.5:
            await asyncio.sleep(at - time.monotonic())
            for line, code in ((f"MAIL FROM:<{SENDER}>", b"250"), (f"RCPT TO:<{RECIPIENT}>", b"250"), ("DATA", b"354")):
                writer.write(line.encode() + b"\r\n")
                await expect(code)
            writer.write(b"X-Sent: %.6f\r\n%b.\r\n" % (time.monotonic(), filler))
            await expect(b"250")
            sent += 1
            at += PROBERS / PROBES
        writer.close()
        await writer.wait_closed()

    await asyncio.wait_for(asyncio.gather(*(client(begin + number / PROBES) for number in range(PROBERS))), seconds + 30)
    return sent
