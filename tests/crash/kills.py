"""kill -9 under load, again and again: what was acknowledged is carried, nothing else is.

A generator keeps sessions busy while receivers take what the gateway carries: by webhook, by
relay, and toward an upstream that is down, so that its mail lives in the spool through the kills
(``traffic.py``). RFC 5321 §4.2.5, §6.1.

Of a hundred kills 44 are at a step between the end of data and the done mark, before and after
each (``failpoints``), where the process tells which deliveries are in flight: only these may come
again; 16 at a step of the adoption of a shard, where fewer workers were started than had been
killed; 10 hit one of two workers, or both at such steps, or their supervisor; the others come at
random, while at least 1,000 messages a second are answered and 50 are unanswered. A step that is
not reached is a fault of the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gateway.shards import on_disk
from tests.crash.failpoints.sitecustomize import ADOPTION, OPERATIONS, STEPS
from tests.crash.traffic import Hook, Kill, Ledger, Mails, Mta, Stalls, connect
from tests.servers import ROOT, free_port

#: Of a hundred.
AT_STEPS, ADOPTING, OF_WORKERS = 44, 16, 10
#: What must be under way at each random kill.
RATE, UNANSWERED = 1000, 50
#: Sessions with BDAT at a kill of another kind, and while shards are adopted.
FEW, FEWER = 16, 4
#: Mails for each worker: one in twenty is for the upstream that is down.
EACH = 200
#: Seconds to carry everything once the kills are over.
LAST = 180
#: Seconds for a step to be reached, and of sending (resting: and more) until it is.
STEP, PULSE = 60.0, 0.4
#: Seconds for a start, and until so much is under way: at once, but a machine may be held up.
READY, ENOUGH = 120.0, 120.0
#: Seconds between words of progress.
SPEAK = 30.0

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
url = "http://{address}:{hook}/inbound"
format = "raw"

[sinks.relay]
type = "relay"
hosts = ["{address}:{relay}"]
tls = "off"
on_failure = "dead_letter"

[sinks.down]
type = "relay"
hosts = ["{address}:{down}"]
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
        deadline = time.monotonic() + READY
        while not (ports := self.events("listening")) or not self.events("ready"):
            if mortal and self.process.poll() is not None:
                return 0
            assert self.process.poll() is None, f"it ended by itself:\n{self._log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"not ready within {READY:.0f} s:\n{self._log.read_text()[-3000:]}"
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

    def __str__(self) -> str:
        return f"log {self._log}"

    def forget(self) -> None:
        """Nobody will ask what it said."""
        self._log.unlink()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass(slots=True)
class Figures:
    """What became of a run; ``wrong`` says everything that should not have been."""

    seed: int
    random: int = 0
    at_steps: int = 0
    adopting: int = 0
    of_workers: int = 0
    rates: list[float] = field(default_factory=list)
    unanswered: list[int] = field(default_factory=list)
    count: dict[str, int] = field(default_factory=dict)
    oldest: float = 0.0
    lost: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def kills(self) -> int:
        return self.random + self.at_steps + self.adopting + self.of_workers

    def __str__(self) -> str:
        return (
            f"{self.kills} kills ({self.random} at random at {min(self.rates, default=0):,.0f} to {max(self.rates, default=0):,.0f} messages/s with"
            f" {min(self.unanswered, default=0)} to {max(self.unanswered, default=0)} unanswered, {self.at_steps} at steps, {self.adopting} while"
            f" shards were adopted, {self.of_workers} of workers or supervisors), seed {self.seed}, {self.seconds / 60:.0f} min:"
            f" {self.count.get('acknowledged', 0):,} acknowledged, {self.lost} lost, {self.count.get('repeated', 0):,} repeated (in flight, or"
            f" taken at most {self.oldest * 1000:.0f} ms before a kill), {self.count.get('refused', 0):,} refused,"
            f" {self.count.get('unknown', 0):,} without an answer; {len(self.wrong)} wrong"
        )


class Run:
    """``kills`` kills in ``folder``; use it once. ``figures`` tells."""

    def __init__(self, folder: Path, kills: int, seed: int, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.config = folder / "gateway.toml"
        self.figures = Figures(seed)
        self._kills = kills
        self._pick = random.Random(seed)
        self._stalls = Stalls(folder / "stalls")
        self._ledger = Ledger(Mails(seed), self._stalls)
        self._told = folder / "told"
        self._say = say
        self._stack = contextlib.AsyncExitStack()
        # Of its own: on 127.0.0.1 somebody else may have the port that is down here, or take a port of ours for his.
        self._address = f"127.{secrets.randbelow(200) + 20}.{secrets.randbelow(256)}.{secrets.randbelow(254) + 1}"
        self._ports: dict[str, int] = {}
        self._started = self._spoken = time.monotonic()

    async def run(self) -> None:
        """Raises AssertionError where anything was wrong, TimeoutError where it could not go on."""
        self._told.mkdir(parents=True)
        self._stalls.start()
        self._stack.callback(self._stalls.stop)
        async with self._stack:
            self._ports = {
                "hook": (await self._listen(lambda: Hook(self._ledger, self._pick)))[1],
                "relay": (await self._listen(lambda: Mta(self._ledger, "relay", self._pick)))[1],
                "down": free_port(),
            }
            await self._chapters()
        figures = self.figures
        figures.count = dict(self._ledger.judge())
        figures.lost = len(self._ledger.missing())
        figures.oldest = self._ledger.oldest
        figures.wrong += self._ledger.wrong
        figures.seconds = time.monotonic() - self._started
        (self.folder / "wrong").write_text("\n".join(figures.wrong))
        assert not figures.wrong, f"{figures}: {figures.wrong[:10]}"

    # --------------------------------------------------------------- the chapters

    async def _chapters(self) -> None:
        at_steps, adopting, of_workers = (share * self._kills // 100 for share in (AT_STEPS, ADOPTING, OF_WORKERS))
        self._workers(1)
        points = self._points([*STEPS, *OPERATIONS])
        for _ in range(at_steps):
            await self._step(next(points))
            self._progress()
        for _ in range(self._kills - at_steps - adopting - of_workers):
            await self._at_random()
            self._progress()
        self._workers(2)
        # Those that a process which starts without mail does not come to: a worker is started again and again.
        often = self._points([name for name, step in STEPS.items() if step.most >= 20])
        for number in range(of_workers):
            await self._of_workers(next(often) if number % 2 else None)
            self._progress()
        points = self._points([*ADOPTION])
        for number in range(adopting):
            await self._adopting(number, next(points))
            self._progress()
        await self._last()

    def _points(self, names: list[str]) -> Iterator[str]:
        """Every step, before and after it, round and round; the frequent ones after some hundred of them at most."""
        while True:
            for name in names:
                step = (STEPS | ADOPTION | OPERATIONS)[name]
                for when in ("before", "after"):
                    count = max(step.least, int(step.most ** self._pick.random()))
                    yield f"{name}:{when}:{count}:{self._told}"

    async def _step(self, point: str) -> None:
        """Sends and rests until the process ends itself at its step."""
        life = self._start(point)
        if port := await life.ready(mortal=True):
            gone = await connect(self._ledger, port, FEW)
            await self._pulses(lambda: life.process.poll() is not None)
        reached = life.process.poll() is not None
        # A row that was written between the last look and the end of the process, if it still runs.
        life.kill()
        await self._ledger.killed()
        if port:
            await asyncio.wait_for(gone.wait(), READY)
        if told := self._ledger.told(self._told):
            # It was this kill, and the process told what was in flight.
            self._ledger.same(told)
            self.figures.at_steps += 1
        self._was_reached(bool(told and reached), point, life)

    async def _pulses(self, over: Callable[[], bool]) -> None:
        deadline = time.monotonic() + STEP
        rest = PULSE
        turn = time.monotonic() + PULSE
        while not over() and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
            if time.monotonic() > turn and self._ledger.resting:
                turn = time.monotonic() + PULSE
                self._ledger.go_on()
            elif time.monotonic() > turn:
                # Longer each time: what was put off comes again after a second or two.
                rest *= 1.5
                turn = time.monotonic() + rest
                self._ledger.rest()
        self._ledger.go_on()

    async def _at_random(self) -> None:
        """Connects, sends, and kills once enough is under way."""
        ledger, pick = self._ledger, self._pick
        if pick.random() < 0.1:
            # Killed while it starts and recovers, without any load.
            life = self._start()
            await asyncio.sleep(pick.uniform(0, 0.6))
            life.kill()
            await ledger.killed()
        life = self._start()
        gone = await connect(ledger, await life.ready())
        samples = [(time.monotonic(), ledger.answered)]
        wanted, deadline = samples[0][0] + pick.uniform(0.3, 0.8), samples[0][0] + ENOUGH
        while True:
            await asyncio.sleep(pick.uniform(0, 0.02))
            now = time.monotonic()
            samples.append((now, ledger.answered))
            while now - samples[0][0] > 0.4:
                del samples[0]
            rate = (samples[-1][1] - samples[0][1]) / max(0.001, now - samples[0][0])
            if now > wanted and rate >= RATE and len(ledger.unanswered) >= UNANSWERED:
                break
            assert now < deadline, (
                f"{rate:.0f} messages/s and {len(ledger.unanswered)} unanswered: too little for the test to mean anything"
            )
            assert life.process.poll() is None, "the gateway ended by itself"
        self.figures.rates.append(rate)
        self.figures.unanswered.append(len(ledger.unanswered))
        life.kill()
        await ledger.killed()
        self.figures.random += 1
        await asyncio.wait_for(gone.wait(), READY)
        assert not ledger.unanswered
        assert not life.events("bug"), life.events("bug")[:3]
        life.forget()

    async def _of_workers(self, point: str | None) -> None:
        """Two workers: one of them is killed, or the supervisor, or both at their step; then all."""
        ledger, pick = self._ledger, self._pick
        life = self._start(point)
        gone = await connect(ledger, await life.ready(), FEW)
        if point is None:
            await asyncio.sleep(pick.uniform(0.2, 0.6))
            victim = life.process.pid if pick.random() < 0.3 else pick.choice(life.children())
            ledger.leaderless = victim == life.process.pid
            os.kill(victim, signal.SIGKILL)
            ledger.kills.append(Kill(time.monotonic(), 0.0))
            self.figures.of_workers += 1
        else:
            await self._pulses(lambda: any(path.suffix != ".new" for path in self._told.iterdir()))
        # Another is started in its place, and sends what it finds.
        await asyncio.sleep(pick.uniform(0.2, 1.2))
        life.kill()
        await ledger.killed()
        await asyncio.wait_for(gone.wait(), READY)
        ledger.leaderless = False
        told = ledger.told(self._told)
        self.figures.of_workers += told
        if point is not None:
            self._was_reached(bool(told), point, life)

    async def _adopting(self, number: int, point: str) -> None:
        """Fewer workers than before: whoever carries what the others left is killed at it. One time in eight there
        are two, of which one adopts and is started again."""
        before, after = (3, 2) if number % 8 == 5 else (2, 1)
        if number % 4 == 0 or before == 3 or max(on_disk(self.folder / "spool")) < after:
            await self._orphaned(before)
        told, life = await self._adopted(after, point)
        if not told and len(life.events("emptied")) > 0:
            # By chance all of its mail had been carried before, and some steps are only taken where there is some.
            await self._orphaned(before)
            told, life = await self._adopted(after, point)
        self._was_reached(told, point, life)

    async def _adopted(self, after: int, point: str) -> tuple[bool, Life]:
        self._workers(after)
        server, _ = await self._listen(lambda: Mta(self._ledger, "down", self._pick), self._ports["down"])
        life = self._start(point)
        # With two of them the supervisor goes on.
        if port := await life.ready(mortal=True):
            gone = await connect(self._ledger, port, FEWER)
            await self._pulses(lambda: any(path.suffix != ".new" for path in self._told.iterdir()) or life.process.poll() is not None)
        await asyncio.sleep(0.1)
        life.kill()
        server.close()
        await self._ledger.killed()
        if port:
            await asyncio.wait_for(gone.wait(), READY)
        told = self._ledger.told(self._told)
        if told and after == 1:
            self._ledger.same(told)
        self.figures.adopting += told
        return bool(told), life

    async def _orphaned(self, workers: int) -> None:
        """So many, killed with mail in each shard."""
        self._workers(workers)
        life = self._start()
        port = await life.ready()
        gone = [await connect(self._ledger, port, FEW)]
        await asyncio.sleep(self._pick.uniform(0.6, 1.0))
        deadline = time.monotonic() + ENOUGH
        # The worker that was awake first may have taken every connection.
        while len(taken := Counter(event["worker"] for event in life.events("accepted"))) < workers or min(taken.values()) < EACH:
            assert time.monotonic() < deadline, f"not {EACH} mails for each of {workers} workers within {ENOUGH:.0f} s: {dict(taken)}"
            gone.append(await connect(self._ledger, port, FEW))
            await asyncio.sleep(0.5)
        life.kill()
        await self._ledger.killed()
        for each in gone:
            await asyncio.wait_for(each.wait(), READY)
        self.figures.of_workers += 1
        life.forget()

    async def _queued(self) -> str:
        """What the spool holds, as JSON."""
        command = [sys.executable, "-m", "gateway", "queue", "list", "--config", str(self.config), "--json"]
        listed = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=READY, check=True, cwd=ROOT)
        return listed.stdout

    async def _last(self) -> None:
        """The upstream is there again, and everything is carried."""
        self._workers(1)
        await self._listen(lambda: Mta(self._ledger, "down", self._pick), self._ports["down"])
        life = self._start()
        await life.ready()
        # What nobody got a word on may wait for its next try when everything else is carried.
        for _ in range(LAST):
            if not self._ledger.missing() and not json.loads(await self._queued()):
                break
            await asyncio.sleep(1)
        await asyncio.sleep(3)  # for a copy that should not come
        life.process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(life.process.wait, READY)
        if code:
            self.figures.wrong.append(f"the last process ended with {code}")
        left = await self._queued()
        if json.loads(left):
            self.figures.wrong.append(f"left in the spool: {left[:2000]}")

    # -------------------------------------------------------------- what they share

    async def _listen(self, made: Callable[[], asyncio.Protocol], port: int = 0) -> tuple[asyncio.Server, int]:
        server = await asyncio.get_running_loop().create_server(made, self._address, port)
        self._stack.callback(server.close)
        return server, int(server.sockets[0].getsockname()[1])

    def _workers(self, count: int) -> None:
        self.config.write_text(CONFIG.format(folder=self.folder, workers=count, address=self._address, **self._ports))

    def _start(self, failpoint: str | None = None) -> Life:
        self._ledger.life += 1
        life = Life(self.config, self.folder / f"{self._ledger.life}.log", failpoint)
        self._stack.callback(life.kill)
        return life

    def _was_reached(self, reached: bool, point: str, life: Life) -> None:
        if reached:
            life.forget()
        else:
            self.figures.wrong.append(f"not reached within {STEP:.0f} s: {point}, {life}")

    def _progress(self) -> None:
        """A word now and then; no further with what is wrong already."""
        figures, ledger = self.figures, self._ledger
        now = time.monotonic()
        if now - self._spoken > SPEAK:
            self._spoken = now
            self._say(
                f"{figures.kills} kills of {self._kills} and more, {len(ledger.acknowledged):,} acknowledged,"
                f" {(now - self._started) / 60:.1f} min; {len(ledger.wrong) + len(figures.wrong)} wrong"
            )
        assert not ledger.wrong, f"seed {figures.seed}, in {self.folder}: {ledger.wrong[:20]}"
