"""Does a hot path cost more than it did? Instructions counted by callgrind, held against budgets.

``python -m bench.count`` (``make count``) counts the cases of ``bench.counted`` under valgrind and exits with 1
where one takes more than its budget in ``bench/budgets.toml`` and the excess that is allowed there. ``--save
--reason TEXT`` writes new budgets for what went over (``all`` of them with ``--all``) with the reason for it; without a
reason nothing is raised.

Instructions do not depend on who else uses the machine: two runs of the same build differ by well under 1 %
(a few % where threads meet: the spool). Start-up is left out: callgrind counts only between two marks that
the work sets itself, after a warm-up, and the median of several rounds is taken. Addresses are not
randomised and hashes are not seeded by chance. Nothing of the kernel is counted.

Budgets are of one build of Python and of compiled rules; ``budgets.toml`` says which. With another one the comparison is
made all the same, and said to be with another one.

Needs valgrind (with its headers), gcc and setarch. With ``--keep FOLDER`` the profiles stay: ``callgrind_annotate
FOLDER/profile.N --threshold=100`` says where the instructions went (rows of 100 % are what stands on the stack).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gateway

from .counted import CASES, Peers
from .stage import FAR_CORE, ROOT, a_folder, free_port, listens, running

BUDGETS = Path(__file__).with_name("budgets.toml")
#: Allowed excess of a new budget, in %, by the first word of its case: more where threads meet.
EXCESS = {"whole": 3.0, "commit": 4.0, "mark": 4.0, "relay": 3.0, "webhook": 3.0}
EXCESS_ELSE = 2.0
#: Times that a case which is over is counted once more. What a far side's pace does to the loop's turns (a relay took 57,200 once in
#: eight runs, else 54,100) does not come again; what a change did comes every time.
AGAIN = 4

MARKS = """
#include <valgrind/callgrind.h>
void instrument(void) { CALLGRIND_START_INSTRUMENTATION; }
void begin(void) { CALLGRIND_ZERO_STATS; }
void end(const char *name) { CALLGRIND_DUMP_STATS_AT(name); }
"""


@dataclass
class Budget:
    """``instructions`` a unit; ``excess`` in % is allowed; ``reason`` of its last raise."""

    instructions: int
    excess: float
    reason: str

    @property
    def most(self) -> float:
        return self.instructions * (1 + self.excess / 100)


def build_told() -> str:
    """The build that is counted: its Python, its compiler, and which modules of ours are compiled."""
    root = Path(gateway.__file__).parent
    compiled = sorted(
        str(path.relative_to(root)).partition(".")[0].replace("/", ".") for path in root.rglob("*.so") if "__mypyc" not in path.name
    )
    return f"Python {platform.python_version()}, {platform.python_compiler()}, {platform.machine()}; compiled: {', '.join(compiled)}"


# ------------------------------------------------------------------- counting


@contextlib.contextmanager
def peers() -> Iterator[Peers]:
    """The far sides: ``gateway receive``, each a process of its own."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(a_folder())
        ports = []
        for protocol in ("smtp", "http"):
            port, log = free_port(), folder / f"{protocol}.log"
            command = [sys.executable, "-m", "gateway", "receive", protocol, "--listen", f"127.0.0.1:{port}"]
            listens(port, stack.enter_context(running(command, FAR_CORE, log)), log)
            ports.append(port)
        yield Peers(*ports)


def needed() -> None:
    """Exits with a sentence where a tool lacks."""
    missing = [name for name in ("valgrind", "gcc", "setarch") if shutil.which(name) is None]
    if missing:
        sys.exit(f"{', '.join(missing)} needed (Debian: apt install valgrind gcc)")


def count(names: Sequence[str], rounds: int, folder: Path) -> dict[str, list[float]]:
    """Instructions a unit of each round, by case. The profiles are in ``folder``."""
    source, library = folder / "marks.c", folder / "marks.so"
    source.write_text(MARKS)
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    with peers() as ports:
        command = ["setarch", platform.machine(), "-R", "valgrind", "--quiet", "--tool=callgrind", "--instr-atstart=no"]
        command += [f"--callgrind-out-file={folder}/profile", sys.executable, "-m", "bench.counted", "--only", ";".join(names)]
        command += ["--rounds", str(rounds + 1), "--mark", str(library), "--relay", str(ports.relay), "--webhook", str(ports.webhook)]
        # io_uring is beyond valgrind.
        environment = {**os.environ, "PYTHONHASHSEED": "0", "UV_USE_IO_URING": "0"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range((rounds + 1) * len(names)):
        name, total = parsed((folder / f"profile.{number + 1}").read_text(errors="replace"))
        # With the first one callgrind still translates what it then only runs.
        if number % (rounds + 1):
            found[name].append(total / CASES[name].units)
    return found


_TRIGGER = re.compile(r"^desc: Trigger: Client Request: (.*)$", re.MULTILINE)
_TOTALS = re.compile(r"^totals: (\d+)", re.MULTILINE)


def parsed(profile: str) -> tuple[str, int]:
    """The case that a profile of callgrind is of, and its instructions. Raises ValueError for anything else."""
    trigger, totals = _TRIGGER.search(profile), _TOTALS.search(profile)
    if trigger is None or totals is None:
        raise ValueError(f"no profile of a case: {profile[:200]!r}")
    return trigger[1], int(totals[1])


# -------------------------------------------------------------------- budgets


def load(path: Path = BUDGETS) -> tuple[str, dict[str, Budget]]:
    """The build that the budgets are of, and the budgets. Raises OSError, ValueError, KeyError for a faulty file."""
    told = tomllib.loads(path.read_text())
    return told["build"], {name: Budget(one["instructions"], one["excess"], one["reason"]) for name, one in told["budgets"].items()}


def written(build: str, budgets: Mapping[str, Budget]) -> str:
    """The file."""
    lines = [
        "# Instructions a unit of the cases of bench.counted. Renewed by `make count COUNT_ARGS='--save --reason …'`,",
        "# never by hand; each names the reason of its last raise. bench/README.md says how to read it.",
        f"build = {json.dumps(build)}",
    ]
    for name, budget in budgets.items():
        lines += ["", f"[budgets.{json.dumps(name)}]", f"instructions = {budget.instructions}  # a {CASES[name].unit}"]
        lines += [f"excess = {budget.excess}  # % allowed", f"reason = {json.dumps(budget.reason, ensure_ascii=False)}"]
    return "\n".join(lines) + "\n"


def judged(found: Mapping[str, float], budgets: Mapping[str, Budget]) -> list[str]:
    """A sentence for each case that is over its budget or has none."""
    faults = []
    for name, instructions in found.items():
        budget = budgets.get(name)
        if budget is None:
            faults.append(f"{name}: has no budget; give it one with --save --reason")
        elif instructions > budget.most:
            over = (instructions / budget.instructions - 1) * 100
            faults.append(
                f"{name}: {instructions:,.0f} instructions a {CASES[name].unit}, {over:.1f} % over its budget of "
                f"{budget.instructions:,} ({budget.excess:g} % is allowed)"
            )
    return faults


def renewed(found: Mapping[str, float], budgets: Mapping[str, Budget], reason: str, everything: bool) -> dict[str, Budget]:
    """Budgets after this run: a raise has this reason, a lower one keeps that of its last raise."""
    result = {name: budget for name, budget in budgets.items() if name in CASES}
    for name, instructions in found.items():
        old = budgets.get(name)
        usual = EXCESS.get(re.split(r"\W", name)[0], EXCESS_ELSE)
        new = Budget(math.ceil(instructions), usual if old is None else old.excess, reason)
        if old is None or instructions > old.most:
            result[name] = new
        elif everything or instructions < old.instructions * (1 - old.excess / 100):
            new.reason = old.reason if instructions <= old.instructions else reason
            result[name] = new
    return {name: result[name] for name in CASES if name in result}


def table(found: Mapping[str, Sequence[float]], budgets: Mapping[str, Budget]) -> str:
    lines = ["| case | unit | instructions | rounds apart | budget | of it |", "|---|---|---:|---:|---:|---:|"]
    for name, rounds in found.items():
        middle = statistics.median(rounds)
        apart = (max(rounds) - min(rounds)) / middle * 100
        budget = budgets.get(name)
        held = f"{budget.instructions:,} + {budget.excess:g} % | {middle / budget.instructions:.1%}" if budget else "none | "
        lines.append(f"| {name} | {CASES[name].unit} | {middle:,.0f} | {apart:.1f} % | {held} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.count", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases, separated by semicolons")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write new budgets for what is over, well under, or new")
    parser.add_argument("--all", action="store_true", help="with --save: for every case")
    parser.add_argument("--reason", default="", help="with --save: why what is raised may be raised")
    parser.add_argument("--keep", type=Path, help="the folder for callgrind's profiles")
    options = parser.parse_args(arguments)
    names = options.only.split(";") if options.only else list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"no such case: {', '.join(unknown)}; there are: {'; '.join(CASES)}")
    if options.save and not options.reason.strip():
        parser.error("--save wants a --reason: a raised budget names it")
    needed()
    build, budgets = load(BUDGETS) if BUDGETS.exists() else (build_told(), {})
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gateway-count-")))
        folder.mkdir(parents=True, exist_ok=True)
        found = count(names, options.rounds, folder.resolve())
        print(table(found, budgets))
        medians = {name: statistics.median(rounds) for name, rounds in found.items()}
        for turn in range(0 if options.save else AGAIN):
            over = [name for name, median in medians.items() if name in budgets and median > budgets[name].most]
            if not over:
                break
            print(f"\nover, and counted again: {'; '.join(over)}")
            place = folder / f"again{turn}"
            place.mkdir(exist_ok=True)
            once_more = count(over, options.rounds, place.resolve())
            print(table(once_more, budgets))
            medians |= {name: min(medians[name], statistics.median(rounds)) for name, rounds in once_more.items()}
    here = build_told()
    print(f"\n{here}; {time.monotonic() - started:.0f} s")
    if options.save:
        if here != build and len(names) < len(CASES):
            sys.exit("this is another build than the budgets are of: save all of them, not some")
        BUDGETS.write_text(written(here, renewed(medians, budgets, options.reason.strip(), options.all or here != build)))
        return
    faults = judged(medians, budgets)
    if here != build:
        print(f"The budgets are of another build: {build}")
    if faults:
        sys.exit("\n" + "\n".join(faults))


if __name__ == "__main__":
    main()
