"""A hundred kills here, a thousand by ``make torture``; the story is told in ``kills.py``."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest
import uvloop

from tests.crash.kills import Run

#: GATEWAY_KILLS and GATEWAY_SEED repeat a run, or make another one.
KILLS = int(os.environ.get("GATEWAY_KILLS", "100"))


@pytest.mark.long
def test_kill_nine_under_load_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("GATEWAY_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
    # The seed and the figures are told whether it passes or not.
    with capsys.disabled(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(f"\nGATEWAY_SEED={seed}", flush=True)
        run = Run(tmp_path, KILLS, seed, lambda words: print(words, flush=True))
        runner.run(run.run())
        figures = run.figures
        print(figures)
    assert figures.kills >= KILLS
    assert figures.count["acknowledged"] > 0
    assert figures.count["refused"] > 0
