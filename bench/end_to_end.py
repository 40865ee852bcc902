"""The gateway beside its peers: messages a second, server CPU a message, latency; in one run, in turn.

``python -m bench.end_to_end [--install] [--only CELL …] [--full | --smoke] [--minutes 20]``

A cell is mode/size/sessions, with ``/new`` (a connection for each message), ``/pipelined`` or ``/bdat``
behind it; ``latency/MODE`` and ``start`` are cells as well. ``--list`` names them, ``--only discard/1KiB``
runs those that begin so (a re-run replaces what is known of them and leaves the rest).

``discard``   taken and dropped.
``durable``   the next hop is down: the 250 means that it is on disk.
``relay``     the next hop has it; measured until the last message is there.
``webhook``   an HTTP receiver has it (ours: ``raw``, and ``standard`` in a row of its own).
``workers``   ours alone, one worker and two, on two cores, of which the generator takes its share.

Each run has a fresh server, with a folder of its own, and a fresh far side; the server is warmed, then
``--seconds`` long measured. In each round each server has its turn, in another order; a ratio is that
of two runs of one round. The server has a core to itself, generator and far side have the other.
The gateway runs whole: checks, promises, event log into a file, metrics, and is the installed command, with its
defaults but for one: as many connections out as there are sessions, which is what its neighbours have.

Writes ``build/peers/results.json`` (every run) and ``bench/RESULTS.md``; another folder with ``--output``.
``--smoke`` is for seeing that all of it works: its figures mean nothing, and go to ``build/peers/smoke``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import generator, report, stage
from .far import Far, far_side
from .generator import Run
from .peers import FOLDER, PEERS, Place, install, versions
from .stage import ROOT, Failed, Server, a_folder, serving

MODES = ("discard", "durable", "relay", "webhook")
SIZES = {"1KiB": 1 << 10, "10KiB": 10 << 10, "100KiB": 100 << 10, "1MiB": 1 << 20}
SESSIONS = (10, 100, 500)
#: Octets that one run may put on the disk, messages that it may have.
DISK, MOST = 1 << 30, 400_000
#: Seconds after which a server that had little to do counts as warm.
WARMING = 10.0
#: Seconds that a run may take, and its far side to have all of it.
PATIENCE = 60.0
#: What of the time is for the rounds; the rest is latency's.
ROUNDS = 0.85

CONFIG = """
hostname = "bench.example"
workers = {workers}

[[listeners]]
address = "127.0.0.1:0"

[spool]
path = "{folder}/spool"

[admin]
address = "127.0.0.1:0"

[sinks.out]
{sink}

[[routes]]
recipients = ["*"]
clients = ["127.0.0.0/8"]
sink = "out"
"""

#: As many connections out as sessions in: its neighbours have them, too.
_OUT = "\nconcurrency = {sessions}"
_RELAY = 'type = "relay"\nhosts = ["127.0.0.1:{far}"]\ntls = "off"\non_failure = "dead_letter"' + _OUT
SINKS = {
    "discard": 'type = "discard"',
    "workers": 'type = "discard"',
    "durable": _RELAY,
    "relay": _RELAY,
    "webhook": 'type = "webhook"\nurl = "http://127.0.0.1:{far}/"\nformat = "raw"' + _OUT,
}
STANDARD = 'type = "webhook"\nurl = "http://127.0.0.1:{far}/"' + _OUT


@dataclass(frozen=True)
class Cell:
    mode: str
    size: str
    sessions: int
    #: "", "new", "pipelined", "new/pipelined", "bdat" (MAIL RCPT BDAT LAST in one write), "smtp-source" (who generates)
    how: str = ""

    @property
    def key(self) -> str:
        return "/".join([self.mode, self.size, str(self.sessions), *[self.how] * bool(self.how)])

    @property
    def octets(self) -> int:
        return SIZES[self.size]


USUAL = (
    Cell("discard", "1KiB", 100),
    Cell("discard", "1KiB", 100, "pipelined"),
    Cell("discard", "1KiB", 100, "bdat"),
    Cell("discard", "1KiB", 100, "new"),
    Cell("discard", "1KiB", 100, "smtp-source"),
    Cell("discard", "1KiB", 10),
    Cell("discard", "1KiB", 500),
    Cell("discard", "10KiB", 100),
    Cell("discard", "100KiB", 100),
    Cell("discard", "1MiB", 10),
    Cell("durable", "1KiB", 100),
    Cell("durable", "1KiB", 10),
    Cell("durable", "100KiB", 10),
    Cell("relay", "1KiB", 100),
    Cell("relay", "1KiB", 10),
    Cell("relay", "100KiB", 10),
    Cell("webhook", "1KiB", 100),
    Cell("webhook", "1KiB", 10),
    Cell("webhook", "100KiB", 10),
    Cell("workers", "1KiB", 100),
)
FULL = tuple(
    Cell(mode, size, sessions, how)
    for mode in MODES
    for size in SIZES
    for sessions in SESSIONS
    for how in ("", "new", "pipelined", "new/pipelined", "bdat")
)
SMOKE = tuple(Cell(mode, "1KiB", 10) for mode in MODES)
#: Latency and the cross-check of the generators are measured there.
TYPICAL = {mode: Cell(mode, "1KiB", 100) for mode in MODES}


# ------------------------------------------------------------------- servers


@contextlib.contextmanager
def _ours(name: str, sink: str, place: Place, workers: int = 1) -> Iterator[Server]:
    text = CONFIG.format(folder=place.folder, sink=sink.format(far=place.far, sessions=place.sessions), workers=workers)
    cores = stage.CORES[:2] if place.mode == "workers" else [stage.SERVER_CORE]
    with serving(text, place.folder, core=cores) as (ports, process):
        yield Server(name, ports[0], process)


@dataclass(frozen=True)
class Contender:
    name: str
    start: Callable[[Place], contextlib.AbstractContextManager[Server]]
    absent: Callable[[], str | None] = lambda: None
    warm: float = 0.5


def contenders(cell: Cell) -> list[Contender]:
    """Ours first. BDAT is for ours alone: no peer that discards offers it. The other generator is a cross-check of two."""
    found = [Contender("gateway", lambda place: _ours("gateway", SINKS[place.mode], place))]
    if cell.mode == "webhook":
        found.append(Contender("gateway, standard", lambda place: _ours("gateway, standard", STANDARD, place)))
    if cell.mode == "workers":
        found.append(Contender("gateway, 2 workers", lambda place: _ours("gateway, 2 workers", SINKS["discard"], place, 2)))
    peers = [peer for peer in PEERS if cell.mode in peer.modes and cell.how != "bdat"]
    if cell.how == "smtp-source":
        peers = [peer for peer in peers if peer.name == "smtp-sink"]
    return found + [Contender(peer.name, peer.start, peer.absent, peer.warm) for peer in peers]


# ---------------------------------------------------------------------- runs


@dataclass
class Pace:
    """How long: seconds to measure, and what part of the usual goes to warming a server up before."""

    seconds: float
    warm: float = 1.0


@contextlib.contextmanager
def _warmed(cell: Cell, contender: Contender, pace: Pace) -> Iterator[tuple[Server, Far, float]]:
    """A server that has had its share of mail, its far side, and the messages a second it took of late."""
    if (why := contender.absent()) is not None:
        raise Failed(why)
    with (
        a_folder() as folder,
        far_side(cell.mode, folder) as far,
        contender.start(Place(cell.mode, folder, far.port, cell.sessions)) as server,
    ):
        # By its CPU: a compiler that learns while it runs (Node's) learns from work, not from waiting.
        wanted, until = contender.warm * pace.warm, time.monotonic() + WARMING
        count = max(cell.sessions, 20)
        while True:
            run = _drive(cell, server, far, count)
            left = wanted - stage.cpu_of(server.process.pid)
            if left <= 0 or time.monotonic() > until:
                break
            count = _count(cell, min(left / run.cpu * run.messages, run.rate * WARMING / 4) if run.cpu else count * 2)
        yield server, far, run.rate


def _count(cell: Cell, wanted: float) -> int:
    limit = DISK // cell.octets if cell.mode in ("durable", "relay") else MOST
    return max(20, cell.sessions, min(int(wanted), limit, MOST))


def _drive(cell: Cell, server: Server, far: Far, count: int) -> Run:
    return generator.drive(
        server,
        cell.octets,
        cell.sessions,
        count,
        reuse="new" not in cell.how,
        pipelined="pipelined" in cell.how or cell.how == "bdat",
        bdat=cell.how == "bdat",
        by="smtp-source" if cell.how == "smtp-source" else "load",
        timeout=PATIENCE,
        settle=lambda messages: far.settle(messages, PATIENCE),
    )


def measure(cell: Cell, contender: Contender, pace: Pace) -> Run:
    """Raises Failed with the reason where there is nothing to measure."""
    with _warmed(cell, contender, pace) as (server, far, rate):
        return _drive(cell, server, far, _count(cell, rate * pace.seconds))


def latency(cell: Cell, contender: Contender, pace: Pace, rate: float) -> dict[str, float]:
    """Milliseconds at this rate: ``p50``, ``p99``, ``max`` of the reply after the data, from when its MAIL was to be
    said; for a webhook ``hook p50`` … from the last dot to the whole request at the receiver."""
    with _warmed(cell, contender, pace) as (server, far, _):
        found = generator.paced(server, cell.octets, cell.sessions, rate, pace.seconds, probe=far if cell.mode == "webhook" else None)
        return {"rate": rate, **found}


def start() -> dict[str, float]:
    """Of a gateway that has nothing to do: seconds until it accepts, MiB of its processes."""
    with a_folder() as folder:
        began = time.monotonic()
        place = Place("discard", folder, 0, 0)
        with _ours("gateway", SINKS["discard"], place) as server:
            ready = time.monotonic() - began
            time.sleep(0.3)
            return {"seconds": ready, "mib": stage.memory_of(server.process.pid)}


# ---------------------------------------------------------------------- main


class Results:
    """What is known so far, from earlier runs as well; on disk after each cell."""

    def __init__(self, folder: Path, page: Path) -> None:
        self._file, self._page = folder / "results.json", page
        self.known: dict[str, Any] = {"about": {}, "runs": [], "latency": [], "start": []}

    def load(self) -> None:
        if self._file.exists():
            self.known = json.loads(self._file.read_text())

    def forget(self, wanted: Callable[[str], bool]) -> None:
        self.known["runs"] = [run for run in self.known["runs"] if not wanted(run["cell"])]
        self.known["latency"] = [run for run in self.known["latency"] if not wanted(f"latency/{run['mode']}")]
        if wanted("start"):
            self.known["start"] = []

    def save(self, about: Mapping[str, Any]) -> None:
        self.known["about"] = dict(about)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text(json.dumps(self.known, indent=1))
        self._page.write_text(report.page(self.known))

    def rate(self, cell: Cell, name: str) -> float | None:
        """Messages a second that this one took there, median."""
        rates = [
            run["messages"] / run["seconds"]
            for run in self.known["runs"]
            if (run["cell"], run["server"]) == (cell.key, name) and "fault" not in run
        ]
        return statistics.median(rates) if rates else None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


#: What ends a run and not the bench: it has a row, and the next one begins.
FAULTS = (Failed, OSError, ValueError, subprocess.SubprocessError)


def _sentence(fault: BaseException) -> str:
    text = str(fault) if isinstance(fault, Failed) else f"{type(fault).__name__}: {fault}"
    return " ".join(text.split())[:400]


def _rounds(cells: Sequence[Cell], options: argparse.Namespace, pace: Pace, results: Results, deadline: float) -> None:
    """Every cell once at least, whatever the time; then rounds until it is over."""
    failures: dict[tuple[str, str], list[str]] = {}
    began = time.monotonic()
    for number in range(options.rounds):
        for place, cell in enumerate(cells):
            if number and time.monotonic() > deadline:
                _say(f"the time is over: {number} whole rounds and {place} of {len(cells)} cells of the next")
                return
            turn = contenders(cell)
            turn = turn[number % len(turn) :] + turn[: number % len(turn)]
            for contender in turn:
                row: dict[str, Any] = {"cell": cell.key, "mode": cell.mode, "server": contender.name, "round": number}
                key = (cell.key, contender.name)
                try:
                    if len(before := failures.get(key, [])) > 1:
                        raise Failed(before[-1])  # twice is enough: each may take a minute
                    run = measure(cell, contender, pace)
                except FAULTS as failed:
                    row["fault"] = _sentence(failed)
                    failures.setdefault(key, []).append(row["fault"])
                    told = f"not measured: {row['fault']}"
                else:
                    row.update(asdict(run))
                    told = f"{run.rate:,.0f}/s, {run.cost:.1f} µs, core {run.busy:.2f}"
                results.known["runs"].append(row)
                _say(f"{time.monotonic() - began:5.0f} s  {number + 1}/{options.rounds}  {cell.key}  {contender.name}: {told}")
            results.save(_about(options))


def _latencies(modes: Sequence[str], options: argparse.Namespace, pace: Pace, results: Results) -> None:
    for number in range(2 if options.rounds > 1 else 1):
        for mode in modes:
            cell = SMOKE[MODES.index(mode)] if options.smoke else TYPICAL[mode]
            for contender in contenders(cell):
                row: dict[str, Any] = {"mode": mode, "server": contender.name, "round": number}
                capacity = results.rate(cell, contender.name)
                try:
                    if capacity is None:
                        raise Failed(f"its capacity is not known ({cell.key})")
                    row.update(latency(cell, contender, pace, max(1.0, math.floor(capacity / 2))))
                    told = ", ".join(f"{name} {value:,.2f}" for name, value in row.items() if isinstance(value, float))
                except FAULTS as failed:
                    row["fault"] = _sentence(failed)
                    told = f"not measured: {row['fault']}"
                results.known["latency"].append(row)
                _say(f"latency/{mode}  {contender.name}: {told}")
    results.save(_about(options))


def _about(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": "make bench-peers" + (f' PEERS_ARGS="{" ".join(options.arguments)}"' if options.arguments else ""),
        "seconds": options.seconds,
        "smoke": options.smoke,
        "versions": versions(),
        "machine": report.machine(),
        "cpu by": "cgroup" if stage.cgroups() is not None else "/proc",
        "peers": [{"name": peer.name, "modes": peer.modes, "promise": peer.promise} for peer in PEERS],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.end_to_end", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--install", action="store_true", help="bring the peers that npm and pip have into build/peers first")
    parser.add_argument("--only", action="append", metavar="CELL", help="only cells that begin so; may be repeated")
    parser.add_argument("--list", action="store_true", help="name the cells and end")
    parser.add_argument("--full", action="store_true", help="every mode, size, number of sessions and way: hours")
    parser.add_argument("--smoke", action="store_true", help="one size, fractions of a second: does it work?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="that each run measures")
    parser.add_argument("--minutes", type=float, default=20.0, help="no further round is begun after that (--full: not bounded)")
    parser.add_argument("--output", type=Path, help="a folder for results.json and RESULTS.md")
    options = parser.parse_args()
    options.arguments = [word for word in sys.argv[1:] if word != "--install"]
    if options.smoke:
        options.rounds, options.seconds = 1, 0.3
    cells = SMOKE if options.smoke else FULL if options.full else USUAL
    extra = [*(f"latency/{mode}" for mode in MODES), "start"]

    def wanted(key: str) -> bool:
        return not options.only or any(f"{key}/".startswith(f"{word.rstrip('/')}/") for word in options.only)

    chosen = [cell for cell in cells if wanted(cell.key)]
    if options.list:
        print("\n".join([*(cell.key for cell in chosen), *filter(wanted, extra)]))
        return
    if not chosen and not any(map(wanted, extra)):
        sys.exit(f"no cell begins with {', '.join(options.only)}; --list names them, --full --list all")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended
    if len(stage.CORES) < 2:
        sys.exit("two cores are needed: one for the server, one for everybody else")
    if options.install:
        for kind, fault in install().items():
            _say(f"{kind}: {fault}")
    folder = options.output or (FOLDER / "smoke" if options.smoke else FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    page = (folder if options.output or options.smoke else ROOT / "bench") / "RESULTS.md"
    results = Results(folder, page)
    if options.only:
        results.load()
        results.forget(wanted)
    pace = Pace(options.seconds, 0.1 if options.smoke else 1.0)
    begun = time.monotonic()
    deadline = math.inf if options.full else begun + options.minutes * 60 * ROUNDS
    try:
        if wanted("start"):
            results.known["start"] = [start() for _ in range(1 if options.smoke else 5)]
        _rounds(chosen, options, pace, results, deadline)
        _latencies([mode for mode in MODES if wanted(f"latency/{mode}")], options, Pace(options.seconds * 2, pace.warm), results)
    finally:
        results.save(_about(options))  # what there is, after Ctrl-C too
    _say(f"{(time.monotonic() - begun) / 60:.1f} minutes; {page}")


if __name__ == "__main__":
    main()
