"""Logins in the session and at the listener: identity, order, who waits for whom, and what is told."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from gateway.contracts import Judgement, Login
from gateway.message import TLS, Client
from gateway.reply import Reply
from gateway.route import Route, Routes
from gateway.smtp.server import AuthWanted, LoggedIn, LoginRefused, MailFinished, MailStarted, Refused, Rules, ServerSession

from ..loops import until
from .test_listener import house

SECURE = TLS("TLSv1.3", "TLS_AES_256_GCM_SHA384", end_point=b"e" * 32)
PLAIN = b"AUTH PLAIN " + base64.b64encode(b"\0alice\0wonder") + b"\r\n"
LETTER = b"MAIL FROM:<a@client.example>\r\nRCPT TO:<b@app.example>\r\nBDAT 2 LAST\r\nhi"
LATER = Reply(421, "4.3.2", "shutting down")


def session(client: Client | None = None, hello: bytes = b"EHLO client.example\r\n", **changes: Any) -> ServerSession:
    rules = Rules(
        "mx.example", Routes((Route(("*",), ("app",)),), "mx.example"), **{"auth": "offered", "mechanisms": ("PLAIN", "XOAUTH2")} | changes
    )
    made = ServerSession(rules, client or Client("192.0.2.1", tls=SECURE), "s1", "l1")
    made.start()
    made.outgoing()
    assert made.receive(hello) == []
    return made


def test_a_login_makes_a_new_client_and_older_mail_keeps_its_own() -> None:
    one = session(Client("192.0.2.1", tls=SECURE))
    one.outgoing()
    before = one.receive(LETTER)
    assert isinstance(before[0], MailStarted)
    assert isinstance(before[-1], MailFinished)
    events = one.receive(PLAIN)
    # The reply waits behind the answer that is owed; the login does not.
    assert events == [AuthWanted(Login("PLAIN", "alice", password="wonder"))]
    assert one.paused
    assert one.judged(Judgement("Alice")) == [LoggedIn("PLAIN", "Alice")]
    assert one.outgoing() == b"250 2.1.0 sender OK\r\n250 2.1.5 recipient OK\r\n"
    one.answer(1, Reply(250, "2.0.0", "taken"))
    assert one.outgoing() == b"250 2.0.0 taken\r\n235 2.7.0 authentication succeeded\r\n"
    assert not one.paused
    after = one.receive(LETTER)
    assert isinstance(after[0], MailStarted)
    assert (before[0].transaction.client.user, before[0].transaction.client.protocol) == (None, "ESMTPS")
    assert (after[0].transaction.client.user, after[0].transaction.client.protocol) == ("Alice", "ESMTPSA")


@pytest.mark.parametrize(
    ("client", "hello", "changes", "keyword"),
    [
        (Client(None), b"EHLO x\r\n", {"auth_without_tls": True}, "ESMTPA"),
        (Client(None, tls=SECURE), b"EHLO x\r\n", {}, "ESMTPSA"),
        (Client(None, tls=SECURE), b"LHLO x\r\n", {"protocol": "lmtp"}, "LMTPSA"),
    ],
)
def test_the_keyword_of_received(client: Client, hello: bytes, changes: dict[str, Any], keyword: str) -> None:
    one = session(client, hello, **changes)
    one.receive(PLAIN)
    one.judged(Judgement("alice"))
    assert one.client.protocol == keyword
    started = one.receive(b"MAIL FROM:<a@b.example> SMTPUTF8\r\nRCPT TO:<c@d.example>\r\nDATA\r\n")[0]
    assert isinstance(started, MailStarted)
    assert started.transaction.client.protocol == f"UTF8{keyword.removeprefix('E')}"


def test_what_may_be_had_in_clear_and_under_tls() -> None:
    assert b"AUTH PLAIN XOAUTH2\r\n" in session().outgoing()
    assert b"AUTH" not in session(Client(None)).outgoing()
    assert b"AUTH" in session(Client(None), auth_without_tls=True).outgoing()
    plus = ("SCRAM-SHA-256-PLUS", "SCRAM-SHA-256")
    assert b"AUTH SCRAM-SHA-256-PLUS SCRAM-SHA-256\r\n" in session(mechanisms=plus).outgoing()
    assert b"AUTH SCRAM-SHA-256\r\n" in session(Client(None, tls=TLS("TLSv1.3", "x")), mechanisms=plus).outgoing()
    assert b"AUTH" not in session(mechanisms=()).outgoing()


def test_a_refusal_is_told_with_who_and_how() -> None:
    one = session()
    one.outgoing()
    one.receive(PLAIN)
    (told,) = one.judged(Judgement(note="expired"))
    assert told == LoginRefused("auth", Reply(535, "5.7.8", "authentication credentials invalid"), None, "PLAIN", "alice", "expired")
    assert one.client.user is None
    (cancelled,) = [*one.receive(b"AUTH PLAIN\r\n"), *one.receive(b"*\r\n")]
    assert isinstance(cancelled, Refused)
    assert not isinstance(cancelled, LoginRefused)
    assert cancelled.stage == "auth"


def test_a_lock_is_no_error_but_counts_toward_the_third() -> None:
    one = session()
    locked = Judgement(reply=Reply(454, "4.7.0", "too many failed logins, try again later"))
    for wanted in (b"454 4.7.0", b"454 4.7.0", b"421 4.7.0"):
        one.outgoing()
        one.receive(PLAIN)
        one.judged(locked)
        assert one.outgoing().startswith(wanted)
    assert one.closing


def test_a_refused_token_is_told_in_json_first_and_cancelling_changes_nothing() -> None:
    one = session()
    bearer = b"AUTH XOAUTH2 " + base64.b64encode(b"user=a@b.example\x01auth=Bearer abc\x01\x01") + b"\r\n"
    for said in (b"\r\n", b"*\r\n"):
        one.outgoing()
        one.receive(bearer)
        assert one.judged(Judgement(note="expired")) == []
        assert base64.b64decode(one.outgoing()[4:-2]) == b'{"status":"401","schemes":"bearer"}'
        (told,) = one.receive(said)
        assert isinstance(told, LoginRefused)
        assert (told.user, told.note) == ("a@b.example", "expired")
        assert one.outgoing().startswith(b"535 5.7.8")
    one.receive(bearer)
    one.judged(Judgement())
    one.outgoing()
    one.receive(b"\r\n")
    assert one.outgoing().startswith(b"421 4.7.0 too many failed logins")


@pytest.mark.parametrize("end", ["stop", "early"])
def test_a_judgement_that_comes_too_late(end: str) -> None:
    one = session()
    one.outgoing()
    one.receive(PLAIN)
    if end == "stop":
        one.stop(LATER)
        assert one.outgoing() == LATER.wire
    else:
        one.receive(b"M")
        assert one.outgoing() == b"554 5.5.0 you sent on before our reply, closing\r\n"
    assert one.judged(Judgement("alice")) == []
    assert one.client.user is None
    assert one.closing
    assert one.outgoing() == b""


def test_a_client_that_sends_no_more_still_hears_of_its_login() -> None:
    one = session()
    one.outgoing()
    one.receive(PLAIN)
    assert one.eof() == []
    assert not one.closing
    one.judged(Judgement("alice"))
    assert one.outgoing() == b"235 2.7.0 authentication succeeded\r\n"
    assert one.closing


def test_nobody_waits_for_a_word() -> None:
    one = session()
    assert one.judged(Judgement("alice")) == []
    assert one.client.user is None


# ----------------------------------------------------------------- the listener


class Judge:
    """An Authenticator whose word the test gives."""

    def __init__(self) -> None:
        self.asked: list[tuple[Login, Client, str]] = []
        self.word: asyncio.Future[Judgement] = asyncio.get_running_loop().create_future()

    async def judge(self, login: Login, client: Client, listener: str) -> Judgement:
        self.asked.append((login, client, listener))
        return await self.word


RULES: dict[str, Any] = {"auth": "required", "auth_without_tls": True, "mechanisms": ("PLAIN",)}


async def test_a_login_at_the_listener() -> None:
    async with house(**RULES) as here:
        judge = here.listener.authenticator = Judge()
        client = await here.dial()
        client.writer.write(b"EHLO x\r\n")
        await client.reader.readuntil(b"AUTH PLAIN\r\n")
        client.writer.write(PLAIN)
        await until(lambda: judge.asked)
        login, who, listener = judge.asked[0]
        assert (login.user, who.ip, who.helo, listener) == ("alice", "127.0.0.1", "x", here.listener.name)
        judge.word.set_result(Judgement("alice"))
        assert (await client.reader.readline()).startswith(b"235 ")
        (told,) = here.told.named("authenticated")
        assert (told["user"], told["mechanism"], told["client"]) == ("alice", "PLAIN", "127.0.0.1")


async def test_whoever_talks_while_a_login_is_judged_is_let_go() -> None:
    async with house(**RULES) as here:
        judge = here.listener.authenticator = Judge()
        client = await here.dial()
        client.writer.write(b"EHLO x\r\n")
        await client.reader.readuntil(b"AUTH PLAIN\r\n")
        client.writer.write(PLAIN)
        await until(lambda: judge.asked)
        client.writer.write(b"MAIL FROM:<a@b.example>\r\n")
        assert (await client.reader.read()) == b"554 5.5.0 you sent on before our reply, closing\r\n"
        client.writer.close()
        judge.word.set_result(Judgement("alice"))
        await asyncio.sleep(0.01)
        assert not here.told.named("authenticated")
        assert not here.told.named("bug")


@pytest.mark.parametrize("how", ["raises", "nobody"])
async def test_a_fault_of_ours_is_454(how: str) -> None:
    async with house(**RULES) as here:
        if how == "raises":
            judge = here.listener.authenticator = Judge()
            judge.word.set_exception(RuntimeError("oh"))
        client = await here.dial()
        client.writer.write(b"EHLO x\r\n")
        await client.reader.readuntil(b"AUTH PLAIN\r\n")
        client.writer.write(PLAIN)
        assert (await client.reader.readline()).startswith(b"454 4.7.0 ")
        (told,) = [fields for fields in here.told.named("refused") if fields["stage"] == "auth"]
        assert (told["user"], told["mechanism"], told["code"], told["note"]) == ("alice", "PLAIN", 454, "fault")
        assert len(here.told.named("bug")) == (how == "raises")
