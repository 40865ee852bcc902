"""Clients that people really use, against a gateway that really runs: swaks, Postfix's
smtp-source, Python's smtplib, Node's nodemailer, and our own ``gateway send``."""

from __future__ import annotations

import base64
import json
import smtplib
import subprocess
import sys
from collections import Counter
from email.message import EmailMessage
from email.policy import SMTP
from pathlib import Path
from typing import Any

import pytest

from ..conftest import Start
from ..servers import PATIENCE, ROOT, GatewayProcess, HttpReceiver, maildir, program, wait_until

NODE = Path(__file__).parent / "node"

#: Mail for hook.example is posted, for box.example kept; limits small enough to be met.
CONFIG = """
hostname = "mx.gateway.example"

[[listeners]]
address = "127.0.0.1:0"

[[listeners]]
address = "127.0.0.1:0"
protocol = "lmtp"

[limits]
message_size = "8 MiB"
recipients = 20

[sinks.hook]
type = "webhook"
url = "{url}"

[sinks.box]
type = "file"
path = "{folder}/box"

[[routes]]
recipients = ["*@hook.example"]
sink = "hook"

[[routes]]
recipients = ["*@box.example"]
sink = "box"

# With somebody who carries reports DSN is offered.
[bounces]
sink = "box"
"""


@pytest.fixture
def house(gateway: Start, webhook: HttpReceiver, tmp_path: Path) -> GatewayProcess:
    return gateway(CONFIG.format(url=webhook.url, folder=tmp_path))


def run(*command: str, code: int = 0, stdin: str | None = None) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=5 * PATIENCE, check=False, cwd=ROOT)
    assert done.returncode == code, f"{done.returncode}: {done.stdout}\n{done.stderr}"
    return done.stdout


def data(webhook: HttpReceiver, count: int = 1) -> list[dict[str, Any]]:
    return [request.json()["data"] for request in webhook.wait(count)]


# --------------------------------------------------------------------- swaks


def swaks(house: GatewayProcess, *options: str, code: int = 0) -> str:
    if program("swaks") is None:
        pytest.skip("swaks is not installed")
    return run("swaks", "--server", house.server, "--helo", "swaks.client.example", *options, code=code)


def test_swaks_one_mail(house: GatewayProcess, webhook: HttpReceiver) -> None:
    dialogue = swaks(house, "--from", "a@client.example", "--to", "b@hook.example", "--header", "Subject: from swaks", "--body", "hello")
    assert " ~> " not in dialogue
    (mail,) = data(webhook)
    assert mail["envelope"] == {
        "mail_from": "a@client.example",
        "mail_params": {},
        "rcpt_to": ["b@hook.example"],
        "rcpt_params": {},
    }
    assert mail["client"]["helo"] == "swaks.client.example"
    assert mail["client"]["protocol"] == "ESMTP"
    assert mail["subject"] == "from swaks"
    assert mail["text"].startswith("hello\n")


def test_swaks_attachment_and_dots(house: GatewayProcess, webhook: HttpReceiver, tmp_path: Path) -> None:
    attachment = tmp_path / "octets.bin"
    attachment.write_bytes(bytes(range(256)) * 40)
    swaks(house, "--to", "b@hook.example", "--body", ".\n..\n.x\nend", "--attach-type", "application/zip", "--attach", f"@{attachment}")
    (mail,) = data(webhook)
    assert mail["text"].startswith(".\n..\n.x\nend")
    (got,) = mail["attachments"]
    assert got["filename"] == "octets.bin"
    assert got["content_type"] == "application/zip"
    assert base64.b64decode(got["content"]) == attachment.read_bytes()


def test_swaks_pipelined_to_several(house: GatewayProcess, webhook: HttpReceiver) -> None:
    dialogue = swaks(house, "--pipeline", "--from", "<>", "--to", "a@hook.example,b@hook.example,c@hook.example")
    assert "PIPELINING" in dialogue
    (mail,) = data(webhook)
    assert mail["envelope"]["mail_from"] == ""
    assert mail["envelope"]["rcpt_to"] == ["a@hook.example", "b@hook.example", "c@hook.example"]


def test_swaks_plain_helo(house: GatewayProcess, webhook: HttpReceiver) -> None:
    swaks(house, "--protocol", "SMTP", "--to", "b@hook.example")
    assert data(webhook)[0]["client"]["protocol"] == "SMTP"


def test_swaks_lmtp(house: GatewayProcess, tmp_path: Path) -> None:
    swaks(house, "--server", house.addresses[1], "--protocol", "LMTP", "--to", "a@box.example,b@box.example")
    wait_until(lambda: maildir(tmp_path / "box"), "the Maildir")


def test_swaks_is_refused_what_nobody_routes(house: GatewayProcess, webhook: HttpReceiver) -> None:
    # 24: none of the recipients was taken.
    assert "<** 550 5.7.1" in swaks(house, "--to", "b@elsewhere.example", code=24)
    # One of two is enough for a mail.
    assert "<** 550 5.7.1" in swaks(house, "--to", "b@elsewhere.example,c@hook.example")
    assert data(webhook)[0]["envelope"]["rcpt_to"] == ["c@hook.example"]


def test_swaks_stopped_in_the_middle_leaves_nothing(house: GatewayProcess, webhook: HttpReceiver) -> None:
    for stage in ("CONNECT", "FIRST-HELO", "MAIL", "RCPT"):
        swaks(house, "--to", "b@hook.example", "--quit-after", stage)
        swaks(house, "--to", "b@hook.example", "--drop-after", stage)
    swaks(house, "--to", "b@hook.example", "--drop-after-send", "DATA")
    swaks(house, "--to", "b@hook.example", "--header", "Subject: the only one")
    assert [mail["subject"] for mail in data(webhook)] == ["the only one"]


# --------------------------------------------------------------- smtp-source


def source(*options: str) -> str:
    path = program("smtp-source")
    if path is None:
        pytest.skip("smtp-source is not installed")
    return run(path, *options)


def test_smtp_source_many_sessions(house: GatewayProcess, webhook: HttpReceiver) -> None:
    """400 mails over 20 parallel sessions, a session each: every one exactly once."""
    source("-s", "20", "-m", "400", "-l", "3000", "-f", "a@client.example", "-t", "b@hook.example", "-S", "from smtp-source", house.server)
    mails = data(webhook, 400)
    assert len({mail["id"] for mail in mails}) == len(mails) == 400
    assert {mail["subject"] for mail in mails} == {"from smtp-source"}
    assert all(mail["size"] >= 3000 for mail in mails)


def test_smtp_source_one_session_many_mails(house: GatewayProcess, webhook: HttpReceiver) -> None:
    source("-d", "-s", "4", "-m", "200", "-l", "1000", "-N", "-f", "a@client.example", "-t", "b@hook.example", house.server)
    mails = data(webhook, 200)
    assert len(mails) == 200
    # -N numbers the recipients, so that one lost and one doubled would not cancel out.
    assert set(Counter(mail["envelope"]["rcpt_to"][0] for mail in mails).values()) == {1}


def test_smtp_source_many_recipients_and_large(house: GatewayProcess, webhook: HttpReceiver) -> None:
    source("-s", "3", "-m", "6", "-l", "2000000", "-r", "10", "-f", "a@client.example", "-t", "b@hook.example", house.server)
    for mail in data(webhook, 6):
        assert len(mail["envelope"]["rcpt_to"]) == 10
        assert mail["size"] >= 2_000_000


# ------------------------------------------------------------------- smtplib


def made() -> EmailMessage:
    mail = EmailMessage(policy=SMTP)
    mail["From"] = "Jürgen <a@client.example>"
    mail["To"] = "b@hook.example"
    mail["Subject"] = "Grüße aus smtplib"
    mail.set_content("Hällo\n.\n..\n")
    mail.add_attachment(b"\x00\xff" * 500, maintype="image", subtype="png", filename="bild.png")
    return mail


def test_smtplib_send_message(house: GatewayProcess, webhook: HttpReceiver) -> None:
    with smtplib.SMTP("127.0.0.1", house.port) as client:
        assert client.send_message(made()) == {}
        assert client.send_message(made(), mail_options=["BODY=8BITMIME", "RET=HDRS", "ENVID=x+3D1"], rcpt_options=["NOTIFY=NEVER"]) == {}
    # One that was stored may be overtaken.
    plain, rich = sorted(data(webhook, 2), key=lambda mail: "RET" in mail["envelope"]["mail_params"])
    assert plain["subject"] == rich["subject"] == "Grüße aus smtplib"
    assert plain["from"] == [{"name": "Jürgen", "address": "a@client.example"}]
    assert plain["text"] == "Hällo\n.\n..\n"
    assert base64.b64decode(plain["attachments"][0]["content"]) == b"\x00\xff" * 500
    assert rich["envelope"]["mail_params"] | {"SIZE": None} == {"BODY": "8BITMIME", "RET": "HDRS", "ENVID": "x+3D1", "SIZE": None}
    assert rich["envelope"]["rcpt_params"] == {"b@hook.example": {"NOTIFY": "NEVER"}}


def test_smtplib_utf8_addresses(house: GatewayProcess, webhook: HttpReceiver) -> None:
    mail = made()
    del mail["To"]
    mail["To"] = "grüße@hook.example"
    with smtplib.SMTP("127.0.0.1", house.port) as client:
        assert client.send_message(mail) == {}
    (got,) = data(webhook)
    assert got["envelope"]["rcpt_to"] == ["grüße@hook.example"]
    assert "SMTPUTF8" in got["envelope"]["mail_params"]
    assert got["client"]["protocol"] == "UTF8SMTP"
    assert got["to"] == [{"name": "", "address": "grüße@hook.example"}]


def test_smtplib_hears_of_each_refused_recipient(house: GatewayProcess, webhook: HttpReceiver) -> None:
    with smtplib.SMTP("127.0.0.1", house.port) as client:
        refused = client.sendmail("a@client.example", ["b@hook.example", "x@elsewhere.example"], b"Subject: x\r\n\r\n")
        assert {address: code for address, (code, _) in refused.items()} == {"x@elsewhere.example": 550}
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            client.sendmail("a@client.example", ["x@elsewhere.example"], b"Subject: x\r\n\r\n")
        # More than the limit: those above it are put off, the mail goes to the others.
        many = [f"n{number}@hook.example" for number in range(25)]
        refused = client.sendmail("a@client.example", many, b"Subject: many\r\n\r\n")
        assert {code for code, _ in refused.values()} == {452}
        assert list(refused) == many[20:]
    assert sorted((mail["envelope"]["rcpt_to"] for mail in data(webhook, 2)), key=len) == [["b@hook.example"], many[:20]]


def test_smtplib_too_large(house: GatewayProcess, webhook: HttpReceiver) -> None:
    content = b"Subject: large\r\n\r\n" + (b"x" * 70 + b"\r\n") * 120_000
    with smtplib.SMTP("127.0.0.1", house.port) as client:
        with pytest.raises(smtplib.SMTPSenderRefused) as sized:
            client.sendmail("a@client.example", ["b@hook.example"], content)
        assert sized.value.smtp_code == 552
    # A client that does not say the size hears it at the end of data, and can go on.
    with smtplib.SMTP("127.0.0.1", house.port) as client:
        client.helo("client.example")
        with pytest.raises(smtplib.SMTPDataError) as unsized:
            client.sendmail("a@client.example", ["b@hook.example"], content)
        assert unsized.value.smtp_code == 552
        assert client.sendmail("a@client.example", ["b@hook.example"], b"Subject: small\r\n\r\n") == {}
    assert [mail["subject"] for mail in data(webhook)] == ["small"]


def test_smtplib_lmtp(house: GatewayProcess, tmp_path: Path) -> None:
    with smtplib.LMTP("127.0.0.1", int(house.addresses[1].rpartition(":")[2])) as client:
        client.ehlo_or_helo_if_needed()
        assert client.mail("a@client.example")[0] == 250
        assert [client.rcpt(f"{name}@box.example")[0] for name in "abc"] == [250] * 3
        assert client.data(b"Subject: lmtp\r\n\r\n.dot\r\n")[0] == 250
        assert [client.getreply()[0] for _ in range(2)] == [250] * 2
    wait_until(lambda: maildir(tmp_path / "box"), "the Maildir")
    assert all(mail.endswith(b"Subject: lmtp\r\n\r\n.dot\r\n") for mail in maildir(tmp_path / "box"))


# ---------------------------------------------------------------- nodemailer


def nodemailer(**order: Any) -> list[dict[str, Any]]:
    if program("node") is None or not (NODE / "node_modules" / "nodemailer").is_dir():
        pytest.skip("nodemailer is not installed (make node)")
    result = run("node", str(NODE / "send.mjs"), stdin=json.dumps(order))
    answer: list[dict[str, Any]] = json.loads(result)
    return answer


def test_nodemailer_one_mail(house: GatewayProcess, webhook: HttpReceiver) -> None:
    octets = bytes(range(256)) * 64
    (result,) = nodemailer(
        port=house.port,
        mails=[
            {
                "from": '"Jürgen" <a@client.example>',
                "to": "b@hook.example",
                "cc": "c@hook.example",
                "bcc": "d@hook.example",
                "subject": "Grüße aus Node ✓",
                "text": "Hällo\n.\n",
                "html": "<b>Hällo</b>",
                "dsn": {"return": "headers", "notify": ["failure", "delay"], "recipient": "a@client.example", "id": "id-1"},
                "attachments": [{"filename": "grüße.bin", "content": base64.b64encode(octets).decode()}],
            }
        ],
    )
    assert result["rejected"] == []
    assert result["response"].startswith("250 2.")
    (mail,) = data(webhook)
    assert mail["envelope"]["rcpt_to"] == ["b@hook.example", "c@hook.example", "d@hook.example"]
    assert mail["envelope"]["rcpt_params"]["b@hook.example"]["NOTIFY"] == "FAILURE,DELAY"
    assert mail["subject"] == "Grüße aus Node ✓"
    assert mail["text"] == "Hällo\n.\n"
    assert mail["html"].strip() == "<b>Hällo</b>"
    assert mail["attachments"][0]["filename"] == "grüße.bin"
    assert base64.b64decode(mail["attachments"][0]["content"]) == octets


def test_nodemailer_pool(house: GatewayProcess, webhook: HttpReceiver) -> None:
    mails = [{"from": "a@client.example", "to": f"n{n}@hook.example", "subject": f"{n}", "text": "x" * 50 * n} for n in range(100)]
    results = nodemailer(port=house.port, pool=5, mails=mails)
    assert all(result.get("response", "").startswith("250") for result in results), results
    got = data(webhook, 100)
    assert sorted(int(mail["subject"]) for mail in got) == list(range(100))
    house.event("connected")
    assert len(house.found("connected")) <= 5


def test_nodemailer_hears_refusals(house: GatewayProcess, webhook: HttpReceiver) -> None:
    none, some, large = nodemailer(
        port=house.port,
        mails=[
            {"from": "a@client.example", "to": "x@elsewhere.example", "text": "x"},
            {"from": "a@client.example", "to": ["x@elsewhere.example", "b@hook.example"], "text": "x"},
            {"from": "a@client.example", "to": "b@hook.example", "text": "x", "attachments": [{"content": base64.b64encode(bytes(9_000_000)).decode()}]},
        ],
    )  # fmt: skip
    assert none["code"] == 550
    assert some["accepted"] == ["b@hook.example"]
    assert some["rejected"] == ["x@elsewhere.example"]
    assert large["code"] == 552
    assert len(data(webhook)) == 1


def test_nodemailer_lmtp(house: GatewayProcess, tmp_path: Path) -> None:
    (result,) = nodemailer(
        port=int(house.addresses[1].rpartition(":")[2]),
        lmtp=True,
        mails=[{"from": "a@client.example", "to": ["b@box.example", "x@elsewhere.example"], "subject": "lmtp", "text": "x"}],
    )
    assert result["accepted"] == ["b@box.example"]
    wait_until(lambda: maildir(tmp_path / "box"), "the Maildir")


# ----------------------------------------------------------------- our own


def test_gateway_send(house: GatewayProcess, webhook: HttpReceiver) -> None:
    command = [sys.executable, "-m", "gateway", "send", "--server", house.server, "--from", "a@client.example"]
    assert "< 250" in run(*command, "--to", "b@hook.example", "--to", "c@hook.example")
    assert data(webhook)[0]["envelope"]["rcpt_to"] == ["b@hook.example", "c@hook.example"]
    assert "550 5.7.1" in run(*command, "--to", "x@elsewhere.example", code=1)


def test_gateway_demo_once() -> None:
    out = run(sys.executable, "-m", "gateway", "demo", "--once")
    assert "signature checked" in out
    shown = json.loads(out[out.index("\n{") :])
    assert shown["type"] == "message.received"
    assert shown["data"]["envelope"]["rcpt_to"] == ["grace@demo.example"]
    assert shown["data"]["attachments"][0]["content"].endswith("characters of base64)")
