"""The counting receivers' engine: SMTP, LMTP and HTTP servers in C that take everything and keep nothing.

``gateway.tools.receive`` is what people and programs use; this is what it drives.
"""

from collections.abc import Sequence
from typing import final

@final
class Sink:
    """Takes what comes to the listening sockets ``listeners`` (descriptors, which stay the caller's), and counts.
    Nothing happens between two ``turn`` calls.

    protocol: smtp, lmtp or http. connections: at most so many at a time, the next ones wait to be accepted.
    delay: seconds before the answer to each message. fails: ``(stage, share, reply)``; at this stage this share
    (0 to 1) of all gets these octets instead of the usual answer. Stages: connect, hello, mail, rcpt, data,
    content (after the data), drop (there too: the connection is closed without an answer, the reply means
    nothing); for http only connect (closed at once), content and drop. seed: of the dice.
    Raises ValueError for an unknown stage, OSError without descriptors."""

    #: Messages that got a good answer; that were refused or dropped after all of their data.
    taken: int
    refused: int
    dropped: int
    #: Recipients of the messages taken; octets of content of all that came (dots that transparency added included).
    recipients: int
    octets: int
    #: Connections that came, that are open now, and the most that were.
    connections: int
    open: int
    most_open: int
    def __init__(
        self,
        listeners: Sequence[int],
        protocol: str = "smtp",
        *,
        connections: int = 10000,
        delay: float = 0.0,
        fails: Sequence[tuple[str, float, bytes]] = (),
        seed: int = 1,
    ) -> None: ...
    def turn(self, seconds: float, messages: int = 0) -> bool:
        """Works for so long, or until so many messages have come in all (0: no such bound). True: that many came."""
    def close(self) -> None:
        """Drops all connections."""
    def stages(self) -> dict[str, int]:
        """How often each stage failed as it was asked to."""
