"""XCLIENT and XFORWARD: what a trusted mail server or filter says about whom it speaks for.

Owns the grammar of both, as Postfix defines it (XCLIENT_README, XFORWARD_README): attribute
names, xtext, ``[UNAVAILABLE]``, ``[TEMPUNAVAIL]``, ``IPV6:``. Decides, changes nothing: who is
trusted and what becomes of the session stand in ``server.py``. XCLIENT changes who the client
is, for every rule; XFORWARD is for the log alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

from ..message import Client
from ..reply import Reply
from . import replies
from .proxy import UNKNOWN_ADDRESS

#: Octets of a value.
VALUE_LIMIT = 255

#: Values by attribute; None: the sender does not know.
Attributes = dict[str, str | None]

_ENCODED = re.compile(rb"\+([0-9A-Fa-f]{2})|\+")
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*\.?")
_DIGITS = re.compile(r"[0-9]{1,5}")
#: What would mean something in a header field or a log line of a mail server.
_SPECIAL = re.compile(r'[^!-~]|[<>()\\";@]')
_PROTOCOL_LIMIT = 64


def named(argument: str) -> Attributes | Reply:
    """The attributes of XCLIENT, or the reply that refuses them. ADDR comes back without prefix."""
    return _attributes(argument, _XCLIENT)


def forwarded(argument: str) -> Attributes | Reply:
    """The attributes of XFORWARD, or the reply that refuses them."""
    return _attributes(argument, _XFORWARD)


def changed(client: Client, told: Mapping[str, str | None]) -> Client:
    """The client as XCLIENT makes it. Address and port stay unless they are told; HELO name,
    protocol and login belong to the session that ends here. TLS is the connection's own."""
    ip, port = client.ip, client.port
    if "ADDR" in told:
        ip, port = told["ADDR"] or UNKNOWN_ADDRESS, 0
    if "PORT" in told:
        port = int(told["PORT"] or 0)
    return replace(client, ip=ip, port=port, helo=told.get("HELO") or "", protocol=told.get("PROTO") or "SMTP", user=told.get("LOGIN"))


def _attributes(argument: str, judges: Mapping[str, Callable[[str], str | None]]) -> Attributes | Reply:
    words = argument.split()
    if not words:
        return replies.NO_ATTRIBUTES
    found: Attributes = {}
    for word in words:
        name, equals, raw = word.partition("=")
        name = name.upper()
        if not equals:
            return replies.NO_ATTRIBUTES
        if name not in judges:
            return replies.UNKNOWN_ATTRIBUTE
        text = _decoded(raw)
        if text is None:
            return replies.BAD_ATTRIBUTE[name]
        unknown = text.upper()
        if unknown == "[UNAVAILABLE]" or (unknown == "[TEMPUNAVAIL]" and name == "NAME"):
            found[name] = None
            continue
        value = judges[name](text)
        if value is None:
            return replies.BAD_ATTRIBUTE[name]
        found[name] = value
    return found


def _decoded(raw: str) -> str | None:
    """xtext (RFC 3461 §4) as text; what was never encoded is taken as it stands."""
    octets = raw.encode()
    if any(not match[1] for match in _ENCODED.finditer(octets)):
        return None
    octets = _ENCODED.sub(lambda match: bytes([int(match[1], 16)]), octets)
    if not octets or len(octets) > VALUE_LIMIT:
        return None
    try:
        text = octets.decode()
    except UnicodeDecodeError:
        return None
    return text if text.isprintable() else None


def _host(text: str) -> str | None:
    return text if _HOST.fullmatch(text) else None


def _address(text: str) -> str | None:
    try:
        if text[:5].upper() == "IPV6:":
            address = IPv6Address(text[5:])
            return None if address.scope_id else str(address.ipv4_mapped or address)
        return str(IPv4Address(text))
    except ValueError:
        return None


def _port(text: str) -> str | None:
    return str(int(text)) if _DIGITS.fullmatch(text) and int(text) <= 0xFFFF else None


def _protocol(text: str) -> str | None:
    return text.upper() if text.upper() in ("SMTP", "ESMTP") else None


def _login(text: str) -> str | None:
    return None if " " in text else text


def _anything(text: str) -> str | None:
    return text


def _quiet(text: str) -> str | None:
    """Others' words for our log: what could mean something else there is a question mark."""
    return _SPECIAL.sub("?", text)


def _other_protocol(text: str) -> str | None:
    return _quiet(text) if len(text) <= _PROTOCOL_LIMIT else None


def _source(text: str) -> str | None:
    return text.upper() if text.upper() in ("LOCAL", "REMOTE") else None


_XCLIENT: dict[str, Callable[[str], str | None]] = {
    "NAME": _host,
    "ADDR": _address,
    "PORT": _port,
    "PROTO": _protocol,
    "HELO": _anything,
    "LOGIN": _login,
    "DESTADDR": _address,
    "DESTPORT": _port,
}
_XFORWARD: dict[str, Callable[[str], str | None]] = {
    "NAME": _quiet,
    "ADDR": _address,
    "PORT": _port,
    "PROTO": _other_protocol,
    "HELO": _quiet,
    "IDENT": _quiet,
    "SOURCE": _source,
}
