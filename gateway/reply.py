"""Replies as values (RFC 5321 §4.2, RFC 2034, RFC 3463).

Owns what a reply is and how it looks on the wire. Knows no command and no session.
A Reply refuses CR, LF and control characters whoever wrote the text: answers of
webhooks and upstreams become replies, and must never become a second one.
"""

from __future__ import annotations

import re
from typing import Final

from mypy_extensions import mypyc_attr

_ENHANCED: Final = re.compile(r"[245]\.\d{1,3}\.\d{1,3}")
#: What upstreams say nearly always: these need not be matched.
_USUAL: Final = frozenset(("2.0.0", "2.1.0", "2.1.5", "2.6.0", "4.0.0", "5.0.0"))
#: None of them is printable in the sense of ``str.isprintable``, which is asked first: it takes a tenth of the time.
_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
#: Octets of text in one reply line (RFC 5321 §4.5.3.1.5: 512 with code and CRLF).
_LINE: Final = 480
#: Characters that are kept of an upstream's reply.
_KEPT: Final = 1024


@mypyc_attr(acyclic=True)
class Reply:
    """One SMTP reply: ``code`` (200–599), ``enhanced`` (``"2.1.0"`` or ``""``), ``text``.

    ``wire`` is what goes out, CRLF included; text over one line is folded into a
    multi-line reply. Raises ValueError for text with controls, for a code outside
    200–599 and for an enhanced code of another class than the code.
    """

    __slots__ = ("_said", "code", "enhanced", "text", "wire")

    code: int
    enhanced: str
    text: str
    wire: bytes

    def __init__(self, code: int, enhanced: str, text: str, wire: bytes = b"") -> None:
        """``wire``: how it looks, where the caller vouches for it."""
        self._said = ""  # as str() gave it: those that are said over and over are told over and over
        if wire:
            self.code, self.enhanced, self.text, self.wire = code, enhanced, text, wire
            return
        if not 200 <= code <= 599:
            raise ValueError(f"reply code {code} is not within 200-599")
        if enhanced and not _fits(enhanced, code):
            raise ValueError(f"enhanced code {enhanced!r} does not fit reply code {code}")
        if not text.isprintable() and _CONTROLS.search(text):
            raise ValueError(f"reply text {text!r} has control characters")
        self.code = code
        self.enhanced = enhanced
        self.text = text
        self.wire = _encode(code, enhanced, text)

    @staticmethod
    def ok(text: str) -> Reply:
        """250 2.0.0 with a text of our own making (ASCII, no controls, under 480 octets): once
        per accepted message, so nothing is looked over again."""
        return Reply(250, "2.0.0", text, b"250 2.0.0 " + text.encode() + b"\r\n")

    @staticmethod
    def untrusted(code: int, text: str) -> Reply:
        """A Reply made of an upstream's or a webhook's words: controls become ``?``, an
        enhanced code at the start of the text is taken as such, 1,024 characters are kept.
        A code that is no 2yz, 4yz or 5yz becomes 451."""
        if not (200 <= code <= 299 or 400 <= code <= 599):
            code = 451
        if not text.isprintable():
            text = _CONTROLS.sub("?", text)
        if len(text) > _KEPT:
            text = text[:_KEPT]
        text = text.strip()
        first, _, rest = text.partition(" ")
        if _fits(first, code):
            return Reply(code, first, rest, _encode(code, first, rest))
        return Reply(code, "", text, _encode(code, "", text))

    @property
    def positive(self) -> bool:
        return self.code < 400

    @property
    def temporary(self) -> bool:
        return 400 <= self.code < 500

    @property
    def permanent(self) -> bool:
        return self.code >= 500

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reply) and self.wire == other.wire

    def __hash__(self) -> int:
        return hash(self.wire)

    def __repr__(self) -> str:
        return f"Reply({self.code}, {self.enhanced!r}, {self.text!r})"

    def __str__(self) -> str:
        said = self._said
        if not said:
            if self.enhanced and self.text:
                said = f"{self.code} {self.enhanced} {self.text}"
            else:
                said = " ".join([part for part in (str(self.code), self.enhanced, self.text) if part])
            self._said = said
        return said


def _fits(enhanced: str, code: int) -> bool:
    """It is an enhanced code, and of this code's class."""
    return (enhanced in _USUAL or _ENHANCED.fullmatch(enhanced) is not None) and ord(enhanced[0]) - 48 == code // 100


def _encode(code: int, enhanced: str, text: str) -> bytes:
    if len(text) <= _LINE // 4:
        # One line, whatever its characters are.
        line = f"{code} {enhanced} {text}\r\n" if enhanced else f"{code} {text}\r\n"
        return line.encode("utf-8", "replace")
    prefix = f"{enhanced} ".encode() if enhanced else b""
    octets = text.encode("utf-8", "replace")
    if len(octets) <= _LINE:
        return b"%d %s%s\r\n" % (code, prefix, octets)
    lines = []
    while octets:
        cut = min(_LINE, len(octets))
        # Never inside a UTF-8 sequence: each line must decode on its own.
        while 0 < cut < len(octets) and octets[cut] & 0xC0 == 0x80:
            cut -= 1
        lines.append(prefix + octets[:cut])
        octets = octets[cut:]
    last = lines.pop()
    return b"".join(b"%d-%s\r\n" % (code, line) for line in lines) + b"%d %s\r\n" % (code, last)
