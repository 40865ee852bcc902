"""Replies as values (RFC 5321 §4.2, RFC 2034, RFC 3463).

Owns what a reply is and how it looks on the wire. Knows no command and no session.
A Reply refuses CR, LF and control characters whoever wrote the text: answers of
webhooks and upstreams become replies, and must never become a second one.
"""

from __future__ import annotations

import re

_ENHANCED = re.compile(r"[245]\.\d{1,3}\.\d{1,3}")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
#: Octets of text in one reply line (RFC 5321 §4.5.3.1.5: 512 with code and CRLF).
_LINE = 480


class Reply:
    """One SMTP reply: ``code`` (200–599), ``enhanced`` (``"2.1.0"`` or ``""``), ``text``.

    ``wire`` is what goes out, CRLF included; text over one line is folded into a
    multi-line reply. Raises ValueError for text with controls, for a code outside
    200–599 and for an enhanced code of another class than the code.
    """

    __slots__ = ("code", "enhanced", "text", "wire")

    code: int
    enhanced: str
    text: str
    wire: bytes

    def __init__(self, code: int, enhanced: str, text: str) -> None:
        if not 200 <= code <= 599:
            raise ValueError(f"reply code {code} is not within 200-599")
        if enhanced and not (_ENHANCED.fullmatch(enhanced) and enhanced[0] == str(code)[0]):
            raise ValueError(f"enhanced code {enhanced!r} does not fit reply code {code}")
        if _CONTROLS.search(text):
            raise ValueError(f"reply text {text!r} has control characters")
        self.code = code
        self.enhanced = enhanced
        self.text = text
        self.wire = _encode(code, enhanced, text)

    @classmethod
    def ok(cls, text: str) -> Reply:
        """250 2.0.0 with a text of our own making (ASCII, no controls, under 480 octets): once
        per accepted message, so nothing is looked over again."""
        self = cls.__new__(cls)
        self.code, self.enhanced, self.text = 250, "2.0.0", text
        self.wire = b"250 2.0.0 %s\r\n" % text.encode()
        return self

    @classmethod
    def untrusted(cls, code: int, text: str) -> Reply:
        """A Reply made of an upstream's or a webhook's words: controls become ``?``, an
        enhanced code at the start of the text is taken as such, 1,024 characters are kept.
        A code that is no 2yz, 4yz or 5yz becomes 451."""
        if not (200 <= code <= 299 or 400 <= code <= 599):
            code = 451
        text = _CONTROLS.sub("?", text)[:1024].strip()
        first, _, rest = text.partition(" ")
        if _ENHANCED.fullmatch(first) and first[0] == str(code)[0]:
            return cls(code, first, rest)
        return cls(code, "", text)

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
        return " ".join(part for part in (str(self.code), self.enhanced, self.text) if part)


def _encode(code: int, enhanced: str, text: str) -> bytes:
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
