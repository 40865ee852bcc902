"""Content taken apart, and made into payloads.

``parse`` turns octets into a ``Parsed``; importing this gives ``Message.parsed()`` its reader.
``words`` (charsets, encoded words) ← ``fields`` (header syntax) ← ``parts`` (structure);
``formats`` turns a message into what a sink sends.

Sans I/O: no clock, no file, no loop. Whatever the octets: no exception, bounded memory, time
linear in their size. Large contents belong in a thread all the same.
"""

from __future__ import annotations

from ..message import Message, read_with
from .fields import Mailbox
from .parts import Attachment, Parsed, parse

__all__ = ["Attachment", "Mailbox", "Parsed", "parse", "parse_message"]


def parse_message(message: Message) -> Parsed:
    """The content of a Message taken apart (reads a file where it lies in one)."""
    return parse(message.content)


read_with(parse_message)
