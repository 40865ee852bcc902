"""A generator, receivers, and the ledger that holds one against the other, for the tests that kill the gateway.

Sessions send without rest (pipelined BDAT, and DATA); a webhook and an upstream take what the
gateway carries. The ledger says of each message whether it was acknowledged, refused, or neither
when the connection broke, and by ``judge`` what is wrong. RFC 5321 §4.2.5, §6.1.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import random
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

from tests.servers import without_trace

BDAT_SESSIONS, DATA_SESSIONS, DEPTH = 40, 30, 3
#: Seconds: a done mark rides on a commit at most 50 ms later; the rest is for a busy machine.
MARK = 1.0
#: Seconds: what was sent before a kill has been read.
READ = 1.0
#: Seconds between two looks at whether the machine is held up, and from which on it was.
LOOK, HELD_UP = 0.05, 0.25


class Stalls:
    """When nothing went on here, or no disk wrote: a thread writes and syncs a few octets again and again, and what was
    long for it was long for all. So much is no time for the limits above."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._over = threading.Event()
        self._times: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        with self._file.open("wb", buffering=0) as file:
            over = False
            while not over:
                began = time.monotonic()
                file.write(b"x")
                os.fsync(file.fileno())
                over = self._over.wait(LOOK)
                if (ended := time.monotonic()) - began > HELD_UP:
                    self._times.append((began, ended))

    def lost(self, since: float, until: float) -> float:
        """Seconds between these times that were none."""
        return sum(max(0.0, min(until, ended) - max(since, began)) for began, ended in list(self._times))

    def after(self, since: float, seconds: float) -> float:
        """When so many had gone by."""
        until = since
        while (left := since + seconds - until + self.lost(since, until)) > 1e-6:
            until += left
        return until


class Mails:
    """What each numbered message is: the same every time it is asked for."""

    def __init__(self, seed: int) -> None:
        pick = random.Random(seed)
        sizes = [200, 1000, 1000, 4000, 20_000]
        self._bodies = [
            b"".join(b"." * pick.randrange(3) + pick.randbytes(pick.randrange(1, 35)).hex().encode() + b"\r\n" for _ in range(size // 40))
            for size in sizes * 8
        ]
        self._large = (b"z" * 98 + b"\r\n") * 3000

    def route(self, number: int) -> str:
        if number % 20 == 7:
            return "down"
        return "relay" if number % 3 == 0 else "hook"

    def refused(self, number: int) -> bool:
        """A bare LF in it: 550 after the end of data."""
        return number % 97 == 5

    def content(self, number: int) -> bytes:
        # A prime: by every route, and in every size of company.
        body = self._large if number % 149 == 11 else self._bodies[number % len(self._bodies)]
        head = b"X-Number: %d\r\nMessage-ID: <%d@client.example>\r\n\r\n" % (number, number)
        return head + body + (b"bare\nnewline\r\n" if self.refused(number) else b"")


@dataclass(slots=True)
class Arrival:
    when: float
    key: str
    taken: bool


@dataclass(slots=True)
class Kill:
    """``until``: when the last that was sent before it had been read, 0 where nobody saw that. ``flying``: the ids of what
    was in flight, where the process could tell (``failpoints``)."""

    at: float
    until: float
    flying: frozenset[str] | None = None


@dataclass
class Ledger:
    mails: Mails
    stalls: Stalls
    life: int = 0
    sent: int = 0
    unanswered: set[int] = field(default_factory=set)
    acknowledged: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    unknown: set[int] = field(default_factory=set)
    arrivals: dict[int, list[Arrival]] = field(default_factory=lambda: defaultdict(list))
    kills: list[Kill] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    #: The supervisor was killed: workers say 421.
    leaderless: bool = False
    #: Nothing new is sent; who would have, once it is over.
    resting: bool = False
    waiting: list[Session] = field(default_factory=list)
    #: Seconds: what was carried again had been taken at most so long before the kill.
    oldest: float = 0.0
    #: Connections of the gateway that the receivers have.
    upstream: set[Hook | Mta] = field(default_factory=set)

    @property
    def answered(self) -> int:
        return len(self.acknowledged) + len(self.refused)

    def next(self) -> int:
        self.sent += 1
        self.unanswered.add(self.sent)
        return self.sent

    def reply(self, number: int, line: bytes) -> None:
        self.unanswered.discard(number)
        if line.startswith(b"250"):
            self.acknowledged.add(number)
        else:
            self.refused.add(number)
            if not self.mails.refused(number):
                self.wrong.append(f"{number} was answered {line!r}")

    def lost(self, number: int) -> None:
        self.unanswered.discard(number)
        self.unknown.add(number)

    def arrived(self, octets: bytes, route: str, key: str | None, taken: bool) -> None:
        content = without_trace(octets)
        trace = octets[: len(octets) - len(content)]
        own = re.search(rb"\bid ([0-9a-f-]{36})\b", trace)
        if own is None or (key is not None and key != own[1].decode()):
            self.wrong.append(f"it came as {key}, and its trace is {trace!r}")
            return
        key = own[1].decode()
        found = re.match(rb"X-Number: (\d+)\r\n", content)
        if found is None:
            self.wrong.append(f"torn at its top, by {route}: {octets[:200]!r}")
            return
        number = int(found[1])
        expected = self.mails.content(number)
        if hashlib.sha256(content).digest() != hashlib.sha256(expected).digest():
            self.wrong.append(f"{number} is torn: {len(content)} octets instead of {len(expected)}")
        if not 1 <= number <= self.sent or self.mails.route(number) != route:
            self.wrong.append(f"{number} came by {route}")
        self.arrivals[number].append(Arrival(time.monotonic(), key, taken))

    def told(self, folder: Path) -> int:
        """Reads what processes wrote that killed themselves; how many there were."""
        count = 0
        for path in folder.iterdir():
            if path.suffix != ".new":
                at = time.monotonic() - time.time() + path.stat().st_mtime
                flying = json.loads(path.read_text())
                self.kills.append(Kill(at, 0.0, None if flying is None else frozenset(flying)))
                path.unlink()
                count += 1
        return count

    def same(self, told: int) -> None:
        """The last ``told`` kills are the one before them: this one knows when all was read that was sent."""
        until = self.kills.pop(-1 - told).until
        for kill in self.kills[-told:]:
            kill.until = max(kill.at + READ, until)

    def rest(self) -> None:
        self.resting = True

    def go_on(self) -> None:
        self.resting = False
        waiting, self.waiting = self.waiting, []
        for session in waiting:
            session.send()

    async def killed(self) -> None:
        """The process is dead: read out what it had sent, then its time is over."""
        kill = Kill(time.monotonic(), 0.0)
        for _ in range(1000):
            # Long enough for connections that nobody accepted yet.
            await asyncio.sleep(0.02)
            if not self.upstream:
                kill.until = time.monotonic()
                self.kills.append(kill)
                return
        raise TimeoutError(f"connections of a dead process stay open: {', '.join(map(str, self.upstream))}")

    def missing(self) -> set[int]:
        return {number for number in self.acknowledged if not any(arrival.taken for arrival in self.arrivals.get(number, ()))}

    def judge(self) -> Counter[str]:
        """Every invariant; fills ``wrong``."""
        count: Counter[str] = Counter(
            sent=self.sent, acknowledged=len(self.acknowledged), refused=len(self.refused), unknown=len(self.unknown)
        )
        if missing := self.missing():
            self.wrong.append(f"{len(missing)} acknowledged and not carried: {sorted(missing)[:20]}")
        kills = [(kill, kill.until or self.stalls.after(kill.at, READ)) for kill in self.kills]
        for number, arrivals in self.arrivals.items():
            if number in self.refused or self.mails.refused(number):
                self.wrong.append(f"{number} was refused and carried")
            if len({arrival.key for arrival in arrivals}) != 1:
                self.wrong.append(f"{number} came under several ids: {arrivals}")
            copies = [arrival for arrival in arrivals if arrival.taken]
            count["carried"] += bool(copies)
            for first, second in itertools.pairwise(copies):
                count["repeated"] += 1
                between = [kill for kill, until in kills if first.when <= until and kill.at <= second.when]
                # What came after the process had written what is in flight was given to a sink by another thread of
                # it, which went on until the end.
                if any(kill.flying is not None and (first.key in kill.flying or first.when >= kill.at) for kill in between):
                    continue
                before = min(
                    (kill.at - first.when - self.stalls.lost(first.when, kill.at) for kill in between if kill.flying is None),
                    default=float("inf"),
                )
                self.oldest = max(self.oldest, before)
                if before > MARK:
                    self.wrong.append(f"{number} was taken {before:.2f} s before a kill, was not in flight, and was carried again")
        return count


# --------------------------------------------------------------- the generator


class Session(asyncio.Protocol):
    """One client connection that never rests. ``depth`` messages are out at a time, each as MAIL,
    RCPT and BDAT LAST in one write; with 0, one after the other by DATA."""

    def __init__(self, ledger: Ledger, depth: int, there: set[Session], over: Callable[[Session], None]) -> None:
        self._there = there
        self._ledger = ledger
        self._depth = depth
        self._over = over
        self._buffer = b""
        self._out: list[int] = []  # messages whose final reply is awaited, in order
        self._replies = 0  # of the message in front
        self._greeted = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not one by inheritance
        self._there.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        for number in self._out:
            self._ledger.lost(number)
        self._over(self)

    def data_received(self, octets: bytes) -> None:
        *lines, self._buffer = (self._buffer + octets).split(b"\r\n")
        for line in lines:
            if line.startswith(b"421") and self._ledger.leaderless:
                # A worker without its supervisor ends in order: what it has not answered is unknown.
                self._transport.abort()
                return
            if line[3:4] != b"-":
                self._reply(line)

    def _reply(self, line: bytes) -> None:
        if self._greeted < 2:
            self._greeted += 1
            if self._greeted == 1:
                self._transport.write(b"EHLO client.example\r\n")
            else:
                for _ in range(self._depth or 1):
                    self.send()
            return
        self._replies += 1
        number = self._out[0]
        if self._replies == 3 and not self._depth:
            if not line.startswith(b"354"):
                self._ledger.wrong.append(f"DATA was answered {line!r}")
            stuffed = self._ledger.mails.content(number).replace(b"\r\n.", b"\r\n..")
            self._transport.write(stuffed + b".\r\n")
        elif self._replies == (3 if self._depth else 4):
            self._replies = 0
            del self._out[0]
            self._ledger.reply(number, line)
            self.send()
        elif not line.startswith(b"250"):
            self._ledger.wrong.append(f"MAIL or RCPT was answered {line!r}")

    def send(self) -> None:
        if self._transport.is_closing():
            return
        if self._ledger.resting:
            self._ledger.waiting.append(self)
            return
        number = self._ledger.next()
        self._out.append(number)
        mails = self._ledger.mails
        head = b"MAIL FROM:<%d@client.example>\r\nRCPT TO:<n@%s.example>\r\n" % (number, mails.route(number).encode())
        if self._depth:
            content = mails.content(number)
            self._transport.write(b"%bBDAT %d LAST\r\n%b" % (head, len(content), content))
        else:
            self._transport.write(head + b"DATA\r\n")


# --------------------------------------------------------------- the receivers


class Hook(asyncio.Protocol):
    """A webhook that takes everything, one in three a little late."""

    def __init__(self, ledger: Ledger, pick: random.Random) -> None:
        self._ledger = ledger
        self._pick = pick
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._ledger.upstream.add(self)
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not one by inheritance

    def connection_lost(self, error: Exception | None) -> None:
        self._ledger.upstream.discard(self)

    def __str__(self) -> str:
        return f"webhook, from {self._transport.get_extra_info('peername')}, {len(self._buffer)} octets unread"

    def data_received(self, octets: bytes) -> None:
        self._buffer += octets
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._buffer[:end]).decode("latin-1")
            fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head.split("\r\n")[1:])}
            size = int(fields["content-length"])
            if len(self._buffer) < end + 4 + size:
                return
            body = bytes(self._buffer[end + 4 : end + 4 + size])
            del self._buffer[: end + 4 + size]
            self._ledger.arrived(body, "hook", fields["webhook-id"], taken=True)
            if self._pick.random() < 0.3:
                asyncio.get_running_loop().call_later(self._pick.uniform(0, 0.05), self._answer)
            else:
                self._answer()

    def _answer(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")


class Mta(asyncio.Protocol):
    """An upstream that puts one mail in fifty off at the end of data."""

    def __init__(self, ledger: Ledger, route: str, pick: random.Random) -> None:
        self._ledger = ledger
        self._route = route
        self._pick = pick
        self._buffer = b""
        self._content = b""
        self._data = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._ledger.upstream.add(self)
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not one by inheritance
        self._transport.write(b"220 upstream.test\r\n")

    def connection_lost(self, error: Exception | None) -> None:
        self._ledger.upstream.discard(self)

    def __str__(self) -> str:
        return f"upstream, from {self._transport.get_extra_info('peername')}, {len(self._buffer)} octets unread"

    def data_received(self, octets: bytes) -> None:
        self._buffer += octets
        said = []
        while (reply := self._step()) is not None:
            said.append(reply)
        self._transport.write(b"".join(said))

    def _step(self) -> bytes | None:
        if self._data:
            before, dot, after = (b"\r\n" + self._buffer).partition(b"\r\n.\r\n")
            if not dot:
                return None
            self._data, self._buffer = False, after
            return self._done((before + b"\r\n").replace(b"\r\n..", b"\r\n.")[2:])
        line, end, rest = self._buffer.partition(b"\r\n")
        if not end:
            return None
        verb = line[:4].upper()
        if verb == b"BDAT":
            size = int(line.split()[1])
            if len(rest) < size:
                return None
            self._content += rest[:size]
            self._buffer = rest[size:]
            if not line.upper().endswith(b"LAST"):
                return b"250 2.0.0 more\r\n"
            content, self._content = self._content, b""
            return self._done(content)
        self._buffer = rest
        match verb:
            case b"EHLO":
                return b"250-upstream.test\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 CHUNKING\r\n"
            case b"DATA":
                self._data = True
                return b"354 go on\r\n"
            case b"QUIT":
                return b"221 2.0.0 bye\r\n"
            case _:
                return b"250 2.0.0 good\r\n"

    def _done(self, octets: bytes) -> bytes:
        taken = self._pick.random() > 0.02
        self._ledger.arrived(octets, self._route, None, taken)
        return b"250 2.0.0 taken\r\n" if taken else b"451 4.3.0 not now\r\n"


async def connect(ledger: Ledger, port: int, sessions: int = BDAT_SESSIONS) -> asyncio.Event:
    """So many BDAT sessions and three quarters as many with DATA; the event is set when all are gone."""
    loop = asyncio.get_running_loop()
    there: set[Session] = set()
    gone = asyncio.Event()

    def over(session: Session) -> None:
        there.discard(session)
        if not there:
            gone.set()

    def session(depth: int) -> Session:
        return Session(ledger, depth, there, over)

    for depth in [DEPTH] * sessions + [0] * (sessions * DATA_SESSIONS // BDAT_SESSIONS):
        try:
            await loop.create_connection(partial(session, depth), "127.0.0.1", port)
        except OSError:
            break  # it died already
    if not there:
        gone.set()
    return gone
