"""The corpus is what it claims to be, and every mail of it can be taken apart and told."""

from __future__ import annotations

import base64
import json
from collections import Counter

from gateway.mime.formats.standard import body
from gateway.mime.parts import take_apart

from ..deliveries import mail, untried
from .corpus import MINIMA, carriable, classify, everything, messages


def test_enough_of_every_class() -> None:
    found = messages()
    assert len(found) >= 300
    assert len({name for name, _ in found}) == len(found)
    assert len({octets for _, octets in found}) > 400
    counts = Counter(name for _, octets in found for name in classify(octets))
    assert {name: counts[name] for name, least in MINIMA.items() if counts[name] < least} == {}
    assert set(counts) == set(MINIMA)


def test_classes_are_read_from_the_octets() -> None:
    cases = {
        b"Subject: x\r\n\r\ntext\r\n": {"plain"},
        b"": {"empty", "no header"},
        b"Subject: x\r\n\r\n": {"empty"},
        b"\r\n.\r\n": {"no header", "dots"},
        b"Subject: =?koi8-r?B?8A==?=\r\n\r\nx\r\n": {"charset", "encoded word"},
        b'Content-Type: text/plain;\r\n charset="iso-8859-1"\r\n\r\n\xe9\r\n': {"charset", "8-bit"},
        b"Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: BASE64\r\n\r\nQQ==\r\n": {"base64"},
        b"A: b\r\n\r\n" + b"x" * 999 + b"\r\n": {"long line"},
        b"A: b\r\n\r\n" + b"x\r\n" * 100_000: {"large"},
    }
    for octets, wanted in cases.items():
        assert classify(octets) == wanted


def test_what_a_strict_listener_takes() -> None:
    assert carriable(b"")
    assert carriable(b"a\r\n.\r\n")
    for octets in (b"a", b"a\n", b"a\rb\r\n", b"a\r", b"\0\r\n", b"a\r\r\n", b"\n\r\n"):
        assert not carriable(octets)


def test_it_is_the_same_in_every_run() -> None:
    first = everything()
    everything.cache_clear()
    assert everything() == first


def test_every_mail_can_be_told() -> None:
    for name, octets in everything():
        parsed = take_apart(octets)
        data = json.loads(b"".join(body(untried(mail(octets)), 0.0, parsed)))["data"]
        assert data["size"] == len(octets), name
        assert [base64.b64decode(attachment["content"]) for attachment in data["attachments"]] == [
            attachment.content for attachment in parsed.attachments
        ], name
