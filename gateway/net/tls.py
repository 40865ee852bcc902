"""TLS contexts for connections that we open.

Owns how strict a handshake is. Knows no SMTP. TLS 1.2 and newer only (RFC 8996).
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Literal

Strictness = Literal["off", "opportunistic", "required", "verify"]


def client_context(strictness: Strictness, ca_file: str | Path | None = None) -> ssl.SSLContext | None:
    """The context for STARTTLS toward an upstream; None for ``"off"``.

    ``opportunistic`` and ``required`` encrypt and take any certificate (RFC 7435): between mail
    servers a name proves nothing where nobody promised one. ``verify`` wants a certificate for
    the host's name or address, signed by ``ca_file`` or, without it, by an authority that this
    machine trusts. Raises OSError or ssl.SSLError for a ``ca_file`` that cannot be used."""
    if strictness == "off":
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if strictness == "verify":
        if ca_file is not None:
            context.load_verify_locations(cafile=str(ca_file))
        else:
            context.load_default_certs()
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
