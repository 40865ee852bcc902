"""What the server says: every canned reply of a ServerSession, made once.

Owns the wording and the codes of reference table F, C, P, B, R and L; knows no session. Each
text names the thing and, where there is one, the way out. RFC 5321 §4.2, RFC 3463.

``CLOSING``: after one of these the connection ends (and after every 421, RFC 5321 §3.8).
"""

from __future__ import annotations

from base64 import b64encode
from functools import lru_cache
from typing import Final

from ..reply import Reply

#: Attributes, as EHLO names them.
XCLIENT: Final = ("NAME", "ADDR", "PORT", "PROTO", "HELO", "LOGIN", "DESTADDR", "DESTPORT")
XFORWARD: Final = ("NAME", "ADDR", "PORT", "PROTO", "HELO", "IDENT", "SOURCE")

# ------------------------------------------------------------------ all is well

QUIT: Final = Reply(221, "2.0.0", "closing the connection")
HELP: Final = Reply(214, "2.0.0", "RFC 5321 is spoken here: EHLO, MAIL, RCPT, DATA, BDAT, RSET, NOOP, VRFY, QUIT")
OK: Final = Reply(250, "2.0.0", "OK")
SENDER_OK: Final = Reply(250, "2.1.0", "sender OK")
RECIPIENT_OK: Final = Reply(250, "2.1.5", "recipient OK")
CHUNK_OK: Final = Reply(250, "2.0.0", "chunk received")
VRFY: Final = Reply(252, "2.5.0", "send mail and see: addresses are not verified")
TLS_READY: Final = Reply(220, "2.0.0", "begin TLS now")
LOGGED_IN: Final = Reply(235, "2.7.0", "authentication succeeded")
START_CONTENT: Final = Reply(354, "", "send the message, end with <CRLF>.<CRLF>")

# ------------------------------------------------------------ lines and grammar

BARE_COMMAND: Final = Reply(500, "5.5.2", "control character, bare CR or bare LF in a command")
LINE_TOO_LONG: Final = Reply(500, "5.5.2", "line too long")
NOT_UTF8: Final = Reply(500, "5.5.2", "command is not UTF-8")
UNKNOWN: Final = Reply(500, "5.5.2", "command unknown")
NOT_OFFERED: Final = Reply(502, "5.5.1", "command not offered here")
FLOOD: Final = Reply(421, "4.7.0", "endless command line, closing")
TOO_MANY_BAD_LINES: Final = Reply(421, "4.7.0", "too many malformed lines, closing")
TOO_MANY_ERRORS: Final = Reply(421, "4.7.0", "too many errors, closing")

HELO_SYNTAX: Final = Reply(501, "5.5.4", "say HELO, EHLO or LHLO with your host name, at most 255 octets")
NO_ARGUMENT: Final = Reply(501, "5.5.4", "this command takes no argument")
ARGUMENT_NEEDED: Final = Reply(501, "5.5.4", "this command needs an argument")
SENDER_SYNTAX: Final = Reply(501, "5.1.7", "bad sender address, say MAIL FROM:<local@domain>")
RECIPIENT_SYNTAX: Final = Reply(501, "5.1.3", "bad recipient address, say RCPT TO:<local@domain>")
PARAMETER_SYNTAX: Final = Reply(501, "5.5.4", "bad parameter, say keyword or keyword=value")
PARAMETER_TWICE: Final = Reply(501, "5.5.4", "parameter given twice")
UTF8_SENDER: Final = Reply(550, "5.6.7", "non-ASCII address without SMTPUTF8")
UTF8_RECIPIENT: Final = Reply(553, "5.6.7", "non-ASCII address in a transaction without SMTPUTF8")

# -------------------------------------------------------------------- parameters

PARAMETER_UNKNOWN: Final = Reply(555, "5.5.4", "parameter not recognized or not offered")
BAD_SIZE: Final = Reply(501, "5.5.4", "SIZE wants a number of octets below 2^63")
BAD_BODY: Final = Reply(501, "5.5.4", "BODY is 7BIT, 8BITMIME or BINARYMIME")
BINARY_NOT_OFFERED: Final = Reply(555, "5.5.4", "BINARYMIME is not offered here")
BAD_SMTPUTF8: Final = Reply(501, "5.5.4", "SMTPUTF8 takes no value")
BAD_REQUIRETLS: Final = Reply(501, "5.5.4", "REQUIRETLS takes no value")
BAD_RET: Final = Reply(501, "5.5.4", "RET is FULL or HDRS")
BAD_ENVID: Final = Reply(501, "5.5.4", "ENVID is xtext of at most 100 octets")
BAD_NOTIFY: Final = Reply(501, "5.5.4", "NOTIFY is NEVER or a list of SUCCESS, FAILURE, DELAY")
BAD_AUTH: Final = Reply(501, "5.5.4", "AUTH is a mailbox in xtext or <>")
BAD_HOLDFOR: Final = Reply(501, "5.5.4", "HOLDFOR wants a number of seconds, at most nine digits")
BAD_HOLDUNTIL: Final = Reply(501, "5.5.4", "HOLDUNTIL wants a time like 2030-01-31T08:00:00Z")
HOLD_TWICE: Final = Reply(501, "5.5.4", "say HOLDFOR or HOLDUNTIL, not both")
HOLD_PAST: Final = Reply(501, "5.5.4", "HOLDUNTIL is in the past")
BAD_BY: Final = Reply(501, "5.5.4", "BY wants seconds and a mode, like 3600;R or 3600;NT")
BY_OVER: Final = Reply(501, "5.5.4", "BY with mode R wants a time above 0")
BY_BEFORE_RELEASE: Final = Reply(501, "5.5.4", "BY ends before the message would be released")
BAD_PRIORITY: Final = Reply(501, "5.5.4", "MT-PRIORITY is a number from -9 to 9")
BAD_ORCPT: Final = Reply(501, "5.5.4", "ORCPT is an address type, a semicolon and xtext, at most 500 octets")

# ----------------------------------------------------------------------- order

SAY_HELLO: Final = Reply(503, "5.5.1", "say EHLO first")
SAY_LHLO: Final = Reply(503, "5.5.1", "say LHLO first")
LMTP_ONLY: Final = Reply(500, "5.5.1", "this is LMTP, say LHLO")
SMTP_ONLY: Final = Reply(500, "5.5.1", "this is SMTP, say EHLO")
NESTED_MAIL: Final = Reply(503, "5.5.1", "a transaction is open, end it or say RSET")
NO_SENDER: Final = Reply(503, "5.5.1", "say MAIL first")
NO_RECIPIENTS: Final = Reply(554, "5.5.1", "no valid recipients")
NO_RECIPIENTS_LMTP: Final = Reply(503, "5.5.1", "no valid recipients")  # RFC 2033 §4.2
CHUNKS_BEGUN: Final = Reply(503, "5.5.1", "BDAT has begun, end it with LAST or say RSET")
BINARY_BY_DATA: Final = Reply(503, "5.5.1", "BINARYMIME comes by BDAT only")
IN_TRANSACTION: Final = Reply(503, "5.5.1", "not within a transaction, say RSET first")
TURNED_AWAY: Final = Reply(503, "5.5.1", "you were refused, say QUIT")
TLS_ALREADY: Final = Reply(554, "5.5.1", "TLS is active already")
TLS_NEEDED: Final = Reply(530, "5.7.0", "say STARTTLS first")
REQUIRETLS_IN_CLEAR: Final = Reply(530, "5.7.10", "REQUIRETLS wants TLS, say STARTTLS first")
AUTH_NEEDED: Final = Reply(530, "5.7.0", "authentication required")

# ------------------------------------------------------------------------ AUTH

AUTH_SYNTAX: Final = Reply(501, "5.5.4", "say AUTH with a mechanism and, if you like, its initial response")
AUTH_MECHANISM: Final = Reply(504, "5.5.4", "mechanism not offered, see the AUTH line after EHLO")
AUTH_AGAIN: Final = Reply(503, "5.5.1", "already authenticated")
AUTH_IN_CLEAR: Final = Reply(538, "5.7.11", "encryption required, say STARTTLS first")
AUTH_CANCELLED: Final = Reply(501, "5.7.0", "authentication cancelled")
AUTH_BASE64: Final = Reply(501, "5.5.2", "cannot decode base64")
AUTH_TOO_LONG: Final = Reply(500, "5.5.6", "authentication exchange line is too long")
TOO_MANY_LOGINS: Final = Reply(421, "4.7.0", "too many failed logins, closing")

# --------------------------------------------------------------------- recipients

TOO_MANY_RECIPIENTS: Final = Reply(452, "4.5.3", "too many recipients, send the rest in another transaction")
CANNOT_HOLD: Final = Reply(550, "5.3.3", "mail to this recipient is delivered before it is acknowledged, it cannot be held")
TOO_MANY_FOR_A_BOUNCE: Final = Reply(452, "4.5.3", "too many recipients for the null sender")
OTHER_PROMISE: Final = Reply(452, "4.5.3", "recipient is acknowledged otherwise than the first, send it in another transaction")

NO_REQUIRETLS: Final = Reply(550, "5.7.30", "REQUIRETLS support required: the way on from here cannot promise TLS")

# ------------------------------------------------------------------------ content

BARE_NEWLINE: Final = Reply(550, "5.5.2", "bare CR or LF")
BARE_NEWLINE_CLOSING: Final = Reply(521, "5.5.2", "bare CR or LF, closing")
NUL: Final = Reply(550, "5.6.0", "NUL in content")
LONG_LINE: Final = Reply(550, "5.6.0", "line too long, at most 998 octets")
LOOP: Final = Reply(554, "5.4.6", "routing loop: too many Received fields")

# -------------------------------------------------------------- no more of this

TOO_EARLY: Final = Reply(554, "5.5.0", "you sent on before our reply, closing")
NOT_SMTP: Final = Reply(554, "5.5.0", "SMTP is spoken here, closing")
NOT_TLS: Final = Reply(554, "5.5.0", "TLS is not spoken on this port, closing")
NO_ATTRIBUTES: Final = Reply(501, "5.5.4", "say ATTRIBUTE=value, as often as needed")
UNKNOWN_ATTRIBUTE: Final = Reply(501, "5.5.4", "attribute unknown here")
NO_XCLIENT: Final = Reply(550, "5.7.0", "not allowed from your address")
NO_PROXY: Final = Reply(500, "5.5.2", "PROXY is not allowed from your address, closing")
BAD_CHUNK: Final = Reply(501, "5.5.4", "say BDAT size [LAST]; without a size we cannot go on, closing")


@lru_cache(maxsize=64)
def greeting(hostname: str, lmtp: bool) -> Reply:
    """220 with our name first (RFC 5321 §4.2)."""
    return Reply(220, "", f"{hostname} {'LMTP' if lmtp else 'ESMTP'}")


@lru_cache(maxsize=64)
def greeted(hostname: str) -> Reply:
    """250 to HELO."""
    return Reply(250, "", hostname)


def challenge(octets: bytes) -> bytes:
    """334 with what a mechanism says (RFC 4954 §4)."""
    return b"334 %s\r\n" % b64encode(octets)


@lru_cache(maxsize=64)
def offer(
    hostname: str,
    message_size: int,
    recipients: int,
    keywords: tuple[str, ...],
    xclient: bool = False,
    mechanisms: tuple[str, ...] = (),
) -> bytes:
    """250 to EHLO and LHLO: our name, then what we offer, a line each. ``keywords``: see
    ``esmtp.offered``. ``xclient``: this client is trusted to speak for others. ``mechanisms``: those
    of AUTH that it may use now."""
    lines = [
        hostname,
        "PIPELINING",
        f"SIZE {message_size}",
        "8BITMIME",
        "SMTPUTF8",
        "ENHANCEDSTATUSCODES",
        "CHUNKING",
        *keywords,
        # No MAILMAX and no RCPTDOMAINMAX: neither is limited (RFC 9422 §4).
        f"LIMITS RCPTMAX={recipients}",
        *([f"XCLIENT {' '.join(XCLIENT)}", f"XFORWARD {' '.join(XFORWARD)}"] if xclient else []),
        *([f"AUTH {' '.join(mechanisms)}"] if mechanisms else []),
    ]
    *others, last = lines
    return "".join([*(f"250-{line}\r\n" for line in others), f"250 {last}\r\n"]).encode()


@lru_cache(maxsize=64)
def over_limit(limit: int) -> Reply:
    """552 for a message over ``limit`` octets."""
    return Reply(552, "5.3.4", f"message over the limit of {limit} octets")


@lru_cache(maxsize=64)
def hold_over_limit(seconds: int) -> Reply:
    """501 for a release later than in ``seconds``."""
    return Reply(501, "5.5.4", f"mail is held for at most {seconds} seconds")


@lru_cache(maxsize=64)
def by_under_minimum(seconds: int) -> Reply:
    """555 for BY with mode R below the minimum (RFC 2852: 55z)."""
    return Reply(555, "5.5.4", f"BY with mode R is for at least {seconds} seconds")


@lru_cache(maxsize=64)
def priority_changed(priority: int) -> Reply:
    """250 for a mail that gets another priority than it asked for (RFC 6710: the new one comes first)."""
    return Reply(250, "2.3.6", f"{priority} is the priority of this mail, log in to raise it")


@lru_cache(maxsize=64)
def chunk_over_limit(limit: int) -> Reply:
    """552 for one BDAT chunk so large that we do not even read over it."""
    return Reply(552, "5.3.4", f"chunk far over the limit of {limit} octets, closing")


#: XCLIENT and XFORWARD: the value of this attribute is none.
BAD_ATTRIBUTE: Final = {name: Reply(501, "5.5.4", f"bad value of {name}") for name in (*XCLIENT, *XFORWARD)}

#: After one of these the connection ends.
CLOSING: Final = frozenset({TOO_EARLY, NOT_SMTP, NOT_TLS, NO_PROXY, BAD_CHUNK, BARE_NEWLINE_CLOSING})

#: Faults of a line whatever its verb (``Command.fault``).
LINE_FAULTS: Final = {"newline": BARE_COMMAND, "long": LINE_TOO_LONG, "flood": FLOOD, "utf8": NOT_UTF8}

#: Faults of a MAIL line and of a RCPT line.
MAIL_FAULTS: Final = {
    "syntax": SENDER_SYNTAX,
    "path": SENDER_SYNTAX,
    "parameter": PARAMETER_SYNTAX,
    "duplicate": PARAMETER_TWICE,
}
RCPT_FAULTS: Final = {
    "syntax": RECIPIENT_SYNTAX,
    "path": RECIPIENT_SYNTAX,
    "parameter": PARAMETER_SYNTAX,
    "duplicate": PARAMETER_TWICE,
}

#: Faults of the content (``Receiver.content_fault``).
CONTENT_FAULTS: Final = {"newline": BARE_NEWLINE, "nul": NUL}
