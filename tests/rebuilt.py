"""The product, compiled anew in a folder of its own with other flags, and tests that run there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Seconds for what takes minutes on an idle machine.
COMPILING, TESTING = 1800, 3600
_PYTHON = [sys.executable, "-W", "ignore"]


class Rebuilt:
    """``environment`` is what ``setup.py`` and the tests see beside this process' own."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.environment = {**os.environ, "PYTHONPATH": str(folder), **environment}
        self.environment.pop("CI", None)  # there the tests in it that need a checkout would be missed
        for name in ("gateway", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "_parser.c", "node_modules", "__pycache__"))
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        subprocess.run(
            [*_PYTHON, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, env=self.environment, check=True, timeout=COMPILING
        )
        (self.parser,) = (folder / "gateway").glob("_parser*.so")

    def imported(self) -> Path:
        """Where the parser comes from that the tests would use."""
        script = "import gateway._parser as parser; print(parser.__file__)"
        done = subprocess.run(
            [*_PYTHON, "-c", script], cwd=self.folder, env=self.environment, capture_output=True, text=True, check=True
        )  # fmt: skip
        return Path(done.stdout.strip())

    def pytest(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*_PYTHON, "-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider", "-m", "not long", *arguments],
            cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=TESTING, check=False,
        )  # fmt: skip
