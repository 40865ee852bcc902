"""Mail with REQUIRETLS on its way out (RFC 8689 §4.2.1, §5): what a relay asks of its upstream, what a webhook
must be, what a report may hold, and that nothing of it is ever seen in clear."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme
from click.testing import CliRunner

from gateway.cli import cli
from gateway.config import Config, WebhookConfig
from gateway.contracts import Delivery, Outcome
from gateway.message import Client, Content, Envelope, Message, Recipient
from gateway.queue import LaneSettings
from gateway.reply import Reply
from gateway.route import Route, Routes
from gateway.sinks.webhook import WebhookSink
from gateway.smtp import bounce

from ..certificates import certified
from ..loops import on_both_loops, until
from ..servers import free_port
from ..upstreams import Peer, Rogue, Talk, good, takes
from .stage import Stage, StagedSink, breathe, patience
from .test_relay import carry, message, states, to

AUTHORITY = trustme.CA()


@pytest.fixture(scope="module")
def ca_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("authority") / "ca.pem"
    AUTHORITY.cert_pem.write_to_path(str(path))
    return path


def secret(*recipients: str, sender: str = "a@x.example") -> Message:
    sent = message(*recipients, sender=sender)
    sent.envelope.mail_params["REQUIRETLS"] = None
    return sent


def offering(
    *offers: str, name: str = "127.0.0.1", authority: trustme.CA = AUTHORITY, starttls: str = "220 go", then: Talk = takes
) -> Talk:
    """STARTTLS, then these offers; in clear, whatever is said is taken."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)

    async def talk(peer: Peer) -> None:
        await peer.hello("PIPELINING", "STARTTLS", "CHUNKING")
        line = await peer.hear()
        if line == "STARTTLS" and starttls.startswith("220"):
            await peer.say(starttls)
            await peer.writer.start_tls(context)
            await peer.hear("EHLO gw.example")
            await peer.say(*(f"250-{offer}" for offer in ("rogue.example", "PIPELINING", *offers)), "250 CHUNKING")
        else:
            await peer.say(starttls if line == "STARTTLS" else "221 bye" if line == "QUIT" else "250 2.1.0 in clear")
        await then(peer)

    return talk


def only(outcomes: Any) -> Outcome:
    (outcome,) = outcomes
    assert isinstance(outcome, Outcome)
    return outcome


# ------------------------------------------------------------------------- the relay


@pytest.mark.parametrize("tls", ["opportunistic", "required", "verify"])
@on_both_loops
async def test_it_goes_on_under_verified_tls_with_its_parameter(ca_file: Path, tls: str) -> None:
    async with Rogue(offering("REQUIRETLS")) as server, to(server.address, tls=tls, ca_file=ca_file) as sink:
        assert states(await carry(sink, secret())) == ["delivered"]
        assert states(await carry(sink, secret("c@y.example"))) == ["delivered"]
        assert states(await carry(sink)) == ["delivered"]
        heard = [line for line in server.peers[0].heard if line.startswith("MAIL")]
        assert heard == ["MAIL FROM:<a@x.example> REQUIRETLS"] * 2 + ["MAIL FROM:<a@x.example>"]
        # The connection is good for both kinds.
        assert len(server.peers) == 1


BAD: dict[str, tuple[Talk, str, str]] = {
    "no offer after TLS": (offering(), "5.7.30", "REQUIRETLS support required"),
    "another name": (offering("REQUIRETLS", name="127.0.0.2"), "5.7.10", "IP address mismatch"),
    "another authority": (offering("REQUIRETLS", authority=trustme.CA()), "5.7.10", "certificate"),
    "no STARTTLS": (good, "5.7.10", "no TLS with this host"),
    "STARTTLS refused": (offering("REQUIRETLS", starttls="502 5.5.1 no"), "5.7.10", "no TLS with this host"),
}


@pytest.mark.parametrize("tls", ["opportunistic", "required", "verify"])
@pytest.mark.parametrize("kind", BAD)
@on_both_loops
async def test_what_an_upstream_cannot_promise_fails_and_is_said_to_nobody(ca_file: Path, kind: str, tls: str) -> None:
    talk, code, words = BAD[kind]
    async with Rogue(talk) as server, to(server.address, tls=tls, ca_file=ca_file) as sink:
        outcome = only(await carry(sink, secret()))
        assert (outcome.state, outcome.reply.code, outcome.reply.enhanced) == ("failed", 550, code)
        assert words in outcome.reply.text
        # Neither the sink nor the host is any worse for other mail.
        assert not outcome.down
        assert sink._hosts[0].until == sink._hosts[0].clear_until == 0.0
        assert server.heard("MAIL") == server.heard("BDAT") == server.heard("DATA") == 0


@on_both_loops
async def test_not_now_is_no_verdict(ca_file: Path) -> None:
    """454 to STARTTLS, and a host that cannot be reached, may be otherwise in a minute."""
    async with Rogue(offering("REQUIRETLS", starttls="454 4.7.0 later")) as server, to(server.address, tls="opportunistic") as sink:
        outcome = only(await carry(sink, secret()))
        assert (outcome.state, outcome.reply.code) == ("deferred", 454)
        assert server.heard("MAIL") == 0
    async with Rogue(offering()) as server, to(f"127.0.0.1:{free_port()}", server.address, tls="opportunistic", ca_file=ca_file) as sink:
        outcome = only(await carry(sink, secret()))
        assert outcome.state == "deferred"
        assert len(server.peers) == 1

    async def hangs_up(peer: Peer) -> None:
        await peer.hello("STARTTLS")
        await peer.hear("STARTTLS")
        await peer.say("220 go")
        peer.reset()

    async with Rogue(hangs_up) as server, to(server.address, tls="opportunistic", ca_file=ca_file) as sink:
        outcome = only(await carry(sink, secret()))
        assert (outcome.state, outcome.down) == ("deferred", False)
        assert sink._hosts[0].clear_until == 0.0


@on_both_loops
async def test_every_host_is_asked_before_it_fails(ca_file: Path) -> None:
    async with Rogue(offering()) as one, Rogue(good) as two, Rogue(offering("REQUIRETLS")) as three:
        async with to(one.address, two.address, three.address, tls="opportunistic", ca_file=ca_file) as sink:
            assert states(await carry(sink, secret())) == ["delivered"]
            assert one.heard("MAIL") == two.heard("MAIL") == 0
            assert three.heard("MAIL FROM:<a@x.example> REQUIRETLS") == 1
        async with to(one.address, two.address, tls="opportunistic", ca_file=ca_file) as sink:
            assert only(await carry(sink, secret())).state == "failed"


@on_both_loops
async def test_a_connection_in_clear_is_not_taken_for_it(ca_file: Path) -> None:
    """A warm one that other mail has left stays for other mail."""
    async with Rogue(good, offering("REQUIRETLS")) as server, to(server.address, tls="opportunistic", ca_file=ca_file) as sink:
        assert states(await carry(sink)) == ["delivered"]
        assert states(await carry(sink, secret())) == ["delivered"]
        assert [peer.heard.count("MAIL FROM:<a@x.example> REQUIRETLS") for peer in server.peers] == [0, 1]
        assert states(await carry(sink, secret())) == ["delivered"]
        assert len(server.peers) == 2


@on_both_loops
async def test_nor_one_whose_certificate_nobody_looked_at(ca_file: Path) -> None:
    unseen = offering("REQUIRETLS", authority=trustme.CA())
    async with Rogue(unseen, offering("REQUIRETLS")) as server, to(server.address, tls="required", ca_file=ca_file) as sink:
        assert states(await carry(sink)) == ["delivered"]
        assert states(await carry(sink, secret())) == ["delivered"]
        assert [sum("REQUIRETLS" in line for line in peer.heard) for peer in server.peers] == [0, 1]


@on_both_loops
async def test_room_is_made_for_a_connection_that_will_do(ca_file: Path) -> None:
    settings: dict[str, Any] = {"tls": "opportunistic", "ca_file": ca_file, "concurrency": 1}
    async with Rogue(good, offering("REQUIRETLS")) as server, to(server.address, **settings) as sink:
        assert states(await carry(sink)) == ["delivered"]
        assert states(await carry(sink, secret())) == ["delivered"]
        await until(lambda: len(sink._connections) == 1)
        await until(lambda: server.peers[0].heard[-1] == "QUIT")


@on_both_loops
async def test_recipients_that_are_left_go_on_as_strictly(ca_file: Path) -> None:
    talk = offering("REQUIRETLS", "LIMITS RCPTMAX=1 MAILMAX=1")
    async with Rogue(talk, good) as server, to(server.address, tls="opportunistic", ca_file=ca_file) as sink:
        first, second = await carry(sink, secret("b@y.example", "c@y.example"))
        assert (first.state, second.state, second.reply.enhanced) == ("delivered", "failed", "5.7.10")
        await until(lambda: server.peers[1].heard[-1] == "QUIT")


@on_both_loops
async def test_a_bounce_is_not_lost_for_want_of_the_offer_but_never_in_clear(ca_file: Path) -> None:
    """RFC 8689 §5, with the null reverse-path."""
    async with Rogue(offering()) as server, to(server.address, tls="opportunistic", ca_file=ca_file) as sink:
        assert states(await carry(sink, secret(sender=""))) == ["delivered"]
        assert server.heard("MAIL FROM:<>") == 1
        assert server.heard("MAIL FROM:<> REQUIRETLS") == 0
    async with Rogue(good) as server, to(server.address, tls="opportunistic", ca_file=ca_file) as sink:
        assert only(await carry(sink, secret(sender=""))).reply.enhanced == "5.7.10"
        assert server.heard("MAIL") == 0


@on_both_loops
async def test_where_the_file_says_no_tls_nobody_is_even_called() -> None:
    async with Rogue(good) as server, to(server.address, tls="off") as sink:
        outcome = only(await carry(sink, secret()))
        assert (outcome.state, outcome.reply.enhanced) == ("failed", "5.7.30")
        assert not server.peers
        assert states(await carry(sink)) == ["delivered"]


@on_both_loops
async def test_the_machine_s_authorities_are_trusted_where_no_file_is_named() -> None:
    async with Rogue(offering("REQUIRETLS")) as server, to(server.address, tls="required") as sink:
        assert states(await carry(sink)) == ["delivered"]
        assert only(await carry(sink, secret())).reply.enhanced == "5.7.10"
        assert server.heard("MAIL") == 1


@on_both_loops
async def test_a_mail_store_behind_a_unix_socket_is_the_end_of_the_way(tmp_path: Path) -> None:
    async def store(peer: Peer) -> None:
        await peer.say("220 store")
        await peer.hear("LHLO ")
        await peer.say("250-store", "250 PIPELINING")
        await peer.envelope()
        await peer.hear("DATA")
        await peer.say("354 go")
        await peer.dotted()
        await peer.say("250 2.0.0 stored")

    for tls in ("off", "opportunistic"):
        async with Rogue(store, path=str(tmp_path / tls)) as server, to(server.address, lmtp=True, tls=tls) as sink:
            assert states(await carry(sink, secret())) == ["delivered"]
            assert server.heard("MAIL FROM:<a@x.example>") == 1
            assert server.heard("MAIL FROM:<a@x.example> REQUIRETLS") == 0


# ----------------------------------------------------------------------- the webhook


@pytest.mark.parametrize(
    ("url", "carries"),
    [
        ("https://app.example/inbound", True),
        ("http://app.example/inbound", False),
        ("http://127.0.0.1:8000/inbound", True),
        ("http://[::1]:8000/inbound", True),
        ("http://localhost/inbound", True),
        ("http://127.0.0.1.app.example/inbound", False),
        ("http://192.0.2.1/inbound", False),
    ],
)
def test_which_webhooks_may_have_it(url: str, carries: bool) -> None:
    assert WebhookConfig(url=url).carries_requiretls is carries


async def test_a_webhook_that_is_in_clear_now_does_not_get_it() -> None:
    """What was taken for https, and waited in the spool while the file was changed."""
    sink = WebhookSink("app", WebhookConfig(url="http://192.0.2.1:9/inbound"), "gw.example")
    settled: list[Any] = []
    sent = secret()
    outcomes = await sink.carry(Delivery("1", sent, sent.envelope.recipients, "app", 1, lambda *what: settled.append(what)))
    assert (outcomes[0].state, outcomes[0].reply.enhanced) == ("failed", "5.7.10")
    await sink.close()


# ------------------------------------------------------------------------- the routes


def table(**sinks: dict[str, Any]) -> Routes:
    config = Config.parse(
        {
            "listeners": [{"address": "127.0.0.1:0"}],
            "sinks": sinks,
            "routes": [{"recipients": ["*@x.example"], "sinks": list(sinks)}],
            "spool": {"path": "/nonexistent"},
        }
    )
    return config.table()


@pytest.mark.parametrize(
    ("sinks", "carries"),
    [
        ({"a": {"type": "discard"}}, True),
        ({"a": {"type": "stdout"}}, True),
        ({"a": {"type": "file", "path": "/nonexistent"}}, True),
        ({"a": {"type": "relay", "hosts": ["mail.example:25"]}}, True),
        ({"a": {"type": "relay", "hosts": ["mail.example:25"], "tls": "off"}}, False),
        ({"a": {"type": "relay", "hosts": ["127.0.0.1:25"], "tls": "off"}}, False),
        ({"a": {"type": "relay", "hosts": ["mail.example:25"], "tls": "verify", "requiretls": False}}, False),
        ({"a": {"type": "lmtp", "address": "unix:/run/lmtp", "requiretls": False}}, False),
        ({"a": {"type": "lmtp", "address": "127.0.0.1:24", "tls": "off"}}, False),
        ({"a": {"type": "lmtp", "address": "unix:/run/lmtp", "tls": "off"}}, True),
        ({"a": {"type": "webhook", "url": "http://app.example/"}}, False),
        # A copy for each: one that cannot is one too many.
        ({"a": {"type": "discard"}, "b": {"type": "webhook", "url": "http://app.example/"}}, False),
    ],
)
def test_which_routes_can_promise_it(sinks: dict[str, Any], carries: bool) -> None:
    assert table(**sinks).routes[0].requiretls is carries


# ------------------------------------------------------------------------- the reports


def taken(**params: str | None) -> Message:
    content = b"Subject: plans\r\nMessage-ID: <1@x.example>\r\n\r\nthe secret\r\n"
    header = content.index(b"\r\n\r\n") + 2
    envelope = Envelope("a@x.example", {"REQUIRETLS": None, **params}, [Recipient("b@y.example", "b", "y.example")])
    return Message("018f", envelope, Content(content, header_size=header), Client("192.0.2.1"), 0.0, trace=b"Received: from z\r\n")


def reported(original: Message, redacted: bool = False) -> tuple[bytes, Envelope]:
    results = [(original.envelope.recipients[0], Reply(550, "5.7.30", "REQUIRETLS support required"), "mx.y.example:25")]
    octets = bounce.report("failed", original, results, reporting_mta="gw.example", now=0.0, message_id="2@gw.example", redacted=redacted)
    return octets, bounce.envelope(original, octets, redacted=redacted)


@pytest.mark.parametrize("wish", ["FULL", "HDRS", None])
def test_a_report_has_the_header_at_most_and_wants_tls_itself(wish: str | None) -> None:
    octets, envelope = reported(taken(**({} if wish is None else {"RET": wish})))
    assert b"Subject: plans" in octets
    assert b"the secret" not in octets
    assert b"Status: 5.7.30" in octets
    assert envelope.requiretls


def test_a_redacted_report_has_nothing_of_the_mail() -> None:
    octets, envelope = reported(taken(), redacted=True)
    assert b"<b@y.example>" in octets
    for word in (b"plans", b"secret", b"1@x.example", b"rfc822-headers"):
        assert word not in octets
    assert not envelope.requiretls


@pytest.mark.parametrize("carried", [True, False])
async def test_the_queue_asks_who_carries_the_report(carried: bool) -> None:
    app, out = StagedSink("app"), StagedSink("out")
    async with Stage(app, out, on_failure="bounce", bounces="out") as stage:
        stage.queue._lanes["out"].settings = LaneSettings(10, "dead_letter", relays=True, requiretls=carried)
        content = b"Subject: plans\r\n\r\nthe secret\r\n"
        transaction = stage.transaction(route=Route(("*",), ("app",)))
        transaction.envelope.mail_params["REQUIRETLS"] = None
        transaction.size, transaction.header_size = len(content), 16
        draft = stage.draft(transaction)
        draft.write(content)
        draft.finish(stage.answers.append)
        await patience()
        stage.spool.commit()
        app.settle(Outcome("failed", Reply(550, "5.7.30", "REQUIRETLS support required"), "mx:25"))
        stage.spool.sync_marks()
        await breathe()
        report = out.seen[0].message
        assert report.envelope.mail_from == ""
        assert report.envelope.requiretls is carried
        assert (b"plans" in report.content) is carried
        assert b"the secret" not in report.content


# --------------------------------------------------------------------------- explained


def test_explain_tells_which_sink_cannot(tmp_path: Path) -> None:
    pair = certified(AUTHORITY, tmp_path, "mx.example")
    file = tmp_path / "gateway.toml"
    file.write_text(
        f"""
        [[listeners]]
        address = "127.0.0.1:0"
        tls = "starttls"
        certificate = "{pair.certificate}"
        key = "{pair.key}"
        [sinks.box]
        type = "discard"
        [sinks.app]
        type = "webhook"
        url = "http://app.example/inbound"
        [[routes]]
        recipients = ["*@box.example"]
        sink = "box"
        [[routes]]
        recipients = ["*@app.example"]
        sinks = ["box", "app"]
        """
    )

    def explained(*more: str) -> Any:
        words = ["explain", "-c", str(file), "--client", "192.0.2.1", "--from", "a@x.example", *more]
        return CliRunner().invoke(cli, words)

    taken = explained("--to", "b@box.example", "--requiretls")
    assert taken.exit_code == 0, taken.output
    assert "this mail with it" in taken.output
    refused = explained("--to", "b@app.example", "--requiretls")
    assert refused.exit_code == 1
    assert "550 5.7.30" in refused.output
    assert "routes[1] fits, but cannot promise TLS: see tls (a webhook's url) of app\n" in refused.output
    assert "530 5.7.10" in explained("--to", "b@box.example", "--requiretls", "--clear").output
