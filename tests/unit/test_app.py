"""The whole in one process: the library form, start, drain, shortage, reload, the numbers.

Signals, exit codes and workers are in tests/integration/test_gateway_process.py."""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import smtplib
import socket
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme

from gateway import Gateway, Message, Reply
from gateway import app as module
from gateway.admin.control import call
from gateway.build import least_room
from gateway.config import Config, ConfigError
from gateway.net.sockets import bind
from gateway.observe import Telemetry
from gateway.spool import sqlite

from ..certificates import Certified, certified
from ..loops import on_both_loops, until
from ..servers import free_port

MAIL = b"Subject: hello\r\n\r\n.dots and all\r\n"


class Told(Telemetry):
    """Telemetry that remembers."""

    def __init__(self) -> None:
        super().__init__("none")
        self.events: list[tuple[str, dict[str, Any]]] = []

    def tell(self, event: str, fields: dict[str, Any]) -> None:
        self.events.append((event, dict(fields)))
        super().tell(event, fields)

    def named(self, name: str) -> list[dict[str, Any]]:
        return [fields for found, fields in self.events if found == name]


def post(port: int, recipients: Sequence[str], content: bytes = MAIL) -> tuple[int, bytes]:
    """Send one mail; the reply after the end of data, or the first that refused."""
    client = smtplib.SMTP("127.0.0.1", port, local_hostname="client.example", timeout=30)
    try:
        client.ehlo()
        client.mail("a@client.example")
        for recipient in recipients:
            code, text = client.rcpt(recipient)
            if code != 250:
                return code, text
        return client.data(content)
    finally:
        # QUIT may be answered with the 421 of a gateway that ends.
        with suppress(smtplib.SMTPException):
            client.quit()
        client.close()


async def dialled(port: int) -> smtplib.SMTP:
    """A client that is in and has said EHLO. Its calls block: through a thread."""

    def dial() -> smtplib.SMTP:
        client = smtplib.SMTP("127.0.0.1", port, timeout=30)
        client.ehlo()
        return client

    return await asyncio.to_thread(dial)


async def sent(port: int, *recipients: str, content: bytes = MAIL) -> tuple[int, bytes]:
    return await asyncio.to_thread(post, port, recipients, content)


def file(folder: Path, **more: Any) -> Config:
    """What a file would say, with everything in this folder."""
    table: dict[str, Any] = {
        "hostname": "mx.example",
        "listeners": [{"address": "127.0.0.1:0"}],
        "spool": {"path": str(folder / "spool"), "minimum_free": "1 MiB"},
        "sinks": {"box": {"type": "file", "path": str(folder / "box")}},
        "routes": [{"recipients": ["*@here.example"], "sink": "box"}],
    }
    return Config.parse(table | more)


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[tuple[Gateway, Told]]:
    told = Told()
    async with Gateway(config, telemetry=told) as gateway:
        yield gateway, told
    assert not told.named("bug"), told.named("bug")


def boxed(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / "box" / "new").iterdir())]


# ----------------------------------------------------------------- in a program


@on_both_loops
async def test_a_function_takes_mail(tmp_path: Path) -> None:
    got: list[Message] = []
    told = Told()
    app = Gateway(listen="127.0.0.1:0", hostname="mx.example", telemetry=told)

    @app.recipients("*@app.example", "postmaster@here.example")
    async def inbound(message: Message) -> None:
        got.append(message)

    async with app:
        code, text = await sent(app.port, "b@app.example", "Postmaster@HERE.example")
        assert (code, text[:18]) == (250, b"2.0.0 accepted as ")
        assert (await sent(app.port, "b@else.example"))[0] == 550
    (message,) = got
    assert message.content == MAIL
    assert [recipient.address for recipient in message.envelope.recipients] == ["b@app.example", "Postmaster@HERE.example"]
    assert message.envelope.mail_from == "a@client.example"
    assert message.client.helo == "client.example"
    assert message.parsed().subject == "hello"
    assert message.id in text.decode()
    (accepted,) = told.named("accepted")
    assert accepted["stored"] is False
    assert [name for name, _ in told.events][-2:] == ["draining", "stopped"]
    assert not told.named("bug")


@on_both_loops
async def test_what_the_function_says_is_the_reply() -> None:
    told = Told()
    app = Gateway(listen="127.0.0.1:0", telemetry=told)

    @app.recipients("no@app.example")
    async def refuse(message: Message) -> Reply:
        return Reply(550, "5.7.1", "not here")

    @app.recipients("later@app.example")
    def put_off(message: Message) -> Reply:
        return Reply(450, "4.2.1", "come again")

    @app.recipients("yes@app.example")
    async def welcome(message: Message) -> Reply:
        return Reply(250, "2.6.0", "thank you")

    @app.recipients("slow@app.example", timeout=0.1)
    async def sleep(message: Message) -> None:
        await asyncio.sleep(5)

    @app.recipients("*@app.example")
    async def rest(message: Message) -> None:
        raise AssertionError("the first that matches is asked")

    async with app:
        assert await sent(app.port, "no@app.example") == (550, b"5.7.1 not here")
        assert await sent(app.port, "later@app.example") == (450, b"4.2.1 come again")
        assert (await sent(app.port, "yes@app.example"))[0] == 250
        assert (await sent(app.port, "slow@app.example"))[0] == 451
        assert app._temporary is not None
        temporary = app._temporary
        assert temporary.is_dir()
    assert not temporary.exists()


@on_both_loops
async def test_a_function_that_raises() -> None:
    app = Gateway(listen="127.0.0.1:0")
    seen: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: seen.append(context))

    @app.recipients("*")
    async def inbound(message: Message) -> None:
        raise ZeroDivisionError

    async with app:
        assert (await sent(app.port, "b@app.example"))[0] == 451
    assert isinstance(seen[0]["exception"], ZeroDivisionError)


@on_both_loops
async def test_mail_that_one_of_two_functions_took_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    """The client cannot be told both: 250, and the rest is in the spool when the program ends."""
    told = Told()
    app = Gateway(listen="127.0.0.1:0", telemetry=told)

    @app.recipients("one@app.example")
    async def one(message: Message) -> None:
        return None

    @app.recipients("two@app.example")
    async def two(message: Message) -> Reply:
        return Reply(451, "4.3.0", "not now")

    with caplog.at_level(logging.WARNING, "gateway"):
        async with app:
            assert (await sent(app.port, "one@app.example", "two@app.example"))[0] == 250
    (stopped,) = told.named("stopped")
    assert stopped["queued"] == 1
    assert stopped["spool"] in caplog.text

    got: list[list[str]] = []
    again = Gateway(listen="127.0.0.1:0", spool=stopped["spool"])

    @again.recipients("*@app.example", name="two")
    async def later(message: Message) -> None:
        got.append([recipient.address for recipient in message.envelope.recipients])

    async with again:
        await asyncio.to_thread(call, again.config.spool.path / "0" / "control.sock", "change", ids=None, action="retry")
        await until(lambda: got)
    assert got == [["two@app.example"]]


def test_what_makes_no_gateway(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give a config, or an address"):
        Gateway()
    with pytest.raises(ValueError, match="give a config, or an address"):
        Gateway(file(tmp_path), listen="127.0.0.1:0")
    with pytest.raises(ValueError, match="stand in the config"):
        Gateway(file(tmp_path), hostname="x.example")
    app = Gateway(listen="127.0.0.1:0")
    with pytest.raises(ValueError, match="say which recipients"):
        app.recipients()
    with pytest.raises(RuntimeError, match="not started"):
        _ = app.port


@on_both_loops
async def test_no_function_no_gateway() -> None:
    with pytest.raises(ConfigError, match="no function takes mail"):
        await Gateway(listen="127.0.0.1:0").start()


@on_both_loops
async def test_a_gateway_starts_once() -> None:
    app = Gateway(listen="127.0.0.1:0")

    @app.recipients("*")
    async def inbound(message: Message) -> None:
        return None

    async with app:
        with pytest.raises(RuntimeError, match="starts once"):
            await app.start()


@on_both_loops
async def test_functions_beside_a_file(tmp_path: Path) -> None:
    got: list[Message] = []
    app = Gateway(file(tmp_path))

    @app.recipients("robot@here.example")
    async def robot(message: Message) -> None:
        got.append(message)

    async with app:
        assert (await sent(app.port, "robot@here.example"))[0] == 250
        assert (await sent(app.port, "b@here.example"))[0] == 250
    assert len(got) == 1
    assert len(boxed(tmp_path)) == 1


# ------------------------------------------------------------------------ start


@on_both_loops
async def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with bind("127.0.0.1", 0) as sock:
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        listeners = [{"address": "127.0.0.1:0"}, {"address": address}, {"address": "192.0.2.1:25"}]
        with pytest.raises(ConfigError) as error:
            await Gateway(file(tmp_path, listeners=listeners)).start()
    assert error.value.faults[0] == f"listeners[1].address: cannot listen on {address}: Address already in use"
    assert error.value.faults[1].startswith("listeners[2].address: cannot listen on 192.0.2.1:25: ")


@on_both_loops
async def test_a_spool_that_another_has(tmp_path: Path) -> None:
    """The second is told, and leaves nothing: its port is free, the first goes on."""
    async with running(file(tmp_path)) as (first, _):
        address = f"127.0.0.1:{free_port()}"
        with pytest.raises(ConfigError) as error:
            await Gateway(file(tmp_path, listeners=[{"address": address}])).start()
        assert error.value.faults[0].startswith("spool.path: ")
        bind("127.0.0.1", int(address.rpartition(":")[2])).close()
        assert (await sent(first.port, "b@here.example"))[0] == 250


@on_both_loops
async def test_a_sink_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "box").write_text("a file where a folder belongs")
    with pytest.raises(ConfigError, match=r"^sinks\.box: "):
        await Gateway(file(tmp_path)).start()
    # The spool's lock is free again.
    (tmp_path / "box").unlink()
    async with running(file(tmp_path)):
        pass


# -------------------------------------------------------------------- the end


@on_both_loops
async def test_what_is_under_way_is_waited_for() -> None:
    """The function is still at it when the end is asked for: its word is the reply."""
    began, go = asyncio.Event(), asyncio.Event()
    app = Gateway(listen="127.0.0.1:0")

    @app.recipients("*")
    async def inbound(message: Message) -> None:
        began.set()
        await go.wait()

    await app.start()
    port = app.port
    sending = asyncio.create_task(sent(port, "b@app.example"))
    await began.wait()
    ending = asyncio.create_task(app.stop())
    await asyncio.sleep(0.1)
    assert not ending.done()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
    go.set()
    assert (await sending)[0] == 250
    await ending


@on_both_loops
async def test_the_drain_has_an_end(tmp_path: Path) -> None:
    began = asyncio.Event()
    app = Gateway(file(tmp_path, drain={"timeout": "300ms"}))

    @app.recipients("slow@here.example", timeout=60.0)
    async def inbound(message: Message) -> None:
        began.set()
        await asyncio.sleep(60)

    await app.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
    await reader.readline()
    writer.write(b"EHLO x\r\n")
    while (await reader.readline())[3:4] == b"-":
        pass
    writer.write(b"MAIL FROM:<a@b.c>\r\nRCPT TO:<slow@here.example>\r\nBDAT 7 LAST\r\n\r\nhey\r\n")
    await reader.readline()
    await reader.readline()
    await began.wait()
    before = time.monotonic()
    await app.stop()
    assert time.monotonic() - before < 30
    # After its end of data: no 421, and no 250 that nobody can stand for.
    assert await reader.read() == b""
    writer.close()


@on_both_loops
async def test_no_word_from_the_spool_ends_the_process(tmp_path: Path) -> None:
    told = Told()
    gateway = Gateway(file(tmp_path), telemetry=told)
    ready = asyncio.Event()
    living = asyncio.create_task(gateway.main(ready.set))
    await ready.wait()
    assert gateway._spool is not None
    gateway._spool._set_fatal("the disk took a sync and forgot it")
    assert await living == module.RECOVER
    (stopped,) = told.named("stopped")
    assert "the disk took a sync and forgot it" in stopped["reason"]


@on_both_loops
async def test_the_second_asking_ends_at_once(tmp_path: Path) -> None:
    began = asyncio.Event()
    app = Gateway(file(tmp_path))

    @app.recipients("slow@here.example", timeout=60.0)
    async def inbound(message: Message) -> None:
        began.set()
        await asyncio.sleep(60)

    ready = asyncio.Event()
    living = asyncio.create_task(app.main(ready.set))
    await ready.wait()
    sending = asyncio.create_task(sent(app.port, "slow@here.example"))
    await began.wait()
    app.ask_to_stop()
    await asyncio.sleep(0.1)
    assert not living.done()
    app.ask_to_stop()
    assert await asyncio.wait_for(living, 30) == 0
    with pytest.raises(smtplib.SMTPServerDisconnected):
        await sending


# ------------------------------------------------------------------- the watch


@on_both_loops
async def test_no_room_is_told_before_mail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A1: 452 at MAIL while there is too little room; the readiness page says why."""
    config = file(tmp_path, spool={"path": str(tmp_path / "spool"), "minimum_free": "1000 TiB"})
    async with running(config) as (gateway, _):
        assert (await gateway.unready() or "").endswith("must be")
        client = await dialled(gateway.port)
        told = await asyncio.to_thread(client.mail, "a@client.example")
        assert told == (452, b"4.3.1 insufficient storage, try again later")
        client.close()


def test_the_room_that_must_be(tmp_path: Path) -> None:
    """A1: what the operator wants free, and never less than one and a half messages."""
    disk = os.statvfs(tmp_path)
    total = disk.f_blocks * disk.f_frsize
    for said, size, wanted in (
        ("1 MiB", "10 MiB", 15 * 2**20),
        ("100 MiB", "10 MiB", 100 * 2**20),
        ("50%", "1 MiB", 0.5),
        ("0%", "1 MiB", 1.5 * 2**20),
        ("50%", f"{total} B", 1.5 * total),
    ):
        config = file(tmp_path, spool={"path": str(tmp_path), "minimum_free": said}, limits={"message_size": size})
        assert least_room(config, tmp_path) == wanted


@on_both_loops
async def test_a_spool_in_trouble_takes_no_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A1: 421 instead of the greeting, and to MAIL; all is well again by itself."""
    monkeypatch.setattr(module, "WATCH", 0.02)
    monkeypatch.setattr(sqlite, "_WATCH", 3600.0)  # when it looks again is for us to say
    async with running(file(tmp_path)) as (gateway, _):
        inside = await dialled(gateway.port)
        assert gateway._spool is not None
        gateway._spool._set_trouble("the disk is gone")
        await until(lambda: gateway._listeners[0].rules.shortage)
        assert (await asyncio.to_thread(inside.mail, "a@client.example"))[0] == 421
        inside.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        assert await reader.read() == module.UNHEALTHY.wire
        writer.close()
        gateway._spool._watch()
        await until(lambda: gateway._listeners[0].rules.shortage is None)
        assert await gateway.unready() is None
        assert (await sent(gateway.port, "b@here.example"))[0] == 250


# ---------------------------------------------------------------------- reload


@on_both_loops
async def test_reload(tmp_path: Path) -> None:
    async with running(file(tmp_path)) as (gateway, told):
        inside = await dialled(gateway.port)
        await asyncio.to_thread(inside.mail, "a@client.example")
        assert (await asyncio.to_thread(inside.rcpt, "b@new.example"))[0] == 550
        routes = [{"recipients": ["*@new.example"], "sink": "box"}]
        await gateway.reload(file(tmp_path, routes=routes, limits={"connections": 1}))
        # For those that are in as well.
        assert (await asyncio.to_thread(inside.rcpt, "b@new.example"))[0] == 250
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        assert (await reader.read()).startswith(b"421 4.3.2 too many connections")
        writer.close()
        inside.close()
        assert len(told.named("reloaded")) == 1


@on_both_loops
async def test_what_only_another_process_can_change(tmp_path: Path) -> None:
    async with running(file(tmp_path)) as (gateway, told):
        other = file(
            tmp_path,
            workers=2,
            admin={"address": "127.0.0.1:0"},
            spool={"path": str(tmp_path / "elsewhere"), "minimum_free": "1 MiB"},
            routes=[{"recipients": ["*@new.example"], "sink": "box"}],
        )
        with pytest.raises(ConfigError) as error:
            await gateway.reload(other)
        assert error.value.faults == [
            f"{name}: only a restart or a hand-over (SIGUSR2) can change this" for name in ("workers", "admin", "spool")
        ]
        assert (await sent(gateway.port, "b@new.example"))[0] == 550
        assert not told.named("reloaded")


# ---------------------------------------------------------------- certificates


AUTHORITY = trustme.CA()


def by_tls(port: int) -> bytes:
    """The certificate of a gateway with implicit TLS, once it has greeted."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    AUTHORITY.configure_trust(context)
    with socket.create_connection(("127.0.0.1", port), 10) as clear, context.wrap_socket(clear, server_hostname="mx.example") as secured:
        assert secured.recv(100).startswith(b"220 ")
        found = secured.getpeercert(True)
        assert found is not None
        return found


def listeners(pair: Certified, **more: Any) -> list[dict[str, Any]]:
    return [{"address": "127.0.0.1:0", "tls": "implicit", "certificate": str(pair.certificate), "key": str(pair.key), **more}]


@on_both_loops
async def test_a_reload_reads_certificates_again(tmp_path: Path) -> None:
    first = certified(AUTHORITY, tmp_path / "tls", "mx.example")
    config = file(tmp_path, listeners=listeners(first))
    async with running(config) as (gateway, told):
        assert await asyncio.to_thread(by_tls, gateway.port) == first.der
        second = certified(AUTHORITY, tmp_path / "tls", "mx.example")
        assert await asyncio.to_thread(by_tls, gateway.port) == first.der
        await gateway.reload(config)
        assert await asyncio.to_thread(by_tls, gateway.port) == second.der
        # Files that do not fit change nothing.
        second.key.write_text("no key")
        with pytest.raises(ConfigError) as error:
            await gateway.reload(config)
        assert error.value.faults == [f"listeners[0].key: {second.key} has no private key in PEM form"]
        assert await asyncio.to_thread(by_tls, gateway.port) == second.der
        assert len(told.named("reloaded")) == 1


@on_both_loops
async def test_replaced_certificates_are_taken_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WATCH_CERTIFICATES", 0.02)
    pair = certified(AUTHORITY, tmp_path / "tls", "mx.example")
    async with running(file(tmp_path, listeners=listeners(pair))) as (gateway, told):
        other = certified(AUTHORITY, tmp_path / "other", "mx.example")
        # First one of the two: they do not fit, and nothing changes.
        other.certificate.replace(pair.certificate)
        await until(lambda: told.named("certificates_refused"))
        assert told.named("certificates_refused") == [{"faults": [f"listeners[0].key: {pair.key} is not the key of {pair.certificate}"]}]
        assert await asyncio.to_thread(by_tls, gateway.port) == pair.der
        other.key.replace(pair.key)
        await until(lambda: told.named("certificates_reloaded"))
        assert await asyncio.to_thread(by_tls, gateway.port) == other.der
        assert len(told.named("certificates_refused")) == 1


async def test_certificates_that_cannot_be_used_end_the_start(tmp_path: Path) -> None:
    good, bad = (certified(AUTHORITY, tmp_path / name, f"{name}.example") for name in ("good", "bad"))
    bad.key.write_text("no key")
    more = [{"certificate": str(bad.certificate), "key": str(bad.key)}]
    gateway = Gateway(
        file(tmp_path, listeners=[*listeners(good, certificates=more), *listeners(bad), *listeners(good, client_ca=str(bad.key))])
    )
    with pytest.raises(ConfigError) as error:
        await gateway.start()
    assert error.value.faults == [
        f"listeners[0].certificates[0].key: {bad.key} has no private key in PEM form",
        f"listeners[1].key: {bad.key} has no private key in PEM form",
        f"listeners[2].client_ca: {bad.key} has no certificate in PEM form",
    ]


# --------------------------------------------------------------- what it tells


@on_both_loops
async def test_numbers_and_health(tmp_path: Path) -> None:
    # A sink that answers at once: nothing is on its way into the spool when we look.
    config = file(tmp_path, admin={"address": "127.0.0.1:0"}, sinks={"box": {"type": "discard"}})
    async with running(config) as (gateway, told):
        (smtp, http) = told.named("listening")
        assert smtp == {"address": gateway.addresses[0], "protocol": "smtp"}
        assert http["protocol"] == "http"
        assert [name for name, _ in told.events].index("ready") == 2
        assert (await sent(gateway.port, "b@here.example"))[0] == 250
        await until(lambda: not gateway._listeners[0].connections)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://{http['address']}/metrics") as answer:
                lines = (await answer.text()).splitlines()
            async with session.get(f"http://{http['address']}/healthz") as answer:
                health = await answer.json()
            async with session.get(f"http://{http['address']}/readyz") as answer:
                assert answer.status == 200
    for line in (
        "gateway_connections 0.0",
        "gateway_messages_accepted_total 1.0",
        'gateway_deliveries_total{outcome="delivered",sink="box"} 1.0',
        'gateway_sink_up{sink="box"} 1.0',
        'gateway_queue_oldest_seconds{sink="box"} 0.0',
        'gateway_deliveries_out{sink="box"} 0.0',
    ):
        assert line in lines, line
    assert health["ready"] is True
    assert health["sinks"] == {"box": "up"}


@on_both_loops
async def test_the_control_socket(tmp_path: Path) -> None:
    """What ``gateway queue`` asks of a gateway that runs: an upstream that is down, and a mail for it."""
    nobody = f"127.0.0.1:{free_port()}"
    config = file(
        tmp_path,
        sinks={"up": {"type": "relay", "hosts": [nobody], "tls": "off"}},
        routes=[{"recipients": ["*@here.example"], "sink": "up"}],
    )
    async with running(config) as (gateway, _):
        assert (await sent(gateway.port, "b@here.example"))[0] == 250
        path = config.spool.path / "0" / "control.sock"

        async def ask(op: str, **arguments: Any) -> Any:
            return await asyncio.to_thread(call, path, op, **arguments)

        (row,) = await ask("rows")
        assert row["sink"] == "up"
        assert row["recipients"] == ["b@here.example"]
        content = base64.b64decode(await ask("export", message_id=row["message_id"]))
        assert content.startswith(b"Received: ")
        assert content.endswith(MAIL)
        assert [(sink, state, rows) for sink, state, rows, _ in await ask("counts")] == [("up", "queued", 1)]
        status = await ask("status")
        assert status["queue"] == {"up": {"queued": 1}}
        assert status["state"] == "ready"
        assert status["unready"] is None
        state = await ask("metrics")
        assert state["gauges"]["gateway_queue_messages"]["values"] == [[["up", "queued"], 1]]
        assert await ask("change", ids=[row["id"]], action="hold") == 1
        assert (await ask("rows", state="held"))[0]["id"] == row["id"]
        assert await ask("change", ids=None, action="drop", sink="up") == 1
        assert await ask("rows") == []
