"""The load tools' histogram beside a sorted list: nothing is lost, and no percentile is off by more than a 128th."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.tools._wire import Histogram

# Every size of number is as likely as every other.
VALUES = st.integers(0, 63).flatmap(lambda bits: st.integers(2**bits >> 1, 2**bits - 1))
SHARES = st.one_of(st.sampled_from([0.0, 0.5, 0.9, 0.99, 0.999, 1.0]), st.floats(0, 1))


def filled(values: list[int]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    return histogram


@given(st.lists(VALUES, min_size=1, max_size=200), SHARES)
def test_a_share_is_that_of_the_sorted_list(values: list[int], share: float) -> None:
    histogram = filled(values)
    exact = sorted(values)[min(max(math.ceil(share * len(values)), 1), len(values)) - 1]
    assert exact <= histogram.at(share) <= exact + exact / 128
    if exact < 256:
        assert histogram.at(share) == exact
    assert (histogram.minimum, histogram.maximum, histogram.count) == (min(values), max(values), len(values))
    assert histogram.total == pytest.approx(sum(values))


@given(st.lists(VALUES), st.lists(VALUES), st.integers(0, 5))
def test_adding_is_seeing_both(one: list[int], other: list[int], times: int) -> None:
    together = filled(one)
    together.add(filled(other))
    together.record(77, times)
    alone = filled([*one, *other, *[77] * times])
    assert together.buckets() == alone.buckets()
    assert (together.minimum, together.maximum, together.count) == (alone.minimum, alone.maximum, alone.count)


@given(VALUES)
def test_a_bucket_ends_where_it_says(value: int) -> None:
    ((end, count),) = filled([value]).buckets()
    assert count == 1
    assert value <= end
    assert filled([end] if end < 2**63 else [2**63 - 1]).buckets() == [(end, 1)]
    if end + 1 < 2**63:
        assert filled([end + 1]).buckets() != [(end, 1)]


def test_what_it_refuses() -> None:
    histogram = Histogram()
    assert (histogram.at(0.5), histogram.minimum, histogram.maximum) == (0, 0, 0)
    with pytest.raises(OverflowError):
        histogram.record(2**63)
    with pytest.raises(ValueError, match="times"):
        histogram.record(1, -1)
    histogram.record(-5)
    assert histogram.buckets() == [(0, 1)]
    histogram.clear()
    assert histogram.buckets() == []
