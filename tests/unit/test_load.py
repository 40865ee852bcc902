"""The load generator against servers that are told what to say: what arrives, and what is counted."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import trustme
from click.testing import CliRunner, Result

from gateway import passwords
from gateway.cli import cli
from gateway.tools import load
from gateway.tools.load import Plan, PlanError, Report

from ..certificates import certified
from ..servers import GatewayProcess, SmtpSink, Upstream
from ..upstreams import Peer, Rogue

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pipelined": {"pipeline": True},
    "BDAT": {"bdat": True},
    "BDAT, pipelined": {"bdat": True, "pipeline": True},
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
DOTS = b"Subject: dots\r\n\r\n.\r\n..\r\n.x\r\nno end"


def counts(report: Report) -> tuple[int, int, int]:
    return report.accepted, report.refused, report.broken


async def beside(server: Rogue, **plan: Any) -> Report:
    """A run against this server, in a thread."""
    plan = {"sessions": 1, "timeout": 30.0, **plan}
    return await asyncio.to_thread(load.run, Plan(server.address, **plan))


# ------------------------------------------------------------------- what arrives


@ways
@pytest.mark.parametrize("lmtp", [False, True], ids=["SMTP", "LMTP"])
def test_every_octet_arrives(way: dict[str, Any], lmtp: bool) -> None:
    eight = "Subject: ä\r\n\r\nmore\r\n".encode()
    with Upstream(lmtp=lmtp) as upstream:
        report = load.run(Plan(upstream.address, sessions=3, messages=30, contents=[DOTS, eight, b""], recipients=2, lmtp=lmtp, **way))
    assert report.good
    assert counts(report) == (30, 0, 0)
    # DATA cannot end in the middle of a line.
    dots = DOTS if "bdat" in way else DOTS + b"\r\n"
    assert Counter(taken.content for taken in upstream.taken) == {dots: 10, eight: 10, b"": 10}
    for taken in upstream.taken:
        assert taken.recipients == ["<load+1@bench.example>", "<load+2@bench.example>"]
        assert taken.mail == ("<load@client.example> BODY=8BITMIME" if taken.content == eight else "<load@client.example>")
    assert report.replies["content"] == {250: 60 if lmtp else 30}
    assert report.latency.count == 30
    assert upstream.connections == report.connections == report.setup.count == 3
    assert upstream.lines.count("QUIT") == 3
    assert report.octets == 10 * (len(DOTS) + len(eight))


@ways
def test_new_connections(way: dict[str, Any]) -> None:
    with Upstream() as upstream:
        report = load.run(Plan(upstream.address, sessions=2, messages=20, per_connection=4, **way))
    assert counts(report) == (20, 0, 0)
    assert len(upstream.taken) == 20
    # One more is there where a session had to look whether anything was left.
    assert 5 <= upstream.connections <= 7
    assert not report.errors


@pytest.mark.parametrize("size", [0, 1, 2, 3, 100, 180, 1023, 1024, 1025, 1101, 1102, 1103, 100_000])
def test_made_content_has_its_size(size: int) -> None:
    content = load.made(size)
    assert len(content) == size
    assert b"\n" not in content.replace(b"\r\n", b"")
    assert not content.startswith(b".")
    assert max(map(len, content.split(b"\r\n"))) < 200


def test_a_large_mail_under_many_sessions() -> None:
    with Upstream() as upstream:
        report = load.run(Plan(upstream.address, sessions=4, messages=8, sizes=[3_000_000, 10]))
    assert counts(report) == (8, 0, 0)
    assert sorted(len(taken.content) for taken in upstream.taken) == [10] * 4 + [3_000_000] * 4


# ----------------------------------------------------------------- what is counted


@ways
def test_recipients_refused(way: dict[str, Any]) -> None:
    with Upstream() as upstream:
        upstream.refuse = {"RCPT TO:<load+2@": "450 4.7.1 later"}
        some = load.run(Plan(upstream.address, sessions=2, messages=6, recipients=3, **way))
        upstream.refuse = {"RCPT": "550 5.1.1 nobody\x1b[2J"}
        none = load.run(Plan(upstream.address, sessions=2, messages=6, recipients=2, **way))
        upstream.refuse = {}
        after = load.run(Plan(upstream.address, messages=6, **way))
    # Somebody got it, but not all that the message was for.
    assert counts(some) == (0, 6, 0)
    assert some.replies["rcpt"] == {250: 12, 450: 6}
    assert some.texts["rcpt", 450] == "4.7.1 later"
    assert counts(none) == (0, 6, 0)
    assert none.replies["rcpt"] == {550: 12}
    assert counts(after) == (6, 0, 0)
    assert len(upstream.taken) == 12
    assert not some.good
    assert not none.good


@ways
@pytest.mark.parametrize("stage", ["mail", "content"])
def test_messages_refused(way: dict[str, Any], stage: str) -> None:
    with Upstream() as upstream:
        upstream.refuse = {"MAIL" if stage == "mail" else ".": "451 4.3.0 not now"}
        report = load.run(Plan(upstream.address, sessions=2, messages=7, **way))
    assert counts(report) == (0, 7, 0)
    assert report.replies[stage] == {451: 7}
    assert report.latency.count == (7 if stage == "content" else 0 if not way or way == {"bdat": True} else report.latency.count)
    assert not report.errors


def test_data_refused() -> None:
    for pipeline in (False, True):
        with Upstream() as upstream:
            upstream.refuse = {"DATA": "452 4.3.1 full"}
            report = load.run(Plan(upstream.address, messages=5, pipeline=pipeline))
        assert counts(report) == (0, 5, 0)
        assert report.replies["data"] == {452: 5}
        assert upstream.lines.count("RSET") == 5


async def test_data_agreed_to_though_nobody_was_taken() -> None:
    async def talk(peer: Peer) -> None:
        await peer.hello("PIPELINING")
        for _ in range(2):
            await peer.hear("MAIL")
            await peer.hear("RCPT")
            await peer.hear("DATA")
            await peer.say("250 ok", "550 nobody", "354 go on")
            assert await peer.hear() == "."
            await peer.say("554 for nobody")
        await peer.hear("QUIT")
        await peer.say("221 bye")

    async with Rogue(talk) as server:
        report = await beside(server, messages=2, pipeline=True)
    assert not server.bugs
    assert counts(report) == (0, 2, 0)


@ways
async def test_replies_cut_anywhere_and_of_many_lines(way: dict[str, Any]) -> None:
    async def talk(peer: Peer) -> None:
        async def drip(text: str) -> None:
            for octet in text.replace("\n", "\r\n").encode():
                peer.writer.write(bytes([octet]))
                await peer.writer.drain()
                await asyncio.sleep(0)

        await drip("220-one\n220-two\n220 three\n")
        await peer.hear("EHLO")
        await drip("250-rogue\n250-PIPELINING\n250-XAUTH\n250 chunking\n")
        while True:
            line = await peer.hear()
            if line == "DATA":
                await drip("354 go on\n")
                while await peer.hear() != ".":
                    pass
                await drip("250-first\n250-\n250 last\n")
            elif line.startswith("BDAT"):
                await peer.reader.readexactly(int(line.split()[1]))
                await drip("250-first\n250\n")
            elif line == "QUIT":
                return await drip("221 bye\n")
            else:
                await drip("250-first\n250 \n")

    async with Rogue(talk) as server:
        report = await beside(server, messages=5, **way)
    assert not server.bugs
    assert counts(report) == (5, 0, 0)
    assert report.replies["content"] == {250: 5}
    assert report.connections == 1


@ways
async def test_a_connection_closed_in_the_middle_is_counted_and_replaced(way: dict[str, Any]) -> None:
    async def rude(peer: Peer) -> None:
        await peer.hello("PIPELINING", "CHUNKING")
        await peer.hear("MAIL")

    async def polite(peer: Peer) -> None:
        await peer.hello("PIPELINING", "CHUNKING")
        while (line := await peer.hear()) != "QUIT":
            if line == "DATA":
                await peer.say("354 go on")
                while await peer.hear() != ".":
                    pass
            elif line.startswith("BDAT"):
                await peer.reader.readexactly(int(line.split()[1]))
            await peer.say("250 ok")
        await peer.say("221 bye")

    async with Rogue(rude, rude, polite) as server:
        report = await beside(server, messages=6, **way)
    assert not server.bugs
    assert counts(report) == (4, 0, 2)
    assert sum(report.errors.values()) == 2
    assert report.connections == 3
    assert not report.good


@pytest.mark.parametrize(
    "line",
    ["200", "25 ok", "2500 ok", "hello", "650 what", "250", "250 " + "x" * 2043, "250 " + "x" * 2044, ""],
    ids=lambda line: line[:10] + str(len(line)),
)
async def test_no_reply_of_smtp(line: str) -> None:
    async def talk(peer: Peer) -> None:
        await peer.say("220 here")
        await peer.hear("EHLO")
        await peer.say("250 PIPELINING")
        await peer.hear("MAIL")
        await peer.say(line)
        # In the place of RCPT it is told that this is no server to talk to.
        await peer.hear()

    async with Rogue(talk) as server:
        report = await beside(server, messages=1)
    assert counts(report) == (0, 0, 1)
    good = line in ("200", "250") or len(line) == 2047
    assert report.errors == ({"closed by the server": 1} if good else {"not an SMTP reply": 1})


async def test_a_server_that_turns_everybody_away_ends_the_run() -> None:
    async def talk(peer: Peer) -> None:
        await peer.say("554 5.7.1 not you")

    async with Rogue(talk) as server:
        report = await beside(server, messages=5, timeout=2.0)
    assert counts(report) == (0, 0, 0)
    tries = report.replies["greeting"][554]
    assert 2 <= tries <= 10
    assert report.errors == {"turned away before the first mail": tries}
    assert report.failure.startswith("no session came about")


async def test_a_silent_server_ends_the_run() -> None:
    async def talk(peer: Peer) -> None:
        await peer.hello()
        await peer.hear("MAIL")
        await peer.hear("never")

    async with Rogue(talk) as server:
        report = await beside(server, messages=5, timeout=2.0)
    assert report.errors == {"no reply in time": 2}
    assert counts(report) == (0, 0, 2)


async def test_more_replies_than_asked_for() -> None:
    async def talk(peer: Peer) -> None:
        await peer.hello()
        await peer.hear("MAIL")
        await peer.say(*["250 ok"] * 100)
        while await peer.hear() != "QUIT":
            pass

    async with Rogue(talk) as server:
        report = await beside(server, messages=10, timeout=3.0)
    # It never agreed to DATA.
    assert report.accepted == 0
    assert report.refused + report.broken == 10


@pytest.mark.parametrize(
    ("plan", "failure"),
    [
        ({"pipeline": True}, "the server does not offer PIPELINING"),
        ({"bdat": True}, "the server does not offer CHUNKING, which BDAT wants"),
        ({"tls": "starttls"}, "the server does not offer STARTTLS"),
        ({"auth": ("app", "secret")}, "the server does not offer AUTH"),
    ],
)
def test_what_is_not_offered(plan: dict[str, Any], failure: str) -> None:
    with Upstream(offers=()) as upstream:
        report = load.run(Plan(upstream.address, messages=5, **plan))
    assert report.failure.partition(": ")[0] == failure
    assert ("gateway receive never does" in report.failure) == ("tls" in plan or "auth" in plan)
    assert report.begun == 0
    assert not report.good


# ---------------------------------------------------------------------- rate and time


async def test_a_stall_is_not_left_out_of_the_latencies() -> None:
    """100 a second for a second, over one session; the server stands still for half a second in the middle."""

    async def talk(peer: Peer) -> None:
        await peer.hello()
        for number in range(100):
            await peer.hear("MAIL")
            if number == 30:
                await asyncio.sleep(0.5)
            await peer.say("250 ok")
            await peer.hear("RCPT")
            await peer.say("250 ok")
            await peer.hear("DATA")
            await peer.say("354 go on")
            while await peer.hear() != ".":
                pass
            await peer.say("250 ok")
        await peer.hear("QUIT")

    async with Rogue(talk) as server:
        report = await beside(server, messages=100, rate=100.0)
    assert counts(report) == (100, 0, 0)
    # Those that were due while it stood still: about fifty, from half a second downwards, not just the one that hit it.
    late = sum(count for end, count in report.latency.buckets() if end > 100_000_000)
    assert late >= 30
    assert report.latency.maximum >= 490_000_000
    assert report.seconds >= 0.98


def test_what_found_no_session_is_told(upstream: Upstream) -> None:
    report = load.run(Plan(upstream.address, sessions=1, seconds=0.3, rate=1_000_000.0))
    assert report.unsent > 0
    assert report.due == report.unsent + report.begun == pytest.approx(300_000, rel=0.01)
    assert report.as_dict()["latency_ms"]["of"] == report.due
    assert report.broken == 0
    assert not report.good


def test_seconds_end_a_run(upstream: Upstream) -> None:
    began = time.monotonic()
    report = load.run(Plan(upstream.address, sessions=2, seconds=0.3))
    assert 0.3 <= time.monotonic() - began < 60
    assert report.good
    assert report.accepted == len(upstream.taken)


# ------------------------------------------------------------------------ TLS and AUTH


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
def test_tls_and_login(gateway: Callable[[str], GatewayProcess], tmp_path: Path, tls: Literal["starttls", "implicit"]) -> None:
    authority = trustme.CA()
    files = certified(authority, tmp_path / "pki", "127.0.0.1")
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    server = gateway(
        f"""
hostname = "gateway.test"
[[listeners]]
address = "127.0.0.1:0"
tls = "{"required" if tls == "starttls" else tls}"
certificate = "{files.certificate}"
key = "{files.key}"
auth = "required"
[users]
app = "{passwords.made("secret", "scram")}"
[sinks.out]
type = "discard"
[[routes]]
recipients = ["*"]
clients = ["127.0.0.0/8"]
sink = "out"
"""
    ).server
    for number, way in enumerate(WAYS.values()):
        plan = Plan(server, sessions=2, messages=5, sizes=[1000, 200_000], tls=tls, ca_file=ca, verify=True, auth=("app", "secret"), **way)
        report = load.run(dataclasses.replace(plan, per_connection=2) if number % 2 else plan)
        assert report.good, report
        assert report.replies["auth"][235] == report.connections
    wrong = load.run(dataclasses.replace(plan, auth=("app", "wrong")))
    assert wrong.failure == "the server refuses AUTH PLAIN (535)"
    stranger = tmp_path / "stranger.pem"
    trustme.CA().cert_pem.write_to_path(str(stranger))
    unknown = load.run(dataclasses.replace(plan, ca_file=stranger, timeout=5.0))
    assert unknown.begun == 0
    assert "certificate verify failed" in next(iter(unknown.errors))


async def test_more_in_clear_after_starttls() -> None:
    async def talk(peer: Peer) -> None:
        await peer.hello("STARTTLS")
        await peer.hear("STARTTLS")
        await peer.say("220 go on", "250 smuggled")

    async with Rogue(talk) as server:
        report = await beside(server, messages=1, tls="starttls", timeout=5.0)
    assert report.begun == 0
    assert set(report.errors) == {"TLS: the server said more in clear after it agreed to TLS"}


# ---------------------------------------------------------------------------- plans


def test_plans_that_are_refused() -> None:
    for plan in (
        Plan("127.0.0.1:25"),
        Plan("127.0.0.1", messages=1),
        Plan("127.0.0.1:99999", messages=1),
        Plan("127.0.0.1:25", messages=1, sessions=0),
        Plan("127.0.0.1:25", messages=1, rate=-1),
        Plan("127.0.0.1:25", messages=1, recipient="a@b>\r\nQUIT"),
        Plan("127.0.0.1:25", messages=1, timeout=0),
        Plan("unix:/" + "x" * 200, messages=1),
        Plan("1.1.1.1:25", messages=1),
        Plan("[2606:4700::1]:25", messages=1),
    ):
        with pytest.raises(PlanError):
            load.run(plan)
    assert load.resolve("1.1.1.1:25", anywhere=True).host == "1.1.1.1"
    assert load.resolve("[::1]:25").host == "::1"


def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        report = load.run(Plan(f"127.0.0.1:{taken.getsockname()[1]}", sessions=1, messages=1, timeout=0.2))
    assert re.fullmatch(r"no session came about: connection refused, \d times", report.failure)


# --------------------------------------------------------------------------- the command


def command(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["load", *arguments])


def test_the_command(upstream: Upstream, tmp_path: Path) -> None:
    good = command(upstream.address, "-m", "5", "--size", "1KiB", "--size", "2000")
    assert good.exit_code == 0
    assert "messages   5 taken, 0 refused, 0 broken off" in good.output
    assert "1,024, 2,000 octets" in good.output
    mail = tmp_path / "a.eml"
    mail.write_bytes(b"Subject: a file\n\n.dot\n")
    told = json.loads(command(upstream.address, "-m", "2", "--message", str(mail), "--json").output)
    assert told["messages"] == {"begun": 2, "accepted": 2, "refused": 0, "broken": 0, "unsent": 0}
    assert upstream.taken[-1].content == b"Subject: a file\r\n\r\n.dot\r\n"
    upstream.refuse = {"RCPT": "550 5.1.1 nobody\x1b[2J"}
    bad = command(upstream.address, "-m", "2")
    assert bad.exit_code == 1
    assert 'rcpt 550: 2  "5.1.1 nobody\\x1b[2J"' in bad.output
    for usage in (
        [upstream.address],
        ["1.1.1.1:25", "-m", "1"],
        [upstream.address, "-m", "1", "--size", "many"],
        [upstream.address, "-m", "1", "--auth", "app"],
        [upstream.address, "-m", "1", "--message", str(mail), "--size", "1"],
        [upstream.address, "-m", "1", "--verify"],
        ["unix:", "-m", "1"],
    ):
        assert command(*usage).exit_code == 2, usage


def test_a_failure_is_told_once_and_alone(tmp_path: Path) -> None:
    failed = command(f"unix:{tmp_path}/nope", "-m", "5", "-s", "2", "--rate", "100", "--timeout", "0.2")
    assert failed.exit_code == 1
    head, why = failed.output.splitlines()
    assert head.startswith(f"unix:{tmp_path}/nope: 2 sessions")
    assert re.fullmatch(r"failed     no session came about: no connection \(No such file or directory\), \d+ times", why)


def test_whom_the_latency_leaves_out_is_told(upstream: Upstream) -> None:
    output = command(upstream.address, "-s", "1", "-t", "0.3", "--rate", "1000000").output
    (line,) = (line for line in output.splitlines() if line.startswith("latency"))
    assert re.search(r"  of [\d,]+ of [\d,]+ \([\d,]+ were never sent\)$", line)
    assert "never sent" not in command(upstream.address, "-m", "5").output


def test_beside_smtp_sink(sink: SmtpSink) -> None:
    report = load.run(Plan(sink.address, sessions=5, messages=50, pipeline=True))
    assert report.good
    assert len(sink.wait(50)) == 50
