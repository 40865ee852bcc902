"""gateway/sinks/file.py on a real disk."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.config import FileConfig
from gateway.sinks import make_sink
from gateway.sinks.file import STALE, FileSink

from ..deliveries import ID, MAIL, TRACE, Try, carried, mail, recipient
from ..loops import until


@asynccontextmanager
async def maildir(folder: Path, name: str = "app", **keys: Any) -> AsyncIterator[FileSink]:
    sink = make_sink(name, FileConfig(path=folder, **keys), "mx.example.net")
    assert isinstance(sink, FileSink)
    await sink.open()
    try:
        yield sink
    finally:
        await sink.close()


def files(folder: Path) -> list[Path]:
    return sorted((folder / "new").iterdir())


async def test_one_file_a_delivery_with_the_octets_as_relayed(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "mail"
    content = b".dot\r\nbare \n and \r, \x00\xff\r\nno end"
    async with maildir(folder) as sink:
        outcome = await carried(sink, mail(content, recipients=[recipient("b@us.example"), recipient("c@us.example")]))
    assert (outcome.state, outcome.reply.code, outcome.remote) == ("delivered", 250, str(folder))
    (file,) = files(folder)
    assert file.read_bytes() == TRACE + content
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for made in (folder.parent, folder, folder / "tmp", folder / "new", folder / "cur"):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert not list((folder / "tmp").iterdir())


async def test_content_in_a_file_is_copied_whole(tmp_path: Path) -> None:
    source = tmp_path / "content"
    source.write_bytes(os.urandom(3_000_001))
    async with maildir(tmp_path / "mail") as sink:
        assert (await carried(sink, mail(source))).state == "delivered"
    (file,) = files(tmp_path / "mail")
    assert file.read_bytes() == TRACE + source.read_bytes()


async def test_the_same_delivery_again_replaces_its_file(tmp_path: Path) -> None:
    async with maildir(tmp_path) as sink:
        for _ in range(2):
            assert (await carried(sink, mail())).state == "delivered"
        assert len(files(tmp_path)) == 1
        await carried(sink, mail(), id=f"{ID}_2")
        assert len(files(tmp_path)) == 2
    async with maildir(tmp_path, name="other") as other:
        await carried(other, mail())
    assert len(files(tmp_path)) == 3


async def test_nothing_of_the_mail_is_in_the_path(tmp_path: Path) -> None:
    inside = tmp_path / "mail"
    odd = "../../etc/passwd@us.example"
    async with maildir(inside, name="a/../b") as sink:
        message = mail(b"Subject: ../../x\r\n\r\n", recipients=[recipient(odd)], mail_from="../up@client.example")
        message.client.helo = "../../helo"
        assert (await carried(sink, message)).state == "delivered"
    assert os.listdir(tmp_path) == ["mail"]
    (file,) = files(inside)
    assert file.name == f"1795374480.{ID}.a_.._b.mx.example.net"


async def test_many_at_once(tmp_path: Path) -> None:
    ids = [f"0193f1c2-7a1b-7c3d-8e4f-{number:012x}" for number in range(200)]
    async with maildir(tmp_path, concurrency=64) as sink:
        outcomes = await asyncio.gather(*(carried(sink, mail(b"%d" % number, id=id)) for number, id in enumerate(ids)))
    assert {outcome.state for outcome in outcomes} == {"delivered"}
    assert [file.read_bytes() for file in files(tmp_path)] == [TRACE + b"%d" % number for number in range(200)]


async def test_it_is_synced_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that promise 1 rests on: file synced, renamed, folder synced, settled."""
    done: list[str] = []
    real_sync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        done.append(f"sync {kind}")
        real_sync(descriptor)

    def rename(source: Path, target: Path) -> None:
        done.append(f"rename {Path(source).parent.name} {Path(target).parent.name}")
        real_rename(source, target)

    async with maildir(tmp_path) as sink:
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "rename", rename)
        assert (await carried(sink, mail())).state == "delivered"
    assert done == ["sync file", "rename tmp new", "sync folder"]


@pytest.mark.parametrize(("number", "reply"), [(errno.ENOSPC, "451 4.3.1"), (errno.EIO, "451 4.3.0")])
@pytest.mark.parametrize("where", ["fsync", "rename"])
async def test_a_disk_that_fails_defers_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int, reply: str
) -> None:
    def fails(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    async with maildir(tmp_path) as sink:
        with monkeypatch.context() as patch:
            patch.setattr(os, where, fails)
            outcome = await carried(sink, mail())
        assert (outcome.state, outcome.down) == ("deferred", True)
        assert str(outcome.reply).startswith(reply)
        assert not files(tmp_path)
        assert not list((tmp_path / "tmp").iterdir())
        assert (await carried(sink, mail())).state == "delivered"


async def test_a_disk_that_hangs_defers_in_time_and_a_late_writer_tears_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync
    hanging, go_on, went_on = threading.Event(), threading.Event(), threading.Event()

    def slow(descriptor: int) -> None:
        if not hanging.is_set():
            hanging.set()
            go_on.wait(20)
            went_on.set()
        real(descriptor)

    async with maildir(tmp_path, timeout=0.1) as sink:
        monkeypatch.setattr(os, "fsync", slow)
        while not hanging.is_set():  # what is late before a thread has it is not begun
            outcome = await carried(sink, mail())
            assert (outcome.state, outcome.down) == ("deferred", True)
        # The next try finds the first one still writing. A true disk may need longer than that.
        sink._timeout = 20.0
        assert (await carried(sink, mail())).state == "delivered"
        go_on.set()
        await until(went_on.is_set)
        await asyncio.sleep(0.2)
    (file,) = files(tmp_path)
    assert file.read_bytes() == TRACE + MAIL


async def test_open_clears_what_a_crash_left_long_ago(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    old, fresh = tmp_path / "tmp" / "old", tmp_path / "tmp" / "fresh"
    for file in (old, fresh):
        file.write_bytes(b"half")
    past = time.time() - STALE - 60
    os.utime(old, (past, past))
    async with maildir(tmp_path):
        assert not old.exists()
        assert fresh.exists()


async def test_open_says_when_the_folder_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "mail").write_bytes(b"a file")
    with pytest.raises(OSError, match="mail"):
        async with maildir(tmp_path / "mail"):
            pass


async def test_closing_settles_what_is_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    hanging, go_on, went_on = threading.Event(), threading.Event(), threading.Event()

    def slow(descriptor: int) -> None:
        hanging.set()
        go_on.wait(20)
        real(descriptor)
        went_on.set()

    async with maildir(tmp_path) as sink:
        monkeypatch.setattr(os, "fsync", slow)
        one = Try(mail())
        sink.start(one.delivery)
        await until(hanging.is_set)
    (outcome,) = await one.outcomes()
    assert outcome.state == "deferred"
    go_on.set()
    # Its word, which nobody waits for any more, does no harm.
    await until(went_on.is_set)
    await asyncio.sleep(0.1)
