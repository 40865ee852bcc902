"""``gateway bench``: the gateway's parsers beside whichever others are installed.

Owns the order of runs and the figures. For each task every implementation first gives its answer, and only who
gives ours is compared: another answer is told with the place where it differs. Then all run in turn, a round at a
time and each round begun by another one, so that what slows the machine for a while slows all of them; told are the
median and the span of the rounds.

``corpora`` (what is read) ← ``tasks`` (what is asked) ← ``implementations``, ``peers`` (who is asked) ← here ←
``report`` (table, JSON, page).
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from ... import __version__
from .corpora import Corpus
from .implementations import BrokenError, Implementation, Work
from .tasks import Task, difference, tasks

#: Runs of each implementation for a task.
ROUNDS = 5


@dataclass
class Result:
    """One implementation on one task; rates in the task's unit, 0 where it was not measured. ``differs``: where its answer is not
    ours. ``broken``: why it gave none."""

    implementation: str
    median: float = 0.0
    low: float = 0.0
    high: float = 0.0
    differs: str | None = None
    broken: str | None = None

    @property
    def comparable(self) -> bool:
        return self.median > 0 and self.differs is None


@dataclass
class Row:
    """One task and who did it, ours first."""

    task: Task
    results: list[Result] = field(default_factory=list)

    def ratio(self, result: Result) -> float | None:
        """How many times ours is faster; None for ours, and where the answers differ."""
        ours = self.results[0]
        return ours.median / result.median if result is not ours and ours.comparable and result.comparable else None


@dataclass
class Report:
    """All that a run found. ``absent``: why, by name; ``notes``: about the corpora."""

    implementations: Sequence[Implementation]
    absent: dict[str, str]
    seconds: float
    notes: Sequence[str] = ()
    rows: list[Row] = field(default_factory=list)
    machine: str = ""

    def noted(self) -> Iterator[tuple[str, str, str]]:
        """``(implementation, kind or "", note)`` for what was measured here, in order."""
        measured = {row.task.kind for row in self.rows}
        for one in self.implementations:
            yield from ((one.name, kind, note) for kind, note in one.notes.items() if not kind or kind in measured)


def run(
    corpora: Sequence[Corpus],
    present: Sequence[Implementation],
    absent: dict[str, str],
    *,
    only: Sequence[str] = (),
    seconds: float = 0.5,
    notes: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Every task whose id has one of ``only`` in it (none: every task) on everybody in ``present``, ours the first of
    them; ``seconds`` for each, all rounds together. Raises ValueError where that leaves no task."""
    report = Report(present, absent, seconds, notes, machine=_machine())
    todo = [task for task in tasks(corpora) if not only or any(part in task.id for part in only)]
    if not todo:
        # One a line: names have commas.
        asked = ", ".join(repr(part) for part in only)
        raise ValueError("\n  ".join([f"no task has {asked} in its name; there are:", *(task.id for task in tasks(corpora))]))
    for number, task in enumerate(todo, 1):
        progress(f"{number}/{len(todo)} {task.id}")
        report.rows.append(_row(task, present, seconds / ROUNDS))
    progress("")
    return report


def _row(task: Task, present: Sequence[Implementation], seconds: float) -> Row:
    row = Row(task)
    gc.collect()  # what an earlier task left is no cost of this one
    with _works(task, present) as works:
        running: list[tuple[Result, Work, list[float]]] = []
        ours: object = None
        for number, (name, work) in enumerate(works):
            result = Result(name)
            row.results.append(result)
            try:
                if isinstance(work, BrokenError):
                    raise work
                answer = work.answer()
            except BrokenError as error:
                result.broken = str(error)
                continue
            if number == 0:
                ours = answer
            elif ours is not None:
                result.differs = difference(ours, answer)
            # Where even the replies are others, what was done was something else.
            if not (result.differs or "").startswith("replies"):
                running.append((result, work, []))
        for turn in range(ROUNDS):
            for place in range(len(running)):
                result, work, rates = running[(turn + place) % len(running)]
                if result.broken is None:
                    try:
                        rates.append(task.amount / work.seconds(seconds))
                    except BrokenError as error:
                        result.broken = str(error)
        for result, _, rates in running:
            if result.broken is None:
                result.median, result.low, result.high = statistics.median(rates), min(rates), max(rates)
    return row


@contextmanager
def _works(task: Task, present: Sequence[Implementation]) -> Iterator[list[tuple[str, Work | BrokenError]]]:
    """What each has for this task, or why it has nothing; closed at the end."""
    works: list[tuple[str, Work | BrokenError]] = []
    try:
        for implementation in present:
            try:
                work: Work | BrokenError | None = implementation.work(task)
            except BrokenError as error:
                work = error
            if work is not None:
                works.append((implementation.name, work))
        yield works
    finally:
        for _, work in works:
            if isinstance(work, Work):
                work.close()


def _machine() -> str:
    load = ", ".join(f"{part:.1f}" for part in os.getloadavg())
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    day = time.strftime("%d %B %Y", time.localtime())
    return f"gateway {__version__}, {platform.python_implementation()} {platform.python_version()}, {system}, {os.cpu_count()} processors, load {load}, {day}"
