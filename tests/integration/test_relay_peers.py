"""The relay and lmtp sinks toward servers of others: smtp-sink, which fails on demand at every command, and
aiosmtpd, which offers neither PIPELINING nor CHUNKING but TLS and AUTH."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trustme
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

from ..servers import PATIENCE, Upstream, program, smtp_sink, without_trace
from ..unit.test_relay import CONTENT, carry, message, on_both_loops, states, to

smtp_sink_only = pytest.mark.skipif(program("smtp-sink") is None, reason="smtp-sink is not installed")

#: Long enough for a peer that is held up: none of these is silent.
toward = partial(to, timeout=PATIENCE)

# --------------------------------------------------------------------- smtp-sink


@smtp_sink_only
@pytest.mark.parametrize(
    ("options", "state", "down"),
    [
        ([], "delivered", False),
        (["-p"], "delivered", False),
        (["-e"], "delivered", False),
        (["-P"], "delivered", False),
        (["-8", "-N", "-E"], "delivered", False),
        (["-f", "EHLO"], "delivered", False),
        (["-f", "CONNECT"], "deferred", True),
        (["-f", "EHLO,HELO"], "deferred", True),
        (["-f", "MAIL"], "failed", False),
        (["-f", "RCPT"], "failed", False),
        (["-f", "DATA"], "failed", False),
        (["-f", "."], "failed", False),
        (["-r", "CONNECT"], "deferred", True),
        (["-r", "EHLO"], "deferred", True),
        (["-r", "MAIL"], "deferred", False),
        (["-r", "RCPT"], "deferred", False),
        (["-r", "DATA"], "deferred", False),
        (["-r", "."], "deferred", False),
        (["-q", "CONNECT"], "deferred", True),
        (["-q", "EHLO"], "deferred", True),
        (["-q", "MAIL"], "deferred", True),
        (["-q", "RCPT"], "deferred", False),
        (["-q", "DATA"], "deferred", False),
        (["-q", "."], "deferred", False),
        (["-Q", "CONNECT"], "deferred", True),
        (["-Q", "EHLO"], "deferred", True),
        (["-Q", "MAIL"], "deferred", False),
        (["-Q", "RCPT"], "deferred", False),
        (["-Q", "DATA"], "deferred", False),
        (["-Q", "."], "deferred", False),
    ],
    ids=lambda value: " ".join(value) or "all is well" if isinstance(value, list) else "",
)
async def test_smtp_sink_fails_where_it_is_told_to(tmp_path: Path, options: list[str], state: str, down: bool) -> None:
    with smtp_sink(tmp_path / "sink", *options) as server:
        async with toward(server.address) as sink:
            for _ in range(2):
                (outcome,) = await carry(sink)
                assert outcome.state == state
                assert outcome.down == down
                assert outcome.remote == server.address
        if state == "delivered":
            assert [without_trace(content.replace(b"\n", b"\r\n")) for content in server.wait(2)] == [CONTENT] * 2


@smtp_sink_only
async def test_smtp_sink_that_refuses_before_the_content_came(tmp_path: Path) -> None:
    """Its 550 comes with the 354 (then it answers nothing, and is not believed) or behind the content."""
    with smtp_sink(tmp_path / "sink", "-A", "0") as server:
        async with to(server.address) as sink:
            for _ in range(5):
                (outcome,) = await carry(sink)
                assert outcome.state in ("failed", "deferred")


@smtp_sink_only
async def test_smtp_sink_as_a_mail_store(tmp_path: Path) -> None:
    with smtp_sink(tmp_path / "sink", "-L") as server:
        async with toward(server.address, lmtp=True) as sink:
            for _ in range(2):
                assert states(await carry(sink, message("b@y.example", "c@y.example"))) == ["delivered"] * 2


@smtp_sink_only
async def test_a_thousand_over_twenty_connections(tmp_path: Path) -> None:
    with smtp_sink(tmp_path / "sink") as server, Upstream() as other:
        async with toward(server.address, other.address) as sink:

            async def one_after_the_other(worker: int) -> None:
                for number in range(50):
                    assert states(await carry(sink, message(sender=f"m{worker}-{number}@x.example"))) == ["delivered"]

            await asyncio.gather(*(one_after_the_other(worker) for worker in range(20)))
            assert len(sink._connections) == 20
        assert len(list(server.folder.iterdir())) + len(other.taken) == 1000


# ---------------------------------------------------------------------- aiosmtpd


class Store:
    """Keeps what aiosmtpd read."""

    def __init__(self) -> None:
        self.taken: list[Envelope] = []
        self.tls: list[bool] = []
        self.refuse = "550 5.1.1 nobody"

    async def handle_RCPT(self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]) -> str:  # noqa: N802
        if address.startswith("no@"):
            return self.refuse
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 ok"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        self.taken.append(envelope)
        self.tls.append(session.ssl is not None)
        return "250 2.0.0 kept"


@contextmanager
def aiosmtpd(store: Store, **settings: Any) -> Iterator[str]:
    class Bound(Controller):
        """On a port of the system's choice; aiosmtpd itself can only be told one."""

        def _create_server(self) -> Any:
            return self.loop.create_server(self._factory_invoker, host="127.0.0.1", port=0)

        def _trigger_server(self) -> None:
            assert isinstance(self.server, asyncio.base_events.Server)
            self.port = self.server.sockets[0].getsockname()[1]
            super()._trigger_server()  # type: ignore[no-untyped-call]

    controller = Bound(store, hostname="127.0.0.1", **settings)
    controller.start()
    try:
        yield f"127.0.0.1:{controller.port}"
    finally:
        controller.stop()


@on_both_loops
async def test_aiosmtpd_takes_one_command_at_a_time() -> None:
    store = Store()
    with aiosmtpd(store, enable_SMTPUTF8=True) as address:
        async with toward(address) as sink:
            outcomes = await carry(sink, message("b@y.example", "no@y.example", "c@y.example"))
            assert states(outcomes) == ["delivered", "failed", "delivered"]
            assert states(await carry(sink, message("grüße@y.example", content="Hällo\r\n".encode(), sender="é@x.example"))) == [
                "delivered"
            ]
    first, second = store.taken
    assert first.rcpt_tos == ["b@y.example", "c@y.example"]
    assert first.original_content == message().trace + CONTENT
    assert (second.mail_from, second.rcpt_tos) == ("é@x.example", ["grüße@y.example"])
    assert second.original_content == message().trace + "Hällo\r\n".encode()


@on_both_loops
async def test_aiosmtpd_with_tls_and_a_login(tmp_path: Path) -> None:
    authority = trustme.CA()
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)

    def judge(server: SMTP, session: Session, envelope: Envelope, mechanism: str, data: Any) -> AuthResult:
        assert isinstance(data, LoginPassword)
        return AuthResult(success=(data.login, data.password) == (b"user", b"pass"), handled=False)

    store = Store()
    with aiosmtpd(store, tls_context=context, require_starttls=True, authenticator=judge, auth_required=True) as address:
        async with toward(address, tls="verify", ca_file=ca_file, username="user", password="pass") as sink:
            for _ in range(2):
                assert states(await carry(sink)) == ["delivered"]
        async with toward(address, tls="verify", ca_file=ca_file, username="user", password="wrong") as sink:
            (outcome,) = await carry(sink)
            assert (outcome.state, outcome.down) == ("deferred", True)
            assert "535 5.7.8" in outcome.reply.text
        # What the server would say to mail without TLS or login is nothing to bounce mail for.
        for tls in ("off", "required"):
            async with toward(address, tls=tls) as sink:
                (outcome,) = await carry(sink)
                assert (outcome.state, outcome.down) == ("deferred", True)
    assert store.tls == [True, True]
