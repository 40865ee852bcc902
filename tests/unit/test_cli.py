"""The command: what is typed, what is printed, and with which exit code it ends."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trustme
from click.testing import CliRunner, Result

from gateway import __version__
from gateway.cli import cli
from gateway.contracts import Pending, Row, SpoolError
from gateway.message import Client, Content, Envelope, Message, Recipient
from gateway.observe import Telemetry
from gateway.spool.sqlite import SqliteSpool

from ..certificates import Certified, certified
from ..servers import GatewayProcess, HttpReceiver, free_port, wait_until

CONFIG = """
hostname = "mx.example.net"

[[listeners]]
address = "127.0.0.1:2525"

[[listeners]]
address = "127.0.0.1:2424"
protocol = "lmtp"

[spool]
path = "spool"

[sinks.app]
type = "discard"

[sinks.out]
type = "relay"
hosts = ["192.0.2.1"]

[checks.doorman]
type = "http"
url = "http://127.0.0.1:1/"
stages = ["client", "sender"]

[checks.policy]
type = "http"
url = "http://127.0.0.1:1/"
stages = ["recipient", "content"]

[[routes]]
recipients = ["*@app.example", "postmaster@mx.example.net"]
sinks = ["app"]
checks = ["policy"]

[[routes]]
recipients = ["*@users.example"]
authenticated = true
sink = "out"

[[routes]]
recipients = ["*"]
clients = ["10.0.0.0/8"]
sink = "out"

[bounces]
sink = "out"
"""


def run(*arguments: str | Path, code: int = 0, environment: dict[str, str] | None = None) -> Result:
    # In the test's own process: the command itself is a function of its arguments and files.
    result = CliRunner(env=environment).invoke(cli, [str(argument) for argument in arguments], prog_name="gateway")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "gateway.toml"
    file.write_text(CONFIG)
    return file


# ------------------------------------------------------------------------------- the door itself


def test_the_command_and_the_module_are_one() -> None:
    done = subprocess.run([sys.executable, "-m", "gateway", "--version"], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == f"gateway {__version__}\n"
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"gateway": "gateway.cli:main"}


def test_help_loads_none_of_the_parts() -> None:
    code = (
        "import sys\nsys.argv = ['gateway', '--help']\nfrom gateway.cli import main\ntry:\n    main()\nexcept SystemExit: pass\n"
        "print([name for name in ('pydantic', 'uvloop', 'asyncio', 'aiohttp', 'apsw', 'orjson') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.endswith("[]\n")
    assert "serve" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["serve", "--to"],
        ["serve", "--listen", "127.0.0.1:0"],
        ["serve", "--to", "discard:", "-c", "x.toml"],
        ["serve", "--to", "discard:", "--log", "xml"],
        ["serve", "--to", "discard:", "--workers", "-1"],
        ["serve"],
        ["check"],
        ["queue", "list"],
        ["queue", "retry", "--spool", "."],
        ["queue", "drop", "ID", "--all", "--spool", "."],
        ["queue", "list", "--spool", ".", "--state", "lost"],
        ["queue", "export", "--spool", "."],
        ["send"],
        ["send", "--to", "a@x", "127.0.0.1:1", "--server", "127.0.0.1:1"],
        ["send", "--to", "a@x", "--message", "x", "--subject", "y"],
    ],
)
def test_usage_ends_with_2(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments, code=2, environment={"XDG_STATE_HOME": str(tmp_path / "state")})
    assert "Error: " in result.stderr
    assert result.stdout == ""


def test_version() -> None:
    assert run("version").stdout.splitlines()[0].split() == ["gateway", __version__]
    versions = json.loads(run("version", "--json").stdout)
    assert versions["gateway"] == __version__
    assert "missing" not in versions.values()


# ----------------------------------------------------------------------------------------- check


def test_check_of_a_good_file(file: Path) -> None:
    result = run("check", "-c", file)
    assert result.stdout == f"{file}: good\n"
    assert result.stderr == "warning: routes[1].authenticated: no listener has auth: no client can ever use this route\n"
    assert json.loads(run("check", "-c", file, "--json").stdout) == {
        "file": str(file),
        "faults": [],
        "warnings": ["routes[1].authenticated: no listener has auth: no client can ever use this route"],
    }
    # It opened nothing.
    assert sorted(path.name for path in file.parent.iterdir()) == ["gateway.toml"]


def test_check_tells_every_fault_one_a_line(file: Path) -> None:
    file.write_text(CONFIG.replace('type = "discard"', 'type = "discart"').replace('"lmtp"', '"lmpt"'))
    wanted = [
        "listeners[1].protocol: must be one of smtp, submission, lmtp; did you mean 'lmtp'?",
        "sinks.app.type: must be one of webhook, relay, lmtp, file, stdout, discard; did you mean 'discard'?",
    ]
    result = run("check", "-c", file, code=1)
    assert result.stderr.splitlines() == wanted
    assert result.stdout == ""
    assert json.loads(run("check", "-c", file, "--json", code=1).stdout) == {"file": str(file), "faults": wanted, "warnings": []}


def test_gateway_toml_here_is_taken(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert run("check").stdout == "gateway.toml: good\n"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    for command in (["check"], ["serve"], ["queue", "list"]):
        assert run(*command, "-c", missing, code=1).stderr == f"{missing}: cannot be read: No such file or directory\n"


# ----------------------------------------------------------------------------------------- serve


def test_serve_refuses_a_faulty_file(file: Path) -> None:
    file.write_text(CONFIG.replace('clients = ["10.0.0.0/8"]', ""))
    (fault,) = run("serve", "-c", file, code=1).stderr.splitlines()
    assert fault.startswith("routes[2]: would be an open relay")


def test_serve_refuses_urls_it_does_not_know() -> None:
    result = run("serve", "--to", "ftp://x", "--to", "gopher://y", code=1)
    assert [line.partition(": ")[0] for line in result.stderr.splitlines()] == ["--to[0]", "--to[1]"]


# --------------------------------------------------------------------------------------- explain

EXPLAIN = ("--client", "192.0.2.7", "--from", "a@client.example")


def explain(file: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(run("explain", "-c", file, *arguments, "--json", code=code).stdout)
    return told


def test_explain_how_the_client_comes_in(file: Path) -> None:
    more = 'address = "127.0.0.1:2525"\nproxy_protocol_from = ["10.0.0.0/8"]\nxclient_from = ["10.1.0.0/16"]\ngreet_delay = "6s"\n'
    file.write_text(CONFIG.replace('address = "127.0.0.1:2525"\n', more, 1))

    def lines(client: str) -> dict[str, str]:
        told = run("explain", "-c", file, "--client", client, "--from", "a@client.example", "--to", "b@app.example").stdout
        return {line[:10].strip(): line[10:] for line in told.splitlines()}

    stranger, proxy, speaker = lines("192.0.2.7"), lines("10.0.0.1"), lines("10.1.0.1")
    assert stranger["proxy"] == "a PROXY header from here is refused; only 10.0.0.0/8 may send one"
    assert stranger["greeting"] == "after 6 s of silence"
    assert "100 of one client" in stranger["limits"]
    assert proxy["proxy"].startswith("must begin with a PROXY header")
    assert "not counted by client" in proxy["limits"]
    assert speaker["xclient"] == "may speak for others (XCLIENT, XFORWARD)"
    assert "xclient" not in stranger | proxy
    assert "greeting" not in speaker
    dialogue = explain(file, "--client", "10.1.0.1", "--from", "a@client.example", "--to", "b@app.example")["dialogue"]
    assert any(line.startswith("< 250-XCLIENT ") for line in dialogue)


def certified_file(tmp_path: Path, tls: str) -> tuple[Path, Certified]:
    pair = certified(trustme.CA(), tmp_path / "tls", "mx.example.net")
    file = tmp_path / "gateway.toml"
    first = 'address = "127.0.0.1:2525"\n'
    file.write_text(CONFIG.replace(first, f'{first}tls = "{tls}"\ncertificate = "tls/certificate.pem"\nkey = "tls/key.pem"\n'))
    return file, pair


def test_explain_says_the_mail_as_the_listener_wants_it(tmp_path: Path) -> None:
    to = (*EXPLAIN, "--to", "b@app.example")
    for tls, options, shown, said, reply in (
        ("starttls", (), "STARTTLS offered; this mail in clear", False, "250 2.1.5 recipient OK"),
        ("starttls", ("--tls",), "STARTTLS offered; this mail with it", True, "250 2.1.5 recipient OK"),
        ("required", (), "STARTTLS required; this mail with it", True, "250 2.1.5 recipient OK"),
        ("required", ("--clear",), "STARTTLS required; this mail in clear", False, "530 5.7.0 say STARTTLS first"),
        ("implicit", (), "from the first octet; this mail with it", False, "250 2.1.5 recipient OK"),
    ):
        file, _ = certified_file(tmp_path, tls)
        code = 0 if reply.startswith("2") else 1
        lines = run("explain", "-c", file, *to, *options, code=code).stdout.splitlines()
        assert lines[2] == f"tls       {shown}"
        told = explain(file, *to, *options, code=code)
        assert told["reply"] == reply
        assert ("> STARTTLS" in told["dialogue"]) is said
    assert "has TLS from the first octet" in run("explain", "-c", file, *to, "--clear", code=2).stderr
    file.write_text(CONFIG)
    assert "has no TLS" in run("explain", "-c", file, *to, "--tls", code=2).stderr


def test_check_reads_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, pair = certified_file(tmp_path, "starttls")
    assert "expire" not in run("check", "-c", file).stderr
    monkeypatch.setattr("gateway.cli.EXPIRES_SOON", 10**6)
    assert f"warning: listeners[0]: {pair.certificate} expires in " in run("check", "-c", file).stderr
    pair.key.write_text("no key")
    assert run("check", "-c", file, code=1).stderr == f"listeners[0].key: {pair.key} has no private key in PEM form\n"


def test_send_wants_its_options_to_fit(tmp_path: Path, file: Path) -> None:
    for options in (("--tls", "--implicit-tls"), ("--insecure",), ("--ca-file", file), ("--tls", "--key", file)):
        run("send", "--to", "b@app.example", *options, code=2)


def test_explain_what_is_taken(file: Path) -> None:
    assert run("explain", "-c", file, *EXPLAIN, "--to", "b@app.example").stdout == (
        "listener  127.0.0.1:2525\n"
        "protocol  smtp\n"
        "tls       off\n"
        "auth      off\n"
        "limits    10000 connections, 100 of one client; 26214400 octets, 1000 recipients; 300 s between commands, 300 s for one, "
        "180 s of silence and 500 octets a second in content\n"
        "may ask   DELIVERBY; MT-PRIORITY\n"
        "checks    doorman (client), doorman (sender), policy (recipient), policy (content)\n"
        "route     routes[0]: '*@app.example', 'postmaster@mx.example.net', acknowledge durable\n"
        "sinks     app (discard)\n"
        "reply     250 2.1.5 recipient OK\n"
    )
    told = explain(file, *EXPLAIN, "--to", "b@app.example")
    assert told["accepted"] is True
    assert told["route"] == {"number": 0, "recipients": ["*@app.example", "postmaster@mx.example.net"], "acknowledge": "durable"}
    assert told["sinks"] == [{"name": "app", "type": "discard"}]
    assert [line for line in told["dialogue"] if line.startswith(">")] == [
        "> EHLO client.example",
        "> MAIL FROM:<a@client.example>",
        "> RCPT TO:<b@app.example>",
    ]


@pytest.mark.parametrize(
    ("arguments", "reply", "stage", "why"),
    [
        (
            [*EXPLAIN, "--to", "b@elsewhere.example"],
            "550 5.7.1",
            "recipient",
            ["routes[2] fits, but not for clients at 192.0.2.7"],
        ),
        (
            [*EXPLAIN, "--to", "b@users.example"],
            "550 5.7.1",
            "recipient",
            ["routes[1] fits, but wants an authenticated client", "routes[2] fits, but not for clients at 192.0.2.7"],
        ),
        (
            ["--client", "10.1.2.3", "--from", "", "--to", '"b%c"@elsewhere.example'],
            "550 5.7.1",
            "recipient",
            ["routes[2] fits, but does not relay local parts with %, ! or @ (odd_local_parts)"],
        ),
        ([*EXPLAIN, "--to", "b@c@app.example"], "501 5.1.3", "recipient", []),
        (["--client", "10.1.2.3", "--from", "no address", "--to", "b@app.example"], "501 5.1.7", "mail", []),
        ([*EXPLAIN, "--to", "b@app.example", "--helo", "in valid"], "501 5.5.4", "hello", []),
    ],
)
def test_explain_what_is_refused(file: Path, arguments: list[str], reply: str, stage: str, why: list[str]) -> None:
    told = explain(file, *arguments, code=1)
    assert told["reply"].startswith(reply)
    assert (told["stage"], told["why"]) == (stage, why)
    assert (told["accepted"], told["route"], told["sinks"]) == (False, None, [])
    text = run("explain", "-c", file, *arguments, code=1).stdout
    assert f"reply     {told['reply']}  ({stage})\n" in text
    assert all(reason in text for reason in why)


def test_explain_for_others(file: Path) -> None:
    assert explain(file, *EXPLAIN, "--to", "b@users.example", "--user", "ann")["route"]["number"] == 1
    assert explain(file, "--client", "10.0.0.1", "--from", "", "--to", "b@elsewhere.example")["sinks"] == [{"name": "out", "type": "relay"}]
    assert explain(file, *EXPLAIN, "--to", "jürgen@app.example")["dialogue"][-4] == "> MAIL FROM:<a@client.example> SMTPUTF8"
    lmtp = explain(file, *EXPLAIN, "--to", "b@app.example", "--listener", "127.0.0.1:2424")
    assert lmtp["listener"] == "127.0.0.1:2424"
    assert "> LHLO client.example" in lmtp["dialogue"]
    assert explain(file, *EXPLAIN, "--to", "Postmaster")["route"]["number"] == 0


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--client", "localhost", "--from", "", "--to", "b@app.example"], "--client"),
        ([*EXPLAIN, "--to", "b@app.example", "--listener", "127.0.0.1:1"], "--listener"),
        ([*EXPLAIN, "--to", "b@app.example>\r\nDATA"], "--to"),
        ([*EXPLAIN, "--to", "b@app.example", "--helo", "x\x00"], "--helo"),
    ],
)
def test_explain_usage(file: Path, arguments: list[str], option: str) -> None:
    assert f"Invalid value for {option}: " in run("explain", "-c", file, *arguments, code=2).stderr


# ----------------------------------------------------------------------- the queue of a stopped one

NOW = time.time()
SIZE = str(len(b"Subject: m1\r\nX-Odd: \x1b[31m\r\n\r\nHello m1\r\n"))


class Ticket:
    """A message on its way into the spool, as the intake brings it."""

    def __init__(self, row: Row) -> None:
        self._row = row
        self.size = row.message.stored.size
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def close(self) -> list[Row]:
        return [self._row]

    def stored(self, error: SpoolError | None) -> None:
        assert error is None
        self.done.set_result(None)


def mail(id: str, sink: str, *, state: Any = "queued", to: Sequence[str] = ("b@app.example",), note: str = "", age: float = 3600.0) -> Row:
    recipients = [Recipient(address, *address.rpartition("@")[::2]) for address in to]
    message = Message(
        id=id,
        envelope=Envelope("a@client.example", {}, recipients),
        stored=Content(f"Subject: {id}\r\nX-Odd: \x1b[31m\r\n\r\nHello {id}\r\n".encode()),
        client=Client("192.0.2.7"),
        received_at=NOW - age,
        trace=f"Received: by mx.example.net id {id}\r\n".encode(),
        expires_at=NOW + 86400,
    )
    pending = Pending(id, sink, tuple(range(len(recipients))), NOW + 7200, NOW + 86400, attempts=2, state=state, note=note)
    return Row(message, [pending])


async def fill(folder: Path, rows: Sequence[Row]) -> None:
    spool = SqliteSpool(folder, observer=Telemetry("none"))
    await spool.open()
    tickets = [Ticket(row) for row in rows]
    for ticket in tickets:
        spool.store(ticket)
    await asyncio.gather(*(ticket.done for ticket in tickets))
    await spool.close()


@pytest.fixture
def spool(tmp_path: Path, file: Path) -> Path:
    """Two shards: m1 and m2 wait, m3 is held, m4 is dead."""
    folder = tmp_path / "spool"
    first = [mail("m1", "app", note="451 later\x1b[2J", age=7200), mail("m4", "out", state="dead", note="550 no", age=60)]
    second = [mail("m2", "out", to=["b@x.example", "c@x.example", "d@x.example", "e@x.example"]), mail("m3", "app", state="held")]
    for number, rows in enumerate((first, second)):
        (folder / str(number)).mkdir(parents=True, mode=0o700)
        asyncio.run(fill(folder / str(number), rows))
    return folder


def rows(spool: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """By id, in the order told."""
    return {row["id"]: row for row in json.loads(run("queue", "list", "--spool", spool, "--json", *arguments).stdout)}


def test_queue_list(spool: Path, file: Path) -> None:
    lines = run("queue", "list", "-c", file).stdout.splitlines()
    assert [line.split()[:5] for line in lines] == [
        ["ID", "STATE", "SINK", "SIZE", "TRIES"],
        ["m1", "queued", "app", SIZE, "2"],
        ["m2", "queued", "out", SIZE, "2"],
        ["m3", "held", "app", SIZE, "2"],
        ["m4", "dead", "out", SIZE, "2"],
    ]
    assert "2h" in lines[1]
    # Nothing out of mail steers the terminal.
    assert re.search(r"<a@client\.example>  b@app\.example +451 later\\u001b\[2J$", lines[1])
    assert "b@x.example, c@x.example, d@x.example and 1 more" in lines[2]
    assert list(rows(spool)) == ["m1", "m2", "m3", "m4"]
    assert list(rows(spool, "--sink", "app")) == ["m1", "m3"]
    assert list(rows(spool, "--state", "dead")) == ["m4"]
    assert list(rows(spool, "--sink", "app", "--state", "dead")) == []
    assert run("queue", "list", "-c", file, "--state", "dead", "--sink", "app").stdout == ""


def test_queue_list_tells_what_its_sender_wants_held(tmp_path: Path) -> None:
    row = mail("m1", "app")
    row.message.not_before = row.pendings[0].due = NOW + 3 * 3600 + 60
    row.pendings[0].attempts = 0
    asyncio.run(fill(tmp_path / "spool" / "0", [row]))
    [_, line] = run("queue", "list", "--spool", tmp_path / "spool").stdout.splitlines()
    assert re.search(r" 3h .* held by its sender until 2\d{3}-\d\d-\d\dT\d\d:\d\d:\d\dZ$", line), line
    assert re.search(r"^not_before +2\d{3}-", run("queue", "show", "--spool", tmp_path / "spool", "m1").stdout, re.MULTILINE)


def test_queue_list_says_when_there_is_more(spool: Path) -> None:
    result = run("queue", "list", "--spool", spool, "--limit", "3")
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["ID", "m1", "m2", "m3"]
    assert result.stderr == "There are more than 3; --limit shows them.\n"
    assert run("queue", "list", "--spool", spool, "--limit", "4").stderr == ""


def test_queue_rows_as_json(spool: Path) -> None:
    row = rows(spool)["m2"]
    assert row == {
        "id": "m2",
        "message_id": "m2",
        "sink": "out",
        "state": "queued",
        "recipients": ["b@x.example", "c@x.example", "d@x.example", "e@x.example"],
        "mail_from": "a@client.example",
        "size": int(SIZE),
        "attempts": 2,
        "due": NOW + 7200,
        "received_at": NOW - 3600,
        "expires_at": NOW + 86400,
        "note": "",
        "priority": 0,
        "not_before": 0.0,
    }


def test_queue_show(spool: Path) -> None:
    text = run("queue", "show", "--spool", spool, "m2").stdout
    assert re.search(r"^state +queued$", text, re.MULTILINE)
    assert re.search(r"^received_at +2\d{3}-\d\d-\d\dT\d\d:\d\d:\d\dZ$", text, re.MULTILINE)
    assert text.endswith("Received: by mx.example.net id m2\nSubject: m2\nX-Odd: \\u001b[31m\n")
    told = json.loads(run("queue", "show", "--spool", spool, "m4", "--json").stdout)
    assert [row["id"] for row in told["rows"]] == ["m4"]
    assert told["header"].startswith("Received: by mx.example.net id m4\r\nSubject: m4")


def test_queue_export_is_the_octets(spool: Path, tmp_path: Path) -> None:
    wanted = b"Received: by mx.example.net id m3\r\nSubject: m3\r\nX-Odd: \x1b[31m\r\n\r\nHello m3\r\n"
    assert run("queue", "export", "--spool", spool, "m3").stdout_bytes == wanted
    run("queue", "export", "--spool", spool, "m3", "-o", tmp_path / "m3.eml")
    assert (tmp_path / "m3.eml").read_bytes() == wanted
    assert "cannot be written" in run("queue", "export", "--spool", spool, "m3", "-o", tmp_path / "none" / "x", code=1).stderr


def test_queue_retry_is_for_what_waits(spool: Path) -> None:
    assert run("queue", "retry", "--spool", spool, "--sink", "app").stdout == "1 changed\n"
    assert rows(spool)["m1"]["due"] <= time.time()
    assert rows(spool)["m3"]["state"] == "held"
    assert rows(spool)["m2"]["due"] == NOW + 7200
    assert run("queue", "retry", "--spool", spool, "--all").stdout == "2 changed\n"
    result = run("queue", "retry", "--spool", spool, "m4", code=1)
    assert result.stderr == "no queued message in the queue under this ID\n"
    assert rows(spool)["m4"]["state"] == "dead"


def test_queue_replay_is_for_dead_letters(spool: Path) -> None:
    assert run("queue", "replay", "--spool", spool, "m4").stdout == "1 changed\n"
    assert rows(spool)["m4"]["state"] == "queued"
    assert run("queue", "replay", "--spool", spool, "m4", "m1", code=1).stderr == "no dead message in the queue under these IDs\n"


def test_queue_hold_and_release(spool: Path) -> None:
    assert run("queue", "hold", "--spool", spool, "m1", "m2").stdout == "2 changed\n"
    assert {id: row["state"] for id, row in rows(spool).items()} == {"m1": "held", "m2": "held", "m3": "held", "m4": "dead"}
    assert run("queue", "release", "--spool", spool, "--sink", "app").stdout == "2 changed\n"
    assert {id: row["state"] for id, row in rows(spool).items()} == {"m1": "queued", "m2": "held", "m3": "queued", "m4": "dead"}


def test_queue_drop(spool: Path) -> None:
    assert run("queue", "drop", "--spool", spool, "--sink", "out", "--state", "dead").stdout == "1 changed\n"
    assert list(rows(spool)) == ["m1", "m2", "m3"]
    assert run("queue", "drop", "--spool", spool, "m1").stdout == "1 changed\n"
    assert run("queue", "drop", "--spool", spool, "m1", code=1).stderr == "no such message in the queue under this ID\n"
    assert run("queue", "drop", "--spool", spool, "--all").stdout == "2 changed\n"
    result = run("queue", "list", "--spool", spool)
    assert (result.stdout, result.stderr) == ("", "Nothing is queued.\n")


@pytest.mark.parametrize("command", [["show"], ["export"]])
def test_an_id_that_nobody_has(spool: Path, command: list[str]) -> None:
    assert run("queue", *command, "--spool", spool, "m\x1b9", code=1).stderr == "m\\u001b9: no such message in the queue\n"


def test_no_spool(tmp_path: Path, file: Path) -> None:
    assert run("queue", "list", "-c", file, code=1).stderr == f"{tmp_path / 'spool'}: there is no spool: No such file or directory\n"
    assert run("queue", "list", "--spool", tmp_path, code=1).stderr == f"{tmp_path}: there is no spool in this folder\n"


def test_the_spool_of_a_gateway_without_a_file(spool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "state" / "gateway-smtp"
    state.mkdir(parents=True)
    spool.rename(state / "spool")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = run("queue", "list", "--state", "dead", "--json", environment={"XDG_STATE_HOME": str(tmp_path / "state")})
    assert [row["id"] for row in json.loads(result.stdout)] == ["m4"]


def test_a_shard_that_somebody_holds_without_answering(spool: Path) -> None:
    async def holding() -> Result:
        held = SqliteSpool(spool / "0", observer=Telemetry("none"))
        await held.open()
        try:
            return await asyncio.to_thread(run, "queue", "list", "--spool", spool, code=1)
        finally:
            await held.close()

    assert asyncio.run(holding()).stderr.startswith(f"{spool / '0'}: ")


# ----------------------------------------------------------------------- the queue of a running one


@pytest.mark.parametrize("workers", [1, 2])
def test_the_queue_of_a_running_gateway(tmp_path: Path, workers: int) -> None:
    config = f"""
    workers = {workers}
    [[listeners]]
    address = "127.0.0.1:0"
    [sinks.out]
    type = "relay"
    hosts = ["127.0.0.1:{free_port()}"]
    [[routes]]
    recipients = ["*"]
    clients = ["127.0.0.1"]
    sink = "out"
    """
    with GatewayProcess(tmp_path / "gateway", config) as gateway:
        for number in range(4):
            run("send", gateway.server, "--to", f"b{number}@x.example", "--subject", f"number {number}", "-q")
        found = json.loads(run("queue", "list", "-c", gateway.config, "--json").stdout)
        assert sorted(row["recipients"] for row in found) == [[f"b{number}@x.example"] for number in range(4)]
        assert {row["state"] for row in found} == {"queued"}
        first, second = found[0]["id"], found[1]["id"]
        assert run("queue", "hold", "-c", gateway.config, first).stdout == "1 changed\n"
        shown = json.loads(run("queue", "show", "-c", gateway.config, first, "--json").stdout)
        assert shown["rows"][0]["state"] == "held"
        assert f"To: {found[0]['recipients'][0]}\r\n" in shown["header"]
        octets = run("queue", "export", "-c", gateway.config, second).stdout_bytes
        assert octets.startswith(b"Received: ")
        assert second.encode() in octets
        assert run("queue", "drop", "-c", gateway.config, second).stdout == "1 changed\n"
        # Nothing is done behind the gateway's back: the same is seen once it is stopped.
        wanted = {row["id"]: row["state"] for row in json.loads(run("queue", "list", "-c", gateway.config, "--json").stdout)}
        assert wanted == {row["id"]: "held" if row["id"] == first else "queued" for row in found if row["id"] != second}
        assert gateway.stop() == 0
        assert {row["id"]: row["state"] for row in json.loads(run("queue", "list", "-c", gateway.config, "--json").stdout)} == wanted


def test_retry_reaches_a_sink_that_is_back(tmp_path: Path) -> None:
    port = free_port()
    config = f"""
    [[listeners]]
    address = "127.0.0.1:0"
    [sinks.app]
    type = "webhook"
    url = "http://127.0.0.1:{port}/"
    [[routes]]
    recipients = ["*"]
    sink = "app"
    [retry]
    delays = ["1h"]
    """
    with GatewayProcess(tmp_path / "gateway", config) as gateway:
        run("send", gateway.server, "--to", "b@x.example", "-q")
        gateway.event("sink_down", sink="app")
        # 410: no probe of its own finds out that it is back, and none overtakes us.
        status = 410
        with HttpReceiver(lambda request: (status, {}), port=port) as receiver:
            assert gateway.event("sink_down", count=2, sink="app")["reason"].startswith("paused")
            asked = len(receiver.requests)
            status = 200
            assert run("queue", "retry", "-c", gateway.config, "--sink", "app").stdout == "1 changed\n"
            gateway.event("delivered", sink="app")
            assert len(receiver.requests) == asked + 1
        # It is told before it is marked, and a mark may wait for company.
        wait_until(lambda: run("queue", "list", "-c", gateway.config).stderr == "Nothing is queued.\n", "an empty queue")


def test_serve_without_a_file(tmp_path: Path) -> None:
    box = tmp_path / "box"
    command = [
        sys.executable,
        "-m",
        "gateway",
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--to",
        f"file://{box}",
        "--to",
        "discard:",
        "--log",
        "text",
    ]
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state"), "GATEWAY_HOSTNAME": "quick.example"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            server = next(
                word.partition("=")[2] for line in process.stderr if "listening" in line for word in line.split() if "address=" in word
            )
            assert "quick.example" in run("send", server, "--to", "b@x.example").stdout
            wait_until(lambda: list((box / "new").glob("*")), "the Maildir")
        finally:
            process.terminate()
            process.communicate(timeout=30)
    assert process.returncode == 0
    assert (tmp_path / "state" / "gateway-smtp" / "spool" / "0").is_dir()


def test_serve_with_flags_over_the_file(tmp_path: Path) -> None:
    config = '[[listeners]]\naddress = "127.0.0.1:0"\n[sinks.app]\ntype = "discard"\n[[routes]]\nrecipients = ["*"]\nsink = "app"\n'
    flags = ["--hostname", "flag.example", "--spool", str(tmp_path / "other")]
    with GatewayProcess(tmp_path / "gateway", config, flags) as gateway:
        assert "< 220 flag.example" in run("send", gateway.server, "--to", "b@x.example").stdout
        assert (tmp_path / "other" / "0").is_dir()


def test_serve_tells_what_cannot_be_had(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "gateway", "serve", "--listen", address, "--to", "discard:", "--spool", str(tmp_path / "spool")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert done.stderr == f"listeners[0].address: cannot listen on {address}: Address already in use\n"


def test_send_and_its_exit_codes(tmp_path: Path) -> None:
    config = (
        '[[listeners]]\naddress = "127.0.0.1:0"\n[sinks.app]\ntype = "discard"\n[[routes]]\nrecipients = ["*@x.example"]\nsink = "app"\n'
    )
    with GatewayProcess(tmp_path / "gateway", config) as gateway:
        assert "< 250" in run("send", "--server", gateway.server, "--to", "b@x.example").stdout
        assert "550 5.7.1" in run("send", gateway.server, "--to", "b@y.example", code=1).stdout
        (tmp_path / "m.eml").write_bytes(b"Subject: x\n\nhello\n")
        run("send", gateway.server, "--to", "b@x.example", "--message", tmp_path / "m.eml", "-q")
        assert gateway.event("accepted", size=len(b"Subject: x\r\n\r\nhello\r\n"))
    run("send", "not an address", "--to", "b@x.example", code=2)


# --------------------------------------------------------------------------- logins


def hashed(*options: str, password: bytes = b"wonder\n", code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "gateway", "hash-password", *options], input=password, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr
    return (done.stdout if code == 0 else done.stderr).decode()


@pytest.mark.parametrize(
    ("option", "begin"), [((), "$scrypt$ln=15,r=8,p=1$"), (("--argon2",), "$argon2id$"), (("--scram",), "SCRAM-SHA-256$100000:")]
)
def test_hash_password(option: tuple[str, ...], begin: str) -> None:
    from gateway.passwords import read

    line = hashed(*option)
    assert line.startswith(begin)
    assert read(line.strip()).proves("wonder")
    assert hashed(*option, "--name", "alice").startswith(f"alice:{begin}")


def test_hash_password_refuses() -> None:
    assert "one character or more" in hashed(password=b"\n", code=1)
    assert "one character or more" in hashed(password=b"", code=1)
    assert "UTF-8" in hashed(password=b"\xff\n", code=1)
    assert "colon" in hashed("--name", "a:b", code=2)
    assert "no login can send" in hashed("--name", "a\nb", code=2)
    # Never as an argument: it would stand in the list of processes.
    hashed("wonder", code=2)


def test_explain_tells_of_logins(file: Path) -> None:
    file.write_text(
        file.read_text().replace(
            'address = "127.0.0.1:2525"',
            'address = "127.0.0.1:2525"\nprotocol = "submission"\nauth = "required"\nauth_without_tls = true',
            1,
        )
        + f'\n[users]\nalice = "{hashed().strip()}"\n[senders]\nalice = ["a@client.example"]\n'
    )
    asked = ("--client", "192.0.2.1", "--to", "b@app.example", "--json")
    told = json.loads(run("explain", "-c", file, *asked, "--from", "a@client.example", code=1).stdout)
    assert (told["reply"], told["stage"]) == ("530 5.7.0 authentication required", "mail")
    assert told["auth"] == {
        "listener": "required",
        "mechanisms": ["PLAIN", "LOGIN"],
        "without_tls": True,
        "user": None,
        "certificate": None,
    }
    told = json.loads(run("explain", "-c", file, *asked, "--from", "b@client.example", "--user", "alice", code=1).stdout)
    assert told["reply"] == "553 5.7.1 Sender address rejected: not owned by user alice"
    shown = run("explain", "-c", file, *asked[:-1], "--from", "a@client.example", "--user", "alice").stdout
    assert "auth      required (PLAIN LOGIN), as alice\n" in shown
