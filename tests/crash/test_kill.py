"""kill -9 under load, again and again: what was acknowledged is carried, nothing else is.

A generator keeps sessions busy (pipelined BDAT and DATA) while receivers take what the gateway
carries: by webhook, by relay, and toward an upstream that is down until the end, so that its
mail lives in the spool through every kill. A ledger says of each message whether it was
acknowledged, refused, or neither when the connection broke. RFC 5321 §4.2.5, §6.1.

The kills come at random, while at least 1,000 messages a second are answered and 50 are
unanswered; at chosen steps between the end of data and the done mark (``failpoints``), where the
process tells which deliveries are in flight: only these may come again; and, with two workers,
to one of them, at random and at such steps, or to the supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import pytest
import uvloop

from ..servers import ROOT, free_port, without_trace
from .failpoints.sitecustomize import OPERATIONS, RARE, STEPS

#: GATEWAY_KILLS and GATEWAY_SEED repeat a run, or make a longer one: half of the kills are random, four in ten at a step,
#: one in ten has two workers.
KILLS = int(os.environ.get("GATEWAY_KILLS", "100"))
SEED = int(os.environ.get("GATEWAY_SEED", str(random.SystemRandom().randrange(2**32))))
#: What must be under way at each kill.
RATE, UNANSWERED = 1000, 50
BDAT_SESSIONS, DATA_SESSIONS, DEPTH = 40, 30, 3
#: Seconds: a done mark rides on a commit at most 50 ms later; the rest is for a busy machine.
MARK = 1.0
#: Seconds: what was sent before a kill has been read.
READ = 1.0
#: Seconds to carry everything once the kills are over.
LAST = 180
#: Seconds for a step to be reached; then the process is killed from outside.
STEP = 2.0

CONFIG = """
hostname = "mx.gateway.example"
workers = {workers}

[[listeners]]
address = "127.0.0.1:0"

[spool]
path = "{folder}/spool"

[retry]
delays = ["1s", "2s"]

[sinks.hook]
type = "webhook"
url = "http://127.0.0.1:{hook}/inbound"
format = "raw"

[sinks.relay]
type = "relay"
hosts = ["127.0.0.1:{relay}"]
tls = "off"
on_failure = "dead_letter"

[sinks.down]
type = "relay"
hosts = ["127.0.0.1:{down}"]
tls = "off"
on_failure = "dead_letter"

[[routes]]
recipients = ["*@hook.example"]
sink = "hook"

[[routes]]
recipients = ["*@relay.example"]
sink = "relay"

[[routes]]
recipients = ["*@down.example"]
sink = "down"
"""


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
        body = self._large if number % 700 == 11 else self._bodies[number % len(self._bodies)]
        head = b"X-Number: %d\r\nMessage-ID: <%d@client.example>\r\n\r\n" % (number, number)
        return head + body + (b"bare\nnewline\r\n" if self.refused(number) else b"")


@dataclass(slots=True)
class Arrival:
    when: float
    key: str
    taken: bool


@dataclass(slots=True)
class Kill:
    """``until``: when the last that was sent before it had been read. ``flying``: the ids of what was in
    flight, where the process could tell."""

    at: float
    until: float
    flying: frozenset[str] | None = None


@dataclass
class Ledger:
    mails: Mails
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
    #: Seconds: what was carried again had been taken at most so long before the kill.
    oldest: float = 0.0
    #: Connections of the gateway that the receivers have.
    upstream: set[asyncio.Protocol] = field(default_factory=set)

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
                self.kills.append(Kill(at, at + READ, frozenset(json.loads(path.read_text()))))
                path.unlink()
                count += 1
        return count

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
        raise TimeoutError("connections of a dead process stay open")

    def missing(self) -> set[int]:
        return {number for number in self.acknowledged if not any(arrival.taken for arrival in self.arrivals.get(number, ()))}

    def judge(self) -> Counter[str]:
        """Every invariant; fills ``wrong``."""
        count: Counter[str] = Counter(
            sent=self.sent, acknowledged=len(self.acknowledged), refused=len(self.refused), unknown=len(self.unknown)
        )
        if missing := self.missing():
            self.wrong.append(f"{len(missing)} acknowledged and not carried: {sorted(missing)[:20]}")
        for number, arrivals in self.arrivals.items():
            if number in self.refused or self.mails.refused(number):
                self.wrong.append(f"{number} was refused and carried")
            if len({arrival.key for arrival in arrivals}) != 1:
                self.wrong.append(f"{number} came under several ids: {arrivals}")
            copies = [arrival for arrival in arrivals if arrival.taken]
            count["carried"] += bool(copies)
            for first, second in itertools.pairwise(copies):
                count["repeated"] += 1
                between = [kill for kill in self.kills if first.when <= kill.until and kill.at <= second.when]
                if any(kill.flying is not None and first.key in kill.flying for kill in between):
                    continue
                before = min((kill.at - first.when for kill in between if kill.flying is None), default=float("inf"))
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
                    self._send()
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
            self._send()
        elif not line.startswith(b"250"):
            self._ledger.wrong.append(f"MAIL or RCPT was answered {line!r}")

    def _send(self) -> None:
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


# ------------------------------------------------------------------- the story


class Life:
    """One process of the gateway, its event log in a file of its own."""

    def __init__(self, config: Path, log: Path, failpoint: str | None = None) -> None:
        self._log = log
        environment = dict(os.environ)
        if failpoint is not None:
            environment |= {"FAILPOINT": failpoint, "PYTHONPATH": str(Path(__file__).parent / "failpoints")}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gateway", "serve", "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stderr=file,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )

    async def ready(self, mortal: bool = False) -> int:
        """The port; 0 where it ended, and may."""
        deadline = time.monotonic() + 60
        while not (ports := self.events("listening")) or not self.events("ready"):
            if mortal and self.process.poll() is not None:
                return 0
            assert self.process.poll() is None, f"it ended by itself:\n{self._log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"not ready within 60 s:\n{self._log.read_text()[-3000:]}"
            await asyncio.sleep(0.01)
        return int(ports[0]["address"].rpartition(":")[2])

    def events(self, name: str) -> list[dict[str, str]]:
        found = []
        for line in self._log.read_bytes().split(b"\n"):
            if f'"event":"{name}"'.encode() in line.replace(b'": "', b'":"'):
                with contextlib.suppress(ValueError):  # a kill may cut the last line
                    found.append(json.loads(line))
        return found

    def children(self) -> list[int]:
        """The workers of a supervisor."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in listed.read_text().split()]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


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


async def load(ledger: Ledger, life: Life, pick: random.Random) -> tuple[float, int]:
    """Connects, sends, and kills once enough is under way; the rate and the unanswered at the kill."""
    gone = await connect(ledger, await life.ready())
    samples = [(time.monotonic(), ledger.answered)]
    wanted, deadline = samples[0][0] + pick.uniform(0.3, 0.8), samples[0][0] + 30
    while True:
        await asyncio.sleep(pick.uniform(0, 0.02))
        now = time.monotonic()
        samples.append((now, ledger.answered))
        while now - samples[0][0] > 0.4:
            del samples[0]
        rate = (samples[-1][1] - samples[0][1]) / max(0.001, now - samples[0][0])
        if now > wanted and rate >= RATE and len(ledger.unanswered) >= UNANSWERED:
            break
        assert now < deadline, f"{rate:.0f} messages/s and {len(ledger.unanswered)} unanswered: too little for the test to mean anything"
        assert life.process.poll() is None, "the gateway ended by itself"
    unanswered = len(ledger.unanswered)
    life.kill()
    await ledger.killed()
    await asyncio.wait_for(gone.wait(), 10)
    assert not ledger.unanswered
    return rate, unanswered


async def step(ledger: Ledger, life: Life, told: Path) -> bool:
    """Sends until the process ends itself at its step; False where it did not come to that."""
    if port := await life.ready(mortal=True):
        gone = await connect(ledger, port, 16)
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(life.process.wait, STEP)
    # A row that was written between the last look and the end of the process, if it still runs.
    life.kill()
    await ledger.killed()
    if port:
        await asyncio.wait_for(gone.wait(), 10)
    if reached := ledger.told(told):
        # It was this kill, and the process told what was in flight.
        ledger.kills.pop(-1 - reached)
    return bool(reached)


async def workers(ledger: Ledger, life: Life, told: Path, pick: random.Random) -> int:
    """Two workers, and one of them is killed, or both at their steps, or the supervisor. How many processes were killed
    before all were."""
    killed = 0
    port = await life.ready(mortal=True)
    if port:
        gone = await connect(ledger, port, 16)
        await asyncio.sleep(pick.uniform(0.2, 0.6))
        victim = life.process.pid if pick.random() < 0.3 else pick.choice([*life.children(), 0])
        ledger.leaderless = victim == life.process.pid
        if victim:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                ledger.kills.append(Kill(time.monotonic(), time.monotonic() + READ))
                killed += 1
        # Another is started in its place, and sends what it finds.
        await asyncio.sleep(pick.uniform(0.2, 1.2))
    life.kill()
    await ledger.killed()
    if port:
        await asyncio.wait_for(gone.wait(), 10)
    ledger.leaderless = False
    return killed + ledger.told(told)


async def story(folder: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        await chapters(folder, stack)


async def chapters(folder: Path, stack: contextlib.AsyncExitStack) -> None:
    pick = random.Random(SEED)
    ledger = Ledger(Mails(SEED))
    loop = asyncio.get_running_loop()

    async def listen(made: Callable[[], asyncio.Protocol], port: int = 0) -> int:
        server = await loop.create_server(made, "127.0.0.1", port)
        stack.callback(server.close)
        return int(server.sockets[0].getsockname()[1])

    ports = {
        "hook": await listen(lambda: Hook(ledger, pick)),
        "relay": await listen(lambda: Mta(ledger, "relay", pick)),
        "down": free_port(),
    }
    config = folder / "gateway.toml"
    config.write_text(CONFIG.format(folder=folder, workers=1, **ports))
    told = folder / "told"
    told.mkdir()

    def start(failpoint: str | None = None) -> Life:
        ledger.life += 1
        life = Life(config, folder / f"{ledger.life}.log", failpoint)
        stack.callback(life.kill)
        return life

    def failpoint() -> Iterator[str]:
        """Every step, before and after it, round and round; the frequent ones mostly after some hundred messages."""
        while True:
            for name in [*STEPS, *OPERATIONS]:
                for when in ("before", "after"):
                    count = 1 if name in RARE else int(10 ** pick.uniform(0, 2.7))
                    yield f"{name}:{when}:{count}:{told}"

    points = failpoint()
    missed: Counter[str] = Counter()
    reached = fallen = 0
    for _ in range(KILLS * 4 // 10):
        point = next(points)
        if await step(ledger, start(point), told):
            reached += 1
        else:
            missed[point.partition(":")[0]] += 1
        assert not ledger.wrong, ledger.wrong[:20]

    rates, depths = [], []
    for _ in range(KILLS // 2):
        if pick.random() < 0.1:
            # Killed while it starts and recovers, without any load.
            life = start()
            await asyncio.sleep(pick.uniform(0, 0.6))
            life.kill()
            await ledger.killed()
        life = start()
        rate, unanswered = await load(ledger, life, pick)
        rates.append(rate)
        depths.append(unanswered)
        assert not life.events("bug"), life.events("bug")[:3]
        assert not ledger.wrong, ledger.wrong[:20]
        (folder / f"{ledger.life}.log").unlink()

    config.write_text(CONFIG.format(folder=folder, workers=2, **ports))
    for number in range(KILLS // 10):
        fallen += await workers(ledger, start(next(points) if number % 2 else None), told, pick)
        assert not ledger.wrong, ledger.wrong[:20]

    await listen(lambda: Mta(ledger, "down", pick), ports["down"])
    life = start()
    await life.ready()
    for _ in range(LAST):
        if not ledger.missing():
            break
        await asyncio.sleep(1)
    await asyncio.sleep(3)  # for a copy that should not come
    life.process.send_signal(signal.SIGTERM)
    code = await asyncio.to_thread(life.process.wait, 60)
    count = ledger.judge()
    (folder / "wrong").write_text("\n".join(ledger.wrong))
    print(
        f"{KILLS} kills, seed {SEED}: {dict(count)}; {reached} at a step (not reached: {dict(missed)}), {fallen} of workers or supervisors; at the kills {min(rates):.0f} to {max(rates):.0f} messages/s, "
        f"{min(depths)} to {max(depths)} unanswered; carried again: what was in flight, or was taken up to {ledger.oldest * 1000:.0f} ms before one"
    )
    assert not ledger.wrong, f"{len(ledger.wrong)} in {folder}/wrong: {ledger.wrong[:10]}"
    assert code == 0
    assert count["acknowledged"] > 0
    assert count["refused"] > 0


@pytest.mark.long
def test_kill_nine_under_load_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The seed and the figures are told whether it passes or not.
    with capsys.disabled(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(f"\nGATEWAY_SEED={SEED}")
        runner.run(story(tmp_path))
    listed = subprocess.run(
        [sys.executable, "-m", "gateway", "queue", "list", "--config", str(tmp_path / "gateway.toml"), "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=ROOT,
    ).stdout
    assert json.loads(listed) == [], listed[:2000]
