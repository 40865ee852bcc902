"""The grammar said plainly: what ``gateway._parser`` must agree with, cut for cut.

Slow, whole inputs only, no state between calls. Where the two differ, one of them is
wrong; the RFC says which. Every function takes what came over the wire, from its first
octet on, and says what a reader must have made of it once all of that was fed.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field

LINE_LIMIT = 2048
FLOOD_LIMIT = 65536

# --- addresses: RFC 5321 §4.1.2 with RFC 6531 §3.3 ------------------------------------------

_WIDE = "\x80-\U0010ffff"
_ATOM = rf"[A-Za-z0-9!#$%&'*+\-/=?^_`{{|}}~{_WIDE}]+"
_DOT_STRING = rf"{_ATOM}(?:\.{_ATOM})*"
_QUOTED = rf'"(?:[ !#-\[\]-~{_WIDE}]|\\[ -~])*"'
_LOCAL = rf"(?:{_DOT_STRING}|{_QUOTED})"
_LABEL = rf"[A-Za-z0-9{_WIDE}](?:[A-Za-z0-9{_WIDE}\-]*[A-Za-z0-9{_WIDE}])?"
_DOMAIN = rf"{_LABEL}(?:\.{_LABEL})*"
_LITERAL = r"\[[!-Z^-~]*\]"
_MAILBOX = re.compile(rf"(?P<local>{_LOCAL})@(?P<domain>{_DOMAIN}|{_LITERAL})")
_ROUTE = re.compile(rf"@{_DOMAIN}(?:,@{_DOMAIN})*:")
#: Controls and line ends of Unicode: never part of an address, though RFC 6531 would let them be.
_ODD_CONTROLS = re.compile("[\x80-\x9f\u2028\u2029]")
_PARAMETER = re.compile(rf"(?P<keyword>[A-Za-z0-9][A-Za-z0-9\-]*)(?:=(?P<value>[!-<>-~{_WIDE}]+))?")


def _octets(text: str) -> int:
    return len(text.encode())


def _is_domain(text: str) -> bool:
    return _octets(text) <= 255 and all(_octets(label) <= 63 for label in text.split("."))


def _is_literal(text: str) -> bool:
    inside = text[1:-1]
    tag, colon, rest = inside.partition(":")
    try:
        if not colon:
            ipaddress.IPv4Address(inside)
            return True
        if tag.lower() == "ipv6":
            ipaddress.IPv6Address(rest)
            return "%" not in rest  # a zone means nothing to the other side
    except ValueError:
        return False
    return bool(rest) and re.fullmatch(r"[A-Za-z0-9\-]*[A-Za-z0-9]", tag) is not None and _octets(text) <= 255


def mailbox(text: str) -> tuple[str, str] | None:
    """``(local, domain in lower case)`` of ``local@domain``; None if it is not one."""
    found = _MAILBOX.fullmatch(text)
    if found is None or _ODD_CONTROLS.search(text) or any("\ud800" <= c <= "\udfff" for c in text):
        return None
    domain = found["domain"]
    if not (_is_literal(domain) if domain.startswith("[") else _is_domain(domain)):
        return None
    if _octets(text) + 2 > 256:  # with its brackets: RFC 5321 §4.5.3.1.3
        return None
    return found["local"], domain.lower()


# --- commands --------------------------------------------------------------------------------


@dataclass
class Said:
    """A command line as ``gateway._parser.Command`` must tell it."""

    verb: str = ""
    fault: str | None = None
    argument: str = ""
    address: str | None = None
    local: str = ""
    domain: str = ""
    source_routed: bool = False
    ascii: bool = False
    params: dict[str, str | None] = field(default_factory=dict)
    chunk_size: int = 0
    last: bool = False


def _read_path(said: Said, keyword: str) -> None:
    """MAIL and RCPT (RFC 5321 §4.1.1.2, §4.1.1.3, §4.1.2). The path ends at the first ``>`` outside quotes."""
    text = said.argument
    if text[: len(keyword)].upper() != keyword:
        said.fault = "syntax"
        return
    text = text[len(keyword) :].removeprefix(" ")
    if not text.startswith("<"):
        said.fault = "syntax"
        return
    end = re.match(r'<(?:"(?:[^"\\]|\\.)*"|[^">])*>', text)
    if end is None:
        said.fault = "path"
        return
    path, rest = end[0][1:-1], text[end.end() :]
    address, local, domain, routed = path, "", "", False
    if path == "" and keyword == "FROM:":
        pass
    elif path.lower() == "postmaster" and keyword == "TO:":
        local = "postmaster"
    else:
        route = _ROUTE.match(path)
        if route:
            routed = True
            address = path[route.end() :]
            if not all(_is_domain(part.removeprefix("@")) for part in route[0][:-1].split(",")):
                said.fault = "path"
                return
        parts = mailbox(address)
        if parts is None or _octets(end[0]) > 256 or _ODD_CONTROLS.search(path):
            said.fault = "path"
            return
        local, domain = parts
    if rest and not rest.startswith(" "):
        said.fault = "syntax"
        return
    said.address, said.local, said.domain, said.source_routed = address, local, domain, routed
    params: dict[str, str | None] = {}
    for word in rest.split(" "):
        if word == "":
            continue
        parameter = _PARAMETER.fullmatch(word)
        if parameter is None:
            said.fault = "parameter"
            return
        if parameter["keyword"].upper() in params:
            said.fault = "duplicate"
            return
        params[parameter["keyword"].upper()] = parameter["value"]
    said.params = params


def _read_line(line: bytes) -> Said:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return Said(fault="utf8")
    word, _, argument = text.partition(" ")
    said = Said(verb=word.encode().upper().decode()[:64], argument=argument.strip(" "), ascii=text.isascii())
    words = [part for part in said.argument.split(" ") if part]
    match said.verb:
        case "MAIL":
            _read_path(said, "FROM:")
        case "RCPT":
            _read_path(said, "TO:")
        case "BDAT":
            size = re.fullmatch(r"([0-9]+)(?: +(LAST))?", said.argument, re.IGNORECASE | re.ASCII)
            if size is None or int(size[1]) > 2**63 - 1:
                said.fault = "chunk"
            else:
                said.chunk_size, said.last = int(size[1]), size[2] is not None
        case "DATA" | "RSET" | "QUIT" | "STARTTLS":
            if words:
                said.fault = "syntax"
        case "EHLO" | "HELO" | "LHLO":
            if len(words) != 1:
                said.fault = "syntax"
        case "AUTH":
            if len(words) not in (1, 2):
                said.fault = "syntax"
        case "VRFY":
            if not words:
                said.fault = "syntax"
    return said


def cut_line(stream: bytes, limit: int) -> tuple[bytes, str | None, bytes] | None:
    """``(text, fault, rest)`` of the first line, None if it is not whole. A line ends at its first LF."""
    end = stream.find(b"\n")
    if (end if end >= 0 else len(stream)) > FLOOD_LIMIT:
        return b"", "flood", b""
    if end < 0:
        return None
    line, rest = stream[: end + 1], stream[end + 1 :]
    if len(line) > limit:
        return b"", "long", rest
    if not line.endswith(b"\r\n") or re.search(rb"[\0-\x1f\x7f]", line[:-2]):
        return b"", "newline", rest
    return line[:-2], None, rest


def lines(stream: bytes, limit: int) -> list[tuple[bytes, str | None]]:
    """``(text, fault)`` of every whole line of the stream; nothing follows a flood."""
    found = []
    while (cut := cut_line(stream, limit)) is not None:
        text, fault, stream = cut
        found.append((text, fault))
    return found


def first_command(stream: bytes, line_limit: int = LINE_LIMIT, auth_limit: int = 0) -> tuple[Said, bytes] | None:
    """``(command, rest)`` of the first line, None if it is not whole. AUTH may be longer where ``auth_limit`` is."""
    limit = max(line_limit, auth_limit) if stream[:5].upper() == b"AUTH " else line_limit
    cut = cut_line(stream, limit)
    if cut is None:
        return None
    text, fault, rest = cut
    return Said(fault=fault) if fault else _read_line(text), rest


def commands(stream: bytes, line_limit: int = LINE_LIMIT, auth_limit: int = 0) -> list[Said]:
    found = []
    while (cut := first_command(stream, line_limit, auth_limit)) is not None:
        said, stream = cut
        found.append(said)
    return found


# --- content ---------------------------------------------------------------------------------


@dataclass
class Content:
    """Content as ``gateway._parser.Receiver`` must tell it after reading the whole stream.

    ``octets`` is what is handed out where there is no fault; ``used`` counts the octets of
    the stream that belong to it, terminator included.
    """

    octets: bytes
    fault: str | None
    finished: bool
    used: int
    eight_bit: bool
    longest: int
    header_size: int
    header_fields: int
    hops: int

    @property
    def size(self) -> int:
        return len(self.octets)


_NEWLINE_FAULTS = {
    False: re.compile(rb"(?P<newline>\r(?![\n\0]|\Z)|(?<!\r)\n)|(?P<nul>\0)"),
    True: re.compile(rb"(?P<newline>\r(?![\n\0]|\Z))|(?P<nul>\0)"),
}


def _tell(octets: bytes, fault: str | None, finished: bool, used: int) -> Content:
    *whole, last = octets.split(b"\r\n")
    longest = max([len(line) for line in whole] + [len(last.removesuffix(b"\r"))])
    header_lines = []
    for line in whole:
        if line == b"":
            break
        header_lines.append(line + b"\r\n")
    else:
        # A CR alone may yet become the empty line that ends the header.
        if last != b"\r":
            header_lines.append(last)
    fields = [line for line in header_lines if line and line[0] not in b" \t"]
    return Content(
        octets=octets,
        fault=fault,
        finished=finished,
        used=used,
        eight_bit=any(octet > 127 for octet in octets),
        longest=longest,
        header_size=sum(map(len, header_lines)),
        header_fields=len(fields),
        hops=sum(1 for line in fields if re.match(rb"received[ \t]*:", line, re.IGNORECASE)),
    )


def _fault(wire: bytes, normalize: bool) -> str | None:
    found = _NEWLINE_FAULTS[normalize].search(wire)
    return None if found is None else found.lastgroup


def content(stream: bytes, normalize: bool = False) -> Content:
    """DATA (RFC 5321 §4.5.2). Only CRLF.CRLF ends it, or .CRLF as the very first octets.

    Every other line that begins with a dot loses it. With ``normalize`` a bare LF ends a line
    like CRLF, and is handed out as CRLF, with one difference: a dot alone between a bare LF
    and a CRLF neither ends the content nor goes away: it is the line.
    """
    if stream.startswith(b".\r\n"):
        wire, used, finished = b"", 3, True
    elif (end := stream.find(b"\r\n.\r\n")) >= 0:
        wire, used, finished = stream[: end + 2], end + 5, True
    else:
        wire, used, finished = stream, len(stream), False
    pieces = re.split(rb"(\r\n|\n)" if normalize else rb"(\r\n)", wire)
    made = []
    before = b"\r\n"
    for text, ending in zip(pieces[::2], [*pieces[1::2], b""], strict=True):
        if not ending and text in (b".", b".\r"):
            break  # may become the end: held back
        alone = normalize and text == b"." and before == b"\n" and ending == b"\r\n"
        made.append(text if alone else text.removeprefix(b"."))
        made.append(b"\r\n" if ending else b"")
        before = ending
    return _tell(b"".join(made), _fault(wire, normalize), finished, used)


def chunks(stream: bytes, normalize: bool = False, binary: bool = False, ended: bool = False) -> Content:
    """BDAT (RFC 3030): all chunks of a message, one behind the other; ``ended``: the last one is complete."""
    if binary:
        told = _tell(stream, None, False, len(stream))
        told.longest, told.eight_bit = 0, False
        return told
    octets = re.sub(rb"(?<!\r)\n", b"\r\n", stream) if normalize else stream
    fault = _fault(stream, normalize)
    if fault is None and ended and stream.endswith(b"\r"):
        fault = "newline"
    return _tell(octets, fault, False, len(stream))


def stuff(octets: bytes, line_start: bool = True) -> bytes:
    """Dot-stuffing (RFC 5321 §4.5.2): a dot more where a line begins with one."""
    stuffed = octets.replace(b"\r\n.", b"\r\n..")
    return b"." + stuffed if line_start and stuffed.startswith(b".") else stuffed


# --- replies -----------------------------------------------------------------------------------

_REPLY_LINE = re.compile(rb"(?P<code>[2-5][0-9][0-9])(?:(?P<sign>[ -])(?P<text>.*))?", re.DOTALL)


def replies(stream: bytes, line_limit: int, reply_limit: int) -> tuple[list[tuple[int, list[str]]], str | None]:
    """``(replies, fault)``: what an upstream said (RFC 5321 §4.2), up to the first fault."""
    told: list[tuple[int, list[str]]] = []
    begun: list[str] = []
    code, total = 0, 0
    while True:
        room = min(line_limit, reply_limit - total)
        end = stream.find(b"\n", 0, room)
        if end < 0:
            return told, "long" if len(stream) >= room else None
        line, stream = stream[: end + 1], stream[end + 1 :]
        if not line.endswith(b"\r\n") or b"\r" in line[:-2]:
            return told, "newline"
        found = _REPLY_LINE.fullmatch(line[:-2])
        if found is None or (begun and int(found["code"]) != code):
            return told, "syntax"
        code = int(found["code"])
        total += len(line)
        text = (found["text"] or b"").decode(errors="replace")
        begun.append(re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufffd]", "?", text))
        if found["sign"] != b"-":
            told.append((code, begun))
            begun, total = [], 0
