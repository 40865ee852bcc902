"""Header fields taken apart: the section, parameters, mailboxes, dates, ids.

Owns RFC 5322 and RFC 2231 syntax as mail really uses it. Knows no MIME structure. Never
raises for what it is given, never looks twice at the same octets without a bound.

A line that is no field is read over if fields follow it; the body begins there if none do.

RFC 5322 §3.2–3.6 and §4 (the obsolete forms too), RFC 2045 §5.1, RFC 2183, RFC 2231,
RFC 6854 (groups anywhere).
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Container
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

from .words import Problems, decode_words, text_of

#: Octets and fields of one header section.
HEADER_LIMIT, FIELD_LIMIT = 256 * 1024, 2000
#: Segments of one RFC 2231 value, and parameters of one field.
SEGMENT_LIMIT, PARAMETER_LIMIT = 1000, 1000
#: Tokens of all address fields of one name; nesting of comments.
TOKEN_LIMIT, NESTING_LIMIT = 10_240, 50

_FIELD: Final = re.compile(rb"([!-9;-~]+)[ \t]*:([^\n]*(?:\n[ \t][^\n]*)*)(?:\n|\Z)")


@dataclass
class Mailbox:
    """One mailbox (RFC 5322 §3.4): ``name`` decoded, ``""`` if there is none; ``address`` as written."""

    name: str
    address: str


@dataclass
class Section:
    """A header section: ``(name as sent, unfolded value)``, and where the body begins.

    ``whole``: False where a limit ended it; then ``body`` is where reading stopped."""

    fields: list[tuple[str, bytes]]
    body: int
    whole: bool


def read_section(
    content: bytes,
    start: int,
    end: int,
    delimiters: Container[bytes],
    problems: Problems,
    where: str,
    fields_left: int = FIELD_LIMIT,
) -> Section:
    """The header section at ``start``. ``delimiters``: boundaries of the multiparts around it; a
    line that is one of theirs ends it, empty line or not."""
    fields: list[tuple[str, bytes]] = []
    limit = min(end, start + HEADER_LIMIT)
    stray = -1  # where a run of lines that are no fields began
    at = body = start
    while at < limit:
        newline = content.find(b"\n", at, limit)
        following = newline + 1 if newline >= 0 else limit
        line = content[at:following] if following - at < 3 else b""
        if line in (b"\n", b"\r\n"):
            body = following
            break
        if delimiters and content.startswith(b"--", at) and is_delimiter(content[at:following].rstrip(b"\r\n"), delimiters):
            body = at
            break
        match = _FIELD.match(content, at, limit)
        if match is None:
            stray = at if stray < 0 else stray
            at = following
            continue
        if match.end() == limit < end:
            at = limit
            break
        if len(fields) >= fields_left:
            problems.note(f"{where}: over {fields_left} header fields, the rest is not taken apart")
            return Section(fields, at, False)
        if stray >= 0:
            problems.note(f"{where}: a line that is no header field, read over")
            stray = -1
        value = match[2]
        if value.find(b"\n") >= 0:
            value = value.replace(b"\r\n", b"").replace(b"\n", b"")
        fields.append((match[1].decode("ascii"), value.strip(b" \t\r")))
        at = body = match.end()
    if at >= limit and limit < end:
        problems.note(f"{where}: header over {HEADER_LIMIT} octets, the rest is not taken apart")
        return Section(fields, at, False)
    if stray >= 0:
        problems.note(f"{where}: the header ends without an empty line")
        body = stray
    return Section(fields, body, True)


def is_delimiter(line: bytes, delimiters: Container[bytes]) -> bool:
    """A line of this section's surroundings (RFC 2046 §5.1.1), ``line`` without its line end."""
    key = line[2:].rstrip(b" \t\r")
    return key in delimiters or (key.endswith(b"--") and key[:-2] in delimiters)


# ---------------------------------------------------------------- parameters

#: Matches everywhere: what is no "name=value" is gone over up to the next semicolon. Nothing is given
#: back that was once taken: a long row of semicolons would cost its length for each of them.
_PARAMETER = re.compile(r'[\s;]*+(?:([^\s=;"]++)\s*+(?:=\s*+("[^"\\]*(?:\\.[^"\\]*)*"|[^;]*)|(?=;|\Z))|[^;]*+)', re.DOTALL)
_SECTIONED: Final = re.compile(r"([^*]+)\*(?:(\d{1,9})(\*)?)?\Z")
_ESCAPED: Final = re.compile(r'\\(["\\])')
_PERCENT: Final = re.compile(r"%([0-9A-Fa-f]{2})")


def parameters(value: str, problems: Problems, where: str) -> tuple[str, dict[str, str]]:
    """``(what stands before the first ";", parameters by lower-case name)``, decoded.

    RFC 2231 wins over the plain form of the same name (RFC 6266 §4.3); of the plain form the
    first counts. Encoded words are decoded too: they are wrong here, and everywhere."""
    main, _, rest = value.partition(";")
    plain: dict[str, str] = {}
    sectioned: dict[str, dict[int, tuple[bool, str]]] = {}
    at, count = 0, 0
    while at < len(rest):
        count += 1
        if count > PARAMETER_LIMIT:
            problems.note(f"{where}: over {PARAMETER_LIMIT} parameters, the rest is left out")
            break
        match = _PARAMETER.match(rest, at)
        assert match is not None  # see above
        at = match.end()
        given = match[2]
        if given is None:
            continue
        name = match[1].lower()
        text = _ESCAPED.sub(r"\1", given[1:-1]) if given.startswith('"') and len(given) > 1 and given.endswith('"') else given.strip()
        section = _SECTIONED.match(name)
        if section is None:
            plain.setdefault(name, text)
            continue
        number = int(section[2] or 0)
        if number >= SEGMENT_LIMIT:
            problems.note(f"{where}: a parameter has over {SEGMENT_LIMIT} parts, the rest is left out")
            continue
        extended = section[3] is not None or section[2] is None
        sectioned.setdefault(section[1], {}).setdefault(number, (extended, text))
    found = {name: decode_words(text, problems, where) for name, text in plain.items()}
    for name, segments in sectioned.items():
        found[name] = _extended(segments, problems, where)
    return main.strip(), found


def _extended(segments: dict[int, tuple[bool, str]], problems: Problems, where: str) -> str:
    """An RFC 2231 value: its segments in order, up to the first that is missing."""
    charset: str | None = None
    octets = bytearray()
    for number in range(len(segments)):
        if number not in segments:
            problems.note(f"{where}: a parameter has a part missing, cut there")
            break
        extended, text = segments[number]
        if extended and number == 0 and text.count("'") >= 2:
            charset, _, text = text.split("'", 2)
        raw = text.encode("utf-8")
        octets += binascii.a2b_qp(_percent_to_quoted(raw)) if extended else raw
    return text_of(bytes(octets), charset or None, problems, where)


def _percent_to_quoted(raw: bytes) -> bytes:
    """%XX as =XX, so that the decoder written in C does the work; an "=" of its own stays one."""
    return re.sub(rb"%(?=[0-9A-Fa-f]{2})", b"=", raw.replace(b"=", b"=3D"))


# ------------------------------------------------------------------ mailboxes

_QUOTED = r'(?P<quoted>"[^"\\]*(?:\\.[^"\\]*)*")|'
_TOKENS = (
    r"(?P<space>[ \t\r\n]+)"
    r"|(?P<literal>\[[^\[\]<>,;]*\])"
    r"|(?P<special>[<>,;:()@])"
    r"|(?P<word>=\?[^?\s]{1,60}\?[bBqQ]\?[^?\s]*\?=)"
    r'|(?P<text>[^ \t\r\n"<>,;:()@\[]+)'
    r"|(?P<other>.)"
)
_TOKEN: Final = re.compile(_QUOTED + _TOKENS, re.DOTALL)
#: Behind a quote that nothing closes no other is closed: looking again would cost its length each time.
_TOKEN_WITHOUT_QUOTES: Final = re.compile(_TOKENS, re.DOTALL)
#: A whole mailbox of the usual kinds, its comma included: "name" <address>, name <address>, address.
_USUAL: Final = re.compile(
    r"""[ ]*(?:(?:"([^"\\]*)"[ ]*|([^"\\<>,;:()@\[\]\t\r\n]*))<([^\s"\\<>,;:()@\[\]]+@[^\s"\\<>,;:()@\[\]]+)>"""
    r"""|([^\s"\\<>,;:()@\[\]]+@[^\s"\\<>,;:()@\[\]]+))[ ]*(?:,|\Z)"""
)
#: What such a mailbox counts for in tokens.
_USUAL_TOKENS: Final = 8
_UNQUOTED: Final = re.compile(r"\\(.)", re.DOTALL)
_SPACES: Final = re.compile(r"[ \t\r\n]+")
_COMMENT: Final = re.compile(r"\\.|[()]", re.DOTALL)


class _Reading:
    """One address list on its way to mailboxes."""

    def __init__(self, problems: Problems, where: str) -> None:
        self.problems = problems
        self.where = where
        self.found: list[Mailbox] = []
        self.tokens = 0
        self.begin()

    def begin(self) -> None:
        # Pieces of the phrase, or of an address without brackets: (quoted, text as written).
        self.phrase: list[tuple[bool, str]] = []
        self.angle: list[str] | None = None
        # What follows the closing bracket: the name of a next mailbox whose comma is missing.
        self.after: list[tuple[bool, str]] = []
        self.comments: list[str] = []

    def read(self, text: str) -> bool:
        """False once there were too many tokens."""
        self.begin()
        grouped = closed = False
        fresh = True  # a mailbox may begin here
        pattern = _TOKEN
        commented = True
        at = following = 0
        while at < len(text):
            if self.tokens > TOKEN_LIMIT:
                self.problems.note(f"{self.where}: over {TOKEN_LIMIT} tokens, the rest is left out")
                return False
            usual = _USUAL.match(text, at) if fresh else None
            if usual and "=?" not in (usual[4] or ""):
                self.tokens += _USUAL_TOKENS
                quoted, phrase, inside, bare = usual.groups()
                name = quoted if quoted is not None else _SPACES.sub(" ", phrase or "").strip(" ")
                self.found.append(Mailbox(decode_words(name, self.problems, self.where), inside or bare))
                at = usual.end()
                continue
            fresh = False
            self.tokens += 1
            match = pattern.match(text, at)
            assert match is not None  # `other` takes any character
            kind, token = match.lastgroup, match[0]
            if token == '"':
                pattern = _TOKEN_WITHOUT_QUOTES
            at = match.end()
            comment = None
            if token == "(" and commented:
                comment, following = self._comment(text, at)
                # Without an end it is no comment, and what follows is not looked at as one.
                commented = comment is not None
            if comment is not None:
                at = following
                self.comments.append(comment)
                if self.angle is None:
                    self.phrase.append((False, " "))
            elif token == "<" and (self.angle is None or closed):
                if closed:
                    name = self.after
                    self.problems.note(f"{self.where}: a comma is missing between two mailboxes")
                    self.finish()
                    self.begin()
                    self.phrase = name
                self.angle, closed = [], False
            elif token == ">" and self.angle is not None:
                closed = True
            elif token == "," or (token == ";" and not (self.angle is not None and not closed)):
                if self.angle is not None and not closed and token == ",":
                    # A source route "<@a,@b:c@d>": its commas are inside the brackets.
                    if self.angle and self.angle[0] == "@":
                        self.angle.append(token)
                        continue
                    self.problems.note(f"{self.where}: an address without its closing bracket")
                self.finish()
                self.begin()
                closed, fresh = False, True
                grouped = grouped and token != ";"
            elif token == ":" and self.angle is None and not grouped:
                grouped = fresh = True
                self.begin()
            elif self.angle is not None:
                if closed:
                    self.after.append((kind == "quoted", " " if kind == "space" else token))
                elif kind != "space":
                    self.angle.append(token)
            else:
                self.phrase.append((kind == "quoted", " " if kind == "space" else token))
        if self.angle is not None and not closed:
            self.problems.note(f"{self.where}: an address without its closing bracket")
        self.finish()
        return True

    def _comment(self, text: str, at: int) -> tuple[str | None, int]:
        """The comment whose "(" was read, and where the text goes on; None if it has no end."""
        start, depth = at, 1
        for match in _COMMENT.finditer(text, at):
            self.tokens += 1
            if self.tokens > TOKEN_LIMIT:
                # The reader of tokens says so.
                return text[start : match.start()], match.end()
            if match[0] == "(":
                depth += 1
                if depth > NESTING_LIMIT:
                    self.problems.note(f"{self.where}: comments nested over {NESTING_LIMIT} deep, the rest is left out")
                    return text[start : match.start()], len(text)
            elif match[0] == ")":
                depth -= 1
                if not depth:
                    return _UNQUOTED.sub(r"\1", text[start : match.start()]), match.end()
        self.problems.note(f"{self.where}: a comment without its end")
        return None, start

    def finish(self) -> None:
        """A mailbox ends here."""
        if self.angle is not None:
            address = "".join(self.angle)
            if address.startswith("@") and ":" in address:
                address = address.partition(":")[2]
            name = self._text(self.phrase)
        else:
            address, name = self._bare()
        if not name and self.comments:
            name = decode_words(" ".join(" ".join(self.comments).split()), self.problems, self.where)
        if address or name:
            if "@" not in address:
                self.problems.note(f"{self.where}: a mailbox without a whole address")
            self.found.append(Mailbox(name, address))

    def _bare(self) -> tuple[str, str]:
        """``(address, name)`` of a mailbox without brackets."""
        words: list[str] = []
        joining = spaced = False
        for quoted, text in self.phrase:
            if not quoted and text == " ":
                spaced = True
                continue
            # White space around "@" and dots is allowed (RFC 5322 §4.4).
            if words and (joining or not spaced or text == "@" or text.startswith(".")):
                words[-1] += text
            else:
                words.append(text)
            spaced = False
            joining = not quoted and text.endswith(("@", "."))
        for number, word in enumerate(words):
            if ("@" in word and not word.startswith('"')) or word.rfind("@") > word.rfind('"'):
                rest = words[:number] + words[number + 1 :]
                return word, self._text([(word.startswith('"') and len(word) > 1, word + " ") for word in rest])
        if len(words) == 1:
            return ("", self._text(self.phrase)) if "=?" in words[0] or words[0].startswith('"') else (words[0], "")
        return "", self._text(self.phrase)

    def _text(self, pieces: list[tuple[bool, str]]) -> str:
        """A phrase as text: quotes off, white space single, encoded words decoded."""
        texts: list[str] = []
        plain = ""
        for quoted, text in [*pieces, (True, "")]:
            if not quoted:
                plain += text
                continue
            # White space inside quotes and encoded words is data, outside it is one space.
            plain = _SPACES.sub(" ", plain)
            texts.append(decode_words(plain if texts else plain.lstrip(" "), self.problems, self.where))
            plain = ""
            bare = text.rstrip(" ")
            inner = _UNQUOTED.sub(r"\1", bare[1:-1]) if len(bare) > 1 else ""
            texts.append(decode_words(inner, self.problems, self.where))
            plain = text[len(bare) :]
        while texts and not texts[-1].strip(" "):
            texts.pop()
        if texts and not pieces[-1][0]:
            texts[-1] = texts[-1].rstrip(" ")
        return "".join(texts)


def mailboxes(values: list[str], problems: Problems, where: str) -> list[Mailbox]:
    """The mailboxes of all these field values, groups flattened; ``values`` unfolded, not decoded."""
    reading = _Reading(problems, where)
    for value in values:
        if not reading.read(value):
            break
    return reading.found


# --------------------------------------------------------------- dates and ids

_ID: Final = re.compile(r"<([^<>]*)>")


def date(value: str, problems: Problems) -> datetime | None:
    """A Date field (RFC 5322 §3.3, the obsolete forms too) with its offset; ``-0000`` is UTC."""
    try:
        moment = parsedate_to_datetime(value[:256])
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        moment.isoformat()
    except (ValueError, TypeError, IndexError, OverflowError, AttributeError):
        problems.note("Date: unreadable")
        return None
    return moment


def ids(value: str) -> list[str]:
    """Message ids (RFC 5322 §3.6.4) without their brackets; words with an ``@`` where there are no brackets."""
    found = ["".join(match.split()) for match in _ID.findall(value)]
    if not found:
        found = [word for word in value.split() if "@" in word and "<" not in word]
    return [word for word in found if word]
