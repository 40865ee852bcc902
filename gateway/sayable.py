"""Objects for orjson: what a check found or a spool lists, made of what JSON can say.

Whoever gives orjson values that others made gives it these two, too. Left to itself it reads dataclasses, and lets go of
an attribute's value before it has written it: a compiled class makes ints and floats anew whenever it is asked, so nobody
else holds them, and what is written is memory that is free (orjson 3.11; at best the right number, at worst no gateway).
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import orjson

OPTION = orjson.OPT_PASSTHROUGH_DATACLASS


def sayable(value: Any) -> dict[str, Any]:
    """The fields of a dataclass. Raises TypeError for anything else."""
    if not is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"{type(value).__name__} cannot be said in JSON")
    return {field.name: getattr(value, field.name) for field in fields(value)}
