"""Listening sockets: by address, by path, or passed on by whoever started us.

Owns what stands in ``address`` of a listener: ``host:port``, ``unix:/path``, ``fd:3``, ``fd:name``.
A unix socket appears with its mode already set; one that a dead process left behind is removed,
one that somebody listens on never. Its file goes when the socket is closed, unless another has
taken its place meanwhile. A socket that was passed on (systemd.socket, sd_listen_fds(3)) is
taken as it is: its file and its queue of waiting clients belong to whoever made it.

Knows no configuration file and no event loop. Raises OSError, with a sentence for the operator.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

#: Clients that wait to be accepted; the kernel takes its own limit if that is lower.
BACKLOG = 4096
#: The first descriptor that systemd passes on (SD_LISTEN_FDS_START).
FIRST_PASSED = 3
#: Mode of a unix socket unless the operator says another: for us and our group.
MODE = 0o660


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket that does not block. A host that has several addresses is bound
    at the first one, IPv4 before IPv6. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # "[::]" says IPv6, whatever the machine's default: 0.0.0.0 can stand beside it.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


class UnixSocket(socket.socket):
    """A listening unix socket of ours: ``close`` takes its file away."""

    _path = ""
    _file: tuple[int, int] | None = None

    def appeared(self, path: str) -> None:
        """It is bound to this path now."""
        self._path, self._file = path, _identity(path)

    def leave(self) -> None:
        """Another process has it too and goes on: its file stays."""
        self._file = None

    def close(self) -> None:
        path, file, self._file = self._path, self._file, None
        if file is not None:
            with suppress(OSError):
                if _identity(path) == file:
                    os.unlink(path)
        super().close()


def bind_unix(path: str, mode: int = MODE) -> UnixSocket:
    """A listening unix socket that does not block. Raises OSError."""
    sock = UnixSocket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _alone(path):
            _clear(path)
            sock.bind(path)
            sock.appeared(path)
            # Nobody can connect before listen(): there is no moment with another mode.
            os.chmod(path, mode)
            sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


@contextmanager
def _alone(path: str) -> Iterator[None]:
    """While this runs no other gateway looks at the folder: between bind and listen a socket
    looks as dead as one that was left behind."""
    folder = None
    try:
        # A folder that we may write to but not read cannot be locked; then there is no race to lose either
        # but with ourselves.
        with suppress(PermissionError):
            folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        if folder is not None:
            os.close(folder)


def _clear(path: str) -> None:
    """Make room for a socket, if nothing is lost by that."""
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise FileExistsError(errno.EEXIST, "there is a file in its place that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            pass  # its queue is full, so that somebody has one
    raise OSError(errno.EADDRINUSE, "somebody listens there already")


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


# ------------------------------------------------------------------- passed on


def passed_on(name: str, environment: Mapping[str, str] | None = None) -> socket.socket:
    """The listening socket that whoever started us left open: by the number of its descriptor, or
    by its name (``FileDescriptorName=`` in the socket unit). Raises OSError."""
    number = int(name) if name.isdigit() else _named(name, os.environ if environment is None else environment)
    try:
        os.fstat(number)
        sock = socket.socket(fileno=number)
    except OSError as error:
        raise OSError(error.errno, f"descriptor {number} is no socket that was passed on") from None
    try:
        if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise OSError(errno.EINVAL, f"descriptor {number} is no listening stream socket")
        if sock.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
            raise OSError(errno.EAFNOSUPPORT, f"descriptor {number} is a socket of another kind")
        sock.set_inheritable(False)
        sock.setblocking(False)
    except BaseException:
        # Not ours to close: it may be anything.
        sock.detach()
        raise
    return sock


def handed_on(descriptor: int) -> socket.socket:
    """A listening socket that another process of ours hands to this one. The file of a unix socket
    is the other's until ``UnixSocket.appeared`` is called. Raises OSError."""
    sock = socket.socket(fileno=descriptor)
    if sock.family == socket.AF_UNIX:
        sock = UnixSocket(fileno=sock.detach())
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock


def _named(name: str, environment: Mapping[str, str]) -> int:
    if environment.get("LISTEN_PID") != str(os.getpid()):
        raise OSError(errno.ENOENT, "no socket was passed on to this process (LISTEN_PID)")
    count = environment.get("LISTEN_FDS", "")
    names = environment.get("LISTEN_FDNAMES", "").split(":")[: int(count) if count.isdigit() else 0]
    numbers = [FIRST_PASSED + place for place, known in enumerate(names) if known == name]
    if not numbers:
        raise OSError(
            errno.ENOENT, f"no socket of this name was passed on; there is {', '.join(filter(None, names)) or 'none with a name'}"
        )
    if len(numbers) > 1:
        raise OSError(errno.EINVAL, f"{len(numbers)} sockets have this name; write {' or '.join(f'fd:{number}' for number in numbers)}")
    return numbers[0]


# -------------------------------------------------------------------- their names


def spoken(address: object) -> str:
    """``host:port``, ``[v6]:port`` or ``unix:/path`` of a socket's own address."""
    if isinstance(address, tuple):
        host, port = address[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    path = address if isinstance(address, str) else bytes(address).decode("utf-8", "replace") if isinstance(address, bytes) else ""
    # One without a path is in the abstract namespace (its first octet is NUL), which Linux writes with @.
    return "unix:" + path.replace("\0", "@", 1)


def plain(host: str) -> str:
    """An IP address as we tell it: without a zone, IPv4 that came through an IPv6 socket as IPv4."""
    host = host.partition("%")[0]
    return host[7:] if host.startswith("::ffff:") and "." in host else host


def whence(address: object) -> tuple[str, int]:
    """``(ip, port)`` of a peer's address; ``("", 0)`` for one on a unix socket."""
    return (plain(address[0]), address[1]) if isinstance(address, tuple) else ("", 0)
