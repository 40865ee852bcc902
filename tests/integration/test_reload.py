"""SIGHUP with workers: the same configuration in all of them, or the old one in all."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import trustme

from ..certificates import certified
from ..conftest import Start
from ..servers import GatewayProcess, free_port, wait_until
from .test_gateway_process import BOX, WORKERS, dial, refuses, send, worker_pids


def reload(house: GatewayProcess, text: str) -> None:
    house.config.write_text(text)
    house.signal(signal.SIGHUP)


def replies(port: int, recipient: str, times: int = 12) -> set[int]:
    """What is said to this recipient, on enough connections that either worker has some."""
    found = set()
    for _ in range(times):
        client = dial(port)
        client.mail("a@client.example")
        found.add(client.rcpt(recipient)[0])
        client.close()
    return found


def test_workers_get_new_listeners_and_lose_old_ones(gateway: Start, tmp_path: Path) -> None:
    free = free_port()
    house = gateway(WORKERS + BOX.format(folder=tmp_path))
    good = house.config.read_text()
    reload(house, good + f'[[listeners]]\naddress = "127.0.0.1:{free}"\n[[listeners]]\naddress = "unix:{tmp_path}/lmtp"\n')
    house.event("listening", address=f"unix:{tmp_path}/lmtp")
    house.event("reloaded", count=2)

    def both_serve() -> bool:
        """One that is held up for a moment leaves all to the other meanwhile."""
        dial(free).close()
        return len({event["worker"] for event in house.found("connected", listener=f"127.0.0.1:{free}")}) == 2

    wait_until(both_serve, "a client for each worker")
    assert send(free, "b@box.example")[0] == 250
    # One that begins anew has them all.
    os.kill(worker_pids(house)[0], signal.SIGKILL)
    house.event("worker_ready", number=0, count=2)
    assert send(free, "b@box.example")[0] == 250
    inside = dial(free)
    reload(house, good)
    house.event("reloaded", count=4)
    assert inside.getreply()[0] == 421
    inside.close()
    house.event("closed", count=2, address=f"127.0.0.1:{free}")
    assert refuses(free)
    assert not (tmp_path / "lmtp").exists()
    assert send(house.port, "b@box.example")[0] == 250


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit is Linux's")
def test_all_workers_or_none(gateway: Start, tmp_path: Path) -> None:
    """One of two has no descriptor left to read a certificate with: the other keeps the old file, too."""
    pair = certified(trustme.CA(), tmp_path / "tls", "mx.gateway.example")
    text = BOX.format(folder=tmp_path).replace(
        'address = "127.0.0.1:0"', f'address = "127.0.0.1:0"\ntls = "starttls"\ncertificate = "{pair.certificate}"\nkey = "{pair.key}"'
    )
    house = gateway(WORKERS + text)
    other = house.config.read_text().replace("*@box.example", "*@new.example")
    good = house.config.read_text()
    pid = worker_pids(house)[1]
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(set(range(len(used) + 1)) - used), hard))
    reload(house, other)
    told = house.event("reload_refused")
    assert [fault.partition(":")[0] for fault in told["faults"]] == ["listeners[0].certificate"], told
    assert "Too many open files" in told["faults"][0]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert replies(house.port, "b@new.example") == {550}
    assert replies(house.port, "b@box.example") == {250}
    assert not house.found("reloaded")
    reload(house, other)
    house.event("reloaded", count=2)
    assert replies(house.port, "b@new.example") == {250}
    assert house.config.read_text() != good


def test_a_worker_that_began_under_the_old_file(gateway: Start, tmp_path: Path) -> None:
    """The file changes while a worker starts again: in the end both go by the new one."""
    house = gateway(WORKERS + BOX.format(folder=tmp_path))
    os.kill(worker_pids(house)[1], signal.SIGKILL)
    house.event("worker_ended", number=1)
    reload(house, house.config.read_text().replace("*@box.example", "*@new.example"))
    house.event("reloaded", worker=0)
    house.event("worker_ready", number=1, count=2)
    # Where it was quicker than the signal, it is told of the new one a moment after the other.
    wait_until(lambda: replies(house.port, "b@new.example") == {250}, "both go by the new file")
    assert not house.found("bug")
