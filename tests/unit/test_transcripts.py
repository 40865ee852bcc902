"""Every golden dialogue, under every cutting, with answers that come at once and late."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from .. import dialogue

SEED = random.randrange(2**32)
CASES = dialogue.cases()


@pytest.mark.parametrize("late", [False, True], ids=["at-once", "late"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_transcript(case: dialogue.Case, late: bool) -> None:
    print(f"seed {SEED}")
    for cut in dialogue.cuttings(case, SEED, every=not late):
        dialogue.run(case, cut, late)


def test_every_row_has_a_transcript() -> None:
    rows = {case.name.partition("-")[0] for case in CASES}
    # F7 and A3 are deadlines (test_server.py and the listener's tests).
    wanted = {f"F{n}" for n in (1, 2, 3, 4, 5, 6, 8, 9, 10)} | {f"C{n}" for n in range(1, 11)}
    wanted |= {"T1", "T2", "T3", "T5", "P1", "P2", "P3", "B1", "B2", "B3", "R1", "R2", "R3", "L1", "L3"}
    assert wanted <= rows, sorted(wanted - rows)


def test_a_wrong_reply_is_found(tmp_path: Path) -> None:
    path = tmp_path / "X1-wrong.smtp"
    path.write_text("# RFC 5321 §4.1: shows that the runner can fail\n@ehlo\nC: NOOP\nS: 250 2.0.0 ok\n")
    (case,) = dialogue.read(path)
    with pytest.raises(AssertionError, match="group 2"):
        dialogue.run(case)


def test_an_unexpected_mail_is_found(tmp_path: Path) -> None:
    path = tmp_path / "X1-mail.smtp"
    path.write_text(
        "# RFC 5321 §4.1: shows that the runner can fail\n@ehlo\nC: MAIL FROM:<>\nC: RCPT TO:<b@app.example>\nC: DATA\n"
        "S: 250 *\nS: 250 *\nS: 354 *\nC: .\nS: 250 *\n"
    )
    (case,) = dialogue.read(path)
    with pytest.raises(AssertionError, match="Mail"):
        dialogue.run(case)


def test_a_file_without_a_reason_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "X1-no-reason.smtp"
    path.write_text("@ehlo\n")
    with pytest.raises(ValueError, match="first line"):
        dialogue.read(path)


def test_escapes() -> None:
    assert dialogue.octets(r"a\r\n\0\x80\\{3*xy}ü") == b"a\r\n\0\x80\\xyxyxy\xc3\xbc"


def test_octets_that_must_arrive_together_are_not_cut() -> None:
    group = dialogue.Group(b"NOOP\r\nDATA\r\nx", together=[(6, 13)])
    assert group.cuts() == [1, 2, 3, 4, 5, 6]
    assert dialogue.byte_by_byte(0, group)[-1] == b"DATA\r\nx"
