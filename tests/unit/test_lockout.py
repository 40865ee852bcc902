"""Failed logins make wait, longer and longer; a lock tells nothing and locks out nobody who was in before."""

from __future__ import annotations

import pytest

from gateway.smtp.lockout import FIRST, FORGET, FREE_BY_ADDRESS, FREE_BY_USER, LONGEST, Lockout

HERE, THERE = "192.0.2.1", "198.51.100.7"


def test_an_address_waits_twice_as_long_each_time() -> None:
    table = Lockout()
    for number in range(FREE_BY_ADDRESS):
        table.failed(HERE, f"user{number}", 0.0)
        assert table.locked(HERE, "alice", 0.0) == 0.0
    waits = []
    for _ in range(15):
        table.failed(HERE, "", 0.0)
        waits.append(table.locked(HERE, "alice", 0.0))
    assert waits[:4] == [FIRST, 2 * FIRST, 4 * FIRST, 8 * FIRST]
    assert waits[-1] == LONGEST
    assert table.locked(THERE, "alice", 0.0) == 0.0
    assert table.locked(HERE, "alice", LONGEST) == 0.0


def test_a_user_waits_whether_it_exists_or_not() -> None:
    table = Lockout()
    for number in range(FREE_BY_USER + 1):
        table.failed(f"192.0.2.{number}", "alice", 5.0)
    assert table.locked(THERE, "alice", 5.0) == FIRST
    assert table.locked(THERE, "bob", 5.0) == 0.0


def test_who_was_in_before_is_not_locked_out_by_others() -> None:
    table = Lockout()
    table.succeeded(HERE, "alice")
    for number in range(FREE_BY_USER + 5):
        table.failed(f"203.0.113.{number}", "alice", 0.0)
    assert table.locked(THERE, "alice", 0.0) > 0.0
    assert table.locked(HERE, "alice", 0.0) == 0.0


def test_success_does_not_wash_an_address_clean() -> None:
    table = Lockout()
    for _ in range(FREE_BY_ADDRESS + 1):
        table.failed(HERE, "", 0.0)
    table.succeeded(HERE, "alice")
    assert table.locked(HERE, "alice", 0.0) == FIRST


def test_failures_are_forgotten() -> None:
    table = Lockout()
    for _ in range(FREE_BY_ADDRESS + 3):
        table.failed(HERE, "alice", 0.0)
    table.failed(HERE, "alice", FORGET + 1.0)
    assert table.locked(HERE, "alice", FORGET + 1.0) == 0.0


def test_one_ipv6_network_is_one_address_and_loopback_is_none() -> None:
    table = Lockout()
    for number in range(FREE_BY_ADDRESS + 1):
        table.failed(f"2001:db8::{number}", "", 0.0)
        for near in ("127.0.0.1", "::1", None):
            table.failed(near, "", 0.0)
    assert table.locked("2001:db8::ffff", "x", 0.0) == FIRST
    assert table.locked("2001:db8:0:1::1", "x", 0.0) == 0.0
    for near in ("127.0.0.1", "::1", None):
        assert table.locked(near, "x", 0.0) == 0.0


@pytest.mark.parametrize("unknown", ["0.0.0.0", "::"])
def test_an_address_that_nobody_knows_is_counted_by_user_alone(unknown: str) -> None:
    """PROXY and XCLIENT may leave it open: many clients, who must not lock each other out."""
    table = Lockout()
    for number in range(100):
        table.failed(unknown, f"user{number}", 0.0)
        table.failed(unknown, "", 0.0)
    assert table.locked(unknown, "alice", 0.0) == 0.0
    for _ in range(FREE_BY_USER + 1):
        table.failed(unknown, "alice", 0.0)
    assert table.locked(unknown, "alice", 0.0) == FIRST
    assert table.locked(unknown, "bob", 0.0) == 0.0


@pytest.mark.parametrize("before", ["0.0.0.0", "::", "127.0.0.1", None])
def test_who_was_in_from_nowhere_proves_nothing_for_others_from_nowhere(before: str | None) -> None:
    table = Lockout()
    table.succeeded(before, "alice")
    for _ in range(FREE_BY_USER + 1):
        table.failed("0.0.0.0", "alice", 0.0)
    assert table.locked("0.0.0.0", "alice", 0.0) == FIRST


def test_it_is_bounded() -> None:
    table = Lockout(most=10)
    for number in range(50):
        table.failed(f"192.0.2.{number}", f"user{number}", 0.0)
        table.succeeded(f"192.0.2.{number}", f"user{number}")
    assert len(table._addresses) == len(table._users) == len(table._known) == 10
