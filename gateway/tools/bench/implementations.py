"""Who is measured: what an implementation is, the gateway's own parts, and the standard library.

An Implementation turns a task into ``Work``: its answer, and the seconds a pass takes. None opens a socket:
a server gets a connection in memory, so that what is measured is its code and what it stands on (an event loop,
gevent, goroutines), not the kernel.
"""

from __future__ import annotations

import platform
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from email import message_from_bytes, policy
from email.message import EmailMessage
from email.utils import parseaddr
from typing import Any

from ... import __version__
from ..._parser import Receiver
from ...message import Client
from ...mime import parse
from ...reply import Reply
from ...route import Route, Routes
from ...smtp.server import MailContent, MailFinished, MailStarted, Rules, ServerSession
from .tasks import Task, digest

_FINAL = re.compile(rb"^(\d{3})(?: |\r)", re.MULTILINE)


class AbsentError(Exception):
    """This implementation is not here, or cannot run; the text says why."""


class BrokenError(Exception):
    """It cannot do this task (any more); the text says why."""


class Work(ABC):
    """A task, ready to run on one implementation."""

    @abstractmethod
    def answer(self) -> Any:
        """One pass, and what came out, in the form of the kind. Raises BrokenError."""

    @abstractmethod
    def seconds(self, least: float) -> float:
        """What one pass takes, measured over at least ``least`` seconds. Raises BrokenError."""

    def close(self) -> None:
        """Ends what the work had open. Not more than once."""
        return


class Implementation(ABC):
    """``name`` and ``version`` as printed; ``notes``: by kind, what it does not do or does otherwise; ``""``: always.
    ``otherwise``: why it gives other content than it got, where that is known; "" else."""

    name: str
    version: str
    notes: Mapping[str, str]
    otherwise: str = ""

    @abstractmethod
    def work(self, task: Task) -> Work | None:
        """None: it has nothing for this kind. Raises BrokenError."""

    def close(self) -> None:
        """Ends its child process, if it has one."""
        return


class Here(Work):
    """Work of this process: ``once`` is a pass, ``told`` makes the answer of what it gave."""

    def __init__(self, once: Callable[[], Any], told: Callable[[Any], Any], closing: Callable[[], None] = lambda: None) -> None:
        self.once = once
        self._told = told
        self._closing = closing

    def answer(self) -> Any:
        try:
            return self._told(self.first())
        except BrokenError:
            raise
        except Exception as error:
            raise BrokenError(f"{type(error).__name__}: {error}") from error

    def first(self) -> Any:
        return self.once()

    def seconds(self, least: float) -> float:
        once, clock = self.once, time.perf_counter
        times = 1
        while True:
            start = clock()
            for _ in range(times):
                once()
            spent = clock() - start
            if spent >= least:
                return spent / times
            times = max(times * 2, int(times * least / max(spent, 1e-9)))

    def close(self) -> None:
        self._closing()


# ------------------------------------------------------------------------------------ ours

_ACCEPTED = Reply(250, "2.0.0", "accepted")


class Gateway(Implementation):
    name = "gateway"
    version = __version__
    notes: Mapping[str, str] = {}

    def work(self, task: Task) -> Work:
        if task.kind == "commands":
            return Here(lambda: _read_commands(task.wire), commands)
        if task.kind == "content":
            return Here(
                lambda: [_read_content(reads) for reads in task.mails], lambda found: [digest(b"".join(pieces)) for pieces in found]
            )
        if task.kind == "mime":
            return Here(lambda: [parse(content) for content in task.contents], lambda found: [_parsed(one) for one in found])
        return _conversation(task)


def _read_commands(wire: bytes) -> list[Any]:
    receiver = Receiver()
    receiver.feed(wire)
    found = []
    while (command := receiver.command()) is not None:
        if command.fault is None:
            _ = command.local, command.domain, command.ascii, command.argument
        found.append((command.verb, command.address, command.params))
    return found


def _read_content(reads: Sequence[bytes]) -> list[bytes]:
    receiver = Receiver()
    receiver.begin()
    pieces = []
    for octets in reads:
        receiver.feed(octets)
        while (piece := receiver.content()) is not None:
            pieces.append(piece)
    if not receiver.finished or receiver.content_fault:
        raise BrokenError(f"content is not clean: {receiver.content_fault}")
    return pieces


def _parsed(one: Any) -> dict[str, Any]:
    return {
        "subject": one.subject,
        "from": [[box.name, box.address] for box in one.from_],
        "to": [[box.name, box.address] for box in one.to],
        "text": _plain(one.text),
        "html": _plain(one.html),
        "attachments": [{"filename": part.filename, "type": part.content_type, **digest(part.content)} for part in one.attachments],
    }


def _plain(text: str | None) -> str | None:
    """Text as it is compared: line ends and those at its end say nothing."""
    return None if text is None else text.replace("\r\n", "\n").rstrip("\n")


def _conversation(task: Task) -> Here:
    rules = Rules("mx.example.net", Routes([Route(("*",), ("discard",))], "mx.example.net"))
    session = ServerSession(rules, Client("127.0.0.1"), "bench", "bench")
    session.start()
    session.outgoing()
    session.receive(b"EHLO client.example\r\n")
    session.outgoing()

    def once() -> tuple[list[bytes], list[Any]]:
        said: list[bytes] = []
        mails: list[Any] = []
        for reads, _ in task.steps:
            for octets in reads:
                events = session.receive(octets)
                while True:
                    for event in events:
                        if isinstance(event, MailContent):
                            mails[-1][1].append(event.octets)
                        elif isinstance(event, MailStarted):
                            mails.append((event.transaction, []))
                        elif isinstance(event, MailFinished):
                            session.answer(event.number, _ACCEPTED)
                    if not session.more:
                        break
                    events = session.proceed()
                said.append(session.outgoing())
        return said, mails

    def told(found: tuple[list[bytes], list[Any]]) -> Any:
        said, mails = found
        taken = []
        for transaction, pieces in mails:
            envelope = transaction.envelope
            taken.append(mail(envelope.mail_from, [recipient.address for recipient in envelope.recipients], b"".join(pieces)))
        return conversed(task, codes(b"".join(said)), taken)

    return Here(once, told)


def commands(found: Sequence[tuple[str, str | None, Mapping[str, str | None]]]) -> list[dict[str, Any]]:
    """The answer to command lines."""
    return [{"verb": verb, "address": address, "parameters": dict(parameters)} for verb, address, parameters in found]


def mail(sender: str, recipients: Sequence[str], content: bytes) -> dict[str, Any]:
    """One mail of a conversation, as it is compared."""
    return {"from": sender, "to": list(recipients), **digest(content)}


def conversed(task: Task, replies: Sequence[int], mails: Sequence[Mapping[str, Any]]) -> Any:
    """The answer that a conversation gives. Raises BrokenError where something was refused: then the rest is no mail either."""
    refused = next((code for code in replies if code >= 400), None)
    if refused is not None:
        raise BrokenError(f"refuses it with {refused}")
    if task.kind == "content":
        return [{"octets": mail["octets"], "sha256": mail["sha256"]} for mail in mails]
    return {"replies": list(replies), "mails": list(mails)}


def codes(said: bytes) -> list[int]:
    """The codes of these replies."""
    return [int(code) for code in _FINAL.findall(said)]


# -------------------------------------------------------------------------- the standard library


class StandardLibrary(Implementation):
    name = "standard library"
    version = platform.python_version()
    notes: Mapping[str, str] = {
        "commands": "str.split and email.utils.parseaddr: no grammar is held to, nothing is refused",
        "content": "collect, split at CRLF, strip dots, join, as smtpd did: no fault is found, nothing is bounded",
        "dialogue": "has no SMTP server since Python 3.12",
        "mime": "email with policy.default",
    }

    def work(self, task: Task) -> Work | None:
        if task.kind == "commands":
            return Here(lambda: _split_commands(task.wire), commands)
        if task.kind == "content":
            return Here(lambda: [_split_content(reads) for reads in task.mails], lambda found: [digest(content) for content in found])
        if task.kind == "mime":
            return Here(lambda: [_email(content) for content in task.contents], lambda found: [_told(one) for one in found])
        return None


def _split_commands(wire: bytes) -> list[Any]:
    found = []
    for line in wire.split(b"\r\n")[:-1]:
        verb, _, argument = line.decode().partition(" ")
        path, *words = argument.split()
        params = {}
        for word in words:
            keyword, equals, value = word.partition("=")
            params[keyword.upper()] = value if equals else None
        found.append((verb.upper(), parseaddr(path.partition(":")[2])[1], params))
    return found


def _split_content(reads: Sequence[bytes]) -> bytes:
    buffer = bytearray()
    for octets in reads:
        buffer += octets
        # Where the end comes in two reads this still sees it: all is looked at from the end.
        if buffer.endswith(b"\r\n.\r\n"):
            break
    lines = bytes(buffer[:-3]).split(b"\r\n")
    return b"\r\n".join([line[1:] if line.startswith(b".") else line for line in lines])


def _email(content: bytes) -> dict[str, Any]:
    mail = message_from_bytes(content, policy=policy.default)
    bodies: dict[str, str | None] = {"plain": None, "html": None}
    chosen = []
    for kind in bodies:
        body = mail.get_body((kind,))
        if body is not None:
            bodies[kind] = body.get_content()
            chosen.append(body)
    parts = [part for part in mail.walk() if not part.is_multipart() and part not in chosen]
    attachments = []
    for part in parts:
        octets = part.get_payload(decode=True)
        octets = octets if isinstance(octets, bytes) else b""
        attachments.append([part.get_filename(), part.get_content_type(), octets])
    return {
        "subject": str(mail["Subject"] or ""),
        "from": _boxes(mail, "From"),
        "to": _boxes(mail, "To"),
        "text": bodies["plain"],
        "html": bodies["html"],
        "attachments": attachments,
    }


def _told(found: dict[str, Any]) -> dict[str, Any]:
    attachments = [{"filename": name, "type": kind, **digest(octets)} for name, kind, octets in found["attachments"]]
    return {**found, "text": _plain(found["text"]), "html": _plain(found["html"]), "attachments": attachments}


def _boxes(mail: EmailMessage, name: str) -> list[list[str]]:
    return [[box.display_name, box.addr_spec] for field in mail.get_all(name, []) for box in field.addresses]
