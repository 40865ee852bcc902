"""The configuration: what an operator may say, and every fault of it at once.

``tables`` has one model per table of the file, with the keys and their defaults, ``values`` what may
stand behind them, ``reading`` the way from a file to the tables, ``fit`` what no table can see alone,
``faults`` how a fault is told. A new kind of sink or check is one class in ``tables`` and one line in its
``SINKS`` or ``CHECKS``.

Opens no port and no spool; reads the file itself and the secrets it points at.

Invariants: a Config that exists has no fault. Unknown keys are faults. No open relay
leaves here (promise 6): a route to a mail server that reaches beyond domains named in
full has ``authenticated = true`` or ``clients`` narrower than everybody. Secrets appear
in no fault and in no ``repr``.

Order of precedence: command line > ``GATEWAY_SECTION__KEY`` in the environment > file >
default.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pydantic import Field, PrivateAttr, model_validator

from .. import passwords
from ..contracts import Stage
from ..route import Route, Routes
from ..senders import Senders
from .faults import ConfigError, lines
from .fit import cross_faults, login_faults, not_yet, warnings
from .reading import Reading
from .tables import (
    CHECKS,
    SINKS,
    Admin,
    Authentication,
    Bounces,
    CertificateConfig,
    CheckConfig,
    DiscardConfig,
    Drain,
    ExtensionsConfig,
    FileConfig,
    Head,
    HttpCheckConfig,
    Limits,
    ListenerConfig,
    LmtpConfig,
    PluginCheckConfig,
    PluginSinkConfig,
    PythonConfig,
    RelayConfig,
    Retry,
    RouteConfig,
    SinkConfig,
    SpoolConfig,
    StdoutConfig,
    Table,
    Upstream,
    WebhookConfig,
)
from .values import Reserve, certificate_name, read_users, reason, split_address

__all__ = [
    "CHECKS",
    "SINKS",
    "Admin",
    "Authentication",
    "Bounces",
    "CertificateConfig",
    "CheckConfig",
    "Config",
    "ConfigError",
    "DiscardConfig",
    "Drain",
    "ExtensionsConfig",
    "FileConfig",
    "Head",
    "HttpCheckConfig",
    "Limits",
    "ListenerConfig",
    "LmtpConfig",
    "PluginCheckConfig",
    "PluginSinkConfig",
    "PythonConfig",
    "RelayConfig",
    "Reserve",
    "Retry",
    "RouteConfig",
    "SinkConfig",
    "SpoolConfig",
    "StdoutConfig",
    "Table",
    "WebhookConfig",
    "certificate_name",
    "split_address",
    "state_folder",
]


class Config(Head):
    """All of it. Made by ``load``, ``parse`` or ``quick``, or in a program from the tables.

    Raises ConfigError where the tables do not fit together, whoever made them."""

    listeners: list[ListenerConfig]
    limits: Limits = Limits()
    drain: Drain = Drain()
    spool: SpoolConfig = Field(default_factory=SpoolConfig)
    retry: Retry = Retry()
    extensions: ExtensionsConfig = ExtensionsConfig()
    checks: dict[str, CheckConfig] = Field(default_factory=dict)
    sinks: dict[str, SinkConfig]
    routes: list[RouteConfig]
    bounces: Bounces | None = None
    authentication: Authentication | None = None
    admin: Admin | None = None

    _source: tuple[Path, Mapping[str, str], Mapping[str, Any]] | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _fits(self) -> Config:
        parts = {name: getattr(self, name) for name in type(self).model_fields}
        relaying = {name for name, sink in self.sinks.items() if sink.relays}
        if faults := [*not_yet(parts), *cross_faults(parts, relaying), *login_faults(parts)]:
            raise ConfigError(lines(faults))
        self.accounts()
        return self

    # ------------------------------------------------------------- ways to get one

    @classmethod
    def load(cls, path: str | Path, *, environment: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None) -> Config:
        """Read a TOML file. ``environment`` is ``os.environ`` unless given; ``flags`` are dotted
        places with their values (``{"spool.path": "/x"}``) and win over both.

        Raises ConfigError with every fault of it."""
        place = Path(path)
        variables = os.environ if environment is None else environment
        try:
            table = tomllib.loads(place.read_bytes().decode("utf-8"))
        except OSError as error:
            raise ConfigError([f"{place}: cannot be read: {reason(error)}"]) from None
        except UnicodeDecodeError:
            raise ConfigError([f"{place}: is not UTF-8 text"]) from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError([f"{place}: is no TOML: {error}"]) from None
        config = cls.parse(table, folder=place.absolute().parent, environment=variables, flags=flags)
        config._source = (place, variables, dict(flags or {}))
        return config

    def reload(self) -> Config:
        """The same file again, under the same flags and environment. A Config that came from
        no file is its own reload. Raises ConfigError."""
        if self._source is None:
            return self
        path, environment, flags = self._source
        return type(self).load(path, environment=environment, flags=flags)

    @classmethod
    def parse(
        cls,
        table: Mapping[str, Any],
        *,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        flags: Mapping[str, Any] | None = None,
    ) -> Config:
        """Make one of nested dicts and lists as TOML has them. Relative paths start at
        ``folder`` (default: the working folder). Raises ConfigError with every fault of it."""
        return cls(**Reading(folder, environment or {}, list(cls.model_fields)).parts(table, flags or {}))

    @classmethod
    def quick(
        cls,
        listen: Sequence[str] = ("127.0.0.1:2525",),
        to: Sequence[str] = ("discard:",),
        clients: Sequence[str] | None = None,
        spool: str | Path | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        flags: Mapping[str, Any] | None = None,
    ) -> Config:
        """A Config without a file, for ``gateway serve --listen … --to …``.

        Every recipient is taken and each ``to`` gets a copy. Toward smtp and lmtp only clients
        on loopback are served unless ``clients`` (networks) says more. The spool lies in the
        user's state folder unless ``spool`` says where. Raises ConfigError."""
        variables = os.environ if environment is None else environment
        faults: list[str] = []
        sinks: dict[str, dict[str, Any]] = {}
        for number, url in enumerate(to):
            try:
                sink = _sink_of(url)
            except ValueError as error:
                faults.append(f"--to[{number}]: {error}")
                continue
            name, count = sink["type"], 1
            while name in sinks:
                count += 1
                name = f"{sink['type']}-{count}"
            sinks[name] = sink
        if faults:
            raise ConfigError(faults)
        route: dict[str, Any] = {"recipients": ["*"], "sinks": list(sinks)}
        if clients:
            route["clients"] = list(clients)
        elif any(issubclass(SINKS[sink["type"]], Upstream) for sink in sinks.values()):
            route["clients"] = ["127.0.0.0/8", "::1/128"]
        table = {
            "listeners": [{"address": address} for address in listen],
            "sinks": sinks,
            "routes": [route],
            "spool": {"path": str(state_folder(variables) if spool is None else Path(spool).absolute())},
        }
        return cls.parse(table, environment=variables, flags=flags)

    # ---------------------------------------------------------------- what it says

    def table(self) -> Routes:
        """The routes, ready for look-up."""
        return Routes(
            [
                Route(
                    recipients=tuple(route.recipients),
                    sinks=route.carriers,
                    clients=None if route.clients is None else tuple(route.clients),
                    authenticated=route.authenticated,
                    acknowledge=route.acknowledge,
                    acknowledge_timeout=route.acknowledge_timeout,
                    fallback=route.fallback,
                    odd_local_parts=route.odd_local_parts,
                    relays=any(self.sinks[name].relays for name in route.carriers),
                    requiretls=all(self.sinks[name].carries_requiretls for name in route.carriers),
                    checks=tuple(route.checks),
                )
                for route in self.routes
            ],
            self.hostname,
        )

    def accounts(self) -> dict[str, passwords.Account]:
        """Everybody in ``users`` and ``users_file``; the file is read anew. Raises ConfigError."""
        found = {name: [passwords.read(text) for text in texts] for name, texts in self.users.items()}
        if self.users_file is not None:
            try:
                filed = read_users(self.users_file)
            except ValueError as error:
                raise ConfigError([f"users_file: {error}"]) from None
            if twice := sorted(found.keys() & filed.keys()):
                raise ConfigError([f"users_file: {twice[0]!r} stands in [users] as well; keep one of the two"])
            found |= filed
        return {name: passwords.account(forms) for name, forms in found.items()}

    def owners(self, listener: ListenerConfig) -> Senders | None:
        """Who may send as whom on this listener; None: nobody is held to anything."""
        strict = listener.protocol == "submission"
        return Senders(self.senders, self.hostname, strict=strict) if self.senders or strict else None

    def checks_at(self, stage: Stage) -> tuple[str, ...]:
        """The checks that judge at this stage, in the order of the file."""
        return tuple(name for name, check in self.checks.items() if stage in check.stages)

    @property
    def worker_count(self) -> int:
        """Processes to start: ``workers``, or one per core that we may use."""
        if self.workers:
            return self.workers
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1

    def warnings(self) -> list[str]:
        """What is no fault but was probably not meant: one line each, ``place: sentence``."""
        return lines(warnings(self))


def state_folder(environment: Mapping[str, str] | None = None) -> Path:
    """Where a gateway without a file keeps its spool (XDG Base Directory Specification)."""
    state = (os.environ if environment is None else environment).get("XDG_STATE_HOME") or ""
    home = Path(state) if os.path.isabs(state) else Path("~/.local/state").expanduser()
    return home / "gateway-smtp" / "spool"


def _sink_of(url: str) -> dict[str, Any]:
    """What one ``--to`` means, as a ``[sinks]`` table."""
    try:
        parts = urlsplit(url)
        login = {} if parts.username is None else {"username": unquote(parts.username), "password": unquote(parts.password or "")}
    except ValueError as error:
        raise ValueError(f"{url!r} is no URL: {error}") from None
    where = parts.netloc.rpartition("@")[2]
    match parts.scheme:
        case "http" | "https":
            return {"type": "webhook", "url": url}
        case "webhook+http" | "webhook+https":
            return {"type": "webhook", "url": url.removeprefix("webhook+")}
        case "smtp" if where and parts.path in ("", "/"):
            return {"type": "relay", "hosts": [where], **login}
        case "lmtp" if where and parts.path in ("", "/"):
            return {"type": "lmtp", "hosts": [where], **login}
        case "lmtp" if not where and parts.path.startswith("/") and len(parts.path) > 1:
            return {"type": "lmtp", "hosts": [f"unix:{unquote(parts.path)}"]}
        case "file" if where in ("", "localhost") and parts.path.startswith("/") and len(parts.path) > 1:
            return {"type": "file", "path": unquote(parts.path)}
        case "stdout" | "discard" if not where and not parts.path:
            return {"type": parts.scheme}
    raise ValueError(
        f"{url!r} says no place for mail; write http://…, https://…, smtp://host:port, lmtp://host:port, file:///folder, stdout: or discard:"
    )
