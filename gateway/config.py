"""The configuration: what an operator may say, and every fault of it at once.

Owns the keys, their defaults and their sentences of complaint. One model per table of
the file; a new kind of sink or check is one class here and one line in ``SINKS`` or
``CHECKS``. Values come out ready for use: sizes are octets (int), durations are seconds
(float), networks are ``ipaddress`` objects, relative paths are made absolute (they start
at the folder of the file).

Opens no port and no spool; reads the file itself and the secrets it points at.

Invariants: a Config that exists has no fault. Unknown keys are faults. No open relay
leaves here (promise 6): a route to a mail server that reaches beyond domains named in
full has ``authenticated = true`` or ``clients`` narrower than everybody. Secrets appear
in no fault and in no ``repr``.

Order of precedence: command line > ``GATEWAY_SECTION__KEY`` in the environment > file >
default.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import os
import re
import tomllib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from . import passwords
from .contracts import Stage
from .message import Client, Message
from .reply import Reply
from .route import Network, Route, Routes, everybody
from .senders import Senders

__all__ = [
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
    "WebhookConfig",
    "split_address",
    "state_folder",
]


class ConfigError(Exception):
    """The configuration cannot be used. ``faults``: one line each, ``place: sentence``."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = list(faults)


# ------------------------------------------------------- values written as text

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?", re.IGNORECASE | re.ASCII)
_SIZE_UNITS = {"b": 1} | {f"{p}b": 1000**n for n, p in enumerate("kmgt", 1)} | {f"{p}ib": 1024**n for n, p in enumerate("kmgt", 1)}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)", re.ASCII)
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*/\s*(s|m|h|d)", re.ASCII)
_DURATION_HELP = 'must be a duration like "250ms", "30s", "5m", "4h" or "5d"'
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
#: The last label of an IPv4 address in any notation: some libraries take 0x7f.1 for 127.0.0.1, others refuse it.
_ODD_NUMBER = re.compile(r"(^|\.)([0-9]+|0x[0-9a-f]*)\.?$", re.ASCII | re.IGNORECASE)
_CONTROLS = re.compile(r"[\x00-\x1f\x7f]")


def _size(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError('must be a size like "25 MiB", "500 B" or a number of octets')
    return int(float(match[1]) * _SIZE_UNITS[(match[2] or "B").lower()])


def _duration(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(_DURATION_HELP)
    if not isinstance(value, str):
        return value
    text = value.strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        raise ValueError(f"{_DURATION_HELP}: {text!r} has no unit")
    seconds, end = 0.0, 0
    while match := _DURATION.match(text, end):
        seconds += float(match[1]) * _DURATION_UNITS[match[2]]
        end = match.end()
        while end < len(text) and text[end] == " ":
            end += 1
    if not text or end != len(text):
        raise ValueError(_DURATION_HELP)
    return seconds


def _rate(value: object) -> object:
    if value == 0 and not isinstance(value, (bool, str)):
        return value
    match = _RATE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or not float(match[1]):
        raise ValueError('must be a rate like "50/s", "600/m" or "10000/h"')
    return float(match[1]) / _DURATION_UNITS[match[2]]


def _duration_or_off(value: object) -> object:
    return None if value == "off" else _duration(value)


def _network(value: object) -> object:
    if isinstance(value, (IPv4Network, IPv6Network)):
        return value
    if not isinstance(value, str):
        raise ValueError('must be text like "10.0.0.0/8"')
    try:
        return ip_network(value.strip())
    except ValueError:
        pass
    try:
        wider = ip_network(value.strip(), strict=False)
    except ValueError:
        raise ValueError('must be a network or an address like "10.0.0.0/8", "192.0.2.7" or "2001:db8::/32"') from None
    raise ValueError(f'{value!r} is an address inside a network; write "{wider}" for the network or leave /{wider.prefixlen} out')


def split_address(address: str, port: int | None = None) -> tuple[str, int]:
    """``host:port`` or ``[v6]:port`` as ``(host, port)``; ``port`` is what stands in where none
    is written. Raises ValueError with a sentence for the operator."""
    text = address.strip()
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        try:
            well = bool(bracket) and ip_address(host).version == 6
        except ValueError:
            well = False
        if not well:
            raise ValueError(f'{address!r} is no IPv6 address in brackets; write "[::1]:2525"')
    else:
        if text.count(":") > 1:
            raise ValueError(
                f'{address!r}: an IPv6 address stands in brackets; write "[{text.rpartition(":")[0] or "::"}]:{text.rpartition(":")[2]}"'
            )
        host, colon, rest = text.partition(":")
        rest = colon + rest
        if not host:
            raise ValueError(f'{address!r} has no host; write "0.0.0.0{rest}" for every IPv4 address or "[::]{rest}" for IPv6')
        if not _is_host(host):
            raise ValueError(f"{host!r} is neither an address nor a host name")
    if not rest and port is not None:
        return host, port
    if not re.fullmatch(r":[0-9]{1,5}", rest) or int(rest[1:]) > 65535:
        raise ValueError(f'{address!r} must end in a port between 0 and 65535; write "host:port"')
    return host, int(rest[1:])


def _is_host(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        pass
    else:
        return True
    labels = text.removesuffix(".").split(".")
    # All digits in the last label would be a mistyped IPv4 address.
    return len(text) <= 255 and all(_LABEL.fullmatch(label) for label in labels) and not labels[-1].isdigit()


def _listen_address(value: str) -> str:
    if value.startswith("unix:"):
        if not value.startswith("unix:/"):
            raise ValueError('the path of a unix socket is absolute; write "unix:/run/gateway/smtp.sock"')
        return value
    if value.startswith("fd:"):
        if not re.fullmatch(r"fd:([0-9]{1,9}|[!-9;-~]{1,255})", value):
            raise ValueError('a passed-on socket is known by its number or its name; write "fd:3" or "fd:smtp"')
        return value
    split_address(value)
    return value


def _mode(value: str) -> str:
    if not re.fullmatch(r"0?[0-7]{3}", value):
        raise ValueError('must be a mode in octal like "0660"')
    return value


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _upstream_address(port: int) -> Callable[[str], str]:
    def validate(value: str) -> str:
        if value.startswith("unix:"):
            return _listen_address(value)
        host, number = split_address(value, port)
        if number == 0:
            raise ValueError("port 0 cannot be connected to")
        return _joined(host, number)

    return validate


def _hostname(value: str) -> str:
    name = value.strip().removesuffix(".").lower()
    if not name.isascii():
        raise ValueError(f"{value!r} must be written in ASCII (the form that starts with xn--)")
    if len(name) > 255 or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise ValueError(f'{value!r} is no domain name; write one like "mx.example.net"')
    return name


def _rooted(value: Path, folder: Path | None) -> Path:
    path = value.expanduser()
    return path if path.is_absolute() else (folder or Path.cwd()) / path


def _absolute(value: Path, info: ValidationInfo) -> Path:
    return _rooted(value, (info.context or {}).get("folder"))


def _existing(value: Path, info: ValidationInfo) -> Path:
    path = _absolute(value, info)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    return path


def _url(value: str) -> str:
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"is no URL: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError('must be a URL like "https://app.example/inbound"')
    if _ODD_NUMBER.search(host) and not _is_host(host):
        raise ValueError(f"{host!r} is no IPv4 address; write four numbers from 0 to 255")
    if _CONTROLS.search(value) or " " in value:
        raise ValueError("has a space or a control character; percent-encode it")
    if parts.fragment:
        raise ValueError("has a #fragment, which is never sent; leave it out")
    return value


def _signing_secret(value: str) -> str:
    body = value.removeprefix("whsec_")
    try:
        octets = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        octets = b""
    if not octets:
        raise ValueError("must be whsec_ followed by base64; make one with: echo whsec_$(openssl rand -base64 32)")
    return value


#: Header fields that are ours to write (reference of the standard webhook form, RFC 9110 framing).
_OUR_HEADERS = {
    "host",
    "content-type",
    "content-length",
    "content-encoding",
    "transfer-encoding",
    "connection",
    "user-agent",
    "te",
    "trailer",
}
_OUR_HEADERS |= {"upgrade", "expect", "x-envelope-from", "x-envelope-to"}


def _headers(value: dict[str, str]) -> dict[str, str]:
    for name, text in value.items():
        if not _TOKEN.fullmatch(name):
            raise ValueError(f"{name!r} is no header name")
        if name.lower() in _OUR_HEADERS or name.lower().startswith("webhook-"):
            raise ValueError(f"{name!r} is written by the gateway itself; choose another name")
        if _CONTROLS.search(text) or not text.isascii():
            raise ValueError(f"the value of {name!r} has characters that no header may hold")
    return value


def _pattern(value: str) -> str:
    local, at, domain = value.rpartition("@")
    if value == "*":
        return value
    if not at:
        raise ValueError(f'{value!r} has no @; write "*@{value}" for a whole domain or "*" for everybody')
    if not local or not domain or _CONTROLS.search(value) or " " in domain:
        raise ValueError(f'{value!r} is no pattern; write "name@domain", "*@domain" or "*"')
    if "@" in local and not (len(local) > 1 and local[0] == local[-1] == '"'):
        raise ValueError(f'{value!r} has more than one @ and fits no address; only in a quoted local part ("a@b"@domain) may one stand')
    return value


def _hashes(value: object) -> object:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("must be a hash in quotes, or a list of them; make one with: gateway hash-password")
    passwords.account([passwords.read(text) for text in texts])
    return texts


def certificate_name(text: str) -> str:
    """A name of a client certificate as ``TLS.names`` has it. Raises ValueError."""
    kind, colon, value = text.partition(":")
    match kind.lower() if colon else "":
        case "sha256":
            fingerprint = value.replace(":", "").lower()
            if not re.fullmatch("[0-9a-f]{64}", fingerprint):
                raise ValueError("is no fingerprint: SHA-256 has 64 hexadecimal digits")
            return f"sha256:{fingerprint}"
        case "dns" if value:
            return f"DNS:{value.lower()}"
        case "email" if value:
            return f"email:{value}"
        case "uri" if value:
            return f"URI:{value}"
    if not re.match(r"[A-Za-z][A-Za-z0-9-]*=", text):
        raise ValueError('is no name of a certificate; write "sha256:…", "DNS:…", "email:…", "URI:…" or a subject like "CN=app,O=Example"')
    return text


def _certificate_users(value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    users: dict[object, object] = {}
    for text, user in value.items():
        try:
            name = certificate_name(text) if isinstance(text, str) else text
        except ValueError as error:
            raise ValueError(f"{text!r} {error}") from None
        if name in users:
            raise ValueError(f"{text!r} stands here twice, spelt differently")
        users[name] = user
    return users


class Reserve(BaseModel):
    """Room that must stay free: a ``share`` (0…1) of octets and of inodes, or ``octets``."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    share: float = 0.0
    octets: int = 0

    def needed(self, total: int) -> int:
        """Octets that must be free on a disk of ``total`` octets."""
        return max(self.octets, int(total * self.share))


def _reserve(value: object) -> object:
    if isinstance(value, Reserve):
        return value
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            percent = float(value.strip()[:-1])
        except ValueError:
            percent = -1.0
        if not 0 <= percent < 100:
            raise ValueError('must be a share like "5%" or a size like "2 GiB"')
        return Reserve(share=percent / 100)
    try:
        octets = _size(value)
    except ValueError:
        octets = None
    if not isinstance(octets, int) or isinstance(octets, bool) or octets < 0:
        raise ValueError('must be a share like "5%" or a size like "2 GiB"')
    return Reserve(octets=octets)


Size = Annotated[int, BeforeValidator(_size), Field(ge=0)]
Duration = Annotated[float, BeforeValidator(_duration), Field(ge=0, allow_inf_nan=False)]
#: A duration of nothing would mean "never in time".
Deadline = Annotated[float, BeforeValidator(_duration), Field(gt=0, allow_inf_nan=False)]
Rate = Annotated[float, BeforeValidator(_rate), Field(ge=0, le=1_000_000, allow_inf_nan=False)]
Networks = list[Annotated[IPv4Network | IPv6Network, BeforeValidator(_network)]]
FilePath = Annotated[Path, AfterValidator(_absolute)]
ExistingFile = Annotated[Path, AfterValidator(_existing)]
ListenAddress = Annotated[str, AfterValidator(_listen_address)]
Url = Annotated[str, AfterValidator(_url)]
Secret = Annotated[Annotated[str, Field(min_length=1)] | None, Field(repr=False)]
SigningSecret = Annotated[Annotated[str, AfterValidator(_signing_secret)] | None, Field(repr=False)]
Pattern = Annotated[str, AfterValidator(_pattern)]
#: Users by the names of their certificates, as ``TLS.names`` has those.
CertificateUsers = Annotated[dict[str, str], BeforeValidator(_certificate_users)]
#: One hash, or a hash and SCRAM keys.
Hashes = Annotated[list[str], BeforeValidator(_hashes)]


class Table(BaseModel):
    """A table of the file. Frozen; unknown keys are faults.

    Where a table has a secret ``x`` and a key ``x_file``, the text of that file (without the
    line end) becomes ``x``. Rules between keys stand in ``misfits``: they are judged beside
    the keys, so that every fault is told at once."""

    # Input may be a secret: pydantic's own errors (of tables made in a program) must not repeat it.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    @classmethod
    def misfits(cls, table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """``(key, sentence)`` for each pair of keys of the unread ``table`` that does not go together."""
        yield from ()

    @classmethod
    def prepare(cls, table: dict[str, Any], folder: Path | None) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        """The table with its secrets read and its short forms spelt out, and its misfits."""
        faults = list(cls.misfits(table))
        for key in [key for key in table if key.endswith("_file") and key.removesuffix("_file") in cls.model_fields]:
            secret, named = key.removesuffix("_file"), table[key]
            if not isinstance(named, (str, Path)):
                continue
            if table.get(secret) is not None:
                faults.append((key, f"{secret} is given as well; keep one of the two"))
                continue
            path = _rooted(Path(named), folder)
            try:
                text = path.read_text(encoding="utf-8").rstrip("\r\n")
            except (OSError, UnicodeDecodeError) as error:
                faults.append((key, f"cannot read {path}: {_reason(error)}"))
                continue
            if text:
                table = table | {secret: text}
            else:
                faults.append((key, f"{path} is empty"))
        return table, faults

    @model_validator(mode="before")
    @classmethod
    def _prepared(cls, table: Any, info: ValidationInfo) -> Any:
        if not isinstance(table, dict) or (info.context or {}).get("prepared"):
            return table
        table, faults = cls.prepare(table, None)
        if faults:
            raise ValueError("; ".join(f"{key}: {sentence}" for key, sentence in faults))
        return table


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "it is not UTF-8 text"


# ------------------------------------------------------------------- the tables


class CertificateConfig(Table):
    """``[[listeners.certificates]]``: a further certificate, for the names that stand in it (SNI)."""

    certificate: ExistingFile
    key: ExistingFile


class ListenerConfig(Table):
    """``[[listeners]]``: one bound address and what is spoken there. ``mode`` in octal, of a unix
    socket. ``greet_delay`` in seconds.

    ``certificate`` with ``key``, else the first of ``certificates``, is for clients that ask for no
    name we have. ``client_ca``: whose client certificates are asked for; with
    ``client_certificate = "required"`` there is no TLS without one. ``certificate_identity``: one that
    ``[client_certificates]`` names stands for its user: once the client said AUTH EXTERNAL, or at once."""

    address: ListenAddress
    protocol: Literal["smtp", "submission", "lmtp"] = "smtp"
    tls: Literal["off", "starttls", "required", "implicit"] = "off"
    certificate: ExistingFile | None = None
    key: ExistingFile | None = None
    certificates: list[CertificateConfig] = []
    client_ca: ExistingFile | None = None
    client_certificate: Literal["optional", "required"] = "optional"
    certificate_identity: Literal["off", "external", "implied"] = "off"
    auth: Literal["off", "offered", "required"] = "off"
    mode: Annotated[str, AfterValidator(_mode)] = "0660"
    greet_delay: Annotated[Duration, Field(le=60.0)] = 0.0
    auth_without_tls: bool = False
    proxy_protocol_from: Networks = []
    xclient_from: Networks = []
    bare_newlines: Literal["reject", "disconnect", "normalize"] = "reject"
    long_lines: Literal["accept", "reject"] = "accept"

    @classmethod
    def misfits(cls, table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        tls = table.get("tls", "off") != "off"
        for given, other in (("certificate", "key"), ("key", "certificate")):
            if table.get(given) is None and ((tls and not table.get("certificates")) or table.get(other) is not None):
                yield given, f"is missing: {other if table.get(other) is not None else 'tls'} needs it"
        if table.get("mode") not in (None, "0660") and not str(table.get("address", "")).startswith("unix:"):
            yield "mode", 'is for an address like "unix:/run/gateway/smtp.sock"; leave it out'
        if table.get("client_ca") is not None and not tls:
            yield "client_ca", 'tls is off; write tls = "required" (or "starttls", or "implicit")'
        if table.get("client_certificate", "optional") != "optional" and table.get("client_ca") is None:
            yield "client_certificate", "client_ca is missing: it says whose certificates are good"
        identity = table.get("certificate_identity", "off")
        if identity != "off" and table.get("client_ca") is None:
            yield "certificate_identity", "client_ca is missing: it says whose certificates are good"
        if identity == "external" and table.get("auth", "off") == "off":
            yield (
                "certificate_identity",
                'AUTH EXTERNAL is an AUTH; write auth = "offered" (or "required"), or certificate_identity = "implied"',
            )
        if table.get("auth", "off") != "off" and not tls and not table.get("auth_without_tls"):
            yield "auth", 'is never offered in clear, and tls is "off"; write tls = "required", or auth_without_tls = true'

    @property
    def pairs(self) -> tuple[tuple[Path, Path], ...]:
        """Every certificate with its key, the one for everybody first."""
        first = [] if self.certificate is None or self.key is None else [(self.certificate, self.key)]
        return (*first, *((pair.certificate, pair.key) for pair in self.certificates))


class Limits(Table):
    """``[limits]``: what one client, one mail and one process may take (promise 5).

    ``null_sender_recipients``: of one mail from <>; unless set, as of any other.

    Defaults of the time-outs: RFC 5321 §4.5.3.2. ``minimum_rate`` in octets a second,
    demanded of content after 30 s. ``memory``: octets of content that one worker holds in
    memory before it stops reading from clients."""

    message_size: Annotated[Size, Field(ge=1)] = 25 * 2**20
    recipients: Annotated[int, Field(ge=1)] = 1000
    null_sender_recipients: Annotated[int, Field(ge=1)] | None = None
    connections: Annotated[int, Field(ge=1)] = 10_000
    connections_per_client: Annotated[int, Field(ge=1)] = 100
    command_timeout: Deadline = 300.0
    data_timeout: Deadline = 180.0
    idle_timeout: Deadline = 300.0
    handshake_timeout: Deadline = 30.0
    minimum_rate: Size = 500
    hops: Annotated[int, Field(ge=1, le=1000)] = 100
    memory: Annotated[Size, Field(ge=2**20)] = 128 * 2**20


class Drain(Table):
    """``[drain]``: how long SIGTERM waits for what is under way."""

    timeout: Duration = 30.0


class SpoolConfig(Table):
    """``[spool]``: the durable place. Each worker has a folder of its own below ``path``."""

    engine: Literal["sqlite", "postgres"] = "sqlite"
    path: Annotated[FilePath, Field(validate_default=True)] = Path("spool")
    dsn: Annotated[str | None, Field(repr=False)] = None
    minimum_free: Annotated[Reserve, BeforeValidator(_reserve)] = Reserve(share=0.05)
    hold: Annotated[Duration, Field(le=1.0)] = 0.025


class Retry(Table):
    """``[retry]``: seconds between tries (the last one repeats) and until giving up."""

    delays: Annotated[list[Deadline], Field(min_length=1)] = [60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 14400.0]
    expire: Deadline = 5 * 86400.0


class ExtensionsConfig(Table):
    """``[extensions]``: what senders may ask of the queue.

    ``hold_limit``: longest hold (FUTURERELEASE), 0 for none; ``deliver_by``: shortest time for
    BY with mode R (DELIVERBY, which wants ``[bounces]``), None for none; both in seconds. ``priorities``: whose
    wish to be urgent counts (MT-PRIORITY); ``priorities_from``: networks whose wish does as well."""

    hold_limit: Annotated[Duration, Field(le=999_999_999)] = 30 * 86400.0
    deliver_by: Annotated[Annotated[float, Field(ge=0, le=999_999_999)] | None, BeforeValidator(_duration_or_off)] = 0.0
    priorities: Literal["off", "authenticated", "everybody"] = "authenticated"
    priorities_from: Networks = []

    @classmethod
    def misfits(cls, table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        if table.get("priorities", "authenticated") != "authenticated" and table.get("priorities_from"):
            yield "priorities_from", 'is for priorities = "authenticated"; leave one of the two out'


class Bounces(Table):
    """``[bounces]``: who carries delivery status notifications."""

    sink: str


Mechanism = Literal["SCRAM-SHA-256-PLUS", "SCRAM-SHA-256", "PLAIN", "LOGIN", "OAUTHBEARER", "XOAUTH2"]


class Authentication(Table):
    """``[authentication]``: who judges logins of users that are not in ``[users]``, and how one may log in.

    ``url``: a service that gets one POST a login. ``jwks_url``: the keys of ``issuer``, whose tokens
    for ``audience`` say in ``identity_claim`` who it is. ``mechanisms``: None is all that can work
    for every user."""

    url: Url | None = None
    secret: SigningSecret = None
    secret_file: FilePath | None = None
    timeout: Deadline = 5.0
    jwks_url: Url | None = None
    issuer: str | None = None
    audience: str | None = None
    identity_claim: Annotated[str, Field(min_length=1)] = "email"
    mechanisms: Annotated[list[Mechanism], Field(min_length=1)] | None = None

    @classmethod
    def misfits(cls, table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        if table.get("jwks_url") is not None:
            for key in ("issuer", "audience"):
                if not table.get(key):
                    yield key, "is missing: jwks_url needs it, or tokens for others would do"


class Admin(Table):
    """``[admin]``: metrics and health over HTTP, and later the API."""

    address: ListenAddress
    token: Secret = None
    token_file: FilePath | None = None


class AnySink(Table):
    """What every sink has. ``concurrency``: deliveries out at a time. ``rate``: deliveries begun
    in a second by all workers together, each of which has its even share (0: any number). ``timeout``: seconds until a try without an
    end counts as deferred. ``relays``: it hands mail to another mail server."""

    type: str
    concurrency: Annotated[int, Field(ge=1, le=10_000)] = 64
    rate: Rate = 0.0
    timeout: Deadline = 30.0
    on_failure: Literal["dead_letter", "bounce"] = "dead_letter"

    @property
    def relays(self) -> bool:
        return False

    @property
    def carries_requiretls(self) -> bool:
        """Mail with REQUIRETLS can be left to it (RFC 8689): it is the end of the way, or the way on is
        under TLS to a host that is known to be the right one. No, unless a kind of sink says so."""
        return False


class WebhookConfig(AnySink):
    """``type = "webhook"``: one POST a delivery.

    ``previous_secret`` signs as well while receivers change over. Without ``secret`` there is
    no signature. ``addresses``: where it may connect to, judged on the address that a name has at
    that moment. ``client``: what speaks HTTP (``gateway.net.http``)."""

    type: Literal["webhook"] = "webhook"
    url: Url
    format: Literal["standard", "raw"] = "standard"
    secret: SigningSecret = None
    secret_file: FilePath | None = None
    previous_secret: SigningSecret = None
    previous_secret_file: FilePath | None = None
    headers: Annotated[dict[str, str], AfterValidator(_headers), Field(repr=False)] = {}
    addresses: Literal["any", "public"] = "any"
    client: Literal["direct", "pyreqwest", "aiohttp"] = "direct"

    @property
    def carries_requiretls(self) -> bool:
        return keeps_secret(self.url)

    @classmethod
    def misfits(cls, table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        if table.get("addresses") == "public" and table.get("client") == "pyreqwest":
            yield "client", 'cannot judge addresses; leave it out (or write client = "aiohttp") beside addresses = "public"'


class Upstream(AnySink):
    """What ``relay`` and ``lmtp`` share: one conversation with a mail server.

    ``tls``: ``opportunistic`` takes STARTTLS where it is offered, whatever the certificate;
    ``required`` defers without it; ``verify`` wants a certificate that fits the host as well.
    ``idle``: seconds that an unused connection is kept. ``requiretls``: mail with REQUIRETLS is taken for
    it, as far as ``tls`` allows; false: it is known that it does not offer that."""

    tls: Literal["off", "opportunistic", "required", "verify"] = "opportunistic"
    ca_file: ExistingFile | None = None
    username: str | None = None
    password: Secret = None
    password_file: FilePath | None = None
    pipelining: bool = True
    binarymime: bool = False
    requiretls: bool = True
    concurrency: Annotated[int, Field(ge=1, le=10_000)] = 20
    timeout: Deadline = 300.0
    idle: Duration = 60.0
    on_failure: Literal["dead_letter", "bounce"] = "bounce"

    @property
    def relays(self) -> bool:
        return True

    @property
    def carries_requiretls(self) -> bool:
        return self.requiretls and self.tls != "off"

    @classmethod
    def misfits(cls, table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        password = table.get("password") is not None or table.get("password_file") is not None
        if table.get("username") is not None:
            if not password:
                yield "username", "password or password_file is missing beside it"
            if (tls := table.get("tls", "opportunistic")) in ("off", "opportunistic") and not _stays_here(table):
                yield "username", f'tls = "{tls}" could send the password in clear; write tls = "verify" (or "required")'
        elif password:
            yield "password", "username is missing beside it"


def keeps_secret(url: str) -> bool:
    """Nobody on the way to this URL can read along: https (the certificate is always verified), or a
    receiver on this machine."""
    parts = urlsplit(url)
    if parts.scheme == "https" or parts.hostname == "localhost":
        return True
    try:
        return ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


def _stays_here(table: Mapping[str, Any]) -> bool:
    """Every host of this upstream is on this machine."""
    hosts = table.get("hosts") or [table.get("address")]
    return isinstance(hosts, list) and all(
        isinstance(host, str) and (host.startswith(("unix:", "127.", "[::1]")) or host.split(":")[0] == "localhost") for host in hosts
    )


class RelayConfig(Upstream):
    """``type = "relay"``: an SMTP server, or several of which each can do it. Default port 25."""

    type: Literal["relay"] = "relay"
    hosts: list[Annotated[str, AfterValidator(_upstream_address(25))]] = []
    mx: bool = False

    @classmethod
    def misfits(cls, table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        yield from super().misfits(table)
        if not table.get("hosts") and not table.get("mx"):
            yield "hosts", 'names no server; write hosts = ["mail.example.net:25"]'
        if table.get("hosts") and table.get("mx"):
            yield "mx", "hosts is given as well; keep one of the two"


class LmtpConfig(Upstream):
    """``type = "lmtp"``: a mail store (RFC 2033). Default port 24; ``address`` is short for one
    entry of ``hosts``."""

    type: Literal["lmtp"] = "lmtp"
    address: Annotated[str, AfterValidator(_upstream_address(24))] | None = None
    hosts: list[Annotated[str, AfterValidator(_upstream_address(24))]] = []

    @classmethod
    def misfits(cls, table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        yield from super().misfits(table)
        if not table.get("hosts") and not table.get("address"):
            yield "address", 'names no server; write address = "127.0.0.1:24"'
        if table.get("hosts") and table.get("address"):
            yield "hosts", "address is given as well; keep one of the two"

    @property
    def carries_requiretls(self) -> bool:
        # A mail store behind a unix socket: LMTP ends there (RFC 2033 §1), and there is no wire.
        return self.requiretls and (self.tls != "off" or all(host.startswith("unix:") for host in self.hosts))

    @model_validator(mode="after")
    def _one_list(self) -> LmtpConfig:
        if self.address is not None and not self.hosts:
            self.hosts.append(self.address)
        return self


class FileConfig(AnySink):
    """``type = "file"``: a Maildir, one file a delivery, CRLF kept."""

    type: Literal["file"] = "file"
    path: FilePath
    format: Literal["maildir"] = "maildir"

    @property
    def carries_requiretls(self) -> bool:
        return True


class StdoutConfig(AnySink):
    """``type = "stdout"``: the standard JSON on standard output, one line a delivery."""

    type: Literal["stdout"] = "stdout"

    @property
    def carries_requiretls(self) -> bool:
        return True


class DiscardConfig(AnySink):
    """``type = "discard"``: takes everything, keeps nothing."""

    type: Literal["discard"] = "discard"

    @property
    def carries_requiretls(self) -> bool:
        return True


class PythonConfig(AnySink):
    """A function of the program that the gateway runs in; no file can say it.

    ``function`` acknowledges by returning: None is 250, a Reply is the reply."""

    type: Literal["python"] = "python"
    function: Callable[[Message], Reply | Awaitable[Reply | None] | None]

    @property
    def carries_requiretls(self) -> bool:
        return True


def _without_extra(table: BaseModel, arguments: Iterable[tuple[str | None, Any]]) -> Iterator[tuple[str | None, Any]]:
    """Keys of others may be secrets."""
    return ((key, value) for key, value in arguments if key in type(table).model_fields)


class PluginSinkConfig(AnySink):
    """A sink of another package (entry point ``gateway.sinks``). Its own keys stand in
    ``model_extra``, as they were written. Unless the file says ``mail_server = false`` it counts
    as one (promise 6)."""

    model_config = ConfigDict(extra="allow")
    mail_server: bool = True

    @property
    def relays(self) -> bool:
        return self.mail_server

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        yield from _without_extra(self, super().__repr_args__())


class AnyCheck(Table):
    """What every check has. At ``client`` and ``sender`` it judges all mail, at ``recipient`` and
    ``content`` that of the routes which name it."""

    type: str
    stages: Annotated[list[Stage], Field(min_length=1)] = ["recipient"]
    timeout: Deadline = 5.0
    on_error: Literal["defer", "accept"] = "defer"


class HttpCheckConfig(AnyCheck):
    """``type = "http"``: a service of yours decides, one POST a question. ``addresses``: as for a webhook."""

    type: Literal["http"] = "http"
    url: Url
    addresses: Literal["any", "public"] = "any"
    secret: SigningSecret = None
    secret_file: FilePath | None = None


class PluginCheckConfig(AnyCheck):
    """A check of another package (entry point ``gateway.checks``); its own keys stand in
    ``model_extra``."""

    model_config = ConfigDict(extra="allow")

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        yield from _without_extra(self, super().__repr_args__())


class RouteConfig(Table):
    """``[[routes]]``: which recipients are taken, from whom, and who carries them. The first
    match wins."""

    recipients: Annotated[list[Pattern], Field(min_length=1)]
    sink: str | None = None
    sinks: list[str] = []
    clients: Networks | None = None
    authenticated: bool = False
    acknowledge: Literal["durable", "delivered"] = "durable"
    acknowledge_timeout: Deadline = 30.0
    fallback: Literal["durable", "refuse"] = "durable"
    odd_local_parts: bool = False
    checks: list[str] = []

    @classmethod
    def misfits(cls, table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        sinks = table.get("sinks")
        if table.get("sink") is None and not sinks:
            yield "sink", 'names no sink; write sink = "NAME" for a table [sinks.NAME]'
        if table.get("sink") is not None and sinks:
            yield "sinks", "sink is given as well; keep one of the two"
        if isinstance(sinks, list) and any(name in sinks[:number] for number, name in enumerate(sinks)):
            yield "sinks", "names a sink twice; each gets one copy"
        if table.get("clients") == []:
            yield "clients", "names nobody; leave it out for everybody, or name networks"

    @property
    def carriers(self) -> tuple[str, ...]:
        """The names of the sinks, however they were written."""
        return tuple(self.sinks) if self.sink is None else (self.sink,)


SinkConfig = WebhookConfig | RelayConfig | LmtpConfig | FileConfig | StdoutConfig | DiscardConfig | PythonConfig | PluginSinkConfig
CheckConfig = HttpCheckConfig | PluginCheckConfig

SINKS: dict[str, type[AnySink]] = {
    "webhook": WebhookConfig,
    "relay": RelayConfig,
    "lmtp": LmtpConfig,
    "file": FileConfig,
    "stdout": StdoutConfig,
    "discard": DiscardConfig,
}
CHECKS: dict[str, type[AnyCheck]] = {"http": HttpCheckConfig}


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


def _users_file(path: Path) -> Path:
    """The file is read again for ``accounts``; here only its faults are wanted, none of which repeats a hash."""
    _, faults = _read_users(path)
    if faults:
        shown = "; ".join(f"line {number}: {sentence}" for number, sentence in faults[:10])
        raise ValueError(f"{path}: {shown}" + (f"; and {len(faults) - 10} more" if len(faults) > 10 else ""))
    return path


def _read_users(path: Path) -> tuple[dict[str, list[passwords.Stored]], list[tuple[int, str]]]:
    try:
        return passwords.read_lines(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {_reason(error)}") from None


class Head(Table):
    """The keys that stand above the first table of the file, and the tables that have no keys of their own."""

    hostname: Annotated[str, AfterValidator(_hostname)] = Field(default_factory=lambda: _machine_name())
    workers: Annotated[int, Field(ge=0, le=1024)] = 1
    users: Annotated[dict[str, Hashes], Field(repr=False)] = {}
    users_file: Annotated[FilePath, AfterValidator(_users_file)] | None = None
    senders: dict[str, list[Pattern]] = {}
    client_certificates: CertificateUsers = {}

    @classmethod
    def prepare(cls, table: dict[str, Any], folder: Path | None) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        return table, []


class Config(Head):
    """All of it. Made by ``load``, ``parse`` or ``quick``, or in a program from the tables.

    Raises ConfigError where the tables do not fit together, whoever made them."""

    listeners: list[ListenerConfig]
    limits: Limits = Limits()
    drain: Drain = Drain()
    spool: SpoolConfig = Field(default_factory=SpoolConfig)
    retry: Retry = Retry()
    extensions: ExtensionsConfig = ExtensionsConfig()
    checks: dict[str, CheckConfig] = {}
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
        if faults := [*_not_yet(parts), *_cross_faults(parts, relaying), *_login_faults(parts)]:
            raise ConfigError(_lines(faults))
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
            raise ConfigError([f"{place}: cannot be read: {_reason(error)}"]) from None
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
        return _Reading(folder, environment or {}).config(table, flags or {})

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
                filed, _ = _read_users(_users_file(self.users_file))
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
        return _lines(_warnings(self))


def _machine_name() -> str:
    try:
        return _hostname(os.uname().nodename)
    except ValueError:
        return "localhost"


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


# ------------------------------------------------------------ faults and their places

Place = tuple[str | int, ...]
Fault = tuple[Place, str]


def _lines(faults: Sequence[Fault]) -> list[str]:
    lines: dict[str, None] = {}
    for place, sentence in faults:
        lines[f"{_written(place)}: {sentence}"] = None
    return list(lines)


def _written(place: Place) -> str:
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            key = part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else '"' + part.replace("\\", "\\\\").replace('"', '\\"') + '"'
            text += f".{key}" if text else key
    return text


def _near(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _sentence(error: Mapping[str, Any], place: Place, keys: Sequence[str]) -> str:
    """One sentence of pydantic's, in our words, with the way out."""
    kind, context = error["type"], error.get("ctx", {})
    match kind:
        case "value_error":
            return str(context["error"])
        case "missing":
            return "is missing; this key is needed"
        case "extra_forbidden":
            word = str(place[-1])
            return f"unknown key{_near(word, keys) or '; known here: ' + ', '.join(sorted(keys))}"
        case "literal_error":
            known = re.findall(r"'([^']*)'", context["expected"])
            return f"must be one of {', '.join(known)}{_near(str(error['input']), known)}"
        case "int_type" | "int_parsing" | "int_from_float":
            return "must be a whole number"
        case "float_type" | "float_parsing" | "finite_number":
            return "must be a number"
        case "bool_type" | "bool_parsing":
            return "must be true or false"
        case "string_type" | "path_type":
            return "must be text in quotes"
        case "list_type":
            return "must be a list; write [ … ] around it"
        case "dict_type" | "model_type" | "model_attributes_type":
            return "must be a table"
        case "too_short" | "string_too_short":
            return "must not be empty"
        case "greater_than_equal":
            return f"must be at least {context['ge']}"
        case "greater_than":
            return f"must be more than {context['gt']}"
        case "less_than_equal":
            return f"must be at most {context['le']}"
    return str(error["msg"])


class _Reading:
    """One table on its way to a Config; gathers faults as it goes."""

    def __init__(self, folder: Path | None, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.environment = environment
        self.faults: list[Fault] = []

    def config(self, table: Mapping[str, Any], flags: Mapping[str, Any]) -> Config:
        tree = self._expanded(dict(table), ())
        self._overlay(tree)
        for dotted, value in flags.items():
            self._put(tree, dotted.split("."), value)
        self.faults.extend(_not_yet(tree))
        parts: dict[str, Any] = {}
        fields = Config.model_fields
        for key in tree:
            if key not in fields:
                self._add((key,), f"unknown key{_near(key, list(fields)) or '; known here: ' + ', '.join(fields)}")
        for key, model in _SINGLE.items():
            # The spool's default folder lies beside the file, so it is read even where nothing is said.
            if key in tree or key == "spool":
                parts[key] = self._table(model, tree.get(key, {}), (key,))
        for key, model in _LISTS.items():
            entries = self._entries(tree, key, list)
            parts[key] = {number: self._table(model, entry, (key, number)) for number, entry in enumerate(entries)}
        for key, models in (("sinks", SINKS), ("checks", CHECKS)):
            named = self._entries(tree, key, dict)
            parts[key] = {name: self._typed(key, models, entry, (key, name)) for name, entry in named.items()}
        plain = {key: tree[key] for key in Head.model_fields if key in tree}
        head = self._table(Head, plain, ())
        logins = {key: tree.get(key) for key in ("users", "users_file", "senders", "client_certificates")}
        if parts.get("authentication") is None:
            # Its own faults are told already.
            logins["unread_authentication"] = tree.get("authentication")
        relaying = {name for name, sink in self._entries(tree, "sinks", dict).items() if _relays(sink)}
        self.faults.extend(_cross_faults(parts, relaying, self._entries(tree, "routes", list)))
        self.faults.extend(_login_faults(parts | logins))
        if self.faults:
            raise ConfigError(_lines(self._first_at_each_place()))
        for key in _LISTS:
            parts[key] = list(parts[key].values())
        return Config(**{key: getattr(head, key) for key in plain}, **parts)

    def _add(self, place: Place, sentence: str) -> None:
        self.faults.append((place, sentence))

    def _first_at_each_place(self) -> list[Fault]:
        """In the order of the tables; a value that is wrong in itself is not told again for what
        follows from it."""
        order = [*Head.model_fields, *Config.model_fields]
        first: dict[Place, Fault] = {}
        for fault in self.faults:
            first.setdefault(fault[0], fault)

        def rank(fault: Fault) -> tuple[int, int]:
            place = fault[0]
            entry = place[1] if len(place) > 1 and isinstance(place[1], int) else 0
            return (order.index(place[0]) if place[0] in order else -1, entry)

        return sorted(first.values(), key=rank)

    # ------------------------------------------------------------------- the words

    def _expanded(self, value: Any, place: Place) -> Any:
        if isinstance(value, dict):
            return {key: self._expanded(inner, (*place, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._expanded(inner, (*place, number)) for number, inner in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value

        def variable(match: re.Match[str]) -> str:
            if match[0] == "$${":
                return "${"
            name = match[1]
            if name is None:
                self._add(place, "has ${ without a name and }; write ${NAME}, or $${ for these very characters")
            elif name not in self.environment:
                self._add(place, f"the environment has no {name}; set it, or write $${{{name}}} for these very characters")
            return self.environment.get(name or "", "")

        return re.sub(r"\$\$\{|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)\})?", variable, value)

    def _overlay(self, tree: dict[str, Any]) -> None:
        """``GATEWAY_SECTION__KEY`` over the file. Lists and tables are written as in TOML. A name
        without ``__`` is only ours if it is a plain key (others may call theirs GATEWAY_…)."""
        for name in sorted(self.environment):
            if not name.startswith("GATEWAY_"):
                continue
            path = name.removeprefix("GATEWAY_").lower().split("__")
            if len(path) == 1 and path[0] not in Head.model_fields:
                continue
            text = self.environment[name]
            value: Any = text
            if text[:1] in ("[", "{"):
                try:
                    value = tomllib.loads(f"value = {text}")["value"]
                except tomllib.TOMLDecodeError:
                    self._add((name,), "is neither text nor a list or table as TOML writes it")
                    continue
            if path[0] not in Config.model_fields or not all(path):
                self._add((name,), f"the file has no {'.'.join(path)}{_near(path[0], list(Config.model_fields))}")
                continue
            self._put(tree, path, value)

    def _put(self, tree: dict[str, Any], path: list[str], value: Any) -> None:
        node: Any = tree
        for depth, part in enumerate(path):
            last = depth == len(path) - 1
            if isinstance(node, list):
                if not part.isdigit() or int(part) > len(node):
                    self._add(
                        tuple(path[:depth]), f"the environment names entry {part!r}, and there are {len(node)}; entries are counted from 0"
                    )
                    return
                number = int(part)
                if number == len(node):
                    node.append({})
                if last:
                    node[number] = value
                node = node[number]
                continue
            if not isinstance(node, dict):
                return  # what is no table here is a fault of the file, told where the file is judged
            key = next((known for known in node if known.lower() == part), part)
            if last:
                node[key] = value
            else:
                node = node.setdefault(key, [] if depth == 0 and key in _LISTS else {})

    # ------------------------------------------------------------------ the tables

    def _entries(self, tree: dict[str, Any], key: str, kind: type) -> Any:
        value = tree.get(key)
        if value is None:
            if key in _NEEDED:
                self._add((key,), _NEEDED[key])
            return kind()
        if not isinstance(value, kind):
            self._add((key,), f"must be written as [[{key}]]" if kind is list else f"must be written as [{key}.NAME]")
            return kind()
        if not value and key in _NEEDED:
            self._add((key,), _NEEDED[key])
        return value

    def _table(self, model: type[Table], table: Any, place: Place) -> Any:
        if not isinstance(table, dict):
            self._add(place, "must be a table")
            return None
        table, misfits = model.prepare(table, self.folder)
        for key, sentence in misfits:
            self._add((*place, key), sentence)
        try:
            result = model.model_validate(table, context={"folder": self.folder, "prepared": True})
        except ValidationError as error:
            self._gather(error, place, model)
            return None
        return None if misfits else result

    def _typed(self, group: str, models: Mapping[str, type[Table]], table: Any, place: Place) -> Any:
        if not isinstance(table, dict):
            self._add(place, f"must be written as [{group}.NAME]")
            return None
        kind = table.get("type")
        if kind is None:
            self._add((*place, "type"), f"is missing; write one of {', '.join(models)}")
            return None
        if isinstance(kind, str) and kind in models:
            return self._table(models[kind], table, place)
        if isinstance(kind, str) and kind in (plugins := _plugins(f"gateway.{group}")):
            return self._table(PluginSinkConfig if group == "sinks" else PluginCheckConfig, table, place)
        if kind == "python":
            self._add((*place, "type"), "a function is no matter of a file; give it to gateway.Gateway in your program")
            return None
        known = [*models, *(plugins if isinstance(kind, str) else [])]
        self._add((*place, "type"), f"must be one of {', '.join(known)}{_near(str(kind), known)}")
        return None

    def _gather(self, error: ValidationError, place: Place, model: type[Table]) -> None:
        for found in error.errors(include_url=False):
            where = (*place, *found["loc"])
            self._add(where, _sentence(found, where, list(model.model_fields)))


_SINGLE: dict[str, type[Table]] = {
    "limits": Limits,
    "drain": Drain,
    "spool": SpoolConfig,
    "retry": Retry,
    "extensions": ExtensionsConfig,
    "bounces": Bounces,
    "authentication": Authentication,
    "admin": Admin,
}
_LISTS: dict[str, type[Table]] = {"listeners": ListenerConfig, "routes": RouteConfig}
_NEEDED = {
    "listeners": 'no address to listen on; write [[listeners]] with address = "127.0.0.1:2525"',
    "sinks": "nobody to carry mail; write a table like [sinks.app]",
    "routes": "without a route every recipient is refused; write [[routes]] with recipients and sink",
}


def _plugins(group: str) -> list[str]:
    """Names that installed packages registered. Costs a walk over all of them, so only where needed."""
    from importlib.metadata import entry_points

    return sorted(point.name for point in entry_points(group=group))


def _not_yet(tree: Mapping[str, Any]) -> list[Fault]:
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


def _relays(table: object) -> bool:
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
            yield ("routes", number, *place), f"there is no table [{group}.{name}]{_near(name, list(known))}"


def _cross_faults(parts: Mapping[str, Any], relaying: set[str], unread: Sequence[object] = ()) -> list[Fault]:
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
        faults.append((("bounces", "sink"), f"there is no table [sinks.{bounces.sink}]{_near(bounces.sink, list(sinks))}"))
    return faults


def _login_faults(parts: Mapping[str, Any]) -> Iterator[Fault]:
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


def _warnings(config: Config) -> list[Fault]:
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
