"""ClientSession as dialogues: each is run whole, octet by octet and at every cut of what the upstream says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.contracts import Outcome
from gateway.message import INLINE_LIMIT, Params, Recipient
from gateway.smtp.client import ClientSession, Event, Mail, Settled, Terms, TLSWanted, Unusable
from gateway.smtp.extensions import DeliverBy

TERMS = Terms("gw.example")
CONTENT = b"Subject: x\r\n\r\n.dot\r\n"


def recipient(address: str, **params: str) -> Recipient:
    local, _, domain = address.rpartition("@")
    return Recipient(address, local, domain, dict(params))


def mail(
    *addresses: str | Recipient,
    content: bytes | None = CONTENT,
    sender: str = "a@x.example",
    params: Params | None = None,
    eight_bit: bool = False,
    size: int | None = None,
) -> Mail:
    recipients = [address if isinstance(address, Recipient) else recipient(address) for address in addresses or ("b@y.example",)]
    return Mail(sender, params or {}, recipients, len(content or b"") if size is None else size, eight_bit, content)


def timed(seconds: int, mode: str, elapsed: float) -> Mail:
    found = mail()
    found.by, found.elapsed = DeliverBy(seconds, mode[0] == "R", mode[1:] == "T"), lambda: elapsed
    return found


def ranked(priority: int, params: Params | None = None) -> Mail:
    found = mail(params=params)
    found.priority = priority
    return found


def octets(lines: Sequence[str]) -> bytes:
    """Lines of a script; ``\\`` escapes, and ``\\c`` at the end keeps the CRLF away."""
    result = b""
    for line in lines:
        ends = not line.endswith("\\c")
        result += (line if ends else line[:-2]).encode().decode("unicode_escape").encode("latin-1") + (b"\r\n" if ends else b"")
    return result


def groups(script: str) -> list[tuple[str, bytes]]:
    """What each side says between two waits: ``("S", octets)`` and ``("C", octets)`` in turn."""
    found: list[tuple[str, list[str]]] = []
    for line in script.strip().splitlines():
        if not line.strip():
            continue
        side, _, text = line.strip().partition(":")
        text = text.removeprefix(" ")
        assert side in ("S", "C"), line
        if not found or found[-1][0] != side:
            found.append((side, []))
        found[-1][1].append(text)
    return [(side, octets(lines)) for side, lines in found]


def cuttings(script: list[tuple[str, bytes]]) -> Iterator[dict[int, list[bytes]]]:
    """For each group of the upstream how it comes: whole, octet by octet, at each single cut."""
    spoken = [(number, said) for number, (side, said) in enumerate(script) if side == "S"]
    whole = {number: [said] for number, said in spoken}
    yield whole
    yield {number: [bytes([octet]) for octet in said] for number, said in spoken}
    for number, said in spoken:
        for cut in range(1, len(said)):
            yield {**whole, number: [said[:cut], said[cut:]]}


class Talk:
    """One run of a script. The mails are begun one after the other, the first before the greeting."""

    def __init__(self, session: ClientSession, mails: Sequence[Mail]) -> None:
        self.session = session
        self.waiting = list(mails)
        self.events: list[Event] = []
        self._next()

    def _next(self) -> None:
        while self.waiting and not self.session.busy and not self.session.closing:
            self._take(self.session.begin(self.waiting.pop(0)))

    def _take(self, event: Event | None) -> None:
        if event is not None:
            self.events.append(event)
            if isinstance(event, TLSWanted):
                self.session.secured()

    def hear(self, pieces: Sequence[bytes]) -> bytes:
        said = b""
        for piece in pieces:
            self._take(self.session.receive(piece))
            self._next()
            said += self.session.outgoing()
        return said


def run(script: str, *mails: Mail, terms: Terms = TERMS, cuts: bool = True) -> tuple[list[Event], ClientSession]:
    """Runs the script in every cutting; what came of it must be the same each time."""
    turns = groups(script)
    first: list[Event] | None = None
    for pieces in cuttings(turns):
        session = ClientSession(terms, "up.example:25")
        talk = Talk(session, mails or (mail(),))
        assert session.outgoing() == b""
        said = b""
        for number, (side, expected) in enumerate(turns):
            if side == "S":
                assert said == b""
                said = talk.hear(pieces[number])
            else:
                assert said == expected
                said = b""
        assert said in (b"", b"QUIT\r\n")
        if first is None:
            first = talk.events
        assert talk.events == first, pieces
        if not cuts:
            break
    assert first is not None
    return first, session


def states(event: Event) -> list[str | None]:
    assert isinstance(event, Settled)
    return [f"{outcome.state} {outcome.reply}" if outcome is not None else None for outcome in event.outcomes]


def settled(event: Event) -> list[Outcome]:
    assert isinstance(event, Settled)
    return [outcome for outcome in event.outcomes if outcome is not None]


PLAIN = """
S: 220 up.example ESMTP
C: EHLO gw.example
S: 250 up.example
"""
PIPED = """
S: 220 up.example ESMTP
C: EHLO gw.example
S: 250-up.example
S: 250-PIPELINING
S: 250 ENHANCEDSTATUSCODES
"""
CHUNKED = PIPED.replace("250 ENHANCEDSTATUSCODES", "250 CHUNKING")

# ------------------------------------------------------------- the straight ways


def test_one_command_at_a_time_where_nothing_is_offered() -> None:
    events, session = run(
        PLAIN
        + """
        C: MAIL FROM:<a@x.example>
        S: 250 ok
        C: RCPT TO:<b@y.example>
        S: 250 ok
        C: RCPT TO:<c@y.example>
        S: 251 will forward
        C: DATA
        S: 354 go on
        C: Subject: x
        C:
        C: ..dot
        C: .
        S: 250 2.0.0 taken as 42
        """,
        mail("b@y.example", "c@y.example"),
    )
    assert states(events[0]) == ["delivered 250 2.0.0 taken as 42"] * 2
    assert settled(events[0])[0].remote == "up.example:25"
    assert session.idle


def test_pipelining_sends_the_envelope_with_data_in_one_write() -> None:
    events, _ = run(
        PIPED
        + """
        C: MAIL FROM:<a@x.example>
        C: RCPT TO:<b@y.example>
        C: RCPT TO:<c@y.example>
        C: DATA
        S: 250 2.1.0 ok
        S: 250 2.1.5 ok
        S: 550 5.1.1 no such user
        S: 354 go on
        C: Subject: x
        C:
        C: ..dot
        C: .
        S: 250 2.0.0 taken
        """,
        mail("b@y.example", "c@y.example"),
    )
    assert states(events[0]) == ["delivered 250 2.0.0 taken", "failed 550 5.1.1 no such user"]


def test_chunking_sends_the_whole_transaction_in_one_write() -> None:
    events, session = run(
        CHUNKED
        + """
        C: MAIL FROM:<a@x.example>
        C: RCPT TO:<b@y.example>
        C: BDAT 20 LAST
        C: Subject: x
        C:
        C: .dot
        S: 250 ok
        S: 250 ok
        S: 250 2.6.0 taken
        C: MAIL FROM:<>
        C: RCPT TO:<c@y.example>
        C: BDAT 0 LAST
        S: 250 ok
        S: 250 ok
        S: 250 2.6.0 taken too
        """,
        mail(),
        mail("c@y.example", content=b"", sender=""),
    )
    assert [states(event) for event in events] == [["delivered 250 2.6.0 taken"], ["delivered 250 2.6.0 taken too"]]
    assert session.idle


def test_chunking_without_pipelining() -> None:
    events, _ = run(
        PLAIN.replace("250 up.example", "250-up.example\n S: 250 CHUNKING")
        + """
        C: MAIL FROM:<a@x.example>
        S: 250 ok
        C: RCPT TO:<b@y.example>
        S: 250 ok
        C: BDAT 20 LAST
        C: Subject: x
        C:
        C: .dot
        S: 250 taken
        """
    )
    assert states(events[0]) == ["delivered 250 taken"]


def test_pipelining_and_chunking_can_be_left_unused() -> None:
    events, _ = run(
        CHUNKED
        + """
        C: MAIL FROM:<a@x.example>
        S: 250 ok
        C: RCPT TO:<b@y.example>
        S: 250 ok
        C: DATA
        S: 354 go
        C: .
        S: 250 taken
        """,
        mail(content=b""),
        terms=replace(TERMS, pipelining=False, chunking=False),
    )
    assert states(events[0]) == ["delivered 250 taken"]


@pytest.mark.parametrize(
    ("content", "wire"),
    [
        (b"", b".\r\n"),
        (b"no end", b"no end\r\n.\r\n"),
        (b"line\r\n", b"line\r\n.\r\n"),
        (b"half\r", b"half\r\r\n.\r\n"),
        (b".", b"..\r\n.\r\n"),
        (b"..\r\n.\r\n", b"...\r\n..\r\n.\r\n"),
        (b"\r\n.\r\n", b"\r\n..\r\n.\r\n"),
    ],
)
def test_dots_and_a_last_line_without_end(content: bytes, wire: bytes) -> None:
    session = ready(ClientSession(TERMS, ""), ["PIPELINING"])
    session.begin(mail(content=content))
    session.outgoing()
    session.receive(b"250 ok\r\n250 ok\r\n354 go\r\n")
    assert session.outgoing() == wire


def ready(session: ClientSession, offers: Sequence[str]) -> ClientSession:
    session.receive(b"220 hi\r\n")
    lines = ["up.example", *offers]
    session.receive("".join(f"250{' ' if line is lines[-1] else '-'}{line}\r\n" for line in lines).encode())
    session.outgoing()
    assert session.idle
    return session


@given(pieces=st.lists(st.sampled_from([b".", b"\r\n", b"\r", b"\n", b"a", b"\r\n.", b"..", b"b.\r"]), max_size=12), data=st.data())
def test_content_in_pieces_reads_as_if_it_came_whole(pieces: list[bytes], data: st.DataObject) -> None:
    """DATA in pieces of any cutting gives the octets of one piece (RFC 5321 §4.5.2)."""
    content = b"".join(pieces)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=6)))
    whole = ready(ClientSession(TERMS, ""), ["PIPELINING"])
    whole.begin(mail(content=content))
    whole.receive(b"250 ok\r\n250 ok\r\n354 go\r\n")
    expected = whole.outgoing().partition(b"DATA\r\n")[2]
    session = ready(ClientSession(TERMS, ""), ["PIPELINING"])
    session.begin(mail(content=None, size=len(content)))
    session.receive(b"250 ok\r\n250 ok\r\n354 go\r\n")
    session.outgoing()
    edges = [0, *cuts, len(content)]
    for number, (start, end) in enumerate(pairwise(edges)):
        assert session.wants_content
        session.content(content[start:end], last=number == len(edges) - 2)
    assert not session.wants_content
    assert session.outgoing() == expected
    unstuffed = re.sub(rb"(\A|(?<=\r\n))\.", b"", expected.removesuffix(b".\r\n"))
    assert unstuffed == (content if content.endswith(b"\r\n") or not content else content + b"\r\n")


def asks(session: ClientSession) -> tuple[bool, str]:
    return session.wants_content, session.awaiting


def test_large_content_waits_for_a_recipient_and_goes_in_chunks() -> None:
    session = ClientSession(TERMS, "")
    assert asks(session) == (False, "setup")
    ready(session, ["PIPELINING", "CHUNKING"])
    assert session.begin(mail(content=None, size=9)) is None
    assert session.outgoing() == b"MAIL FROM:<a@x.example>\r\nRCPT TO:<b@y.example>\r\n"
    assert asks(session) == (False, "command")
    session.receive(b"250 ok\r\n250 ok\r\n")
    assert asks(session) == (True, "content")
    session.content(b"abc", last=False)
    assert asks(session) == (True, "content")
    session.content(b"defghi", last=True)
    assert session.outgoing() == b"BDAT 3\r\nabcBDAT 6 LAST\r\ndefghi"
    assert asks(session) == (False, "answer")
    assert session.receive(b"250 3 octets\r\n") is None
    assert states(session.receive(b"250 taken\r\n") or Settled([])) == ["delivered 250 taken"]


def test_without_pipelining_each_chunk_waits_for_its_reply() -> None:
    session = ready(ClientSession(TERMS, ""), ["CHUNKING"])
    session.begin(mail(content=None, size=4))
    for _ in range(2):
        session.receive(b"250 ok\r\n")
    session.content(b"ab", last=False)
    assert asks(session) == (False, "content")
    session.receive(b"250 ok\r\n")
    assert asks(session) == (True, "content")


@pytest.mark.parametrize("reply", ["354 go", "421 bye"])
def test_a_chunk_that_is_answered_oddly(reply: str) -> None:
    session = ready(ClientSession(TERMS, ""), ["PIPELINING", "CHUNKING"])
    session.begin(mail(content=None, size=9))
    session.receive(b"250 ok\r\n250 ok\r\n")
    session.content(b"abc", last=False)
    assert [outcome.state for outcome in settled(session.receive(octets([reply])) or Settled([]))] == ["deferred"]
    assert session.closing


@pytest.mark.parametrize("reply", ["250 thanks", "334 what", "421 bye"])
def test_data_that_is_answered_oddly(reply: str) -> None:
    session = ready(ClientSession(TERMS, ""), ["PIPELINING"])
    session.begin(mail())
    event = session.receive(octets(["250 ok", "250 ok", reply]))
    assert isinstance(event, Unusable)
    assert not event.down
    assert session.closing


def test_large_content_in_memory_waits_for_a_recipient_too() -> None:
    session = ready(ClientSession(TERMS, ""), ["PIPELINING", "CHUNKING"])
    session.begin(mail(content=b"x" * (INLINE_LIMIT + 1)))
    assert session.outgoing().endswith(b"RCPT TO:<b@y.example>\r\n")
    session.receive(b"250 ok\r\n250 ok\r\n")
    assert session.outgoing().startswith(b"BDAT %d LAST\r\n" % (INLINE_LIMIT + 1))


def test_a_chunk_that_is_refused_ends_the_stream() -> None:
    session = ready(ClientSession(TERMS, ""), ["PIPELINING", "CHUNKING"])
    session.begin(mail(content=None, size=9))
    session.receive(b"250 ok\r\n250 ok\r\n")
    session.content(b"abc", last=False)
    session.content(b"def", last=False)
    assert session.receive(b"552 5.3.4 too much\r\n") is None
    assert not session.wants_content
    assert states(session.receive(b"503 5.5.1 no\r\n") or Settled([])) == ["failed 552 5.3.4 too much"]
    session.outgoing()
    session.begin(mail(content=b""))
    assert session.outgoing().startswith(b"RSET\r\nMAIL ")


def test_a_chunk_that_is_refused_after_the_last_one_was_sent() -> None:
    session = ready(ClientSession(TERMS, ""), ["PIPELINING", "CHUNKING"])
    session.begin(mail(content=None, size=6))
    session.receive(b"250 ok\r\n250 ok\r\n")
    session.content(b"abc", last=False)
    session.content(b"def", last=True)
    session.receive(b"452 4.3.1 full\r\n")
    assert states(session.receive(b"250 2.0.0 nonsense\r\n") or Settled([])) == ["deferred 452 4.3.1 full"]


# -------------------------------------------------------------------- recipients


def test_no_recipient_taken_content_was_sent_all_the_same() -> None:
    """RFC 3030 §2: the chunk is read over and refused; the next mail begins with RSET in the same write."""
    events, _ = run(
        CHUNKED
        + """
        C: MAIL FROM:<a@x.example>
        C: RCPT TO:<b@y.example>
        C: BDAT 0 LAST
        S: 250 ok
        S: 450 4.2.1 later
        S: 554 5.5.1 no valid recipients
        C: RSET
        C: MAIL FROM:<a@x.example>
        C: RCPT TO:<c@y.example>
        C: BDAT 0 LAST
        S: 250 ok
        S: 250 ok
        S: 250 ok
        S: 250 taken
        """,
        mail(content=b""),
        mail("c@y.example", content=b""),
    )
    assert [states(event) for event in events] == [["deferred 450 4.2.1 later"], ["delivered 250 taken"]]


def test_a_chunk_taken_for_nobody_delivers_nothing() -> None:
    session = ready(ClientSession(TERMS, ""), ["PIPELINING", "CHUNKING"])
    session.begin(mail())
    assert states(session.receive(b"250 ok\r\n550 no\r\n250 thanks\r\n") or Settled([])) == ["failed 550 no"]


def test_no_recipient_taken_but_354_gets_a_lone_dot() -> None:
    """RFC 2920 §3.1."""
    events, _ = run(
        PIPED
        + """
        C: MAIL FROM:<a@x.example>
        C: RCPT TO:<b@y.example>
        C: DATA
        S: 250 ok
        S: 550 5.1.1 no
        S: 354 go on
        C: .
        S: 250 taken
        """
    )
    assert states(events[0]) == ["failed 550 5.1.1 no"]


def test_no_recipient_taken_and_data_refused() -> None:
    events, session = run(
        PIPED
        + """
        C: MAIL FROM:<a@x.example>
        C: RCPT TO:<b@y.example>
        C: DATA
        S: 250 ok
        S: 550 5.1.1 no
        S: 554 5.5.1 no valid recipients
        """
    )
    assert states(events[0]) == ["failed 550 5.1.1 no"]
    assert session.idle


def test_no_recipient_taken_one_by_one_sends_no_data() -> None:
    events, _ = run(
        PLAIN
        + """
        C: MAIL FROM:<a@x.example>
        S: 250 ok
        C: RCPT TO:<b@y.example>
        S: 550 5.1.1 no
        C: RSET
        S: 250 ok
        C: MAIL FROM:<a@x.example>
        S: 250 ok
        C: RCPT TO:<c@y.example>
        S: 452 4.3.1 full
        """,
        mail(),
        mail("c@y.example"),
    )
    assert [states(event) for event in events] == [["failed 550 5.1.1 no"], ["deferred 452 4.3.1 full"]]


@pytest.mark.parametrize(
    ("reply", "state"), [("550 5.1.8 bad sender", "failed"), ("451 4.3.0 later", "deferred"), ("552 5.3.4 too large", "failed")]
)
def test_mail_refused_is_for_everybody(reply: str, state: str) -> None:
    events, session = run(
        CHUNKED
        + f"""
        C: MAIL FROM:<a@x.example>
        C: RCPT TO:<b@y.example>
        C: RCPT TO:<c@y.example>
        C: BDAT 0 LAST
        S: {reply}
        S: 503 5.5.1 MAIL first
        S: 503 5.5.1 MAIL first
        S: 503 5.5.1 MAIL first
        """,
        mail("b@y.example", "c@y.example", content=b""),
    )
    assert states(events[0]) == [f"{state} {reply}"] * 2
    assert session.idle


def test_mail_refused_one_by_one_goes_no_further() -> None:
    events, session = run(PLAIN + "C: MAIL FROM:<a@x.example>\nS: 553 5.1.7 no\n")
    assert states(events[0]) == ["failed 553 5.1.7 no"]
    assert session.idle


def test_a_missing_login_is_the_operators_fault_and_bounces_nothing() -> None:
    events, _ = run(PLAIN + "C: MAIL FROM:<a@x.example>\nS: 530 5.7.0 Authentication required\n")
    (outcome,) = settled(events[0])
    assert outcome.state == "deferred"
    assert outcome.down
    assert str(outcome.reply) == "451 4.3.0 MAIL was answered with 530 5.7.0 Authentication required"


@pytest.mark.parametrize(("reply", "state"), [("554 5.7.1 spam", "failed"), ("451 4.7.1 greylisted", "deferred")])
@pytest.mark.parametrize("offers", [PIPED, CHUNKED])
def test_content_refused(offers: str, reply: str, state: str) -> None:
    chunked = "C: BDAT 0 LAST\n" if offers is CHUNKED else "C: DATA\n"
    data = "" if offers is CHUNKED else "S: 354 go\nC: .\n"
    events, _ = run(
        offers + "C: MAIL FROM:<a@x.example>\nC: RCPT TO:<b@y.example>\n" + chunked + "S: 250 ok\nS: 250 ok\n" + data + f"S: {reply}\n",
        mail(content=b""),
    )
    assert states(events[0]) == [f"{state} {reply}"]


@pytest.mark.parametrize(("reply", "state"), [("554 5.7.1 no", "failed"), ("451 4.3.0 not now", "deferred")])
def test_data_refused(reply: str, state: str) -> None:
    events, session = run(
        PIPED
        + f"""
        C: MAIL FROM:<a@x.example>
        C: RCPT TO:<b@y.example>
        C: RCPT TO:<c@y.example>
        C: DATA
        S: 250 ok
        S: 250 ok
        S: 550 5.1.1 no
        S: {reply}
        """,
        mail("b@y.example", "c@y.example"),
    )
    assert states(events[0]) == [f"{state} {reply}", "failed 550 5.1.1 no"]
    assert session.idle


def test_too_many_recipients_are_left_for_another_transaction() -> None:
    """452 4.5.3, and 552 as RFC 5321 §4.5.3.1.10 reads it; a mailbox that is full is another matter."""
    session = ready(ClientSession(TERMS, ""), ["PIPELINING", "CHUNKING"])
    session.begin(mail("b@y.example", "c@y.example", "d@y.example", "e@y.example", "f@y.example"))
    event = session.receive(b"250 ok\r\n250 ok\r\n452 4.5.3 many\r\n552 many\r\n452 4.2.2 full\r\n552 5.2.2 full\r\n250 taken\r\n")
    assert states(event or Settled([])) == ["delivered 250 taken", None, None, "deferred 452 4.2.2 full", "failed 552 5.2.2 full"]


def test_too_many_although_none_was_taken_is_deferred() -> None:
    session = ready(ClientSession(TERMS, ""), ["PIPELINING", "CHUNKING"])
    session.begin(mail("b@y.example"))
    event = session.receive(b"250 ok\r\n552 too many\r\n554 none\r\n")
    assert states(event or Settled([])) == ["deferred 452 4.5.3 too many"]


def test_limits_are_kept() -> None:
    """RFC 9422."""
    session = ready(ClientSession(TERMS, ""), ["PIPELINING", "CHUNKING", "LIMITS RCPTMAX=2 MAILMAX=7 X=y RCPTDOMAINMAX=0"])
    assert (session.recipient_limit, session.mail_limit) == (2, 7)
    session.begin(mail("b@y.example", "c@y.example", "d@y.example"))
    assert session.outgoing().count(b"RCPT TO") == 2
    event = session.receive(b"250 ok\r\n250 ok\r\n250 ok\r\n250 taken\r\n")
    assert states(event or Settled([])) == ["delivered 250 taken", "delivered 250 taken", None]


# -------------------------------------------------------- what the hop can carry


@pytest.mark.parametrize(
    ("offers", "given", "line"),
    [
        ([], mail(), "MAIL FROM:<a@x.example>"),
        (["SIZE"], mail(), "MAIL FROM:<a@x.example> SIZE=20"),
        (["SIZE 0"], mail(), "MAIL FROM:<a@x.example> SIZE=20"),
        (["SIZE 20"], mail(), "MAIL FROM:<a@x.example> SIZE=20"),
        (["size 20"], mail(), "MAIL FROM:<a@x.example> SIZE=20"),
        (["SIZE x"], mail(), "MAIL FROM:<a@x.example> SIZE=20"),
        (["SIZE 19"], mail(), "552 5.3.4"),
        (["8BITMIME"], mail(eight_bit=True), "MAIL FROM:<a@x.example> BODY=8BITMIME"),
        (["8BITMIME"], mail(params={"BODY": "8BITMIME"}), "MAIL FROM:<a@x.example> BODY=8BITMIME"),
        (["8BITMIME"], mail(params={"BODY": "7BIT"}), "MAIL FROM:<a@x.example> BODY=7BIT"),
        (["8BITMIME"], mail(params={"BODY": "7BIT"}, eight_bit=True), "MAIL FROM:<a@x.example> BODY=8BITMIME"),
        (["8BITMIME"], mail(), "MAIL FROM:<a@x.example>"),
        ([], mail(params={"BODY": "8BITMIME"}), "MAIL FROM:<a@x.example>"),
        ([], mail(eight_bit=True), "554 5.6.3"),
        (["SMTPUTF8"], mail(params={"SMTPUTF8": None}), "MAIL FROM:<a@x.example> SMTPUTF8"),
        (["SMTPUTF8"], mail("bé@y.example"), "MAIL FROM:<a@x.example> SMTPUTF8"),
        (["SMTPUTF8"], mail(), "MAIL FROM:<a@x.example>"),
        ([], mail(params={"SMTPUTF8": None}), "550 5.6.7"),
        ([], mail(sender="é@x.example"), "550 5.6.7"),
        ([], mail("b@y.example", "bé@y.example"), "550 5.6.7"),
        (
            ["CHUNKING", "BINARYMIME", "8BITMIME"],
            mail(params={"BODY": "BINARYMIME"}, eight_bit=True),
            "MAIL FROM:<a@x.example> BODY=BINARYMIME",
        ),
        (["CHUNKING", "8BITMIME"], mail(params={"BODY": "BINARYMIME"}), "554 5.6.1"),
        (["BINARYMIME", "8BITMIME"], mail(params={"BODY": "BINARYMIME"}), "554 5.6.1"),
        (["DSN"], mail(params={"RET": "HDRS", "ENVID": "q+2B1"}), "MAIL FROM:<a@x.example> RET=HDRS ENVID=q+2B1"),
        ([], mail(params={"RET": "HDRS", "ENVID": "q"}), "MAIL FROM:<a@x.example>"),
        (["DSN", "AUTH PLAIN"], mail(params={"AUTH": "<>", "MT-PRIORITY": "3"}), "MAIL FROM:<a@x.example>"),
        # What it asked of our queue is said as it stands now, and a hold that is over to nobody.
        (["MT-PRIORITY"], ranked(0, {"MT-PRIORITY": "9"}), "MAIL FROM:<a@x.example> MT-PRIORITY=0"),
        (["MT-PRIORITY MIXER"], ranked(-4), "MAIL FROM:<a@x.example> MT-PRIORITY=-4"),
        (["MT-PRIORITY"], mail(), "MAIL FROM:<a@x.example>"),
        ([], ranked(4), "MAIL FROM:<a@x.example>"),
        (["FUTURERELEASE 9 2030-01-01T00:00:00Z"], mail(params={"HOLDFOR": "5"}), "MAIL FROM:<a@x.example>"),
        (["DELIVERBY"], timed(60, "R", 12.5), "MAIL FROM:<a@x.example> BY=48;R"),
        (["DELIVERBY 48"], timed(60, "RT", 12.0), "MAIL FROM:<a@x.example> BY=48;RT"),
        (["DELIVERBY"], timed(60, "R", 59.9), "MAIL FROM:<a@x.example> BY=1;R"),
        (["DELIVERBY"], timed(60, "R", 60.0), "554 5.4.7 the time left"),
        (["DELIVERBY 48"], timed(60, "R", 12.1), "554 5.4.7 the time left"),
        (["DELIVERBY 99,x"], timed(60, "R", 0.0), "554 5.4.7 the time left"),
        ([], timed(60, "R", 0.0), "554 5.4.7 the next hop does not offer DELIVERBY,"),
        (["DELIVERBY 99"], timed(60, "N", 12.0), "MAIL FROM:<a@x.example> BY=48;N"),
        (["DELIVERBY"], timed(60, "NT", 100.0), "MAIL FROM:<a@x.example> BY=-40;NT"),
        (["DELIVERBY"], timed(-999_999_999, "N", 100.0), "MAIL FROM:<a@x.example> BY=-999999999;N"),
        ([], timed(60, "N", 100.0), "MAIL FROM:<a@x.example>"),
    ],
)
def test_what_mail_says(offers: list[str], given: Mail, line: str) -> None:
    session = ready(ClientSession(replace(TERMS, binarymime=True), ""), offers)
    event = session.begin(given)
    if line[0] == "5":
        assert states(event or Settled([]))[0] is not None
        assert all(text is not None and text.startswith(f"failed {line} ") for text in states(event or Settled([])))
        assert session.outgoing() == b""
        assert session.idle
    else:
        assert event is None
        assert session.outgoing() == f"{line}\r\n".encode()


@pytest.mark.parametrize(("offers", "lmtp", "onward"), [("DELIVERBY", False, "timed"), ("SIZE", False, "untimed"), ("SIZE", True, "")])
@pytest.mark.parametrize("given", ["DSN", "X"])
def test_an_outcome_says_whether_the_next_hop_was_told_the_time(offers: str, given: str, lmtp: bool, onward: str) -> None:
    session = ready(ClientSession(replace(TERMS, lmtp=lmtp), ""), [offers, given])
    assert session.begin(timed(60, "N", 0.0)) is None
    event = None
    for reply in (b"250 2.1.0 ok\r\n", b"250 2.1.5 ok\r\n", b"354 go on\r\n", b"250 2.0.0 taken\r\n"):
        assert event is None
        event = session.receive(reply)
    assert event is not None
    assert [outcome.onward for outcome in settled(event)] == [onward]


@pytest.mark.parametrize(("elapsed", "state"), [(59.0, None), (60.0, "failed 554 5.4.7 the time left is less than the next hop wants")])
def test_a_mail_store_delivers_on_the_spot_and_need_not_know_the_time(elapsed: float, state: str | None) -> None:
    session = ready(ClientSession(replace(TERMS, lmtp=True), ""), [])
    event = session.begin(timed(60, "R", elapsed))
    assert (None if event is None else states(event)[0]) == state


def test_binary_content_leaves_only_where_the_operator_allows_it() -> None:
    session = ready(ClientSession(TERMS, ""), ["CHUNKING", "BINARYMIME"])
    assert (
        states(session.begin(mail(params={"BODY": "BINARYMIME"})) or Settled([]))[0]
        == "failed 554 5.6.1 the next hop does not carry binary content"
    )


def test_notifications_are_handed_on_where_they_are_known() -> None:
    """RFC 3461 §5.2: NOTIFY and ORCPT go on as they came; where DSN is not offered the duty stays here."""
    one = recipient("b@y.example", NOTIFY="SUCCESS,FAILURE", ORCPT="rfc822;b+2Bx@y.example")
    two = recipient("c@y.example")
    session = ready(ClientSession(TERMS, ""), ["PIPELINING", "CHUNKING", "DSN"])
    session.begin(mail(one, two))
    assert session.outgoing().startswith(
        b"MAIL FROM:<a@x.example>\r\nRCPT TO:<b@y.example> NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;b+2Bx@y.example\r\nRCPT TO:<c@y.example>\r\nBDAT"
    )
    event = session.receive(b"250 ok\r\n250 ok\r\n250 ok\r\n250 taken\r\n")
    assert [outcome.notifies for outcome in settled(event or Settled([]))] == [True, False]
    session = ready(ClientSession(TERMS, ""), ["PIPELINING", "CHUNKING"])
    session.begin(mail(one, two))
    assert session.outgoing().startswith(b"MAIL FROM:<a@x.example>\r\nRCPT TO:<b@y.example>\r\nRCPT TO:<c@y.example>\r\nBDAT")
    event = session.receive(b"250 ok\r\n250 ok\r\n250 ok\r\n250 taken\r\n")
    assert [outcome.notifies for outcome in settled(event or Settled([]))] == [False, False]


@pytest.mark.parametrize("bad", ["b\r\nRCPT TO:<x@y.example>", "b\n", "b\0", "b\x1b", "b\udc80"])
def test_no_address_becomes_a_command(bad: str) -> None:
    session = ready(ClientSession(TERMS, ""), ["PIPELINING", "CHUNKING", "SMTPUTF8", "DSN"])
    session.begin(mail(f"{bad}@y.example", recipient("c@y.example", ORCPT=f"rfc822;{bad}"), "d@y.example"))
    assert re.findall(rb"RCPT.*", session.outgoing()) == [b"RCPT TO:<d@y.example>\r"]
    event = session.receive(b"250 ok\r\n250 ok\r\n250 taken\r\n")
    assert [outcome.reply.code for outcome in settled(event or Settled([]))] == [501, 501, 250]
    assert [outcome.reply.code for outcome in settled(session.begin(mail(bad)) or Settled([]))] == [501]
    assert [outcome.reply.code for outcome in settled(session.begin(mail(sender=bad)) or Settled([]))] == [501]
    assert session.outgoing() == b""


# -------------------------------------------------------------------------- LMTP

LMTP = replace(TERMS, lmtp=True)
STORE = CHUNKED.replace("EHLO", "LHLO")


def test_lmtp_answers_for_each_recipient_that_was_taken() -> None:
    events, session = run(
        STORE
        + """
        C: MAIL FROM:<a@x.example>
        C: RCPT TO:<b@y.example>
        C: RCPT TO:<c@y.example>
        C: RCPT TO:<d@y.example>
        C: RCPT TO:<e@y.example>
        C: BDAT 0 LAST
        S: 250 ok
        S: 250 ok
        S: 550 5.1.1 who
        S: 250 ok
        S: 250 ok
        S: 250 2.1.5 b
        S: 452 4.2.2 full
        S: 552 5.2.2 full for good
        """,
        mail("b@y.example", "c@y.example", "d@y.example", "e@y.example", content=b""),
        terms=LMTP,
    )
    assert states(events[0]) == [
        "delivered 250 2.1.5 b",
        "failed 550 5.1.1 who",
        "deferred 452 4.2.2 full",
        "failed 552 5.2.2 full for good",
    ]
    assert session.idle


def test_lmtp_by_data() -> None:
    events, _ = run(
        PIPED.replace("EHLO", "LHLO")
        + """
        C: MAIL FROM:<a@x.example>
        C: RCPT TO:<b@y.example>
        C: RCPT TO:<c@y.example>
        C: DATA
        S: 250 ok
        S: 250 ok
        S: 250 ok
        S: 354 go
        C: .
        S: 250 b
        S: 250 c
        """,
        mail("b@y.example", "c@y.example", content=b""),
        terms=LMTP,
    )
    assert states(events[0]) == ["delivered 250 b", "delivered 250 c"]


def test_lmtp_none_taken_is_answered_once() -> None:
    session = ready(ClientSession(LMTP, ""), ["PIPELINING", "CHUNKING"])
    session.begin(mail("b@y.example", "c@y.example"))
    assert states(session.receive(b"250 ok\r\n550 b\r\n450 c\r\n503 nobody\r\n") or Settled([])) == ["failed 550 b", "deferred 450 c"]
    assert session.idle


def test_lmtp_that_wants_content_for_nobody_is_left() -> None:
    session = ready(ClientSession(LMTP, ""), ["PIPELINING"])
    session.begin(mail())
    assert states(session.receive(b"250 ok\r\n550 b\r\n354 go\r\n") or Settled([])) == ["failed 550 b"]
    assert session.closing


def test_lmtp_lost_between_two_answers() -> None:
    session = ready(ClientSession(LMTP, ""), ["PIPELINING", "CHUNKING"])
    session.begin(mail("b@y.example", "c@y.example"))
    assert session.receive(b"250 ok\r\n250 ok\r\n250 ok\r\n250 b\r\n") is None
    one, two = settled(session.eof() or Settled([]))
    assert (one.state, two.state) == ("delivered", "deferred")


def test_lmtp_has_no_helo() -> None:
    events, session = run("S: 220 hi\nC: LHLO gw.example\nS: 500 5.5.1 what\nC: QUIT\n", terms=LMTP)
    assert isinstance(events[0], Unusable)
    assert session.closing


# ------------------------------------------------------------------------- setup


def test_helo_where_ehlo_is_unknown() -> None:
    """RFC 5321 §3.2."""
    events, _ = run(
        """
        S: 220 old
        C: EHLO gw.example
        S: 502 unimplemented
        C: HELO gw.example
        S: 250-PIPELINING
        S: 250 CHUNKING
        C: MAIL FROM:<a@x.example>
        S: 250 ok
        C: RCPT TO:<b@y.example>
        S: 250 ok
        C: DATA
        S: 354 go
        C: .
        S: 250 taken
        """,
        mail(content=b""),
    )
    assert states(events[0]) == ["delivered 250 taken"]


@pytest.mark.parametrize(
    "script",
    [
        "S: 554 5.3.2 no mail here\nC: QUIT",
        "S: 421 4.3.2 busy\nC: QUIT",
        "S: 354 what\nC: QUIT",
        "S: 220 hi\nC: EHLO gw.example\nS: 421 4.3.2 busy\nC: QUIT",
        "S: 220 hi\nC: EHLO gw.example\nS: 450 4.3.2 later\nC: QUIT",
        "S: 220 hi\nC: EHLO gw.example\nS: 554 no\nC: HELO gw.example\nS: 554 no\nC: QUIT",
        "S: 220-hi\nS: 250 code changes",
        "S: HTTP/1.1 400 Bad Request",
        "S: 220 bare \\n\\c\nS: x",
    ],
)
def test_what_is_wrong_before_mail_blames_the_host_and_nothing_is_lost(script: str) -> None:
    events, session = run(script)
    (event,) = events
    assert isinstance(event, Unusable)
    assert event.down
    assert not event.stale
    assert event.reply.temporary
    assert session.closing
    assert not session.busy


def test_the_enhanced_code_of_several_lines_is_said_once() -> None:
    events, _ = run(
        PLAIN
        + """
        C: MAIL FROM:<a@x.example>
        S: 550-5.7.1 You
        S: 550-5.7.1 shall not
        S: 550 5.7.1 pass
        """
    )
    assert states(events[0]) == ["failed 550 5.7.1 You shall not pass"]


def test_words_of_an_upstream_are_cleaned() -> None:
    """O1, CVE-2020-8794: nothing of a reply can start a line of its own anywhere."""
    events, _ = run(PLAIN + "C: MAIL FROM:<a@x.example>\nS: 550 5.1.1 a\\x1b[2Jb\\x85c\\xff\\tz\n")
    (outcome,) = settled(events[0])
    assert re.fullmatch(r"[ -~]*", outcome.reply.text)


TLS = replace(TERMS, tls="required")
OFFERED = """
S: 220 hi
C: EHLO gw.example
S: 250-up
S: 250-PIPELINING
S: 250-CHUNKING
S: 250 STARTTLS
C: STARTTLS
"""


def test_starttls_then_everything_anew() -> None:
    """RFC 3207 §4.2: what was offered before counts for nothing."""
    events, _ = run(
        OFFERED
        + """
        S: 220 go
        C: EHLO gw.example
        S: 250 up
        C: MAIL FROM:<a@x.example>
        S: 550 5.1.1 no
        """,
        terms=TLS,
    )
    assert isinstance(events[0], TLSWanted)
    assert states(events[1]) == ["failed 550 5.1.1 no"]


def test_octets_before_the_handshake_are_an_offence() -> None:
    """https://nostarttls.secvuln.info: a reply injected behind the 220 must not be read under TLS."""
    for said in ([b"220 go\r\n250 evil\r\n"], [b"220 go\r\n2"], [b"220 go\r\n", b"250 evil\r\n"], [b"220 go\r\n", b"\x16"]):
        session = ClientSession(replace(TERMS, tls="opportunistic"), "")
        session.begin(mail())
        session.receive(b"220 hi\r\n")
        session.receive(b"250-up\r\n250 STARTTLS\r\n")
        event: Event | None = None
        for piece in said:
            event = session.receive(piece)
        assert isinstance(event, Unusable)
        assert event.down
        assert session.closing
        assert not session.outgoing().endswith(b"MAIL")


def test_tls_that_is_missing() -> None:
    wanted = PLAIN + "C: QUIT\n"
    for terms in (TLS, replace(TERMS, tls="verify")):
        (event,), _ = run(wanted, terms=terms)
        assert isinstance(event, Unusable)
        assert "TLS is required" in event.reply.text
    (event,), _ = run(OFFERED + "S: 454 4.7.0 not now\nC: QUIT\n", terms=TLS)
    assert isinstance(event, Unusable)
    opportunistic = replace(TERMS, tls="opportunistic")
    (event,), _ = run(PLAIN + "C: MAIL FROM:<a@x.example>\nS: 550 no\n", terms=opportunistic)
    assert states(event) == ["failed 550 no"]
    script = (
        OFFERED
        + "S: 454 4.7.0 not now\nC: MAIL FROM:<a@x.example>\nC: RCPT TO:<b@y.example>\nC: BDAT 0 LAST\nS: 250 ok\nS: 250 ok\nS: 250 ok"
    )
    (event,), _ = run(script, mail(content=b""), terms=opportunistic)
    assert states(event) == ["delivered 250 ok"]


def test_tls_is_not_asked_for_where_it_is_off() -> None:
    (event,), _ = run(
        "S: 220 hi\nC: EHLO gw.example\nS: 250-up\nS: 250 STARTTLS\nC: MAIL FROM:<a@x.example>\nS: 550 no\n",
        terms=replace(TERMS, tls="off"),
    )
    assert states(event) == ["failed 550 no"]


LOGIN = replace(TERMS, username="üser", password="pass", clear_login=True)


def test_auth_plain() -> None:
    (event,), _ = run(
        """
        S: 220 hi
        C: EHLO gw.example
        S: 250-up
        S: 250 AUTH LOGIN PLAIN
        C: AUTH PLAIN AMO8c2VyAHBhc3M=
        S: 235 2.7.0 welcome
        C: MAIL FROM:<a@x.example>
        S: 550 no
        """,
        terms=LOGIN,
    )
    assert states(event) == ["failed 550 no"]


@pytest.mark.parametrize("offer", ["AUTH LOGIN", "AUTH=LOGIN CRAM-MD5", "auth cram-md5 login"])
def test_auth_login(offer: str) -> None:
    (event,), _ = run(
        f"""
        S: 220 hi
        C: EHLO gw.example
        S: 250-up
        S: 250 {offer}
        C: AUTH LOGIN
        S: 334 VXNlcm5hbWU6
        C: w7xzZXI=
        S: 334 UGFzc3dvcmQ6
        C: cGFzcw==
        S: 235 welcome
        C: MAIL FROM:<a@x.example>
        S: 550 no
        """,
        terms=LOGIN,
    )
    assert states(event) == ["failed 550 no"]


@pytest.mark.parametrize(
    ("script", "terms"),
    [
        ("S: 250 AUTH PLAIN\nC: QUIT", replace(LOGIN, clear_login=False)),
        ("S: 250 AUTH CRAM-MD5\nC: QUIT", LOGIN),
        ("S: 250 DSN\nC: QUIT", LOGIN),
        ("S: 250 AUTH PLAIN\nC: AUTH PLAIN AMO8c2VyAHBhc3M=\nS: 535 5.7.8 wrong\nC: QUIT", LOGIN),
        ("S: 250 AUTH PLAIN\nC: AUTH PLAIN AMO8c2VyAHBhc3M=\nS: 454 4.7.0 later\nC: QUIT", LOGIN),
        ("S: 250 AUTH PLAIN\nC: AUTH PLAIN AMO8c2VyAHBhc3M=\nS: 334 more\nC: QUIT", LOGIN),
        ("S: 250 AUTH LOGIN\nC: AUTH LOGIN\nS: 334 a\nC: w7xzZXI=\nS: 334 b\nC: cGFzcw==\nS: 334 c\nC: QUIT", LOGIN),
    ],
)
def test_a_login_that_fails_bounces_nothing_and_tells_no_password(script: str, terms: Terms) -> None:
    (event,), session = run("S: 220 hi\nC: EHLO gw.example\nS: 250-up\n" + script, terms=terms)
    assert isinstance(event, Unusable)
    assert event.down
    assert event.reply.temporary
    assert session.closing


# ------------------------------------------------- O1: how an upstream misbehaves

ENVELOPE = "C: MAIL FROM:<a@x.example>\nC: RCPT TO:<b@y.example>\nC: RCPT TO:<c@y.example>\n"
TWO = ("b@y.example", "c@y.example")
NONSENSE = [
    "S: 250 ok\nS: 250 ok\nS: 250 ok\nS: 250-taken\nS: 251 code changes",
    "S: 250 ok\nS: 250 ok\nS: 250 ok\nS: hello",
    "S: 250 ok\nS: 250 ok\nS: 250 ok\nS: 250 bare \\n\\c\nS: x",
    "S: 250 ok\nS: 250 ok\nS: 250 ok\nS: 100 continue",
    "S: 250 ok\nS: 250 ok\nS: 250 ok\nS: 600 what",
    "S: 250 ok\nS: 250 ok\nS: 250 ok\nS: 25",
    "S: 250 ok\nS: 250 ok\nS: 250 ok\nS: 354 go on",
    "S: 250 ok\nS: 250 ok\nS: 354 go on\nS: 250 ok",
    "S: 354 go on\nS: 250 ok\nS: 250 ok\nS: 250 ok",
    "S: 503 5.5.1 nested MAIL\nS: 250 ok\nS: 250 ok\nS: 250 ok",
    "S: 250 ok\nS: 250 ok\nS: 550 5.1.1 no\nS: " + "x" * 5000,
    "S: 250 ok\nS: 250 ok\nS: 550 5.1.1 no\nS: 250-" + "x" * 5000,
]


@pytest.mark.parametrize("said", NONSENSE)
def test_nonsense_after_the_content_has_left_is_deferred_for_all(said: str) -> None:
    """Not even the 550 of a recipient stands: no reply can be trusted to answer what it seems to."""
    events, session = run(CHUNKED + ENVELOPE + "C: BDAT 0 LAST\n" + said, mail(*TWO, content=b""), cuts=len(said) < 1000)
    outcomes = settled(events[0])
    assert [outcome.state for outcome in outcomes] == ["deferred"] * 2
    assert "broke the protocol" in outcomes[0].reply.text
    assert session.closing


def test_a_reply_too_early_is_an_offence_of_its_own() -> None:
    """Where a client must wait (RFC 2920 §3.1) nothing may come together with the reply it waits for."""
    for script in ("S: 220 hi\nS: 250 too early", "S: 220 hi\nC: EHLO gw.example\nS: 250 up\nS: 250 too many"):
        (event,), session = run(script, cuts=False)
        assert isinstance(event, Unusable)
        assert event.down
        assert session.closing


@pytest.mark.parametrize("said", ["250 before the dot", "2", "550 before the dot", "\\n\\c"])
def test_a_reply_before_the_end_of_data(said: str) -> None:
    """Nothing of the content has left, so another host may have it."""
    session = ready(ClientSession(TERMS, ""), ["PIPELINING"])
    session.begin(mail())
    event = session.receive(b"250 ok\r\n250 ok\r\n354 go\r\n" + octets([said]))
    event = event or session.eof()
    assert isinstance(event, Unusable)
    assert session.closing
    assert b"Subject" not in session.outgoing()


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("250 2.0.0 taken", "deferred 451 4.5.0"),
        ("354 go", "deferred 451 4.5.0"),
        ("421 4.3.2 bye", "deferred 421 4.3.2 bye"),
        ("552 5.3.4 enough", "failed 552 5.3.4 enough"),
        ("452 4.3.1 full", "deferred 452 4.3.1 full"),
    ],
)
def test_a_reply_while_the_content_is_on_its_way(said: str, text: str) -> None:
    """The end of data was not said, so whatever this is, nothing was delivered."""
    session = ready(ClientSession(TERMS, ""), ["PIPELINING"])
    session.begin(mail(content=None, size=100))
    session.receive(b"250 ok\r\n250 ok\r\n354 go\r\n")
    session.content(b"first piece\r\n", last=False)
    event = session.receive(octets([said]))
    (found,) = states(event or Settled([]))
    assert found is not None
    assert found.startswith(text)
    assert not session.wants_content
    assert session.closing


def test_a_reply_too_many_takes_the_delivery_back() -> None:
    """Two replies for each command would let the answer to RCPT stand for the content's."""
    session = ready(ClientSession(TERMS, ""), ["PIPELINING", "CHUNKING"])
    session.begin(mail())
    assert states(session.receive(b"250 a\r\n250 a\r\n250 b\r\n250 b\r\n") or Settled([]))[0] == (
        "deferred 451 4.5.0 the upstream broke the protocol: a reply too many"
    )
    session = ready(ClientSession(TERMS, ""), ["PIPELINING", "CHUNKING"])
    session.begin(mail())
    assert session.receive(b"250 a\r\n250 a\r\n250 b\r\n25") is None
    assert [outcome.state for outcome in settled(session.eof() or Settled([]))] == ["deferred"]


def test_a_goodbye_on_the_heels_of_the_last_reply_is_none_of_that() -> None:
    for tail in (b"421 4.3.2 shutting down\r\n", b"421-4.3.2 shutting\r\n421 4.3.2 down\r\n"):
        session = ready(ClientSession(TERMS, ""), ["PIPELINING", "CHUNKING"])
        session.begin(mail())
        event = session.receive(b"250 a\r\n250 a\r\n250 taken\r\n" + tail)
        assert states(event or Settled([])) == ["delivered 250 taken"]
        assert session.closing


@pytest.mark.parametrize("said", [b"250 hello again\r\n", b"421 4.4.2 idle for too long\r\n", b"x", b"\r\n", b"\xff\n"])
def test_words_between_mails_end_the_connection(said: bytes) -> None:
    session = ready(ClientSession(TERMS, ""), ["PIPELINING", "CHUNKING"])
    assert session.receive(said) is None
    assert session.receive(b"more\r\n") is None or session.closing
    assert session.closing or not session.idle or said == b"x"


REPLIES = ["250 ok", "250 ok", "250 ok", "250 taken"]


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("offers", [PIPED, CHUNKED])
def test_421_at_any_time(place: int, offers: str) -> None:
    """RFC 5321 §3.8. Nobody is delivered, nobody fails, and the conversation is over."""
    session = ready(ClientSession(TERMS, ""), ["PIPELINING", "CHUNKING"] if offers is CHUNKED else ["PIPELINING"])
    session.begin(mail(*TWO))
    replies = [*REPLIES[:place], "421 4.3.2 bye"]
    if offers is PIPED and place == 3:
        session.receive(octets([*replies[:3], "354 go"]))
        event = session.receive(octets(replies[3:]))
    else:
        event = session.receive(octets(replies))
    assert session.closing
    if isinstance(event, Unusable):
        assert event.reply.code == 421
        assert not event.stale
    else:
        assert states(event or Settled([])) == ["deferred 421 4.3.2 bye"] * 2
    # Where the content had left and something was taken of the envelope, no other host may be asked.
    assert isinstance(event, Unusable) == (place == 0 or (place < 3 and offers is PIPED))


@pytest.mark.parametrize("heard", range(4))
@pytest.mark.parametrize("offers", [[], ["PIPELINING"], ["PIPELINING", "CHUNKING"]])
@pytest.mark.parametrize("end", ["eof", "stop"])
def test_a_connection_that_is_lost_never_delivers(heard: int, offers: list[str], end: str) -> None:
    session = ready(ClientSession(TERMS, ""), offers)
    session.begin(mail(*TWO))
    sent = session.outgoing()
    for reply in (["250 ok", "550 5.1.1 no", "250 ok", "354 go"] if "CHUNKING" not in offers else ["250 ok", "550 5.1.1 no", "250 ok"])[
        :heard
    ]:
        assert session.receive(octets([reply])) is None
        sent += session.outgoing()
    event = session.eof() if end == "eof" else session.stop("no reply in time")
    if b"Subject" in sent:
        outcomes = settled(event or Settled([]))
        # What was said of a recipient stands; the rest nobody knows.
        assert [outcome.state for outcome in outcomes] == ["failed" if heard >= 2 else "deferred", "deferred"]
        assert outcomes[1].down == (heard == 0)
        assert outcomes[1].reply.code == 451
    else:
        assert isinstance(event, Unusable)
        assert event.down == (heard == 0)
        assert not event.stale
    assert session.closing
    assert session.eof() is None


def test_lost_after_the_content_says_that_nobody_knows() -> None:
    session = ready(ClientSession(TERMS, ""), ["PIPELINING", "CHUNKING"])
    session.begin(mail())
    session.receive(b"250 ok\r\n250 ok\r\n")
    assert states(session.eof() or Settled([])) == ["deferred 451 4.4.2 connection lost after the content was sent: it may have been taken"]


# -------------------------------------------------------------- warm connections


def warm(offers: Sequence[str] = ("PIPELINING", "CHUNKING")) -> ClientSession:
    session = ready(ClientSession(TERMS, ""), offers)
    session.begin(mail())
    assert states(session.receive(b"250 ok\r\n250 ok\r\n250 taken\r\n") or Settled([])) == ["delivered 250 taken"]
    session.outgoing()
    return session


@pytest.mark.parametrize("cautious", [True, False])
def test_a_connection_that_ended_before_this_mail_is_stale(cautious: bool) -> None:
    session = warm()
    session.begin(mail(), cautious=cautious)
    assert (b"Subject" in session.outgoing()) is not cautious
    event = session.eof()
    assert isinstance(event, Unusable)
    assert event.stale


def test_a_goodbye_as_the_first_answer_is_stale_too() -> None:
    session = warm()
    session.begin(mail())
    event = session.receive(b"421 4.4.2 idle for too long\r\n")
    assert isinstance(event, Unusable)
    assert event.stale


def test_a_connection_that_answered_anything_is_not_stale() -> None:
    session = warm()
    session.begin(mail())
    session.receive(b"2")
    assert [outcome.state for outcome in settled(session.eof() or Settled([]))] == ["deferred"]
    session = warm()
    session.begin(mail(), cautious=True)
    session.receive(b"250 ok\r\n")
    event = session.eof()
    assert isinstance(event, Unusable)
    assert not event.stale


def test_with_caution_the_content_waits_for_the_first_replies() -> None:
    session = warm()
    session.begin(mail(), cautious=True)
    assert session.outgoing() == b"MAIL FROM:<a@x.example>\r\nRCPT TO:<b@y.example>\r\n"
    session.receive(b"250 ok\r\n250 ok\r\n")
    assert session.outgoing() == b"BDAT 20 LAST\r\n" + CONTENT


def test_quit_and_misuse() -> None:
    session = warm()
    session.quit()
    session.quit()
    assert session.outgoing() == b"QUIT\r\n"
    with pytest.raises(RuntimeError):
        session.begin(mail())
    session = warm()
    session.begin(mail())
    with pytest.raises(RuntimeError):
        session.begin(mail())
    with pytest.raises(RuntimeError):
        session.content(b"", last=True)


# -------------------------------------------------------------------- the oracle

CODES = [
    "250 ok",
    "250-a\r\n250 b",
    "354 go",
    "421 bye",
    "450 4.2.1 later",
    "550 5.1.1 no",
    "552 many",
    "235 x",
    "200 x",
    "junk",
    "25",
    "250\n",
]


@given(
    lines=st.lists(st.sampled_from(CODES), max_size=9),
    cuts=st.lists(st.integers(1, 80), max_size=5),
    offers=st.sampled_from([[], ["PIPELINING"], ["CHUNKING"], ["PIPELINING", "CHUNKING"]]),
    lmtp=st.booleans(),
)
def test_whatever_is_said_nothing_counts_as_delivered_that_was_not(
    lines: list[str], cuts: list[int], offers: list[str], lmtp: bool
) -> None:
    """Delivered needs a 2yz to the end of data: as many replies before it as the envelope asked for,
    each whole, and the content sent. Every outcome's reply fits its state, whatever comes."""
    session = ready(ClientSession(replace(TERMS, lmtp=lmtp), ""), offers)
    event = session.begin(mail(*TWO))
    sent = session.outgoing()
    wire = "".join(f"{line}\r\n" for line in lines).encode()
    replies = 0
    edges = [0, *sorted(cut for cut in cuts if cut < len(wire)), len(wire)]
    for start, end in pairwise(edges):
        if event is None and not session.closing:
            event = session.receive(wire[start:end])
            sent += session.outgoing()
            replies = len(re.findall(rb"^\d{3} .*\r\n", wire[:end], re.MULTILINE))
    event = event or session.eof()
    assert event is not None
    if isinstance(event, Unusable):
        assert event.reply.temporary
        return
    outcomes = settled(event)
    for outcome in outcomes:
        assert outcome.state == {2: "delivered", 4: "deferred", 5: "failed"}[outcome.reply.code // 100]
    if any(outcome.state == "delivered" for outcome in outcomes):
        assert CONTENT in sent or CONTENT.replace(b"\r\n.", b"\r\n..") + b".\r\n" in sent
        assert replies >= 4
