"""TLS contexts: how strict a handshake is, for connections that we open and that we take.

Owns versions, ciphers, certificates and which of them a client gets (SNI). Knows no SMTP and
no connection. TLS 1.2 and newer only (RFC 8996), without renegotiation and compression
(RFC 9325 §3.4, §3.3).

A server's context is never changed after it was made: new certificates make a new one, and a
handshake that has begun ends with the one it began with.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .binding import BoundContext, end_point

if TYPE_CHECKING:
    from cryptography import x509

Strictness = Literal["off", "opportunistic", "required", "verify"]

#: TLS 1.2 with forward secrecy and authenticated encryption (RFC 9325 §4.2); those of TLS 1.3 all are so.
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


def client_context(strictness: Strictness, ca_file: str | Path | None = None) -> ssl.SSLContext | None:
    """The context for STARTTLS toward an upstream; None for ``"off"``.

    ``opportunistic`` and ``required`` encrypt and take any certificate (RFC 7435): between mail
    servers a name proves nothing where nobody promised one. ``verify`` wants a certificate for
    the host's name or address, signed by ``ca_file`` or, without it, by an authority that this
    machine trusts. Raises OSError or ssl.SSLError for a ``ca_file`` that cannot be used."""
    if strictness == "off":
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if strictness == "verify":
        if ca_file is not None:
            context.load_verify_locations(cafile=str(ca_file))
        else:
            context.load_default_certs()
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


# ------------------------------------------------------------------------- server


class CertificateError(Exception):
    """A file cannot be used. ``file``: which; the text says why, for the operator."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(reason)
        self.file = file


@dataclass(frozen=True, slots=True)
class Identity:
    """What a listener proves who it is with. ``pairs``: certificate (with its chain) and key, PEM;
    the first is for clients that name nobody we know. ``client_ca``: authorities whose client
    certificates are asked for; ``demanded``: no handshake without one."""

    pairs: tuple[tuple[Path, Path], ...]
    client_ca: Path | None = None
    demanded: bool = False

    @property
    def files(self) -> list[Path]:
        found = [path for pair in self.pairs for path in pair]
        return found if self.client_ca is None else [*found, self.client_ca]

    def stamp(self) -> tuple[object, ...]:
        """Differs once a file was replaced or written to."""
        return tuple(_stamp(path) for path in self.files)

    def context(self) -> ssl.SSLContext:
        """Reads the files. Raises CertificateError."""
        contexts: dict[frozenset[str], BoundContext] = {}
        first: ssl.SSLContext | None = None
        for certificate, key in self.pairs:
            # With a single pair nobody has to be told apart.
            names = names_of(certificate) if len(self.pairs) > 1 else frozenset[str]()
            # The same names twice: an RSA and an ECDSA key, of which OpenSSL takes what the client can do.
            known = names in contexts
            context = contexts.setdefault(names, _bare_context())
            _load(context, certificate, key)
            # Which of two was shown OpenSSL does not tell: a login can be bound to neither.
            context.end_point = None if known else end_point(_first_in_der(certificate))
            if self.client_ca is not None:
                _ask_client(context, self.client_ca, self.demanded)
            first = first or context
        if first is None:
            raise ValueError("an identity without a certificate")
        if len(contexts) > 1:
            first.sni_callback = _chooser({name: context for names, context in reversed(contexts.items()) for name in names})
        return first


def _stamp(path: Path) -> object:
    try:
        found = os.stat(path)
    except OSError as error:
        return error.errno
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _bare_context() -> BoundContext:
    context = BoundContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_ciphers(CIPHERS)
    return context


def _load(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    for path, wanted, what in ((certificate, b"-----BEGIN CERTIFICATE-----", "certificate"), (key, b"PRIVATE KEY-----", "private key")):
        if wanted not in (octets := _read(path)):
            raise CertificateError(path, f"{path} has no {what} in PEM form")
        if path == key and b"ENCRYPTED" in octets:
            raise CertificateError(path, f"{path} is encrypted; keep the key in clear, in a file that only the gateway can read")
    try:
        context.load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise CertificateError(key, f"{key} is not the key of {certificate}") from None
        raise CertificateError(certificate, f"{certificate} with {key} cannot be used: {_reason(error)}") from None


def _first_in_der(certificate: Path) -> bytes:
    """The first certificate in this file, which ``_load`` has read."""
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    text = _read(certificate).decode("ascii", "replace").partition(begin)[2].partition(end)[0]
    try:
        return ssl.PEM_cert_to_DER_cert(f"{begin}{text}{end}")
    except ValueError:
        # It is being written to just now.
        raise CertificateError(certificate, f"{certificate} has no certificate in PEM form") from None


def _ask_client(context: ssl.SSLContext, authorities: Path, demanded: bool) -> None:
    if b"-----BEGIN" not in _read(authorities):
        raise CertificateError(authorities, f"{authorities} has no certificate in PEM form")
    try:
        context.load_verify_locations(cafile=authorities)
    except ssl.SSLError as error:
        raise CertificateError(authorities, f"{authorities} cannot be used: {_reason(error)}") from None
    context.verify_mode = ssl.CERT_REQUIRED if demanded else ssl.CERT_OPTIONAL


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(path, f"{path} cannot be read: {error.strerror}") from None


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).lower().replace("_", " ")


Choose = Callable[[ssl.SSLObject, str | None, ssl.SSLContext], None]


def _chooser(contexts: Mapping[str, ssl.SSLContext]) -> Choose:
    """By the name that the client asks for (RFC 6066 §3); ``*`` stands for one label (RFC 9525 §6.3)."""

    def choose(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        if name is not None:
            name = name.lower()
            context = contexts.get(name) or contexts.get(f"*.{name.partition('.')[2]}")
            if context is not None:
                connection.context = context

    return choose


def names_of(certificate: Path) -> frozenset[str]:
    """The DNS names of the first certificate in this file, in lower case; where it has none, its
    common name. Raises CertificateError."""
    from cryptography import x509

    found = _parsed(certificate)
    try:
        extension = found.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names = extension.value.get_values_for_type(x509.DNSName)
    except x509.ExtensionNotFound:
        names = []
    if not names:
        names = [str(name.value) for name in found.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
    return frozenset(name.lower() for name in names)


def ends_at(certificate: Path) -> float:
    """Unix seconds at which the first certificate in this file expires. Raises CertificateError."""
    return _parsed(certificate).not_valid_after_utc.timestamp()


def _parsed(certificate: Path) -> x509.Certificate:
    # Only listeners with several certificates, and gateway check, need to look inside one.
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(_read(certificate))[0]
    except ValueError:
        raise CertificateError(certificate, f"{certificate} has no certificate in PEM form") from None
