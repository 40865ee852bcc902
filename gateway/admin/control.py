"""The control socket of a worker: ``<shard>/control.sock``, for the ``gateway`` command and the supervisor.

Owns the wire: one JSON object a line each way, ``{"op": "rows", …}`` → ``{"ok": true,
"result": …}`` or ``{"ok": false, "error": "…"}``; several questions may follow one another
on a connection. Knows nothing of queues and spools: what an operation does is handed in.

The socket is 0600 in a folder that is 0700: whoever may open it owns the spool. A path that
is longer than a socket address allows (about 100 octets) is reached through its folder.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson

from ..sayable import OPTION, sayable

#: The socket's name in its shard folder.
NAME = "control.sock"
#: Octets that a question may have.
QUESTION_LIMIT = 1024 * 1024
#: Octets of path that every system's socket address takes (sun_path: 108 on Linux, 104 on macOS).
_PATH_LIMIT = 100

Operation = Callable[..., Awaitable[Any]]


class ControlError(Exception):
    """The gateway understood, but would or could not."""


class Control:
    """Answers on the socket. ``operations`` get what stood beside ``op`` as keyword arguments
    and give back what orjson can write; a ValueError or TypeError of theirs is told to the
    asker, as every other exception is, and ends nothing."""

    def __init__(self, path: str | Path, operations: Mapping[str, Operation]) -> None:
        self.path = Path(path)
        self._operations = operations
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def open(self) -> None:
        """Listen. A socket that lies there is a dead one's: the caller holds the shard's lock."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.path.unlink(missing_ok=True)
            with _reachable(self.path) as address:
                sock.bind(address)
                os.chmod(address, 0o600)
            sock.setblocking(False)
            self._server = await asyncio.start_unix_server(self._serve, sock=sock, limit=QUESTION_LIMIT)
        except BaseException:
            sock.close()
            raise

    async def close(self) -> None:
        if self._server is None:
            return
        self._server.close()
        for writer in list(self._open):
            writer.close()
        self.path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while line := await reader.readline():
                writer.write(await self._answered(line) + b"\n")
                await writer.drain()
        except (ConnectionError, ValueError):
            pass  # gone, or a question without an end
        finally:
            self._open.discard(writer)
            writer.close()

    async def _answered(self, line: bytes) -> bytes:
        try:
            question = orjson.loads(line)
            operation = self._operations[question.pop("op")]
        except (orjson.JSONDecodeError, KeyError, AttributeError, TypeError):
            return _refusal("no such operation")
        try:
            return orjson.dumps({"ok": True, "result": await operation(**question)}, default=sayable, option=OPTION)
        except Exception as error:
            return _refusal(str(error) or type(error).__name__)


def _refusal(why: str) -> bytes:
    return orjson.dumps({"ok": False, "error": why})


def call(path: str | Path, op: str, /, *, timeout: float = 30.0, **arguments: Any) -> Any:
    """Ask the gateway at this socket; blocks up to ``timeout`` seconds. Raises ControlError for
    its refusal, OSError (FileNotFoundError, ConnectionRefusedError …) where none answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        with _reachable(Path(path)) as address:
            sock.connect(address)
        sock.sendall(orjson.dumps({"op": op, **arguments}) + b"\n")
        answer = bytearray()
        while not answer.endswith(b"\n"):
            piece = sock.recv(1024 * 1024)
            if not piece:
                raise ConnectionResetError(f"the gateway at {path} hung up")
            answer += piece
    result = orjson.loads(answer)
    if not result["ok"]:
        raise ControlError(result["error"])
    return result["result"]


@contextmanager
def _reachable(path: Path) -> Iterator[str]:
    """The path in a form short enough for a socket address. Raises OSError."""
    if len(os.fsencode(path)) <= _PATH_LIMIT:
        yield str(path)
        return
    if sys.platform != "linux":
        short = os.path.relpath(path)
        if len(os.fsencode(short)) > _PATH_LIMIT:
            raise OSError(f"{path} is too long for a socket; start from a folder nearer to it")
        yield short
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
