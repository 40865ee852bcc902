"""gateway/net/addresses.py: what is public, what is not, what is ours."""

from __future__ import annotations

import socket

import pytest

from gateway.net import addresses
from gateway.net.addresses import is_own, not_public

PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "11.0.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "172.15.255.255",
    "172.32.0.0",
    "192.0.1.0",
    "223.255.255.255",
    "2606:4700:4700::1111",
    "2a00:1450:4001::1",
    "2001:4860:4860::8888",
    "::ffff:1.1.1.1",
    "64:ff9b::1.1.1.1",
]

NOT_PUBLIC = {
    "this network": ["0.0.0.0", "0.1.2.3"],
    "private": ["10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1", "fc00::1", "fd00:ec2::254"],
    "shared by a carrier's customers": ["100.64.0.1", "100.127.255.255", "100.100.100.200"],
    "loopback": ["127.0.0.1", "127.255.255.254", "::1"],
    "a cloud's own service": ["168.63.129.16"],
    "link-local": ["169.254.169.254", "169.254.0.1", "fe80::1", "fe80::1%lo"],
    "set aside for protocols": ["192.0.0.192", "2001:0:1::1", "2001:2::1", "2001:20::1"],
    "for documentation": ["192.0.2.1", "198.51.100.7", "203.0.113.9", "2001:db8::1", "3fff::1"],
    "a 6to4 relay": ["192.88.99.1"],
    "for benchmarks": ["198.18.0.1", "198.19.255.255"],
    "multicast": ["224.0.0.1", "239.255.255.250", "ff02::1", "ff0e::1"],
    "reserved": ["240.0.0.1", "255.255.255.255", "::10.0.0.1", "64:ff9b:1::1.1.1.1", "100::1", "fec0::1", "4000::1", "5f00::1", "e000::1"],
    "no address": ["::"],
    "6to4": ["2002:a00:1::", "2002:101:101::"],
}


@pytest.mark.parametrize("address", PUBLIC)
def test_public(address: str) -> None:
    assert not_public(address) is None


@pytest.mark.parametrize(("what", "address"), [(what, address) for what, many in NOT_PUBLIC.items() for address in many])
def test_not_public(what: str, address: str) -> None:
    assert not_public(address) == f"{address} is not public ({what})"


@pytest.mark.parametrize("address", [address for many in NOT_PUBLIC.values() for address in many if ":" not in address])
@pytest.mark.parametrize("form", ["::ffff:{}", "64:ff9b::{}"])
def test_an_address_inside_an_address_is_the_one_that_is_judged(address: str, form: str) -> None:
    assert not_public(form.format(address)) is not None


@pytest.mark.parametrize("text", ["", "localhost", "2130706433", "0x7f.1", "127.1", "[::1]", "1.1.1.1:80"])
def test_what_is_no_numeric_address_is_not_judged(text: str) -> None:
    """Other notations are for the resolver: it is its answer that is judged."""
    with pytest.raises(ValueError, match="address"):
        not_public(text)


def test_addresses_of_this_machine() -> None:
    assert is_own("127.0.0.1")
    for address in PUBLIC:
        if not address.startswith(("::ffff:", "64:")):
            assert not is_own(address)


def test_a_public_address_of_this_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine of ours has one for certain: here the system lets 8.8.8.8 be bound, as if it had."""

    class Bound(socket.socket):
        def bind(self, address: tuple[str, int]) -> None:  # type: ignore[override]  # of the one family asked for
            if address[0] != "8.8.8.8":
                super().bind(address)

    monkeypatch.setattr(socket, "socket", Bound)
    assert not_public("8.8.8.8") == "8.8.8.8 is not public (of this machine)"
    assert not_public("64:ff9b::8.8.8.8") == "64:ff9b::8.8.8.8 is not public (of this machine)"
    assert not_public("1.1.1.1") is None


def test_where_everything_can_be_bound_the_route_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_can_bind", lambda text: True)
    assert is_own("127.0.0.1")
    assert not is_own("8.8.8.8")
