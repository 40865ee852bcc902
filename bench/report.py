"""RESULTS.md out of results.json: goals, tables, latency, and what flatters whom.

Knows nothing of how it was measured. A ratio is made of two runs of the same round, and told as the
median of the rounds with the least and the greatest; which way round it is stands in each row.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

#: Below this share of its core a server was waiting for the generator or the far side.
BUSY = 0.9
#: Above this share of the server's core others disturbed the run.
DISTURBED = 0.1


@dataclass(frozen=True)
class Goal:
    """One row of DESIGN §9. ``by``: CPU a message, or messages a second. ``less``: ours over theirs, and less is
    better; else how many times better ours is. ``beside``: whose run, in which cell, is the other one."""

    what: str
    cell: str
    beside: str
    gate: float | None
    goal: float
    less: bool = False
    by: Literal["cost", "rate"] = "cost"
    other: str = ""
    ours: str = "gateway"

    @property
    def sign(self) -> str:
        return "≤" if self.less else "≥"


GOALS = (
    Goal("accept and discard, 1 KiB", "discard/1KiB/100", "smtp-sink", 1.3, 1.0, less=True),
    Goal("accept and discard, 1 KiB", "discard/1KiB/100", "aiosmtpd", None, 10),
    Goal("accept and discard, 1 KiB", "discard/1KiB/100", "smtp-server", None, 2),
    Goal("accept and discard, 100 KiB", "discard/100KiB/100", "smtp-server", 3, 5),
    Goal("accept and discard, 100 KiB", "discard/100KiB/100", "smtp-sink", 5, 8),
    Goal("pipelined, body with the next group", "discard/1KiB/100/pipelined", "gateway", 0.65, 0.5, less=True, other="discard/1KiB/100"),
    Goal("pipelined, MAIL RCPT BDAT LAST in one write", "discard/1KiB/100/bdat", "gateway", 0.65, 0.5, less=True, other="discard/1KiB/100"),
    Goal("durable accept, 100 sessions", "durable/1KiB/100", "Postfix hold", 10, 20, by="rate"),
    Goal("durable accept, 10 sessions", "durable/1KiB/10", "Postfix hold", 5, 8, by="rate"),
    Goal("durable accept, 100 KiB, 10 sessions", "durable/100KiB/10", "Postfix hold", 3, 6, by="rate"),
    Goal("relay", "relay/1KiB/100", "Postfix proxy", 3, 5),
    Goal("relay", "relay/1KiB/100", "Postfix queue", 12, 20),
    Goal("relay", "relay/1KiB/100", "smtp-server + nodemailer", 2.5, 4),
    Goal("webhook, `raw`", "webhook/1KiB/100", "smtp-server + undici", 1.8, 3),
    Goal("webhook, `raw`", "webhook/1KiB/100", "aiosmtpd + aiohttp", 5, 8),
    Goal("two workers", "workers/1KiB/100", "gateway", 1.15, 1.05, less=True, ours="gateway, 2 workers"),
)

FLATTERS = """\
For us:

- The generator is ours (`gateway load`), and so is the HTTP receiver; they know no server from another. The rows by smtp-source are
  the cross-check, and relays go to smtp-sink.
- Content is base64 lines without a dot at a line's start. Ours leaps to the octets that matter, smtp-sink and Postfix go
  octet by octet; many dots would cost everybody, and smtp-server the most.
- Durable: SQLite commits many messages at once, Postfix writes and syncs a file for each. That is the point, but at few sessions it
  shows less, and on a disk that syncs slowly Postfix with many cores would look better than here, with one.
- Postfix is several processes that were made to spread over cores; here it has one, as everybody. It also looks at each header
  and rewrites addresses.
- pip's and npm's newest that fit this Python and Node (`bench/peers`), and Debian's Postfix: others may have faster ones.
- Node compiles while it runs: its servers are warmed by 2 to 6 s of work before a run counts. smtp-server is as fast as it gets by then;
  Haraka would still gain, after half a minute perhaps a fifth.
- Its own core: a server that needs a thread or a second process for what it does (SQLite's commits, Node's garbage) cannot use another.

For the others:

- smtp-sink parses no address, keeps no log, has no routes, limits nothing. aiosmtpd, smtp-server, slimta and Haraka were told to log
  nothing or next to nothing; ours writes its event log (three lines for each message that goes on) into a file, keeps its metrics, and checks
  addresses, headers, hops and line ends.
- The relays and webhooks of Node and Python pass the far side's answer on: no queue, no retry, no signature, no id; while the far side
  is down they take no mail. Only Postfix's queue and hold promise what ours does.
- Each peer was set up for speed: no TLS, no DNS, no checks that cost, as many connections and processes as there are sessions. Ours
  has its defaults, but as many connections out (`concurrency`) as well.
- Loopback charges the receiver's half of the network to the sender, and has no latency: what waits well gains nothing here.
- smtp-server waits 100 ms before it greets, by design: its rows with new connections are bounded by that, not by its CPU.
"""


def machine() -> dict[str, str]:
    """What it was measured on."""
    cpu = next((line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    folder = Path(os.environ.get("GATEWAY_BENCH_FOLDER", "/var/tmp"))
    mounts = [line.split() for line in _lines("/proc/self/mounts")]
    over = [fields for fields in mounts if folder.resolve().is_relative_to(fields[1])]
    disk = max(over, key=lambda fields: len(fields[1]))[2] if over else "unknown"
    return {
        "cpu": cpu,
        "cores": str(os.cpu_count()),
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "disk": disk,
        "system": next((line.partition("=")[2].strip('"') for line in _lines("/etc/os-release") if line.startswith("PRETTY_NAME=")), ""),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


# --------------------------------------------------------------------- runs


def _good(known: Mapping[str, Any], cell: str, server: str) -> dict[int, Mapping[str, Any]]:
    """The runs of a server in a cell, by their round."""
    return {run["round"]: run for run in known["runs"] if (run["cell"], run["server"]) == (cell, server) and "fault" not in run}


def value(run: Mapping[str, Any], by: str) -> float:
    """µs of CPU a message, or messages a second."""
    return float(run["cpu"] / run["messages"] * 1e6 if by == "cost" else run["messages"] / run["seconds"])


def ratios(known: Mapping[str, Any], goal: Goal) -> list[float]:
    """One for each round that has both."""
    ours, theirs = _good(known, goal.cell, goal.ours), _good(known, goal.other or goal.cell, goal.beside)
    found = []
    for number in sorted(ours.keys() & theirs.keys()):
        mine, other = value(ours[number], goal.by), value(theirs[number], goal.by)
        found.append(mine / other if goal.less or goal.by == "rate" else other / mine)
    return found


def verdict(goal: Goal, measured: float) -> str:
    def holds(bound: float) -> bool:
        return measured <= bound if goal.less else measured >= bound

    if holds(goal.goal):
        return "goal met"
    if goal.gate is None:
        return "goal missed"
    return "gate met" if holds(goal.gate) else "**gate missed**"


def _span(values: Sequence[float], form: str = ",.1f") -> str:
    """Median, and the least and the greatest where there is more than one."""
    text = format(statistics.median(values), form)
    return text if len(values) < 2 else f"{text} ({format(min(values), form)}–{format(max(values), form)})"


# -------------------------------------------------------------------- page


def _goals(known: Mapping[str, Any]) -> list[str]:
    lines = ["| what | beside | by | gate | goal | measured | |", "|---|---|---|---|---|---|---|"]
    for goal in GOALS:
        found = ratios(known, goal)
        beside = "its own, not pipelined" if goal.other else "one worker" if goal.ours != goal.beside == "gateway" else goal.beside
        by = "CPU a message" if goal.by == "cost" else "messages/s"
        gate = f"{goal.sign} {goal.gate:g} ×" if goal.gate is not None else "–"
        measured = f"{_span(found, '.2f')} ×" if found else "not measured"
        lines.append(
            f"| {goal.what} | {beside} | {by} | {gate} | {goal.sign} {goal.goal:g} × | {measured} | {verdict(goal, statistics.median(found)) if found else ''} |"
        )
    starts = known.get("start", [])
    for what, name, unit, bound, aim in (
        ("start to accepting", "seconds", "s", 0.7, 0.4),
        ("memory of an idle worker", "mib", "MiB", 80.0, 50.0),
    ):
        if starts:
            row = Goal(what, "", "", bound, aim, less=True)
            values = [one[name] for one in starts]
            form = ".2f" if unit == "s" else ".0f"
            lines.append(
                f"| {what} | | | ≤ {bound:g} {unit} | ≤ {aim:g} {unit} | {_span(values, form)} {unit} | {verdict(row, statistics.median(values))} |"
            )
    return lines


def _mode(known: Mapping[str, Any], mode: str) -> list[str]:
    lines = [
        "| cell | server | messages/s | CPU µs a message | core | ours beside it: CPU, messages/s |",
        "|---|---|---:|---:|---:|---|",
    ]
    runs = [run for run in known["runs"] if run["mode"] == mode]
    for cell in dict.fromkeys(run["cell"] for run in runs):
        # Ours first, the others as they stand in the table of peers.
        order = ["gateway", *(peer["name"] for peer in known["about"]["peers"])]
        servers = sorted(
            {run["server"] for run in runs if run["cell"] == cell},
            key=lambda name: (name.partition(",")[0] not in order[:1], order.index(name) if name in order else 0, name),
        )
        for server in servers:
            good = _good(known, cell, server)
            if not good:
                fault = next(run["fault"] for run in runs if (run["cell"], run["server"]) == (cell, server))
                lines.append(f"| {_short(cell)} | {server} | not measured: {fault.replace('|', '¦')} | | | |")
                continue
            busy = statistics.median(run["cpu"] / run["seconds"] for run in good.values())
            marks = " †" * (busy < BUSY) + " ‡" * (statistics.median(run["others"] for run in good.values()) > DISTURBED)
            beside = ""
            if not server.startswith("gateway"):
                by_cost, by_rate = (ratios(known, Goal("", cell, server, None, 0, by=by)) for by in ("cost", "rate"))
                beside = f"{_span(by_cost, '.2f')} ×, {_span(by_rate, '.2f')} ×" if by_cost else ""
            rates, costs = ([value(run, by) for run in good.values()] for by in ("rate", "cost"))
            lines.append(f"| {_short(cell)} | {server} | {_span(rates, ',.0f')}{marks} | {_span(costs)} | {busy:.2f} | {beside} |")
    return lines


def _short(cell: str) -> str:
    _, size, sessions, *how = cell.split("/")
    return f"{size.replace('KiB', ' KiB').replace('MiB', ' MiB')} × {sessions}{', ' + ', '.join(how) if how else ''}"


def _latency(known: Mapping[str, Any]) -> list[str]:
    lines = [
        "| mode | server | messages/s | 250: p50, p99, max (ms) | last dot to HTTP request: p50, p99, max (ms) |",
        "|---|---|---:|---|---|",
    ]
    rows = known.get("latency", [])
    for mode, server in dict.fromkeys((row["mode"], row["server"]) for row in rows):
        mine = [row for row in rows if (row["mode"], row["server"]) == (mode, server)]
        good = [row for row in mine if "fault" not in row]
        if not good:
            lines.append(f"| {mode} | {server} | not measured: {mine[0]['fault'].replace('|', '¦')} | | |")
            continue
        cells = []
        for prefix in ("", "hook "):
            names = [f"{prefix}{name}" for name in ("p50", "p99", "max")]
            cells.append("; ".join(", ".join(f"{row[name]:.2f}" for name in names) for row in good if names[0] in row))
        late = sum(row["unsent"] for row in good)
        note = f"; {late:,.0f} messages found no free session" if late else ""
        lines.append(f"| {mode} | {server} | {statistics.median(row['rate'] for row in good):,.0f} | {cells[0]}{note} | {cells[1]} |")
    return lines


def page(known: Mapping[str, Any]) -> str:
    """The whole of RESULTS.md."""
    about = known["about"]
    there = about["machine"]
    versions = ", ".join(f"{name} {version.removeprefix(name).removeprefix(',').strip()}" for name, version in about["versions"].items())
    rounds = len({run["round"] for run in known["runs"]})
    lines = [
        "# Results",
        "",
        f"Written by `{about['command']}`, {about['when']}. Not to be edited: run it again, or one cell of it (`bench/README.md`).",
        "",
    ]
    if about["smoke"]:
        lines += ["**A trial of the bench itself: runs of fractions of a second. The figures mean nothing.**", ""]
    lines += [
        f"{there['cpu']}, {there['cores']} cores, {there['system']}; disk {there['disk']}; load averages at the end {there['load']} (the bench's own).",
        f"{versions}.",
        "",
        f"Median (least–greatest) of up to {rounds} rounds of {about['seconds']:g} s; server on one core, generator and far side on the other. CPU is user and system",
        f"time of all of the server's processes, those that came and went included (by {about['cpu by']}). † its core was less than {BUSY:.0%} busy: generator or",
        f"far side set the pace, messages/s are a lower bound, compare the CPU. ‡ others had more than {DISTURBED:.0%} of the server's core meanwhile (for the disk, the kernel itself). “New”: a connection",
        "for each message. “Pipelined”: MAIL, RCPT and DATA in one write, the body with the next group. “bdat”: MAIL, RCPT, BDAT LAST in one write.",
        "",
        "## Goals",
        "",
        *_goals(known),
        "",
        "The other goals are measured by `gateway bench` (parser), `python -m bench.pressure` (idle connections).",
        "",
    ]
    for mode, title in (
        ("discard", "Accept and discard"),
        ("durable", "Durable accept: the next hop is down"),
        ("relay", "Relay, end to end"),
        ("webhook", "Webhook, end to end"),
        ("workers", "Two workers, on the generator's core as well"),
    ):
        if any(run["mode"] == mode for run in known["runs"]):
            lines += [f"## {title}", "", *_mode(known, mode), ""]
    if known.get("latency"):
        lines += [
            "## Latency at half load",
            "",
            "1 KiB over 100 sessions, at half the messages/s that each server itself reached above (so the fast ones have more to do), at fixed times: a reply",
            "counts from when its message's MAIL was due, so that a stall is not forgiven (no coordinated omission). One group of figures for each run. The time",
            "from the last dot to the whole HTTP request at the receiver is that of probes between the others, 200 a second.",
            "",
            *_latency(known),
            "",
        ]
    broken = [run for run in known["runs"] if "fault" in run and _good(known, run["cell"], run["server"])]
    if broken:
        lines += ["## Runs that failed, of those with others that did not", ""]
        lines += [f"- {run['cell']}, {run['server']}, round {run['round'] + 1}: {run['fault']}" for run in broken]
        lines += [""]
    lines += ["## What each promises with its 250", "", "| server | modes | |", "|---|---|---|"]
    lines.append(
        "| gateway | all | every recipient's sink has it, or a synced row in the spool names who has not; event log and metrics on |"
    )
    lines += [f"| {peer['name']} | {', '.join(peer['modes'])} | {peer['promise']} |" for peer in about["peers"]]
    lines += ["", "## What flatters whom", "", FLATTERS]
    return "\n".join(lines)
