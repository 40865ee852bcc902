"""Connections that want nothing: a crowd of idle and of dripping clients.

``python -m bench.crowd PORT --idle 10000 --contents 1500 --commands 1500 --every 3 [--tls]``

An idle client says EHLO and is silent from then on. A dripping one sends one octet every ``every``
seconds: of a command that has no end, or of content after DATA. Each is one socket of this
process; a few threads bring them to their place, one loop over epoll does the rest.

With ``--decoy`` nobody is bothered: the drips go to sockets of this very process that nobody reads. It
does then what it does otherwise, so that a run beside it differs from one in the crowd by the server's
part alone: generator and crowd share a core, and a generator that is slowed down makes each message dearer.

Talks to whoever started it, a JSON object a line: first ``{"idle": …}`` when the idle are there; on
a line from its standard input the others come, ``{"drips": …}``; they drip until they were all
closed, or until the standard input ends. Then it says how they ended, and ends itself: ``late`` is
in seconds behind the deadline, ``other`` what was said instead of 421.
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import ssl
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

Kind = Literal["idle", "command", "content"]

#: Clients that are brought to their place at a time.
THREADS = 16
#: Connections from one source address: the range of ports has 28,232 by default, and some rest.
PER_ADDRESS = 20_000


@dataclass(slots=True, eq=False)
class Client:
    kind: Kind
    sock: socket.socket
    #: When its deadline began (monotonic seconds).
    since: float


def _connected(port: int, kind: Kind, number: int, context: ssl.SSLContext | None) -> Client:
    """One client, as far as it goes without dripping. Raises OSError."""
    source = f"127.0.0.{1 + number // PER_ADDRESS}"
    sock = socket.create_connection(("127.0.0.1", port), timeout=60, source_address=(source, 0))
    # A reset at the end: no port of ours rests for a minute.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    if context is not None:
        sock = context.wrap_socket(sock)
    _expect(sock, b"220")
    said = {"idle": (), "command": (), "content": ((b"MAIL FROM:<a@client.example>", b"250"), (b"RCPT TO:<b@bench.example>", b"250"))}[kind]
    for line, code in ((b"EHLO client.example", b"250"), *said, *([(b"DATA", b"354")] if kind == "content" else [])):
        sock.sendall(line + b"\r\n")
        _expect(sock, code)
    return Client(kind, sock, time.monotonic())


def _expect(sock: socket.socket, code: bytes) -> None:
    """One whole reply."""
    octets = b""
    while not (octets.endswith(b"\r\n") and octets.rpartition(b"\r\n")[0].rpartition(b"\r\n")[2][3:4] == b" "):
        more = sock.recv(4096)
        if not more:
            raise ConnectionError(f"closed after {octets!r}")
        octets += more
    if not octets.startswith(code):
        raise ConnectionError(f"wanted {code!r}, heard {octets!r}")


def _decoy() -> int:
    """The port of a listener whose connections are never read."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    kept: list[socket.socket] = []

    def accept() -> None:
        while True:
            kept.append(listener.accept()[0])

    threading.Thread(target=accept, daemon=True).start()
    return int(listener.getsockname()[1])


def _placed(port: int, kind: Kind) -> Client:
    return Client(kind, socket.create_connection(("127.0.0.1", port), timeout=60), time.monotonic())


class Crowd:
    """All clients of this process. ``deadlines``: seconds by kind of drip."""

    def __init__(self, port: int | None, every: float, context: ssl.SSLContext | None, deadlines: dict[Kind, float]) -> None:
        """``port`` None: a decoy."""
        self._decoy = port is None
        self._port = _decoy() if port is None else port
        self._every = every
        self._context = context
        self._deadlines = deadlines
        self._clients: dict[int, Client] = {}
        self._poll = select.epoll()
        self._drips: deque[Client] = deque()
        self._late: dict[Kind, list[float]] = {"command": [], "content": []}
        self._other: Counter[str] = Counter()
        self._idle_lost = 0

    def bring(self, kinds: Iterable[Kind]) -> None:
        """Connects these; returns when all of them are at their place. Raises OSError."""
        first = len(self._clients)
        with ThreadPoolExecutor(THREADS) as threads:
            made = threads.map(
                lambda item: (
                    _placed(self._port, item[1]) if self._decoy else _connected(self._port, item[1], first + item[0], self._context)
                ),
                enumerate(kinds),
            )
            for client in made:
                client.sock.setblocking(False)
                self._clients[client.sock.fileno()] = client
                self._poll.register(client.sock, select.EPOLLIN | select.EPOLLRDHUP)
                if client.kind == "command":
                    self._drip(client)
                    client.since = time.monotonic()
                if client.kind != "idle":
                    self._drips.append(client)

    def drip(self) -> None:
        """Until all drips were closed, or the standard input ends."""
        self._poll.register(sys.stdin, select.EPOLLIN)
        turn = time.monotonic()
        while self._drips:
            now = time.monotonic()
            while self._drips and turn <= now:
                client = self._drips.popleft()
                if client.sock.fileno() >= 0:
                    self._drip(client)
                    self._drips.append(client)
                    turn += self._every / len(self._drips)
            for descriptor, _ in self._poll.poll(max(0.0, turn - time.monotonic())):
                if descriptor == sys.stdin.fileno():
                    return
                self._hear(self._clients[descriptor])

    def _drip(self, client: Client) -> None:
        try:
            client.sock.send(b"X")
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except OSError:
            self._hear(client)

    def _hear(self, client: Client) -> None:
        """It was closed, or something was said to it."""
        now = time.monotonic()
        try:
            said = client.sock.recv(4096)
        except (BlockingIOError, ssl.SSLWantReadError):
            return  # a record of TLS that has nothing in it for us
        except OSError as error:
            said = str(error).encode()
        if client.kind == "idle":
            self._idle_lost += 1
        elif said.startswith(b"421 "):
            self._late[client.kind].append(now - client.since - self._deadlines[client.kind])
        else:
            self._other[said.decode("ascii", "replace") or "(closed without a word)"] += 1
        self._poll.unregister(client.sock)
        del self._clients[client.sock.fileno()]
        client.sock.close()

    def report(self) -> dict[str, object]:
        return {
            "left": sum(client.sock.fileno() >= 0 for client in self._drips),
            "idle_lost": self._idle_lost,
            "late": {kind: [min(late), max(late)] for kind, late in self._late.items() if late},
            "closed": sum(map(len, self._late.values())),
            "other": dict(self._other),
        }


def _tell(**what: object) -> None:
    print(json.dumps(what), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.crowd", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("port", type=int)
    parser.add_argument("--idle", type=int, default=0)
    parser.add_argument("--commands", type=int, default=0)
    parser.add_argument("--contents", type=int, default=0)
    parser.add_argument("--every", type=float, default=3.0, help="seconds between two octets of a drip")
    parser.add_argument("--command-deadline", type=float, default=300.0)
    parser.add_argument("--content-deadline", type=float, default=30.0)
    parser.add_argument("--decoy", action="store_true", help="the port is not asked for anything: the drips go nowhere")
    parser.add_argument("--tls", action="store_true", help="TLS from the first octet on")
    options = parser.parse_args()
    context = None
    if options.tls:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    port = None if options.decoy else options.port
    crowd = Crowd(port, options.every, context, {"command": options.command_deadline, "content": options.content_deadline})
    started = time.monotonic()
    crowd.bring(["idle"] * options.idle)
    _tell(idle=options.idle, seconds=time.monotonic() - started)
    if not sys.stdin.readline():
        return
    started = time.monotonic()
    crowd.bring(["command"] * options.commands)
    # Last, because their time is the shortest.
    crowd.bring(["content"] * options.contents)
    _tell(drips=options.commands + options.contents, seconds=time.monotonic() - started)
    crowd.drip()
    _tell(**crowd.report())


if __name__ == "__main__":
    main()
