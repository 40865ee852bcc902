"""AUTH exchanges with whatever a client says: one reply for each line, no exception, nobody let in by chance."""

from __future__ import annotations

import base64
import itertools

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.contracts import Judgement, Login
from gateway.message import TLS, Client
from gateway.passwords import prepared
from gateway.reply import Reply
from gateway.route import Route, Routes
from gateway.smtp.auth import MECHANISMS, Granted, mechanism
from gateway.smtp.server import Rules, ServerSession

from ..dialogue import ACCOUNTS, HOSTNAME, Driver, split_replies

ROUTES = Routes((Route(("*",), ("app",)),), HOSTNAME)
PIECES = st.sampled_from(
    [
        b"\0",
        b"\0alice",
        b"alice",
        b"wonder",
        b"n,,",
        b"n=user,",
        b"r=abc",
        b"p=",
        b"c=biws,",
        b"user=",
        b"\x01",
        b"auth=Bearer ",
        b"a=b,",
        b"\xff",
        b"*",
        b"=",
        b"\xe2\x80\xa8",
    ]
)
MESSAGES = st.one_of(st.binary(max_size=60), st.lists(PIECES, max_size=8).map(b"".join))
RESPONSES = st.one_of(
    MESSAGES.map(base64.b64encode),
    MESSAGES.map(base64.b64encode),
    st.binary(max_size=30).filter(lambda octets: not any(sign in octets for sign in b"\r\n")),
    st.sampled_from([b"*", b"", b"=", b"AAAA" * 3073, b"NOOP", b"RSET"]),
)
COMMANDS = st.builds(
    lambda name, initial: b"AUTH " + name + (b"" if initial is None else b" " + initial),
    st.one_of(st.sampled_from([name.encode() for name in MECHANISMS]), st.sampled_from([b"EXTERNAL", b"plain", b"X", b""])),
    st.one_of(st.none(), RESPONSES),
)
LINES = st.lists(st.one_of(COMMANDS, RESPONSES, RESPONSES), max_size=10)


def play(lines: list[bytes], cut: int) -> tuple[list[list[str]], list[str], bool]:
    """The replies to these lines, who got in, and whether the session went on to the end."""
    rules = Rules(
        HOSTNAME, ROUTES, auth="required", mechanisms=MECHANISMS, certificates={"CN=alice": "alice"}, certificate_identity="external"
    )
    client = Client("192.0.2.1", tls=TLS("TLSv1.3", "x", "CN=alice", end_point=b"e" * 32, names=("CN=alice",)))
    driver = Driver(ServerSession(rules, client, "s", "l"))
    driver.start()
    driver.feed(b"EHLO client.example\r\n")
    replies, driver.wire = split_replies(driver.wire)
    for number, line in enumerate(lines):
        stream = line + b"\r\n"
        for at in range(0, len(stream), cut):
            driver.feed(stream[at : at + cut])
            if driver.session.closing:
                break
        said, driver.wire = split_replies(driver.wire)
        replies += said
        assert len(said) == 1, f"{line!r} had {said}"
        if driver.session.closing:
            assert said[0][0].startswith(("421", "500", "554")), said
            return replies, driver.users, number == len(lines) - 1
    assert not driver.session.paused
    driver.end()
    assert driver.session.closing
    return replies, driver.users, True


@settings(max_examples=400)
@given(LINES, st.integers(1, 40))
@example([b"AUTH PLAIN", b"*", b"AUTH LOGIN", b"YWxpY2U=", b"d29uZGVy"], 7)
@example([b"AUTH EXTERNAL", b"*", b"AUTH EXTERNAL", b"Ym9i", b"AUTH EXTERNAL", b""], 3)
@example([b"AUTH XOAUTH2 " + base64.b64encode(b"user=alice\x01auth=Bearer x\x01\x01"), b"*"] * 3, 5)
def test_one_reply_for_each_line_however_it_is_cut(lines: list[bytes], cut: int) -> None:
    first = play(lines, 1 << 20)
    assert play(lines, cut) == first
    for user in first[1]:
        assert user in ACCOUNTS


@settings(max_examples=400)
@given(
    st.sampled_from(MECHANISMS),
    st.lists(st.one_of(st.none(), MESSAGES), max_size=5),
    st.lists(
        st.sampled_from(
            [
                Judgement("alice"),
                Judgement(),
                Judgement(reply=Reply(454, "4.7.0", "later")),
                Judgement(keys=ACCOUNTS["user"].keys, nonce="xyz"),
            ]
        ),
        min_size=1,
    ),
)
def test_a_mechanism_never_raises_and_names_are_clean(name: str, responses: list[bytes | None], judgements: list[Judgement]) -> None:
    one = mechanism(name, MECHANISMS, b"e" * 32)
    assert one is not None
    words = itertools.cycle(judgements)
    for response in responses:
        step = one.respond(response)
        for _ in range(3):
            if not isinstance(step, Login):
                break
            assert len(step.user.encode()) <= 255
            assert prepared(step.user) == step.user
            step = one.judged(next(words))
        if isinstance(step, (Granted, Reply)):
            return


@settings(max_examples=400)
@given(st.text(max_size=20))
def test_what_is_prepared_stays_so(text: str) -> None:
    try:
        once = prepared(text)
    except ValueError:
        return
    assert prepared(once) == once
    assert not any(ord(sign) < 32 or 0x7F <= ord(sign) <= 0x9F for sign in once)
