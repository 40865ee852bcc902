"""An SMTP gateway: accept mail, promise only what is safe, carry it to relays and webhooks.

The names below are loaded on first use, so that ``import gateway`` costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import Gateway
    from .message import Message
    from .reply import Reply

__version__ = "0.1.0"
__all__ = ["Gateway", "Message", "Reply", "__version__"]

_PLACES = {"Gateway": "app", "Message": "message", "Reply": "reply"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'gateway' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_PLACES[name]}", __name__), name)
