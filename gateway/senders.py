"""Which senders an identity may use: ``[senders]``, in Postfix's words ``smtpd_sender_login_maps``.

Pure look-up, no I/O. Patterns are those of routes (``name@domain``, ``*@domain``, ``*``), compared
without regard to case. With a table, an identity may use what its entry and the entry ``"*"``
name, and no other sender; an identity without an entry that is an address owns that address.
Without a table any sender will do, but on a submission listener (``strict``), where an identity
that is an address is held to it. The null sender is everybody's: receipts have no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .message import Client
from .reply import Reply
from .route import Route, Routes

NOT_LOGGED_IN = Reply(553, "5.7.1", "Sender address rejected: not logged in")

_NOBODY = Client(None)


class Senders:
    """``patterns`` by identity. ``strict``: the rules of submission (RFC 6409 §6.1): see above, and
    whoever is not logged in may use no sender that the table gives to somebody."""

    def __init__(self, patterns: Mapping[str, Sequence[str]], hostname: str, *, strict: bool = False) -> None:
        self._strict = strict
        self._tables = {identity: _table(allowed, hostname) for identity, allowed in patterns.items()}
        own = [pattern for identity, allowed in patterns.items() if identity != "*" for pattern in allowed if pattern != "*"]
        self._owned = _table(own, hostname) if own else None

    def refusal(self, user: str | None, address: str, local: str, domain: str) -> Reply | None:
        """None if this identity (None: not logged in) may send as this address, else 553."""
        if not address:
            return None
        if user is None:
            # Somebody else's address, on a listener where people log in.
            owned = self._strict and self._owned is not None and _holds(self._owned, local, domain)
            return NOT_LOGGED_IN if owned else None
        own_address = "@" in user and address.lower() == user.lower()
        if not self._tables:
            allowed = own_address or not (self._strict and "@" in user)
        else:
            entries = [self._tables[identity] for identity in (user, "*") if identity in self._tables]
            allowed = any(_holds(entry, local, domain) for entry in entries) or (own_address and user not in self._tables)
        return None if allowed else Reply(553, "5.7.1", f"Sender address rejected: not owned by user {user}")


def _table(patterns: Sequence[str], hostname: str) -> Routes:
    return Routes([Route(tuple(patterns), ("own",))] if patterns else [], hostname)


def _holds(table: Routes, local: str, domain: str) -> bool:
    return isinstance(table.find(local, domain, _NOBODY), Route)
