"""``bench.scale``: what is told of the figures, and (long) that all of it runs."""

from __future__ import annotations

import resource
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bench import scale
from bench.plots import figure, plot
from bench.scale import Budget, Found


def test_a_cost_that_grows_is_told_on() -> None:
    found = Found("Connections", "connections", {})
    for value, cost in ((10, 100.0), (100, 90.0), (1000, 140.0)):
        found.add(value, {"µs": cost})
    found.flat("µs", "a message (µs)")
    assert found.faults == ["a message (µs) costs 140 at 1,000 connections, 1.6 times the best before; 1.5 is the bound"]
    flat = Found("Connections", "connections", {}, rows={10: {"µs": [100.0]}, 100: {"µs": [500.0, 120.0, 110.0]}})
    flat.flat("µs", "a message (µs)")
    assert flat.faults == []  # the median counts


def test_rounds_take_turns_and_stop_when_the_time_is_over() -> None:
    found = Found("", "", {})
    assert list(Budget(time.monotonic() + 60, 2, False).rounds(found, (1, 2))) == [1, 2, 1, 2]
    assert found.left_out == 0
    assert list(Budget(0.0, 3, False).rounds(found, (1, 2))) == [1, 2]
    assert found.left_out == 4


def test_a_plot_shows_every_point_where_it_belongs() -> None:
    drawn = ET.fromstring(plot({"CPU & more": [(1, 50.0), (10, 25.0), (100, 100.0)]}, "connections", "µs <a message>"))
    across = [float(dot.attrib["cx"]) for dot in drawn.iter("circle")]
    up = [float(dot.attrib["cy"]) for dot in drawn.iter("circle")]
    assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.2)  # tens are equally far apart
    bottom, top = up[1] + (up[1] - up[0]), up[2]  # 25 is half of 50: as far from zero as from 50
    assert bottom - top == pytest.approx(4 * (bottom - up[1]), abs=0.5)
    assert drawn.attrib["aria-label"] == "µs <a message> over connections"
    proportional = ET.fromstring(plot({"ms": [(1, 0.2), (10, 2.0), (100, 20.0)]}, "KiB", "ms"))
    up = [float(dot.attrib["cy"]) for dot in proportional.iter("circle")]
    assert up[0] - up[1] == pytest.approx(up[1] - up[2], abs=0.2)  # a straight line
    with pytest.raises(ValueError, match="right of zero"):
        plot({"none": [(0, 1.0)]}, "x", "y")


def test_figures_have_three_digits_that_count() -> None:
    assert [figure(value) for value in (0, 0.0213, 3.4149, 33.27, 1250.4)] == ["0", "0.0213", "3.41", "33.3", "1,250"]


@pytest.mark.long
def test_every_dimension_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    scale.main(["--smoke", "--html", str(tmp_path / "scale.html"), "--json", str(tmp_path / "scale.json")])
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
    told = capsys.readouterr().out
    for head in (
        "| messages waiting |",
        "| connections |",
        "| recipients |",
        "| KiB |",
        "| workers |",
        "| connections at a time |",
        "| idle connections |",
    ):
        assert head in told
    page = (tmp_path / "scale.html").read_text()
    assert page.count("<svg ") == 2 + 2 + 2 + 3 + 1 + 1 + 2
    assert "http" not in page  # nothing from the network
    assert page.count("<h2>") == 7
