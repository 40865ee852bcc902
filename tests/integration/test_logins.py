"""People who log in, with clients that are really used, at a gateway that really runs."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import signal
import smtplib
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trustme

from ..certificates import certified
from ..conftest import Start
from ..servers import PATIENCE, ROOT, GatewayProcess, HttpReceiver, maildir, program, wait_until
from .test_clients import nodemailer, run

AUTHORITY = trustme.CA()

CONFIG = """
hostname = "mx.gateway.example"
users_file = "{users}"

[[listeners]]
address = "127.0.0.1:0"
protocol = "submission"
auth = "required"
auth_without_tls = true

[senders]
"alice" = ["*@client.example"]

[admin]
address = "127.0.0.1:0"

[sinks.box]
type = "file"
path = "{folder}/box"

[[routes]]
recipients = ["*@box.example"]
authenticated = true
sink = "box"
"""


def hashed(password: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "gateway", "hash-password", *options],
        input=f"{password}\n",
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=True,
        cwd=ROOT,
    )
    return done.stdout


@pytest.fixture(scope="module")
def people() -> str:
    return hashed("wonder land", "--name", "alice") + hashed("wonder land", "--scram", "--name", "alice")


@pytest.fixture
def house(gateway: Start, tmp_path: Path, people: str) -> GatewayProcess:
    users = tmp_path / "users"
    users.write_text(people)
    users.chmod(0o600)
    return gateway(CONFIG.format(users=users, folder=tmp_path))


def mail(folder: Path, count: int = 1) -> list[bytes]:
    wait_until(lambda: len(maildir(folder / "box")) >= count, f"{count} mails")
    return maildir(folder / "box")


def test_smtplib_logs_in_and_sends_as_who_it_is(house: GatewayProcess, tmp_path: Path) -> None:
    with smtplib.SMTP("127.0.0.1", house.port, timeout=PATIENCE) as client:
        with pytest.raises(smtplib.SMTPSenderRefused) as early:
            client.sendmail("a@client.example", ["b@box.example"], b"Subject: x\r\n\r\nhi\r\n")
        assert early.value.smtp_code == 530
        assert client.login("alice", "wonder land")[0] == 235
        with pytest.raises(smtplib.SMTPSenderRefused) as foreign:
            client.sendmail("a@elsewhere.example", ["b@box.example"], b"Subject: x\r\n\r\nhi\r\n")
        assert (foreign.value.smtp_code, foreign.value.smtp_error) == (553, b"5.7.1 Sender address rejected: not owned by user alice")
        client.sendmail("a@client.example", ["b@box.example"], b"Subject: x\r\n\r\nhi\r\n")
    (octets,) = mail(tmp_path)
    head, _, rest = octets.partition(b"Date: ")
    assert b" with ESMTPA\r\n" in head
    # What was missing stands between our trace and what was sent, which is untouched.
    assert re.fullmatch(
        rb"[^\r]+ \+0000\r\nFrom: <a@client.example>\r\nMessage-ID: <[0-9a-f-]{36}@mx.gateway.example>\r\nSubject: x\r\n\r\nhi\r\n", rest
    )
    told = house.event("authenticated")
    assert (told["user"], told["mechanism"]) == ("alice", "PLAIN")


def test_smtplib_with_the_wrong_password(house: GatewayProcess) -> None:
    with smtplib.SMTP("127.0.0.1", house.port, timeout=PATIENCE) as client:
        with pytest.raises(smtplib.SMTPAuthenticationError) as refused:
            client.login("alice", "wrong")
        # smtplib tries each mechanism it knows: PLAIN, then LOGIN.
        assert refused.value.smtp_code == 535
        client.ehlo()
        client.docmd("AUTH", "PLAIN " + base64.b64encode(b"\0alice\0wrong").decode())
        with pytest.raises(smtplib.SMTPServerDisconnected):
            client.noop()
    house.event("refused", code=421)
    refusals = [event for event in house.events if event["event"] == "refused"]
    assert [(event["mechanism"], event["code"]) for event in refusals] == [("PLAIN", 535), ("LOGIN", 535), ("PLAIN", 421)]
    assert all(event["stage"] == "auth" and event["user"] == "alice" for event in refusals)


@pytest.mark.parametrize("name", ["PLAIN", "LOGIN"])
def test_swaks_logs_in(house: GatewayProcess, tmp_path: Path, name: str) -> None:
    if program("swaks") is None:
        pytest.skip("swaks is not installed")
    login = ["--auth", name, "--auth-user", "alice", "--from", "a@client.example", "--to", "b@box.example"]
    run("swaks", "--server", house.server, *login, "--auth-password", "wonder land")
    (octets,) = mail(tmp_path)
    # swaks brings its own Date and From: there is one of each.
    assert len(re.findall(rb"(?m)^Date:", octets)) == len(re.findall(rb"(?m)^From:", octets)) == 1
    run("swaks", "--server", house.server, *login, "--auth-password", "wrong", code=28)


def test_nodemailer_logs_in(house: GatewayProcess, tmp_path: Path) -> None:
    order = {"port": house.port, "mails": [{"from": "a@client.example", "to": "b@box.example", "subject": "x", "text": "hi"}]}
    (good,) = nodemailer(**order, auth={"user": "alice", "pass": "wonder land"})
    assert good["accepted"] == ["b@box.example"]
    assert len(mail(tmp_path)) == 1
    (bad,) = nodemailer(**order, auth={"user": "alice", "pass": "wrong"})
    assert bad["code"] == 535


def scram(client: smtplib.SMTP, mechanism: str, binding: bytes | None = None) -> tuple[int, bytes]:
    """A client of SCRAM-SHA-256 as RFC 5802 §3 tells it; no library at hand speaks it over SMTP.
    ``binding``: that of -PLUS, by the server's certificate. Returns what the server says at the end."""
    header = b"n,," if binding is None else b"p=tls-server-end-point,,"
    bare = "n=alice,r=fyko+d2lbbFgONRv9qkxdawL"
    code, text = client.docmd("AUTH", f"{mechanism} " + base64.b64encode(header + bare.encode()).decode())
    assert code == 334
    first = base64.b64decode(text).decode()
    fields = dict(part.split("=", 1) for part in first.split(","))
    salted = hashlib.pbkdf2_hmac("sha256", b"wonder land", base64.b64decode(fields["s"]), int(fields["i"]))
    key = hmac.digest(salted, b"Client Key", "sha256")
    without = f"c={base64.b64encode(header + (binding or b'')).decode()},r={fields['r']}"
    said = f"{bare},{first},{without}".encode()
    signature = hmac.digest(hashlib.sha256(key).digest(), said, "sha256")
    proof = base64.b64encode(bytes(a ^ b for a, b in zip(key, signature, strict=True))).decode()
    code, text = client.docmd(base64.b64encode(f"{without},p={proof}".encode()).decode())
    if code == 334:
        server = hmac.digest(hmac.digest(salted, b"Server Key", "sha256"), said, "sha256")
        assert base64.b64decode(text) == b"v=" + base64.b64encode(server)
        return client.docmd("")
    return code, text


def test_scram_with_proof_of_both_sides(house: GatewayProcess) -> None:
    with smtplib.SMTP("127.0.0.1", house.port, timeout=PATIENCE) as client:
        client.ehlo()
        assert client.esmtp_features["auth"].strip() == "SCRAM-SHA-256 PLAIN LOGIN"
        assert scram(client, "SCRAM-SHA-256")[0] == 235
        assert client.mail("a@client.example")[0] == 250
    assert house.event("authenticated")["mechanism"] == "SCRAM-SHA-256"


# ------------------------------------------------------------------------ under TLS


@pytest.fixture
def safe(gateway: Start, tmp_path: Path, people: str) -> GatewayProcess:
    """Logins under TLS alone; a name of its own for a client that asks for it."""
    users = tmp_path / "users"
    users.write_text(people)
    users.chmod(0o600)
    certified(AUTHORITY, tmp_path / "tls", "mx.gateway.example")
    certified(AUTHORITY, tmp_path / "other", "other.gateway.example")
    secure = """
tls = "starttls"
certificate = "{folder}/tls/certificate.pem"
key = "{folder}/tls/key.pem"
[[listeners.certificates]]
certificate = "{folder}/other/certificate.pem"
key = "{folder}/other/key.pem"
"""
    return gateway(CONFIG.replace("auth_without_tls = true\n", secure).format(users=users, folder=tmp_path))


@contextmanager
def encrypted(house: GatewayProcess, name: str) -> Iterator[smtplib.SMTP]:
    """A client of smtplib behind its STARTTLS, which asked for this name."""
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    with smtplib.SMTP("127.0.0.1", house.port, timeout=PATIENCE) as client:
        client._host = name  # type: ignore[attr-defined] # what smtplib asks for is what it dialled
        assert client.starttls(context=context)[0] == 220
        yield client


def test_smtplib_logs_in_behind_starttls(safe: GatewayProcess, tmp_path: Path) -> None:
    with smtplib.SMTP("127.0.0.1", safe.port, timeout=PATIENCE) as client:
        client.ehlo()
        assert "auth" not in client.esmtp_features
        assert client.docmd("AUTH", "PLAIN " + base64.b64encode(b"\0alice\0wonder land").decode())[0] == 538
    with encrypted(safe, "mx.gateway.example") as client:
        client.ehlo()
        assert client.esmtp_features["auth"].strip() == "SCRAM-SHA-256-PLUS SCRAM-SHA-256 PLAIN LOGIN"
        assert client.login("alice", "wonder land")[0] == 235
        client.sendmail("a@client.example", ["b@box.example"], b"Subject: x\r\n\r\nhi\r\n")
    (octets,) = mail(tmp_path)
    assert b" with ESMTPSA\r\n" in octets.partition(b"Date: ")[0]
    assert safe.event("authenticated")["user"] == "alice"


def test_swaks_logs_in_behind_starttls(safe: GatewayProcess, tmp_path: Path) -> None:
    if program("swaks") is None:
        pytest.skip("swaks is not installed")
    login = ["--auth", "PLAIN", "--auth-user", "alice", "--auth-password", "wonder land", "--from", "a@client.example"]
    run("swaks", "--server", safe.server, *login, "--to", "b@box.example", "--tls")
    (octets,) = mail(tmp_path)
    assert b" with ESMTPSA\r\n" in octets.partition(b"Date: ")[0]
    # In clear there is no offer: it gives up before a word of the password (28: no way to log in).
    assert "AUTH PLAIN" not in run("swaks", "--server", safe.server, *login, "--to", "b@box.example", code=28)


@pytest.mark.parametrize("name", ["mx.gateway.example", "other.gateway.example"])
def test_scram_bound_to_the_certificate_that_was_shown(safe: GatewayProcess, name: str) -> None:
    with encrypted(safe, name) as client:
        client.ehlo()
        assert isinstance(client.sock, ssl.SSLSocket)
        certificate = client.sock.getpeercert(True)
        assert certificate is not None
        # trustme signs by SHA-256.
        assert scram(client, "SCRAM-SHA-256-PLUS", hashlib.sha256(b"another").digest())[0] == 535
        assert scram(client, "SCRAM-SHA-256-PLUS", hashlib.sha256(certificate).digest())[0] == 235
    assert safe.event("authenticated")["mechanism"] == "SCRAM-SHA-256-PLUS"


def test_users_are_read_anew_by_sighup(house: GatewayProcess, tmp_path: Path, people: str) -> None:
    (tmp_path / "users").write_text(people + hashed("new one", "--name", "bob", "--argon2"))
    house.signal(signal.SIGHUP)
    house.event("reloaded")
    with smtplib.SMTP("127.0.0.1", house.port, timeout=PATIENCE) as client:
        assert client.login("bob", "new one")[0] == 235
        # Bob has no SCRAM keys, so SCRAM can no longer be had by everybody.
        client.ehlo()
        assert client.esmtp_features["auth"].strip() == "PLAIN LOGIN"
    (tmp_path / "users").write_text("bob:secret\n")
    house.signal(signal.SIGHUP)
    told = house.event("reload_refused")
    assert "line 1: the hash must be a hash" in told["faults"][0]
    assert "secret" not in json.dumps(told)
    with smtplib.SMTP("127.0.0.1", house.port, timeout=PATIENCE) as client:
        assert client.login("alice", "wonder land")[0] == 235


def test_a_service_that_judges(gateway: Start, tmp_path: Path) -> None:
    with HttpReceiver(lambda request: (204 if request.json()["password"] == "good" else 401, {})) as service:
        config = (
            CONFIG.replace('users_file = "{users}"\n', "").format(folder=tmp_path)
            + f'\n[authentication]\nurl = "{service.url}"\ntimeout = "60s"\n'
        )
        house = gateway(config)
        with smtplib.SMTP("127.0.0.1", house.port, timeout=PATIENCE) as client:
            assert client.login("carol", "good", initial_response_ok=False)[0] == 235
        with smtplib.SMTP("127.0.0.1", house.port, timeout=PATIENCE) as client, pytest.raises(smtplib.SMTPAuthenticationError):
            client.login("carol", "bad")
