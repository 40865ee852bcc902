"""``make mutants`` is run seldom; that its mutants still fit the source is looked at always."""

from __future__ import annotations

from tests.mutants import MUTANTS, ROOT, misfits


def test_every_mutant_has_its_place() -> None:
    assert misfits() == []


def test_every_mutant_names_tests_that_are_there() -> None:
    for mutant in MUTANTS:
        for name in mutant.tests.split():
            assert (ROOT / name).is_file(), mutant.name
        assert mutant.says
