"""Target: the ReplyReceiver against ``tests/reference.py``.

The first octets choose the limits and the pieces; the rest is what an upstream says.
"""

from __future__ import annotations

from gateway._parser import ReplyReceiver

from .. import reference
from .inputs import cut, stretched

LIMITS = ((16, 40), (64, 64), (300, 1000), (4096, 65536))


def _read(limits: tuple[int, int], pieces: list[bytes]) -> tuple[list[tuple[int, list[str]]], str | None]:
    receiver = ReplyReceiver(*limits)
    told = []
    for piece in pieces:
        receiver.feed(piece)
        while (reply := receiver.reply()) is not None:
            told.append(reply)
        assert receiver.pending <= limits[1], "more is held than a reply may have"
    return told, receiver.fault


def probe(data: bytes) -> None:
    if len(data) < 3:
        return
    _read(LIMITS[data[0] & 3], cut(stretched(data[3:]), data[1] + 1, data[2] + 1))


def check(data: bytes) -> None:
    if len(data) < 3:
        return
    limits, stream = LIMITS[data[0] & 3], stretched(data[3:])
    told, wanted = _read(limits, cut(stream, data[1] + 1, data[2] + 1)), reference.replies(stream, *limits)
    assert told == wanted, f"{told}, not {wanted}"
