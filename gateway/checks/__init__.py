"""Checks: each judges a client, a sender, a recipient or a content. One file each.

A new one is a class with ``__init__(name, config)`` in a file of its own, a dataclass in
``config/tables.py`` and a line in ``CHECKS``; other packages register theirs as an entry point of the
group ``gateway.checks``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config import CheckConfig
    from ..contracts import Check

#: ``type`` in the configuration → ``module:class``, imported with the first check of that kind.
CHECKS: dict[str, str] = {"http": ".http:HttpCheck"}


def make_check(name: str, config: CheckConfig) -> Check:
    """The check for one ``[checks.NAME]``. Raises LookupError for a type that nobody offers."""
    if config.type in CHECKS:
        module, _, kind = CHECKS[config.type].partition(":")
        check: Check = getattr(import_module(module, __name__), kind)(name, config)
        return check
    # Slow to import, and few have any.
    from importlib.metadata import entry_points

    for point in entry_points(group="gateway.checks", name=config.type):
        foreign: Check = point.load()(name, config)
        return foreign
    raise LookupError(f"check {name}: no package offers the type {config.type!r}")
