"""The ``raw`` form: the content as it would be relayed, the envelope in header fields.

Invariant: whatever an address holds, a header value is printable ASCII of one line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from ...contracts import Delivery
from .payload import Payload

#: Octets of one ``x-envelope-to``; longer lists repeat the field.
FIELD_OCTETS: Final = 4096

_KEPT: Final = frozenset(range(0x21, 0x7F)) - frozenset(b'%,"')
#: Leaves what holds nothing but those as it is: one look, where an expression takes three times as long.
_PLAIN: Final = bytes(octet if octet in _KEPT else octet ^ 0x80 for octet in range(0x100))
_TYPE: Final = ("content-type", "message/rfc822")


def raw(delivery: Delivery, now: float) -> Payload:
    """Our trace header first, then the octets the client sent, streamed where they lie in a file."""
    message = delivery.message
    headers = [_TYPE, ("x-envelope-from", escaped(message.envelope.mail_from))]
    recipients = delivery.recipients
    if len(recipients) == 1:
        headers.append(("x-envelope-to", escaped(recipients[0].address)))
    else:
        headers += [("x-envelope-to", value) for value in joined([escaped(recipient.address) for recipient in recipients])]
    return Payload(headers, [message.trace] if message.trace else [], message.stored)


def escaped(address: str) -> str:
    """``%``, comma, quote, space, controls and non-ASCII octets percent-encoded (UTF-8, upper case)."""
    try:
        octets = address.encode()
    except UnicodeEncodeError:
        octets = address.encode("utf-8", "replace")  # half of a surrogate pair has no octets
    else:
        if octets.translate(_PLAIN) == octets:
            return address
    return "".join(chr(octet) if octet in _KEPT else f"%{octet:02X}" for octet in octets)


def joined(addresses: Iterable[str]) -> Iterator[str]:
    """Values of at most ``FIELD_OCTETS``, addresses separated by comma and space."""
    value = ""
    for address in addresses:
        if value and len(value) + 2 + len(address) > FIELD_OCTETS:
            yield value
            value = address
        else:
            value = f"{value}, {address}" if value else address
    yield value
