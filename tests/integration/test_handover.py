"""SIGUSR2: the program's next version takes over the sockets, and no client notices.

The load opens connections at a steady rate, each for one mail. What becomes of each is counted:
accepted; told 421 before the old process had read the end of its data (allowed, and such a mail
must not be carried); and what must never be: refused, reset, or left without an answer.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import smtplib
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from ..conftest import Start
from ..servers import PATIENCE, ROOT, GatewayProcess, HttpReceiver, Request, free_port, mails, wait_until
from .test_gateway_process import ADMIN, AWAY, BASE, BOX, WORKERS, alive, begin, dial, queued, read, send, worker_pids

HOOK = (
    "{head}"
    + BASE
    + """
[sinks.app]
type = "webhook"
format = "raw"
url = "{url}"

[[routes]]
recipients = ["*@app.example"]
sink = "app"
"""
)


def hand_over(house: GatewayProcess, pid: int) -> int:
    """The id of the new process, once the old one is gone."""
    count = len(house.found("handed_over")) + 1
    os.kill(pid, signal.SIGUSR2)
    new = int(house.event("handed_over", count=count)["pid"])
    wait_until(lambda: not alive(pid), "the old process ends")
    return new


@pytest.fixture
def gateway(gateway: Start) -> Iterator[Start]:
    """As everywhere; none of those that took over from one another outlives the test."""
    started: list[GatewayProcess] = []

    def start(config: str, *arguments: str, environment: dict[str, str] | None = None) -> GatewayProcess:
        started.append(gateway(config, *arguments, environment=environment))
        return started[-1]

    yield start
    for house in started:
        if not house.running:
            with suppress(ProcessLookupError):
                # They are of one group.
                os.killpg(house.pid, signal.SIGKILL)


def end(house: GatewayProcess, pid: int) -> None:
    """Of a gateway that has handed over: as ``house.stop`` for the last process."""
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not alive(pid), "the new process ends")
    assert house.wait() == 0
    bugs = house.found("bug")
    assert not bugs, bugs


#: As many as wait for their turn at a machine that is held up for a moment; all are answered long before ``PATIENCE``.
AT_ONCE = 100


@dataclass
class Load:
    """``rate`` connections a second, from a thread of its own, until ``stop``; fewer where so many are not
    answered: no more than ``AT_ONCE`` wait at a time."""

    port: int
    rate: float
    ends: Counter[str] = field(default_factory=Counter)
    acked: set[int] = field(default_factory=set)
    told: set[int] = field(default_factory=set)
    strange: list[str] = field(default_factory=list)
    _ended: bool = False
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()

    def wait(self, accepted: int) -> None:
        """Returns when so many mails were accepted."""
        wait_until(lambda: self.ends["accepted"] >= accepted, "load", 2 * PATIENCE)

    def stop(self) -> None:
        self._ended = True
        assert self._thread is not None
        self._thread.join(2 * PATIENCE)
        assert not self._thread.is_alive(), "the load does not end"

    async def _run(self) -> None:
        tasks: set[asyncio.Task[None]] = set()
        begun, number = time.monotonic(), 0
        while not self._ended:
            while number < (time.monotonic() - begun) * self.rate and len(tasks) < AT_ONCE:
                number += 1
                task = asyncio.create_task(self._mail(number))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.sleep(0.005)
        await asyncio.gather(*tasks)

    async def _mail(self, number: int) -> None:
        stage = "connect"
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(PATIENCE):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                for stage, line in (
                    ("greeting", b""),
                    ("hello", b"HELO client.example\r\n"),
                    ("mail", b"MAIL FROM:<a@client.example>\r\n"),
                    ("recipient", b"RCPT TO:<b@app.example>\r\n"),
                    ("data", b"DATA\r\n"),
                    ("content", b"X-Number: %d\r\n\r\nhello\r\n.\r\n" % number),
                ):
                    writer.write(line)
                    reply = await reader.readline()
                    if reply.startswith(b"421"):
                        self.ends[f"421 at {stage}"] += 1
                        self.told.add(number)
                        return
                    if reply[:1] not in (b"2", b"3"):
                        raise ConnectionError(f"{reply!r}")
                self.ends["accepted"] += 1
                self.acked.add(number)
        except (OSError, TimeoutError) as error:
            self.ends[f"{stage}: {type(error).__name__}"] += 1
            self.strange.append(f"{number} at {stage}: {error!r}")
        finally:
            if writer is not None:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()


def carried(receiver: HttpReceiver) -> dict[int, list[str]]:
    """The ids under which each numbered mail came."""
    found: dict[int, list[str]] = defaultdict(list)
    for request in list(receiver.requests):
        number = int(request.body.partition(b"X-Number: ")[2].partition(b"\r\n")[0])
        found[number].append(request.header("webhook-id"))
    return found


def story(house: GatewayProcess, receiver: HttpReceiver, times: int, rate: float) -> tuple[Load, int]:
    """Hand over so many times under this load; the process that is left."""
    load = Load(house.port, rate)
    pid = house.pid
    load.start()
    try:
        load.wait(10)
        for _ in range(times):
            pid = hand_over(house, pid)
    finally:
        load.stop()
    assert not load.strange, load.strange[:10]
    wait_until(lambda: load.acked <= carried(receiver).keys(), "all is carried", 2 * PATIENCE)
    found = carried(receiver)
    assert max(len(ids) for ids in found.values()) == 1, [ids for ids in found.values() if len(ids) > 1][:10]
    assert not load.told & found.keys()
    return load, pid


@pytest.mark.parametrize("head", ["", pytest.param(WORKERS, marks=pytest.mark.long)])
def test_no_client_is_refused_and_no_mail_lost(gateway: Start, head: str) -> None:
    with HttpReceiver() as receiver:
        house = gateway(HOOK.format(head=head, url=receiver.url))
        _, pid = story(house, receiver, 2, 50)
        end(house, pid)
        assert not queued(house)


@pytest.mark.long
@pytest.mark.parametrize("head", ["", WORKERS])
def test_a_hundred_hand_overs(gateway: Start, capsys: pytest.CaptureFixture[str], head: str) -> None:
    """200 connections a second throughout. GATEWAY_HANDOVERS makes it shorter or longer."""
    times = int(os.environ.get("GATEWAY_HANDOVERS", "100"))
    with HttpReceiver() as receiver:
        house = gateway(HOOK.format(head=head, url=receiver.url))
        load, pid = story(house, receiver, times, 200)
        end(house, pid)
        assert not queued(house)
    with capsys.disabled():
        print(f"\n{times} hand-overs ({head or 'one process'}): {dict(load.ends)}")


@pytest.mark.parametrize("head", ["", pytest.param(WORKERS, marks=pytest.mark.long)])
def test_a_new_version_that_cannot_start_changes_nothing(gateway: Start, tmp_path: Path, head: str) -> None:
    path = tmp_path / "lmtp"
    house = gateway(head + BOX.format(folder=tmp_path) + f'[[listeners]]\naddress = "unix:{path}"\n')
    good = house.config.read_text()
    house.config.write_text(good.replace("recipients", "recipient"))
    house.signal(signal.SIGUSR2)
    told = house.event("handover_refused")
    assert any("routes[0].recipient" in fault for fault in told["faults"]), told
    # A fault that shows only when it is put to work.
    house.config.write_text(good + '[[listeners]]\naddress = "192.0.2.1:25"\n')
    house.signal(signal.SIGUSR2)
    told = house.event("handover_refused", count=2)
    assert told["faults"] == ["listeners[2].address: cannot listen on 192.0.2.1:25: Cannot assign requested address"]
    house.config.write_text("")
    # Nothing is changed: port, file of the socket, mail.
    assert send(house.port, "b@box.example")[0] == 250
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert client.recv(100).startswith(b"220 ")
    house.config.write_text(good)
    pid = hand_over(house, house.pid)
    assert send(house.port, "b@box.example")[0] == 250
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert client.recv(100).startswith(b"220 ")
    mails(tmp_path / "box", 2)
    end(house, pid)
    assert not path.exists()


def test_who_is_in_is_answered_and_the_numbers_go_on(gateway: Start, tmp_path: Path) -> None:
    """Content whose end was read gets its answer from the old process, while the new one has been
    serving for long; the shard changes hands when that is over."""
    go = threading.Event()

    def slow(request: Request) -> tuple[int, dict[str, str]]:
        if b"whole" in request.body:
            go.wait(PATIENCE)
        return 200, {}

    with HttpReceiver(slow) as receiver, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        config = HOOK.format(head="", url=receiver.url) + 'acknowledge = "delivered"\n' + ADMIN + '\n[drain]\ntimeout = "24s"\n'
        house = gateway(config, environment={"NOTIFY_SOCKET": str(tmp_path / "notify")})
        http = house.found("listening", protocol="http")[0]["address"]
        idle, owed = dial(house.port), begin(house.port, "b@app.example")
        owed.send(b"\r\nwhole\r\n.\r\n")
        receiver.wait(1)
        old = house.pid
        house.signal(signal.SIGUSR2)
        new = house.event("handed_over")["pid"]
        assert send(house.port, "b@app.example")[0] == 250
        assert idle.getreply() == (421, b"4.3.2 shutting down, try again later")
        assert alive(old)
        status, text = read(f"http://{http}/healthz")
        assert (status, json.loads(text)["pid"], json.loads(text)["shards"]) == (200, new, [1])
        go.set()
        assert owed.getreply()[0] == 250
        house.event("home")
        wait_until(lambda: json.loads(read(f"http://{http}/healthz")[1])["shards"] == [0], "the shard is ours")
        idle.close()
        owed.close()
        # The service manager heard who is the main process now, and nothing of an end.
        manager.setblocking(False)
        words = [manager.recv(1000).decode() for _ in range(3)]
        assert set(words) == {"READY=1\nSTATUS=taking mail", f"MAINPID={new}"}
        with pytest.raises(BlockingIOError):
            manager.recv(1000)
        end(house, new)
        assert [path.name for path in house.spool.iterdir()] == ["0"]


@pytest.mark.parametrize(("before", "after"), [pytest.param("", WORKERS, marks=pytest.mark.long), (WORKERS, "")])
def test_the_new_version_may_have_more_workers_or_fewer(gateway: Start, before: str, after: str) -> None:
    """What the old one's shards hold is carried on, and is seen all the while."""
    house = gateway(AWAY.format(head=before, tail="", upstream=f"127.0.0.1:{free_port()}"))
    count = 6
    for _ in range(count):
        assert send(house.port, "b@away.example")[0] == 250
    ids = {str(row["id"]) for row in queued(house)}
    text = house.config.read_text()
    house.config.write_text(f"{after}\n{text.replace(WORKERS, '')}")
    pid = hand_over(house, house.pid)
    assert {str(row["id"]) for row in queued(house)} == ids
    assert send(house.port, "b@away.example")[0] == 250
    assert len(queued(house)) == count + 1
    end(house, pid)
    assert len(queued(house)) == count + 1


def test_the_old_one_killed_in_the_middle(gateway: Start) -> None:
    """kill -9 while the new version serves and waits for the shard: nothing is lost, it goes on alone."""
    house = gateway(AWAY.format(head="", tail="", upstream=f"127.0.0.1:{free_port()}"))
    for _ in range(5):
        assert send(house.port, "b@away.example")[0] == 250
    hold = begin(house.port, "b@away.example")
    house.signal(signal.SIGUSR2)
    pid = house.event("handed_over")["pid"]
    os.kill(house.pid, signal.SIGKILL)
    with suppress(smtplib.SMTPServerDisconnected, OSError):
        hold.getreply()
    hold.close()
    assert send(house.port, "b@away.example")[0] == 250
    house.event("home")
    assert len(queued(house)) == 6
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not alive(pid), "the new process ends")
    assert len(queued(house)) == 6
    assert not house.found("bug")
    house.wait()


def test_stopped_while_the_new_version_starts(gateway: Start, tmp_path: Path) -> None:
    house = gateway(BOX.format(folder=tmp_path))
    # It waits for somebody who writes its configuration, and starts no further.
    house.config.unlink()
    os.mkfifo(house.config)
    house.signal(signal.SIGUSR2)
    house.event("handing_over")
    house.signal(signal.SIGTERM)
    assert house.wait() == 0
    # The log ends with the last process that has it.
    assert not house.found("handed_over")
    assert not house.found("handover_refused")


@pytest.mark.parametrize("head", ["", pytest.param(WORKERS, marks=pytest.mark.long)])
def test_a_socket_that_was_passed_on_is_handed_on(gateway: Start, tmp_path: Path, head: str) -> None:
    """As under systemd: the descriptor keeps its name in the file, whatever its number is by then."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        program = tmp_path / "service"
        program.write_text(
            f"import os, sys\nos.dup2({sock.fileno()}, 40, inheritable=True)\nos.environ.update(LISTEN_FDS='38', LISTEN_FDNAMES=':'.join(['x'] * 37 + ['smtp']),"
            f" LISTEN_PID=str(os.getpid()))\nos.execv(sys.executable, [sys.executable, '-m', 'gateway', 'serve', *sys.argv[1:]])\n"
        )
        config = tmp_path / "gateway.toml"
        config.write_text(head + BOX.format(folder=tmp_path).replace("127.0.0.1:0", "fd:smtp") + f'[spool]\npath = "{tmp_path}/spool"\n')
        with (tmp_path / "log").open("wb") as log:
            first = subprocess.Popen(
                [sys.executable, str(program), "--config", str(config)],
                pass_fds=[sock.fileno()],
                stderr=log,
                cwd=ROOT,
                start_new_session=True,
            )

    def told(name: str) -> list[dict[str, object]]:
        events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [event for event in events if event["event"] == name]

    try:
        wait_until(lambda: told("ready"), "ready")
        pid = first.pid
        for count in (1, 2):
            assert send(port, "b@box.example")[0] == 250
            os.kill(pid, signal.SIGUSR2)
            wait_until(partial(lambda wanted: len(told("handed_over")) == wanted, count), "handed over")
            pid = int(str(told("handed_over")[-1]["pid"]))
        assert first.wait(PATIENCE) == 0
        assert send(port, "b@box.example")[0] == 250
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not alive(pid), "the end")
        assert not told("bug")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
        first.wait()


# ------------------------------------------------------------ workers and adoption


def test_killed_while_it_adopts(tmp_path: Path) -> None:
    """Fewer workers than shards, and kill -9 again and again while they are emptied: each mail is
    carried, and what is carried again has the same id."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/inbound"
    house = GatewayProcess(tmp_path / "house", HOOK.format(head="workers = 3\n", url=url) + '[retry]\ndelays = ["1s"]\n').start()
    load = Load(house.port, 300)
    load.start()
    load.wait(300)
    load.stop()
    assert not load.strange
    assert house.stop() == 0
    assert {path.name for path in house.spool.iterdir()} == {"0", "1", "2"}
    house.config.write_text(house.config.read_text().replace("workers = 3", "workers = 1"))

    killed = [threading.Event(), threading.Event()]

    def slow(request: Request) -> tuple[int, dict[str, str]]:
        """Forty are answered before the first kill, forty more before the second: there is always some to adopt."""
        here = len(receiver.requests)
        for kill, over in enumerate(killed, 1):
            if here > kill * 40:
                over.wait(PATIENCE)
        return 200, {}

    with HttpReceiver(slow, port=port) as receiver:
        for kill, over in enumerate(killed, 1):
            house.launch()
            house.event("adopted")
            receiver.wait(kill * 40)
            house.kill()
            over.set()
        with house:
            wait_until(lambda: load.acked <= carried(receiver).keys(), "all is carried", 2 * PATIENCE)
            wait_until(lambda: [path.name for path in house.spool.iterdir()] == ["0"], "the others are gone")
        found = carried(receiver)
    assert found.keys() == load.acked
    assert all(len(set(ids)) == 1 for ids in found.values())
    assert not queued(house)


def test_a_worker_killed_under_load(gateway: Start) -> None:
    """The other goes on; what the dead one had is recovered; nobody is refused."""
    with HttpReceiver() as receiver:
        house = gateway(HOOK.format(head=WORKERS, url=receiver.url) + ADMIN)
        http = house.found("listening", protocol="http")[0]["address"]
        load = Load(house.port, 150)
        load.start()
        try:
            for kill in range(2):
                load.wait((kill + 1) * 40)
                os.kill(worker_pids(house)[kill % 2], signal.SIGKILL)
                house.event("worker_ended", count=kill + 1)
                house.event("worker_ready", count=3 + kill)
        finally:
            load.stop()
        # Those that were with the dead worker broke off; nobody was refused, nobody waited in vain.
        assert not [line for line in load.strange if "ConnectionRefused" in line or "Timeout" in line], load.strange[:10]
        wait_until(lambda: load.acked <= carried(receiver).keys(), "all is carried", 2 * PATIENCE)
        assert all(len(set(ids)) == 1 for ids in carried(receiver).values())
        wait_until(lambda: read(f"http://{http}/readyz")[0] == 200, "ready")
        # Each worker for itself.
        assert [event["again_in"] for event in house.found("worker_ended")] == [0.1, 0.1]


#: As ``sitecustomize``: a worker starts only while nobody holds it back.
HELD_BACK = """
import os, sys, time
while "gateway.supervisor" in sys.orig_argv and os.path.exists({file!r}):
    time.sleep(0.01)
"""


@pytest.mark.long
def test_a_worker_that_dies_again_and_again_waits_longer(gateway: Start, tmp_path: Path) -> None:
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / "sitecustomize.py").write_text(HELD_BACK.format(file=str(tmp_path / "back")))
    path = os.pathsep.join([str(tmp_path / "started"), os.environ.get("PYTHONPATH", "")])
    house = gateway(AWAY.format(head=WORKERS, tail=ADMIN, upstream=f"127.0.0.1:{free_port()}"), environment={"PYTHONPATH": path})
    http = house.found("listening", protocol="http")[0]["address"]
    # One that is there and does nothing is no better.
    os.kill(worker_pids(house)[1], signal.SIGSTOP)
    assert read(f"http://{http}/readyz") == (503, "worker 1 does not answer\n")
    os.kill(worker_pids(house)[1], signal.SIGCONT)
    wait_until(lambda: read(f"http://{http}/readyz")[0] == 200, "ready")
    # What is meant for the supervisor ends no worker.
    os.kill(worker_pids(house)[1], signal.SIGUSR2)
    for death in range(3):
        if death == 2:
            (tmp_path / "back").touch()
        os.kill(worker_pids(house)[0], signal.SIGKILL)
        house.event("worker_ended", count=death + 1)
        if death == 2:
            # That one is missing is seen, and which.
            assert read(f"http://{http}/readyz") == (503, "worker 0 is not up\n")
            status, text = read(f"http://{http}/healthz")
            assert (status, json.loads(text)["reason"]) == (503, "worker 0 is not up")
            assert len(json.loads(text)["workers"]) == 1
            (tmp_path / "back").unlink()
        assert send(house.port, "b@away.example")[0] == 250
        house.event("worker_ready", number=0, count=death + 2)
    assert [event["again_in"] for event in house.found("worker_ended")] == [0.1, 0.2, 0.4]
    wait_until(lambda: read(f"http://{http}/readyz")[0] == 200, "ready")
    assert len(queued(house)) == 3
