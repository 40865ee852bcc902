"""Whom the gateway is measured beside: whatever of this is installed.

aiosmtpd and python-slimta run here, each with a connection in memory; Node's smtp-server (``node.cjs``) and
go-smtp (``go/``) run in a child process that measures itself: this process only says when, so that runs can be
interleaved. Nothing is downloaded: what is not here is told as absent, with the reason.

A child reads a JSON object a line and answers each with one: ``{"task": …}`` ``{}``; ``{"answer": true}``
``{"answer": …}``; ``{"seconds": s}`` ``{"seconds": of a pass}``; and ``{"broken": why}`` to any of them. Octets are base64.
"""

from __future__ import annotations

import asyncio
import base64
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from .implementations import (
    AbsentError,
    BrokenError,
    Gateway,
    Here,
    Implementation,
    StandardLibrary,
    Work,
    codes,
    commands,
    conversed,
    mail,
)
from .tasks import Task

HERE = Path(__file__).parent
#: Seconds after which a peer that gives no answer is given up, on top of what it was told to take.
PATIENCE = 20.0
#: Seconds that building go-smtp may take.
BUILDING = 300.0

#: How Python and Node name what ended them, amid the lines that say where.
_ERROR = re.compile(r"[\w.]*(?:Error|Exception): ")
_FINAL = re.compile(rb"^\d{3}(?: |\r)", re.MULTILINE)


def implementations() -> tuple[list[Implementation], dict[str, str]]:
    """Those that are here, ours first, and why the others are not, by name."""
    present: list[Implementation] = []
    absent: dict[str, str] = {}
    for kind in (Gateway, StandardLibrary, Aiosmtpd, Slimta, Node, Go):
        try:
            present.append(kind())
        except AbsentError as error:
            absent[kind.name] = str(error)
    return present, absent


def _module(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what its dependencies deprecate is no matter of ours
            return importlib.import_module(name)
    except Exception as error:  # a package may break in any way, and then it is not here
        raise AbsentError(f"{type(error).__name__}: {error}") from error


def _told(task: Task, found: tuple[list[bytes], list[Any]]) -> Any:
    said, mails = found
    taken = [mail(sender, recipients, bytes(content)) for sender, recipients, content in mails]
    return conversed(task, codes(b"".join(said)), taken)


# ------------------------------------------------------------------------------ aiosmtpd


class Aiosmtpd(Implementation):
    name = "aiosmtpd"
    notes: Mapping[str, str] = {
        "": "on uvloop",
        "commands": "its _getaddr and _getparams; the address as email's header parser reads it",
        "content": "through a whole transaction, MAIL and RCPT included",
        "mime": "reads none",
    }

    def __init__(self) -> None:
        self._smtp = _module("aiosmtpd.smtp").SMTP
        self.version = importlib.metadata.version("aiosmtpd")

    def work(self, task: Task) -> Work | None:
        if task.kind == "mime":
            return None
        loop = uvloop.new_event_loop()
        if task.kind == "commands":
            smtp = self._smtp(object(), enable_SMTPUTF8=True, hostname="peer", loop=loop)
            return Here(lambda: _aiosmtpd_commands(smtp, task.wire), commands, loop.close)
        keeper = _Keeper()
        smtp = self._smtp(keeper, enable_SMTPUTF8=True, hostname="peer", loop=loop)
        transport = _Memory(loop)

        async def begin() -> None:
            smtp.connection_made(transport)
            await transport.replies(1)
            smtp.data_received(b"EHLO client.example\r\n")
            await transport.replies(1)

        async def go() -> tuple[list[bytes], list[Any]]:
            keeper.mails, transport.said = [], []
            for reads, replies in task.steps:
                for octets in reads:
                    if transport.paused:
                        await transport.resumed()
                    smtp.data_received(octets)
                await transport.replies(replies)
            return transport.said, keeper.mails

        def once() -> tuple[list[bytes], list[Any]]:
            return loop.run_until_complete(go())

        def close() -> None:
            transport.close()
            smtp.connection_lost(None)
            # Its own task is cancelled then, and wants a turn to notice.
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()

        loop.run_until_complete(begin())
        return Patient(once, partial(_told, task), close, lambda: loop.run_until_complete(asyncio.wait_for(go(), PATIENCE)))


class Patient(Here):
    """The first pass is not waited for without end."""

    def __init__(self, once: Any, told: Any, closing: Any, first: Any) -> None:
        super().__init__(once, told, closing)
        self._first = first

    def first(self) -> Any:
        try:
            return self._first()
        except TimeoutError:
            raise BrokenError("it gives no answer") from None


class _Keeper:
    """The handler: keeps what it is given, as ours does."""

    def __init__(self) -> None:
        self.mails: list[Any] = []

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802 - aiosmtpd calls it so
        self.mails.append((envelope.mail_from, envelope.rcpt_tos, envelope.content))
        return "250 2.0.0 accepted"


class _Memory(asyncio.Transport):
    """The server's end of a connection that is no socket."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__({"peername": ("127.0.0.1", 1)})
        self.said: list[bytes] = []
        self.paused = False
        self._loop = loop
        self._owed = 0
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None

    def write(self, data: Any) -> None:
        octets = bytes(data)
        self.said.append(octets)
        self._owed -= len(_FINAL.findall(octets))
        self._wake(self._owed <= 0 and not self.paused)

    async def replies(self, count: int) -> None:
        """Waits until so many more replies were said since the last wait."""
        self._owed += count
        while self._owed > 0:
            await self._turn()

    async def resumed(self) -> None:
        while self.paused:
            await self._turn()

    async def _turn(self) -> None:
        self._waiter = self._loop.create_future()
        await self._waiter

    def _wake(self, due: bool) -> None:
        if due and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False
        self._wake(True)

    def is_closing(self) -> bool:
        return self._closed

    def close(self) -> None:
        self._closed = True
        self._owed = 0
        self._wake(True)


def _aiosmtpd_commands(smtp: Any, wire: bytes) -> list[Any]:
    # As _handle_client, smtp_MAIL and smtp_RCPT take a line apart, without their replies.
    found = []
    for line in wire.split(b"\r\n")[:-1]:
        verb, _, argument = line.partition(b" ")
        keyword = "FROM:" if verb.upper() == b"MAIL" else "TO:"
        text = smtp._strip_command_keyword(keyword, argument.decode("utf-8", "surrogateescape").strip())
        address, rest = smtp._getaddr(text)
        params = smtp._getparams(rest.upper().split())
        found.append((verb.decode("ascii").upper(), address, {key: None if value is True else value for key, value in params.items()}))
    return found


# -------------------------------------------------------------------------- python-slimta


class Slimta(Implementation):
    name = "python-slimta"
    notes: Mapping[str, str] = {
        "commands": "takes no command line apart by itself",
        "content": "through a whole transaction, MAIL and RCPT included; reads of 4 KiB at most",
        "dialogue": "each pass begins with a greeting and EHLO",
        "mime": "reads none",
    }

    def __init__(self) -> None:
        self._server = _module("slimta.smtp.server").Server
        self.version = importlib.metadata.version("python-slimta")

    def work(self, task: Task) -> Work | None:
        if task.kind not in ("content", "dialogue"):
            return None
        steps = [([], 1), ([b"EHLO client.example\r\n"], 1), *task.steps]

        def once() -> tuple[list[bytes], list[Any]]:
            wire, handlers = _Script(steps), _SlimtaHandlers()
            try:
                self._server(wire, handlers, address=("127.0.0.1", 1)).handle()
            except _ScriptEnd:
                return wire.said[2:], handlers.mails
            raise BrokenError("it ended the conversation")

        return Here(once, partial(_told, task))


class _ScriptEnd(BaseException):
    """The client has said everything."""


class _Script:
    """A socket, as far as slimta asks it: gives what the client says next once it heard what it waited for."""

    def __init__(self, steps: Sequence[tuple[list[bytes], int]]) -> None:
        self.said: list[bytes] = []
        self._steps = iter(steps)
        self._reads: list[bytes] = []
        self._owed = 0

    def fileno(self) -> int:
        return -1

    def recv(self, size: int) -> bytes:
        while not self._reads:
            if self._owed > 0:
                raise BrokenError(f"{self._owed} replies did not come")
            reads, owed = next(self._steps, (None, 0))
            if reads is None:
                raise _ScriptEnd
            self._owed += owed
            self._reads = [octets[at : at + size] for octets in reversed(reads) for at in reversed(range(0, len(octets), size))]
        return self._reads.pop()

    def sendall(self, octets: bytes) -> None:
        self.said.append(octets)
        self._owed -= len(_FINAL.findall(octets))


class _SlimtaHandlers:
    """What slimta calls at each command (its names)."""

    def __init__(self) -> None:
        self.mails: list[Any] = []
        self._sender = ""
        self._recipients: list[str] = []

    def MAIL(self, reply: Any, address: str, params: Any) -> None:  # noqa: N802 - slimta calls it so
        self._sender, self._recipients = address, []

    def RCPT(self, reply: Any, address: str, params: Any) -> None:  # noqa: N802 - slimta calls it so
        self._recipients.append(address)

    def HAVE_DATA(self, reply: Any, data: bytes | None, error: Exception | None) -> None:  # noqa: N802 - slimta calls it so
        self.mails.append((self._sender, self._recipients, data or b""))


# ------------------------------------------------------------------------- in a child process


class Child:
    """A peer in a process of its own, asked one thing at a time."""

    def __init__(self, command: Sequence[str], patience: float = PATIENCE) -> None:
        self._patience = patience
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - close() closes it
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, bufsize=0)
        self._buffer = b""

    def ask(self, question: dict[str, Any], seconds: float = 0.0) -> dict[str, Any]:
        """Raises BrokenError for what it says so, when it is gone or when it says nothing (then it is ended)."""
        timer = threading.Timer(seconds + self._patience, self._process.kill)
        timer.start()
        try:
            self._say(json.dumps(question).encode() + b"\n")
            line = self._line()
        finally:
            timer.cancel()
        answer: dict[str, Any] = json.loads(line)
        if "broken" in answer:
            raise BrokenError(str(answer["broken"]))
        return answer

    def _say(self, octets: bytes) -> None:
        assert self._process.stdin is not None
        view = memoryview(octets)
        try:
            while view:
                view = view[self._process.stdin.write(view) or 0 :]
        except OSError:
            raise BrokenError(self._last_words()) from None

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        while b"\n" not in self._buffer:
            octets = self._process.stdout.read(1 << 20)
            if not octets:
                raise BrokenError(self._last_words())
            self._buffer += octets
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        error = next((line for line in lines if _ERROR.match(line)), lines[-1] if lines else "")
        return error.strip() or f"its process ended with {code}"

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(2)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


class _Asked(Work):
    def __init__(self, child: Child, task: Task) -> None:
        self._child = child
        self._task = task
        child.ask(
            {
                "task": {
                    "kind": task.kind,
                    "wire": _base64(task.wire),
                    "mails": [[_base64(octets) for octets in reads] for reads in task.mails],
                    "steps": [[[_base64(octets) for octets in reads], replies] for reads, replies in task.steps],
                }
            }
        )

    def answer(self) -> Any:
        answer = self._child.ask({"answer": True})["answer"]
        return answer if isinstance(answer, list) else conversed(self._task, answer["replies"], answer["mails"])

    def seconds(self, least: float) -> float:
        return float(self._child.ask({"seconds": least}, least)["seconds"])


def _base64(octets: bytes) -> str:
    return base64.b64encode(octets).decode()


class Node(Implementation):
    name = "smtp-server (Node)"
    notes: Mapping[str, str] = {
        "commands": "its _parseAddressCommand",
        "content": "its SMTPStream by itself",
        "mime": "reads none",
    }

    def __init__(self) -> None:
        program = shutil.which("node")
        if program is None:
            raise AbsentError("there is no node")
        self._child = Child([program, str(HERE / "node.cjs")])
        try:
            told = self._child.ask({"version": True})
        except BrokenError as error:
            self._child.close()
            raise AbsentError(f"{error} (looked for from this folder and in NODE_PATH)") from None
        self.version = f"{told['version']}, node {told['node']}"

    def work(self, task: Task) -> Work | None:
        return None if task.kind == "mime" else _Asked(self._child, task)

    def close(self) -> None:
        self._child.close()


class Go(Implementation):
    name = "go-smtp"
    notes: Mapping[str, str] = {
        "commands": "takes no command line apart by itself",
        "content": "through a whole transaction, MAIL and RCPT included",
        "dialogue": "over net.Pipe, its two ends goroutines on one core",
        "mime": "reads none",
    }

    def __init__(self) -> None:
        program = shutil.which("go")
        if program is None:
            raise AbsentError("there is no go")
        self._folder = tempfile.TemporaryDirectory(prefix="gateway-bench-")
        try:
            self.version = self._build(program, Path(self._folder.name))
            self._child = Child([str(Path(self._folder.name) / "peer")])
        except (AbsentError, OSError, subprocess.TimeoutExpired) as error:
            self._folder.cleanup()
            raise AbsentError(str(error)) from None

    def work(self, task: Task) -> Work | None:
        return _Asked(self._child, task) if task.kind in ("content", "dialogue") else None

    def close(self) -> None:
        self._child.close()
        self._folder.cleanup()

    def _build(self, program: str, folder: Path) -> str:
        """From the newest go-smtp in the module cache, else from GOPATH (where Debian's package lies); its version."""

        def go(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [program, *arguments],
                cwd=folder,
                env={**os.environ, "GOPROXY": "off", "GOFLAGS": "", "GOTOOLCHAIN": "local", **environment},
                capture_output=True,
                text=True,
                timeout=BUILDING,
                check=False,
            )

        for source in (HERE / "go").glob("*.go"):
            shutil.copy(source, folder)
        compiler = go("env", "GOVERSION").stdout.strip()
        cache = Path(go("env", "GOMODCACHE").stdout.strip() or "/nonexistent") / "github.com" / "emersion"
        found = sorted(cache.glob("go-smtp@v*"), key=lambda path: [int(word) for word in re.findall(r"\d+", path.name)])
        why = "no go-smtp in the module cache"
        if found:
            version = found[-1].name.partition("@")[2]
            (folder / "go.mod").write_text(f"module bench\n\ngo 1.18\n\nrequire github.com/emersion/go-smtp {version}\n")
            built = go("build", "-mod=mod", "-o", "peer", ".", GO111MODULE="on", GOSUMDB="off")
            if built.returncode == 0:
                return f"{version.lstrip('v')}, {compiler}"
            why = _first_error(built.stderr)
            (folder / "go.mod").unlink()
        gopath = os.pathsep.join(path for path in (go("env", "GOPATH").stdout.strip(), "/usr/share/gocode") if path)
        for tags in ("", "before013"):
            built = go("build", "-tags", tags, "-o", "peer", ".", GO111MODULE="off", GOPATH=gopath)
            if built.returncode == 0:
                if tags:
                    self.otherwise = "before 0.13 go-smtp gives its backend LF line ends, an octet less for each line"
                return f"of GOPATH{', before 0.13' if tags else ''}, {compiler}"
        raise AbsentError(f"{why}; in GOPATH: {_first_error(built.stderr)}")


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return lines[0] if lines else "go build says nothing"
