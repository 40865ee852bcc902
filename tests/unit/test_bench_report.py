"""What the bench makes of its runs: ratios of one round, verdicts, and rows for who was not there;
and the CPU of a server, of which the children that came and went are part."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import report, stage

CHILD = "sum(range(6_000_000))"
PARENT = f"""
import subprocess, sys
subprocess.run([sys.executable, "-c", {CHILD!r}], check=True)
print("done", flush=True)
sys.stdin.read()
"""


def a_run(server: str, number: int, cost: float, rate: float = 1000.0, cell: str = "discard/1KiB/100") -> dict[str, Any]:
    """1,000 messages at ``cost`` µs each."""
    mode = cell.partition("/")[0]
    seconds = 1000 / rate
    found = {"cell": cell, "mode": mode, "server": server, "round": number, "messages": 1000, "seconds": seconds, "cpu": cost / 1000}
    return {**found, "others": 0.0}


def known(*runs: dict[str, Any]) -> dict[str, Any]:
    about = {
        "when": "2026-11-23 00:00 UTC",
        "command": "make bench-peers",
        "seconds": 1.5,
        "smoke": False,
        "versions": {"gateway": "gateway 0.1.0"},
        "machine": report.machine(),
        "cpu by": "cgroup",
        "peers": [{"name": "smtp-sink", "modes": ["discard"], "promise": "nothing"}],
    }
    return {"about": about, "runs": list(runs), "latency": [], "start": []}


def goal_row(page: str, beside: str) -> str:
    return next(line for line in page.splitlines() if line.startswith("| accept and discard, 1 KiB |") and f"| {beside} |" in line)


def test_a_ratio_is_made_of_two_runs_of_one_round() -> None:
    """Not of medians: a machine that drifts by two drifts for both."""
    runs = [a_run("gateway", 0, 40), a_run("smtp-sink", 0, 50), a_run("gateway", 1, 90), a_run("smtp-sink", 1, 100), a_run("gateway", 2, 1)]
    goal = report.Goal("", "discard/1KiB/100", "smtp-sink", 1.3, 1.0, less=True)
    assert report.ratios(known(*runs), goal) == pytest.approx([0.8, 0.9])
    better = report.Goal("", "discard/1KiB/100", "smtp-sink", None, 1.0)
    assert report.ratios(known(*runs), better) == pytest.approx([1.25, 1 / 0.9])


def test_messages_a_second_are_ours_over_theirs() -> None:
    runs = [a_run("gateway", 0, 40, rate=3000), a_run("Postfix hold", 0, 40, rate=1000)]
    goal = report.Goal("", "discard/1KiB/100", "Postfix hold", 10, 20, by="rate")
    assert report.ratios(known(*runs), goal) == pytest.approx([3.0])


@pytest.mark.parametrize(
    ("ours", "said"), [(30, "goal met"), (50, "goal met"), (60, "gate met"), (64, "gate met"), (66, "**gate missed**")]
)
def test_the_verdict_stands_beside_the_figures(ours: float, said: str) -> None:
    row = goal_row(report.page(known(a_run("gateway", 0, ours), a_run("smtp-sink", 0, 50))), "smtp-sink")
    assert row.endswith(f"| {said} |")
    assert f"{ours / 50:.2f} ×" in row


def test_a_goal_without_runs_is_not_measured() -> None:
    row = goal_row(report.page(known(a_run("gateway", 0, 10))), "aiosmtpd")
    assert row.endswith("| not measured |  |")


def test_who_does_not_start_has_a_row_that_says_why() -> None:
    gone = {
        "cell": "discard/1KiB/100",
        "mode": "discard",
        "server": "smtp-sink",
        "round": 0,
        "fault": "smtp-sink is not installed | at all",
    }
    assert "| 1 KiB × 100 | smtp-sink | not measured: smtp-sink is not installed ¦ at all | | | |" in report.page(
        known(a_run("gateway", 0, 10), gone)
    )


def test_a_run_that_failed_among_others_is_told() -> None:
    gone = {"cell": "discard/1KiB/100", "mode": "discard", "server": "gateway", "round": 1, "fault": "it was slow"}
    assert "- discard/1KiB/100, gateway, round 2: it was slow" in report.page(known(a_run("gateway", 0, 10), gone))


@pytest.mark.parametrize("by", ["what there is", "/proc"])
def test_cpu_of_children_that_came_and_went(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "/proc":
        monkeypatch.setattr(stage, "cgroups", lambda: None)
    started = time.process_time()
    exec(CHILD)  # what the child does, here: its measure
    least = (time.process_time() - started) / 3
    with stage.running(
        [sys.executable, "-c", PARENT], stage.CORES, tmp_path / "log", stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        assert stage.cpu_of(process.pid) > least
    assert process.returncode is not None


def test_what_was_started_is_ended_children_too(tmp_path: Path) -> None:
    """Also one that went into a session of its own and ignores SIGTERM."""
    child = "import os, signal, time; os.setsid(); signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with stage.running([sys.executable, "-c", parent], stage.CORES, tmp_path / "log", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()
