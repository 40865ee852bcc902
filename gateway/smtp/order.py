"""The order of replies, and the count of offences: the two ledgers of a ServerSession.

``Order`` holds what was said until it may go out: replies behind an answer that is still owed
wait in its slot (RFC 2920 §3.2: replies come in the order of the commands). ``Conduct`` counts
errors, junk and malformed lines (row C9 of the reference); what came before a message is
forgiven when that message is accepted. Neither knows a command.
"""

from __future__ import annotations

from typing import Final

from mypy_extensions import mypyc_attr

from ..reply import Reply

#: Messages after their end of data that may be unanswered at a time.
ANSWERS_OWED: Final = 16
#: Replies that may wait behind the last owed answer before reading stops.
REPLIES_HELD: Final = 1024
#: Errors after which each further one is answered late, and with which we hang up.
ERRORS_FREE: Final = 10
ERRORS_AT_MOST: Final = 20
#: NOOP, RSET, VRFY and HELP after which each further one counts as an error.
JUNK_FREE: Final = 100
#: Malformed lines with which we hang up, however many messages were accepted.
BAD_LINES_AT_MOST: Final = 3

#: Octets of replies from which on another one is not joined to them.
LONG: Final = 1024

#: Errors and junk counted up to some moment.
Mark = tuple[int, int]


@mypyc_attr(acyclic=True, free_list_len=1)
class Said:
    """Replies one behind the other. They are few and short, so that they are joined as they come; of many none is copied
    again and again, because what has become long is put aside."""

    __slots__ = ("_aside", "_wire", "count")

    def __init__(self) -> None:
        self._wire = b""
        self._aside: list[bytes] | None = None
        self.count = 0

    def add(self, wire: bytes) -> None:
        self.count += 1
        if len(self._wire) < LONG:
            self._wire = self._wire + wire if self._wire else wire
        else:
            if self._aside is None:
                self._aside = []
            self._aside.append(self._wire)
            self._wire = wire

    def take(self) -> bytes:
        """All of them, and none is left; ``b""`` if there was none."""
        wire = self._wire
        if wire:
            if self._aside is not None:
                self._aside.append(wire)
                wire = b"".join(self._aside)
                self._aside = None
            self._wire = b""
            self.count = 0
        return wire


@mypyc_attr(acyclic=True, free_list_len=1)
class Owed:
    """The place of one answer among the replies, and what was said after it."""

    __slots__ = ("after", "count", "mark", "number", "silent", "wire")

    def __init__(self, number: int, count: int, mark: Mark) -> None:
        self.number = number
        self.count = count  # replies that the answer has: recipients in LMTP, else 1
        self.mark = mark
        self.wire: bytes | None = None
        self.silent = False
        self.after = Said()


class Order:
    """Replies in the order of the commands."""

    __slots__ = ("_out", "_tail", "owed")

    def __init__(self) -> None:
        self._out = Said()
        #: Where the next reply goes: ``_out``, or behind the last owed answer.
        self._tail = self._out
        #: Oldest first.
        self.owed: list[Owed] = []

    def say(self, wire: bytes) -> None:
        self._tail.add(wire)

    def owe(self, number: int, count: int, mark: Mark) -> None:
        """An answer of ``count`` replies comes here later."""
        place = Owed(number, count, mark)
        self.owed.append(place)
        self._tail = place.after

    @property
    def full(self) -> bool:
        """No more should be taken on until an answer is in."""
        return bool(self.owed) and (len(self.owed) >= ANSWERS_OWED or self._tail.count >= REPLIES_HELD)

    def settle(self, number: int, answer: list[Reply] | None) -> Owed | None:
        """The answer is known (None: it never will be). None comes back where nothing is owed
        (any more). Raises ValueError when the count is off, RuntimeError for a second answer."""
        for place in self.owed:
            if place.number == number:
                break
        else:
            return None
        if place.wire is not None:
            raise RuntimeError(f"transaction {number} was answered twice")
        if answer is None:
            place.wire = b""
            place.silent = True
        elif len(answer) == place.count:
            place.wire = answer[0].wire if place.count == 1 else b"".join([reply.wire for reply in answer])
        elif len(answer) == 1:
            place.wire = answer[0].wire * place.count
        else:
            raise ValueError(f"{len(answer)} replies where {place.count} are owed")
        return place

    def release(self) -> bool:
        """Let out what no longer stands behind an owed answer. False: an answer that nobody
        knows is next, nothing may be said from here on."""
        owed = self.owed
        while owed:
            place = owed[0]
            if place.wire is None:
                return True
            owed.pop(0)
            if place.silent:
                return False
            self._out.add(place.wire)
            after = place.after.take()
            if after:
                self._out.add(after)
        self._tail = self._out
        return True

    def forsake(self) -> list[int]:
        """Owe nothing any more; the numbers of those that had no answer."""
        numbers = [place.number for place in self.owed if place.wire is None]
        self.owed.clear()
        self._tail = self._out
        return numbers

    def take(self) -> bytes:
        """What may be written now; ``b""`` if nothing."""
        return self._out.take()


class Conduct:
    """What a client did wrong or in vain."""

    __slots__ = ("_base_errors", "_base_junk", "_errors", "_junk", "bad_lines")

    def __init__(self) -> None:
        # Totals that only grow; what counts is what came after the bases.
        self._errors = 0
        self._junk = 0
        self._base_errors = 0
        self._base_junk = 0
        self.bad_lines = 0

    def error(self) -> int:
        """Count one; how many count now."""
        self._errors += 1
        return self._errors - self._base_errors

    def junk(self) -> bool:
        """Count one; True if it is an error by now."""
        self._junk += 1
        return self._junk - self._base_junk > JUNK_FREE

    @property
    def mark(self) -> Mark:
        return self._errors, self._junk

    def forgive(self, mark: Mark) -> None:
        """Forget what was counted up to that moment."""
        errors, junk = mark
        self._base_errors = max(self._base_errors, errors)
        self._base_junk = max(self._base_junk, junk)

    @property
    def at_the_brink(self) -> bool:
        """The next error or junk command will be judged by these counts."""
        return self._errors - self._base_errors >= ERRORS_FREE or self._junk - self._base_junk >= JUNK_FREE
