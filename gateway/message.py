"""The words of one mail: Recipient, Envelope, Client, Content, Message.

Plain values, shared by every floor above. Content is octets, never re-encoded
(promise 3). Nothing here touches the network; only a Content that lies in a
file reads that file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from mypy_extensions import mypyc_attr

#: ESMTP parameters, keywords in upper case, None where no value was given.
Params = dict[str, str | None]

#: Octets of content that stay in memory; more goes to a file of its own.
INLINE_LIMIT = 256 * 1024


# Values that every mail makes several of write their own __init__: the one that ``dataclass`` makes is interpreted
# where all else is compiled, and was a tenth of what a mail costs.


@mypyc_attr(acyclic=True)
@dataclass(init=False)
class Recipient:
    """One forward-path (RFC 5321 §4.1.1.3): ``address`` as given, without brackets, quotes kept;
    ``domain`` in lower case. ``params``: DSN (NOTIFY, ORCPT)."""

    address: str
    local: str
    domain: str
    params: Params

    def __init__(self, address: str, local: str, domain: str, params: Params | None = None) -> None:
        self.address = address
        self.local = local
        self.domain = domain
        self.params = {} if params is None else params


@mypyc_attr(acyclic=True)
@dataclass(init=False)
class Envelope:
    """RFC 5321 §2.3.1. ``mail_from`` is ``""`` for the null reverse-path."""

    mail_from: str
    mail_params: Params
    recipients: list[Recipient]

    def __init__(self, mail_from: str, mail_params: Params, recipients: list[Recipient]) -> None:
        self.mail_from = mail_from
        self.mail_params = mail_params
        self.recipients = recipients

    @property
    def binary(self) -> bool:
        """BODY=BINARYMIME: the content may hold any octets and leaves only by BDAT (RFC 3030)."""
        return (self.mail_params.get("BODY") or "").upper() == "BINARYMIME"

    @property
    def held(self) -> bool:
        """Its sender asked for a later time of release (RFC 4865)."""
        params = self.mail_params
        return bool(params) and ("HOLDFOR" in params or "HOLDUNTIL" in params)

    @property
    def utf8(self) -> bool:
        """SMTPUTF8 was asked for (RFC 6531)."""
        params = self.mail_params
        return bool(params) and "SMTPUTF8" in params

    @property
    def requiretls(self) -> bool:
        """REQUIRETLS was asked for: it travels only under TLS, between hosts that know each other (RFC 8689)."""
        return "REQUIRETLS" in self.mail_params


@dataclass
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


@dataclass
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

    def __post_init__(self) -> None:
        #: A host's name and how the Received field begins that it adds to mail of this client, once it is written
        #: (``smtp/trace.py``). No field of the value: whoever is made of it begins anew.
        self.origin = ("", "")


@mypyc_attr(acyclic=True)
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

    def header(self) -> bytes:
        """The header section, without the empty line that ends it. May read from the disk."""
        if self._octets is not None:
            return self._octets[: self.header_size]
        header = b""
        for piece in self.chunks():
            header += piece[: self.header_size - len(header)]
            if len(header) >= self.header_size:
                break
        return header

    def chunks(self, size: int = INLINE_LIMIT) -> Iterator[bytes]:
        """Pieces of at most ``size`` octets (a Content in memory comes as the one object it is)."""
        if self._octets is not None:
            return iter((self._octets,) if self._octets else ())
        assert self.path is not None
        return _Pieces(self.path, size)


class _Pieces:
    """A file, ``size`` octets at a time; closed after the last one, and when nobody wants more (compiled generators
    are not ended when they are dropped, so this is none)."""

    __slots__ = ("_file", "_path", "_size")

    def __init__(self, path: str, size: int) -> None:
        self._path = path
        self._size = size
        self._file: BinaryIO | None = None

    def __iter__(self) -> _Pieces:
        return self

    def __next__(self) -> bytes:
        if self._file is None:
            self._file = open(self._path, "rb")  # noqa: SIM115 (closed at the end, or when it is dropped)
        piece = self._file.read(self._size)
        if not piece:
            self._file.close()
            raise StopIteration
        return piece

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()


@mypyc_attr(free_list_len=1)
@dataclass(init=False)
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
    listener: str
    trace: bytes
    checks: dict[str, Any]
    priority: int
    not_before: float
    expires_at: float

    def __init__(
        self,
        id: str,
        envelope: Envelope,
        stored: Content,
        client: Client,
        received_at: float,
        listener: str = "",
        trace: bytes = b"",
        checks: dict[str, Any] | None = None,
        priority: int = 0,
        not_before: float = 0.0,
        expires_at: float = 0.0,
    ) -> None:
        self.id = id
        self.envelope = envelope
        self.stored = stored
        self.client = client
        self.received_at = received_at
        self.listener = listener
        self.trace = trace
        self.checks = {} if checks is None else checks
        self.priority = priority
        self.not_before = not_before
        self.expires_at = expires_at

    @property
    def content(self) -> bytes:
        """The octets the client sent, without our trace header (see ``Content.read``)."""
        return self.stored.read()

    def parsed(self) -> Any:
        """The message taken apart: a ``gateway.mime.Parsed``."""
        if _reader is None:
            raise RuntimeError("import gateway.mime before Message.parsed()")
        return _reader(self)


_reader: Callable[[Message], Any] | None = None


def read_with(reader: Callable[[Message], Any] | None) -> None:
    """What ``Message.parsed`` takes a message apart with; ``gateway.mime`` says so when it is imported
    (the library lives a floor above)."""
    global _reader
    _reader = reader
