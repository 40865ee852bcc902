"""The load generator's engine and its histogram: C, with no Python object for a message.

``gateway.tools.load`` is what people and programs use; this is what it drives.
"""

from collections.abc import Callable, Sequence
from typing import final

from .load import Secured

@final
class Histogram:
    """How often which value was seen: whole numbers from 0 to 2^63 - 1 in 7,424 counters, whatever
    their number. Up to 255 a value is told exactly, above it by at most 1/128 too high."""

    count: int
    #: The smallest and the greatest value, exactly; 0 where there is none.
    minimum: int
    maximum: int
    #: Sum of all values.
    total: float
    def __init__(self) -> None: ...
    def record(self, value: int, times: int = 1) -> None:
        """A value below 0 counts as 0. Raises OverflowError over 2^63 - 1, ValueError for ``times`` below 0."""
    def at(self, share: float) -> int:
        """The value that ``share`` (0 to 1) of all are not above; 0 where there is none."""
    def add(self, other: Histogram) -> None:
        """All that ``other`` has seen."""
    def clear(self) -> None: ...
    def buckets(self) -> list[tuple[int, int]]:
        """``(greatest value of the bucket, how many)`` of those that are not empty, rising."""

@final
class Generator:
    """Sends mail over ``sessions`` connections, and counts. Nothing happens between two ``turn`` calls.

    host, port: a numeric address; port -1 is the path of a unix socket. scope: of a link-local address.
    mails: of each kind of message, which take turns, its MAIL line, the same for a server that offers
    8BITMIME, and its body as it goes over the wire (the end of data, or ``BDAT n LAST``, with it).
    recipients: RCPT lines. hello: the EHLO or LHLO line; auth: a line that logs in at once, or b"".
    messages, seconds: when to stop; 0 is no such bound. rate: messages a second, 0 is as fast as it goes.
    per_connection: messages after which a connection ends with QUIT, 0 for never.
    pipeline: MAIL, RCPT and DATA (or BDAT and the body) in one write, after DATA the body with the next group.
    secure: makes TLS for a new connection; implicit: before the greeting, else by STARTTLS.
    timeout: seconds for each reply, and for one session without a connection. Raises ValueError for an address that is none, OSError without descriptors."""

    #: Transactions that were begun; what became of them: taken, refused, broken off.
    begun: int
    accepted: int
    refused: int
    broken: int
    #: Connections that came about; octets of content in the messages that were taken.
    connections: int
    octets: int
    #: Nanoseconds from MAIL to the reply after the data; with a rate from when MAIL should have been said.
    latency: Histogram
    #: Nanoseconds from connect to the reply to the last EHLO (or AUTH).
    setup: Histogram
    #: Why nothing can be sent at all, or "".
    failure: str
    def __init__(
        self,
        host: str,
        port: int,
        *,
        scope: int = 0,
        sessions: int,
        mails: Sequence[tuple[bytes, bytes, bytes]],
        sizes: Sequence[int],
        recipients: Sequence[bytes],
        hello: bytes,
        auth: bytes = b"",
        messages: int = 0,
        seconds: float = 0.0,
        rate: float = 0.0,
        per_connection: int = 0,
        pipeline: bool = False,
        bdat: bool = False,
        lmtp: bool = False,
        secure: Callable[[], Secured] | None = None,
        implicit: bool = False,
        timeout: float = 60.0,
    ) -> None: ...
    def turn(self, seconds: float) -> bool:
        """Works for so long, or to the end. False: it is over, all connections are closed."""
    def stop(self) -> None:
        """Begins nothing more; what is out gets its reply."""
    def close(self) -> None:
        """Leaves everything as it is: connections are dropped."""
    @property
    def elapsed(self) -> float:
        """Seconds from the first MAIL to the last reply after data."""
    @property
    def unsent(self) -> int:
        """With a rate: messages whose time had come and that found no session before the end."""
    def replies(self) -> dict[str, dict[int, int]]:
        """How often which code came, by what it answered: greeting, hello, starttls, auth, mail, rcpt, data, content, other."""
    def texts(self) -> dict[tuple[str, int], str]:
        """Of the first reply of 400 and more of each kind its last line, as it came."""
    def errors(self) -> dict[str, int]:
        """What was no reply: connections refused, closed in the middle, time-outs …"""
