"""The words of one mail: Recipient, Envelope, Client, Content, Message.

Plain values, shared by every floor above. Content is octets, never re-encoded
(promise 3). Nothing here touches the network; only a Content that lies in a
file reads that file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

#: ESMTP parameters, keywords in upper case, None where no value was given.
Params = dict[str, str | None]

#: Octets of content that stay in memory; more goes to a file of its own.
INLINE_LIMIT = 256 * 1024


@dataclass(slots=True)
class Recipient:
    """One forward-path (RFC 5321 §4.1.1.3): ``address`` as given, without brackets, quotes kept;
    ``domain`` in lower case. ``params``: DSN (NOTIFY, ORCPT)."""

    address: str
    local: str
    domain: str
    params: Params = field(default_factory=dict)


@dataclass(slots=True)
class Envelope:
    """RFC 5321 §2.3.1. ``mail_from`` is ``""`` for the null reverse-path."""

    mail_from: str
    mail_params: Params
    recipients: list[Recipient]

    @property
    def binary(self) -> bool:
        """BODY=BINARYMIME: the content may hold any octets and leaves only by BDAT (RFC 3030)."""
        return (self.mail_params.get("BODY") or "").upper() == "BINARYMIME"

    @property
    def held(self) -> bool:
        """Its sender asked for a later time of release (RFC 4865)."""
        return "HOLDFOR" in self.mail_params or "HOLDUNTIL" in self.mail_params

    @property
    def utf8(self) -> bool:
        """SMTPUTF8 was asked for (RFC 6531)."""
        return "SMTPUTF8" in self.mail_params

    @property
    def requiretls(self) -> bool:
        """REQUIRETLS was asked for: it travels only under TLS, between hosts that know each other (RFC 8689)."""
        return "REQUIRETLS" in self.mail_params


@dataclass(slots=True)
class TLS:
    """``version`` as OpenSSL names it (``TLSv1.3``), ``cipher`` likewise; ``peer``: the
    subject of a client certificate that was verified, None if there was none. ``end_point``:
    what a login can be bound to (tls-server-end-point, RFC 5929 §4), None if there is nothing.
    ``names``: what that certificate can be called in ``[client_certificates]``, the surest first; only
    of a handshake that was our own."""

    version: str
    cipher: str
    peer: str | None = None
    end_point: bytes | None = field(default=None, repr=False, compare=False)
    names: tuple[str, ...] = field(default=(), repr=False, compare=False)


@dataclass(slots=True)
class Client:
    """Who sends: ``ip`` is None on a unix socket; ``protocol`` is the ``with`` keyword of
    Received (SMTP, ESMTP, ESMTPA, ESMTPS, ESMTPSA, LMTP, UTF8SMTP … RFC 3848, RFC 6531);
    ``user``: the authenticated identity."""

    ip: str | None
    port: int = 0
    helo: str = ""
    protocol: str = "SMTP"
    tls: TLS | None = None
    user: str | None = None


class Content:
    """The message octets: in memory (``octets``) or in a file (``path``), never both.

    ``size`` in octets. ``eight_bit``: an octet over 127 is among them. ``header_size``: octets
    of the header section, without the empty line that ends it."""

    __slots__ = ("_octets", "eight_bit", "header_size", "path", "size")

    def __init__(
        self, octets: bytes | None = None, path: str | None = None, size: int = 0, *, eight_bit: bool = False, header_size: int = 0
    ) -> None:
        if (octets is None) == (path is None):
            raise ValueError("a Content is in memory or in a file")
        self._octets = octets
        self.path = path
        self.size = size if octets is None else len(octets)
        self.eight_bit = eight_bit
        self.header_size = header_size

    def read(self) -> bytes:
        """All of it. Blocks on the disk where it lies in a file: use a thread for large ones."""
        if self._octets is not None:
            return self._octets
        assert self.path is not None
        with open(self.path, "rb") as file:
            return file.read()

    def chunks(self, size: int = INLINE_LIMIT) -> Iterator[bytes]:
        """Pieces of at most ``size`` octets (a Content in memory comes as the one object it is)."""
        if self._octets is not None:
            if self._octets:
                yield self._octets
            return
        assert self.path is not None
        with open(self.path, "rb") as file:
            while piece := file.read(size):
                yield piece


@dataclass(slots=True)
class Message:
    """An Envelope and content under one id.

    ``id``: UUIDv7, the id of our ``Received``. ``received_at``: Unix seconds. ``trace``: the
    header fields we add, CRLF included, carried above the content. ``checks``: verdicts by
    name of the check. ``not_before`` and ``expires_at``: Unix seconds, ``not_before`` 0 for
    at once. ``priority``: −9…9 (RFC 6710), 0 is ordinary, more is sooner.
    """

    id: str
    envelope: Envelope
    stored: Content
    client: Client
    received_at: float
    listener: str = ""
    trace: bytes = b""
    checks: dict[str, Any] = field(default_factory=dict)
    priority: int = 0
    not_before: float = 0.0
    expires_at: float = 0.0

    #: Takes a message apart; ``gateway.mime`` sets it (the library lives a floor above).
    reader: ClassVar[Callable[[Message], Any] | None] = None

    @property
    def content(self) -> bytes:
        """The octets the client sent, without our trace header (see ``Content.read``)."""
        return self.stored.read()

    def parsed(self) -> Any:
        """The message taken apart: a ``gateway.mime.Parsed``."""
        if Message.reader is None:
            raise RuntimeError("import gateway.mime before Message.parsed()")
        return Message.reader(self)
