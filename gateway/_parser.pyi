"""The bytes: wire octets to commands, lines, content and replies, and back.

Owns every loop over octets. Knows no reply text, no order of commands, no I/O.
No state outside the objects. RFC 5321 §4.1 (grammar), §4.5.2 (transparency),
RFC 2920 (pipelining), RFC 3030 (BDAT), RFC 6531 (UTF-8 addresses).

A malformed line is a Command with a ``fault``, never an exception. Exceptions
(ValueError, TypeError) mean that the caller broke the contract below.
"""

from typing import Any, Final, Self, final

#: Octets a command line may have, CRLF included, unless the Receiver is told otherwise.
LINE_LIMIT: Final[int]
#: Octets without CRLF after which a command line is a flood (fault ``"flood"``).
FLOOD_LIMIT: Final[int]

@final
class Command:
    """One command line, taken apart and validated.

    ``fault`` is None for a line that is good as far as syntax goes, else one of:

    ========== ====================================================================
    newline    bare CR, bare LF, NUL or another control character in the line
    long       more than ``line_limit`` octets, CRLF included (told once, line skipped)
    flood      more than FLOOD_LIMIT octets without CRLF: the connection must end
    utf8       octets over 127 that are not UTF-8
    syntax     the verb is known, its arguments do not fit its grammar
    path       MAIL or RCPT: the address is not one (RFC 5321 §4.1.2), or a label
               is over 63, a domain over 255 or a path over 256 octets
    parameter  MAIL or RCPT: a parameter is not ``keyword[=value]``
    duplicate  MAIL or RCPT: a parameter is given twice
    chunk      BDAT: the size is missing, not decimal or over 2**63-1, or something else than
               LAST follows it: what the next octets are is unknown
    ========== ====================================================================
    """

    @property
    def verb(self) -> str:
        """The first word, ASCII letters in upper case; ``""`` for an empty line, after a leading space and
        after a newline, long, flood or utf8 fault. Unknown verbs too, cut at 64 characters."""
    @property
    def fault(self) -> str | None: ...
    @property
    def argument(self) -> str:
        """What follows the verb, without the white space around it; ``""`` after a newline, long, flood or utf8 fault."""
    @property
    def address(self) -> str | None:
        """MAIL and RCPT: the path without brackets and source route, quotes kept; ``""`` for ``<>``; None for other verbs and after a path fault."""
    @property
    def local(self) -> str:
        """The local part as given, quotes kept; ``postmaster`` in any case for ``<Postmaster>``."""
    @property
    def domain(self) -> str:
        """The domain or address literal in lower case; ``""`` for ``<>`` and ``<Postmaster>``."""
    @property
    def source_routed(self) -> bool:
        """The path began with a source route (``@a,@b:``), which was read over (RFC 5321 §F.2)."""
    @property
    def ascii(self) -> bool:
        """True if the whole line is ASCII; False too after a newline, long, flood or utf8 fault."""
    @property
    def params(self) -> dict[str, str | None]:
        """MAIL and RCPT: ESMTP parameters in order, keywords in upper case; empty for others."""
    def path(self) -> tuple[str | None, str, str, dict[str, str | None], bool]:
        """``address``, ``local``, ``domain``, ``params`` and ``ascii``: whoever wants them all asks once."""
    @property
    def chunk_size(self) -> int:
        """BDAT: octets that follow the line."""
    @property
    def last(self) -> bool:
        """BDAT: LAST was given."""

@final
class ReadBuffer:
    """What the reads of one event loop are made into, for any number of connections: give it to whoever reads
    (``socket.recv_into``, or from ``asyncio.BufferedProtocol.get_buffer``), say how much was ``filled``, and
    ``Receiver.feed`` it. Much content at once then comes out in the memory that was read into, without
    a copy; the next read goes into other memory.

    A view of it is good until the next ``feed``, and for one read."""

    def __new__(cls, size: int = ..., taken: int = ...) -> Self:
        """``size``: octets that one read may bring. ``taken``: contents from so many octets on are handed out in their
        memory. Raises ValueError where either is under 1."""
    def get_buffer(self, size_hint: int) -> Any:
        """Itself, whatever the hint, as ``asyncio.BufferedProtocol`` has it. (Any: what can be written into has no name before Python 3.12.)"""
    def filled(self, n: int) -> None:
        """``n`` octets were read. Raises ValueError if there is no room for so many, or nothing was read since the last ``feed``."""
    def __len__(self) -> int:
        """Octets that were read and not fed yet."""
    def head(self) -> bytes:
        """A copy of the first 64 octets of them."""

@final
class Receiver:
    """The one read buffer of a connection. ``feed`` what came, then read it the way the
    session's state asks for: ``command``, ``line``, ``content`` or ``chunk``.

    What is held is bounded by one read plus FLOOD_LIMIT octets: the caller does not feed
    again while it leaves a read unread (it pauses the transport instead).
    """

    def __init__(self, line_limit: int = ..., normalize: bool = ..., auth_limit: int = ...) -> None:
        """``line_limit``: 2 to FLOOD_LIMIT. ``auth_limit``: the same for AUTH commands, where it is
        more (0: it is not). ``normalize``: in content a bare LF becomes CRLF instead
        of a fault (a bare CR stays one), and begins a line whose first dot is stuffing; but a dot
        alone between a bare LF and a CRLF is that line: it ends nothing."""
    def feed(self, data: bytes | ReadBuffer) -> None: ...
    @property
    def pending(self) -> int:
        """Octets fed and not yet read."""
    def discard(self) -> None:
        """Forget what is pending (before TLS starts, before a close)."""
    def command(self) -> Command | None:
        """The next command line; None if no whole line is there yet, and after a flood."""
    def line(self, limit: int) -> bytes | None:
        """The next line without its CRLF, at most ``limit`` (2 to FLOOD_LIMIT) octets with it; None
        if not whole yet. An over-long or malformed line sets ``line_fault`` and comes back as ``b""``."""
    @property
    def line_fault(self) -> str | None:
        """Fault of the last ``line``: ``"newline"``, ``"long"``, ``"flood"`` or None."""
    def begin(self, binary: bool = ...) -> None:
        """A new content begins: counters and faults start anew. ``binary``: BODY=BINARYMIME,
        only the header is counted: no faults, no ``longest``, no ``eight_bit``."""
    def content(self) -> bytes | None:
        """The next piece of DATA content, dots unstuffed; None if there is none now.

        A read (bytes) that is wholly clean content comes back as the very object that was fed. After
        the terminating CRLF.CRLF (RFC 5321 §4.5.2; nothing else ends DATA) ``finished`` is
        True; what follows it stays pending. After a fault the rest is read over to the true
        end, and nothing is handed out."""
    @property
    def finished(self) -> bool:
        """DATA: the true end of the content has been read."""
    def chunk(self, n: int) -> bytes | None:
        """The next piece of a BDAT chunk of which ``n`` octets (over 0) are still to come; None
        if nothing is pending. ``taken`` says by how much ``n`` shrinks. After a fault the
        octets are taken and ``b""`` is handed out."""
    @property
    def taken(self) -> int:
        """Octets of the wire that the last ``chunk`` took."""
    def end(self) -> None:
        """BDAT: the last chunk is complete; a CR that waited for its LF becomes a fault."""
    @property
    def content_fault(self) -> str | None:
        """The first fault of this content: ``"newline"`` (bare CR or LF), ``"nul"`` or None."""
    def facts(self) -> tuple[str | None, int, int, bool, int, int, int]:
        """``content_fault``, ``size``, ``longest``, ``eight_bit``, ``header_size``, ``header_fields`` and
        ``hops``, as they are now: whoever wants them all asks once."""
    @property
    def size(self) -> int:
        """Octets of this content so far, as handed out (after a fault: as they would have been)."""
    @property
    def longest(self) -> int:
        """Octets of the longest line so far, without its CRLF (an unfinished last line counts)."""
    @property
    def eight_bit(self) -> bool:
        """An octet over 127 was seen."""
    @property
    def header_size(self) -> int:
        """Octets of the header section so far, without the empty line that ends it."""
    @property
    def header_fields(self) -> int:
        """Header fields so far (lines of the header that are no continuation)."""
    @property
    def hops(self) -> int:
        """``Received`` fields so far (RFC 5321 §6.3), in any case."""

@final
class ReplyReceiver:
    """Reads the replies of an upstream (RFC 5321 §4.2): bounded, forgiving about text only."""

    def __init__(self, line_limit: int = ..., reply_limit: int = ...) -> None:
        """Octets a line (CRLF included) and a whole reply may have."""
    def feed(self, data: bytes) -> None: ...
    @property
    def pending(self) -> int:
        """Octets that belong to no reply told so far: also those of a reply that is not whole."""
    def discard(self) -> None: ...
    def reply(self) -> tuple[int, list[str]] | None:
        """``(code, lines)`` of the next whole reply, None if it is not there yet or after a
        fault. Lines are without code and CRLF, controls and broken UTF-8 replaced by ``?``."""
    @property
    def fault(self) -> str | None:
        """Why nothing more can be read: ``"syntax"`` (no code, the code changes inside a
        reply, a code outside 200–599), ``"newline"``, ``"long"`` (line or reply) or None."""

def stuff(content: bytes, line_start: bool = ...) -> bytes:
    """Dot-stuffing for DATA (RFC 5321 §4.5.2). ``line_start``: the octet before ``content``
    was the LF of a CRLF, or there was none. Gives back ``content`` itself where no line
    begins with a dot. Only CRLF ends a line here."""

def parse_address(text: str) -> tuple[str, str] | None:
    """``(local, domain)`` of one mailbox without brackets by the grammar that RCPT uses,
    UTF-8 allowed, the domain in lower case; None if it is not one."""

def crc32(content: bytes, value: int = ...) -> int:
    """``zlib.crc32``, ten times as fast where the processor multiplies without carry. Lets go of
    the GIL for more than 256 KiB."""
