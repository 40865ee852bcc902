"""The configuration: what is taken, how it comes out, and every fault with its exact place."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gateway import passwords
from gateway.config import (
    CHECKS,
    SINKS,
    Admin,
    Bounces,
    Config,
    ConfigError,
    DiscardConfig,
    FileConfig,
    Head,
    Limits,
    ListenerConfig,
    LmtpConfig,
    PluginSinkConfig,
    PythonConfig,
    RelayConfig,
    Reserve,
    Retry,
    RouteConfig,
    SpoolConfig,
    StdoutConfig,
    Table,
    WebhookConfig,
    split_address,
    state_folder,
)
from gateway.message import Client, Message
from gateway.reply import Reply
from gateway.route import Route

EXAMPLE = Path(__file__).parents[2] / "examples" / "gateway.toml"
SECRET = "whsec_Z2F0ZXdheSBleGFtcGxlIHNlY3JldCE="

#: The smallest file that is good; tests add to it or replace its tables.
GOOD: dict[str, str] = {
    "head": 'hostname = "mx.example.net"',
    "listeners": '[[listeners]]\naddress = "127.0.0.1:2525"',
    "sinks": '[sinks.app]\ntype = "discard"',
    "routes": '[[routes]]\nrecipients = ["*@app.example"]\nsink = "app"',
}


def text(**tables: str) -> str:
    return "\n".join((GOOD | tables).values()) + "\n"


def load(tmp_path: Path, toml: str, environment: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None) -> Config:
    file = tmp_path / "gateway.toml"
    file.write_text(toml)
    return Config.load(file, environment=environment or {}, flags=flags)


def faults(tmp_path: Path, toml: str, environment: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, toml, environment, flags)
    assert str(caught.value) == "\n".join(caught.value.faults)
    return caught.value.faults


# ------------------------------------------------------------------------------- what is taken


def test_the_smallest_file_and_its_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, text())
    assert config.hostname == "mx.example.net"
    assert config.workers == config.worker_count == 1
    assert config.limits == Limits()
    assert (config.limits.message_size, config.limits.minimum_rate) == (25 * 1024 * 1024, 500)
    assert (config.limits.command_timeout, config.limits.idle_timeout) == (300.0, 300.0)
    assert config.drain.timeout == 30.0
    assert config.spool.path == tmp_path / "spool"
    assert (config.spool.hold, config.spool.minimum_free) == (0.025, Reserve(share=0.05))
    assert config.retry.delays == [60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 14400.0]
    assert config.retry.expire == 432_000.0
    assert isinstance(config.sinks["app"], DiscardConfig)
    assert config.bounces is None
    assert config.admin is None
    assert config.checks == {}


def test_on_failure_is_bounce_toward_mail_servers_only(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        text(
            sinks='[sinks.app]\ntype="webhook"\nurl="http://a.example/"\n[sinks.out]\ntype="relay"\nhosts=["a.example"]\n'
            '[sinks.box]\ntype="lmtp"\naddress="unix:/run/lmtp"\n[sinks.f]\ntype="file"\npath="box"'
        ),
    )
    assert {name: sink.on_failure for name, sink in config.sinks.items()} == {
        "app": "dead_letter",
        "out": "bounce",
        "box": "bounce",
        "f": "dead_letter",
    }
    assert {name for name, sink in config.sinks.items() if sink.relays} == {"out", "box"}


def test_values_come_out_ready_for_use(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        text(
            sinks='[sinks.app]\ntype="relay"\nhosts=["a.example", "192.0.2.1:2525", "[2001:db8::1]", "[::1]:26"]\ntimeout="1h30m"\nidle=5\n'
            '[sinks.box]\ntype="lmtp"\nhosts=["127.0.0.1"]',
            routes='[[routes]]\nrecipients=["*"]\nclients=["10.0.0.0/8","192.0.2.7","2001:db8::/32"]\nsinks=["app","box"]',
            limits='[limits]\nmessage_size="1.5 MB"\nminimum_rate="2KiB"\ndata_timeout="250ms"\nmemory="1GiB"',
            spool='[spool]\nminimum_free="2 GiB"\nhold="0s"',
        ),
    )
    app, box = config.sinks["app"], config.sinks["box"]
    assert isinstance(app, RelayConfig)
    assert isinstance(box, LmtpConfig)
    assert app.hosts == ["a.example:25", "192.0.2.1:2525", "[2001:db8::1]:25", "[::1]:26"]
    assert box.hosts == ["127.0.0.1:24"]
    assert (app.timeout, app.idle) == (5400.0, 5.0)
    assert config.routes[0].clients == [ip_network("10.0.0.0/8"), ip_network("192.0.2.7/32"), ip_network("2001:db8::/32")]
    assert config.routes[0].carriers == ("app", "box")
    assert config.limits.message_size == 1_500_000
    assert (config.limits.minimum_rate, config.limits.data_timeout, config.limits.memory) == (2048, 0.25, 2**30)
    assert config.spool.minimum_free == Reserve(octets=2 * 2**30)
    assert config.spool.minimum_free.needed(100) == 2 * 2**30
    assert config.spool.hold == 0.0


def test_a_share_of_the_disk() -> None:
    assert Reserve(share=0.05).needed(1000) == 50


def test_lmtp_takes_one_address_or_hosts() -> None:
    assert LmtpConfig(address="127.0.0.1").hosts == ["127.0.0.1:24"]
    assert LmtpConfig(hosts=["unix:/run/x"]).hosts == ["unix:/run/x"]
    assert LmtpConfig(hosts=["127.0.0.1"]).hosts == ["127.0.0.1:24"]
    assert LmtpConfig(address="a.example").hosts == ["a.example:24"]  # defaults are not shared between them


def test_the_hostname_default_is_the_machines_or_localhost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Named:
        nodename = "Box-7.Example.NET"

    monkeypatch.setattr("os.uname", Named)
    assert load(tmp_path, text(head="")).hostname == "box-7.example.net"
    Named.nodename = "under_score"
    assert load(tmp_path, text(head="")).hostname == "localhost"


def test_models_are_frozen(tmp_path: Path) -> None:
    config = load(tmp_path, text())
    with pytest.raises(ValidationError, match="frozen"):
        config.hostname = "x"
    with pytest.raises(ValidationError, match="frozen"):
        config.limits.hops = 1


def test_the_table_is_what_the_file_says(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        text(
            sinks='[sinks.app]\ntype="discard"\n[sinks.out]\ntype="relay"\nhosts=["a.example"]',
            checks='[checks.policy]\ntype="http"\nurl="http://127.0.0.1:1/"\nstages=["recipient","content"]\n'
            '[checks.early]\ntype="http"\nurl="http://127.0.0.1:1/"\nstages=["client","sender"]',
            routes='[[routes]]\nrecipients=["*@app.example"]\nsink="app"\nacknowledge="delivered"\nacknowledge_timeout="2s"\n'
            'fallback="refuse"\nchecks=["policy"]\n'
            '[[routes]]\nrecipients=["*"]\nclients=["127.0.0.1"]\nsink="out"\nodd_local_parts=true',
        ),
    )
    table = config.table()
    assert table.routes == (
        Route(
            recipients=("*@app.example",),
            sinks=("app",),
            acknowledge="delivered",
            acknowledge_timeout=2.0,
            fallback="refuse",
            checks=("policy",),
            requiretls=True,
        ),
        Route(recipients=("*",), sinks=("out",), clients=(ip_network("127.0.0.1/32"),), odd_local_parts=True, relays=True, requiretls=True),
    )
    assert table.hostname == "mx.example.net"
    assert (config.checks_at("client"), config.checks_at("recipient")) == (("early",), ("policy",))
    assert (config.checks_at("sender"), config.checks_at("content")) == (("early",), ("policy",))


def test_lmtp_counts_as_a_mail_server_in_the_table(tmp_path: Path) -> None:
    config = load(tmp_path, text(sinks='[sinks.app]\ntype="lmtp"\naddress="127.0.0.1:24"'))
    assert config.table().routes[0].relays
    assert isinstance(config.table().find("a%b", "app.example", Client("192.0.2.1")), Reply)


# ------------------------------------------------------------------------- secrets, environment


def test_secrets_from_files_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    (tmp_path / "key").write_text(f"{SECRET}\n")
    (tmp_path / "pw").write_text("päss word\r\n")
    config = load(
        tmp_path,
        text(
            sinks='[sinks.app]\ntype="webhook"\nurl="http://a.example/"\nsecret_file="key"\nprevious_secret_file="key"\n'
            f'[sinks.out]\ntype="relay"\nhosts=["a.example"]\ntls="verify"\nusername="u"\npassword_file="{tmp_path}/pw"',
        ),
    )
    app, out = config.sinks["app"], config.sinks["out"]
    assert isinstance(app, WebhookConfig)
    assert isinstance(out, RelayConfig)
    assert (app.secret, app.previous_secret, out.password) == (SECRET, SECRET, "päss word")
    assert app.secret_file == tmp_path / "key"
    assert SECRET not in repr(config)
    assert "päss" not in repr(config)


def test_the_environment_in_texts(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        text(sinks='[sinks.app]\ntype="webhook"\nurl="http://${HOST}:${PORT}/$${x}"\nheaders={ "x-token" = "${TOKEN}" }'),
        {"HOST": "a.example", "PORT": "8000", "TOKEN": "t"},
    )
    app = config.sinks["app"]
    assert isinstance(app, WebhookConfig)
    assert app.url == "http://a.example:8000/${x}"
    assert app.headers == {"x-token": "t"}


def test_flags_over_environment_over_file(tmp_path: Path) -> None:
    toml = text(
        head='hostname = "file.example"\nworkers = 1', sinks='[sinks.App-1]\ntype="file"\npath="a"', limits="[limits]\nhops = 10"
    ).replace('sink = "app"', 'sink = "App-1"')
    environment = {
        "GATEWAY_HOSTNAME": "env.example",
        "GATEWAY_WORKERS": "2",
        "GATEWAY_LIMITS__MESSAGE_SIZE": "1 MiB",
        "GATEWAY_LIMITS__HOPS": "20",
        "GATEWAY_SINKS__APP-1__CONCURRENCY": "3",
        "GATEWAY_LISTENERS__0__ADDRESS": "127.0.0.1:25",
        "GATEWAY_LISTENERS__1__ADDRESS": "127.0.0.1:26",
        "GATEWAY_ROUTES__0__RECIPIENTS": '["*@b.example"]',
        "GATEWAY_ADMIN__ADDRESS": "127.0.0.1:0",
        "GATEWAY_SERVICE_HOST": "somebody else's",
        "GATEWAY_INTERFACE": "CGI/1.1",
    }
    config = load(tmp_path, toml, environment, {"hostname": "flag.example", "spool.path": "/x"})
    assert (config.hostname, config.workers) == ("flag.example", 2)
    assert (config.limits.message_size, config.limits.hops) == (2**20, 20)
    assert config.sinks["App-1"].concurrency == 3
    assert [listener.address for listener in config.listeners] == ["127.0.0.1:25", "127.0.0.1:26"]
    assert config.routes[0].recipients == ["*@b.example"]
    assert config.spool.path == Path("/x")
    assert config.admin is not None
    assert load(tmp_path, toml, environment).hostname == "env.example"
    assert load(tmp_path, toml).hostname == "file.example"


def test_faults_of_the_environment(tmp_path: Path) -> None:
    assert faults(
        tmp_path,
        text(),
        {
            "GATEWAY_LIMTS__HOPS": "1",
            "GATEWAY_LIMITS__HOP": "1",
            "GATEWAY_LISTENERS__7__ADDRESS": "127.0.0.1:1",
            "GATEWAY_ROUTES__0__RECIPIENTS": '["a@b.example"',
            "GATEWAY_WORKERS": "many",
        },
    ) == [
        "GATEWAY_LIMTS__HOPS: the file has no limts.hops; did you mean 'limits'?",
        "GATEWAY_ROUTES__0__RECIPIENTS: is neither text nor a list or table as TOML writes it",
        "workers: must be a whole number",
        "listeners: the environment names entry '7', and there are 1; entries are counted from 0",
        "limits.hop: unknown key; did you mean 'hops'?",
    ]


def test_whole_entries_of_the_environment(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        text(head="hostname = 'h.example'", sinks=""),
        {"GATEWAY_LISTENERS__0": '{ address = "[::1]:0" }', "GATEWAY_SINKS__APP__TYPE": "discard"},
    )
    assert config.listeners == [ListenerConfig(address="[::1]:0")]
    assert config.sinks == {"app": DiscardConfig()}
    assert faults(tmp_path, text(head="limits = 5"), {"GATEWAY_LIMITS__HOPS": "5"}) == ["limits: must be a table"]
    listed = faults(tmp_path, text(), {"GATEWAY_ROUTES__FIRST__SINK": "app"})
    assert listed == ["routes: the environment names entry 'first', and there are 1; entries are counted from 0"]


def test_as_many_workers_as_cores(tmp_path: Path) -> None:
    assert load(tmp_path, text(head="workers = 0")).worker_count == len(os.sched_getaffinity(0))


def test_reload_goes_by_the_same_flags(tmp_path: Path) -> None:
    config = load(tmp_path, text(), {"GATEWAY_WORKERS": "2"}, {"hostname": "flag.example"})
    (tmp_path / "gateway.toml").write_text(text(head='hostname = "new.example"', limits="[limits]\nhops = 7"))
    again = config.reload()
    assert (again.hostname, again.workers, again.limits.hops) == ("flag.example", 2, 7)
    assert again.reload() == again
    (tmp_path / "gateway.toml").write_text(text(head="workers = 1", limits="[limits]\nhops = 0"))
    with pytest.raises(ConfigError) as caught:
        again.reload()
    assert caught.value.faults == ["limits.hops: must be at least 1"]
    quick = Config.quick(to=["discard:"], environment={})
    assert quick.reload() is quick


# ------------------------------------------------------------------------------ without a file


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("http://127.0.0.1:8000/in?x=1", WebhookConfig(url="http://127.0.0.1:8000/in?x=1")),
        ("https://app.example/in", WebhookConfig(url="https://app.example/in")),
        ("webhook+http://127.0.0.1:8000/in", WebhookConfig(url="http://127.0.0.1:8000/in")),
        ("webhook+https://app.example/in", WebhookConfig(url="https://app.example/in")),
        ("smtp://127.0.0.1:2526", RelayConfig(hosts=["127.0.0.1:2526"])),
        ("smtp://[::1]:2526/", RelayConfig(hosts=["[::1]:2526"])),
        ("smtp://mail.example.net", RelayConfig(hosts=["mail.example.net:25"])),
        ("smtp://u%40x:p%3A@127.0.0.1:25", RelayConfig(hosts=["127.0.0.1:25"], username="u@x", password="p:")),
        ("lmtp://127.0.0.1:24", LmtpConfig(hosts=["127.0.0.1:24"])),
        ("lmtp:///run/lmtp%20x", LmtpConfig(hosts=["unix:/run/lmtp x"])),
        ("file:///var/mail%20box", FileConfig(path=Path("/var/mail box"))),
        ("stdout:", StdoutConfig()),
        ("discard:", DiscardConfig()),
    ],
)
def test_quick_urls(url: str, wanted: Table) -> None:
    config = Config.quick(["127.0.0.1:0"], [url], environment={})
    assert list(config.sinks.values()) == [wanted]
    (route,) = config.table().routes
    assert route.recipients == ("*",)
    loopback = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
    assert route.clients == (loopback if isinstance(wanted, (RelayConfig, LmtpConfig)) else None)


def test_quick_gives_each_a_copy(tmp_path: Path) -> None:
    config = Config.quick(
        ["127.0.0.1:0", "[::1]:0"],
        ["http://a.example/", "http://b.example/", "smtp://127.0.0.1:1"],
        ["10.0.0.0/8"],
        tmp_path / "s",
        environment={},
        flags={"hostname": "q.example", "workers": 2},
    )
    assert list(config.sinks) == ["webhook", "webhook-2", "relay"]
    assert config.table().routes[0].sinks == ("webhook", "webhook-2", "relay")
    assert config.table().routes[0].clients == (ip_network("10.0.0.0/8"),)
    assert [listener.address for listener in config.listeners] == ["127.0.0.1:0", "[::1]:0"]
    assert config.spool.path == tmp_path / "s"
    assert (config.hostname, config.workers) == ("q.example", 2)


def test_quick_spool_lies_in_the_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Config.quick(environment={"XDG_STATE_HOME": "/st"}).spool.path == Path("/st/gateway-smtp/spool")
    monkeypatch.setenv("HOME", "/home/ann")
    # A relative path is to be ignored (XDG Base Directory Specification).
    assert Config.quick(environment={"XDG_STATE_HOME": "st"}).spool.path == Path("/home/ann/.local/state/gateway-smtp/spool")
    monkeypatch.setenv("XDG_STATE_HOME", "/other")
    assert state_folder() == Path("/other/gateway-smtp/spool")
    assert Config.quick(spool="here", environment={}).spool.path == Path.cwd() / "here"


@pytest.mark.parametrize(
    "url", ["ftp://x", "smtp:", "smtp://h:1/path", "file:relative", "file://other/host", "stdout:/x", "inbox", "lmtp:///"]
)
def test_quick_urls_that_say_nothing(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.quick(to=["discard:", url], environment={})
    assert caught.value.faults == [
        f"--to[1]: {url!r} says no place for mail; write http://…, https://…, smtp://host:port, lmtp://host:port, file:///folder, "
        "stdout: or discard:"
    ]


def test_a_quick_url_that_is_none() -> None:
    with pytest.raises(ConfigError) as caught:
        Config.quick(to=["http://[::1/"], environment={})
    assert caught.value.faults == ["--to[0]: 'http://[::1/' is no URL: Invalid IPv6 URL"]


def test_quick_is_no_open_relay_either() -> None:
    with pytest.raises(ConfigError, match="open relay"):
        Config.quick(to=["smtp://127.0.0.1:25"], clients=["0.0.0.0/0"], environment={})


# --------------------------------------------------------------------------------- every fault

RELAY = '[sinks.app]\ntype = "relay"\nhosts = ["192.0.2.1:25"]\n'
WEBHOOK = '[sinks.app]\ntype = "webhook"\nurl = "http://a.example/"\n'
LISTENER = '[[listeners]]\naddress = "127.0.0.1:2525"\n'
ROUTE = '[[routes]]\nrecipients = ["*@app.example"]\nsink = "app"\n'
DURATION = 'must be a duration like "250ms", "30s", "5m", "4h" or "5d"'
SIZE = 'must be a size like "25 MiB", "500 B" or a number of octets'
NETWORK = 'must be a network or an address like "10.0.0.0/8", "192.0.2.7" or "2001:db8::/32"'
SIGNING = "must be whsec_ followed by base64; make one with: echo whsec_$(openssl rand -base64 32)"
FREE = 'must be a share like "5%" or a size like "2 GiB"'
OPEN = (
    "would be an open relay: anybody could send to anybody through 'app'; name the domains in full, "
    "or add clients narrower than everybody or authenticated = true"
)


PASSED_ON = 'listeners[0].address: a passed-on socket is known by its number or its name; write "fd:3" or "fd:smtp"'
SCRYPT = "$scrypt$ln=4,r=8,p=1$c2FsdHNhbHQ$" + "A" * 43


def not_yet(way: str) -> str:
    return f"not available yet in this version; {way}"


@pytest.mark.parametrize(
    ("tables", "wanted"),
    [
        # the head
        ({"head": "hostnam = 'x'"}, ["hostnam: unknown key; did you mean 'hostname'?"]),
        ({"head": "hostname = 'mx_1.example'"}, ["hostname: 'mx_1.example' is no domain name; write one like \"mx.example.net\""]),
        ({"head": "hostname = 'bücher.example'"}, ["hostname: 'bücher.example' must be written in ASCII (the form that starts with xn--)"]),
        ({"head": "hostname = 5"}, ["hostname: must be text in quotes"]),
        ({"head": "workers = -1"}, ["workers: must be at least 0"]),
        ({"head": "workers = 'two'"}, ["workers: must be a whole number"]),
        ({"head": "workers = 1.5"}, ["workers: must be a whole number"]),
        # users
        ({"users": "[users]\napp = 'secret'"}, ["users.app: must be a hash; make one with: gateway hash-password"]),
        ({"users": "[users]\napp = '$scrypt$x'"}, ["users.app: is damaged; make it anew with: gateway hash-password"]),
        ({"users": "[users]\napp = 5"}, ["users.app: must be a hash in quotes, or a list of them; make one with: gateway hash-password"]),
        ({"users": "[users]\napp = []"}, ["users.app: names no hash"]),
        (
            {"users": f"[users]\napp = ['{SCRYPT}', '{SCRYPT}']"},
            ["users.app: has two hashes; keep one, and SCRAM keys beside it if you like"],
        ),
        ({"users": f"[users]\n'a\u202eb' = '{SCRYPT}'"}, ['users."a\u202eb": the name has characters that no login can send']),
        ({"senders": "[senders]\n'' = ['*']"}, ['senders."": the name must have between 1 and 255 octets']),
        ({"senders": "[senders]\napp = ['x']"}, ["senders.app[0]: 'x' has no @; write \"*@x\" for a whole domain or \"*\" for everybody"]),
        (
            {"authentication": "[authentication]\njwks_url = 'https://id.example/keys'"},
            [
                "authentication.issuer: is missing: jwks_url needs it, or tokens for others would do",
                "authentication.audience: is missing: jwks_url needs it, or tokens for others would do",
            ],
        ),
        (
            {"authentication": "[authentication]\nmechanisms = ['CRAM-MD5']"},
            ["authentication.mechanisms[0]: must be one of SCRAM-SHA-256-PLUS, SCRAM-SHA-256, PLAIN, LOGIN, OAUTHBEARER, XOAUTH2"],
        ),
        # listeners
        ({"listeners": ""}, ['listeners: no address to listen on; write [[listeners]] with address = "127.0.0.1:2525"']),
        ({"listeners": "[listeners]\naddress = '127.0.0.1:1'"}, ["listeners: must be written as [[listeners]]"]),
        ({"listeners": "[[listeners]]"}, ["listeners[0].address: is missing; this key is needed"]),
        (
            {"listeners": "[[listeners]]\naddress = ':25'"},
            ["listeners[0].address: ':25' has no host; write \"0.0.0.0:25\" for every IPv4 address or \"[::]:25\" for IPv6"],
        ),
        (
            {"listeners": "[[listeners]]\naddress = '127.0.0.1'"},
            ["listeners[0].address: '127.0.0.1' must end in a port between 0 and 65535; write \"host:port\""],
        ),
        (
            {"listeners": "[[listeners]]\naddress = '127.0.0.1:65536'"},
            ["listeners[0].address: '127.0.0.1:65536' must end in a port between 0 and 65535; write \"host:port\""],
        ),
        (
            {"listeners": "[[listeners]]\naddress = '::1:25'"},
            ["listeners[0].address: '::1:25': an IPv6 address stands in brackets; write \"[::1]:25\""],
        ),
        (
            {"listeners": "[[listeners]]\naddress = '[127.0.0.1]:25'"},
            ["listeners[0].address: '[127.0.0.1]:25' is no IPv6 address in brackets; write \"[::1]:2525\""],
        ),
        (
            {"listeners": "[[listeners]]\naddress = '1.2.3.400:25'"},
            ["listeners[0].address: '1.2.3.400' is neither an address nor a host name"],
        ),
        (
            {"listeners": "[[listeners]]\naddress = 'unix:x'"},
            ['listeners[0].address: the path of a unix socket is absolute; write "unix:/run/gateway/smtp.sock"'],
        ),
        (
            {"listeners": "[[listeners]]\naddress = '[::g]:25'"},
            ["listeners[0].address: '[::g]:25' is no IPv6 address in brackets; write \"[::1]:2525\""],
        ),
        ({"listeners": "[[listeners]]\naddress = 'fd:'"}, [PASSED_ON]),
        ({"listeners": "[[listeners]]\naddress = 'fd:a:b'"}, [PASSED_ON]),
        ({"listeners": "[[listeners]]\naddress = 25"}, ["listeners[0].address: must be text in quotes"]),
        ({"listeners": "listeners = [25]"}, ["listeners[0]: must be a table"]),
        ({"listeners": "listeners = []"}, ['listeners: no address to listen on; write [[listeners]] with address = "127.0.0.1:2525"']),
        ({"listeners": "[[listeners]]\naddress = 'unix:/run/x'\nmode = '0888'"}, ['listeners[0].mode: must be a mode in octal like "0660"']),
        ({"listeners": "[[listeners]]\naddress = 'unix:/run/x'\nmode = 660"}, ["listeners[0].mode: must be text in quotes"]),
        (
            {"listeners": LISTENER + "mode = '0600'"},
            ['listeners[0].mode: is for an address like "unix:/run/gateway/smtp.sock"; leave it out'],
        ),
        ({"listeners": LISTENER + "greet_delay = '61s'"}, ["listeners[0].greet_delay: must be at most 60.0"]),
        ({"listeners": LISTENER + "protocol = 'esmtp'"}, ["listeners[0].protocol: must be one of smtp, submission, lmtp; did you mean 'smtp'?"]),
        (
            {"listeners": LISTENER + "tls = 'starttls'"},
            [
                "listeners[0].certificate: is missing: tls needs it",
                "listeners[0].key: is missing: tls needs it",
            ],
        ),
        (
            {"listeners": LISTENER + f"tls = 'implicit'\ncertificate = '{__file__}'"},
            ["listeners[0].key: is missing: certificate needs it"],
        ),
        (
            {"listeners": LISTENER + f"tls = 'implicit'\ncertificates = [{{certificate = '{__file__}'}}, {{key = '/no/key', name = 'x'}}]"},
            [
                "listeners[0].certificates[0].key: is missing; this key is needed",
                "listeners[0].certificates[1].certificate: is missing; this key is needed",
                "listeners[0].certificates[1].key: there is no file /no/key",
                "listeners[0].certificates[1].name: unknown key; known here: address, auth, auth_without_tls, bare_newlines, certificate, certificate_identity, "
                "certificates, client_ca, client_certificate, greet_delay, key, long_lines, mode, protocol, proxy_protocol_from, tls, xclient_from",
            ],
        ),
        (
            {"listeners": LISTENER + f"client_ca = '{__file__}'\nclient_certificate = 'demanded'"},
            [
                'listeners[0].client_ca: tls is off; write tls = "required" (or "starttls", or "implicit")',
                "listeners[0].client_certificate: must be one of optional, required",
            ],
        ),
        (
            {"listeners": LISTENER + "client_certificate = 'required'"},
            ["listeners[0].client_certificate: client_ca is missing: it says whose certificates are good"],
        ),
        ({"limits": "[limits]\nhandshake_timeout = 0"}, ["limits.handshake_timeout: must be more than 0"]),
        (
            {"listeners": LISTENER + f"certificate = '/no/cert'\nkey = '{__file__}'"},
            ["listeners[0].certificate: there is no file /no/cert"],
        ),
        (
            {"listeners": LISTENER + "auth = 'offered'", "users": f"[users]\napp = '{SCRYPT}'"},
            ['listeners[0].auth: is never offered in clear, and tls is "off"; write tls = "required", or auth_without_tls = true'],
        ),
        (
            {"listeners": LISTENER + "auth = 'offered'\nauth_without_tls = true"},
            ["listeners[0].auth: nobody can log in: there are no [users], no users_file and no [authentication] with url or jwks_url"],
        ),
        (
            {"listeners": LISTENER + "proxy_protocol_from = ['10.0.0.1/8']\nxclient_from = ['everybody']"},
            [
                "listeners[0].proxy_protocol_from[0]: '10.0.0.1/8' is an address inside a network; "
                'write "10.0.0.0/8" for the network or leave /8 out',
                'listeners[0].xclient_from[0]: must be a network or an address like "10.0.0.0/8", "192.0.2.7" or "2001:db8::/32"',
            ],
        ),
        ({"listeners": LISTENER + "bare_newlines = 'accept'"}, ["listeners[0].bare_newlines: must be one of reject, disconnect, normalize"]),
        ({"listeners": LISTENER + "long_lines = 'split'"}, ["listeners[0].long_lines: must be one of accept, reject"]),
        ({"listeners": LISTENER * 2}, ["listeners[1].address: 127.0.0.1:2525 is taken by listeners[0]"]),
        # limits and the like
        ({"limits": "[limits]\nmessage_size = '25 MiBs'"}, [f"limits.message_size: {SIZE}"]),
        ({"limits": "[limits]\nmessage_size = -1"}, ["limits.message_size: must be at least 0"]),
        ({"limits": "[limits]\nrecipients = 0"}, ["limits.recipients: must be at least 1"]),
        ({"limits": "[limits]\ncommand_timeout = '5'"}, [f"limits.command_timeout: {DURATION}: '5' has no unit"]),
        ({"limits": "[limits]\ncommand_timeout = '5 minutes'"}, [f"limits.command_timeout: {DURATION}"]),
        ({"limits": "[limits]\ncommand_timeout = '0s'"}, ["limits.command_timeout: must be more than 0"]),
        ({"limits": "[limits]\ncommand_timeout = inf"}, ["limits.command_timeout: must be a number"]),
        ({"limits": "[limits]\nidle_timeout = true"}, [f"limits.idle_timeout: {DURATION}"]),
        ({"limits": "[limits]\ndata_timeout = []"}, ["limits.data_timeout: must be a number"]),
        ({"limits": "[limits]\nhops = 1001"}, ["limits.hops: must be at most 1000"]),
        ({"limits": "[limits]\nminimum_rate = '1h 30m'"}, [f"limits.minimum_rate: {SIZE}"]),
        ({"limits": "limits = 5"}, ["limits: must be a table"]),
        ({"drain": "[drain]\ntimeout = '-1s'"}, [f"drain.timeout: {DURATION}"]),
        ({"spool": "[spool]\nminimum_free = '105%'"}, [f"spool.minimum_free: {FREE}"]),
        ({"spool": "[spool]\nminimum_free = 'much'"}, [f"spool.minimum_free: {FREE}"]),
        ({"spool": "[spool]\nminimum_free = 'half%'"}, [f"spool.minimum_free: {FREE}"]),
        ({"spool": "[spool]\nminimum_free = true"}, [f"spool.minimum_free: {FREE}"]),
        ({"spool": "[spool]\nhold = '2s'"}, ["spool.hold: must be at most 1.0"]),
        (
            {"spool": "[spool]\nengine = 'postgres'\ndsn = 'postgresql://x'"},
            ['spool.engine: ' + not_yet('write "sqlite"'), f"spool.dsn: {not_yet('leave it out')}"],
        ),
        ({"retry": "[retry]\ndelays = []"}, ["retry.delays: must not be empty"]),
        ({"retry": "[retry]\ndelays = ['1m', 'soon']"}, [f"retry.delays[1]: {DURATION}"]),
        ({"retry": "[retry]\ndelays = '1m'"}, ["retry.delays: must be a list; write [ … ] around it"]),
        # sinks
        ({"sinks": ""}, ["sinks: nobody to carry mail; write a table like [sinks.app]", "routes[0].sink: there is no table [sinks.app]"]),
        ({"sinks": "[[sinks]]"}, ["sinks: must be written as [sinks.NAME]", "routes[0].sink: there is no table [sinks.app]"]),
        ({"sinks": "sinks.app = 1"}, ["sinks.app: must be written as [sinks.NAME]"]),
        ({"sinks": "[sinks.app]"}, ["sinks.app.type: is missing; write one of webhook, relay, lmtp, file, stdout, discard"]),
        (
            {"sinks": "[sinks.app]\ntype = 'webhok'"},
            ["sinks.app.type: must be one of webhook, relay, lmtp, file, stdout, discard; did you mean 'webhook'?"],
        ),
        ({"sinks": "[sinks.app]\ntype = 7"}, ["sinks.app.type: must be one of webhook, relay, lmtp, file, stdout, discard"]),
        (
            {"sinks": "[sinks.app]\ntype = 'python'"},
            ["sinks.app.type: a function is no matter of a file; give it to gateway.Gateway in your program"],
        ),
        ({"sinks": "[sinks.app]\ntype = 'discard'\n[sinks.'a b']\ntype = 'x'"}, [
            'sinks."a b".type: must be one of webhook, relay, lmtp, file, stdout, discard'
        ]),
        (
            {"sinks": "[sinks.app]\ntype = 'discard'\nurl = 'x'"},
            ["sinks.app.url: unknown key; known here: concurrency, on_failure, rate, timeout, type"],
        ),
        ({"sinks": "[sinks.app]\ntype = 'discard'\nconcurrency = 0"}, ["sinks.app.concurrency: must be at least 1"]),
        (
            {"sinks": "[sinks.app]\ntype = 'discard'\nrate = '50'"},
            ['sinks.app.rate: must be a rate like "50/s", "600/m" or "10000/h"'],
        ),
        ({"sinks": "[sinks.app]\ntype = 'discard'\nrate = '0/s'"}, ['sinks.app.rate: must be a rate like "50/s", "600/m" or "10000/h"']),
        ({"sinks": "[sinks.app]\ntype = 'discard'\non_failure = 'drop'"}, ["sinks.app.on_failure: must be one of dead_letter, bounce"]),
        ({"sinks": "[sinks.app]\ntype = 'webhook'"}, ["sinks.app.url: is missing; this key is needed"]),
        ({"sinks": "[sinks.app]\ntype = 'webhook'\nurl = 'app.example'"}, ['sinks.app.url: must be a URL like "https://app.example/inbound"']),
        ({"sinks": "[sinks.app]\ntype = 'webhook'\nurl = 'http://a.example:x/'"}, [
            "sinks.app.url: is no URL: Port could not be cast to integer value as 'x'"
        ]),
        ({"sinks": "[sinks.app]\ntype = 'webhook'\nurl = 'http://a.example/b c'"}, [
            "sinks.app.url: has a space or a control character; percent-encode it"
        ]),
        ({"sinks": "[sinks.app]\ntype = 'webhook'\nurl = 'http://a.example/#x'"}, [
            "sinks.app.url: has a #fragment, which is never sent; leave it out"
        ]),
        ({"sinks": WEBHOOK + "format = 'cloudevents'"}, ['sinks.app.format: ' + not_yet('write "standard" or "raw"')]),
        ({"sinks": WEBHOOK + "format = 'rawr'"}, ["sinks.app.format: must be one of standard, raw; did you mean 'raw'?"]),
        *(
            (
                {"sinks": f"[sinks.app]\ntype = 'webhook'\nurl = 'http://{host}/'"},
                [f"sinks.app.url: '{host}' is no IPv4 address; write four numbers from 0 to 255"],
            )
            for host in ("2130706433", "0x7f.1", "127.1", "10.0.0.256", "0177.0.0.1")
        ),
        (
            {"sinks": WEBHOOK + "addresses = 'public'\nclient = 'pyreqwest'"},
            ['sinks.app.client: cannot judge addresses; leave it out (or write client = "aiohttp") beside addresses = "public"'],
        ),
        ({"sinks": WEBHOOK + "addresses = 'private'"}, ["sinks.app.addresses: must be one of any, public"]),
        ({"sinks": WEBHOOK + "client = 'x'"}, ["sinks.app.client: must be one of direct, pyreqwest, aiohttp"]),
        ({"sinks": WEBHOOK + "secret = 'whsec_not base64'"}, [f"sinks.app.secret: {SIGNING}"]),
        ({"sinks": WEBHOOK + "secret = 'whsec_'\nprevious_secret = '%'"}, [f"sinks.app.secret: {SIGNING}", f"sinks.app.previous_secret: {SIGNING}"]),
        ({"sinks": WEBHOOK + "secret_file = '/no/secret'"}, ["sinks.app.secret_file: cannot read /no/secret: No such file or directory"]),
        ({"sinks": WEBHOOK + "secret_file = 7"}, ["sinks.app.secret_file: must be text in quotes"]),
        ({"sinks": RELAY + "mx = true"}, [f"sinks.app.mx: {not_yet('name the servers in hosts')}"]),
        ({"sinks": WEBHOOK + "secret_file = '/dev/null'"}, ["sinks.app.secret_file: /dev/null is empty"]),
        (
            {"sinks": WEBHOOK + f"secret = '{SECRET}'\nsecret_file = '/dev/null'"},
            ["sinks.app.secret_file: secret is given as well; keep one of the two"],
        ),
        ({"sinks": WEBHOOK + "headers = { 'a b' = 'x' }"}, ["sinks.app.headers: 'a b' is no header name"]),
        (
            {"sinks": WEBHOOK + "headers = { 'Webhook-Id' = 'x' }"},
            ["sinks.app.headers: 'Webhook-Id' is written by the gateway itself; choose another name"],
        ),
        ({"sinks": WEBHOOK + 'headers = { x = "a\\r\\nb" }'}, ["sinks.app.headers: the value of 'x' has characters that no header may hold"]),
        ({"sinks": WEBHOOK + "headers = { x = 1 }"}, ["sinks.app.headers.x: must be text in quotes"]),
        ({"sinks": "[sinks.app]\ntype = 'relay'"}, ['sinks.app.hosts: names no server; write hosts = ["mail.example.net:25"]']),
        ({"sinks": "[sinks.app]\ntype = 'relay'\nmx = true"}, [f"sinks.app.mx: {not_yet('name the servers in hosts')}"]),
        ({"sinks": "[sinks.app]\ntype = 'relay'\nhosts = ['a.example:0']"}, ["sinks.app.hosts[0]: port 0 cannot be connected to"]),
        ({"sinks": "[sinks.app]\ntype = 'relay'\nhosts = ['a.example', 'a..b']"}, [
            "sinks.app.hosts[1]: 'a..b' is neither an address nor a host name"
        ]),
        ({"sinks": RELAY + "tls = 'starttls'"}, ["sinks.app.tls: must be one of off, opportunistic, required, verify"]),
        ({"sinks": RELAY + "ca_file = '/no/ca'"}, ["sinks.app.ca_file: there is no file /no/ca"]),
        ({"sinks": RELAY + "pipelining = 'perhaps'"}, ["sinks.app.pipelining: must be true or false"]),
        ({"sinks": RELAY + "tls = 'verify'\nusername = 'u'"}, ["sinks.app.username: password or password_file is missing beside it"]),
        ({"sinks": RELAY + "password = 'p'"}, ["sinks.app.password: username is missing beside it"]),
        (
            {"sinks": RELAY + "username = 'u'\npassword = 'p'"},
            ['sinks.app.username: tls = "opportunistic" could send the password in clear; write tls = "verify" (or "required")'],
        ),
        ({"sinks": "[sinks.app]\ntype = 'lmtp'"}, ['sinks.app.address: names no server; write address = "127.0.0.1:24"']),
        (
            {"sinks": "[sinks.app]\ntype = 'lmtp'\naddress = '127.0.0.1'\nhosts = ['127.0.0.1']"},
            ["sinks.app.hosts: address is given as well; keep one of the two"],
        ),
        ({"sinks": "[sinks.app]\ntype = 'lmtp'\naddress = 'unix:run'"}, [
            'sinks.app.address: the path of a unix socket is absolute; write "unix:/run/gateway/smtp.sock"'
        ]),
        ({"sinks": "[sinks.app]\ntype = 'file'"}, ["sinks.app.path: is missing; this key is needed"]),
        ({"sinks": "[sinks.app]\ntype = 'file'\npath = 'x'\nformat = 'mbox'"}, ["sinks.app.format: must be one of maildir"]),
        # checks
        ({"checks": "[checks.p]\ntype = 'https'"}, ["checks.p.type: must be one of http; did you mean 'http'?"]),
        ({"checks": "[checks.p]\ntype = 'http'"}, ["checks.p.url: is missing; this key is needed"]),
        (
            {"checks": "[checks.p]\ntype = 'http'\nurl = 'http://a.example/'\nstages = ['rcpt', 'content']"},
            ["checks.p.stages[0]: must be one of client, sender, recipient, content; did you mean 'recipient'?"],
        ),
        ({"checks": "[checks.p]\ntype = 'http'\nurl = 'http://a.example/'\nstages = []"}, ["checks.p.stages: must not be empty"]),
        ({"checks": "[checks.p]\ntype = 'http'\nurl = 'http://a.example/'\non_error = 'reject'"}, [
            "checks.p.on_error: must be one of defer, accept"
        ]),
        # routes
        ({"routes": ""}, ["routes: without a route every recipient is refused; write [[routes]] with recipients and sink"]),
        ({"routes": "[[routes]]\nsink = 'app'"}, ["routes[0].recipients: is missing; this key is needed"]),
        ({"routes": "[[routes]]\nrecipients = []\nsink = 'app'"}, ["routes[0].recipients: must not be empty"]),
        (
            {"routes": "[[routes]]\nrecipients = ['app.example']\nsink = 'app'"},
            ["routes[0].recipients[0]: 'app.example' has no @; write \"*@app.example\" for a whole domain or \"*\" for everybody"],
        ),
        (
            {"routes": "[[routes]]\nrecipients = ['x@app.example', '@app.example', 'x@']\nsink = 'app'"},
            [
                "routes[0].recipients[1]: '@app.example' is no pattern; write \"name@domain\", \"*@domain\" or \"*\"",
                "routes[0].recipients[2]: 'x@' is no pattern; write \"name@domain\", \"*@domain\" or \"*\"",
            ],
        ),
        *(
            (
                {"routes": f"[[routes]]\nrecipients = ['\"a@b\"@app.example', '{pattern}']\nsink = 'app'"},
                [
                    f"routes[0].recipients[1]: '{pattern}' has more than one @ and fits no address; "
                    'only in a quoted local part ("a@b"@domain) may one stand'
                ],
            )
            for pattern in ("a@b@app.example", "*@b@app.example", '"a@b@app.example', '"@app.example@x')
        ),
        (
            {"routes": "[[routes]]\nrecipients = ['x@']\nsink = 'apps'\nchecks = ['spf', 7]\n[[routes]]\nsinks = ['app', 'none']"},
            [
                "routes[0].recipients[0]: 'x@' is no pattern; write \"name@domain\", \"*@domain\" or \"*\"",
                "routes[0].checks[1]: must be text in quotes",
                "routes[0].sink: there is no table [sinks.apps]; did you mean 'app'?",
                "routes[0].checks[0]: there is no table [checks.spf]",
                "routes[1].recipients: is missing; this key is needed",
                "routes[1].sinks[1]: there is no table [sinks.none]",
            ],
        ),
        ({"routes": "[[routes]]\nrecipients = ['*']"}, ['routes[0].sink: names no sink; write sink = "NAME" for a table [sinks.NAME]']),
        ({"routes": ROUTE + "sinks = ['app']"}, ["routes[0].sinks: sink is given as well; keep one of the two"]),
        (
            {"routes": "[[routes]]\nrecipients = ['*']\nsinks = ['app', 'app']"},
            ["routes[0].sinks: names a sink twice; each gets one copy"],
        ),
        ({"routes": ROUTE.replace('"app"', '"apps"')}, ["routes[0].sink: there is no table [sinks.apps]; did you mean 'app'?"]),
        (
            {"routes": ROUTE + "[[routes]]\nrecipients = ['*']\nsinks = ['app', 'none']"},
            ["routes[1].sinks[1]: there is no table [sinks.none]"],
        ),
        ({"routes": ROUTE + "checks = ['spf']"}, ["routes[0].checks[0]: there is no table [checks.spf]"]),
        ({"routes": ROUTE + "clients = []"}, ["routes[0].clients: names nobody; leave it out for everybody, or name networks"]),
        ({"routes": ROUTE + "clients = ['10.0.0.0/8', 'lan', 5]"}, [
            f"routes[0].clients[1]: {NETWORK}",
            'routes[0].clients[2]: must be text like "10.0.0.0/8"',
        ]),
        (
            {"routes": ROUTE + "clients = ['10.0.0.1/8']"},
            ["routes[0].clients[0]: '10.0.0.1/8' is an address inside a network; write \"10.0.0.0/8\" for the network or leave /8 out"],
        ),
        ({"routes": ROUTE + "acknowledge = 'later'"}, ["routes[0].acknowledge: must be one of durable, delivered"]),
        ({"routes": ROUTE + "fallback = 'accept'"}, ["routes[0].fallback: must be one of durable, refuse"]),
        # bounces, admin
        ({"bounces": "[bounces]\nsink = 'out'"}, ["bounces.sink: there is no table [sinks.out]"]),
        ({"bounces": "[bounces]"}, ["bounces.sink: is missing; this key is needed"]),
        ({"admin": "[admin]\naddress = '127.0.0.1:2525'"}, ["admin.address: 127.0.0.1:2525 is taken by listeners[0]"]),
        ({"admin": "[admin]\naddress = 'fd:3'"}, ['admin.address: ' + not_yet('write "host:port"')]),
        ({"admin": "[admin]\naddress = '127.0.0.1:0'\ntoken = 't'"}, [f"admin.token: {not_yet('leave it out')}"]),
        # the environment in texts
        (
            {"sinks": "[sinks.app]\ntype = 'webhook'\nurl = 'http://${NOT_SET}/'"},
            ["sinks.app.url: the environment has no NOT_SET; set it, or write $${NOT_SET} for these very characters"],
        ),
        (
            {"sinks": "[sinks.app]\ntype = 'file'\npath = '${'"},
            ["sinks.app.path: has ${ without a name and }; write ${NAME}, or $${ for these very characters"],
        ),
    ],
)  # fmt: skip
def test_a_fault_and_its_place(tmp_path: Path, tables: dict[str, str], wanted: list[str]) -> None:
    # Keys of the head come first, a whole table that stands in one line too.
    order = sorted((GOOD | tables).items(), key=lambda item: not re.match(r"\w+(\.\w+)* = ", item[1]))
    assert faults(tmp_path, "\n".join(table for _, table in order) + "\n") == wanted


def test_all_faults_come_at_once_in_the_order_of_the_tables(tmp_path: Path) -> None:
    assert [
        fault.partition(": ")[0]
        for fault in faults(
            tmp_path,
            """
            wrkers = 2
            [[listeners]]
            address = "127.0.0.1:2525"
            [[listeners]]
            address = "x"
            [bounces]
            sink = "o"
            [limits]
            hops = "many"
            message_size = "x"
            [sinks.app]
            type = "webhok"
            [sinks.hook]
            type = "webhook"
            url = "ftp://x"
            formt = "raw"
            [sinks.out]
            type = "relay"
            timeout = "x"
            [[routes]]
            recipients = ["*"]
            sink = "out"
            [[routes]]
            recipients = ["*@a.example"]
            sink = "hok"
            [admin]
            """,
        )
    ] == [
        "wrkers",
        "listeners[1].address",
        "limits.message_size",
        "limits.hops",
        "sinks.app.type",
        "sinks.hook.url",
        "sinks.hook.formt",
        "sinks.out.hosts",
        "sinks.out.timeout",
        "routes[0]",  # an open relay, although the sink itself is faulty
        "routes[1].sink",
        "bounces.sink",
        "admin.address",
    ]


def test_no_secret_in_a_fault(tmp_path: Path) -> None:
    told = "\n".join(
        faults(
            tmp_path,
            text(
                sinks="[sinks.app]\ntype='webhook'\nurl='http://a.example/'\nsecret='hush hush'\nprevious_secret=7\n"
                "[sinks.out]\ntype='relay'\nhosts=['192.0.2.1']\nusername='u'\npassword='${PASS}'\ntls='none'"
            ),
            {"PASS": "hush hush"},
        )
    )
    assert "sinks.app.secret" in told
    assert "hush" not in told


@pytest.mark.parametrize(
    ("octets", "wanted"),
    [
        (b"hostname = ", "{file}: is no TOML: Invalid value (at end of document)"),
        (b'a = 1\na = "\xff"', "{file}: is not UTF-8 text"),
        (None, "{file}: cannot be read: No such file or directory"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, octets: bytes | None, wanted: str) -> None:
    file = tmp_path / "gateway.toml"
    if octets is not None:
        file.write_bytes(octets)
    with pytest.raises(ConfigError) as caught:
        Config.load(file, environment={})
    assert caught.value.faults == [wanted.format(file=file)]


MODELS: list[type[Table]] = [*SINKS.values(), *CHECKS.values(), ListenerConfig, RouteConfig, Limits, SpoolConfig]
KEYS = [*Config.model_fields, *(key for model in MODELS for key in model.model_fields)]
WORDS = [
    "webhook",
    "relay",
    "lmtp",
    "file",
    "app",
    "*",
    "*@a.example",
    "127.0.0.1:0",
    "5m",
    "1 MiB",
    "${X}",
    "10.0.0.0/8",
    "http://a.example/",
    "",
]
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(WORDS), st.dates()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)),
    max_leaves=20,
)


@st.composite
def nearly_good(draw: st.DrawFn) -> dict[str, Any]:
    """A whole file in which one sink and one route have odd values."""
    kind = draw(st.sampled_from(sorted(SINKS)))
    sink = draw(st.dictionaries(st.sampled_from(sorted(SINKS[kind].model_fields)), VALUES, max_size=5))
    route = draw(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
    return {
        "hostname": "mx.example.net",
        "listeners": [{"address": "127.0.0.1:0"}],
        "sinks": {"app": {"type": kind} | sink},
        "routes": [{"recipients": ["*@a.example"], "sink": "app"} | route],
    }


@given(st.one_of(st.dictionaries(st.sampled_from([*Config.model_fields]), VALUES), nearly_good()))
def test_whatever_a_file_says_its_faults_have_places(tree: dict[str, Any]) -> None:
    try:
        Config.parse(tree, environment={"X": "x"})
    except ConfigError as error:
        found = error.faults
    else:
        return
    assert found
    for fault in found:
        place, colon, sentence = fault.partition(": ")
        assert place
        assert colon
        # A sentence of ours, not of the machinery's.
        assert sentence
        assert not re.search(r"Input|pydantic|Error", sentence), fault


# -------------------------------------------------------------------------- no open relay ever


@pytest.mark.parametrize("kind", ['type = "relay"\nhosts = ["192.0.2.1"]', 'type = "lmtp"\naddress = "192.0.2.1"'])
@pytest.mark.parametrize("pattern", ["*", "*@*", "*@*.com", "a@*", "*@a.example*", "x*@*.b.example"])
@pytest.mark.parametrize(
    "clients",
    [
        "",
        'clients = ["0.0.0.0/0"]',
        'clients = ["10.0.0.0/8", "::/0"]',
        'clients = ["0.0.0.0/1", "128.0.0.0/1"]',
        'clients = ["::/1", "8000::/1"]',
        'clients = ["::ffff:0:0/96"]',
        'clients = ["::ffff:0.0.0.0/97", "::ffff:128.0.0.0/97"]',
    ],
)
def test_an_open_relay_is_refused(tmp_path: Path, kind: str, pattern: str, clients: str) -> None:
    route = f'[[routes]]\nrecipients = ["a@app.example", "{pattern}"]\nsinks = ["box", "app"]\n{clients}'
    toml = text(sinks=f'[sinks.app]\n{kind}\n[sinks.box]\ntype = "discard"', routes=ROUTE + route)
    assert faults(tmp_path, toml) == [f"routes[1]: {OPEN}"]


@pytest.mark.parametrize(
    "route",
    [
        'recipients = ["*@app.example", "a*@b.example", "*@[192.0.2.1]"]\nsink = "app"',
        'recipients = ["*"]\nsink = "app"\nclients = ["10.0.0.0/8", "2001:db8::/32"]',
        'recipients = ["*"]\nsink = "app"\nclients = ["::ffff:10.0.0.0/104"]',
        'recipients = ["*"]\nsink = "app"\nauthenticated = true',
        'recipients = ["*"]\nsink = "app"\nauthenticated = true\nclients = ["0.0.0.0/0"]',
        'recipients = ["*"]\nsink = "box"',
    ],
)
def test_these_are_no_open_relays(tmp_path: Path, route: str) -> None:
    toml = text(sinks=RELAY + '[sinks.box]\ntype = "discard"', routes=f"[[routes]]\n{route}")
    assert len(load(tmp_path, toml).routes) == 1


def test_a_program_is_held_to_the_same(tmp_path: Path) -> None:
    parts: dict[str, Any] = {
        "hostname": "mx.example.net",
        "listeners": [ListenerConfig(address="127.0.0.1:0"), ListenerConfig(address="127.0.0.1:0")],
        "sinks": {"app": RelayConfig(hosts=["192.0.2.1"])},
        "spool": SpoolConfig(path=tmp_path),
    }
    assert Config(routes=[RouteConfig(recipients=["*@a.example"], sink="app")], **parts).table().routes[0].relays
    with pytest.raises(ConfigError) as caught:
        Config(
            routes=[RouteConfig(recipients=["*"], sink="app"), RouteConfig(recipients=["*@a.example"], sinks=["app", "b"])],
            bounces=Bounces(sink="c"),
            admin=Admin(address="unix:/x"),
            **parts,
        )
    assert caught.value.faults == [
        "admin.address: " + not_yet('write "host:port"'),
        f"routes[0]: {OPEN}",
        "routes[1].sinks[1]: there is no table [sinks.b]",
        "bounces.sink: there is no table [sinks.c]",
    ]


def test_tables_made_in_a_program_are_judged_too(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="hosts: names no server"):
        RelayConfig()
    with pytest.raises(ValidationError, match="sink: names no sink"):
        RouteConfig(recipients=["*"])
    with pytest.raises(ValidationError, match=r"secret_file: cannot read .*; "):
        WebhookConfig.model_validate(
            {"url": "http://a.example/", "secret_file": str(tmp_path / "x"), "previous_secret_file": str(tmp_path / "y")}
        )
    (tmp_path / "key").write_text(SECRET)
    assert WebhookConfig(url="http://a.example/", secret_file=tmp_path / "key").secret == SECRET


def test_no_secret_in_what_pydantic_says() -> None:
    with pytest.raises(ValidationError) as caught:
        WebhookConfig(url="http://a.example/", secret="hush hush")
    assert "hush" not in str(caught.value)


def test_a_function_as_sink(tmp_path: Path) -> None:
    async def inbound(message: Message) -> Reply | None:
        return None

    config = Config(
        listeners=[ListenerConfig(address="127.0.0.1:0")],
        sinks={"inbound": PythonConfig(function=inbound)},
        routes=[RouteConfig(recipients=["*"], sink="inbound", acknowledge="delivered")],
        spool=SpoolConfig(path=tmp_path),
    )
    sink = config.sinks["inbound"]
    assert isinstance(sink, PythonConfig)
    assert sink.function is inbound
    assert not sink.relays


# -------------------------------------------------------------------------------------- plugins


def test_a_sink_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A real installed distribution, as entry points are found.
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gateway.sinks]\npigeon = acme:Pigeon\n[gateway.checks]\noracle = acme:Oracle\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    sinks = '[sinks.app]\ntype = "pigeon"\nloft = "north"\ntimeout = "2d"\n'
    config = load(tmp_path, text(sinks=sinks, checks='[checks.o]\ntype = "oracle"\nstages = ["content"]\ntemple = "delphi"'))
    app = config.sinks["app"]
    assert isinstance(app, PluginSinkConfig)
    assert (app.type, app.model_extra, app.timeout, app.concurrency) == ("pigeon", {"loft": "north"}, 172_800.0, 64)
    assert config.checks["o"].model_extra == {"temple": "delphi"}
    assert config.checks_at("content") == ("o",)
    assert "north" not in repr(config)
    assert "delphi" not in repr(config)
    # What is not known to be none counts as a mail server.
    assert app.relays
    everybody = '[[routes]]\nrecipients = ["*"]\nsink = "app"'
    assert faults(tmp_path, text(sinks=sinks, routes=everybody)) == [f"routes[0]: {OPEN}"]
    assert not load(tmp_path, text(sinks=sinks + "mail_server = false", routes=everybody)).table().routes[0].relays
    assert faults(tmp_path, text(sinks="[sinks.app]\ntype = 'pigon'")) == [
        "sinks.app.type: must be one of webhook, relay, lmtp, file, stdout, discard, pigeon; did you mean 'pigeon'?"
    ]
    assert faults(tmp_path, text(sinks=sinks + "concurrency = 0\nmail_server = 'who knows'", routes=everybody)) == [
        "sinks.app.concurrency: must be at least 1",
        "sinks.app.mail_server: must be true or false",
        f"routes[0]: {OPEN}",
    ]


# ------------------------------------------------------------------------------------- warnings


def test_what_was_probably_not_meant(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        text(
            head='hostname = "box"',
            limits="[limits]\nrecipients = 99\nmessage_size = 65535",
            retry='[retry]\ndelays = ["1h"]\nexpire = "1m"',
            checks='[checks.lone]\ntype="http"\nurl="http://a.example/"\n[checks.early]\ntype="http"\nurl="http://a.example/"\nstages=["client"]',
            sinks=RELAY + '[sinks.hook]\ntype="webhook"\nurl="http://a.example/"\nsecret="whsec_c2hvcnQ="\n[sinks.lone]\ntype="discard"',
            routes='[[routes]]\nrecipients=["*"]\nauthenticated=true\nsink="app"\n'
            '[[routes]]\nrecipients=["a@app.example"]\nsink="hook"\nchecks=["early"]\n'
            '[[routes]]\nrecipients=["x@a.example", "*"]\nclients=["127.0.0.1"]\nsink="hook"',
        ),
    )
    assert config.warnings() == [
        "hostname: 'box' is no full domain name; many servers refuse mail from such a name",
        "limits.message_size: RFC 5321 wants at least 64 KiB to be taken",
        "limits.recipients: RFC 5321 wants at least 100 recipients to be taken",
        "routes[0].authenticated: no listener has auth: no client can ever use this route",
        "routes[1].checks[0]: 'early' judges neither recipient nor content: naming it here changes nothing",
        "sinks.app.on_failure: there is no [bounces]: what would bounce becomes a dead letter",
        "sinks.hook.secret: has fewer than 24 octets, the least that Standard Webhooks asks for",
        "sinks.lone: no route names it",
        "checks.lone: no route names it",
        "retry.expire: is shorter than the first delay: every message gets one try only",
    ]


AUTH = LISTENER + "auth = 'required'\nauth_without_tls = true\n"


def test_users_of_the_file_and_of_a_file_of_their_own(tmp_path: Path) -> None:
    keys = str(passwords.made("x", "scram"))
    (tmp_path / "people").write_text(f"bob:{SCRYPT}\nbob:{keys}\n")
    (tmp_path / "people").chmod(0o600)
    config = load(
        tmp_path, text(head="users_file = 'people'", listeners=AUTH, users=f"[users]\nalice = '{SCRYPT}'\ncarol = ['{keys}', '{SCRYPT}']\n")
    )
    accounts = config.accounts()
    assert sorted(accounts) == ["alice", "bob", "carol"]
    assert accounts["alice"].keys is None
    assert accounts["bob"] == accounts["carol"]
    assert SCRYPT not in repr(config)
    assert (
        "users: SCRAM is not offered, because 'alice' has no SCRAM keys; make them with: gateway hash-password --scram" in config.warnings()
    )
    (tmp_path / "people").write_text(f"bob:{SCRYPT}\nno colon\n")
    with pytest.raises(ConfigError, match="line 2: is not name:hash"):
        config.accounts()


def test_faults_of_a_users_file(tmp_path: Path) -> None:
    toml = text(head="users_file = 'people'", listeners=AUTH)
    place = tmp_path / "people"
    assert faults(tmp_path, toml) == [f"users_file: cannot read {place}: No such file or directory"]
    place.write_text(f"{'bad' * 5}\n" * 12)
    (told,) = faults(tmp_path, toml)
    assert told.startswith(f"users_file: {place}: line 1: is not name:hash; line 2: ")
    assert told.endswith("; and 2 more")
    place.write_text(f"alice:{SCRYPT}\n")
    assert faults(tmp_path, toml + f"[users]\nalice = '{SCRYPT}'\n") == [
        "users_file: 'alice' stands in [users] as well; keep one of the two"
    ]


def test_logins_that_were_probably_not_meant(tmp_path: Path) -> None:
    (tmp_path / "people").write_text(f"bob:{SCRYPT}\n")
    (tmp_path / "people").chmod(0o644)
    config = load(
        tmp_path,
        text(
            head="users_file = 'people'",
            listeners="[[listeners]]\naddress = '0.0.0.0:0'\nprotocol = 'submission'\nauth = 'offered'\nauth_without_tls = true\n",
        ),
    )
    assert {line.partition(":")[0] for line in config.warnings()} >= {"listeners[0].auth", "listeners[0].auth_without_tls", "users_file"}
    config = load(tmp_path, text(users=f"[users]\nbob = '{SCRYPT}'\n", senders="[senders]\nbob = ['*']\n"))
    assert {
        "users: no listener has auth: nobody can ever log in",
        "senders: no listener has auth: nobody is ever held to this",
    } <= set(config.warnings())


def test_a_service_is_somebody(tmp_path: Path) -> None:
    config = load(tmp_path, text(listeners=AUTH, authentication="[authentication]\nurl = 'http://127.0.0.1:1/login'\n"))
    assert config.accounts() == {}
    owners = config.owners(config.listeners[0])
    assert owners is None
    # What is faulty in itself is told once.
    assert faults(tmp_path, text(listeners=AUTH, authentication="[authentication]\nurl = 'x'\n")) == [
        'authentication.url: must be a URL like "https://app.example/inbound"'
    ]


def test_postmaster_and_routes_that_are_never_reached(tmp_path: Path) -> None:
    nobody = load(tmp_path, text())
    assert nobody.warnings() == ["routes: no route takes postmaster@mx.example.net, which RFC 5321 demands of every mail server"]
    somebody = load(tmp_path, text(routes=ROUTE + '[[routes]]\nrecipients=["PostMaster@mx.example.net"]\nsink="app"'))
    assert somebody.warnings() == []
    shadowed = load(tmp_path, text(routes='[[routes]]\nrecipients=["*"]\nsink="app"\n' + ROUTE))
    assert shadowed.warnings() == ["routes[1]: is never reached: routes[0] takes every recipient from every client"]


# --------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize(
    ("address", "port", "wanted"),
    [
        ("127.0.0.1:25", None, ("127.0.0.1", 25)),
        ("[::1]:0", None, ("::1", 0)),
        ("[2001:db8::1]", 25, ("2001:db8::1", 25)),
        ("mail.example.net", 25, ("mail.example.net", 25)),
        ("localhost:2525", 25, ("localhost", 2525)),
    ],
)
def test_addresses(address: str, port: int | None, wanted: tuple[str, int]) -> None:
    assert split_address(address, port) == wanted


@pytest.mark.parametrize("address", ["", "x", "a b:25", "[::1:25", "[::1]25", "[::1]:x", "1:2:3", "host:-1", "host:٢٥", "-a.example:25"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ValueError, match=re.escape(address.removesuffix(":25") or "host")):
        split_address(address)


# ------------------------------------------------------------------------------------ the example


def uncommented() -> dict[str, Any]:
    """The example with every setting that is commented out (``#key`` without a space) taken in."""
    lines = []
    for line in EXAMPLE.read_text().splitlines():
        setting = re.match(r"#(?=[a-z_]+ = |\[)", line)
        lines.append(line[1:] if setting else line)
    return tomllib.loads("\n".join(lines))


def test_the_example_is_good_as_it_stands() -> None:
    config = Config.load(EXAMPLE, environment={})
    assert config.warnings() == []
    assert config.spool.path == EXAMPLE.parent / "spool"


def tables_of(tree: dict[str, Any]) -> list[tuple[str, type[Table], dict[str, Any]]]:
    head = {key: value for key, value in tree.items() if key in Head.model_fields}
    found: list[tuple[str, type[Table], dict[str, Any]]] = [("", Head, head)]
    for key, field in Config.model_fields.items():
        if key in Head.model_fields:
            continue
        if key in ("sinks", "checks"):
            models: Mapping[str, type[Table]] = SINKS if key == "sinks" else CHECKS
            found += [(f"{key}.{name}", models[table["type"]], table) for name, table in tree[key].items()]
        elif isinstance(tree[key], list):
            found += [(f"{key}[{number}]", get_args(field.annotation)[0], table) for number, table in enumerate(tree[key])]
        else:
            models_named = [
                part for part in (field.annotation, *get_args(field.annotation)) if isinstance(part, type) and issubclass(part, Table)
            ]
            found.append((key, models_named[0], tree[key]))
    return found


def test_every_key_of_the_example_is_known() -> None:
    tree = uncommented()
    assert set(tree) <= set(Config.model_fields)
    for place, model, table in tables_of(tree):
        assert set(table) <= set(model.model_fields), place


def test_every_key_there_is_stands_in_the_example() -> None:
    tree = uncommented()
    assert set(Config.model_fields) <= set(tree)
    shown: dict[type[Table], set[str]] = {}
    for _, model, table in tables_of(tree):
        shown.setdefault(model, set()).update(table)
    # The example says in words that lmtp has what relay has, and stdout and discard what every sink has.
    shown[LmtpConfig] |= shown[RelayConfig] - {"mx"}
    for model in (StdoutConfig, DiscardConfig):
        shown[model] |= {"concurrency", "rate", "timeout", "on_failure"}
    assert {*SINKS.values(), *CHECKS.values(), Head, Limits, Retry, SpoolConfig, Admin, RouteConfig, ListenerConfig} <= set(shown)
    for model, keys in shown.items():
        assert set(model.model_fields) == keys, model.__name__


def test_what_is_commented_out_in_the_example_is_the_default() -> None:
    active = {
        place: set(table)
        for place, _, table in tables_of(tomllib.loads(EXAMPLE.read_text()) | {"users": {}, "checks": {}, "authentication": {}})
    }
    seen = 0
    for place, model, table in tables_of(uncommented()):
        for key, value in table.items():
            field = model.model_fields[key]
            default = field.get_default(call_default_factory=True) if not field.is_required() else None
            # Without a default, or inside a table that is an example as a whole, the value is one.
            given = (model is Head and key in ("users", "senders")) or key in ("hosts", "certificates")
            if key in active.get(place, {key}) or default is None or given:
                continue
            needed = {name: table[name] for name, other in model.model_fields.items() if other.is_required() or name in ("hosts", "sinks", "sink")
                      if name in table}  # fmt: skip
            made = getattr(model.model_validate(needed | {key: value}, context={"folder": Path("/")}), key)
            assert made == (Path("/spool") if key == "path" else default), f"{place}.{key}"
            seen += 1
    assert seen > 40
