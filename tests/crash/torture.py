"""``python -m tests.crash.torture [power] [damages] [kills]``: a million power cuts, 10,000 damages, 1,000 kill -9.

Each ends with a line of figures; all of them come again at the end. The exit code is 0 where
nothing was wrong. SIGINT and SIGTERM end it and its children in order: the power cuts go on where
they were stopped when they are called again.

Damages are told in ``damages.py``, kills in ``kills.py``. Of the power cuts: lives (``recorded.py``) are led one after the other on one disk: each ends with the power going,
and the next begins with what the disk held then. Of every life, states are drawn that the disk
could have held at any of its operations (``powercut.py``), and each is recovered by the real
engine and held against what had been promised by then.

Deterministic are the draws, not the lives: threads and clocks have their say in these. So a state
that fails is kept, in the folder that is named, with what is wrong with it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from multiprocessing.synchronize import Event
from pathlib import Path
from types import FrameType
from typing import Any

import uvloop

from tests.crash.damages import Damages
from tests.crash.faulty import Faults, How
from tests.crash.kills import Run
from tests.crash.powercut import Cut, Disk
from tests.crash.recorded import WRITING, Found, Ledger, Life, hurried, recover

#: Lives that follow each other on one disk, and states drawn of each.
LIVES, STATES = 4, 500
#: Seconds between words of progress; in which a process notes that its parent is gone, and then has to clear up.
SPEAK, PARENT, CLEARING = 30.0, 1.0, 10.0


class StoppedError(Exception):
    """Somebody wants an end of it."""


#: Set in the processes of a pool: nobody wants more states.
_stop: Event | None = None


def _begin(stop: Event, parent: int) -> None:
    """A process of the pool: its parent says when it ends, by the event or by being gone."""
    global _stop
    _stop = stop
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT)
        stop.set()
        time.sleep(CLEARING)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def plan(chance: random.Random) -> Faults | None:
    """In one life of three the disk fails, too."""
    if chance.random() < 0.67:
        return None
    hows: tuple[How, ...] = ("EIO", "ENOSPC", "EDQUOT", "short")
    kinds = chance.choice((WRITING, frozenset({"sync", "sync_dir"}), frozenset({"write"}), frozenset({"sync"}), frozenset({"truncate"})))
    return Faults(chance.randrange(1, 300), chance.choice((1, 1, 2, 3, 20, 10**9)), chance.choice(hows), kinds)


def draws(life: Life, disk: Disk, end: int, states: int, chance: random.Random) -> Iterator[tuple[int, Cut]]:
    """So many different states of this life, fewer where there are no more; those after ``kill -9`` among them."""
    doubts: list[int] = []
    trial = Disk.__new__(Disk)
    trial.__dict__.update(pickle.loads(pickle.dumps(disk.__dict__)))
    for step in life.faults.log[:end]:
        trial.take(step)
        doubts.append(trial.doubt)
    places = (
        Counter(chance.choices(range(end), [1 + min(doubt, 30) for doubt in doubts], k=max(0, states - end // 4))) if end else Counter()
    )
    seen: set[int] = set()
    for at, step in enumerate(life.faults.log[:end]):
        disk.take(step)
        drawn = [None] * (at % 4 == 0) + [chance] * places[at]
        for each in drawn:
            for _ in range(4):
                cut = disk.cut(each)
                key = hash(cut.key)
                if key not in seen:
                    seen.add(key)
                    yield at + 1, cut
                    break


def lives(seed: int, number: int, states: int, place: str, keep: str) -> Counter[str]:
    """The ``number``-th series of lives, on a disk in memory at ``place``."""
    chance = random.Random(f"{seed}-{number}")
    count: Counter[str] = Counter()
    folder = Path(tempfile.mkdtemp(prefix="cut-", dir=place))
    try:
        with hurried():
            _lead(chance, f"{seed}-{number}", folder, states, Path(keep), count)
    except StoppedError:
        return Counter(stopped=1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return count


def _lead(chance: random.Random, name: str, folder: Path, states: int, keep: Path, count: Counter[str]) -> None:
    image: dict[str, bytes] = {}
    folders: tuple[str, ...] = ()
    ledger = Ledger()
    for turn in range(LIVES):
        root = folder / f"spool{turn}"
        _make(root, image, folders)
        life = Life(root, f"{name}-{turn}", ledger, faults=plan(chance))
        end = asyncio.run(life.run())
        count["lives"] += 1
        count["operations"] += end
        count["faults"] += life.faults.fired
        count["acknowledged"] += sum(mail.reply == "250" and mail.answered >= 0 for mail in ledger.mails.values())
        if ledger.wrong:
            _keep(keep, f"{name}-{turn}", {}, ledger, ledger.wrong, count)
        disk = Disk(str(root), image, folders)
        last: tuple[dict[str, bytes], tuple[str, ...], Found, int] | None = None
        goes_on = chance.randrange(states)
        for place, (at, cut) in enumerate(draws(life, disk, end, states, chance)):
            if _stop is not None and _stop.is_set():
                raise StoppedError
            found, wrong = _try(folder / "state", cut, ledger, at)
            count["states"] += 1
            count["held"] += sum(len(pairs) for pairs in found.owed.values())
            if wrong:
                _keep(keep, f"{name}-{turn}-{at}-{place}", cut.image(), ledger, wrong, count)
            if place <= goes_on or last is None:
                last = (cut.image(), cut.folders, found, at) if place == goes_on or last is None else last
        shutil.rmtree(root)
        if last is None:
            return
        image, folders, found, at = last
        ledger = ledger.after(found, at)


def _make(root: Path, image: dict[str, bytes], folders: tuple[str, ...]) -> None:
    root.mkdir()
    for path in folders:
        (root / path).mkdir()
    for path, octets in image.items():
        (root / path).write_bytes(octets)


def _try(target: Path, cut: Cut, ledger: Ledger, at: int) -> tuple[Found, list[str]]:
    target.mkdir()
    try:
        cut.write(target)
        found = recover(target)
        return found, ledger.judge(found, at)
    finally:
        shutil.rmtree(target)


def _keep(keep: Path, name: str, image: dict[str, bytes], ledger: Ledger, wrong: list[str], count: Counter[str]) -> None:
    count["wrong"] += 1
    for line in wrong:
        count[f"wrong: {line.split(':')[0]}"] += 1
    if count["wrong"] > 5:
        return
    target = keep / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    (target / "wrong").write_text("\n".join(wrong) + "\n")
    for path, octets in image.items():
        (target / "spool" / path).parent.mkdir(parents=True, exist_ok=True)
        (target / "spool" / path).write_bytes(octets)


# ------------------------------------------------------------------- the command


def memory() -> str:
    """A folder in memory where there is one: what is asked here is what the spool makes of a disk, not how fast one is."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()


def power(states: int, seed: int, jobs: int, keep: Path) -> tuple[str, bool]:
    """``states`` power cuts; where an earlier run with this seed was stopped, it goes on. The figures, and whether
    nothing was wrong. Raises StoppedError."""
    progress = keep / f"power-{seed}.json"
    total: Counter[str] = Counter()
    done: set[int] = set()
    if progress.exists():
        told = json.loads(progress.read_text())
        total, done = Counter(told["count"]), set(told["done"])
        say(f"power: going on after {total['states']:,} states")
    keep.mkdir(parents=True, exist_ok=True)
    started, before = time.monotonic(), total["states"]
    spoken = started
    number = 0
    stop = multiprocessing.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    with ExitStack() as stack:
        for each in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, each, signal.signal(each, end))
        pool = stack.enter_context(ProcessPoolExecutor(jobs, initializer=_begin, initargs=(stop, os.getpid())))
        running: dict[Future[Counter[str]], int] = {}
        while total["states"] < states or running:
            # As many series as the rest of the states needs.
            while len(running) < jobs and total["states"] + len(running) * LIVES * STATES < states and not stop.is_set():
                if number not in done:
                    running[pool.submit(lives, seed, number, STATES, memory(), str(keep))] = number
                number += 1
            if not running:
                break
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                series, count = running.pop(future), future.result()
                if not count["stopped"]:
                    done.add(series)
                    total += count
            # Whole or not at all: it may be stopped here, too.
            fresh = progress.with_suffix(".new")
            fresh.write_text(json.dumps({"count": total, "done": sorted(done)}))
            fresh.replace(progress)
            if time.monotonic() - spoken > SPEAK:
                spoken = time.monotonic()
                rate = max(1e-9, (total["states"] - before) / (spoken - started))
                left = max(0, states - total["states"]) / rate
                say(f"power: {total['states']:,} of {states:,} states, {rate:.0f}/s, {left / 60:.0f} min left; {total['wrong']} wrong")
    if stop.is_set():
        raise StoppedError(f"{total['states']:,} of {states:,} states, {total['wrong']} wrong; the same command goes on")
    wrong = {name.partition(": ")[2]: count for name, count in total.items() if name.startswith("wrong: ")}
    return (
        f"{total['states']:,} different states of {total['lives']:,} lives, seed {seed}, {(time.monotonic() - started) / 60:.0f} min:"
        f" {total['operations']:,} file operations, {total['faults']:,} of them failed; {total['acknowledged']:,} mails acknowledged,"
        f" {total['held']:,} times one was found to be owed; {wrong.get('lost', 0)} lost, {wrong.get('torn', 0)} torn, {wrong.get('back', 0)}"
        f" back; {total['wrong']} wrong{f': {wrong}' if wrong else ''}",
        not total["wrong"],
    )


def damages(rounds: int, seed: int) -> tuple[str, bool]:
    """The same of damages. What is wrong is kept, and raises AssertionError."""
    folder = Path(tempfile.mkdtemp(prefix="damages-", dir=memory()))
    made = Damages(folder, rounds, seed, lambda words: say(f"damages: {words}"))
    _await(made.run(), folder)
    return str(made), True


def kills(count: int, seed: int, keep: Path) -> tuple[str, bool]:
    """The same of kills."""
    keep.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"kills-{seed}-", dir=keep.resolve()))
    run = Run(folder, count, seed, lambda words: say(f"kills: {words}"))
    _await(run.run(), folder)
    return str(run.figures), True


def _await(work: Coroutine[Any, Any, None], folder: Path) -> None:
    """Raises StoppedError at SIGINT and SIGTERM, once it has cleared up. The folder stays where something is wrong."""

    async def stoppable() -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(work)
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(each, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            shutil.rmtree(folder)
            raise StoppedError("nothing was wrong so far") from None
        except BaseException:
            say(f"kept in {folder}")
            raise
        shutil.rmtree(folder)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(stoppable())


def say(words: str) -> None:
    print(words, flush=True)


def unfinished(keep: Path, states: int) -> int | None:
    """The seed of a run that was stopped before it had so many states, and found nothing wrong."""
    for progress in sorted(keep.glob("power-*.json")):
        count = json.loads(progress.read_text())["count"]
        if count["states"] < states and not count.get("wrong"):
            return int(progress.stem.partition("-")[2])
    return None


PARTS = ("power", "damages", "kills")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash.torture", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--states", type=int, default=1_000_000, help="power cuts")
    parser.add_argument("--damages", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=1_000)
    parser.add_argument("--seed", type=int, help="default: a new one; of the power cuts that of a run that was stopped, if there is one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes for the power cuts")
    parser.add_argument("--keep", type=Path, default=Path("build/torture"), help="progress, and what went wrong")
    told = parser.parse_args()
    if strange := set(told.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(strange))}")
    lines: list[str] = []
    good = True
    for part in told.parts or PARTS:
        seed = told.seed or (part == "power" and unfinished(told.keep, told.states)) or random.SystemRandom().randrange(1, 1 << 32)
        say(f"{part}: GATEWAY_SEED={seed}")
        try:
            if part == "power":
                figures, fine = power(told.states, seed, told.jobs, told.keep)
            elif part == "damages":
                figures, fine = damages(told.damages, seed)
            else:
                figures, fine = kills(told.kills, seed, told.keep)
        except StoppedError as stopped:
            say(f"{part}: stopped: {stopped}")
            return 130
        except (AssertionError, TimeoutError) as error:
            figures, fine = f"seed {seed}: broken off: {error!r}", False
        good = good and fine
        lines.append(f"{part}: {figures}")
        say(lines[-1])
    if len(lines) > 1:
        say("\n".join(["", *lines]))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
