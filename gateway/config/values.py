"""Values as an operator writes them, and as the gateway has them.

Sizes become octets (int), durations seconds (float), rates deliveries a second, networks
``ipaddress`` objects; paths become absolute, from the folder of the file. Each is a type
that the tables name; its fault is a sentence that shows how to write it.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Callable, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from .. import passwords

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


def rooted(value: Path, folder: Path | None) -> Path:
    """``value``, where it is relative below ``folder`` (None: the working folder)."""
    path = value.expanduser()
    return path if path.is_absolute() else (folder or Path.cwd()) / path


def _absolute(value: Path, info: ValidationInfo) -> Path:
    return rooted(value, (info.context or {}).get("folder"))


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


def read_users(path: Path) -> dict[str, list[passwords.Stored]]:
    """Everybody in a file of users. Raises ValueError, which repeats no hash."""
    try:
        found, faults = passwords.read_lines(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {reason(error)}") from None
    if faults:
        shown = "; ".join(f"line {number}: {sentence}" for number, sentence in faults[:10])
        raise ValueError(f"{path}: {shown}" + (f"; and {len(faults) - 10} more" if len(faults) > 10 else ""))
    return found


def _users_file(path: Path) -> Path:
    # It is read again when somebody asks for the accounts; here only its faults are wanted.
    read_users(path)
    return path


def machine_name() -> str:
    """What this machine calls itself, where that is a domain name."""
    try:
        return _hostname(os.uname().nodename)
    except ValueError:
        return "localhost"


def reason(error: Exception) -> str:
    """Why a file could not be read."""
    return (error.strerror or str(error)) if isinstance(error, OSError) else "it is not UTF-8 text"


Size = Annotated[int, BeforeValidator(_size), Field(ge=0)]
Duration = Annotated[float, BeforeValidator(_duration), Field(ge=0, allow_inf_nan=False)]
#: A duration of nothing would mean "never in time".
Deadline = Annotated[float, BeforeValidator(_duration), Field(gt=0, allow_inf_nan=False)]
Rate = Annotated[float, BeforeValidator(_rate), Field(ge=0, le=1_000_000, allow_inf_nan=False)]
Networks = list[Annotated[IPv4Network | IPv6Network, BeforeValidator(_network)]]
#: A duration, or None where ``off`` is written.
DurationOrOff = Annotated[Annotated[float, Field(ge=0, le=999_999_999)] | None, BeforeValidator(_duration_or_off)]
FilePath = Annotated[Path, AfterValidator(_absolute)]
ExistingFile = Annotated[Path, AfterValidator(_existing)]
UsersFile = Annotated[FilePath, AfterValidator(_users_file)]
Room = Annotated[Reserve, BeforeValidator(_reserve)]
Hostname = Annotated[str, AfterValidator(_hostname)]
ListenAddress = Annotated[str, AfterValidator(_listen_address)]
RelayAddress = Annotated[str, AfterValidator(_upstream_address(25))]
LmtpAddress = Annotated[str, AfterValidator(_upstream_address(24))]
Mode = Annotated[str, AfterValidator(_mode)]
Url = Annotated[str, AfterValidator(_url)]
Secret = Annotated[Annotated[str, Field(min_length=1)] | None, Field(repr=False)]
SigningSecret = Annotated[Annotated[str, AfterValidator(_signing_secret)] | None, Field(repr=False)]
Headers = Annotated[dict[str, str], AfterValidator(_headers)]
Pattern = Annotated[str, AfterValidator(_pattern)]
#: Users by the names of their certificates, as ``TLS.names`` has those.
CertificateUsers = Annotated[dict[str, str], BeforeValidator(_certificate_users)]
#: One hash, or a hash and SCRAM keys.
Hashes = Annotated[list[str], BeforeValidator(_hashes)]
