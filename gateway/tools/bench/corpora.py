"""What ``gateway bench`` reads: mails made by code from a fixed seed, or the user's own.

Owns octets to measure with, knows no implementation. The same version gives the same octets on every machine;
no mail of anybody else is among them. A content is what lies between DATA and its end: CRLF lines, no dot
stuffed (RFC 5321 §4.5.2 is the tasks' doing).
"""

from __future__ import annotations

import base64
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..._parser import parse_address
from ...mime import Mailbox, parse

#: Octets that a mail about octets has, its end of data included: what one read of a fast connection brings.
READ = 65536
#: Octets of the user's own mails that are measured; of more, some are drawn by the seed.
SAMPLE = 16 * 2**20
#: Octets of a header that are looked at for addresses.
HEADER = 65536
SEED = 7

_WORDS = ["mail", "the", "gateway", "of", "lines", "a", "carried", "below.", "octets,", "and", "so"]
_BARE = re.compile(rb"\r(?!\n)|(?<!\r)\n")


@dataclass(frozen=True)
class Corpus:
    """Mails of one kind: ``contents``, and the command lines of their envelopes, one MAIL and its RCPTs each."""

    name: str
    contents: Sequence[bytes] = ()
    envelopes: Sequence[Sequence[bytes]] = ()

    @property
    def octets(self) -> int:
        return sum(map(len, self.contents))


@dataclass(frozen=True)
class Mails:
    """The user's own: ``corpus``, and ``notes``: what was left out or altered, and why, a line each."""

    corpus: Corpus
    notes: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------ built in


def envelopes() -> list[Corpus]:
    """Corpora of command lines: plain, with parameters, with UTF-8 addresses."""
    plain = [(b"MAIL FROM:<sender%d@example.org>" % i, b"RCPT TO:<recipient%d@dest.example.com>" % i) for i in range(64)]
    parameters = [
        (
            b"MAIL FROM:<bounce+%d=user=example.com@lists.example.org> SIZE=%d BODY=8BITMIME" % (i, 1000 + i),
            b"RCPT TO:<first.last%d@dest.example.com>" % i,
        )
        for i in range(64)
    ]
    wide = [(f"MAIL FROM:<绯{i}@例え.example> SMTPUTF8".encode(), f"RCPT TO:<用户{i}@dest.example.com>".encode()) for i in range(64)]
    return [Corpus("plain", envelopes=plain), Corpus("parameters", envelopes=parameters), Corpus("utf-8", envelopes=wide)]


def mails() -> list[Corpus]:
    """Corpora of contents, in the order of the report."""
    chance = random.Random(SEED)
    made = [(name, make(chance)) for name, make in _MAKERS.items()]
    sender = b"MAIL FROM:<sender@example.org>"
    return [
        Corpus(name, contents, [(sender, b"RCPT TO:<recipient%d@dest.example.com>" % i) for i in range(len(contents))])
        for name, contents in made
    ]


def _header(number: int, subject: bytes, *fields: bytes) -> bytes:
    lines = [
        b"Received: from client.example (client.example [192.0.2.1])\r\n\tby mx.example with ESMTP id %d" % number,
        b"Date: Mon, 1 Jan 2024 00:00:00 +0000",
        b"From: Sender <sender@example.org>",
        b"To: Recipient <recipient%d@dest.example.com>" % number,
        b"Message-ID: <%d@example.org>" % number,
        b"Subject: " + subject,
        b"MIME-Version: 1.0",
        *fields,
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _filled(header: bytes, lines: Iterable[bytes], size: int) -> bytes:
    """As many whole lines, with CRLF, as fit into ``size`` octets."""
    taken, left = [header], size - len(header)
    for line in lines:
        left -= len(line) + 2
        if left < 0:
            break
        taken.append(line + b"\r\n")
    return b"".join(taken)


def _encoded(octets: bytes) -> list[bytes]:
    base = base64.b64encode(octets)
    return [base[i : i + 76] for i in range(0, len(base), 76)]


def _prose(chance: random.Random, count: int) -> list[bytes]:
    """Lines of 0 to 80 octets, 40 in the mean; one in 200 begins with a dot."""
    lines = []
    for i in range(count):
        want, line = chance.randint(0, 80), ""
        while len(line) < want:
            line += chance.choice(_WORDS) + " "
        lines.append((b"." if i % 200 == 199 else b"") + line[:want].rstrip().encode())
    return lines


def _base64(chance: random.Random) -> list[bytes]:
    header = _header(
        1,
        b"one file",
        b"Content-Type: application/octet-stream",
        b"Content-Transfer-Encoding: base64",
        b'Content-Disposition: attachment; filename="octets.bin"',
    )
    return [_filled(header, _encoded(chance.randbytes(57 * 1200)), READ - 3)]


def _text(chance: random.Random) -> list[bytes]:
    return [_filled(_header(1, b"text", b"Content-Type: text/plain; charset=us-ascii"), _prose(chance, 3000), READ - 3)]


def _dotted(chance: random.Random) -> list[bytes]:
    lines = [b"." + line[:74] for line in _encoded(chance.randbytes(57 * 1200))]
    # Stuffing adds an octet to each line.
    return [_filled(_header(1, b"dots", b"Content-Type: text/plain; charset=us-ascii"), lines, READ - 3 - 840)]


def _encoded_words(chance: random.Random) -> list[bytes]:
    names = ["Zoë Müller", "Łukasz Żółć", "Ελένη Παππά", "Анна Каренина", "田中 太郎", "محمد علي"]
    made = []
    for i in range(16):
        fields = [b"X-Note-%d: =?utf-8?B?%s?=" % (k, base64.b64encode(f"{chance.choice(names)} {k}".encode())) for k in range(8)]
        cc = b",\r\n ".join(b"=?utf-8?B?%s?= <cc%d@example.com>" % (base64.b64encode(name.encode()), k) for k, name in enumerate(names))
        subject = b" ".join(b"=?utf-8?B?%s?=" % base64.b64encode(chance.choice(names).encode()) for _ in range(4))
        header = _header(i, subject.replace(b" ", b"\r\n "), b"Cc: " + cc, *fields, b"Content-Type: text/plain; charset=us-ascii")
        made.append(header + b"short\r\n")
    return made


def _raw_utf8(chance: random.Random) -> list[bytes]:
    """RFC 6532: the header as UTF-8 octets."""
    made = []
    for i in range(16):
        fields = [f"X-Note-{k}: 例え {chance.randrange(1000)} Grüße".encode() for k in range(8)]
        header = _header(i, "Grüße aus 東京, Привет".encode(), *fields, b"Content-Type: text/plain; charset=utf-8")
        made.append(header + "kürzer\r\n".encode())
    return made


def _short(chance: random.Random) -> list[bytes]:
    return [
        _filled(_header(i, b"a message of one KiB", b"Content-Type: text/plain; charset=us-ascii"), _prose(chance, 100), 1024)
        for i in range(16)
    ]


def _attachments(chance: random.Random) -> list[bytes]:
    made = []
    for i in range(4):
        text = "\r\n".join(f"Zeile {k}: {chance.choice(_WORDS)} =3D Grüße" for k in range(60)).replace("=3D", "und")
        quoted = b"".join(bytes([octet]) if octet < 128 else b"=%02X" % octet for octet in text.encode())
        parts = [
            b"Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n" + quoted + b"\r\n",
            b"Content-Type: image/png\r\nContent-Transfer-Encoding: base64\r\n"
            b"Content-Disposition: attachment; filename*=utf-8''%E5%9B%BE%20one.png\r\n\r\n"
            + b"\r\n".join(_encoded(chance.randbytes(57 * 300)))
            + b"\r\n",
            b'Content-Type: application/pdf; name="report.pdf"\r\nContent-Transfer-Encoding: base64\r\n'
            b'Content-Disposition: attachment; filename="report.pdf"\r\n\r\n'
            + b"\r\n".join(_encoded(chance.randbytes(57 * 500)))
            + b"\r\n",
        ]
        boundary = b"=_%08x" % chance.getrandbits(32)
        header = _header(i, b"with attachments", b'Content-Type: multipart/mixed; boundary="%s"' % boundary)
        made.append(header + b"".join(b"--%s\r\n%s" % (boundary, part) for part in parts) + b"--%s--\r\n" % boundary)
    return made


def _pathological(chance: random.Random) -> list[bytes]:
    """Legal, and made to cost: one-octet lines, one line of 32 KiB, 40 multiparts in each other, 1,000 header
    fields, 300 encoded words in one, 2,000 lines that look like a boundary."""
    plain = b"Content-Type: text/plain; charset=us-ascii"
    nested = b"Content-Type: text/plain\r\n\r\ninnermost\r\n"
    for depth in range(40):
        nested = b'Content-Type: multipart/mixed; boundary="b%d"\r\n\r\n--b%d\r\n%s\r\n--b%d--\r\n' % (depth, depth, nested, depth)
    words = b"\r\n ".join(b"=?utf-8?Q?=C3=BC%d?=" % i for i in range(300))
    dashes = b"".join(b"--b%d\r\n" % chance.randrange(10**6, 10**7) for _ in range(2000))
    return [
        _header(1, b"one octet a line", plain) + b"x\r\n" * 8192,
        _header(2, b"one line", plain) + b"x" * 32768 + b"\r\n",
        _header(3, b"nested")[:-2] + nested,
        _header(4, b"fields", *[b"X-Field-%d: %d" % (i, i) for i in range(1000)], plain) + b"x\r\n",
        _header(5, words, plain) + b"x\r\n",
        _header(6, b"dashes", b'Content-Type: multipart/mixed; boundary="b"') + b"--b\r\n\r\n" + dashes + b"--b--\r\n",
    ]


_MAKERS: dict[str, Callable[[random.Random], list[bytes]]] = {
    "base64": _base64,
    "text": _text,
    "dotted": _dotted,
    "encoded headers": _encoded_words,
    "utf-8 headers": _raw_utf8,
    "short": _short,
    "attachments": _attachments,
    "pathological": _pathological,
}


# ------------------------------------------------------------------------------ one's own


def own(paths: Sequence[Path], sample: int = SAMPLE) -> Mails:
    """The mails in these files, as content. A file that cannot be read, or that DATA cannot carry (a NUL, a lone
    CR), is left out with a note; lines that end with a bare LF get their CRLF, also noted. Raises ValueError when
    none is left. ``sample``: octets of all together."""
    notes: list[str] = []
    contents: list[bytes] = []
    mended = 0
    for path in paths:
        try:
            octets = path.read_bytes()
        except OSError as error:
            notes.append(f"{path}: left out, {error.strerror}")
            continue
        content = _content(octets, sample)
        if isinstance(content, str):
            notes.append(f"{path}: left out, {content}")
            continue
        mended += content != octets
        contents.append(content)
    if mended:
        notes.append(f"{mended} of {len(paths)} files: line ends made CRLF, as SMTP carries them")
    if not contents:
        raise ValueError("\n".join(notes) or "no file was named")
    contents, found = _sample(contents, sample), len(contents)
    if len(contents) < found:
        notes.append(f"{len(contents)} of {found} mails are measured, drawn by a fixed seed: {sample >> 20} MiB at most")
    return Mails(Corpus("your mail", contents, [_envelope(content) for content in contents]), notes)


def _content(octets: bytes, most: int) -> bytes | str:
    """What DATA would carry, or why it cannot."""
    if not octets.strip():
        return "it is empty"
    if b"\0" in octets:
        return "it holds a NUL"
    if b"\r" in octets and re.search(rb"\r(?!\n)", octets):
        return "it holds a CR without LF"
    content = _BARE.sub(b"\r\n", octets)
    if not content.endswith(b"\r\n"):
        content += b"\r\n"
    return content if len(content) <= most else f"it has more than {most >> 20} MiB"


def _sample(contents: list[bytes], most: int) -> list[bytes]:
    if sum(map(len, contents)) <= most:
        return contents
    chosen, left = [], most
    for number in random.Random(SEED).sample(range(len(contents)), len(contents)):
        if len(contents[number]) <= left:
            left -= len(contents[number])
            chosen.append(number)
    return [contents[number] for number in sorted(chosen)]


def _envelope(content: bytes) -> list[bytes]:
    """Command lines with the addresses of From, To and Cc, as far as they are addresses of RFC 5321."""
    end = content.find(b"\r\n\r\n", 0, HEADER)
    parsed = parse(content[: end + 4 if end >= 0 else HEADER])
    sender = next(_addresses(parsed.from_), "sender@example.org")
    recipients = list(_addresses([*parsed.to, *parsed.cc]))[:100] or ["recipient@dest.example.com"]
    wide = "" if all(address.isascii() for address in (sender, *recipients)) else " SMTPUTF8"
    return [f"MAIL FROM:<{sender}> SIZE={len(content)}{wide}".encode(), *(f"RCPT TO:<{address}>".encode() for address in recipients)]


def _addresses(boxes: Sequence[Mailbox]) -> Iterator[str]:
    for box in boxes:
        # What was no UTF-8 is read as this character, and is nobody's address.
        if "\ufffd" not in box.address and parse_address(box.address) is not None:
            yield box.address
