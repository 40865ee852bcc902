"""Fuzzes the parser and both sessions: ``python -m tests.fuzz [TARGET …]``, or ``make fuzz``.

Builds the program (binary.py), gives it the corpus and the seeds, runs each target for its time
and says what was reached. What fails is kept in ``build/fuzz`` and ends the run with 1.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from . import binary, corpus

#: Octets of an input; ``STRETCH`` makes long lines of short ones.
OCTETS = {"receiver": 384, "replies": 192, "server": 1024, "client": 512}
TITLES = f"{'target':10}{'executions':>12}{'with oracle':>13}{'a second':>10}{'edges in C':>14}{'in Python':>14}{'inputs':>8}"


def unpack(folder: Path, inputs: Iterable[bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for octets in inputs:
        (folder / hashlib.sha1(octets).hexdigest()).write_bytes(octets)
    return folder


def line(target: str, run: binary.Run, inputs: int) -> str:
    rate = run.executions / run.seconds if run.seconds else 0
    edges, marks = (f"{found} of {of}" for found, of in (run.edges, run.marks))
    return f"{target:10}{run.executions:12,}{run.asked:13,}{rate:10,.0f}{edges:>14}{marks:>14}{inputs:8,}"


def tell(target: str, run: binary.Run) -> None:
    """A finding, in full, and what to do with it."""
    print(run.fault, file=sys.stderr)
    if run.culprit is not None and run.culprit.exists():
        print(f"{target}: found with {run.culprit}:\n  {corpus.escaped(run.culprit.read_bytes())}", file=sys.stderr)
        print(f"once more: .venv/bin/python -m tests.fuzz {target} --input {run.culprit}", file=sys.stderr)


def keep(program: Path, target: str) -> None:
    """The smallest set of all inputs that reaches what they reach."""
    with tempfile.TemporaryDirectory(dir=binary.FOLDER) as place:
        done = binary.run(program, target, ["-merge=1", f"-max_len={OCTETS[target]}", place, str(binary.FOLDER / "corpus" / target)])
        if done.fault is not None:
            tell(target, done)
            raise SystemExit(1)
        corpus.keep(target, [path.read_bytes() for path in Path(place).iterdir()])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzzes the parser and both sessions.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(corpus.TARGETS)}; all without one")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (60)")
    parser.add_argument("--runs", type=int, help="executions of each target, instead of a time")
    parser.add_argument("--input", type=Path, help="just this input, once")
    parser.add_argument("--keep", action="store_true", help="write what was found into tests/fuzz/corpus")
    arguments = parser.parse_args()
    targets = arguments.targets or corpus.TARGETS
    if unknown := set(targets) - set(corpus.TARGETS):
        parser.error(f"no target: {', '.join(sorted(unknown))}")
    if reason := binary.missing():
        print(reason, file=sys.stderr)
        return 2
    print("building build/fuzz/fuzz …", flush=True)
    program = binary.build()
    if arguments.input is not None:
        run = binary.run(program, targets[0], [str(arguments.input.resolve())], oracle=1)
        if run.fault is not None:
            tell(targets[0], run)
        return int(run.fault is not None)
    print(TITLES, flush=True)
    bounds = [f"-max_total_time={arguments.seconds}"] if arguments.runs is None else [f"-runs={arguments.runs}"]
    for target in targets:
        folder = unpack(binary.FOLDER / "corpus" / target, [*corpus.kept(target), *corpus.seeds(target)])
        words = [f"-dict={binary.HERE / 'smtp.dict'}", f"-max_len={OCTETS[target]}", *bounds, str(folder)]
        run = binary.run(program, target, words)
        print(line(target, run, len(list(folder.iterdir()))), flush=True)
        if run.fault is not None:
            tell(target, run)
            return 1
        if arguments.keep:
            keep(program, target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
