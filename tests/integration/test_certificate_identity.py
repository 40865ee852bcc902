"""People and programs whose client certificate says who they are, at a gateway that really runs: smtplib and
openssl as clients, the table changed by SIGHUP, a webhook that is told."""

from __future__ import annotations

import hashlib
import signal
import smtplib
import ssl
from pathlib import Path

import pytest
import trustme

from ..certificates import Certified, certified
from ..conftest import Start
from ..servers import PATIENCE, GatewayProcess, HttpReceiver

AUTHORITY = trustme.CA()

CONFIG = """
hostname = "mx.gateway.example"

[[listeners]]
address = "127.0.0.1:0"
protocol = "submission"
tls = "required"
auth = "required"
certificate = "{mine.certificate}"
key = "{mine.key}"
client_ca = "{folder}/ca.pem"
certificate_identity = "{identity}"

[client_certificates]
"{name}" = "printer@x.example"

[sinks.app]
type = "webhook"
url = "{url}"

[[routes]]
recipients = ["*@app.example"]
authenticated = true
sink = "app"
"""


@pytest.fixture
def printer(tmp_path: Path) -> Certified:
    AUTHORITY.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return certified(AUTHORITY, tmp_path / "printer", "printer.example")


def fingerprint(one: Certified) -> str:
    digits = hashlib.sha256(one.der).hexdigest().upper()
    return "SHA256:" + ":".join(digits[at : at + 2] for at in range(0, 64, 2))


def dial(here: GatewayProcess, shown: Certified | None) -> smtplib.SMTP:
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    context.check_hostname = False
    if shown is not None:
        context.load_cert_chain(*shown.pair)
    client = smtplib.SMTP("127.0.0.1", here.port, timeout=PATIENCE)
    client.starttls(context=context)
    client.ehlo()
    return client


def send(client: smtplib.SMTP, sender: str = "printer@x.example") -> None:
    client.sendmail(sender, ["b@app.example"], b"Subject: x\r\n\r\nhi\r\n")


def test_a_printer_that_knows_no_password(gateway: Start, webhook: HttpReceiver, printer: Certified, tmp_path: Path) -> None:
    mine = certified(AUTHORITY, tmp_path / "mine", "mx.gateway.example")
    words = {"folder": tmp_path, "mine": mine, "identity": "implied", "url": webhook.url}
    here = gateway(CONFIG.format(name=fingerprint(printer), **words))
    with dial(here, printer) as client:
        send(client)
        # Submission: an identity that is an address is held to it.
        with pytest.raises(smtplib.SMTPSenderRefused) as foreign:
            send(client, "somebody@x.example")
        assert foreign.value.smtp_code == 553
    told = webhook.wait(1)[0].json()["data"]["client"]
    assert (told["user"], told["protocol"]) == ("printer@x.example", "ESMTPS")
    assert (here.event("authenticated")["user"], here.event("authenticated")["mechanism"]) == ("printer@x.example", "certificate")
    with dial(here, None) as client, pytest.raises(smtplib.SMTPSenderRefused) as nobody:
        send(client)
    assert nobody.value.smtp_code == 530
    # The printer is sold: a certificate is only as good as the table.
    here.config.write_text(here.config.read_text().replace(fingerprint(printer), "DNS:other.example"))
    here.signal(signal.SIGHUP)
    here.event("reloaded")
    with dial(here, printer) as client, pytest.raises(smtplib.SMTPSenderRefused) as gone:
        send(client)
    assert gone.value.smtp_code == 530


def test_auth_external(gateway: Start, webhook: HttpReceiver, printer: Certified, tmp_path: Path) -> None:
    mine = certified(AUTHORITY, tmp_path / "mine", "mx.gateway.example")
    here = gateway(CONFIG.format(name="DNS:Printer.example", folder=tmp_path, mine=mine, identity="external", url=webhook.url))
    with dial(here, printer) as client:
        assert client.esmtp_features["auth"].split() == ["EXTERNAL"]
        with pytest.raises(smtplib.SMTPSenderRefused):
            send(client)
        assert client.docmd("AUTH", "EXTERNAL =")[0] == 235
        send(client)
    told = webhook.wait(1)[0].json()["data"]["client"]
    assert (told["user"], told["protocol"]) == ("printer@x.example", "ESMTPSA")
    assert here.event("authenticated")["mechanism"] == "EXTERNAL"
    with dial(here, None) as client:
        assert not client.has_extn("auth")
