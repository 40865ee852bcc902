"""Passwords as they are stored: read, made, compared.

Owns the stored forms and the work of comparing. Knows no user, no file and no wire. All of it
blocks for as long as the hash wants (that is its purpose): on a loop it belongs into a thread.

``$scrypt$ln=15,r=8,p=1$salt$hash``      RFC 7914, the form of passlib; base64 without padding
``$argon2id$v=19$m=…,t=…,p=…$salt$hash`` RFC 9106, by argon2-cffi (argon2i and argon2d as well)
``SCRAM-SHA-256$iterations:salt$StoredKey:ServerKey``  RFC 5802 §3, RFC 7677, the form of
PostgreSQL: what is kept cannot be used to log in elsewhere, and proves a password as well

Passwords and names are prepared with SASLprep (RFC 4013), as RFC 4616 and RFC 5802 ask;
a password that SASLprep has no place for is taken as it is.
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
import re
import stringprep
import unicodedata
from base64 import b64encode
from collections.abc import Iterable
from dataclasses import dataclass, field
from os import urandom
from typing import Final, Literal

#: What scrypt costs where we choose: 32 MiB and about 60 ms.
SCRYPT_LOG_N: Final = 15
SCRYPT_R: Final = 8
SCRYPT_P: Final = 1
#: What SCRAM costs where we choose; the client pays it at every login (RFC 7677 §4 wants 4,096 or more).
SCRAM_ITERATIONS: Final = 100_000
SALT: Final = 16
#: Octets of memory that a stored form may ask for.
MOST_MEMORY: Final = 1024 * 1024 * 1024
MOST_ITERATIONS: Final = 10_000_000

Kind = Literal["scrypt", "argon2", "scram"]

_B64 = r"[A-Za-z0-9+/]"
_SCRYPT = re.compile(rf"\$scrypt\$ln=(\d{{1,2}}),r=(\d{{1,3}}),p=(\d{{1,3}})\$({_B64}+=*)\$({_B64}+=*)")
_ARGON2 = re.compile(rf"\$argon2(?:id|i|d)\$v=19\$m=(\d{{1,9}}),t=(\d{{1,6}}),p=(\d{{1,4}})\$({_B64}+)\$({_B64}+)")
_SCRAM = re.compile(rf"SCRAM-SHA-256\$(\d{{1,9}}):({_B64}+=*)\$({_B64}+=*):({_B64}+=*)")

_FORMS = "must be a hash; make one with: gateway hash-password"


def prepared(text: str) -> str:
    """``text`` by SASLprep (RFC 4013, as a query: code points unassigned in Unicode 3.2 are left).
    Raises ValueError where it has characters that no name or password may have."""
    if text.isascii():
        if text.isprintable():
            return text
        raise ValueError("control characters")
    mapped = "".join(" " if stringprep.in_table_c12(sign) else sign for sign in text if not stringprep.in_table_b1(sign))
    result = unicodedata.ucd_3_2_0.normalize("NFKC", mapped)
    if any(prohibited(sign) for prohibited in _PROHIBITED for sign in result):
        raise ValueError("characters that are not allowed")
    if any(stringprep.in_table_d1(sign) for sign in result) and (
        any(stringprep.in_table_d2(sign) for sign in result)
        or not (stringprep.in_table_d1(result[0]) and stringprep.in_table_d1(result[-1]))
    ):
        raise ValueError("directions of text that do not go together")
    return result


_PROHIBITED = (
    stringprep.in_table_c12,
    stringprep.in_table_c21_c22,
    stringprep.in_table_c3,
    stringprep.in_table_c4,
    stringprep.in_table_c5,
    stringprep.in_table_c6,
    stringprep.in_table_c7,
    stringprep.in_table_c8,
    stringprep.in_table_c9,
)


def _octets(password: str) -> bytes:
    try:
        return prepared(password).encode()
    except ValueError:
        return password.encode("utf-8", "surrogatepass")


# ------------------------------------------------------------------- stored forms


@dataclass(frozen=True, slots=True)
class Scrypt:
    log_n: int
    r: int
    p: int
    salt: bytes = field(repr=False)
    hash: bytes = field(repr=False)

    def proves(self, password: str) -> bool:
        return hmac.compare_digest(self._made(password), self.hash)

    def _made(self, password: str) -> bytes:
        n = 1 << self.log_n
        memory = 128 * self.r * (n + self.p + 2) + 1024 * 1024
        return hashlib.scrypt(_octets(password), salt=self.salt, n=n, r=self.r, p=self.p, maxmem=memory, dklen=len(self.hash))

    @property
    def cost(self) -> tuple[object, ...]:
        return ("scrypt", self.log_n, self.r, self.p)

    def decoy(self) -> Scrypt:
        return Scrypt(self.log_n, self.r, self.p, urandom(len(self.salt)), urandom(len(self.hash)))

    def __str__(self) -> str:
        return f"$scrypt$ln={self.log_n},r={self.r},p={self.p}${_plain64(self.salt)}${_plain64(self.hash)}"


@dataclass(frozen=True, slots=True)
class Argon2:
    text: str = field(repr=False)

    def proves(self, password: str) -> bool:
        from argon2.exceptions import Argon2Error, InvalidHashError
        from argon2.low_level import Type, verify_secret

        kind = {"$argon2d": Type.D, "$argon2i": Type.I}.get(self.text[: self.text.index("$", 1)], Type.ID)
        try:
            return verify_secret(self.text.encode(), _octets(password), kind)
        except (Argon2Error, InvalidHashError):
            return False

    @property
    def cost(self) -> tuple[object, ...]:
        return ("argon2", *self.text.split("$")[1:4])

    def decoy(self) -> Argon2:
        head, salt, made = self.text.rsplit("$", 2)
        octets = [len(part) * 3 // 4 for part in (salt, made)]
        return Argon2("$".join([head, *(_plain64(urandom(size)) for size in octets)]))

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class ScramKeys:
    """StoredKey and ServerKey for SCRAM-SHA-256 (RFC 5802 §3)."""

    iterations: int
    salt: bytes = field(repr=False)
    stored: bytes = field(repr=False)
    server: bytes = field(repr=False)

    def proves(self, password: str) -> bool:
        return hmac.compare_digest(scram_keys(password, self.salt, self.iterations).stored, self.stored)

    @property
    def cost(self) -> tuple[object, ...]:
        return ("scram", self.iterations)

    def decoy(self) -> ScramKeys:
        return ScramKeys(self.iterations, urandom(len(self.salt)), urandom(32), urandom(32))

    def __str__(self) -> str:
        salt, stored, server = (b64encode(octets).decode() for octets in (self.salt, self.stored, self.server))
        return f"SCRAM-SHA-256${self.iterations}:{salt}${stored}:{server}"


Stored = Scrypt | Argon2 | ScramKeys


def scram_keys(password: str, salt: bytes, iterations: int) -> ScramKeys:
    """The keys of a password (RFC 5802 §3)."""
    salted = hashlib.pbkdf2_hmac("sha256", _octets(password), salt, iterations)
    client = hmac.digest(salted, b"Client Key", "sha256")
    return ScramKeys(iterations, salt, hashlib.sha256(client).digest(), hmac.digest(salted, b"Server Key", "sha256"))


def made(password: str, kind: Kind = "scrypt") -> Stored:
    """A stored form of this password, with fresh salt. Raises ValueError for an empty one and
    for one that no login could send."""
    if not password or "\0" in password:
        raise ValueError("a password has one character or more, and no NUL")
    salt = urandom(SALT)
    if kind == "scrypt":
        empty = Scrypt(SCRYPT_LOG_N, SCRYPT_R, SCRYPT_P, salt, bytes(32))
        return Scrypt(SCRYPT_LOG_N, SCRYPT_R, SCRYPT_P, salt, empty._made(password))
    if kind == "scram":
        return scram_keys(password, salt, SCRAM_ITERATIONS)
    from argon2 import PasswordHasher

    return Argon2(PasswordHasher().hash(_octets(password)))


def read(text: str) -> Stored:
    """A stored form. Raises ValueError with a sentence that does not repeat it."""
    try:
        return _read(text)
    except binascii.Error:
        raise ValueError("is damaged: its base64 cannot be read") from None


def _read(text: str) -> Stored:
    if match := _SCRYPT.fullmatch(text):
        log_n, r, p = (int(match[group]) for group in (1, 2, 3))
        if not (1 <= log_n <= 24 and r >= 1 and p >= 1 and 128 * r * (1 << log_n) <= MOST_MEMORY and r * p < 1 << 10):
            raise ValueError("asks scrypt for more than 1 GiB of memory, or for nothing")
        return Scrypt(log_n, r, p, _octets64(match[4]), _least(_octets64(match[5]), 16))
    if match := _ARGON2.fullmatch(text):
        memory, time, lanes = (int(match[group]) for group in (1, 2, 3))
        if not (8 * lanes <= memory <= MOST_MEMORY // 1024 and 1 <= time <= 1000 and 1 <= lanes <= 256):
            raise ValueError("asks argon2 for more than 1 GiB of memory, or for nothing")
        _least(_octets64(match[4]), 8)
        _least(_octets64(match[5]), 16)
        return Argon2(text)
    if match := _SCRAM.fullmatch(text):
        iterations = int(match[1])
        if not 4096 <= iterations <= MOST_ITERATIONS:
            raise ValueError("must have between 4,096 and 10,000,000 iterations (RFC 7677)")
        stored, server = (_octets64(match[group]) for group in (3, 4))
        if len(stored) != 32 or len(server) != 32:
            raise ValueError("is damaged: its keys are not of 32 octets")
        return ScramKeys(iterations, _least(_octets64(match[2]), 8), stored, server)
    if re.match(r"\$2[abxy]\$|\$apr1\$|\$[156]\$|\{SHA\}", text):
        raise ValueError(f"is a form that is not read here (bcrypt, MD5, crypt or SHA-1); {_FORMS.removeprefix('must be a hash; ')}")
    if text.startswith(("$scrypt$", "$argon2", "SCRAM-SHA-256$")):
        raise ValueError("is damaged; make it anew with: gateway hash-password")
    raise ValueError(_FORMS)


def _octets64(text: str) -> bytes:
    text = text.rstrip("=")
    return binascii.a2b_base64(text + "=" * (-len(text) % 4), strict_mode=True)


def _least(octets: bytes, size: int) -> bytes:
    if len(octets) < size:
        raise ValueError(f"is damaged: a part of it has fewer than {size} octets")
    return octets


def _plain64(octets: bytes) -> str:
    return b64encode(octets).decode().rstrip("=")


# ----------------------------------------------------------------------- accounts


@dataclass(frozen=True, slots=True)
class Account:
    """What proves that somebody is this user: ``password`` for PLAIN and LOGIN, ``keys`` for SCRAM."""

    password: Stored
    keys: ScramKeys | None = None


def account(forms: Iterable[Stored]) -> Account:
    """One account of all that is stored for a name; the first slow hash proves passwords, keys
    only where there is none. Raises ValueError for two of a kind: which would hold?"""
    keys: ScramKeys | None = None
    password: Stored | None = None
    for form in forms:
        if isinstance(form, ScramKeys):
            if keys is not None:
                raise ValueError("has SCRAM keys twice; keep one")
            keys = form
        else:
            if password is not None:
                raise ValueError("has two hashes; keep one, and SCRAM keys beside it if you like")
            password = form
    if password is None:
        password = keys
    if password is None:
        raise ValueError("names no hash")
    return Account(password, keys)


def name_fault(name: str) -> str | None:
    """Why this cannot be a user's name; None if it can."""
    try:
        good = prepared(name) == name
    except ValueError:
        good = False
    if not good:
        return "has characters that no login can send"
    if not name or len(name.encode()) > MOST_NAME:
        return f"must have between 1 and {MOST_NAME} octets"
    return None


#: Octets of a user's name.
MOST_NAME: Final = 255


def read_lines(text: str) -> tuple[dict[str, list[Stored]], list[tuple[int, str]]]:
    """A file in the manner of htpasswd, ``name:hash`` a line (a name may come again, with another
    kind), ``#`` begins a comment: what it says, and its faults with their lines."""
    found: dict[str, list[Stored]] = {}
    faults: list[tuple[int, str]] = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        name, colon, form = line.partition(":")
        if not colon:
            faults.append((number, "is not name:hash"))
            continue
        if fault := name_fault(name):
            faults.append((number, f"the name {fault}"))
            continue
        try:
            stored = read(form.strip())
            account([*found.get(name, ()), stored])
        except ValueError as error:
            faults.append((number, f"the hash {error}" if not str(error).startswith("has ") else f"{name!r} {error}"))
            continue
        found.setdefault(name, []).append(stored)
    return found, faults
