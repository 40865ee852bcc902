"""Under CI=true a skip is a failure (tests/conftest.py)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from ..servers import ROOT

FILES = {
    "conftest": "from tests.conftest import pytest_make_collect_report, pytest_runtest_makereport\n",
    "test_call": "import pytest\ndef test_it():\n    pytest.skip('nothing here')\n",
    "test_mark": "import pytest\n@pytest.mark.skip(reason='nothing here')\ndef test_it(): pass\n",
    "test_fixture": "import pytest\n@pytest.fixture\ndef gone(): pytest.skip('nothing here')\ndef test_it(gone): pass\n",
    "test_module": "import pytest\npytest.skip('nothing here', allow_module_level=True)\n",
    # Not a skip, though pytest calls its outcome one.
    "test_expected": "import pytest\n@pytest.mark.xfail(strict=True)\ndef test_it(): assert False\n",
}


def closing_line(folder: Path, ci: str) -> tuple[int, str]:
    """Exit code and last line of a run on these files."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--rootdir", str(folder)]
    environment = {**os.environ, "CI": ci, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, re.sub(r" in .*", "", done.stdout.strip().splitlines()[-1])


def test_a_skip_is_a_failure_in_ci_alone(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert closing_line(tmp_path, "") == (0, "4 skipped, 1 xfailed")
    code, line = closing_line(tmp_path, "true")
    assert code == 1
    # What fails before the test itself runs is an error to pytest.
    assert line == "1 failed, 1 xfailed, 3 errors"
