"""TLS as others speak it: swaks, Python's smtplib, openssl s_client, our own ``gateway send``,
against a gateway that runs; certificates replaced under load by SIGHUP."""

from __future__ import annotations

import re
import signal
import smtplib
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import trustme

from ..certificates import Certified, certified
from ..conftest import Start
from ..servers import PATIENCE, GatewayProcess, HttpReceiver, program

AUTHORITY = trustme.CA()
NAME = "mx.gateway.example"

CONFIG = """
hostname = "mx.gateway.example"

[[listeners]]
address = "127.0.0.1:0"
tls = "starttls"
certificate = "{folder}/tls/certificate.pem"
key = "{folder}/tls/key.pem"
[[listeners.certificates]]
certificate = "{folder}/other/certificate.pem"
key = "{folder}/other/key.pem"

[[listeners]]
address = "127.0.0.1:0"
tls = "required"
certificate = "{folder}/tls/certificate.pem"
key = "{folder}/tls/key.pem"
client_ca = "{folder}/ca.pem"
client_certificate = "required"

[[listeners]]
address = "127.0.0.1:0"
tls = "implicit"
certificate = "{folder}/tls/certificate.pem"
key = "{folder}/tls/key.pem"

[[listeners]]
address = "127.0.0.1:0"
protocol = "lmtp"
tls = "required"
certificate = "{folder}/tls/certificate.pem"
key = "{folder}/tls/key.pem"

[sinks.hook]
type = "webhook"
url = "{url}"

[[routes]]
recipients = ["*@hook.example"]
sink = "hook"
"""
STARTTLS, CLIENT_CERTIFICATE, IMPLICIT, LMTP = range(4)


@pytest.fixture
def pair(tmp_path: Path) -> Certified:
    AUTHORITY.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certified(AUTHORITY, tmp_path / "other", "other.gateway.example")
    certified(AUTHORITY, tmp_path / "client", "app.client.example")
    return certified(AUTHORITY, tmp_path / "tls", NAME)


@pytest.fixture
def house(gateway: Start, webhook: HttpReceiver, pair: Certified, tmp_path: Path) -> GatewayProcess:
    return gateway(CONFIG.format(url=webhook.url, folder=tmp_path))


def run(*command: str, code: int = 0, stdin: str | None = None) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=5 * PATIENCE, check=False)
    assert done.returncode == code, f"{done.returncode}: {done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def port(house: GatewayProcess, which: int) -> int:
    return int(house.addresses[which].rpartition(":")[2])


def client(webhook: HttpReceiver) -> dict[str, Any]:
    (request,) = webhook.wait(1)
    found: dict[str, Any] = request.json()["data"]["client"]
    return found


def trusting() -> ssl.SSLContext:
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    return context


# ------------------------------------------------------------------------- swaks


def swaks(house: GatewayProcess, which: int, *options: str, code: int = 0) -> str:
    if program("swaks") is None:
        pytest.skip("swaks is not installed")
    return run("swaks", "--server", house.addresses[which], "--helo", "swaks.client.example", "--to", "b@hook.example", *options, code=code)


@pytest.mark.parametrize("version", ["tlsv1_2", "tlsv1_3"])
def test_swaks_starttls(house: GatewayProcess, webhook: HttpReceiver, tmp_path: Path, version: str) -> None:
    # Debian's swaks names versions up to 1.2 and says "yes" to any.
    protocol = ["--tls-protocol", version] if version == "tlsv1_2" else []
    told = swaks(house, STARTTLS, "--tls", "--tls-verify", "--tls-ca-path", str(tmp_path / "ca.pem"), "--tls-sni", NAME, *protocol)
    assert "=== TLS started with cipher TLSv1." in told
    found = client(webhook)
    assert found["protocol"] == "ESMTPS"
    assert found["tls"]["version"] == ("TLSv1.2" if protocol else "TLSv1.3")


def test_swaks_implicit(house: GatewayProcess, webhook: HttpReceiver) -> None:
    assert "=== TLS started" in swaks(house, IMPLICIT, "--tls-on-connect")
    assert client(webhook)["protocol"] == "ESMTPS"


def test_swaks_in_clear_where_tls_is_demanded(house: GatewayProcess) -> None:
    assert "<** 530 5.7.0 say STARTTLS first" in swaks(house, CLIENT_CERTIFICATE, code=23)


def test_swaks_client_certificate(house: GatewayProcess, webhook: HttpReceiver, tmp_path: Path) -> None:
    own = ["--tls-cert", str(tmp_path / "client/certificate.pem"), "--tls-key", str(tmp_path / "client/key.pem")]
    swaks(house, CLIENT_CERTIFICATE, "--tls", *own)
    assert client(webhook)["tls"] is not None
    swaks(house, CLIENT_CERTIFICATE, "--tls", "--tls-protocol", "tlsv1_2", code=29)
    assert house.event("tls_failed")["reason"] == "peer did not return a certificate"


def test_swaks_old_versions(house: GatewayProcess) -> None:
    swaks(house, STARTTLS, "--tls", "--tls-protocol", "tlsv1_1", code=29)
    assert house.event("tls_failed")["reason"]


# ----------------------------------------------------------------------- smtplib


def test_smtplib(house: GatewayProcess, webhook: HttpReceiver) -> None:
    context = trusting()
    context.check_hostname = False
    with smtplib.SMTP("127.0.0.1", port(house, STARTTLS), local_hostname="client.example", timeout=PATIENCE) as smtp:
        smtp.starttls(context=context)
        smtp.sendmail("a@client.example", ["b@hook.example"], b"Subject: x\r\n\r\n" + b"line\r\n" * 100_000)
    with smtplib.SMTP_SSL("127.0.0.1", port(house, IMPLICIT), local_hostname="client.example", timeout=PATIENCE, context=context) as smtp:
        smtp.sendmail("a@client.example", ["b@hook.example"], b"Subject: x\r\n\r\nline\r\n")
    assert [request.json()["data"]["client"]["protocol"] for request in webhook.wait(2)] == ["ESMTPS", "ESMTPS"]


# ----------------------------------------------------------------------- openssl


def s_client(house: GatewayProcess, which: int, *options: str, stdin: str = "QUIT\n", code: int = 0) -> str:
    started = ["-starttls", "smtp"] if which in (STARTTLS, CLIENT_CERTIFICATE) else ["-starttls", "lmtp"] if which == LMTP else []
    command = ["openssl", "s_client", "-connect", house.addresses[which], "-crlf", *started, *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        told = ""
        # It would talk before it is greeted.
        while which == IMPLICIT and "\n220 " not in told and (line := process.stdout.readline()):
            told += line
        told += process.communicate(stdin, timeout=2 * PATIENCE)[0]
    assert process.returncode == code, told
    return told


@pytest.mark.parametrize("which", [STARTTLS, IMPLICIT, LMTP])
def test_openssl(house: GatewayProcess, which: int, tmp_path: Path) -> None:
    told = s_client(house, which, "-CAfile", str(tmp_path / "ca.pem"), "-servername", NAME, "-verify_return_error", "-ign_eof")
    assert "Verify return code: 0 (ok)" in told
    assert re.search("New, TLSv1.3, Cipher is TLS_", told)
    assert "Compression: NONE" in told
    assert "221 2.0.0" in told


def test_openssl_names_the_server(house: GatewayProcess) -> None:
    for name, expected in ((NAME, NAME), ("other.gateway.example", "other.gateway.example"), ("unknown.example", NAME)):
        told = s_client(house, STARTTLS, "-servername", name)
        pem = told[told.index("-----BEGIN") : told.index("-----END") + 26]
        assert expected in run("openssl", "x509", "-noout", "-ext", "subjectAltName", stdin=pem)


@pytest.mark.parametrize("version", ["-tls1", "-tls1_1"])
def test_openssl_old_versions(house: GatewayProcess, version: str) -> None:
    told = s_client(house, STARTTLS, version, "-cipher", "ALL:@SECLEVEL=0", code=1)
    assert "alert protocol version" in told


def test_openssl_resumes(house: GatewayProcess, tmp_path: Path) -> None:
    kept = str(tmp_path / "session")
    s_client(house, IMPLICIT, "-sess_out", kept, "-ign_eof")
    assert "Reused, TLSv1.3" in s_client(house, IMPLICIT, "-sess_in", kept)


# ------------------------------------------------------------------ gateway send


def send(house: GatewayProcess, which: int, *options: str, code: int = 0) -> str:
    server = f"localhost:{port(house, which)}"
    return run(sys.executable, "-m", "gateway", "send", server, "--to", "b@hook.example", *options, code=code)


def test_gateway_send(gateway: Start, webhook: HttpReceiver, pair: Certified, tmp_path: Path) -> None:
    certified(AUTHORITY, tmp_path / "tls", "localhost")
    house = gateway(CONFIG.format(url=webhook.url, folder=tmp_path))
    trust = ("--ca-file", str(tmp_path / "ca.pem"))
    told = send(house, STARTTLS, "--tls", *trust)
    assert "> STARTTLS\n< 220 2.0.0 begin TLS now\n  (TLSv1.3 TLS_AES_256_GCM_SHA384)\n> EHLO " in told
    assert send(house, IMPLICIT, "--implicit-tls", *trust).startswith("  (TLSv1.3 ")
    send(house, LMTP, "--lmtp", "--tls", *trust)
    own = ("--certificate", str(tmp_path / "client/certificate.pem"), "--key", str(tmp_path / "client/key.pem"))
    send(house, CLIENT_CERTIFICATE, "--tls", *trust, *own)
    assert len(webhook.wait(4)) == 4
    # Nothing goes out where the certificate is not good, unless that is what is wanted.
    assert "! the server's certificate is not good: " in send(house, STARTTLS, "--tls", code=1)
    assert len(webhook.requests) == 4
    send(house, STARTTLS, "--tls", "--insecure")
    assert "! no TLS came about: " in send(house, STARTTLS, "--implicit-tls", "--insecure", code=1)
    assert len(webhook.wait(5)) == 5


def test_gateway_send_never_goes_on_in_clear(gateway: Start, tmp_path: Path, webhook: HttpReceiver) -> None:
    config = '[[listeners]]\naddress = "127.0.0.1:0"\n' + CONFIG[CONFIG.index("[sinks.hook]") :].format(url=webhook.url)
    house = gateway(config)
    told = send(house, 0, "--tls", "--insecure", code=1)
    assert "! the server does not offer STARTTLS, and the mail shall not go in clear" in told
    assert "MAIL FROM" not in told


# ------------------------------------------------------------------------ reload


@pytest.mark.parametrize("head", ["", "workers = 2\n"])
def test_hangup_under_load(gateway: Start, webhook: HttpReceiver, pair: Certified, tmp_path: Path, head: str) -> None:
    """T4: certificates are replaced and SIGHUP sent while 200 clients and more shake hands; none fails,
    and those that are in stay."""
    house = gateway(head + CONFIG.format(url=webhook.url, folder=tmp_path))
    failed: list[Exception] = []
    shaken: list[bytes | None] = []
    enough = threading.Event()
    context = trusting()
    context.check_hostname = False
    inside = smtplib.SMTP_SSL("127.0.0.1", port(house, IMPLICIT), timeout=PATIENCE, context=context)

    def shake() -> None:
        while not enough.is_set():
            try:
                with smtplib.SMTP_SSL("127.0.0.1", port(house, IMPLICIT), timeout=PATIENCE, context=context) as smtp:
                    assert isinstance(smtp.sock, ssl.SSLSocket)
                    assert smtp.noop()[0] == 250
                    shaken.append(smtp.sock.getpeercert(True))
            except Exception as error:
                failed.append(error)

    clients = [threading.Thread(target=shake) for _ in range(8)]
    for thread in clients:
        thread.start()
    reloads = 0
    deadline = time.monotonic() + 2 * PATIENCE
    try:
        while not failed and (len(shaken) < 200 or len(set(shaken)) < 2):
            certified(AUTHORITY, tmp_path / "tls", NAME)
            house.signal(signal.SIGHUP)
            reloads += 1
            house.event("reloaded", count=reloads * (2 if head else 1))
            assert time.monotonic() < deadline, f"{reloads} reloads, {len(shaken)} handshakes, {len(set(shaken))} certificates"
    finally:
        enough.set()
        for thread in clients:
            thread.join()
    assert not failed, failed
    assert inside.noop()[0] == 250
    inside.quit()
    assert not house.found("tls_failed")
