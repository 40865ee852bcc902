"""Listening sockets by path and by descriptor, and what a service manager is told."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.net import notify
from gateway.net.sockets import bind, bind_unix, passed_on, spoken, whence


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


# ------------------------------------------------------------------------ unix


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_a_unix_socket_comes_with_its_mode_and_goes_with_its_file(path: str, mode: int) -> None:
    old = os.umask(0o077)
    try:
        sock = bind_unix(path, mode)
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.lstat(path).st_mode) == mode
    assert not sock.getblocking()
    assert spoken(sock.getsockname()) == f"unix:{path}"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    sock.close()
    assert not os.path.exists(path)
    sock.close()


def test_what_a_dead_process_left_is_cleared(path: str) -> None:
    subprocess.run([sys.executable, "-c", f"import socket; socket.socket(socket.AF_UNIX).bind({path!r})"], check=True)
    assert os.path.exists(path)
    sock = bind_unix(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    sock.close()


def test_somebody_who_listens_is_left_alone(path: str) -> None:
    first = bind_unix(path)
    with pytest.raises(OSError, match="somebody listens there already"):
        bind_unix(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    first.close()


def test_somebody_whose_queue_is_full_listens_too(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(path)
        busy.listen(0)
        clients = []
        for _ in range(8):
            client = socket.socket(socket.AF_UNIX)
            client.setblocking(False)
            clients.append(client)
            if client.connect_ex(path):
                break
        with pytest.raises(OSError, match="somebody listens there already"):
            bind_unix(path)
        for client in clients:
            client.close()
    assert os.path.exists(path)


def test_what_is_no_socket_is_no_bodys_to_remove(path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(OSError, match="no socket"):
        bind_unix(path)
    assert Path(path).read_text() == "precious"


def test_the_file_of_a_successor_stays(path: str) -> None:
    first = bind_unix(path)
    os.unlink(path)
    second = bind_unix(path)
    first.close()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    second.close()
    assert not os.path.exists(path)


def test_of_many_that_start_at_once_one_has_it(path: str) -> None:
    subprocess.run([sys.executable, "-c", f"import socket; socket.socket(socket.AF_UNIX).bind({path!r})"], check=True)
    bound: list[socket.socket] = []
    faults: list[OSError] = []

    def start() -> None:
        try:
            bound.append(bind_unix(path))
        except OSError as fault:
            faults.append(fault)

    threads = [threading.Thread(target=start) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(bound), len(faults)) == (1, 15)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    bound[0].close()


def test_a_path_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        bind_unix(str(tmp_path / "no" / "folder" / "s"))
    with pytest.raises(OSError, match="too long"):
        bind_unix(str(tmp_path / ("x" * 120)))


# ------------------------------------------------------------------- passed on


@pytest.fixture
def given() -> Iterator[int]:
    sock = bind("127.0.0.1", 0)
    number = os.dup(sock.fileno())
    sock.close()
    yield number
    os.close(number)


def named(names: str, count: int, pid: int | None = None) -> dict[str, str]:
    return {"LISTEN_PID": str(os.getpid() if pid is None else pid), "LISTEN_FDS": str(count), "LISTEN_FDNAMES": names}


def test_by_number(given: int) -> None:
    os.set_inheritable(given, True)
    sock = passed_on(str(given))
    assert sock.fileno() == given
    assert not sock.get_inheritable()
    assert not sock.getblocking()
    sock.detach()


def test_by_name() -> None:
    # The numbers begin at 3, whatever they are here: a process of its own has them free.
    script = (
        "import os, socket, sys\n"
        "from gateway.net.sockets import bind, passed_on\n"
        "one, two = bind('127.0.0.1', 0), bind('127.0.0.1', 0)\n"
        "assert (one.fileno(), two.fileno()) == (3, 4), (one, two)\n"
        "there = {'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '2', 'LISTEN_FDNAMES': 'smtp:lmtp'}\n"
        "sock = passed_on('lmtp', there)\n"
        "assert (sock.fileno(), sock.getsockname()) == (4, two.getsockname())\n"
        "two.detach()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent.parent.parent)


@pytest.mark.parametrize(
    ("name", "environment", "complaint"),
    [
        ("smtp", {}, "no socket was passed on"),
        ("smtp", named("smtp", 1, pid=1), "no socket was passed on"),
        ("smtp", named("smtp", 0), "no socket of this name"),
        ("smtp", named("lmtp:admin", 2), "there is lmtp, admin"),
        ("smtp", named("", 1), "none with a name"),
        ("smtp", named("smtp:lmtp:smtp", 3), "write fd:3 or fd:5"),
        ("smtp", {**named("smtp", 1), "LISTEN_FDS": "many"}, "no socket of this name"),
    ],
)
def test_no_such_name(name: str, environment: dict[str, str], complaint: str) -> None:
    with pytest.raises(OSError, match=complaint):
        passed_on(name, environment)


def test_what_is_no_listening_socket_is_not_touched(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no socket that was passed on"):
        passed_on("987654")
    with open(tmp_path / "file", "w") as file, pytest.raises(OSError, match="no socket that was passed on"):
        passed_on(str(file.fileno()))
    for kind, complaint in ((socket.SOCK_STREAM, "no listening stream socket"), (socket.SOCK_DGRAM, "no listening stream socket")):
        with socket.socket(socket.AF_INET, kind) as sock:
            with pytest.raises(OSError, match=complaint):
                passed_on(str(sock.fileno()))
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == kind


def test_names_of_sockets_and_peers() -> None:
    assert spoken(b"\0abstract") == "unix:@abstract"
    assert spoken("") == "unix:"
    assert whence("") == ("", 0)
    assert whence(("::ffff:192.0.2.1", 5, 0, 0)) == ("192.0.2.1", 5)


# --------------------------------------------------------------------- sd_notify


@pytest.mark.parametrize("abstract", [False, True])
def test_the_manager_is_told(path: str, abstract: bool) -> None:
    if abstract and sys.platform != "linux":
        pytest.skip("the abstract namespace is Linux's")
    name = f"@{path}" if abstract else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + path if abstract else path)
        assert notify.notify("READY=1", "STATUS=x", environment={"NOTIFY_SOCKET": name})
        assert manager.recv(4096) == b"READY=1\nSTATUS=x"


def test_nobody_to_tell(path: str) -> None:
    assert not notify.notify("READY=1", environment={})
    assert not notify.notify("READY=1", environment={"NOTIFY_SOCKET": "vsock:2:1"})
    assert not notify.notify("READY=1", environment={"NOTIFY_SOCKET": path})
