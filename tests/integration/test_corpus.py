"""Promise 3 through the whole house: several hundred mails, each octet for octet at a relay, a raw
webhook and a Maildir; by DATA and by BDAT, at once and out of the spool after a restart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from ..conftest import Start
from ..mime.corpus import carriable, everything, messages
from ..servers import (
    EVERYTHING,
    Client,
    GatewayProcess,
    HttpReceiver,
    Upstream,
    free_port,
    maildir,
    wait_until,
    without_trace,
)

CONFIG = """
hostname = "mx.gateway.example"

[[listeners]]
address = "127.0.0.1:0"

[retry]
delays = ["1s"]

[sinks.relay]
type = "relay"
hosts = ["127.0.0.1:{relay}"]
tls = "off"
binarymime = {binarymime}

[sinks.hook]
type = "webhook"
url = "http://127.0.0.1:{hook}/inbound"
format = "raw"

[sinks.box]
type = "file"
path = "{folder}/box"

[[routes]]
recipients = ["*@us.example"]
clients = ["127.0.0.0/8"]
sinks = ["relay", "hook", "box"]
"""

#: Sizes of BDAT chunks, taken in turn: one octet at a time only for what is short.
CHUNKS = (10_000_000, 1000, 77, 65536)
SHORT = 400


def post(house: GatewayProcess, mails: Iterable[tuple[str, bytes]], how: str) -> dict[str, bytes]:
    """Sends them over one connection; what was sent, by sender."""
    sent = {}
    with Client(house.server) as client:
        for number, (name, content) in enumerate(mails):
            sender = f"m{number}@client.example"
            body = "" if content.isascii() else " BODY=8BITMIME"
            if not carriable(content):
                body = " BODY=BINARYMIME"
            chunk = 1 if len(content) < SHORT and number % 5 == 0 else CHUNKS[number % len(CHUNKS)]
            reply = client.mail(sender, ["b@us.example"], content, "DATA" if how == "DATA" else f"BDAT {chunk}", body)
            assert reply.startswith("250 2.0.0 "), f"{name}: {reply}"
            sent[sender] = content
    return sent


def ours_above(octets: bytes) -> bytes:
    """The content, after a look at what we put above it."""
    assert octets.startswith(b"Received: from client.example ([127.0.0.1])\r\n\tby mx.gateway.example "), octets[:200]
    return without_trace(octets)


def same(where: str, got: dict[str, bytes], sent: dict[str, bytes]) -> None:
    different = [sender for sender in sent if got.get(sender) != sent[sender]]
    assert not different, (
        f"{len(different)} differ at the {where}, the first: {sent[different[0]][:300]!r} is {got.get(different[0], b'')[:300]!r}"
    )
    assert got.keys() == sent.keys()


def arrived(sent: dict[str, bytes], relay: Upstream, hook: HttpReceiver, box: Path) -> None:
    """All of it is at all three, once, as it was sent."""
    wait_until(lambda: min(len(relay.taken), len(hook.requests), len(maildir(box))) >= len(sent), "all mails everywhere", 120)
    same("relay", {taken.mail.partition(">")[0][1:]: ours_above(taken.content) for taken in relay.taken}, sent)
    same("webhook", {request.header("x-envelope-from"): ours_above(request.body) for request in hook.requests}, sent)
    assert Counter(map(ours_above, maildir(box))) == Counter(sent.values())
    assert len(relay.taken) == len(hook.requests) == len(sent)


@pytest.mark.parametrize("offers", [EVERYTHING, ("PIPELINING", "8BITMIME"), ("8BITMIME",)], ids=["BDAT on", "DATA on", "one by one"])
def test_by_data(gateway: Start, tmp_path: Path, webhook: HttpReceiver, offers: Sequence[str]) -> None:
    with Upstream(offers) as relay:
        house = gateway(CONFIG.format(relay=relay.port, hook=webhook.port, folder=tmp_path, binarymime="false"))
        arrived(post(house, messages(), "DATA"), relay, webhook, tmp_path / "box")
        assert all(bool(taken.chunks) == ("CHUNKING" in offers) for taken in relay.taken)


def test_by_bdat_with_what_only_bdat_can_carry(gateway: Start, tmp_path: Path, webhook: HttpReceiver, upstream: Upstream) -> None:
    mails = everything()
    assert sum(not carriable(content) for _, content in mails) > 3
    house = gateway(CONFIG.format(relay=upstream.port, hook=webhook.port, folder=tmp_path, binarymime="true"))
    arrived(post(house, mails, "BDAT"), upstream, webhook, tmp_path / "box")


def test_out_of_the_spool_after_a_restart(gateway: Start, tmp_path: Path) -> None:
    """Nobody is there when it is sent; the gateway ends and starts again before anybody is."""
    ports = {"relay": free_port(), "hook": free_port()}
    house = gateway(CONFIG.format(**ports, folder=tmp_path, binarymime="true"))
    sent = post(house, everything(), "BDAT")
    assert house.stop() == 0
    with Upstream(port=ports["relay"]) as relay, HttpReceiver(port=ports["hook"]) as hook:
        house.start()
        arrived(sent, relay, hook, tmp_path / "box")
