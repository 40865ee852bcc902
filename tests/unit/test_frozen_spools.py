"""Spools that released versions left behind: each is opened by today's program and delivered; one from the future is not touched."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from gateway import Gateway, Message
from gateway.config import Config, ConfigError, PythonConfig
from gateway.observe import Telemetry
from gateway.spool.records import VERSION

from ..loops import until
from ..spools.frozen import FOLDER, MAILS, restore

VERSIONS = sorted(int(path.stem.removeprefix("version-")) for path in FOLDER.glob("version-*.sql"))


def test_every_version_that_there_ever_was_is_kept() -> None:
    assert list(range(1, VERSION + 1)) == VERSIONS


def gateway(folder: Path, carried: dict[str, list[tuple[Message, bytes]]], **options: Any) -> Gateway:
    def sink(name: str) -> PythonConfig:
        async def take(message: Message) -> None:
            # The file of a large one goes with its row.
            carried[name].append((message, message.content))

        return PythonConfig(function=take)

    config = Config.parse(
        {
            "hostname": "mx.example",
            "listeners": [{"address": "127.0.0.1:0"}],
            "spool": {"path": str(folder), "minimum_free": "1 MiB"},
            "sinks": {"app": {"type": "discard"}, "archive": {"type": "discard"}},
            "routes": [{"recipients": ["*@app.example"], "sinks": ["app", "archive"]}],
        }
    )
    return Gateway(config.model_copy(update={"sinks": {name: sink(name) for name in config.sinks}}), telemetry=Telemetry("none"))


@pytest.mark.parametrize("version", VERSIONS)
async def test_what_an_older_version_promised_is_delivered(tmp_path: Path, version: int) -> None:
    restore(version, tmp_path / "0")
    carried: dict[str, list[tuple[Message, bytes]]] = {"app": [], "archive": []}
    due = {name: mail for name, mail in MAILS.items() if name not in ("held", "dead")}
    async with gateway(tmp_path, carried) as app:
        # When it is due by the clock of the machine that made it is nothing to wait for.
        await retry(app, "queued")
        await until(lambda: min(map(len, carried.values())) >= len(due))
        spool = app._spool
        assert spool is not None
        left = {(row.recipients[0].partition("@")[0], row.sink, row.state) for row in await spool.rows()}
        assert left >= {(name, sink, name) for name in ("held", "dead") for sink in carried}
        # Held and dead are for a person, who still can.
        for state in ("held", "dead"):
            assert await retry(app, state) == 2
        await until(lambda: min(map(len, carried.values())) >= len(MAILS))
    for messages in carried.values():
        assert {message.envelope.recipients[0].local for message, _ in messages[: len(due)]} == due.keys()
        found = {message.envelope.recipients[0].local: (message, octets) for message, octets in messages}
        for name, (recipients, _, content) in MAILS.items():
            message, octets = found[name]
            assert octets == content
            assert [recipient.address for recipient in message.envelope.recipients] == recipients
            assert (message.envelope.mail_from, message.client.helo) == ("a@client.example", "client.example")
            assert b"client.example" in message.trace
        assert found["eight"][0].envelope.mail_params.items() >= {"BODY": "8BITMIME", "RET": "HDRS", "ENVID": "x+3D1"}.items()
        assert found["eight"][0].envelope.recipients[0].params == {"NOTIFY": "FAILURE"}
        assert "SMTPUTF8" in found["grüße"][0].envelope.mail_params


async def retry(app: Gateway, state: str) -> int:
    """As ``gateway queue retry``: how many rows."""
    assert app._spool is not None
    (queue,) = app._queues()
    changed = await app._spool.change(None, "retry", state=state)
    queue.kick()
    return changed


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


async def test_a_spool_of_a_newer_version_is_refused_at_start_and_not_touched(tmp_path: Path) -> None:
    restore(VERSION, tmp_path / "0")
    db = sqlite3.connect(tmp_path / "0" / "spool.db")
    db.executescript(f"ALTER TABLE pendings RENAME COLUMN due TO later; PRAGMA user_version = {VERSION + 1};")
    db.close()
    before = digests(tmp_path)
    with pytest.raises(
        ConfigError, match=rf"has schema {VERSION + 1}, this program knows up to {VERSION}: use the newer version that wrote it"
    ):
        async with gateway(tmp_path, {"app": [], "archive": []}):
            pytest.fail("it started")
    assert digests(tmp_path) == before
