"""How clients come in, over real sockets: PROXY headers, the greet delay, unix sockets, those who
speak for others. R3 and P1 of the reference; the grammar of the header is test_proxy.py's."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import time
from ipaddress import ip_network
from pathlib import Path

import pytest

from gateway import listener as module
from gateway.contracts import Verdict
from gateway.listener import Admission, Door, Listener, SessionIds
from gateway.message import TLS, Client
from gateway.net.sockets import bind_unix
from gateway.reply import Reply
from gateway.route import Route, Routes
from gateway.smtp import replies
from gateway.smtp.proxy import SIGNATURE
from gateway.smtp.server import Rules

from ..loops import on_both_loops, until
from .test_listener import Bounds, Dialled, House, Inbox, Told, house
from .test_proxy import ADDRESSES4, secured, tlv, v2

LOOPBACK = (ip_network("127.0.0.0/8"),)
BEHIND = Door(proxies=LOOPBACK)
V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 25\r\n"


async def dial(here: House, octets: bytes = b"") -> Dialled:
    """A client whose first octets are in our queue before we look."""
    client = await here.dial()
    if octets:
        client.writer.write(octets)
    return client


async def heard(client: Dialled) -> bytes:
    """All that was said to it; a reset says nothing (what it had sent was not read)."""
    try:
        return await client.rest()
    except ConnectionResetError:
        return b""


# ---------------------------------------------------------------- PROXY, trusted


@on_both_loops
@pytest.mark.parametrize("header", [V1, v2(), v2(block=ADDRESSES4 + tlv(2, b"mx.example.net"))])
async def test_the_client_is_whom_the_proxy_names(header: bytes) -> None:
    async with house() as here:
        here.listener.door = BEHIND
        client = await dial(here, header)
        await client.to_content()
        assert await client.say(b"text\r\n.") == [b"250 2.0.0 taken\r\n"]
        (mail,) = here.inbox.mails
        assert (mail.transaction.client.ip, mail.transaction.client.port) == ("192.0.2.7", 4711)
        (connected,) = here.told.named("connected")
        assert (connected["client"], connected["proxy"]) == ("192.0.2.7", "127.0.0.1")
        assert connected.get("authority") == ("mx.example.net" if len(header) > 43 else None)
        assert here.listener.admission._clients == {"192.0.2.7": 1}


@on_both_loops
async def test_tls_is_what_the_proxy_says() -> None:
    async with house() as here:
        here.listener.door = BEHIND
        client = await dial(here, v2(block=ADDRESSES4 + secured(1, 0, tlv(0x21, b"TLSv1.3"), tlv(0x23, b"AES"))))
        await client.to_content()
        assert here.inbox.mails[0].transaction.client.tls == TLS("TLSv1.3", "AES")
        assert here.inbox.mails[0].transaction.client.protocol == "ESMTPS"


@on_both_loops
@pytest.mark.parametrize("header", [V1, v2()])
async def test_a_header_that_comes_piece_by_piece(header: bytes) -> None:
    async with house() as here:
        here.listener.door = BEHIND
        client = await here.dial()
        for at in range(len(header)):
            client.writer.write(header[at : at + 1])
            await client.writer.drain()
            if at % 5 == 0:
                await asyncio.sleep(0.001)
        await client.hello()


@on_both_loops
async def test_what_comes_behind_the_header_is_the_clients() -> None:
    """It is an early talker, and not a word of it is lost or taken for the proxy's."""
    async with house() as here:
        here.listener.door = BEHIND
        for header in (V1, v2()):
            client = await dial(here, header + b"EHLO x\r\n")
            assert await client.rest() == replies.TOO_EARLY.wire
        client = await dial(here, V1 + V1)
        assert await client.rest() == replies.NO_PROXY.wire


@on_both_loops
@pytest.mark.parametrize("header", [b"PROXY UNKNOWN\r\n", v2(0x20, 0, b""), v2(0x21, 0, b"")])
async def test_a_health_check_of_the_proxy_itself(header: bytes) -> None:
    async with house() as here:
        here.listener.door = BEHIND
        client = await dial(here, header)
        await client.hello()
        assert here.told.named("connected")[0]["client"] == "127.0.0.1"


@on_both_loops
@pytest.mark.parametrize(
    ("octets", "fault"),
    [
        (b"EHLO x\r\n", "missing"),
        (b"\x16\x03\x01\x02\x00\x01", "missing"),
        (b"\r\n", "late"),
        (b"", "late"),
        (b"PROXY TCP4 192.0.2.7 ", "late"),
        (v2()[:-1], "late"),
        (b"PROXY TCP4 nobody 198.51.100.1 1 2\r\n", "malformed"),
        (v2(block=ADDRESSES4 + tlv(3, b"\0\0\0\0")), "malformed"),
        (b"PROXY UNKNOWN " + b"x" * 100 + b"\r\n", "too long"),
        (SIGNATURE + b"\x21\x11\xff\xff" + ADDRESSES4, "too long"),
    ],
)
async def test_no_header_no_greeting(monkeypatch: pytest.MonkeyPatch, octets: bytes, fault: str) -> None:
    if fault == "late":  # whoever is not must not be overtaken by the clock
        monkeypatch.setattr(module, "PROXY_DEADLINE", 0.1)
    async with house() as here:
        here.listener.door = BEHIND
        client = await dial(here, octets)
        assert await heard(client) == b""
        (shed,) = here.told.named("shed")
        assert (shed["reason"], shed["client"]) == (f"PROXY header {fault}", "127.0.0.1")
        assert not here.told.named("connected")
        await here.empty()
        assert here.listener.admission.count == 0


@on_both_loops
async def test_the_deadline_is_not_moved_by_a_drip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROXY_DEADLINE", 0.3)
    async with house() as here:
        here.listener.door = BEHIND
        began = time.monotonic()
        client = await here.dial()
        dripped = 0
        while not here.told.named("shed"):
            client.writer.write(V1[dripped : dripped + 1])
            dripped += 1
            await asyncio.sleep(0.03)
            assert dripped < len(V1) - 1
        assert time.monotonic() - began >= 0.29  # a loop counts in milliseconds
        assert here.told.named("shed")[0]["reason"] == "PROXY header late"


@on_both_loops
async def test_any_octets_at_all_are_never_greeted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROXY_DEADLINE", 0.05)
    chance = random.Random(3)
    starts = [b"", b"PROXY ", b"PROXY TCP4 ", SIGNATURE, SIGNATURE + b"\x21\x11", SIGNATURE + b"\x21\x21\x00\x24"]
    async with house() as here:
        here.listener.door = BEHIND
        for number in range(120):
            octets = starts[number % len(starts)] + chance.randbytes(chance.randrange(60))
            if number % len(starts) == 5:
                octets = octets[:40]  # less than the addresses it announces
            client = await dial(here, octets)
            assert await heard(client) == b"", octets
            await client.close()
        assert not here.told.named("connected")
        assert not here.told.named("bug")


@on_both_loops
async def test_a_look_whether_somebody_listens_is_no_news() -> None:
    async with house() as here:
        here.listener.door = BEHIND
        for gone in (Dialled.close, Dialled.reset):
            client = await here.dial()
            await until(lambda: here.listener._tasks)
            if gone is Dialled.close:
                await client.close()
            else:
                client.reset()
            await here.empty()
        assert here.told.events == []


@on_both_loops
async def test_limits_per_client_go_by_the_header() -> None:
    async with house(Bounds(connections_per_client=1)) as here:
        here.listener.door = BEHIND
        first = await dial(here, V1)
        await first.hello()
        second = await dial(here, V1)
        assert await second.rest() == module.TOO_MANY_OF_YOURS.wire
        other = await dial(here, V1.replace(b"192.0.2.7", b"192.0.2.8"))
        await other.hello()
        await first.say(b"QUIT")
        await first.close()
        await until(lambda: here.listener.admission.count == 1)
        third = await dial(here, V1)
        await third.hello()


@on_both_loops
async def test_a_full_house_says_so_to_proxies_too() -> None:
    async with house(Bounds(connections=1)) as here:
        here.listener.door = BEHIND
        first = await dial(here, V1)
        await first.hello()
        second = await dial(here, v2())
        assert await second.rest() == module.TOO_MANY.wire


@on_both_loops
async def test_draining_waits_for_no_header() -> None:
    async with house() as here:
        here.listener.door = BEHIND
        client = await dial(here, b"PROXY ")
        await until(lambda: here.listener._nameless)
        here.listener.drain()
        await here.empty()
        assert await heard(client) == b""
        assert here.listener.admission.count == 0


# -------------------------------------------------------------- PROXY, from others


@on_both_loops
@pytest.mark.parametrize("header", [V1, v2(), v2(0x20, 0, b"")])
async def test_a_header_from_anybody_else(header: bytes) -> None:
    async with house() as here:
        here.listener.door = Door(proxies=(ip_network("10.0.0.0/8"),))
        sock = socket.create_connection(("127.0.0.1", here.port))
        sock.sendall(header)
        client = await here.dial(sock)
        assert await client.rest() in (replies.NO_PROXY.wire, replies.greeting("mx.example", False).wire + replies.NO_PROXY.wire)
        (refused,) = here.told.named("refused")
        assert (refused["code"], refused["client"]) == (500, "127.0.0.1")


@on_both_loops
async def test_a_header_while_the_greeting_waits() -> None:
    async with house(client_checks=("doorman",)) as here:
        client = await here.dial()
        await until(lambda: here.inbox.verdicts)
        client.writer.write(V1)
        assert await client.rest() == replies.NO_PROXY.wire


# ------------------------------------------------------------------ the greet delay


@on_both_loops
async def test_who_is_silent_is_greeted_after_the_delay() -> None:
    async with house() as here:
        here.listener.door = Door(greet_delay=0.2)
        began = time.monotonic()
        client = await here.dial()
        await client.hello()
        assert time.monotonic() - began >= 0.19  # a loop counts in milliseconds


@on_both_loops
async def test_who_talks_in_the_delay_is_turned_away() -> None:
    async with house() as here:
        here.listener.door = Door(greet_delay=30.0)
        client = await here.dial()
        await until(lambda: here.listener.connections)
        client.writer.write(b"EHLO x\r\n")
        assert await client.rest() == replies.TOO_EARLY.wire
        client = await here.dial()
        await until(lambda: here.listener.connections)
        client.writer.write(V1)
        assert await client.rest() == replies.NO_PROXY.wire


@on_both_loops
async def test_who_leaves_or_is_sent_away_in_the_delay() -> None:
    async with house() as here:
        here.listener.door = Door(greet_delay=30.0)
        client = await here.dial()
        await until(lambda: here.listener.connections)
        await client.close()
        await here.empty()
        client = await here.dial()
        await until(lambda: here.listener.connections)
        here.listener.drain()
        assert await client.rest() == module.SHUTTING_DOWN.wire


@on_both_loops
async def test_the_delay_follows_the_header() -> None:
    async with house() as here:
        here.listener.door = Door(proxies=LOOPBACK, greet_delay=0.1)
        client = await dial(here, V1)
        await client.hello()
        here.listener.door = Door(proxies=LOOPBACK, greet_delay=30.0)
        client = await here.dial()
        client.writer.write(V1)
        await until(lambda: len(here.listener.connections) == 2)
        client.writer.write(b"x")
        assert await client.rest() == replies.TOO_EARLY.wire


async def test_how_long_the_delay_is() -> None:
    async with house(Bounds(connections=1)) as here:
        listener = here.listener
        listener.door = Door(speakers=(ip_network("10.0.0.0/8"),), greet_delay=6.0)
        assert listener.greet_delay(Client("192.0.2.1")) == 6.0
        assert listener.greet_delay(Client("10.0.0.1")) == 0.0
        listener.admission.enter("192.0.2.2")
        assert listener.admission.stress
        assert listener.greet_delay(Client("192.0.2.1")) == module.STRESS_GREET_DELAY
        listener.door = Door(greet_delay=1.0)
        assert listener.greet_delay(Client("192.0.2.1")) == 1.0
        listener.admission.leave("192.0.2.2")


# ---------------------------------------------------------- who speaks for others


@on_both_loops
async def test_the_named_client_is_asked_about_told_and_logged() -> None:
    async with house(client_checks=("doorman",)) as here:
        here.listener.door = Door(speakers=LOOPBACK)
        client = await here.dial()
        await until(lambda: here.inbox.verdicts)
        here.inbox.verdicts.pop()(Verdict())
        await client.hello()
        client.writer.write(b"XCLIENT NAME=x.example ADDR=192.0.2.9 LOGIN=me\r\nEHLO x.example\r\n")
        await until(lambda: here.inbox.verdicts)
        asked = here.inbox.asked[-1]
        assert (asked.stage, asked.client.ip) == ("client", "192.0.2.9")
        here.inbox.verdicts.pop()(Verdict(Reply(554, "5.7.1", "listed")))
        assert await client.reply() == b"554 5.7.1 listed\r\n"
        assert await client.reply() == replies.TURNED_AWAY.wire
        (introduced,) = here.told.named("introduced")
        assert (introduced["client"], introduced["by"], introduced["name"], introduced["user"]) == (
            "192.0.2.9",
            "127.0.0.1",
            "x.example",
            "me",
        )
        assert here.told.named("refused")[0]["client"] == "192.0.2.9"


@on_both_loops
async def test_the_header_decides_who_may_speak_for_others() -> None:
    async with house() as here:
        here.listener.door = Door(proxies=LOOPBACK, speakers=(ip_network("192.0.2.7/32"),))
        client = await dial(here, V1)
        await client.hello()
        assert (await client.say(b"XCLIENT ADDR=10.9.9.9"))[0].startswith(b"220 ")
        # Once trusted, for the whole connection: one connection serves many clients.
        assert (await client.say(b"XCLIENT ADDR=10.9.9.8"))[0].startswith(b"220 ")
        client = await dial(here, V1.replace(b"192.0.2.7", b"127.0.0.1"))
        await client.hello()
        assert await client.say(b"XCLIENT ADDR=10.9.9.9") == [replies.NO_XCLIENT.wire]


def test_those_that_many_come_through_are_not_one_client() -> None:
    door = Door(proxies=LOOPBACK, speakers=(ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")))
    assert [door.trusts(ip) for ip in ("10.1.2.3", "2001:db8::1", "127.0.0.1", None)] == [True, True, False, False]
    assert [door.demands_header(ip) for ip in ("127.0.0.9", None, "10.0.0.1", "::1")] == [True, True, False, False]
    assert not Door().trusts(None)


# -------------------------------------------------------------------- unix sockets


@on_both_loops
@pytest.mark.parametrize("header", [b"", V1])
async def test_a_mail_over_a_unix_socket(tmp_path: Path, header: bytes) -> None:
    path = str(tmp_path / "s")
    told, inbox, bounds = Told(), Inbox(), Bounds(connections_per_client=1)
    listener = Listener(
        bind_unix(path),
        Rules("mx.example", Routes([Route(("*@here.example",), ("app",), clients=LOOPBACK if not header else None)], "mx.example")),
        inbox,
        observer=told,
        admission=Admission(bounds),
        session_ids=SessionIds(),
        door=Door(proxies=LOOPBACK if header else ()),
    )
    listener.start()
    try:
        assert listener.name == f"unix:{path}"
        clients: list[Dialled] = []
        for _ in range(2):  # not counted as one client
            client = Dialled(*await asyncio.open_unix_connection(path))
            client.writer.write(header if not clients else header.replace(b".7", b".8"))
            await client.to_content()
            assert await client.say(b"x" * 200_000 + b"\r\n.") == [b"250 2.0.0 taken\r\n"]
            clients.append(client)
        assert inbox.mails[0].transaction.client.ip == ("192.0.2.7" if header else None)
        listener.drain()
        for client in clients:
            assert await client.rest() == module.SHUTTING_DOWN.wire
            await client.close()
        await asyncio.wait_for(listener.gone(), 30)
        assert not await asyncio.to_thread(os.path.exists, path)
    finally:
        listener.close()
