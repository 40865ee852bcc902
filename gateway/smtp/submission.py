"""What a submission server adds to a mail that lacks it (RFC 6409 §8): Date, Message-ID, From.

Pure: octets of the header section in, fields to stand above it out. What the client sent is
never changed (promise 3), so that a field that is there but faulty stays as it is. The time and
the id are handed in.

RFC 5322 §3.6: these are the fields without which a mail is none (and Message-ID should be there).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..message import Envelope
from .trace import date_header

#: Octets of the header that are looked at; what stands beyond counts as not there.
HEADER_LIMIT = 256 * 1024

_FIELD = re.compile(rb"(?:\A|\r\n)(date|message-id|from)[ \t]*:", re.IGNORECASE)
_FIRST = re.compile(rb"[!-9;-~]+[ \t]*:")


def header_of(pieces: Iterable[bytes], size: int) -> bytes:
    """The first ``size`` octets (at most HEADER_LIMIT) of a content that comes in pieces."""
    wanted = min(size, HEADER_LIMIT)
    header = b""
    for piece in pieces:
        header += piece[: wanted - len(header)]
        if len(header) >= wanted:
            break
    return header


def supplied(header: bytes, envelope: Envelope, hostname: str, id: str, now: float) -> bytes:
    """The fields that are missing, each with its CRLF; ``b""`` where all are there.

    ``header``: the header section, without the empty line that ends it. Content that begins with
    no field at all has none: what is supplied then ends with the empty line that it lacks.
    ``now``: Unix seconds. ``From`` is the sender of the envelope, unless that is null."""
    there = {match[1].lower() for match in _FIELD.finditer(header)}
    fields = []
    if b"date" not in there:
        fields.append(f"Date: {date_header(now)}")
    if b"from" not in there and envelope.mail_from:
        fields.append(f"From: <{envelope.mail_from}>")
    if b"message-id" not in there:
        fields.append(f"Message-ID: <{id}@{hostname}>")
    if header and not _FIRST.match(header):
        fields.append("")
    return "".join(f"{field}\r\n" for field in fields).encode()
