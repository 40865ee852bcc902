"""The server session where a transcript cannot look: events, waiting, order of answers, the end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest

from gateway.contracts import Verdict
from gateway.message import TLS, Client
from gateway.reply import Reply
from gateway.route import Route, Routes
from gateway.smtp import replies
from gateway.smtp.order import ANSWERS_OWED, REPLIES_HELD, Conduct, Order
from gateway.smtp.server import (
    ClientAsked,
    Event,
    MailAborted,
    MailContent,
    MailFinished,
    MailStarted,
    RecipientAsked,
    Refused,
    Rules,
    SenderAsked,
    ServerSession,
)

HOST = "mx.example.net"
YES = Reply(250, "2.0.0", "accepted")
NO = Reply(550, "5.7.1", "no")
LATER = Reply(421, "4.3.2", "shutting down")
LETTER = b"MAIL FROM:<a@client.example>\r\nRCPT TO:<b@app.example>\r\n"
BY_CHUNK = LETTER + b"BDAT 2 LAST\r\nhi"


def rules(*, routes: tuple[Route, ...] = (Route(("*@app.example",), ("app",)),), **changes: Any) -> Rules:
    return Rules(HOST, Routes(routes, HOST), **changes)


def session(hello: bytes = b"EHLO client.example\r\n", **changes: Any) -> ServerSession:
    """Greeted, and with the reply to ``hello`` taken."""
    made = ServerSession(rules(**changes), Client("192.0.2.1", 4711), "s1", "l1")
    assert made.start() == []
    assert made.outgoing().startswith(b"220 mx.example.net ")
    if hello:
        assert made.receive(hello) == []
        assert made.outgoing().startswith(b"250")
    return made


def paused(one: ServerSession) -> bool:
    return one.paused


def awaiting(one: ServerSession) -> str:
    return one.awaiting


def closing(one: ServerSession) -> bool:
    return one.closing


def delay(one: ServerSession) -> float:
    return one.delay


def more(one: ServerSession) -> bool:
    return one.more


def kinds(events: list[Event]) -> list[str]:
    return [type(event).__name__ for event in events]


def codes(wire: bytes) -> list[int]:
    return [int(line[:3]) for line in wire.split(b"\r\n")[:-1] if line[3:4] == b" "]


# ------------------------------------------------------------------ the mail


def test_the_events_of_a_mail() -> None:
    one = session()
    (started,) = one.receive(
        b"MAIL FROM:<a@client.example> SIZE=99 BODY=8BITMIME RET=HDRS ENVID=x\r\n"
        b"RCPT TO:<B@App.example> NOTIFY=NEVER ORCPT=rfc822;b+40app.example\r\nDATA\r\n"
    )
    assert isinstance(started, MailStarted)
    transaction = started.transaction
    assert codes(one.outgoing()) == [250, 250, 354]
    assert (transaction.number, transaction.session, transaction.listener, transaction.lmtp) == (1, "s1", "l1", False)
    assert transaction.client == Client("192.0.2.1", 4711, "client.example", "ESMTP")
    envelope = transaction.envelope
    assert envelope.mail_from == "a@client.example"
    assert envelope.mail_params == {"SIZE": "99", "BODY": "8BITMIME", "RET": "HDRS", "ENVID": "x"}
    (recipient,) = envelope.recipients
    assert (recipient.address, recipient.local, recipient.domain) == ("B@App.example", "B", "app.example")
    assert recipient.params == {"NOTIFY": "NEVER", "ORCPT": "rfc822;b+40app.example"}
    assert transaction.routes == [Route(("*@app.example",), ("app",))]

    piece, finished = one.receive(b"Received: x\r\nSubject: \xfc\r\n\r\n" + b"y" * 1200 + b"\r\n.\r\n")
    assert isinstance(piece, MailContent)
    assert piece.octets == b"Received: x\r\nSubject: \xfc\r\n\r\n" + b"y" * 1200 + b"\r\n"
    assert finished == MailFinished(1)
    assert (transaction.size, transaction.eight_bit, transaction.header_size) == (len(piece.octets), True, 25)
    assert transaction.hops == 1
    assert one.outgoing() == b""
    assert awaiting(one) == "answer"
    assert one.answer(1, YES) == []
    assert one.outgoing() == YES.wire
    assert awaiting(one) == "command"


def test_clean_content_is_the_very_object_that_came() -> None:
    one = session()
    one.receive(LETTER + b"DATA\r\n")
    data = b"clean lines of content\r\n" * 1000
    (piece,) = one.receive(data)
    assert isinstance(piece, MailContent)
    assert piece.octets is data
    one = session()
    one.receive(LETTER + b"BDAT 24000\r\n")
    (piece,) = one.receive(data)
    assert isinstance(piece, MailContent)
    assert piece.octets is data


def test_each_message_keeps_the_client_it_came_from() -> None:
    one = session()
    first = one.receive(BY_CHUNK)[0]
    one.answer(1, YES)
    one.receive(b"EHLO other.example\r\n")
    second = one.receive(BY_CHUNK)[0]
    assert isinstance(first, MailStarted)
    assert isinstance(second, MailStarted)
    assert first.transaction.client.helo == "client.example"
    assert second.transaction.client.helo == "other.example"
    assert (first.transaction.number, second.transaction.number) == (1, 2)


@pytest.mark.parametrize(
    ("hello", "changes", "client", "keyword"),
    [
        (b"HELO c\r\n", {}, Client(None), "SMTP"),
        (b"EHLO c\r\n", {}, Client(None), "ESMTP"),
        (b"EHLO c\r\n", {}, Client(None, tls=TLS("TLSv1.3", "x")), "ESMTPS"),
        (b"EHLO c\r\n", {}, Client(None, user="u"), "ESMTPA"),
        (b"EHLO c\r\n", {}, Client(None, tls=TLS("TLSv1.3", "x"), user="u"), "ESMTPSA"),
        (b"LHLO c\r\n", {"protocol": "lmtp"}, Client(None), "LMTP"),
        (b"LHLO c\r\n", {"protocol": "lmtp"}, Client(None, tls=TLS("TLSv1.3", "x")), "LMTPS"),
    ],
)
def test_the_keyword_of_received(hello: bytes, changes: dict[str, Any], client: Client, keyword: str) -> None:
    one = ServerSession(rules(**changes), client, "s", "l")
    one.start()
    one.outgoing()
    one.receive(hello)
    assert one.client.protocol == keyword
    assert client.protocol == "SMTP", "the client handed in was changed"


@pytest.mark.parametrize(("hello", "protocol", "keyword"), [(b"EHLO c\r\n", "smtp", "UTF8SMTP"), (b"LHLO c\r\n", "lmtp", "UTF8LMTP")])
def test_the_keyword_of_received_with_smtputf8(hello: bytes, protocol: str, keyword: str) -> None:
    one = session(hello, protocol=protocol)
    started = one.receive(BY_CHUNK.replace(b"example>\r\nRCPT", b"example> SMTPUTF8\r\nRCPT"))[0]
    assert isinstance(started, MailStarted)
    assert started.transaction.client.protocol == keyword
    assert started.transaction.envelope.utf8


def test_over_size_is_aborted_at_once_and_answered_at_the_true_end() -> None:
    one = session(message_size=1000)
    one.receive(LETTER + b"DATA\r\n")
    one.outgoing()
    assert kinds(one.receive(b"x" * 1000)) == ["MailContent"]
    assert one.receive(b"x") == [MailAborted(1)]
    assert one.receive(b"\r\nMAIL FROM:<>\r\n") == []
    assert one.outgoing() == b""
    events = one.receive(b".\r\n")
    assert events == [Refused("data", replies.over_limit(1000), None)]
    assert one.outgoing() == b"552 5.3.4 message over the limit of 1000 octets\r\n"


def test_a_fault_is_aborted_at_once_and_answered_at_the_true_end() -> None:
    one = session()
    one.receive(LETTER + b"DATA\r\n")
    one.outgoing()
    assert kinds(one.receive(b"good\r\n")) == ["MailContent"]
    assert one.receive(b"bad\n.\r\n") == [MailAborted(1)]
    assert one.outgoing() == b""
    assert kinds(one.receive(b"x\r\n.\r\n")) == ["Refused"]
    assert one.outgoing() == b"550 5.5.2 bare CR or LF\r\n"


def test_a_refusal_is_told_with_its_address() -> None:
    one = session()
    events = one.receive(b"MAIL FROM:<a@client.example>\r\nRCPT TO:<x@elsewhere.example>\r\nRCPT TO:<bad\r\nNONSENSE\r\nMAIL FROM:<>\r\n")
    assert [(event.stage, event.reply.code, event.address) for event in events if isinstance(event, Refused)] == [
        ("recipient", 550, "x@elsewhere.example"),
        ("recipient", 501, None),
        ("command", 500, None),
        ("mail", 503, ""),
    ]


def test_a_64_mib_line_is_carried_and_never_held() -> None:
    one = session(message_size=2**27)
    one.receive(LETTER + b"DATA\r\n")
    piece = b"x" * 2**18
    for _ in range(256):
        (event,) = one.receive(piece)
        assert isinstance(event, MailContent)
        assert event.octets is piece
    assert kinds(one.receive(b"\r\n.\r\n")) == ["MailContent", "MailFinished"]


# ---------------------------------------------------------- answers and order


def test_replies_leave_in_the_order_of_the_commands() -> None:
    one = session()
    assert kinds(one.receive(BY_CHUNK + BY_CHUNK + b"NOOP\r\n")) == ["MailStarted", "MailContent", "MailFinished"] * 2
    assert codes(one.outgoing()) == [250, 250]
    one.answer(2, NO)
    assert one.outgoing() == b""
    one.answer(1, YES)
    assert codes(one.outgoing()) == [250, 250, 250, 550, 250]


def test_sixteen_owed_answers_stop_the_reading() -> None:
    one = session()
    events = one.receive(BY_CHUNK * 20)
    assert kinds(events).count("MailFinished") == ANSWERS_OWED
    assert paused(one)
    assert not more(one)
    one.answer(1, YES)
    assert not paused(one)
    assert more(one)
    assert kinds(one.proceed()).count("MailFinished") == 1
    assert paused(one)


def test_replies_that_pile_up_behind_an_answer_stop_the_reading() -> None:
    one = session()
    one.receive(BY_CHUNK)
    one.receive(LETTER)
    for _ in range(REPLIES_HELD):
        if paused(one):
            break
        one.receive(b"RCPT TO:<c@app.example>\r\n")
    assert paused(one)
    assert one.outgoing() == SENT_BEFORE
    one.answer(1, YES)
    assert not paused(one)
    assert len(codes(one.outgoing())) > REPLIES_HELD


SENT_BEFORE = b"250 2.1.0 sender OK\r\n250 2.1.5 recipient OK\r\n"


def test_an_answer_that_nobody_knows_closes_without_a_word() -> None:
    one = session()
    one.receive(BY_CHUNK * 3 + LETTER + b"BDAT 2\r\nhi")
    one.outgoing()
    one.answer(3, YES)
    assert one.answer(2, None) == []
    assert one.outgoing() == b""
    assert not closing(one)
    # The third was answered, though nobody hears of it; the fourth never ended.
    assert one.answer(1, YES) == [MailAborted(4)]
    assert codes(one.outgoing()) == [250, 250, 250]
    assert closing(one)
    assert one.answer(3, YES) == []
    assert one.receive(b"NOOP\r\n") == []
    assert one.outgoing() == b""


def test_what_is_aborted_when_an_answer_is_lost() -> None:
    one = session()
    one.receive(BY_CHUNK * 3 + LETTER + b"BDAT 2\r\nhi")
    # The first is lost: the second and third will never be answered, the fourth never ends.
    assert one.answer(1, None) == [MailAborted(2), MailAborted(3), MailAborted(4)]
    assert closing(one)


def test_a_refused_message_is_told() -> None:
    one = session()
    one.receive(BY_CHUNK)
    assert one.answer(1, NO) == [Refused("data", NO, None)]


def test_answers_that_are_our_bug() -> None:
    one = session()
    one.receive(BY_CHUNK * 2)
    with pytest.raises(ValueError, match="2 replies where 1 are owed"):
        one.answer(1, [YES, YES])
    one.answer(2, YES)
    with pytest.raises(RuntimeError, match="answered twice"):
        one.answer(2, YES)
    assert one.answer(77, YES) == []


def test_lmtp_has_a_reply_for_each_recipient() -> None:
    one = session(b"LHLO client.example\r\n", protocol="lmtp")
    letter = LETTER + b"RCPT TO:<c@app.example>\r\nBDAT 0 LAST\r\n"
    (started, _) = one.receive(letter)
    assert isinstance(started, MailStarted)
    assert started.transaction.lmtp
    one.outgoing()
    assert one.answer(1, [YES, NO]) == [Refused("data", NO, None)]
    assert one.outgoing() == YES.wire + NO.wire
    one.receive(letter)
    one.outgoing()
    one.answer(2, YES)
    assert one.outgoing() == YES.wire * 2
    one.receive(letter)
    with pytest.raises(ValueError, match="3 replies where 2 are owed"):
        one.answer(3, [YES, YES, YES])


# --------------------------------------------------------- turns and the tarpit


def test_256_commands_a_turn() -> None:
    one = session()
    one.receive(LETTER)
    one.outgoing()
    one.receive(b"RCPT TO:<b@app.example>\r\n" * 600)
    seen = []
    while True:
        seen.append(len(codes(one.outgoing())))
        if not more(one):
            break
        one.proceed()
    assert seen == [256, 256, 88]


def test_the_tarpit_withholds_and_stops() -> None:
    one = session()
    one.receive(b"BAD\r\n" * 10)
    assert codes(one.outgoing()) == [500] * 10
    assert delay(one) == 0
    one.receive(b"BAD\r\nNOOP\r\n")
    assert delay(one) == 1
    assert paused(one)
    assert awaiting(one) == "answer"
    assert one.outgoing() == b""
    one.proceed()
    assert codes(one.outgoing()) == [500, 250]
    assert delay(one) == 0
    assert not paused(one)


def test_errors_behind_an_owed_answer_wait_for_it_before_they_cost() -> None:
    one = session()
    one.receive(b"BAD\r\n" * 9)
    one.receive(BY_CHUNK + b"BAD\r\n" * 5)
    # The tenth error was counted; whether the eleventh is one, the answer decides.
    assert paused(one)
    assert delay(one) == 0
    one.answer(1, YES)
    assert more(one)
    one.proceed()
    assert codes(one.outgoing()) == [500] * 9 + [250, 250, 250] + [500] * 5
    assert delay(one) == 0


def test_the_same_with_an_answer_that_refuses() -> None:
    one = session()
    one.receive(b"BAD\r\n" * 9)
    one.receive(BY_CHUNK + b"BAD\r\n" * 5)
    one.answer(1, NO)
    one.proceed()
    assert delay(one) == 1


def test_conduct_is_forgiven_up_to_the_message() -> None:
    conduct = Conduct()
    for _ in range(5):
        conduct.error()
    mark = conduct.mark
    for _ in range(3):
        conduct.error()
    later = conduct.mark
    conduct.forgive(later)
    conduct.forgive(mark)
    assert conduct.error() == 1


def test_order_gives_back_a_single_reply_uncopied() -> None:
    order = Order()
    order.say(YES.wire)
    assert order.take() is YES.wire
    assert order.take() == b""


def test_junk_behind_an_owed_answer_waits_for_it_before_it_costs() -> None:
    one = session()
    one.receive(b"NOOP\r\n" * 99)
    one.receive(BY_CHUNK + b"NOOP\r\n" * 30)
    assert paused(one)
    one.answer(1, YES)
    one.proceed()
    assert codes(one.outgoing()) == [250] * (99 + 3 + 30)
    assert delay(one) == 0


def test_several_answers_decide_together() -> None:
    one = session()
    one.receive(b"BAD\r\n" * 9)
    one.receive(BY_CHUNK * 2 + b"BAD\r\n" * 3)
    assert paused(one)
    one.answer(1, NO)
    assert paused(one), "the second may still forgive"
    one.answer(2, YES)
    assert more(one)
    one.proceed()
    assert delay(one) == 0


# ---------------------------------------------------------- waiting and early talk


def test_octets_before_the_greeting() -> None:
    one = ServerSession(rules(client_checks=("list",)), Client("192.0.2.1"), "s", "l")
    (asked,) = one.start()
    assert isinstance(asked, ClientAsked)
    assert awaiting(one) == "greeting"
    assert one.receive(b"EHLO x\r\n") == [Refused("connect", replies.TOO_EARLY, None)]
    assert one.outgoing() == replies.TOO_EARLY.wire
    assert closing(one)
    assert one.verdict(Verdict()) == []
    assert one.outgoing() == b""


def test_content_before_354_left() -> None:
    one = session()
    one.receive(BY_CHUNK + LETTER + b"DATA\r\n")
    assert awaiting(one) == "answer"
    events = one.receive(b"text\r\n.\r\n")
    assert kinds(events) == ["Refused", "MailAborted"]
    assert not closing(one)
    one.answer(1, YES)
    assert codes(one.outgoing()) == [250, 250, 250, 250, 250, 354, 554]
    assert closing(one)


def test_half_a_chunk_waits_for_content() -> None:
    one = session()
    one.receive(BY_CHUNK + LETTER + b"BDAT 9 LAST\r\nhalf")
    assert awaiting(one) == "content", "also while an answer is owed: it is the client's turn"


def test_content_after_354_left() -> None:
    one = session()
    one.receive(BY_CHUNK + LETTER + b"DATA\r\n")
    one.answer(1, YES)
    assert codes(one.outgoing()) == [250, 250, 250, 250, 250, 354]
    assert awaiting(one) == "content"
    assert kinds(one.receive(b"text\r\n.\r\n")) == ["MailContent", "MailFinished"]


def test_octets_before_the_reply_to_an_ehlo_behind_an_owed_answer() -> None:
    one = session()
    one.receive(BY_CHUNK + b"EHLO again.example\r\n")
    one.receive(b"NOOP\r\n")
    one.answer(1, YES)
    assert codes(one.outgoing()) == [250, 250, 250, 250, 554]
    assert closing(one)


def test_a_helo_client_waits_also_for_an_owed_answer() -> None:
    one = session(b"HELO client.example\r\n")
    for line in LETTER.splitlines(keepends=True):
        one.receive(line)
    one.receive(b"DATA\r\n")
    one.receive(b".\r\n")
    one.outgoing()
    one.receive(b"QUIT\r\n")
    one.answer(1, YES)
    assert codes(one.outgoing()) == [250, 554]
    assert closing(one)


# -------------------------------------------------------------------- verdicts


def test_a_refused_client_may_only_quit() -> None:
    one = ServerSession(rules(client_checks=("list",)), Client("192.0.2.1"), "s", "l")
    one.start()
    refusal = Reply(554, "5.7.1", "you are on the list")
    assert one.verdict(Verdict(refusal)) == [Refused("connect", refusal, None)]
    assert one.outgoing() == refusal.wire
    assert not closing(one)
    one.receive(b"EHLO x\r\nGET / HTTP/1.1\r\nQUIT\r\n")
    assert codes(one.outgoing()) == [503, 503, 221]
    assert closing(one)


def test_a_client_that_is_told_421_is_let_go() -> None:
    one = ServerSession(rules(client_checks=("list",)), Client("192.0.2.1"), "s", "l")
    one.start()
    one.verdict(Verdict(LATER))
    assert one.outgoing() == LATER.wire
    assert closing(one)


def test_verdicts_of_the_sender_and_the_facts_of_all() -> None:
    one = ServerSession(
        rules(
            client_checks=("list",),
            sender_checks=("spf",),
            recipient_checks=frozenset({"quota"}),
            routes=(Route(("*@app.example",), ("app",), checks=("quota", "virus")),),
        ),
        Client("192.0.2.1"),
        "s",
        "l",
    )
    one.start()
    one.verdict(Verdict(None, {"list": "clean"}))
    assert one.outgoing() == b"220 mx.example.net ESMTP\r\n"
    one.receive(b"EHLO client.example\r\n")
    one.outgoing()

    (asked,) = one.receive(LETTER + b"RCPT TO:<c@app.example>\r\nBDAT 0 LAST\r\n")
    assert isinstance(asked, SenderAsked)
    assert (asked.question.stage, asked.question.sender, asked.checks) == ("sender", "a@client.example", ("spf",))
    assert paused(one)
    assert awaiting(one) == "answer"
    assert one.outgoing() == b""
    assert one.verdict(Verdict(None, {"spf": "pass"})) == []
    assert one.outgoing() == b"250 2.1.0 sender OK\r\n"
    assert more(one)

    for name in ("b", "c"):
        (asked,) = one.proceed()
        assert isinstance(asked, RecipientAsked)
        assert asked.checks == ("quota",)
        assert asked.question.recipient is not None
        assert asked.question.recipient.address == f"{name}@app.example"
        assert asked.question.sender == "a@client.example"
        assert one.verdict(Verdict(None, {"quota": name})) == []
    started, finished = one.proceed()
    assert isinstance(started, MailStarted)
    assert started.transaction.facts["checks"] == {
        "list": "clean",
        "spf": "pass",
        "quota": {"b@app.example": "b", "c@app.example": "c"},
    }
    assert finished == MailFinished(1)


def test_a_refused_sender() -> None:
    one = session(sender_checks=("spf",))
    one.receive(LETTER + b"DATA\r\n")
    assert one.verdict(Verdict(NO)) == [Refused("mail", NO, "a@client.example")]
    one.proceed()
    assert codes(one.outgoing()) == [550, 503, 503]
    one.receive(b"MAIL FROM:<>\r\n")
    one.verdict(Verdict())
    assert codes(one.outgoing()) == [250]


def test_a_refused_recipient() -> None:
    one = session(recipient_checks=frozenset({"quota"}), routes=(Route(("*@app.example",), ("app",), checks=("quota",)),))
    one.receive(LETTER + b"RCPT TO:<c@app.example>\r\nDATA\r\n")
    full = Reply(452, "4.2.2", "full")
    assert one.verdict(Verdict(full)) == [Refused("recipient", full, "b@app.example")]
    one.proceed()
    one.verdict(Verdict())
    (started,) = one.proceed()
    assert isinstance(started, MailStarted)
    assert [recipient.address for recipient in started.transaction.envelope.recipients] == ["c@app.example"]
    assert codes(one.outgoing()) == [250, 452, 250, 354]


def test_checks_of_other_stages_are_not_asked_of_a_recipient() -> None:
    one = session(recipient_checks=frozenset({"quota"}), routes=(Route(("*@app.example",), ("app",), checks=("virus",)),))
    assert one.receive(LETTER) == []
    assert codes(one.outgoing()) == [250, 250]


def test_what_comes_while_a_question_is_open_waits() -> None:
    one = session(sender_checks=("spf",))
    one.receive(b"MAIL FROM:<>\r\n")
    assert one.receive(b"NOOP\r\n") == []
    assert one.outgoing() == b""
    one.verdict(Verdict())
    one.proceed()
    assert codes(one.outgoing()) == [250, 250]


def test_a_verdict_after_the_end() -> None:
    one = session(sender_checks=("spf",))
    one.receive(b"MAIL FROM:<>\r\n")
    one.stop(LATER)
    assert one.verdict(Verdict(NO)) == []
    assert one.outgoing() == LATER.wire


@pytest.mark.parametrize(
    ("timeout", "fallback", "code"),
    [(30.0, "durable", 250), (31.0, "durable", 452), (30.0, "refuse", 452)],
)
def test_recipients_that_are_acknowledged_alike_go_together(timeout: float, fallback: Literal["durable", "refuse"], code: int) -> None:
    one = session(
        routes=(
            Route(("*@app.example",), ("app",), acknowledge="delivered"),
            Route(("*@b.example",), ("b",), acknowledge="delivered", acknowledge_timeout=timeout, fallback=fallback),
        )
    )
    one.receive(LETTER + b"RCPT TO:<b@b.example>\r\n")
    assert codes(one.outgoing()) == [250, 250, code]


# ------------------------------------------------------------------ shortage


def test_shortage_refuses_mail_and_comes_and_goes() -> None:
    one = session()
    short = Reply(452, "4.3.1", "disk is short")
    one.rules.shortage = short
    assert one.receive(LETTER + b"DATA\r\n")[0] == Refused("mail", short, "a@client.example")
    assert codes(one.outgoing()) == [452, 503, 503]
    one.rules.shortage = None
    one.receive(LETTER)
    assert codes(one.outgoing()) == [250, 250]


def test_shortage_by_421_closes_and_greets_nobody() -> None:
    one = session()
    one.rules.shortage = LATER
    one.receive(b"MAIL FROM:<>\r\nNOOP\r\n")
    assert one.outgoing() == LATER.wire
    assert closing(one)
    two = ServerSession(rules(shortage=LATER), Client("192.0.2.1"), "s", "l")
    assert two.start() == [Refused("connect", LATER, None)]
    assert two.outgoing() == LATER.wire
    assert closing(two)


@pytest.mark.parametrize(
    ("change", "reply"), [({"tls": "required"}, "say STARTTLS first"), ({"auth": "required"}, "authentication required")]
)
def test_what_is_required_and_not_there_refuses_mail(change: dict[str, Any], reply: str) -> None:
    one = session(**change)
    one.receive(b"MAIL FROM:<>\r\n")
    assert one.outgoing() == f"530 5.7.0 {reply}\r\n".encode()


# ------------------------------------------------------------------- the end


@pytest.mark.parametrize("before", [b"", b"MAIL FROM:<>\r\n", LETTER, LETTER + b"BDAT 3\r\na"])
def test_stop_where_a_command_is_awaited(before: bytes) -> None:
    one = session()
    one.receive(before)
    one.outgoing()
    aborted = [MailAborted(1)] if b"BDAT" in before else []
    assert [event for event in one.stop(LATER) if not isinstance(event, Refused)] == aborted
    assert one.outgoing() == LATER.wire
    assert closing(one)
    assert one.stop(LATER) == []
    assert one.eof() == []


def test_f7_content_that_never_ends() -> None:
    one = session()
    one.receive(LETTER + b"DATA\r\n")
    one.receive(b"text\n.\n")
    late = Reply(421, "4.4.2", "time-out")
    assert one.stop(late) == [Refused("data", late, None)]
    assert codes(one.outgoing()) == [250, 250, 354, 421]
    assert closing(one)


def test_stop_waits_for_what_is_owed() -> None:
    one = session()
    one.receive(BY_CHUNK)
    one.outgoing()
    assert one.stop(LATER) == [Refused("command", LATER, None)]
    assert one.outgoing() == b""
    assert not closing(one)
    one.answer(1, YES)
    assert one.outgoing() == YES.wire + LATER.wire
    assert closing(one)


def test_stop_before_the_greeting_and_in_the_tarpit() -> None:
    one = ServerSession(rules(client_checks=("list",)), Client("192.0.2.1"), "s", "l")
    one.start()
    assert one.stop(LATER) == [Refused("connect", LATER, None)]
    assert one.outgoing() == LATER.wire
    two = session()
    two.receive(b"BAD\r\n" * 11)
    assert delay(two)
    two.stop(LATER)
    assert codes(two.outgoing())[-1] == 421
    assert closing(two)


def test_quit_waits_for_what_is_owed() -> None:
    one = session()
    one.receive(BY_CHUNK + b"QUIT\r\nNOOP\r\n")
    one.outgoing()
    assert not closing(one)
    one.answer(1, YES)
    assert codes(one.outgoing()) == [250, 221]
    assert closing(one)


def test_a_client_that_ended_still_gets_its_answer() -> None:
    one = session()
    one.receive(BY_CHUNK)
    one.outgoing()
    assert one.eof() == []
    assert not closing(one)
    one.answer(1, YES)
    assert one.outgoing() == YES.wire
    assert closing(one)


def test_eof_aborts_what_is_not_whole() -> None:
    one = session()
    one.receive(LETTER + b"DATA\r\n")
    one.receive(b"text\r\n.\r")
    assert one.eof() == [MailAborted(1)]
    assert closing(one)


def test_what_was_sent_before_the_end_is_still_done() -> None:
    one = session(sender_checks=("spf",))
    one.receive(BY_CHUNK + b"QUIT\r\n")
    assert one.eof() == []
    assert not closing(one)
    one.verdict(Verdict())
    assert more(one)
    assert kinds(one.proceed()) == ["MailStarted", "MailContent", "MailFinished"]
    one.answer(1, YES)
    assert codes(one.outgoing()) == [250, 250, 250, 221]
    assert closing(one)


def test_the_end_within_many_commands() -> None:
    one = session()
    one.receive(LETTER + b"RCPT TO:<b@app.example>\r\n" * 300)
    one.eof()
    assert not closing(one)
    one.proceed()
    assert len(codes(one.outgoing())) == 302
    assert closing(one)


def test_the_end_while_a_verdict_is_out_and_nothing_follows() -> None:
    one = session(sender_checks=("spf",))
    one.receive(b"MAIL FROM:<>\r\n")
    one.eof()
    one.verdict(Verdict())
    assert codes(one.outgoing()) == [250]
    assert closing(one)


def test_rules_may_change_in_between() -> None:
    one = session()
    one.rules = replace(one.rules, message_size=10)
    one.receive(b"MAIL FROM:<> SIZE=11\r\n")
    assert codes(one.outgoing()) == [552]


def test_help_and_the_greeting_of_helo() -> None:
    one = session(b"")
    one.receive(b"HELO client.example\r\n")
    assert one.outgoing() == b"250 mx.example.net\r\n"


# ------------------------------------------------------------------- all replies


def test_every_canned_reply_has_an_enhanced_code_that_fits() -> None:
    canned = [value for value in vars(replies).values() if isinstance(value, Reply)]
    assert len(canned) > 50
    for reply in canned:
        # RFC 2034 §4: all but the greeting, HELO, EHLO and 354.
        assert reply.enhanced or reply.code == 354
        assert len(reply.wire) <= 512
        assert reply.wire.count(b"\r\n") == 1
