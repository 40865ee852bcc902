"""Several hundred mails: the hand-written ones and a generated rest, the same on every run.

``messages()`` gives those that DATA can carry octet for octet to a strict listener: CRLF ends
every line, the last one too, and there is no NUL. ``classify`` says by reading the octets what
a mail is; it knows nothing of the generator, and ``MINIMA`` holds the corpus to what it claims.
"""

from __future__ import annotations

import base64
import quopri
import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

#: At least so many mails of each class.
MINIMA = {
    "charset": 80,
    "base64": 80,
    "quoted-printable": 60,
    "encoded word": 80,
    "nesting": 50,
    "attachment": 80,
    "dots": 60,
    "8-bit": 80,
    "empty": 10,
    "no header": 15,
    "long line": 30,
    "large": 10,
    "plain": 20,
}

SENTENCES = {
    "utf-8": [
        "Grüße aus Köln",
        "Съешь ещё этих мягких французских булок",
        "日本語のメール、こんにちは",
        "مرحبا بالعالم",
        "emoji 🌍🚀 und ﬁ",
    ],
    "iso-8859-1": ["À bientôt, Renée", "Smørrebrød på Ærø", "¿Qué tal, señor?"],
    "iso-8859-2": ["Zażółć gęślą jaźń", "Příliš žluťoučký kůň"],
    "iso-8859-15": ["zehn € für Œuvre"],
    "windows-1252": ["“quoted” – it’s 5 €…"],
    "windows-1251": ["Широкая электрификация южных губерний"],
    "koi8-r": ["Широкая электрификация южных губерний"],
    "iso-2022-jp": ["日本語のメール"],
    "shift_jis": ["テスト メール 漢字"],
    "euc-jp": ["漢字かな交じり文"],
    "gb2312": ["你好世界"],
    "gb18030": ["你好，镕基"],
    "big5": ["您好，世界"],
    "euc-kr": ["안녕하세요"],
    "iso-8859-7": ["Ξεσκεπάζω την ψυχοφθόρα"],
    "iso-8859-9": ["Fahiş bluz güvencesi"],
    "windows-1256": ["مرحبا"],
    "us-ascii": ["the engine weaves patterns", "plain words and nothing else"],
}
HEADER = b"From: Ada <ada@client.example>\r\nTo: bob@us.example\r\nDate: Sun, 22 Nov 2026 11:00:00 +0100\r\nMIME-Version: 1.0\r\n"


def messages() -> list[tuple[str, bytes]]:
    """``(name, octets)``, names unique, the same in every run."""
    return [(name, octets) for name, octets in everything() if carriable(octets)]


def carriable(octets: bytes) -> bool:
    """DATA carries it to a strict listener and its octets stay what they are."""
    if not octets:
        return True
    return octets.endswith(b"\r\n") and b"\0" not in octets and re.search(rb"\r(?!\n)|(?<!\r)\n", octets) is None


@cache
def everything() -> tuple[tuple[str, bytes], ...]:
    """All of them, those that only BDAT can carry too."""
    found = [(f"written/{path.stem}", path.read_bytes()) for path in sorted((Path(__file__).parent / "mails").glob("*.eml"))]
    source = random.Random("mails")
    for kind, count in KINDS.items():
        found += [(f"{kind.__name__}/{number}", kind(source)) for number in range(count)]
    return tuple(found)


# ------------------------------------------------------------------ by reading

_DECLARED = re.compile(rb"(?im)^content-type:[^\r\n]*(?:\r\n[ \t][^\r\n]*)*?charset\*?=\"?([a-z0-9_.:-]+)")
_ENCODED_WORD = re.compile(rb"=\?([A-Za-z0-9_-]+)(?:\*[A-Za-z-]+)?\?[bBqQ]\?[^?\r\n]*\?=")
_TRANSFER = re.compile(rb"(?im)^content-transfer-encoding:[ \t]*([a-z0-9-]+)")
_MULTIPART = re.compile(rb"(?im)^content-type:[ \t]*multipart/")
_FIELD = re.compile(rb"[!-9;-~]+[ \t]*:")


def classify(octets: bytes) -> frozenset[str]:
    """The classes of a mail, by its octets alone."""
    found: set[str] = set()
    header, _, body = octets.partition(b"\r\n\r\n")
    if octets.startswith(b"\r\n"):
        header, body = b"", octets[2:]
    charsets = {charset.lower() for charset in _DECLARED.findall(octets) + _ENCODED_WORD.findall(octets)}
    if charsets - {b"us-ascii", b"utf-8"}:
        found.add("charset")
    if _ENCODED_WORD.search(header):
        found.add("encoded word")
    encodings = {encoding.lower() for encoding in _TRANSFER.findall(octets)}
    found |= {name for name in ("base64", "quoted-printable") if name.encode() in encodings}
    if len(_MULTIPART.findall(octets)) > 1:
        found.add("nesting")
    if re.search(rb"(?im)^content-disposition:[ \t]*attachment", octets):
        found.add("attachment")
    if re.search(rb"(?:\A|\r\n)\.", octets):
        found.add("dots")
    if not octets.isascii():
        found.add("8-bit")
    if not body.strip():
        found.add("empty")
    if not _FIELD.match(octets):
        found.add("no header")
    if any(len(line) > 998 for line in octets.split(b"\r\n")):
        found.add("long line")
    if len(octets) > 256 * 1024:
        found.add("large")
    if header and body.strip() and not found:
        found.add("plain")
    return frozenset(found)


# ------------------------------------------------------------------- by making


def _lines(source: random.Random, charset: str, count: int) -> str:
    sentences = SENTENCES[charset] + SENTENCES["us-ascii"]
    return "".join(" ".join(source.choice(sentences) for _ in range(source.randint(1, 3))) + "\r\n" for _ in range(count))


def _charset(source: random.Random) -> str:
    return source.choice(list(SENTENCES))


def _subject(source: random.Random, charset: str) -> bytes:
    text = source.choice(SENTENCES[charset]).encode(charset)
    name = charset.encode()
    if charset == "us-ascii":
        return b"Subject: " + text + b"\r\n"
    if source.random() < 0.5:
        return b"Subject: =?" + name + b"?B?" + base64.b64encode(text) + b"?=\r\n"
    quoted = b"".join(b"%c" % octet if chr(octet).isascii() and chr(octet).isalnum() else b"=%02X" % octet for octet in text)
    # One word may have 75 characters (RFC 2047 §2): cut it, inside characters too.
    pieces = re.findall(rb"(?:=[0-9A-F]{2}|[^=]){1,18}", quoted)
    return b"Subject: " + b"\r\n ".join(b"=?" + name + b"?Q?" + piece + b"?=" for piece in pieces) + b"\r\n"


def _encoded(octets: bytes, encoding: str) -> bytes:
    if encoding == "base64":
        return base64.encodebytes(octets).replace(b"\n", b"\r\n")
    if encoding == "quoted-printable":
        return quopri.encodestring(octets.replace(b"\r\n", b"\n")).replace(b"\n", b"\r\n")
    return octets


def _text_part(source: random.Random, kind: str = "plain", count: int = 4) -> bytes:
    charset = _charset(source)
    text = _lines(source, charset, count)
    if kind == "html":
        text = "<p>" + text.replace("\r\n", "<br>\r\n") + "</p>\r\n"
    encoding = source.choice(["base64", "quoted-printable", "8bit"])
    head = f"Content-Type: text/{kind}; charset={charset}\r\nContent-Transfer-Encoding: {encoding}\r\n\r\n".encode()
    return head + _encoded(text.encode(charset), encoding)


def _file_part(source: random.Random, size: int) -> bytes:
    name = source.choice(SENTENCES["utf-8"])
    encoded = "".join(f"%{octet:02X}" for octet in name.encode())
    parameter = source.choice(
        [f"filename*=utf-8''{encoded}.bin", f"filename*0*=utf-8''{encoded[:9]}; filename*1*={encoded[9:]}.bin", 'filename="a b;c.bin"']
    )
    head = f"Content-Type: application/octet-stream\r\nContent-Disposition: attachment; {parameter}\r\nContent-Transfer-Encoding: base64\r\n\r\n"
    return head.encode() + _encoded(source.randbytes(size), "base64")


def _multipart(source: random.Random, kind: str, parts: list[bytes]) -> bytes:
    boundary = f"=_{source.getrandbits(64):016x}".encode()
    head = b"Content-Type: multipart/" + kind.encode() + b'; boundary="' + boundary + b'"\r\n\r\n'
    preamble = source.choice([b"", b"This is a multi-part message in MIME format.\r\n"])
    return head + preamble + b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"


def plain_text(source: random.Random) -> bytes:
    return HEADER + b"Subject: note\r\n\r\n" + _lines(source, "us-ascii", source.randint(1, 30)).encode()


def text_in_a_charset(source: random.Random) -> bytes:
    return HEADER + _subject(source, _charset(source)) + _text_part(source, source.choice(["plain", "html"]), source.randint(1, 12))


def alternatives_with_a_file(source: random.Random) -> bytes:
    body = _multipart(source, "alternative", [_text_part(source), _text_part(source, "html")])
    return HEADER + _subject(source, _charset(source)) + _multipart(source, "mixed", [body, _file_part(source, source.randint(0, 9000))])


def deep_nesting(source: random.Random) -> bytes:
    body = _text_part(source)
    for _ in range(source.randint(2, 30)):
        body = _multipart(source, source.choice(["mixed", "related", "alternative"]), [body])
    return HEADER + _subject(source, _charset(source)) + body


def lines_of_dots(source: random.Random) -> bytes:
    lines = [source.choice(["." * source.randint(1, 5), ".x", "..leading", "x.", "", "text", ". "]) for _ in range(source.randint(1, 60))]
    if source.random() < 0.3:
        lines.append(".")
    return HEADER + b"Subject: dots\r\n\r\n." + "\r\n".join(lines).encode() + b"\r\n"


def eight_bit_noise(source: random.Random) -> bytes:
    octets = bytes(source.choice(range(1, 256)) for _ in range(source.randint(10, 3000))).replace(b"\r", b"?").replace(b"\n", b"\r\n")
    return HEADER + b"Subject: gr\xc3\xbc\xc3\x9fe\r\n\r\n\xff" + octets + b"\r\n"


def nothing_in_it(source: random.Random) -> bytes:
    return source.choice(
        [HEADER + b"Subject: empty\r\n\r\n", HEADER, HEADER + b"\r\n\r\n \r\n", b"\r\n", HEADER + b"Content-Type: text/html\r\n\r\n"]
    )


def no_header_at_all(source: random.Random) -> bytes:
    start = source.choice([b"\r\n", b"just words\r\n", b" folded onto nothing\r\n", b"--\r\n", b"\xe2\x82\xac\r\n", b":\r\n"])
    return start + _lines(source, "utf-8", source.randint(1, 8)).encode()


def lines_without_end(source: random.Random) -> bytes:
    line = source.choice([b"x", b"ab ", b"\xc3\xbc", b". ", b"=3D"]) * source.randint(1000, 20_000)
    return HEADER + b"Subject: long\r\nX-Long: " + line[: source.choice([0, 1500])] + b"\r\n\r\n" + line + b"\r\nnext\r\n"


def large_files(source: random.Random) -> bytes:
    parts = [_text_part(source), _file_part(source, source.randint(200_000, 700_000))]
    return HEADER + _subject(source, _charset(source)) + _multipart(source, "mixed", parts)


def large_text(source: random.Random) -> bytes:
    return HEADER + b"Subject: much\r\n\r\n" + b".dots and words\r\n" * source.randint(17_000, 40_000)


def broken_structure(source: random.Random) -> bytes:
    """A mail as others write it, with octets lost, doubled or changed: still CRLF lines."""
    octets = bytearray(alternatives_with_a_file(source))
    for _ in range(source.randint(1, 8)):
        at = source.randrange(len(octets))
        action = source.randrange(3)
        if action == 0:
            del octets[at : at + source.randint(1, 80)]
        elif action == 1:
            octets[at:at] = octets[max(0, at - source.randint(1, 80)) : at]
        else:
            octets[at] = source.randrange(1, 256)
    return re.sub(rb"\r\n|\r|\n", b"\r\n", bytes(octets)).rstrip(b"\r\n") + b"\r\n"


#: How many of each are made.
KINDS: dict[Callable[[random.Random], bytes], int] = {
    plain_text: 20,
    text_in_a_charset: 90,
    alternatives_with_a_file: 50,
    deep_nesting: 20,
    lines_of_dots: 60,
    eight_bit_noise: 25,
    nothing_in_it: 12,
    no_header_at_all: 18,
    lines_without_end: 30,
    large_files: 8,
    large_text: 4,
    broken_structure: 60,
}
