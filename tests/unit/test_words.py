"""Reply, Route, Message, the trace header: the values everything else is made of."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import mime
from gateway._parser import ReplyReceiver
from gateway.message import TLS, Client, Content, Envelope, Message, Recipient, read_with
from gateway.reply import Reply
from gateway.route import NO_SUCH_MAILBOX, ODD_LOCAL_PART, RELAYING_DENIED, Route, Routes, everybody
from gateway.smtp.trace import mark, received

OUTSIDE = Client("192.0.2.7")
INSIDE = Client("10.1.2.3")


# ----------------------------------------------------------------------- replies


@pytest.mark.parametrize("text", ["a\r\n250 b", "a\nb", "a\rb", "a\0b", "esc \x1b[2J", "nel \x85", "ls \u2028"])
def test_a_reply_refuses_controls_whoever_wrote_it(text: str) -> None:
    with pytest.raises(ValueError, match="control"):
        Reply(250, "2.0.0", text)
    assert b"\n" not in Reply.untrusted(451, text).wire[:-2]


@pytest.mark.parametrize(("code", "enhanced"), [(199, ""), (600, ""), (250, "5.0.0"), (550, "5"), (550, "5.1.1 x")])
def test_a_reply_refuses_codes_that_are_none(code: int, enhanced: str) -> None:
    with pytest.raises(ValueError, match="code"):
        Reply(code, enhanced, "x")


def test_an_untrusted_reply_keeps_its_enhanced_code_only_if_it_fits() -> None:
    assert Reply.untrusted(550, "5.1.1 nobody").enhanced == "5.1.1"
    assert Reply.untrusted(450, "5.1.1 nobody").enhanced == ""
    assert Reply.untrusted(354, "go on").code == 451
    assert Reply.untrusted(999, "?").code == 451
    assert len(Reply.untrusted(550, "x" * 5000).text) == 1024


@given(st.integers(200, 599), st.text(max_size=3000))
def test_whatever_the_text_a_reply_reads_back_as_exactly_one(code: int, text: str) -> None:
    receiver = ReplyReceiver()
    reply = Reply.untrusted(code, text)
    receiver.feed(reply.wire)
    found = receiver.reply()
    assert found is not None
    assert found[0] == reply.code
    assert receiver.pending == 0
    assert all(len(line) <= 512 for line in reply.wire.splitlines(keepends=True))
    for line in reply.wire.splitlines():
        line.decode("utf-8")


def test_ok_is_an_ordinary_reply() -> None:
    assert Reply.ok("accepted as 1") == Reply(250, "2.0.0", "accepted as 1")


# ------------------------------------------------------------------------ routes


def table(*routes: Route) -> Routes:
    return Routes(routes, "mx.example.net")


def test_first_match_wins_and_no_route_is_no_mail() -> None:
    one, two, three = Route(("vip@us.example",), ("a",)), Route(("*@us.example",), ("b",)), Route(("*@*.example",), ("c",))
    routes = table(one, two, three)
    assert routes.find("vip", "us.example", OUTSIDE) is one
    assert routes.find("VIP", "us.example", OUTSIDE) is one
    assert routes.find("other", "us.example", OUTSIDE) is two
    assert routes.find("x", "deep.them.example", OUTSIDE) is three
    assert routes.find("x", "else.test", OUTSIDE) is RELAYING_DENIED


def test_the_star_never_crosses_the_at() -> None:
    routes = table(Route(("*.example",), ("a",)), Route(("a*@us.test",), ("b",)))
    assert routes.find("x", "us.example", OUTSIDE) is RELAYING_DENIED
    assert isinstance(routes.find("abc", "us.test", OUTSIDE), Route)
    assert routes.find("b", "us.test", OUTSIDE) is RELAYING_DENIED


def test_clients_and_identity_narrow_a_route() -> None:
    inside = Route(("*",), ("out",), clients=(ip_network("10.0.0.0/8"),))
    users = Route(("*",), ("out",), authenticated=True)
    routes = table(inside, users)
    assert routes.find("a", "b.test", INSIDE) is inside
    assert routes.find("a", "b.test", Client("::ffff:10.0.0.9")) is inside
    assert routes.find("a", "b.test", OUTSIDE) is RELAYING_DENIED
    assert routes.find("a", "b.test", Client("192.0.2.7", user="app")) is users
    loopback = Route(("*",), ("out",), clients=(ip_network("127.0.0.0/8"),))
    assert table(loopback).find("a", "b.test", Client(None)) is loopback


def test_a_domain_of_single_mailboxes_says_which_mailbox_is_missing() -> None:
    routes = table(Route(("ann@us.example", "bob@us.example"), ("a",)))
    assert routes.find("eve", "us.example", OUTSIDE) is NO_SUCH_MAILBOX
    assert routes.find("eve", "them.example", OUTSIDE) is RELAYING_DENIED


@pytest.mark.parametrize("local", ["u%x", "x!u", '"u@x"', '"u%x"', '"u\\@x"'])
def test_odd_local_parts_never_reach_a_relay(local: str) -> None:
    relay = Route(("*@us.example",), ("out",), relays=True)
    assert table(relay).find(local, "us.example", OUTSIDE) is ODD_LOCAL_PART
    allowed = Route(("*@us.example",), ("out",), relays=True, odd_local_parts=True)
    assert table(allowed).find(local, "us.example", OUTSIDE) is allowed
    webhook = Route(("*@us.example",), ("app",))
    assert table(webhook).find(local, "us.example", OUTSIDE) is webhook


def test_postmaster_is_postmaster_at_hostname() -> None:
    route = Route(("postmaster@mx.example.net",), ("a",))
    assert table(route).find("Postmaster", "", OUTSIDE) is route


def test_quotes_that_are_not_needed_make_no_difference() -> None:
    route = Route(("ann@us.example",), ("a",))
    assert table(route).find('"ann"', "us.example", OUTSIDE) is route
    assert table(route).find('"a\\nn"', "us.example", OUTSIDE) is route


@pytest.mark.parametrize(("pattern", "full"), [("a@b.c", True), ("*@b.c", True), ("*", False), ("*@*", False), ("*@*.com", False)])
def test_domains_named_in_full(pattern: str, full: bool) -> None:
    assert Route((pattern,), ("a",)).domains_in_full is full


def test_everybody() -> None:
    assert everybody(None)
    assert everybody([ip_network("10.0.0.0/8"), ip_network("0.0.0.0/0")])
    assert everybody([ip_network("::/0")])
    assert not everybody([ip_network("10.0.0.0/8")])


# ----------------------------------------------------------------------- message


def test_content_is_in_memory_or_in_a_file(tmp_path: object) -> None:
    with pytest.raises(ValueError, match="memory or in a file"):
        Content()
    content = Content(b"abc")
    assert list(content.chunks()) == [b"abc"]
    assert next(iter(content.chunks())) is content.read()
    assert list(Content(b"").chunks()) == []


def test_content_in_a_file_comes_in_pieces(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("content") / "x"
    path.write_bytes(b"x" * 700)
    content = Content(path=str(path), size=700)
    assert [len(piece) for piece in content.chunks(300)] == [300, 300, 100]
    assert content.read() == b"x" * 700


def test_what_the_client_asked_for() -> None:
    envelope = Envelope("", {"BODY": "binarymime", "SMTPUTF8": None}, [])
    assert envelope.binary
    assert envelope.utf8
    assert not Envelope("", {}, []).binary


def test_parsed_needs_its_reader() -> None:
    message = Message("1", Envelope("", {}, []), Content(b""), OUTSIDE, 0.0)
    read_with(None)
    try:
        with pytest.raises(RuntimeError, match=r"gateway\.mime"):
            message.parsed()
    finally:
        read_with(mime.parse_message)


# ------------------------------------------------------------------------- trace


def test_received_in_every_form() -> None:
    client = Client("2001:db8::1", 1, "evil\r\nX: (y)", "ESMTPSA", TLS("TLSv1.3", "TLS_AES_256_GCM_SHA384"), "app")
    envelope = Envelope("a@b", {}, [Recipient("ü@us.example", "ü", "us.example")])
    line = received(client, envelope, "mx.example.net", "id-1", 0.0)
    assert line == (
        b"Received: from evil??X:??y? ([IPv6:2001:db8::1])\r\n"
        b"\t(TLSv1.3 TLS_AES_256_GCM_SHA384)\r\n"
        b"\tby mx.example.net (gateway-smtp) with ESMTPSA\r\n"
        b"\tid id-1;\r\n\tThu, 01 Jan 1970 00:00:00 +0000\r\n"
    ), "no UTF-8 in it unless SMTPUTF8 was asked for"
    assert mark("mx.example.net") in line
    envelope.mail_params["SMTPUTF8"] = None
    assert "for <ü@us.example>;" in received(client, envelope, "mx", "id-1", 0.0).decode()
    assert received(Client(None, helo="h"), envelope, "mx", "i", 0.0).startswith(b"Received: from h\r\n\tby mx ")
