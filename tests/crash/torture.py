"""``python -m tests.crash.torture power``: a million power cuts, and what became of the mail.

Lives (``recorded.py``) are led one after the other on one disk: each ends with the power going,
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
import os
import pickle
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

from tests.crash.faulty import Faults, How
from tests.crash.powercut import Cut, Disk
from tests.crash.recorded import WRITING, Found, Ledger, Life, hurried, recover

#: Lives that follow each other on one disk, and states drawn of each.
LIVES, STATES = 4, 500


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


def power(states: int, seed: int, jobs: int, keep: Path) -> Counter[str]:
    """``states`` power cuts; where an earlier run with this seed was stopped, it goes on."""
    progress = keep / f"power-{seed}.json"
    total: Counter[str] = Counter()
    done: set[int] = set()
    if progress.exists():
        told = json.loads(progress.read_text())
        total, done = Counter(told["count"]), set(told["done"])
        print(f"going on after {total['states']} states", flush=True)
    keep.mkdir(parents=True, exist_ok=True)
    started, before = time.monotonic(), total["states"]
    spoken = started
    number = 0
    with ProcessPoolExecutor(jobs) as pool:
        running: dict[Future[Counter[str]], int] = {}
        while total["states"] < states or running:
            # As many series as the rest of the states needs.
            while len(running) < jobs and total["states"] + len(running) * LIVES * STATES < states:
                if number not in done:
                    running[pool.submit(lives, seed, number, STATES, memory(), str(keep))] = number
                number += 1
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                done.add(running.pop(future))
                total += future.result()
            progress.write_text(json.dumps({"count": total, "done": sorted(done)}))
            if time.monotonic() - spoken > 30:
                spoken = time.monotonic()
                rate = (total["states"] - before) / (spoken - started)
                left = (states - total["states"]) / rate
                print(
                    f"{total['states']:,} of {states:,} states, {rate:.0f}/s, {left / 60:.0f} min left; {total['wrong']} wrong", flush=True
                )
    seconds = time.monotonic() - started
    print(
        f"{total['states']:,} different states of {total['lives']} lives ({total['operations']:,} file operations, {total['faults']} of"
        f" them failed), {total['acknowledged']:,} mails acknowledged, {total['held']:,} times one was found to be owed;"
        f" {(total['states'] - before) / seconds:.0f} states/s. Wrong: {total['wrong']}"
        + "".join(f"; {name.partition(': ')[2]}: {number}" for name, number in total.items() if name.startswith("wrong: "))
    )
    return total


def unfinished(keep: Path, states: int) -> int | None:
    """The seed of a run that was stopped before it had so many states, and found nothing wrong."""
    for progress in sorted(keep.glob("power-*.json")):
        count = json.loads(progress.read_text())["count"]
        if count["states"] < states and not count.get("wrong"):
            return int(progress.stem.partition("-")[2])
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crash.torture", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    cuts = commands.add_parser("power", help="power cuts")
    cuts.add_argument("--states", type=int, default=1_000_000)
    cuts.add_argument("--seed", type=int, help="default: that of a run that was stopped, else a new one")
    cuts.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    cuts.add_argument("--keep", type=Path, default=Path("build/torture"), help="progress, and states that failed")
    told = parser.parse_args()
    if told.seed is None:
        told.seed = unfinished(told.keep, told.states) or random.SystemRandom().randrange(1, 1 << 32)
    print(f"GATEWAY_SEED={told.seed}", flush=True)
    return 1 if power(told.states, told.seed, told.jobs, told.keep)["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
