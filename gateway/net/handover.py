"""From one version of the program to the next: the listening sockets are handed on while both run.

The old process starts its own command line again (``sys.orig_argv``, with the files that are on
disk now), with one end of a socket pair and with its listening sockets open. Over the pair go
lines of JSON, so that versions may differ:

    old → new   {"sockets": [["127.0.0.1:25", 7], ["admin 127.0.0.1:9025", 8]]}
    new → old   {"ready": true}        it takes connections: the old one takes no more
                {"faults": ["…"]}      it cannot start: the old one goes on

Both hold every socket all the while, so that a client which connects is never refused and one
that waits in the kernel's queue is accepted by either. A new process that ends without a word
has not taken over; an old one that ends without a word leaves the new one in its place.

Owns the pair and what is said on it. Knows no configuration; a socket's name is whatever the
two call it.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from .sockets import UnixSocket, handed_on

#: Names the descriptor of the pair for the new process.
ENVIRONMENT = "GATEWAY_HANDOVER"
#: Seconds until the new version must take mail.
PATIENCE = 60.0
#: Seconds that the new version waits for the word of the old one: it was said before it began.
GREETING = 10.0

Named = tuple[str, socket.socket]


class HandoverError(Exception):
    """The new version does not take over. ``faults``: why, a line each."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = list(faults)


class Handover:
    """The old process's side. ``command``: what to run, the command line of this process unless given."""

    def __init__(self, sockets: Sequence[Named], command: Sequence[str] | None = None) -> None:
        self._sockets = sockets
        self._command = list(command or [sys.executable, *sys.orig_argv[1:]])
        self._process: subprocess.Popen[bytes] | None = None

    async def make(self) -> int:
        """Returns the new process's id once it takes connections. Raises HandoverError."""
        if os.getpid() == 1:
            raise HandoverError(["process 1 cannot hand over: when it ends, so does everything"])
        ours, theirs = socket.socketpair()
        with theirs:
            words = {"sockets": [[name, sock.fileno()] for name, sock in self._sockets]}
            ours.sendall(json.dumps(words).encode() + b"\n")
            try:
                # Not by the event loop: that one would take the process down with itself.
                self._process = self._started(theirs)
            except (OSError, ValueError) as error:
                ours.close()
                reason = error.strerror if isinstance(error, OSError) and error.strerror else error
                raise HandoverError([f"{self._command[0]} cannot be started: {reason}"]) from None
        reader, writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
        try:
            async with asyncio.timeout(PATIENCE):
                line = await reader.readline()
            said: Any = json.loads(line) if line else {"faults": await self._last_word()}
        except (TimeoutError, ValueError, OSError) as error:
            late = isinstance(error, TimeoutError)
            said = {"faults": [f"the new version {f'was not ready within {PATIENCE:.0f} s' if late else f'said {error!r}'}"]}
        finally:
            writer.close()
        if not said.get("ready"):
            await self.recall()
            raise HandoverError([str(fault) for fault in said.get("faults", ["the new version said nothing"])])
        return self._process.pid

    def _started(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command,
            env={**os.environ, ENVIRONMENT: str(theirs.fileno())},
            pass_fds=[theirs.fileno(), *(sock.fileno() for _, sock in self._sockets)],
        )

    async def _last_word(self) -> list[str]:
        assert self._process is not None
        code = await asyncio.to_thread(self._process.wait)
        return [f"the new version ended with code {code} before it took mail"]

    async def recall(self) -> None:
        """The new version shall end; returns when it has."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                await asyncio.to_thread(self._process.wait, GREETING)
            except subprocess.TimeoutExpired:
                self._process.kill()
                await asyncio.to_thread(self._process.wait)


class Inheritance:
    """The new process's side: the sockets, by name. Those that are taken are the taker's to close."""

    def __init__(self, channel: socket.socket, sockets: Sequence[Named]) -> None:
        self._channel = channel
        self._sockets = list(sockets)
        self._taken: list[socket.socket] = []
        self._over = False

    def take(self, name: str) -> socket.socket | None:
        """The next socket of this name."""
        for place, (known, sock) in enumerate(self._sockets):
            if known == name:
                del self._sockets[place]
                self._taken.append(sock)
                return sock
        return None

    def ready(self) -> None:
        """We take connections: the sockets are ours with their files; what nobody wanted is closed."""
        for sock in (*self._taken, *(sock for _, sock in self._sockets)):
            if isinstance(sock, UnixSocket) and isinstance(path := sock.getsockname(), str) and os.path.exists(path):
                sock.appeared(path)
        self._say({"ready": True})

    def refuse(self, faults: Sequence[str]) -> None:
        """We cannot start."""
        self._say({"faults": list(faults)})

    def _say(self, words: dict[str, Any]) -> None:
        if self._over:
            return
        self._over = True
        with self._channel, suppress(OSError):  # the old one may be gone
            self._channel.sendall(json.dumps(words).encode() + b"\n")
        while self._sockets:
            self._sockets.pop()[1].close()


_inheritance: Inheritance | None = None


def refuse(faults: Sequence[str]) -> None:
    """Tell whoever hands over to this process, if anybody does, that it cannot start."""
    with suppress(HandoverError):
        if (inheritance := _inheritance or inherited()) is not None:
            inheritance.refuse(faults)


def inherited() -> Inheritance | None:
    """What an old version hands to this process, asked for once; None: nobody hands anything on.
    Raises HandoverError where what was handed on cannot be understood."""
    global _inheritance
    number = os.environ.pop(ENVIRONMENT, "")
    if not number.isdecimal():
        return None
    channel: socket.socket | None = None
    sockets: list[Named] = []
    try:
        channel = socket.socket(fileno=int(number))
        channel.set_inheritable(False)
        channel.settimeout(GREETING)
        with channel.makefile("rb") as lines:
            told = json.loads(lines.readline())
        for name, descriptor in told["sockets"]:
            sockets.append((str(name), handed_on(int(descriptor))))
    except (OSError, ValueError, KeyError, TypeError) as error:
        for sock in (channel, *(sock for _, sock in sockets)):
            if sock is not None:
                sock.close()
        raise HandoverError([f"{ENVIRONMENT}: what was handed on cannot be understood: {error!r}"]) from None
    _inheritance = Inheritance(channel, sockets)
    return _inheritance
