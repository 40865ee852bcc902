"""Shards that nobody carries: adopted, carried, removed once they are empty."""

from __future__ import annotations

import asyncio
import os
import smtplib
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from gateway import shards as module
from gateway.app import Gateway, Place
from gateway.build import bind_all
from gateway.shards import on_disk
from gateway.spool.sqlite import InUseError, SqliteSpool

from ..crash.mail import Events, keep, opened, settle
from ..loops import on_both_loops, until
from ..servers import free_port
from .test_app import Told, boxed, file, running, sent


async def lay(root: Path, number: int, *sinks: str, mails: int = 1) -> list[str]:
    """Mail in this shard; the ids of the deliveries."""
    async with opened(root / str(number)) as spool:
        rows = [row for _ in range(mails) for row in await keep(spool, None, *sinks)]
        return [row.delivery_id for row in rows]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK", 0.02)


@on_both_loops
async def test_what_lies_in_shards_without_a_worker_is_carried(tmp_path: Path) -> None:
    root = tmp_path / "spool"
    ids = [*await lay(root, 1, "box", mails=3), *await lay(root, 2, "box", mails=2)]
    async with running(file(tmp_path)) as (gateway, told):
        await until(lambda: len(told.named("emptied")) == 2)
        assert sorted((event["shard"], event["deliveries"]) for event in told.named("adopted")) == [(1, 3), (2, 2)]
        assert len(boxed(tmp_path)) == 5
        assert sorted(event["delivery"] for event in told.named("delivered")) == sorted(ids)
        # Nothing of them is left, and they are not made again.
        assert os.listdir(root) == ["0"]
        assert sorted(event["shard"] for event in told.named("emptied")) == [1, 2]
        assert (await gateway.status())["shards"] == [0]


@on_both_loops
async def test_what_cannot_be_carried_stays_and_is_told(tmp_path: Path) -> None:
    """Rows of a sink that is not in the file: seen by the numbers, kept through the end."""
    root = tmp_path / "spool"
    await lay(root, 3, "elsewhere", "box")
    async with running(file(tmp_path)) as (gateway, told):
        await until(lambda: told.named("adopted") and told.named("delivered"))
        for _ in range(500):
            # Its done mark rides on the next group.
            if (await gateway.status())["queue"] == {"elsewhere": {"queued": 1}}:
                break
            await asyncio.sleep(0.01)
        assert (await gateway.status())["queue"] == {"elsewhere": {"queued": 1}}
        assert (await gateway.status())["shards"] == [0, 3]
        assert b'gateway_queue_messages{sink="elsewhere",state="queued"} 1.0' in await gateway.metrics()
        assert (await sent(gateway.port, "b@here.example"))[0] == 250
    assert told.named("stopped")[0]["queued"] == 1
    assert on_disk(root) == [0, 3]


@on_both_loops
async def test_a_shard_that_another_has_is_waited_for(tmp_path: Path) -> None:
    root = tmp_path / "spool"
    (left,) = await lay(root, 1, "box")
    async with opened(root / "1"), running(file(tmp_path)) as (gateway, told):
        await asyncio.sleep(0.1)
        assert not told.named("adopted")
        assert (await sent(gateway.port, "b@here.example"))[0] == 250
    async with running(file(tmp_path)) as (_, told):
        await until(lambda: told.named("delivered"))
        assert told.named("delivered")[0]["delivery"] == left


@on_both_loops
async def test_one_that_cannot_be_opened_stops_nothing(tmp_path: Path) -> None:
    root = tmp_path / "spool"
    await lay(root, 1, "elsewhere")
    with sqlite3.connect(root / "1" / "spool.db") as db:
        db.execute("PRAGMA user_version = 60")
    db.close()
    before = (root / "1" / "spool.db").read_bytes()
    async with running(file(tmp_path)) as (gateway, told):
        await until(lambda: told.named("adoption_failed"))
        (event,) = told.named("adoption_failed")
        assert event["shard"] == 1
        assert "schema 60" in event["reason"]
        assert (await sent(gateway.port, "b@here.example"))[0] == 250
    assert (root / "1" / "spool.db").read_bytes() == before


@on_both_loops
async def test_one_that_is_no_database_is_kept_for_a_person(tmp_path: Path) -> None:
    root = tmp_path / "spool"
    (root / "1").mkdir(parents=True)
    (root / "1" / "spool.db").write_bytes(b"no database" * 1000)
    async with running(file(tmp_path)) as (gateway, told):
        await until(lambda: told.named("damaged"))
        await until(lambda: not (root / "1" / "spool.db").exists())
        assert (await sent(gateway.port, "b@here.example"))[0] == 250
    assert (root / "1" / "damaged-1.db").read_bytes() == b"no database" * 1000


@on_both_loops
async def test_the_queue_command_reaches_an_adopted_shard(tmp_path: Path) -> None:
    root = tmp_path / "spool"
    (left,) = await lay(root, 1, "elsewhere")
    async with running(file(tmp_path)) as (_, told):
        await until(lambda: told.named("adopted"))

        def queue(*words: str) -> str:
            command = [sys.executable, "-m", "gateway", "queue", *words, "--spool", str(root)]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout

        assert left in await asyncio.to_thread(queue, "list")
        assert await asyncio.to_thread(queue, "drop", left) == "1 changed\n"
        await until(lambda: told.named("emptied"))
        assert await asyncio.to_thread(queue, "list", "--json") == "[]\n"


async def test_only_what_is_empty_is_removed(tmp_path: Path) -> None:
    async with opened(tmp_path / "1") as spool:
        (row,) = await keep(spool)
        assert await spool.remove() is False
    assert on_disk(tmp_path) == [1]
    async with opened(tmp_path / "1") as spool:
        (row,) = await spool.due("app", float("inf"), 10)
        await settle(spool, row)
        assert await spool.remove() is True
    assert os.listdir(tmp_path) == []


async def test_who_waited_for_the_lock_of_a_removed_shard_makes_it_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was opened before it was removed, and locked after."""
    first = SqliteSpool(tmp_path / "1", observer=Events(), minimum_free=0.0)
    await first.open()
    second = SqliteSpool(tmp_path / "1", observer=Events(), minimum_free=0.0)
    with pytest.raises(InUseError):
        await second.open()
    lock = second._files.lock
    removed = asyncio.Event()
    loop = asyncio.get_running_loop()

    def late(descriptor: int) -> bool:
        if not removed.is_set():
            assert asyncio.run_coroutine_threadsafe(first.remove(), loop).result(30)
            removed.set()
        return lock(descriptor)

    monkeypatch.setattr(second._files, "lock", late)
    await second.open()
    try:
        assert on_disk(tmp_path) == [1]
        assert len(await keep(second)) == 1
        with pytest.raises(InUseError, match=f"process {os.getpid()}"):
            await SqliteSpool(tmp_path / "1", observer=Events(), minimum_free=0.0).open()
    finally:
        await second.close()


@pytest.mark.parametrize(
    ("owed", "places", "rates"), [("box", [48, 8, 8], [60.0, 10.0, 10.0]), ("elsewhere", [62, 1, 1], [78.4, 0.8, 0.8])]
)
async def test_a_sink_has_no_more_places_for_all_shards_than_for_one(
    tmp_path: Path, owed: str, places: list[int], rates: list[float]
) -> None:
    """And a shard that wants nothing of it, or has dead letters alone, takes next to nothing of its share."""
    root = tmp_path / "spool"
    for number in (1, 2):
        await lay(root, number, owed)
    nobody = {"type": "webhook", "url": f"http://127.0.0.1:{free_port()}/", "rate": "80/s", "concurrency": 64}
    async with running(file(tmp_path, sinks={"box": nobody})) as (gateway, told):
        await until(lambda: len(told.named("adopted")) == 2)
        assert gateway._shards is not None
        lanes = [shard.lanes["box"] for shard in gateway._shards]
        await until(lambda: [lane.concurrency for lane in lanes] == places)
        assert [round(lane.rate, 6) for lane in lanes] == rates


async def test_a_client_in_the_middle_of_its_content_keeps_its_shard(tmp_path: Path) -> None:
    """Our own shard is freed by whoever had it: mail that had begun before ends where it began."""
    root = tmp_path / "spool"
    config = file(tmp_path, sinks={"box": {"type": "discard"}})
    old = SqliteSpool(root / "0", observer=Events(), minimum_free=0.0)
    await old.open()
    told = Told()
    gateway = Gateway(config, telemetry=told, place=Place(0, 1, bind_all(config), handed=True))
    await gateway.start()
    try:
        assert (await gateway.status())["shards"] == [1]
        client = await asyncio.to_thread(smtplib.SMTP, "127.0.0.1", gateway.port, timeout=30)
        await asyncio.to_thread(client.ehlo)
        await asyncio.to_thread(client.mail, "a@client.example")
        await asyncio.to_thread(client.rcpt, "b@here.example")
        assert (await asyncio.to_thread(client.docmd, "DATA"))[0] == 354
        large = b"Subject: x\r\n\r\n" + b"x" * 70 + b"\r\n" * 10_000
        await asyncio.to_thread(client.send, large)
        await asyncio.to_thread(client.send, large * 20)
        await old.close()
        await until(lambda: told.named("home"))
        assert (await sent(gateway.port, "b@here.example"))[0] == 250
        assert (await gateway.status())["shards"] == [0, 1]
        await asyncio.to_thread(client.send, b"\r\n.\r\n")
        assert (await asyncio.to_thread(client.getreply))[0] == 250
        client.close()
        await until(lambda: told.named("emptied"))
        assert os.listdir(root) == ["0"]
        assert (await gateway.status())["shards"] == [0]
    finally:
        await gateway.stop()
    assert not told.named("bug"), told.named("bug")


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_client_on_a_listener_that_leaves_keeps_its_shard(tmp_path: Path, when: str) -> None:
    """In the middle of its content, with a reload that takes its listener away before the move, or after."""
    root = tmp_path / "spool"
    stays = {"address": "127.0.0.1:0"}
    both = file(tmp_path, listeners=[stays, {"address": f"127.0.0.1:{free_port()}"}])
    one = file(tmp_path, listeners=[stays])
    old = SqliteSpool(root / "0", observer=Events(), minimum_free=0.0)
    await old.open()
    told = Told()
    gateway = Gateway(both, telemetry=told, place=Place(0, 1, bind_all(both), handed=True))
    await gateway.start()
    try:
        leaving = int(gateway.addresses[1].rpartition(":")[2])
        client = await asyncio.to_thread(smtplib.SMTP, "127.0.0.1", leaving, timeout=30)
        await asyncio.to_thread(client.ehlo)
        await asyncio.to_thread(client.mail, "a@client.example")
        await asyncio.to_thread(client.rcpt, "b@here.example")
        assert (await asyncio.to_thread(client.docmd, "DATA"))[0] == 354
        await asyncio.to_thread(client.send, b"Subject: x\r\n\r\n")
        await asyncio.sleep(0.05)
        if when == "before":
            await gateway.reload(one)
        await old.close()
        await until(lambda: told.named("home"))
        if when == "after":
            await gateway.reload(one)
        await asyncio.sleep(0.2)
        assert not told.named("emptied")
        await asyncio.to_thread(client.send, b"hello\r\n.\r\n")
        code, text = await asyncio.to_thread(client.getreply)
        assert (code in (250, 421), bool(told.named("accepted"))) == (True, code == 250), text
        client.close()
        await until(lambda: told.named("emptied"))
    finally:
        await gateway.stop()
    assert not told.named("bug"), told.named("bug")


async def test_nothing_is_left_of_an_empty_shard_whose_process_was_killed(tmp_path: Path) -> None:
    """Its control socket lies there, which nobody answers."""
    root = tmp_path / "spool"
    async with opened(root / "1"):
        pass
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(root / "1" / "control.sock"))
    async with running(file(tmp_path)):
        await until(lambda: os.listdir(root) == ["0"])
