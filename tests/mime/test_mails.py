"""Hand-written mails beside what their decoded fields must be, checked by reading, not by running.

``mails/NAME.eml`` is the mail, ``mails/NAME.json`` its fields as the standard webhook body has
them. A field that the file leaves out must have nothing in it; ``headers`` are compared where
they are given. ``problems`` are pieces of the sentences, in order. ``octets`` of an attachment
are in base64.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from gateway.mime import parse
from gateway.mime.formats.standard import body
from gateway.mime.parts import take_apart

from ..deliveries import mail, untried

MAILS = sorted((Path(__file__).parent / "mails").glob("*.eml"))
NOTHING: dict[str, Any] = {
    "subject": "",
    "from": [],
    "to": [],
    "cc": [],
    "reply_to": [],
    "date": None,
    "message_id": None,
    "in_reply_to": None,
    "references": [],
    "text": None,
    "html": None,
    "attachments": [],
}


@pytest.mark.parametrize("path", MAILS, ids=lambda path: path.stem)
def test_mail(path: Path) -> None:
    octets = path.read_bytes()
    wanted = json.loads(path.with_suffix(".json").read_text())
    parsed = take_apart(octets)
    assert parse(octets) == parsed
    data = json.loads(b"".join(body(untried(mail(octets)), 0.0, parsed)))["data"]
    for key, nothing in NOTHING.items():
        if key != "attachments":
            assert data[key] == wanted.get(key, nothing), key
    if "headers" in wanted:
        assert data["headers"] == wanted["headers"]
    assert len(data["attachments"]) == len(wanted.get("attachments", []))
    for found, expected in zip(data["attachments"], wanted.get("attachments", []), strict=True):
        expected = dict(expected)
        content = base64.b64decode(expected.pop("octets"))
        assert base64.b64decode(found.pop("content")) == content
        assert found == expected | {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    pieces = wanted.get("problems", [])
    assert len(data["problems"]) == len(pieces), data["problems"]
    assert all(piece in problem for piece, problem in zip(pieces, data["problems"], strict=True)), data["problems"]
    assert "raw" not in data


def test_the_mails_are_all_there() -> None:
    assert len(MAILS) >= 80
    assert all(path.with_suffix(".json").exists() for path in MAILS)
