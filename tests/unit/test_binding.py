"""tls-server-end-point of certificates by every algorithm there is, beside cryptography's reading."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from gateway.net.binding import end_point

RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())


def certificate(key: Any, algorithm: Any) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mx.example")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(5)
    return builder.not_valid_before(now).not_valid_after(now + timedelta(days=1)).sign(key, algorithm)


@pytest.mark.parametrize("key", [RSA, EC], ids=["rsa", "ec"])
@pytest.mark.parametrize("algorithm", [hashes.SHA256(), hashes.SHA384(), hashes.SHA512()], ids=lambda one: str(one.name))
def test_the_hash_of_the_signature(key: Any, algorithm: hashes.HashAlgorithm) -> None:
    made = certificate(key, algorithm)
    assert end_point(made.public_bytes(serialization.Encoding.DER)) == made.fingerprint(algorithm)


def test_no_hash_no_binding() -> None:
    made = certificate(ed25519.Ed25519PrivateKey.generate(), None)
    assert end_point(made.public_bytes(serialization.Encoding.DER)) is None


DER = certificate(EC, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


@given(st.one_of(st.binary(max_size=50), st.integers(0, len(DER) - 1).map(lambda at: DER[:at])))
def test_what_is_no_certificate(octets: bytes) -> None:
    assert end_point(octets) is None
