"""Spools as released versions left them, one SQL text each: what a newer program must still deliver.

``python -m tests.spools.frozen`` writes the one of this version (``version-N.sql``, N is the schema's
number), once, when the number is raised or before it first is released; it is never made anew. The
text is all that SQLite needs to build the file again, but for the large content, which is a rule
(in ``MAILS``) and not a file; its checksum stands in its row.

What is in it: seven mails to ``*@app.example``, taken by a gateway whose sinks were down.
"""

from __future__ import annotations

import asyncio
import smtplib
import sqlite3
import sys
import tempfile
from pathlib import Path

from gateway import Gateway, Message, Reply
from gateway.config import Config, PythonConfig
from gateway.observe import Telemetry
from gateway.spool.records import VERSION

FOLDER = Path(__file__).parent

#: What each client sent, by the local part of its first recipient.
MAILS: dict[str, tuple[list[str], list[str], bytes]] = {
    # recipients, parameters of MAIL, content
    "plain": (["plain@app.example", "second@app.example"], [], b"Subject: plain\r\n\r\n.one\r\n..\r\ntwo\r\n"),
    "eight": (["eight@app.example"], ["BODY=8BITMIME", "RET=HDRS", "ENVID=x+3D1"], b"Subject: \xc3\xa9\r\n\r\n\xff\xfe\r\n"),
    "empty": (["empty@app.example"], [], b"\r\n"),
    "large": (["large@app.example"], [], b"Subject: large\r\n\r\n" + b"".join(b"line %06d\r\n" % number for number in range(25_000))),
    "grüße": (["grüße@app.example"], ["SMTPUTF8"], "Subject: Grüße\r\n\r\nü\r\n".encode()),
    "held": (["held@app.example"], [], b"Subject: held\r\n\r\n"),
    "dead": (["dead@app.example"], [], b"Subject: dead\r\n\r\n"),
}


def send(port: int, recipients: list[str], parameters: list[str], content: bytes) -> None:
    with smtplib.SMTP("127.0.0.1", port, local_hostname="client.example") as client:
        client.ehlo()
        client.command_encoding = "utf-8"
        client.mail("a@client.example", parameters)
        for recipient in recipients:
            client.rcpt(recipient, ["NOTIFY=FAILURE"] if recipient.startswith("eight") else [])
        code, text = client.data(content)
        assert code == 250, text


async def fill(folder: Path) -> None:
    """A spool that holds ``MAILS``."""

    async def down(message: Message) -> Reply | None:
        if message.envelope.recipients[0].local == "dead":
            return Reply(550, "5.1.1", "no such user")
        return Reply(451, "4.3.0", "not now")

    config = Config.parse(
        {
            "hostname": "mx.example",
            "listeners": [{"address": "127.0.0.1:0"}],
            # A hundred years: who reads it again must still find it worth a try.
            "retry": {"expire": "5200w"},
            "spool": {"path": str(folder), "minimum_free": "1 MiB"},
            "sinks": {"app": {"type": "discard"}, "archive": {"type": "discard"}},
            "routes": [{"recipients": ["*@app.example"], "sinks": ["app", "archive"]}],
            "bounces": {"sink": "archive"},
        }
    )
    sinks = {name: PythonConfig(function=down) for name in config.sinks}
    async with Gateway(config.model_copy(update={"sinks": sinks}), telemetry=Telemetry("none")) as gateway:
        for recipients, parameters, content in MAILS.values():
            await asyncio.to_thread(send, gateway.port, recipients, parameters, content)
        spool = gateway._spool
        assert spool is not None
        for row in await spool.rows():
            if row.recipients == ["held@app.example"]:
                await spool.change([row.message_id], "hold")


def dumped(path: Path) -> str:
    """The SQL that makes this database again, and what SQL does not say of it."""
    db = sqlite3.connect(path)
    numbers = {name: db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_size", "auto_vacuum", "application_id", "user_version")}
    before = "".join(f"PRAGMA {name} = {numbers[name]};\n" for name in ("page_size", "auto_vacuum"))
    after = "".join(f"PRAGMA {name} = {numbers[name]};\n" for name in ("application_id", "user_version"))
    try:
        return before + "\n".join(db.iterdump()) + "\n" + after
    finally:
        db.close()


def restore(version: int, shard: Path) -> None:
    """The spool of one worker as that version left it."""
    (shard / "content").mkdir(parents=True)
    db = sqlite3.connect(shard / "spool.db")
    db.executescript((FOLDER / f"version-{version}.sql").read_text())
    for (name,) in db.execute("SELECT file FROM messages WHERE file IS NOT NULL"):
        (shard / "content" / name).write_bytes(MAILS["large"][2])
    db.close()


def main() -> None:
    target = FOLDER / f"version-{VERSION}.sql"
    if target.exists():
        sys.exit(f"{target.name} is there already; it is never made anew")
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(fill(Path(folder)))
        target.write_text(dumped(Path(folder) / "0" / "spool.db"))
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
