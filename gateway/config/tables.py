"""The tables of the file: their keys, the defaults, and the rules between keys of one table."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from ..contracts import Stage
from ..message import Message
from ..reply import Reply
from .values import (
    CertificateUsers,
    Deadline,
    Duration,
    DurationOrOff,
    ExistingFile,
    FilePath,
    Hashes,
    Headers,
    Hostname,
    ListenAddress,
    LmtpAddress,
    Mode,
    Networks,
    Pattern,
    Rate,
    RelayAddress,
    Reserve,
    Room,
    Secret,
    SigningSecret,
    Size,
    Url,
    UsersFile,
    machine_name,
    reason,
    rooted,
)


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
            path = rooted(Path(named), folder)
            try:
                text = path.read_text(encoding="utf-8").rstrip("\r\n")
            except (OSError, UnicodeDecodeError) as error:
                faults.append((key, f"cannot read {path}: {reason(error)}"))
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
    mode: Mode = "0660"
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
    minimum_free: Room = Reserve(share=0.05)
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
    deliver_by: DurationOrOff = 0.0
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
    headers: Annotated[Headers, Field(repr=False)] = {}
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
    hosts: list[RelayAddress] = []
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
    address: LmtpAddress | None = None
    hosts: list[LmtpAddress] = []

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


class Head(Table):
    """The keys that stand above the first table of the file, and the tables that have no keys of their own."""

    hostname: Hostname = Field(default_factory=machine_name)
    workers: Annotated[int, Field(ge=0, le=1024)] = 1
    users: Annotated[dict[str, Hashes], Field(repr=False)] = {}
    users_file: UsersFile | None = None
    senders: dict[str, list[Pattern]] = {}
    client_certificates: CertificateUsers = {}

    @classmethod
    def prepare(cls, table: dict[str, Any], folder: Path | None) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        return table, []
