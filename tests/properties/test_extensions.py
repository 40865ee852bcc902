"""Values of HOLDFOR, HOLDUNTIL, BY and MT-PRIORITY against the grammar said plainly."""

from __future__ import annotations

import calendar
import string
from ipaddress import ip_network

from hypothesis import example, given
from hypothesis import strategies as st

from gateway.message import Client
from gateway.smtp.extensions import LARGEST, SKEW, Extensions, deliver_by_of, priority_of, release_of

NOW = 1_800_000_000.0
RULES = Extensions(3600.0, 10.0, "authenticated", (ip_network("10.0.0.0/8"), ip_network("127.0.0.0/8")), lambda: NOW)
#: Nearly right, and anything.
NUMBERS = st.from_regex(r"[+-]?[0-9]{0,11}", fullmatch=True)
ANYTHING = st.text(st.sampled_from(string.digits + "+-;:.RNTrntZz \u0661\u00b2"), max_size=24)
TIMES = st.builds(
    "{:04d}-{:02d}-{:02d}{}{:02d}:{:02d}:{:02d}{}{}".format,
    st.integers(0, 9999) | st.just(2027),
    st.integers(0, 13) | st.just(1),
    st.integers(0, 32) | st.just(15),
    st.sampled_from("TTTt "),
    st.integers(0, 24),
    st.integers(0, 60),
    st.integers(0, 60),
    st.sampled_from(["", "", ".5", ".1234567", "."]),
    st.sampled_from(["Z", "Z", "z", "", "+00:00", "-05:30", "+24:00", "+0100"]),
)


def is_number(text: str, most: int) -> bool:
    return 0 < len(text) <= most and all(sign in string.digits for sign in text)


@given(NUMBERS | ANYTHING)
def test_holdfor_is_one_to_nine_digits(value: str) -> None:
    expected = NOW + int(value) if is_number(value, 9) else None
    assert release_of({"HOLDFOR": value}, NOW) == expected
    reply = RULES.refusal({"HOLDFOR": value}, True)
    assert (reply is None) == (expected is not None and expected - NOW <= 3600)
    refused = RULES.refusal({"HOLDFOR": value}, False)
    assert refused is not None
    assert refused.code == 555


def moment(text: str) -> float | None:
    """RFC 3339 §5.6, read by hand."""
    date, clock = text[:10], text[11:19]
    if len(text) < 20 or text[10] not in "Tt" or [date[4], date[7], clock[2], clock[5]] != ["-", "-", ":", ":"]:
        return None
    numbers = [date[:4], date[5:7], date[8:], clock[:2], clock[3:5], clock[6:]]
    rest = text[19:]
    if not all(is_number(number, 4) for number in numbers):
        return None
    year, month, day, hour, minute, second = map(int, numbers)
    if not (
        year >= 1 and 1 <= month <= 12 and 1 <= day <= calendar.monthrange(year, month)[1] and hour < 24 and minute < 60 and second < 60
    ):
        return None
    fraction = 0.0
    if rest.startswith("."):
        digits = rest[1:].rstrip("Zz").partition("+")[0].partition("-")[0]
        if not is_number(digits, 6):
            return None
        fraction, rest = float(f"0.{digits}"), rest[1 + len(digits) :]
    offset = 0
    if rest not in ("Z", "z"):
        if len(rest) != 6 or rest[0] not in "+-" or rest[3] != ":" or not (is_number(rest[1:3], 2) and is_number(rest[4:], 2)):
            return None
        if int(rest[1:3]) > 23 or int(rest[4:]) > 59:
            return None
        offset = (int(rest[1:3]) * 3600 + int(rest[4:]) * 60) * (1 if rest[0] == "+" else -1)
    return calendar.timegm((year, month, day, hour, minute, second)) + fraction - offset


@given(TIMES | ANYTHING)
@example("2027-01-15T08:30:00Z")
@example("2028-02-29T23:59:59.25+01:00")
@example("2027-02-29T00:00:00Z")
def test_holduntil_is_a_moment(value: str) -> None:
    expected, found = moment(value), release_of({"HOLDUNTIL": value}, NOW)
    assert (found is None) == (expected is None)
    if expected is not None and found is not None:
        assert abs(found - expected) < 1e-5
        allowed = -SKEW <= expected - NOW <= 3600
        assert (RULES.refusal({"HOLDUNTIL": value}, True) is None) == allowed


@given(st.one_of(ANYTHING, st.builds("{};{}{}".format, NUMBERS, st.sampled_from("RNrnX"), st.sampled_from(["", "T", "t", "TT"]))))
@example("-5;N")
@example("+5;rT")
@example("10;R")
def test_by_is_a_time_a_mode_and_a_trace(value: str) -> None:
    time, _, rest = value.partition(";")
    good = is_number(time[1:] if time[:1] in ("+", "-") else time, 9) and rest.upper() in ("R", "N", "RT", "NT") and rest.isascii()
    found = deliver_by_of({"BY": value})
    assert (found is not None) == good
    reply = RULES.refusal({"BY": value}, False)
    if found is None:
        assert reply is not None
        assert reply.code == 501
    else:
        assert (found.seconds, found.returns, found.trace) == (int(time), rest[0] in "Rr", len(rest) == 2)
        assert (reply is None) == (not found.returns or found.seconds >= 10)


@given(st.integers(-LARGEST, LARGEST), st.sampled_from(["N", "R", "NT", "RT"]), st.floats(0, 2e9))
def test_what_is_handed_on_is_well_formed_and_never_more_than_is_left(seconds: int, mode: str, elapsed: float) -> None:
    by = deliver_by_of({"BY": f"{seconds};{mode}"})
    assert by is not None
    said = deliver_by_of({"BY": by.said(elapsed)})
    assert said is not None
    assert (said.returns, said.trace) == (by.returns, by.trace)
    if seconds - elapsed > -LARGEST:
        assert seconds - elapsed <= said.seconds < seconds - elapsed + 1


@given(st.one_of(ANYTHING, st.integers(-20, 20).map(str)))
def test_priority_is_one_digit_with_or_without_a_minus(value: str) -> None:
    good = value in {str(number) for number in range(-9, 10)}
    assert priority_of({"MT-PRIORITY": value}) == (int(value) if good else None)
    assert (RULES.refusal({"MT-PRIORITY": value}, False) is None) == good


@given(st.integers(-9, 9), st.sampled_from([None, "10.1.2.3", "::ffff:10.1.2.3", "192.0.2.1"]), st.booleans())
def test_nobody_raises_his_own_priority_without_trust(wish: int, ip: str | None, login: bool) -> None:
    client = Client(ip, user="alice" if login else None)
    trusted = login or ip in (None, "10.1.2.3", "::ffff:10.1.2.3")
    params = {"MT-PRIORITY": str(wish)}
    assert RULES.priority(dict(params), client) == (wish if trusted else min(wish, 0))
    assert Extensions(priorities="everybody").priority(dict(params), client) == wish
