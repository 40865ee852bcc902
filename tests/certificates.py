"""Certificates for tests, in files as an operator keeps them."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Certified:
    """``certificate`` (with its chain) and ``key``: PEM files. ``der``: the certificate itself."""

    certificate: Path
    key: Path
    der: bytes

    @property
    def pair(self) -> tuple[Path, Path]:
        return self.certificate, self.key


def certified(authority: trustme.CA, folder: Path, *names: str, kind: trustme.KeyType = trustme.KeyType.ECDSA) -> Certified:
    """A new certificate for these names, in this folder; replaces the one that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    made = authority.issue_cert(*names, key_type=kind)
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    certificate.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
    made.private_key_pem.write_to_path(str(key))
    return Certified(certificate, key, ssl.PEM_cert_to_DER_cert(made.cert_chain_pems[0].bytes().decode()))
