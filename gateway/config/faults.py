"""Faults of the configuration: their places in the file, and how they are written.

Knows no table.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

#: Keys and numbers of entries, from the top of the file.
Place = tuple[str | int, ...]
Fault = tuple[Place, str]


class ConfigError(Exception):
    """The configuration cannot be used. ``faults``: one line each, ``place: sentence``."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = list(faults)


def lines(faults: Sequence[Fault]) -> list[str]:
    """One line a fault, ``place: sentence``, none twice."""
    return list(dict.fromkeys(f"{_written(place)}: {sentence}" for place, sentence in faults))


def _written(place: Place) -> str:
    text = ""
    for part in place:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            key = part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else '"' + part.replace("\\", "\\\\").replace('"', '\\"') + '"'
            text += f".{key}" if text else key
    return text


def near(word: str, known: Sequence[str]) -> str:
    """What may have been meant, as the end of a sentence; nothing where nothing is near."""
    found = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {found[0]!r}?" if found else ""
