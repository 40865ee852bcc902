"""The trace header we add (RFC 5321 §4.4) and how we know it again.

Pure text: time and id are handed in. The field names no recipient when there are
several, so that nobody learns of a blind copy.
"""

from __future__ import annotations

import re
from email.utils import formatdate
from functools import lru_cache

from ..message import Client, Envelope

# What may stand in a HELO name that we repeat: anything else could end the field or hide in it.
_UNSAFE = re.compile(r"[^A-Za-z0-9.:_\-\[\]]")


@lru_cache(maxsize=4)
def _date(second: int) -> str:
    return formatdate(second, localtime=False).replace("-0000", "+0000")


def date_header(now: float) -> str:
    """RFC 5322 §3.3 date-time in UTC of ``now`` (Unix seconds)."""
    return _date(int(now))


def mark(hostname: str) -> bytes:
    """The octets by which this gateway knows its own ``Received`` field again."""
    return f"by {hostname} (gateway-smtp)".encode()


def received(client: Client, envelope: Envelope, hostname: str, id: str, now: float, priority: int | None = None) -> bytes:
    """One ``Received`` field, folded, CRLF included. ``priority``: the clause of RFC 6710, None for none."""
    helo = _UNSAFE.sub("?", client.helo)[:255] or "unknown"
    if client.ip is None:
        origin = helo
    elif ":" in client.ip:
        origin = f"{helo} ([IPv6:{client.ip}])"
    else:
        origin = f"{helo} ([{client.ip}])"
    single = ""
    if len(envelope.recipients) == 1:
        address = envelope.recipients[0].address
        if len(address) <= 256 and (envelope.utf8 or address.isascii()):
            single = f"\r\n\tfor <{address}>"
    secured = f"\r\n\t({client.tls.version} {client.tls.cipher})" if client.tls else ""
    urgency = "" if priority is None else f"\r\n\tPRIORITY {priority}"
    return (
        f"Received: from {origin}{secured}\r\n\tby {hostname} (gateway-smtp) with {client.protocol}\r\n\tid {id}{single}{urgency};\r\n\t{_date(int(now))}\r\n"
    ).encode()
