"""Which addresses belong to the public Internet: the judge for connections to hosts that a stranger may have named.

Owns one question, ``not_public``, asked of the address that is about to be connected to, never
of a name: what a name says can change between the look and the connection.

Invariant: what this page does not know is not public. An address that carries another one
(IPv4-mapped, NAT64) is judged by the one it carries. Addresses of this machine are not public,
whatever block they are from.

IANA special-purpose address registries (RFC 6890, RFC 8190), RFC 6052 (NAT64), RFC 4291 (IPv6).
"""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

_NOT_PUBLIC_4 = [
    (IPv4Network(block), what)
    for block, what in (
        ("0.0.0.0/8", "this network"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "shared by a carrier's customers"),
        ("127.0.0.0/8", "loopback"),
        # Not special to IANA, but the same on every machine of Azure: its platform answers there.
        ("168.63.129.16/32", "a cloud's own service"),
        ("169.254.0.0/16", "link-local"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "set aside for protocols"),
        ("192.0.2.0/24", "for documentation"),
        ("192.88.99.0/24", "a 6to4 relay"),
        ("192.168.0.0/16", "private"),
        ("198.18.0.0/15", "for benchmarks"),
        ("198.51.100.0/24", "for documentation"),
        ("203.0.113.0/24", "for documentation"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
    )
]
#: All that IANA has given out for the Internet; every other block is special or not in use.
_GLOBAL_6 = IPv6Network("2000::/3")
_NOT_PUBLIC_6 = [
    (IPv6Network(block), what)
    for block, what in (
        ("::/128", "no address"),
        ("::1/128", "loopback"),
        ("fc00::/7", "private"),
        ("fe80::/10", "link-local"),
        ("ff00::/8", "multicast"),
        # Holds Teredo, benchmarks, ORCHID.
        ("2001::/23", "set aside for protocols"),
        ("2001:db8::/32", "for documentation"),
        # Any IPv4 address can be inside, and nobody should use it any more (RFC 7526).
        ("2002::/16", "6to4"),
        ("3fff::/20", "for documentation"),
    )
]
_NAT64 = IPv6Network("64:ff9b::/96")


def not_public(text: str) -> str | None:
    """Why this address (a numeric one, with or without a scope) is none to connect to, None if it is one.

    Looks at the addresses of this machine; sends nothing. Raises ValueError for what is no address."""
    address = ip_address(text.partition("%")[0])
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address in _NAT64:
            address = IPv4Address(int(address) & 0xFFFFFFFF)
    what = _special_4(address) if isinstance(address, IPv4Address) else _special_6(address)
    if what is None and is_own(str(address)):
        what = "of this machine"
    return what and f"{text} is not public ({what})"


def _special_4(address: IPv4Address) -> str | None:
    return next((what for block, what in _NOT_PUBLIC_4 if address in block), None)


def _special_6(address: IPv6Address) -> str | None:
    what = next((what for block, what in _NOT_PUBLIC_6 if address in block), None)
    return what or (None if address in _GLOBAL_6 else "reserved")


def is_own(text: str) -> bool:
    """Is this an address of this machine? Only such a one can be bound to."""
    if not _can_bind(text):
        return False
    # Where the system lets everything be bound (ip_nonlocal_bind), the route must tell: it leaves
    # from the address itself.
    return not _can_bind("2001:db8::1" if ":" in text else "192.0.2.1") or _leaves_from(text) == text


def _can_bind(text: str) -> bool:
    try:
        with _datagrams(text) as probe:
            probe.bind((text, 0))
    except OSError:
        return False
    return True


def _leaves_from(text: str) -> str:
    try:
        with _datagrams(text) as probe:
            probe.connect((text, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _datagrams(text: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in text else socket.AF_INET, socket.SOCK_DGRAM)
