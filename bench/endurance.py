"""Long outages and large queues: what a worker needs then, and what others notice of it.

``python -m bench.endurance restart|outage|herd|fairness [options]``

``restart``   a spool with a million deferred messages. The gateway starts on it, its files not in
              the kernel's memory: with a dead sink, then with one that is back. How soon a new mail
              has its 250 (bound: 2 s), all rows are scheduled and first tries begun (60 s), and the
              worker's memory (300 MiB, resident, its highest point).
``outage``    ``--rate`` messages a second of 1 KiB while the sink is dead, for ``--seconds``: memory (300 MiB).
``herd``      100,000 deferred messages wait for a webhook that comes back: the most that it ever had
              in hand (its ``concurrency``), the most in a second (its ``rate``), copies.
``fairness``  latency from the client's MAIL to the receiver of a healthy sink, at a steady rate, with
              and without 100,000 messages for another sink that is dead: connections refused, or
              taken and never answered. Two gateways stand side by side and get mail in turn, so that
              whatever else the machine does hits both. Median of the rounds' p99 ratio (bound: 2).

The gateway has core 0, all others core 1. Exit code 1, with a sentence, where a bound is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gateway.admin import control

from . import stage
from .spools import fill, forget
from .stage import OTHER_CORE, ROOT, a_folder, free_port, program

ACCEPTS_WITHIN = 2.0
TRIES_WITHIN = 60.0
MOST_MEMORY = 300.0  # MiB
MOST_LATENCY = 2.0  # times the baseline
CONCURRENCY = 20

CONFIG = """
hostname = "bench.example"

[[listeners]]
address = "127.0.0.1:{port}"

[limits]
connections_per_client = 1000

[spool]
path = "{folder}/spool"

[sinks.out]
type = "webhook"
url = "http://127.0.0.1:{out}/"
format = "raw"
concurrency = {concurrency}
{rate}

[sinks.healthy]
type = "webhook"
url = "http://127.0.0.1:{healthy}/"
format = "raw"

[[routes]]
recipients = ["*@healthy.example"]
sink = "healthy"

[[routes]]
recipients = ["*"]
sink = "out"
"""


class Receiver:
    """``bench.receiver`` on a port."""

    def __init__(self, port: int, delay: float = 0.0) -> None:
        os.sched_setaffinity(0, {OTHER_CORE})  # inherited
        command = [sys.executable, "-m", "bench.receiver", str(port), "--delay", str(delay)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True, text=True)
        stage.listens(port, self.process)

    def seen(self, line: str = "tell") -> dict[str, Any]:
        """What it saw so far; ``"new"``: and forget the ages."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        result: dict[str, Any] = json.loads(self.process.stdout.readline())
        return result

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.communicate()


def memory(pid: int) -> tuple[float, float]:
    """MiB resident: now, and at the highest point."""
    found = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Vm"))
    return int(found["VmRSS"].split()[0]) / 1024, int(found["VmHWM"].split()[0]) / 1024


def one_mail(port: int, recipient: str) -> float:
    """Seconds from the connection to the 250 after the end of data. Raises OSError."""
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
        lines = (b"", b"EHLO client.example", b"MAIL FROM:<a@client.example>", b"RCPT TO:<%s>" % recipient.encode(), b"DATA")
        for line in (*lines, b"Subject: new\r\n\r\nnew\r\n."):
            if line:
                sock.sendall(line + b"\r\n")
            reply = b""
            while not (reply.endswith(b"\n") and reply.splitlines()[-1][3:4] == b" "):
                if not (more := sock.recv(4096)):
                    raise ConnectionError(f"closed after {line!r}")
                reply += more
            if reply[:1] not in (b"2", b"3"):
                raise ConnectionError(f"{line!r} was answered {reply!r}")
    return time.monotonic() - started


def until(true: Callable[[], bool], seconds: float, every: float = 0.05) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True


def queued(folder: Path, sink: str) -> int:
    with contextlib.suppress(OSError):
        return int(control.call(folder / "spool" / "0" / control.NAME, "status")["queue"].get(sink, {}).get("queued", 0))
    return -1


def logged(folder: Path, event: str) -> bool:
    return f'"event":"{event}"'.encode() in (folder / "gateway.log").read_bytes()


def moment(folder: Path, event: str) -> float | None:
    """Unix seconds of the first such event."""
    with (folder / "gateway.log").open("rb") as lines:
        for line in lines:
            if f'"event":"{event}"'.encode() in line:
                return _unix(json.loads(line)["time"])
    return None


def _unix(told: str | float) -> float:
    from datetime import datetime

    return datetime.fromisoformat(told).timestamp() if isinstance(told, str) else told


# ------------------------------------------------------------------- restart


def restart(options: argparse.Namespace) -> list[str]:
    faults: list[str] = []
    with a_folder() as folder:
        started = time.monotonic()
        fill(folder / "spool", "out", options.messages, recipient="b@bench.example")
        print(f"{options.messages:,} messages were laid in the spool in {time.monotonic() - started:.0f} s", file=sys.stderr)
        print(
            "| sink | first 250 after start | all scheduled | first try begun | carried within 60 s | new mail meanwhile: slowest 250 | RSS now, highest |"
        )
        print("|---|---:|---:|---:|---:|---:|---:|")
        for kind in ("dead", "back"):
            faults += _restarted(options, folder, kind)
    return faults


def _restarted(options: argparse.Namespace, folder: Path, kind: str) -> list[str]:
    port, out = free_port(), free_port()
    text = CONFIG.format(port=port, folder=folder, out=out, healthy=free_port(), concurrency=64, rate="")
    forget(folder / "spool")
    faults = []
    with contextlib.ExitStack() as stack:
        receiver = stack.enter_context(Receiver(out)) if kind == "back" else None
        wall, started = time.time(), time.monotonic()
        (folder / "gateway.toml").write_text(text)
        command = [sys.executable, "-m", "gateway", "serve", "--config", str(folder / "gateway.toml")]
        process = stack.enter_context(stage.running(command, stage.SERVER_CORE, folder / "gateway.log"))

        def takes() -> bool:
            if process.poll() is not None:
                sys.exit(f"the gateway did not start:\n{(folder / 'gateway.log').read_text()[-4000:]}")
            try:
                one_mail(port, "b@bench.example")
            except OSError:
                return False
            return True

        until(takes, 120, 0.02)
        accepted = time.monotonic() - started
        scheduled: float | None = None
        if until(lambda: queued(folder, "out") >= 0, 60):
            left = queued(folder, "out") + (receiver.seen()["messages"] if receiver else 0)
            if left >= options.messages:
                scheduled = time.monotonic() - started
            else:
                faults.append(f"{left} of {options.messages} messages are scheduled")
        slowest, carried, first = 0.0, 0, None
        end = started + (TRIES_WITHIN if kind == "back" else options.seconds)
        while time.monotonic() < end:
            time.sleep(0.5)
            slowest = max(slowest, one_mail(port, "b@bench.example"))
            if first is None and (told := moment(folder, "attempted")) is not None:
                first = told - wall
        carried = receiver.seen()["messages"] if receiver else 0
        now, highest = memory(process.pid)
        print(
            f"| {kind} | {accepted:.2f} s | {'never' if scheduled is None else f'{scheduled:.2f} s'} "
            f"| {'never' if first is None else f'{first:.2f} s'} | {carried:,} | {slowest * 1000:.0f} ms | {now:.0f}, {highest:.0f} MiB |",
            flush=True,
        )
    if accepted > ACCEPTS_WITHIN:
        faults.append(f"new mail was accepted {accepted:.1f} s after the start; {ACCEPTS_WITHIN:.0f} s is the bound")
    if first is None or first > TRIES_WITHIN or scheduled is None or scheduled > TRIES_WITHIN:
        faults.append(f"not all was scheduled and tried within {TRIES_WITHIN:.0f} s")
    if highest > MOST_MEMORY:
        faults.append(f"the worker took {highest:.0f} MiB; {MOST_MEMORY:.0f} MiB is the bound")
    return [f"{kind}: {fault}" for fault in faults]


# -------------------------------------------------------------------- outage


def outage(options: argparse.Namespace) -> list[str]:
    """The sink is dead; smtp-source sends a second's worth each second."""
    port = free_port()
    taken, slots, sizes = 0, 0, []
    with a_folder() as folder, _dead(options.dead) as out:
        text = CONFIG.format(port=port, folder=folder, out=out, healthy=free_port(), concurrency=64, rate="")
        with stage.serving(text, folder) as (_, process):
            os.sched_setaffinity(0, {OTHER_CORE})
            command = [program("smtp-source"), "-d", "-s", "50", "-m", str(options.rate), "-l", "1024"]
            command += ["-f", "a@client.example", "-t", "b@bench.example", f"inet:127.0.0.1:{port}"]
            started = time.monotonic()
            while (passed := time.monotonic() - started) < options.seconds:
                time.sleep(max(0.0, slots - passed))
                slots = max(slots + 1, int(passed))
                done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
                if done.returncode or done.stderr:
                    sys.exit(f"smtp-source: {done.stderr[-2000:]}")
                taken += options.rate
                sizes.append(memory(process.pid)[0])
                if len(sizes) % 10 == 0:
                    print(f"{passed:.0f} s: {taken:,} messages, {sizes[-1]:.0f} MiB", file=sys.stderr)
            seconds = time.monotonic() - started
            cpu = stage.cpu_of(process.pid)
            highest = memory(process.pid)[1]
            rows = queued(folder, "out")
        disk = sum(path.stat().st_size for path in (folder / "spool").rglob("*") if path.is_file()) / 2**20
    print("| messages | a second | RSS at the beginning, at the end, highest | CPU of the gateway | spool on disk |")
    print("|---:|---:|---:|---:|---:|")
    print(
        f"| {taken:,} | {taken / seconds:,.0f} | {sizes[0]:.0f}, {sizes[-1]:.0f}, {highest:.0f} MiB | {cpu / seconds:.0%} | {disk:,.0f} MiB |"
    )
    faults = []
    if highest > MOST_MEMORY:
        faults.append(f"the worker took {highest:.0f} MiB; {MOST_MEMORY:.0f} MiB is the bound")
    if rows < taken:
        faults.append(f"{rows} messages wait of {taken} that were accepted")
    if taken / seconds < 0.95 * options.rate:
        faults.append(f"only {taken / seconds:,.0f} messages a second came in: a busy machine, this was no run at {options.rate}")
    return faults


# ---------------------------------------------------------------------- herd


def herd(options: argparse.Namespace) -> list[str]:
    port, out = free_port(), free_port()
    with a_folder() as folder:
        fill(folder / "spool", "out", options.messages, recipient="b@bench.example")
        rate = f'rate = "{options.rate}/s"' if options.rate else ""
        text = CONFIG.format(port=port, folder=folder, out=out, healthy=free_port(), concurrency=CONCURRENCY, rate=rate)
        with stage.serving(text, folder) as (_, process):
            if not until(lambda: logged(folder, "sink_down"), 30):
                sys.exit("the gateway did not notice that its sink is dead")
            with Receiver(out, options.delay) as receiver:
                back = time.monotonic()
                until(lambda: receiver.seen()["messages"] > 0, 120)
                first = time.monotonic() - back
                until(lambda: receiver.seen()["messages"] >= options.messages and queued(folder, "out") == 0, 600, 0.5)
                seconds = time.monotonic() - back - first
                seen = receiver.seen()
                left = queued(folder, "out")
            highest = memory(process.pid)[1]
    print(
        "| messages | most at once (concurrency) | most in a second (rate) | first after it came back | all after that | copies | RSS, highest |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|")
    print(
        f"| {seen['ids']:,} | {seen['most_at_once']} ({CONCURRENCY}) | {seen['most_in_a_second']:,} ({options.rate or 'none'}) | {first:.1f} s | {seconds:.1f} s "
        f"| {seen['messages'] - seen['ids']} | {highest:.0f} MiB |"
    )
    faults = []
    if seen["most_at_once"] > CONCURRENCY:
        faults.append(f"the sink had {seen['most_at_once']} deliveries at once; its concurrency is {CONCURRENCY}")
    # What a late lane may make up for (queue.CATCH_UP), and what a busy receiver counts late.
    if options.rate and seen["most_in_a_second"] > options.rate * 1.07 + 1:
        faults.append(f"the sink had {seen['most_in_a_second']} deliveries in a second; its rate is {options.rate}")
    if seen["ids"] != options.messages or left:
        faults.append(f"{seen['ids']} of {options.messages} messages came, {left} wait")
    if seen["messages"] != seen["ids"]:
        faults.append(f"{seen['messages'] - seen['ids']} came twice")
    return faults


# ------------------------------------------------------------------ fairness


async def _steady(ports: Sequence[int], rate: float, seconds: float, connections: int = 20) -> None:
    """Mail to the healthy sink of each, evenly and in turn; each says when it was to be sent, whatever
    it had to wait for."""
    begin = time.monotonic() + 0.1

    async def client(port: int, first: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        expect = partial(stage.heard, reader)
        await expect(b"220")
        writer.write(b"EHLO client.example\r\n")
        await expect(b"250")
        at = first
        while at < begin + seconds:
            await asyncio.sleep(at - time.monotonic())
            writer.write(b"MAIL FROM:<a@client.example>\r\nRCPT TO:<b@healthy.example>\r\nDATA\r\n")
            for code in (b"250", b"250", b"354"):
                await expect(code)
            writer.write(b"X-Sent: %.6f\r\n\r\n%b\r\n.\r\n" % (at, b"x" * 900))
            await expect(b"250")
            at += connections / rate
        writer.close()
        await writer.wait_closed()

    turns = [(port, begin + (number + turn / len(ports)) / rate) for number in range(connections) for turn, port in enumerate(ports)]
    await asyncio.gather(*(client(port, first) for port, first in turns))


@contextlib.contextmanager
def _dead(kind: str) -> Iterator[int]:
    """The port of a far side that refuses connections, or takes them and is silent."""
    if kind == "refused":
        yield free_port()
        return
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as sock:
        yield int(sock.getsockname()[1])


def fairness(options: argparse.Namespace) -> list[str]:
    faults = []
    print(
        "| dead destination | p50, p99, p99.9 without its queue (ms) | with it (ms) | ratio of p99, median (all rounds) | CPU without, with |"
    )
    print("|---|---:|---:|---|---:|")
    for kind in ("refused", "silent"):
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(_dead(kind))
            folders = [stack.enter_context(a_folder()) for _ in range(2)]
            fill(folders[1] / "spool", "out", options.messages, recipient="b@bench.example", due=time.time() - 1, down=False)
            ports, receivers, processes = [free_port(), free_port()], [], []
            for folder, port in zip(folders, ports, strict=True):
                healthy = free_port()
                receivers.append(stack.enter_context(Receiver(healthy)))
                text = CONFIG.format(port=port, folder=folder, out=out, healthy=healthy, concurrency=CONCURRENCY, rate="")
                processes.append(stack.enter_context(stage.serving(text, folder))[1])
            os.sched_setaffinity(0, {OTHER_CORE})
            asyncio.run(_steady(ports, options.rate, 2.0))
            rounds, before = [], [stage.cpu_of(process.pid) for process in processes]
            for number in range(options.rounds):
                for receiver in receivers:
                    receiver.seen("new")
                asyncio.run(_steady(ports if number % 2 else ports[::-1], options.rate, options.seconds))
                time.sleep(0.5)
                seen = [receiver.seen() for receiver in receivers]
                if min(one["aged"] for one in seen) < options.rate * options.seconds * 0.98:
                    sys.exit(f"only {[one['aged'] for one in seen]} messages came to the healthy sinks")
                rounds.append([one["ms"] for one in seen])
                print(f"{kind} {number + 1}/{options.rounds}: {rounds[-1][0]} without, {rounds[-1][1]} with", file=sys.stderr)
            spent = [stage.cpu_of(process.pid) - start for process, start in zip(processes, before, strict=True)]
        ratios = sorted(there["p99"] / alone["p99"] for alone, there in rounds)
        cells = [
            ", ".join(f"{statistics.median(one[side][name] for one in rounds):.1f}" for name in ("p50", "p99", "p99.9")) for side in (0, 1)
        ]
        ratio = statistics.median(ratios)
        print(
            f"| {kind} | {cells[0]} | {cells[1]} | {ratio:.2f} ({', '.join(f'{one:.2f}' for one in ratios)}) | {spent[0]:.1f}, {spent[1]:.1f} s |",
            flush=True,
        )
        if ratio > MOST_LATENCY:
            faults.append(f"{kind}: p99 to the healthy sink is {ratio:.1f} times its baseline; {MOST_LATENCY:.0f} is the bound")
    return faults


# ---------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.endurance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(required=True)

    def kind(name: str, work: Callable[[argparse.Namespace], list[str]]) -> argparse.ArgumentParser:
        result = kinds.add_parser(name)
        result.set_defaults(work=work, name=name)
        return result

    one = kind("restart", restart)
    one.add_argument("--messages", type=int, default=1_000_000)
    one.add_argument("--seconds", type=float, default=20.0, help="how long the gateway stays with a dead sink")
    one = kind("outage", outage)
    one.add_argument("--rate", type=int, default=5000, help="messages a second")
    one.add_argument("--seconds", type=float, default=60.0)
    one.add_argument("--dead", choices=("refused", "silent"), default="refused", help="how the sink is dead")
    one = kind("herd", herd)
    one.add_argument("--messages", type=int, default=100_000)
    one.add_argument("--delay", type=float, default=0.002, help="seconds that the sink takes over a message")
    one.add_argument("--rate", type=int, default=1500, help="the sink's rate, 0 for none")
    one = kind("fairness", fairness)
    one.add_argument("--messages", type=int, default=100_000)
    one.add_argument("--rate", type=float, default=150.0, help="messages a second to each healthy sink")
    one.add_argument("--seconds", type=float, default=10.0, help="of each round")
    one.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("two cores are needed: one for the gateway, one for everybody else")
    started, load = time.monotonic(), os.getloadavg()
    faults = options.work(options)
    print(
        f"\nPython {platform.python_version()}, {options.name}, {time.monotonic() - started:.0f} s; "
        f"load average {load[0]:.2f} at the beginning, {os.getloadavg()[0]:.2f} at the end."
    )
    if faults:
        sys.exit("\n" + "\n".join(faults))


if __name__ == "__main__":
    main()
