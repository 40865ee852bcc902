"""Contexts from files: what is taken, what is refused with which words, names and ends."""

from __future__ import annotations

import hashlib
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat, load_pem_private_key

from gateway.net.binding import BoundContext
from gateway.net.tls import CertificateError, Identity, ends_at, names_of

from ..certificates import Certified, certified

AUTHORITY = trustme.CA()


@pytest.fixture
def mine(tmp_path: Path) -> Certified:
    return certified(AUTHORITY, tmp_path, "mx.example", "*.Mx.example")


def test_a_context_is_strict(mine: Certified) -> None:
    context = Identity((mine.pair,)).context()
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.options & ssl.OP_NO_RENEGOTIATION
    assert context.options & ssl.OP_NO_COMPRESSION
    assert context.verify_mode == ssl.CERT_NONE
    for cipher in context.get_ciphers():
        assert cipher["protocol"] in ("TLSv1.2", "TLSv1.3")
        assert "GCM" in cipher["name"] or "CHACHA20" in cipher["name"], cipher
        assert cipher["protocol"] == "TLSv1.3" or cipher["name"].startswith("ECDHE"), cipher


def test_what_a_login_can_be_bound_to(mine: Certified, tmp_path: Path) -> None:
    alone = Identity((mine.pair,)).context()
    assert isinstance(alone, BoundContext)
    # trustme signs by SHA-256.
    assert alone.end_point == hashlib.sha256(mine.der).digest()
    # Which of two with the same names OpenSSL showed is not known; one for other names does no harm.
    same = certified(AUTHORITY, tmp_path / "rsa", "mx.example", "*.Mx.example", kind=trustme.KeyType.RSA)
    other = certified(AUTHORITY, tmp_path / "other", "other.example")
    either = Identity((mine.pair, same.pair)).context()
    assert isinstance(either, BoundContext)
    assert either.end_point is None
    several = Identity((mine.pair, other.pair)).context()
    assert isinstance(several, BoundContext)
    assert several.end_point == hashlib.sha256(mine.der).digest()


def test_names_and_end(mine: Certified, tmp_path: Path) -> None:
    assert names_of(mine.certificate) == {"mx.example", "*.mx.example"}
    assert ends_at(mine.certificate) > time.time()
    nameless = AUTHORITY.issue_cert("someone@example.org", common_name="Common.example")
    file = tmp_path / "nameless.pem"
    nameless.cert_chain_pems[0].write_to_path(str(file))
    assert names_of(file) == {"common.example"}


def _empty(mine: Certified) -> Path:
    mine.certificate.write_text("")
    return mine.certificate


def _gone(mine: Certified) -> Path:
    mine.key.unlink()
    return mine.key


def _other_key(mine: Certified) -> Path:
    certified(AUTHORITY, mine.key.parent / "other", "mx.example").key.replace(mine.key)
    return mine.key


def _encrypted(mine: Certified) -> Path:
    key = load_pem_private_key(mine.key.read_bytes(), None)
    mine.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))
    return mine.key


def _broken(mine: Certified) -> Path:
    lines = mine.certificate.read_text().splitlines()
    mine.certificate.write_text("\n".join([lines[0], "AAAA", *lines[2:]]))
    return mine.certificate


def _not_a_key(mine: Certified) -> Path:
    mine.key.write_bytes(mine.certificate.read_bytes())
    return mine.key


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_empty, "has no certificate in PEM form"),
        (_gone, "cannot be read: No such file"),
        (_other_key, "is not the key of"),
        (_encrypted, "is encrypted; keep the key in clear"),
        (_broken, "cannot be used: "),
        (_not_a_key, "has no private key in PEM form"),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_files_that_cannot_be_used(mine: Certified, tmp_path: Path, spoil: Callable[[Certified], Path], words: str, beside: bool) -> None:
    file = spoil(mine)
    good = certified(AUTHORITY, tmp_path / "good", "good.example")
    with pytest.raises(CertificateError) as error:
        Identity((good.pair, mine.pair) if beside else (mine.pair,)).context()
    assert error.value.file == file
    assert words in str(error.value) or (beside and "has no certificate in PEM form" in str(error.value))
    assert str(file) in str(error.value)


def test_authorities_that_cannot_be_used(mine: Certified, tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    for text in ("", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        file.write_text(text)
        with pytest.raises(CertificateError) as error:
            Identity((mine.pair,), file).context()
        assert error.value.file == file


def test_a_stamp_differs_once_a_file_does(mine: Certified, tmp_path: Path) -> None:
    identity = Identity((mine.pair,))
    before = identity.stamp()
    assert identity.stamp() == before
    other = certified(AUTHORITY, tmp_path / "other", "mx.example")
    other.key.replace(mine.key)
    changed = identity.stamp()
    assert changed != before
    mine.certificate.unlink()
    assert identity.stamp() != changed
