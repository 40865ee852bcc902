"""What fuzzing found once is tried for ever: corpus and seeds, with the ordinary parser, against the oracle."""

from __future__ import annotations

import gc
import sys
from importlib import import_module

import pytest

from . import corpus, inputs


@pytest.mark.parametrize("target", corpus.TARGETS)
def test_corpus_and_seeds(target: str) -> None:
    module = import_module(f"tests.fuzz.{target}")
    found = [*corpus.kept(target), *corpus.seeds(target)]
    assert len(found) > 50
    for octets in found:
        try:
            module.probe(octets)
            module.check(octets)
        except Exception as error:
            error.add_note(f"{target}: {corpus.escaped(octets)}")
            raise


@pytest.mark.parametrize("target", ["receiver", "replies"])
def test_nothing_leaks(target: str) -> None:
    """Objects that the parser forgets to let go would be left over after each round."""
    module = import_module(f"tests.fuzz.{target}")
    found = [octets for octets in corpus.kept(target) if len(octets) < 300][:400]

    def round_of_all() -> int:
        for octets in found:
            module.probe(octets)
        gc.collect()
        return sys.getallocatedblocks()

    round_of_all()
    more = []
    for _ in range(5):
        # What leaks does so in every round; what another thread keeps meanwhile is in one.
        before = round_of_all()
        round_of_all()
        more.append(round_of_all() - before)
        # One object a round for each tenth input would be eighty.
        if more[-1] < 50:
            return
    raise AssertionError(f"{more} blocks more, each after two rounds of {len(found)} inputs")


def test_the_corpus_reads_and_writes_every_octet() -> None:
    octets = bytes(range(256)) + b"\\\r\n\x1e"
    assert corpus.unescaped(corpus.escaped(octets)) == octets
    assert "\n" not in corpus.escaped(octets)
    assert corpus.escaped(octets).isascii()


@pytest.mark.parametrize("sizes", [(), (1,), (1, 2), (3, 50), (100,)])
def test_pieces_are_the_whole(sizes: tuple[int, ...]) -> None:
    octets = bytes(range(90))
    pieces = inputs.cut(octets, *sizes)
    assert b"".join(pieces) == octets
    assert all(pieces)
    assert inputs.cut(b"", *sizes) == []


def test_stretching() -> None:
    assert inputs.stretched(b"ab\xfe\x02c") == b"ab" + b"b" * 32 + b"c"
    assert inputs.stretched(b"\r\n\xfe\x02") == b"\r\n\xfe\x02"
    assert inputs.stretched(b"\xfe\x02a\xfe") == b"\xfe\x02a\xfe"
    assert len(inputs.stretched(b"a\xfe\xff" * 3)) <= inputs.LONGEST + 8
