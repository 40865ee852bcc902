"""Row M1 of the bad-input table: taking apart stops there, the mail is delivered with problems."""

from __future__ import annotations

import base64
import json
import re

import pytest

from gateway.mime import fields, parse
from gateway.mime.fields import FIELD_LIMIT, HEADER_LIMIT, NESTING_LIMIT, SEGMENT_LIMIT, TOKEN_LIMIT
from gateway.mime.formats.standard import body
from gateway.mime.parts import BOUNDARY_LIMIT, DEPTH_LIMIT, PARAMETERS, PART_FIELDS, PART_LIMIT, Parsed, take_apart
from gateway.mime.words import PROBLEM_LENGTH, PROBLEMS, WORD_LIMIT, Problems

from ..deliveries import mail, untried

PARAMETER = fields._PARAMETER


def told(parsed: Parsed, octets: bytes) -> dict[str, object]:
    data: dict[str, object] = json.loads(b"".join(body(untried(mail(octets)), 0.0, parsed)))["data"]
    return data


def test_a_header_over_its_limit_leaves_the_mail_in_one_piece() -> None:
    octets = b"Subject: first\r\n" + b"X-Filler: %b\r\n" % (b"x" * 1000) * 300 + b"X-Last: y\r\n\r\nbody\r\n"
    parsed = take_apart(octets)
    assert parsed.subject == "first"
    assert (parsed.text, parsed.html, parsed.attachments, parsed.raw) == (None, None, [], octets)
    assert parsed.problems == [f"message: header over {HEADER_LIMIT} octets, the rest is not taken apart"]
    data = told(parsed, octets)
    assert (data["text"], base64.b64decode(str(data["raw"]))) == (None, octets)


@pytest.mark.parametrize("line", [b"X: y", b"no field", b" folded", b"x" * 70_000])
def test_a_header_just_within_its_limit_is_taken_apart(line: bytes) -> None:
    start = b"Subject: s\r\n"
    count = (HEADER_LIMIT - len(start) - 2) // (len(line) + 2)
    if line == b"X: y":
        count = FIELD_LIMIT - 1
    octets = start + (line + b"\r\n") * count + b"\r\nbody\r\n"
    parsed = take_apart(octets)
    assert parsed.raw is None
    assert parsed.subject.startswith("s")
    assert parsed.text is not None
    assert parsed.text.endswith("body\n")


def test_over_2000_fields() -> None:
    octets = b"".join(b"X-%d: y\r\n" % number for number in range(FIELD_LIMIT + 1)) + b"\r\nbody\r\n"
    parsed = take_apart(octets)
    assert len(parsed.headers) == FIELD_LIMIT
    assert (parsed.text, parsed.raw) == (None, octets)
    assert parsed.problems == ["message: over 2000 header fields, the rest is not taken apart"]


def test_over_1000_parts() -> None:
    head = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n"
    rest = b"".join(b"Content-Type: application/x\r\n\r\n%d\r\n--b\r\n" % number for number in range(100))
    octets = head + b"--b\r\n\r\ntext\r\n" + b"--b\r\nContent-Type: application/x\r\n\r\nx\r\n" * (PART_LIMIT - 2) + b"--b\r\n" + rest
    parsed = take_apart(octets)
    assert parsed.text == "text"
    # The multipart itself is a part.
    assert len(parsed.attachments) == PART_LIMIT - 1
    assert parsed.attachments[-1].content == rest
    assert parsed.problems == ["body: over 1000 parts, the rest is not taken apart"]


def test_over_100_deep() -> None:
    def nested(depth: int) -> bytes:
        head = b"".join(b"Content-Type: multipart/mixed; boundary=b%d\r\n\r\n--b%d\r\n" % (number, number) for number in range(depth))
        return head + b"\r\nat the bottom\r\n" + b"".join(b"--b%d--\r\n" % number for number in reversed(range(depth)))

    assert take_apart(nested(DEPTH_LIMIT)) == Parsed([("Content-Type", "multipart/mixed; boundary=b0")], text="at the bottom")
    parsed = take_apart(nested(DEPTH_LIMIT + 1))
    assert parsed.text is None
    (attachment,) = parsed.attachments
    assert attachment.content_type == "multipart/mixed"
    assert attachment.content == b"--b100\r\n\r\nat the bottom\r\n--b100--"
    assert parsed.problems == ["body: multiparts nested over 100 deep, not taken apart"]


def test_a_boundary_over_2048_octets() -> None:
    def with_boundary(size: int) -> Parsed:
        boundary = b"b" * size
        return take_apart(
            b"Content-Type: multipart/mixed; boundary=" + boundary + b"\r\n\r\n--" + boundary + b"\r\n\r\ntext\r\n--" + boundary + b"--\r\n"
        )

    assert with_boundary(BOUNDARY_LIMIT).text == "text"
    parsed = with_boundary(BOUNDARY_LIMIT + 1)
    assert parsed.text is None
    assert parsed.attachments[0].content.count(b"text") == 1
    assert parsed.problems == ["body: a boundary over 2048 octets, not taken apart"]


def test_a_2231_index_over_999() -> None:
    def attached(number: int) -> Parsed:
        return take_apart(b"Content-Type: a/b; name*0=x; name*%d=y\r\n\r\n" % number)

    assert attached(1).attachments[0].filename == "xy"
    for number in (SEGMENT_LIMIT, 10**9 - 1):
        parsed = attached(number)
        assert parsed.attachments[0].filename == "x"
        assert parsed.problems == ["Content-Type: a parameter has over 1000 parts, the rest is left out"]
    # Longer numbers are no section numbers any more.
    assert attached(10**100).attachments[0].filename == "x"


def test_over_10240_address_tokens() -> None:
    parsed = take_apart(b"To: " + b"a@b.c, " * 20_000 + b"last@us.example\r\nCc: other@us.example\r\n\r\nbody\r\n")
    assert 1000 <= len(parsed.to) <= TOKEN_LIMIT
    assert parsed.cc[0].address == "other@us.example"
    assert parsed.text == "body\n"
    assert parsed.problems == ["To: over 10240 tokens, the rest is left out"]
    parsed = take_apart(b"To: " + b"(), " * 20_000 + b"\r\n\r\nbody\r\n")
    assert "To: over 10240 tokens, the rest is left out" in parsed.problems


def test_comments_over_50_deep() -> None:
    def commented(depth: int) -> Parsed:
        return take_apart(b"To: a@us.example " + b"(" * depth + b"x" + b")" * depth + b", b@us.example\r\n\r\n")

    assert [mailbox.address for mailbox in commented(NESTING_LIMIT).to] == ["a@us.example", "b@us.example"]
    parsed = commented(NESTING_LIMIT + 1)
    assert [mailbox.address for mailbox in parsed.to] == ["a@us.example"]
    assert parsed.problems == ["To: comments nested over 50 deep, the rest is left out"]


def test_over_10000_encoded_words() -> None:
    parsed = take_apart(b"Subject: " + b"=?utf-8?Q?a?= " * (WORD_LIMIT + 10) + b"\r\n\r\nbody\r\n")
    assert parsed.subject.startswith("a" * WORD_LIMIT)
    assert parsed.subject.endswith("=?utf-8?Q?a?=")
    assert parsed.problems == ["Subject: over 10000 encoded words, the rest is left as it was"]


def test_header_fields_of_all_parts_have_a_limit_together() -> None:
    part = b"--b\r\n" + b"X: y\r\n" * 1900 + b"Content-Type: application/x\r\n\r\nz\r\n"
    octets = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + part * 10 + b"--b--\r\n"
    parsed = take_apart(octets)
    assert len(parsed.attachments) == 10
    assert PART_FIELDS == 10_000
    assert [attachment.content_type for attachment in parsed.attachments] == ["application/x"] * 5 + ["application/octet-stream"] * 5
    # What is not taken apart is there with its header.
    assert parsed.attachments[-1].content == part[5:-2]


def test_parameters_of_all_parts_have_a_limit_together() -> None:
    part = b"--b\r\nContent-Type: application/x; name=x" + b";a=b" * 898 + b"\r\n\r\nz\r\n"
    parsed = take_apart(b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + part * 20 + b"--b--\r\n")
    assert [attachment.content_type for attachment in parsed.attachments] == ["application/x"] * 20
    assert [attachment.filename for attachment in parsed.attachments] == ["x"] * 11 + [None] * 9
    assert PARAMETERS == 10_000
    assert parsed.problems == ["Content-Type: over 10000 parameters in all parts, the rest is left out"]


def test_a_row_of_semicolons_is_gone_over_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands between, each octet of a value is looked at once: the matches lie end to end."""
    matches: list[re.Match[str]] = []

    class Watched:
        def match(self, text: str, at: int) -> re.Match[str] | None:
            found = PARAMETER.match(text, at)
            assert found is not None
            matches.append(found)
            return found

    monkeypatch.setattr(fields, "_PARAMETER", Watched())
    value = "text/plain" + ";" * 9_000 + '"";= ; ;;a' + " ;" * 500 + "b=c;;"
    assert fields.parameters(value, Problems(), "x") == ("text/plain", {"b": "c"})
    assert len(matches) < 10
    assert [one.start() for one in matches[1:]] == [one.end() for one in matches[:-1]]


def test_lines_that_look_like_delimiters_have_a_limit() -> None:
    head = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\n"
    parsed = take_apart(head + b"--\r\n" * 100_000 + b"--b\r\n\r\nnever\r\n--b--\r\n")
    assert parsed.text is not None
    assert parsed.text.endswith("--b--\n")
    assert parsed.problems == ["body: too many lines that begin with --, the rest is not taken apart"]
    # As many as a dump of a database has are no offence.
    dump = b"-- a comment of SQL\r\ninsert into t values (1, 2, 3);\r\n" * 20_000
    parsed = take_apart(head + dump + b"--b--\r\n")
    assert (parsed.problems, len(parsed.text or "")) == ([], len(dump) - 40_000 - 1)


def test_problems_have_a_limit() -> None:
    fields = b"".join(b"X-%d-%b: =?x-%d?Q?a?=\r\n" % (number, b"y" * 300, number) for number in range(500))
    parsed = take_apart(fields + b"\r\nbody\r\n")
    assert len(parsed.problems) == PROBLEMS + 1
    assert parsed.problems[-1] == "further problems are not told"
    assert max(map(len, parsed.problems)) <= PROBLEM_LENGTH


@pytest.mark.parametrize(
    "name", ["idna", "punycode", "zlib", "hex", "rot13", "unicode_escape", "../../etc/passwd", "undefined", "x" * 10_000]
)
def test_no_codec_is_used_that_is_no_charset(name: str) -> None:
    parsed = take_apart(b"Content-Type: text/plain; charset=" + name.encode() + b"\r\n\r\nxn--mnchen-3ya \\u0041 \xc3\xbc\r\n")
    assert parsed.text == "xn--mnchen-3ya \\u0041 ü\n"
    assert parsed.problems[0].startswith("text: unknown charset")


def test_a_fault_of_our_own_still_gives_the_mail(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*given: object) -> str:
        raise RecursionError

    # Functions of ours are compiled in; one of the library is looked up.
    monkeypatch.setattr("gateway.mime.fields.parsedate_to_datetime", breaks)
    octets = b"Subject: x\r\nDate: x\r\n\r\nbody\r\n"
    assert parse(octets) == Parsed(raw=octets, problems=["could not be taken apart: RecursionError"])


def test_a_header_by_its_name() -> None:
    parsed = take_apart(b"X-One: a\r\nx-one: b\r\n\r\n")
    assert (parsed.header("X-ONE"), parsed.header("x-two")) == ("a", None)
