"""What no table can see alone: tables that do not fit together, and what was probably not meant.

Judges unread tables and models alike, so that each fault of a file is told at once and a Config
made in a program is held to the same. No open relay leaves here (promise 6).
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from .. import passwords
from ..message import Client
from ..reply import Reply
from ..route import Network, Route, Routes, everybody
from .faults import ConfigError, Fault, Place, near
from .tables import SINKS, AnyCheck, AnySink, Authentication, RouteConfig, Upstream, WebhookConfig

if TYPE_CHECKING:
    from . import Config


def _off(value: Any) -> bool:
    return value not in (None, "off", [], {}, False)


def _no_tcp(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("unix:", "fd:"))


#: What the file will be able to say in a later version: place (``*`` is any entry), what cannot
#: be had there today, and what to write instead.
NOT_YET: list[tuple[tuple[str, ...], Callable[[Any], bool], str]] = [
    (("spool", "engine"), lambda value: value == "postgres", 'write "sqlite"'),
    (("spool", "dsn"), _off, "leave it out"),
    (("sinks", "*", "mx"), lambda value: value is True, "name the servers in hosts"),
    (
        ("sinks", "*", "format"),
        lambda value: value in ("cloudevents", "sendgrid", "mailgun", "postmark"),
        'write "standard" or "raw"',
    ),
    (("admin", "address"), _no_tcp, 'write "host:port"'),
    (("admin", "token"), _off, "leave it out"),
    (("admin", "token_file"), _off, "leave it out"),
]


def not_yet(tree: Mapping[str, Any]) -> list[Fault]:
    """Every use of what ``NOT_YET`` names, in unread tables and in models alike."""
    return [
        (place, f"not available yet in this version; {way}")
        for pattern, wanted, way in NOT_YET
        for place, value in _at(tree, pattern, ())
        if wanted(value)
    ]


def _at(node: Any, pattern: Sequence[str], place: Place) -> Iterator[tuple[Place, Any]]:
    if not pattern:
        yield place, node
        return
    key, rest = pattern[0], pattern[1:]
    if key == "*":
        pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for part, inner in pairs:
            yield from _at(inner, rest, (*place, part))
    elif isinstance(node, dict):
        if key in node:
            yield from _at(node[key], rest, (*place, key))
    elif isinstance(node, BaseModel) and hasattr(node, key):
        yield from _at(getattr(node, key), rest, (*place, key))


def _numbered(entries: Any) -> Iterator[tuple[int, Any]]:
    for number, entry in entries.items() if isinstance(entries, dict) else enumerate(entries):
        if entry is not None:
            yield number, entry


def mail_server(table: object) -> bool:
    """Is this unread (perhaps faulty) ``[sinks]`` table a mail server?"""
    return (
        isinstance(table, dict)
        and isinstance(kind := table.get("type"), str)
        and (issubclass(SINKS[kind], Upstream) if kind in SINKS else table.get("mail_server", True) is not False)
    )


def _unknown_names(number: int, route: object, sinks: Iterable[str], checks: Iterable[str]) -> Iterator[Fault]:
    """Names in an unread (perhaps faulty) route that no table has."""
    if not isinstance(route, Mapping):
        return
    named: list[tuple[tuple[str | int, ...], str, Iterable[str], object]] = [(("sink",), "sinks", sinks, route.get("sink"))]
    for key, known in (("sinks", sinks), ("checks", checks)):
        many = route.get(key)
        named += [((key, index), key, known, name) for index, name in enumerate(many if isinstance(many, list) else ())]
    for place, group, known, name in named:
        if isinstance(name, str) and name not in known:
            yield ("routes", number, *place), f"there is no table [{group}.{name}]{near(name, list(known))}"


def cross_faults(parts: Mapping[str, Any], relaying: set[str], unread: Sequence[object] = ()) -> list[Fault]:
    """What no table can see alone. A part that is None is faulty in itself: it exists, and
    nothing more is said of it here. ``relaying``: the names of the sinks that are mail servers.
    ``unread``: the routes as they were written, the faulty ones among them; none for models."""
    faults: list[Fault] = []
    sinks: Mapping[str, AnySink | None] = parts["sinks"]
    checks: Mapping[str, AnyCheck | None] = parts["checks"]
    taken: dict[str, str] = {}
    for number, listener in _numbered(parts["listeners"]):
        if listener.address in taken and not listener.address.endswith(":0"):
            faults.append((("listeners", number, "address"), f"{listener.address} is taken by {taken[listener.address]}"))
        taken.setdefault(listener.address, f"listeners[{number}]")
    admin = parts.get("admin")
    if admin is not None and admin.address in taken and not admin.address.endswith(":0"):
        faults.append((("admin", "address"), f"{admin.address} is taken by {taken[admin.address]}"))
    for number, route in enumerate(unread):
        faults.extend(_unknown_names(number, route, sinks, checks))
    for number, route in _numbered(parts["routes"]):
        if not unread:
            faults.extend(_unknown_names(number, route.model_dump(include={"sink", "sinks", "checks"}), sinks, checks))
        if (relay := _open_relay(route, relaying)) is not None:
            faults.append(
                (
                    ("routes", number),
                    f"would be an open relay: anybody could send to anybody through {relay!r}; name the domains in full, "
                    "or add clients narrower than everybody or authenticated = true",
                )
            )
    bounces = parts.get("bounces")
    if bounces is not None and bounces.sink not in sinks:
        faults.append((("bounces", "sink"), f"there is no table [sinks.{bounces.sink}]{near(bounces.sink, list(sinks))}"))
    return faults


def login_faults(parts: Mapping[str, Any]) -> Iterator[Fault]:
    """Listeners at which nobody could log in, and users with names that cannot be."""
    for key in ("users", "senders"):
        named = parts.get(key)
        for name in named if isinstance(named, Mapping) else ():
            if not (key == "senders" and name == "*") and (fault := passwords.name_fault(name)) is not None:
                yield (key, name), f"the name {fault}"
    certified = parts.get("client_certificates")
    for name, user in certified.items() if isinstance(certified, Mapping) else ():
        if isinstance(user, str) and (fault := passwords.name_fault(user)) is not None:
            yield ("client_certificates", name), f"the user's name {fault}"
    authentication: Authentication | None = parts.get("authentication")
    somebody = parts.get("users") or parts.get("users_file") or parts.get("unread_authentication")
    if authentication is not None:
        somebody = somebody or authentication.url or authentication.jwks_url
    for number, listener in _numbered(parts["listeners"]):
        if listener.certificate_identity != "off" and not certified:
            yield ("listeners", number, "certificate_identity"), "no certificate stands for anybody: write a table [client_certificates]"
        if listener.auth != "off" and not somebody and listener.certificate_identity == "off":
            yield (
                ("listeners", number, "auth"),
                "nobody can log in: there are no [users], no users_file and no [authentication] with url or jwks_url",
            )


def _open_relay(route: RouteConfig, relaying: set[str]) -> str | None:
    """The mail server that this route would open to the world (promise 6), or None."""
    relay = next((name for name in route.carriers if name in relaying), None)
    narrow = route.authenticated or not _everybody(route.clients)
    if relay is None or narrow or Route(tuple(route.recipients), (relay,)).domains_in_full:
        return None
    return relay


#: IPv4 as IPv6 sockets show it: a client there is judged by its IPv4 address.
_MAPPED = IPv6Network("::ffff:0:0/96")


def _everybody(clients: Sequence[Network] | None) -> bool:
    """``clients`` leave nobody out, also where that is said in pieces (0.0.0.0/1 and 128.0.0.0/1)."""
    if clients is None:
        return True
    four = list(collapse_addresses(network for network in clients if isinstance(network, IPv4Network)))
    six = list(collapse_addresses(network for network in clients if isinstance(network, IPv6Network)))
    return everybody([*four, *six]) or any(_MAPPED.subnet_of(network) for network in six)


def _login_warnings(config: Config) -> Iterator[Fault]:
    certified = any(listener.certificate_identity != "off" for listener in config.listeners)
    logins = any(listener.auth != "off" for listener in config.listeners)
    if config.client_certificates and not certified:
        yield ("client_certificates",), "no listener has certificate_identity: no certificate stands for anybody"
    for number, listener in enumerate(config.listeners):
        if listener.protocol == "submission" and listener.auth != "required":
            yield ("listeners", number, "auth"), 'RFC 6409 wants submission to be authenticated; write auth = "required"'
        if listener.auth_without_tls and not listener.address.startswith(("127.", "[::1]", "localhost:", "unix:")):
            yield ("listeners", number, "auth_without_tls"), "passwords travel in clear; keep it to loopback"
    if (config.users or config.users_file) and not logins:
        yield ("users" if config.users else "users_file",), "no listener has auth: nobody can ever log in"
    if config.senders and not (logins or certified):
        yield ("senders",), "no listener has auth: nobody is ever held to this"
    if config.users_file is not None and config.users_file.exists() and config.users_file.stat().st_mode & 0o004:
        yield ("users_file",), "everybody on this machine can read it; chmod o-r"
    try:
        accounts = config.accounts()
    except ConfigError:
        return  # told where it is used
    without = next((name for name, account in sorted(accounts.items()) if account.keys is None), None)
    chosen = config.authentication is not None and config.authentication.mechanisms is not None
    if without is not None and not chosen and any(account.keys is not None for account in accounts.values()):
        yield ("users",), f"SCRAM is not offered, because {without!r} has no SCRAM keys; make them with: gateway hash-password --scram"


def warnings(config: Config) -> list[Fault]:
    found: list[Fault] = []
    if "." not in config.hostname:
        found.append((("hostname",), f"{config.hostname!r} is no full domain name; many servers refuse mail from such a name"))
    if config.limits.message_size < 64 * 1024:
        found.append((("limits", "message_size"), "RFC 5321 wants at least 64 KiB to be taken"))
    if config.limits.recipients < 100:
        found.append((("limits", "recipients"), "RFC 5321 wants at least 100 recipients to be taken"))
    anyone = [Route(tuple(route.recipients), ()) for route in config.routes]
    if isinstance(Routes(anyone, config.hostname).find("postmaster", "", Client(ip=None)), Reply):
        found.append((("routes",), f"no route takes postmaster@{config.hostname}, which RFC 5321 demands of every mail server"))
    final: int | None = None
    named: set[str] = set()
    for number, route in enumerate(config.routes):
        if final is not None:
            found.append((("routes", number), f"is never reached: routes[{final}] takes every recipient from every client"))
        elif "*" in route.recipients and not route.authenticated and _everybody(route.clients):
            final = number
        if route.authenticated and all(listener.auth == listener.certificate_identity == "off" for listener in config.listeners):
            found.append((("routes", number, "authenticated"), "no listener has auth: no client can ever use this route"))
        for index, name in enumerate(route.checks):
            if not {"recipient", "content"} & set(config.checks[name].stages):
                found.append(
                    (("routes", number, "checks", index), f"{name!r} judges neither recipient nor content: naming it here changes nothing")
                )
        named.update(route.checks)
    carrying = {name for route in config.routes for name in route.carriers} | ({config.bounces.sink} if config.bounces else set())
    found.extend(_login_warnings(config))
    for name, sink in config.sinks.items():
        if name not in carrying:
            found.append((("sinks", name), "no route names it"))
        if sink.on_failure == "bounce" and config.bounces is None and name in carrying:
            found.append((("sinks", name, "on_failure"), "there is no [bounces]: what would bounce becomes a dead letter"))
        for key in ("secret", "previous_secret"):
            secret = getattr(sink, key, None)
            if isinstance(sink, WebhookConfig) and secret is not None and len(base64.b64decode(secret.removeprefix("whsec_"))) < 24:
                found.append((("sinks", name, key), "has fewer than 24 octets, the least that Standard Webhooks asks for"))
    for name, check in config.checks.items():
        if name not in named and not {"client", "sender"} & set(check.stages):
            found.append((("checks", name), "no route names it"))
    if config.retry.expire < config.retry.delays[0]:
        found.append((("retry", "expire"), "is shorter than the first delay: every message gets one try only"))
    return found
