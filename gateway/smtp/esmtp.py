"""ESMTP parameters of MAIL and RCPT: is each known, and is its value one?

Owns the grammar of the values; the keywords were taken apart by the parser. Decides, changes
nothing: None is well, a Reply refuses. Keywords come in upper case.

SIZE RFC 1870, BODY RFC 6152 and RFC 3030, SMTPUTF8 RFC 6531, RET ENVID NOTIFY ORCPT RFC 3461
(ORCPT with ``utf-8`` RFC 6533), AUTH RFC 4954 §5, REQUIRETLS RFC 8689 §2. What is asked of the
queue stands in ``extensions.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from ..message import Client, Params
from ..reply import Reply
from . import replies
from .events import Rules
from .extensions import KEYWORDS

_XTEXT: Final = re.compile(r"(?:[!-*,-<>-~]|\+[0-9A-F]{2})+")
#: RFC 6533 §3: in a transaction with SMTPUTF8 an address of type utf-8 may be said as it is.
_UTF8_XTEXT: Final = re.compile(r"(?:[!-*,-<>-~\u0080-\U0010ffff]|\+[0-9A-F]{2})+")
_ADDRESS_TYPE: Final = re.compile(r"[A-Za-z0-9!#$%&'*+\-/=?^_`{|}~.]+")
_NOTIFY: Final = frozenset({"SUCCESS", "FAILURE", "DELAY"})
#: Of MAIL. All that RCPT may have is of DSN, too.
_DSN: Final = frozenset({"RET", "ENVID"})
_SIZE_DIGITS: Final = 20


def may_log_in(rules: Rules, client: Client) -> bool:
    """AUTH is offered to this client: never in clear unless the listener says so."""
    return rules.auth != "off" and (client.tls is not None or rules.auth_without_tls)


def may_require_tls(rules: Rules, client: Client) -> bool:
    """REQUIRETLS is offered to this client: only under TLS (RFC 8689 §2)."""
    return rules.requiretls and client.tls is not None


def offered(rules: Rules, client: Client) -> tuple[str, ...]:
    """Keywords of EHLO that not every listener says to every client."""
    return (
        *(["BINARYMIME"] if rules.binarymime else []),
        *(["DSN"] if rules.dsn else []),
        *(["REQUIRETLS"] if may_require_tls(rules, client) else []),
        *rules.extensions.offered(rules.protocol, client),
        *(["STARTTLS"] if client.tls is None and rules.tls in ("starttls", "required") else []),
    )


def mail_parameters(params: Params, rules: Rules, client: Client) -> Reply | None:
    """What was not offered to this client is unknown."""
    if not KEYWORDS.isdisjoint(params):
        refusal = rules.extensions.refusal(params, rules.extensions.may_hold(rules.protocol, client))
        if refusal is not None:
            return refusal
    for keyword, value in params.items():
        if keyword in KEYWORDS:
            continue
        judge = _MAIL.get(keyword)
        if judge is None or not _may_say(keyword, rules, client):
            return replies.PARAMETER_UNKNOWN
        refusal = judge(value, rules.message_size, rules.binarymime)
        if refusal is not None:
            return refusal
    return None


def rcpt_parameters(params: Params, rules: Rules, utf8: bool) -> Reply | None:
    """``utf8``: the transaction has SMTPUTF8."""
    for keyword, value in params.items():
        if not rules.dsn:
            return replies.PARAMETER_UNKNOWN
        if keyword == "NOTIFY":
            if not _is_notify(value or ""):
                return replies.BAD_NOTIFY
        elif keyword == "ORCPT":
            if not _is_orcpt(value or "", utf8):
                return replies.BAD_ORCPT
        else:
            return replies.PARAMETER_UNKNOWN
    return None


def _may_say(keyword: str, rules: Rules, client: Client) -> bool:
    if keyword == "AUTH":
        return may_log_in(rules, client)
    if keyword == "REQUIRETLS":
        return may_require_tls(rules, client)
    return rules.dsn or keyword not in _DSN


def _size(value: str | None, limit: int, binary: bool) -> Reply | None:
    if value is None or len(value) > _SIZE_DIGITS or not (value.isascii() and value.isdigit()) or int(value) >= 1 << 63:
        return replies.BAD_SIZE
    return replies.over_limit(limit) if int(value) > limit else None


def _body(value: str | None, limit: int, binary: bool) -> Reply | None:
    kind = (value or "").upper()
    if kind == "BINARYMIME":
        return None if binary else replies.BINARY_NOT_OFFERED
    return None if kind in ("7BIT", "8BITMIME") else replies.BAD_BODY


def _smtputf8(value: str | None, limit: int, binary: bool) -> Reply | None:
    return None if value is None else replies.BAD_SMTPUTF8


def _requiretls(value: str | None, limit: int, binary: bool) -> Reply | None:
    return None if value is None else replies.BAD_REQUIRETLS


def _ret(value: str | None, limit: int, binary: bool) -> Reply | None:
    return None if (value or "").upper() in ("FULL", "HDRS") else replies.BAD_RET


def _envid(value: str | None, limit: int, binary: bool) -> Reply | None:
    return None if value is not None and len(value) <= 100 and _XTEXT.fullmatch(value) else replies.BAD_ENVID


def _auth(value: str | None, limit: int, binary: bool) -> Reply | None:
    # Who submitted it first, says the client (RFC 4954 §5). Nobody is believed, so it goes no further.
    return None if value is not None and len(value) <= 500 and (value == "<>" or _XTEXT.fullmatch(value)) else replies.BAD_AUTH


def _is_notify(value: str) -> bool:
    words = value.upper().split(",")
    return words == ["NEVER"] or (len(set(words)) == len(words) and _NOTIFY.issuperset(words))


def _is_orcpt(value: str, utf8: bool) -> bool:
    kind, _, address = value.partition(";")
    grammar = _UTF8_XTEXT if utf8 and kind.lower() == "utf-8" else _XTEXT
    return len(value.encode()) <= 500 and _ADDRESS_TYPE.fullmatch(kind) is not None and grammar.fullmatch(address) is not None


_MAIL: Final[dict[str, Callable[[str | None, int, bool], Reply | None]]] = {
    "SIZE": _size,
    "BODY": _body,
    "SMTPUTF8": _smtputf8,
    "RET": _ret,
    "ENVID": _envid,
    "AUTH": _auth,
    "REQUIRETLS": _requiretls,
}
