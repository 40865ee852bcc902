"""What a ServerSession decides about a command or a content, apart from what it then does.

Pure functions: they look and give back a Reply that refuses, or None (or the Route) where all
is well; the session alone changes anything. The order in which they look is the order in which
a client with several faults hears of them. Rows C, B, F, R and L of the reference.
"""

from __future__ import annotations

from typing import Final

from .._parser import Command
from ..contracts import Transaction
from ..message import TLS, Client, Params, Recipient
from ..reply import Reply
from ..route import Route
from . import replies
from .esmtp import mail_parameters, may_log_in, rcpt_parameters
from .events import Rules

#: Octets of a text line without its CRLF (RFC 5321 §4.5.3.1.6).
TEXT_LINE: Final = 998
#: Octets of the name that a client gives itself (RFC 5321 §4.5.3.1.2).
NAME: Final = 255


def hello(command: Command) -> Reply | None:
    name = command.argument
    if command.fault is not None or not name or len(name.encode()) > NAME:
        return replies.HELO_SYNTAX
    return None


def mail(rules: Rules, client: Client, greeted: bool, transaction: Transaction | None, command: Command, params: Params) -> Reply | None:
    """``params``: those of the command."""
    if not greeted:
        return replies.SAY_LHLO if rules.protocol == "lmtp" else replies.SAY_HELLO
    if transaction is not None:
        return replies.NESTED_MAIL
    if rules.tls == "required" and client.tls is None:
        return replies.TLS_NEEDED
    if rules.auth == "required" and client.user is None:
        return replies.AUTH_NEEDED
    if rules.shortage is not None:
        return rules.shortage
    fault = command.fault
    if fault is not None:
        return replies.MAIL_FAULTS[fault]
    if not command.ascii and "SMTPUTF8" not in params and not (command.address or "").isascii():
        return replies.UTF8_SENDER
    if params:
        if "REQUIRETLS" in params and client.tls is None and rules.requiretls and rules.tls == "starttls":
            return replies.REQUIRETLS_IN_CLEAR
        refusal = mail_parameters(params, rules, client)
        if refusal is not None:
            return refusal
    if rules.senders is not None:
        return rules.senders.refusal(client.user, command.address or "", command.local, command.domain)
    return None


def starttls(rules: Rules, client: Client, transaction: Transaction | None, command: Command) -> Reply | None:
    if client.tls is not None:
        return replies.TLS_ALREADY
    if rules.tls not in ("starttls", "required"):
        return replies.NOT_OFFERED if transaction is None else replies.IN_TRANSACTION
    if command.fault is not None:
        return replies.NO_ARGUMENT
    return None if transaction is None else replies.IN_TRANSACTION


def certified(rules: Rules, tls: TLS) -> str | None:
    """The user for whom this client's certificate stands, where the operator says that it may for any."""
    if rules.certificate_identity == "off":
        return None
    return next((rules.certificates[name] for name in tls.names if name in rules.certificates), None)


def auth(rules: Rules, client: Client, esmtp: bool, transaction: Transaction | None, command: Command) -> Reply | None:
    """``esmtp``: EHLO (LHLO) was said. ``client.user`` is who logged in before."""
    if transaction is not None:
        return replies.IN_TRANSACTION
    if rules.auth == "off":
        return replies.NOT_OFFERED
    if not may_log_in(rules, client):
        return replies.AUTH_IN_CLEAR
    if not esmtp:
        return replies.SAY_LHLO if rules.protocol == "lmtp" else replies.SAY_HELLO
    if client.user is not None:
        return replies.AUTH_AGAIN
    return replies.AUTH_SYNTAX if command.fault is not None or not command.argument else None


def rcpt(rules: Rules, transaction: Transaction | None, chunks_begun: bool, fault: str | None, params: Params) -> Reply | None:
    """Faults of the command; the merits of the recipient come after (``recipient``)."""
    if transaction is None:
        return replies.NO_SENDER
    if chunks_begun:
        return replies.CHUNKS_BEGUN
    if fault is not None:
        return replies.RCPT_FAULTS[fault]
    if params:
        return rcpt_parameters(params, rules, transaction.envelope.utf8)
    return None


def recipient(rules: Rules, transaction: Transaction, ascii: bool, address: str, local: str, domain: str) -> Route | Reply:
    """What becomes of this one, by its address; ``ascii``: all of the command is."""
    if not ascii and not transaction.envelope.utf8 and not address.isascii():
        return replies.UTF8_RECIPIENT
    routes = transaction.routes
    if len(routes) >= rules.recipients:
        return replies.TOO_MANY_RECIPIENTS
    if rules.null_sender_recipients is not None and not transaction.envelope.mail_from and len(routes) >= rules.null_sender_recipients:
        return replies.TOO_MANY_FOR_A_BOUNCE
    route = rules.routes.find(local, domain, transaction.client)
    if isinstance(route, Reply):
        return route
    if transaction.envelope.mail_params:
        if not route.requiretls and transaction.envelope.requiretls:
            return replies.NO_REQUIRETLS
        if route.acknowledge == "delivered" and transaction.envelope.held:
            return replies.CANNOT_HOLD
    if not routes or route is routes[0] or _same_promise(route, routes[0]):
        return route
    return replies.OTHER_PROMISE


def _same_promise(one: Route, other: Route) -> bool:
    """One reply after the end of data can be true for both."""
    if one.acknowledge != other.acknowledge:
        return False
    return one.acknowledge == "durable" or (one.acknowledge_timeout == other.acknowledge_timeout and one.fallback == other.fallback)


def named(rules: Rules, address: str, local: str, domain: str, params: Params) -> Recipient:
    """The recipient of a RCPT that is well formed; ``<Postmaster>`` is ours (RFC 5321 §4.5.1)."""
    if domain:
        return Recipient(address, local, domain, params)
    return Recipient(f"{local}@{rules.hostname}", local, rules.hostname.lower(), params)


def data(rules: Rules, transaction: Transaction | None, chunks_begun: bool, command: Command) -> Reply | None:
    if command.argument:
        return replies.NO_ARGUMENT
    if transaction is None:
        return replies.NO_SENDER
    if chunks_begun:
        return replies.CHUNKS_BEGUN
    if transaction.envelope.mail_params and transaction.envelope.binary:
        return replies.BINARY_BY_DATA
    return None if transaction.routes else _no_recipients(rules)


def chunk(rules: Rules, client: Client, transaction: Transaction | None, total: int) -> Reply | None:
    """``total``: octets of this chunk and those before it."""
    if rules.tls == "required" and client.tls is None:
        return replies.TLS_NEEDED
    if transaction is None:
        return replies.NO_SENDER
    if not transaction.routes:
        return _no_recipients(rules)
    return replies.over_limit(rules.message_size) if total > rules.message_size else None


def _no_recipients(rules: Rules) -> Reply:
    return replies.NO_RECIPIENTS_LMTP if rules.protocol == "lmtp" else replies.NO_RECIPIENTS


def content(rules: Rules, fault: str | None, size: int, longest: int, hops: int) -> Reply | None:
    """After the true end of the content; see ``Receiver.facts``. What smells of smuggling comes before what is merely too much."""
    if fault is not None:
        return content_fault(rules, fault)
    if size > rules.message_size:
        return replies.over_limit(rules.message_size)
    if hops > rules.hops:
        return replies.LOOP
    if rules.long_lines == "reject" and longest > TEXT_LINE:
        return replies.LONG_LINE
    return None


def content_fault(rules: Rules, fault: str) -> Reply:
    """For content, or a chunk of it, with a fault of the parser's (``Receiver.content_fault``)."""
    if fault == "newline" and rules.bare_newlines == "disconnect":
        return replies.BARE_NEWLINE_CLOSING
    return replies.CONTENT_FAULTS[fault]
