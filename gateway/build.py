"""The parts of a gateway, each made from what the Config says of it.

Owns the way from a table of the file to a socket, a sink, a check, TLS contexts, the rules of a
listener's sessions, the settings of a lane. Whatever cannot be made is a ConfigError, or one more
fault in a list, named by its key. Starts nothing and keeps nothing: who asks for a part has it to
close. When they are made, and in which order they come and go, is ``app.py``'s.
"""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from .checks import make_check
from .config import Config, ConfigError, ListenerConfig, split_address
from .contracts import Check, Sink
from .listener import Door
from .net.handover import Inheritance
from .net.sockets import bind, bind_unix, passed_on
from .net.tls import CertificateError, Identity
from .queue import LaneSettings
from .route import Routes
from .sinks import make_sink
from .smtp.extensions import Extensions
from .smtp.server import Rules

#: Before the name of the admin socket, when it is handed on.
ADMIN = "admin "
#: Room that must be free, as a multiple of the largest message.
ROOM_FOR_A_MESSAGE = 1.5


def bind_all(config: Config, inheritance: Inheritance | None = None) -> list[socket.socket]:
    """One listening socket per ``[[listeners]]`` entry, from who hands them on where there is somebody.
    Raises ConfigError with every fault."""
    bound = bind_some(config, range(len(config.listeners)), inheritance)
    return [bound[number] for number in range(len(config.listeners))]


def bind_some(config: Config, numbers: Iterable[int], inheritance: Inheritance | None = None) -> dict[int, socket.socket]:
    """The same for listeners by number."""
    sockets: dict[int, socket.socket] = {}
    faults: list[str] = []
    for number in numbers:
        listener = config.listeners[number]
        try:
            sockets[number] = (inheritance and inheritance.take(listener.address)) or _bound(listener)
        except OSError as error:
            faults.append(f"listeners[{number}].address: cannot listen on {listener.address}: {error.strerror or error}")
    if faults:
        for sock in sockets.values():
            sock.close()
        raise ConfigError(faults)
    return sockets


def named(config: Config, sockets: Sequence[socket.socket], admin: socket.socket | None) -> list[tuple[str, socket.socket]]:
    """The listening sockets as they are called when they are handed on."""
    found = [(entry.address, sock) for entry, sock in zip(config.listeners, sockets, strict=True)]
    return found if admin is None or config.admin is None else [*found, (ADMIN + config.admin.address, admin)]


def _bound(listener: ListenerConfig) -> socket.socket:
    kind, _, rest = listener.address.partition(":")
    if kind == "unix":
        return bind_unix(rest, int(listener.mode, 8))
    if kind == "fd":
        return passed_on(rest)
    return bind(*split_address(listener.address))


def bind_admin(config: Config, inheritance: Inheritance | None = None) -> socket.socket | None:
    """The socket of ``[admin]``, None without one. Raises ConfigError."""
    if config.admin is None:
        return None
    try:
        return (inheritance and inheritance.take(ADMIN + config.admin.address)) or bind(*split_address(config.admin.address))
    except OSError as error:
        raise ConfigError([f"admin.address: cannot listen on {config.admin.address}: {error.strerror or error}"]) from None


def door(listener: ListenerConfig) -> Door:
    """How clients of this listener come in."""
    return Door(tuple(listener.proxy_protocol_from), tuple(listener.xclient_from), listener.greet_delay)


def identities(config: Config) -> list[Identity | None]:
    """What each listener proves who it is with; None where it has no TLS."""
    return [
        None if listener.tls == "off" else Identity(listener.pairs, listener.client_ca, listener.client_certificate == "required")
        for listener in config.listeners
    ]


def contexts(config: Config) -> list[ssl.SSLContext | None]:
    """The TLS context of each listener, from what its files hold now. Raises ConfigError with every fault."""
    made: list[ssl.SSLContext | None] = []
    faults: list[str] = []
    for number, identity in enumerate(identities(config)):
        try:
            made.append(None if identity is None else identity.context())
        except CertificateError as error:
            faults.append(f"listeners[{number}].{_key_of(config.listeners[number], error.file)}: {error}")
    if faults:
        raise ConfigError(faults)
    return made


def _key_of(listener: ListenerConfig, file: Path) -> str:
    """The key of the file under which this path was given."""
    for key in ("certificate", "key", "client_ca"):
        if getattr(listener, key) == file:
            return key
    for number, pair in enumerate(listener.certificates):
        for key in ("certificate", "key"):
            if getattr(pair, key) == file:
                return f"certificates[{number}].{key}"
    return "certificates"


def stamps(config: Config) -> list[tuple[object, ...]]:
    return [() if identity is None else identity.stamp() for identity in identities(config)]


def rules(config: Config, listener: ListenerConfig, table: Routes, mechanisms: tuple[str, ...], *, binarymime: bool = True) -> Rules:
    """What the sessions of a listener go by. ``mechanisms``: of SASL, those that can be offered;
    ``binarymime``: every route's sink carries it."""
    return Rules(
        hostname=config.hostname,
        routes=table,
        protocol=listener.protocol,
        message_size=config.limits.message_size,
        recipients=config.limits.recipients,
        null_sender_recipients=config.limits.null_sender_recipients,
        hops=config.limits.hops,
        long_lines=listener.long_lines,
        bare_newlines=listener.bare_newlines,
        tls=listener.tls,
        auth=listener.auth,
        auth_without_tls=listener.auth_without_tls,
        mechanisms=mechanisms,
        senders=config.owners(listener),
        certificates=config.client_certificates,
        certificate_identity=listener.certificate_identity,
        binarymime=binarymime,
        requiretls=any(route.requiretls for route in table.routes),
        # Who offers DSN promises reports (RFC 3461 §5.2); without [bounces] nobody carries them.
        dsn=config.bounces is not None,
        extensions=_extensions(config, table),
        client_checks=config.checks_at("client"),
        sender_checks=config.checks_at("sender"),
        recipient_checks=frozenset(config.checks_at("recipient")),
    )


def _extensions(config: Config, table: Routes) -> Extensions:
    """What can be kept: a hold wants a route that acknowledges before it delivers, DELIVERBY somebody
    who carries notices."""
    asked = config.extensions
    durable = any(route.acknowledge == "durable" for route in table.routes)
    return Extensions(
        hold=asked.hold_limit if durable else 0.0,
        by=None if config.bounces is None else asked.deliver_by,
        priorities=asked.priorities,
        priorities_from=tuple(asked.priorities_from),
        clock=time.time,
    )


def lane_settings(config: Config) -> dict[str, LaneSettings]:
    """How the queue goes about each sink."""
    return {
        name: LaneSettings(sink.concurrency, sink.on_failure, sink.relays, sink.rate / config.worker_count, sink.carries_requiretls)
        for name, sink in config.sinks.items()
    }


async def opened_sinks(config: Config, names: Iterable[str], sinks: dict[str, Sink], faults: list[str]) -> None:
    """Make and open these; what could not be is a fault, what was made is in ``sinks`` all the same."""
    for name in names:
        try:
            sinks[name] = make_sink(name, config.sinks[name], config.hostname)
            await sinks[name].open()
        except (LookupError, ValueError, OSError) as error:
            faults.append(f"sinks.{name}: {error}")


def made_checks(config: Config, names: Iterable[str], checks: dict[str, Check], faults: list[str]) -> None:
    """The same with checks."""
    for name in names:
        try:
            checks[name] = make_check(name, config.checks[name])
        except (LookupError, ValueError, OSError) as error:
            faults.append(f"checks.{name}: {error}")


def least_room(config: Config, folder: Path) -> float:
    """What must stay free on the disk: ``minimum_free``, and never less than one and a half of
    the largest message (reference A1). A share below 1, or octets."""
    # The spool makes its folder when it opens.
    disk = os.statvfs(next(place for place in (folder, *folder.parents) if place.exists()))
    reserve, message = config.spool.minimum_free, ROOM_FOR_A_MESSAGE * config.limits.message_size
    if reserve.needed(disk.f_blocks * disk.f_frsize) < message:
        return message
    return reserve.share or reserve.octets
