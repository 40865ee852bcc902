"""What a row of the spool looks like: the schema, and values to columns and back.

Owns the tables, their version and the checksums. Pure: no I/O, no clock.

A message has a ``key`` that only ever grows; the rows it owes its sinks lie beside each
other under ``key << 20 | n``, so that no second index is needed to find the last one.
``sum`` is the CRC-32 of what decides who gets what; ``content_sum`` of the content.
CRC-32 because it costs 0.1 µs at 1 KiB and 15 µs at 256 KiB where blake2b costs 1.3 and
285: damage is what is looked for here, not malice.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

import orjson
from mypy_extensions import mypyc_attr

from .._parser import crc32
from ..contracts import Keeping, Pending
from ..message import TLS, Client, Content, Envelope, Message, Recipient
from ..sayable import OPTION, sayable

#: "SMTG": what ``file(1)`` and we know a spool by (SQLite's application_id).
APPLICATION_ID = 0x534D5447

#: The schema written here (SQLite's user_version).
VERSION = 2

SCHEMA = """
CREATE TABLE messages (
  key INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  received_at REAL NOT NULL,
  size INTEGER NOT NULL,
  file TEXT,                      -- a name in content/; NULL: the content is in this row
  sum INTEGER NOT NULL,
  content_sum INTEGER NOT NULL,
  meta BLOB NOT NULL,             -- JSON: envelope, client, checks, …
  trace BLOB NOT NULL,
  content BLOB
) STRICT;
CREATE INDEX messages_file ON messages (file) WHERE file IS NOT NULL;
CREATE TABLE pendings (
  key INTEGER PRIMARY KEY,        -- messages.key << 20 | number
  sink TEXT NOT NULL,
  state TEXT NOT NULL,            -- queued | held | dead
  priority INTEGER NOT NULL,
  due REAL NOT NULL,
  expires_at REAL NOT NULL,
  part INTEGER NOT NULL,
  attempts INTEGER NOT NULL,
  down INTEGER NOT NULL,          -- waits for its sink
  person INTEGER NOT NULL,        -- held by a person: only a person releases it
  recipients BLOB NOT NULL,       -- JSON: indexes into the envelope's recipients
  note TEXT NOT NULL,
  sum INTEGER NOT NULL
) STRICT;
CREATE INDEX pendings_due ON pendings (sink, state, priority, due);
CREATE INDEX pendings_down ON pendings (sink) WHERE down = 1 AND state = 'queued';
CREATE TABLE health (probed REAL NOT NULL) STRICT;
INSERT INTO health VALUES (0);
"""

#: From version n to n + 1, statements that run in one transaction with the new number.
UPGRADES: dict[int, str] = {
    # So that a start need not walk through the contents of all messages to learn which lie in files.
    1: "CREATE INDEX messages_file ON messages (file) WHERE file IS NOT NULL",
}

SHIFT = 20
NUMBERS = (1 << SHIFT) - 1

#: Numbers from here on are splits; a message starts with fewer sinks than that.
FIRST_SPLIT = 1 << 16

MESSAGE_WIDTH = 10
PENDING_WIDTH = 13
PENDING_COLUMNS = "key, sink, state, priority, due, expires_at, part, attempts, down, person, recipients, note, sum"
MESSAGE_COLUMNS = "key, id, received_at, size, file, sum, content_sum, meta, trace, content"

#: Its place in the tuple of a message.
CONTENT_SUM = 6

#: The columns of one row; what SQLite can bind.
Value = int | float | str | bytes | None
Columns = tuple[Value, ...]


#: What is read back: texts as octets, since damaged ones are no UTF-8 any more.
MESSAGE_READ = "key, CAST(id AS BLOB), received_at, size, CAST(file AS BLOB), sum, content_sum, meta, trace, content"
PENDING_READ = (
    "p.key, CAST(p.sink AS BLOB), CAST(p.state AS BLOB), p.priority, p.due, p.expires_at, p.part, p.attempts, p.down, p.person,"
    " p.recipients, CAST(p.note AS BLOB), p.sum"
)


@mypyc_attr(native_class=False)
class DamagedError(Exception):
    """A row or a content file is not what was stored."""


def text(octets: Value) -> str:
    """A text that was read as octets, as far as it can be read."""
    return octets.decode("utf-8", "replace") if isinstance(octets, bytes) else ""


def _plain(value: Any) -> Any:
    # Facts of a check that JSON cannot say must not cost the mail.
    try:
        return sayable(value)
    except TypeError:
        return repr(value)


def pack_message(key: int, message: Message, file: str | None, content_sum: int) -> Columns:
    """The columns of ``MESSAGE_COLUMNS``. Raises TypeError or ValueError for what cannot be
    written down (a lone surrogate)."""
    stored = message.stored
    envelope, client, tls = message.envelope, message.client, message.client.tls
    # Spelled out: orjson takes three times as long over a dataclass with slots.
    told: dict[str, Any] = {
        "mail_from": envelope.mail_from,
        "mail_params": envelope.mail_params,
        "recipients": [[each.address, each.local, each.domain, each.params] for each in envelope.recipients],
        "client": [client.ip, client.port, client.helo, client.protocol, client.user],
        "tls": None if tls is None else [tls.version, tls.cipher, tls.peer],
        "listener": message.listener,
        "checks": message.checks,
        "priority": message.priority,
        "not_before": message.not_before,
        "expires_at": message.expires_at,
        "received_at": message.received_at,
        "size": stored.size,
        "eight_bit": stored.eight_bit,
        "header_size": stored.header_size,
    }
    try:
        meta = orjson.dumps(told, default=_plain, option=OPTION)
    except TypeError:
        # Keys that are no text are rare (facts of a check), and to be ready for them costs twice the time.
        meta = orjson.dumps(told, default=_plain, option=orjson.OPT_NON_STR_KEYS | OPTION)
    content = stored.read() if file is None else None
    sum_ = message_sum(key, message.id, meta, message.trace)
    return (key, message.id, message.received_at, stored.size, file, sum_, content_sum, meta, message.trace, content)


def message_sum(key: int, id: str, meta: bytes, trace: bytes) -> int:
    return crc32(b"".join((id.encode(), meta, trace)), key & 0xFFFFFFFF)


def unpack_message(row: Columns, folder: str) -> Message:
    """The message of a row of ``MESSAGE_READ``. Content in the row is checked here, content in a file by whoever
    reads it first. Raises DamagedError."""
    # Values of any type: what is damaged may be anything, and compiled, a cast to types is a test of them.
    key, id_, _, size, file_, sum_, content_sum, meta, trace, content = cast("tuple[Any, ...]", row)
    id, file = text(id_), None if file_ is None else text(file_)
    if not isinstance(meta, bytes) or not isinstance(trace, bytes):
        raise DamagedError("a column of the message is missing")
    if message_sum(key, id, meta, trace) != sum_:
        raise DamagedError("the checksum of the envelope does not fit")
    told = orjson.loads(meta)
    where: dict[str, Any] = {"octets": content}
    if file is not None:
        if os.path.basename(file) != file or told["size"] != size:
            raise DamagedError("the name of the content file does not fit")
        where = {"path": os.path.join(folder, file), "size": size}
    elif content is None or len(content) != told["size"] or crc32(content) != content_sum:
        raise DamagedError("the checksum of the content does not fit")
    ip, port, helo, protocol, user = told["client"]
    tls = told["tls"]
    return Message(
        id=id,
        envelope=Envelope(told["mail_from"], told["mail_params"], [Recipient(*each) for each in told["recipients"]]),
        stored=Content(**where, eight_bit=told["eight_bit"], header_size=told["header_size"]),
        client=Client(ip, port, helo, protocol, TLS(*tls) if tls else None, user),
        received_at=told["received_at"],
        listener=told["listener"],
        trace=trace,
        checks=told["checks"],
        priority=told["priority"],
        not_before=told["not_before"],
        expires_at=told["expires_at"],
    )


class Entry:
    """What one ticket or mark adds to a group.

    ``changes``: key and what the row is to be, None to delete it. ``splits``: further rows of
    a stored message; ``split_keys`` come back. ``owners``: whose rows are new, and their keys."""

    __slots__ = ("changes", "messages", "owners", "pendings", "split_keys", "splits")

    def __init__(self) -> None:
        self.messages: list[Columns] = []
        self.pendings: list[Columns] = []
        self.owners: list[tuple[Pending, int]] = []
        self.changes: list[tuple[int, Snapshot | None]] = []
        self.splits: list[tuple[int, Snapshot]] = []
        self.split_keys: list[int] = []

    def add(self, key: int, message: Message, pendings: Sequence[Pending], file: str | None, content_sum: int) -> None:
        """A new message and what it owes, whole or not at all; raises as ``pack_message`` does."""
        columns = pack_message(key, message, file, content_sum)
        first = key << SHIFT
        rows = [pack_pending(first | number, pending) for number, pending in enumerate(pendings)]
        self.messages.append(columns)
        self.pendings += rows
        for number, pending in enumerate(pendings):
            self.owners.append((pending, first | number))


class Snapshot:
    """A Pending as it was when the loop spoke of it: the object may change before it is written.
    Raises ValueError for a note or a sink that is not text (a lone surrogate)."""

    __slots__ = ("attempts", "down", "due", "expires_at", "note", "part", "priority", "recipients", "sink", "state")

    def __init__(self, pending: Pending) -> None:
        pending.note.encode()
        pending.sink.encode()
        self.sink = pending.sink
        self.state = pending.state
        self.priority = pending.priority
        self.due = pending.due
        self.expires_at = pending.expires_at
        self.part = pending.part
        self.attempts = pending.attempts
        self.down = pending.down
        self.recipients = orjson.dumps(pending.recipients)
        self.note = pending.note

    def columns(self, key: int) -> Columns:
        sum_ = pending_sum(key, self.sink, self.part, self.recipients)
        return (
            key,
            self.sink,
            self.state,
            self.priority,
            self.due,
            self.expires_at,
            self.part,
            self.attempts,
            int(self.down),
            0,
            self.recipients,
            self.note,
            sum_,
        )


def pack_pending(key: int, pending: Pending) -> Columns:
    """The columns of ``PENDING_COLUMNS`` for a new row. Raises ValueError as a ``Snapshot`` does."""
    note, sink = pending.note, pending.sink
    if note:
        note.encode()
    recipients = orjson.dumps(pending.recipients)
    return (
        key,
        sink,
        pending.state,
        pending.priority,
        pending.due,
        pending.expires_at,
        pending.part,
        pending.attempts,
        int(pending.down),
        0,
        recipients,
        note,
        pending_sum(key, sink, pending.part, recipients),
    )


def pending_sum(key: int, sink: str, part: int, recipients: bytes) -> int:
    """Over what decides who gets it and under which id; the schedule is not guarded."""
    return crc32(recipients + sink.encode(), (key ^ part) & 0xFFFFFFFF)


def unpack_pending(row: Columns, message_id: str) -> Pending:
    """The row of ``PENDING_READ``. Raises DamagedError."""
    key, sink_, state_, priority, due, expires_at, part, attempts, down, _, recipients, note_, sum_ = cast("tuple[Any, ...]", row)
    sink, state, note = text(sink_), cast(Keeping, text(state_)), text(note_)
    if not isinstance(recipients, bytes) or not isinstance(part, int):
        raise DamagedError("a column of the row is missing")
    if pending_sum(key, sink, part, recipients) != sum_:
        raise DamagedError("the checksum of the recipients does not fit")
    return Pending(
        message_id,
        sink,
        tuple(orjson.loads(recipients)),
        due,
        expires_at,
        part,
        attempts,
        priority,
        state,
        note,
        bool(down),
        key,
        key >> SHIFT,
    )
