"""Stored passwords: read, made, compared; what is none of ours; SASLprep by the examples of its RFC."""

from __future__ import annotations

from base64 import b64decode, b64encode

import pytest

from gateway.passwords import Argon2, ScramKeys, Scrypt, account, made, name_fault, prepared, read, read_lines, scram_keys

#: RFC 7914 §12: scrypt("password", "NaCl", N=1024, r=8, p=16, 64 octets).
RFC_7914 = (
    "fdbabe1c9d3472007856e7190d01e9fe7c6ad7cbc8237830e77376634b3731622eaf30d92e22a3886ff109279d9830dac727afb94a83ee6d8360cbdfa2cc0640"
)


def plain64(octets: bytes) -> str:
    return b64encode(octets).decode().rstrip("=")


def scrypt(salt: bytes = b"NaCl", octets: bytes = bytes.fromhex(RFC_7914), cost: str = "ln=10,r=8,p=16") -> str:
    return f"$scrypt${cost}${plain64(salt)}${plain64(octets)}"


def test_scrypt_is_the_scrypt_of_its_rfc() -> None:
    stored = read(scrypt())
    assert stored.proves("password")
    assert not stored.proves("passwor")
    assert str(stored) == scrypt()


def test_scram_keys_are_those_of_the_rfc() -> None:
    # RFC 7677 §3: the client's proof there fits these keys (test_auth.py makes it).
    keys = scram_keys("pencil", b64decode("W22ZaJ0SNY7soEsUEjb6gQ=="), 4096)
    assert str(keys) == (
        "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
    )
    assert read(str(keys)) == keys
    assert keys.proves("pencil")
    assert not keys.proves("pencil ")


@pytest.mark.parametrize("kind", ["scrypt", "argon2", "scram"])
def test_what_is_made_proves_its_password_alone(kind: str) -> None:
    stored = made("pass wörd", kind)  # type: ignore[arg-type]
    again = read(str(stored))
    assert again.proves("pass wörd")
    assert again.proves("pass wo\u0308rd"), "the same letters, composed otherwise"
    assert not again.proves("pass word")
    assert not again.proves("")
    assert str(made("pass wörd", kind)) != str(stored), "two of the same have their own salts"  # type: ignore[arg-type]
    decoy = again.decoy()
    assert decoy.cost == again.cost
    assert not decoy.proves("pass wörd")
    assert "pass" not in repr(stored)
    assert str(stored).rpartition("$")[2] not in repr(stored)


def test_argon2_of_other_kinds() -> None:
    from argon2 import PasswordHasher, Type

    for kind in (Type.D, Type.I, Type.ID):
        stored = read(PasswordHasher(time_cost=1, memory_cost=64, parallelism=1, type=kind).hash("x"))
        assert isinstance(stored, Argon2)
        assert stored.proves("x")
        assert not stored.proves("y")


@pytest.mark.parametrize("password", ["", "a\0b"])
def test_passwords_that_no_login_can_send(password: str) -> None:
    with pytest.raises(ValueError, match="one character or more"):
        made(password)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("secret", "must be a hash; make one with: gateway hash-password"),
        ("", "must be a hash"),
        ("$2y$10$abcdefghijklmnopqrstuv", "bcrypt"),
        ("{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=", "SHA-1"),
        ("$scrypt$ln=10,r=8$x$y", "is damaged"),
        (scrypt(cost="ln=24,r=64,p=1"), "more than 1 GiB"),
        (scrypt(cost="ln=0,r=8,p=1"), "or for nothing"),
        (scrypt(cost="ln=10,r=8,p=999"), "more than 1 GiB"),
        (scrypt(octets=b"short"), "fewer than 16"),
        ("$scrypt$ln=10,r=8,p=1$A$" + "A" * 43, "base64"),
        ("$argon2id$v=19$m=9999999,t=1,p=1$c2FsdHNhbHQ$" + "A" * 43, "more than 1 GiB"),
        ("$argon2id$v=19$m=64,t=1,p=1$c2E$" + "A" * 43, "fewer than 8"),
        ("$argon2id$v=16$m=64,t=1,p=1$c2FsdHNhbHQ$" + "A" * 43, "is damaged"),
        ("SCRAM-SHA-256$4095:c2FsdHNhbHQ=$" + "A" * 43 + "=:" + "A" * 43 + "=", "4,096"),
        ("SCRAM-SHA-256$4096:c2FsdHNhbHQ=$AAAA:" + "A" * 43 + "=", "32 octets"),
    ],
)
def test_what_is_no_stored_form(text: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted) as caught:
        read(text)
    assert len(text) < 8 or text not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("I\u00adX", "IX"),
        ("user", "user"),
        ("USER", "USER"),
        ("\u00aa", "a"),
        ("\u2168", "IX"),
        ("a\u00a0b", "a b"),
        ("p\U0001f511", "p\U0001f511"),
    ],
)
def test_saslprep_by_its_rfc(text: str, wanted: str) -> None:
    assert prepared(text) == wanted  # RFC 4013 §3


@pytest.mark.parametrize("text", ["\x07", "\u0627\x31", "a\nb", "a\x00", "a\u2028b", "a\u0085b", "a\u202eb", "\ud800"])
def test_saslprep_has_no_place_for_these(text: str) -> None:
    with pytest.raises(ValueError, match=r"characters|directions"):
        prepared(text)


def test_a_password_without_a_place_is_taken_as_it_is() -> None:
    assert made("a\tb").proves("a\tb")


def test_an_account_has_one_of_a_kind() -> None:
    keys, slow = made("x", "scram"), read(scrypt())
    assert isinstance(keys, ScramKeys)
    assert account([keys]).password is keys
    assert account([keys, slow]) == account([slow, keys])
    assert isinstance(account([keys, slow]).password, Scrypt)
    for forms, wanted in (([keys, keys], "twice"), ([slow, slow], "two hashes"), ([], "no hash")):
        with pytest.raises(ValueError, match=wanted):
            account(forms)


def test_names() -> None:
    assert name_fault("alice@app.example") is None
    assert name_fault("bücher") is None
    for name in ("", "a" * 256, "a\nb", "a\u00adb", "\u2168"):
        assert name_fault(name) is not None


def test_a_file_in_the_manner_of_htpasswd() -> None:
    keys = made("x", "scram")
    found, faults = read_lines(f"# people\n\nalice:{scrypt()}\nalice:{keys}\nbob:{scrypt()}\n")
    assert not faults
    assert {name: len(forms) for name, forms in found.items()} == {"alice": 2, "bob": 1}


def test_every_fault_of_a_file_with_its_line() -> None:
    _, faults = read_lines(f"alice\nbob:$2y$10$abcdefghijklmnopqrstuv\n:{scrypt()}\ncarol:{scrypt()}\ncarol:{scrypt()}\n")
    assert [number for number, _ in faults] == [1, 2, 3, 5]
    assert faults[0][1] == "is not name:hash"
    assert faults[3][1].startswith("'carol' has two hashes")
    assert "abcdefghij" not in faults[1][1]
