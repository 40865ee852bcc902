"""What the octets of an input mean to every target: a few settings, then a stream and how it is cut.

Settings are low bits of the first octets, so that seeds can write them as digits. In the stream
``WAIT`` is where the one who speaks waits for the other side; ``STRETCH`` and an octet repeat
what stands before, so that long lines need no long inputs.
"""

from __future__ import annotations

from itertools import cycle, islice

from ..reference import FLOOD_LIMIT

WAIT = b"\x1e"
STRETCH = 0xFE
UNIT = 16
#: Octets of a stream once it is stretched.
LONGEST = 70_000
#: Pieces of the given sizes; what then is left comes whole.
PIECES = 24


def cut(octets: bytes, *sizes: int) -> list[bytes]:
    """Pieces of these sizes in turn; whole where there is none."""
    if not sizes:
        return [octets] if octets else []
    pieces = []
    at = 0
    for size in islice(cycle(sizes), PIECES):
        pieces.append(octets[at : at + size])
        at += size
        if at >= len(octets):
            break
    else:
        pieces.append(octets[at:])
    return [piece for piece in pieces if piece]


def stretched(octets: bytes) -> bytes:
    """``STRETCH`` n: the octet before it n * 16 more times, at n = 255 more often than any line may
    have octets. Line ends are not repeated: a thousand empty lines say no more than ten."""
    if STRETCH not in octets:
        return octets
    made = bytearray()
    at = 0
    while at < len(octets):
        if octets[at] == STRETCH and at + 1 < len(octets) and made and made[-1] not in b"\r\n":
            count = octets[at + 1]
            made += made[-1:] * min(FLOOD_LIMIT if count == 255 else UNIT * count, LONGEST - len(made))
            at += 2
        else:
            made.append(octets[at])
            at += 1
    return bytes(made)
