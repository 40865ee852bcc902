"""The program that fuzzes: harness.c, Python and the parser in one, compiled by clang.

The parser has AddressSanitizer, UndefinedBehaviorSanitizer and a counter at every edge of our own
functions (not of Cython's own support code). Python's objects come from malloc, so that
AddressSanitizer sees the end of each. Leaks are looked for elsewhere (test_corpus.py): Python
itself keeps much to its end.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
FOLDER = ROOT / "build" / "fuzz"
PARSER = ROOT / "gateway" / "_parser.pyx"

#: On Debian; `make` installs nothing.
REMEDY = "apt-get install --no-install-recommends clang libclang-rt-dev (and python3-dev where python3 is Debian's)"

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
COUNTED = "src:*\nfun:*gateway*\n"
#: Cython's wrappers add 0 to the NULL that stands for no arguments, which C does not define and
#: every compiler does; what they wrap is still looked at.
BENIGN = "[pointer-overflow]\nfun:__pyx_pw_*\n"
#: As setup.py has them.
DIRECTIVES = ["boundscheck=False", "wraparound=False", "freethreading_compatible=True"]

#: Of how many inputs without news one goes to the oracle.
ORACLE = {"receiver": 32, "replies": 32, "server": 4, "client": 4}


def missing() -> str | None:
    """What is not here and how to get it; None if all is."""
    if shutil.which("clang") is None:
        return f"clang is not installed: {REMEDY}"
    tried = subprocess.run(
        ["clang", "-fsanitize=fuzzer,address,undefined", "-x", "c", "-o", os.devnull, "-"],
        input="int LLVMFuzzerTestOneInput(const unsigned char *p, unsigned long n) { return p && n ? 0 : 0; }",
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        return f"clang has no libFuzzer or no sanitizers: {REMEDY}\n{tried.stderr.strip()}"
    if _library() is None:
        return f"this Python ({sys.base_prefix}) has no shared library to build in: {REMEDY}, or a Python built with --enable-shared"
    return None


def _library() -> Path | None:
    name = sysconfig.get_config_var("LDLIBRARY") or ""
    folders = [sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("LIBPL")]
    multiarch = sysconfig.get_config_var("MULTIARCH")
    if multiarch:
        folders.append(f"/usr/lib/{multiarch}")
    found = [Path(folder) / name for folder in folders if folder and (Path(folder) / name).exists() and ".so" in name]
    return found[0] if found else None


def build(folder: Path = FOLDER, parser: Path = PARSER) -> Path:
    """The program, built where it is older than its sources. Raises RuntimeError with the compiler's words."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "fuzz"
    sources = [parser, HERE / "harness.c", Path(__file__)]
    if program.exists() and all(source.stat().st_mtime < program.stat().st_mtime for source in sources):
        return program
    (folder / "counted.txt").write_text(COUNTED)
    (folder / "benign.txt").write_text(BENIGN)
    include = f"-I{sysconfig.get_path('include')}"
    directives = [word for directive in DIRECTIVES for word in ("-X", directive)]
    _run(
        [sys.executable, "-m", "cython", "-3", *directives, "--module-name", "gateway._parser", "-o", str(folder / "parser.c"), str(parser)]
    )
    counters = ["-fsanitize-coverage=inline-8bit-counters,pc-table", f"-fsanitize-coverage-allowlist={folder / 'counted.txt'}"]
    words = ["clang", "-c", "-g", "-O2", "-fno-omit-frame-pointer", include]
    benign = f"-fsanitize-ignorelist={folder / 'benign.txt'}"
    _run([*words, *SANITIZERS, *counters, benign, "-o", str(folder / "parser.o"), str(folder / "parser.c")])
    _run([*words, "-Wall", "-Wextra", "-Wno-unused-parameter", "-o", str(folder / "harness.o"), str(HERE / "harness.c")])
    library = _library()
    assert library is not None, "asked before whether it is missing"
    objects = [str(folder / "harness.o"), str(folder / "parser.o"), str(library), f"-Wl,-rpath,{library.parent}"]
    _run(["clang", "-fsanitize=fuzzer,address,undefined", "-o", str(program), *objects])
    return program


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


@dataclass
class Run:
    """What came of one run. ``fault``: the log where it ended early, None if nothing was found;
    ``culprit`` is where libFuzzer put the input that did it."""

    executions: int
    asked: int
    edges: tuple[int, int]
    marks: tuple[int, int]
    seconds: float
    fault: str | None
    culprit: Path | None


def run(program: Path, target: str, arguments: Sequence[str], oracle: int | None = None, timeout: float | None = None) -> Run:
    """Runs libFuzzer on a target; its own log lies beside the program."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONMALLOC": "malloc",
        "FUZZ_PYTHON": sys.executable,
        "FUZZ_TARGET": target,
        "FUZZ_ORACLE": str(oracle or ORACLE[target]),
        # Objects are many and short-lived: a small quarantine of freed ones stays in the cache of the processor.
        "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=1:thread_local_quarantine_size_kb=64:malloc_context_size=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    log = program.parent / f"{target}.log"
    prefix = program.parent / f"{target}-"
    command = [str(program), "-detect_leaks=0", f"-artifact_prefix={prefix}", "-print_final_stats=1", *arguments]
    with log.open("w") as out:
        done = subprocess.run(command, env=environment, cwd=program.parent, stdout=out, stderr=out, timeout=timeout, check=False)
    text = log.read_text(errors="replace")
    counts = re.findall(r"fuzz: executions=(\d+) oracle=(\d+) c_edges=(\d+)/(\d+) python_edges=(\d+)/(\d+) seconds=([\d.]+)", text)
    numbers = [float(number) for number in counts[-1]] if counts else [0.0] * 7
    executions, asked, edges, of_edges, marks, of_marks = (int(number) for number in numbers[:6])
    if units := re.search(r"stat::number_of_executed_units: (\d+)", text):
        # libFuzzer's own count: a sanitizer ends the process before the harness can tell its.
        executions = int(units[1])
    written = re.search(r"Test unit written to (\S+)", text)
    culprit = Path(written[1]) if written else None
    return Run(executions, asked, (edges, of_edges), (marks, of_marks), numbers[6], text if done.returncode else None, culprit)
