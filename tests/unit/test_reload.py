"""A new configuration while mail goes on: what changes, what stays, and that it is all or nothing."""

from __future__ import annotations

import asyncio
import os
import smtplib
import socket
from pathlib import Path
from typing import Any

import pytest

from gateway import app
from gateway.config import Config, ConfigError, ListenerConfig
from gateway.net.handover import HandoverError
from gateway.net.sockets import spoken
from gateway.reload import Prepared, matched, unchangeable

from ..loops import on_both_loops, until
from ..receivers import Receiver, receiving
from ..servers import free_port
from .test_app import boxed, dialled, file, post, running, sent


def box(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    return {name: {"type": "file", "path": str(folder / name), **more}}


def hook(url: str, **more: Any) -> dict[str, Any]:
    return {"hook": {"type": "webhook", "url": url, "format": "raw", **more}}


def routed(*sinks: str) -> list[dict[str, Any]]:
    return [{"recipients": [f"*@{name}.example"], "sink": name} for name in sinks]


def port(address: str) -> int:
    return int(address.rpartition(":")[2])


async def come(receiver: Receiver, count: int) -> None:
    await until(lambda: len(receiver.requests) >= count)


# ------------------------------------------------------------------- listeners


@on_both_loops
async def test_listeners_come_and_go(tmp_path: Path) -> None:
    path = tmp_path / "lmtp"
    first = {"address": "127.0.0.1:0"}
    async with running(file(tmp_path)) as (gateway, told):
        (kept,) = gateway.addresses
        inside = await dialled(gateway.port)
        more = [{"address": f"unix:{path}", "protocol": "lmtp"}, first, {"address": "127.0.0.1:0"}]
        await gateway.reload(file(tmp_path, listeners=more))
        unix, same, new = gateway.addresses
        assert (unix, same) == (f"unix:{path}", kept)
        assert new != kept
        assert [event["address"] for event in told.named("listening")] == [kept, unix, new]
        assert (await sent(port(new), "b@here.example"))[0] == 250
        outside = await dialled(port(new))
        with socket.socket(socket.AF_UNIX) as client:
            await asyncio.to_thread(client.connect, str(path))
            assert (await asyncio.to_thread(client.recv, 100)).startswith(b"220 ")
            await gateway.reload(file(tmp_path))
            # Who is in at a listener that goes hears it, between two mails; the others go on.
            assert (await asyncio.to_thread(client.recv, 100)).startswith(b"421 4.3.2 ")
        assert (await asyncio.to_thread(outside.getreply))[0] == 421
        outside.close()
        assert not path.exists()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port(new))
        assert (await asyncio.to_thread(inside.noop))[0] == 250
        inside.close()
        assert gateway.addresses == [kept]
        assert {event["address"] for event in told.named("closed")} == {unix, new}
        assert (await sent(gateway.port, "b@here.example"))[0] == 250


@on_both_loops
async def test_a_mail_under_way_on_a_listener_that_goes(tmp_path: Path) -> None:
    """After the end of its data it gets its answer, before it 421."""
    listeners = [{"address": "127.0.0.1:0"}, {"address": "127.0.0.1:0"}]
    async with receiving() as receiver:
        receiver.gate.clear()
        routes = [{"recipients": ["*@here.example"], "sink": "hook", "acknowledge": "delivered"}]
        config = {"sinks": hook(receiver.url), "routes": routes}
        async with running(file(tmp_path, listeners=listeners, **config)) as (gateway, _):
            gone = port(gateway.addresses[1])
            half = await dialled(gone)
            await asyncio.to_thread(half.mail, "a@client.example")
            await asyncio.to_thread(half.rcpt, "b@here.example")
            assert (await asyncio.to_thread(half.docmd, "DATA"))[0] == 354
            whole = asyncio.create_task(sent(gone, "b@here.example"))
            await come(receiver, 1)
            await gateway.reload(file(tmp_path, listeners=listeners[:1], **config))
            assert (await asyncio.to_thread(half.getreply))[0] == 421
            half.close()
            receiver.gate.set()
            assert (await whole)[0] == 250
            await until(lambda: not gateway._leaving)


@on_both_loops
async def test_nothing_changes_where_anything_cannot(tmp_path: Path) -> None:
    """Every fault at once; no socket is left bound, no sink left open."""
    free = free_port()
    (tmp_path / "no").write_text("a file where a folder belongs")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        busy = f"127.0.0.1:{taken.getsockname()[1]}"
        async with running(file(tmp_path)) as (gateway, told):
            listeners = [{"address": "127.0.0.1:0"}, {"address": f"127.0.0.1:{free}"}, {"address": busy}]
            with pytest.raises(ConfigError, match=rf"^listeners\[2\]\.address: cannot listen on {busy}: "):
                await gateway.reload(file(tmp_path, listeners=listeners, routes=routed("box")))
            with pytest.raises(ConfigError, match=r"^sinks\.no: "):
                await gateway.reload(file(tmp_path, listeners=listeners[:2], sinks=box(tmp_path, "no"), routes=routed("no")))
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", free)
            assert (await sent(gateway.port, "b@here.example"))[0] == 250
            assert (await sent(gateway.port, "b@box.example"))[0] == 550
            assert not told.named("reloaded")
            await gateway.reload(file(tmp_path, listeners=listeners[:2], routes=routed("box")))
            assert (await sent(free, "b@box.example"))[0] == 250


# ----------------------------------------------------------------------- sinks


@on_both_loops
async def test_a_sink_that_changes_with_deliveries_out(tmp_path: Path) -> None:
    """What is out ends where it began, once; what starts now goes to the new one."""
    async with receiving() as old, receiving() as new:
        old.gate.clear()
        async with running(file(tmp_path, sinks=hook(old.url), routes=routed("hook"))) as (gateway, told):
            assert {(await sent(gateway.port, "b@hook.example"))[0] for _ in range(3)} == {250}
            await come(old, 1)
            await gateway.reload(file(tmp_path, sinks=hook(new.url), routes=routed("hook")))
            assert (await sent(gateway.port, "b@hook.example"))[0] == 250
            await come(new, 1)
            old.gate.set()
            await until(lambda: len(told.named("delivered")) == 4)
            assert (len(old.requests), len(new.requests)) == (3, 1)
            ids = [request.one("webhook-id") for request in (*old.requests, *new.requests)]
            assert len(set(ids)) == 4
            assert not told.named("deferred")


@on_both_loops
async def test_a_sink_that_was_down_is_tried_at_its_new_place_at_once(tmp_path: Path) -> None:
    down = f"http://127.0.0.1:{free_port()}/inbound"
    async with running(file(tmp_path, sinks=hook(down), routes=routed("hook"))) as (gateway, told):
        assert {(await sent(gateway.port, "b@hook.example"))[0] for _ in range(5)} == {250}
        await until(lambda: told.named("sink_down"))
        async with receiving() as receiver:
            await gateway.reload(file(tmp_path, sinks=hook(receiver.url), routes=routed("hook")))
            await come(receiver, 5)
            await until(lambda: told.named("sink_up"))


@on_both_loops
async def test_a_sink_that_goes_and_comes_back(tmp_path: Path) -> None:
    """Its rows are kept meanwhile and told; one that is still out is not tried a second time beside."""
    async with receiving() as receiver:
        receiver.gate.clear()
        both = box(tmp_path, "box") | hook(receiver.url)
        async with running(file(tmp_path, sinks=both, routes=routed("hook", "box"))) as (gateway, told):
            assert (await sent(gateway.port, "b@hook.example"))[0] == 250
            await come(receiver, 1)
            half = await dialled(gateway.port)
            await asyncio.to_thread(half.mail, "a@client.example")
            assert (await asyncio.to_thread(half.rcpt, "b@hook.example"))[0] == 250
            await gateway.reload(file(tmp_path, sinks=box(tmp_path, "box"), routes=routed("box")))
            assert "not in the configuration" in told.named("sink_down")[0]["reason"]
            assert (await sent(gateway.port, "b@hook.example"))[0] == 550
            assert (await sent(gateway.port, "b@box.example"))[0] == 250
            # A mail that was let in before is promised all the same, and kept.
            assert (await asyncio.to_thread(half.data, b"Subject: half\r\n\r\n"))[0] == 250
            half.close()
            await gateway.reload(file(tmp_path, sinks=both, routes=routed("hook", "box")))
            receiver.gate.set()
            await come(receiver, 2)
            await until(lambda: len(told.named("delivered")) == 3)
            assert [request.body.rpartition(b"Subject: ")[2][:5] for request in receiver.requests] == [b"hello", b"half\r"]
            assert len(boxed(tmp_path)) == 1


@on_both_loops
async def test_a_client_that_waits_for_a_sink_that_goes_is_told(tmp_path: Path) -> None:
    """acknowledge = "delivered", and all places taken: whoever waits for one gets the fallback."""
    async with receiving() as receiver:
        receiver.gate.clear()
        routes = [{"recipients": ["*@here.example"], "sink": "hook", "acknowledge": "delivered", "fallback": "refuse"}]
        config = {"sinks": box(tmp_path, "box") | hook(receiver.url, concurrency=1), "routes": routes}
        async with running(file(tmp_path, **config)) as (gateway, told):
            out = asyncio.create_task(sent(gateway.port, "b@here.example"))
            await come(receiver, 1)
            waiting = asyncio.create_task(sent(gateway.port, "b@here.example"))
            await until(lambda: gateway._queues()[0]._lanes["hook"].waiting)
            await gateway.reload(file(tmp_path, sinks=box(tmp_path, "box"), routes=routed("box")))
            assert (await waiting)[0] == 451
            receiver.gate.set()
            assert (await out)[0] == 250
            assert len(receiver.requests) == 1
            assert not told.named("accepted")[1:]


@on_both_loops
async def test_the_rest_of_the_file(tmp_path: Path) -> None:
    async with running(file(tmp_path)) as (gateway, told):
        other = file(
            tmp_path,
            hostname="other.example",
            retry={"delays": ["7s"], "expire": "2h"},
            limits={"memory": "2 MiB", "message_size": "1 MiB"},
            sinks={"box": {"type": "relay", "hosts": [f"127.0.0.1:{free_port()}"], "tls": "off"}},
        )
        await gateway.reload(other)
        client = await asyncio.to_thread(smtplib.SMTP, "127.0.0.1", gateway.port, timeout=30)
        _, greeting = await asyncio.to_thread(client.ehlo)
        client.close()
        assert greeting.startswith(b"other.example")
        assert b"SIZE 1048576" in greeting
        assert (await sent(gateway.port, "b@here.example"))[0] == 250
        await until(lambda: told.named("deferred"))
        (row,) = [row for queue in gateway._queues() for row in await queue._spool.due("box", float("inf"), 10)]
        assert 2 * 3600 - 60 < row.expires_at - row.due < 2 * 3600 + 1
        assert gateway._intake is not None
        assert gateway._intake.memory == 2 * 1024 * 1024


# --------------------------------------------------------------- what differs


def listening(*addresses: str) -> list[ListenerConfig]:
    return [ListenerConfig(address=address) for address in addresses]


@pytest.mark.parametrize(
    ("old", "new", "kept"),
    [
        (["127.0.0.1:1"], ["127.0.0.1:1"], [0]),
        (["127.0.0.1:1", "127.0.0.1:2"], ["127.0.0.1:2", "127.0.0.1:3"], [1, None]),
        # Port 0 may stand there more than once.
        (["127.0.0.1:0", "127.0.0.1:0"], ["127.0.0.1:0"], [0]),
        (["127.0.0.1:0"], ["127.0.0.1:0", "127.0.0.1:0"], [0, None]),
    ],
)
def test_listeners_are_known_by_their_address(old: list[str], new: list[str], kept: list[int | None]) -> None:
    assert matched(listening(*old), listening(*new)) == kept


def test_descriptors_that_were_passed_on_stay(tmp_path: Path) -> None:
    def config(*addresses: str, **more: Any) -> Config:
        return file(tmp_path, listeners=[{"address": address} for address in addresses], **more)

    assert unchangeable(config("fd:3", "127.0.0.1:0"), config("127.0.0.1:1", "fd:3")) == []
    (fault,) = unchangeable(config("fd:3", "127.0.0.1:0"), config("127.0.0.1:0"))
    assert fault.startswith("listeners (fd:): only a restart or a hand-over")
    hold = {"path": str(tmp_path / "spool"), "minimum_free": "1 MiB", "hold": "9ms"}
    assert unchangeable(config("127.0.0.1:0"), config("127.0.0.1:0", spool=hold)) == []


@on_both_loops
async def test_the_mode_of_a_socket_that_stays(tmp_path: Path) -> None:
    path = tmp_path / "smtp"
    where = {"address": f"unix:{path}", "mode": "0660"}
    async with running(file(tmp_path, listeners=[{"address": "127.0.0.1:0"}, where])) as (gateway, _):
        await gateway.reload(file(tmp_path, listeners=[{"address": "127.0.0.1:0"}, where | {"mode": "0600"}]))
        assert os.stat(path).st_mode & 0o777 == 0o600
        assert await asyncio.to_thread(post, gateway.port, ["b@here.example"])


# ------------------------------------------------------- beside a hand-over and the end


async def test_a_hand_over_passes_on_what_a_reload_just_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for while a reload is under way: the sockets are those of the new configuration."""
    offered: list[list[str]] = []

    class Offered:
        def __init__(self, sockets: list[tuple[str, socket.socket]]) -> None:
            offered.append([f"{name} {spoken(sock.getsockname())}" for name, sock in sockets])

        async def make(self) -> int:
            raise HandoverError(["there is no new version here"])

    monkeypatch.setattr(app, "Handover", Offered)
    first, second = ({"address": f"127.0.0.1:{free_port()}"} for _ in range(2))
    async with running(file(tmp_path, listeners=[first])) as (gateway, told):
        # The new sink is opened in a thread: the hand-over is asked for while the reload waits.
        sinks = box(tmp_path, "box") | box(tmp_path, "more")
        reloading = asyncio.create_task(gateway.reload(file(tmp_path, listeners=[second], sinks=sinks)))
        await asyncio.sleep(0)
        assert not reloading.done()
        gateway._hand_over()
        await asyncio.sleep(0)
        await reloading
        await until(lambda: told.named("handover_refused"))
        assert offered == [[f"{second['address']} {second['address']}"]]


@pytest.mark.parametrize("end", ["leave", "stop"])
async def test_a_reload_that_the_end_overtakes_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """What it made is closed again: nothing is opened by a process that is about to go."""
    extra = free_port()
    made = asyncio.Event()
    go_on = asyncio.Event()
    prepared: list[Prepared] = []

    async with running(file(tmp_path)) as (gateway, told):
        prepare = gateway.prepare

        async def slow(*given: Any) -> Prepared:
            prepared.append(await prepare(*given))
            made.set()
            await go_on.wait()
            return prepared[-1]

        monkeypatch.setattr(gateway, "prepare", slow)
        reloading = asyncio.create_task(gateway.reload(file(tmp_path, listeners=[{"address": f"127.0.0.1:{extra}"}])))
        await made.wait()
        if end == "leave":
            gateway.leave()
        else:
            await gateway.stop()
        go_on.set()
        with pytest.raises(ConfigError):
            await reloading
        assert not told.named("reloaded")
        assert all(sock.fileno() == -1 for sock in prepared[0].sockets.values())
