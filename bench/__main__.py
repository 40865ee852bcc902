"""The end-to-end table: messages a second and server CPU per message, beside peers in the same run.

``python -m bench [--sizes 1,10,100] [--seconds 3] [--repeat 3] [--sessions 100] [--json FILE]``

Postfix's smtp-source generates: it reuses its connections and never pipelines. The server has
core 0 to itself, generator and upstream share core 1. The gateway runs whole: event log (into a
file), metrics, spool on disk. For each cell the median of ``repeat`` runs of about ``seconds``
seconds is shown; the servers take turns, so that a machine that drifts drifts for all.

CPU is user and system time of all processes of the server, from /proc. Where the server's core
was not busy (``busy`` in the JSON), messages a second are the generator's or the upstream's
limit: compare the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SERVER_CORE, OTHER_CORE = 0, 1
#: Octets that one run may put on the disk.
DISK = 2 * 2**30

CONFIG = """
hostname = "bench.example"

[[listeners]]
address = "127.0.0.1:0"

[limits]
connections_per_client = 1000

[spool]
path = "{folder}/spool"

[sinks.out]
{sink}

[[routes]]
recipients = ["*"]
clients = ["127.0.0.0/8"]
sink = "out"
"""

SINKS = {
    "discard": 'type = "discard"',
    "durable": 'type = "relay"\nhosts = ["127.0.0.1:{port}"]\ntls = "off"\non_failure = "dead_letter"',
    "relay": 'type = "relay"\nhosts = ["127.0.0.1:{port}"]\ntls = "off"\non_failure = "dead_letter"',
    "webhook": 'type = "webhook"\nurl = "http://127.0.0.1:{port}/"\nformat = "raw"',
    "webhook, standard": 'type = "webhook"\nurl = "http://127.0.0.1:{port}/"',
}


@dataclass
class Run:
    """One run: ``cpu`` in seconds of the server, ``busy`` its share of its core."""

    mode: str
    server: str
    size: int
    messages: int
    seconds: float
    cpu: float

    @property
    def rate(self) -> float:
        return self.messages / self.seconds

    @property
    def cost(self) -> float:
        """µs of server CPU a message."""
        return self.cpu / self.messages * 1e6

    @property
    def busy(self) -> float:
        return self.cpu / self.seconds


@dataclass
class Server:
    mode: str
    name: str
    port: int
    process: subprocess.Popen[bytes]


def program(name: str) -> str:
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if path is None:
        sys.exit(f"{name} is needed (Debian: apt install postfix)")
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: Sequence[str], core: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The process, in a group of its own, on one core; killed at the end."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})  # inherited, threads and all
    try:
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file, cwd=ROOT, start_new_session=True
            )
    finally:
        os.sched_setaffinity(0, before)
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def listens(port: int, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"{process.args!r} does not listen")
        time.sleep(0.02)


def cpu_of(group: int) -> float:
    """Seconds of CPU of all processes of this group."""
    total = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == group:
                    total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def serving(text: str, folder: Path, patience: float = 20.0) -> Iterator[tuple[list[int], subprocess.Popen[bytes]]]:
    """A gateway that goes by this configuration: the ports it listens on, in order, and its process.
    Its event log is ``gateway.log`` in ``folder``."""
    config, log = folder / "gateway.toml", folder / "gateway.log"
    config.write_text(text)
    command = [sys.executable, "-m", "gateway", "serve", "--config", str(config)]
    with running(command, SERVER_CORE, log) as process:
        deadline = time.monotonic() + patience
        while b'"ready"' not in (told := log.read_bytes()):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the gateway did not start:\n{told.decode()}")
            time.sleep(0.02)
        addresses = [json.loads(line)["address"] for line in told.splitlines() if b'"listening"' in line]
        yield [int(address.rpartition(":")[2]) for address in addresses], process


@contextlib.contextmanager
def gateway(mode: str, folder: Path) -> Iterator[Server]:
    port = free_port()
    with contextlib.ExitStack() as stack:
        if mode == "relay":
            user = ["-u", "root"] if os.geteuid() == 0 else []
            sink = stack.enter_context(
                running([program("smtp-sink"), *user, f"127.0.0.1:{port}", "1024"], OTHER_CORE, folder / "upstream.log")
            )
            listens(port, sink)
        elif mode.startswith("webhook"):
            command = [sys.executable, "-m", "bench.peers", "webhook", str(port)]
            listens(port, stack.enter_context(running(command, OTHER_CORE, folder / "upstream.log")))
        text = CONFIG.format(folder=folder, sink=SINKS[mode].format(port=port))
        ports, process = stack.enter_context(serving(text, folder))
        yield Server(mode, "gateway", ports[0], process)


@contextlib.contextmanager
def peer(name: str, folder: Path) -> Iterator[Server]:
    port = free_port()
    user = ["-u", "root"] if os.geteuid() == 0 else []
    command = {
        "smtp-sink": [program("smtp-sink"), *user, f"127.0.0.1:{port}", "1024"],
        "aiosmtpd": [sys.executable, "-m", "bench.peers", "aiosmtpd", str(port)],
    }[name]
    with running(command, SERVER_CORE, folder / "peer.log") as process:
        listens(port, process)
        yield Server("discard", name, port, process)


def drive(server: Server, size: int, sessions: int, messages: int) -> Run:
    """One run of smtp-source; ``size`` in octets."""
    command = [program("smtp-source"), "-d", "-s", str(sessions), "-m", str(messages), "-l", str(size)]
    command += ["-f", "a@client.example", "-t", "b@bench.example", f"inet:127.0.0.1:{server.port}"]
    before = cpu_of(server.process.pid)
    os.sched_setaffinity(0, {OTHER_CORE})
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    seconds = time.monotonic() - started
    if done.returncode or done.stderr:
        sys.exit(f"{server.name}, {server.mode}: smtp-source: {done.stderr[-2000:]}")
    return Run(server.mode, server.name, size, messages, seconds, cpu_of(server.process.pid) - before)


def measure(mode: str, name: str, size: int, sessions: int, seconds: float) -> Run:
    """A fresh server, a short run to warm it and to learn its speed, then the one that counts."""
    with tempfile.TemporaryDirectory(prefix="gateway-bench-", dir=os.environ.get("GATEWAY_BENCH_FOLDER")) as folder:
        place = Path(folder)
        with gateway(mode, place) if name == "gateway" else peer(name, place) as server:
            warm = drive(server, size, sessions, max(sessions * 2, 500))
            messages = int(max(sessions * 2, warm.rate * seconds))
            if mode == "durable":
                messages = min(messages, DISK // size)
            return drive(server, size, sessions, messages)


def table(runs: Sequence[Run], sizes: Sequence[int]) -> str:
    """Markdown: a row for each mode and server, the median of its runs in each cell."""
    lines = [
        "| mode | server | " + " | ".join(f"{size // 1024} KiB: messages/s (CPU µs)" for size in sizes) + " |",
        "|---|---|" + "---:|" * len(sizes),
    ]
    for mode, name in dict.fromkeys((run.mode, run.server) for run in runs):
        cells = []
        for size in sizes:
            mine = [run for run in runs if (run.mode, run.server, run.size) == (mode, name, size)]
            rate, cost = statistics.median(run.rate for run in mine), statistics.median(run.cost for run in mine)
            idle = " †" if statistics.median(run.busy for run in mine) < 0.9 else ""
            cells.append(f"{rate:,.0f} ({cost:,.1f}){idle}")
        lines.append(f"| {mode} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1,10,100", help="KiB, separated by commas")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--sessions", type=int, default=100)
    parser.add_argument("--modes", default=",".join(mode for mode in SINKS if "," not in mode) + ",webhook standard")
    parser.add_argument("--json", type=Path, help="every single run, as JSON")
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("two cores are needed: one for the server, one for everybody else")
    sizes = [int(size) * 1024 for size in options.sizes.split(",")]
    modes = [mode.replace("webhook standard", "webhook, standard") for mode in options.modes.split(",")]
    cells = [("discard", "smtp-sink"), ("discard", "aiosmtpd"), *((mode, "gateway") for mode in modes)]
    runs = []
    for number in range(options.repeat):
        for size in sizes:
            for mode, name in cells:
                run = measure(mode, name, size, options.sessions, options.seconds)
                runs.append(run)
                print(
                    f"{number + 1}/{options.repeat} {run.mode} {run.server} {size // 1024} KiB: {run.rate:.0f}/s, {run.cost:.1f} µs, busy {run.busy:.2f}",
                    file=sys.stderr,
                )
    print(f"Python {platform.python_version()}, {options.sessions} sessions, median of {options.repeat} runs.")
    print("† the server's core was not busy all the time: the generator or the upstream sets the pace, compare the CPU.\n")
    print(table(runs, sizes))
    if options.json:
        options.json.write_text(json.dumps([asdict(run) for run in runs], indent=1))


if __name__ == "__main__":
    main()
