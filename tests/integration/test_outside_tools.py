"""What people try on somebody else's mail server, against a gateway that runs: nmap's SMTP
scripts, swaks with each of its AUTH and TLS options, openssl s_client with each version, and
testssl.sh beside ``openssl s_server`` with the same settings and certificate."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from xml.etree import ElementTree

import pytest
import trustme

from gateway.net.tls import CIPHERS

from ..certificates import Certified, certified
from ..conftest import Start
from ..servers import PATIENCE, GatewayProcess, HttpReceiver, Upstream, free_port, program, reachable, wait_until
from .test_logins import hashed

pytestmark = pytest.mark.long

AUTHORITY = trustme.CA()
STRANGERS = trustme.CA()
NAME = "mx.gateway.example"

LISTENER = """
[[listeners]]
address = "127.0.0.1:0"
tls = "{tls}"
certificate = "{folder}/tls/certificate.pem"
key = "{folder}/tls/key.pem"
"""
#: A gateway before somebody's mail server, as the README has it: a domain to a relay, one to a hook.
CONFIG = (
    """
hostname = "mx.gateway.example"

[[listeners]]
address = "127.0.0.1:0"
"""
    + "".join(LISTENER.replace("{tls}", tls) for tls in ("starttls", "required", "implicit"))
    + """
[[listeners]]
address = "127.0.0.1:0"
tls = "required"
certificate = "{folder}/tls/certificate.pem"
key = "{folder}/tls/key.pem"
client_ca = "{folder}/ca.pem"
client_certificate = "required"

[[listeners]]
address = "127.0.0.1:0"
protocol = "submission"
tls = "starttls"
certificate = "{folder}/tls/certificate.pem"
key = "{folder}/tls/key.pem"
auth = "required"

[users]
alice = {hash}

[senders]
"alice" = ["*"]

[sinks.hook]
type = "webhook"
url = "{url}"

[sinks.out]
type = "relay"
hosts = ["{upstream}"]
tls = "off"

[[routes]]
recipients = ["*@hook.example", "root@mailboxes.example"]
sink = "hook"

[[routes]]
recipients = ["*@relayed.example"]
sink = "out"
"""
)
CLEAR, STARTTLS, REQUIRED, IMPLICIT, CLIENT_CERTIFICATE, SUBMISSION = range(6)


@pytest.fixture(scope="module")
def people() -> str:
    return hashed("wonder land").strip()


@pytest.fixture
def pair(tmp_path: Path) -> Certified:
    AUTHORITY.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    STRANGERS.cert_pem.write_to_path(str(tmp_path / "strangers.pem"))
    certified(AUTHORITY, tmp_path / "client", "app.client.example")
    certified(STRANGERS, tmp_path / "stranger", "app.client.example")
    return certified(AUTHORITY, tmp_path / "tls", NAME)


@pytest.fixture
def house(gateway: Start, webhook: HttpReceiver, upstream: Upstream, pair: Certified, people: str, tmp_path: Path) -> GatewayProcess:
    return gateway(CONFIG.format(url=webhook.url, upstream=upstream.address, folder=tmp_path, hash=json.dumps(people)))


def run(*command: str, code: int | None = 0, stdin: str | None = None, timeout: float = 5 * PATIENCE) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)
    assert code is None or done.returncode == code, f"{done.returncode}: {done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


# -------------------------------------------------------------------------- nmap


#: The listeners that nmap's scripts can talk to: it knows no STARTTLS, and takes its time with what never greets in clear.
SCANNED = (CLEAR, STARTTLS, REQUIRED, SUBMISSION)


def nmap(house: GatewayProcess, *scripts: str, arguments: str = "") -> dict[int, dict[str, str]]:
    """What each script said, by its name, of each listener."""
    if program("nmap") is None:
        pytest.skip("nmap is not installed")
    ports = {which: house.addresses[which].rpartition(":")[2] for which in SCANNED}
    # "+": also where the port is none of SMTP's.
    chosen = ["--script", ",".join(f"+{name}" for name in scripts), *(["--script-args", arguments] if arguments else [])]
    told = run("nmap", "-n", "-Pn", "-sT", "-v", "-p", ",".join(ports.values()), *chosen, "-oX", "-", "127.0.0.1", timeout=10 * PATIENCE)
    found = {
        port.get("portid"): {script.get("id", ""): script.get("output", "") for script in port.iter("script")}
        for port in ElementTree.fromstring(told[: told.index("</nmaprun>") + 10]).iter("port")
    }
    return {which: found[port] for which, port in ports.items()}


def test_nmap_finds_no_open_relay(house: GatewayProcess, webhook: HttpReceiver, upstream: Upstream) -> None:
    """R1: each of the sixteen probes is refused, where they may be tried at all."""
    told = nmap(house, "smtp-open-relay")
    for which, scripts in told.items():
        # Without TLS, without a login it hears 530.
        expected = "all tests failed" if which in (CLEAR, STARTTLS) else "authentication needed"
        assert expected in scripts["smtp-open-relay"], told
    house.event("refused", count=16, stage="recipient", listener=house.server)
    refused = house.found("refused", stage="recipient", listener=house.server)
    assert len(refused) == 16
    assert {event["code"] for event in refused} == {501, 550}
    assert not house.found("accepted")
    assert not upstream.taken


def test_nmap_finds_no_users(house: GatewayProcess) -> None:
    """C8: not by VRFY and EXPN, though root@mailboxes.example, the first that it asks for, is one."""
    arguments = "smtp-enum-users.methods={VRFY,EXPN},smtp-enum-users.domain=mailboxes.example"
    told = nmap(house, "smtp-enum-users", arguments=arguments)[CLEAR]
    assert "Couldn't find any accounts" in told["smtp-enum-users"], told


def test_nmap_reads_what_is_offered(house: GatewayProcess) -> None:
    told = nmap(house, "smtp-commands")
    for which in (CLEAR, STARTTLS):
        offered = told[which]["smtp-commands"].partition("\n")[0].split(", ")
        assert offered[0] == NAME
        assert {"PIPELINING", "8BITMIME", "SMTPUTF8", "CHUNKING", "MT-PRIORITY"} <= set(offered)
        assert ("STARTTLS" in offered) is (which == STARTTLS)


# ------------------------------------------------------------------------- swaks


def swaks(house: GatewayProcess, which: int, *options: str, code: int = 0) -> str:
    if program("swaks") is None:
        pytest.skip("swaks is not installed")
    envelope = ["--helo", "swaks.client.example", "--from", "a@client.example", "--to", "b@hook.example"]
    return run("swaks", "--server", house.addresses[which], *envelope, *options, code=code)


LOGIN = ["--tls", "--auth-user", "alice", "--auth-password", "wonder land"]


def test_swaks_auth(house: GatewayProcess, webhook: HttpReceiver) -> None:
    """Each way to log in that swaks knows, and each of its options: those we have work by any name
    and in any form, those we have not are refused without harm."""
    good = [
        ["--auth"],
        ["--auth", "PLAIN"],
        ["--auth", "LOGIN"],
        ["--auth", "CRAM-MD5,PLAIN"],
        ["--auth-optional"],
        ["--auth-optional-strict"],
        ["--auth-hide-password"],
        ["--auth-plaintext"],
    ]
    for options in good:
        assert "235 2.7.0" in swaks(house, SUBMISSION, *LOGIN, *options), options
    assert [request.json()["data"]["client"]["user"] for request in webhook.wait(len(good))] == ["alice"] * len(good)
    wrong = [*LOGIN[:-1], "wrong"]
    for options in (["--auth", "PLAIN"], ["--auth", "LOGIN"], ["--auth"]):
        assert "535 5.7.8" in swaks(house, SUBMISSION, *wrong, *options, code=28), options
    # Without a login the mail is refused, not the session.
    assert "530 5.7.0" in swaks(house, SUBMISSION, *wrong, "--auth-optional", code=23)
    # Not offered in clear, nor taken.
    assert "*** Host did not advertise authentication" in swaks(house, SUBMISSION, *LOGIN[1:], "--auth", "PLAIN", code=28)
    for name in ("CRAM-MD5", "CRAM-SHA1"):
        # swaks does not even try what is not offered; T5-faults.smtp does, also with those it has not here.
        assert "*** Auth not attempted" in swaks(house, SUBMISSION, *LOGIN, "--auth", name, code=28), name
    assert len(webhook.requests) == len(good)


def test_swaks_tls(house: GatewayProcess, webhook: HttpReceiver, tmp_path: Path) -> None:
    """Each of its TLS options where it can work, and where it cannot."""
    trust = ["--tls-verify", "--tls-ca-path", str(tmp_path / "ca.pem"), "--tls-sni", NAME]
    shown = tmp_path / "shown.pem"
    good = [
        (STARTTLS, ["--tls"], "TLSv1.3"),
        (STARTTLS, ["--tls-optional"], "TLSv1.3"),
        (STARTTLS, ["--tls-optional-strict"], "TLSv1.3"),
        (CLEAR, ["--tls-optional"], None),
        (CLEAR, ["--tls-optional-strict"], None),
        (REQUIRED, ["--tls"], "TLSv1.3"),
        (REQUIRED, ["--tls", "--tls-protocol", "tlsv1_2"], "TLSv1.2"),
        (REQUIRED, ["--tls", "--tls-protocol", "no_sslv3,no_tlsv1,no_tlsv1_1"], "TLSv1.3"),
        (REQUIRED, ["--tls", "--tls-protocol", "tlsv1_2", "--tls-cipher", "ECDHE-ECDSA-CHACHA20-POLY1305"], "TLSv1.2"),
        (REQUIRED, ["--tls", *trust], "TLSv1.3"),
        (REQUIRED, ["--tls", "--tls-get-peer-cert", str(shown)], "TLSv1.3"),
        (IMPLICIT, ["--tls-on-connect"], "TLSv1.3"),
        (IMPLICIT, ["--tls-on-connect", *trust], "TLSv1.3"),
        (CLIENT_CERTIFICATE, ["--tls", *keys(tmp_path / "client")], "TLSv1.3"),
    ]
    for number, (which, options, version) in enumerate(good, 1):
        swaks(house, which, *options)
        tls = webhook.wait(number)[-1].json()["data"]["client"]["tls"]
        assert (tls and tls["version"]) == version, options
    assert "BEGIN CERTIFICATE" in shown.read_text()
    bad = [
        (CLEAR, ["--tls"], 29),
        (REQUIRED, [], 23),
        (REQUIRED, ["--tls", "--tls-protocol", "tlsv1"], 29),
        (REQUIRED, ["--tls", "--tls-protocol", "tlsv1_1"], 29),
        (REQUIRED, ["--tls", "--tls-protocol", "tlsv1_2", "--tls-cipher", "AES128-SHA"], 29),
        (REQUIRED, ["--tls", "--tls-verify", "--tls-ca-path", str(tmp_path / "strangers.pem")], 29),
        (CLEAR, ["--tls-on-connect"], 29),
        # Under TLS 1.3 a client hears of its certificate behind its own handshake.
        (CLIENT_CERTIFICATE, ["--tls", "--tls-protocol", "tlsv1_2"], 29),
        (CLIENT_CERTIFICATE, ["--tls", "--tls-protocol", "tlsv1_2", *keys(tmp_path / "stranger")], 29),
    ]
    for which, options, code in bad:
        swaks(house, which, *options, code=code)
    assert len(webhook.requests) == len(good)


def keys(folder: Path) -> list[str]:
    return ["--tls-cert", str(folder / "certificate.pem"), "--tls-key", str(folder / "key.pem")]


# ------------------------------------------------------------------------- openssl


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_openssl_starttls_and_resumption(house: GatewayProcess, tmp_path: Path, version: str) -> None:
    """A whole mail by s_client, then another over the resumed session; with each version."""
    kept = str(tmp_path / "session")
    steps = [
        ("EHLO client.example\n", "(?m)^250 "),
        ("MAIL FROM:<a@client.example>\nRCPT TO:<b@hook.example>\nDATA\n", "(?m)^354 "),
        ("Subject: x\n\nQUIT\n.\n", "(?m)^250 2.0.0"),
    ]
    for which, started in ((STARTTLS, ["-starttls", "smtp"]), (IMPLICIT, [])):
        for resumed in (False, True):
            session = ["-sess_in", kept] if resumed else ["-sess_out", kept]
            command = ["openssl", "s_client", "-connect", house.addresses[which], "-crlf", version, *started, *session]
            trust = ["-CAfile", str(tmp_path / "ca.pem"), "-verify_hostname", NAME, "-verify_return_error", "-ign_eof"]
            with subprocess.Popen(
                [*command, *trust], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ) as process:
                assert process.stdin is not None
                assert process.stdout is not None
                told = _until(process.stdout, "(?m)^220 " if which == IMPLICIT else "(?m)^250 ")
                for text, wanted in steps:
                    process.stdin.write(text)
                    process.stdin.flush()
                    told += _until(process.stdout, wanted)
                process.stdin.write("QUIT\n")
                process.stdin.close()
                told += process.stdout.read()
                process.wait(PATIENCE)
            assert "221 2.0.0" in told
            assert ("Reused, TLSv" if resumed else "New, TLSv") in told
            assert "Verification: OK" in told or "Verify return code: 0" in told
    wait_until(lambda: len(house.found("accepted")) == 4, "the mails")


def _until(stream: IO[str], wanted: str) -> str:
    """What is said up to the line that matches."""
    told = ""
    while not re.search(wanted, told):
        line = stream.readline()
        assert line, told
        told += line
    return told


# ------------------------------------------------------------------------- testssl


@contextmanager
def s_server(folder: Path) -> Iterator[int]:
    """``openssl s_server`` with what ``net/tls.py`` sets, and the same certificate; its port."""
    port = free_port()
    same = ["-cipher", CIPHERS, "-serverpref", "-no_tls1", "-no_tls1_1", "-no_ssl3", "-no_renegotiation", "-no_comp"]
    pair = ["-cert", str(folder / "certificate.pem"), "-key", str(folder / "key.pem")]
    process = subprocess.Popen(
        ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-quiet", *same, *pair],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(lambda: reachable(port), "s_server")
        yield port
    finally:
        process.kill()
        process.wait()


#: What testssl.sh says of a certificate that no public authority signed, and of a name nobody published.
ABOUT_CERTIFICATES = re.compile(r"cert_|DNS_")


def findings(address: str, found: Path, *options: str) -> dict[str, dict[str, str]]:
    """All that testssl.sh says, by what it is about."""
    testssl = program("testssl")
    if testssl is None:
        pytest.skip("testssl.sh is not installed")
    command = [testssl, "--quiet", "--color", "0", "--warnings", "off", "--jsonfile", str(found), *options, address]
    subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60 * PATIENCE, check=False)
    told = {one["id"]: one for one in json.loads(found.read_text())}
    assert told["TLS1_3"]["finding"].startswith("offered"), told
    return told


def serious(told: dict[str, dict[str, str]]) -> set[str]:
    return {name for name, one in told.items() if one["severity"] in ("MEDIUM", "HIGH", "CRITICAL")}


@pytest.mark.parametrize("which", [STARTTLS, IMPLICIT])
def test_testssl(house: GatewayProcess, tmp_path: Path, which: int) -> None:
    """Nothing of MEDIUM or above but what is said of the certificate; and with implicit TLS nothing,
    not even of that, which is not said of OpenSSL's own server with these settings, too."""
    ours = findings(house.addresses[which], tmp_path / "ours.json", *(["-t", "smtp"] if which == STARTTLS else []))
    assert ours["secure_client_renego"]["finding"].startswith("not vulnerable"), ours
    assert not [name for name in serious(ours) if not ABOUT_CERTIFICATES.search(name)], ours
    assert not house.found("bug")
    if which == IMPLICIT:
        with s_server(tmp_path / "tls") as port:
            theirs = findings(f"127.0.0.1:{port}", tmp_path / "theirs.json")
        assert serious(ours) <= serious(theirs), (serious(ours), serious(theirs))
