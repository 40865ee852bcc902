"""What every bench here stands on: processes on cores of their own, their CPU, a gateway of ours.

CPU of a server is that of its whole process tree, children that came and went included: from a
cgroup of its own where one can be made (cgroup v2, in practice: as root), else from /proc (what
lives, and what a living parent has reaped). What is started here is ended here, and nothing else:
by the process' id, then by its cgroup or its process group.

Server, generator and far side have a core each, or the latter two share one where there are two.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
#: Debian keeps Postfix and what comes with it out of an ordinary PATH.
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
PATIENCE = 20.0


def _cores() -> list[int]:
    """Those we may use, one of each physical core first."""
    own = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    first: list[int] = []
    rest: list[int] = []
    seen = set()
    for core in own:
        siblings = f"core {core}"
        with contextlib.suppress(OSError):
            siblings = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text().strip()
        (rest if siblings in seen else first).append(core)
        seen.add(siblings)
    return first + rest


CORES = _cores()
SERVER_CORE = CORES[0]
OTHER_CORE = CORES[1 % len(CORES)]
FAR_CORE = CORES[2] if len(CORES) > 2 else OTHER_CORE


class Failed(SystemExit):
    """A sentence for whoever runs the bench. A tool that does not catch it ends with it."""


@dataclass
class Server:
    name: str
    port: int
    process: subprocess.Popen[bytes]


def program(name: str) -> str:
    path = shutil.which(name, path=SEARCH)
    if path is None:
        raise Failed(f"{name} is not installed (Debian: apt install {'nodejs npm' if name in ('node', 'npm') else 'postfix'})")
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def a_folder() -> Iterator[Path]:
    """A folder that goes at the end. On a disk: ``/tmp`` may be memory, where a sync costs nothing."""
    with tempfile.TemporaryDirectory(prefix="gateway-bench-", dir=os.environ.get("GATEWAY_BENCH_FOLDER", "/var/tmp")) as name:
        yield Path(name)


# ----------------------------------------------------------------- processes

#: The cgroup of each process that has one of its own.
_cgroups: dict[int, Path] = {}


@functools.cache
def cgroups() -> Path | None:
    """The cgroup v2 under which those of servers are made: our own. None where that is not allowed."""
    with contextlib.suppress(OSError, StopIteration):
        mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
        root = next(fields[1] for fields in mounts if fields[2] == "cgroup2")
        own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        parent = Path(f"{root}{own}")
        trial = Path(tempfile.mkdtemp(prefix="gateway-bench-", dir=parent))
        try:
            entered = subprocess.run(["/bin/sh", "-c", 'echo $$ >"$0"', str(trial / "cgroup.procs")], capture_output=True, check=False)
            return parent if entered.returncode == 0 and "usage_usec" in (trial / "cpu.stat").read_text() else None
        finally:
            _end_cgroup(trial)
    return None


def _end_cgroup(cgroup: Path) -> None:
    """Ends what is left in it, then the cgroup itself."""
    with contextlib.suppress(OSError):
        (cgroup / "cgroup.kill").write_text("1")
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            cgroup.rmdir()
        except OSError:
            time.sleep(0.01)
        else:
            return


@contextlib.contextmanager
def on_cores(cores: Sequence[int]) -> Iterator[None]:
    """What is started inside runs there, threads and children too."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def running(
    command: Sequence[str],
    core: int | Sequence[int],
    log: Path,
    *,
    environment: dict[str, str] | None = None,
    folder: Path = ROOT,
    stdin: int = subprocess.DEVNULL,
    stdout: int | Path = subprocess.DEVNULL,
) -> Iterator[subprocess.Popen[bytes]]:
    """The process, in a session and, if possible, a cgroup of its own; ended at the end, with all it started."""
    parent = cgroups()
    cgroup = Path(tempfile.mkdtemp(prefix="gateway-bench-", dir=parent)) if parent is not None else None
    if cgroup is not None:
        command = ["/bin/sh", "-c", 'echo $$ >"$0" && exec "$@"', str(cgroup / "cgroup.procs"), *command]
    with contextlib.ExitStack() as stack:
        error = stack.enter_context(log.open("wb"))
        output = stack.enter_context(stdout.open("wb")) if isinstance(stdout, Path) else stdout
        stack.enter_context(on_cores([core] if isinstance(core, int) else core))
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=output,
            stderr=error,
            cwd=folder,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
    if cgroup is not None:
        _cgroups[process.pid] = cgroup
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        left = [] if cgroup is not None else _tree(process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for pid in left[1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        if cgroup is not None:
            del _cgroups[process.pid]
            _end_cgroup(cgroup)


def listens(port: int, process: subprocess.Popen[Any], log: Path | None = None) -> None:
    """Returns when it does."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            said = log.read_text(errors="replace")[-500:].strip() if log is not None else ""
            raise Failed(f"it does not listen: {said or process.args!r}")
        time.sleep(0.02)


async def heard(reader: asyncio.StreamReader, code: bytes) -> None:
    """Reads one reply, however many lines it has. Raises ConnectionError where it is another one."""
    while (line := await reader.readline())[3:4] == b"-":
        pass
    if not line.startswith(code):
        raise ConnectionError(f"wanted {code!r}, heard {line!r}")


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on: parent is [1], times are [11:15]."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _tree(pid: int) -> list[int]:
    """This process and all under it."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                children.setdefault(int(_stat(int(folder.name))[1]), []).append(int(folder.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def cpu_of(pid: int) -> float:
    """Seconds of CPU, user and system, that this process and all under it have taken so far."""
    if (cgroup := _cgroups.get(pid)) is not None:
        usage = (cgroup / "cpu.stat").read_text().split()
        return int(usage[usage.index("usage_usec") + 1]) / 1e6
    total = 0
    for member in _tree(pid):
        with contextlib.suppress(OSError):
            total += sum(int(field) for field in _stat(member)[11:15])
    return total / os.sysconf("SC_CLK_TCK")


def core_busy(core: int) -> float:
    """Seconds so far in which this core was not idle, whoever it worked for."""
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name == f"cpu{core}":
            ticks = [int(field) for field in fields[:8]]
            return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    return 0.0


def memory_of(pid: int) -> float:
    """MiB of this process and all under it, shared pages divided (Pss)."""
    total = 0
    for member in _tree(pid):
        with contextlib.suppress(OSError):
            found = [line.split()[1] for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines() if line.startswith("Pss:")]
            total += int(found[0])
    return total / 1024


# ---------------------------------------------------------------------- ours


@contextlib.contextmanager
def serving(
    text: str, folder: Path, patience: float = PATIENCE, core: int | Sequence[int] = SERVER_CORE
) -> Iterator[tuple[list[int], subprocess.Popen[bytes]]]:
    """A gateway that goes by this configuration: the ports it listens on, in order, and its process.
    Its event log is ``gateway.log`` in ``folder``."""
    config, log = folder / "gateway.toml", folder / "gateway.log"
    config.write_text(text)
    command = [str(Path(sys.executable).with_name("gateway")), "serve", "--config", str(config)]
    with running(command, core, log) as process:
        deadline = time.monotonic() + patience
        while b'"ready"' not in (told := log.read_bytes()):
            if process.poll() is not None or time.monotonic() > deadline:
                raise Failed(f"the gateway did not start:\n{told.decode()}")
            time.sleep(0.005)
        addresses = [json.loads(line)["address"] for line in told.splitlines() if b'"listening"' in line]
        yield [int(address.rpartition(":")[2]) for address in addresses], process
