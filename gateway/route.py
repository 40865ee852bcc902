"""Which recipients we accept, from whom, and which sinks carry them.

Pure look-up, no I/O. First match wins (DESIGN §6). Promise 6 lives here: no route,
no mail (550 5.7.1); a domain of which single mailboxes are named answers 550 5.1.1
for the others; toward a relay odd local parts are refused, because the next server
might read ``%``, ``!`` or ``@`` in them again as routing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Final, Literal

from .message import Client
from .reply import Reply

Network = IPv4Network | IPv6Network

#: Pairs of a route and a client's address that are remembered, at most.
ADDRESSES_KNOWN: Final = 4096

RELAYING_DENIED: Final = Reply(550, "5.7.1", "no route for this recipient")
NO_SUCH_MAILBOX: Final = Reply(550, "5.1.1", "no such mailbox")
ODD_LOCAL_PART: Final = Reply(550, "5.7.1", "local parts with %, ! or @ are not relayed")


@dataclass(frozen=True)
class Route:
    """One ``[[routes]]`` entry, ready for use.

    ``sinks``: names, each gets a copy. ``relays``: one of them is a mail server, which may
    re-read local parts. ``requiretls``: every one of them can carry mail with REQUIRETLS.
    ``clients``: None is everybody. ``checks``: names, in order.
    ``acknowledge_timeout`` in seconds."""

    recipients: tuple[str, ...]
    sinks: tuple[str, ...]
    clients: tuple[Network, ...] | None = None
    authenticated: bool = False
    acknowledge: Literal["durable", "delivered"] = "durable"
    acknowledge_timeout: float = 30.0
    fallback: Literal["durable", "refuse"] = "durable"
    odd_local_parts: bool = False
    relays: bool = False
    checks: tuple[str, ...] = ()
    requiretls: bool = False

    def admits(self, client: Client) -> bool:
        """May this client use the route? A client on a unix socket counts as loopback."""
        if self.authenticated and client.user is None:
            return False
        if self.clients is None:
            return True
        return self.covers(client.ip or "127.0.0.1")

    def covers(self, ip: str) -> bool:
        """Is this address among ``clients``?"""
        address = ip_address(ip)
        mapped = getattr(address, "ipv4_mapped", None)
        return self.clients is None or any((mapped or address) in network or address in network for network in self.clients)

    @property
    def domains_in_full(self) -> bool:
        """True if every pattern ends in a domain without ``*``: the route reaches only
        domains that somebody wrote down."""
        return all("@" in p and "*" not in p.rpartition("@")[2] for p in self.recipients)


class Routes:
    """The table. ``hostname`` is the domain of ``<Postmaster>`` (RFC 5321 §4.5.1)."""

    def __init__(self, routes: Sequence[Route], hostname: str) -> None:
        self.routes = tuple(routes)
        #: By route: whether its ``clients`` hold an address. Asked for every recipient, and slow to find out.
        self._known: list[dict[str, bool]] = [{} for _ in self.routes]
        self.hostname = hostname.lower()
        # Most patterns are "user@domain" or "*@domain": those cost a dict look-up.
        self._exact: dict[str, list[int]] = {}
        self._domain: dict[str, list[int]] = {}
        self._everybody: list[int] = []
        self._other: list[tuple[int, re.Pattern[str]]] = []
        for number, route in enumerate(self.routes):
            for pattern in route.recipients:
                self._add(number, pattern.lower())
        self._mailbox_domains = {
            pattern.rpartition("@")[2].lower(): None
            for route in self.routes
            for pattern in route.recipients
            if "@" in pattern and "*" not in pattern
        }

    def _add(self, number: int, pattern: str) -> None:
        local, _, domain = pattern.rpartition("@")
        if "*" not in pattern:
            self._exact.setdefault(pattern, []).append(number)
        elif local == "*" and "*" not in domain:
            self._domain.setdefault(domain, []).append(number)
        elif pattern == "*":
            self._everybody.append(number)
        else:
            inner = ".*".join(re.escape(piece) for piece in local.split("*"))
            outer = "[^@]*".join(re.escape(piece) for piece in domain.split("*"))
            self._other.append((number, re.compile(f"{inner}@{outer}\\Z", re.DOTALL)))

    def find(self, local: str, domain: str, client: Client) -> Route | Reply:
        """The route for one recipient of this client, or the reply that refuses it.

        ``domain`` in lower case, ``""`` for ``<Postmaster>``; ``local`` as given. Patterns are
        compared without regard to case; quotes around a local part that does not need
        them make no difference."""
        domain = domain or self.hostname
        plain = _unquoted(local).lower()
        numbers = self._everybody
        if self._exact:
            numbers = _both(numbers, self._exact.get(f"{plain}@{domain}"))
        if self._domain:
            numbers = _both(numbers, self._domain.get(domain))
        if self._other:
            address = f"{plain}@{domain}"
            numbers = _both(numbers, [number for number, pattern in self._other if pattern.match(address)])
        for number in numbers:
            route = self.routes[number]
            if self._admits(number, route, client):
                if route.relays and not route.odd_local_parts and any(c in plain for c in "%!@"):
                    return ODD_LOCAL_PART
                return route
        if not numbers and domain in self._mailbox_domains:
            return NO_SUCH_MAILBOX
        return RELAYING_DENIED

    def _admits(self, number: int, route: Route, client: Client) -> bool:
        """``Route.admits``, its addresses looked up."""
        if route.clients is None or (route.authenticated and client.user is None):
            return route.admits(client)
        ip = client.ip or "127.0.0.1"
        known = self._known[number]
        covered = known.get(ip)
        if covered is None:
            if len(known) * len(self._known) >= ADDRESSES_KNOWN:
                known.clear()
            covered = known[ip] = route.covers(ip)
        return covered

    def sinks(self) -> set[str]:
        return {name for route in self.routes for name in route.sinks}


def _both(some: list[int], more: list[int] | None) -> list[int]:
    """Numbers of routes in either, in their order. Mostly one of the two is empty."""
    if not more:
        return some
    return sorted({*some, *more}) if some else more


def _unquoted(local: str) -> str:
    if local.startswith('"') and local.endswith('"') and len(local) >= 2:
        return re.sub(r"\\(.)", r"\1", local[1:-1])
    return local


def everybody(networks: Iterable[Network] | None) -> bool:
    """True if these ``clients`` leave nobody out (None, or a network of prefix length 0)."""
    return networks is None or any(network.prefixlen == 0 for network in networks)
