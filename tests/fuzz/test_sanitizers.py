"""Under AddressSanitizer and UBSan: the corpus, a bounded time of fuzzing, and whether a fault would be found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from . import binary, corpus
from .__main__ import OCTETS, unpack

pytestmark = pytest.mark.long

#: Seconds of fuzzing for each target.
SECONDS = 15
#: Seconds for a run that takes a minute or two on an idle machine.
PATIENCE = 3600


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := binary.missing():
        pytest.skip(reason)
    return binary.build(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("target", corpus.TARGETS)
def test_corpus_then_new_inputs(target: str, program: Path, tmp_path: Path) -> None:
    found = {*corpus.kept(target), *corpus.seeds(target)}
    folder = unpack(tmp_path / "corpus", found)
    replayed = binary.run(program, target, ["-runs=0", f"-max_len={2 * max(map(len, found))}", str(folder)], oracle=1, timeout=PATIENCE)
    assert replayed.fault is None, replayed.fault
    # Each was tried, and the rules in Python were seen as well as the parser.
    assert replayed.asked >= len(found)
    assert replayed.edges[0] > 100
    assert (replayed.marks[0] > 300) == (target in ("server", "client"))
    for seconds in (SECONDS, 8 * SECONDS, 64 * SECONDS):
        words = [f"-dict={binary.HERE / 'smtp.dict'}", f"-max_len={OCTETS[target]}", f"-max_total_time={seconds}", str(folder)]
        fresh = binary.run(program, target, words, timeout=PATIENCE)
        assert fresh.fault is None, fresh.fault
        # The time begins with the corpus, which a slow machine may need all of it for.
        if fresh.executions > len(found):
            break
    assert fresh.executions > len(found)


@dataclass(frozen=True)
class Fault:
    """A line of the parser, what is put in its place, and the word by which it must be found."""

    target: str
    right: str
    wrong: str
    word: str


FAULTS = {
    # Sixteen octets are looked at where there are eight.
    "read behind the end": Fault(
        "receiver",
        "for (; i + 16 <= n; i += 16) {",
        "for (; i + 8 <= n; i += 16) {",
        "AddressSanitizer",
    ),
    # What comes out is more than was reckoned with.
    "written behind the end": Fault(
        "receiver",
        "room = same + (n - same) * (2 if w.normalize else 1) + 72",
        "room = same + (n - same) * (2 if w.normalize else 1) // 4 + 1",
        "AddressSanitizer",
    ),
    "shifted too far": Fault(
        "receiver",
        "valid = (<uint64_t>1 << m) - 1\n            look(",
        "valid = (<uint64_t>1 << (m + 64)) - 1\n            look(",
        "UndefinedBehaviorSanitizer",
    ),
    # LF.CRLF ends the content: smuggling.
    "another end of data": Fault(
        "receiver",
        "        if w.place == DOT_CR:\n",
        "        if w.place == DOT_CR or w.place == BARE_DOT_CR:\n",
        "oracle disagrees",
    ),
    "the same, seen by the session": Fault(
        "server",
        "        if w.place == DOT_CR:\n",
        "        if w.place == DOT_CR or w.place == BARE_DOT_CR:\n",
        "AssertionError",
    ),
    "the code changes inside a reply": Fault(
        "replies",
        " or (self.lines and code != self.code)",
        "",
        "oracle disagrees",
    ),
    # Only where the CR is the last octet of a read.
    "forgotten between two reads": Fault(
        "receiver",
        "    at.cr = w.cr\n",
        "    at.cr = 0\n",
        "oracle disagrees",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, tmp_path: Path) -> None:
    """From a few seeds alone: the corpus may know the answer already."""
    if reason := binary.missing():
        pytest.skip(reason)
    fault = FAULTS[name]
    source = binary.PARSER.read_text()
    assert source.count(fault.right) == 1, f"the parser no longer has the line that {name!r} spoils"
    planted = tmp_path / "_parser.pyx"
    planted.write_text(source.replace(fault.right, fault.wrong))
    program = binary.build(tmp_path / "build", planted)
    folder = unpack(tmp_path / "corpus", START[fault.target])
    words = [
        f"-dict={binary.HERE / 'smtp.dict'}",
        f"-max_len={OCTETS[fault.target]}",
        "-seed=1",
        "-runs=300000",
        f"-max_total_time={PATIENCE // 2}",
        str(folder),
    ]
    run = binary.run(program, fault.target, words, timeout=PATIENCE)
    assert run.fault is not None, f"not found in {run.executions} executions"
    assert fault.word in run.fault
    assert run.culprit is not None
    assert run.culprit.exists()


#: What knows no fault: one harmless conversation for each.
START = {
    "receiver": [
        b"30 0 Subject: x\r\n\r\n..a\r\n.\r\n",
        b"31 0 Subject: x\r\n\r\na\r\n.\r\n",
        b"003 0EHLO x\r\nMAIL FROM:<a@[IPv6:::1]>\r\nDATA\r\nx\r\n.\r\n",
    ],
    "replies": [b"3 0250-a\r\n250 b\r\n"],
    "server": [b"\x00\x02\x06\x1eEHLO x\r\n\x1eMAIL FROM:<a@client.example>\r\nRCPT TO:<b@app.example>\r\nDATA\r\n\x1ex\r\n.\r\n"],
}
