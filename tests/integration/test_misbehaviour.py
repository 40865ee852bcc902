"""Upstreams and receivers that misbehave, each through the whole gateway (bad input O1, W2).

One gateway process, with a sink of its own for every kind. A mail is promised (250), tried, and must
still be owed: no misbehaviour counts as delivered, and none fails the mail for good. What is looked at
is the row of the spool, the metrics and the event log; and the memory of the process, which no peer
may fill. The same tables are run on the bare sinks in ``tests/unit/test_relay.py`` and ``test_webhook.py``.
"""

from __future__ import annotations

import asyncio
import re
import smtplib
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from gateway.admin.control import call

from ..receivers import (
    ABOUT_TO_LAY,
    RECEIVERS,
    Misbehaviour,
    answers_before_the_body,
    answers_what_was_never_asked,
    misbehaving,
    says_two_answers_at_once,
)
from ..servers import PATIENCE, GatewayProcess, wait_until
from ..upstreams import UPSTREAMS, Rogue, Talk, injects_behind_starttls, never_shakes_hands, talks_on_instead_of_a_handshake

#: Seconds for one try.
TIMEOUT = 0.3
#: Seconds beyond it until the event is told, on a busy machine: not so many as any of them keeps silent.
MARGIN = 40.0
#: What all of them together may add to the memory of the process, in octets.
MEMORY = 48 * 2**20

UNDER_TLS = (injects_behind_starttls, talks_on_instead_of_a_handshake, never_shakes_hands)
#: These lay something into the connection for the request that comes next.
TWICE = (answers_what_was_never_asked, says_two_answers_at_once)

CONTENT = b"Subject: x\r\n\r\n.dot\r\n"

HEAD = """
hostname = "mx.gateway.example"

[[listeners]]
address = "127.0.0.1:0"

[admin]
address = "127.0.0.1:0"

[retry]
delays = ["1h"]
"""

SINK = """
[sinks.{name}]
{keys}
timeout = "{timeout}s"
concurrency = 1
on_failure = "dead_letter"

[[routes]]
recipients = ["*@{domain}.example"]
clients = ["127.0.0.0/8"]
sink = "{name}"
"""


class Everybody:
    """All that misbehave, each listening, on a loop in a thread of its own."""

    def __init__(self) -> None:
        self.sinks: dict[str, str] = {}
        self._ready: Future[None] = Future()
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._live(),), daemon=True)

    async def _live(self) -> None:
        async with AsyncExitStack() as stack:
            for talk in UPSTREAMS:
                rogue = await stack.enter_async_context(Rogue(talk))
                tls = "required" if talk in UNDER_TLS else "off"
                self.sinks[talk.__name__] = f'type = "relay"\nhosts = ["{rogue.address}"]\ntls = "{tls}"'
            for behaviour in (*RECEIVERS, answers_before_the_body):
                url = await stack.enter_async_context(misbehaving(behaviour))
                for client in ("direct", "pyreqwest", "aiohttp"):
                    form = "raw" if behaviour is answers_before_the_body else "standard"
                    self.sinks[f"{behaviour.__name__}-{client}"] = (
                        f'type = "webhook"\nurl = "{url}"\nclient = "{client}"\nformat = "{form}"'
                    )
            self._ready.set_result(None)
            await self._over.wait()

    def __enter__(self) -> Everybody:
        self._thread.start()
        self._ready.result(PATIENCE)
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        self._loop.close()


@dataclass
class House:
    """``idle``: octets of memory before the first mail."""

    process: GatewayProcess
    idle: int


def domain(sink: str) -> str:
    return sink.replace("_", "-")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with Everybody() as everybody:
        tables = [SINK.format(name=name, domain=domain(name), keys=keys, timeout=TIMEOUT) for name, keys in everybody.sinks.items()]
        with GatewayProcess(tmp_path_factory.mktemp("misbehaviour"), HEAD + "".join(tables)) as process:
            yield House(process, memory(process))


def memory(process: GatewayProcess) -> int:
    """The most octets that the process ever had in memory."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def metrics(process: GatewayProcess, sink: str) -> dict[str, float]:
    """``gateway_deliveries_total`` of this sink, by outcome."""
    address = process.found("listening", protocol="http")[0]["address"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=PATIENCE) as answer:
        text = answer.read().decode()
    found = re.findall(r"gateway_deliveries_total\{([^}]*)\} (\S+)", text)
    labels = [(dict(re.findall(r'(\w+)="([^"]*)"', words)), float(value)) for words, value in found]
    return {words["outcome"]: value for words, value in labels if words["sink"] == sink}


def tried(control: Path, sink: str, times: int) -> bool:
    """So often, as the row of the spool has it."""
    (row,) = call(control, "rows", sink=sink)
    return bool(row["attempts"] >= times)


def through(house: House, sink: str, tries: int = 1, content: bytes = CONTENT) -> None:
    """One mail to this sink: promised, tried so often, and still owed."""
    process = house.process
    with smtplib.SMTP("127.0.0.1", process.port, local_hostname="client.example", timeout=PATIENCE) as client:
        client.ehlo()
        client.mail("a@client.example")
        assert client.rcpt(f"b@{domain(sink)}.example")[0] == 250
        code, text = client.data(content)
    began = time.monotonic()
    assert code == 250
    id = text.decode().split()[-1]
    control = process.spool / "0" / "control.sock"
    for number in range(1, tries + 1):
        if number > 1:
            # What comes without being asked for has to be there before the next request is: behind it, it is its answer.
            wait_until(lambda: not ABOUT_TO_LAY, "what nobody asked for")
            # Read by each client, too: one of them has a thread of its own.
            metrics(process, sink)
            time.sleep(0.25)
            began = time.monotonic()
            call(control, "change", ids=None, action="retry", sink=sink)
        event = process.event("deferred", count=number, timeout=TIMEOUT + MARGIN, id=id)
        assert time.monotonic() - began < TIMEOUT + MARGIN
        assert re.fullmatch(r"4\d\d [ -~]{0,1100}", event["reply"]), event
        # The mark of a try is written a moment after it is told.
        wait_until(partial(tried, control, sink, number), f"{number} tries in the row")
    (row,) = call(control, "rows", sink=sink)
    assert (row["message_id"], row["state"]) == (id, "queued")
    assert row["recipients"] == [f"b@{domain(sink)}.example"]
    assert re.fullmatch(r"4\d\d [ -~]*", row["note"])
    told = metrics(process, sink)
    assert told.keys() == {"deferred"}
    assert told["deferred"] >= tries
    for outcome in ("delivered", "failed", "dead", "bounced", "bug"):
        assert not process.found(outcome, sink=sink), outcome
    assert not process.found("bug")
    assert memory(process) - house.idle < MEMORY


@pytest.mark.parametrize("talk", UPSTREAMS, ids=lambda talk: talk.__name__)
def test_no_misbehaving_upstream_counts_as_delivered(house: House, talk: Talk) -> None:
    through(house, talk.__name__)


@pytest.mark.parametrize("client", ["direct", "pyreqwest", "aiohttp"])
@pytest.mark.parametrize("behaviour", RECEIVERS, ids=lambda behaviour: behaviour.__name__)
def test_no_misbehaving_receiver_counts_as_delivered(house: House, behaviour: Misbehaviour, client: str) -> None:
    through(house, f"{behaviour.__name__}-{client}", tries=2 if behaviour in TWICE else 1)


@pytest.mark.parametrize("client", ["direct", "pyreqwest", "aiohttp"])
def test_a_200_before_the_body_was_sent_does_not_count_as_delivered(house: House, client: str) -> None:
    """More than the sockets between us hold: what the receiver answered it cannot have read."""
    through(house, f"answers_before_the_body-{client}", content=CONTENT + b"x" * 70 * 2**10 + b"\r\n" + (b"y" * 998 + b"\r\n") * 20_000)
