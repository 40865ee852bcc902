"""A new configuration while mail goes on: all of it, or nothing.

First everything that the new one needs is made beside what there is: sockets are bound,
certificates read, sinks and checks opened. Only when all of that has come to pass (with several
workers: in each of them) does anything change, in one turn of the loop and without a step that
could fail. Otherwise what was made is closed again and the old configuration stands.

Owns what differs, and what stands ready; ``app.Gateway`` makes it and puts it in place.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from .config import Config, ListenerConfig
from .contracts import Check, Sink
from .smtp.server import Rules
from .users import Users

#: Keys that the running process keeps; with those of ``[spool]``, of which only ``hold`` can change.
FIXED = ("workers", "admin")


def unchangeable(old: Config, new: Config) -> list[str]:
    """A fault for everything that another process must do: a restart, or the new version of a hand-over."""
    places = [name for name in FIXED if getattr(old, name) != getattr(new, name)]
    if old.spool.model_copy(update={"hold": new.spool.hold}) != new.spool:
        places.append("spool")
    if _passed(old) != _passed(new):
        # Closed, its number may be anything's by the time it is wanted again.
        places.append("listeners (fd:)")
    return [f"{place}: only a restart or a hand-over (SIGUSR2) can change this" for place in places]


def _passed(config: Config) -> list[str]:
    return sorted(entry.address for entry in config.listeners if entry.address.startswith("fd:"))


def matched(old: Sequence[ListenerConfig], new: Sequence[ListenerConfig]) -> list[int | None]:
    """For each listener the place of the old one with its address, None where it is new."""
    free = list(enumerate(entry.address for entry in old))
    found: list[int | None] = []
    for entry in new:
        place = next((place for place, address in free if address == entry.address), None)
        if place is not None:
            free.remove((place, entry.address))
        found.append(place)
    return found


def adjust(old: ListenerConfig, new: ListenerConfig) -> None:
    """What can be changed of a socket that stays: the mode of its file."""
    if old.mode != new.mode and new.address.startswith("unix:"):
        with suppress(OSError):
            os.chmod(new.address.removeprefix("unix:"), int(new.mode, 8))


def changed(old: Config, new: Config, part: str) -> set[str]:
    """Names in ``sinks`` or ``checks`` that must be made: they are new or say something else."""
    before: dict[str, Any] = getattr(old, part)
    after: dict[str, Any] = getattr(new, part)
    everything = part == "sinks" and old.hostname != new.hostname
    return {name for name, entry in after.items() if everything or before.get(name) != entry}


@dataclass
class Prepared:
    """All that a new configuration needs. ``sockets``: by place in its listeners, for new ones;
    ``kept``: as ``matched``. ``sinks`` and ``checks`` are whole; those in ``made_…`` were made for it."""

    config: Config
    kept: list[int | None]
    sockets: dict[int, socket.socket] = field(default_factory=dict)
    sinks: dict[str, Sink] = field(default_factory=dict)
    made_sinks: dict[str, Sink] = field(default_factory=dict)
    checks: dict[str, Check] = field(default_factory=dict)
    made_checks: dict[str, Check] = field(default_factory=dict)
    users: Users | None = None
    made_users: bool = False
    accounts: Any = None
    rules: list[Rules] = field(default_factory=list)
    contexts: list[ssl.SSLContext | None] = field(default_factory=list)
    stamps: list[tuple[object, ...]] = field(default_factory=list)

    async def close(self) -> None:
        """It will not be: whatever was made for it goes."""
        for sock in self.sockets.values():
            sock.close()
        for sink in self.made_sinks.values():
            await sink.close()
        for check in self.made_checks.values():
            await check.close()
        if self.made_users and self.users is not None:
            await self.users.close()
