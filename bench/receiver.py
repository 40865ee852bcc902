"""A webhook receiver that counts, for the runs of ``bench.endurance``.

``python -m bench.receiver PORT [--delay SECONDS]``

Takes every POST and answers it after ``delay`` seconds. When its standard input ends it says, as
one JSON object, what it saw: messages and how many distinct ids (``webhook-id``) they had, the most
that were in its hands at once, the most in one second, and how old they were: the first line of the
content may be ``X-Sent:`` with the monotonic clock in seconds; ages are told as percentiles in ms.
On a line from its standard input it says the same, and goes on; ``new`` forgets the ages first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from typing import cast

import uvloop

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"

#: As a line, and as JSON has it.
_SENT = re.compile(rb"X-Sent[\":, ]{1,4}([0-9.]+)")
_ID = re.compile(rb"(?i)\r\nwebhook-id: ([^\r\n]+)\r\n")
_SIZE = re.compile(rb"(?i)\r\ncontent-length: ([0-9]+)\r\n")


class Counted:
    """What was seen so far."""

    def __init__(self, delay: float) -> None:
        self.delay = delay
        self.messages = self.here = self.most_here = 0
        self.ids: set[bytes] = set()
        self.seconds: dict[int, int] = {}
        self.ages: list[float] = []

    def come(self, head: bytes, body: bytes) -> None:
        now = time.monotonic()
        self.messages += 1
        self.here += 1
        self.most_here = max(self.most_here, self.here)
        self.seconds[int(now)] = self.seconds.get(int(now), 0) + 1
        if found := _ID.search(head):
            self.ids.add(found[1])
        if found := _SENT.search(body[:4096]):
            self.ages.append(now - float(found[1]))

    def tell(self) -> None:
        ages = sorted(self.ages)
        at = {name: round(ages[min(len(ages) - 1, int(len(ages) * share))] * 1000, 2) for name, share in SHARES.items()} if ages else {}
        result = {"messages": self.messages, "ids": len(self.ids), "most_at_once": self.most_here, "aged": len(ages), "ms": at}
        print(json.dumps({**result, "most_in_a_second": max(self.seconds.values(), default=0)}), flush=True)


SHARES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}


class Receiver(asyncio.Protocol):
    """One connection: whole requests, one after the other."""

    def __init__(self, counted: Counted) -> None:
        self._counted = counted
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not one by inheritance

    def data_received(self, octets: bytes) -> None:
        self._buffer += octets
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._buffer[: end + 2])
            size = _SIZE.search(head)
            assert size is not None, head
            whole = end + 4 + int(size[1])
            if len(self._buffer) < whole:
                return
            self._counted.come(head, b"\r\n" + bytes(self._buffer[end + 4 : whole]))
            del self._buffer[:whole]
            if self._counted.delay:
                asyncio.get_running_loop().call_later(self._counted.delay, self._answer)
            else:
                self._answer()

    def _answer(self) -> None:
        self._counted.here -= 1
        self._transport.write(ANSWER)


async def receive(port: int, counted: Counted) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def asked() -> None:
        line = sys.stdin.readline()
        if line == "new\n":
            counted.ages.clear()
        counted.tell()
        if not line:
            loop.remove_reader(sys.stdin)
            ended.set()

    server = await loop.create_server(lambda: Receiver(counted), "127.0.0.1", port, backlog=1024)
    loop.add_reader(sys.stdin, asked)
    await ended.wait()
    server.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.receiver", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("port", type=int)
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    options = parser.parse_args()
    uvloop.run(receive(options.port, Counted(options.delay)))


if __name__ == "__main__":
    main()
