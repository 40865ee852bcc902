"""gateway/net/http.py against real sockets, with each client behind it (bad input W2)."""

from __future__ import annotations

import asyncio
import gzip
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from gateway.net.http import ANSWER_LIMIT, Answer, Body, Headers, HttpClient, HttpFault, Kind, http_client, shown

from ..loops import until
from ..receivers import MISBEHAVIOURS, Misbehaviour, misbehaving, never_reads, read_request, receiving


@pytest.fixture(params=["direct", "pyreqwest", "aiohttp"])
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = request.param
    return found


@asynccontextmanager
async def client(kind: Kind, connections: int = 8) -> AsyncIterator[HttpClient]:
    http = http_client(kind, connections)
    try:
        yield http
    finally:
        await http.close()


async def post(http: HttpClient, url: str, headers: Headers = (), body: Body = b"body", seconds: float = 30.0) -> Answer:
    return await http.post(url, headers, body, asyncio.get_running_loop().time() + seconds)


async def test_an_answer_comes_with_its_status_and_the_headers_that_are_asked_for(kind: Kind) -> None:
    async with (
        receiving((503, {"Retry-After": "7", "Content-Type": "text/plain", "X-Other": "y"}, b"busy")) as receiver,
        client(kind) as http,
    ):
        answer = await post(
            http, receiver.url + "?a=1", [("x-one", "1"), ("x-two", "a"), ("x-two", "b"), ("content-type", "message/rfc822")]
        )
    assert answer == Answer(503, {"retry-after": "7", "content-type": "text/plain"}, b"busy")
    (request,) = receiver.requests
    assert request.path == "/inbound?a=1"
    assert (request.one("x-one"), request.all("x-two"), request.body) == ("1", ["a", "b"], b"body")
    assert request.one("content-type") == "message/rfc822"
    assert request.one("content-length") == "4"
    assert not request.all("accept-encoding")


async def test_a_body_can_be_an_iterator_of_either_kind(kind: Kind) -> None:
    pieces = [b"a" * 100_000, b"b" * 100_000, b"c"]

    async def later() -> AsyncIterator[bytes]:
        for piece in pieces:
            await asyncio.sleep(0)
            yield piece

    def at_once() -> Iterator[bytes]:
        yield from pieces

    async with receiving() as receiver, client(kind) as http:
        for body in (later(), at_once(), b"".join(pieces) * 3):
            headers = [] if isinstance(body, bytes) else [("content-length", "200001")]
            assert (await post(http, receiver.url, headers, body)).status == 204
    assert [len(request.body) for request in receiver.requests] == [200_001, 200_001, 600_003]
    assert receiver.requests[0].body == b"".join(pieces) == receiver.requests[1].body
    # A receiver that does not know chunks (WSGI) sees how much comes.
    assert [request.one("content-length") for request in receiver.requests] == ["200001", "200001", "600003"]


async def test_connections_are_kept_and_never_more_than_allowed(kind: Kind) -> None:
    connections: set[asyncio.StreamWriter] = set()
    out = most = 0
    go_on = asyncio.Event()

    async def counts(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal out, most
        connections.add(writer)
        while True:
            await read_request(reader)
            out += 1
            most = max(most, out)
            await go_on.wait()
            await asyncio.sleep(0.002)
            out -= 1
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            await writer.drain()

    async with misbehaving(counts) as url, client(kind, connections=4) as http:
        answering = asyncio.gather(*(post(http, url) for _ in range(100)))
        await until(lambda: out == 4)
        await asyncio.sleep(0.1)  # a fifth would come now
        go_on.set()
        answers = await answering
    assert [answer.status for answer in answers] == [200] * 100
    assert most == 4
    assert len(connections) <= (100 if kind == "aiohttp" else 6)


@pytest.mark.parametrize("behaviour", MISBEHAVIOURS, ids=lambda behaviour: behaviour.__name__)
async def test_what_is_no_whole_answer_is_a_fault_within_the_deadline(kind: Kind, behaviour: Misbehaviour) -> None:
    async with misbehaving(behaviour) as url, client(kind) as http:
        began = asyncio.get_running_loop().time()
        with pytest.raises(HttpFault) as fault:
            await post(http, url, seconds=0.6)
        # The bound is ours; the margin is for a busy machine.
        assert asyncio.get_running_loop().time() - began < 30
        assert fault.value.reason
        assert url not in fault.value.reason


async def test_a_peer_that_does_not_read_is_late(kind: Kind) -> None:
    async with misbehaving(never_reads) as url, client(kind) as http:
        with pytest.raises(HttpFault) as fault:
            await post(http, url, body=b"x" * 20_000_000, seconds=0.5)
        assert fault.value.late


async def test_waiting_for_a_connection_counts_in_the_deadline(kind: Kind) -> None:
    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        await asyncio.sleep(60)

    async with misbehaving(slow) as url, client(kind, connections=1) as http:
        first = asyncio.create_task(post(http, url, seconds=30))
        await asyncio.sleep(0.1)
        with pytest.raises(HttpFault) as fault:
            await post(http, url, seconds=0.2)
        assert fault.value.late
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first


async def test_nobody_there(kind: Kind) -> None:
    async with misbehaving(never_reads) as url:
        pass
    async with client(kind) as http:
        with pytest.raises(HttpFault) as fault:
            await post(http, url + "?token=secret")
    assert not fault.value.late
    assert "secret" not in fault.value.reason


async def test_redirects_are_told_and_not_followed(kind: Kind) -> None:
    async with receiving((302, {"Location": "/elsewhere"}, b"")) as receiver, client(kind) as http:
        assert (await post(http, receiver.url)).status == 302
    assert len(receiver.requests) == 1


async def test_of_an_endless_answer_a_bounded_part_is_read(kind: Kind) -> None:
    sent = 0

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await read_request(reader)
        writer.write(b"HTTP/1.1 500 Oh\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()
            sent += 65536

    async with misbehaving(endless) as url, client(kind) as http:
        answer = await post(http, url)
        assert (answer.status, len(answer.body), answer.whole) == (500, ANSWER_LIMIT, False)
        before = sent
        await asyncio.sleep(0.2)
        # The connection is closed, not read on: what still moves is what lay in the kernel.
        assert sent - before < 64 * 1024 * 1024
        assert (await post(http, url)).status == 500


async def test_an_answer_as_long_as_is_read_is_whole(kind: Kind) -> None:
    answers: list[tuple[int, dict[str, str], bytes]] = [
        (200, {}, b"x" * size) for size in (ANSWER_LIMIT - 1, ANSWER_LIMIT, ANSWER_LIMIT + 1)
    ]
    async with receiving(*answers) as receiver, client(kind) as http:
        for _, _, body in answers:
            answer = await post(http, receiver.url)
            assert (answer.status, answer.body, answer.whole) == (200, body[:ANSWER_LIMIT], len(body) <= ANSWER_LIMIT)


async def test_a_closed_client_stays_closed(kind: Kind) -> None:
    async with receiving() as receiver, client(kind, connections=1) as http:
        assert (await post(http, receiver.url)).status == 204
        await http.close()
        for _ in range(2):
            with pytest.raises(HttpFault, match="closed"):
                await post(http, receiver.url)
    assert len(receiver.requests) == 1


async def test_nothing_is_decompressed(kind: Kind) -> None:
    bomb = gzip.compress(b"\0" * 10_000_000)
    async with receiving((200, {"Content-Encoding": "gzip"}, bomb)) as receiver, client(kind) as http:
        answer = await post(http, receiver.url)
    assert answer.body == bomb


async def test_an_answer_to_nothing_does_not_answer_the_next_request(kind: Kind) -> None:
    """Keep-alive desync: octets behind an answer must not count as the answer to what comes next."""
    for late in (False, True):
        requests = 0
        said = asyncio.Event()

        async def desynchronised(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, late: bool = late, said: asyncio.Event = said
        ) -> None:
            nonlocal requests
            await read_request(reader)
            requests += 1
            if requests > 1:
                writer.write(b"HTTP/1.1 503 Not now\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
                await writer.drain()
                return
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            if late:
                await writer.drain()
                await asyncio.sleep(0.05)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")
            await writer.drain()
            said.set()
            await read_request(reader)
            requests += 1
            await asyncio.sleep(60)

        async with misbehaving(desynchronised) as url, client(kind) as http:
            assert (await post(http, url)).status == 200
            await said.wait()
            await asyncio.sleep(0.2)
            try:
                second = (await post(http, url, seconds=0.5)).status
            except HttpFault:
                second = 0
            assert second != 200


@pytest.mark.parametrize("value", ["a\r\nx-evil: 1", "a\nb", "a\0b"])
async def test_a_header_of_two_lines_is_refused(kind: Kind, value: str) -> None:
    async with receiving() as receiver, client(kind) as http:
        with pytest.raises(ValueError, match=r"(?i)header"):
            await post(http, receiver.url, [("x-one", value)])
    assert not receiver.requests


async def test_a_proxy_of_the_environment_is_not_used(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    async with receiving() as receiver, client(kind) as http:
        assert (await post(http, receiver.url)).status == 204


def test_what_is_shown_of_a_url_holds_no_secrets() -> None:
    assert shown("https://user:pass@app.example:8443/in/bound?token=t#f") == "https://app.example:8443/in/bound"


def test_the_libraries_are_imported_with_the_first_client() -> None:
    code = "import sys, gateway.net.http; print([name for name in ('aiohttp', 'pyreqwest', 'httptools') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
