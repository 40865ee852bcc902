"""What a crowd that sends no mail costs those who do, and what each of the crowd takes.

``python -m bench.pressure [--pairs 7] [--idle 10000] [--drips 3000] [--only clear|tls]``

A pair is two runs of the same mail (gateway load, 100 sessions, 1 KiB, discarded): one into a
gateway alone, one into a gateway to which ``idle`` silent and ``drips`` dripping clients are
connected (``bench.crowd``; half of the drips drip a command, half content; one octet every three
seconds). Each run has a gateway of its own, and which of the two comes first changes from pair
to pair. In clear and with a crowd that speaks TLS; the mail comes in clear both times.

The gateway has core 0, everybody else core 1. Beside the gateway that is alone the drips go to a
decoy, so that core 1 has the same to do both times: a generator that has to wait for its core sends
more slowly, and a gateway that sleeps between two messages spends more on each. CPU is user and system time of the gateway;
memory is its Pss after the crowd came, less that before. After the last pair the drips are
waited for: each is to hear 421, at its deadline.

What the crowd costs, it costs by the second: an octet of a drip is a read, and a read wakes whoever
sleeps. Beside a gateway that has its core to itself the ratio is what the bound means; where others
work on the core, fewer messages share the same drips. So the table has messages a second as well, and
what the crowd takes of the core when no mail comes at all.

Exit code 1, with a sentence, where a bound is broken: 5 % more CPU a message (median of the
pairs), 6 KiB a connection in clear, 40 KiB under TLS, a drip that outlives its deadline by more
than 2 seconds (a sweep, and the turn of a busy loop) or hears anything else than 421.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trustme

from . import generator, stage
from .stage import OTHER_CORE, ROOT, Server, a_folder

CPU_BOUND = 1.05
MEMORY_BOUND = {"clear": 6.0, "tls": 40.0}  # KiB a connection
LATE_BOUND = 2.0
#: Seconds: what a command may take here, and what content is spared from ``minimum_rate`` (listener.RATE_GRACE).
COMMAND_DEADLINE, CONTENT_DEADLINE = 45.0, 30.0
SIZE, SESSIONS = 1024, 100
#: Seconds without mail, in which only the crowd costs.
QUIET = 2.0

CONFIG = """
hostname = "bench.example"

[[listeners]]
address = "127.0.0.1:0"

[[listeners]]
address = "127.0.0.1:0"
{tls}

[limits]
connections = {connections}
connections_per_client = 1000
command_timeout = "{deadline}s"

[spool]
path = "{folder}/spool"

[sinks.out]
type = "discard"

[[routes]]
recipients = ["*"]
clients = ["127.0.0.0/8"]
sink = "out"
"""


class CrowdProcess:
    """``bench.crowd``, step by step."""

    def __init__(self, port: int, idle: int, drips: int, every: float, *words: str) -> None:
        command = [sys.executable, "-m", "bench.crowd", str(port), "--idle", str(idle)]
        command += ["--commands", str(drips // 2), "--contents", str(drips - drips // 2), "--every", str(every)]
        command += ["--command-deadline", str(COMMAND_DEADLINE), "--content-deadline", str(CONTENT_DEADLINE)]
        os.sched_setaffinity(0, {OTHER_CORE})  # inherited
        self.process = subprocess.Popen(
            [*command, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True, text=True
        )

    def told(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit("the crowd did not come together")
        result: dict[str, Any] = json.loads(line)
        return result

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> dict[str, Any]:
        """Its report, as it stands now."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.told()

    def __enter__(self) -> CrowdProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def pss(pid: int) -> float:
    """KiB that this process takes, its share of what it shares included."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return float(line.split()[1])
    raise LookupError("the kernel does not tell Pss")


@dataclass
class Result:
    """``alone``, ``crowded``: µs of CPU a message, pair by pair. ``rate``: messages a second in
    the crowd. ``quiet``: share of a core without mail. ``idle``, ``drip``: KiB each."""

    alone: list[float] = field(default_factory=list)
    crowded: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    quiet: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)
    drip: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return statistics.median(crowded / alone for alone, crowded in zip(self.alone, self.crowded, strict=True))


@contextlib.contextmanager
def served(options: argparse.Namespace, tls: bool) -> Iterator[tuple[Server, int]]:
    """A fresh gateway that is warm, and the port for the crowd."""
    with a_folder() as folder:
        lines = ""
        if tls:
            made = trustme.CA().issue_cert("bench.example", key_type=trustme.KeyType.ECDSA)
            (folder / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
            made.private_key_pem.write_to_path(str(folder / "key.pem"))
            lines = f'tls = "implicit"\ncertificate = "{folder}/cert.pem"\nkey = "{folder}/key.pem"'
        # Half as many again: it is the crowd's cost that is measured, not the hurry of a full house.
        connections = int((options.idle + options.drips + SESSIONS) * 1.2)
        text = CONFIG.format(tls=lines, connections=connections, deadline=int(COMMAND_DEADLINE), folder=folder)
        with stage.serving(text, folder) as (ports, process):
            server = Server("gateway", ports[0], process)
            generator.drive(server, SIZE, SESSIONS, 2000)
            yield server, ports[1]


def alone(options: argparse.Namespace, result: Result, tls: bool) -> None:
    with served(options, tls) as (server, port), CrowdProcess(port, 0, options.drips, options.every, "--decoy") as crowd:
        crowd.told()
        crowd.go_on()
        crowd.told()
        time.sleep(0.2)
        result.alone.append(generator.drive(server, SIZE, SESSIONS, options.messages).cost)


def crowded(options: argparse.Namespace, result: Result, tls: bool, last: bool) -> None:
    with served(options, tls) as (server, port):
        pid = server.process.pid
        before = pss(pid)
        with CrowdProcess(port, options.idle, options.drips, options.every, *["--tls"] * tls) as crowd:
            seconds = float(crowd.told()["seconds"])
            time.sleep(0.2)
            silent = pss(pid)
            crowd.go_on()
            seconds += float(crowd.told()["seconds"])
            time.sleep(0.2)
            dripping = pss(pid)
            result.seconds.append(seconds)
            if options.idle:
                result.idle.append((silent - before) / options.idle)
            if options.drips:
                result.drip.append((dripping - silent) / options.drips)
            result.each.append((dripping - before) / max(1, options.idle + options.drips))
            run = generator.drive(server, SIZE, SESSIONS, options.messages)
            result.crowded.append(run.cost)
            result.rate.append(run.rate)
            spent, started = stage.cpu_of(pid), time.monotonic()
            time.sleep(QUIET)
            result.quiet.append((stage.cpu_of(pid) - spent) / (time.monotonic() - started))
            report = crowd.told() if last else crowd.end()
            if not last and (gone := options.drips - report["left"]):
                print(f"note: {gone} drips were over before the run was: this pair had a smaller crowd", file=sys.stderr)
            if report["idle_lost"]:
                result.faults.append(f"{report['idle_lost']} idle connections were lost")
            if report["other"]:
                result.faults.append(f"drips heard something else than 421: {report['other']}")
            if last:
                result.report = report


def measure(options: argparse.Namespace, kind: str) -> Result:
    result, tls = Result(), kind == "tls"
    for pair in range(options.pairs):
        last = pair == options.pairs - 1
        if pair % 2:
            crowded(options, result, tls, last)
            alone(options, result, tls)
        else:
            alone(options, result, tls)
            crowded(options, result, tls, last)
        print(
            f"{kind} {pair + 1}/{options.pairs}: {result.alone[-1]:.1f} µs alone, {result.crowded[-1]:.1f} in the crowd, "
            f"{result.each[-1]:.2f} KiB each, {result.seconds[-1]:.1f} s until all were in",
            file=sys.stderr,
        )
    if result.ratio >= CPU_BOUND:
        share = statistics.median(cost * rate for cost, rate in zip(result.crowded, result.rate, strict=True)) / 1e6
        busy = "" if share > 0.8 else f" (it had {share:.0%} of its core, others the rest: this says nothing, try again on a quiet machine)"
        result.faults.append(f"a message costs {(result.ratio - 1) * 100:.1f} % more CPU in the crowd; less than 5 % is the bound{busy}")
    each = statistics.median(result.each)
    if each > MEMORY_BOUND[kind]:
        result.faults.append(f"a connection takes {each:.1f} KiB; {MEMORY_BOUND[kind]:.0f} KiB is the bound")
    if result.report["closed"] != options.drips:
        result.faults.append(f"{options.drips - result.report['closed']} of {options.drips} drips were not closed with 421")
    for drip, (first, latest) in result.report["late"].items():
        if latest > LATE_BOUND or first < -0.5:
            result.faults.append(
                f"{drip} drips were closed {first:.1f} to {latest:.1f} s after their deadline; 0 to {LATE_BOUND:.0f} s is the bound"
            )
    return result


def table(results: dict[str, Result]) -> str:
    lines = [
        "| crowd | CPU a message alone, in the crowd (µs) | ratio, median (all pairs) | messages/s in the crowd | the crowd alone, of a core "
        "| KiB: each, idle, drip | drips closed with 421, most late |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for kind, result in results.items():
        ratios = sorted(crowded / alone for alone, crowded in zip(result.alone, result.crowded, strict=True))
        memory = ", ".join(f"{statistics.median(found):.2f}" if found else "-" for found in (result.each, result.idle, result.drip))
        late = ", ".join(f"{drip} {latest:.1f} s" for drip, (_, latest) in result.report["late"].items())
        lines.append(
            f"| {kind} | {statistics.median(result.alone):.1f}, {statistics.median(result.crowded):.1f} "
            f"| {result.ratio:.3f} ({', '.join(f'{ratio:.3f}' for ratio in ratios)}) | {statistics.median(result.rate):,.0f} "
            f"| {statistics.median(result.quiet):.1%} | {memory} | {result.report['closed']}, {late} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.pressure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--idle", type=int, default=10_000)
    parser.add_argument("--drips", type=int, default=3_000)
    parser.add_argument("--every", type=float, default=3.0, help="seconds between two octets of a drip")
    parser.add_argument("--messages", type=int, default=20_000, help="of each run")
    parser.add_argument("--only", choices=("clear", "tls"))
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("two cores are needed: one for the gateway, one for everybody else")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = int((options.idle + options.drips + SESSIONS) * 1.2) + 512
    if hard != resource.RLIM_INFINITY and hard < wanted:
        sys.exit(f"a process may have {hard} descriptors here, and {wanted} are needed: raise the hard limit (ulimit -Hn), or lower --idle")
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    started, load = time.monotonic(), os.getloadavg()
    results = {kind: measure(options, kind) for kind in ([options.only] if options.only else ["clear", "tls"])}
    print(
        f"Python {platform.python_version()}, {options.idle} idle and {options.drips} dripping connections, {options.pairs} pairs of "
        f"{options.messages} messages, {time.monotonic() - started:.0f} s; load average {load[0]:.2f} at the beginning, {os.getloadavg()[0]:.2f} at the end.\n"
    )
    print(table(results))
    faults = [f"{kind}: {fault}" for kind, result in results.items() for fault in result.faults]
    if faults:
        sys.exit("\n" + "\n".join(faults))


if __name__ == "__main__":
    main()
