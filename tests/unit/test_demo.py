"""``gateway demo``: what its receiver believes, what it shows, how it ends. The whole of it runs
in tests/integration/test_clients.py."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import signal
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import pytest
from standardwebhooks.webhooks import Webhook

from gateway.tools import demo
from gateway.tools.demo import DemoError, Receiver, Served, shortened, signature_is_good

SECRET = "whsec_" + base64.b64encode(bytes(range(24))).decode()
BODY = json.dumps({"data": {"attachments": [{"content": "QUJD" * 100}], "subject": "x" * 100}}).encode()


def signed(body: bytes = BODY, secret: str = SECRET, age: int = 0) -> dict[str, str]:
    moment = datetime.now(UTC) - timedelta(seconds=age)
    signature = Webhook(secret).sign("id_1", moment, body.decode())
    return {"webhook-id": "id_1", "webhook-timestamp": str(int(moment.timestamp())), "webhook-signature": signature}


def test_a_signature_of_standard_webhooks_is_good() -> None:
    headers = signed()
    assert signature_is_good(SECRET, headers, BODY)
    rotated = headers | {"webhook-signature": f"v1,{'A' * 43}= {headers['webhook-signature']}"}
    assert signature_is_good(SECRET, rotated, BODY)


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp", "webhook-signature"])
def test_one_that_lacks_something_or_was_changed_is_not(name: str) -> None:
    headers = signed()
    assert not signature_is_good(SECRET, {key: value for key, value in headers.items() if key != name}, BODY)
    assert not signature_is_good(SECRET, headers | {name: "1"}, BODY)


def test_another_body_secret_or_time_is_not() -> None:
    assert not signature_is_good(SECRET, signed(), BODY + b" ")
    assert not signature_is_good(SECRET, signed(secret="whsec_" + base64.b64encode(b"another key, long enough").decode()), BODY)
    assert not signature_is_good(SECRET, signed(age=1000), BODY)
    assert not signature_is_good(SECRET, signed(age=-1000), BODY)


async def test_the_receiver_shows_what_is_signed_and_turns_the_rest_away(capsys: pytest.CaptureFixture[str]) -> None:
    async with Receiver(SECRET) as receiver, aiohttp.ClientSession() as client:
        async with client.post(receiver.url, data=BODY, headers=signed() | {"webhook-signature": "v1,nonsense"}) as answer:
            assert answer.status == 401
        assert not receiver.arrived.is_set()
        async with client.post(receiver.url, data=BODY, headers=signed()) as answer:
            assert answer.status == 200
        assert receiver.arrived.is_set()
        assert capsys.readouterr().out == ""
        receiver.release()
    out = capsys.readouterr().out
    assert out.count("webhook-id id_1") == 1
    assert "(400 characters of base64)" in out


def test_only_base64_is_cut_short() -> None:
    value = {"a": [{"content": "Q" * 61, "filename": "f" * 100}], "raw": "Q" * 60, "content": None}
    cut = shortened(value)
    assert cut == {"a": [{"content": "Q" * 40 + "… (61 characters of base64)", "filename": "f" * 100}], "raw": "Q" * 60, "content": None}


async def test_a_gateway_that_does_not_start_is_told_with_its_own_words(tmp_path: Path) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text("nonsense = 1\n")
    served = await Served.start(config)
    with pytest.raises(DemoError, match="nonsense"):
        await served.listening()
    assert await served.end() == 1


async def test_the_demo_says_what_did_not_come(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The gateway takes the mail, but nobody ever gets it."""
    monkeypatch.setattr(demo, "ARRIVAL", 0.5)
    monkeypatch.setattr(demo, "CONFIG", re.sub(r"\{url\}", "http://127.0.0.1:9/", demo.CONFIG))
    process = asyncio.create_task(demo.demo(once=True))
    assert await process == 1
    assert "nothing came to the webhook" in capfd.readouterr().err


async def test_it_stays_up_until_interrupted_and_ends_cleanly() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "demo", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    shown = b""
    while b"Ctrl-C" not in shown:
        line = await asyncio.wait_for(process.stdout.readline(), 30)
        assert line, shown
        shown += line
    port = re.search(rb'smtplib.SMTP\("127.0.0.1", (\d+)\)', shown)
    assert port
    code = "import smtplib, sys; smtplib.SMTP('127.0.0.1', int(sys.argv[1])).sendmail('a@b.example', 'c@d.example', 'Subject: mine')"
    sender = await asyncio.create_subprocess_exec(sys.executable, "-c", code, port[1].decode())
    assert await sender.wait() == 0
    while b'"subject": "mine"' not in shown:
        shown += await asyncio.wait_for(process.stdout.readline(), 30)
    process.send_signal(signal.SIGINT)
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, err
    assert b"Ending" in out
    assert err == b""
