"""What the load tools themselves cost, beside Postfix's: ``python -m bench.tools [--pairs 5] [--messages 30000]``.

The generators send to one smtp-sink, in turn; then the receivers take from our generator, in turn. CPU is user
and system time of the whole process, start included; a run without messages is taken off it. The one that is
measured has core 1 to itself. Median of all pairs.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from gateway.tools.load import Plan, run

from .peers import smtp_sink_command
from .stage import OTHER_CORE, ROOT, SERVER_CORE, cpu_of, free_port, listens, program, running

SESSIONS = 100


def spent(command: Sequence[str]) -> float:
    """Seconds of CPU of a child, from its start to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    os.sched_setaffinity(0, {OTHER_CORE})
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def generators(pairs: int, messages: int, folder: Path) -> dict[str, list[float]]:
    """µs of the generator's CPU a message."""
    port = free_port()
    found: dict[str, list[float]] = {}
    ours = [sys.executable, "-m", "gateway", "load", f"127.0.0.1:{port}", "-s", str(SESSIONS)]
    with running(smtp_sink_command(port), SERVER_CORE, folder / "sink.log") as sink:
        listens(port, sink)
        for _ in range(pairs):
            for size in (1024, 10240, 102400):
                count = messages if size < 100_000 else messages // 10
                idle = spent([*ours, "-m", "1", "-s", "1"])
                theirs = [program("smtp-source"), "-d", "-s", str(SESSIONS), "-m", str(count), "-l", str(size)]
                for name, cost in (
                    ("smtp-source", spent([*theirs, f"inet:127.0.0.1:{port}"])),
                    ("gateway load", spent([*ours, "-m", str(count), "-l", str(size)]) - idle),
                    ("gateway load --pipeline", spent([*ours, "-m", str(count), "-l", str(size), "-p"]) - idle),
                ):
                    found.setdefault(f"{name}, {size // 1024} KiB", []).append(cost / count * 1e6)
    return found


def receivers(pairs: int, messages: int, folder: Path) -> dict[str, list[float]]:
    """µs of the receiver's CPU a message."""
    found: dict[str, list[float]] = {}
    for _ in range(pairs):
        for size in (1024, 102400):
            for name in ("smtp-sink", "gateway receive"):
                port = free_port()
                command = {
                    "smtp-sink": smtp_sink_command(port),
                    "gateway receive": [sys.executable, "-m", "gateway", "receive", "smtp", "--listen", f"127.0.0.1:{port}"],
                }[name]
                with running(command, OTHER_CORE, folder / "receiver.log") as receiver:
                    listens(port, receiver)
                    time.sleep(0.1)
                    os.sched_setaffinity(0, {SERVER_CORE})
                    count = messages * 2 if size == 1024 else messages // 4
                    before = cpu_of(receiver.pid)
                    report = run(Plan(f"127.0.0.1:{port}", sessions=SESSIONS, messages=count, sizes=[size]))
                    assert report.good, report
                    found.setdefault(f"{name}, {size // 1024} KiB", []).append((cpu_of(receiver.pid) - before) / count * 1e6)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tools", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--messages", type=int, default=30_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gateway-bench-") as folder:
        found = generators(options.pairs, options.messages, Path(folder)) | receivers(options.pairs, options.messages, Path(folder))
    print("| tool | CPU a message (µs), median | all runs |\n|---|---:|---|")
    for name, costs in found.items():
        print(f"| {name} | {statistics.median(costs):.1f} | {', '.join(f'{cost:.1f}' for cost in costs)} |")


if __name__ == "__main__":
    main()
