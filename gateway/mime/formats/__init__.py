"""Payload formats: what a sink sends for one delivery.

A format is a function ``(delivery, now) -> Payload`` in a file of its own and one line in
``FORMATS``. The time (Unix seconds) is handed in; signatures and transport are the sink's.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from ...contracts import Delivery
from .payload import Payload

__all__ = ["FORMATS", "Format", "Payload", "format_named"]

#: Name in the configuration → ``module:function``, loaded on first use.
FORMATS: dict[str, str] = {
    "standard": ".standard:standard",
    "raw": ".raw:raw",
}


Format = Callable[[Delivery, float], Payload]


def format_named(name: str) -> Format:
    """The format of this name. Raises KeyError if there is none."""
    module, _, function = FORMATS[name].partition(":")
    found: Format = getattr(import_module(module, __name__), function)
    return found
