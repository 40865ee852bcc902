"""Octets that are not what they were: found, confined, never delivered."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import apsw
import pytest

from gateway.contracts import SpoolError
from gateway.message import Message
from tests.crash.mail import Events, keep, large, message, opened


def harm(path: Path, chance: random.Random) -> str:
    """One flipped bit, one zeroed sector, or a file that is cut short."""
    octets = bytearray(path.read_bytes())
    place = chance.randrange(len(octets))
    kind = chance.choice(["flip"] * 8 + ["zero", "cut"])
    if kind == "flip":
        octets[place] ^= 1 << chance.randrange(8)
    elif kind == "zero":
        start = place // 512 * 512
        octets[start : start + 512] = bytes(len(octets[start : start + 512]))
    else:
        del octets[place:]
    path.write_bytes(octets)
    return f"{kind} at {place} of {path.name}"


def told(mail: Message) -> tuple[Any, ...]:
    return mail.envelope, mail.client, mail.trace, mail.stored.size, mail.content


@pytest.mark.parametrize("rounds", [40, pytest.param(500, marks=pytest.mark.long)])
async def test_what_is_damaged_is_never_delivered(quick_path: Path, rounds: int) -> None:
    folder = quick_path / "sound"
    sound: dict[tuple[str, str], tuple[tuple[int, ...], tuple[Any, ...]]] = {}
    chance = random.Random(0)
    async with opened(folder) as spool:
        for number in range(60):
            content = chance.randbytes(chance.choice([10, 1000, 20_000]))
            mail = message(content, recipients=4) if number % 20 else await large(spool, content * 300, recipients=4)
            rows = await keep(spool, mail, "app", "out", recipients=(0, 2))
            sound.update({(mail.id, row.sink): (row.recipients, (*told(mail)[:-1], mail.content)) for row in rows})
    seed = int(os.environ.get("GATEWAY_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
    print(f"GATEWAY_SEED={seed}")
    chance = random.Random(seed)
    refused = lost = 0
    for number in range(rounds):
        copy = quick_path / str(number)
        shutil.copytree(folder, copy)
        files = sorted(path for path in copy.rglob("*") if path.is_file() and path.name != "lock")
        what = harm(chance.choice(files), chance)
        found: set[tuple[str, str]] = set()
        events = Events()
        try:
            async with opened(copy, observer=events) as spool:
                for sink in ("app", "out"):
                    for row in await spool.due(sink, 1e12, 1000):
                        mail_ = await spool.load(row)
                        if mail_ is not None:
                            assert (row.recipients, told(mail_)) == sound[row.message_id, row.sink], f"{what}, GATEWAY_SEED={seed}"
                            assert (row.message_id, row.sink) not in found
                            found.add((row.message_id, row.sink))
                listed = {(row.message_id, row.sink) for row in await spool.rows()}
                lost += len(sound) - len(found)
                assert found == sound.keys() or events.named("damaged") or listed == sound.keys(), f"silent: {what}, GATEWAY_SEED={seed}"
        except SpoolError:
            refused += 1
        shutil.rmtree(copy)
    print(f"{refused} of {rounds} were refused, {lost / rounds:.2f} of {len(sound)} rows were lost a round")


async def test_an_index_that_does_not_fit_is_made_anew(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        for _ in range(5):
            await keep(spool)
    db = apsw.Connection(str(tmp_path / "spool.db"))
    db.execute("PRAGMA writable_schema = ON")
    (sql,) = db.execute("SELECT sql FROM sqlite_schema WHERE name = 'pendings_due'").fetchall()[0]
    # Rows that the index never hears of.
    db.execute(
        "UPDATE sqlite_schema SET sql = replace(sql, 'priority, due)', 'priority, due) WHERE sink = ''none''') WHERE name = 'pendings_due'"
    )
    db.close()
    db = apsw.Connection(str(tmp_path / "spool.db"))
    db.execute("REINDEX pendings_due; PRAGMA writable_schema = ON")
    db.execute("UPDATE sqlite_schema SET sql = ? WHERE name = 'pendings_due'", (sql,))
    db.close()
    events = Events()
    async with opened(tmp_path, observer=events) as spool:
        assert len(await spool.due("app", 1e12, 10)) == 5
    (fields,) = events.named("damaged")
    assert "mended" in fields["reason"]


async def test_a_row_of_no_state_is_held(tmp_path: Path) -> None:
    async with opened(tmp_path) as spool:
        await keep(spool)
    db = apsw.Connection(str(tmp_path / "spool.db"))
    db.execute("UPDATE pendings SET state = 'quewed'")
    db.close()
    async with opened(tmp_path) as spool:
        assert [(row.state, row.note) for row in await spool.rows()] == [("held", "damaged: its sink or state was lost")]
        assert {place: count for place, (count, _) in (await spool.counts()).items()} == {("app", "held"): 1}


async def test_a_file_that_is_no_database_says_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "spool.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(SpoolError, match=r"sqlite3 .*spool.db .recover"):
        async with opened(tmp_path):
            pass
