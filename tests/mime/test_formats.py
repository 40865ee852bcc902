"""The payloads: every key of the standard body, and the raw form."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from gateway.message import TLS, Client, Content, Envelope, Message
from gateway.mime.formats import FORMATS, format_named
from gateway.mime.formats.raw import FIELD_OCTETS, escaped, joined
from gateway.mime.formats.standard import moment

from ..deliveries import ID, TRACE, mail, recipient, untried

CONTENT = """\
From: =?utf-8?Q?J=C3=BCrgen?= <j@client.example>
Subject: =?utf-8?B?R3LDvMOfZQ==?=
To: b@us.example
Date: Sun, 22 Nov 2026 10:00:00 +0000
Message-ID: <1@client.example>
Content-Type: multipart/mixed; boundary=b

--b
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: 8bit

Hällo

--b
Content-Type: text/html; charset=utf-8
Content-Transfer-Encoding: quoted-printable

<b>H=C3=A4llo</b>

--b
Content-Type: application/pdf
Content-Disposition: attachment; filename*=utf-8''gr%C3%BC%C3%9Fe.pdf
Content-Transfer-Encoding: base64

JVBERi0=
--b--
""".replace("\n", "\r\n").encode()

#: The whole of it, as receivers know it: no key is renamed, none changes its type.
BODY: dict[str, Any] = {
    "type": "message.received",
    "timestamp": "2026-11-22T19:08:00.123456Z",
    "data": {
        "id": ID,
        "received_at": "2026-11-22T19:08:00.120000Z",
        "size": len(CONTENT),
        "priority": 0,
        "listener": "127.0.0.1:2525",
        "envelope": {
            "mail_from": "a@client.example",
            "mail_params": {"BODY": "8BITMIME", "SMTPUTF8": None},
            "rcpt_to": ["b@us.example", '"b cc"@us.example'],
            "rcpt_params": {"b@us.example": {"NOTIFY": "NEVER"}},
        },
        "client": {
            "ip": "192.0.2.7",
            "port": 51234,
            "helo": "client.example",
            "protocol": "ESMTPS",
            "tls": {"version": "TLSv1.3", "cipher": "TLS_AES_256_GCM_SHA384"},
            "user": None,
        },
        "checks": {},
        "headers": [
            ["From", "Jürgen <j@client.example>"],
            ["Subject", "Grüße"],
            ["To", "b@us.example"],
            ["Date", "Sun, 22 Nov 2026 10:00:00 +0000"],
            ["Message-ID", "<1@client.example>"],
            ["Content-Type", "multipart/mixed; boundary=b"],
        ],
        "subject": "Grüße",
        "from": [{"name": "Jürgen", "address": "j@client.example"}],
        "to": [{"name": "", "address": "b@us.example"}],
        "cc": [],
        "reply_to": [],
        "date": "2026-11-22T10:00:00+00:00",
        "message_id": "1@client.example",
        "in_reply_to": None,
        "references": [],
        "text": "Hällo\n",
        "html": "<b>Hällo</b>\n",
        "attachments": [
            {
                "filename": "grüße.pdf",
                "content_type": "application/pdf",
                "disposition": "attachment",
                "content_id": None,
                "size": 5,
                "sha256": "38523c087796e5d5dd1cf9bad1fb026781a838dd9dd2cf8af58b9f6502a46778",
                "content": "JVBERi0=",
            }
        ],
        "problems": [],
    },
}


def said(message: Message, now: float = 1795374480.123456) -> Any:
    payload = format_named("standard")(untried(message), now)
    assert payload.headers == [("content-type", "application/json")]
    octets = b"".join(payload.chunks())
    assert payload.size == len(octets)
    # Signing walks through it once more.
    assert b"".join(payload.chunks()) == octets
    return json.loads(octets)


def test_standard_is_as_promised() -> None:
    found = said(mail(CONTENT, [recipient("b@us.example", {"NOTIFY": "NEVER"}), recipient('"b cc"@us.example')]))
    assert found == BODY
    assert list(found["data"]) == list(BODY["data"])


def test_no_key_is_ever_missing() -> None:
    message = Message(ID, Envelope("", {}, [recipient("b@us.example")]), Content(b""), Client(None), 0.0)
    found = said(message, 0.0)
    assert set(found) == set(BODY)
    assert set(found["data"]) == set(BODY["data"])
    assert found["timestamp"] == found["data"]["received_at"] == "1970-01-01T00:00:00.000000Z"
    assert found["data"]["envelope"] == {"mail_from": "", "mail_params": {}, "rcpt_to": ["b@us.example"], "rcpt_params": {}}
    assert found["data"]["client"] == {"ip": None, "port": 0, "helo": "", "protocol": "SMTP", "tls": None, "user": None}
    assert (found["data"]["size"], found["data"]["headers"], found["data"]["text"]) == (0, [], "")


def test_whatever_a_check_found_does_not_hold_up_a_delivery() -> None:
    message = mail()
    message.client.tls = TLS("TLSv1.3", "x", peer="CN=secret")
    message.checks |= {
        "odd": {1: {2}, "path": Path("x"), "bytes": b"\xff", "huge": 1 << 100, "lone": "\ud800", "\ud800": (1, None, True, 0.5)},
        "loop": object,
    }
    found = said(message)["data"]
    assert found["checks"]["odd"] == {
        "1": [2],
        "path": "x",
        "bytes": "b'\\xff'",
        "huge": str(1 << 100),
        "lone": "?",
        "?": [1, None, True, 0.5],
    }
    assert "object" in found["checks"]["loop"]
    assert found["client"]["tls"] == {"version": "TLSv1.3", "cipher": "x"}


def test_raw_is_trace_and_content(tmp_path: Path) -> None:
    octets = b"Subject: x\r\n\r\n" + bytes(range(256)) * 5000
    file = tmp_path / "content"
    file.write_bytes(octets)
    for content in (octets, file):
        payload = format_named("raw")(untried(mail(content)), 0.0)
        assert b"".join(payload.chunks()) == TRACE + octets == b"".join(payload.chunks())
        assert payload.size == len(TRACE) + len(octets)
        assert payload.on_disk == (content is file)
    assert payload.headers == [
        ("content-type", "message/rfc822"),
        ("x-envelope-from", "a@client.example"),
        ("x-envelope-to", "b@us.example"),
    ]
    null = format_named("raw")(untried(mail(mail_from="")), 0.0)
    assert ("x-envelope-from", "") in null.headers


@pytest.mark.parametrize(
    ("address", "field"),
    [
        ("b@us.example", "b@us.example"),
        ("a+b-c_d'e!#$&*/=?^`{|}~@us.example", "a+b-c_d'e!#$&*/=?^`{|}~@us.example"),
        ('"a b,c"@us.example', "%22a%20b%2Cc%22@us.example"),
        ("100%@us.example", "100%25@us.example"),
        ("ü@us.example", "%C3%BC@us.example"),
        ("a\r\nb\t\0\x7f@us.example", "a%0D%0Ab%09%00%7F@us.example"),
        ("", ""),
    ],
)
def test_addresses_in_header_fields(address: str, field: str) -> None:
    assert escaped(address) == field


def test_long_lists_are_cut_between_addresses() -> None:
    addresses = ["x" * size for size in (1, 4000, 91, 94, 4095, 4096, 4097, 1, 1)]
    fields = list(joined(addresses))
    assert ", ".join(fields) == ", ".join(addresses)
    assert [len(value) for value in fields] == [4096, 94, 4095, 4096, 4097, 4]
    assert list(joined([])) == [""]
    assert FIELD_OCTETS == 4096


def test_every_format_has_its_function() -> None:
    assert all(callable(format_named(name)) for name in FORMATS)
    with pytest.raises(KeyError):
        format_named("nonsense")
    assert all(re.fullmatch(r"[a-z]+", name) for name in FORMATS)


@pytest.mark.parametrize("fraction", [0.0, 0.0000005, 0.25, 0.9999994, 0.9999996])
def test_a_moment_is_what_the_library_says(fraction: float) -> None:
    for second in (0, 1_700_000_000, 1_700_000_000, 1_699_999_999, 4_102_444_800):
        expected = datetime.fromtimestamp(second + fraction, UTC).isoformat(timespec="microseconds")
        assert moment(second + fraction) == expected.removesuffix("+00:00") + "Z"
