"""Who stands beside the gateway: what each is, how it is installed, started and configured.

npm and pip install into ``build/peers`` (``node``, ``python``) what `package.json` and
`requirements.txt` here name; Postfix, Node and npm are the system's. A peer that is not there or does
not start has a row that says so. Each runs as its makers would have it for speed, and no kinder: one
process on the core (Postfix: its own), no TLS, no DNS, no checks that cost, logging where it is part
of the product (Postfix). What each one promises with its 250 stands in ``Peer.promise``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import stage
from ..stage import ROOT, SERVER_CORE, Failed, Server, free_port, listens, program, running

HERE = Path(__file__).parent
FOLDER = ROOT / "build" / "peers"
#: Seconds for npm or pip.
INSTALL = 600.0


@dataclass(frozen=True)
class Place:
    """Where a server is to stand: its own folder; the far side's port (nobody listens there in ``durable``)."""

    mode: str
    folder: Path
    far: int
    sessions: int


Start = Callable[[Place], contextlib.AbstractContextManager[Server]]


@dataclass(frozen=True)
class Peer:
    name: str
    modes: Sequence[str]
    promise: str
    start: Start
    #: Answers why it is not here, or None.
    absent: Callable[[], str | None]
    #: Seconds of its own CPU after which it is as fast as it gets (Node compiles what is hot, and looks on for long).
    warm: float = 0.5


# ------------------------------------------------------------------- install


def _installed(folder: Path, wanted: Path, commands: Sequence[Sequence[str]]) -> str | None:
    """Runs the commands in ``folder`` unless ``wanted`` was installed there before. Answers what went wrong."""
    mark = folder / ".installed"
    if mark.exists() and mark.read_bytes() == wanted.read_bytes():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(wanted, folder)
    for command in commands:
        try:
            done = subprocess.run(
                command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=INSTALL
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{Path(command[0]).name}: {error}"
        if done.returncode:
            lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip() and "warn" not in line.lower()]
            return f"{Path(command[0]).name} {command[1]}: {(lines or ['exit code ' + str(done.returncode)])[-1][:300]}"
    mark.write_bytes(wanted.read_bytes())
    return None


def install() -> dict[str, str]:
    """Brings what npm and pip can into ``build/peers``: what went wrong, by kind. Once; then it is there."""
    faults = {}
    python = FOLDER / "python"
    pip = [str(python / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", "requirements.txt"]
    if fault := _installed(python, HERE / "requirements.txt", [[sys.executable, "-m", "venv", str(python)], pip]):
        faults["python"] = fault
    npm = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--no-save", "--loglevel", "error"]
    if fault := _installed(FOLDER / "node", HERE / "package.json", [npm]):
        faults["node"] = fault
    return faults


def _no_python() -> str | None:
    return None if (FOLDER / "python" / ".installed").exists() else "pip could not install it (python -m bench.end_to_end --install)"


def _no_node() -> str | None:
    if shutil.which("node", path=stage.SEARCH) is None:
        return "Node is not installed (Debian: apt install nodejs npm)"
    return None if (FOLDER / "node" / ".installed").exists() else "npm could not install it (python -m bench.end_to_end --install)"


def _no_smtp_sink() -> str | None:
    return None if shutil.which("smtp-sink", path=stage.SEARCH) else "smtp-sink is not installed (Debian: apt install postfix)"


def _no_postfix() -> str | None:
    if shutil.which("postfix", path=stage.SEARCH) is None:
        return "Postfix is not installed (Debian: apt install postfix)"
    return None if os.geteuid() == 0 else "Postfix wants root"


@functools.cache
def versions() -> dict[str, str]:
    """Of everything that can be beside us, by its name; what is not here is left out."""
    found = {"CPython": platform.python_version(), "kernel": platform.release()}

    def say(name: str, command: Sequence[str]) -> None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            found[name] = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip().splitlines()[-1]

    say("gateway", [str(Path(sys.executable).with_name("gateway")), "--version"])
    say("revision", ["git", "-C", str(ROOT), "describe", "--always", "--dirty"])
    ours = [path.relative_to(ROOT / "gateway") for path in (ROOT / "gateway").rglob("*.so") if "__mypyc" not in path.name]
    found["compiled modules of ours"] = ", ".join(sorted(str(path).partition(".")[0].replace("/", ".") for path in ours))
    if postconf := shutil.which("postconf", path=stage.SEARCH):
        say("Postfix", [postconf, "-d", "-h", "mail_version"])
    if node := shutil.which("node", path=stage.SEARCH):
        say("Node", [node, "--version"])
    for name in ("Haraka", "smtp-server", "nodemailer", "undici"):
        with contextlib.suppress(OSError):
            found[name] = json.loads((FOLDER / "node" / "node_modules" / name / "package.json").read_text())["version"]
    for name in ("aiosmtpd", "aiosmtplib", "aiohttp", "python-slimta", "uvloop"):
        code = f"import importlib.metadata as m; print(m.version({name!r}))"
        say(name, [str(FOLDER / "python" / "bin" / "python"), "-c", code])
    return found


# ------------------------------------------------------------ a process each


@contextlib.contextmanager
def _one(name: str, place: Place, command: Sequence[str], port: int, environment: dict[str, str] | None = None) -> Iterator[Server]:
    log = place.folder / "peer.log"
    with running(command, SERVER_CORE, log, environment=environment, folder=place.folder) as process:
        listens(port, process, log)
        yield Server(name, port, process)


def smtp_sink_command(port: int, *words: str) -> list[str]:
    user = ["-u", "root"] if os.geteuid() == 0 else []
    # Without -m it takes 256 connections at once; the others wait for a greeting.
    return [program("smtp-sink"), *user, "-m", "2000", *words, f"127.0.0.1:{port}", "1024"]


def _smtp_sink(place: Place) -> contextlib.AbstractContextManager[Server]:
    port = free_port()
    return _one("smtp-sink", place, smtp_sink_command(port), port)


def _python(name: str, what: str) -> Start:
    def start(place: Place) -> contextlib.AbstractContextManager[Server]:
        port = free_port()
        command = [str(FOLDER / "python" / "bin" / "python"), str(HERE / "servers.py"), what, place.mode, str(port), str(place.far)]
        return _one(name, place, command, port)

    return start


def _node(name: str) -> Start:
    def start(place: Place) -> contextlib.AbstractContextManager[Server]:
        port = free_port()
        command = [program("node"), str(HERE / "server.mjs"), place.mode, str(port), str(place.far), str(place.sessions)]
        return _one(name, place, command, port, {"PEERS": str(FOLDER / "node"), "NODE_ENV": "production"})

    return start


@contextlib.contextmanager
def _haraka(place: Place) -> Iterator[Server]:
    port = free_port()
    config = place.folder / "config"
    config.mkdir()
    files = {
        "smtp.ini": f"listen=127.0.0.1:{port}\nnodes=0\n",
        "plugins": "rcpt_to.in_host_list\nqueue/discard\n",
        "host_list": "bench.example\n",
        "loglevel": "warn\n",
        "me": "peer.example\n",
    }
    for name, text in files.items():
        (config / name).write_text(text)
    shutil.copy(FOLDER / "node" / "node_modules" / "Haraka" / "config" / "connection.ini", config)  # it does not greet without
    command = [program("node"), str(FOLDER / "node" / "node_modules" / "Haraka" / "bin" / "haraka"), "-c", str(place.folder)]
    environment = {"YES_REALLY_DO_DISCARD": "1", "NODE_ENV": "production"}
    with running(command, SERVER_CORE, place.folder / "peer.log", environment=environment, stdout=place.folder / "peer.out") as process:
        listens(port, process, place.folder / "peer.out")
        yield Server("Haraka", port, process)


# ------------------------------------------------------------------- Postfix

MASTER = """\
127.0.0.1:{port} inet n - n - {processes} smtpd
{smtpd}
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
myhostname = peer.example
myorigin = peer.example
mydestination =
mynetworks = 127.0.0.0/8
local_transport = error:nothing is local here
relayhost = [127.0.0.1]:{far}
smtp_dns_support_level = disabled
smtpd_relay_restrictions = permit_mynetworks, reject
smtpd_peername_lookup = no
message_size_limit = 104857600
mailbox_size_limit = 0
alias_maps =
alias_database =
notify_classes =
default_process_limit = {processes}
default_destination_concurrency_limit = 100
initial_destination_concurrency = 100
in_flow_delay = 0
"""


def _postfix(name: str, settings: str = "", smtpd: str = "") -> Start:
    """Loopback only, no TLS, no lookups; as many processes as there are sessions; nothing that slows intake down."""

    @contextlib.contextmanager
    def start(place: Place) -> Iterator[Server]:
        port, folder, processes = free_port(), place.folder, max(100, place.sessions)
        folder.chmod(0o755)  # Postfix's own user has to get through
        for part in ("conf", "queue", "data", "log"):
            (folder / part).mkdir()
        shutil.chown(folder / "data", "postfix")
        daemons = next(path for path in ("/usr/lib/postfix/sbin", "/usr/libexec/postfix") if Path(path, "master").exists())
        words = {
            "folder": folder,
            "commands": Path(program("postfix")).parent,
            "daemons": daemons,
            "far": place.far,
            "processes": processes,
        }
        (folder / "conf" / "main.cf").write_text(MAIN.format(**words) + settings)
        (folder / "conf" / "master.cf").write_text(
            MASTER.format(port=port, processes=processes, smtpd=smtpd.format(far=place.far)).replace("\n\n", "\n")
        )
        done = subprocess.run(
            [program("postfix"), "-c", str(folder / "conf"), "check"], capture_output=True, text=True, check=False, timeout=60
        )
        if done.returncode:
            raise Failed(f"postfix check: {done.stderr.strip()[-300:]}")
        with running([f"{daemons}/master", "-c", str(folder / "conf"), "-d"], SERVER_CORE, folder / "master.log") as process:
            try:
                listens(port, process)
            except Failed:
                log = folder / "log" / "mail.log"
                raise Failed(f"Postfix does not listen: {log.read_text()[-300:] if log.exists() else ''}") from None
            yield Server(name, port, process)

    return start


# --------------------------------------------------------------------- table

PEERS = (
    Peer("smtp-sink", ("discard",), "nothing; parses no address, logs nothing", _smtp_sink, _no_smtp_sink),
    Peer("aiosmtpd", ("discard",), "nothing; on uvloop", _python("aiosmtpd", "aiosmtpd"), _no_python),
    Peer("smtp-server", ("discard",), "nothing; no log", _node("smtp-server"), _no_node, 2),
    Peer("Haraka", ("discard",), "nothing (queue/discard); one process, log level warn", _haraka, _no_node, 5),
    Peer("slimta", ("discard",), "nothing; on gevent, no queue", _python("slimta", "slimta"), _no_python),
    Peer(
        "Postfix hold",
        ("durable",),
        "in the queue, synced; held at once, so that nothing tries to deliver it",
        _postfix("Postfix hold", "smtpd_recipient_restrictions = check_client_access static:HOLD, permit_mynetworks, reject\n"),
        _no_postfix,
    ),
    Peer(
        "Postfix proxy",
        ("relay",),
        "the upstream's own 250, passed on (before-queue proxy: no queue, a connection upstream for each message)",
        _postfix("Postfix proxy", smtpd="  -o smtpd_proxy_filter=127.0.0.1:{far}"),
        _no_postfix,
    ),
    Peer(
        "Postfix queue",
        ("relay",),
        "in the queue, synced, then relayhost; measured until the last is delivered",
        _postfix("Postfix queue"),
        _no_postfix,
    ),
    Peer(
        "smtp-server + nodemailer",
        ("relay",),
        "the upstream's own 250 (a pool of as many connections as sessions); no queue, no log",
        _node("smtp-server + nodemailer"),
        _no_node,
        6,
    ),
    Peer(
        "aiosmtpd + aiosmtplib",
        ("relay",),
        "the upstream's own 250, over connections that are kept; no queue, no log",
        _python("aiosmtpd + aiosmtplib", "aiosmtpd"),
        _no_python,
    ),
    Peer(
        "smtp-server + undici",
        ("webhook",),
        "the receiver's 2xx; no queue, no log, no signature",
        _node("smtp-server + undici"),
        _no_node,
        4,
    ),
    Peer(
        "aiosmtpd + aiohttp",
        ("webhook",),
        "the receiver's 2xx; no queue, no log, no signature",
        _python("aiosmtpd + aiohttp", "aiosmtpd"),
        _no_python,
    ),
)
