"""The control socket and the health pages, over real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.admin import control
from gateway.admin.control import Control, ControlError, call
from gateway.admin.http import Site
from gateway.net.sockets import bind

from ..loops import on_both_loops


async def echo(**given: Any) -> dict[str, Any]:
    return given


async def broken() -> None:
    raise ZeroDivisionError("division by zero")


async def large() -> str:
    return "x" * 5_000_000


async def unspeakable() -> object:
    return object()


OPERATIONS: dict[str, control.Operation] = {"echo": echo, "broken": broken, "large": large, "unspeakable": unspeakable}


async def ask(path: Path, op: str, **arguments: Any) -> Any:
    """The blocking client, as the command line uses it."""
    return await asyncio.to_thread(call, path, op, timeout=30, **arguments)


# --------------------------------------------------------------- control socket


@on_both_loops
async def test_a_question_and_its_answer(tmp_path: Path) -> None:
    path = tmp_path / control.NAME
    server = Control(path, OPERATIONS)
    await server.open()
    assert await ask(path, "echo", sink="app", limit=3, ids=None) == {"sink": "app", "limit": 3, "ids": None}
    assert len(await ask(path, "large")) == 5_000_000
    await server.close()
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        await ask(path, "echo")


@on_both_loops
async def test_what_cannot_be_is_told_and_ends_nothing(tmp_path: Path) -> None:
    path = tmp_path / control.NAME
    server = Control(path, OPERATIONS)
    await server.open()
    for op, arguments, told in (
        ("nothing", {}, "no such operation"),
        ("broken", {}, "division by zero"),
        ("broken", {"extra": 1}, "unexpected keyword"),
        ("unspeakable", {}, "not JSON serializable"),
    ):
        with pytest.raises(ControlError, match=told):
            await ask(path, op, **arguments)
    assert await ask(path, "echo") == {}
    await server.close()


@on_both_loops
@pytest.mark.parametrize("line", [b"\n", b"[]\n", b"{}\n", b'{"op": ["echo"]}\n', b"\xff\xfe\n", b"null\n"])
async def test_lines_that_are_no_question(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / control.NAME
    server = Control(path, OPERATIONS)
    await server.open()
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(line + b'{"op": "echo", "a": 1}\n')
    assert json.loads(await reader.readline()) == {"ok": False, "error": "no such operation"}
    assert json.loads(await reader.readline()) == {"ok": True, "result": {"a": 1}}
    writer.close()
    await server.close()


async def test_a_question_without_an_end_is_hung_up_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "QUESTION_LIMIT", 1000)
    path = tmp_path / control.NAME
    server = Control(path, OPERATIONS)
    await server.open()
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(b"x" * 100_000)
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await reader.readexactly(1)
    writer.close()
    assert await ask(path, "echo") == {}
    await server.close()


async def test_only_the_owner_may_open_it(tmp_path: Path) -> None:
    path = tmp_path / control.NAME
    server = Control(path, OPERATIONS)
    await server.open()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    await server.close()


async def test_what_a_dead_gateway_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / control.NAME
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    with pytest.raises(ConnectionRefusedError):
        await ask(path, "echo")
    server = Control(path, OPERATIONS)
    await server.open()
    assert await ask(path, "echo") == {}
    await server.close()


async def test_a_path_that_no_socket_address_holds(tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*["a folder with a long name"] * 6)
    folder.mkdir(parents=True)
    path = folder / control.NAME
    assert len(str(path)) > 120
    server = Control(path, OPERATIONS)
    await server.open()
    assert path.is_socket()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert await ask(path, "echo", a=1) == {"a": 1}
    await server.close()
    assert not path.exists()


# ------------------------------------------------------------------------ HTTP


class Truth:
    """A Source whose truth the test says."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.touched = 0

    async def metrics(self) -> bytes:
        return b"gateway_connections 1\n"

    async def unready(self) -> str | None:
        self.touched += 1
        return self.reason

    async def status(self) -> dict[str, Any]:
        return {"sinks": {"app": "up"}}


@on_both_loops
async def test_health_and_metrics() -> None:
    truth = Truth()
    sock = bind("127.0.0.1", 0)
    site = Site(sock, truth)
    base = f"http://127.0.0.1:{sock.getsockname()[1]}"
    await site.open()
    async with aiohttp.ClientSession() as session:

        async def get(path: str) -> tuple[int, str, str]:
            async with session.get(base + path) as answer:
                return answer.status, answer.headers["Content-Type"], await answer.text()

        assert await get("/readyz") == (200, "text/plain; charset=utf-8", "ready\n")
        status, kind, text = await get("/healthz")
        assert (status, kind) == (200, "application/json")
        assert json.loads(text) == {"ready": True, "reason": None, "sinks": {"app": "up"}}
        assert await get("/metrics") == (200, "text/plain; version=0.0.4; charset=utf-8", "gateway_connections 1\n")

        truth.reason = "no room"
        assert await get("/readyz") == (503, "text/plain; charset=utf-8", "no room\n")
        status, _, text = await get("/healthz")
        assert status == 503
        assert json.loads(text)["reason"] == "no room"

        before = truth.touched
        assert await get("/livez") == (200, "text/plain; charset=utf-8", "alive\n")
        assert truth.touched == before
        assert (await get("/api/v1/messages"))[0] == 404
    await site.close()
    sock.close()
