"""Every transcript over a socket, against the whole gateway: listener, session, intake, queue, spool, sink.

One gateway for each kind of listener that the transcripts ask for, in this process on a thread
of its own; its sink is a function that notes what it gets. Each dialogue runs whole, and cut in
ways that are the same every time."""

from __future__ import annotations

import asyncio
import random
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import fields, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Self

import pytest
import trustme
import uvloop

from gateway import Gateway, Message, Reply
from gateway.config import (
    Authentication,
    Bounces,
    Config,
    DiscardConfig,
    ExtensionsConfig,
    Limits,
    ListenerConfig,
    PythonConfig,
    RelayConfig,
    RouteConfig,
    SpoolConfig,
)
from gateway.observe import Telemetry
from gateway.smtp.lockout import Lockout

from ..dialogue import (
    CERTIFICATES,
    EXTENSIONS,
    HOSTNAME,
    MECHANISMS,
    SENDERS,
    USERS,
    Case,
    Mail,
    Settings,
    at_random,
    byte_by_byte,
    cases,
    run_live,
    whole,
)
from ..servers import PATIENCE, Upstream, wait_until, without_trace

CASES = [case for case in cases() if not case.only_here]
#: Octets of a dialogue up to which it is also sent byte by byte.
SMALL = 600
RANDOM_CUTS = 3


class Noticing(Telemetry):
    """Keeps what the gateway calls a bug."""

    def __init__(self) -> None:
        super().__init__(log="none")
        self.bugs: list[dict[str, Any]] = []

    def tell(self, event: str, fields: dict[str, Any]) -> None:
        if event == "bug":
            self.bugs.append(fields)
        super().tell(event, fields)


class House:
    """A gateway that is set up as a dialogue's settings say."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.mails: list[Mail] = []
        self.answers: Iterator[Reply] = iter(())
        self.telemetry = Noticing()
        self._upstream = Upstream()
        self._settings = settings
        self._certificate: Path | None = None
        self._folder = folder
        self._port: Future[int] = Future()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)

    @property
    def port(self) -> int:
        return self._port.result(PATIENCE)

    def config(self) -> Config:
        settings = self._settings
        # An answer other than 250 can only come from a sink that is waited for.
        mixed = any(route.acknowledge == "delivered" for route in settings.routes)
        routes = [
            RouteConfig(
                recipients=list(route.recipients),
                sink="out" if route.relays else "app",
                acknowledge=route.acknowledge if mixed else "delivered",
                clients=list(route.clients) if route.clients else [ip_network("127.0.0.0/8")] if route.relays else None,
                authenticated=route.authenticated,
            )
            for route in settings.routes
        ]
        sinks: dict[str, Any] = {"app": PythonConfig(function=self._take, concurrency=1)}
        if settings.dsn:
            sinks["nowhere"] = DiscardConfig()
        if not settings.binarymime or any(route.relays for route in settings.routes):
            sinks["out"] = RelayConfig(hosts=[self._upstream.address], tls="off", binarymime=settings.binarymime, on_failure="dead_letter")
            routes.append(RouteConfig(recipients=["nobody@relay.invalid"], sink="out"))
        limits = {name: field.default for name, field in Limits.model_fields.items()}
        certified: dict[str, Any] = {}
        if settings.tls != "off":
            pair = trustme.CA().issue_cert(HOSTNAME)
            certified = {"certificate": self._folder / "certificate.pem", "key": self._folder / "key.pem"}
            pair.cert_chain_pems[0].write_to_path(certified["certificate"])
            pair.private_key_pem.write_to_path(certified["key"])
        if settings.certificate_identity != "off":
            certified |= {"client_ca": self._folder / "ca.pem", "certificate_identity": settings.certificate_identity}
            authority = trustme.CA()
            authority.cert_pem.write_to_path(certified["client_ca"])
            self._certificate = self._folder / "alice.pem"
            authority.issue_cert("alice.example").private_key_and_cert_chain_pem.write_to_path(str(self._certificate))
        limits |= {field.name: getattr(settings, field.name) for field in fields(settings) if field.name in limits}
        return Config(
            hostname=HOSTNAME,
            listeners=[
                ListenerConfig(
                    address="127.0.0.1:0",
                    protocol=settings.protocol,
                    long_lines=settings.long_lines,
                    bare_newlines=settings.bare_newlines,
                    xclient_from=[ip_network("127.0.0.0/8")] if settings.xclient else [],
                    tls=settings.tls,
                    **certified,
                    auth=settings.auth,
                    auth_without_tls=settings.auth_without_tls,
                )
            ],
            users=USERS,
            senders=SENDERS if settings.senders else {},
            client_certificates=CERTIFICATES,
            authentication=Authentication(mechanisms=MECHANISMS),
            # Dialogues that want these have a clock of their own (see _live).
            extensions=ExtensionsConfig(hold_limit=0.0, deliver_by=None, priorities="off"),
            # Some dialogues want smaller limits than an operator may set.
            limits=Limits.model_construct(**limits),
            spool=SpoolConfig(path=self._folder),
            sinks=sinks,
            routes=routes,
            bounces=Bounces(sink="nowhere") if settings.dsn else None,
        )

    async def _take(self, message: Message) -> Reply | None:
        answer = next(self.answers, None)
        if answer is None or answer.positive:
            envelope = message.envelope
            self.mails.append(Mail(envelope.mail_from, tuple(one.address for one in envelope.recipients), message.content))
        return answer

    def _live(self) -> None:
        async def live() -> None:
            try:
                async with Gateway(self.config(), telemetry=self.telemetry) as gateway:
                    if self._settings.extensions:
                        gateway._listeners[0].rules.extensions = EXTENSIONS
                    self._gateway = gateway
                    self._loop = asyncio.get_running_loop()
                    self._port.set_result(gateway.port)
                    await self._over.wait()
            except BaseException as error:
                if self._port.done():
                    raise
                self._port.set_exception(error)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(live())

    def play(self, case: Case, cut: Any) -> None:
        self.mails.clear()
        self._upstream.taken.clear()
        self.answers = iter(case.answers)
        # Each dialogue is the first of its client: failed logins of others are not its own.
        assert self._gateway._users is not None
        self._gateway._users.lockout = Lockout()

        def accepted() -> list[Mail]:
            wait_until(lambda: len(self.mails) + len(self._upstream.taken) >= len(case.accepted), f"the mails of {case.name}")
            relayed = [
                Mail(
                    taken.mail.partition(">")[0].lstrip("<"),
                    tuple(line.partition(">")[0].lstrip("<") for line in taken.recipients),
                    without_trace(taken.content),
                )
                for taken in self._upstream.taken
            ]
            return self.mails + relayed

        run_live(self.worded(case), "127.0.0.1", self.port, cut, accepted=accepted, certificate=self._certificate)
        assert not self.telemetry.bugs, self.telemetry.bugs

    @staticmethod
    def worded(case: Case) -> Case:
        """The same, but for the text of an acceptance: the whole gateway names an id there."""
        groups = [
            replace(group, expected=[["250 2.0.0 accepted*"] if reply == ["250 2.0.0 accepted"] else reply for reply in group.expected])
            for group in case.groups
        ]
        return replace(case, groups=groups)

    def __enter__(self) -> Self:
        self._upstream.__enter__()
        self._thread.start()
        assert self.port
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(PATIENCE)
        self._upstream.__exit__()
        assert not self._thread.is_alive(), "the gateway did not end"


@pytest.fixture(scope="module")
def houses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Settings, House]]:
    running: dict[Settings, House] = {}

    class Houses(dict[Settings, House]):
        def __missing__(self, settings: Settings) -> House:
            running[settings] = self[settings] = House(settings, tmp_path_factory.mktemp("house")).__enter__()
            return self[settings]

    yield Houses()
    for house in running.values():
        house.__exit__()


def slow(case: Case) -> list[pytest.MarkDecorator]:
    """The tarpit takes a second for each reply it holds back."""
    return [pytest.mark.long] if case.tarpit else []


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=slow(case)) for case in CASES])
def test_dialogue(case: Case, houses: dict[Settings, House]) -> None:
    house = houses[case.settings]
    house.play(case, whole)
    if case.tarpit:
        return
    if case.size <= SMALL:
        house.play(case, byte_by_byte)
    chance = random.Random(zlib.crc32(case.name.encode()))
    for _ in range(RANDOM_CUTS):
        house.play(case, at_random(chance))


def test_there_are_dialogues() -> None:
    assert len(CASES) > 50
