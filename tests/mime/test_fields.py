"""gateway/mime/words.py and fields.py by tables: what each spelling means."""

from __future__ import annotations

from datetime import datetime

import pytest

from gateway.mime.fields import date, ids, mailboxes, parameters, read_section
from gateway.mime.words import (
    Problems,
    base64_octets,
    codec_of,
    decode_words,
    quoted_printable_octets,
    text_of,
)

WORDS = [
    ("no words", "no words"),
    ("=?utf-8?Q?a?=", "a"),
    ("=?utf-8?q?a_b=5Fc?=", "a b_c"),
    ("=?UTF-8?B?w7w=?=", "ü"),
    ("=?UTF-8?B?w7w?=", "ü"),
    ("=?UTF-8?b?YQ==?= =?UTF-8?b?Yg==?=", "ab"),
    ("=?utf-8?Q?a?= =?utf-8?Q?b?=", "ab"),
    ("=?utf-8?Q?a?=\t =?utf-8?Q?b?=", "ab"),
    ("=?utf-8?Q?a?= b =?utf-8?Q?c?=", "a b c"),
    ("=?utf-8?Q?a?==?utf-8?Q?b?=", "ab"),
    ("(=?utf-8?Q?a?=)", "(a)"),
    ("=?iso-8859-1?Q?=FC?= =?utf-8?Q?=C3=BC?=", "üü"),
    ("=?utf-8?Q?=C3?= =?utf-8?Q?=BC?=", "ü"),
    ("=?utf-8?Q?=C3?= =?UTF-8?B?vA==?=", "ü"),
    ("=?utf-8*de-DE?Q?=C3=BC?=", "ü"),
    ("=?iso-2022-jp?B?GyRCRnxLXBsoQg==?=", "日本"),
    ("=?utf-8?Q??=", ""),
    ("=?utf-8?Q?=3D=3F?=", "=?"),
    ("=?utf-8?Q?100=_=ZZ?=", "100= =ZZ"),
    # Left as they were.
    ("=?utf-8?X?a?=", "=?utf-8?X?a?="),
    ("=?utf-8?Q?a", "=?utf-8?Q?a"),
    ("=?utf-8?Q?a=", "=?utf-8?Q?a="),
    ("=?utf-8?B?!?=", "=?utf-8?B?!?="),
    ("=?nope?Q?a?= =?nope?Q?b?=", "=?nope?Q?a?= =?nope?Q?b?="),
    ("=?=?=?utf-8?Q?a?=", "=?=?a"),
    ("=?utf-8?Q?cut =?utf-8?Q?whole?=", "=?utf-8?Q?cut whole"),
    ("=??Q?a?=", "=??Q?a?="),
    ("=?", "=?"),
    ("a =? b ?= c", "a =? b ?= c"),
]


@pytest.mark.parametrize(("text", "decoded"), WORDS)
def test_encoded_words(text: str, decoded: str) -> None:
    assert decode_words(text, Problems(), "x") == decoded


PARAMETERS = [
    ("text/plain", "text/plain", {}),
    ("text/plain;", "text/plain", {}),
    (" text/plain ; charset=utf-8", "text/plain", {"charset": "utf-8"}),
    ("a/b; X=1; x=2", "a/b", {"x": "1"}),
    ('a/b; x="a;b"; y=c', "a/b", {"x": "a;b", "y": "c"}),
    ('a/b; x="a\\"b"', "a/b", {"x": 'a"b'}),
    ('a/b; x="a\\b"', "a/b", {"x": "a\\b"}),
    ('a/b; x=""; y=', "a/b", {"x": "", "y": ""}),
    ("a/b; x = 1 ; y", "a/b", {"x": "1"}),
    ("a/b;;; x=1;;", "a/b", {"x": "1"}),
    ("a/b; =1; x=2", "a/b", {"x": "2"}),
    ('a/b; "junk"; x=2', "a/b", {"x": "2"}),
    ('a/b; x="open', "a/b", {"x": '"open'}),
    ("a/b; x*=utf-8'en'%C3%BC", "a/b", {"x": "ü"}),
    ("a/b; x*=UTF-8''%c3%bc%", "a/b", {"x": "ü%"}),
    ("a/b; x*0*=utf-8''%C3; x*1*=%BC", "a/b", {"x": "ü"}),
    ("a/b; x*0=a'b'; x*1=c", "a/b", {"x": "a'b'c"}),
    ("a/b; x*1=b; x*0=a", "a/b", {"x": "ab"}),
    ("a/b; x*0*=''%41; x*1=%41", "a/b", {"x": "A%41"}),
    ("a/b; x*=''a=b%3D", "a/b", {"x": "a=b="}),
    ("a/b; x=plain; x*=''extended", "a/b", {"x": "extended"}),
    ("a/b; x*1=only", "a/b", {"x": ""}),
    ("a/b; x=a\tb", "a/b", {"x": "a\tb"}),
    ("", "", {}),
]


@pytest.mark.parametrize(("value", "main", "found"), PARAMETERS)
def test_parameters(value: str, main: str, found: dict[str, str]) -> None:
    assert parameters(value, Problems(), "x") == (main, found)


MAILBOXES = [
    ("", []),
    ("a@b", [("", "a@b")]),
    ("<a@b>", [("", "a@b")]),
    ("N <a@b>", [("N", "a@b")]),
    ('"N, O" <a@b>', [("N, O", "a@b")]),
    ('"N \\"O\\"" <a@b>', [('N "O"', "a@b")]),
    ("N  O\t<a@b>", [("N O", "a@b")]),
    ('"N  O" <a@b>', [("N  O", "a@b")]),
    ('N "O" P <a@b>', [("N O P", "a@b")]),
    ("N<a@b>", [("N", "a@b")]),
    ("N.O. <a@b>", [("N.O.", "a@b")]),
    ("a@b, c@d", [("", "a@b"), ("", "c@d")]),
    ("a@b,, ,c@d,", [("", "a@b"), ("", "c@d")]),
    ("a@b; c@d", [("", "a@b"), ("", "c@d")]),
    ("G: a@b, c@d;", [("", "a@b"), ("", "c@d")]),
    ("G: a@b; H: N <c@d>;, e@f", [("", "a@b"), ("N", "c@d"), ("", "e@f")]),
    ("G:;", []),
    ("(c) a@b", [("c", "a@b")]),
    ("a@b (c)", [("c", "a@b")]),
    ("a@b (c (d) \\) e)", [("c (d) ) e", "a@b")]),
    ("N (c) <a@b>", [("N", "a@b")]),
    ("a (c) @ (d) b", [("c d", "a@b")]),
    ("a . b @ c . d", [("", "a.b@c.d")]),
    ("<a (c) @b>", [("c", "a@b")]),
    ("<@r,@s:a@b>", [("", "a@b")]),
    ("<@r:a@b>", [("", "a@b")]),
    ('"a b"@c', [("", '"a b"@c')]),
    ('<"a@b"@c>', [("", '"a@b"@c')]),
    ("a@[192.0.2.1]", [("", "a@[192.0.2.1]")]),
    ("<a@[IPv6:2001:db8::1]>", [("", "a@[IPv6:2001:db8::1]")]),
    ("<>", []),
    ("N <>", [("N", "")]),
    ("root", [("", "root")]),
    ("N O", [("N O", "")]),
    ('"N O"', [("N O", "")]),
    ("=?utf-8?Q?=C3=BC?= <a@b>", [("ü", "a@b")]),
    ("=?utf-8?Q?a,_b?= <a@b>", [("a, b", "a@b")]),
    ("=?utf-8?Q?c@d,?= <a@b>", [("c@d,", "a@b")]),
    ('"=?utf-8?Q?=C3=BC?=" <a@b>', [("ü", "a@b")]),
    ("=?utf-8?Q?=C3=BC?= =?utf-8?Q?=C3=BC?= O <a@b>", [("üü O", "a@b")]),
    ("=?utf-8?Q?a__b?= <a@b>", [("a  b", "a@b")]),
    ("N <a@b> O <c@d>", [("N", "a@b"), ("O", "c@d")]),
    ("N <a@b", [("N", "a@b")]),
    ("N <a@b, c@d", [("N", "a@b"), ("", "c@d")]),
    ("a@b>", [("", "a@b>")]),
    ('"N <a@b>', [('"N', "a@b")]),
    ("N (c <a@b>", [("N (c", "a@b")]),
    ("N (c (d) <a@b>, e@f", [("N (c (d)", "a@b"), ("", "e@f")]),
    ("jürgen@müller.example", [("", "jürgen@müller.example")]),
    ("山田　太郎 <a@b>", [("山田　太郎", "a@b")]),
    ("a@b@c", [("", "a@b@c")]),
    ("mailto:a@b", [("", "a@b")]),
    ("'N' <a@b>", [("'N'", "a@b")]),
]


@pytest.mark.parametrize(("value", "found"), MAILBOXES)
def test_mailboxes(value: str, found: list[tuple[str, str]]) -> None:
    assert [(mailbox.name, mailbox.address) for mailbox in mailboxes([value], Problems(), "x")] == found


DATES = [
    ("Sun, 22 Nov 2026 11:00:00 +0100", "2026-11-22T11:00:00+01:00"),
    ("22 Nov 2026 11:00:00 -0330", "2026-11-22T11:00:00-03:30"),
    ("Sun, 22 Nov 2026 11:00 GMT", "2026-11-22T11:00:00+00:00"),
    ("Sun, 22 Nov 2026 11:00:00 -0000", "2026-11-22T11:00:00+00:00"),
    ("Sun, 22 Nov 2026 11:00:00", "2026-11-22T11:00:00+00:00"),
    ("Sun, 22 Nov 2026 11:00:00 +0100 (CET)", "2026-11-22T11:00:00+01:00"),
    ("Sun, 22 Nov 99 11:00:00 PST", "1999-11-22T11:00:00-08:00"),
    ("", None),
    ("yesterday", None),
    ("Sun, 99 Nov 2026 11:00:00 +0100", None),
    ("Sun, 22 Nov 2026 25:00:00 +0100", None),
    ("Sun, 22 Nov 2026 11:00:00 +9999", None),
    ("1" * 100_000, None),
    ("\0", None),
]


@pytest.mark.parametrize(("value", "found"), DATES)
def test_dates(value: str, found: str | None) -> None:
    problems = Problems()
    moment = date(value, problems)
    assert moment == (None if found is None else datetime.fromisoformat(found))
    assert (moment is None) == bool(problems)
    if moment is not None:
        assert moment.isoformat() == found


def test_message_ids() -> None:
    assert ids("<a@b>") == ["a@b"]
    assert ids("<a@b><c@d> <e f@g>") == ["a@b", "c@d", "ef@g"]
    assert ids("a@b c@d other") == ["a@b", "c@d"]
    assert ids("<> <") == []
    assert ids("") == []


def test_charset_names() -> None:
    for name, codec in {
        "UTF-8": "utf_8",
        "utf8": "utf_8",
        "ISO_8859-1": "latin_1",
        "iso8859-15": "iso8859_15",
        "Windows-1252": "cp1252",
        "cp-850": None,
        "KOI8-R": "koi8_r",
        "koi8-u": "koi8_u",
        "x-sjis": "cp932",
        "GB2312": "gb2312",
        "ks_c_5601-1987": "euc_kr",
        "unicode-1-1-utf-7": "utf_7",
        "windows-874": "cp874",
        "": None,
        "base64": None,
        "mbcs": None,
    }.items():
        assert codec_of(name) == codec, name


def test_text_never_has_lone_surrogates() -> None:
    for charset, octets in (("utf-7", b"+2AA-x"), ("utf-16", b"\x00\xd8x\x00"), ("utf-8", b"\xed\xa0\x80"), ("utf-16-be", b"\xd8\x00")):
        text_of(octets, charset, Problems(), "x").encode("utf-8")


def test_base64() -> None:
    for octets, decoded, problem in [
        (b"", b"", ""),
        (b"\r\n", b"", ""),
        (b"QUJD", b"ABC", ""),
        (b"QU\r\nJD\r\n", b"ABC", ""),
        (b"QUI=", b"AB", ""),
        (b"QQ==\r\n", b"A", ""),
        (b"QQ", b"A", "ends early"),
        (b"QQ=", b"A", "ends early"),
        (b"QUJDR", b"ABC", "ends early"),
        (b"Q!U*J D", b"ABC", "not base64"),
        (b"QQ==QQ==", b"A", "after its padding"),
        (b"QUI=QUI=", b"AB", "after its padding"),
        (b"====", b"", ""),
        (b"QUJD" * 1_000_000 + b"QQ==", b"ABC" * 1_000_000 + b"A", ""),
        (b"QUJDQUJD\r\n" * 300_000 + b"QUJ", b"ABC" * 600_000 + b"AB", "ends early"),
    ]:
        problems = Problems()
        assert base64_octets(octets, problems, "x") == decoded
        assert (problem in problems[0]) if problem else not problems
        assert base64_octets(b"#" + octets + b"#", Problems(), "x", 1, len(octets) + 1) == decoded


def test_quoted_printable() -> None:
    for octets, decoded, problem in [
        (b"a=41=3d\r\n", b"aA=\r\n", ""),
        (b"a=\r\nb=\nc", b"abc", ""),
        (b"a= \t\r\nb", b"ab", ""),
        (b"a=", b"a", ""),
        (b"a==b=4", b"a==b=4", "broken"),
        (b"a=\rb", b"a=\rb", "broken"),
        (b"=" * 5000, b"=" * 5000, "not quoted-printable"),
    ]:
        problems = Problems()
        assert quoted_printable_octets(octets, problems, "x") == decoded
        assert (problem in problems[-1]) if problem else not problems


def test_a_section_ends_at_a_delimiter_of_what_is_around_it() -> None:
    content = b"A: b\r\n--edge\r\nC: d\r\n\r\nbody"
    section = read_section(content, 0, len(content), {b"edge"}, Problems(), "x")
    assert (section.fields, section.body, section.whole) == ([("A", b"b")], 6, True)
    section = read_section(content, 0, len(content), (), Problems(), "x")
    assert section.fields == [("A", b"b"), ("C", b"d")]
