"""``make bench-peers`` runs through, unattended: every mode, with whoever is here, to the page it writes."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..servers import PATIENCE, ROOT, program

MODES = ("discard", "durable", "relay", "webhook")


pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(program("smtp-sink") is None, reason="Postfix is not installed: smtp-sink is one of its programs"),
]


@pytest.fixture
def place() -> Iterator[Path]:
    """Where the servers have their folders: Postfix's own user has to get there."""
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir="/var/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def smoke(output: Path, place: Path, *words: str) -> dict[str, list[dict[str, Any]]]:
    """What it found. Nothing that it started or wrote is left behind."""
    command = [sys.executable, "-m", "bench.end_to_end", "--smoke", "--output", str(output), *words]
    environment = {**os.environ, "GATEWAY_BENCH_FOLDER": str(place)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60 * PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert str(place) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert list(place.iterdir()) == []
    found: dict[str, list[dict[str, Any]]] = json.loads((output / "results.json").read_text())
    return found


def test_the_smoke_run(tmp_path: Path, place: Path) -> None:
    found = smoke(tmp_path, place)
    ours = [run for run in found["runs"] if run["server"] == "gateway"]
    assert [run["mode"] for run in ours] == list(MODES)
    assert all("fault" not in run and run["messages"] >= 20 and run["cpu"] > 0 for run in ours), ours
    sink = next(run for run in found["runs"] if run["server"] == "smtp-sink")
    assert "fault" not in sink
    latency = {row["mode"]: row for row in found["latency"] if row["server"] == "gateway"}
    assert all(0 < latency[mode]["p50"] <= latency[mode]["p99"] <= latency[mode]["max"] for mode in MODES), latency
    assert 0 < latency["webhook"]["hook p50"] <= latency["webhook"]["hook p99"]
    page = (tmp_path / "RESULTS.md").read_text()
    assert "## Goals" in page
    # A peer that is not here has a row that says so.
    for row in found["runs"]:
        assert "fault" not in row or f"not measured: {row['fault']}".replace("|", "¦") in page


def test_a_cell_by_itself_replaces_what_was_known_of_it(tmp_path: Path, place: Path) -> None:
    def of(mode: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [run for run in runs if run["mode"] == mode]

    first = smoke(tmp_path, place, "--only", "durable")["runs"]
    assert {run["mode"] for run in first} == {"durable"}
    second = smoke(tmp_path, place, "--only", "discard/1KiB/10")["runs"]
    assert of("durable", second) == first
    third = smoke(tmp_path, place, "--only", "durable")["runs"]
    assert of("discard", third) == of("discard", second) != []
    assert len(third) == len(second)
    assert of("durable", third) != first
