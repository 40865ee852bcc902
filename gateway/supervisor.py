"""Several worker processes behind one set of listening sockets.

Owns the sockets, the processes and what is true about all of them together: it binds once,
hands the sockets on, starts one worker per core or as many as it is told, starts those again
that die, passes SIGTERM on, and adds their numbers up for ``/metrics``. It sees no mail: each
worker has its own loop, spool shards and sinks, and shares nothing with the others
(DESIGN §8).

A reload (SIGHUP) has two steps: every worker makes ready, and only when all can does it take
place in all. New listening sockets are bound here and go to the workers that live through a
second socket pair (SCM_RIGHTS). A hand-over (SIGUSR2, ``net/handover.py``) starts another
supervisor with workers of its own; once these take connections ours drain.

A worker is this module run by the same Python with one end of a socket pair. Over it the
supervisor sends the Config (never by the command line, where secrets could be seen), and the
worker says when it is ready or why it cannot be. A worker whose supervisor is gone drains and
ends: there are no orphans.
"""

from __future__ import annotations

import asyncio
import pickle
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING, Any, cast

from . import __version__
from .app import Gateway, Log, Place
from .build import bind_admin, bind_all, bind_some, named
from .config import Config, ConfigError
from .exposition import expose
from .net import handover, notify
from .net.handover import Handover, HandoverError, Inheritance
from .net.sockets import UnixSocket, spoken
from .observe import Telemetry
from .reload import Prepared, adjust, matched, unchangeable

if TYPE_CHECKING:
    from .admin.http import Site

#: Seconds until a worker that died is started again: at first, and at most.
AGAIN_FIRST, AGAIN_LAST = 0.1, 30.0
#: A worker that lived this long (seconds) begins anew with AGAIN_FIRST.
HEALTHY = 60.0
#: Seconds beyond ``drain.timeout`` until a worker that does not end is killed.
GRACE = 5.0
#: Seconds for a worker's numbers.
ASKING = 2.0
#: Seconds for a worker to make ready for a new configuration.
PREPARING = 30.0

_LENGTH = struct.Struct("!I")


class Worker:
    """One worker process, as the supervisor knows it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: asyncio.subprocess.Process | None = None
        self.writer: asyncio.StreamWriter | None = None
        #: Our end of what new listening sockets go through.
        self.lift: socket.socket | None = None
        #: The configuration that it was told last.
        self.config: Config | None = None
        self.ready = False
        self.since = 0.0
        self.delay = AGAIN_FIRST
        self._questions = count(1)
        self._asked: dict[int, asyncio.Future[Any]] = {}

    async def ask(self, word: str, what: Any = None, *, within: float) -> Any:
        """What the worker answers. Raises TimeoutError where it does not, ConnectionError where it ended first."""
        if not self.ready:
            raise ConnectionError(f"worker {self.number} is not up")
        number = next(self._questions)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self.tell(word, (number, what))
            return await asyncio.wait_for(answer, within)
        finally:
            del self._asked[number]

    def answered(self, number: int, what: Any) -> None:
        if (answer := self._asked.get(number)) is not None and not answer.done():
            answer.set_result(what)

    def ended(self) -> None:
        """Its process is no more: nobody answers."""
        self.ready = False
        if self.writer is not None:
            self.writer.close()
        if self.lift is not None:
            self.lift.close()
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(ConnectionError(f"worker {self.number} ended"))

    def tell(self, word: str, what: Any = None) -> None:
        if self.writer is not None and not self.writer.is_closing():
            self.writer.write(_packed(word, what))


class Supervisor:
    """See the module. ``serve`` runs one."""

    def __init__(self, config: Config, telemetry: Telemetry, log: Log, config_path: str | None = None) -> None:
        self.config = config
        self.telemetry = telemetry
        self._log = log
        self._config_path = config_path
        self._sockets: list[socket.socket] = []
        self._workers = [Worker(number) for number in range(config.worker_count)]
        self._keepers: list[asyncio.Task[None]] = []
        self._site: Site | None = None
        self._started_at = time.time()
        self._asked = asyncio.Event()
        self._ending = False
        self._up = False
        self._admin: socket.socket | None = None
        self._inheritance: Inheritance | None = None
        self._offer: Handover | None = None
        self._offering: asyncio.Task[None] | None = None
        self._left = False
        self._reloading = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """Returns the exit code. Raises ConfigError where a worker cannot start at all."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ask_to_stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        loop.add_signal_handler(signal.SIGUSR2, self._hand_over)
        try:
            self._inheritance = handover.inherited()
        except HandoverError as error:
            raise ConfigError(error.faults) from None
        admin = self._admin = bind_admin(self.config, self._inheritance)
        try:
            self._sockets = bind_all(self.config, self._inheritance)
            first: list[asyncio.Future[list[str]]] = [loop.create_future() for _ in self._workers]
            self._keepers = [loop.create_task(self._keep(worker, started)) for worker, started in zip(self._workers, first, strict=True)]
            for sock, listener in zip(self._sockets, self.config.listeners, strict=True):
                self.telemetry.event("listening", address=spoken(sock.getsockname()), protocol=listener.protocol)
            if faults := list(dict.fromkeys(fault for faults in await asyncio.gather(*first) for fault in faults)):
                raise ConfigError(faults)
            if admin is not None:
                await self._open_admin(admin)
            self._up = True
            self.telemetry.event("ready", workers=len(self._workers), **({"config": self._config_path} if self._config_path else {}))
            if self._inheritance is not None:
                self._inheritance.ready()
            notify.ready()
            await self._asked.wait()
            if self._offering is not None:
                self._offering.cancel()
                if self._offer is not None:
                    await self._offer.recall()
            if not self._left:
                notify.stopping()
        except ConfigError as error:
            handover.refuse(error.faults)
            raise
        finally:
            code = await self._stop()
            if admin is not None:
                admin.close()
        return code

    async def _open_admin(self, sock: socket.socket) -> None:
        from .admin.http import Site

        self._site = Site(sock, self)
        await self._site.open()
        self.telemetry.event("listening", address=spoken(sock.getsockname()), protocol="http")

    # ------------------------------------------------------------- the workers

    async def _keep(self, worker: Worker, started: asyncio.Future[list[str]]) -> None:
        """Start this worker, and start it again whenever it dies. ``started`` gets its faults at
        the first start, an empty list once it is ready."""
        while not self._ending:
            process, reader = await self._spawn(worker)
            listening = asyncio.create_task(self._listen(worker, reader, started))
            code = await process.wait()
            await listening
            worker.ended()
            if not started.done():
                started.set_result([f"workers: worker {worker.number} ended with code {code} before it was ready"])
            if self._ending or started.result():
                return
            if time.monotonic() - worker.since > HEALTHY:
                worker.delay = AGAIN_FIRST
            self.telemetry.event("worker_ended", number=worker.number, pid=process.pid, code=code, again_in=worker.delay)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._asked.wait(), worker.delay)
            worker.delay = min(worker.delay * 2, AGAIN_LAST)

    async def _spawn(self, worker: Worker) -> tuple[asyncio.subprocess.Process, asyncio.StreamReader]:
        ours, theirs = socket.socketpair()
        worker.lift, lift = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with theirs, lift:
            reader, worker.writer = await asyncio.open_connection(sock=ours)
            worker.since = time.monotonic()
            # One moment for the configuration and its sockets: a reload may come while the process starts.
            config, fds = self.config, [sock.fileno() for sock in self._sockets]
            worker.config = config
            worker.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "gateway.supervisor",
                str(theirs.fileno()),
                str(lift.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), lift.fileno(), *fds],
            )
        handed = self._inheritance is not None
        worker.tell("begin", (_bare(config), worker.number, len(self._workers), fds, self._log, handed))
        return worker.process, reader

    async def _listen(self, worker: Worker, reader: asyncio.StreamReader, started: asyncio.Future[list[str]]) -> None:
        while (told := await _received(reader)) is not None:
            word, what = told
            if word == "ready":
                if worker.config is not self.config and worker.process is not None:
                    # It began under what is the old configuration by now: once more.
                    worker.process.terminate()
                    continue
                worker.ready = True
                self.telemetry.event("worker_ready", number=worker.number, pid=worker.process.pid if worker.process else 0)
                if not started.done():
                    started.set_result([])
            elif word == "answer":
                worker.answered(*what)
            elif word == "faults":
                if not started.done():
                    started.set_result(what)
                else:
                    self.telemetry.event("worker_refused", number=worker.number, faults=what)

    # --------------------------------------------------------------- the signals

    def _ask_to_stop(self) -> None:
        if self._asked.is_set():
            # Once more: at once.
            self._signal(signal.SIGTERM)
        self._asked.set()

    def _signal(self, number: int) -> None:
        for worker in self._workers:
            if worker.process is not None and worker.process.returncode is None:
                with suppress(ProcessLookupError):
                    worker.process.send_signal(number)

    def _spawn_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _reload(self) -> None:
        """SIGHUP: the file is read once, here, so that all workers get the same."""
        self._spawn_task(self._read_again())

    async def _read_again(self) -> None:
        async with self._reloading:
            notify.reloading()
            try:
                await self._pass_on(self.config.reload())
            except ConfigError as error:
                self.telemetry.event("reload_refused", faults=error.faults)
            except Exception as error:
                self.telemetry.event("bug", message=f"reload: {error!r}", traceback=traceback.format_exc())
            notify.ready()

    async def _pass_on(self, config: Config) -> None:
        """In all workers, or in none. Raises ConfigError."""
        if faults := unchangeable(self.config, config):
            raise ConfigError(faults)
        if not self._up or self._ending:
            raise ConfigError(["the gateway is not up"])
        kept = matched(self.config.listeners, config.listeners)
        bound = bind_some(config, [number for number, place in enumerate(kept) if place is None])
        workers = [worker for worker in self._workers if worker.ready and worker.config is self.config]
        processes = [worker.process for worker in workers]
        answers = await asyncio.gather(*(self._prepared(worker, config, bound) for worker in workers))
        if faults := list(dict.fromkeys(fault for answer in answers for fault in answer)):
            for worker in workers:
                worker.tell("abandon")
            for sock in bound.values():
                sock.close()
            raise ConfigError(faults)
        old, before = self.config, self._sockets
        self.config = config
        self._sockets = [bound[number] if place is None else before[place] for number, place in enumerate(kept)]
        workers = [worker for worker, process in zip(workers, processes, strict=True) if worker.process is process]
        for worker in workers:
            worker.config = config
        # One that ended meanwhile begins anew, with the new configuration.
        told = await asyncio.gather(*(worker.ask("commit", within=PREPARING) for worker in workers), return_exceptions=True)
        for worker, answer in zip(workers, told, strict=True):
            if isinstance(answer, TimeoutError) and worker.process is not None and worker.ready:
                worker.process.kill()
        for worker in self._workers:
            if worker.ready and worker.config is not config and worker.process is not None:
                worker.process.terminate()
        for number, (place, entry) in enumerate(zip(kept, config.listeners, strict=True)):
            if place is None:
                self.telemetry.event("listening", address=spoken(bound[number].getsockname()), protocol=entry.protocol)
            else:
                adjust(old.listeners[place], entry)
        for place, sock in enumerate(before):
            if place not in kept:
                sock.close()

    async def _prepared(self, worker: Worker, config: Config, bound: Mapping[int, socket.socket]) -> list[str]:
        """Why this worker cannot go by this configuration; empty: it stands ready."""
        try:
            if bound:
                assert worker.lift is not None
                worker.lift.setblocking(False)
                socket.send_fds(worker.lift, [b"sockets"], [sock.fileno() for sock in bound.values()])
            return list(await worker.ask("prepare", (_bare(config), list(bound)), within=PREPARING))
        except ConnectionError:
            return []  # it ended: the next one begins with what holds then
        except (TimeoutError, OSError) as error:
            return [f"workers: worker {worker.number} did not make ready: {error!r}"]

    # --------------------------------------------------------------- hand-over

    def _hand_over(self) -> None:
        """SIGUSR2: start the new version; it takes our place, or we stay and say why."""
        if self._up and self._offering is None and not self._asked.is_set():
            self._offering = self._spawn_task(self._give())

    async def _give(self) -> None:
        self.telemetry.event("handing_over")
        try:
            async with self._reloading:
                self._offer = Handover(named(self.config, self._sockets, self._admin))
                pid = await self._offer.make()
                notify.notify(f"MAINPID={pid}")
                self.telemetry.event("handed_over", pid=pid)
                self._left = True
                for sock in self._sockets:
                    if isinstance(sock, UnixSocket):
                        sock.leave()
                self._asked.set()
        except HandoverError as error:
            self.telemetry.event("handover_refused", faults=error.faults)
        finally:
            self._offering = None

    async def _stop(self) -> int:
        """No new connection; every worker drains; the exit code of the whole."""
        self._ending = True
        if self._up:
            self.telemetry.event("draining")
        for sock in self._sockets:
            sock.close()
        self._asked.set()
        if self._left:
            if self._site is not None:
                await self._site.close()
                self._site = None
            for worker in self._workers:
                worker.tell("leave")
        else:
            self._signal(signal.SIGTERM)
        if self._keepers:
            _, late = await asyncio.wait(self._keepers, timeout=self.config.drain.timeout + GRACE)
            if late:
                self._signal(signal.SIGKILL)
                await asyncio.wait(late)
        if self._site is not None:
            await self._site.close()
        if self._up:
            self.telemetry.event("stopped")
        codes = [worker.process.returncode for worker in self._workers if worker.process is not None]
        return next((code if code and code > 0 else 1 for code in codes if code), 0)

    # ------------------------------------------- admin.http.Source, for all together

    async def _ask_all(self, op: str) -> list[Any]:
        """What each worker that lives answers."""
        answers = await asyncio.gather(*(worker.ask("ask", op, within=ASKING) for worker in self._workers), return_exceptions=True)
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def metrics(self) -> bytes:
        return expose([self.telemetry.state(), *await self._ask_all("metrics")])

    async def unready(self) -> str | None:
        if self._ending:
            return "draining"
        for worker in self._workers:
            if not worker.ready:
                return f"worker {worker.number} is not up"
        answers = await asyncio.gather(*(worker.ask("ask", "status", within=ASKING) for worker in self._workers), return_exceptions=True)
        for worker, answer in zip(self._workers, answers, strict=True):
            if isinstance(answer, BaseException):
                return f"worker {worker.number} does not answer"
            if answer["unready"] is not None:
                return str(answer["unready"])
        return None

    async def status(self) -> Mapping[str, Any]:
        return {
            "version": __version__,
            "uptime": round(time.time() - self._started_at, 3),
            "workers": await self._ask_all("status"),
        }


def serve(config: Config, *, log: Log = "json", config_path: str | None = None) -> int:
    """``gateway serve`` with ``workers`` over 1: blocks until all is over; returns the exit code.
    Raises ConfigError."""
    import uvloop

    telemetry = Telemetry(log)

    async def run() -> int:
        return await Supervisor(config, telemetry, log, config_path).run()

    try:
        return int(uvloop.run(run()))
    finally:
        telemetry.close()


# -------------------------------------------------------------------- the worker's side


async def _work(channel: socket.socket, lift: socket.socket) -> int:
    reader, writer = await asyncio.open_connection(sock=channel)
    told = await _received(reader)
    if told is None:
        return 1
    config, number, workers, fds, log, handed = cast("tuple[Config, int, int, list[int], Log, bool]", told[1])
    telemetry = Telemetry(log, worker=number)
    gateway = Gateway(config, telemetry=telemetry, place=Place(number, workers, [_taken(fd) for fd in fds], handed))
    ready_for: Prepared | None = None

    async def prepare(given: Config, numbers: Sequence[int]) -> list[str]:
        """Why not; empty: ``commit`` may come."""
        nonlocal ready_for
        passed = socket.recv_fds(lift, 64, len(numbers))[1] if numbers else []
        try:
            ready_for = await gateway.prepare(given, dict(zip(numbers, map(_taken, passed), strict=True)))
        except ConfigError as error:
            return error.faults
        return []

    async def abandon() -> None:
        nonlocal ready_for
        if ready_for is not None:
            unwanted, ready_for = ready_for, None
            await unwanted.close()

    async def answer(word: str, what: Any) -> Any:
        nonlocal ready_for
        if word == "ask":
            return await gateway.asked(what)
        if word == "prepare":
            return await prepare(*what)
        assert ready_for is not None
        ready, ready_for = ready_for, None
        if gateway.ending:
            # The worker that comes after this one begins with it.
            await ready.close()
        else:
            gateway.commit(ready)
        return None

    def ready() -> None:
        writer.write(_packed("ready", None))

    async def listen() -> None:
        try:
            while (told := await _received(reader)) is not None:
                word, what = told
                if word == "leave":
                    gateway.leave()
                elif word == "abandon":
                    await abandon()
                else:
                    question, about = what
                    writer.write(_packed("answer", (question, await answer(word, about))))
        except Exception as error:
            # Nobody knows by what we go: the next process does.
            telemetry.event("bug", message=f"a word of the supervisor: {error!r}", traceback=traceback.format_exc())
        gateway.ask_to_stop()

    listening = asyncio.ensure_future(listen())
    try:
        return await gateway.main(ready)
    except ConfigError as error:
        writer.write(_packed("faults", error.faults))
        return 1
    except Exception as error:
        telemetry.event("bug", message=f"start: {error!r}", traceback=traceback.format_exc())
        return 1
    finally:
        listening.cancel()
        with suppress(OSError):
            await writer.drain()
            writer.close()
            await writer.wait_closed()
        telemetry.close()


def _taken(fd: int) -> socket.socket:
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    return sock


def _bare(config: Config) -> Config:
    """The Config without where it came from: only the supervisor reads files."""
    copy = config.model_copy()
    copy._source = None
    return copy


def _packed(word: str, what: Any) -> bytes:
    octets = pickle.dumps((word, what))
    return _LENGTH.pack(len(octets)) + octets


async def _received(reader: asyncio.StreamReader) -> tuple[str, Any] | None:
    """The next word of the other side; None when it is gone."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        return cast("tuple[str, Any]", pickle.loads(await reader.readexactly(length)))
    except (asyncio.IncompleteReadError, OSError):
        return None


def work(fd: int, lift: int) -> int:
    """The life of a worker process; ``fd``: its end of the socket pair; ``lift``: of the one on which
    further listening sockets come."""
    import uvloop

    # Ctrl-C reaches every process of the terminal; the supervisor says what comes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A hand-over is the supervisor's business; whoever signals the whole group means it.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    return int(uvloop.run(_work(socket.socket(fileno=fd), socket.socket(fileno=lift))))


if __name__ == "__main__":
    sys.exit(work(int(sys.argv[1]), int(sys.argv[2])))
