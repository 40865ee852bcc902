"""Bounces: read back by Python's email, octets held against RFC 3464, 3461, 6533 and 2045."""

from __future__ import annotations

import email
import email.message
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.message import Client, Content, Message, Params, Recipient
from gateway.message import Envelope as MessageEnvelope
from gateway.reply import Reply
from gateway.smtp.bounce import HEADER_LIMIT, RETURN_LIMIT, Kind, Result, envelope, excerpt_size, report, wants

NO_USER = Reply(550, "5.1.1", "no such user")
LATER = Reply(451, "4.3.0", "try later")
TAKEN = Reply(250, "2.0.0", "taken")
HEADER = b"Subject: hi\r\nMessage-ID: <orig@x.example>\r\n"
TRACE = b"Received: from c\r\n\tby mx.example id 1\r\n"
CONTENT = HEADER + b"\r\nbody\r\n"


def recipient(address: str, **params: str) -> Recipient:
    local, _, domain = address.rpartition("@")
    return Recipient(address, local, domain, dict(params))


def message(content: bytes | Path = CONTENT, sender: str = "a@x.example", expires_at: float = 0.0, **params: str | None) -> Message:
    octets = content.read_bytes() if isinstance(content, Path) else content
    size = octets.find(b"\r\n\r\n") + 2
    inline, path = (None, str(content)) if isinstance(content, Path) else (content, None)
    stored = Content(inline, path, len(octets), eight_bit=not octets.isascii(), header_size=size if size > 1 else len(octets))
    mail_params: Params = dict(params)
    found = MessageEnvelope(sender, mail_params, [])
    return Message("018f", found, stored, Client("192.0.2.1"), 1700000000.0, trace=TRACE, expires_at=expires_at)


def written(
    about: Message | None = None, *results: Result, kind: Kind = "failed", excerpt: bytes | None = None
) -> tuple[bytes, email.message.Message]:
    octets = report(
        kind,
        about or message(),
        results or [(recipient("b@y.example"), NO_USER, "mx.y.example:25")],
        reporting_mta="gw.example",
        now=1700000600.0,
        message_id="018f-b@gw.example",
        excerpt=excerpt,
    )
    # Whatever it is about, it is mail that the next hop may take: CRLF lines of bounded length, no NUL.
    assert octets.endswith(b"\r\n")
    assert octets.count(b"\r") == octets.count(b"\n") == octets.count(b"\r\n")
    assert b"\0" not in octets
    assert max(map(len, octets.split(b"\r\n"))) <= 998
    return octets, email.message_from_bytes(octets)


def parts(read: email.message.Message) -> list[email.message.Message]:
    assert not read.defects
    found = read.get_payload()
    assert isinstance(found, list)
    return [part for part in found if isinstance(part, email.message.Message)]


def body(part: email.message.Message) -> bytes:
    """The octets of a part as they were meant, its transfer encoding undone."""
    octets = part.get_payload(decode=True)
    assert isinstance(octets, bytes)
    return octets


def raw_part(octets: bytes, number: int) -> tuple[bytes, bytes]:
    """Header and octets of a part by the boundary alone (RFC 2046 §5.1.1)."""
    found = re.search(rb'boundary="([^"]+)"', octets)
    assert found is not None
    pieces = octets.split(b"\r\n--" + found[1])
    assert pieces[-1] == b"--\r\n"
    head, _, rest = pieces[number + 1].removeprefix(b"\r\n").partition(b"\r\n\r\n")
    return head, rest


def fields(octets: bytes) -> list[dict[str, str]]:
    """The groups of the delivery-status part, unfolded."""
    _, text = raw_part(octets, 1)
    groups = re.sub(r"\r\n[ \t]", " ", text.decode()).removesuffix("\r\n").split("\r\n\r\n")
    return [dict(line.split(": ", 1) for line in group.split("\r\n")) for group in groups]


# ------------------------------------------------------------------------- wants


@pytest.mark.parametrize(
    ("notify", "wanted"),
    [
        (None, {"failed"}),
        ("NEVER", set()),
        ("never", set()),
        ("FAILURE", {"failed"}),
        ("SUCCESS", {"relayed", "delivered"}),
        ("DELAY", {"delayed"}),
        ("success,Failure,DELAY", {"failed", "delayed", "relayed", "delivered"}),
    ],
)
def test_what_notify_asks_for(notify: str | None, wanted: set[Kind]) -> None:
    """RFC 3461 §4.1."""
    given = recipient("b@y.example", **({"NOTIFY": notify} if notify else {}))
    kinds: list[Kind] = ["failed", "delayed", "relayed", "delivered"]
    assert {kind for kind in kinds if wants(given, kind)} == wanted


def test_nobody_is_not_written_to() -> None:
    """RFC 5321 §4.5.5."""
    with pytest.raises(ValueError, match="null sender"):
        written(message(sender=""))
    with pytest.raises(ValueError, match="without recipients"):
        report("failed", message(), [], reporting_mta="gw.example", now=0.0, message_id="x@y")


# ------------------------------------------------------------------------- shape


def test_the_whole_of_a_plain_one() -> None:
    octets, read = written()
    assert read["From"] == "Mail Delivery System <MAILER-DAEMON@gw.example>"
    assert read["To"] == "<a@x.example>"
    assert read["Message-ID"] == "<018f-b@gw.example>"
    assert read["References"] == "<orig@x.example>"
    assert read["Date"] == "Tue, 14 Nov 2023 22:23:20 +0000"
    assert read["Auto-Submitted"] == "auto-replied"
    assert read["MIME-Version"] == "1.0"
    assert read.get_content_type() == "multipart/report"
    assert read.get_param("report-type") == "delivery-status"
    text, status, original = parts(read)
    assert text.get_content_type() == "text/plain"
    assert "<b@y.example>" in body(text).decode()
    assert "mx.y.example said: 550 5.1.1 no such user" in body(text).decode()
    assert status.get_content_type() == "message/delivery-status"
    assert fields(octets) == [
        {"Reporting-MTA": "dns; gw.example", "Arrival-Date": "Tue, 14 Nov 2023 22:13:20 +0000"},
        {
            "Final-Recipient": "rfc822; b@y.example",
            "Action": "failed",
            "Status": "5.1.1",
            "Remote-MTA": "dns; mx.y.example",
            "Diagnostic-Code": "smtp; 550 5.1.1 no such user",
            "Last-Attempt-Date": "Tue, 14 Nov 2023 22:23:20 +0000",
        },
    ]
    assert original.get_content_type() == "message/rfc822"
    assert raw_part(octets, 2)[1] == TRACE + CONTENT
    assert octets.isascii()


def test_several_recipients_and_what_the_client_asked_to_be_told() -> None:
    about = message(ENVID="QQ+2B314+3D")
    octets, _ = written(
        about,
        (recipient("b@y.example", ORCPT="rfc822;first+2Blast@z.example"), NO_USER, "10.0.0.1:25"),
        (recipient("c@y.example"), LATER, "[2001:db8::1]:25"),
        (recipient("d@y.example"), Reply(554, "", "no code of the new kind"), ""),
    )
    top, one, two, three = fields(octets)
    assert top["Original-Envelope-Id"] == "QQ+314="
    assert one["Original-Recipient"] == "rfc822; first+last@z.example"
    assert one["Remote-MTA"] == "dns; 10.0.0.1"
    # Refused for good is told as that, given up after many tries as that (RFC 3463 §3.5).
    assert [group["Status"] for group in (one, two, three)] == ["5.1.1", "4.4.7", "5.0.0"]
    assert two["Remote-MTA"] == "dns; [2001:db8::1]"
    assert two["Diagnostic-Code"] == "smtp; 451 4.3.0 try later"
    assert "Remote-MTA" not in three
    assert three["Diagnostic-Code"] == "smtp; 554 no code of the new kind"
    assert {group["Action"] for group in (one, two, three)} == {"failed"}


def test_an_expired_one_says_so_to_people() -> None:
    _, read = written(message(), (recipient("b@y.example"), LATER, "mx.y.example:25"))
    assert "was tried until the message expired" in body(parts(read)[0]).decode()


def test_a_delay() -> None:
    octets, read = written(message(expires_at=1700432000.0), (recipient("b@y.example"), LATER, "mx.y.example:25"), kind="delayed")
    group = fields(octets)[1]
    assert (group["Action"], group["Status"]) == ("delayed", "4.3.0")
    assert group["Will-Retry-Until"] == "Sun, 19 Nov 2023 22:13:20 +0000"
    text = body(parts(read)[0]).decode()
    assert "need\r\nnot send it again" in text
    assert "Sun, 19 Nov 2023" in text
    # RET counts for failures only: of what may still arrive the header is enough.
    assert parts(read)[2].get_content_type() == "text/rfc822-headers"


@pytest.mark.parametrize("kind", ["relayed", "delivered"])
def test_a_success(kind: Kind) -> None:
    octets, read = written(message(RET="FULL"), (recipient("b@y.example", NOTIFY="SUCCESS"), TAKEN, "mx.y.example:25"), kind=kind)
    group = fields(octets)[1]
    assert (group["Action"], group["Status"]) == (kind, "2.0.0")
    assert "Last-Attempt-Date" not in group
    assert parts(read)[2].get_content_type() == "text/rfc822-headers"
    octets, _ = written(message(), (recipient("b@y.example"), TAKEN, ""), kind=kind)
    assert "Diagnostic-Code" not in fields(octets)[1]


@pytest.mark.parametrize(
    "remote", ["https://app.internal.example/inbound?token=x", "/var/mail/x", "unix:/run/lmtp", "http://10.0.0.1:8000", "x"]
)
def test_what_is_only_ours_is_not_told(remote: str) -> None:
    octets, _ = written(message(), (recipient("b@y.example"), NO_USER, remote))
    assert "Remote-MTA" not in fields(octets)[1]
    assert remote == "x" or remote.encode() not in octets


# ---------------------------------------------------------------------- original


@pytest.mark.parametrize(
    ("wish", "size", "whole"),
    [
        (None, 100, True),
        ("FULL", 100, True),
        ("full", 100, True),
        ("HDRS", 100, False),
        (None, RETURN_LIMIT + 1, False),
        ("FULL", RETURN_LIMIT + 1, False),
    ],
)
def test_how_much_of_the_original_goes_back(wish: str | None, size: int, whole: bool) -> None:
    """RFC 3461 §4.3."""
    content = HEADER + b"\r\n" + b"x\r\n" * (size // 3)
    about = message(content)
    if wish:
        about.envelope.mail_params["RET"] = wish
    octets, read = written(about)
    assert parts(read)[2].get_content_type() == ("message/rfc822" if whole else "text/rfc822-headers")
    assert raw_part(octets, 2)[1] == TRACE + (content if whole else HEADER)
    assert excerpt_size(about, "failed") == (len(content) if whole else len(HEADER))


def test_eight_bit_content_goes_back_only_where_it_was_asked_for() -> None:
    """Else a hop without 8BITMIME would lose the whole report."""
    content = HEADER + b"\r\n\xff\xfe caf\xc3\xa9\r\n"
    octets, read = written(message(content))
    assert octets.isascii()
    assert raw_part(octets, 2)[1] == TRACE + HEADER
    octets, read = written(message(content, RET="FULL"))
    assert raw_part(octets, 2)[1] == TRACE + content
    assert parts(read)[2]["Content-Transfer-Encoding"] == "8bit"
    assert read["Content-Transfer-Encoding"] == "8bit"


@pytest.mark.parametrize(
    "content",
    [
        HEADER + b"\r\n" + b"x" * 999 + b"\r\n",
        HEADER + b"\r\nbare \n lf\r\n",
        HEADER + b"\r\nbare \r cr\r\n",
        HEADER + b"\r\nnul \0\r\n",
    ],
)
def test_what_message_rfc822_may_not_hold_stays_here(content: bytes) -> None:
    octets, read = written(message(content, RET="FULL"))
    assert parts(read)[2].get_content_type() == "text/rfc822-headers"
    assert raw_part(octets, 2)[1] == TRACE + HEADER


def test_binary_content_stays_here() -> None:
    octets, read = written(message(HEADER + b"\r\n\x00\n\r\xff", RET="FULL", BODY="BINARYMIME"))
    assert parts(read)[2].get_content_type() == "text/rfc822-headers"
    assert octets.isascii()


@pytest.mark.parametrize(
    "header",
    [b"Subject: " + b"x" * 2000 + b"\r\n", b"Subject: caf\xe9\r\n", b"A: b\0c\nd\re\r\n", b"T: x \r\n" + b"L: " + b"=" * 1200 + b"\r\n"],
)
def test_a_header_that_is_no_text_is_quoted(header: bytes) -> None:
    """text/rfc822-headers may be quoted-printable (RFC 6522 §4); nothing of it is lost."""
    octets, read = written(message(header + b"\r\nbody\r\n", RET="HDRS"))
    part = parts(read)[2]
    assert part["Content-Transfer-Encoding"] == "quoted-printable"
    assert body(part) == TRACE + header
    assert octets.isascii()


def test_a_huge_header_is_cut_at_a_line() -> None:
    header = b"".join(b"X-%d: %s\r\n" % (number, b"y" * 70) for number in range(2000))
    octets, _ = written(message(header + b"\r\nbody\r\n"))
    back = raw_part(octets, 2)[1]
    assert back.endswith(b"y\r\n")
    assert (TRACE + header).startswith(back)
    assert HEADER_LIMIT - 100 < len(back) <= HEADER_LIMIT + len(TRACE)


def test_content_in_a_file_is_handed_in(tmp_path: Path) -> None:
    path = tmp_path / "content"
    path.write_bytes(CONTENT)
    about = message(path)
    octets, read = written(about, excerpt=CONTENT[: excerpt_size(about, "failed")])
    assert raw_part(octets, 2)[1] == TRACE + CONTENT
    path.unlink()
    _, read = written(about)
    assert len(parts(read)) == 2


def test_content_without_header_or_end() -> None:
    for content in (b"", b"no header, no end"):
        octets, _ = written(message(content))
        assert raw_part(octets, 2)[1] == TRACE + content


def test_the_boundary_is_not_in_the_original() -> None:
    content = HEADER + b"\r\n--report-018f-b\r\n--report-018f-b--\r\n--report-018f-b_\r\n"
    octets, read = written(message(content))
    assert raw_part(octets, 2)[1] == TRACE + content
    assert len(parts(read)) == 3


def test_a_message_id_in_the_body_or_a_strange_one_is_not_believed() -> None:
    for content in (b"Subject: x\r\n\r\nMessage-ID: <x@y>\r\n", b"Message-ID: no brackets\r\n\r\n", b"Message-ID: <a b>\r\n\r\n"):
        assert written(message(content))[1]["References"] is None


# ------------------------------------------------------------------------- UTF-8


def test_a_utf8_sender_gets_utf8() -> None:
    """RFC 6533: message/global-delivery-status with the addresses as they are."""
    about = message("Subject: Grüße\r\n\r\nbody\r\n".encode(), sender="jürgen@x.example", SMTPUTF8=None, RET="HDRS")
    octets, read = written(
        about,
        (
            recipient("grüße@y.example", ORCPT="utf-8;gr\\x{FC}\\x{DF}e@y.example"),
            Reply(550, "5.1.1", "kein Benutzer grüße"),
            "mx.y.example:25",
        ),
    )
    text, status, original = parts(read)
    assert status.get_content_type() == "message/global-delivery-status"
    group = fields(octets)[1]
    assert group["Final-Recipient"] == "utf-8; grüße@y.example"
    assert group["Original-Recipient"] == "utf-8; grüße@y.example"
    assert group["Diagnostic-Code"] == "smtp; 550 5.1.1 kein Benutzer grüße"
    assert "<grüße@y.example>" in body(text).decode()
    assert original.get_content_type() == "message/global-headers"
    assert raw_part(octets, 2)[1] == TRACE + "Subject: Grüße\r\n".encode()
    carried = envelope(about, octets)
    assert carried.mail_params == {"BODY": "8BITMIME", "SMTPUTF8": None}
    assert "To: <jürgen@x.example>".encode() in octets


def test_an_ascii_sender_gets_ascii_about_utf8() -> None:
    """RFC 6533 §3: the 7-bit form of the address, so that no hop and no reader needs SMTPUTF8."""
    about = message("Subject: Grüße\r\n\r\nbody\r\n".encode(), SMTPUTF8=None)
    octets, read = written(
        about,
        (recipient("grüße+=x@y.example", ORCPT="utf-8;grüße@y.example"), Reply(550, "5.1.1", "kein Benutzer grüße"), "mx.y.example:25"),
    )
    assert octets.isascii()
    text, status, original = parts(read)
    assert status.get_content_type() == "message/delivery-status"
    group = fields(octets)[1]
    assert group["Final-Recipient"] == "utf-8; gr\\x{FC}\\x{DF}e\\x{2B}\\x{3D}x@y.example"
    assert group["Original-Recipient"] == "utf-8; gr\\x{FC}\\x{DF}e@y.example"
    assert group["Diagnostic-Code"] == "smtp; 550 5.1.1 kein Benutzer gr??e"
    assert "<grüße+=x@y.example>" in body(text).decode()
    assert original.get_content_type() == "text/rfc822-headers"
    assert body(original) == TRACE + "Subject: Grüße\r\n".encode()
    assert envelope(about, octets).mail_params == {}


def test_a_utf8_original_that_goes_back_whole_is_message_global() -> None:
    content = "Subject: Grüße\r\n\r\nbody\r\n".encode()
    octets, _ = written(message(content, SMTPUTF8=None, RET="FULL"))
    head, back = raw_part(octets, 2)
    assert b"message/global\r\n" in head
    assert back == TRACE + content


# ------------------------------------------------------------------ hostile words


@pytest.mark.parametrize("said", ["many words " * 90, "x" * 1000, "a " + "é" * 500])
def test_long_answers_are_folded_and_lose_nothing(said: str) -> None:
    octets, read = written(message(sender="é@x.example"), (recipient("b@y.example"), Reply(550, "5.7.1", said.strip()), "mx.y.example:25"))
    told = fields(octets)[1]["Diagnostic-Code"]
    assert told.replace(" ", "") == f"smtp;5505.7.1{said}".replace(" ", "")
    text = body(parts(read)[0]).decode()
    assert max(map(len, text.split("\r\n"))) <= 76
    assert said.replace(" ", "") in re.sub(r"\s", "", text)


@given(
    address=st.text(max_size=40),
    orcpt=st.text(max_size=40),
    envid=st.text(max_size=40),
    said=st.text(max_size=1500),
    remote=st.text(max_size=30),
    sender=st.text(min_size=1, max_size=30),
    content=st.binary(max_size=300),
)
def test_no_text_gets_in_with_a_line_of_its_own(
    address: str, orcpt: str, envid: str, said: str, remote: str, sender: str, content: bytes
) -> None:
    """CVE-2020-8794: what others said is a value, never a field, a part or a line."""
    about = message(content, sender=sender.encode("utf-8", "replace").decode(), ENVID=envid.encode("utf-8", "replace").decode())
    result = (
        recipient(address.encode("utf-8", "replace").decode(), ORCPT=orcpt.encode("utf-8", "replace").decode()),
        Reply.untrusted(550, said.encode("utf-8", "replace").decode()),
        remote,
    )
    octets, read = written(about, result)
    assert len(parts(read)) == 3
    allowed = {"Reporting-MTA", "Original-Envelope-Id", "Arrival-Date", "Original-Recipient", "Final-Recipient", "Action", "Status"}
    allowed |= {"Remote-MTA", "Diagnostic-Code", "Last-Attempt-Date"}
    groups = fields(octets)
    assert len(groups) == 2
    assert all(set(group) <= allowed for group in groups)
    assert set(read.keys()) <= {
        "Date",
        "From",
        "To",
        "Subject",
        "Message-ID",
        "References",
        "Auto-Submitted",
        "MIME-Version",
        "Content-Type",
        "Content-Transfer-Encoding",
    }


def test_how_it_travels() -> None:
    about = message()
    octets, _ = written(about)
    carried = envelope(about, octets)
    assert carried.mail_from == ""
    assert carried.mail_params == {}
    (to,) = carried.recipients
    assert (to.address, to.local, to.domain, to.params) == ("a@x.example", "a", "x.example", {"NOTIFY": "NEVER"})
    assert not wants(to, "failed")
