"""A disk that fails when told to, and remembers what was done to it.

``Faults`` is the plan: which operation fails, and how. ``FaultyVFS`` is SQLite's view of
the disk, ``FaultyFiles`` the spool's own; both ask the same plan and write the same log, so
that "the n-th operation" counts them together, in the order in which they happened.

``replay`` makes of a log what a disk may hold after the power went: the operations up to
a point, with all that was written, with no more than what was synced, or with all octets
but no cut that was not synced.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import apsw

from gateway.spool.files import Files

Kind = Literal["open", "write", "sync", "unsynced", "truncate", "delete", "rename", "sync_dir", "statvfs", "mkdir", "read"]
How = Literal["EIO", "ENOSPC", "EDQUOT", "short"]

#: What SQLite says for each fault.
_CODES: dict[str, dict[str, int]] = {
    "open": {"": apsw.SQLITE_CANTOPEN},
    # Of all that write(2) may say SQLite takes only ENOSPC for a full disk.
    "write": {"": apsw.SQLITE_IOERR_WRITE, "ENOSPC": apsw.SQLITE_FULL},
    "sync": {"": apsw.SQLITE_IOERR_FSYNC},
    "truncate": {"": apsw.SQLITE_IOERR_TRUNCATE},
    "delete": {"": apsw.SQLITE_IOERR_DELETE},
}


@dataclass(slots=True)
class Operation:
    """``size`` is the new size for a truncate; ``target`` the new name of a rename; ``named``: the
    sync is SQLite's, whose first of a new file syncs the folder too. A sync speaks of what stood in
    the log at ``since``, when it began; one that failed is ``unsynced``."""

    kind: Kind
    path: str
    offset: int = 0
    octets: bytes = b""
    size: int = 0
    target: str = ""
    named: bool = False
    since: int = 0


@dataclass
class Faults:
    """``first``: the number (from 1) of the operation that fails, 0 for none; ``count``: how many
    fail from there on. ``errno``: of the last one. ``kinds``: count only these (a ``read`` is the opening of a file
    that is only read); ``paths``: only where the path ends so."""

    first: int = 0
    count: int = 1
    how: How = "EIO"
    kinds: frozenset[str] | None = None
    paths: tuple[str, ...] = ("",)
    keep: bool = False
    seen: int = 0
    fired: int = 0
    errno: int = 0
    log: list[Operation] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def meet(self, kind: Kind, path: str) -> How | None:
        """Counts the operation; how it fails, or None."""
        if (self.kinds is not None and kind not in self.kinds) or not path.endswith(self.paths):
            return None
        with self.lock:
            self.seen += 1
            if self.first and self.first <= self.seen < self.first + self.count:
                self.fired += 1
                return self.how
        return None

    def note(self, operation: Operation) -> None:
        if self.keep:
            with self.lock:
                self.log.append(operation)


class FaultyVFS(apsw.VFS):
    """Register by making one; keep it as long as connections use ``name``."""

    def __init__(self, name: str, faults: Faults) -> None:
        self.faults = faults
        super().__init__(name, "")

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> FaultyFile:  # noqa: N802 - SQLite's name
        return FaultyFile(name, flags, self.faults)

    def xGetLastError(self) -> tuple[int, str]:  # noqa: N802 - SQLite's name
        """What SQLite asks for the reason of an I/O error: an errno, as its own view of the disk tells it."""
        return self.faults.errno, ""

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802 - SQLite's name
        if how := self.faults.meet("delete", filename):
            _raise(self.faults, "delete", how)
        super().xDelete(filename, syncdir)
        self.faults.note(Operation("delete", filename))


class FaultyFile(apsw.VFSFile):
    def __init__(self, name: str | apsw.URIFilename | None, flags: list[int], faults: Faults) -> None:
        path = name.filename() if isinstance(name, apsw.URIFilename) else (name or "")
        self.path = path
        self.faults = faults
        if how := faults.meet("open", path):
            _raise(faults, "open", how)
        new = bool(path) and not os.path.exists(path)
        super().__init__("", name, flags)
        if new:
            faults.note(Operation("open", path))

    def xWrite(self, data: Any, offset: int) -> None:  # noqa: N802 - SQLite's name
        octets = bytes(data)
        if how := self.faults.meet("write", self.path):
            if how == "short":
                half = octets[: len(octets) // 2]
                super().xWrite(half, offset)
                self.faults.note(Operation("write", self.path, offset, half))
                _raise(self.faults, "write", "short")
            _raise(self.faults, "write", how)
        super().xWrite(octets, offset)
        self.faults.note(Operation("write", self.path, offset, octets))

    def xSync(self, flags: int) -> None:  # noqa: N802 - SQLite's name
        since = len(self.faults.log)
        if how := self.faults.meet("sync", self.path):
            # What was written stays in the cache and may reach the disk all the same.
            self.faults.note(Operation("unsynced", self.path, since=since))
            _raise(self.faults, "sync", how)
        super().xSync(flags)
        self.faults.note(Operation("sync", self.path, named=True, since=since))

    def xTruncate(self, newsize: int) -> None:  # noqa: N802 - SQLite's name
        if how := self.faults.meet("truncate", self.path):
            _raise(self.faults, "truncate", how)
        super().xTruncate(newsize)
        self.faults.note(Operation("truncate", self.path, size=newsize))


def _raise(faults: Faults, kind: Kind, how: How) -> None:
    # A write is all that tells ENOSPC from the rest; of a quota SQLite knows nothing anywhere.
    codes = _CODES[kind]
    full = how in ("ENOSPC", "short")
    faults.errno = errno.ENOSPC if how == "short" else getattr(errno, how)
    raise apsw.exception_for(codes.get("ENOSPC", codes[""]) if full else codes[""])


class FaultyFiles(Files):
    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self._paths: dict[int, str] = {}
        self._offsets: dict[int, int] = {}
        #: What ``statvfs`` says instead of the truth.
        self.room: os.statvfs_result | None = None

    def _meet(self, kind: Kind, path: str) -> How | None:
        how = self.faults.meet(kind, path)
        if how is None or how == "short":
            return how
        raise OSError(getattr(errno, how), os.strerror(getattr(errno, how)), path)

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        self._meet("open" if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR) else "read", path)
        new = not os.path.exists(path)
        descriptor = super().open(path, flags, mode)
        self._paths[descriptor] = path
        self._offsets[descriptor] = 0
        if new:
            self.faults.note(Operation("open", path))
        return descriptor

    def write(self, descriptor: int, pieces: Sequence[bytes]) -> None:
        octets = b"".join(pieces)
        path = self._paths[descriptor]
        short = self._meet("write", path) == "short"
        done = octets[: len(octets) // 2] if short else octets
        super().write(descriptor, [done])
        self.faults.note(Operation("write", path, self._offsets[descriptor], done))
        self._offsets[descriptor] += len(done)
        if short:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def fsync(self, descriptor: int) -> None:
        path = self._paths.get(descriptor)
        since = len(self.faults.log)
        if path is not None:
            try:
                self._meet("sync", path)
            except OSError:
                self.faults.note(Operation("unsynced", path, since=since))
                raise
        super().fsync(descriptor)
        if path is not None:
            self.faults.note(Operation("sync", path, since=since))

    def truncate(self, descriptor: int, size: int) -> None:
        self._meet("truncate", self._paths[descriptor])
        super().truncate(descriptor, size)
        self.faults.note(Operation("truncate", self._paths[descriptor], size=size))

    def close(self, descriptor: int) -> None:
        self._paths.pop(descriptor, None)
        super().close(descriptor)

    def rename(self, source: str, target: str) -> None:
        self._meet("rename", source)
        super().rename(source, target)
        self.faults.note(Operation("rename", source, target=target))

    def unlink(self, path: str) -> None:
        self._meet("delete", path)
        super().unlink(path)
        self.faults.note(Operation("delete", path))

    def fsync_dir(self, path: str) -> None:
        since = len(self.faults.log)
        self._meet("sync_dir", path)
        super().fsync_dir(path)
        self.faults.note(Operation("sync_dir", path, since=since))

    def mkdir(self, path: str) -> None:
        self._meet("mkdir", path)
        new = not os.path.isdir(path)
        super().mkdir(path)
        if new:
            self.faults.note(Operation("mkdir", path))

    def statvfs(self, path: str) -> os.statvfs_result:
        self._meet("statvfs", path)
        return self.room or super().statvfs(path)


Left = Literal["all", "synced", "uncut"]


def replay(log: Sequence[Operation], root: str, target: Path, left: Left) -> None:
    """Make below ``target`` what the disk may hold after these operations on files below
    ``root``: everything; no octet, size or name that no sync had asked for; or every octet, but
    the old size where a file was cut and not synced since.

    Names and removals wait for the sync of their folder, as POSIX has it."""
    live: dict[str, bytearray] = {}
    names: set[str] = set()
    disk: dict[str, bytearray] = {}
    durable: set[str] = set()
    folders: list[str] = []

    def put(image: dict[str, bytearray], step: Operation) -> None:
        content = image.setdefault(step.path, bytearray())
        content.extend(bytes(max(0, step.offset - len(content))))
        content[step.offset : step.offset + len(step.octets)] = step.octets

    for step in log:
        path = step.path
        if step.kind == "mkdir":
            folders.append(path)
        elif step.kind == "open":
            live[path] = bytearray()
            names.add(path)
        elif step.kind == "write":
            put(live, step)
            names.add(path)
            if left != "synced":
                put(disk, step)
        elif step.kind == "truncate":
            del live.setdefault(path, bytearray())[step.size :]
            if left == "all":
                del disk.setdefault(path, bytearray())[step.size :]
        elif step.kind == "sync":
            disk[path] = bytearray(live.get(path, b""))
            if step.named:
                durable.add(path)
        elif step.kind == "delete":
            names.discard(path)
        elif step.kind == "rename":
            live[step.target] = live.pop(path, bytearray())
            disk[step.target] = disk.pop(path, bytearray())
            names.discard(path)
            names.add(step.target)
        elif step.kind == "sync_dir":
            inside = {name for name in names if os.path.dirname(name) == path}
            durable = {name for name in durable if os.path.dirname(name) != path} | inside
    target.mkdir(parents=True)
    for folder in folders:
        (target / os.path.relpath(folder, root)).mkdir(parents=True, exist_ok=True)
    for path in names if left == "all" else durable:
        place = target / os.path.relpath(path, root)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(disk.get(path, b""))
