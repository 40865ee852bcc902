"""gateway/checks/http.py against real receivers."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from standardwebhooks.webhooks import Webhook

from gateway.checks import CHECKS, make_check
from gateway.checks.http import UNAVAILABLE
from gateway.config import CHECKS as MODELS
from gateway.config import HttpCheckConfig, PluginCheckConfig
from gateway.contracts import Check, Question, Verdict
from gateway.message import Client
from gateway.reply import Reply

from ..deliveries import ID, MAIL, mail, recipient
from ..receivers import MISBEHAVIOURS, Misbehaviour, misbehaving, receiving

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()
CLIENT = Client("192.0.2.7", 51234, "client.example", "ESMTP")
ASKED = Question("recipient", CLIENT, "127.0.0.1:2525", "a@client.example", recipient("b@us.example", {"NOTIFY": "NEVER"}))


@asynccontextmanager
async def check(url: str, **keys: Any) -> AsyncIterator[Check]:
    found = make_check("policy", HttpCheckConfig(url=url, **keys))
    try:
        yield found
    finally:
        await found.close()


def answer(said: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(said).encode()


def test_every_type_of_the_configuration_has_its_check() -> None:
    assert set(CHECKS) == set(MODELS)
    with pytest.raises(LookupError, match="check policy: no package offers the type 'oracle'"):
        make_check("policy", PluginCheckConfig.model_validate({"type": "oracle"}))


async def test_the_question_holds_what_is_known_at_its_stage() -> None:
    message = mail(recipients=[recipient("b@us.example"), recipient("c@us.example")])
    message.checks["spf"] = {"result": "pass", "codes": {1: {2}}}
    questions = [
        Question("client", CLIENT, "127.0.0.1:2525"),
        Question("sender", CLIENT, "127.0.0.1:2525", ""),
        ASKED,
        Question("content", CLIENT, "127.0.0.1:2525", "a@client.example", message=message),
    ]
    async with receiving((204, {}, b"")) as receiver, check(receiver.url, secret=SECRET, stages=["client", "content"]) as policy:
        assert policy.stages == {"client", "content"}
        for question in questions:
            assert await policy.judge(question) == Verdict()
    said = []
    for request in receiver.requests:
        signed = {name: request.one(name) for name in ("webhook-id", "webhook-timestamp", "webhook-signature")}
        said.append(Webhook(SECRET).verify(request.body, signed))
    assert len({request.one("webhook-id") for request in receiver.requests}) == 4
    client = {"ip": "192.0.2.7", "port": 51234, "helo": "client.example", "protocol": "ESMTP", "tls": None, "user": None}
    shared = {"type": "check", "check": "policy", "listener": "127.0.0.1:2525", "client": client}
    nothing = {"sender": None, "recipient": None, "message": None}
    assert said[0] == shared | nothing | {"stage": "client"}
    assert said[1] == shared | nothing | {"stage": "sender", "sender": ""}
    assert said[2] == shared | nothing | {
        "stage": "recipient",
        "sender": "a@client.example",
        "recipient": {"address": "b@us.example", "params": {"NOTIFY": "NEVER"}},
    }
    content = said[3].pop("message")
    assert said[3] == shared | {"stage": "content", "sender": "a@client.example", "recipient": None}
    assert base64.b64decode(content.pop("content")) == MAIL
    assert content == {
        "id": ID,
        "size": len(MAIL),
        "recipients": ["b@us.example", "c@us.example"],
        "checks": {"spf": {"result": "pass", "codes": {"1": "{2}"}}},
    }


ANSWERS = [
    ((204, {}, b""), Verdict()),
    (answer({}), Verdict()),
    (answer({"reply": None, "facts": {"score": 3}}), Verdict(None, {"score": 3})),
    (answer({"reply": "550 5.1.1 no such user", "facts": [1]}), Verdict(Reply(550, "5.1.1", "no such user"), [1])),
    (answer({"reply": "451 4.7.1 greylisted"}), Verdict(Reply(451, "4.7.1", "greylisted"))),
    (answer({"reply": "550"}), Verdict(Reply(550, "", "refused by policy"))),
    (answer({"reply": "550 5.7.1 two\r\n250 lines"}), Verdict(Reply(550, "5.7.1", "two??250 lines"))),
]


@pytest.mark.parametrize(("given", "verdict"), ANSWERS)
async def test_the_answer_is_the_verdict(given: tuple[int, dict[str, str], bytes], verdict: Verdict) -> None:
    async with receiving(given) as receiver, check(receiver.url) as policy:
        assert await policy.judge(ASKED) == verdict


NONSENSE = [
    (500, {}, b""),
    (302, {"Location": "/"}, b""),
    (201, {}, b"{}"),
    (200, {}, b""),
    (200, {}, b"not json"),
    (200, {}, b'{"reply": "550 5.1.1 cut'),
    (200, {}, b"\xff"),
    answer([]),
    answer("550 no"),
    answer({"reply": "250 2.0.0 fine"}),
    answer({"reply": "5.1.1 no such user"}),
    answer({"reply": 550}),
    answer({"reply": "650 no"}),
    (200, {}, b'{"reply": null}' + b" " * 100_000 + b"x"),
]


@pytest.mark.parametrize("given", NONSENSE)
async def test_what_is_no_answer_is_for_the_operator_to_decide(given: tuple[int, dict[str, str], bytes]) -> None:
    async with receiving(given) as receiver:
        async with check(receiver.url) as policy:
            verdict = await policy.judge(ASKED)
            assert verdict.reply == UNAVAILABLE
            assert verdict.facts["error"]
        async with check(receiver.url, on_error="accept") as policy:
            verdict = await policy.judge(ASKED)
            assert verdict.reply is None
            assert verdict.facts["error"]


@pytest.mark.parametrize("behaviour", MISBEHAVIOURS, ids=lambda behaviour: behaviour.__name__)
async def test_no_misbehaving_service_lets_mail_pass(behaviour: Misbehaviour) -> None:
    async with misbehaving(behaviour) as url, check(url, timeout=0.4) as policy:
        assert (await policy.judge(ASKED)).reply == UNAVAILABLE
