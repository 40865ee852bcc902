"""What holds for taking mail apart whatever the octets, and beside Python's email where that is right."""

from __future__ import annotations

import base64
import email
import email.header
import email.policy
import json
import quopri
import re
from email.headerregistry import Address
from email.message import EmailMessage, Message
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.mime import fields, parse
from gateway.mime.fields import Mailbox, mailboxes, parameters
from gateway.mime.formats.standard import body
from gateway.mime.parts import PART_LIMIT, Parsed, take_apart
from gateway.mime.words import PROBLEMS, Problems, base64_octets, decode_words, quoted_printable_octets

from ..deliveries import mail, untried
from ..mime.corpus import everything

#: Pieces that mail is made of, so that random octets mean something.
PIECES = [
    b"\r\n",
    b"\r\n\r\n",
    b"\n",
    b"\r",
    b" ",
    b"\t",
    b"\0",
    b":",
    b";",
    b"=",
    b'"',
    b"\\",
    b"(",
    b")",
    b"<",
    b">",
    b"@",
    b",",
    b"--",
    b"--b",
    b"--b--",
    b"\r\n--b\r\n",
    b"\r\n--b--\r\n",
    b"\r\n--c\r\n",
    b"From: ",
    b"To: ",
    b"Subject: ",
    b"Date: ",
    b"Message-ID: ",
    b"References: ",
    b"Content-Type: ",
    b"Content-Disposition: ",
    b"Content-Transfer-Encoding: ",
    b"Content-ID: ",
    b"multipart/mixed",
    b"multipart/digest",
    b"text/plain",
    b"text/html",
    b"; boundary=b",
    b'; boundary="c"',
    b"; charset=",
    b"utf-8",
    b"utf-7",
    b"iso-2022-jp",
    b"; filename",
    b"*=",
    b"*0*=",
    b"*1=",
    b"utf-8''",
    b"%C3%BC",
    b"=?utf-8?Q?",
    b"=?utf-8?B?",
    b"?=",
    b"=C3=BC",
    b"=\r\n",
    b"base64",
    b"quoted-printable",
    b"QUJD",
    b"\xff",
    b"\xc3\xbc",
    b"\xed\xa0\x80",
    b"attachment",
    b"inline",
]
OCTETS = st.one_of(st.binary(max_size=200), st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=6)), max_size=60).map(b"".join))
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"], max_codepoint=0x1FFFF), max_size=60)
#: Text that a header field can hold as it is written: no controls, no blanks at its ends or in a row.
LINE = TEXT.map(lambda text: " ".join("".join(character for character in text if character.isprintable()).split()))


def checked(octets: bytes) -> Parsed:
    """Taken apart, and the invariants of every Parsed."""
    parsed = take_apart(octets)
    assert parse(octets) == parsed
    data = json.loads(b"".join(body(untried(mail(octets)), 0.0, parsed)))["data"]
    assert [tuple(field) for field in data["headers"]] == parsed.headers
    assert (data["text"], data["html"], data["subject"]) == (parsed.text, parsed.html, parsed.subject)
    assert len(data["attachments"]) == len(parsed.attachments) <= PART_LIMIT + 1
    assert len(parsed.problems) <= PROBLEMS + 1
    assert all("\r" not in text for text in (parsed.text, parsed.html) if text)
    assert sum(attachment.size for attachment in parsed.attachments) <= len(octets)
    assert parsed.raw in (None, octets)
    return parsed


@given(OCTETS)
def test_nothing_raises_and_everything_can_be_told(octets: bytes) -> None:
    checked(octets)


@given(st.sampled_from([octets for _, octets in everything() if len(octets) < 5000]), st.data())
def test_damage_anywhere_is_survived(octets: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(octets)))
    length = data.draw(st.integers(0, 40))
    checked(octets[:at] + data.draw(OCTETS) + octets[at + length :])


@given(OCTETS)
def test_unix_line_ends_mean_the_same(octets: bytes) -> None:
    octets = octets.replace(b"\r", b"")
    first, second = take_apart(octets), take_apart(octets.replace(b"\n", b"\r\n"))
    assert (first.headers, first.subject, first.to, first.problems) == (second.headers, second.subject, second.to, second.problems)
    assert len(first.attachments) == len(second.attachments)


# ------------------------------------------------------------- round trips


@given(
    subject=LINE,
    name=st.text(alphabet=st.characters(categories=["Lu", "Ll", "Lo", "Nd"]), max_size=40),
    text=TEXT,
    html=st.none() | TEXT,
    files=st.lists(st.tuples(LINE, st.binary(max_size=300)), max_size=3),
    encoding=st.sampled_from(["base64", "quoted-printable"]),
    when=st.datetimes(timezones=st.timezones()),
)
def test_what_pythons_email_writes_is_read_back(
    subject: str, name: str, text: str, html: str | None, files: list[tuple[str, bytes]], encoding: str, when: Any
) -> None:
    written = EmailMessage(policy=email.policy.SMTP)
    written["Subject"] = subject
    written["From"] = Address(name, "a", "client.example")
    written["Date"] = format_datetime(when)
    written.set_content(text, cte=encoding)
    if html is not None:
        written.add_alternative(html, subtype="html", cte=encoding)
    for filename, content in files:
        written.add_attachment(content, "application", "octet-stream", filename=filename or None)
    parsed = checked(written.as_bytes())
    # Python's generator breaks lines at more than CR and LF, and ends the last one.
    lines = "\n".join((text + "\n").splitlines())
    assert "\n".join((parsed.text or "").splitlines()) in (lines, lines.removesuffix("\n"))
    assert (parsed.html is None) == (html is None)
    assert [mailbox.address for mailbox in parsed.from_] == ["a@client.example"]
    assert parsed.from_[0].name == name
    assert parsed.subject == subject
    assert [attachment.content for attachment in parsed.attachments] == [content for _, content in files]
    assert [attachment.filename or "" for attachment in parsed.attachments] == [filename for filename, _ in files]


@given(TEXT, st.sampled_from(["utf-8", "utf-16-be", "utf-7"]), st.sampled_from("bBqQ"), st.integers(1, 20))
def test_encoded_words_cut_anywhere(text: str, charset: str, encoding: str, size: int) -> None:
    octets = text.encode(charset)
    words = []
    for at in range(0, len(octets), size):
        piece = octets[at : at + size]
        payload = base64.b64encode(piece).decode() if encoding in "bB" else "".join(f"={octet:02X}" for octet in piece)
        words.append(f"=?{charset}?{encoding}?{payload}?=")
    assert decode_words(" ".join(words), Problems(), "x") == text


@given(TEXT, st.integers(1, 30))
def test_2231_values_cut_anywhere(text: str, size: int) -> None:
    escaped = "".join(f"%{octet:02X}" for octet in text.encode())
    pieces = [escaped[at : at + size * 3] for at in range(0, len(escaped), size * 3)] or [""]
    pieces[0] = "utf-8''" + pieces[0]
    value = "attachment" + "".join(f"; filename*{number}*={piece}" for number, piece in enumerate(pieces))
    assert parameters(value, Problems(), "x")[1]["filename"] == text


@given(st.binary(max_size=400), st.integers(1, 80), st.sampled_from([b"\r\n", b"\n", b""]))
def test_base64_in_lines(octets: bytes, width: int, newline: bytes) -> None:
    encoded = base64.b64encode(octets)
    lines = newline.join(encoded[at : at + width] for at in range(0, len(encoded), width))
    problems = Problems()
    assert base64_octets(lines, problems, "x") == octets
    assert not problems


@given(st.binary(max_size=200))
def test_base64_the_plain_way(octets: bytes) -> None:
    """The quick way and the reading-over way agree with a third that takes one character at a time."""
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    characters = bytes(octet for octet in octets if octet in alphabet + b"=").split(b"=")[0]
    bits = "".join(f"{alphabet.index(octet):06b}" for octet in characters)
    plain = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits) - 7, 8))
    assert base64_octets(octets, Problems(), "x") == plain


@given(st.binary(max_size=300))
def test_quoted_printable_round_trip(octets: bytes) -> None:
    octets = octets.replace(b"\r", b"")
    encoded = quopri.encodestring(octets).replace(b"\n", b"\r\n")
    problems = Problems()
    assert quoted_printable_octets(encoded, problems, "x").replace(b"\r\n", b"\n") == octets
    assert not problems


ADDRESSES = st.lists(
    st.sampled_from(
        [
            "a@b",
            "<a@b>",
            "N ",
            '"Q, R" ',
            "(c)",
            ", ",
            ";",
            ":",
            "G: ",
            "@",
            ".",
            " ",
            "<",
            ">",
            '"',
            "\\",
            "[",
            "]",
            "=?utf-8?Q?x=2C?=",
            "=?",
            "é",
        ]
    ),
    max_size=12,
).map("".join)


@given(ADDRESSES)
def test_the_short_way_for_usual_mailboxes_says_the_same(text: str) -> None:
    quick = mailboxes([text], Problems(), "x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fields, "_USUAL", re.compile(r"(?!)()()()()"))
        slow = mailboxes([text], Problems(), "x")
    assert quick == slow


@given(st.lists(st.tuples(LINE, st.sampled_from(["a@b", "c.d@e.example", '"f g"@h', "i@[192.0.2.1]"])), max_size=6))
def test_written_mailboxes_are_read_back(wanted: list[tuple[str, str]]) -> None:
    # A name that looks like an encoded word is one.
    wanted = [(name.replace("=?", "="), address) for name, address in wanted]
    quoted = ['"' + re.sub(r'(["\\])', r"\\\1", name) + '" ' if name else "" for name, _ in wanted]
    text = ", ".join(f"{name}<{address}>" for name, (_, address) in zip(quoted, wanted, strict=True))
    assert mailboxes([text], Problems(), "x") == [Mailbox(name, address) for name, address in wanted]


# ------------------------------------------------- beside Python's email

WELL_FORMED = ("plain_text", "text_in_a_charset", "alternatives_with_a_file", "deep_nesting", "lines_of_dots", "large_files")


def _texts(message: Message, kind: str) -> list[str]:
    found = []
    for part in message.walk():
        if part.get_content_type() == kind and part.get_content_disposition() != "attachment":
            payload = part.get_payload(decode=True)
            assert isinstance(payload, bytes)
            found.append(payload.decode(part.get_content_charset("us-ascii")).replace("\r\n", "\n"))
    return found


def test_where_pythons_email_is_right_it_says_the_same() -> None:
    compared = 0
    for name, octets in everything():
        if not name.startswith(WELL_FORMED):
            continue
        compared += 1
        parsed = take_apart(octets)
        theirs = email.message_from_bytes(octets)
        assert parsed.problems == [], name
        assert [field for field, _ in parsed.headers] == theirs.keys(), name
        subject = str(email.header.make_header(email.header.decode_header(theirs["Subject"].replace("\r\n ", " "))))
        assert parsed.subject == subject, name
        for kind, ours in (("text/plain", parsed.text), ("text/html", parsed.html)):
            assert ours == next(iter(_texts(theirs, kind)), None), name
        files = [part for part in theirs.walk() if part.get_content_disposition() == "attachment"]
        assert [attachment.content for attachment in parsed.attachments if attachment.disposition] == [
            part.get_payload(decode=True) for part in files
        ], name
        assert [attachment.filename for attachment in parsed.attachments if attachment.disposition] == [
            part.get_filename() for part in files
        ], name
    assert compared > 200
