"""Real servers for tests: the gateway itself, upstreams, webhook receivers, peers.

Every one runs on loopback, on a free port, with files only in its own folder, and is a context
manager that leaves nothing behind. What waits does so with a deadline and raises TimeoutError
with what was seen instead. All of it blocks: an async test calls it through a thread.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import select
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parent.parent
#: Seconds a test waits for something that should come at once: for ever, but a test that fails must end.
PATIENCE = 60.0
#: Debian keeps Postfix out of an ordinary PATH.
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])


def wait_until(look: Callable[[], object], what: str, timeout: float = PATIENCE) -> None:
    """Returns when ``look`` answers something true."""
    deadline = time.monotonic() + timeout
    while not look():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout:.0f} s")
        time.sleep(0.01)


# Below the range from which the kernel gives ports away, so that nobody is handed one between
# our look and its use; a stretch of its own for every process that runs tests.
_ports = itertools.cycle(range(12000 + os.getpid() % 180 * 100, 12000 + os.getpid() % 180 * 100 + 100))


def free_port() -> int:
    """For servers that cannot be asked to choose one."""
    for port in itertools.islice(_ports, 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise RuntimeError("no free port")


def program(name: str) -> str | None:
    """Where this program is, None if it is not installed."""
    return shutil.which(name, path=SEARCH)


def reachable(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


# ------------------------------------------------------------------- gateway


class GatewayProcess:
    """``python -m gateway serve`` with a configuration of the test's own.

    ``config`` is TOML with listeners on port 0; ``[spool]`` is added if it is not there. ``events``
    are the lines of the event log so far, ``noise`` all else that came on standard error. ``under``:
    a command that runs it, as ``strace -D`` does."""

    def __init__(
        self,
        folder: Path,
        config: str,
        arguments: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        under: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.spool = folder / "spool"
        folder.mkdir(parents=True, exist_ok=True)
        if "[spool]" not in config:
            config += f'\n[spool]\npath = "{self.spool}"\n'
        self.config = folder / "gateway.toml"
        self.config.write_text(config)
        self.events: list[dict[str, Any]] = []
        self.noise: list[str] = []
        self._arguments = list(arguments)
        self._under = list(under)
        self._environment = {**os.environ, **(environment or {})}
        self._news = threading.Condition()
        self._ended = False
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None

    def start(self) -> Self:
        """Returns once the gateway is ready."""
        self.launch()
        self.event("ready")
        return self

    def launch(self) -> None:
        """Starts the process without waiting for it. The events begin anew."""
        self.events, self.noise, self._ended = [], [], False
        self._process = subprocess.Popen(
            [*self._under, sys.executable, "-m", "gateway", "serve", "--config", str(self.config), *self._arguments],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env=self._environment,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        with process.stderr as lines:
            for line in lines:
                try:
                    event = json.loads(line)
                    assert isinstance(event["event"], str)
                except (ValueError, TypeError, KeyError):
                    event = None
                with self._news:
                    if event is None:
                        self.noise.append(line.decode(errors="replace").rstrip())
                    else:
                        self.events.append(event)
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def found(self, name: str, **fields: Any) -> list[dict[str, Any]]:
        """The events of this name so far that have these fields."""
        with self._news:
            return [
                event for event in self.events if event["event"] == name and all(event.get(key) == value for key, value in fields.items())
            ]

    def event(self, name: str, timeout: float = PATIENCE, count: int = 1, **fields: Any) -> dict[str, Any]:
        """Waits for the ``count``-th event of this name with these fields."""
        deadline = time.monotonic() + timeout
        with self._news:
            while len(found := self.found(name, **fields)) < count:
                if self._ended:
                    raise RuntimeError(f"the gateway ended without {name!r} {fields}:\n{self.told()}")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no {name!r} {fields} within {timeout:.0f} s:\n{self.told()}")
                self._news.wait(0.5)
            return found[count - 1]

    def told(self) -> str:
        """The last of what it said, for the message of a failing test."""
        return "\n".join([*self.noise[-30:], *(json.dumps(event) for event in self.events[-30:])])

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def addresses(self) -> list[str]:
        """The real addresses of the listeners, in the order of the file."""
        return [event["address"] for event in self.found("listening")]

    @property
    def port(self) -> int:
        """Of the first listener."""
        return int(self.addresses[0].rpartition(":")[2])

    @property
    def server(self) -> str:
        return self.addresses[0]

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def spare(self, count: int) -> None:
        """Leaves it just so many descriptors, below a limit that counts numbers, not files."""
        used: set[int] = set()
        while used != (used := {int(name) for name in os.listdir(f"/proc/{self.pid}/fd")}):
            time.sleep(0.2)  # one that was open for a moment would count as one more to spare
        free = (number for number in itertools.count() if number not in used)
        limit = next(itertools.islice(free, count, None))
        hard = resource.prlimit(self.pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (limit, hard))

    def stop(self, timeout: float = PATIENCE) -> int:
        """SIGTERM, then its exit code."""
        if self.running:
            self.signal(signal.SIGTERM)
        return self.wait(timeout)

    def kill(self) -> None:
        """kill -9, to the whole process group."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self.wait()

    def wait(self, timeout: float = PATIENCE) -> int:
        assert self._process is not None
        assert self._reader is not None
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            told = self.told()
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            raise TimeoutError(f"the gateway did not end within {timeout:.0f} s:\n{told}") from None
        finally:
            self._reader.join(PATIENCE)
        return code

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: object, *rest: object) -> None:
        """A clean end, unless the test ended it itself; nothing it called a bug stays unseen."""
        code = self.stop() if self.running else 0
        if kind is None:
            bugs = self.found("bug")
            assert not bugs, bugs
            assert code == 0, f"exit code {code}:\n{self.told()}"


# ----------------------------------------------------------- webhook receiver


@dataclass(slots=True)
class Request:
    """One POST. ``headers`` in order, names in lower case."""

    path: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str:
        """The one value; KeyError if it is not there once."""
        values = [value for key, value in self.headers if key == name]
        if len(values) != 1:
            raise KeyError(f"{name} is there {len(values)} times")
        return values[0]

    def json(self) -> Any:
        return json.loads(self.body)


#: What to answer: a status, and header fields to send with it.
HttpAnswer = tuple[int, dict[str, str]]


class HttpReceiver:
    """Records every POST and answers as ``answer`` says (200 unless told otherwise)."""

    def __init__(self, answer: Callable[[Request], HttpAnswer] | None = None, port: int = 0) -> None:
        self.answer = answer or (lambda request: (200, {}))
        self.requests: list[Request] = []
        receiver = self

        class Answering(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Without this every answer waits for the client's delayed ACK.
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = _chunked(self.rfile) if "chunked" in self.headers.get("transfer-encoding", "") else b""
                body = body or self.rfile.read(int(self.headers.get("content-length", 0)))
                request = Request(self.path, [(key.lower(), value) for key, value in self.headers.items()], body)
                receiver.requests.append(request)
                status, headers = receiver.answer(request)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 256

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that goes away is part of many tests

        self._server = Server(("127.0.0.1", port), Answering)
        self._server.block_on_close = False
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}/inbound"

    def wait(self, count: int, timeout: float = PATIENCE) -> list[Request]:
        """All requests, once there are ``count``."""
        wait_until(lambda: len(self.requests) >= count, f"{count} requests", timeout)
        return list(self.requests)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _chunked(stream: BufferedIOBase) -> bytes:
    """A chunked body (RFC 9112 §7.1)."""
    body = b""
    while size := int(stream.readline().split(b";")[0], 16):
        body += stream.read(size)
        stream.readline()
    while stream.readline() not in (b"\r\n", b""):
        pass
    return body


# ------------------------------------------------------------- SMTP upstream


@dataclass(slots=True)
class Taken:
    """One mail as an upstream read it. ``mail`` and ``recipients``: the lines as sent, after the
    colon. ``content``: unstuffed. ``chunks``: how many BDAT, 0 for DATA."""

    helo: str
    mail: str
    recipients: list[str]
    content: bytes
    chunks: int = 0


EVERYTHING = ("PIPELINING", "SIZE 104857600", "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES", "CHUNKING", "BINARYMIME", "DSN")


class Upstream:
    """An SMTP or LMTP server that reads the wire in the plainest way and keeps every octet.

    ``offers``: what EHLO lists. ``refuse``: the beginning of a line ("RCPT TO:<x@", "DATA", "." for
    the end of data) to the reply it gets instead of the usual one. An independent reading:
    nothing of the gateway is used."""

    def __init__(self, offers: Sequence[str] = EVERYTHING, lmtp: bool = False, port: int = 0) -> None:
        self.offers = offers
        self.lmtp = lmtp
        self.refuse: dict[str, str] = {}
        self.taken: list[Taken] = []
        self.lines: list[str] = []
        self.connections = 0
        upstream = self

        class Talking(socketserver.StreamRequestHandler):
            disable_nagle_algorithm = True

            def handle(self) -> None:
                upstream.connections += 1
                with suppress(OSError):
                    _Dialogue(upstream, self.rfile, self.connection).talk()

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True
            block_on_close = False
            request_queue_size = 256

        self._server = Server(("127.0.0.1", port), Talking)
        self.port = int(self._server.server_address[1])
        self.address = f"127.0.0.1:{self.port}"

    def accept(self) -> socket.socket:
        """The next connection, as long as this is not entered: nobody talks on it."""
        ready, _, _ = select.select([self._server.socket], [], [], PATIENCE)
        if not ready:
            raise TimeoutError(f"nobody connected within {PATIENCE:.0f} s")
        return self._server.socket.accept()[0]

    def wait(self, count: int, timeout: float = PATIENCE) -> list[Taken]:
        wait_until(lambda: len(self.taken) >= count, f"{count} mails", timeout)
        return list(self.taken)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclass(slots=True)
class _Dialogue:
    upstream: Upstream
    stream: BufferedIOBase
    connection: socket.socket
    helo: str = ""
    mail: str = ""
    recipients: list[str] = field(default_factory=list)
    content: bytes = b""
    chunks: int = 0

    def say(self, reply: str) -> None:
        self.connection.sendall(reply.encode() + b"\r\n")

    def talk(self) -> None:
        self.say("220 upstream.test ESMTP")
        while line := self.stream.readline():
            assert line.endswith(b"\r\n"), line
            text = line[:-2].decode()
            self.upstream.lines.append(text)
            verb, _, argument = text.partition(" ")
            refusal = self._refusal(text)
            match verb.upper():
                case "EHLO" | "LHLO" if not refusal:
                    self.helo = argument
                    lines = ["upstream.test", *self.upstream.offers]
                    self.say("\r\n".join(f"250{'-' if i < len(lines) - 1 else ' '}{offer}" for i, offer in enumerate(lines)))
                case "HELO" if not refusal:
                    self.helo = argument
                    self.say("250 upstream.test")
                case "MAIL" if not refusal:
                    self._forget()
                    self.mail = argument.partition(":")[2]
                    self.say("250 2.1.0 sender is good")
                case "RCPT" if not refusal:
                    self.recipients.append(argument.partition(":")[2])
                    self.say("250 2.1.5 recipient is good")
                case "DATA":
                    if refusal or not self.recipients:
                        self.say(refusal or "554 5.5.1 no valid recipients")
                    else:
                        self.say("354 go on")
                        self._data()
                        self._done()
                case "BDAT":
                    self._bdat(argument, refusal)
                case "RSET" if not refusal:
                    self._forget()
                    self.say("250 2.0.0 forgotten")
                case "QUIT" if not refusal:
                    self.say("221 2.0.0 bye")
                    return
                case "NOOP" if not refusal:
                    self.say("250 2.0.0 here")
                case _:
                    self.say(refusal or "500 5.5.2 what?")

    def _refusal(self, line: str) -> str | None:
        return next((reply for start, reply in self.upstream.refuse.items() if line.upper().startswith(start.upper())), None)

    def _data(self) -> None:
        whole = True  # the line before ended in CRLF
        pieces = []
        while (line := self.stream.readline()) and not (whole and line == b".\r\n"):
            pieces.append(line[1:] if whole and line.startswith(b".") else line)
            whole = line.endswith(b"\r\n")
        if not line:
            raise ConnectionError
        self.content = b"".join(pieces)

    def _bdat(self, argument: str, refusal: str | None) -> None:
        size, _, last = argument.partition(" ")
        octets = self.stream.read(int(size))
        if len(octets) < int(size):
            raise ConnectionError
        if refusal or not self.recipients:
            self.say(refusal or "503 5.5.1 no valid recipients")
            return
        self.content += octets
        self.chunks += 1
        if last.upper() == "LAST":
            self._done()
        else:
            self.say("250 2.0.0 more")

    def _done(self) -> None:
        refusal = self._refusal(".")
        if not refusal:
            self.upstream.taken.append(Taken(self.helo, self.mail, self.recipients, self.content, self.chunks))
        for _ in self.recipients if self.upstream.lmtp else self.recipients[:1]:
            self.say(refusal or "250 2.0.0 taken")
        self._forget()

    def _forget(self) -> None:
        self.mail, self.recipients, self.content, self.chunks = "", [], b"", 0


# ---------------------------------------------------------------- a client


class Client:
    """An SMTP client that says just what it is told and puts content on the wire by itself."""

    def __init__(self, server: str, timeout: float = PATIENCE) -> None:
        host, _, port = server.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=timeout)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._stream = self._socket.makefile("rb")
        self.greeting = self.reply()
        self.offers = self.command("EHLO client.example").split("\n")[1:]

    def reply(self) -> str:
        """``250 text``; further lines after ``\\n``."""
        lines = []
        while line := self._stream.readline():
            lines.append(line[4:].rstrip(b"\r\n").decode())
            if line[3:4] != b"-":
                return f"{line[:3].decode()} " + "\n".join(lines)
        raise ConnectionError("the server closed the connection")

    def send(self, octets: bytes) -> None:
        self._socket.sendall(octets)

    def command(self, line: str) -> str:
        self.send(line.encode() + b"\r\n")
        return self.reply()

    def mail(self, sender: str, recipients: Sequence[str], content: bytes, how: str = "DATA", parameters: str = "") -> str:
        """One transaction; the reply to the end of data, or the first one that refused.

        ``how``: DATA, or BDAT in chunks of that many octets (``BDAT 1000``)."""
        for line in (f"MAIL FROM:<{sender}>{parameters}", *(f"RCPT TO:<{recipient}>" for recipient in recipients)):
            if not (reply := self.command(line)).startswith("250"):
                return reply
        if how == "DATA":
            if not (reply := self.command("DATA")).startswith("354"):
                return reply
            lines = content.split(b"\r\n")
            stuffed = b"\r\n".join(b"." + line if line.startswith(b".") else line for line in lines)
            self.send(stuffed + (b".\r\n" if not content or content.endswith(b"\r\n") else b"\r\n.\r\n"))
            return self.reply()
        size = int(how.partition(" ")[2])
        pieces = [content[start : start + size] for start in range(0, len(content), size)] or [b""]
        for number, piece in enumerate(pieces, 1):
            last = " LAST" if number == len(pieces) else ""
            self.send(f"BDAT {len(piece)}{last}\r\n".encode() + piece)
            if not (reply := self.reply()).startswith("250"):
                break
        return reply

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(OSError):
            self.command("QUIT")
        self._stream.close()
        self._socket.close()


_DATE = rb"[A-Z][a-z]{2}, \d\d? [A-Z][a-z]{2} \d{4} [\d:]{8} [+-]\d{4}(?: \(\w+\))?\r\n"
_RETURN_PATH = rb"(?:Return-Path:[^\r\n]*\r\n)?"
#: Up to its date: the content may begin with a line that looks like a continuation.
_TRACE = re.compile(_RETURN_PATH + rb"Received:[^\r\n]*?(?:\r\n[ \t][^\r\n]*?)*?" + _DATE)
_DATELESS = re.compile(_RETURN_PATH + rb"Received:[^\r\n]*\r\n(?:[ \t][^\r\n]*\r\n)*")


def without_trace(octets: bytes) -> bytes:
    """What is below the topmost ``Received``."""
    match = _TRACE.match(octets) or _DATELESS.match(octets)
    return octets[match.end() :] if match else octets


# --------------------------------------------------------------------- peers


@dataclass(slots=True)
class SmtpSink:
    """Postfix's ``smtp-sink``, which dumps every mail into a file of its own."""

    port: int
    folder: Path
    pid: int

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def wait(self, count: int, timeout: float = PATIENCE) -> list[bytes]:
        """The contents as dumped: line ends are LF, and its own ``X-…`` fields and ``Received`` are gone."""

        wait_until(lambda: len(list(self.folder.iterdir())) >= count and not self._writes(), f"{count} mails at smtp-sink", timeout)
        return [_dumped(path.read_bytes()) for path in sorted(self.folder.iterdir())]

    def _writes(self) -> bool:
        """A file is there from MAIL on, and holds next to nothing until the end of data closes it."""
        for descriptor in Path(f"/proc/{self.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                if descriptor.readlink().is_relative_to(self.folder.resolve()):
                    return True
        return False


def _dumped(octets: bytes) -> bytes:
    lines = octets.split(b"\n")
    start = next(i for i, line in enumerate(lines) if line.startswith(b"Received: from") and b"smtp-sink" in lines[i + 1])
    while lines[start + 1].startswith((b"\t", b" ")):
        start += 1
    # It ends every dump with an empty line of its own.
    return b"\n".join(lines[start + 1 :]).removesuffix(b"\n")


@contextmanager
def smtp_sink(folder: Path, *options: str) -> Iterator[SmtpSink]:
    """Runs smtp-sink; FileNotFoundError if it is not installed."""
    path = program("smtp-sink")
    if path is None:
        raise FileNotFoundError("smtp-sink")
    dumps = folder / "dumps"
    dumps.mkdir(parents=True)
    port = free_port()
    user = ["-u", "root"] if os.geteuid() == 0 else []
    process = subprocess.Popen(
        [path, *user, *options, "-d", f"{dumps}/%s.", f"127.0.0.1:{port}", "256"], stdin=subprocess.DEVNULL, cwd=folder
    )
    try:
        wait_until(lambda: reachable(port), "smtp-sink")
        yield SmtpSink(port, dumps, process.pid)
    finally:
        process.terminate()
        process.wait(PATIENCE)


MASTER = """\
{port} inet n - n - - smtpd
pickup unix n - n 60 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
proxywrite unix - - n - 1 proxymap
smtp unix - - n - - smtp
lmtp unix - - n - - lmtp
relay unix - - n - - smtp
showq unix n - n - - showq
error unix - - n - - error
retry unix - - n - - error
discard unix - - n - - discard
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
postlog unix-dgram n - n - 1 postlogd
"""

MAIN = """\
compatibility_level = 3.6
queue_directory = {folder}/queue
data_directory = {folder}/data
maillog_file = {folder}/log/mail.log
maillog_file_prefixes = {folder}
command_directory = {commands}
daemon_directory = {daemons}
mail_owner = postfix
setgid_group = postdrop
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
myhostname = postfix.test
myorigin = postfix.test
mydestination =
mynetworks = 127.0.0.0/8
local_transport = error:nothing is local here
default_transport = smtp:[127.0.0.1]:{next_port}
smtp_dns_support_level = disabled
smtpd_relay_restrictions = permit_mynetworks, reject
smtputf8_enable = yes
smtpd_peername_lookup = no
message_size_limit = 104857600
mailbox_size_limit = 0
minimal_backoff_time = 1s
maximal_backoff_time = 2s
queue_run_delay = 1s
smtp_line_length_limit = 0
line_length_limit = 1000000
header_size_limit = 1000000
local_header_rewrite_clients =
alias_maps =
alias_database =
notify_classes =
"""


class Postfix:
    """A Postfix of the test's own: it takes mail on ``port`` and passes all of it to ``next_port``.

    Postfix wants root, folders that its own user can reach, and short paths for its sockets:
    the folder lies right under the temporary one."""

    def __init__(self, next_port: int, settings: str = "") -> None:
        self.port = free_port()
        self._postfix = program("postfix")
        self._next_port = next_port
        self._settings = settings
        self.folder = Path()
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def missing() -> str | None:
        """Why it cannot run here, None if it can."""
        if program("postfix") is None:
            return "Postfix is not installed"
        return None if os.geteuid() == 0 else "Postfix wants root"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def log(self) -> str:
        path = self.folder / "log" / "mail.log"
        return path.read_text() if path.exists() else ""

    def __enter__(self) -> Self:
        assert self._postfix is not None
        self.folder = Path(tempfile.mkdtemp(prefix="postfix-"))
        self.folder.chmod(0o755)
        for name in ("conf", "queue", "data", "log"):
            (self.folder / name).mkdir()
        shutil.chown(self.folder / "data", "postfix")
        daemons = next(path for path in ("/usr/lib/postfix/sbin", "/usr/libexec/postfix") if Path(path, "master").exists())
        (self.folder / "conf" / "main.cf").write_text(
            MAIN.format(folder=self.folder, commands=Path(self._postfix).parent, daemons=daemons, next_port=self._next_port)
            + self._settings
        )
        (self.folder / "conf" / "master.cf").write_text(MASTER.format(port=f"127.0.0.1:{self.port}"))
        self._run("check")
        self._process = subprocess.Popen(
            [self._postfix, "-c", str(self.folder / "conf"), "start-fg"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_until(lambda: reachable(self.port), "Postfix")
        except TimeoutError:
            log = self.log()
            self.__exit__()
            raise TimeoutError(f"Postfix does not listen:\n{log}") from None
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process is not None
        self._run("abort")
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, word: str) -> None:
        assert self._postfix is not None
        subprocess.run(
            [self._postfix, "-c", str(self.folder / "conf"), word],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=PATIENCE,
            check=False,
        )


def maildir(folder: Path) -> list[bytes]:
    """The mails in a Maildir, in the order of their names."""
    new = folder / "new"
    return [path.read_bytes() for path in sorted(new.iterdir())] if new.is_dir() else []


def mails(folder: Path, count: int) -> list[bytes]:
    """The mails in a Maildir, as soon as there are as many as that, and no more than that.

    A 250 does not say that a mail is there already: where the disk needed longer than `spool.hold`, it is stored and goes on later.
    """
    wait_until(lambda: len(maildir(folder)) >= count, f"{count} mails in {folder}")
    found = maildir(folder)
    assert len(found) == count, found
    return found
