"""The ``discard`` sink: takes everything, keeps nothing. For load tests and unwanted mail."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..contracts import DELIVERED, Delivery

if TYPE_CHECKING:
    from ..config import DiscardConfig


class DiscardSink:
    """Settles before ``start`` returns."""

    carries_binary = True

    def __init__(self, name: str, config: DiscardConfig, hostname: str) -> None:
        self.name = name

    def start(self, delivery: Delivery) -> None:
        delivery.settle([DELIVERED] * len(delivery.recipients))

    async def open(self) -> None:
        return None

    async def close(self) -> None:
        return None
