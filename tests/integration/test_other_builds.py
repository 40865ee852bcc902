"""What is compiled has more than one half: wide registers where the processor has them, what every x86-64 has, plain C. Which one
runs is chosen by the machine; here each does what the others do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.rebuilt import Rebuilt
from tests.servers import program

TESTS = ("tests/unit/test_parser.py", "tests/properties/test_parser.py", "tests/fuzz/test_corpus.py", "tests/unit/test_load.py")


@pytest.mark.long
@pytest.mark.parametrize("half", ["GATEWAY_AVX2", "GATEWAY_BASELINE", "GATEWAY_PORTABLE"])
def test_the_parser_is_the_same_with_narrower_registers(tmp_path: Path, half: str) -> None:
    if program("gcc") is None:
        pytest.skip("gcc is not installed")
    built = Rebuilt(tmp_path / "house", GATEWAY_CFLAGS=f"-O1 -D{half}", GATEWAY_PURE="1")
    left_out = b"gateway_walk_widest" if half == "GATEWAY_AVX2" else b"gateway_walk_wide"
    assert left_out not in built.parser.read_bytes()
    assert built.imported() == built.parser
    done = built.pytest("-n2", *TESTS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 400, done.stdout[-300:]
