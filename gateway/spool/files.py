"""The seam for all file access below the spool that is not SQLite's own.

``Files`` owns every system call on lock, content and (for the proof after a failed
commit) WAL files; tests put a subclass in its place that records or injects faults.
SQLite's own calls go through the apsw VFS named in ``SqliteSpool(vfs=…)``. Knows
nothing of messages. Blocks: call it from a thread, ``open()`` and ``close()`` of the
spool apart. Every failure is an OSError.

Modes do not depend on the umask: folders are 0700, files 0600 (DESIGN §7).
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Sequence

#: Pieces in one writev (POSIX promises 16, Linux and macOS have 1,024).
_IOV_MAX = 1024

#: macOS: fsync leaves the octets in the drive's cache, this does not (fcntl(2)).
_FULLFSYNC: int | None = getattr(fcntl, "F_FULLFSYNC", None) if sys.platform == "darwin" else None


class Files:
    """File access by descriptor and path; without state of its own."""

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        """A descriptor. With O_CREAT the file gets exactly ``mode``, whatever the umask."""
        descriptor = os.open(path, flags | os.O_CLOEXEC, mode)
        if flags & os.O_CREAT:
            try:
                os.fchmod(descriptor, mode)
            except OSError:
                os.close(descriptor)
                raise
        return descriptor

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def write(self, descriptor: int, pieces: Sequence[bytes]) -> None:
        """All of the pieces, in order; a short write is carried on."""
        todo = [memoryview(piece) for piece in pieces if piece]
        while todo:
            done = os.writev(descriptor, todo[:_IOV_MAX])
            gone = 0
            while gone < len(todo) and done >= len(todo[gone]):
                done -= len(todo[gone])
                gone += 1
            del todo[:gone]
            if done:
                todo[0] = todo[0][done:]

    def read(self, descriptor: int, size: int) -> bytes:
        """At most ``size`` octets, ``b""`` at the end."""
        return os.read(descriptor, size)

    def fsync(self, descriptor: int) -> None:
        """Octets and size are on stable storage. Never call it again after it failed: the
        kernel may have forgotten which pages it could not write."""
        if _FULLFSYNC is not None:
            fcntl.fcntl(descriptor, _FULLFSYNC)
        else:
            os.fsync(descriptor)

    def truncate(self, descriptor: int, size: int) -> None:
        os.ftruncate(descriptor, size)

    def size(self, descriptor: int) -> int:
        return os.fstat(descriptor).st_size

    def rename(self, source: str, target: str) -> None:
        os.replace(source, target)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def fsync_dir(self, path: str) -> None:
        """New, renamed and removed names in this folder are on stable storage."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.fsync(descriptor)
        finally:
            os.close(descriptor)

    def mkdir(self, path: str) -> None:
        """The folder is there and has mode 0700."""
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            if not os.path.isdir(path):
                raise
        if os.stat(path).st_mode & 0o777 != 0o700:
            os.chmod(path, 0o700)

    def rmdir(self, path: str) -> None:
        """The folder is gone; OSError where something is in it."""
        os.rmdir(path)

    def names(self, path: str) -> list[str]:
        """What lies in a folder."""
        return os.listdir(path)

    def stat(self, path: str) -> os.stat_result:
        return os.stat(path)

    def statvfs(self, path: str) -> os.statvfs_result:
        return os.statvfs(path)

    def lock(self, descriptor: int) -> bool:
        """The exclusive lock of the whole file (flock), without waiting; False: another has it."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
