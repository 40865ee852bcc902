"""The relay and lmtp sinks over real sockets: pool, failover, deadlines, and how upstreams misbehave (row O1)."""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop

from gateway.config import LmtpConfig, RelayConfig
from gateway.contracts import Delivery, Outcome
from gateway.message import INLINE_LIMIT, Client, Content, Envelope, Message, Params, Recipient
from gateway.net import direct, secure
from gateway.sinks import relay
from gateway.sinks.relay import Host, LmtpSink, RelaySink

from ..loops import until
from ..servers import Upstream, free_port
from ..upstreams import (
    UPSTREAMS,
    Peer,
    Rogue,
    Talk,
    bare_lf_at_once,
    good,
    goodbye_as_greeting,
    injects_behind_starttls,
    is_a_web_server,
    never_shakes_hands,
    no_line_at_all,
    resets_at_once,
    silent_after_the_envelope,
    takes,
    talks_on_instead_of_a_handshake,
)

CONTENT = b"Subject: x\r\n\r\n.dot\r\n"


LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


# ------------------------------------------------------------------- the means


def on_both_loops(test: Callable[..., Coroutine[None, None, None]], loops: Sequence[str] = tuple(LOOPS)) -> Callable[..., None]:
    """Their transports differ (closing, TLS), and a program may bring either."""

    def run(loop: str, **given: Any) -> None:
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(test(**given))

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    signature = inspect.signature(test)
    loop = inspect.Parameter("loop", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    run.__signature__ = signature.replace(parameters=[loop, *signature.parameters.values()])  # type: ignore[attr-defined]
    both: Callable[..., None] = pytest.mark.parametrize("loop", loops)(run)
    return both


def on_uvloop(test: Callable[..., Coroutine[None, None, None]]) -> Callable[..., None]:
    """What takes long and has nothing to do with transports."""
    return on_both_loops(test, ["uvloop"])


def message(*recipients: str | Recipient, content: bytes | Path = CONTENT, sender: str = "a@x.example", **params: str) -> Message:
    mail_params: Params = dict(params)
    if isinstance(content, Path):
        stored = Content(path=str(content), size=content.stat().st_size)
    else:
        stored = Content(content, eight_bit=not content.isascii())
    found = [Recipient(r, r.partition("@")[0], r.partition("@")[2]) if isinstance(r, str) else r for r in recipients or ("b@y.example",)]
    return Message("018f", Envelope(sender, mail_params, found), stored, Client("192.0.2.1"), 0.0, trace=b"Received: from z\r\n\tby gw\r\n")


def begin(sink: RelaySink, sent: Message) -> asyncio.Future[Sequence[Outcome]]:
    done = asyncio.get_running_loop().create_future()

    def settled(delivery: Delivery, outcomes: Sequence[Outcome]) -> None:
        done.set_result(outcomes)

    sink.start(Delivery(sent.id, sent, sent.envelope.recipients, sink.name, 1, settled))
    return done


async def carry(sink: RelaySink, sent: Message | None = None, patience: float = 40.0) -> Sequence[Outcome]:
    return await asyncio.wait_for(begin(sink, sent or message()), patience)


def states(outcomes: Sequence[Outcome]) -> list[str]:
    return [outcome.state for outcome in outcomes]


@asynccontextmanager
async def to(*hosts: str, lmtp: bool = False, **settings: Any) -> AsyncIterator[RelaySink]:
    """A sink toward these hosts that must leave nothing behind."""
    settings = {"tls": "off", "timeout": 20.0, **settings}
    sink: RelaySink
    if lmtp:
        sink = LmtpSink("out", LmtpConfig(hosts=list(hosts), **settings), "gw.example")
    else:
        sink = RelaySink("out", RelayConfig(hosts=list(hosts), **settings), "gw.example")
    await sink.open()
    try:
        yield sink
    finally:
        await sink.close()
        assert not sink._connections
        assert not sink._tasks
        assert all(host.connections == 0 for host in sink._hosts)


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        yield server


# ------------------------------------------------------------------ the straight way


@on_both_loops
async def test_a_warm_connection_carries_mail_after_mail_without_a_task(upstream: Upstream) -> None:
    async with to(upstream.address) as sink:
        for _ in range(30):
            (outcome,) = await carry(sink)
            assert outcome.state == "delivered"
            assert outcome.remote == upstream.address
            before = len(asyncio.all_tasks())
            done = begin(sink, message())
            assert len(asyncio.all_tasks()) == before
            assert states(await done) == ["delivered"]
    assert upstream.connections == 1
    assert [taken.content for taken in upstream.wait(60)] == [b"Received: from z\r\n\tby gw\r\n" + CONTENT] * 60


@on_both_loops
async def test_one_write_for_a_transaction(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Rogue(good) as server, to(server.address) as sink:
        await carry(sink)
        (connection,) = sink._connections
        writes: list[bytes] = []
        assert connection.transport is not None
        transport = connection.transport

        class Counting:
            def write(self, data: bytes) -> None:
                writes.append(data)
                transport.write(data)

            def __getattr__(self, name: str) -> Any:
                return getattr(transport, name)

        monkeypatch.setattr(connection, "transport", Counting())
        await carry(sink)
        assert len(writes) == 1
        assert writes[0].startswith(b"MAIL FROM:<a@x.example>\r\nRCPT TO:<b@y.example>\r\nBDAT 46 LAST\r\nReceived")


@on_both_loops
async def test_the_next_delivery_takes_the_connection_that_is_just_free(upstream: Upstream) -> None:
    """Started from within ``settle``, as the Queue does."""
    async with to(upstream.address) as sink:
        done = asyncio.get_running_loop().create_future()
        left = 50

        def settled(delivery: Delivery, outcomes: Sequence[Outcome]) -> None:
            nonlocal left
            assert states(outcomes) == ["delivered"]
            left -= 1
            if left:
                start()
            else:
                done.set_result(None)

        def start() -> None:
            sent = message()
            sink.start(Delivery(sent.id, sent, sent.envelope.recipients, "out", 1, settled))

        start()
        await asyncio.wait_for(done, 60)
    assert upstream.connections == 1


@on_both_loops
async def test_many_at_once_share_the_hosts(upstream: Upstream) -> None:
    with Upstream() as other:
        async with to(upstream.address, other.address) as sink:
            outcomes = await asyncio.gather(*(carry(sink) for _ in range(20)))
            assert [states(outcome) for outcome in outcomes] == [["delivered"]] * 20
            assert len(sink._warm) == 20
        assert (upstream.connections, other.connections) == (10, 10)


@on_both_loops
async def test_outcomes_are_per_recipient(upstream: Upstream) -> None:
    upstream.refuse = {"RCPT TO:<no@": "550 5.1.1 who", "RCPT TO:<later@": "450 4.2.1 busy"}
    async with to(upstream.address) as sink:
        outcomes = await carry(sink, message("b@y.example", "no@y.example", "later@y.example"))
    assert states(outcomes) == ["delivered", "failed", "deferred"]


@on_both_loops
async def test_what_the_upstream_cannot_carry_fails_without_nesting() -> None:
    """Each settles the next: a thousand in a row are no thousand frames."""
    with Upstream(offers=["PIPELINING", "SIZE 10"]) as poor:
        async with to(poor.address) as sink:
            done = asyncio.get_running_loop().create_future()
            left = 2000

            def settled(delivery: Delivery, outcomes: Sequence[Outcome]) -> None:
                nonlocal left
                assert str(outcomes[0].reply).startswith("552 5.3.4 ")
                left -= 1
                if left:
                    start()
                else:
                    done.set_result(None)

            def start() -> None:
                sent = message()
                sink.start(Delivery(sent.id, sent, sent.envelope.recipients, "out", 1, settled))

            start()
            await asyncio.wait_for(done, 60)
        assert not poor.taken


@pytest.mark.parametrize("limit", ["LIMITS RCPTMAX=2", ""])
@on_both_loops
async def test_more_recipients_than_one_transaction_takes(limit: str) -> None:
    """RFC 9422, and 452 4.5.3 where no limit was told: the rest follows at once on the same connection."""
    taken: list[str] = []

    async def two(peer: Peer) -> None:
        await peer.hello("PIPELINING", "CHUNKING", *([limit] if limit else []))
        while True:
            if (await peer.hear()) == "QUIT":
                return
            replies, count = ["250 ok"], 0
            while (line := await peer.hear()).startswith("RCPT"):
                count += count < 2
                if count == 2 and len(replies) > 2:
                    replies.append("452 4.5.3 too many")
                else:
                    taken.append(line)
                    replies.append("250 ok")
            await peer.reader.readexactly(int(line.split()[1]))
            await peer.say(*replies, "250 taken")

    people = [f"p{number}@y.example" for number in range(5)]
    async with Rogue(two) as server, to(server.address) as sink:
        assert states(await carry(sink, message(*people))) == ["delivered"] * 5
        assert len(server.peers) == 1
    assert taken == [f"RCPT TO:<{address}>" for address in people]


@on_uvloop
async def test_the_time_that_is_left_is_reckoned_from_the_age_of_the_delivery() -> None:
    """Not from a wall clock, which somebody may have set since the mail was received."""
    with Upstream(offers=["PIPELINING", "DELIVERBY"]) as server:
        async with to(server.address) as sink:
            sent = message(BY="600;R")
            done = asyncio.get_running_loop().create_future()
            sink.start(
                Delivery("1", sent, sent.envelope.recipients, "out", 1, lambda _delivery, outcomes: done.set_result(outcomes), age=70.5)
            )
            [outcome] = await done
            assert outcome.state == "delivered"
            assert "BY=530;R" in server.wait(1)[0].mail


@on_both_loops
async def test_an_upstream_may_limit_mails_on_a_connection() -> None:
    with Upstream(offers=["PIPELINING", "CHUNKING", "LIMITS MAILMAX=2"]) as server:
        async with to(server.address) as sink:
            for _ in range(5):
                assert states(await carry(sink)) == ["delivered"]
        assert server.connections == 3


@on_both_loops
async def test_recipients_that_are_left_go_on_over_a_new_connection() -> None:
    with Upstream(offers=["PIPELINING", "CHUNKING", "LIMITS RCPTMAX=1 MAILMAX=1"]) as server:
        async with to(server.address) as sink:
            assert states(await carry(sink, message("b@y.example", "c@y.example", "d@y.example"))) == ["delivered"] * 3
        assert server.connections == 3
        assert [taken.recipients for taken in server.wait(3)] == [["<b@y.example>"], ["<c@y.example>"], ["<d@y.example>"]]


@on_both_loops
async def test_an_idle_connection_says_goodbye() -> None:
    async with Rogue(good) as server, to(server.address, idle=0.05) as sink:
        await carry(sink)
        await until(lambda: not sink._connections)
        await until(lambda: server.heard("QUIT") == 1)
        assert not sink._warm
        assert states(await carry(sink)) == ["delivered"]


# ------------------------------------------------------------------------- hosts


@on_both_loops
async def test_a_host_that_refuses_connections_is_asked_last(upstream: Upstream) -> None:
    dead = f"127.0.0.1:{free_port()}"
    async with to(dead, upstream.address) as sink:
        assert states(await carry(sink)) == ["delivered"]
        host = sink._hosts[0]
        assert host.until > sink.now()
        # Under load every further connection goes to the one that works, without trying the other.
        until = host.until = sink.now() + 1000.0
        await asyncio.gather(*(carry(sink) for _ in range(5)))
        assert host.until == until


@on_both_loops
async def test_no_host_at_all() -> None:
    dead = [f"127.0.0.1:{free_port()}" for _ in range(2)]
    async with to(*dead) as sink:
        (outcome,) = await carry(sink)
        assert outcome.state == "deferred"
        assert outcome.down
        assert outcome.reply.enhanced == "4.4.1"
        assert outcome.remote in dead
        # A host that failed is asked all the same where there is no better one.
        with Upstream(port=int(dead[0].rpartition(":")[2])):
            assert states(await carry(sink)) == ["delivered"]
            assert sink._hosts[0].until == 0.0


@on_both_loops
async def test_a_name_that_does_not_exist() -> None:
    for name in ("no-such-host.invalid:25", f"{'a' * 64}.example:25"):
        async with to("127.0.0.1:25") as sink:
            sink._hosts[0].name = name
            (outcome,) = await carry(sink)
            assert (outcome.state, outcome.down) == ("deferred", True)


@pytest.mark.parametrize("line", ["554 5.3.2 no service", "421 4.3.2 busy"])
@on_both_loops
async def test_a_host_that_turns_us_away_is_left_for_the_other(upstream: Upstream, line: str) -> None:
    async def away(peer: Peer) -> None:
        await peer.say(line)
        await peer.silence()

    async with Rogue(away) as server, to(server.address, upstream.address) as sink:
        assert states(await carry(sink)) == ["delivered"]
        assert len(server.peers) == 1


@on_both_loops
async def test_a_host_that_hangs_leaves_time_for_the_other(upstream: Upstream) -> None:
    async def hangs(peer: Peer) -> None:
        await peer.silence()

    async with Rogue(hangs) as server, to(server.address, upstream.address, timeout=6.0) as sink:
        assert states(await carry(sink)) == ["delivered"]


@on_both_loops
async def test_another_host_is_asked_only_while_no_content_has_left(upstream: Upstream) -> None:
    async def leaves_early(peer: Peer) -> None:
        await peer.hello("PIPELINING")
        await peer.envelope()

    async def leaves_late(peer: Peer) -> None:
        await peer.hello("PIPELINING", "CHUNKING")
        await peer.envelope()
        await peer.chunk()

    async with Rogue(leaves_early) as server, to(server.address, upstream.address) as sink:
        assert states(await carry(sink)) == ["delivered"]
    async with Rogue(leaves_late) as server, to(server.address, upstream.address) as sink:
        (outcome,) = await carry(sink)
        assert outcome.state == "deferred"
        assert "may have been taken" in outcome.reply.text
    assert len(upstream.taken) == 1


@pytest.mark.parametrize(
    ("label", "name", "port", "local"),
    [
        ("10.0.0.1:25", "10.0.0.1", 25, False),
        ("[::1]:2525", "::1", 2525, True),
        ("127.0.0.5:1", "127.0.0.5", 1, True),
        ("mx.example.net:587", "mx.example.net", 587, False),
        ("unix:/run/lmtp", "localhost", 0, True),
    ],
)
def test_hosts(label: str, name: str, port: int, local: bool) -> None:
    host = Host(label)
    assert (host.name, host.port, host.local) == (name, port, local)


def test_failures_are_remembered_longer_each_time() -> None:
    host = Host("127.0.0.1:25")
    now, waits = 100.0, []
    for _ in range(6):
        host.failed(now)
        host.failed(now)  # many deliveries failed at once: one failure
        waits.append(host.until - now)
        now = host.until
    assert waits == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0]


def test_exchangers_of_the_recipients_are_refused_clearly() -> None:
    with pytest.raises(ValueError, match="mx = true"):
        RelaySink("out", RelayConfig.model_construct(hosts=[], mx=True), "gw.example")


# ------------------------------------------------------------------- stale connections


@on_both_loops
async def test_an_upstream_that_closes_after_each_mail() -> None:
    """Its end of the connection may cross our next mail: nothing is deferred for that, nothing doubled."""
    taken: list[str] = []

    async def once(peer: Peer) -> None:
        await peer.hello("PIPELINING", "CHUNKING")
        taken.append(await peer.hear("MAIL "))
        await peer.hear("RCPT ")
        await peer.chunk()
        await peer.say("250 ok", "250 ok", "250 taken")

    async with Rogue(once) as server, to(server.address) as sink:
        for number in range(20):
            assert states(await carry(sink, message(sender=f"m{number}@x.example"))) == ["delivered"]
        assert sink._hosts[0].until == 0.0
    assert taken == [f"MAIL FROM:<m{number}@x.example>" for number in range(20)]


@on_both_loops
async def test_after_a_rest_no_content_leaves_before_a_reply() -> None:
    second: list[str] = []

    async def ends_at_the_second(peer: Peer) -> None:
        await peer.hello("PIPELINING", "CHUNKING")
        await peer.envelope()
        await peer.chunk()
        await peer.say("250 taken")
        second.append(await peer.hear("MAIL "))
        second.append(await peer.hear("RCPT "))
        with suppress(TimeoutError):
            second.append(str(await asyncio.wait_for(peer.reader.read(100), 0.05)))
        peer.reset()

    async with Rogue(ends_at_the_second, good) as server, to(server.address) as sink:
        sink.rested = 0.0
        assert states(await carry(sink)) == ["delivered"]
        await asyncio.sleep(0.01)
        assert states(await carry(sink)) == ["delivered"]
        assert len(server.peers) == 2
        assert sink._hosts[0].until == 0.0
    assert second == ["MAIL FROM:<a@x.example>", "RCPT TO:<b@y.example>"]


@on_both_loops
async def test_a_stale_connection_is_forgiven_once() -> None:
    """An upstream that always dies at the second mail of a connection, and at the first from then on."""

    async def dies_at_the_second(peer: Peer) -> None:
        await peer.hello("PIPELINING", "CHUNKING")
        await peer.envelope()
        await peer.chunk()
        await peer.say("250 taken")
        await peer.hear("MAIL ")

    async def dies_at_the_first(peer: Peer) -> None:
        await peer.hello("PIPELINING", "CHUNKING")
        await peer.hear("MAIL ")

    async with Rogue(dies_at_the_second, dies_at_the_first) as server, to(server.address) as sink:
        assert states(await carry(sink)) == ["delivered"]
        (outcome,) = await carry(sink)
        assert outcome.state == "deferred"
        assert len(server.peers) == 2


@on_both_loops
async def test_a_goodbye_while_idle_is_heard() -> None:
    async def idle(peer: Peer) -> None:
        await peer.hello("PIPELINING", "CHUNKING")
        await peer.envelope()
        await peer.chunk()
        await peer.say("250 taken")
        await peer.say("421 4.4.2 idle")

    async with Rogue(idle, good) as server, to(server.address) as sink:
        assert states(await carry(sink)) == ["delivered"]
        await until(lambda: not sink._warm)
        assert states(await carry(sink)) == ["delivered"]


# ------------------------------------------------------------------- large content


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "content"
    lines = b"".join(b"." * (number % 3) + b"%d" % number + b"\r\n" for number in range(150_000))
    # A CR and its LF on either side of the edge between two pieces, with a dot behind it.
    octets = b"x" * (INLINE_LIMIT - 1) + b"\r\n.edge\r\n" + lines
    path.write_bytes(octets)
    return path


@pytest.mark.parametrize("offers", [["PIPELINING", "CHUNKING"], ["CHUNKING"], ["PIPELINING"], []])
@on_uvloop
async def test_content_in_a_file_arrives_as_it_is(large: Path, offers: list[str]) -> None:
    with Upstream(offers=offers) as server:
        async with to(server.address) as sink:
            for _ in range(2):
                assert states(await carry(sink, message(content=large))) == ["delivered"]
        for taken in server.wait(2):
            assert taken.content == message().trace + message(content=large).content


@on_both_loops
async def test_an_upstream_that_reads_slowly_holds_the_file_back(large: Path) -> None:
    reads_no_more, go_on = asyncio.Event(), asyncio.Event()
    taken: list[bytes] = []

    async def slow(peer: Peer) -> None:
        peer.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        await peer.hello("PIPELINING")
        await peer.hear("MAIL ")
        await peer.hear("RCPT ")
        await peer.hear("DATA")
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await peer.say("250 ok", "250 ok", "354 go")
        reads_no_more.set()
        await go_on.wait()
        peer.writer.transport.resume_reading()  # type: ignore[attr-defined]
        taken.append(await peer.dotted())
        await peer.say("250 taken")
        await peer.silence()

    huge = large.with_name("huge")
    huge.write_bytes((b"y" * 78 + b"\r\n") * 400_000)
    async with Rogue(slow) as server, to(server.address) as sink:
        done = begin(sink, message(content=huge))
        await asyncio.wait_for(reads_no_more.wait(), 30)
        await asyncio.sleep(0.3)
        (connection,) = sink._connections
        assert connection.left > huge.stat().st_size / 2
        assert connection.transport is not None
        assert connection.transport.get_write_buffer_size() < 4 * INLINE_LIMIT
        go_on.set()
        server.peers[0].reader._limit = 2**26  # type: ignore[attr-defined]
        assert states(await asyncio.wait_for(done, 60)) == ["delivered"]
    assert taken[0].endswith(b"y\r\n")
    assert len(taken[0]) == huge.stat().st_size + len(message().trace)


@pytest.mark.parametrize("fault", ["short", "long", "gone"])
@pytest.mark.parametrize("offers", [["PIPELINING", "CHUNKING"], ["PIPELINING"]])
@on_both_loops
async def test_a_content_that_is_not_what_was_stored_is_not_sent(large: Path, fault: str, offers: list[str]) -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
    sent = message(content=large)
    sent.stored.size += {"short": 1, "long": -1, "gone": 0}[fault]
    if fault == "gone":
        os.unlink(large)
    with Upstream(offers=offers) as server:
        async with to(server.address) as sink:
            (outcome,) = await carry(sink, sent)
            assert (outcome.state, outcome.down) == ("deferred", False)
            assert sink._hosts[0].until == 0.0
        assert not server.taken
    assert [context["message"] for context in told] == ["the content of 018f cannot be read as it was stored"]


@on_both_loops
async def test_content_that_is_refused_on_its_way(large: Path) -> None:
    async def full(peer: Peer) -> None:
        await peer.hello("PIPELINING")
        await peer.envelope()
        await peer.hear("DATA")
        await peer.say("354 go")
        await peer.reader.readexactly(1000)
        await peer.say("552 5.3.4 too much")
        await peer.silence()

    async with Rogue(full) as server, to(server.address) as sink:
        (outcome,) = await carry(sink, message(content=large))
        assert (outcome.state, str(outcome.reply)) == ("failed", "552 5.3.4 too much")


# ------------------------------------------------------------------------- O1


@pytest.mark.parametrize("talk", [goodbye_as_greeting, resets_at_once, is_a_web_server, bare_lf_at_once], ids=lambda talk: talk.__name__)
@on_both_loops
async def test_a_connection_that_ends_before_the_mail_reaches_it(talk: Talk, upstream: Upstream) -> None:
    """Between the connection and the task that waited for it there are turns of the loop, in which all may be over."""
    opened = relay._open

    async def late(connection: relay.Connection) -> None:
        await opened(connection)
        await asyncio.sleep(0.05)

    async with Rogue(talk) as server:
        async with to(server.address) as sink:
            sink.reach = late
            (outcome,) = await carry(sink)
            assert outcome.state == "deferred"
            assert outcome.remote == server.address
        async with to(server.address, upstream.address) as sink:
            sink.reach = late
            sink._hosts.sort(key=lambda host: host.label != server.address)
            assert states(await carry(sink)) == ["delivered"]
    assert len(upstream.taken) == 1


@pytest.mark.parametrize("talk", UPSTREAMS, ids=lambda talk: talk.__name__)
@on_uvloop
async def test_an_upstream_that_misbehaves_defers_in_bounded_time(talk: Talk) -> None:
    tls = "required" if talk in (injects_behind_starttls, talks_on_instead_of_a_handshake, never_shakes_hands) else "off"
    async with Rogue(talk) as server, to(server.address, tls=tls, timeout=0.3) as sink:
        outcomes = await asyncio.gather(*(carry(sink, patience=30.0) for _ in range(3)))
        for (outcome,) in outcomes:
            assert outcome.state == "deferred"
            assert outcome.reply.temporary
            assert re.fullmatch(r"[ -~]{0,1100}", outcome.reply.text)
        # Nothing of a broken conversation is used again.
        assert not sink._warm


@on_both_loops
async def test_memory_is_bounded_while_an_upstream_floods() -> None:
    async with Rogue(no_line_at_all) as server, to(server.address) as sink:
        await carry(sink)
        assert all(connection.session._replies.pending < 2**17 for connection in sink._connections)


# -------------------------------------------------------------------------- LMTP


@on_both_loops
async def test_lmtp_over_a_unix_socket(tmp_path: Path) -> None:
    async def store(peer: Peer) -> None:
        await peer.say("220 store")
        await peer.hear("LHLO gw.example")
        await peer.say("250-store", "250-PIPELINING", "250 CHUNKING")
        await peer.hear("MAIL ")
        await peer.hear("RCPT ")
        await peer.hear("RCPT ")
        assert (await peer.chunk()).endswith(CONTENT)
        await peer.say("250 ok", "250 ok", "250 ok", "250 2.0.0 first", "452 4.2.2 full")
        await peer.silence()

    async with Rogue(store, path=str(tmp_path / "lmtp")) as server, to(server.address, lmtp=True) as sink:
        outcomes = await carry(sink, message("b@y.example", "c@y.example"))
        assert [str(outcome.reply) for outcome in outcomes] == ["250 2.0.0 first", "452 4.2.2 full"]
        assert outcomes[0].remote == server.address


# ------------------------------------------------------------------------- close


@on_both_loops
async def test_closing_defers_what_is_out_and_says_goodbye_to_what_is_not() -> None:
    async with Rogue(good) as server, to(server.address) as sink:
        await carry(sink)
        await sink.close()
        await until(lambda: server.heard("QUIT"))
        assert server.heard("QUIT") == 1
        assert states(await carry(sink)) == ["deferred"]
    async with Rogue(silent_after_the_envelope) as server, to(server.address) as sink:
        out = [begin(sink, message()) for _ in range(3)]
        await asyncio.sleep(0.05)
        out += [begin(sink, message()) for _ in range(3)]
        await sink.close()
        assert all(done.done() for done in out)
        assert {str(done.result()[0].reply) for done in out} == {"451 4.3.2 interrupted, will be tried again"}


@on_both_loops
async def test_closing_does_not_wait_for_an_upstream_that_reads_nothing(large: Path) -> None:
    async def deaf(peer: Peer) -> None:
        await peer.hello("PIPELINING", "CHUNKING")
        await peer.envelope()
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(60)

    async with Rogue(deaf) as server:
        async with to(server.address) as sink:
            done = begin(sink, message(content=large))
            await asyncio.sleep(0.1)
        assert states(done.result()) == ["deferred"]
        for task in server.tasks:
            task.cancel()


@on_both_loops
async def test_closing_while_a_connection_is_on_its_way() -> None:
    async def never(connection: relay.Connection) -> None:
        await asyncio.sleep(60)

    async with to("127.0.0.1:25") as sink:
        sink.reach = never
        done = begin(sink, message())
        await asyncio.sleep(0.01)
        await sink.close()
        assert states(done.result()) == ["deferred"]


@on_both_loops
async def test_a_fault_of_ours_is_told_and_loses_nothing() -> None:
    async def broken(connection: relay.Connection) -> None:
        raise RuntimeError("ours")

    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
    async with to("127.0.0.1:25") as sink:
        sink.reach = broken
        (outcome,) = await carry(sink)
        assert (outcome.state, str(outcome.reply)) == ("deferred", "451 4.3.0 internal fault in the sink")
    assert [str(context["exception"]) for context in told] == ["ours"]


@on_both_loops
async def test_what_is_still_in_the_buffer_of_a_closed_connection_is_dropped_in_time(large: Path) -> None:
    async def refuses_and_reads_no_more(peer: Peer) -> None:
        await peer.hello("PIPELINING")
        await peer.envelope()
        await peer.hear("DATA")
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await peer.say("354 go")
        await until(lambda: any(each.transport is not None and each.transport.get_write_buffer_size() for each in sink._connections))
        await peer.say("552 5.3.4 too much")
        await asyncio.sleep(60)

    huge = large.with_name("huge")
    huge.write_bytes(b"x" * 78 + b"\r\n" + b"".join([b"y" * 78 + b"\r\n"] * 200_000))
    async with Rogue(refuses_and_reads_no_more) as server:
        async with to(server.address, timeout=10.0) as sink:
            sink.linger = 3600.0
            assert states(await carry(sink, message(content=huge))) == ["failed"]
            assert sink._connections
            sink.linger = 0.1
            await until(lambda: not sink._connections)
        for task in server.tasks:
            task.cancel()


# --------------------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def secured(authority: trustme.CA, *names: str, then: Talk = takes) -> Talk:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)

    async def talk(peer: Peer) -> None:
        await peer.hello("PIPELINING", "STARTTLS", "CHUNKING")
        line = await peer.hear()
        if line != "STARTTLS":
            await peer.say("250 2.1.0 in the clear")
            await then(peer)
            return
        await peer.say("220 go")
        await peer.writer.start_tls(context)
        await peer.hear("EHLO gw.example")
        await peer.say("250-rogue.example", "250-PIPELINING", "250 CHUNKING")
        await then(peer)

    return talk


@pytest.mark.parametrize("tls", ["opportunistic", "required"])
@on_both_loops
async def test_any_certificate_will_do_unless_verify_is_asked_for(authority: trustme.CA, tls: str) -> None:
    async with Rogue(secured(authority, "somebody.example")) as server, to(server.address, tls=tls) as sink:
        for _ in range(3):
            assert states(await carry(sink)) == ["delivered"]
        assert server.heard("STARTTLS") == 1
        (connection,) = sink._connections
        assert connection.transport is not None
        assert connection.transport.get_extra_info("ssl_object").version() in ("TLSv1.2", "TLSv1.3")


@on_both_loops
async def test_verify_wants_an_authority_and_the_name(authority: trustme.CA, tmp_path: Path) -> None:
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    async with Rogue(secured(authority, "127.0.0.1")) as server:
        async with to(server.address, tls="verify", ca_file=ca_file) as sink:
            assert states(await carry(sink)) == ["delivered"]
        async with to(server.address, tls="verify") as sink:
            (outcome,) = await carry(sink)
            assert (outcome.state, outcome.down) == ("deferred", True)
            assert "TLS handshake failed" in outcome.reply.text
    async with Rogue(secured(authority, "127.0.0.2")) as server, to(server.address, tls="verify", ca_file=ca_file) as sink:
        (outcome,) = await carry(sink)
        assert (outcome.state, outcome.down) == ("deferred", True)
        assert "IP address mismatch" in outcome.reply.text
        assert server.heard("MAIL") == 0


@on_both_loops
async def test_opportunistic_goes_on_in_the_clear_where_the_handshake_fails(authority: trustme.CA) -> None:
    clear = secured(authority, "x.example")
    async with Rogue(talks_on_instead_of_a_handshake, clear) as server, to(server.address, tls="opportunistic") as sink:
        assert states(await carry(sink)) == ["delivered"]
        assert server.heard("STARTTLS") == 1
        assert server.heard("MAIL") == 1
        assert sink._hosts[0].until == 0.0
        assert sink._hosts[0].clear_until > sink.now()


@on_both_loops
async def test_large_content_under_tls(authority: trustme.CA, large: Path) -> None:
    expected = message().trace + message(content=large).content

    async def takes_large(peer: Peer) -> None:
        await peer.envelope()
        content = b""
        while True:
            line = await peer.hear("BDAT ")
            content += await peer.reader.readexactly(int(line.split()[1]))
            if line.endswith("LAST"):
                break
            await peer.say("250 more")
        assert content == expected
        await peer.say("250 taken")
        await peer.silence()

    async with Rogue(secured(authority, "x.example", then=takes_large)) as server, to(server.address, tls="required") as sink:
        assert states(await carry(sink, message(content=large))) == ["delivered"]


@on_both_loops
async def test_a_password_goes_to_this_machine_in_the_clear() -> None:
    async def login(peer: Peer) -> None:
        await peer.hello("AUTH PLAIN", "PIPELINING", "CHUNKING")
        assert await peer.hear("AUTH ") == "AUTH PLAIN AHVzZXIAcGFzcw=="
        await peer.say("235 2.7.0 welcome")
        await takes(peer)

    async with Rogue(login) as server, to(server.address, username="user", password="pass") as sink:
        assert states(await carry(sink)) == ["delivered"]


@on_both_loops
async def test_a_password_goes_nowhere_else_in_the_clear() -> None:
    async def login(peer: Peer) -> None:
        await peer.hello("AUTH PLAIN", "PIPELINING", "CHUNKING")
        await takes(peer)

    async with Rogue(login) as server, to(server.address, username="user", password="pass") as sink:
        sink._hosts[0].local = False
        (outcome,) = await carry(sink)
        assert (outcome.state, outcome.down) == ("deferred", True)
        assert "password is not sent" in outcome.reply.text
        assert server.heard("AUTH") == 0


@on_both_loops
async def test_a_wrong_password_bounces_nothing() -> None:
    async def no(peer: Peer) -> None:
        await peer.hello("AUTH PLAIN")
        await peer.hear("AUTH ")
        await peer.say("535 5.7.8 wrong")
        await peer.silence()

    async with Rogue(no) as server, to(server.address, username="user", password="pass") as sink:
        (outcome,) = await carry(sink)
        assert (outcome.state, outcome.down) == ("deferred", True)
        assert str(outcome.reply) == "451 4.3.0 AUTH was answered with 535 5.7.8 wrong"


def nameless() -> ssl.SSLError:
    """An alert of the other side, within the handshake, that Python has no name for."""
    incoming = ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(incoming, ssl.MemoryBIO(), server_hostname="mx.example")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    incoming.write(b"\x15\x03\x03\0\2\2\0")
    with pytest.raises(ssl.SSLError) as told:
        tls.do_handshake()
    return told.value


def test_an_alert_without_a_name_has_words_all_the_same() -> None:
    error = nameless()
    assert error.reason is None
    assert relay._reason(error) == "protocol error"
    assert direct.reason(error) == "TLS: protocol error"
    assert secure._told(error)
