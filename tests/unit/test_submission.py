"""What submission supplies, and what it leaves alone."""

from __future__ import annotations

import pytest

from gateway.message import Envelope
from gateway.senders import NOT_LOGGED_IN, Senders
from gateway.smtp.submission import HEADER_LIMIT, header_of, supplied

NOW = 1_800_000_000.0
DATE = b"Date: Fri, 15 Jan 2027 08:00:00 +0000\r\n"
FROM = b"From: <a@client.example>\r\n"
ID = b"Message-ID: <id1@mx.example>\r\n"


def added(header: bytes, sender: str = "a@client.example") -> bytes:
    return supplied(header, Envelope(sender, {}, []), "mx.example", "id1", NOW)


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        (b"Subject: x\r\n", DATE + FROM + ID),
        (b"Subject: x\r\nDATE : y\r\n", FROM + ID),
        (b"from: z\r\nX: y\r\n\tDate: folded\r\n", DATE + ID),
        (b"X: Date: no\r\nX-Date: no\r\nMessage-Id:<1@x>\r\n", DATE + FROM),
        (b"Date: a\r\nFrom: b\r\nMessage-ID: c\r\n", b""),
        (b"Resent-Date: a\r\nResent-From: b\r\nMessage-ID-X: c\r\n", DATE + FROM + ID),
        (b"", DATE + FROM + ID),
        # No header at all: what is supplied is the header, so it needs an end.
        (b"hello world\r\n", DATE + FROM + ID + b"\r\n"),
        (b" folded: x\r\n", DATE + FROM + ID + b"\r\n"),
    ],
)
def test_what_is_missing(header: bytes, wanted: bytes) -> None:
    assert added(header) == wanted


def test_the_null_sender_is_nobodys_name() -> None:
    assert added(b"Subject: x\r\n", "") == DATE + ID


def test_the_header_alone_is_looked_at() -> None:
    content = [b"Subject: x\r\n", b"X: y\r\n\r\nDate: in the body\r\n", b"more"]
    assert header_of(content, 18) == b"Subject: x\r\nX: y\r\n"
    assert header_of(content, 10**9) == b"".join(content)
    assert len(header_of([b"x" * HEADER_LIMIT] * 2, 2 * HEADER_LIMIT)) == HEADER_LIMIT
    assert header_of([], 5) == b""


@pytest.mark.parametrize(
    ("user", "address", "good"),
    [
        ("alice", "alice@app.example", True),
        ("alice", "Alice@APP.example", True),
        ("alice", "x@lists.example", True),
        ("alice", "bob@app.example", False),
        ("alice", "shared@app.example", True),
        ("bob@app.example", "shared@app.example", True),
        ("bob@app.example", "Bob@app.example", True),
        ("bob@app.example", "alice@app.example", False),
        ("carol", "carol@app.example", False),
        ("root", "whoever@wherever.example", True),
        ("alice", "", True),
        ("", "", True),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_senders_with_a_table(user: str, address: str, good: bool, strict: bool) -> None:
    table = Senders(
        {"alice": ["alice@app.example", "*@lists.example"], "*": ["shared@app.example"], "root": ["*"]}, "mx.example", strict=strict
    )
    local, _, domain = address.lower().rpartition("@")
    refusal = table.refusal(user, address, local, domain)
    assert (refusal is None) is good
    assert refusal is None or str(refusal) == f"553 5.7.1 Sender address rejected: not owned by user {user}"


def test_an_entry_without_patterns_is_nobodys_sender() -> None:
    refusal = Senders({"alice": []}, "mx.example").refusal("alice", "alice@app.example", "alice", "app.example")
    assert refusal is not None


def test_senders_without_a_table() -> None:
    strict, loose = Senders({}, "mx.example", strict=True), Senders({}, "mx.example")
    for table, user, good in (
        (strict, "app", True),
        (strict, "b@c.example", False),
        (strict, "a@b.example", True),
        (loose, "b@c.example", True),
    ):
        assert (table.refusal(user, "a@b.example", "a", "b.example") is None) is good
    assert strict.refusal(None, "a@b.example", "a", "b.example") is None


def test_senders_of_somebody_want_a_login_on_submission() -> None:
    tables = {"alice": ["alice@app.example"], "root": ["*"], "*": ["shared@app.example"]}
    strict = Senders(tables, "mx.example", strict=True)
    assert strict.refusal(None, "alice@app.example", "alice", "app.example") == NOT_LOGGED_IN
    assert strict.refusal(None, "dave@app.example", "dave", "app.example") is None
    assert Senders(tables, "mx.example").refusal(None, "alice@app.example", "alice", "app.example") is None
