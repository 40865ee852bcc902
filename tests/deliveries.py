"""Deliveries for tests of sinks: one try each, with what it settled as."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from gateway.contracts import Delivery, Outcome, Sink
from gateway.message import TLS, Client, Content, Envelope, Message, Params, Recipient

ID = "0193f1c2-7a1b-7c3d-8e4f-1a2b3c4d5e6f"
TRACE = b"Received: from client.example by mx.example.net with ESMTPS id 0193f1c2; Sun, 22 Nov 2026 19:08:00 +0000\r\n"
MAIL = b"From: a@client.example\r\nSubject: hello\r\n\r\n.one\r\ntwo\r\n"


def recipient(address: str, params: Params | None = None) -> Recipient:
    local, _, domain = address.rpartition("@")
    return Recipient(address, local, domain.lower(), params or {})


def mail(
    content: bytes | Path = MAIL,
    recipients: Sequence[Recipient] | None = None,
    mail_from: str = "a@client.example",
    id: str = ID,
) -> Message:
    stored = Content(path=str(content), size=content.stat().st_size) if isinstance(content, Path) else Content(content)
    client = Client("192.0.2.7", 51234, "client.example", "ESMTPS", TLS("TLSv1.3", "TLS_AES_256_GCM_SHA384"))
    envelope = Envelope(mail_from, {"BODY": "8BITMIME", "SMTPUTF8": None}, list(recipients or [recipient("b@us.example")]))
    return Message(id, envelope, stored, client, 1795374480.12, "127.0.0.1:2525", TRACE)


class Try:
    """One delivery to start; ``await one.outcomes()`` waits for the settling."""

    def __init__(self, message: Message, recipients: Sequence[Recipient] | None = None, id: str = "") -> None:
        self.future: asyncio.Future[Sequence[Outcome]] = asyncio.get_running_loop().create_future()
        self.delivery = Delivery(
            id or message.id,
            message,
            message.envelope.recipients if recipients is None else recipients,
            "app",
            1,
            lambda _, outcomes: self.future.set_result(outcomes),
        )

    async def outcomes(self) -> Sequence[Outcome]:
        return await asyncio.wait_for(self.future, 60)


def untried(message: Message, id: str = "") -> Delivery:
    """A delivery to make payloads of; nobody waits for it."""
    return Delivery(id or message.id, message, message.envelope.recipients, "app", 1, lambda *_: None)


async def carried(sink: Sink, message: Message, id: str = "") -> Outcome:
    """What a sink makes of one message: the same for every recipient."""
    one = Try(message, id=id)
    sink.start(one.delivery)
    outcomes = await one.outcomes()
    assert len(outcomes) == len(message.envelope.recipients)
    assert all(outcome == outcomes[0] for outcome in outcomes)
    return outcomes[0]
