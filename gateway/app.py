"""The whole: a Gateway made from a Config, its life from the first bind to the last row.

Owns the order of things. Start: bind, spool, sinks, queue, intake, listeners, control
socket, health and metrics. Drain: no new connection; mail before the end of its data gets
421, mail after it its answer; deliveries that are out are waited for; what is still owed
stays in the spool. The watch: room on the disk, health of the spool. Reload: everything new is
made first (``prepare``), then put in place in one turn of the loop (``commit``). Hand-over: the
new version of the program gets the listening sockets, and this one drains.

It decides nothing about mail: that is the parts' business, which meet in contracts and are
put together here.

Exit codes of ``serve``: 0 ended as asked; ``RECOVER`` when the spool can no longer tell what
it holds: whoever started us starts us again, and recovery finds the truth (DESIGN §4).
A Config that cannot be put to work (a port that is taken, a spool that is locked) raises
ConfigError like any other fault of it.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import logging
import os
import resource
import signal
import socket
import ssl
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from . import __version__
from .admin.control import Operation
from .build import (
    bind_admin,
    bind_all,
    bind_some,
    contexts,
    door,
    lane_settings,
    least_room,
    made_checks,
    named,
    opened_sinks,
    rules,
    stamps,
)
from .config import Config, ConfigError, ListenerConfig, PythonConfig, RouteConfig, SinkConfig, SpoolConfig
from .contracts import Check, Sink, SpoolError
from .exposition import expose
from .intake import MailIntake, new_id
from .listener import Admission, Listener, SessionIds
from .message import Message
from .net import handover, notify
from .net.handover import Handover, HandoverError, Inheritance
from .net.sockets import UnixSocket, spoken
from .observe import Telemetry
from .queue import LaneSettings, Queue
from .reload import Prepared, adjust, changed, matched, unchangeable
from .reply import Reply
from .shards import Shard, Shards
from .smtp.server import Rules
from .spool.sqlite import SqliteSpool
from .users import Users

if TYPE_CHECKING:
    from .admin.http import Site

#: Exit code: the spool must be recovered by a new process (sysexits.h: EX_TEMPFAIL).
RECOVER = 75
#: Seconds between looks at the spool's health.
WATCH = 0.25
#: Seconds between looks at the files of certificates.
WATCH_CERTIFICATES = 5.0
#: Seconds beyond its own deadline until a part that a reload put out of use is closed.
LATE = 60.0
#: Objects more than have gone, until the collector looks for cycles among the new ones. Mail makes a few dozen each and none,
#: so that with the usual 700 it looked at what was on its way several times a turn.
YOUNG = 5000
#: Seconds for answers that are still owed when the spool can no longer be trusted.
LAST_ANSWERS = 1.0
#: Descriptors that are not for clients: spool, sinks, log, admin.
RESERVED_DESCRIPTORS = 256

#: Share of ``drain.timeout`` that clients have to finish, after a hand-over, before they hear 421.
FINISH = 1 / 3

#: Said to MAIL, and (a 421) to new connections, while nothing can be kept (reference A1).
NO_ROOM = Reply(452, "4.3.1", "insufficient storage, try again later")
UNHEALTHY = Reply(421, "4.3.2", "not able to take mail now, try again later")

Function = Callable[[Message], Awaitable[Reply | None] | Reply | None]
F = TypeVar("F", bound=Function)
Log = Literal["json", "text", "none"]


@dataclass(slots=True)
class Place:
    """What one of several worker processes is given: its number, how many there are, and the
    listening sockets that the supervisor bound for all, one per ``[[listeners]]`` entry.
    ``handed``: the version before this one may still have our shard."""

    number: int
    workers: int
    sockets: list[socket.socket]
    handed: bool = False


class Gateway:
    """A gateway inside your program::

        app = Gateway(listen="127.0.0.1:2525")

        @app.recipients("*@app.example")
        async def inbound(message: Message) -> Reply | None: ...

        app.run()                 # or: async with app: …

    or one made from a whole Config, to which functions may be added as well. ``run`` brings its
    own event loop and ends with SIGTERM or SIGINT; ``async with`` runs in yours (uvloop or
    asyncio) and ends with the block.

    ``listen``: one address or several, ``host:port``; port 0 is a free one, told by ``port``.
    ``spool``: a folder for mail that was promised and is not yet carried. Without it there is
    a private temporary one: a function acknowledges by returning, so that only mail to several
    functions, of which one took it and another did not, is ever kept there. Where such mail is
    left at the end the folder stays, and the ``stopped`` event names it: give it as ``spool`` to
    go on. ``log``: event lines on standard error.
    """

    def __init__(
        self,
        config: Config | None = None,
        *,
        listen: str | Sequence[str] = (),
        hostname: str | None = None,
        spool: str | Path | None = None,
        log: Log = "none",
        telemetry: Telemetry | None = None,
        place: Place | None = None,
    ) -> None:
        if (config is None) == (not listen):
            raise ValueError("give a config, or an address to listen on")
        if config is not None and (hostname is not None or spool is not None):
            raise ValueError("hostname and spool stand in the config")
        self.telemetry = telemetry or Telemetry(log)
        #: Told with ``ready``.
        self.config_path: str | None = None
        self._given = config
        self._listen = (listen,) if isinstance(listen, str) else tuple(listen)
        self._hostname = hostname
        self._spool_folder = spool
        self._temporary: Path | None = None
        self._functions: list[tuple[RouteConfig, str, PythonConfig]] = []
        self._place = place
        self._state: Literal["new", "starting", "ready", "draining", "stopped"] = "new"
        self._started_at = 0.0
        self._sockets: list[socket.socket] = []
        self._listeners: list[Listener] = []
        #: Not in the file any more, with clients that are not done.
        self._leaving: list[Listener] = []
        self._sinks: dict[str, Sink] = {}
        self._checks: dict[str, Check] = {}
        self._users: Users | None = None
        self._shards: Shards | None = None
        self._intake: MailIntake | None = None
        #: Those of main shards that we had before.
        self._former: list[MailIntake] = []
        self._admission: Admission | None = None
        self._site: Site | None = None
        self._admin: socket.socket | None = None
        self._watcher: asyncio.TimerHandle | None = None
        self._certificate_watcher: asyncio.TimerHandle | None = None
        #: How the files of each listener's certificates were when they were last looked at.
        self._stamps: list[tuple[object, ...]] = []
        self._counts: Mapping[tuple[str, str], tuple[int, float]] = {}
        self._broken: str | None = None
        self._session_ids = SessionIds()
        #: What the old version hands to us; its new version, to which we hand on, while it starts.
        self._inheritance: Inheritance | None = None
        self._offer: Handover | None = None
        self._offering: asyncio.Task[None] | None = None
        self._left = False
        #: What a reload put out of use and what still has work to do; closed in the end at the latest.
        self._retiring: dict[asyncio.Task[None], Callable[[], Coroutine[Any, Any, None]]] = {}
        self._reloading = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        #: Set: end (``run``), and: end at once.
        self._asked = asyncio.Event()
        self._hurry = asyncio.Event()

    # ------------------------------------------------------------ in a program

    def recipients(self, *patterns: str, timeout: float = 30.0, concurrency: int = 64, name: str = "") -> Callable[[F], F]:
        """Mail for these recipients (``name@domain``, ``*@domain``, ``*``) is this function's; the
        first that matches wins, in the order of the program. The client gets 250 when the function
        returns None, or the Reply it returns; 451 when it raises or takes more than ``timeout``
        seconds. ``concurrency``: calls at a time. An async function runs on the loop, a plain one
        in a thread. ``name``: in events and metrics; the function's own unless given."""
        if not patterns:
            raise ValueError("say which recipients")

        def register(function: F) -> F:
            base = name or getattr(function, "__name__", "function")
            known = {sink for _, sink, _ in self._functions}
            sink, number = base, 1
            while sink in known:
                number += 1
                sink = f"{base}-{number}"
            route = RouteConfig(
                recipients=list(patterns), sink=sink, acknowledge="delivered", acknowledge_timeout=timeout, fallback="refuse"
            )
            call = cast(Callable[[Message], Awaitable[Reply | None]], function)
            self._functions.append((route, sink, PythonConfig(function=call, timeout=timeout, concurrency=concurrency)))
            return function

        return register

    def run(self) -> int:
        """Start, stay until SIGTERM or SIGINT, drain. Returns the exit code (see the module).
        Raises ConfigError."""
        import uvloop

        return int(uvloop.run(self.main()))

    async def __aenter__(self) -> Gateway:
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    @property
    def addresses(self) -> list[str]:
        """The real addresses of the listeners, in order."""
        if not self._listeners:
            raise RuntimeError("the gateway is not started")
        return [listener.name for listener in self._listeners]

    @property
    def port(self) -> int:
        """The real port of the first listener that has one. Raises RuntimeError without any."""
        for address in self.addresses:
            if not address.startswith("unix:"):
                return int(address.rpartition(":")[2])
        raise RuntimeError("no listener has a port: all are unix sockets")

    def _composed(self, given: Config | None) -> Config:
        """The Config to go by: what was given, and the functions of the program before it."""
        if not self._functions:
            if given is None:
                raise ConfigError(['routes: no function takes mail; write @app.recipients("*@your.domain") above one'])
            return given
        routes = [route for route, _, _ in self._functions]
        sinks: dict[str, SinkConfig] = {sink: config for _, sink, config in self._functions}
        if given is not None:
            parts = {name: getattr(given, name) for name in Config.model_fields}
            return Config(**parts | {"sinks": given.sinks | sinks, "routes": [*routes, *given.routes]})
        if self._spool_folder is None:
            self._temporary = Path(tempfile.mkdtemp(prefix="gateway-"))
        head: dict[str, Any] = {} if self._hostname is None else {"hostname": self._hostname}
        return Config(
            listeners=[ListenerConfig(address=address) for address in self._listen],
            sinks=sinks,
            routes=routes,
            spool=SpoolConfig(path=Path(self._temporary or self._spool_folder or "")),
            **head,
        )

    # ------------------------------------------------------------------- start

    async def start(self) -> None:
        """Returns when mail is taken. Raises ConfigError; then nothing is left running."""
        if self._state != "new":
            raise RuntimeError("a Gateway starts once")
        self._state = "starting"
        self._started_at = time.time()
        try:
            self.config = self._composed(self._given)
            await self._start(self.config)
        except BaseException:
            await self._close()
            raise

    async def _start(self, config: Config) -> None:
        telemetry, place = self.telemetry, self._place
        self._stamps = stamps(config)
        secured = contexts(config)
        admin = bind_admin(config, self._inheritance) if place is None else None
        if admin is not None:
            self._sockets.append(admin)
        sockets = bind_all(config, self._inheritance) if place is None else place.sockets
        self._sockets += sockets
        shards = self._shards = Shards(
            config.spool.path,
            0 if place is None else place.number,
            1 if place is None else place.workers,
            spool=self._make_spool,
            queue=self._make_queue,
            operations=self._operations,
            whole=lambda: lane_settings(self.config),
            moved=self._moved,
            observer=telemetry,
        )
        try:
            main = await shards.claim(handed=self._inheritance is not None if place is None else place.handed)
        except (SpoolError, OSError) as error:
            raise ConfigError([f"spool.path: {error}"]) from error
        faults: list[str] = []
        await opened_sinks(config, config.sinks, self._sinks, faults)
        made_checks(config, config.checks, self._checks, faults)
        try:
            self._users = Users(config.accounts(), config.authentication)
        except ValueError as error:
            faults.append(f"authentication: {error}")
        if faults:
            raise ConfigError(faults)
        await shards.begin(main)
        self._intake = self._make_intake(main)
        self._admission = Admission(config.limits, descriptors=_descriptors(), workers=1 if place is None else place.workers)
        told = self._rules(config, self._sinks, self._users)
        self._listeners = [self._listener(*parts) for parts in zip(sockets, told, secured, config.listeners, strict=True)]
        self._watch()
        self._watch_certificates()
        for listener in self._listeners:
            listener.start()
            if place is None:
                telemetry.event("listening", address=listener.name, protocol=listener.rules.protocol)
        telemetry.gauge("gateway_connections", lambda: self._admission.count if self._admission else 0)
        telemetry.gauge("gateway_sink_up", self._sinks_up)
        telemetry.gauge("gateway_queue_messages", lambda: {key: rows for key, (rows, _) in self._counts.items()})
        telemetry.gauge("gateway_queue_oldest_seconds", self._oldest)
        telemetry.gauge("gateway_deliveries_out", self._out, ("sink",), "Deliveries that were started and have no result yet")
        telemetry.gauge("gateway_shards", lambda: len(list(shards)), (), "Shards of the spool that are carried, adopted ones among them")
        await shards.answer(main)
        shards.look()
        if admin is not None:
            # The import takes longer than all the rest, and clients are being served already.
            site = await asyncio.to_thread(_site)
            self._admin = admin
            self._site = site(admin, self)
            await self._site.open()
            telemetry.event("listening", address=spoken(admin.getsockname()), protocol="http")
        self._state = "ready"
        if place is None:
            telemetry.event("ready", **({"config": self.config_path} if self.config_path else {}))

    def _make_spool(self, folder: Path) -> SqliteSpool:
        return SqliteSpool(folder, observer=self.telemetry, minimum_free=least_room(self.config, folder), on_fatal=self._fatal)

    def _make_queue(self, spool: SqliteSpool) -> tuple[Queue, dict[str, LaneSettings]]:
        config = self.config
        lanes = lane_settings(config)
        queue = Queue(
            spool,
            self._sinks,
            lanes,
            retry=config.retry.delays,
            expire=config.retry.expire,
            hold=config.spool.hold,
            bounces=None if config.bounces is None else config.bounces.sink,
            hostname=config.hostname,
            observer=self.telemetry,
            new_id=new_id,
        )
        return queue, lanes

    def _make_intake(self, shard: Shard) -> MailIntake:
        config = self.config
        assert shard.queue is not None
        return MailIntake(
            shard.queue,
            shard.spool,
            self._checks,
            hostname=config.hostname,
            expire=config.retry.expire,
            observer=self.telemetry,
            memory=config.limits.memory,
        )

    def _moved(self, old: Shard, new: Shard) -> None:
        """Mail that begins now goes to the new shard; mail that has begun ends in the old one."""
        intake = self._intake
        assert intake is not None
        self._former.append(intake)
        self._intake = self._make_intake(new)
        listeners = (*self._listeners, *self._leaving)
        within = {connection for listener in listeners for connection in listener.connections}
        for listener in listeners:
            listener.intake = self._intake
        # Of these listeners, also where a reload takes them out of the file meanwhile.
        old.entered = lambda: intake.owed > 0 or any(within & listener.connections for listener in listeners)

    def _rules(self, config: Config, sinks: Mapping[str, Sink], users: Users | None) -> list[Rules]:
        """What each listener's sessions go by."""
        table = config.table()
        binary = all(sinks[name].carries_binary for name in table.sinks())
        mechanisms = users.mechanisms if users is not None else ()
        return [rules(config, listener, table, mechanisms, binarymime=binary) for listener in config.listeners]

    def _listener(self, sock: socket.socket, rules: Rules, context: ssl.SSLContext | None, entry: ListenerConfig) -> Listener:
        assert self._intake is not None
        assert self._admission is not None
        return Listener(
            sock,
            rules,
            self._intake,
            observer=self.telemetry,
            admission=self._admission,
            session_ids=self._session_ids,
            shared=self._place is not None,
            lent=entry.address.startswith("fd:"),
            door=door(entry),
            context=context,
            authenticator=self._users,
        )

    # --------------------------------------------------------------- the watch

    def _watch(self) -> None:
        """While the spool cannot keep mail, none is taken. Asking costs nothing."""
        self._watcher = asyncio.get_running_loop().call_later(WATCH, self._watch)
        self._tell_shortage()

    def _tell_shortage(self) -> None:
        spool = self._spool
        reason = spool.unhealthy
        for listener in self._listeners:
            listener.rules.shortage = None if reason is None else NO_ROOM if reason == spool.shortage else UNHEALTHY

    @property
    def _spool(self) -> SqliteSpool:
        """Where new mail goes."""
        assert self._shards is not None
        assert self._shards.main is not None
        return self._shards.main.spool

    def _queues(self) -> list[Queue]:
        return [shard.queue for shard in self._shards or () if shard.queue is not None]

    def _fatal(self, reason: str) -> None:
        """Nobody knows what the spool holds: a new process must find out."""
        self._broken = reason
        self._asked.set()

    # ------------------------------------------------------------------ reload

    async def reload(self, given: Config) -> None:
        """Go by this Config from now on, for clients that are in as well. Raises ConfigError, and changes
        nothing, where it cannot be put to work, or differs in what only another process can change."""
        async with self._reloading:
            ready = await self.prepare(given)
            if self.ending:
                await ready.close()
                raise ConfigError(["the gateway is about to end"])
            self.commit(ready)

    @property
    def ending(self) -> bool:
        """The end was asked for: nothing new may be put in place."""
        return self._asked.is_set() or self._state in ("draining", "stopped")

    async def prepare(self, given: Config, sockets: Mapping[int, socket.socket] | None = None) -> Prepared:
        """Everything that this Config needs and we do not have, ready for ``commit``. ``sockets``: of its
        new listeners, by number, where they are not ours to bind. Raises ConfigError."""
        config, old = self._composed(given), self.config
        ready = Prepared(config, matched(old.listeners, config.listeners), dict(sockets or {}))
        try:
            if self._state != "ready" or self.ending:
                raise ConfigError([f"the gateway is {'about to end' if self._state == 'ready' else self._state}"])
            if faults := unchangeable(old, config):
                raise ConfigError(faults)
            ready.stamps = stamps(config)
            ready.contexts = contexts(config)
            ready.accounts = config.accounts()
            ready.users = self._users
            if config.authentication != old.authentication:
                try:
                    lockout = None if self._users is None else self._users.lockout
                    ready.users = Users(ready.accounts, config.authentication, lockout=lockout)
                    ready.made_users = True
                except ValueError as error:
                    faults.append(f"authentication: {error}")
            await opened_sinks(config, changed(old, config, "sinks"), ready.made_sinks, faults)
            made_checks(config, changed(old, config, "checks"), ready.made_checks, faults)
            if faults:
                raise ConfigError(faults)
            ready.sinks = {name: ready.made_sinks.get(name) or self._sinks[name] for name in config.sinks}
            ready.checks = {name: ready.made_checks.get(name) or self._checks[name] for name in config.checks}
            ready.rules = self._rules(config, ready.sinks, ready.users)
            if sockets is None:
                ready.sockets = bind_some(config, [number for number, kept in enumerate(ready.kept) if kept is None])
        except BaseException:
            await ready.close()
            raise
        return ready

    def commit(self, ready: Prepared) -> None:
        """Put it in place: in one turn of the loop, all of it."""
        config, old = ready.config, self.config
        self.config = config
        self._stamps = ready.stamps
        self._change_users(ready)
        self._change_sinks(ready, old)
        self._change_listeners(ready, old)
        self.telemetry.event("reloaded")

    def _change_users(self, ready: Prepared) -> None:
        if ready.made_users:
            if self._users is not None:
                self._retire(self._users.close, LATE)
            self._users = ready.users
        elif self._users is not None:
            self._users.go_by(ready.accounts)
            # What is offered follows from who there is.
            ready.rules = self._rules(ready.config, ready.sinks, self._users)

    def _change_sinks(self, ready: Prepared, old: Config) -> None:
        config = ready.config
        for name, sink in self._sinks.items():
            if ready.sinks.get(name) is not sink:
                # By then every delivery that it has is over: a relay gives a second more for every 64 KiB.
                self._retire(sink.close, old.sinks[name].timeout + old.limits.message_size / 65536 + LATE)
        self._sinks = ready.sinks
        for shard in self._shards or ():
            if shard.queue is not None:
                shard.lanes = lane_settings(config)
                shard.queue.go_by(
                    ready.sinks,
                    shard.lanes,
                    retry=config.retry.delays,
                    expire=config.retry.expire,
                    hold=config.spool.hold,
                    bounces=None if config.bounces is None else config.bounces.sink,
                    hostname=config.hostname,
                )
        if self._shards is not None:
            self._shards.deal()
        for name, check in self._checks.items():
            if ready.checks.get(name) is not check:
                self._retire(check.close, LATE)
        # Mail that is under way may ask a check that is not in the file any more.
        self._checks = {**self._checks, **ready.checks}
        for intake in (*self._former, *([self._intake] if self._intake is not None else [])):
            intake.go_by(self._checks, hostname=config.hostname, expire=config.retry.expire, memory=config.limits.memory)
        self._checks = ready.checks

    def _change_listeners(self, ready: Prepared, old: Config) -> None:
        config = ready.config
        if self._admission is not None:
            self._admission.limits = config.limits
        before, self._listeners = self._listeners, []
        for number, (kept, entry) in enumerate(zip(ready.kept, config.listeners, strict=True)):
            rules, context = ready.rules[number], ready.contexts[number]
            if kept is None:
                sock = ready.sockets[number]
                self._sockets.append(sock)
                listener = self._listener(sock, rules, context, entry)
                listener.start()
                if self._place is None:
                    self.telemetry.event("listening", address=listener.name, protocol=entry.protocol)
            else:
                listener = before[kept]
                listener.authenticator = self._users
                listener.go_by(rules, door(entry), context=context)
                if self._place is None:
                    adjust(old.listeners[kept], entry)
            self._listeners.append(listener)
        self._tell_shortage()
        for place, listener in enumerate(before):
            if place not in ready.kept:
                self._dismiss(listener)

    def _dismiss(self, listener: Listener) -> None:
        """This listener is not in the file any more: who waits to be let in hears it, too."""
        self.telemetry.event("closed", address=listener.name)
        listener.drain(alone=True)
        if listener.sock in self._sockets:
            self._sockets.remove(listener.sock)
        self._leaving.append(listener)

        async def close() -> None:
            listener.close()
            self._leaving.remove(listener)

        self._retire(close, self.config.drain.timeout, listener.gone)

    def _retire(
        self,
        close: Callable[[], Coroutine[Any, Any, None]],
        patience: float,
        over: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        """Close this once its work is ``over``, and after so many seconds at the latest."""

        async def wait() -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await (asyncio.Event().wait() if over is None else over())
            self._retiring.pop(task, None)
            await self._safely(close())

        task = asyncio.get_running_loop().create_task(wait())
        self._retiring[task] = close

    def _watch_certificates(self) -> None:
        """Files of certificates that were replaced are taken at once, without being asked. Where they
        do not fit together (one of two was written so far) the old ones stay, until more changes."""
        self._certificate_watcher = asyncio.get_running_loop().call_later(WATCH_CERTIFICATES, self._watch_certificates)
        found = stamps(self.config)
        if found == self._stamps:
            return
        self._stamps = found
        try:
            secured = contexts(self.config)
        except ConfigError as error:
            self.telemetry.event("certificates_refused", faults=error.faults)
            return
        for listener, context in zip(self._listeners, secured, strict=True):
            listener.context = context
        self.telemetry.event("certificates_reloaded")

    def _reload(self) -> None:
        """SIGHUP: the file again, if there is one. A worker waits for its supervisor's word."""
        if self._place is None and self._given is not None:
            task = asyncio.get_running_loop().create_task(self._read_again(self._given))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _read_again(self, given: Config) -> None:
        notify.reloading()
        try:
            await self.reload(given.reload())
        except ConfigError as error:
            self.telemetry.event("reload_refused", faults=error.faults)
        except Exception as error:
            self._bug(f"reload: {error!r}", error)
        notify.ready()

    # --------------------------------------------------------------- hand-over

    def _hand_over(self) -> None:
        """SIGUSR2: start the new version; it takes our place, or we stay and say why."""
        if self._state == "ready" and self._offering is None and not self._asked.is_set():
            self._offering = asyncio.get_running_loop().create_task(self._give())

    async def _give(self) -> None:
        self.telemetry.event("handing_over")
        try:
            # A reload meanwhile would change what was handed on.
            async with self._reloading:
                self._offer = Handover(named(self.config, [listener.sock for listener in self._listeners], self._admin))
                pid = await self._offer.make()
                notify.notify(f"MAINPID={pid}")
                self.telemetry.event("handed_over", pid=pid)
                self.leave()
        except HandoverError as error:
            self.telemetry.event("handover_refused", faults=error.faults)
        finally:
            self._offering = None

    def leave(self) -> None:
        """Another process takes connections from our sockets now: end without a word to who waits there."""
        self._left = True
        for sock in self._sockets:
            if isinstance(sock, UnixSocket):
                sock.leave()
        self._asked.set()

    # --------------------------------------------------------------------- end

    async def stop(self) -> None:
        """Take no more; wait, at most ``drain.timeout`` seconds, for what is under way; close."""
        if self._state == "ready":
            self._state = "draining"
            self.telemetry.event("draining")
            await self._drain()
        await self._close()

    async def _drain(self) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (LAST_ANSWERS if self._broken is not None else self.config.drain.timeout)
        if self._left:
            for listener in self._listeners:
                listener.stop()
            if self._site is not None:
                await self._safely(self._site.close())
            finishing = asyncio.gather(*(listener.gone() for listener in self._listeners))
            await self._unless_hurried(finishing, loop.time() + FINISH * (deadline - loop.time()))
        for listener in self._listeners:
            listener.drain()
        await self._unless_hurried(asyncio.gather(*(listener.gone() for listener in self._listeners)), deadline)
        for listener in self._listeners:
            listener.close()
        if self._shards is not None:
            await self._shards.stay()
        patience = max(deadline - loop.time(), 0.0)
        await self._unless_hurried(asyncio.gather(*(queue.close(patience) for queue in self._queues())), deadline + 1.0)

    async def _unless_hurried(self, work: Awaitable[Any], deadline: float) -> None:
        """Wait for this until the deadline (loop time), or until somebody wants the end at once."""
        wanted = asyncio.ensure_future(work)
        hurried = asyncio.ensure_future(self._hurry.wait())
        loop = asyncio.get_running_loop()
        await asyncio.wait({wanted, hurried}, timeout=max(deadline - loop.time(), 0.0), return_when=asyncio.FIRST_COMPLETED)
        for task in (wanted, hurried):
            task.cancel()
        await asyncio.gather(wanted, hurried, return_exceptions=True)

    async def _close(self) -> None:
        """Everything down, in order, however far the start came."""
        if self._state == "stopped":
            return
        started = self._state == "draining"
        self._state = "stopped"
        for listener in (*self._listeners, *self._leaving):
            listener.close()
        for timer in (self._watcher, self._certificate_watcher):
            if timer is not None:
                timer.cancel()
        left = 0
        # What is still out at a sink is deferred, and the spool is told: in this order.
        if self._shards is not None:
            await self._safely(self._shards.stay())
        for queue in self._queues():
            await self._safely(queue.close())
        retiring, self._retiring = self._retiring, {}
        for task, close in retiring.items():
            task.cancel()
            await self._safely(close())
        for sink in self._sinks.values():
            await self._safely(sink.close())
        for intake in (*self._former, *([self._intake] if self._intake is not None else [])):
            await self._safely(intake.close())
        for check in self._checks.values():
            await self._safely(check.close())
        for part in (self._users, self._site):
            if part is not None:
                await self._safely(part.close())
        for shard in self._shards or ():
            if shard.control is not None:
                await self._safely(shard.control.close())
            await self._safely(shard.spool.close())
            left += sum(rows for rows, _ in shard.spool.left.values())
        for sock in self._sockets:
            sock.close()
        kept = self._put_away(left)
        if started:
            self.telemetry.event("stopped", queued=left, **({"spool": str(kept)} if kept else {}), **self._reason())
        self.telemetry.flush()

    def _reason(self) -> dict[str, str]:
        return {} if self._broken is None else {"reason": f"the spool must be recovered: {self._broken}"}

    def _put_away(self, left: int) -> Path | None:
        """Remove the temporary spool, unless it holds mail; then it is told."""
        if self._temporary is None:
            return None
        if left or self._broken is not None:
            logging.getLogger("gateway").warning("%d messages were not carried; they are kept in %s", left, self._temporary)
            return self._temporary
        import shutil

        shutil.rmtree(self._temporary, ignore_errors=True)
        return None

    async def _safely(self, work: Coroutine[Any, Any, None]) -> None:
        """A part that cannot close must not keep the others open."""
        try:
            await work
        except Exception as error:
            self._bug(f"closing: {error!r}", error)

    def _bug(self, message: str, error: BaseException | None) -> None:
        trace = "" if error is None else "".join(traceback.format_exception(error))
        self.telemetry.event("bug", message=message, traceback=trace)

    # ---------------------------------------------------------- a whole process

    async def main(self, ready: Callable[[], None] = lambda: None) -> int:
        """The life of a process that does nothing else, on its own loop; ``ready`` is called once
        mail is taken. Returns the exit code."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._unexpected)
        loop.add_signal_handler(signal.SIGTERM, self.ask_to_stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        if self._place is None:
            loop.add_signal_handler(signal.SIGINT, self.ask_to_stop)
            loop.add_signal_handler(signal.SIGUSR2, self._hand_over)
            self._inheritance = _inherited()
        try:
            await self.start()
        except ConfigError as error:
            handover.refuse(error.faults)
            raise
        ready()
        if self._place is None:
            if self._inheritance is not None:
                self._inheritance.ready()
            notify.ready()
        # What is there now stays: the collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(YOUNG)
        await self._asked.wait()
        if self._offering is not None:
            self._offering.cancel()
            if self._offer is not None:
                await self._offer.recall()
        if self._place is None and not self._left:
            notify.stopping()
        await self.stop()
        return 0 if self._broken is None else RECOVER

    def ask_to_stop(self) -> None:
        """Drain and end; asked again: end at once."""
        if self._asked.is_set():
            self._hurry.set()
        self._asked.set()

    def _unexpected(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        message = str(context.get("message", "unexpected"))
        self._bug(message if error is None else f"{message}: {error!r}", error)

    # ------------------------------------------------------------ what it tells

    async def metrics(self) -> bytes:
        """The text form of Prometheus."""
        await self._count()
        return expose([self.telemetry.state()])

    async def unready(self) -> str | None:
        """Why no new mail should be sent here; None if it is welcome."""
        if self._state != "ready":
            return self._state
        return self._spool.unhealthy

    async def status(self) -> dict[str, Any]:
        await self._count()
        queued: dict[str, dict[str, int]] = {}
        for (sink, state), (rows, _) in self._counts.items():
            queued.setdefault(sink, {})[state] = rows
        return {
            "version": __version__,
            "pid": os.getpid(),
            "state": self._state,
            "unready": await self.unready(),
            "uptime": round(time.time() - self._started_at, 3),
            "listeners": self.addresses,
            "connections": self._admission.count if self._admission else 0,
            "shards": sorted(shard.number for shard in self._shards or ()),
            "sinks": self._health(),
            "queue": queued,
        }

    async def _count(self) -> None:
        if self._shards is not None:
            self._counts = await self._shards.counts()

    def _health(self) -> dict[str, str]:
        """Of the main shard's lanes: the others ask the same sinks."""
        return self._shards.main.queue.health() if self._shards and self._shards.main and self._shards.main.queue else {}

    def _sinks_up(self) -> dict[tuple[str, ...], float]:
        return {(name,): float(health == "up") for name, health in self._health().items()}

    def _out(self) -> dict[tuple[str, ...], float]:
        return {(name,): float(out) for name, out in self._shards.out().items()} if self._shards else {}

    def _oldest(self) -> dict[tuple[str, ...], float]:
        now = time.time()
        ages: dict[tuple[str, ...], float] = {(name,): 0.0 for name in self._sinks}
        for (sink, state), (_, since) in self._counts.items():
            if state == "queued":
                ages[(sink,)] = max(now - since, 0.0)
        return ages

    async def asked(self, op: str) -> Any:
        """``"metrics"`` or ``"status"``, for the supervisor."""
        if op == "status":
            return await self.status()
        await self._count()
        return self.telemetry.state()

    def _operations(self, shard: Shard) -> Mapping[str, Operation]:
        """What the control socket of a shard is asked (see ``admin/control.py``)."""
        spool, queue = shard.spool, shard.queue
        assert queue is not None

        async def change(**what: Any) -> int:
            changed = await spool.change(**what, now=queue.clock())
            sink = what.get("sink")
            again = what.get("action") == "retry"
            # "Now, please" also ends a pause, but only of a sink that it names.
            resume = again and sink is not None
            if changed or resume:
                queue.kick(sink, probe=again, resume=resume)
            return changed

        async def export(message_id: str) -> str:
            return base64.b64encode(await spool.export(message_id)).decode()

        async def counts() -> list[tuple[str, str, int, float]]:
            return [(sink, state, rows, oldest) for (sink, state), (rows, oldest) in (await spool.counts()).items()]

        return {
            "rows": spool.rows,
            "change": change,
            "export": export,
            "counts": counts,
            "metrics": partial(self.asked, "metrics"),
            "status": self.status,
        }


def serve(config: Config, *, log: Log = "json", config_path: str | None = None) -> int:
    """``gateway serve``: blocks until the gateway ends; returns the exit code (see the module).
    Raises ConfigError. ``config_path``: told in the event log; SIGHUP reads what ``config`` was read from."""
    # Until we can hand over it must not end us.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    _claim_descriptors(config.limits.connections + 2 * RESERVED_DESCRIPTORS)
    if config.worker_count > 1:
        from . import supervisor

        return supervisor.serve(config, log=log, config_path=config_path)
    telemetry = Telemetry(log)
    gateway = Gateway(config, telemetry=telemetry)
    gateway.config_path = config_path
    try:
        return gateway.run()
    finally:
        telemetry.close()


def _inherited() -> Inheritance | None:
    """Raises ConfigError."""
    try:
        return handover.inherited()
    except HandoverError as error:
        raise ConfigError(error.faults) from None


def _site() -> type[Site]:
    from .admin.http import Site

    # What the first scrape needs.
    import_module("prometheus_client.exposition")

    return Site


def _claim_descriptors(wanted: int) -> None:
    """As many descriptors as connections may need, as far as the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _descriptors() -> int | None:
    """Descriptors that are left for clients; None: no end of them."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else max(soft - RESERVED_DESCRIPTORS, soft // 2)
