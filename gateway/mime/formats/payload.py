"""What a format makes of one delivery: header fields, and octets that may lie in a file in part."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from mypy_extensions import mypyc_attr

from ...message import Content


@mypyc_attr(acyclic=True)
class Payload:
    """``headers``: those that the format owns, values printable ASCII. The octets are ``pieces``
    and then ``tail``, which may lie in a file. They can be walked through more than once."""

    __slots__ = ("headers", "pieces", "tail")

    def __init__(self, headers: list[tuple[str, str]], pieces: list[bytes], tail: Content | None = None) -> None:
        self.headers = headers
        self.pieces = pieces
        self.tail = tail

    @property
    def size(self) -> int:
        """Octets of all of it."""
        return sum(map(len, self.pieces)) + (self.tail.size if self.tail is not None else 0)

    @property
    def on_disk(self) -> bool:
        """Walking through it blocks on a file."""
        return self.tail is not None and self.tail.path is not None

    def octets(self) -> bytes:
        """All of it; for what is small and in memory."""
        pieces, tail = self.pieces, self.tail
        before = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return before if tail is None else before + tail.read()

    def chunks(self) -> Iterator[bytes]:
        """All of it, piece by piece: a new walk each time."""
        return iter(self.pieces) if self.tail is None else chain(self.pieces, self.tail.chunks())
