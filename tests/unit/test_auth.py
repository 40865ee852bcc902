"""SASL mechanisms as values: the examples of their RFCs, and what is no message of theirs."""

from __future__ import annotations

import hashlib
import hmac
from base64 import b64decode, b64encode

import pytest

from gateway.contracts import Judgement, Login
from gateway.passwords import scram_keys
from gateway.reply import Reply
from gateway.smtp.auth import BAD_NAME, MALFORMED, MECHANISMS, NO_PASSWORD, REFUSED, Granted, Mechanism, decoded, mechanism, offered

KEYS = scram_keys("pencil", b64decode("W22ZaJ0SNY7soEsUEjb6gQ=="), 4096)
NONCE = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0"
END_POINT = hashlib.sha256(b"a certificate").digest()
LATER = Reply(454, "4.7.0", "later")


def begin(name: str, end_point: bytes | None = None) -> Mechanism:
    found = mechanism(name, MECHANISMS, end_point)
    assert found is not None
    assert found.name == name.upper()
    return found


# ---------------------------------------------------------------- PLAIN and LOGIN


def test_plain_by_its_rfc() -> None:
    # RFC 4616 §4, both examples.
    one = begin("plain")
    assert one.respond(None) == b""
    assert one.respond(b"\0tim\0tanstaaftanstaaf") == Login("PLAIN", "tim", password="tanstaaftanstaaf")
    assert one.judged(Judgement("tim")) == Granted("tim")
    assert begin("PLAIN").respond(b"Ursel\0Kurt\0xipj3plmq") == REFUSED


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (b"", MALFORMED),
        (b"tim", MALFORMED),
        (b"tim\0pass", MALFORMED),
        (b"\0tim\0pa\0ss", MALFORMED),
        (b"\0\0pass", BAD_NAME),
        (b"\0t\rim\0pass", BAD_NAME),
        (b"\0t\xffim\0pass", BAD_NAME),
        (b"\0" + b"t" * 256 + b"\0pass", BAD_NAME),
        (b"\0tim\0", NO_PASSWORD),
        (b"\0tim\0\xff", NO_PASSWORD),
    ],
)
def test_what_is_no_plain(message: bytes, wanted: Reply) -> None:
    assert begin("PLAIN").respond(message) == wanted


def test_names_are_prepared() -> None:
    assert begin("PLAIN").respond("\0I\u00adX\0p".encode()) == Login("PLAIN", "IX", password="p")


def test_login() -> None:
    one = begin("LOGIN")
    assert one.respond(None) == b"Username:"
    assert one.respond(b"tim") == b"Password:"
    assert one.respond(b"secret") == Login("LOGIN", "tim", password="secret")
    assert one.judged(Judgement(reply=LATER)) == LATER
    assert begin("LOGIN").respond(b"tim") == b"Password:"
    assert begin("LOGIN").respond(b"t\0im") == BAD_NAME
    one = begin("LOGIN")
    one.respond(b"tim")
    assert one.respond(b"a\0b") == NO_PASSWORD


def test_no_secret_in_a_repr() -> None:
    said = repr(Login("PLAIN", "tim", password="hidden", token="hidden"))
    assert "hidden" not in said
    assert "tim" in said


# ------------------------------------------------------------------------- SCRAM


def scram(one: Mechanism, first: str, password: str = "pencil", bound: bytes | None = None, keys: object = KEYS) -> tuple[object, bytes]:
    """A client of its own (RFC 5802 §3) up to its proof; what came of it, and the server's proof as it must be."""
    header, bare = first[: first.index("n=", 2)], first[first.index("n=", 2) :]
    assert isinstance(one.respond(first.encode()), Login)
    challenge = one.judged(Judgement(keys=KEYS, nonce=NONCE))
    assert isinstance(challenge, bytes)
    fields = dict(part.split("=", 1) for part in challenge.decode().split(","))
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), b64decode(fields["s"]), int(fields["i"]))
    key = hmac.digest(salted, b"Client Key", "sha256")
    without = f"c={b64encode(header.encode() + (bound or b'')).decode()},r={fields['r']}"
    said = f"{bare},{challenge.decode()},{without}".encode()
    signature = hmac.digest(hashlib.sha256(key).digest(), said, "sha256")
    proof = b64encode(bytes(a ^ b for a, b in zip(key, signature, strict=True))).decode()
    server = hmac.digest(hmac.digest(salted, b"Server Key", "sha256"), said, "sha256")
    return one.respond(f"{without},p={proof}".encode()), b"v=" + b64encode(server)


def test_scram_by_its_rfc() -> None:
    # RFC 7677 §3.
    one = begin("SCRAM-SHA-256")
    assert one.respond(None) == b""
    assert one.respond(b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO") == Login("SCRAM-SHA-256", "user")
    assert (
        one.judged(Judgement(keys=KEYS, nonce=NONCE))
        == b"r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
    )
    final = b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
    assert one.respond(final) == Login("SCRAM-SHA-256", "user", proven=True)
    assert one.judged(Judgement("user")) == b"v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="
    assert one.respond(b"") == Granted("user")


def test_scram_wants_an_empty_line_at_the_end() -> None:
    one = begin("SCRAM-SHA-256")
    step, proof = scram(one, "n,,n=user,r=abc")
    assert step == Login("SCRAM-SHA-256", "user", proven=True)
    assert one.judged(Judgement("user")) == proof
    assert one.respond(b"x") == MALFORMED


def test_scram_with_a_wrong_password() -> None:
    one = begin("SCRAM-SHA-256")
    assert scram(one, "n,,n=user,r=abc", password="pen")[0] == Login("SCRAM-SHA-256", "user", proven=False)
    assert one.judged(Judgement()) == REFUSED


def test_a_locked_user_gets_no_keys() -> None:
    one = begin("SCRAM-SHA-256")
    one.respond(b"n,,n=user,r=abc")
    assert one.judged(Judgement(reply=LATER)) == LATER


def test_scram_names_with_commas() -> None:
    assert begin("SCRAM-SHA-256").respond(b"n,a=u=2Cs=3Der,n=u=2Cs=3Der,r=abc") == Login("SCRAM-SHA-256", "u,s=er")
    assert begin("SCRAM-SHA-256").respond(b"n,a=other,n=user,r=abc") == REFUSED
    assert begin("SCRAM-SHA-256").respond(b"n,,n=us\x01er,r=abc") == BAD_NAME


@pytest.mark.parametrize(
    "first",
    [b"", b"n", b"n,,", b"n,,n=,r=abc", b"n,,n=a=b,r=abc", b"n,,n=user", b"n,,n=user,r=", b"x,,n=user,r=abc", b"n,,n=user,r=a b", b"\xff"],
)
def test_what_is_no_scram(first: bytes) -> None:
    assert begin("SCRAM-SHA-256").respond(first) == MALFORMED


@pytest.mark.parametrize("final", [b"", b"c=biws", b"c=!,r=abc,p=AAAA", b"c=biws,r=abc,p=!", b"c=b,r=abc,p=AAAA", b"\xff"])
def test_what_is_no_final(final: bytes) -> None:
    one = begin("SCRAM-SHA-256")
    one.respond(b"n,,n=user,r=abc")
    one.judged(Judgement(keys=KEYS, nonce=NONCE))
    assert one.respond(final) == MALFORMED


def test_scram_bound_to_its_channel() -> None:
    one = begin("SCRAM-SHA-256-PLUS", END_POINT)
    step, proof = scram(one, "p=tls-server-end-point,,n=user,r=abc", bound=END_POINT)
    assert step == Login("SCRAM-SHA-256-PLUS", "user", proven=True)
    assert one.judged(Judgement("user")) == proof
    # Somebody in between shows another certificate.
    step, _ = scram(begin("SCRAM-SHA-256-PLUS", END_POINT), "p=tls-server-end-point,,n=user,r=abc", bound=bytes(32))
    assert step == Login("SCRAM-SHA-256-PLUS", "user", proven=False)


def test_scram_channels_that_do_not_fit() -> None:
    assert begin("SCRAM-SHA-256-PLUS", END_POINT).respond(b"n,,n=user,r=abc") == MALFORMED
    assert begin("SCRAM-SHA-256-PLUS", END_POINT).respond(b"p=tls-unique,,n=user,r=abc") == MALFORMED
    # The client can bind and saw no offer, but there was one: it was taken out on the way.
    assert begin("SCRAM-SHA-256", END_POINT).respond(b"y,,n=user,r=abc") == REFUSED
    assert isinstance(begin("SCRAM-SHA-256").respond(b"y,,n=user,r=abc"), Login)


# ------------------------------------------------------------------------ tokens


def test_oauthbearer_by_its_rfc() -> None:
    # RFC 7628 §4.1 and §4.3.
    one = begin("OAUTHBEARER")
    message = (
        b"n,a=user@example.com,\x01host=server.example.com\x01port=587\x01auth=Bearer vF9dft4qmTc2Nvb3RlckBhbHRhdmlzdGEuY29tCg==\x01\x01"
    )
    assert one.respond(message) == Login("OAUTHBEARER", "user@example.com", token="vF9dft4qmTc2Nvb3RlckBhbHRhdmlzdGEuY29tCg==")
    assert one.judged(Judgement(note="expired")) == b'{"status":"invalid_token"}'
    assert (one.refusal, one.note) == (REFUSED, "expired")
    assert one.respond(b"\x01") == REFUSED


def test_oauthbearer_without_a_name() -> None:
    assert begin("OAUTHBEARER").respond(b"n,,\x01auth=bearer abc\x01\x01") == Login("OAUTHBEARER", "", token="abc")


def test_xoauth2() -> None:
    one = begin("XOAUTH2")
    assert one.respond(None) == b""
    assert one.respond(b"user=a@b.example\x01auth=Bearer abc\x01\x01") == Login("XOAUTH2", "a@b.example", token="abc")
    assert one.judged(Judgement("a@b.example")) == Granted("a@b.example")


def test_a_service_that_is_down_says_so_at_once() -> None:
    one = begin("XOAUTH2")
    one.respond(b"user=a@b.example\x01auth=Bearer abc\x01\x01")
    assert one.judged(Judgement(reply=LATER)) == LATER


@pytest.mark.parametrize("name", ["OAUTHBEARER", "XOAUTH2"])
@pytest.mark.parametrize(
    "rest",
    [
        b"",
        b"\x01\x01",
        b"\x01auth=\x01\x01",
        b"\x01auth=Basic abc\x01\x01",
        b"\x01auth=Bearer a b\x01\x01",
        b"\x01auth=Bearer abc\x01",
        b"\xff",
    ],
)
def test_what_is_no_token(name: str, rest: bytes) -> None:
    assert begin(name).respond((b"n," if name == "OAUTHBEARER" else b"user=a") + rest) == MALFORMED


def test_a_bad_name_beside_a_token() -> None:
    assert begin("XOAUTH2").respond(b"user=a\nb\x01auth=Bearer abc\x01\x01") == BAD_NAME


# ----------------------------------------------------------------------- offers


def test_plus_wants_something_to_bind_to() -> None:
    assert "SCRAM-SHA-256-PLUS" not in offered(MECHANISMS, None)
    assert offered(MECHANISMS, END_POINT) == MECHANISMS
    assert mechanism("SCRAM-SHA-256-PLUS", MECHANISMS, None) is None
    assert mechanism("PLAIN", ("LOGIN",), None) is None
    assert mechanism("", MECHANISMS, None) is None


def test_base64_is_strict() -> None:
    assert decoded(b"AGE=") == b"\0a"
    assert decoded(b"") == b""
    for text in (b"AGE", b"AGE==", b"A GE=", b"AGE=x", b"=", b"\xff", b"AGE-", "ü"):
        assert decoded(text) is None
