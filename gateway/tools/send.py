"""One test mail, with the dialogue shown: what ``gateway send`` does.

A plain blocking client for people, not the way mail leaves the gateway (that is
``sinks/relay.py``). It reads replies and stuffs dots with the gateway's own parser, says one
command at a time, and prints every line with ``>`` (ours) or ``<`` (theirs). The content it
sends is either a small multipart mail made here or a file, octet for octet.

It never guesses: what the server does not offer (SIZE, 8BITMIME, SMTPUTF8) is not used, and a
mail that would need it is sent all the same, so that the server's own reply is seen.
RFC 5321 §3.3 (the transaction), RFC 3207 (STARTTLS), RFC 8314 (implicit TLS), RFC 2033 (LMTP), RFC 1870 (SIZE), RFC 6152, RFC 6531.
"""

from __future__ import annotations

import mimetypes
import re
import socket
import ssl
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime, localtime, make_msgid
from pathlib import Path
from typing import Literal, Self

from .._parser import ReplyReceiver, parse_address, stuff

#: Seconds for the connection and for every reply, unless told otherwise.
TIMEOUT = 30.0

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Security:
    """TLS as ``gateway send`` is asked for it. ``implicit``: before the greeting instead of by STARTTLS.
    ``ca_file``: authorities instead of the machine's; ``insecure``: take any certificate.
    ``certificate`` and ``key``: ours, PEM files."""

    implicit: bool = False
    ca_file: Path | None = None
    insecure: bool = False
    certificate: Path | None = None
    key: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Raises OSError (ssl.SSLError is one) for a file that cannot be used."""
        context = ssl.create_default_context(cafile=None if self.ca_file is None else str(self.ca_file))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.certificate is not None:
            context.load_cert_chain(self.certificate, self.key)
        return context


class ConversationError(Exception):
    """The conversation cannot go on: no connection, no reply, or no reply that SMTP knows."""


@dataclass(slots=True)
class Result:
    """``replies``: after the end of data, one by recipient in LMTP, else one for all; empty if it never
    came to that. ``refused``: recipients the server did not take, with its reply."""

    replies: list[tuple[int, str]] = field(default_factory=list)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    failure: str = ""

    @property
    def accepted(self) -> bool:
        """Everybody's mail was taken."""
        return not self.failure and not self.refused and bool(self.replies) and all(code < 300 for code, _ in self.replies)


def make_mail(
    sender: str,
    recipients: Sequence[str],
    subject: str = "A test mail: Grüße from the gateway",
    text: str = "This is a test mail.\nIt has a second line, an ümlaut and an attachment.\n",
    attachments: Sequence[Path] = (),
) -> bytes:
    """A multipart mail as content: text, HTML and at least one attachment. Raises OSError if one cannot be read."""
    mail = EmailMessage(policy=SMTP)
    mail["From"] = _mailbox(sender) if sender else Address("", "postmaster", "localhost")
    mail["To"] = tuple(_mailbox(recipient) for recipient in recipients)
    mail["Subject"] = subject
    mail["Date"] = format_datetime(localtime())
    mail["Message-ID"] = make_msgid(domain="gateway.invalid")
    mail.set_content(text)
    paragraphs = "".join(f"<p>{line}</p>" for line in text.replace("&", "&amp;").replace("<", "&lt;").splitlines())
    mail.add_alternative(f"<html><body>{paragraphs}</body></html>\n", subtype="html")
    for path in attachments:
        major, _, minor = (mimetypes.guess_type(path.name)[0] or "application/octet-stream").partition("/")
        mail.add_attachment(path.read_bytes(), maintype=major, subtype=minor, filename=path.name)
    if not attachments:
        mail.add_attachment(bytes(range(256)) * 4, maintype="application", subtype="octet-stream", filename="every-octet.bin")
    return mail.as_bytes()


def _mailbox(address: str) -> Address:
    """For a header field; an address that is none (a test may want one) still gets a field that can be written."""
    taken = parse_address(address)
    local, domain = taken if taken else (re.sub(r"[^\w.+-]", "_", address), "invalid")
    return Address("", local.strip('"'), domain)


def send(
    server: str,
    sender: str,
    recipients: Sequence[str],
    content: bytes,
    *,
    protocol: Literal["smtp", "lmtp"] = "smtp",
    helo: str = "",
    timeout: float = TIMEOUT,
    tls: Security | None = None,
    say: Say | None = None,
) -> Result:
    """Sends ``content`` (octets with CRLF line ends) to ``host:port``, ``[v6]:port`` or ``unix:/path``.

    Every line of the dialogue goes to ``say``. With ``tls`` nothing of the mail is said in clear: a
    server without TLS, or with a certificate that is not trusted, is a failure. Faults of the far
    side are in the Result; a server
    address that cannot be read, or a line end in what becomes a command, raises ValueError."""
    for word in (sender, *recipients, helo):
        if any(ord(character) < 32 for character in word):
            raise ValueError(f"{word!r} has control characters")
    tell: Say = say or (lambda line: None)
    result = Result()
    try:
        security = (
            None if tls is None else (tls, tls.context(), "" if server.startswith("unix:") else server.rpartition(":")[0].strip("[]"))
        )
        with _Conversation(_connect(server, timeout), tell, security) as conversation:
            conversation.transact(result, protocol, helo or socket.gethostname(), sender, recipients, content)
    except (ConversationError, OSError) as error:
        result.failure = str(error)
        tell(f"! {error}")
    return result


def _connect(server: str, timeout: float) -> socket.socket:
    if server.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout)
        connection.connect(server.removeprefix("unix:"))
        return connection
    host, _, port = server.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"{server!r} is not host:port, [v6]:port or unix:/path")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=timeout)


class _Conversation:
    def __init__(self, connection: socket.socket, say: Say, security: tuple[Security, ssl.SSLContext, str] | None) -> None:
        """``security``: with its context and the host's name."""
        self._connection = connection
        self._replies = ReplyReceiver()
        self._say = say
        self._security = security

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()

    def transact(self, result: Result, protocol: str, helo: str, sender: str, recipients: Sequence[str], content: bytes) -> None:
        implicit = self._security is not None and self._security[0].implicit
        if implicit:
            self._shake()
        code, text = self._reply()
        if code != 220:
            raise ConversationError(f"the server does not want to talk: {code} {text}")
        offered = self._hello(protocol, helo)
        if self._security is not None and not implicit:
            if "STARTTLS" not in offered:
                raise ConversationError("the server does not offer STARTTLS, and the mail shall not go in clear")
            code, text = self._command("STARTTLS")
            if code != 220:
                raise ConversationError(f"the server refused STARTTLS: {code} {text}")
            if self._replies.pending:
                raise ConversationError("the server said more in clear after it agreed to TLS")
            self._shake()
            offered = self._hello(protocol, helo)
        code, text = self._command(f"MAIL FROM:<{sender}>{self._parameters(offered, [sender, *recipients], content)}")
        if code >= 300:
            result.refused = dict.fromkeys(recipients, (code, text))
        taken = []
        for recipient in recipients if not result.refused else ():
            code, text = self._command(f"RCPT TO:<{recipient}>")
            if code < 300:
                taken.append(recipient)
            else:
                result.refused[recipient] = (code, text)
        if taken:
            code, text = self._command("DATA")
            if code == 354:
                body = stuff(content)
                ending = b".\r\n" if not body or body.endswith(b"\r\n") else b"\r\n.\r\n"
                self._say(f"> ({len(content)} octets of content, then a dot)")
                self._connection.sendall(body + ending)
                result.replies = [self._reply() for _ in (taken if protocol == "lmtp" else taken[:1])]
            else:
                result.replies = [(code, text)]
        self._command("QUIT")

    def _hello(self, protocol: str, helo: str) -> dict[str, str]:
        """What the server offers: keyword in upper case to its argument."""
        verb = "LHLO" if protocol == "lmtp" else "EHLO"
        code, text = self._command(f"{verb} {helo}")
        if code >= 300 and verb == "EHLO":
            code, text = self._command(f"HELO {helo}")
            if code < 300:
                return {}
        if code >= 300:
            raise ConversationError(f"the server refused {verb}: {code} {text}")
        lines = [line.partition(" ") for line in text.split("\n")[1:]]
        return {keyword.upper(): argument for keyword, _, argument in lines}

    def _shake(self) -> None:
        assert self._security is not None
        _, context, host = self._security
        try:
            # For a unix socket there is no name to prove.
            secured = context.wrap_socket(self._connection, server_hostname=host or None)
        except ssl.SSLCertVerificationError as error:
            raise ConversationError(f"the server's certificate is not good: {error.verify_message}") from None
        except ssl.SSLError as error:
            raise ConversationError(f"no TLS came about: {error.reason or error}") from None
        self._connection = secured
        cipher = secured.cipher()
        self._say(f"  ({secured.version()} {cipher[0] if cipher else ''})")

    @staticmethod
    def _parameters(offered: dict[str, str], addresses: Sequence[str], content: bytes) -> str:
        words = []
        if "SIZE" in offered:
            words.append(f"SIZE={len(content)}")
        if "8BITMIME" in offered and not content.isascii():
            words.append("BODY=8BITMIME")
        if "SMTPUTF8" in offered and not all(address.isascii() for address in addresses):
            words.append("SMTPUTF8")
        return "".join(f" {word}" for word in words)

    def _command(self, line: str) -> tuple[int, str]:
        self._say(f"> {line}")
        self._connection.sendall(line.encode() + b"\r\n")
        return self._reply()

    def _reply(self) -> tuple[int, str]:
        """Code, and its lines joined by ``\\n``."""
        while (reply := self._replies.reply()) is None:
            if self._replies.fault:
                raise ConversationError(f"that is no SMTP reply ({self._replies.fault})")
            octets = self._connection.recv(65536)
            if not octets:
                raise ConversationError("the server closed the connection")
            self._replies.feed(octets)
        code, lines = reply
        for number, line in enumerate(lines):
            self._say(f"< {code}{' ' if number == len(lines) - 1 else '-'}{line}")
        return code, "\n".join(lines)


def run(
    server: str,
    sender: str,
    recipients: Sequence[str],
    *,
    subject: str | None = None,
    text: str | None = None,
    attachments: Sequence[Path] = (),
    message: Path | None = None,
    protocol: Literal["smtp", "lmtp"] = "smtp",
    helo: str = "",
    timeout: float = TIMEOUT,
    tls: Security | None = None,
    quiet: bool = False,
) -> int:
    """The command: 0 if everything was taken, 1 if not, 2 for a fault in what was asked for.

    ``message``: a file whose octets are the content (line ends become CRLF); ``-`` is standard
    input. Without it a test mail is made from ``subject``, ``text`` and ``attachments``."""
    try:
        if message is not None:
            octets = sys.stdin.buffer.read() if str(message) == "-" else message.read_bytes()
            content = re.sub(rb"\r?\n", b"\r\n", octets)
        else:
            made = {"subject": subject, "text": text}
            content = make_mail(
                sender, recipients, attachments=attachments, **{key: value for key, value in made.items() if value is not None}
            )
        result = send(
            server, sender, recipients, content, protocol=protocol, helo=helo, timeout=timeout, tls=tls, say=None if quiet else print
        )
    except (OSError, ValueError) as error:
        print(f"gateway send: {error}", file=sys.stderr)
        return 2
    if result.failure and quiet:
        print(f"gateway send: {result.failure}", file=sys.stderr)
    return 0 if result.accepted else 1
