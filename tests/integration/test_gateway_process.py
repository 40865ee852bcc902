"""The gateway as a process: signals, exit codes, workers, restarts, ports, descriptors."""

from __future__ import annotations

import json
import os
import resource
import signal
import smtplib
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path

import pytest

from ..conftest import Start
from ..servers import PATIENCE, ROOT, GatewayProcess, HttpReceiver, Request, Upstream, free_port, wait_until

BASE = """
hostname = "mx.gateway.example"

[[listeners]]
address = "127.0.0.1:0"
"""

BOX = (
    BASE
    + """
[sinks.box]
type = "file"
path = "{folder}/box"

[[routes]]
recipients = ["*@box.example"]
sink = "box"
"""
)

#: A relay that may be down: what is sent there stays in the spool.
AWAY = (
    """
{head}
"""
    + BASE
    + """
[sinks.out]
type = "relay"
hosts = ["{upstream}"]
tls = "off"

[retry]
delays = ["1s"]

[[routes]]
recipients = ["*@away.example"]
sink = "out"

{tail}
"""
)


def dial(port: int) -> smtplib.SMTP:
    client = smtplib.SMTP("127.0.0.1", port, local_hostname="client.example", timeout=PATIENCE)
    try:
        client.ehlo()
    except BaseException:
        client.close()
        raise
    return client


def send(port: int, recipient: str, text: str = "hello") -> tuple[int, bytes]:
    client = dial(port)
    try:
        client.mail("a@client.example")
        code, reply = client.rcpt(recipient)
        return client.data(f"Subject: {text}\r\n\r\n{text}\r\n") if code == 250 else (code, reply)
    finally:
        with suppress(smtplib.SMTPException, OSError):
            client.quit()
        client.close()


def begin(port: int, recipient: str) -> smtplib.SMTP:
    """A client whose content is half way."""
    client = dial(port)
    client.mail("a@client.example")
    client.rcpt(recipient)
    assert client.docmd("DATA")[0] == 354
    client.send(b"Subject: half\r\n")
    return client


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE).close()
    except ConnectionRefusedError:
        return True
    return False


def read(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            # A zombie that its parent has not looked at yet is no life.
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        # It may go between opening and reading, too.
        return False


def queued(gateway: GatewayProcess) -> list[dict[str, object]]:
    """What ``gateway queue list`` says."""
    done = subprocess.run(
        [sys.executable, "-m", "gateway", "queue", "list", "--spool", str(gateway.spool), "--limit", "100000", "--json"],
        capture_output=True,
        timeout=2 * PATIENCE,
        check=True,
        cwd=ROOT,
    )
    rows: list[dict[str, object]] = json.loads(done.stdout)
    return rows


# -------------------------------------------------------------------- the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_clean_end(gateway: Start, number: int) -> None:
    """Before the end of data 421; after it the answer; nobody new; exit code 0."""
    go = threading.Event()

    def slow(request: Request) -> tuple[int, dict[str, str]]:
        go.wait(PATIENCE)
        return 200, {}

    with HttpReceiver(slow) as receiver:
        house = gateway(
            BASE
            + f"""
[sinks.app]
type = "webhook"
url = "{receiver.url}"

[[routes]]
recipients = ["*@app.example"]
sink = "app"
acknowledge = "delivered"
"""
        )
        idle, half, owed = dial(house.port), begin(house.port, "b@app.example"), begin(house.port, "b@app.example")
        owed.send(b"\r\nwhole\r\n.\r\n")
        receiver.wait(1)
        house.signal(number)
        house.event("draining")
        for client in (idle, half):
            assert client.getreply() == (421, b"4.3.2 shutting down, try again later")
            client.close()
        wait_until(lambda: refuses(house.port), "the port is closed")
        assert house.running
        go.set()
        assert owed.getreply()[0] == 250
        assert owed.getreply()[0] == 421
        owed.close()
        assert house.wait() == 0
        assert house.event("stopped")["queued"] == 0
        assert len(receiver.requests) == 1


def test_nothing_is_lost_when_it_ends_under_load(gateway: Start, tmp_path: Path) -> None:
    """What was answered 250 is in the box or in the spool."""
    house = gateway(BOX.format(folder=tmp_path))
    acked: list[str] = []
    ended = threading.Event()

    def load(number: int) -> None:
        count = 0
        while not ended.is_set():
            with suppress(smtplib.SMTPException, OSError), closing(dial(house.port)) as client:
                for _ in range(20):
                    count += 1
                    text = f"{number}-{count}"
                    client.mail("a@client.example")
                    client.rcpt("b@box.example")
                    if client.data(f"Subject: {text}\r\n\r\n.\r\n")[0] == 250:
                        acked.append(text)

    threads = [threading.Thread(target=load, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(acked) > 200, "load", 2 * PATIENCE)
        code = house.stop()
    finally:
        ended.set()
    for thread in threads:
        thread.join()
    assert code == 0
    kept = {str(row["message_id"]) for row in queued(house)}
    boxed = Counter(
        line.removeprefix(b"Subject: ").decode()
        for path in (tmp_path / "box" / "new").iterdir()
        for line in path.read_bytes().split(b"\r\n")
        if line.startswith(b"Subject: ")
    )
    assert house.event("stopped")["queued"] == len(kept)
    missing = [text for text in acked if text not in boxed]
    assert len(missing) <= len(kept), f"{len(missing)} lost"
    assert max(boxed.values()) == 1


# -------------------------------------------------------------------- the start


def test_a_port_that_is_taken(gateway: Start, tmp_path: Path) -> None:
    house = gateway(BOX.format(folder=tmp_path))
    second = GatewayProcess(tmp_path / "second", BOX.format(folder=tmp_path).replace("127.0.0.1:0", house.server))
    second.launch()
    assert second.wait() == 1
    assert second.noise == [f"listeners[0].address: cannot listen on {house.server}: Address already in use"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_spool_that_another_has(gateway: Start, tmp_path: Path, workers: int) -> None:
    house = gateway(BOX.format(folder=tmp_path))
    second = GatewayProcess(
        tmp_path / "second", f"workers = {workers}\n" + BOX.format(folder=tmp_path) + f'[spool]\npath = "{house.spool}"\n'
    )
    second.launch()
    assert second.wait() == 1
    assert len(second.noise) == 1
    assert second.noise[0].startswith("spool.path: ")
    assert send(house.port, "b@box.example")[0] == 250


def test_mail_survives_kill_and_goes_out_once_there_is_somebody(tmp_path: Path) -> None:
    port = free_port()
    house = GatewayProcess(tmp_path / "house", AWAY.format(head="", tail="", upstream=f"127.0.0.1:{port}"))
    house.start()
    for number in range(5):
        assert send(house.port, "b@away.example", f"mail-{number}")[0] == 250
    house.kill()
    with Upstream(port=port) as upstream, house:
        assert house.event("recovered")["messages"] == 5
        taken = upstream.wait(5)
        assert sorted(mail.content.split(b"\r\n\r\n")[1] for mail in taken) == [b"mail-%d\r\n" % number for number in range(5)]
        wait_until(lambda: not queued(house), "the spool is empty")


# --------------------------------------------------------------------- workers

WORKERS = "workers = 2"
ADMIN = '[admin]\naddress = "127.0.0.1:0"'


def worker_pids(house: GatewayProcess) -> dict[int, int]:
    """The newest process of each worker."""
    return {event["number"]: event["pid"] for event in house.found("worker_ready")}


def spread(house: GatewayProcess, recipient: str) -> Counter[int]:
    """Send until each of two workers took a mail; how many each took. One that is held up for a moment
    leaves all to the other meanwhile."""
    deadline = time.monotonic() + 2 * PATIENCE
    number = 0
    while True:
        number += 1
        assert send(house.port, recipient)[0] == 250
        house.event("accepted", count=number)
        taken = Counter(event["worker"] for event in house.found("accepted"))
        if len(taken) == 2:
            return taken
        assert time.monotonic() < deadline, f"one worker took everything: {taken}"


def test_workers_share_the_port_and_nothing_else(gateway: Start, tmp_path: Path) -> None:
    house = gateway(AWAY.format(head=WORKERS, tail=ADMIN, upstream=f"127.0.0.1:{free_port()}"))
    assert len(worker_pids(house)) == 2
    (smtp, http) = house.found("listening")
    assert (smtp["protocol"], http["protocol"]) == ("smtp", "http")
    taken = spread(house, "b@away.example")
    assert len(taken) == 2
    assert sorted(path.name for path in house.spool.iterdir()) == ["0", "1"]
    # One list of both shards, while they live and when they do not.
    assert len(queued(house)) == taken.total()

    def asked(path: str) -> str:
        """What is said once every worker has answered: who is held up for two seconds is told of as missing."""
        wait_until(lambda: read(f"http://{http['address']}/readyz") == (200, "ready\n"), "ready")
        status, text = read(f"http://{http['address']}/{path}")
        return text if status == 200 else ""

    accepted = f"gateway_messages_accepted_total {taken.total()}.0"
    queue = f'gateway_queue_messages{{sink="out",state="queued"}} {taken.total()}.0'
    wait_until(lambda: {accepted, queue} <= set(asked("metrics").splitlines()), f"{accepted}, {queue}")

    def shares() -> list[int]:
        return [worker["queue"]["out"]["queued"] for worker in json.loads(asked("healthz") or '{"workers": []}')["workers"]]

    wait_until(lambda: shares() == [taken[0], taken[1]], f"{taken} in the shards")
    assert house.stop() == 0
    assert not any(alive(pid) for pid in worker_pids(house).values())
    assert len(queued(house)) == taken.total()


def test_a_worker_that_dies_is_started_again(gateway: Start) -> None:
    """Its mail is recovered by the next one; the other serves meanwhile; no connection is refused."""
    house = gateway(AWAY.format(head=WORKERS, tail=ADMIN, upstream=f"127.0.0.1:{free_port()}"))
    http = house.found("listening")[1]["address"]
    taken = spread(house, "b@away.example")
    victim = worker_pids(house)[0]
    os.kill(victim, signal.SIGKILL)
    ended = house.event("worker_ended", number=0)
    assert ended["pid"] == victim
    assert ended["code"] == -signal.SIGKILL
    assert send(house.port, "b@away.example")[0] == 250
    house.event("worker_ready", number=0, count=2)
    assert house.event("recovered", worker=0)["messages"] == taken[0]
    assert worker_pids(house)[0] != victim
    wait_until(lambda: read(f"http://{http}/readyz")[0] == 200, "ready again")
    assert len(queued(house)) == taken.total() + 1
    assert house.stop() == 0


def test_workers_do_not_outlive_their_supervisor(tmp_path: Path) -> None:
    house = GatewayProcess(tmp_path / "house", WORKERS + "\n" + BOX.format(folder=tmp_path))
    house.start()
    pids = worker_pids(house)
    idle = dial(house.port)
    os.kill(house.pid, signal.SIGKILL)
    assert idle.getreply()[0] == 421
    idle.close()
    wait_until(lambda: not any(alive(pid) for pid in pids.values()), "the workers end")
    house.wait()
    with house:
        assert send(house.port, "b@box.example")[0] == 250


def test_workers_end_with_what_is_owed(gateway: Start) -> None:
    go = threading.Event()

    def slow(request: Request) -> tuple[int, dict[str, str]]:
        go.wait(PATIENCE)
        return 200, {}

    with HttpReceiver(slow) as receiver:
        house = gateway(
            WORKERS
            + BASE
            + f"""
[sinks.app]
type = "webhook"
url = "{receiver.url}"

[[routes]]
recipients = ["*@app.example"]
sink = "app"
acknowledge = "delivered"
"""
        )
        owed = begin(house.port, "b@app.example")
        owed.send(b"\r\nwhole\r\n.\r\n")
        receiver.wait(1)
        house.signal(signal.SIGTERM)
        wait_until(lambda: refuses(house.port), "the port is closed")
        go.set()
        assert owed.getreply()[0] == 250
        owed.close()
        assert house.wait() == 0


# ---------------------------------------------------------------------- reload


@pytest.mark.parametrize("head", ["", WORKERS])
def test_hangup_reads_the_file_again(gateway: Start, tmp_path: Path, head: str) -> None:
    config = head + BOX.format(folder=tmp_path)
    house = gateway(config)
    count = 2 if head else 1
    assert send(house.port, "b@new.example")[0] == 550
    house.config.write_text(house.config.read_text().replace("*@box.example", "*@new.example"))
    house.signal(signal.SIGHUP)
    house.event("reloaded", count=count)
    assert send(house.port, "b@new.example")[0] == 250
    # A file with a fault changes nothing, and every fault is told.
    good = house.config.read_text()
    house.config.write_text(good.replace("recipients =", "recipient =") + "\n[nonsense]\n")
    house.signal(signal.SIGHUP)
    assert len(house.event("reload_refused")["faults"]) >= 2
    assert send(house.port, "b@new.example")[0] == 250
    # So does what only another process can do.
    house.config.write_text(good + '[admin]\naddress = "127.0.0.1:0"\n')
    house.signal(signal.SIGHUP)
    told = house.event("reload_refused", count=2)
    assert told["faults"] == ["admin: only a restart or a hand-over (SIGUSR2) can change this"]
    assert send(house.port, "b@new.example")[0] == 250
    assert len(house.found("reloaded")) == count


# ----------------------------------------------------------------- descriptors


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit is Linux's")
def test_out_of_descriptors(gateway: Start, tmp_path: Path) -> None:
    """A2: the client is told, nothing spins, and all is well when there are some again."""
    house = gateway(BOX.format(folder=tmp_path))
    inside = dial(house.port)
    hard = resource.prlimit(house.pid, resource.RLIMIT_NOFILE)[1]
    house.spare(3)
    clients = [socket.create_connection(("127.0.0.1", house.port), timeout=PATIENCE) for _ in range(10)]
    greetings = [client.recv(100)[:10] for client in clients]
    assert greetings.count(b"220 mx.gat") == 3
    assert greetings.count(b"421 4.3.2 ") == 7
    assert house.event("shed")["reason"] == "cannot accept: Too many open files"
    before, since = _cpu(house.pid), time.monotonic()
    time.sleep(1.0)
    assert _cpu(house.pid) - before < 0.5 * (time.monotonic() - since)
    for client in clients:
        client.close()
    assert inside.noop()[0] == 250
    inside.close()
    resource.prlimit(house.pid, resource.RLIMIT_NOFILE, (hard, hard))
    assert send(house.port, "b@box.example")[0] == 250


def _cpu(pid: int) -> float:
    """Seconds of CPU that the process has used."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---------------------------------------------------------------- in a program

PROGRAM = """
import sys
from gateway import Gateway, Message, Reply

app = Gateway(listen="127.0.0.1:0", log="json")

@app.recipients("*@app.example")
async def inbound(message: Message) -> Reply | None:
    print(message.parsed().subject, flush=True)

sys.exit(app.run())
"""


def test_the_program_of_the_readme() -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True)
    try:
        assert process.stderr is not None
        assert process.stdout is not None
        listening = json.loads(process.stderr.readline())
        assert listening["event"] == "listening"
        port = int(listening["address"].rpartition(":")[2])
        assert send(port, "b@app.example", "from a program")[0] == 250
        assert process.stdout.readline() == "from a program\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
        events = [json.loads(line)["event"] for line in process.stderr]
        assert "bug" not in events
        assert events[-1] == "stopped"
    finally:
        process.kill()
        process.communicate()
