"""Content taken apart: its parts, the text, the attachments.

Owns MIME structure. One pass over the octets finds every line that begins with ``--`` and
looks it up among the boundaries that are open, so the work is linear however deep the
nesting is. What is not taken apart (too deep, too many, over a limit) becomes one attachment
with its octets as they stand: nothing is lost, and ``problems`` says so.

Knows no message of ours, no clock, no file. Nothing raises for what it is given.

RFC 2045, RFC 2046 §5.1 (multiparts; the outer boundary wins), RFC 2183 (a disposition
nobody knows is ``attachment``), RFC 2387.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from .fields import FIELD_LIMIT, Mailbox, date, ids, mailboxes, parameters, read_section
from .words import Problems, base64_octets, decode_words, field_text, quoted_printable_octets, text_of

#: Parts of one message, nesting of multiparts, octets of a boundary.
PART_LIMIT, DEPTH_LIMIT, BOUNDARY_LIMIT = 1000, 100, 2048
#: Header fields of all parts together.
PART_FIELDS = 10_000
#: Semicolons, each of which may begin a parameter, of all fields that have some together.
PARAMETERS = 10_000
#: Lines that begin with "--" and are no delimiter: so many, and one more per so many octets.
STRAY_LIMIT, STRAY_SHARE = 10_000, 64

_TYPE: Final = re.compile(r"\s*([^\s/;()<>@,\\\":=\[\]?]+)/([^\s/;()<>@,\\\":=\[\]?]+)")


@dataclass
class Attachment:
    """A part that is not the text or the html of the message.

    ``filename`` is what the sender wrote, decoded: text, never a path to use. ``content_type``
    in lower case without parameters. ``disposition``: ``inline``, ``attachment`` or None.
    ``content_id`` without angle brackets. ``content``: the octets, transfer encoding undone."""

    filename: str | None
    content_type: str
    disposition: str | None
    content_id: str | None
    content: bytes = field(repr=False)

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass
class Parsed:
    """A message taken apart; field by field what the standard webhook body tells.

    ``headers``: every field in order, name as sent, value unfolded and decoded. ``text`` and
    ``html``: line ends ``\\n``; None if there is none. ``problems``: what was broken and how it
    was taken. ``raw``: the whole content, only where it could not be taken apart at all."""

    headers: list[tuple[str, str]] = field(default_factory=list)
    subject: str = ""
    from_: list[Mailbox] = field(default_factory=list)
    to: list[Mailbox] = field(default_factory=list)
    cc: list[Mailbox] = field(default_factory=list)
    reply_to: list[Mailbox] = field(default_factory=list)
    date: datetime | None = None
    message_id: str | None = None
    in_reply_to: str | None = None
    references: list[str] = field(default_factory=list)
    text: str | None = None
    html: str | None = None
    attachments: list[Attachment] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    raw: bytes | None = field(default=None, repr=False)

    def header(self, name: str) -> str | None:
        """The first header field of this name, in any case; None if there is none."""
        name = name.lower()
        return next((value for given, value in self.headers if given.lower() == name), None)


def parse(content: bytes) -> Parsed:
    """Take ``content`` apart. Never raises: a fault of our own gives a Parsed with ``raw``."""
    try:
        return take_apart(content)
    except Exception as fault:
        return Parsed(raw=content, problems=[f"could not be taken apart: {type(fault).__name__}"])


def take_apart(content: bytes) -> Parsed:
    """``parse`` without its net, for tests: what this raises is a bug."""
    problems = Problems()
    section = read_section(content, 0, len(content), (), problems, "message")
    parsed = Parsed(problems=problems)
    _read_fields(parsed, section.fields, problems)
    if not section.whole:
        parsed.raw = content
        return parsed
    _Body(content, parsed, problems).read(section.fields, section.body)
    return parsed


def _read_fields(parsed: Parsed, fields: list[tuple[str, bytes]], problems: Problems) -> None:
    addresses: dict[str, list[str]] = {"from": [], "to": [], "cc": [], "reply-to": []}
    first: dict[str, str] = {}
    for name, raw in fields:
        text = field_text(raw, problems, name)
        parsed.headers.append((name, decode_words(text, problems, name)))
        key = name.lower()
        if key in addresses:
            addresses[key].append(text)
        elif key in _FIRST and key not in first:
            first[key] = text if key != "subject" else parsed.headers[-1][1]
    parsed.subject = first.get("subject", "")
    parsed.from_ = mailboxes(addresses["from"], problems, "From")
    parsed.to = mailboxes(addresses["to"], problems, "To")
    parsed.cc = mailboxes(addresses["cc"], problems, "Cc")
    parsed.reply_to = mailboxes(addresses["reply-to"], problems, "Reply-To")
    if "date" in first:
        parsed.date = date(first["date"], problems)
    own = ids(first.get("message-id", "")) or first.get("message-id", "").split()
    parsed.message_id = own[0].strip("<>") if own else None
    parsed.in_reply_to = next(iter(ids(first.get("in-reply-to", ""))), None)
    parsed.references = ids(first.get("references", ""))


_FIRST: Final = frozenset(("subject", "date", "message-id", "in-reply-to", "references"))


@dataclass
class _Multipart:
    """A multipart whose delimiters are looked for. ``kind``: type of parts that say none."""

    boundary: bytes
    kind: str
    body: int
    encoding: str
    seen: bool = False


@dataclass
class _Leaf:
    """A part whose end is not found yet."""

    body: int
    content_type: str = "application/octet-stream"
    charset: str | None = None
    encoding: str = ""
    disposition: str | None = None
    filename: str | None = None
    content_id: str | None = None


class _Body:
    def __init__(self, content: bytes, parsed: Parsed, problems: Problems) -> None:
        self.content = content
        self.parsed = parsed
        self.problems = problems
        self.stack: list[_Multipart] = []
        self.depths: dict[bytes, int] = {}  # boundary → index into stack
        self.leaf: _Leaf | None = None
        self.parts = 0
        self.fields_left = PART_FIELDS
        self.parameters_left = PARAMETERS

    def read(self, fields: list[tuple[str, bytes]], body: int) -> None:
        content, size = self.content, len(self.content)
        self._begin(fields, body, "text/plain")
        strays = STRAY_LIMIT + size // STRAY_SHARE
        at = -1
        if self.depths:
            # The body itself starts a line.
            at = body if content.startswith(b"--", body) else self._next(body)
        while at >= 0 and self.depths:
            newline = content.find(b"\n", at, at + BOUNDARY_LIMIT + 64)
            end = newline if newline >= 0 else min(size, at + BOUNDARY_LIMIT + 64)
            key = content[at + 2 : end].rstrip(b" \t\r")
            depth = self.depths.get(key)
            closing = depth is None and key.endswith(b"--")
            if closing:
                depth = self.depths.get(key[:-2])
            if depth is None:
                strays -= 1
                if strays < 0:
                    self.problems.note("body: too many lines that begin with --, the rest is not taken apart")
                    return self._rest(at)
                at = self._next(end)
                continue
            self._leave(depth + 1, self._before(at))
            multipart = self.stack[depth]
            multipart.seen = True
            if closing:
                # What follows is the epilogue: it ends at a delimiter of the outer multipart.
                del self.depths[multipart.boundary]
                at = self._next(end)
                continue
            following = newline + 1 if newline >= 0 else size
            if self.parts >= PART_LIMIT:
                self.problems.note(f"body: over {PART_LIMIT} parts, the rest is not taken apart")
                return self._rest(following)
            section = read_section(content, following, size, self.depths, self.problems, "part", min(FIELD_LIMIT, self.fields_left))
            self.fields_left -= len(section.fields)
            if section.whole:
                self._begin(section.fields, section.body, multipart.kind)
            else:
                self.parts += 1
                self.leaf = _Leaf(following)
            # The body may begin with a delimiter: then the line end before it is the one to find.
            at = self._next(section.body - 1)
        return self._leave(0, size)

    def _next(self, at: int) -> int:
        """Where the next line that begins with ``--`` does so; a line may start right after ``at``."""
        found = self.content.find(b"\n--", at)
        return found + 1 if found >= 0 else -1

    def _rest(self, at: int) -> None:
        """Everything from here on is one attachment."""
        if self.leaf is None:
            self.leaf = _Leaf(at)
        self._end_leaf(len(self.content))

    def _leave(self, depth: int, end: int) -> None:
        """The open leaf ends before ``end``, and so do the multiparts from this depth on."""
        self._end_leaf(end)
        for multipart in self.stack[depth:]:
            if self.depths.pop(multipart.boundary, None) is None:
                continue
            if multipart.seen:
                self.problems.note("body: a multipart without its end")
                continue
            # It is not what it claims to be, but people may want to read it.
            self.problems.note("body: a multipart without its boundary, taken as text")
            self.leaf = _Leaf(multipart.body, "text/plain", encoding=multipart.encoding)
            self._end_leaf(end)
        del self.stack[depth:]

    def _parameters(self, value: str, where: str) -> tuple[str, dict[str, str]]:
        self.parameters_left -= value.count(";")
        if self.parameters_left >= 0:
            return parameters(value, self.problems, where)
        self.problems.note(f"{where}: over {PARAMETERS} parameters in all parts, the rest is left out")
        return value.partition(";")[0].strip(), {}

    def _begin(self, fields: list[tuple[str, bytes]], body: int, kind: str) -> None:
        """A part whose header was read: push a multipart, or open a leaf."""
        self.parts += 1
        given: dict[str, str] = {}
        for given_name, raw in fields:
            key = given_name.lower()
            if key in _OURS:
                if key in given:
                    self.problems.note(f"{given_name}: given twice, the first counts")
                else:
                    given[key] = field_text(raw, self.problems, given_name)
        name: str | None = None
        charset: str | None = None
        boundary = ""
        if "content-type" in given:
            main, params = self._parameters(given["content-type"], "Content-Type")
            match = _TYPE.match(main)
            name = params.get("name")
            charset = re.split(r"[\s(]", params.get("charset", "").strip(), maxsplit=1)[0].strip("'\"") or None
            boundary = params.get("boundary", "")
            if match:
                kind = f"{match[1]}/{match[2]}".lower()
            elif main or params:
                self.problems.note(f"Content-Type: {main!r:.80} is no media type")
                kind = "text/plain" if name is None else "application/octet-stream"
        disposition: str | None = None
        filename: str | None = None
        if "content-disposition" in given:
            main, params = self._parameters(given["content-disposition"], "Content-Disposition")
            word = main.split(None, 1)[0].lower() if main.strip() else ""
            disposition = "inline" if word == "inline" else "attachment" if word else None
            filename = params.get("filename")
        encoding = given.get("content-transfer-encoding", "").partition("(")[0].strip(" \t\"';").lower()
        if kind.startswith("multipart/") and disposition != "attachment":
            delimiter = boundary.encode("utf-8").rstrip(b" \t\r")
            if not delimiter:
                self.problems.note("body: a multipart names no boundary, taken as text")
                kind = "text/plain"
            elif self._push(_Multipart(delimiter, "message/rfc822" if kind == "multipart/digest" else "text/plain", body, encoding)):
                return
        found = ids(given.get("content-id", "")) or given.get("content-id", "").strip("<> \t").split()
        self.leaf = _Leaf(
            body,
            kind,
            charset,
            encoding,
            disposition,
            filename if filename is not None else name,
            found[0] if found else None,
        )

    def _push(self, multipart: _Multipart) -> bool:
        """False: it is left in one piece."""
        if len(multipart.boundary) > BOUNDARY_LIMIT:
            self.problems.note(f"body: a boundary over {BOUNDARY_LIMIT} octets, not taken apart")
        elif len(self.stack) >= DEPTH_LIMIT:
            self.problems.note(f"body: multiparts nested over {DEPTH_LIMIT} deep, not taken apart")
        elif multipart.boundary in self.depths:
            self.problems.note("body: a multipart has the boundary of the one around it, not taken apart")
        else:
            self.depths[multipart.boundary] = len(self.stack)
            self.stack.append(multipart)
            self.leaf = None
            return True
        return False

    def _end_leaf(self, end: int) -> None:
        leaf, self.leaf = self.leaf, None
        if leaf is None:
            return
        end = max(leaf.body, end)
        encoded = leaf.encoding
        where = leaf.content_type
        if encoded == "base64":
            octets = base64_octets(self.content, self.problems, where, leaf.body, end)
        else:
            octets = self.content[leaf.body : end]
            if encoded == "quoted-printable":
                octets = quoted_printable_octets(octets, self.problems, where)
            elif encoded not in ("", "7bit", "8bit", "binary"):
                self.problems.note(f"{where}: unknown transfer encoding {encoded!r:.60}, left as it was")
        parsed = self.parsed
        if leaf.disposition != "attachment":
            if leaf.content_type == "text/plain" and parsed.text is None:
                parsed.text = self._text(octets, leaf.charset, "text")
                return
            if leaf.content_type == "text/html" and parsed.html is None:
                parsed.html = self._text(octets, leaf.charset, "html")
                return
        parsed.attachments.append(Attachment(leaf.filename, leaf.content_type, leaf.disposition, leaf.content_id, octets))

    def _before(self, at: int) -> int:
        """The line end before a delimiter belongs to the delimiter (RFC 2046 §5.1.1)."""
        return at - 2 if self.content.endswith(b"\r\n", 0, at) else at - 1

    def _text(self, octets: bytes, charset: str | None, where: str) -> str:
        text = text_of(octets, charset, self.problems, where)
        return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


_OURS: Final = frozenset(("content-type", "content-transfer-encoding", "content-disposition", "content-id"))
