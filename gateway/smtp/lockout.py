"""Who guesses passwords has to wait: failed logins, counted by address and by user.

A pure table: time is handed in (seconds that only grow). After some free failures each further
one doubles the time in which nothing is even tried (row T5 of the reference). Unknown users are
counted like known ones, so that a lock tells nobody who exists.

A user is not locked for an address from which that user logged in before: whoever fails on
purpose under somebody's name locks out strangers only. An address is an IPv4 address or an IPv6
/64; loopback and unix sockets have none, because everybody behind a web mailer would be one. An
address that a proxy could not tell (``0.0.0.0``) is many clients: failures from there count by
user alone, and a login from there says nothing for the next one.

Bounded: the ``MOST`` names and addresses that failed last are kept.
"""

from __future__ import annotations

from collections import OrderedDict
from ipaddress import IPv6Address, ip_address
from typing import Final

#: Failures that cost nothing.
FREE_BY_ADDRESS: Final = 5
FREE_BY_USER: Final = 10
#: Seconds of the first lock; each further failure doubles it, up to the longest.
FIRST: Final = 5.0
LONGEST: Final = 3600.0
#: Seconds without a failure after which an address or a user begins anew.
FORGET: Final = 6 * 3600.0
#: Entries of each kind that are kept.
MOST: Final = 20_000


class _Failures:
    __slots__ = ("count", "last", "until")

    def __init__(self) -> None:
        self.count = 0
        self.last = 0.0
        self.until = 0.0


class Lockout:
    """The table of one process."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._addresses: OrderedDict[str, _Failures] = OrderedDict()
        self._users: OrderedDict[str, _Failures] = OrderedDict()
        self._known: OrderedDict[tuple[str, str], None] = OrderedDict()

    def locked(self, ip: str | None, user: str, now: float) -> float:
        """Seconds for which no login of this user from this address is tried; 0.0 if it may be."""
        address = _key(ip)
        left = _left(self._addresses.get(address), now) if address else 0.0
        if user and not self._was_in(address, user):
            left = max(left, _left(self._users.get(user), now))
        return left

    def failed(self, ip: str | None, user: str, now: float) -> None:
        """A login was refused. ``user`` is ``""`` where only a token would have said it."""
        address = _key(ip)
        if address:
            self._count(self._addresses, address, FREE_BY_ADDRESS, now)
        if user and not self._was_in(address, user):
            self._count(self._users, user, FREE_BY_USER, now)

    def succeeded(self, ip: str | None, user: str) -> None:
        """The user is who it says, at this address. What the address did otherwise stands."""
        address = _key(ip)
        if address is None:
            return
        self._known[(address, user)] = None
        self._known.move_to_end((address, user))
        if len(self._known) > self._most:
            self._known.popitem(last=False)

    def _was_in(self, address: str | None, user: str) -> bool:
        return address is not None and (address, user) in self._known

    def _count(self, table: OrderedDict[str, _Failures], key: str, free: int, now: float) -> None:
        entry = table.get(key)
        if entry is None or now - entry.last > FORGET:
            entry = table[key] = _Failures()
        table.move_to_end(key)
        entry.count += 1
        entry.last = now
        if entry.count > free:
            entry.until = now + min(FIRST * 2.0 ** min(entry.count - free - 1, 30), LONGEST)
        if len(table) > self._most:
            table.popitem(last=False)


def _left(entry: _Failures | None, now: float) -> float:
    return 0.0 if entry is None else max(entry.until - now, 0.0)


def _key(ip: str | None) -> str | None:
    """What counts as one address; ``""`` for this machine, None for one that nobody knows."""
    if ip is None:
        return ""
    address = ip_address(ip)
    if address.is_unspecified:
        return None
    if address.is_loopback:
        return ""
    if isinstance(address, IPv6Address):
        return str(IPv6Address(int(address) >> 64 << 64))
    return ip
