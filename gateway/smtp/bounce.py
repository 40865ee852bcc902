"""Delivery status notifications as octets.

Owns the words and the shape of a Bounce: multipart/report (RFC 6522, before it
RFC 3462) with a text for people, a ``message/delivery-status`` for programs
(RFC 3464) and the original message or its header (RFC 3461 §4.3, RET). Addresses
and headers in UTF-8 follow RFC 6533.

Pure functions: the time, the id and the octets of the original are handed in. Knows
no queue and no route: who decides that a report is due is above. What is written is
7-bit wherever the original allows it, so that a report reaches senders behind hops
that carry nothing else. Words of upstreams and clients are fields here, so no text
gets in with a line break or another control in it (Reply refuses them, the rest is
cleaned below).

A report on mail with REQUIRETLS holds the header of the original at most, and asks for REQUIRETLS
itself; where it must go a way that cannot promise TLS it is *redacted*: nothing of the original
is in it, and it asks for nothing (RFC 8689 §5).

A report for the null sender is never made (RFC 5321 §4.5.5): ValueError.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Sequence
from typing import Literal

from ..message import Envelope, Message, Params, Recipient
from ..reply import Reply
from . import extensions
from .trace import date_header

#: ``failed``: it will not arrive (refused, or tried until it expired). ``delayed``: it did not
#: arrive yet. ``relayed``: a next hop took it that sends no reports itself. ``delivered``: it
#: is where it was meant to be.
Kind = Literal["failed", "delayed", "relayed", "delivered"]

#: What became of one recipient: the reply that decided it, and who said so (``host:port``;
#: ``""`` where it was our own word).
Result = tuple[Recipient, Reply, str]

#: Octets of an original, our trace header included, that are sent back whole; of a larger one
#: only the header.
RETURN_LIMIT = 50_000
#: Octets of a header that are sent back; a longer one ends at the last whole line.
HEADER_LIMIT = 32_768

_NOTIFY = {"failed": "FAILURE", "delayed": "DELAY", "relayed": "SUCCESS", "delivered": "SUCCESS"}
_SUBJECT = {
    "failed": "Undelivered mail returned to sender",
    "delayed": "Mail is delayed, still trying",
    "relayed": "Mail was relayed",
    "delivered": "Mail was delivered",
}
_OPENING = {
    "failed": "Your message could not be delivered to the recipients below. Nothing more\r\nwill be tried for them.",
    "delayed": "Your message could not yet be delivered to the recipients below. You need\r\nnot send it again: it will be tried further.",
    "relayed": "Your message was passed on for the recipients below, to a mail system\r\nthat may not send a notice when it is delivered.",
    "delivered": "Your message was delivered to the recipients below.",
}
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_XTEXT = re.compile(r"\+([0-9A-F]{2})")
_EMBEDDED = re.compile(r"\\x\{([0-9A-Fa-f]{2,6})\}")
_MESSAGE_ID = re.compile(rb"^message-id:\s*(<[!-;=?-~]{1,250}>)", re.IGNORECASE | re.MULTILINE)
_HOST = re.compile(r"\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")


def wants(recipient: Recipient, kind: Kind) -> bool:
    """Is a report of this kind wanted for this recipient? (RFC 3461 §4.1, NOTIFY.)

    Without NOTIFY only failures are told. NEVER silences everything."""
    notify = recipient.params.get("NOTIFY")
    if notify is None:
        return kind == "failed"
    return _NOTIFY[kind] in notify.upper().split(",")


def awaits(recipient: Recipient) -> bool:
    """Is word of a delay wanted where the sender set a time for it (RFC 2852, BY with mode N)?
    Then it is, unless NOTIFY says otherwise."""
    return recipient.params.get("NOTIFY") is None or wants(recipient, "delayed")


def traces(recipient: Recipient) -> bool:
    """Is word wanted that a relay has it, where BY asks for that (RFC 2852)? NEVER silences it."""
    return (recipient.params.get("NOTIFY") or "").upper() != "NEVER"


def excerpt_size(message: Message, kind: Kind) -> int:
    """How many octets of the content, from its start, ``report`` wants as ``excerpt``."""
    if _returns_all(message, kind):
        return message.stored.size
    return min(message.stored.header_size, HEADER_LIMIT)


def report(
    kind: Kind,
    message: Message,
    results: Sequence[Result],
    *,
    reporting_mta: str,
    now: float,
    message_id: str,
    excerpt: bytes | None = None,
    redacted: bool = False,
) -> bytes:
    """One report to the sender of ``message`` on these recipients.

    ``results`` holds only recipients for whom ``wants`` said yes. A ``failed`` one with a
    4yz reply is told as expired (status 4.4.7). ``now``: Unix seconds. ``message_id``: of the
    report, without the brackets (``id@host``). ``excerpt``: the first ``excerpt_size`` octets
    of the content; None takes them from a content in memory, and leaves the original out
    for one in a file. ``redacted``: nothing of the original (see the module). Raises ValueError for the null sender and for no results.

    Carry the result with ``envelope``."""
    sender = message.envelope.mail_from
    if not sender:
        raise ValueError(f"message {message.id} has the null sender: no report is made")
    if not results:
        raise ValueError(f"report on message {message.id} without recipients")
    if excerpt is None and message.stored.path is None:
        excerpt = message.content[: excerpt_size(message, kind)]
    if redacted:
        excerpt = None
    # Only a sender with a UTF-8 address is known to read mail with UTF-8 in its header.
    international = not sender.isascii()
    date = date_header(now)
    parts = [
        _for_people(kind, message, results, reporting_mta),
        _for_programs(kind, message, results, reporting_mta, now, international),
    ]
    if excerpt is not None:
        parts.append(_original(kind, message, excerpt, international))
    boundary = b"report-" + re.sub(rb"[^A-Za-z0-9-]", b"", message_id.partition("@")[0].encode())[:40]
    while any(boundary in part for part in parts):
        boundary += b"_"
    found = _MESSAGE_ID.search((excerpt or b"")[: message.stored.header_size])
    head = (
        f"Date: {date}\r\n"
        f"From: Mail Delivery System <MAILER-DAEMON@{reporting_mta}>\r\n"
        f"To: <{_line(sender)}>\r\n"
        f"Subject: {_SUBJECT[kind]}\r\n"
        f"Message-ID: <{message_id}>\r\n"
        + (f"References: {found.group(1).decode('ascii')}\r\n" if found else "")
        + "Auto-Submitted: auto-replied\r\n"
        "MIME-Version: 1.0\r\n"
        "Content-Type: multipart/report; report-type=delivery-status;\r\n"
        f' boundary="{boundary.decode("ascii")}"\r\n'
    ).encode()
    if any(not part.isascii() for part in parts):
        head += b"Content-Transfer-Encoding: 8bit\r\n"
    opening = b"\r\nThis is a delivery status notification in MIME format.\r\n"
    return head + opening + b"".join(b"\r\n--%b\r\n%b" % (boundary, part) for part in parts) + b"\r\n--%b--\r\n" % boundary


def envelope(message: Message, octets: bytes, *, redacted: bool = False) -> Envelope:
    """How the report ``octets`` on ``message`` travels: from nobody to its sender."""
    sender = message.envelope.mail_from
    params: Params = {}
    if not octets.isascii():
        params["BODY"] = "8BITMIME"
    if not sender.isascii():
        params["SMTPUTF8"] = None
    if message.envelope.requiretls and not redacted:
        params["REQUIRETLS"] = None
    local, _, domain = sender.rpartition("@")
    # NEVER: nobody wants to hear of a report that did not arrive (RFC 3461 §6.1).
    return Envelope("", params, [Recipient(sender, local, domain.lower(), {"NOTIFY": "NEVER"})])


def _for_people(kind: Kind, message: Message, results: Sequence[Result], reporting_mta: str) -> bytes:
    lines = [f"This is the mail system at {reporting_mta}.", "", _OPENING[kind], ""]
    if kind == "delayed" and message.expires_at:
        lines += [f"It will be given up on {date_header(message.expires_at)}.", ""]
    for recipient, reply, remote in results:
        lines.append(f"<{_line(recipient.address)}>")
        if kind == "failed" and not reply.permanent:
            lines.append("    was tried until the message expired; the last answer was:")
        host = _remote_host(remote)
        said = f"{host} said: {reply}" if host else str(reply)
        lines += [f"    {piece}" for piece in _wrapped(said, 72)]
        lines.append("")
    text = "\r\n".join(lines)
    if text.isascii():
        return b"Content-Type: text/plain; charset=us-ascii\r\n\r\n" + text.encode()
    return b"Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n" + _quoted(text.encode())


def _for_programs(kind: Kind, message: Message, results: Sequence[Result], reporting_mta: str, now: float, international: bool) -> bytes:
    groups = [[f"Reporting-MTA: dns; {reporting_mta}"]]
    envid = message.envelope.mail_params.get("ENVID")
    if envid:
        groups[0].append(f"Original-Envelope-Id: {_ascii(_from_xtext(envid))}")
    groups[0].append(f"Arrival-Date: {date_header(message.received_at)}")
    timed = extensions.deadline(message)
    if timed is not None:
        groups[0].append(f"Deliver-By-Date: {date_header(timed[0])}")  # RFC 2852
    for keyword, form in (("HOLDFOR", "for"), ("HOLDUNTIL", "until")):
        if asked := message.envelope.mail_params.get(keyword):
            groups[0].append(f"Future-Release-Request: {form}; {asked}")  # RFC 4865
    for recipient, reply, remote in results:
        fields = []
        original = recipient.params.get("ORCPT")
        if original:
            form, _, address = original.partition(";")
            fields.append(f"Original-Recipient: {_typed(form, address, international)}")
        fields.append(f"Final-Recipient: {_final(recipient.address, international)}")
        fields.append(f"Action: {kind}")
        fields.append(f"Status: {_status(kind, reply)}")
        host = _remote_host(remote)
        if host:
            fields.append(f"Remote-MTA: dns; {host}")
        if host or kind == "failed":
            text = _line(str(reply)) if international else _ascii(str(reply))
            # 240 characters are at most 960 octets.
            fields.append("\r\n ".join(_wrapped(f"Diagnostic-Code: smtp; {text}", 240)))
        if kind in ("failed", "delayed"):
            fields.append(f"Last-Attempt-Date: {date_header(now)}")
        if kind == "delayed" and message.expires_at:
            fields.append(f"Will-Retry-Until: {date_header(message.expires_at)}")
        groups.append(fields)
    text = "\r\n".join("".join(f"{field}\r\n" for field in fields) for fields in groups)
    if text.isascii():
        return b"Content-Type: message/delivery-status\r\n\r\n" + text.encode()
    return b"Content-Type: message/global-delivery-status\r\nContent-Transfer-Encoding: 8bit\r\n\r\n" + text.encode()


def _returns_all(message: Message, kind: Kind) -> bool:
    """RET=FULL counts for failures only (RFC 3461 §4.3), and not with REQUIRETLS (RFC 8689 §5). Without RET the choice is ours: whole,
    unless that would make the report 8-bit."""
    wish = (message.envelope.mail_params.get("RET") or "").upper()
    if kind != "failed" or wish == "HDRS" or message.envelope.binary or message.envelope.requiretls:
        return False
    if len(message.trace) + message.stored.size > RETURN_LIMIT:
        return False
    return wish == "FULL" or not message.stored.eight_bit


def _original(kind: Kind, message: Message, excerpt: bytes, international: bool) -> bytes:
    if _returns_all(message, kind):
        octets = message.trace + excerpt
        # message/rfc822 may not be encoded, so it must already be 7-bit or 8-bit text.
        if _is_text(octets):
            header = octets[: len(message.trace) + message.stored.header_size]
            form = b"message/rfc822" if header.isascii() else b"message/global"
            encoding = b"" if octets.isascii() else b"Content-Transfer-Encoding: 8bit\r\n"
            return b"Content-Type: %b\r\n%b\r\n%b" % (form, encoding, octets)
    header = message.trace + excerpt[: min(message.stored.header_size, HEADER_LIMIT)]
    if message.stored.header_size > HEADER_LIMIT:
        header = header[: header.rfind(b"\r\n") + 2]
    if header.isascii() and _is_text(header):
        return b"Content-Type: text/rfc822-headers\r\n\r\n" + header
    if international and _is_text(header) and _is_utf8(header):
        return b"Content-Type: message/global-headers\r\nContent-Transfer-Encoding: 8bit\r\n\r\n" + header
    # Every reader undoes the encoding of a text; of a message/global-headers hardly any.
    return b"Content-Type: text/rfc822-headers\r\nContent-Transfer-Encoding: quoted-printable\r\n\r\n" + _quoted(header)


def _status(kind: Kind, reply: Reply) -> str:
    if kind == "failed":
        # A failure with a temporary reply is one that was tried for too long (RFC 3463 §3.5).
        return (reply.enhanced or "5.0.0") if reply.permanent else "4.4.7"
    if kind == "delayed":
        return reply.enhanced if reply.temporary and reply.enhanced else "4.0.0"
    return reply.enhanced if reply.positive and reply.enhanced else "2.0.0"


def _final(address: str, international: bool) -> str:
    if address.isascii():
        return f"rfc822; {_line(address)}"
    return f"utf-8; {_line(address) if international else _embedded(address)}"


def _typed(form: str, address: str, international: bool) -> str:
    """An ORCPT value as a field (RFC 3461 §4.2, RFC 6533 §3)."""
    form = _ascii(form.strip()) or "rfc822"
    if form.lower() == "utf-8":
        plain = _line(_EMBEDDED.sub(_character, _from_xtext(address)))
        return f"{form}; {plain if international else _embedded(plain)}"
    return f"{form}; {_ascii(_from_xtext(address))}"


def _character(found: re.Match[str]) -> str:
    point = int(found.group(1), 16)
    return chr(point) if point <= 0x10FFFF and not 0xD800 <= point <= 0xDFFF else "?"


def _embedded(address: str) -> str:
    """The 7-bit form of a UTF-8 address: ``\\x{HEX}`` (RFC 6533 §3, utf-8-addr-xtext)."""
    return "".join(c if "!" <= c <= "~" and c not in "+=\\" else f"\\x{{{ord(c):02X}}}" for c in address)


def _from_xtext(text: str) -> str:
    return _XTEXT.sub(lambda found: chr(int(found.group(1), 16)), text)


def _remote_host(remote: str) -> str:
    """The host of ``host:port``; ``""`` for a URL or a path: those are nobody's but ours."""
    host, _, port = remote.rpartition(":")
    if not port.isdigit() or not _HOST.fullmatch(host):
        return ""
    return host


def _line(text: str) -> str:
    return _CONTROLS.sub("?", text)


def _ascii(text: str) -> str:
    return _line(text).encode("ascii", "replace").decode("ascii")


def _wrapped(text: str, width: int) -> list[str]:
    """Pieces of at most ``width`` characters (a word longer than that is cut)."""
    pieces = []
    while len(text) > width:
        cut = text.rfind(" ", 1, width + 1)
        if cut < 1:
            pieces.append(text[:width])
            text = text[width:]
        else:
            pieces.append(text[:cut])
            text = text[cut + 1 :]
    return [*pieces, text]


def _quoted(octets: bytes) -> bytes:
    # Line by line and not as text: so a bare CR or LF is encoded, and what is left of LF is a
    # soft line break.
    return b"\r\n".join(binascii.b2a_qp(line, istext=False).replace(b"\n", b"\r\n") for line in octets.split(b"\r\n"))


def _is_text(octets: bytes) -> bool:
    """Lines as RFC 2045 §2.7 and §2.8 want them: CRLF only, at most 998 octets, no NUL."""
    ends = octets.count(b"\r\n")
    return b"\0" not in octets and octets.count(b"\r") == octets.count(b"\n") == ends and max(map(len, octets.split(b"\r\n"))) <= 998


def _is_utf8(octets: bytes) -> bool:
    try:
        octets.decode()
    except UnicodeDecodeError:
        return False
    return True
