"""Who may log in: accounts, a service over HTTP, a key set; lock-out; nothing slow on the loop."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from standardwebhooks import Webhook

from gateway import users as module
from gateway.config import Authentication
from gateway.contracts import Judgement, Login
from gateway.message import Client
from gateway.passwords import Account, Scrypt, account, made, read, scram_keys
from gateway.smtp.auth import MECHANISMS, REFUSED
from gateway.smtp.lockout import FREE_BY_ADDRESS
from gateway.users import LOCKED, UNAVAILABLE, Users, mechanisms

from ..loops import until

HERE = Client("192.0.2.1", helo="client.example")
SECRET = "whsec_Z2F0ZXdheSBleGFtcGxlIHNlY3JldCE="


def slow(password: str) -> Account:
    return account([Scrypt(4, 8, 1, b"saltsalt", Scrypt(4, 8, 1, b"saltsalt", bytes(32))._made(password))])


def keyed(password: str, iterations: int = 4096) -> Account:
    return account([scram_keys(password, b"salt" * 5, iterations)])


@asynccontextmanager
async def house(accounts: dict[str, Account], authentication: Authentication | None = None, **more: Any) -> AsyncIterator[Users]:
    made_users = Users(accounts, authentication, **more)
    try:
        yield made_users
    finally:
        await made_users.close()


async def judge(users: Users, login: Login, client: Client = HERE) -> Judgement:
    return await users.judge(login, client, "127.0.0.1:25")


def plain(user: str, password: str) -> Login:
    return Login("PLAIN", user, password=password)


# ---------------------------------------------------------------------- accounts


async def test_passwords_by_either_form() -> None:
    async with house({"alice": slow("wonder"), "bob": keyed("build")}) as users:
        assert (await judge(users, plain("alice", "wonder"))).identity == "alice"
        assert (await judge(users, plain("bob", "build"))).identity == "bob"
        for login in (plain("alice", "build"), plain("bob", "wonder"), plain("nobody", "wonder"), plain("Alice", "wonder")):
            judgement = await judge(users, login)
            assert (judgement.identity, judgement.reply) == (None, REFUSED)


async def test_scram_in_two_steps() -> None:
    async with house({"bob": keyed("build")}) as users:
        first = await judge(users, Login("SCRAM-SHA-256", "bob"))
        assert first.keys == keyed("build").keys
        assert len(first.nonce) >= 24
        assert first.nonce.isprintable()
        assert "," not in first.nonce
        assert first.nonce != (await judge(users, Login("SCRAM-SHA-256", "bob"))).nonce
        assert (await judge(users, Login("SCRAM-SHA-256", "bob", proven=True))).identity == "bob"
        assert (await judge(users, Login("SCRAM-SHA-256", "bob", proven=False))).reply == REFUSED


async def test_a_user_that_is_not_has_salt_like_one_that_is() -> None:
    accounts = {"bob": keyed("build", 5000), "alice": slow("wonder")}
    async with house(accounts) as users, house(accounts) as again:
        for name in ("nobody", "alice"):
            keys = (await judge(users, Login("SCRAM-SHA-256", name))).keys
            other = (await judge(again, Login("SCRAM-SHA-256", name))).keys
            assert keys is not None
            assert other is not None
            assert (keys.iterations, len(keys.salt)) == (5000, 20)
            assert keys.salt == other.salt, "in every worker and after each start"
            assert keys.stored != other.stored
            assert (await judge(users, Login("SCRAM-SHA-256", name, proven=True))).reply == REFUSED
        one, two = [(await judge(users, Login("SCRAM-SHA-256", name))).keys for name in ("x", "y")]
        assert one is not None
        assert two is not None
        assert one.salt != two.salt


async def test_a_user_that_is_not_costs_what_one_that_is_does(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[tuple[int, int, int]] = []
    real = Scrypt.proves

    def counted(self: Scrypt, password: str) -> bool:
        computed.append((self.log_n, self.r, self.p))
        assert threading.current_thread() is not threading.main_thread(), "a slow hash on the loop"
        return real(self, password)

    monkeypatch.setattr(Scrypt, "proves", counted)
    async with house({"alice": slow("wonder"), "al": slow("x"), "bob": keyed("build")}) as users:
        for name in ("alice", "nobody"):
            assert (await judge(users, plain(name, "no"))).reply == REFUSED
    assert computed == [(4, 8, 1), (4, 8, 1)]


async def test_too_many_logins_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAITING", 3)
    gate = threading.Event()
    monkeypatch.setattr(Scrypt, "proves", lambda self, password: gate.wait(60))
    async with house({"alice": slow("wonder")}) as users:
        waiting = [asyncio.create_task(judge(users, plain("alice", "x"))) for _ in range(5)]
        await until(lambda: sum(task.done() for task in waiting) == 2)
        done = [task for task in waiting if task.done()]
        assert [task.result().reply for task in done] == [UNAVAILABLE] * 2
        gate.set()
        assert [(await task).identity for task in waiting if task not in done] == ["alice"] * 3


async def test_accounts_are_replaced_whole() -> None:
    async with house({"alice": slow("wonder")}) as users:
        assert users.mechanisms == ("PLAIN", "LOGIN")
        users.go_by({"bob": keyed("build")})
        assert users.mechanisms == ("SCRAM-SHA-256-PLUS", "SCRAM-SHA-256", "PLAIN", "LOGIN")
        assert (await judge(users, plain("alice", "wonder"))).reply == REFUSED
        assert (await judge(users, plain("bob", "build"))).identity == "bob"


@pytest.mark.parametrize(
    ("accounts", "service", "key_set", "wanted", "offers"),
    [
        ("", False, False, None, ""),
        ("s", False, False, None, "PLAIN LOGIN"),
        ("k", False, False, None, "SCRAM-SHA-256-PLUS SCRAM-SHA-256 PLAIN LOGIN"),
        ("ks", False, False, None, "PLAIN LOGIN"),
        ("ks", False, False, MECHANISMS, "SCRAM-SHA-256-PLUS SCRAM-SHA-256 PLAIN LOGIN"),
        ("k", True, False, None, "PLAIN LOGIN OAUTHBEARER XOAUTH2"),
        ("", True, False, ("PLAIN",), "PLAIN"),
        ("", False, True, None, "OAUTHBEARER XOAUTH2"),
        ("k", False, False, ("SCRAM-SHA-256", "XOAUTH2"), "SCRAM-SHA-256"),
    ],
)
def test_what_is_offered(accounts: str, service: bool, key_set: bool, wanted: tuple[str, ...] | None, offers: str) -> None:
    table = {letter: slow("x") if letter == "s" else keyed("x") for letter in accounts}
    assert " ".join(mechanisms(table, service, key_set, None if wanted is None else frozenset(wanted))) == offers


# ---------------------------------------------------------------------- lock-out


async def test_whoever_guesses_is_locked_out_even_with_the_right_password() -> None:
    now = 0.0
    async with house({"alice": slow("wonder")}, clock=lambda: now) as users:
        for _ in range(FREE_BY_ADDRESS + 1):
            assert (await judge(users, plain("nobody", "x"))).reply == REFUSED
        judgement = await judge(users, plain("alice", "wonder"))
        assert (judgement.reply, judgement.note) == (LOCKED, "locked")
        assert (await judge(users, Login("SCRAM-SHA-256", "alice"))).reply == LOCKED
        assert (await judge(users, plain("alice", "wonder"), Client("198.51.100.1"))).identity == "alice"
        now = 3600.0
        assert (await judge(users, plain("alice", "wonder"))).identity == "alice"


async def test_scram_proofs_count_as_well() -> None:
    async with house({"bob": keyed("build")}, clock=lambda: 0.0) as users:
        for _ in range(FREE_BY_ADDRESS + 1):
            assert (await judge(users, Login("SCRAM-SHA-256", "bob", proven=False))).reply == REFUSED
        assert (await judge(users, Login("SCRAM-SHA-256", "bob"))).reply == LOCKED


# ------------------------------------------------------------------- the service


class Answering:
    """An HTTP server whose answers the test gives: status and body."""

    def __init__(self, answer: Callable[[dict[str, Any]], tuple[int, bytes]]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.signed: list[tuple[dict[str, str], bytes]] = []
        self.fetched = 0
        self.answer = answer
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                octets = self.rfile.read(int(self.headers["content-length"]))
                outer.bodies.append(json.loads(octets))
                outer.signed.append(({key.lower(): value for key, value in self.headers.items()}, octets))
                self._say(*outer.answer(outer.bodies[-1]))

            def do_GET(self) -> None:
                outer.fetched += 1
                self._say(*outer.answer({}))

            def _say(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/login"


@contextmanager
def answering(answer: Callable[[dict[str, Any]], tuple[int, bytes]]) -> Iterator[Answering]:
    one = Answering(answer)
    thread = threading.Thread(target=one.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield one
    finally:
        one.server.shutdown()
        one.server.server_close()
        thread.join()


async def test_the_service_is_asked_for_whom_no_account_knows() -> None:
    def answer(asked: dict[str, Any]) -> tuple[int, bytes]:
        return (200, b'{"identity": "Carol"}') if asked["password"] == "good" else (401, b"")

    with answering(answer) as service:
        async with house({"alice": slow("wonder")}, Authentication(url=service.url, secret=SECRET)) as users:
            assert (await judge(users, plain("carol", "good"))).identity == "Carol"
            assert (await judge(users, plain("carol", "bad"))).reply == REFUSED
            assert (await judge(users, plain("alice", "good"))).reply == REFUSED, "an account decides alone"
        assert len(service.bodies) == 2
        assert service.bodies[0] == {
            "type": "authentication",
            "mechanism": "PLAIN",
            "user": "carol",
            "password": "good",
            "token": None,
            "listener": "127.0.0.1:25",
            "client": service.bodies[0]["client"],
        }
        assert service.bodies[0]["client"]["ip"] == "192.0.2.1"
        headers, octets = service.signed[0]
        Webhook(SECRET).verify(octets, headers)


async def test_the_service_judges_tokens() -> None:
    with answering(lambda asked: (200, json.dumps({"identity": "dave" if asked["token"] == "t0ken" else None}).encode())) as service:
        async with house({}, Authentication(url=service.url)) as users:
            assert (await judge(users, Login("OAUTHBEARER", "", token="t0ken"))).identity == "dave"
            assert (await judge(users, Login("XOAUTH2", "dave", token="other"))).reply == REFUSED
        assert [asked["user"] for asked in service.bodies] == [None, "dave"]


@pytest.mark.parametrize(
    ("status", "body", "note"),
    [
        (500, b"", "HTTP 500"),
        (302, b"", "HTTP 302"),
        (404, b"", "HTTP 404"),
        (200, b"", "no JSON object"),
        (200, b"[]", "no JSON object"),
        (200, b"{}", "no JSON object"),
        (200, b'{"identity": 5}', "is no text"),
        (200, b'{"identity": ""}', "between 1 and 255"),
        (200, b'{"identity": "a\\r\\nb"}', "characters"),
        (200, b'{"identity": "a\\u2028b"}', "characters"),
    ],
)
async def test_a_service_that_does_not_work(status: int, body: bytes, note: str) -> None:
    with answering(lambda asked: (status, body)) as service:
        async with house({}, Authentication(url=service.url)) as users:
            for _ in range(FREE_BY_ADDRESS + 2):
                judgement = await judge(users, plain("carol", "good"))
                assert judgement.reply == UNAVAILABLE, "its faults are not the client's"
            assert note in judgement.note


async def test_204_is_the_claimed_name() -> None:
    with answering(lambda asked: (204, b"")) as service:
        async with house({}, Authentication(url=service.url)) as users:
            assert (await judge(users, plain("carol", "x"))).identity == "carol"
            judgement = await judge(users, Login("OAUTHBEARER", "", token="x"))
            assert judgement.reply == UNAVAILABLE, "nobody was claimed"


async def test_a_service_that_is_not_there_or_slow() -> None:
    with answering(lambda asked: (204, b"")) as service:
        url = service.url
    async with house({}, Authentication(url=url)) as users:
        assert (await judge(users, plain("carol", "x"))).reply == UNAVAILABLE
    gate = threading.Event()
    with answering(lambda asked: (204 if gate.wait(30) else 500, b"")) as service:
        async with house({}, Authentication(url=service.url, timeout=0.1)) as users:
            assert (await judge(users, plain("carol", "x"))).reply == UNAVAILABLE
        gate.set()


# ------------------------------------------------------------------- the key set


KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER = rsa.generate_private_key(public_exponent=65537, key_size=2048)


def key_set() -> bytes:
    public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(KEY.public_key()))
    return json.dumps({"keys": [public | {"kid": "k1", "use": "sig", "alg": "RS256"}]}).encode()


def token(key: Any = KEY, kid: str = "k1", algorithm: str = "RS256", **claims: Any) -> str:
    good = {"iss": "https://id.example", "aud": "smtp", "exp": time.time() + 60, "email": "a@b.example"}
    wanted = {name: value for name, value in (good | claims).items() if value is not None}
    return jwt.encode(wanted, key, algorithm=algorithm, headers={"kid": kid})


@pytest.mark.parametrize(
    ("said", "user", "good"),
    [
        (lambda: token(), "", True),
        (lambda: token(), "A@b.example", True),
        (lambda: token(), "other@b.example", False),
        (lambda: token(exp=time.time() - 3600), "", False),
        (lambda: token(exp=None), "", False),
        (lambda: token(aud="imap"), "", False),
        (lambda: token(aud=None), "", False),
        (lambda: token(iss="https://evil.example"), "", False),
        (lambda: token(email=None), "", False),
        (lambda: token(email="a\nb"), "", False),
        (lambda: token(key=OTHER), "", False),
        (lambda: token(kid="k2"), "", False),
        (lambda: token(key="x" * 64, algorithm="HS256"), "", False),
        (lambda: token(key=None, algorithm="none"), "", False),
        (lambda: "no.jwt", "", False),
        (lambda: "abc", "", False),
    ],
)
async def test_tokens_by_the_keys_of_their_issuer(said: Callable[[], str], user: str, good: bool) -> None:
    with answering(lambda asked: (200, key_set())) as issuer:
        wanted = Authentication(jwks_url=issuer.url, issuer="https://id.example", audience="smtp")
        async with house({}, wanted) as users:
            assert users.mechanisms == ("OAUTHBEARER", "XOAUTH2")
            judgement = await judge(users, Login("OAUTHBEARER", user, token=said()))
    assert (judgement.identity, judgement.reply) == (("a@b.example", None) if good else (None, REFUSED)), judgement.note


async def test_the_key_set_is_kept_and_a_strange_key_fetches_it_no_more() -> None:
    with answering(lambda asked: (200, key_set())) as issuer:
        wanted = Authentication(jwks_url=issuer.url, issuer="https://id.example", audience="smtp")
        async with house({}, wanted) as users:
            for number in range(5):
                assert (await judge(users, Login("XOAUTH2", "", token=token()))).identity == "a@b.example"
                await judge(users, Login("XOAUTH2", f"u{number}", token=token(kid=f"k{number + 5}")))
        assert issuer.fetched == 1


@pytest.mark.parametrize(("status", "body"), [(500, b""), (200, b"{"), (200, b"{}"), (200, b'{"keys": []}')])
async def test_a_key_set_that_cannot_be_had(status: int, body: bytes) -> None:
    with answering(lambda asked: (status, body)) as issuer:
        wanted = Authentication(jwks_url=issuer.url, issuer="https://id.example", audience="smtp")
        async with house({}, wanted) as users:
            for _ in range(2):
                assert (await judge(users, Login("XOAUTH2", "", token=token()))).reply == UNAVAILABLE
        assert issuer.fetched == 1


def test_forms_come_from_text() -> None:
    assert read(str(made("x", "scram"))).proves("x")
