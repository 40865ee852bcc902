"""The power goes: what was promised is there, whole; what was refused is not.

Ten thousand states here, a million by ``make torture``. And every single file operation below the
real intake failing in turn, with the power going afterwards.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import apsw
import pytest

from tests.crash import recorded
from tests.crash.faulty import Faults, FaultyFile, FaultyFiles, FaultyVFS, Operation
from tests.crash.powercut import Disk
from tests.crash.recorded import WRITING, Ledger, Life, hurried, recover
from tests.crash.torture import draws, lives


def a_seed() -> int:
    seed = int(os.environ.get("GATEWAY_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
    print(f"GATEWAY_SEED={seed}")
    return seed


# ----------------------------------------------------------------- the disk itself


def drawn(disk: Disk, times: int = 300) -> set[bytes | None]:
    """What ``/spool/a`` may hold now."""
    chance = random.Random(1)
    return {disk.cut(chance).image().get("a") for _ in range(times)}


def test_what_was_synced_is_there_and_the_rest_in_any_part() -> None:
    disk = Disk("/spool", {"a": b"old" * 400})
    disk.take(Operation("write", "/spool/a", 0, b"n" * 600))
    assert {b"old" * 400, b"n" * 600 + (b"old" * 400)[600:], b"n" * 512 + (b"old" * 400)[512:]} <= drawn(disk)
    disk.take(Operation("sync", "/spool/a", since=1))
    assert drawn(disk) == {b"n" * 600 + (b"old" * 400)[600:]}
    disk.take(Operation("truncate", "/spool/a", size=2))
    disk.take(Operation("write", "/spool/a", 4, b"x"))
    new = b"n" * 600 + (b"old" * 400)[600:]
    # The size may have grown before the octets came.
    assert drawn(disk) == {new, b"nn", b"nn\0\0", b"nn\0\0x", b"nnnnx" + new[5:]}


def test_a_write_while_a_sync_runs_is_not_covered_by_it() -> None:
    disk = Disk("/spool", {"a": b""})
    disk.take(Operation("write", "/spool/a", 0, b"1"))
    disk.take(Operation("write", "/spool/a", 1, b"2"))
    disk.take(Operation("sync", "/spool/a", since=1))
    assert drawn(disk) == {b"1", b"12"}


def test_what_a_failed_sync_was_about_stays_in_doubt() -> None:
    disk = Disk("/spool", {"a": b"....."})
    disk.take(Operation("write", "/spool/a", 0, b"1"))
    disk.take(Operation("unsynced", "/spool/a", since=1))
    disk.take(Operation("write", "/spool/a", 4, b"2"))
    disk.take(Operation("sync", "/spool/a", since=3))
    assert drawn(disk) == {b"1...2", b"....2"}
    disk.take(Operation("write", "/spool/a", 0, b"3"))
    disk.take(Operation("sync", "/spool/a", since=5))
    assert drawn(disk) == {b"3...2"}


def test_names_wait_for_the_sync_of_their_folder() -> None:
    disk = Disk("/spool")
    disk.take(Operation("open", "/spool/a"))
    disk.take(Operation("write", "/spool/a", 0, b"1"))
    disk.take(Operation("sync", "/spool/a", since=2))
    assert drawn(disk) == {None, b"1"}
    disk.take(Operation("sync_dir", "/spool", since=3))
    assert drawn(disk) == {b"1"}
    disk.take(Operation("delete", "/spool/a"))
    disk.take(Operation("open", "/spool/a"))
    assert drawn(disk) == {b"1", None, b""}
    disk.take(Operation("mkdir", "/spool/content"))
    disk.take(Operation("open", "/spool/content/b"))
    disk.take(Operation("sync_dir", "/spool/content", since=8))
    found = {tuple(sorted(disk.cut(random.Random(n)).image())) for n in range(100)}
    assert ("a", "content/b") in found
    assert ("a",) in found, "a file in a folder whose own name was never synced"


def test_a_sync_of_a_folder_that_began_first_may_end_last() -> None:
    disk = Disk("/spool", {"a": b"1"})
    disk.take(Operation("delete", "/spool/a"))
    disk.take(Operation("open", "/spool/a"))
    disk.take(Operation("sync_dir", "/spool", since=2))
    disk.take(Operation("sync_dir", "/spool", since=1))
    assert drawn(disk) == {b""}


# ------------------------------------------------------------------------ the spool


def cut_power(states: int, path: Path, seed: int) -> Counter[str]:
    total: Counter[str] = Counter()
    for number in itertools.count():
        total += lives(seed, number, 125 if states < 1000 else 500, str(path), str(path / "wrong"))
        # Where by chance the disk failed in most of these lives, some more say what they say.
        plenty = total["acknowledged"] > states / 50 and total["held"] > states
        if total["states"] >= states and (plenty or total["wrong"] or number >= 50):
            return total
    raise AssertionError


@pytest.mark.parametrize("states", [1000, pytest.param(10_000, marks=pytest.mark.long)])
def test_the_power_goes_at_any_time(quick_path: Path, states: int) -> None:
    seed = a_seed()
    total = cut_power(states, quick_path, seed)
    print(dict(total))
    told = [file.read_text() for file in quick_path.glob("wrong/*/wrong")]
    assert not total["wrong"], f"{dict(total)}, GATEWAY_SEED={seed}: {told}"
    assert total["acknowledged"] > states / 50
    assert total["held"] > states


@pytest.mark.long
@pytest.mark.parametrize("what", ["the WAL", "content files", "names"])
def test_a_spool_that_does_not_sync_is_found_out(quick_path: Path, what: str) -> None:
    """The tests above can fail: this is what the syncs are for."""

    class Careless(FaultyFiles):
        def fsync(self, descriptor: int) -> None:
            if what != "content files" or "/content/" not in self._paths.get(descriptor, ""):
                super().fsync(descriptor)

        def fsync_dir(self, path: str) -> None:
            if what != "names" or not path.endswith("content"):
                super().fsync_dir(path)

    class CarelessFile(FaultyFile):
        def xSync(self, flags: int) -> None:  # noqa: N802 - SQLite's name
            if what != "the WAL":
                super().xSync(flags)

    class CarelessVFS(FaultyVFS):
        def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> CarelessFile:  # noqa: N802 - SQLite's name
            return CarelessFile(name, flags, self.faults)

    total: Counter[str] = Counter()
    with (
        mock.patch.object(recorded, "FaultyFiles", Careless),
        mock.patch.object(recorded, "FaultyVFS", CarelessVFS),
        # More of the mail in files.
        mock.patch.object(recorded, "FILE_LIMIT", 16 * 1024 if what == "the WAL" else 500),
    ):
        # How many it takes lies with the turns of the loop and of the threads: mostly a few.
        for number in range(400):
            total += lives(1, number, 60, str(quick_path), str(quick_path / "wrong"))
            if total["wrong: lost"]:
                break
    assert total["wrong: lost"], dict(total)


async def one_fails(path: Path, number: int, plan: dict[str, Any]) -> tuple[Life, Ledger]:
    """Mail through the intake while the ``number``-th operation fails; then the power goes."""
    root = path / f"{number}"
    root.mkdir()
    ledger = Ledger()
    life = Life(root, number, ledger, faults=Faults(number, **{"kinds": WRITING, **plan}))
    end = await life.run(mails=8, clients=3)
    disk = Disk(str(root))
    for step in life.faults.log[:end]:
        disk.take(step)
    chance = random.Random(number)
    for each in (None, chance, chance, chance):
        target = path / "state"
        target.mkdir()
        disk.cut(each).write(target)
        found = recover(target)
        ledger.wrong += ledger.judge(found, end)
        shutil.rmtree(target)
    shutil.rmtree(root)
    return life, ledger


PLANS: dict[str, dict[str, Any]] = {
    "EIO": {"how": "EIO"},
    "EDQUOT": {"how": "EDQUOT"},
    "ENOSPC": {"how": "ENOSPC"},
    "short write": {"how": "short", "kinds": frozenset({"write"})},
    "EIO three times": {"how": "EIO", "count": 3},
    "over quota for good": {"how": "EDQUOT", "count": 10**9, "kinds": frozenset({"write", "open", "mkdir"})},
    "full for good": {"how": "ENOSPC", "count": 10**9, "kinds": frozenset({"write", "open", "mkdir"})},
    "no sync works": {"how": "EIO", "count": 10**9, "kinds": frozenset({"sync", "sync_dir"})},
    "nothing can be removed or cut": {"how": "EIO", "count": 10**9, "kinds": frozenset({"delete", "truncate"})},
}


@pytest.mark.parametrize(("name", "stride"), [("EIO", 17), *(pytest.param(name, 1, marks=pytest.mark.long) for name in PLANS)])
def test_any_operation_fails_below_the_intake(quick_path: Path, name: str, stride: int) -> None:
    """Never a false 250, never torn, never back after 451, whatever fails; and after a commit of
    which nobody knows nothing more is promised."""
    acknowledged = refused = idle = 0
    with hurried():
        for number in itertools.count(1, stride):
            life, ledger = asyncio.run(one_fails(quick_path, number, PLANS[name]))
            assert not ledger.wrong, f"{name}, operation {number}: {ledger.wrong[:5]}"
            acknowledged += ledger.acknowledged
            refused += len(ledger.mails) - ledger.acknowledged
            # No two lives have as many operations.
            idle = 0 if life.faults.fired else idle + 1
            if idle == 5:
                break
    assert number > 10
    assert acknowledged > 0
    assert refused > 0 or name in ("EIO", "nothing can be removed or cut")


def test_a_state_is_drawn_once(quick_path: Path) -> None:
    root = quick_path / "spool"
    root.mkdir()
    life = Life(root, 1)
    with hurried():
        end = asyncio.run(life.run())
    disk = Disk(str(root))
    images = [(tuple(sorted(cut.image().items())), cut.folders) for _, cut in draws(life, disk, end, 300, random.Random(1))]
    assert len(images) > 150
    # Two recipes may come to the same octets (a page written twice alike), but rarely do: one in thirty.
    assert len(set(images)) > len(images) * 0.8
