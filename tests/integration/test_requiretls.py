"""REQUIRETLS (RFC 8689) from a client to a store, through two gateways that really run: real TLS on both hops,
a spool that is read again after a restart, and a next hop that turns out to speak in clear."""

from __future__ import annotations

import smtplib
import ssl
from pathlib import Path

import pytest
import trustme

from ..certificates import certified
from ..conftest import Start
from ..servers import PATIENCE, GatewayProcess, Upstream, free_port, maildir, wait_until

AUTHORITY = trustme.CA()

FRONT = """
hostname = "front.example"

[[listeners]]
address = "127.0.0.1:0"
tls = "starttls"
certificate = "{folder}/front/certificate.pem"
key = "{folder}/front/key.pem"

[sinks.out]
type = "relay"
hosts = ["localhost:{port}"]
tls = "opportunistic"
ca_file = "{folder}/ca.pem"

[sinks.clear]
type = "relay"
hosts = ["localhost:{port}"]
tls = "off"

[sinks.box]
type = "file"
path = "{folder}/bounces"

[retry]
delays = ["1s"]

[bounces]
sink = "box"

[[routes]]
recipients = ["*@store.example"]
sink = "out"

[[routes]]
recipients = ["*@clear.example"]
sink = "clear"
"""

STORE = """
hostname = "store.example"

[[listeners]]
address = "127.0.0.1:{port}"
tls = "starttls"
certificate = "{folder}/store/certificate.pem"
key = "{folder}/store/key.pem"

[sinks.box]
type = "file"
path = "{folder}/box"

[[routes]]
recipients = ["*@store.example"]
sink = "box"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    AUTHORITY.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certified(AUTHORITY, tmp_path / "front", "front.example")
    certified(AUTHORITY, tmp_path / "store", "localhost")
    return tmp_path


def client(front: GatewayProcess) -> smtplib.SMTP:
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    context.check_hostname = False
    smtp = smtplib.SMTP("127.0.0.1", front.port, timeout=PATIENCE)
    smtp.ehlo()
    assert not smtp.has_extn("requiretls")
    smtp.starttls(context=context)
    smtp.ehlo()
    assert smtp.has_extn("requiretls")
    return smtp


def send(front: GatewayProcess, recipient: str = "b@store.example") -> None:
    with client(front) as smtp:
        smtp.sendmail("a@x.example", [recipient], b"Subject: plans\r\n\r\nthe secret\r\n", mail_options=["REQUIRETLS"])


def mails(folder: Path) -> bytes:
    wait_until(lambda: maildir(folder), "a mail")
    (octets,) = maildir(folder)
    return octets


def test_from_the_client_to_the_store(gateway: Start, folder: Path) -> None:
    port = free_port()
    store = gateway(STORE.format(folder=folder, port=port))
    front = gateway(FRONT.format(folder=folder, port=port))
    send(front)
    octets = mails(folder / "box")
    # Both hops say TLS.
    assert octets.count(b" with ESMTPS\r\n") == 2
    assert octets.endswith(b"\r\n\r\nthe secret\r\n")
    store.event("accepted")
    with client(front) as smtp:
        smtp.mail("a@x.example", ["REQUIRETLS"])
        assert smtp.rcpt("b@clear.example")[0:2] == (550, b"5.7.30 REQUIRETLS support required: the way on from here cannot promise TLS")


def test_what_waited_in_the_spool_still_wants_tls(gateway: Start, folder: Path) -> None:
    """Taken while nobody was there; after a restart somebody is, and speaks in clear."""
    port = free_port()
    front = gateway(FRONT.format(folder=folder, port=port))
    send(front)
    front.stop()
    with Upstream(["PIPELINING", "CHUNKING", "8BITMIME"], port=port) as clear:
        front.start()
        report = mails(folder / "bounces")
        assert b"Status: 5.7.10\r\n" in report
        assert b"Subject: plans" in report
        assert b"the secret" not in report
        assert not clear.taken
        assert not any(line.startswith("MAIL") for line in clear.lines)


def test_what_waited_in_the_spool_goes_on_as_it_came(gateway: Start, folder: Path) -> None:
    port = free_port()
    front = gateway(FRONT.format(folder=folder, port=port))
    send(front)
    front.stop()
    gateway(STORE.format(folder=folder, port=port))
    front.start()
    assert mails(folder / "box").count(b" with ESMTPS\r\n") == 2
