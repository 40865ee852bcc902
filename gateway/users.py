"""Who may log in: accounts of the configuration, and a service that is asked over HTTP.

``Users`` implements ``contracts.Authenticator``. Owns the order of the sources (an account that
is written down decides alone; who has none is the service's), the threads in which slow hashes
are computed, and the lock-out. Knows no wire.

The service is asked by one POST a login, signed like a check's::

    {"type": "authentication", "mechanism": …, "user": … | null, "password": … | null,
     "token": … | null, "listener": …, "client": {…}}

204 lets the user in under the claimed name, 200 and ``{"identity": "name"}`` under that name;
401, 403, and 200 with ``{"identity": null}`` refuse (535). Everything else is a service that does
not work: 454, the client tries again.

Tokens can be checked by a key set instead (``jwks_url``): signature, expiry, issuer and audience
of a JWT, by PyJWT (the extra ``gateway-smtp[jwt]``).

Invariants: a user that does not exist costs what one that exists does, down to its SCRAM salt;
no hash is computed on the loop; at most ``WAITING`` logins wait for a thread.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import secrets
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, TypeVar

import orjson

from . import __version__
from .contracts import Judgement, Login
from .message import Client
from .mime.formats.standard import client_facts
from .net.http import Answer, HttpFault, http_client
from .net.signature import Signer
from .passwords import SALT, SCRAM_ITERATIONS, SCRYPT_LOG_N, SCRYPT_P, SCRYPT_R, Account, ScramKeys, Scrypt, Stored, name_fault
from .reply import Reply
from .smtp.auth import MECHANISMS, PLUS, REFUSED, SCRAM
from .smtp.lockout import Lockout

if TYPE_CHECKING:
    from .config import Authentication

#: Logins that wait for a thread; further ones are 454.
WAITING = 256
#: Requests to the service that are out at a time.
CONNECTIONS = 64
#: Seconds between two looks at a key set for a key that it did not have.
KEYS_AGAIN = 30.0
#: Seconds for which a key set is good.
KEYS_LIFETIME = 300.0

LOCKED = Reply(454, "4.7.0", "too many failed logins, try again later")
UNAVAILABLE = Reply(454, "4.7.0", "authentication is not possible now, try again later")

_ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
_NO = Judgement(reply=REFUSED)

T = TypeVar("T")


class _Broken(Exception):  # noqa: N818 (a source's fault, not an error of ours)
    """A source gives no usable answer; the text is the reason."""


class Threads:
    """Where slow hashes are computed: few threads, and a bound on those who wait."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1)), thread_name_prefix="login")
        self._waiting = 0

    async def run(self, work: Callable[[], T]) -> T:
        """What ``work`` returns or raises. Raises _Broken where too many wait."""
        if self._waiting >= WAITING:
            raise _Broken("too many logins at a time")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class Users:
    """``accounts``: those written down, replaced whole on reload. ``mechanisms``: which the operator
    wants; None: all that can work for everybody."""

    def __init__(
        self,
        accounts: Mapping[str, Account],
        authentication: Authentication | None = None,
        *,
        lockout: Lockout | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        wanted = None if authentication is None else authentication.mechanisms
        self._service = Service(authentication) if authentication is not None and authentication.url is not None else None
        self._key_set = KeySet(authentication) if authentication is not None and authentication.jwks_url is not None else None
        self._wanted = None if wanted is None else frozenset(wanted)
        self.lockout = Lockout() if lockout is None else lockout
        self._clock = clock
        self._threads = Threads()
        self.go_by(accounts)

    def go_by(self, accounts: Mapping[str, Account]) -> None:
        """These accounts from now on."""
        self._accounts = dict(accounts)
        self.mechanisms = mechanisms(self._accounts, self._service is not None, self._key_set is not None, self._wanted)
        self._decoy = _decoy([account.password for account in accounts.values()])
        keys = [account.keys for account in accounts.values() if account.keys is not None]
        self._iterations = Counter(one.iterations for one in keys).most_common(1)[0][0] if keys else SCRAM_ITERATIONS
        self._salt = Counter(len(one.salt) for one in keys).most_common(1)[0][0] if keys else SALT
        # Salts of users that do not exist: the same in every worker and after every start, as real ones are.
        self._seed = sha256(b"\0".join(f"{name}:{one.password}:{one.keys}".encode() for name, one in sorted(accounts.items()))).digest()

    async def judge(self, login: Login, client: Client, listener: str) -> Judgement:
        if login.proven is None and self.lockout.locked(client.ip, login.user, self._clock()):
            return Judgement(reply=LOCKED, note="locked")
        try:
            judgement = await self._judged(login, client, listener)
        except _Broken as fault:
            return Judgement(reply=UNAVAILABLE, note=str(fault)[:200])
        if judgement.identity is not None:
            self.lockout.succeeded(client.ip, login.user or judgement.identity)
        elif judgement.keys is None:
            self.lockout.failed(client.ip, login.user, self._clock())
        return judgement

    async def _judged(self, login: Login, client: Client, listener: str) -> Judgement:
        account = self._accounts.get(login.user)
        if login.token is not None:
            if self._key_set is not None:
                return await self._key_set.judge(login, self._threads)
            return _NO if self._service is None else await self._service.judge(login, client, listener)
        password = login.password
        if password is not None:
            if account is None and self._service is not None:
                return await self._service.judge(login, client, listener)
            form = self._decoy if account is None else account.password
            good = await self._threads.run(lambda: form.proves(password))
            return Judgement(login.user) if good and account is not None else _NO
        if login.proven is None:
            keys = self._no_keys(login.user) if account is None or account.keys is None else account.keys
            return Judgement(keys=keys, nonce=secrets.token_urlsafe(24))
        return Judgement(login.user) if login.proven and account is not None and account.keys is not None else _NO

    def _no_keys(self, user: str) -> ScramKeys:
        """For whoever has none: they look like keys and fit no password."""
        salt = b""
        while len(salt) < self._salt:
            salt += hmac.digest(self._seed, f"{len(salt)}:{user}".encode(), "sha256")
        return ScramKeys(self._iterations, salt[: self._salt], secrets.token_bytes(32), secrets.token_bytes(32))

    async def close(self) -> None:
        self._threads.close()
        if self._service is not None:
            await self._service.close()


def mechanisms(accounts: Mapping[str, Account], service: bool, key_set: bool, wanted: frozenset[str] | None = None) -> tuple[str, ...]:
    """What is offered. Unless it is said which are wanted, SCRAM only where every user has keys:
    a client that can do SCRAM takes it, and would fail for the others."""
    possible: set[str] = set()
    if accounts or service:
        possible |= {"PLAIN", "LOGIN"}
    if any(account.keys is not None for account in accounts.values()) and (
        wanted is not None or (not service and all(account.keys is not None for account in accounts.values()))
    ):
        possible |= {SCRAM, PLUS}
    if service or key_set:
        possible |= {"OAUTHBEARER", "XOAUTH2"}
    return tuple(name for name in MECHANISMS if name in possible and (wanted is None or name in wanted))


def _decoy(forms: Sequence[Stored]) -> Stored:
    """What the password of a user that does not exist is compared with: as dear as most others."""
    if not forms:
        return Scrypt(SCRYPT_LOG_N, SCRYPT_R, SCRYPT_P, secrets.token_bytes(SALT), secrets.token_bytes(32))
    dearest = Counter(form.cost for form in forms).most_common(1)[0][0]
    return next(form for form in forms if form.cost == dearest).decoy()


# ------------------------------------------------------------------------ the service


class Service:
    """``[authentication] url``. Raises ValueError for a secret that is no base64."""

    def __init__(self, config: Authentication) -> None:
        assert config.url is not None
        self._url = config.url
        self._timeout = config.timeout
        self._signer = Signer([config.secret])
        self._http = http_client("direct", CONNECTIONS)

    async def judge(self, login: Login, client: Client, listener: str) -> Judgement:
        body = orjson.dumps(
            {
                "type": "authentication",
                "mechanism": login.mechanism,
                "user": login.user or None,
                "password": login.password,
                "token": login.token,
                "listener": listener,
                "client": client_facts(client),
            }
        )
        headers = [("content-type", "application/json"), ("user-agent", f"gateway-smtp/{__version__}")]
        headers += self._signer.headers(str(uuid.uuid4()), int(time.time()), [body])
        try:
            answer = await self._http.post(self._url, headers, body, asyncio.get_running_loop().time() + self._timeout)
        except (HttpFault, ValueError) as fault:
            raise _Broken(f"the service: {fault}") from None
        return _identified(answer, login)

    async def close(self) -> None:
        await self._http.close()


def _identified(answer: Answer, login: Login) -> Judgement:
    if answer.status in (401, 403):
        return _NO
    if answer.status == 204:
        return _as(login.user, login)
    if answer.status != 200:
        raise _Broken(f"the service: HTTP {answer.status}")
    try:
        said: Any = orjson.loads(answer.body)
        identity = said["identity"]
    except (ValueError, TypeError, KeyError):
        raise _Broken('the service: the answer is no JSON object with "identity"') from None
    return _NO if identity is None else _as(identity, login)


def _as(identity: object, login: Login) -> Judgement:
    """Let in under this name, if it is one: it is repeated in replies, logs and headers."""
    fault = name_fault(identity) if isinstance(identity, str) else "is no text"
    if not isinstance(identity, str) or fault is not None:
        raise _Broken(f"the service: the identity {fault}")
    return Judgement(identity)


# ----------------------------------------------------------------------- the key set


class KeySet:
    """``[authentication] jwks_url``: tokens that are JWTs (RFC 7519), by the issuer's keys (RFC 7517).

    Raises ValueError where PyJWT is not installed."""

    def __init__(self, config: Authentication) -> None:
        try:
            import jwt
        except ImportError:
            raise ValueError("jwks_url wants PyJWT: pip install gateway-smtp[jwt]") from None
        assert config.jwks_url is not None
        self._jwt = jwt
        self._client = jwt.PyJWKClient(config.jwks_url, cache_keys=False, lifespan=int(KEYS_LIFETIME), timeout=int(config.timeout) or 1)
        self._issuer = config.issuer
        self._audience = config.audience
        self._claim = config.identity_claim
        self._timeout = config.timeout
        self._fault = ""
        self._keys: dict[str, Any] = {}
        self._looked = -KEYS_LIFETIME
        self._turn = asyncio.Lock()

    async def judge(self, login: Login, threads: Threads) -> Judgement:
        token = login.token or ""
        jwt = self._jwt
        try:
            kid = jwt.get_unverified_header(token).get("kid")
        except jwt.PyJWTError as error:
            return replace(_NO, note=str(error)[:200])
        key = await self._key(kid, threads)
        if key is None:
            return replace(_NO, note="no such key")
        try:
            claims = await threads.run(lambda: self._claims(token, key))
        except jwt.PyJWTError as error:
            return replace(_NO, note=str(error)[:200])
        identity = claims.get(self._claim)
        if not isinstance(identity, str) or name_fault(identity) is not None:
            return replace(_NO, note=f"the claim {self._claim} names nobody")
        if login.user and login.user.lower() != identity.lower():
            return replace(_NO, note="the token is another user's")
        return Judgement(identity)

    def _claims(self, token: str, key: Any) -> dict[str, Any]:
        decoded: dict[str, Any] = self._jwt.decode(
            token,
            key,
            algorithms=_ALGORITHMS,
            issuer=self._issuer,
            audience=self._audience,
            leeway=30,
            options={"require": ["exp", "iss", "aud"]},
        )
        return decoded

    async def _key(self, kid: object, threads: Threads) -> Any:
        """The key of this name (a set of one needs no name), None where the issuer has none. Raises
        _Broken while no key set could be had."""
        async with self._turn:
            age = time.monotonic() - self._looked
            if age >= KEYS_LIFETIME or (age >= KEYS_AGAIN and self._named(kid) is None):
                self._looked = time.monotonic()
                try:
                    async with asyncio.timeout(self._timeout):
                        fetched = await threads.run(lambda: self._client.get_signing_keys(refresh=True))
                except (self._jwt.PyJWTError, ValueError, OSError) as error:
                    self._fault = type(error).__name__
                else:
                    self._keys = {str(one.key_id): one for one in fetched}
        if not self._keys:
            raise _Broken(f"the key set: {self._fault}")
        return self._named(kid)

    def _named(self, kid: object) -> Any:
        if kid is None:
            return next(iter(self._keys.values())) if len(self._keys) == 1 else None
        return self._keys.get(str(kid))
