"""The gateway toward real mail servers, and real mail servers toward the gateway: Postfix,
smtp-sink, and plain receivers that offer less than everything."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ..conftest import Start
from ..servers import (
    Client,
    GatewayProcess,
    HttpReceiver,
    Postfix,
    SmtpSink,
    Upstream,
    free_port,
    program,
    smtp_sink,
    wait_until,
    without_trace,
)
from .test_clients import source

RELAY = """
hostname = "mx.gateway.example"

[[listeners]]
address = "127.0.0.1:0"

[retry]
delays = ["1s"]

[sinks.out]
type = "relay"
hosts = [{hosts}]
tls = "off"
{more}

[[routes]]
recipients = ["*"]
clients = ["127.0.0.0/8"]
sink = "out"

[bounces]
sink = "out"
"""

HOOK = """
hostname = "mx.gateway.example"

[[listeners]]
address = "127.0.0.1:0"

[sinks.hook]
type = "webhook"
url = "{url}"
format = "raw"

[[routes]]
recipients = ["*@hook.example"]
sink = "hook"
"""

MAIL = b"Subject: dots and dashes\r\nX-Long: " + b"x" * 900 + b"\r\n\r\n.\r\n..\r\n.x\r\n\r\n--\r\nFrom here\r\n" + b"y" * 990 + b"\r\n"

PostfixTo = Callable[..., Postfix]


def relay(gateway: Start, *hosts: str, more: str = "") -> GatewayProcess:
    return gateway(RELAY.format(hosts=", ".join(f'"{host}"' for host in hosts), more=more))


# ------------------------------------------------------------------- Postfix


def test_to_postfix_by_bdat_and_on(gateway: Start, postfix_to: PostfixTo, upstream: Upstream) -> None:
    """gateway → Postfix (which offers CHUNKING) → a receiver: nothing below the trace fields is changed."""
    postfix = postfix_to(upstream.port)
    house = relay(gateway, postfix.address)
    with Client(house.server) as client:
        for number, how in enumerate(("DATA", "BDAT 100", "BDAT 100000")):
            assert client.mail(f"m{number}@client.example", ["b@far.example"], MAIL, how).startswith("250 2.")
    for taken in upstream.wait(3):
        # Postfix's own Received, ours, then what was sent.
        assert without_trace(without_trace(taken.content)) == MAIL
    # Postfix counts a session's commands at its end.
    assert house.stop() == 0
    wait_until(lambda: sum(map(int, re.findall(r"disconnect from .* bdat=(\d+) ", postfix.log()))) == 3, "three BDAT at Postfix")
    assert " data=" not in postfix.log()


def test_postfix_without_chunking_gets_data(gateway: Start, postfix_to: PostfixTo, upstream: Upstream) -> None:
    postfix = postfix_to(upstream.port, "smtpd_discard_ehlo_keywords = chunking, pipelining\n")
    house = relay(gateway, postfix.address)
    with Client(house.server) as client:
        assert client.mail("a@client.example", ["b@far.example"], MAIL).startswith("250 2.")
    assert without_trace(without_trace(upstream.wait(1)[0].content)) == MAIL
    assert house.stop() == 0
    wait_until(lambda: re.search(r"disconnect from .* data=1 ", postfix.log()), "one DATA at Postfix")


def test_postfix_refuses_one_of_three(gateway: Start, postfix_to: PostfixTo, upstream: Upstream) -> None:
    """Who is refused for good gets a bounce to the sender; the others get their mail."""
    access = "{ {bad@far.example = 550 5.1.1 nobody} }"
    postfix = postfix_to(
        upstream.port, f"smtpd_recipient_restrictions = check_recipient_access inline:{access}, permit_mynetworks, reject\n"
    )
    house = relay(gateway, postfix.address)
    with Client(house.server) as client:
        reply = client.mail("a@client.example", ["b@far.example", "bad@far.example", "c@far.example"], MAIL)
        assert reply.startswith("250 2.")
    mails = {taken.mail.split(">")[0] + ">": taken for taken in upstream.wait(2)}
    assert [address.split(">")[0] + ">" for address in mails["<a@client.example>"].recipients] == ["<b@far.example>", "<c@far.example>"]
    bounce = mails["<>"]
    assert bounce.recipients[0].startswith("<a@client.example>")
    assert b"Final-Recipient: rfc822; bad@far.example" in bounce.content
    assert b"Action: failed" in bounce.content
    assert b"550 5.1.1" in bounce.content
    house.event("bounced")


def test_postfix_as_a_client(gateway: Start, postfix_to: PostfixTo, webhook: HttpReceiver) -> None:
    """A Postfix that hands its mail to the gateway: pipelined, many at once, 8-bit and UTF-8."""
    house = gateway(HOOK.format(url=webhook.url))
    postfix = postfix_to(house.port)
    with Client(postfix.address) as client:
        for number in range(50):
            assert client.mail(f"m{number}@client.example", [f"n{number}@hook.example"], MAIL).startswith("250")
        utf8 = "Subject: Grüße\r\n\r\nHällo\r\n".encode()
        assert client.mail("jürgen@client.example", ["grüße@hook.example"], utf8, parameters=" SMTPUTF8 BODY=8BITMIME").startswith("250")
    requests = webhook.wait(51)
    assert {request.header("x-envelope-from") for request in requests} >= {f"m{number}@client.example" for number in range(50)}
    for request in requests:
        expected = utf8 if b"Gr\xc3\xbc\xc3\x9fe" in request.body else MAIL
        assert without_trace(without_trace(request.body)) == expected


def test_postfix_hears_who_is_refused(gateway: Start, postfix_to: PostfixTo, webhook: HttpReceiver) -> None:
    house = gateway(HOOK.format(url=webhook.url))
    postfix = postfix_to(house.port)
    with Client(postfix.address) as client:
        assert client.mail("a@client.example", ["x@elsewhere.example", "b@hook.example"], MAIL).startswith("250")
    assert webhook.wait(1)[0].header("x-envelope-to") == "b@hook.example"
    wait_until(lambda: re.search(r"to=<x@elsewhere.example>.*dsn=5\.7\.1, status=bounced", postfix.log()), "the refusal in Postfix's log")


# ----------------------------------------------------------------- smtp-sink


def test_to_smtp_sink(gateway: Start, sink: SmtpSink) -> None:
    house = relay(gateway, sink.address)
    with Client(house.server) as client:
        assert client.mail("a@client.example", ["b@far.example"], MAIL).startswith("250 2.")
    (content,) = sink.wait(1)
    assert without_trace(content.replace(b"\n", b"\r\n")) == MAIL


def test_many_sessions_through_to_smtp_sink(gateway: Start, sink: SmtpSink) -> None:
    """smtp-source → gateway → smtp-sink: 600 mails over 20 sessions, each once; the upstream's connections are few and kept."""
    house = relay(gateway, sink.address, more="concurrency = 8")
    source("-s", "20", "-m", "600", "-l", "2000", "-N", "-f", "a@client.example", "-t", "b@far.example", house.server)
    assert len(sink.wait(600)) == 600
    house.event("delivered", count=600)
    wait_until(lambda: len(list(sink.folder.iterdir())) == 600, "600 and no more")


@pytest.mark.parametrize("options", [["-8"], ["-e"], ["-p"]], ids=["no ESMTP", "ESMTP without more", "no PIPELINING"])
def test_smtp_sink_that_offers_less(gateway: Start, tmp_path: Path, options: list[str]) -> None:
    if program("smtp-sink") is None:
        pytest.skip("smtp-sink is not installed")
    with smtp_sink(tmp_path / "sink", *options) as server:
        house = relay(gateway, server.address)
        with Client(house.server) as client:
            assert client.mail("a@client.example", ["b@far.example", "c@far.example"], MAIL).startswith("250 2.")
        assert without_trace(server.wait(1)[0].replace(b"\n", b"\r\n")) == MAIL


# ------------------------------------------------------------ what is missing


def test_what_the_next_hop_cannot_carry_fails_and_is_not_re_encoded(gateway: Start) -> None:
    eight_bit = "Subject: x\r\n\r\nGrüße\r\n".encode()
    with Upstream(offers=["PIPELINING", "ENHANCEDSTATUSCODES"]) as poor:
        house = relay(gateway, poor.address)
        with Client(house.server) as client:
            assert client.mail("a@client.example", ["b@far.example"], eight_bit, parameters=" BODY=8BITMIME").startswith("250 2.")
            assert client.mail("a@client.example", ["grüße@far.example"], MAIL, parameters=" SMTPUTF8").startswith("250 2.")
        (bounce,) = poor.wait(1)
        # A bounce that has to name a UTF-8 address is no more for this hop than the mail was.
        house.event("dead", sink="out")
        # Two connections may carry them: the second can be over first.
        house.event("failed", count=2)
        replies = [event["reply"] for event in house.found("failed")]
        assert all(re.match(r"5\d\d 5\.6\.[37] ", reply) for reply in replies), replies
        assert any(re.match(r"5\d\d 5\.6\.3 ", reply) for reply in replies), replies
        assert len(poor.taken) == 1
    assert bounce.mail.startswith("<>")
    assert b"Status: 5.6.3" in bounce.content
    assert bounce.content.isascii()


def test_the_other_host_when_one_is_down(gateway: Start, upstream: Upstream) -> None:
    house = relay(gateway, f"127.0.0.1:{free_port()}", upstream.address)
    with Client(house.server) as client:
        for number in range(20):
            assert client.mail(f"m{number}@client.example", ["b@far.example"], MAIL).startswith("250 2.")
    assert len(upstream.wait(20)) == 20


def test_mail_waits_for_an_upstream_that_is_down(gateway: Start) -> None:
    port = free_port()
    house = relay(gateway, f"127.0.0.1:{port}")
    with Client(house.server) as client:
        for number in range(20):
            assert client.mail(f"m{number}@client.example", ["b@far.example"], MAIL).startswith("250 2.")
    house.event("sink_down", sink="out")
    with Upstream(port=port) as upstream:
        mails = upstream.wait(20)
        house.event("sink_up", sink="out")
    assert {taken.mail.partition(" ")[0] for taken in mails} == {f"<m{number}@client.example>" for number in range(20)}
    assert all(without_trace(taken.content) == MAIL for taken in mails)


def test_lmtp_answers_for_each(gateway: Start) -> None:
    config = RELAY.replace('type = "relay"', 'type = "lmtp"')
    with Upstream(lmtp=True) as store:
        store.refuse["RCPT TO:<bad@"] = "550 5.1.1 nobody"
        house = gateway(config.format(hosts=f'"{store.address}"', more='on_failure = "dead_letter"'))
        with Client(house.server) as client:
            assert client.mail("a@client.example", ["b@far.example", "bad@far.example"], MAIL).startswith("250 2.")
        (taken,) = store.wait(1)
        assert store.lines[0].startswith("LHLO ")
        assert [address.partition(" ")[0] for address in taken.recipients] == ["<b@far.example>"]
        house.event("dead", sink="out")
