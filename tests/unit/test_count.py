"""``make count``: every case has a budget, does what it says it does, and is told on when it costs more."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest

from bench import count
from bench.count import BUDGETS, Budget, judged, load, parsed, renewed, written
from bench.counted import CASES, counted

PROFILE = """# callgrind format
desc: Trigger: Client Request: session, lock-step

events: Ir
summary: 999

fn=(1) somewhere
16 5

totals: 9020837
"""


def test_every_case_has_a_budget_and_a_reason() -> None:
    build, budgets = load()
    assert list(budgets) == list(CASES)
    assert "compiled" in build
    for name, budget in budgets.items():
        assert budget.instructions > 0, name
        assert 0 < budget.excess <= 10, name
        assert budget.reason.strip(), name


def test_the_file_is_as_it_would_be_written() -> None:
    """Nobody raised a budget by hand in another form."""
    assert written(*load()) == BUDGETS.read_text()


async def test_every_case_does_what_is_counted() -> None:
    """Each round proves itself; a case that did nothing would raise."""
    ended: list[str] = []
    begun: list[int] = []
    with count.peers() as peers:
        await counted(list(CASES), peers, 1, lambda: begun.append(1), ended.append)
    assert ended == list(CASES)
    assert len(begun) == len(ended)


def test_a_profile_of_callgrind_is_read() -> None:
    assert parsed(PROFILE) == ("session, lock-step", 9020837)
    with pytest.raises(ValueError, match="no profile of a case"):
        parsed(PROFILE.replace("Client Request", "Program termination"))


def test_who_is_over_the_budget_is_told_on() -> None:
    budgets = {"mail": Budget(1000, 2.0, "first"), "rcpt": Budget(1000, 2.0, "first")}
    assert judged({"mail": 1019.0, "rcpt": 900.0}, budgets) == []
    (fault,) = judged({"mail": 1021.0, "rcpt": 1000.0}, budgets)
    assert fault == "mail: 1,021 instructions a line, 2.1 % over its budget of 1,000 (2 % is allowed)"
    (fault,) = judged({"commit": 1.0}, budgets)
    assert fault.startswith("commit: has no budget")


def test_a_raise_bears_its_reason_and_a_lower_budget_keeps_the_old_one() -> None:
    old = {"mail": Budget(1000, 2.0, "first"), "rcpt": Budget(1000, 3.0, "second"), "commit": Budget(1000, 2.0, "third")}
    new = renewed({"mail": 1100.2, "rcpt": 800.0, "commit": 1010.0, "mark": 5.0}, old, "REQUIRETLS", False)
    assert new == {
        "mail": Budget(1101, 2.0, "REQUIRETLS"),
        "rcpt": Budget(800, 3.0, "second"),
        "commit": Budget(1000, 2.0, "third"),
        "mark": Budget(5, 4.0, "REQUIRETLS"),
    }
    assert renewed({"commit": 1010.0}, old, "again", True)["commit"] == Budget(1010, 2.0, "again")


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    budgets = {"mail": Budget(1000, 2.0, 'a "quoted" reason, naïve'), "whole, BDAT": Budget(7, 1.5, "x")}
    file = tmp_path / "budgets.toml"
    file.write_text(written("this build", budgets))
    assert load(file) == ("this build", budgets)
    assert tomllib.loads(file.read_text())["build"] == "this build"


def test_no_budget_is_raised_without_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        count.main(["--save", "--reason", " "])
    assert ended.value.code == 2
    assert "wants a --reason" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_a_budget_that_is_too_small_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way through callgrind: this build keeps its own figure, and breaks a smaller one."""
    file = tmp_path / "budgets.toml"
    monkeypatch.setattr(count, "BUDGETS", file)
    count.main(["--only", "mail;rcpt", "--rounds", "2", "--save", "--reason", "first"])
    build, budgets = load(file)
    count.main(["--only", "mail;rcpt", "--rounds", "2"])
    budgets["mail"].instructions = int(budgets["mail"].instructions * 0.9)
    file.write_text(written(build, budgets))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        count.main(["--only", "mail;rcpt", "--rounds", "2"])
    assert "mail: " in str(ended.value.code)
    assert "over its budget" in str(ended.value.code)
    assert "rcpt" not in str(ended.value.code)
    assert "| mail | line |" in capsys.readouterr().out
