"""The parsers as pytest-benchmark suites: ``make bench``, each time compared with the last saved run.

The tasks are those of ``gateway bench`` (``gateway/tools/bench``), on every implementation that runs in this process:
an answer that is not the gateway's fails here. Below them stand rows that only the gateway has: lines that nobody looks at
(taken apart when asked), chunks, dot-stuffing, replies.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from gateway._parser import Receiver, ReplyReceiver, stuff
from gateway.tools.bench.corpora import READ, envelopes, mails
from gateway.tools.bench.implementations import AbsentError, BrokenError, Gateway, Here, Implementation, StandardLibrary
from gateway.tools.bench.peers import Aiosmtpd, Slimta
from gateway.tools.bench.tasks import Task, difference, tasks

CORPORA = {corpus.name: corpus for corpus in [*envelopes(), *mails()]}
PRESENT: list[Implementation] = [Gateway()]
for kind in (StandardLibrary, Aiosmtpd, Slimta):
    try:
        PRESENT.append(kind())
    except AbsentError as why:
        print(f"{kind.name}: {why}")


def rows() -> Iterator[Any]:
    for task in tasks(list(CORPORA.values())):
        for implementation in PRESENT:
            try:
                work = implementation.work(task)
            except BrokenError:
                continue
            if work is not None:
                work.close()
                yield pytest.param(task, implementation, id=f"{task.id}, {implementation.name}")


@pytest.mark.parametrize(("task", "implementation"), list(rows()))
def test_task(benchmark: Any, task: Task, implementation: Any) -> None:
    benchmark.group = task.id
    benchmark.extra_info["amount"] = f"{task.amount} {task.unit.removesuffix('/s')}"
    work, ours = implementation.work(task), Gateway().work(task)
    try:
        expected = ours.answer()
        try:
            found = difference(expected, work.answer())
        except BrokenError as error:
            pytest.skip(f"{implementation.name}: {error}")
        assert found is None
        assert isinstance(work, Here)
        benchmark(work.once)
    finally:
        work.close()


# --- the gateway's own -----------------------------------------------------------------


@pytest.mark.parametrize("task", [task for task in tasks(envelopes()) if task.kind == "commands"], ids=lambda task: task.id)
def test_commands_unread(benchmark: Any, task: Task) -> None:
    benchmark.group = f"{task.id}, nothing looked at"
    receiver = Receiver()

    def turn() -> int:
        receiver.feed(task.wire)
        count = 0
        while receiver.command() is not None:
            count += 1
        return count

    assert benchmark(turn) == task.wire.count(b"\r\n")


@pytest.mark.parametrize("name", ["base64", "text", "dotted"])
def test_chunk(benchmark: Any, name: str) -> None:
    """BDAT: as many octets, nothing stuffed."""
    benchmark.group = f"chunk of 64 KiB: {name}"
    content = CORPORA[name].contents[0]

    def turn() -> bytes | None:
        receiver = Receiver()
        receiver.begin()
        receiver.feed(content)
        return receiver.chunk(READ)

    assert benchmark(turn) == content


@pytest.mark.parametrize("name", ["base64", "text", "dotted"])
def test_stuff(benchmark: Any, name: str) -> None:
    benchmark.group = f"stuffing 64 KiB: {name}"
    content = CORPORA[name].contents[0]
    stuffed = benchmark(partial(stuff, content))
    assert len(stuffed) - len(content) == sum(line.startswith(b".") for line in content.split(b"\r\n"))


def test_replies(benchmark: Any) -> None:
    benchmark.group = "replies of an upstream, 100 at once"
    receiver = ReplyReceiver()
    octets = b"250 2.1.0 Ok\r\n" * 100

    def turn() -> int:
        receiver.feed(octets)
        count = 0
        while receiver.reply() is not None:
            count += 1
        return count

    assert benchmark(turn) == 100
