"""The trace header we add (RFC 5321 §4.4) and how we know it again.

Pure text: time and id are handed in. The field names no recipient when there are
several, so that nobody learns of a blind copy.
"""

from __future__ import annotations

import re
from email.utils import formatdate
from typing import Final

from ..message import Client, Envelope

# What may stand in a HELO name that we repeat: anything else could end the field or hide in it.
_UNSAFE = re.compile(r"[^A-Za-z0-9.:_\-\[\]]")


class _Date:
    """The second that was written last, and how: one value, because threads write notices, too."""

    def __init__(self) -> None:
        self.written = (-1, "")


_DATE: Final = _Date()


def date_header(now: float) -> str:
    """RFC 5322 §3.3 date-time in UTC of ``now`` (Unix seconds)."""
    second, written = int(now), _DATE.written
    if written[0] != second:
        written = _DATE.written = (second, formatdate(second, localtime=False).replace("-0000", "+0000"))
    return written[1]


def mark(hostname: str) -> bytes:
    """The octets by which this gateway knows its own ``Received`` field again."""
    return f"by {hostname} (gateway-smtp)".encode()


def _origin(client: Client, hostname: str) -> str:
    ip, tls = client.ip, client.tls
    name = _UNSAFE.sub("?", client.helo)[:255] or "unknown"
    if ip is None:
        origin = name
    elif ":" in ip:
        origin = f"{name} ([IPv6:{ip}])"
    else:
        origin = f"{name} ([{ip}])"
    secured = f"\r\n\t({tls.version} {tls.cipher})" if tls else ""
    return f"Received: from {origin}{secured}\r\n\tby {hostname} (gateway-smtp) with {client.protocol}\r\n\tid "


def received(client: Client, envelope: Envelope, hostname: str, id: str, now: float, priority: int | None = None) -> bytes:
    """One ``Received`` field, folded, CRLF included. ``priority``: the clause of RFC 6710, None for none."""
    before = address = after = ""
    if len(envelope.recipients) == 1:
        only = envelope.recipients[0].address
        if len(only) <= 256 and (envelope.utf8 or only.isascii()):
            before, address, after = "\r\n\tfor <", only, ">"
    urgency = "" if priority is None else f"\r\n\tPRIORITY {priority}"
    known, origin = client.origin
    if not origin or known != hostname:
        origin = _origin(client, hostname)
        client.origin = (hostname, origin)
    return f"{origin}{id}{before}{address}{after}{urgency};\r\n\t{date_header(now)}\r\n".encode()
