"""The counting receivers: what they say on the wire, what they count, and how they fail when they are asked to."""

from __future__ import annotations

import http.client
import json
import re
import signal
import smtplib
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gateway.cli import cli
from gateway.tools import load
from gateway.tools._sink import Sink
from gateway.tools.load import Plan
from gateway.tools.receive import Failure, Order, OrderError, Protocol, Receiver, Tally

from ..servers import PATIENCE, ROOT, wait_until

#: As it goes over the wire after DATA, with all that could be taken for its end.
CONTENT = b".\ra\r\n.\rb\r\n..\r\n\r\n.\r\r\n.x\r\n\n.\n\r.\r\n.\n\r\n"
ENVELOPE = b"EHLO c\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\n"


class Serving:
    """A receiver in a thread; ``tally`` ends it."""

    def __init__(self, order: Order) -> None:
        self.receiver = Receiver(order)
        self.address = self.receiver.address
        self.port = int(self.address.rpartition(":")[2]) if not self.address.startswith("unix:") else 0
        self.found: Tally | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        self.found = self.receiver.run()

    def tally(self) -> Tally:
        self.receiver.end()
        self.thread.join(PATIENCE)
        assert self.found is not None
        return self.found


@contextmanager
def serving(order: Order) -> Iterator[Serving]:
    server = Serving(order)
    with server.receiver:
        try:
            yield server
        finally:
            server.tally()


# ------------------------------------------------------------------------ the wire


@contextmanager
def talking(protocol: str = "smtp", **options: Any) -> Iterator[tuple[Sink, socket.socket]]:
    """A sink that works only when the test lets it, and a client."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # What is accepted inherits it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        listener.setblocking(False)
        sink = Sink([listener.fileno()], protocol, **options)
        try:
            with socket.create_connection(listener.getsockname()) as client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client.settimeout(PATIENCE)
                sink.turn(0.001)
                yield sink, client
        finally:
            sink.close()


def exchanged(sink: Sink, client: socket.socket, pieces: list[bytes]) -> list[str]:
    """The codes that came for these pieces, each of which was there alone."""
    answer = b""
    for piece in pieces:
        client.sendall(piece)
        sink.turn(0.0002)
    client.shutdown(socket.SHUT_WR)
    sink.turn(0.001)
    with suppress(ConnectionResetError):
        while more := client.recv(65536):
            answer += more
    return [line[:3].decode() for line in answer.split(b"\r\n")[:-1] if line[3:4] != b"-"]


def cuts(octets: bytes) -> Iterator[list[bytes]]:
    yield [octets]
    yield [octets[at : at + 1] for at in range(len(octets))]
    for at in range(1, len(octets)):
        yield [octets[:at], octets[at:]]


def test_the_end_of_data_is_found_wherever_it_is_cut() -> None:
    for pieces in cuts(CONTENT + b".\r\n"):
        with talking() as (sink, client):
            codes = exchanged(sink, client, [ENVELOPE + b"DATA\r\n", *pieces, b"QUIT\r\n"])
            assert codes == ["220", "250", "250", "250", "354", "250", "221"], pieces
            assert (sink.taken, sink.recipients, sink.octets) == (1, 1, len(CONTENT)), pieces


@pytest.mark.parametrize("protocol", ["smtp", "lmtp"])
def test_a_pipelined_conversation_wherever_it_is_cut(protocol: str) -> None:
    recipients = b"RCPT TO:<e@d.example>\r\n"
    said = ENVELOPE + recipients + b"BDAT 5\r\nQUIT\nBDAT 3 LAST\r\nab\nRSET\r\nnoop\r\nWHAT\r\nBDAT 4 LAST\r\nabcd" + ENVELOPE[8:]
    said += b"DATA\r\n.\r\nRCPT TO:<x@y.example>\r\nDATA\r\nQUIT\r\n"
    ends = ["250"] * (2 if protocol == "lmtp" else 1)
    for pieces in cuts(said):
        with talking(protocol) as (sink, client):
            codes = exchanged(sink, client, pieces)
            expected = [
                "220",
                "250",
                "250",
                "250",
                "250",
                "250",
                *ends,
                "250",
                "250",
                "500",
                "503",
                "250",
                "250",
                "354",
                "250",
                "503",
                "503",
                "221",
            ]
            assert codes == expected, pieces
            assert (sink.taken, sink.octets) == (2, 8), pieces


@pytest.mark.parametrize("delay", [0.0, 0.002])
def test_pipelined_requests_wherever_they_are_cut(delay: float) -> None:
    said = b"POST / HTTP/1.1\r\nHost: x\r\nContent-LENGTH: 5\r\n\r\nab\r\n\rGET / HTTP/1.1\r\n\r\nPOST / HTTP/1.1\r\ncontent-length:4\r\nExpect: 100-continue\r\n\r\n"
    for pieces in (
        cuts(said + b"abcdPOST / HTTP/1.1\r\ncontent-length: 0\r\nConnection: close\r\n\r\n") if not delay else [[said + b"abcd"]]
    ):
        with talking("http", delay=delay) as (sink, client):
            for piece in pieces:
                client.sendall(piece)
                sink.turn(0.0002)
            sink.turn(PATIENCE, 3 if delay else 4)
            answer = client.recv(65536)
            assert answer.count(b"HTTP/1.1 200 OK\r\n") == (3 if delay else 4), pieces
            assert answer.count(b"HTTP/1.1 100 Continue\r\n") == 1
            assert (sink.taken, sink.octets) == (3 if delay else 4, 9), pieces


def test_what_it_does_not_know() -> None:
    with talking() as (sink, client):
        assert exchanged(sink, client, [b"BDAT x\r\n"]) == ["220", "501"]
    with talking() as (sink, client):
        assert exchanged(sink, client, [b"x" * 9000]) == ["220"]
        assert sink.open == 0
    with talking("http") as (sink, client):
        client.sendall(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
        sink.turn(0.002)
        assert client.recv(65536).startswith(b"HTTP/1.1 411 ")
        assert (sink.taken, sink.open) == (0, 0)


def test_a_client_that_does_not_read_is_read_no_more() -> None:
    with talking() as (sink, client):
        client.settimeout(0.02)
        sent = 0
        with suppress(TimeoutError):
            while sent < 30_000_000:
                sent += client.send(b"NOOP\r\n" * 10_000)
                sink.turn(0.001)
        assert sent < 30_000_000
        # It reads at last: a reply for every NOOP that came whole, none lost.
        replies = 0
        client.setblocking(False)
        deadline = time.monotonic() + PATIENCE
        while replies < 1 + sent // 6 and time.monotonic() < deadline:
            sink.turn(0)
            with suppress(BlockingIOError):
                replies += client.recv(1 << 20).count(b"\n")
        assert replies == 1 + sent // 6


# --------------------------------------------------------------------------- counts


def test_smtplib_and_a_load_are_counted() -> None:
    with serving(Order()) as server:
        with smtplib.SMTP("127.0.0.1", server.port) as client:
            client.sendmail("a@b.example", ["c@d.example", "e@d.example"], "Subject: x\r\n\r\n.dot\r\n")
        wait_until(lambda: not server.receiver._sink.open, "the end of its connection")
        report = load.run(Plan(server.address, sessions=5, messages=100, sizes=[100_000], recipients=3, pipeline=True))
        tally = server.tally()
    assert report.good
    assert (tally.messages, tally.recipients, tally.connections) == (101, 302, 6)
    assert tally.octets == 100 * 100_000 + len("Subject: x\r\n\r\n..dot\r\n")
    assert sum(tally.each) == 101
    assert tally.most_open == 5


@pytest.mark.parametrize("way", [{}, {"pipeline": True}, {"bdat": True, "pipeline": True}], ids=["plain", "pipelined", "BDAT"])
def test_failures_are_those_asked_for(way: dict[str, Any]) -> None:
    fails = [Failure.read(text) for text in ("mail:10/451", "rcpt:10%/550", "content:20/452", "content:10/554", "drop:5", "connect:5/421")]
    with serving(Order(fails=fails)) as server:
        report = load.run(Plan(server.address, sessions=4, messages=2000, **way))
        tally = server.tally()
    assert report.begun == report.accepted + report.refused + report.broken == 2000
    # A connection that drops takes the next message with it that was said ahead.
    assert tally.dropped <= report.broken <= 2 * tally.dropped
    assert report.accepted == tally.messages
    assert tally.failed["mail"] == report.replies["mail"][451] == pytest.approx(200, abs=80)
    assert report.replies["rcpt"][550] == tally.failed["rcpt"]
    assert report.replies["content"].get(452, 0) + report.replies["content"].get(554, 0) == tally.failed["content"] == tally.refused
    assert report.replies["content"][452] > report.replies["content"][554] > 50
    assert tally.failed["drop"] == tally.dropped == pytest.approx(80, abs=40)
    assert tally.failed.get("connect", 0) == report.replies["greeting"].get(421, 0)


def test_a_delay_is_for_each_message_and_holds_nobody_else_up() -> None:
    with serving(Order(delay=0.2)) as server:
        began = time.monotonic()
        report = load.run(Plan(server.address, sessions=50, messages=100, pipeline=True))
        seconds = time.monotonic() - began
    assert report.good
    assert report.latency.minimum >= 200_000_000
    # One after the other they would take twenty.
    assert 0.4 <= seconds < 15


def test_more_clients_than_places_wait_for_one() -> None:
    with serving(Order(connections=2)) as server:
        report = load.run(Plan(server.address, sessions=6, messages=60, per_connection=5))
        tally = server.tally()
    assert report.good
    assert (tally.messages, tally.most_open) == (60, 2)


def test_http_failures_and_a_kept_connection() -> None:
    with serving(Order("http", fails=[Failure.read("content:50/503")])) as server:
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        answers = []
        for _ in range(100):
            client.request("POST", "/", body=b"x" * 100)
            answer = client.getresponse()
            answer.read()
            answers.append(answer.status)
        client.close()
        tally = server.tally()
    assert tally.connections == 1
    assert (answers.count(200), answers.count(503)) == (tally.messages, tally.refused)
    assert 25 < tally.refused < 75
    assert tally.octets == 10_000


def test_a_unix_socket(tmp_path: Path) -> None:
    with serving(Order("lmtp", f"unix:{tmp_path}/s")) as server:
        report = load.run(Plan(server.address, messages=10, lmtp=True, recipients=2))
    assert report.good
    assert report.replies["content"] == {250: 20}


@pytest.mark.parametrize(
    ("protocol", "texts", "why"),
    [
        ("smtp", ["rcpt"], "'rcpt' is not STAGE:PERCENT/CODE"),
        ("smtp", [""], "'' is not STAGE"),
        ("smtp", ["rcpt:-1/450"], "'rcpt:-1/450' is not STAGE"),
        ("smtp", ["rcpt:10"], "'rcpt:10': fail with which code? As in rcpt:10/451"),
        ("smtp", ["rcpt:101/450"], "'rcpt:101/450': 101 percent is more than all"),
        ("smtp", ["foo:10/450"], "'foo:10/450': smtp has no stage 'foo', but connect, hello, mail, rcpt, data, content, drop"),
        ("http", ["rcpt:1/500"], "'rcpt:1/500': http has no stage 'rcpt', but connect, content, drop"),
        ("smtp", ["rcpt:10%/250"], "'rcpt:10%/250': 250 is no failure; codes go from 400 to 599, as in rcpt:10/451"),
        ("http", ["content:10/204"], "204 is no failure; codes go from 300 to 599, as in content:10/503"),
        ("smtp", ["drop:5/450"], "'drop:5/450': the connection is closed without an answer, so there is no code: drop:5"),
        ("http", ["connect:5/503"], "so there is no code: connect:5"),
        ("smtp", ["rcpt:60/450", "drop:50", "rcpt:60/550"], "rcpt: its shares add up to 120 percent, more than all"),
    ],
)
def test_failures_that_cannot_be(protocol: Protocol, texts: list[str], why: str) -> None:
    with pytest.raises(OrderError, match=re.escape(why)):
        Receiver(Order(protocol, fails=[Failure.read(text) for text in texts]))


def test_shares_of_one_stage_add_up_to_all() -> None:
    with serving(Order(fails=[Failure.read(text) for text in ("content:33.4/450", "content:66.6/550")])) as server:
        report = load.run(Plan(server.address, messages=200))
    assert (report.accepted, report.refused) == (0, 200)
    assert report.replies["content"][550] > report.replies["content"][450] > 20


def test_where_it_cannot_listen_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        for place, code, why in (
            ("unix:", 2, "'unix:' names no path, as unix:/tmp/receive.sock does"),
            ("nowhere", 2, "'nowhere' is not host:port, [v6]:port or unix:/path"),
            (f"unix:{tmp_path}/no/s", 1, "No such file or directory; name a short path in a folder that exists"),
            (f"unix:{tmp_path}/file", 1, "there is a file in its place that is no socket; name another path"),
            (f"127.0.0.1:{port}", 1, "Address already in use; end who has it, or name another place"),
            ("192.0.2.1:2526", 1, "Cannot assign requested address; name an address of this machine"),
        ):
            told = CliRunner().invoke(cli, ["receive", "smtp", "--listen", place])
            assert (told.exit_code, why in told.output) == (code, True), told.output
            assert place in told.output
            assert "Errno" not in told.output


def test_the_command_ends_with_its_counts() -> None:
    command = [sys.executable, "-m", "gateway", "receive", "smtp", "--listen", "127.0.0.1:0", "--fail", "rcpt:100/550"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        address = process.stderr.readline().removeprefix("listening on ").strip()
        report = load.run(Plan(address, messages=3))
        process.send_signal(signal.SIGTERM)
        told, noise = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert noise == ""
    assert json.loads(told)["failed"] == {"rcpt": 3}
    assert report.refused == 3


def test_a_client_that_resets_is_forgotten_at_once() -> None:
    """An error of the socket is told as readable and writable: it is read, and the wait after it is a wait."""
    with talking() as (sink, client):
        client.sendall(b"EHLO me.example\r\n")
        sink.turn(0.01)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        before = time.process_time()
        sink.turn(0.5)
        assert time.process_time() - before < 0.25
