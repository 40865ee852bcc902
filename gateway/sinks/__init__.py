"""Sinks: each carries a message one hop. One file each; they meet the rest in ``contracts``.

A new one is a class with ``__init__(name, config, hostname)`` in a file of its own, a dataclass
in ``config/tables.py`` and a line in ``SINKS``; other packages register theirs as an entry point of
the group ``gateway.sinks``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config import SinkConfig
    from ..contracts import Sink

#: ``type`` in the configuration → ``module:class``, imported with the first sink of that kind.
SINKS: dict[str, str] = {
    "webhook": ".webhook:WebhookSink",
    "relay": ".relay:RelaySink",
    "lmtp": ".relay:LmtpSink",
    "file": ".file:FileSink",
    "stdout": ".stdout:StdoutSink",
    "discard": ".discard:DiscardSink",
    "python": ".python:PythonSink",
}


def make_sink(name: str, config: SinkConfig, hostname: str) -> Sink:
    """The sink for one ``[sinks.NAME]``; nothing is opened yet. Raises LookupError for a type that
    nobody offers, and what the sink raises for values it cannot use."""
    if config.type in SINKS:
        module, _, kind = SINKS[config.type].partition(":")
        sink: Sink = getattr(import_module(module, __name__), kind)(name, config, hostname)
        return sink
    # Slow to import, and few have any.
    from importlib.metadata import entry_points

    for point in entry_points(group="gateway.sinks", name=config.type):
        foreign: Sink = point.load()(name, config, hostname)
        return foreign
    raise LookupError(f"sink {name}: no package offers the type {config.type!r}")
