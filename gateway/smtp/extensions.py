"""What a sender may ask of the queue: hold it, deliver it by then, how urgent it is.

FUTURERELEASE (RFC 4865, HOLDFOR and HOLDUNTIL), DELIVERBY (RFC 2852, BY) and MT-PRIORITY
(RFC 6710). Owns the grammar of the values, who is offered what, and what a message that was
accepted asks for; the queue carries it out and the relay passes it on. Pure: the clock of
``Extensions`` is handed in.

Decisions that the RFCs leave open: a hold is for submission listeners and for clients that
logged in; HOLDUNTIL may be past by ``SKEW``, for clocks that differ, and is then no hold; a BY
that ends before the hold does is refused; who is not trusted may lower the priority of his mail
and never raise it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Final, Literal

from ..message import Client, Envelope, Message, Params
from ..reply import Reply
from ..route import Network
from . import replies

#: Largest number that HOLDFOR and BY can say (nine digits).
LARGEST: Final = 999_999_999
#: Seconds by which HOLDUNTIL may be past.
SKEW: Final = 300.0

_HOLDFOR: Final = re.compile(r"[0-9]{1,9}")
_BY: Final = re.compile(r"([+-]?[0-9]{1,9});([NR])(T?)", re.IGNORECASE)
_PRIORITY: Final = re.compile(r"0|-?[1-9]")
_MOMENT: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Extensions:
    """What a listener lets senders ask for.

    ``hold``: longest hold in seconds, 0: FUTURERELEASE is not offered. ``by``: shortest time of
    BY with mode R in seconds, None: DELIVERBY is not offered. ``priorities``: whose wish for a
    priority above 0 counts; ``priorities_from``: networks whose wish counts as well. ``clock``:
    Unix seconds."""

    hold: float = 0.0
    by: float | None = None
    priorities: Literal["off", "authenticated", "everybody"] = "off"
    priorities_from: tuple[Network, ...] = ()
    clock: Callable[[], float] = lambda: 0.0

    def may_hold(self, protocol: str, client: Client) -> bool:
        """FUTURERELEASE is an extension of submission (RFC 4865): nobody parks mail here at no cost."""
        return self.hold > 0 and (protocol == "submission" or client.user is not None)

    def offered(self, protocol: str, client: Client) -> tuple[str, ...]:
        """The lines of EHLO for this client, now."""
        lines = []
        if self.may_hold(protocol, client):
            # To the minute: what is offered holds until it is used.
            until = datetime.fromtimestamp((self.clock() + self.hold) // 60 * 60, UTC)
            lines.append(f"FUTURERELEASE {int(self.hold)} {until:%Y-%m-%dT%H:%M:%SZ}")
        if self.by is not None:
            lines.append(f"DELIVERBY {int(self.by)}" if self.by else "DELIVERBY")
        if self.priorities != "off":
            lines.append("MT-PRIORITY")
        return tuple(lines)

    def refusal(self, params: Params, may_hold: bool) -> Reply | None:
        """What is wrong with these among the parameters of MAIL; None if nothing is. ``may_hold``: see there."""
        hold = 0.0
        if "HOLDFOR" in params or "HOLDUNTIL" in params:
            if not may_hold:
                return replies.PARAMETER_UNKNOWN
            if "HOLDFOR" in params and "HOLDUNTIL" in params:
                return replies.HOLD_TWICE
            now = self.clock()
            release = release_of(params, now)
            if release is None:
                return replies.BAD_HOLDFOR if "HOLDFOR" in params else replies.BAD_HOLDUNTIL
            hold = release - now
            if hold < -SKEW:
                return replies.HOLD_PAST
            if hold > self.hold:
                return replies.hold_over_limit(int(self.hold))
        if "BY" in params:
            if self.by is None:
                return replies.PARAMETER_UNKNOWN
            by = deliver_by_of(params)
            if by is None:
                return replies.BAD_BY
            if by.returns and by.seconds <= 0:
                return replies.BY_OVER
            if by.returns and by.seconds < self.by:
                return replies.by_under_minimum(int(self.by))
            if hold > 0 and by.seconds <= hold:
                return replies.BY_BEFORE_RELEASE
        if "MT-PRIORITY" in params:
            if self.priorities == "off":
                return replies.PARAMETER_UNKNOWN
            if priority_of(params) is None:
                return replies.BAD_PRIORITY
        return None

    def priority(self, params: Params, client: Client) -> int:
        """The priority that will apply (RFC 6710): nobody raises his own without trust."""
        wish = priority_of(params) or 0
        return wish if wish <= 0 or self._trusts(client) else 0

    def _trusts(self, client: Client) -> bool:
        if self.priorities == "everybody" or client.user is not None:
            return True
        if not self.priorities_from:
            return False
        address = ip_address(client.ip or "127.0.0.1")  # a unix socket
        mapped = getattr(address, "ipv4_mapped", None)
        return any((mapped or address) in network for network in self.priorities_from)


#: Nothing is offered.
NOTHING: Final = Extensions()

#: The keywords of MAIL that this module knows.
KEYWORDS: Final = frozenset({"HOLDFOR", "HOLDUNTIL", "BY", "MT-PRIORITY"})


@dataclass(frozen=True)
class DeliverBy:
    """BY (RFC 2852). ``seconds`` from when the message was received, maybe negative with mode
    N. ``returns``: mode R, it comes back if it is not delivered by then; else (N) its sender is
    told, and it is tried on. ``trace``: a ``relayed`` notice is wanted of every relay."""

    seconds: int
    returns: bool
    trace: bool

    def said(self, elapsed: float) -> str:
        """The value for the next hop, ``elapsed`` seconds after it was received."""
        left = max(-LARGEST, min(LARGEST, int(self.seconds - elapsed // 1)))
        return f"{left};{'R' if self.returns else 'N'}{'T' if self.trace else ''}"


def release_of(params: Params, now: float) -> float | None:
    """When a mail received ``now`` may go (Unix seconds). None: the value is none, or there is no hold."""
    value = params.get("HOLDFOR")
    if value is not None:
        return now + int(value) if _HOLDFOR.fullmatch(value) else None
    value = params.get("HOLDUNTIL")
    if value is None or not _MOMENT.fullmatch(value):
        return None
    try:
        return datetime.fromisoformat(value.upper()).timestamp()
    except (ValueError, OverflowError):
        return None


def deliver_by_of(params: Params) -> DeliverBy | None:
    """BY of a MAIL; None where there is none or its value is none."""
    found = _BY.fullmatch(params.get("BY") or "")
    if found is None or not found[0].isascii():
        return None
    return DeliverBy(int(found[1]), found[2].upper() == "R", bool(found[3]))


def priority_of(params: Params) -> int | None:
    """MT-PRIORITY of a MAIL (RFC 6710); None where there is none or its value is none."""
    value = params.get("MT-PRIORITY") or ""
    return int(value) if _PRIORITY.fullmatch(value) else None


def deadline(message: Message) -> tuple[float, DeliverBy] | None:
    """By when this message is to be delivered (Unix seconds), and what if not."""
    params = message.envelope.mail_params
    by = deliver_by_of(params) if params and "BY" in params else None
    return None if by is None else (message.received_at + by.seconds, by)


def first_limit(message: Message) -> float:
    """When the queue must act on a message that is still owed: give it up, or, where BY with mode
    N ends before that, tell its sender (Unix seconds). A BY that was over when it came was told by
    whoever sent it here."""
    timed = deadline(message)
    if timed is None or timed[1].seconds <= 0:
        return message.expires_at
    return min(timed[0], message.expires_at)


def untold(message: Message, limit: float) -> bool:
    """This ``first_limit`` is one at which the sender is told, and the message tried on."""
    return limit < message.expires_at and "BY" in message.envelope.mail_params and not _returns(message)


def _returns(message: Message) -> bool:
    timed = deadline(message)
    return timed is not None and timed[1].returns


def returned(message: Message, now: float) -> bool:
    """BY with mode R is over: it is returned, and not tried again."""
    timed = deadline(message)
    return timed is not None and timed[1].returns and now >= timed[0]


def traced_priority(envelope: Envelope, priority: int) -> int | None:
    """What Received says, and a next hop is told (RFC 6710): nothing where nothing was asked for."""
    params = envelope.mail_params
    return priority if priority or (params and "MT-PRIORITY" in params) else None


def priority_changed(params: Params, priority: int) -> bool:
    """Another priority applies than the one asked for: the replies say so (RFC 6710, X.3.6)."""
    return bool(params) and "MT-PRIORITY" in params and priority_of(params) != priority
