"""How the cost of a message grows with what surrounds it, on one machine.

``python -m bench.scale [--only queue,connections,recipients,size,workers,balance,idle] [--html FILE] [--repeat 3] [--minutes 10]``

``queue``        1,000 to 1,000,000 messages wait in the spool (laid there by ``bench.spools``, for a dead sink); CPU of a
                 message that is accepted durably meanwhile. 1.5 GB of disk
``connections``  10 to 10,000 connections that all send; CPU of a message
``recipients``   1 to 1,000 recipients; CPU of a message and of a recipient
``size``         1 KiB to 100 MiB; CPU of a message and of a KiB, highest memory. What is over 256 KiB goes through a file
``workers``      one and two worker processes; CPU of a message
``balance``      how evenly 4 to 2,000 connections fall to two workers
``idle``         connections that say EHLO and nothing more: memory of each, CPU of all

Mail is 1 KiB unless it says so, discarded unless it says so, and sent by ``gateway load`` from core 1, never
pipelined. The gateway runs whole (event log, metrics) on core 0, two workers on both. Where connections are many
a short run comes before the long one and is taken off it, so that connecting drops out. CPU is user and system time of
all processes of the gateway. Values take turns (but for the queue, which only grows); each figure is the median of ``repeat`` rounds. No round begins
after ``minutes``; what was left out is told.

Exit code 1, with a sentence, where a bound is broken: a message (of ``size``: a KiB, of ``recipients``: a
recipient) costs more than 1.5 times what it costs at the best smaller value; the gateway takes more than 300 MiB; an
idle connection more than 6 KiB. ``--smoke`` runs all of it small, and holds no bound: it shows that it works.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import generator, stage
from .endurance import MOST_MEMORY, memory
from .plots import figure, html_table, page, plot
from .pressure import MEMORY_BOUND, CrowdProcess
from .spools import fill
from .stage import OTHER_CORE, SERVER_CORE, Server, a_folder, free_port

#: A cost may be so many times the best at a smaller value.
FLAT = 1.5
#: Octets of a message, and the sessions that send, unless a dimension says otherwise.
SIZE, SESSIONS = 1024, 100
#: Seconds that a run may take, and the start of a gateway on a full spool.
PATIENCE, PATIENCE_START = 600.0, 60.0

CONFIG = """
hostname = "bench.example"
workers = {workers}

[[listeners]]
address = "127.0.0.1:0"

[limits]
connections = 20000
connections_per_client = 20000
message_size = "200 MiB"

[spool]
path = "{folder}/spool"
minimum_free = "1%"

[sinks.out]
{sink}

[[routes]]
recipients = ["*"]
clients = ["127.0.0.0/8"]
sink = "out"
"""
DISCARD = 'type = "discard"'


@dataclass
class Found:
    """One dimension: ``rows`` by value, figure by name; several of a name are rounds."""

    title: str
    across: str
    plots: dict[str, tuple[str, ...]]
    rows: dict[float, dict[str, list[float]]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    left_out: int = 0

    def add(self, value: float, figures: dict[str, float]) -> None:
        row = self.rows.setdefault(value, {})
        for name, one in figures.items():
            row.setdefault(name, []).append(one)

    def median(self, value: float, name: str) -> float:
        return statistics.median(self.rows[value][name])

    def flat(self, name: str, what: str) -> None:
        """A fault where this cost grows. ``what``: whose cost it is."""
        best = float("inf")
        for value in sorted(self.rows):
            cost = self.median(value, name)
            if cost > best * FLAT:
                self.faults.append(
                    f"{what} costs {cost:.3g} at {value:,.0f} {self.across}, {cost / best:.1f} times the best before; {FLAT} is the bound"
                )
            best = min(best, cost)


@dataclass(frozen=True)
class Budget:
    """Until when rounds may begin (monotonic), how many, and whether all is small."""

    until: float
    repeat: int
    smoke: bool

    def rounds(self, found: Found, values: Sequence[float]) -> Iterator[float]:
        """Values in turn, round by round. The first round is always run."""
        for number in range(self.repeat):
            for value in values:
                if number and time.monotonic() > self.until:
                    found.left_out += 1
                else:
                    yield value


@contextlib.contextmanager
def a_gateway(folder: Path, sink: str = DISCARD, workers: int = 1) -> Iterator[Server]:
    """Ready to be sent to."""
    text = CONFIG.format(folder=folder, sink=sink, workers=workers)
    with stage.serving(text, folder, PATIENCE_START, [SERVER_CORE, OTHER_CORE][:workers]) as (ports, process):
        yield Server("gateway", ports[0], process)


def send(server: Server, messages: int, *, sessions: int = SESSIONS, size: int = SIZE, recipients: int = 1) -> float:
    """Seconds of CPU that the gateway took for it. Exits where it was refused."""
    return generator.drive(server, size, min(sessions, messages), messages, recipients=recipients, timeout=PATIENCE).cpu


# ------------------------------------------------------------------ dimensions


def queue(budget: Budget) -> Found:
    found = Found(
        "Messages waiting in the spool",
        "messages waiting",
        {"CPU of a message accepted durably (µs)": ("µs",), "memory, highest (MiB)": ("MiB",)},
    )
    many = (100, 1000) if budget.smoke else (1_000, 10_000, 100_000, 1_000_000)
    messages = 200 if budget.smoke else 5000
    with a_folder() as folder:
        laid = 0
        sink = f'type = "relay"\nhosts = ["127.0.0.1:{free_port()}"]\ntls = "off"\non_failure = "dead_letter"'
        for value in many:
            fill(folder / "spool", "out", value - laid, recipient="b@bench.example", size=512)
            laid = value
            for _ in range(budget.repeat):
                with a_gateway(folder, sink) as server:
                    send(server, messages // 10)
                    spent = send(server, messages)
                    found.add(value, {"µs": spent / messages * 1e6, "MiB": memory(server.process.pid)[1]})
                laid += messages + messages // 10
                if time.monotonic() > budget.until:
                    break
            print(f"queue: {value:,} waiting: {found.median(value, 'µs'):.1f} µs", file=sys.stderr)
    found.flat("µs", "a message (µs)")
    return found


def connections(budget: Budget) -> Found:
    found = Found("Connections that send", "connections", {"CPU of a message (µs)": ("µs",), "memory, highest (MiB)": ("MiB",)})
    many = (10, 50) if budget.smoke else (10, 100, 1000, 10_000)
    messages = 300 if budget.smoke else 15_000
    for value in budget.rounds(found, many):
        count = int(value)
        with a_folder() as folder, a_gateway(folder) as server:
            send(server, 100, sessions=10)
            # Connecting is in both, and drops out of the difference.
            short = send(server, 2 * count, sessions=count)
            long = send(server, 2 * count + messages, sessions=count)
            found.add(value, {"µs": max(long - short, 0.0) / messages * 1e6, "MiB": memory(server.process.pid)[1]})
            print(f"connections: {count:,}: {found.rows[value]['µs'][-1]:.1f} µs", file=sys.stderr)
    found.flat("µs", "a message (µs)")
    return found


def recipients(budget: Budget) -> Found:
    found = Found(
        "Recipients of a message", "recipients", {"CPU of a recipient (µs)": ("µs a recipient",), "CPU of a message (µs)": ("µs",)}
    )
    many = (1, 10) if budget.smoke else (1, 10, 100, 1000)
    for value in budget.rounds(found, many):
        count = int(value)
        messages = 50 if budget.smoke else max(100, 20_000 // (count + 3))
        with a_folder() as folder, a_gateway(folder) as server:
            send(server, 100)
            spent = send(server, messages, recipients=count, sessions=20) / messages * 1e6
            found.add(value, {"µs": spent, "µs a recipient": spent / count})
            print(f"recipients: {count:,}: {spent:.1f} µs", file=sys.stderr)
    found.flat("µs a recipient", "a recipient (µs)")
    return found


def size(budget: Budget) -> Found:
    found = Found(
        "Size of a message",
        "KiB",
        {"CPU of a KiB (µs)": ("µs a KiB",), "CPU of a message (ms)": ("ms",), "memory, highest (MiB)": ("MiB",)},
    )
    many = (1, 512) if budget.smoke else (1, 10, 100, 1024, 10_240, 102_400)
    for value in budget.rounds(found, many):
        kibs = int(value)
        messages = 3 if budget.smoke else max(3, min(10_000, 300_000 // kibs))
        with a_folder() as folder, a_gateway(folder) as server:
            send(server, 20, sessions=2)
            # So many large ones at once as there are connections: memory is of all of them.
            sessions = 100 if kibs <= 100 else 4
            spent, most = send(server, messages, size=kibs * 1024, sessions=sessions), memory(server.process.pid)[1]
            found.add(value, {"ms": spent / messages * 1e3, "µs a KiB": spent / messages / kibs * 1e6, "MiB": most})
            print(f"size: {kibs:,} KiB: {spent / messages * 1e3:.3f} ms, {most:.0f} MiB", file=sys.stderr)
    found.flat("µs a KiB", "a KiB (µs)")
    for value in sorted(found.rows):
        if (taken := found.median(value, "MiB")) > MOST_MEMORY:
            found.faults.append(f"{value:,.0f} KiB: the gateway took {taken:.0f} MiB; {MOST_MEMORY:.0f} MiB is the bound")
    return found


def workers(budget: Budget) -> Found:
    found = Found("Worker processes", "workers", {"CPU of a message (µs)": ("µs",)})
    messages = 500 if budget.smoke else 15_000
    for value in budget.rounds(found, (1, 2)):
        count = int(value)
        with a_folder() as folder, a_gateway(folder, workers=count) as server:
            send(server, 200, sessions=50)
            spent = send(server, messages)
            found.add(value, {"µs": spent / messages * 1e6})
            print(f"workers: {count}: {spent / messages * 1e6:.1f} µs", file=sys.stderr)
    found.add(2, {"× one worker": found.median(2, "µs") / found.median(1, "µs")})
    return found


def balance(budget: Budget) -> Found:
    """The worker that got more, in % of the connections: 50 is even."""
    found = Found("Connections that fall to two workers", "connections at a time", {"the larger share (%)": ("larger share, %",)})
    many = (4, 50) if budget.smoke else (4, 20, 100, 500, 2000)
    for value in budget.rounds(found, many):
        count = int(value)
        with a_folder() as folder, a_gateway(folder, workers=2) as server:
            send(server, count * 4, sessions=count)
            # The log is behind by a moment.
            time.sleep(0.5)
            share = connected(folder)
            found.add(value, {"larger share, %": max(share.values()) / share.total() * 100})
            print(f"balance: {count} connections: {dict(share)}", file=sys.stderr)
    return found


def connected(folder: Path) -> Counter[int]:
    """Connections by worker, from the event log."""
    with (folder / "gateway.log").open("rb") as lines:
        return Counter(int(json.loads(line).get("worker", 0)) for line in lines if b'"event":"connected"' in line)


def idle(budget: Budget) -> Found:
    found = Found(
        "Idle connections", "idle connections", {"memory of each (KiB)": ("KiB each",), "CPU of all, of a core (%)": ("% of a core",)}
    )
    many = (20, 100) if budget.smoke else (100, 1000, 10_000)
    quiet = 1.0 if budget.smoke else 5.0
    for value in budget.rounds(found, many):
        count = int(value)
        with a_folder() as folder, a_gateway(folder) as server:
            pid = server.process.pid
            send(server, 300, sessions=50)
            time.sleep(0.5)
            before = stage.memory_of(pid)
            with CrowdProcess(server.port, count, 0, 3.0) as crowd:
                crowd.told()
                time.sleep(0.5)
                each = (stage.memory_of(pid) - before) / count * 1024
                rested = stage.cpu_of(pid)
                time.sleep(quiet)
                spent = (stage.cpu_of(pid) - rested) / quiet * 100
            found.add(value, {"KiB each": max(each, 0.0), "% of a core": spent})
            print(f"idle: {count:,}: {each:.2f} KiB each, {spent:.2f} % of a core", file=sys.stderr)
    most = max(found.rows)
    if (each := found.median(most, "KiB each")) > MEMORY_BOUND["clear"]:
        found.faults.append(f"an idle connection takes {each:.1f} KiB; {MEMORY_BOUND['clear']:.0f} KiB is the bound")
    return found


DIMENSIONS: dict[str, Callable[[Budget], Found]] = {
    "queue": queue,
    "connections": connections,
    "recipients": recipients,
    "size": size,
    "workers": workers,
    "balance": balance,
    "idle": idle,
}
#: Of the time: a million messages have to be laid down first.
SHARES = {"queue": 3}


# ----------------------------------------------------------------- the report


def cells(found: Found) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: medians, with the least and the most of the rounds where there are several."""
    names = list(dict.fromkeys(name for row in found.rows.values() for name in row))
    rows = []
    for value in sorted(found.rows):
        row = [f"{value:,.0f}"]
        for name in names:
            rounds = found.rows[value].get(name, [])
            told = figure(statistics.median(rounds)) if rounds else ""
            row.append(f"{told} ({figure(min(rounds))} to {figure(max(rounds))})" if len(rounds) > 1 else told)
        rows.append(row)
    return [found.across, *names], rows


def markdown(found: Found) -> str:
    heads, rows = cells(found)
    return "\n".join(["| " + " | ".join(heads) + " |", "|" + "---:|" * len(heads), *("| " + " | ".join(row) + " |" for row in rows)])


def html(results: Sequence[Found], about: str) -> str:
    sections = []
    for found in results:
        drawn = []
        for up, names in found.plots.items():
            series = {name: [(value, found.median(value, name)) for value in sorted(found.rows)] for name in names}
            drawn.append(plot(series, found.across, up))
        sections.append((found.title, html_table(*cells(found)) + "\n" + "\n".join(drawn)))
    return page("gateway: scale on one machine", about, sections)


def enough_descriptors() -> None:
    """10,000 connections want as many descriptors, here and in whom we start. Exits with a sentence."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 12_000
    if hard != resource.RLIM_INFINITY and hard < wanted:
        sys.exit(f"a process may have {hard} descriptors here, and {wanted} are needed: raise the hard limit (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(DIMENSIONS), help="dimensions, separated by commas")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=10.0, help="no round of any dimension begins after its share of this")
    parser.add_argument("--html", type=Path, help="tables and plots as one page")
    parser.add_argument("--json", type=Path, help="every single round")
    parser.add_argument("--smoke", action="store_true", help="small, once, and without bounds")
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    if unknown := [name for name in names if name not in DIMENSIONS]:
        parser.error(f"no such dimension: {', '.join(unknown)}; there are: {', '.join(DIMENSIONS)}")
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("two cores are needed: one for the gateway, one for everybody else")
    if not options.smoke:
        enough_descriptors()
    started, load = time.monotonic(), os.getloadavg()
    results: list[Found] = []
    before = os.sched_getaffinity(0)
    try:
        shares = [SHARES.get(name, 1) for name in names]
        for number, name in enumerate(names, 1):
            until = started + options.minutes * 60 * sum(shares[:number]) / sum(shares)
            results.append(DIMENSIONS[name](Budget(until, 1 if options.smoke else options.repeat, options.smoke)))
    finally:
        os.sched_setaffinity(0, before)
    about = (
        f"Python {platform.python_version()}, {os.cpu_count()} cores, {time.monotonic() - started:.0f} s; load average {load[0]:.2f} at the "
        f"beginning, {os.getloadavg()[0]:.2f} at the end. Medians of {1 if options.smoke else options.repeat} rounds"
    )
    for found in results:
        print(f"\n{found.title}\n\n{markdown(found)}")
        if found.left_out:
            print(f"\n{found.left_out} rounds were left out: the time was over.")
    print(f"\n{about}.")
    if options.html:
        options.html.write_text(html(results, about + "."))
    if options.json:
        options.json.write_text(json.dumps({found.title: found.rows for found in results}, indent=1))
    faults = [f"{found.title}: {fault}" for found in results for fault in found.faults]
    if faults and not options.smoke:
        sys.exit("\n" + "\n".join(faults))


if __name__ == "__main__":
    main()
