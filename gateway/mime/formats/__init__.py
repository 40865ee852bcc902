"""Payload formats: what a sink sends for one delivery.

A format is a function ``(delivery, now) -> Payload`` in a file of its own and one line in
``FORMATS``. The time (Unix seconds) is handed in; signatures and transport are the sink's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module

from ...contracts import Delivery
from ...message import Content

#: Name in the configuration → ``module:function``, loaded on first use.
FORMATS: dict[str, str] = {
    "standard": ".standard:standard",
    "raw": ".raw:raw",
}


@dataclass(slots=True)
class Payload:
    """``headers``: those that the format owns, values printable ASCII. The octets are ``pieces``
    and then ``tail``, which may lie in a file. They can be walked through more than once."""

    headers: list[tuple[str, str]]
    pieces: list[bytes] = field(repr=False)
    tail: Content | None = field(default=None, repr=False)

    @property
    def size(self) -> int:
        """Octets of all of it."""
        return sum(map(len, self.pieces)) + (self.tail.size if self.tail is not None else 0)

    @property
    def on_disk(self) -> bool:
        """Walking through it blocks on a file."""
        return self.tail is not None and self.tail.path is not None

    def chunks(self) -> Iterator[bytes]:
        yield from self.pieces
        if self.tail is not None:
            yield from self.tail.chunks()


Format = Callable[[Delivery, float], Payload]


def format_named(name: str) -> Format:
    """The format of this name. Raises KeyError if there is none."""
    module, _, function = FORMATS[name].partition(":")
    found: Format = getattr(import_module(module, __name__), function)
    return found
