"""kill -9 in the middle of the load: what was told to be stored is there, whole; nothing else is."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import zlib
from pathlib import Path

import pytest

from tests.crash.mail import TRACE, opened
from tests.servers import PATIENCE

#: Messages that were stored before each kill.
LEAST = 100


@pytest.mark.parametrize("kills", [4, pytest.param(40, marks=pytest.mark.long)])
async def test_kill_9_under_load(tmp_path: Path, kills: int) -> None:
    seed = int(os.environ.get("GATEWAY_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
    print(f"GATEWAY_SEED={seed}")
    chance = random.Random(seed)
    stored: dict[str, int] = {}
    refused: set[str] = set()
    settling: set[str] = set()
    settled: set[str] = set()
    total = 0
    for kill in range(kills):
        told = await run_and_kill(tmp_path, f"{seed}-{kill}", chance.uniform(0.1, 0.6))
        for line in told:
            word, id, *rest = line.split()
            if word == "stored":
                stored[id] = int(rest[0])
                total += 1
            else:
                {"refused": refused, "settling": settling, "settled": settled}[word].add(id)
        found: dict[str, int] = {}
        async with opened(tmp_path) as spool:
            for row in await spool.due("app", 1e12, 1_000_000):
                assert row.message_id not in found, "twice"
                mail = await spool.load(row)
                assert mail is not None, f"{row.message_id} is damaged"
                assert mail.trace == TRACE
                found[row.message_id] = zlib.crc32(mail.content)
            assert await spool.change(None, "drop") == len(found)
        expected = {id: crc for id, crc in stored.items() if id not in settling}
        assert {id: found.get(id) for id in expected} == expected, f"lost or torn, GATEWAY_SEED={seed}"
        assert not refused & found.keys(), f"refused and back, GATEWAY_SEED={seed}"
        assert not settled & found.keys(), f"settled and back, GATEWAY_SEED={seed}"
        # Whoever waited for an answer may have been stored: never more than were in flight.
        assert len(found.keys() - stored.keys()) <= 60, f"phantoms, GATEWAY_SEED={seed}"
        stored.clear()
    assert total > LEAST * kills
    assert os.listdir(tmp_path / "content") == []


async def run_and_kill(folder: Path, prefix: str, seconds: float) -> list[str]:
    """The whole lines it told."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.crash.producer", str(folder), prefix, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    # The clock runs from the first message on.
    told = [await asyncio.wait_for(process.stdout.readline(), PATIENCE)]
    over = asyncio.get_running_loop().time() + seconds
    stored = 0
    async with asyncio.timeout(PATIENCE):
        # As long as is wanted, and longer where a slow disk has taken less than means anything.
        while (stored <= LEAST or asyncio.get_running_loop().time() < over) and (line := await process.stdout.readline()):
            stored += line.startswith(b"stored ")
            told.append(line)
        process.send_signal(signal.SIGKILL)
        told.append(await process.stdout.read())
    await process.wait()
    lines = b"".join(told).decode().split("\n")
    return lines[:-1]
