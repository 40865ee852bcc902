"""``addresses = "public"`` (bad input W1): judged on the resolved address, at connect time, and no octet leaves.

Names are resolved by a stub in the place of the system's ``getaddrinfo``; sockets are real. What may
not be connected to is a listener on loopback that counts what comes: a connection is a failure."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from gateway.checks import make_check
from gateway.checks.http import UNAVAILABLE
from gateway.config import HttpCheckConfig, WebhookConfig
from gateway.net.addresses import not_public
from gateway.net.http import HttpFault, Kind, http_client
from gateway.sinks import make_sink

from ..deliveries import carried, mail
from ..receivers import misbehaving, read_request, redirects_to_a_200
from .test_http_check import ASKED

#: Public to everybody but us: what a name says before it says something else.
ELSEWHERE = "192.0.2.1"


class Trap:
    """Listens at every address of loopback and wants to hear nothing."""

    def __init__(self) -> None:
        self.connections = 0
        self.octets = b""

    async def _taken(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        # Head and body may come one after the other.
        while piece := await reader.read(65536):
            self.octets += piece
            if self.octets.endswith((b"body", b"first", b"second")):
                break
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def __aenter__(self) -> Trap:
        self.server = await asyncio.start_server(self._taken, "0.0.0.0", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        self.servers = [self.server]
        # Where there is no IPv6 at all, its addresses fail to connect, and that is as good.
        with suppress(OSError):
            self.servers.append(await asyncio.start_server(self._taken, "::1", self.port))
        return self

    async def __aexit__(self, *exception: object) -> None:
        for server in self.servers:
            server.close()
            await server.wait_closed()


@pytest.fixture
async def trap() -> AsyncIterator[Trap]:
    async with Trap() as found:
        yield found


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str]]]:
    """``names["x.example"] = [[addresses], …]``: what each look-up in turn finds, the last one repeats."""
    table: dict[str, list[list[str]]] = {}
    system = socket.getaddrinfo

    def look_up(host: Any, port: Any, *rest: Any, **more: Any) -> list[Any]:
        answers = table.get(host)
        if answers is None:
            return system(host, port, *rest, **more)
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [entry for address in found for entry in system(address, port, type=socket.SOCK_STREAM)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return table


@pytest.fixture(params=["direct", "aiohttp", "pyreqwest"])
def kind(request: pytest.FixtureRequest) -> Kind:
    """pyreqwest cannot judge: where it is asked to, it must become one that can."""
    found: Kind = request.param
    return found


@asynccontextmanager
async def guarded(kind: Kind) -> AsyncIterator[Any]:
    http = http_client(kind, 8, not_public)
    try:
        yield lambda url: http.post(url, (), b"body", asyncio.get_running_loop().time() + 30)
    finally:
        await http.close()


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.9.9.9",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "0.0.0.0",
        "0",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "017700000001",
        "127.1",
        "127.0.0.1.",
        "user:password@127.0.0.1",
        "１２７.0.0.1",
        "①②⑦.0.0.1",
    ],
)
async def test_no_notation_of_a_forbidden_address_gets_through(trap: Trap, kind: Kind, host: str) -> None:
    async with guarded(kind) as post:
        with pytest.raises(HttpFault) as fault:
            await post(f"http://{host}:{trap.port}/")
    assert fault.value.forbidden
    assert fault.value.reason.startswith("refused by policy: ")
    assert (trap.connections, trap.octets) == (0, b"")


async def test_the_trap_would_be_reached_without_the_guard(trap: Trap, kind: Kind) -> None:
    http = http_client(kind, 8)
    answer = await http.post(f"http://localhost:{trap.port}/", (), b"body", asyncio.get_running_loop().time() + 30)
    await http.close()
    assert answer.status == 200
    assert trap.connections == 1
    assert b"body" in trap.octets


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "::1", "::ffff:127.0.0.1"])
async def test_a_name_is_judged_by_its_address(trap: Trap, kind: Kind, names: dict[str, list[list[str]]], address: str) -> None:
    names["inside.example"] = [[address]]
    async with guarded(kind) as post:
        with pytest.raises(HttpFault) as fault:
            await post(f"http://inside.example:{trap.port}/")
    assert fault.value.forbidden
    assert fault.value.reason == f"refused by policy: {address} is not public (loopback)"
    assert (trap.connections, trap.octets) == (0, b"")


async def test_of_several_addresses_each_is_judged(trap: Trap, kind: Kind, names: dict[str, list[list[str]]]) -> None:
    """A judge that lets one address of loopback pass: the others are never touched, wherever they stand."""
    asked: list[str] = []

    def refusal(address: str) -> str | None:
        asked.append(address)
        return None if address == "127.0.0.3" else f"{address} is not 127.0.0.3"

    names["many.example"] = [["127.0.0.1", "::1", "127.0.0.3", "127.0.0.2"]]
    http = http_client(kind, 8, refusal)
    answer = await http.post(f"http://many.example:{trap.port}/", (), b"body", asyncio.get_running_loop().time() + 30)
    await http.close()
    assert answer.status == 200
    assert trap.connections == 1
    # One behind it is judged where that connection took its time, and is not touched either.
    assert asked[:3] == ["127.0.0.1", "::1", "127.0.0.3"]


async def test_a_name_that_changes_its_address_between_look_and_connection(
    trap: Trap, kind: Kind, names: dict[str, list[list[str]]]
) -> None:
    """DNS rebinding: what was judged is what is connected to, and every connection is judged anew."""
    asked: list[str] = []

    def refusal(address: str) -> str | None:
        asked.append(address)
        return None if address in ("127.0.0.3", ELSEWHERE) else not_public(address)

    names["turns.example"] = [["127.0.0.3"], ["127.0.0.1"]]
    http = http_client(kind, 8, refusal)
    url = f"http://turns.example:{trap.port}/"
    deadline = asyncio.get_running_loop().time() + 30
    assert (await http.post(url, (), b"first", deadline)).status == 200
    await http.close()
    assert asked == ["127.0.0.3"]
    http = http_client(kind, 8, refusal)
    with pytest.raises(HttpFault) as fault:
        await http.post(url, (), b"second", deadline)
    await http.close()
    assert fault.value.forbidden
    assert trap.connections == 1
    assert b"second" not in trap.octets


async def test_a_redirect_to_a_forbidden_address_is_not_followed(trap: Trap, kind: Kind) -> None:
    async def sends_elsewhere(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(f"HTTP/1.1 307 Go\r\nlocation: http://127.0.0.2:{trap.port}/\r\ncontent-length: 0\r\n\r\n".encode())
        await writer.drain()

    http = http_client(kind, 8, lambda address: None)
    async with misbehaving(sends_elsewhere) as url:
        assert (await http.post(url, (), b"body", asyncio.get_running_loop().time() + 30)).status == 307
    await http.close()
    assert (trap.connections, trap.octets) == (0, b"")


async def test_a_webhook_that_may_be_public_alone_defers_and_says_why(trap: Trap, names: dict[str, list[list[str]]]) -> None:
    names["tenant.example"] = [["127.0.0.1"]]
    url = f"http://tenant.example:{trap.port}/inbound"
    sink = make_sink("app", WebhookConfig(url=url, addresses="public"), "mx.example.net")
    await sink.open()
    outcome = await carried(sink, mail())
    await sink.close()
    assert (outcome.state, outcome.down, outcome.remote) == ("deferred", True, url)
    assert str(outcome.reply) == "451 4.7.1 refused by policy: 127.0.0.1 is not public (loopback)"
    assert (trap.connections, trap.octets) == (0, b"")


async def test_a_check_that_may_be_public_alone_does_not_work(trap: Trap, names: dict[str, list[list[str]]]) -> None:
    names["tenant.example"] = [["::ffff:127.0.0.1"]]
    policy = make_check("policy", HttpCheckConfig(url=f"http://tenant.example:{trap.port}/", addresses="public"))
    verdict = await policy.judge(ASKED)
    await policy.close()
    assert verdict.reply == UNAVAILABLE
    assert verdict.facts["error"] == "refused by policy: ::ffff:127.0.0.1 is not public (loopback)"
    assert (trap.connections, trap.octets) == (0, b"")


async def test_without_the_option_loopback_is_the_operators_word() -> None:
    async with misbehaving(redirects_to_a_200) as url:
        sink = make_sink("app", WebhookConfig(url=url), "mx.example.net")
        await sink.open()
        outcome = await carried(sink, mail())
        await sink.close()
    assert "HTTP 307" in outcome.reply.text
