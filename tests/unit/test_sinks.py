"""The small sinks (stdout, discard, python), the threads behind them, and the table of sinks."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from gateway.config import SINKS as MODELS
from gateway.config import DiscardConfig, PluginSinkConfig, PythonConfig, StdoutConfig
from gateway.contracts import BROKEN, DELIVERED, AsyncSink, Delivery, Outcome
from gateway.message import Message
from gateway.reply import Reply
from gateway.sinks import SINKS, make_sink
from gateway.sinks.discard import DiscardSink
from gateway.sinks.python import PythonSink
from gateway.sinks.stdout import StdoutSink
from gateway.sinks.threads import Threads

from ..deliveries import ID, Try, carried, mail, recipient


def test_every_type_of_the_configuration_has_its_sink() -> None:
    assert set(SINKS) == {*MODELS, "python"}


def test_other_packages_bring_sinks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("carrier", "gateway.sinks.discard:DiscardSink", "gateway.sinks")
    monkeypatch.setattr(
        "importlib.metadata.entry_points", lambda group, name: [point] if (group, name) == ("gateway.sinks", "carrier") else []
    )
    sink = make_sink("pigeon", PluginSinkConfig.model_validate({"type": "carrier"}), "mx.example.net")
    assert isinstance(sink, DiscardSink)
    with pytest.raises(LookupError, match="sink pigeon: no package offers the type 'raven'"):
        make_sink("pigeon", PluginSinkConfig.model_validate({"type": "raven"}), "mx.example.net")


async def test_discard_settles_before_start_returns() -> None:
    sink = make_sink("null", DiscardConfig(), "mx.example.net")
    one = Try(mail(recipients=[recipient("b@us.example"), recipient("c@us.example")]))
    sink.start(one.delivery)
    assert one.delivery.settled
    assert [outcome.state for outcome in await one.outcomes()] == ["delivered", "delivered"]


class Careless(AsyncSink):
    """Breaks the contract of ``carry`` as it is told."""

    def __init__(self, does: Callable[[], Any]) -> None:
        super().__init__("careless")
        self._does = does

    def carry(self, delivery: Delivery) -> Any:
        return self._does()


async def _nothing() -> None:
    return None


async def _no_outcome() -> list[str]:
    return ["delivered"]


def _raises() -> None:
    raise ZeroDivisionError("a fault of theirs")


@pytest.mark.parametrize("does", [_raises, lambda: None, lambda: 5, _nothing, _no_outcome])
async def test_whatever_a_sink_of_somebody_else_does_the_delivery_is_settled(does: Callable[[], Any]) -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    one = Try(mail())
    Careless(does).start(one.delivery)
    assert list(await one.outcomes()) == [BROKEN]
    assert [context["message"] for context in told] == [f"sink careless failed on {one.delivery.id}"]


async def test_a_sink_may_return_a_future() -> None:
    outcome = asyncio.get_running_loop().create_future()
    one = Try(mail())
    Careless(lambda: outcome).start(one.delivery)
    outcome.set_result([DELIVERED])
    assert list(await one.outcomes()) == [DELIVERED]


# --------------------------------------------------------------------- stdout


class Pipe:
    """Stands for standard output while a sink is opened."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        self.reading = os.fdopen(reading, "rb", buffering=0)
        self.writing = os.fdopen(writing, "w")

    def read(self) -> bytes:
        found: bytes = self.reading.read(1 << 20)
        return found

    async def sink(self, **keys: Any) -> StdoutSink:
        sink = make_sink("out", StdoutConfig(**keys), "mx.example.net")
        assert isinstance(sink, StdoutSink)
        before, sys.stdout = sys.stdout, self.writing
        try:
            await sink.open()
        finally:
            sys.stdout = before
        return sink


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    pipe.reading.close()
    pipe.writing.close()


async def test_stdout_is_the_standard_body_one_line_each(pipe: Pipe) -> None:
    sink = await pipe.sink()
    for subject in (b"one", b"two"):
        assert (await carried(sink, mail(b"Subject: " + subject + b"\r\n\r\nline\r\nline\r\n"))).state == "delivered"
    lines = pipe.read().splitlines()
    assert [json.loads(line)["data"]["subject"] for line in lines] == ["one", "two"]
    assert json.loads(lines[0])["type"] == "message.received"
    await sink.close()


async def test_a_reader_that_is_gone_is_a_sink_that_is_down(pipe: Pipe) -> None:
    sink = await pipe.sink()
    pipe.reading.close()
    outcome = await carried(sink, mail())
    assert (outcome.state, outcome.down, outcome.reply.code) == ("deferred", True, 451)
    await sink.close()


async def test_a_reader_that_does_not_read_never_blocks_the_loop(pipe: Pipe) -> None:
    sink = await pipe.sink(timeout=0.3)
    large = mail(b"Subject: large\r\n\r\n" + b"x" * 300_000)
    while not select.select([pipe.reading], [], [], 0)[0]:  # what is late before a thread has it is not begun
        began = time.monotonic()
        outcomes = await asyncio.gather(carried(sink, large), *(carried(sink, mail(id=f"{ID[:-1]}{number}")) for number in range(3)))
        assert time.monotonic() - began < 30
        assert all(outcome.state == "deferred" and outcome.down for outcome in outcomes)
    # What was given up before it began is never written; the line that had begun ends.
    read = b""
    while not read.endswith(b"\n"):
        read += await asyncio.to_thread(pipe.read)
    assert json.loads(read)["data"]["subject"] == "large"
    sink._timeout = 20.0
    assert (await carried(sink, mail(b"Subject: after\r\n\r\n"))).state == "delivered"
    assert json.loads(await asyncio.to_thread(pipe.read))["data"]["subject"] == "after"
    await sink.close()


async def test_standard_output_may_be_non_blocking(pipe: Pipe) -> None:
    sink = await pipe.sink()
    os.set_blocking(pipe.writing.fileno(), False)
    carrying = asyncio.create_task(carried(sink, mail(b"Subject: large\r\n\r\n" + b"x" * 300_000)))
    read = b""
    while not read.endswith(b"\n"):
        read += await asyncio.to_thread(pipe.read)
    assert (await carrying).state == "delivered"
    assert len(json.loads(read)["data"]["text"]) == 300_000
    await sink.close()


# --------------------------------------------------------------------- python


def python_sink(function: Callable[[Message], Any], **keys: Any) -> PythonSink:
    sink = make_sink("inbound", PythonConfig(function=function, **keys), "mx.example.net")
    assert isinstance(sink, PythonSink)
    return sink


async def calls(function: Callable[[Message], Any], **keys: Any) -> Outcome:
    sink = python_sink(function, **keys)
    await sink.open()
    try:
        return await carried(sink, mail())
    finally:
        await sink.close()


async def test_the_function_gets_the_message_of_this_delivery() -> None:
    seen: list[Message] = []

    async def inbound(message: Message) -> None:
        seen.append(message)

    message = mail(
        b"Subject: =?utf-8?Q?Gr=C3=BC=C3=9Fe?=\r\n\r\ntext\r\n", recipients=[recipient("b@us.example"), recipient("c@us.example")]
    )
    sink = python_sink(inbound)
    one = Try(message, message.envelope.recipients[1:])
    sink.start(one.delivery)
    assert [outcome.state for outcome in await one.outcomes()] == ["delivered"]
    (given,) = seen
    assert [each.address for each in given.envelope.recipients] == ["c@us.example"]
    assert (given.envelope.mail_from, given.client.ip) == ("a@client.example", "192.0.2.7")
    assert given.parsed().subject == "Grüße"
    assert given.content == message.content
    # The message itself still has everybody.
    assert len(message.envelope.recipients) == 2
    await sink.close()


RESULTS = [
    (None, "delivered", "250 2.0.0 delivered"),
    (Reply(250, "2.1.0", "taken"), "delivered", "250 2.1.0 taken"),
    (Reply(354, "", "go on"), "deferred", "354 go on"),
    (Reply(450, "4.2.1", "later"), "deferred", "450 4.2.1 later"),
    (Reply(550, "5.7.1", "no"), "failed", "550 5.7.1 no"),
]


@pytest.mark.parametrize(("result", "state", "reply"), RESULTS)
async def test_what_the_function_returns_is_the_outcome(result: Reply | None, state: str, reply: str) -> None:
    async def coroutine(message: Message) -> Reply | None:
        await asyncio.sleep(0)
        return result

    def plain(message: Message) -> Reply | None:
        return result

    class Callable_:  # noqa: N801 (a class whose instances are called)
        async def __call__(self, message: Message) -> Reply | None:
            return result

    functions: list[Any] = [coroutine, plain, Callable_(), partial(lambda _, message: coroutine(message), 1), partial(coroutine)]
    for function in functions:
        outcome = await calls(function)
        assert (outcome.state, str(outcome.reply), outcome.down) == (state, reply, False)


async def test_a_plain_function_runs_beside_the_loop() -> None:
    threads: list[threading.Thread] = []

    def plain(message: Message) -> None:
        threads.append(threading.current_thread())

    await calls(plain)
    assert threads[0] is not threading.main_thread()


@pytest.mark.parametrize("wrong", ["raises", "times out by itself", "returns", "stops"])
async def test_a_fault_of_the_function_defers_and_is_told(wrong: str) -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))

    def act() -> Any:
        if wrong == "raises":
            raise RuntimeError("bug of the program")
        if wrong == "times out by itself":
            raise TimeoutError
        if wrong == "stops":
            raise StopIteration
        return "250 ok"

    async def coroutine(message: Message) -> Any:
        return act()

    for function in (coroutine, lambda message: act()):
        outcome = await calls(function)
        assert (outcome.state, outcome.reply.code, outcome.reply.enhanced) == ("deferred", 451, "4.3.0")
    assert len(told) == 2
    assert all(isinstance(context["exception"], Exception) for context in told)


async def test_a_function_that_never_ends_is_deferred_in_time() -> None:
    ended = threading.Event()
    cancelled = False

    async def coroutine(message: Message) -> None:
        nonlocal cancelled
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled = True
            raise

    for function in (coroutine, lambda message: ended.wait(20)):
        outcome = await calls(function, timeout=0.1)
        assert (outcome.state, outcome.reply.enhanced) == ("deferred", "4.4.2")
    assert cancelled
    ended.set()


# -------------------------------------------------------------------- threads


async def test_threads_are_few_and_used_again() -> None:
    threads = Threads("test", 3)
    names: set[str] = set()
    three = threading.Barrier(3)

    def work() -> int:
        names.add(threading.current_thread().name)
        three.wait(20)
        return 1

    assert sum(await asyncio.gather(*(threads.run(work) for _ in range(30)))) == 30
    assert names == {"test-1", "test-2", "test-3"}
    threads.close()


async def test_work_that_nobody_waits_for_is_not_begun() -> None:
    threads = Threads("test", 1)
    begun: list[str] = []
    hold = threading.Event()
    first = asyncio.create_task(threads.run(lambda: hold.wait(20)))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(threads.run(lambda: begun.append("second")))
    await asyncio.sleep(0.01)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    hold.set()
    await first
    await threads.run(lambda: begun.append("third"))
    assert begun == ["third"]
    threads.close()


def test_threads_do_not_keep_a_program_from_ending() -> None:
    code = (
        "import asyncio, time\n"
        "from gateway.sinks.threads import Threads\n"
        "async def main():\n"
        "    try:\n"
        "        await asyncio.wait_for(Threads('t', 1).run(lambda: time.sleep(60)), 0.2)\n"
        "    except TimeoutError:\n"
        "        print('gave up')\n"
        "asyncio.run(main())\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout) == (0, "gave up\n")
