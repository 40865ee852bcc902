"""The ``standard`` form: one JSON object, every key always there.

The body is made in pieces, so that the base64 of large attachments is held once. What each
field means is said on ``Parsed``; names and types of this object are a promise to receivers.

RFC 8259 (JSON), RFC 3339 (times), Standard Webhooks 1.0 (``type``, ``timestamp``, ``data``).
"""

from __future__ import annotations

import binascii
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from ...contracts import Delivery
from ...message import Client, Message
from ...sayable import OPTION, sayable
from .. import Mailbox, Parsed, parse_message
from .payload import Payload

#: Octets that become base64 in one call (a multiple of 3), so that none holds up other threads.
_PIECE = 3 << 18


def standard(delivery: Delivery, now: float) -> Payload:
    """The body for this delivery, made at ``now`` (Unix seconds)."""
    return Payload([("content-type", "application/json")], body(delivery, now, parse_message(delivery.message)))


def body(delivery: Delivery, now: float, parsed: Parsed) -> list[bytes]:
    """The JSON as pieces to be joined."""
    pieces = [_dumps({"type": "message.received", "timestamp": moment(now), "data": _facts(delivery, parsed)})[:-2], b',"attachments":[']
    comma = b""
    for attachment in parsed.attachments:
        about = {
            "filename": attachment.filename,
            "content_type": attachment.content_type,
            "disposition": attachment.disposition,
            "content_id": attachment.content_id,
            "size": attachment.size,
            "sha256": attachment.sha256,
        }
        pieces += [comma, _dumps(about)[:-1], b',"content":"', *_base64(attachment.content), b'"}']
        comma = b","
    pieces += [b'],"problems":', _dumps(parsed.problems)]
    if parsed.raw is not None:
        pieces += [b',"raw":"', *_base64(parsed.raw), b'"']
    pieces.append(b"}}")
    return pieces


class _Last:
    """The last whole second that was written out: nearly always the next one, too. One object, as threads share it."""

    __slots__ = ("second",)

    def __init__(self) -> None:
        self.second = (-1, "")


_last: Final = _Last()


def moment(seconds: float) -> str:
    """Unix seconds as RFC 3339 in UTC, to the microsecond."""
    whole = int(seconds)
    micros = round((seconds - whole) * 1e6)
    if micros >= 1_000_000:
        whole, micros = whole + 1, micros - 1_000_000
    number, text = _last.second
    if number != whole:
        text = datetime.fromtimestamp(whole, UTC).isoformat()[:-6]
        _last.second = (whole, text)
    return f"{text}.{micros:06d}Z"


def client_facts(client: Client) -> dict[str, Any]:
    tls = client.tls
    return {
        "ip": client.ip,
        "port": client.port,
        "helo": client.helo,
        "protocol": client.protocol,
        "tls": {"version": tls.version, "cipher": tls.cipher} if tls is not None else None,
        "user": client.user,
    }


def _facts(delivery: Delivery, parsed: Parsed) -> dict[str, Any]:
    message: Message = delivery.message
    return {
        "id": message.id,
        "received_at": moment(message.received_at),
        "size": message.stored.size,
        "priority": message.priority,
        "listener": message.listener,
        "envelope": {
            "mail_from": message.envelope.mail_from,
            "mail_params": message.envelope.mail_params,
            "rcpt_to": [recipient.address for recipient in delivery.recipients],
            "rcpt_params": {recipient.address: recipient.params for recipient in delivery.recipients if recipient.params},
        },
        "client": client_facts(message.client),
        "checks": message.checks,
        "headers": parsed.headers,
        "subject": parsed.subject,
        "from": _mailboxes(parsed.from_),
        "to": _mailboxes(parsed.to),
        "cc": _mailboxes(parsed.cc),
        "reply_to": _mailboxes(parsed.reply_to),
        "date": parsed.date.isoformat() if parsed.date is not None else None,
        "message_id": parsed.message_id,
        "in_reply_to": parsed.in_reply_to,
        "references": parsed.references,
        "text": parsed.text,
        "html": parsed.html,
    }


def _mailboxes(found: list[Mailbox]) -> list[dict[str, str]]:
    return [{"name": mailbox.name, "address": mailbox.address} for mailbox in found]


def _dumps(value: object) -> bytes:
    try:
        return orjson.dumps(value, default=sayable, option=OPTION)
    except TypeError:
        return orjson.dumps(_sayable(value))


def _sayable(value: object) -> object:
    """What JSON cannot say (facts of a check, lone surrogates) is said as text: it must not hold up a delivery."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {str(_sayable(str(key))): _sayable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_sayable(inner) for inner in value]
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and -(1 << 63) <= value < 1 << 64):
        return value
    return _sayable(str(value))


def _base64(octets: bytes) -> list[bytes]:
    return [binascii.b2a_base64(octets[at : at + _PIECE], newline=False) for at in range(0, len(octets), _PIECE)]
