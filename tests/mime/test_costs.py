"""Row M1 of the table of hostile input: what taking a mail apart costs grows with its size and no
faster, whatever is in it. Ratios and CPU time only, the best of several: another's work on this machine
makes a run longer, never shorter."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from gateway.mime import parse

from ..servers import ROOT

pytestmark = pytest.mark.long

HEAD = b"Subject: x\r\nMIME-Version: 1.0\r\n"


def _mixed(parts: bytes, boundary: bytes = b"b") -> bytes:
    return HEAD + b'Content-Type: multipart/mixed; boundary="%b"\r\n\r\n%b--%b--\r\n' % (boundary, parts, boundary)


def _nested(depth: int) -> bytes:
    octets = b"Content-Type: text/plain\r\n\r\ntext\r\n"
    for level in range(depth):
        octets = b'Content-Type: multipart/mixed; boundary="b%d"\r\n\r\n--b%d\r\n%b--b%d--\r\n' % (level, level, octets, level)
    return HEAD + octets


#: Each makes a mail whose size goes with the number.
SHAPES: dict[str, Callable[[int], bytes]] = {
    "text": lambda size: HEAD + b"\r\n" + b"A line of text, as there are many.\r\n" * (size * 30),
    "one-line": lambda size: HEAD + b"\r\n" + b"x" * (size * 1000) + b"\r\n",
    "base64": lambda size: HEAD + b"Content-Transfer-Encoding: base64\r\n\r\n" + (b"QUJD" * 18 + b"\r\n") * (size * 14),
    "broken-base64": lambda size: HEAD + b"Content-Transfer-Encoding: base64\r\n\r\n" + b"Q=!\r\n" * (size * 200),
    "quoted-printable": lambda size: HEAD + b"Content-Transfer-Encoding: quoted-printable\r\n\r\n" + b"=C3=BC= \t\r\n=" * (size * 90),
    "empty-parts": lambda size: _mixed(b"--b\r\n\r\n\r\n" * (size * 100)),
    "empty-mixed-parts": lambda size: _mixed(b"--b\r\nContent-Type: multipart/mixed; boundary=c\r\n\r\n--c\r\n" * (size * 16)),
    "almost-delimiters": lambda size: _mixed(b"--b\r\n\r\n" + b"--bx\r\n--\r\n" * (size * 90)),
    "long-boundary": lambda size: _mixed((b"--" + b"b" * 2040 + b"\r\n") * (size // 2 + 1), b"b" * 2048),
    "nested": lambda size: _nested(size),
    "fields": lambda size: HEAD + b"X-Field: y\r\n" * (size * 20) + b"\r\ntext\r\n",
    "folds": lambda size: HEAD + b"X-Field:\r\n" + b" y\r\n" * (size * 50) + b"\r\ntext\r\n",
    "encoded-words": lambda size: HEAD + b"X-Field:\r\n" + b" =?utf-8?q?=C3=BC?=\r\n" * (size * 10) + b"\r\ntext\r\n",
    "addresses": lambda size: HEAD + b"To: " + b"a@b.example, " * (size * 10) + b"c@d.example\r\n\r\ntext\r\n",
    "comments": lambda size: HEAD + b"To: " + b"(" * (size * 200) + b"a@b.example\r\n\r\ntext\r\n",
    "quotes": lambda size: HEAD + b'To: "' + b'\\"' * (size * 100) + b"a@b.example\r\n\r\ntext\r\n",
    "groups": lambda size: HEAD + b"To: " + b"g:;" * (size * 60) + b"\r\n\r\ntext\r\n",
    "parameters": lambda size: (
        HEAD + b"Content-Type: text/plain" + b"".join(b";\r\n n*%d*=%%41" % number for number in range(size * 10)) + b"\r\n\r\ntext\r\n"
    ),
    "semicolons": lambda size: HEAD + b"Content-Type: text/plain" + b";" * (size * 200) + b"\r\n\r\ntext\r\n",
}
#: Below these seconds a measurement says nothing.
FLOOR = 0.01
#: How much more time twice the size may take: 2 is linear, and what no longer fits into the cache costs more; 4 is quadratic.
TWICE = 2.65


def cost(octets: bytes, times: int = 3) -> float:
    best = float("inf")
    for _ in range(times):
        begun = time.process_time()
        parse(octets)
        best = min(best, time.process_time() - begun)
    return best


@pytest.mark.parametrize("shape", SHAPES)
def test_twice_as_much_costs_twice_as_much(shape: str) -> None:
    make = SHAPES[shape]
    size = 8
    while cost(make(size), 1) < FLOOR and len(make(size)) < 4 * 2**20:
        size *= 2
    ratios = []
    for _ in range(4):
        once, more = cost(make(size)), cost(make(size * 4))
        ratios.append(more / max(once, FLOOR))
        if ratios[-1] <= TWICE * TWICE:
            return
    pytest.fail(f"{shape}: {len(make(size))} octets, then four times as many, cost {ratios} times as much")


@pytest.mark.parametrize("shape", ["text", "one-line", "base64", "broken-base64", "quoted-printable", "almost-delimiters"])
def test_memory_is_three_times_the_mail_at_most(shape: str) -> None:
    """The content itself is one of the three. In a process of its own, which warms up first."""
    done = subprocess.run([sys.executable, "-c", MEASURE, shape], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    size, grown = map(int, done.stdout.split())
    assert grown <= 2 * size + 2**20, f"{shape}: {size} octets, {grown} more while it was taken apart"


MEASURE = """
import re, sys
from pathlib import Path
from tests.mime.test_costs import SHAPES, parse

def peak():
    return int(re.findall(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024

make = SHAPES[sys.argv[1]]
parse(make(8))
octets = make(16 * 2**20 // len(make(1)) + 1)
before = peak()
parse(octets)
print(len(octets), peak() - before)
"""
