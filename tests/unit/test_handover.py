"""What the old and the new process say to one another when sockets are handed on."""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
from pathlib import Path

import pytest

from gateway.net import handover as module
from gateway.net.handover import ENVIRONMENT, Handover, HandoverError, Inheritance, inherited
from gateway.net.sockets import bind, bind_unix

#: A new version that says this, or does that.
WORDS = """
import os, socket, sys, time
channel = socket.socket(fileno=int(os.environ["GATEWAY_HANDOVER"]))
channel.recv(1000)
{act}
"""


def version(act: str) -> Handover:
    return Handover([], [sys.executable, "-c", WORDS.format(act=act)])


async def test_the_new_version_is_ready() -> None:
    offer = version("channel.sendall(b'{\"ready\": true}\\n'); time.sleep(60)")
    pid = await offer.make()
    os.kill(pid, 0)
    await offer.recall()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("act", "fault"),
    [
        ("sys.exit(7)", "the new version ended with code 7 before it took mail"),
        ('channel.sendall(b\'{"faults": ["routes: no"]}\\n\'); time.sleep(60)', "routes: no"),
        ("channel.sendall(b'{}\\n')", "the new version said nothing"),
        ("time.sleep(60)", "the new version was not ready within 1 s"),
        ("channel.sendall(b'hello\\n'); time.sleep(60)", "the new version said JSONDecodeError("),
    ],
)
async def test_the_new_version_is_not(act: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 1.0 if "was not ready" in fault else 30.0)
    offer = version(act)
    with pytest.raises(HandoverError) as error:
        await offer.make()
    assert error.value.faults[0].startswith(fault)
    # It has ended, and was waited for.
    assert offer._process is not None
    assert offer._process.returncode is not None


async def test_there_is_no_new_version() -> None:
    with pytest.raises(HandoverError, match="/nonexistent/gateway cannot be started: No such file"):
        await Handover([], ["/nonexistent/gateway", "serve"]).make()


def passed(told: object) -> socket.socket:
    """The new one's end, with what the old one said; the old one's."""
    ours, theirs = socket.socketpair()
    ours.sendall(json.dumps(told).encode() + b"\n")
    os.environ[ENVIRONMENT] = str(theirs.detach())
    ours.settimeout(30)
    return ours


def test_nobody_hands_on() -> None:
    assert inherited() is None


@pytest.mark.parametrize("told", [[], {"sockets": [["x", "y"]]}, {"sockets": [["x", 99999]]}, {"sockets": None}])
def test_what_cannot_be_understood(told: object) -> None:
    with passed(told), pytest.raises(HandoverError, match="what was handed on cannot be understood"):
        inherited()
    assert ENVIRONMENT not in os.environ


def test_sockets_are_taken_by_name_and_the_rest_is_closed(tmp_path: Path) -> None:
    first, second = bind("127.0.0.1", 0), bind("127.0.0.1", 0)
    unix, other = (bind_unix(str(tmp_path / name)) for name in ("kept", "unwanted"))
    names = [sock.getsockname() for sock in (first, second)]
    told = [["127.0.0.1:0", first], ["127.0.0.1:0", second], ["unix:kept", unix], ["unix:unwanted", other]]
    with passed({"sockets": [[name, os.dup(sock.fileno())] for name, sock in told if isinstance(sock, socket.socket)]}) as old:
        inheritance = inherited()
        assert isinstance(inheritance, Inheritance)
        assert inheritance.take("127.0.0.1:25") is None
        taken = [inheritance.take("127.0.0.1:0"), inheritance.take("127.0.0.1:0"), inheritance.take("unix:kept")]
        assert [sock.getsockname() for sock in taken if sock is not None] == [*names, str(tmp_path / "kept")]
        assert not any(sock.get_inheritable() for sock in taken if sock is not None)
        inheritance.ready()
        assert old.recv(1000) == b'{"ready": true}\n'
        assert old.recv(1000) == b""
        inheritance.refuse(["too late"])
        unix.leave()
        other.leave()
        for each in (first, second, unix, other):
            each.close()
        # The file of the one that nobody wanted is gone, that of the other is now the new one's.
        assert os.listdir(tmp_path) == ["kept"]
        for own in taken:
            assert own is not None
            own.close()
        assert os.listdir(tmp_path) == []


def test_who_cannot_start_leaves_the_files(tmp_path: Path) -> None:
    unix = bind_unix(str(tmp_path / "smtp"))
    with passed({"sockets": [["unix:smtp", os.dup(unix.fileno())]]}) as old:
        inheritance = inherited()
        assert inheritance is not None
        taken = inheritance.take("unix:smtp")
        assert taken is not None
        module.refuse(["routes: no"])
        taken.close()
        assert json.loads(old.recv(1000)) == {"faults": ["routes: no"]}
        assert os.listdir(tmp_path) == ["smtp"]
    unix.close()
    assert os.listdir(tmp_path) == []


async def test_a_socket_that_is_closed_is_a_fault_like_any_other() -> None:
    closed = socket.socket()
    closed.close()
    gc.collect()  # what others left closes its own
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(HandoverError):
        await Handover([("127.0.0.1:25", closed)], [sys.executable, "-c", ""]).make()
    assert len(os.listdir("/proc/self/fd")) <= before
