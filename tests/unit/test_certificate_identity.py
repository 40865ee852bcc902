"""Client certificates that stand for users: what they are called, what the file may say, what AUTH EXTERNAL
takes, and real handshakes at a real listener."""

from __future__ import annotations

import hashlib
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme
from click.testing import CliRunner, Result

from gateway.cli import cli
from gateway.config import Config, ConfigError, certificate_name
from gateway.message import TLS
from gateway.net.secure import names_of_client
from gateway.net.tls import Identity
from gateway.route import Route, Routes
from gateway.smtp import judge
from gateway.smtp.auth import BAD_NAME, MECHANISMS, REFUSED, Granted, mechanism, offered
from gateway.smtp.server import Rules

from ..certificates import Certified, certified
from ..loops import on_both_loops
from .test_listener import fast, house
from .test_listener_tls import AUTHORITY, STRANGERS, trusting, upgraded

__all__ = ["fast"]

# ---------------------------------------------------------------------------- the names


def test_what_a_certificate_can_be_called() -> None:
    shown = {
        "subject": ((("organizationName", "Example, Inc"),), (("commonName", "app"),)),
        "subjectAltName": (("DNS", "App.Example"), ("email", "App@x.example"), ("URI", "spiffe://x/App"), ("IP Address", "192.0.2.1")),
    }
    assert names_of_client(shown, b"der") == (
        f"sha256:{hashlib.sha256(b'der').hexdigest()}",
        "DNS:app.example",
        "email:App@x.example",
        "URI:spiffe://x/App",
        "CN=app,O=Example\\, Inc",
    )
    # Where the subject is empty there is none to be called by, whatever stands for it in the log.
    assert names_of_client({"subjectAltName": (("DirName", "CN=app"),)}, b"")[1:] == ()


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("SHA256:" + ":".join(["AB"] * 32), "sha256:" + "ab" * 32),
        ("sha256:" + "0f" * 32, "sha256:" + "0f" * 32),
        ("dns:App.Example", "DNS:app.example"),
        ("Email:App@x.example", "email:App@x.example"),
        ("uri:spiffe://x/App", "URI:spiffe://x/App"),
        ("CN=app,O=Example\\, Inc", "CN=app,O=Example\\, Inc"),
        ("CN=urn:app", "CN=urn:app"),
    ],
)
def test_how_the_file_writes_them(written: str, name: str) -> None:
    assert certificate_name(written) == name


@pytest.mark.parametrize("written", ["", "app", "sha256:", "sha256:" + "0f" * 31, "sha256:" + "0g" * 32, "DNS:", "IP:192.0.2.1", "md5:00"])
def test_what_is_no_name(written: str) -> None:
    with pytest.raises(ValueError, match="is no "):
        certificate_name(written)


def test_the_surest_name_decides() -> None:
    rules = Rules("mx", Routes([], "mx"), certificates={"CN=app": "weak", "sha256:00": "sure"}, certificate_identity="external")
    assert judge.certified(rules, TLS("", "", names=("sha256:00", "CN=app"))) == "sure"
    assert judge.certified(rules, TLS("", "", names=("sha256:01", "CN=app"))) == "weak"
    assert judge.certified(rules, TLS("", "", names=("sha256:01",))) is None
    # What a proxy told of a certificate is no handshake of ours.
    assert judge.certified(rules, TLS("", "", "CN=app")) is None
    rules.certificate_identity = "off"
    assert judge.certified(rules, TLS("", "", names=("CN=app",))) is None


# ---------------------------------------------------------------------------- the exchange


def test_external() -> None:
    def begin() -> Any:
        return mechanism("External", MECHANISMS, None, "app@x.example")

    assert begin().respond(None) == b""
    assert begin().respond(b"") == Granted("app@x.example")
    assert begin().respond(b"app@x.example") == Granted("app@x.example")
    assert begin().respond(b"root") == REFUSED
    assert begin().respond(b"\0") == BAD_NAME
    assert begin().respond(b"\xff") == BAD_NAME
    assert begin().user == "app@x.example"


def test_external_is_offered_to_nobody_else() -> None:
    assert mechanism("EXTERNAL", MECHANISMS, None) is None
    assert offered(["PLAIN"], None, "app") == ("EXTERNAL", "PLAIN")
    assert offered([], None, "app") == ("EXTERNAL",)
    assert offered(["PLAIN"], None) == ("PLAIN",)


# ---------------------------------------------------------------------------- the file


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Certified:
    return certified(AUTHORITY, tmp_path_factory.mktemp("certificates"), "mx.example")


def parsed(mine: Certified, users: Any = None, **listener: Any) -> Config:
    entry = {"address": "127.0.0.1:0", "tls": "required", "certificate": str(mine.certificate), "key": str(mine.key)}
    table: dict[str, Any] = {
        "hostname": "mx.example",
        "listeners": [entry | {"client_ca": str(mine.certificate)} | listener],
        "sinks": {"a": {"type": "discard"}},
        "routes": [{"recipients": ["*"], "sink": "a", "authenticated": True}],
        "spool": {"path": "/nonexistent"},
    }
    if users is not None:
        table["client_certificates"] = users
    return Config.parse({name: value for name, value in table.items() if value is not None})


APP = {"dns:APP.example": "app"}


def test_a_file_that_is_good(mine: Certified) -> None:
    config = parsed(mine, APP, certificate_identity="implied")
    assert config.client_certificates == {"DNS:app.example": "app"}
    assert not [line for line in config.warnings() if "auth" in line]
    # Nobody else needs to be able to log in.
    assert parsed(mine, APP, certificate_identity="external", auth="required").listeners[0].auth == "required"


@pytest.mark.parametrize(
    ("users", "listener", "fault"),
    [
        (None, {"certificate_identity": "implied"}, "listeners[0].certificate_identity: no certificate stands for anybody"),
        ({}, {"certificate_identity": "implied"}, "listeners[0].certificate_identity: no certificate stands for anybody"),
        (APP, {"certificate_identity": "external"}, "listeners[0].certificate_identity: AUTH EXTERNAL is an AUTH"),
        (APP, {"certificate_identity": "implied", "client_ca": None}, "listeners[0].certificate_identity: client_ca is missing"),
        (APP, {"certificate_identity": "yes"}, "listeners[0].certificate_identity: must be one of off, external, implied"),
        ({"app": "app"}, {}, "client_certificates: 'app' is no name of a certificate"),
        ({"sha256:00": "app"}, {}, "client_certificates: 'sha256:00' is no fingerprint"),
        (APP | {"DNS:app.example": "b"}, {}, "client_certificates: 'DNS:app.example' stands here twice, spelt differently"),
        ({"CN=app": "a\nb"}, {}, 'client_certificates."CN=app": the user\'s name has characters that no login can send'),
        ({"CN=app": ""}, {}, 'client_certificates."CN=app": the user\'s name must have'),
        ({"CN=app": 1}, {}, 'client_certificates."CN=app": must be text in quotes'),
        ([], {}, "client_certificates: must be a table"),
    ],
)
def test_a_file_that_is_not(mine: Certified, users: Any, listener: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(mine, users, **listener)
    assert any(line.startswith(fault) for line in caught.value.faults), caught.value.faults


def test_a_table_that_nobody_looks_at_is_told(mine: Certified) -> None:
    assert "client_certificates: no listener has certificate_identity: no certificate stands for anybody" in parsed(mine, APP).warnings()


# ---------------------------------------------------------------------------- handshakes

ROUTES = Routes([Route(("*",), ("app",), authenticated=True)], "mx.example")


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    path = tmp_path / "ca.pem"
    AUTHORITY.cert_pem.write_to_path(path)
    return path


def shown(*names: str, authority: trustme.CA = AUTHORITY, subject: tuple[str, str] | None = None) -> ssl.SSLContext:
    """``subject``: common name and organization."""
    context = trusting()
    common, organization = subject or (None, None)
    authority.issue_cert(
        *names, common_name=common, organization_name=organization, organization_unit_name=subject and "Mail"
    ).configure_cert(context)
    return context


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
@on_both_loops
async def test_the_certificate_alone_is_the_identity(mine: Certified, ca: Path, tls: str) -> None:
    rules: dict[str, Any] = {"certificates": {"email:app@x.example": "app"}, "certificate_identity": "implied"}
    async with house(tls=tls, auth="required", **rules) as here:
        here.listener.rules.routes = ROUTES
        here.listener.context = Identity((mine.pair,), ca).context()

        async def dialled(context: ssl.SSLContext) -> Any:
            if tls == "starttls":
                return await upgraded(here, context)
            client = await here.dial()
            await client.writer.start_tls(context, server_hostname="mx.example")
            await client.hello()
            await client.say(b"EHLO me.example")
            return client

        client = await dialled(shown("app@x.example"))
        replies = await client.say(b"MAIL FROM:<a@me.example>", b"RCPT TO:<b@here.example>", b"DATA", b"x\r\n.")
        assert replies[-1].startswith(b"250"), replies
        told = here.inbox.mails[0].transaction.client
        # RFC 3848: an A would say that AUTH was used.
        assert (told.user, told.protocol) == ("app", "ESMTPS")
        assert here.told.named("authenticated")[0]["mechanism"] == "certificate"
        for other in (shown("other@x.example"), trusting()):
            client = await dialled(other)
            assert (await client.say(b"MAIL FROM:<a@me.example>"))[0].startswith(b"530 ")


@on_both_loops
async def test_auth_external_over_sockets(mine: Certified, ca: Path) -> None:
    rules: dict[str, Any] = {"certificates": {"CN=app,OU=Mail,O=Example": "app"}, "certificate_identity": "external"}
    async with house(tls="starttls", auth="offered", **rules) as here:
        here.listener.rules.routes = ROUTES
        here.listener.context = Identity((mine.pair,), ca).context()
        client = await upgraded(here, shown("app@x.example", subject=("app", "Example")))
        assert (await client.say(b"MAIL FROM:<a@me.example>", b"RCPT TO:<b@here.example>"))[1].startswith(b"550 5.7.1 ")
        await client.say(b"RSET")
        assert (await client.say(b"AUTH EXTERNAL ="))[0].startswith(b"235 ")
        await client.say(b"MAIL FROM:<a@me.example>", b"RCPT TO:<b@here.example>", b"DATA", b"x\r\n.")
        told = here.inbox.mails[0].transaction.client
        assert (told.user, told.protocol) == ("app", "ESMTPSA")
        # The same subject, by somebody else's word.
        with pytest.raises((ssl.SSLError, AssertionError, ConnectionError)):
            await upgraded(here, shown("app@x.example", authority=STRANGERS, subject=("app", "Example")))
        client = await upgraded(here, shown("app@x.example", subject=("app", "Example, Inc")))
        assert (await client.say(b"AUTH EXTERNAL ="))[0].startswith(b"504 ")


@on_both_loops
async def test_a_session_that_is_resumed_is_the_same_client_s(mine: Certified, ca: Path) -> None:
    rules: dict[str, Any] = {"certificates": {"DNS:app.example": "app"}, "certificate_identity": "implied"}
    async with house(tls="starttls", auth="required", **rules) as here:
        here.listener.rules.routes = ROUTES
        here.listener.context = Identity((mine.pair,), ca, True).context()
        context = shown("app.example")
        for _ in range(2):
            client = await upgraded(here, context)
            assert (await client.say(b"MAIL FROM:<a@me.example>"))[0].startswith(b"250 ")
            await client.say(b"QUIT")


# ---------------------------------------------------------------------------- explained


def test_explain(mine: Certified, tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"

    def explained(identity: str, auth: str, *more: str) -> Result:
        file.write_text(
            f"""
            hostname = "mx.example"
            [[listeners]]
            address = "127.0.0.1:0"
            tls = "starttls"
            certificate = "{mine.certificate}"
            key = "{mine.key}"
            client_ca = "{mine.certificate}"
            certificate_identity = "{identity}"
            auth = "{auth}"
            [client_certificates]
            "DNS:app.example" = "app"
            [users]
            bob = "$scrypt$ln=4,r=8,p=1$c2FsdHNhbHQ$DKmzQqrK7qQQ5XWaJ1DqpQjG8ZrfhsmL5iGRM4ApY/U"
            [sinks.a]
            type = "discard"
            [[routes]]
            recipients = ["*"]
            authenticated = true
            sink = "a"
            """
        )
        words = ["explain", "-c", str(file), "--client", "192.0.2.1", "--from", "a@x.example", "--to", "b@y.example"]
        return CliRunner().invoke(cli, [*words, *more])

    for identity, auth in (("implied", "off"), ("implied", "required"), ("external", "required")):
        found = explained(identity, auth, "--certificate", "dns:APP.example")
        assert found.exit_code == 0, found.output
        assert "as app (DNS:app.example says so)" in found.output
        assert ("(EXTERNAL PLAIN LOGIN)" in found.output) is (auth == "required")
        assert "AUTH EXTERNAL" in explained("external", "offered", "--certificate", "DNS:app.example", "--json").output
        nobody = explained(identity, auth, "--certificate", "CN=other")
        assert nobody.exit_code == 1
        assert "not logged in (CN=other stands for nobody here)" in nobody.output
    off = explained("off", "offered", "--certificate", "DNS:app.example")
    assert off.exit_code == 1
    assert "stands for nobody here" in off.output
    assert "routes[0] fits, but wants an authenticated client" in off.output
    for words in (["app"], ["CN=app", "--user", "bob"], ["CN=app", "--clear"]):
        assert explained("implied", "offered", "--certificate", *words).exit_code == 2
