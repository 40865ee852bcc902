"""Whatever a client says, and however its octets are cut: the same replies, the same mail.

A dialogue is a list of moves, valid and hostile. After each the client may wait; after those
that end a group (RFC 2920 §3.1) it must. The first run takes the octets between two waits
whole and answers at once; all others, cut at random and answered early or late, must agree
with it. Every command has one reply, and nothing raises.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.message import Client
from gateway.reply import Reply
from gateway.route import Route, Routes
from gateway.smtp.server import Rules, ServerSession

from ..dialogue import Driver, Mail, split_replies

HOST = "mx.example.net"
LIMIT = 300
Protocol = Literal["smtp", "submission", "lmtp"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
#: What the intake says in turn: counts are forgiven only by an accepted message.
ANSWERS = [Reply(250, "2.0.0", "accepted"), Reply(451, "4.3.0", "later"), Reply(550, "5.7.1", "no")] * 40


@dataclass(frozen=True)
class Move:
    """``replies``: how many it has while the session lives. ``waits``: the client waits after it.
    ``content``: sent only if the reply before was 354, as a client does."""

    octets: bytes
    replies: int = 1
    waits: bool = False
    content: bool = False


# What must not come by chance into the middle of a line of ours: commands that end a group.
WORDS = st.sampled_from(
    [
        b"x",
        b".",
        b"..",
        b"\r\n",
        b"\r\n.",
        b"\n",
        b"\r",
        b"\0",
        b"\xff",
        b"Received: x\r\n",
        b"Subject: x\r\n",
        b"y" * 120,
        b"\r\n\r\n",
        b" ",
    ]
)


def _content(pieces: list[bytes]) -> Move:
    """Content with its end, and nothing behind it."""
    octets = b"".join(pieces) + b"\r\n.\r\n"
    if octets.startswith(b".\r\n"):
        return Move(b".\r\n", content=True)
    return Move(octets[: octets.index(b"\r\n.\r\n") + 5], content=True)


def _chunk(pieces: list[bytes], last: bool) -> Move:
    octets = b"".join(pieces)
    return Move(b"BDAT %d%s\r\n%s" % (len(octets), b" LAST" if last else b"", octets))


def line(*texts: bytes, waits: bool = False) -> st.SearchStrategy[Move]:
    return st.sampled_from([Move(text + b"\r\n", waits=waits) for text in texts])


MOVES = st.one_of(
    line(b"MAIL FROM:<a@client.example>", b"MAIL FROM:<>", b"mail from:<a@client.example> SIZE=10 BODY=8BITMIME"),
    line(b"MAIL FROM:<a@client.example> BODY=BINARYMIME", b"MAIL FROM:<\xc3\xbc@client.example> SMTPUTF8"),
    line(b"RCPT TO:<b@app.example>", b"RCPT TO:<c@app.example> NOTIFY=NEVER", b"RCPT TO:<Postmaster>"),
    line(b"MAIL FROM:<bad", b"MAIL", b"MAIL FROM:<a@b.example> SIZE=x", b"MAIL FROM:<\xc3\xbc@b.example>", b"MAIL FROM:<> SIZE=301"),
    line(
        b"RCPT TO:<b@elsewhere.example>", b"RCPT TO:<u@x@app.example>", b"RCPT", b"RCPT TO:<d@now.example>", b"RCPT TO:<b@app.example> X=1"
    ),
    line(b"NOOP", b"RSET", b"VRFY x", b"HELP", b"EXPN x", b"", b"FROBNICATE", b"XCLIENT A=b"),
    line(b"NOOP " + b"x" * 3000, b"NOOP\0", b"NO\rOP", b"MAIL FROM:<\xff@b.example>", b"RCPT TO:<\n\r".replace(b"\n", b"\x1b")),
    line(b"EHLO client.example", b"EHLO", b"LHLO c x", b"DATA", b"DATA", b"DATA x", b"STARTTLS", b"AUTH PLAIN", waits=True),
    line(b"QUIT", b"GET / HTTP/1.1", b"BDAT 5000", b"PROXY x"),
    st.just(Move(b"NOOP\n")),
    st.lists(WORDS, max_size=8).map(_content),
    st.lists(WORDS, max_size=8).map(_content),
    st.builds(_chunk, st.lists(WORDS, max_size=6), st.booleans()),
    st.builds(_chunk, st.lists(WORDS, max_size=6), st.just(True)),
    st.just(Move(b"BAD\r\n" * 8, replies=8)),
    st.just(Move(b"NOOP\r\n" * 40, replies=40)),
)

#: A start that leads to mail, so that not every dialogue dies of disorder.
LETTER = [Move(b"MAIL FROM:<a@client.example>\r\n"), Move(b"RCPT TO:<b@app.example>\r\n"), Move(b"DATA\r\n", waits=True)]

DIALOGUES = st.lists(st.one_of(MOVES.map(lambda move: [move]), st.just(LETTER), st.lists(MOVES, max_size=4)), max_size=12).map(
    lambda groups: list(itertools.chain.from_iterable(groups))
)

Cut = Callable[[bytes], list[bytes]]


@dataclass
class Result:
    replies: list[list[str]]
    accepted: list[Mail]
    tarpit: int
    closed: bool


def play(moves: list[Move], waits: list[bool], cut: Cut, late: bool, lmtp: bool = False, lockstep: bool = False) -> Result:
    """``waits``: after which moves the client waits although it need not."""
    routes = (
        Route(("*@app.example", "postmaster@mx.example.net"), ("app",)),
        Route(("*@now.example",), ("app",), acknowledge="delivered"),
    )
    rules = Rules(HOST, Routes(routes, HOST), protocol="lmtp" if lmtp else "smtp", message_size=LIMIT, recipients=3, hops=2)
    driver = Driver(ServerSession(rules, Client("192.0.2.1"), "s", "l"), ANSWERS, late)
    driver.start()
    hello = b"LHLO" if lmtp else b"HELO" if lockstep else b"EHLO"
    driver.feed(hello + b" client.example\r\n")
    replies, driver.wire = split_replies(driver.wire)
    assert len(replies) == 2

    expected = 2
    stream = b""
    for number, move in enumerate(moves):
        if move.content and not (replies[-1][0].startswith("354") and not stream):
            continue
        stream += move.octets
        expected += move.replies
        if not (move.waits or lockstep or (number < len(waits) and waits[number]) or number == len(moves) - 1):
            continue
        for piece in cut(stream):
            driver.feed(piece)
        driver.settle()
        stream = b""
        said, driver.wire = split_replies(driver.wire)
        assert not driver.wire
        replies += said
        if driver.session.closing:
            break
        if not lmtp and not (replies[-1][0].startswith("354") and not _content_next(moves, number)):
            assert len(replies) == expected, f"{len(replies)} replies to {expected} commands: {replies}"
        if replies[-1][0].startswith("354") and not _content_next(moves, number):
            # Content that never comes is its own end.
            break
    driver.end()
    return Result(replies, driver.accepted, driver.tarpit, driver.session.closing)


def _content_next(moves: list[Move], number: int) -> bool:
    return number + 1 < len(moves) and moves[number + 1].content


def whole(stream: bytes) -> list[bytes]:
    return [stream] if stream else []


def single(stream: bytes) -> list[bytes]:
    return [stream[at : at + 1] for at in range(len(stream))]


def by(sizes: list[int]) -> Cut:
    def cut(stream: bytes) -> list[bytes]:
        pieces: list[bytes] = []
        at = 0
        for size in itertools.cycle(sizes):
            if at >= len(stream):
                return pieces
            pieces.append(stream[at : at + size])
            at += size
        raise AssertionError

    return cut


SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=8)


@settings(max_examples=300)
@given(DIALOGUES, st.lists(st.booleans(), max_size=40), SIZES, st.booleans())
@example([*LETTER, _content([b"text\n.\r\n"]), Move(b"NOOP\r\n")], [], [1], False)
@example([Move(b"BAD\r\n" * 8, replies=8), *LETTER[:2], Move(b"BDAT 2 LAST\r\nhi"), Move(b"BAD\r\n" * 8, replies=8)], [], [7], True)
@example([Move(b"NOOP\r\n" * 40, replies=40)] * 4, [], [1], True)
def test_the_cut_makes_no_difference(moves: list[Move], waits: list[bool], sizes: list[int], lmtp: bool) -> None:
    first = play(moves, waits, whole, late=False, lmtp=lmtp)
    for cut in (by(sizes), single, whole):
        for late in (False, True):
            assert play(moves, waits, cut, late, lmtp) == first


@settings(max_examples=100)
@given(DIALOGUES, SIZES)
def test_the_cut_makes_no_difference_to_who_waits_for_every_reply(moves: list[Move], sizes: list[int]) -> None:
    # One command at a time: what holds several lines is pipelining, and an offence of its own.
    moves = [move for move in moves if move.content or move.octets.startswith(b"BDAT") or re.fullmatch(rb"[^\n]*\n", move.octets)]
    first = play(moves, [], whole, late=False, lockstep=True)
    for cut in (by(sizes), single):
        for late in (False, True):
            assert play(moves, [], cut, late, lockstep=True) == first


@settings(max_examples=200)
@given(st.lists(st.binary(max_size=40), max_size=20), st.booleans(), st.sampled_from(PROTOCOLS))
def test_nothing_raises_whatever_comes(pieces: list[bytes], late: bool, protocol: Protocol) -> None:
    rules = Rules(HOST, Routes((Route(("*",), ("app",)),), HOST), protocol=protocol, message_size=LIMIT)
    driver = Driver(ServerSession(rules, Client("192.0.2.1"), "s", "l"), [], late)
    driver.start()
    for piece in pieces:
        if piece:
            driver.feed(piece)
    driver.settle()
    driver.end()
    assert driver.session.closing
    assert not split_replies(driver.wire)[1]


TOKENS = st.sampled_from(
    [
        b"EHLO x\r\n",
        b"HELO x\r\n",
        b"MAIL FROM:<a@b.example>\r\n",
        b"RCPT TO:<b@app.example>\r\n",
        b"DATA\r\n",
        b".\r\n",
        b"\r\n.\r\n",
        b"\n.\n",
        b"RSET\r\n",
        b"BDAT 3\r\n",
        b"BDAT 9 LAST\r\n",
        b"BDAT x\r\n",
        b"QUIT\r\n",
        b"NOOP\r\n",
        b"text",
        b"\r",
        b"\n",
        b"\0",
        b"MAIL FROM:<> BODY=BINARYMIME\r\n",
        b"VRFY x\r\n",
    ]
)


@settings(max_examples=300)
@given(st.lists(st.lists(TOKENS, max_size=6).map(b"".join), max_size=12), st.booleans())
def test_nothing_raises_whatever_is_said_in_whatever_order(pieces: list[bytes], late: bool) -> None:
    rules = Rules(HOST, Routes((Route(("*",), ("app",)),), HOST), message_size=LIMIT)
    driver = Driver(ServerSession(rules, Client("192.0.2.1"), "s", "l"), ANSWERS, late)
    driver.start()
    for piece in pieces:
        if piece:
            driver.feed(piece)
    driver.settle()
    driver.end()
    assert driver.session.closing
    assert not split_replies(driver.wire)[1]
    for mail in driver.accepted:
        assert len(mail.content) <= LIMIT
