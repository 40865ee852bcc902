"""SASL mechanisms of the server as values: responses in, challenges and claims out.

Owns the grammar of EXTERNAL, PLAIN, LOGIN, SCRAM-SHA-256 (with and without channel binding),
OAUTHBEARER and XOAUTH2. Knows no user: what a client claims leaves as a ``Login``, and what
is true of it comes back as a ``Judgement``. Knows no base64 line and no reply code but those
that refuse a message which is none; nonces and keys are handed in.

Invariants: ``respond`` and ``judged`` never raise, whatever the client sent. A name has no
control characters and at most 255 octets when it leaves here. Nothing is compared but in
constant time.

RFC 4422 (SASL; appendix A: EXTERNAL), RFC 4616 (PLAIN), RFC 5802 and RFC 7677 (SCRAM), RFC 5929 §4
(tls-server-end-point), RFC 7628 (OAUTHBEARER), RFC 4954 §4 (the exchange in SMTP);
LOGIN and XOAUTH2 have no RFC and are taken as they are met.
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
import re
from abc import ABC, abstractmethod
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from ..contracts import Judgement, Login
from ..passwords import MOST_NAME, ScramKeys, prepared
from ..reply import Reply

#: Octets of a response line, CRLF not counted (RFC 4954 §4.3.3 of its drafts, Postfix): more is 500 5.5.6.
RESPONSE_LIMIT: Final = 12288
#: The channel binding there is: the hash of our certificate. Python's ssl has no tls-exporter.
BINDING: Final = "tls-server-end-point"
PLUS: Final = "SCRAM-SHA-256-PLUS"
SCRAM: Final = "SCRAM-SHA-256"
#: Not among MECHANISMS: not the users make it possible, but a client's certificate.
EXTERNAL: Final = "EXTERNAL"

REFUSED: Final = Reply(535, "5.7.8", "authentication credentials invalid")
MALFORMED: Final = Reply(501, "5.5.2", "this is no message of the mechanism")
BAD_NAME: Final = Reply(501, "5.5.2", "the user name is not UTF-8, is empty or over 255 octets, or has control characters")
NO_PASSWORD: Final = Reply(501, "5.5.2", "the password is empty, not UTF-8 or has a NUL")


@dataclass(frozen=True)
class Granted:
    """The exchange is over, and this is who it is."""

    identity: str


#: What comes next: a challenge (octets), a claim to be judged, the end (well or not).
Step = bytes | Login | Granted | Reply


class Mechanism(ABC):
    """One exchange. ``user`` is the name the client claims, as soon as it is known. ``refusal``: the
    reply that is due whatever the client says next, with its ``note``."""

    name: ClassVar[str]

    def __init__(self) -> None:
        self.user = ""
        self.refusal: Reply | None = None
        self.note = ""

    @abstractmethod
    def respond(self, response: bytes | None) -> Step:
        """The client's next message; None where AUTH came without an initial one."""

    def judged(self, judgement: Judgement) -> Step:
        """What is true of the last ``Login``."""
        if judgement.identity is not None:
            return Granted(judgement.identity)
        return judgement.reply or REFUSED


def decoded(text: bytes | str) -> bytes | None:
    """Base64 as RFC 4954 wants it, without blanks and whole; None if it is not."""
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        return None


def offered(mechanisms: Sequence[str], end_point: bytes | None, certified: str | None = None) -> tuple[str, ...]:
    """Those that this connection can have: ``-PLUS`` wants a TLS channel that can be bound to, EXTERNAL a
    client whose certificate stands for somebody (``certified``)."""
    usual = tuple(name for name in mechanisms if name != PLUS or end_point is not None)
    return usual if certified is None else (EXTERNAL, *usual)


def mechanism(name: str, mechanisms: Sequence[str], end_point: bytes | None, certified: str | None = None) -> Mechanism | None:
    """The mechanism by its name in any case; None if it is not among those that are offered."""
    name = name.upper()
    offers = offered(mechanisms, end_point, certified)
    if name not in offers:
        return None
    if name == EXTERNAL and certified is not None:
        return External(certified)
    if name == PLUS:
        return ScramPlus(end_point or b"")
    if name == SCRAM:
        return Scram(bindable=PLUS in offers)
    return _SIMPLE[name]()


def _name(octets: bytes) -> str | None:
    """A user's name, prepared (RFC 4013); None if it cannot be one."""
    if len(octets) > MOST_NAME:
        return None
    try:
        text = prepared(octets.decode())
    except ValueError:
        return None
    return text if text and len(text.encode()) <= MOST_NAME else None


def _password(octets: bytes) -> str | None:
    try:
        text = octets.decode()
    except ValueError:
        return None
    return text if text and "\0" not in text else None


class External(Mechanism):
    """RFC 4422 appendix A: TLS has said who it is. The client may name whom it wants to be, and that can only
    be the same."""

    name = EXTERNAL

    def __init__(self, identity: str) -> None:
        super().__init__()
        self.user = identity

    def respond(self, response: bytes | None) -> Step:
        if response is None:
            return b""
        if response:
            wanted = _name(response)
            if wanted is None:
                return BAD_NAME
            if wanted != self.user:
                # Nobody acts for somebody else here.
                return REFUSED
        return Granted(self.user)


class Plain(Mechanism):
    """RFC 4616: everything in one message."""

    name = "PLAIN"

    def respond(self, response: bytes | None) -> Step:
        if response is None:
            return b""
        parts = response.split(b"\0")
        if len(parts) != 3:
            return MALFORMED
        user = _name(parts[1])
        if user is None:
            return BAD_NAME
        self.user = user
        password = _password(parts[2])
        if password is None:
            return NO_PASSWORD
        if parts[0] and _name(parts[0]) != user:
            # Nobody acts for somebody else here.
            return REFUSED
        return Login(self.name, user, password=password)


class LoginMechanism(Mechanism):
    """The name, then the password (draft-murchison-sasl-login)."""

    name = "LOGIN"

    def respond(self, response: bytes | None) -> Step:
        if response is None:
            return b"Username:"
        if not self.user:
            user = _name(response)
            if user is None:
                return BAD_NAME
            self.user = user
            return b"Password:"
        password = _password(response)
        return NO_PASSWORD if password is None else Login(self.name, self.user, password=password)


_CHANNEL = re.compile(r"(n|y|p=[A-Za-z0-9.-]+),(a=[^,\0]*)?,")
_FIRST = re.compile(r"n=((?:[^,=\0]|=2C|=3D)+),r=([!-+\--~]+)(?:,[A-Za-z]=[^,\0]+)*")
_FINAL = re.compile(r"(c=([A-Za-z0-9+/=]+),r=([!-+\--~]+)(?:,[A-Za-z]=[^,\0]+)*),p=([A-Za-z0-9+/=]+)")


class Scram(Mechanism):
    """RFC 5802 with SHA-256 (RFC 7677): the password never travels, and we prove ourselves too."""

    name = SCRAM

    def __init__(self, bindable: bool = False) -> None:
        """``bindable``: SCRAM-SHA-256-PLUS was offered as well; a client that says it saw no such
        offer talks to somebody in between (RFC 5802 §6)."""
        super().__init__()
        self._bindable = bindable
        self._header = ""
        self._first = ""
        self._nonce = ""
        self._server_first = ""
        self._keys: ScramKeys | None = None
        self._server_final: bytes | None = None
        self._identity: str | None = None

    def respond(self, response: bytes | None) -> Step:
        if response is None:
            return b""
        if self._identity is not None:
            return Granted(self._identity) if not response else MALFORMED
        try:
            text = response.decode()
        except ValueError:
            return MALFORMED
        return self._begin(text) if self._keys is None else self._end(text, self._keys)

    def _channel(self, flag: str) -> Reply | None:
        """Does what the client says of the channel fit this mechanism?"""
        if flag == "n":
            return None
        return REFUSED if flag == "y" and self._bindable else None if flag == "y" else MALFORMED

    def _bound(self) -> bytes:
        """What ``c=`` must say."""
        return self._header.encode()

    def _begin(self, text: str) -> Step:
        header = _CHANNEL.match(text)
        first = _FIRST.fullmatch(text, header.end()) if header else None
        if header is None or first is None:
            return MALFORMED
        refusal = self._channel(header[1])
        if refusal is not None:
            return refusal
        user = _name(_saslname(first[1]).encode())
        if user is None:
            return BAD_NAME
        self.user = user
        if header[2] and _name(_saslname(header[2][2:]).encode()) != user:
            return REFUSED
        self._header, self._first, self._nonce = header[0], text[header.end() :], first[2]
        return Login(self.name, user)

    def judged(self, judgement: Judgement) -> Step:
        if self._keys is None:
            if judgement.keys is None:
                return judgement.reply or REFUSED
            keys = self._keys = judgement.keys
            self._nonce += judgement.nonce
            self._server_first = f"r={self._nonce},s={b64encode(keys.salt).decode()},i={keys.iterations}"
            return self._server_first.encode()
        if judgement.identity is None or self._server_final is None:
            return judgement.reply or REFUSED
        # 235 can carry nothing: our proof is one more challenge, which the client answers with
        # an empty line (RFC 4954 §4, RFC 4422 §3.6).
        self._identity = judgement.identity
        return self._server_final

    def _end(self, text: str, keys: ScramKeys) -> Step:
        final = _FINAL.fullmatch(text)
        if final is None:
            return MALFORMED
        bound, proof = decoded(final[2]), decoded(final[4])
        if bound is None or proof is None:
            return MALFORMED
        said = f"{self._first},{self._server_first},{final[1]}".encode()
        signature = hmac.digest(keys.stored, said, "sha256")
        key = bytes(one ^ other for one, other in zip(proof, signature, strict=False))
        proven = (
            hmac.compare_digest(hashlib.sha256(key).digest(), keys.stored)
            & (len(proof) == len(signature))
            & hmac.compare_digest(bound, self._bound())
            & hmac.compare_digest(final[3].encode(), self._nonce.encode())
        )
        self._server_final = b"v=" + b64encode(hmac.digest(keys.server, said, "sha256"))
        return Login(self.name, self.user, proven=bool(proven))


class ScramPlus(Scram):
    """SCRAM bound to the TLS channel it runs in (RFC 5929 §4): nobody in between can pass it on."""

    name = PLUS

    def __init__(self, end_point: bytes) -> None:
        super().__init__()
        self._end_point = end_point

    def _channel(self, flag: str) -> Reply | None:
        return None if flag == f"p={BINDING}" else MALFORMED

    def _bound(self) -> bytes:
        return self._header.encode() + self._end_point


def _saslname(text: str) -> str:
    return text.replace("=2C", ",").replace("=3D", "=")


_BEARER = re.compile(r"Bearer +([A-Za-z0-9\-._~+/]+=*)", re.IGNORECASE)
_OAUTHBEARER = re.compile(r"[ny],(?:a=([^,\0\x01]*))?,\x01((?:[A-Za-z]+=[^\0\x01]*\x01)*)\x01")
_XOAUTH2 = re.compile(r"user=([^\0\x01]*)\x01((?:[A-Za-z]+=[^\0\x01]*\x01)*)\x01")


class Bearer(Mechanism):
    """What OAUTHBEARER and XOAUTH2 share: a token in one message; a refusal is told in JSON first,
    and the client answers that with whatever it likes (RFC 7628 §3.2.3)."""

    _message: ClassVar[re.Pattern[str]]
    _error: ClassVar[bytes]

    def respond(self, response: bytes | None) -> Step:
        if self.refusal is not None:
            return self.refusal
        if response is None:
            return b""
        try:
            message = self._message.fullmatch(response.decode())
        except ValueError:
            message = None
        if message is None:
            return MALFORMED
        pairs = dict(pair.split("=", 1) for pair in message[2].split("\x01")[:-1])
        token = _BEARER.fullmatch(pairs.get("auth", ""))
        if token is None:
            return MALFORMED
        if message[1]:
            user = _name(_saslname(message[1]).encode())
            if user is None:
                return BAD_NAME
            self.user = user
        return Login(self.name, self.user, token=token[1])

    def judged(self, judgement: Judgement) -> Step:
        step = super().judged(judgement)
        if isinstance(step, Reply) and step.permanent:
            self.refusal, self.note = step, judgement.note
            return self._error
        return step


class OAuthBearer(Bearer):
    """RFC 7628. The name (``a=``) may be left out: the token says it."""

    name = "OAUTHBEARER"
    _message = _OAUTHBEARER
    _error = b'{"status":"invalid_token"}'


class XOAuth2(Bearer):
    """Google's and Microsoft's form before RFC 7628."""

    name = "XOAUTH2"
    _message = _XOAUTH2
    _error = b'{"status":"401","schemes":"bearer"}'


_SIMPLE: Final[dict[str, type[Plain | LoginMechanism | OAuthBearer | XOAuth2]]] = {
    "PLAIN": Plain,
    "LOGIN": LoginMechanism,
    "OAUTHBEARER": OAuthBearer,
    "XOAUTH2": XOAuth2,
}
#: Every mechanism, the best first.
MECHANISMS: Final = (PLUS, SCRAM, "PLAIN", "LOGIN", "OAUTHBEARER", "XOAUTH2")
