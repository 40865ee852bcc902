"""gateway/net/direct.py: what counts as an answer, however it is cut; connections, deadlines, TLS.

What every client must do stands in ``test_http.py``; here is what is our own."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import trustme
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.net.direct import HEAD_LIMIT, JOINED, WIRE_LIMIT, Connection, DirectClient, Exchange, Result
from gateway.net.http import ANSWER_LIMIT, Answer, HttpFault

from ..loops import until
from ..receivers import answers_before_the_body, misbehaving, never_answers, never_reads, read_request

URL = "http://receiver.example/inbound"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


# ------------------------------------------------------- one answer, without a network


class Wire(asyncio.Transport):
    """The far side of one connection, as far as a connection asks."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.stuck = 0
        self.over = False
        self.broken = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.broken:
            raise RuntimeError("broken")
        self.sent += data

    def get_write_buffer_size(self) -> int:
        return self.stuck

    def is_closing(self) -> bool:
        return self.over

    def abort(self) -> None:
        self.over = True


def tells(results: list[Result], result: Result) -> None:
    """What ``begin`` is told with."""
    results.append(result)


class Stage:
    """One client with one connection to ``URL``, and what comes of a request on it."""

    def __init__(self) -> None:
        self.client = DirectClient(8)
        self.wire = Wire()
        self.results: list[Result] = []
        target = self.client._aim(URL)
        self.client._target = target
        self.client._loop = asyncio.get_running_loop()
        self.connection = Connection(self.client, target.origin)
        self.connection.connection_made(self.wire)
        self.client.rests(self.connection, 60.0)

    def post(self) -> None:
        deadline = asyncio.get_running_loop().time() + 60
        self.client.begin(URL, [("x-one", "1")], b"body", deadline, tells, self.results)
        assert self.connection.exchange is not None, "a request goes out on the connection that rests"
        self.client.deliver()

    def comes(self, *pieces: bytes, end: bool = True) -> Result:
        """The answer in these pieces, then the end of the connection."""
        for piece in pieces:
            if not self.wire.over:
                self.connection.data_received(piece)
        if end and not self.wire.over:
            self.connection.eof_received()
            self.connection.connection_lost(None)
        (result,) = self.results
        return result

    def forget(self) -> None:
        if self.client._timer is not None:
            self.client._timer.cancel()


def answer_to(*pieces: bytes, end: bool = True) -> Answer | None:
    """What one request gets: an answer, or None for an HttpFault."""
    stage = Stage()
    try:
        stage.post()
        result = stage.comes(*pieces, end=end)
    finally:
        stage.forget()
    assert isinstance(result, (Answer, HttpFault)), result
    assert isinstance(result, Answer) or URL not in result.reason
    return result if isinstance(result, Answer) else None


HEAD = b"HTTP/1.1 200 OK\r\n"
ANSWERS: dict[str, tuple[bytes, Answer]] = {
    "length": (OK, Answer(200, {}, b"ok")),
    "length 0": (b"HTTP/1.1 201 Created\r\nContent-Length:0\r\n\r\n", Answer(201, {}, b"")),
    "nothing": (b"HTTP/1.1 204 No Content\r\ndate: now\r\n\r\n", Answer(204, {}, b"")),
    "no reason": (b"HTTP/1.1 200\r\ncontent-length: 1\r\n\r\nx", Answer(200, {}, b"x")),
    "kept fields": (
        b"HTTP/1.1 503 Busy\r\nRETRY-AFTER:  7 \r\nContent-Type: text/plain\r\nretry-after: 9\r\ncontent-length: 4\r\n\r\nbusy",
        Answer(503, {"retry-after": "7", "content-type": "text/plain"}, b"busy"),
    ),
    "chunks": (
        HEAD + b'Transfer-Encoding: Chunked\r\n\r\n2;a=b\r\nok\r\n00003;c="d"\r\nay!\r\n0\r\nx-trailer: 1\r\n\r\n',
        Answer(200, {}, b"okay!"),
    ),
    "interim": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nretry-after: 1\r\n\r\nHTTP/1.1 422 No\r\ncontent-length: 0\r\n\r\n",
        Answer(422, {}, b""),
    ),
    "until the end": (HEAD + b"\r\nall that comes", Answer(200, {}, b"all that comes")),
    "1.0": (b"HTTP/1.0 200 OK\r\n\r\nold", Answer(200, {}, b"old")),
    "1.0 with a length": (b"HTTP/1.0 500 Oh\r\ncontent-length: 1\r\n\r\n-", Answer(500, {}, b"-")),
    "lines that look like others": (HEAD + b"content-length: 11\r\n\r\n\r\n\r\nRTSP/1.", Answer(200, {}, b"\r\n\r\nRTSP/1.")),
    "closing": (HEAD + b"connection: close\r\ncontent-length: 2\r\n\r\nok", Answer(200, {}, b"ok")),
    "close among others": (HEAD + b"connection: x, Close\r\ncontent-length: 2\r\n\r\nok", Answer(200, {}, b"ok")),
    "a field in UTF-8": (
        HEAD + b"content-type: t\xc3\xa9\xff\r\ncontent-length: 0\r\n\r\n",
        Answer(200, {"content-type": "té\ufffd"}, b""),
    ),
    "no one switches": (HEAD + b"connection: upgrade\r\nupgrade: h2c\r\ncontent-length: 2\r\n\r\nok", Answer(200, {}, b"ok")),
}

NO_ANSWERS: dict[str, bytes] = {
    "nothing at all": b"",
    "half a head": HEAD + b"content-length: 2\r\n",
    "half a body": HEAD + b"content-length: 3\r\n\r\nok",
    "no end of chunks": HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\nok\r\n",
    "no end of trailers": HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n",
    "only interim": b"HTTP/1.1 100 Continue\r\n\r\n",
    "chunks and a length": HEAD + b"transfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "a length and chunks": HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "a length in the trailers": HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\ncontent-length: 2\r\n\r\n",
    "two lengths": HEAD + b"content-length: 2\r\ncontent-length: 4\r\n\r\nokok",
    "the same length twice": HEAD + b"content-length: 2\r\ncontent-length: 2\r\n\r\nok",
    "a list of lengths": HEAD + b"content-length: 2, 2\r\n\r\nok",
    "a length with a sign": HEAD + b"content-length: +2\r\n\r\nok",
    "a negative length": HEAD + b"content-length: -2\r\n\r\nok",
    "a hexadecimal length": HEAD + b"content-length: 0x2\r\n\r\nok",
    "an empty length": HEAD + b"content-length:\r\n\r\nok",
    "a length with a space inside": HEAD + b"content-length: 2 2\r\n\r\n" + b"x" * 22,
    "a length beyond numbers": HEAD + b"content-length: 18446744073709551618\r\n\r\nok",
    "a coding that is not chunked": HEAD + b"transfer-encoding: gzip\r\n\r\nok",
    "chunked among others": HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "chunked before others": HEAD + b"transfer-encoding: chunked, gzip\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "chunked twice": HEAD + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "nearly chunked": HEAD + b"transfer-encoding: xchunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "chunks in 1.0": b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "a chunk of no size": HEAD + b"transfer-encoding: chunked\r\n\r\n\r\nok\r\n0\r\n\r\n",
    "a chunk of a signed size": HEAD + b"transfer-encoding: chunked\r\n\r\n+2\r\nok\r\n0\r\n\r\n",
    "a chunk of a negative size": HEAD + b"transfer-encoding: chunked\r\n\r\n-2\r\nok\r\n0\r\n\r\n",
    "a chunk of 0x": HEAD + b"transfer-encoding: chunked\r\n\r\n0x2\r\nok\r\n0\r\n\r\n",
    "a chunk beyond numbers": HEAD + b"transfer-encoding: chunked\r\n\r\n10000000000000002\r\nok\r\n0\r\n\r\n",
    "a space behind a size": HEAD + b"transfer-encoding: chunked\r\n\r\n2 \r\nok\r\n0\r\n\r\n",
    "a chunk that goes on": HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\noktoo\r\n0\r\n\r\n",
    "bare LF after a size": HEAD + b"transfer-encoding: chunked\r\n\r\n2\nok\r\n0\r\n\r\n",
    "a line break in an extension": HEAD + b'transfer-encoding: chunked\r\n\r\n2;a="b\nc"\r\nok\r\n0\r\n\r\n',
    "a folded field": HEAD + b"x-a: b\r\n c\r\ncontent-length: 2\r\n\r\nok",
    "a folded length": HEAD + b"content-length:\r\n 2\r\n\r\nok",
    "a fold before all fields": HEAD + b" x-a: b\r\ncontent-length: 2\r\n\r\nok",
    "a space before the colon": HEAD + b"content-length : 2\r\n\r\nok",
    "no colon": HEAD + b"content-length 2\r\n\r\nok",
    "no name": HEAD + b": 2\r\ncontent-length: 2\r\n\r\nok",
    "bare LF": b"HTTP/1.1 200 OK\ncontent-length: 2\n\nok",
    "bare LF after a field": HEAD + b"x-a: b\ncontent-length: 2\r\n\r\nok",
    "bare CR in a field": HEAD + b"x-a: b\rcontent-length: 2\r\n\r\nok",
    "NUL in a field": HEAD + b"x-a: b\0\r\ncontent-length: 2\r\n\r\nok",
    "HTTP/0.9": b"HTTP/0.9 200 OK\r\ncontent-length: 2\r\n\r\nok",
    "HTTP/2": b"HTTP/2.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
    "HTTP/1.2": b"HTTP/1.2 200 OK\r\ncontent-length: 2\r\n\r\nok",
    "no HTTP": b"220 mx.example.net ESMTP\r\n",
    "RTSP": b"RTSP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
    "RTSP behind an interim answer": b"HTTP/1.1 100 Continue\r\n\r\nRTSP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
    "ICE": b"ICE/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
    "ICY": b"ICY 200 OK\r\ncontent-length: 2\r\n\r\nok",
    "99": b"HTTP/1.1 099 OK\r\ncontent-length: 2\r\n\r\nok",
    "600": b"HTTP/1.1 600 OK\r\ncontent-length: 2\r\n\r\nok",
    "four digits": b"HTTP/1.1 2000 OK\r\ncontent-length: 2\r\n\r\nok",
    "101": b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n" + OK,
    "101 of nothing": b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + OK,
    "an interim answer with a length": b"HTTP/1.1 103 Early Hints\r\ncontent-length: %d\r\n\r\n" % len(OK) + OK,
    "an interim answer in chunks": b"HTTP/1.1 103 Early Hints\r\ntransfer-encoding: chunked\r\n\r\n" + OK,
    "a head too long": HEAD + b"x-a: b\r\n" * (HEAD_LIMIT // 8) + OK[len(HEAD) :],
    "interim answers too long": b"HTTP/1.1 103 E\r\n\r\n" * (HEAD_LIMIT // 18 + 1) + OK,
    "much around little": HEAD
    + b"transfer-encoding: chunked\r\n\r\n"
    + (b"1;" + b"e" * 4000 + b"\r\nx\r\n") * (WIRE_LIMIT // 4000)
    + b"0\r\n\r\n",
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_an_answer_is_the_same_wherever_it_is_cut(name: str) -> None:
    octets, wanted = ANSWERS[name]
    assert answer_to(octets) == wanted
    assert answer_to(*(octets[at : at + 1] for at in range(len(octets)))) == wanted
    for at in range(1, len(octets)):
        assert answer_to(octets[:at], octets[at:]) == wanted, octets[:at]
    for at in range(1, len(octets)):
        # Of no answer a part is one, but of one that ends with the connection.
        assert (answer_to(octets[:at]) is None) == (b"ngth" in octets or b"hunked" in octets or b"\r\n\r\n" not in octets[:at]), octets[:at]


@pytest.mark.parametrize("name", NO_ANSWERS)
async def test_what_is_no_answer_is_a_fault_wherever_it_is_cut(name: str) -> None:
    octets = NO_ANSWERS[name]
    assert answer_to(octets) is None
    if len(octets) < 1000:
        assert answer_to(*(octets[at : at + 1] for at in range(len(octets)))) is None
        for at in range(1, len(octets)):
            assert answer_to(octets[:at], octets[at:]) is None, octets[:at]
    else:
        assert answer_to(*(octets[at : at + 1021] for at in range(0, len(octets), 1021))) is None


async def test_of_a_long_answer_a_bounded_part_is_kept_and_the_connection_is_not() -> None:
    body = bytes(range(256)) * 300
    for octets in (
        b"HTTP/1.1 500 Oh\r\ncontent-length: %d\r\n\r\n" % len(body) + body,
        b"HTTP/1.1 500 Oh\r\n\r\n" + body,
        b"HTTP/1.1 500 Oh\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n",
    ):
        for cut in (len(octets), 4096):
            stage = Stage()
            stage.post()
            result = stage.comes(*(octets[at : at + cut] for at in range(0, len(octets), cut)), end=False)
            stage.forget()
            assert result == Answer(500, {}, body[:ANSWER_LIMIT], whole=False)
            assert stage.wire.over or cut == len(octets)


async def test_an_answer_as_the_last_one_is_not_parsed_again_and_none_else_is_taken_for_it() -> None:
    stage = Stage()
    try:
        for octets, wanted in (
            (OK, 200),
            (OK, 200),
            (b"HTTP/1.1 503 No\r\ncontent-length: 2\r\n\r\nok", 503),
            (OK[:-1] + b"K", 200),
            (OK, 200),
        ):
            stage.results.clear()
            stage.post()
            result = stage.comes(octets, end=False)
            assert isinstance(result, Answer)
            assert (result.status, result.body) == (wanted, octets[-2:])
        # Its octets inside of another answer are that answer's.
        stage.results.clear()
        stage.post()
        assert stage.comes(b"HTTP/1.1 400 No\r\ncontent-length: %d\r\n\r\n" % len(OK), OK, end=False) == Answer(400, {}, OK)
    finally:
        stage.forget()
    assert not stage.wire.over
    assert stage.wire.sent.count(b"POST /inbound HTTP/1.1\r\nhost: receiver.example\r\nx-one: 1\r\ncontent-length: 4\r\n\r\nbody") == 6


@pytest.mark.parametrize(
    ("octets", "keeps"),
    [
        (OK, True),
        (b"HTTP/1.1 204 No\r\n\r\n", True),
        (b"HTTP/1.1 204 No\r\ncontent-length: 0\r\n\r\n", True),
        (b"HTTP/1.1 204 No\r\ncontent-length: 2\r\n\r\n", False),
        (b"HTTP/1.1 204 No\r\ntransfer-encoding: chunked\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", False),
        (b"HTTP/1.0 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nok", True),
        (HEAD + b"connection: close\r\ncontent-length: 2\r\n\r\nok", False),
        (HEAD + b"keep-alive: timeout=1\r\ncontent-length: 2\r\n\r\nok", False),
        (HEAD + b"keep-alive: max=9, timeout=5\r\ncontent-length: 2\r\n\r\nok", True),
        (OK + OK, False),
        (OK + b"H", False),
        (OK + b"<html>", False),
        (HEAD + b"connection: close\r\ncontent-length: 2\r\n\r\nok" + OK, False),
    ],
)
async def test_which_connections_are_used_again(octets: bytes, keeps: bool) -> None:
    stage = Stage()
    stage.post()
    assert isinstance(stage.comes(octets, end=False), Answer)
    stage.forget()
    assert stage.wire.over == (not keeps)
    assert (stage.connection in stage.connection.origin.idle) == keeps


async def test_a_connection_that_says_something_unasked_is_not_used_again() -> None:
    stage = Stage()
    stage.connection.data_received(b"\r\n")
    assert stage.wire.over
    assert not stage.connection.usable(asyncio.get_running_loop().time())
    stage.forget()


async def test_an_answer_before_the_request_has_left_is_early_and_is_not_remembered() -> None:
    stage = Stage()
    stage.post()
    stage.wire.stuck = 1
    assert stage.comes(OK, end=False) == Answer(200, {}, b"ok", early=True)
    assert stage.wire.over
    assert stage.client.known_answer is None or not stage.client.known_answer.early
    stage.forget()


# --------------------------------------------------------------------- the oracle

_STATUS = re.compile(rb"HTTP/1\.([01]) (\d{3})(?: [^\r\n]*)?")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\0]*?)[ \t]*")
_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[^\r\n]*)?\r\n")


def said(octets: bytes) -> int | None:
    """The status of the whole answer that these octets begin with, the connection ending behind them; None if there is none.
    RFC 9112, said plainly."""
    while True:
        octets = octets.lstrip(b"\r\n")
        head, end, rest = octets.partition(b"\r\n\r\n")
        if not end:
            return None
        first, *lines = head.split(b"\r\n")
        status = _STATUS.fullmatch(first)
        fields = [_FIELD.fullmatch(line) for line in lines]
        if status is None or None in fields:
            return None
        named = [(field[1].lower(), field[2]) for field in fields if field is not None]
        lengths = [value for name, value in named if name == b"content-length"]
        codings = [value.lower() for name, value in named if name == b"transfer-encoding"]
        code = int(status[2])
        if (
            len(lengths) + len(codings) > 1
            or not all(re.fullmatch(rb"\d{1,19}", value) for value in lengths)
            or codings not in ([], [b"chunked"])
        ):
            return None
        if code < 200:
            octets = rest
            continue
        if code in (204, 304):
            return code
        if codings:
            return code if _chunks(rest) else None
        return code if not lengths or len(rest) >= int(lengths[0]) else None


def _chunks(rest: bytes) -> bool:
    while (size := _SIZE.match(rest)) is not None:
        octets = int(size[1], 16)
        rest = rest[size.end() :]
        if octets == 0:
            while not rest.startswith(b"\r\n"):
                line, end, rest = rest.partition(b"\r\n")
                if not end or _FIELD.fullmatch(line) is None:
                    return False
            return True
        if rest[octets : octets + 2] != b"\r\n":
            return False
        rest = rest[octets + 2 :]
    return False


@pytest.mark.parametrize("name", [*ANSWERS, *NO_ANSWERS])
def test_the_oracle_agrees_on_what_is_known(name: str) -> None:
    if name in ANSWERS:
        assert said(ANSWERS[name][0]) == ANSWERS[name][1].status
    elif said(NO_ANSWERS[name]) is not None:
        # It knows neither our bounds, nor what we ask of the version, nor quoted text.
        assert re.search("too long|much around|1.0|99|600|101|interim|extension|trailers", name), name


PIECES = [
    b"HTTP/1.1 200 OK", b"HTTP/1.1 204 No", b"HTTP/1.1 103 E", b"HTTP/1.0 200 OK", b"content-length: 2", b"content-length: 0",
    b"transfer-encoding: chunked", b"connection: close", b"x: y", b"\r\n", b"\r\n\r\n", b"ok", b"2", b"0", b"2\r\nok\r\n", b"0\r\n\r\n", OK,
    b" ", b"\t", b"\n", b"\r", b"\0", b",", b";", b":", b"\xff",
]  # fmt: skip
SPOILT = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join),
    st.tuples(
        st.sampled_from([octets for octets, _ in ANSWERS.values()]),
        st.integers(0, 300),
        st.integers(0, 3),
        st.one_of(st.binary(max_size=3), st.sampled_from(PIECES)),
    ).map(lambda found: found[0][: found[1]] + found[3] + found[0][found[1] + found[2] :]),
)


@settings(max_examples=500, deadline=None)
@given(octets=SPOILT, cuts=st.lists(st.integers(0, 400), max_size=4))
def test_hostile_octets_end_always_alike_and_a_2xx_is_one_by_the_book(octets: bytes, cuts: list[int]) -> None:
    async def both() -> tuple[Answer | None, Answer | None]:
        at = sorted({0, *cuts, len(octets)})
        pieces = [octets[a:b] for a, b in pairwise(at) if octets[a:b]]
        return answer_to(octets), answer_to(*pieces)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        whole, cut = runner.run(both())
    assert whole == cut
    if whole is not None:
        assert said(octets) == whole.status


# ----------------------------------------------------------------------- over sockets


@asynccontextmanager
async def direct(connections: int = 8) -> AsyncIterator[DirectClient]:
    client = DirectClient(connections)
    try:
        yield client
    finally:
        await client.close()
        assert not client._open
        assert not client._out


async def post(client: DirectClient, url: str, seconds: float = 30.0) -> Answer:
    return await client.post(url, [], b"body", asyncio.get_running_loop().time() + seconds)


class Counts:
    """Answers with 200; knows its connections and requests."""

    def __init__(self, more: bytes = b"keep-alive: timeout=60\r\n", requests: int = 1000, silent: int = 0) -> None:
        self.connections = self.requests = 0
        self.ended = 0
        self.heads: list[bytes] = []
        self._more = more
        self._limit = requests
        self._silent = silent

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            for number in range(1, self._limit + 1):
                self.heads.append(await read_request(reader))
                self.requests += 1
                if number == self._silent:
                    return
                writer.write(b"HTTP/1.1 200 OK\r\n%bcontent-length: 0\r\n\r\n" % self._more)
                await writer.drain()
        finally:
            self.ended += 1


async def test_a_connection_is_kept_and_ends_after_its_rest() -> None:
    counts = Counts(b"keep-alive: timeout=50\r\n")
    async with misbehaving(counts) as url, direct() as client:
        for _ in range(3):
            assert (await post(client, url)).status == 200
        assert counts.connections == 1
        assert counts.ended == 0
        (rests,) = client._open
        assert 0 < rests.until - asyncio.get_running_loop().time() <= 49, "its time is over before the receiver's is"
        rests.until = asyncio.get_running_loop().time() + 0.1
        client._arm(rests.until)
        await until(lambda: counts.ended == 1)
        assert (await post(client, url)).status == 200
        assert counts.connections == 2


async def test_a_connection_that_the_receiver_closed_while_it_rested_is_not_used() -> None:
    counts = Counts(requests=1)
    async with misbehaving(counts) as url, direct() as client:
        for number in range(1, 4):
            assert (await post(client, url)).status == 200
            await until(lambda: not client._open)
            assert (counts.connections, counts.requests) == (number, number)


@pytest.mark.parametrize("comes", ["answer", "part", "end", "reset"])
async def test_what_comes_before_a_request_has_left_is_no_answer_and_another_connection_carries_it(comes: str) -> None:
    """It leaves at the end of the loop's turn: a receiver that gives up a connection that rests (408, 400) may be quicker."""
    counts = Counts()
    async with misbehaving(counts) as url, direct() as client:
        assert (await post(client, url)).status == 200
        (rests,) = client._open
        results: list[Result] = []
        client.begin(url, [], b"body", asyncio.get_running_loop().time() + 30, tells, results)
        if comes == "answer":
            rests.data_received(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
        elif comes == "part":
            rests.data_received(b"HTTP/1.1 2")
        elif comes == "end":
            rests.eof_received()
        else:
            assert rests.transport is not None
            rests.transport.abort()  # as a loop does that reads a reset: what is lost is told in its next turn
        await until(lambda: results)
        (answer,) = results
        assert isinstance(answer, Answer)
        assert (answer.status, answer.early) == (200, False)
        assert (counts.connections, counts.requests) == (2, 2)


async def test_a_new_connection_that_ends_before_its_request_has_left_is_a_fault() -> None:
    stage = Stage()
    stage.connection.until = 0.0
    (rests,) = stage.connection.origin.idle
    stage.connection.origin.idle.clear()
    stage.client._out.clear()
    target = stage.client._target
    assert target is not None
    deadline = asyncio.get_running_loop().time() + 60
    exchange = Exchange(stage.client, target.origin, b"head and body", None, 13, deadline, tells, stage.results)
    rests.carry(exchange)
    assert isinstance(stage.comes(OK), HttpFault)
    await asyncio.sleep(0.01)
    assert stage.wire.sent == b"", "and nothing leaves on what has ended"
    stage.forget()


async def test_nothing_is_sent_a_second_time() -> None:
    """The kept connection ends as the second request is read: nobody can say whether it was carried out."""
    counts = Counts(silent=2)
    async with misbehaving(counts) as url, direct() as client:
        assert (await post(client, url)).status == 200
        with pytest.raises(HttpFault) as fault:
            await post(client, url)
        assert fault.value.reason == "the connection was closed without an answer"
        assert (counts.connections, counts.requests) == (1, 2)
        assert (await post(client, url)).status == 200


async def test_the_request_as_it_is_sent() -> None:
    counts = Counts()
    async with misbehaving(counts) as url:
        client = DirectClient(2, None, [("x-standing", "yes"), ("user-agent", "t")])
        address = url.removeprefix("http://").removesuffix("/inbound")
        deadline = asyncio.get_running_loop().time() + 30
        await client.post(
            f"http://us%20er:p%3Aw@{address}/a b/é?q=1&x=%20 #frag", [("x-one", "é")], [b"bo", b"dy"][:0] or b"body", deadline
        )
        await client.post(f"http://{address.replace('127.0.0.1', 'LOCALHOST')}", [("content-length", "4")], [b"bo", b"dy"], deadline)
        await client.close()
    assert counts.heads[0] == (
        b"POST /a%20b/%C3%A9?q=1&x=%20%20 HTTP/1.1\r\nhost: " + address.encode() + b"\r\nx-standing: yes\r\nuser-agent: t\r\n"
        b"authorization: Basic dXMgZXI6cDp3\r\nx-one: \xc3\xa9\r\ncontent-length: 4\r\n\r\nbody"
    )
    assert counts.heads[1].startswith(b"POST / HTTP/1.1\r\nhost: localhost:")
    assert counts.heads[1].endswith(b"\r\ncontent-length: 4\r\n\r\nbody")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://a.example:80/", "a.example"),
        ("https://a.example:443/", "a.example"),
        ("https://a.example:80/", "a.example:80"),
        ("http://[2001:DB8::1]:8080/", "[2001:db8::1]:8080"),
        ("http://bücher.example/", "xn--bcher-kva.example"),
    ],
)
def test_the_host_as_it_is_said(url: str, shown: str) -> None:
    assert f"\r\nhost: {shown}\r\n".encode() in DirectClient(1)._aim(url).start


@pytest.mark.parametrize(
    "url", ["ftp://a.example/", "http:///x", "http://a%0d%0ab/", "http://a b/", "http://[::g]/", "http://a.example:99999/", "http://[::1"]
)
async def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (the standard library's words are among them)
        await post(DirectClient(1), url)


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a\r\nb", "é"])
async def test_a_name_that_is_no_token_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="header"):
        await DirectClient(1).post(URL, [(name, "x")], b"", 1e9)


async def test_a_body_that_is_not_as_long_as_it_was_said() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"four"

    def broken() -> Iterator[bytes]:
        yield b"four"

    counts = Counts()
    async with misbehaving(counts) as url, direct() as client:
        deadline = asyncio.get_running_loop().time() + 30
        for length in ("3", "5"):
            with pytest.raises(ValueError, match="content-length"):
                await client.post(url, [("content-length", length)], broken(), deadline)
            with pytest.raises(HttpFault, match="not as long"):
                await client.post(url, [("content-length", length)], pieces(), deadline)
        with pytest.raises(ValueError, match="content-length"):
            await client.post(url, [], pieces(), deadline)
    assert counts.requests == 0 or counts.heads == [b""]


async def test_what_the_body_raises_is_the_callers() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"four"
        raise OSError(5, "the disk")

    async with misbehaving(never_answers) as url, direct() as client:
        with pytest.raises(OSError, match="the disk"):
            await client.post(url, [("content-length", "8")], pieces(), asyncio.get_running_loop().time() + 30)


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("large", [b"x" * 20_000_000, [b"x" * 200_000] * 100], ids=["whole", "pieces"])
def test_a_200_to_a_body_that_has_not_left_is_early(loop: Callable[[], asyncio.AbstractEventLoop], large: bytes | list[bytes]) -> None:
    async def story() -> None:
        async with misbehaving(answers_before_the_body) as url, direct() as client:
            headers = [] if isinstance(large, bytes) else [("content-length", "20000000")]
            answer = await client.post(url, headers, large, asyncio.get_running_loop().time() + 30)
            assert (answer.status, answer.early) == (200, True)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(story())


async def test_who_waits_is_served_in_turn_and_a_place_that_is_given_up_is_free() -> None:
    async with misbehaving(never_answers) as silent, misbehaving(Counts()) as url, direct(connections=1) as client:
        stuck = asyncio.create_task(post(client, silent, 30))
        await asyncio.sleep(0)
        waiting = [asyncio.create_task(post(client, url)) for _ in range(3)]
        gone = asyncio.create_task(post(client, url))
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in waiting)
        for task in (gone, stuck):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert [answer.status for answer in await asyncio.gather(*waiting)] == [200] * 3


async def test_closing_ends_what_is_out() -> None:
    async with misbehaving(never_answers) as url:
        client = DirectClient(1)
        tasks = [asyncio.create_task(post(client, url)) for _ in range(2)]
        await asyncio.sleep(0.05)
        await client.close()
        for task in tasks:
            with pytest.raises(HttpFault, match="closed"):
                await task
        assert not client._open


async def test_a_closed_client_refuses_for_good() -> None:
    counts = Counts()
    async with misbehaving(counts) as url, direct() as client:
        assert (await post(client, url)).status == 200
        await client.close()
        for _ in range(2):
            with pytest.raises(HttpFault, match="closed"):
                await post(client, url)
        await client.close()
    assert (counts.connections, counts.requests) == (1, 1)


@pytest.mark.parametrize("cancelled", [False, True])
async def test_closing_waits_for_what_is_connecting(cancelled: bool) -> None:
    async with misbehaving(never_answers) as url:
        client = DirectClient(1)
        # The handshake hangs.
        task = asyncio.create_task(post(client, url.replace("http:", "https:")))
        await until(lambda: len(client._tasks) == 1 and client._context is not None)
        (connecting,) = client._tasks
        await asyncio.sleep(0.05)
        assert not connecting.done()
        if cancelled:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await client.close()
        assert connecting.done()
        if not cancelled:
            with pytest.raises(HttpFault, match="closed"):
                await task


async def test_who_is_told_is_told_whatever_becomes_of_the_next() -> None:
    stage = Stage()
    stage.client._limit = 1
    stage.post()
    others: list[Result] = []
    stage.client.begin(URL, [], b"next", asyncio.get_running_loop().time() + 60, tells, others)
    stage.wire.broken = True
    assert isinstance(stage.comes(OK, end=False), Answer)
    assert others == []
    for _ in range(2):
        await asyncio.sleep(0)
    (fault,) = others
    assert str(fault) == "broken"
    assert not stage.client._out
    assert stage.wire.over
    stage.forget()


async def test_who_raises_when_told_keeps_nobody_else_from_it() -> None:
    loop = asyncio.get_running_loop()
    contexts: list[dict[str, object]] = []
    loop.set_exception_handler(lambda _, context: contexts.append(context))
    told: list[Result] = []

    def raises(about: object, result: Result) -> None:
        told.append(result)
        raise RuntimeError("told")

    async with misbehaving(never_answers) as url, direct(connections=2) as client:
        now = loop.time()
        for wait in (0.05, 0.05, 0.05, 0.15, 0.15):
            client.begin(url, [], b"body", now + wait, raises, None)
        await until(lambda: len(told) == 5)
        client.begin(url, [], b"body", now + 30, raises, None)
        await client.close()
    assert len(told) == len(contexts) == 6
    assert [isinstance(result, HttpFault) and result.late for result in told] == [True] * 5 + [False]


async def test_a_body_that_is_given_up_is_closed() -> None:
    closed: list[bool] = []

    async def pieces() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x" * 1_000_000
        finally:
            closed.append(True)

    async with misbehaving(never_reads) as url, direct() as client:
        body = pieces()
        task = asyncio.create_task(client.post(url, [("content-length", "100000000")], body, asyncio.get_running_loop().time() + 20))
        await until(lambda: any(connection.paused for connection in client._open))
        assert not closed
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: bool(closed))
        with pytest.raises(StopAsyncIteration):
            await anext(body)


async def test_a_deadline_that_is_over_sends_nothing() -> None:
    counts = Counts()
    async with misbehaving(counts) as url, direct() as client:
        with pytest.raises(HttpFault) as fault:
            await post(client, url, -1.0)
        assert fault.value.late
    assert counts.connections == 0


# ---------------------------------------------------------------------------- TLS


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> trustme.CA:
    """One that this process trusts, as its environment says."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    return ca


@asynccontextmanager
async def over_tls(ca: trustme.CA, name: str, talk: Counts, ragged: bool = False) -> AsyncIterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(name).configure_cert(context)
    tasks: list[asyncio.Task[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await talk(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            if ragged:
                writer.transport.abort()
            else:
                writer.close()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.get_running_loop().create_task(serve(reader, writer)))

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await asyncio.wait_for(asyncio.gather(*tasks), 30)
        await server.wait_closed()


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_tls_is_verified_and_kept(authority: trustme.CA, loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def story() -> None:
        counts = Counts(requests=2)
        async with over_tls(authority, "localhost", counts) as port, direct() as client:
            for _ in range(2):
                assert (await post(client, f"https://localhost:{port}/")).status == 200
            assert (counts.connections, counts.requests) == (1, 2)
            with pytest.raises(HttpFault) as fault:
                await post(client, f"https://127.0.0.1:{port}/")
            assert fault.value.reason.startswith("TLS: IP address mismatch")
            assert counts.requests == 2

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(story())


async def test_an_authority_that_nobody_trusts(authority: trustme.CA) -> None:
    counts = Counts()
    async with over_tls(trustme.CA(), "localhost", counts) as port, direct() as client:
        with pytest.raises(HttpFault) as fault:
            await post(client, f"https://localhost:{port}/")
    assert fault.value.reason.startswith("TLS: ")
    assert "certificate" in fault.value.reason
    assert counts.requests == 0


class Endless(Counts):
    """Its answer has no length: it ends with the connection."""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nall of it")
        await writer.drain()
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("ragged", [False, True])
def test_under_tls_an_answer_without_a_length_ends_with_a_close_notify(
    authority: trustme.CA, ragged: bool, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Whoever sits between can cut a connection, but cannot say that it is closed."""

    async def story() -> None:
        async with over_tls(authority, "localhost", Endless(), ragged) as port, direct() as client:
            if ragged:
                with pytest.raises(HttpFault):
                    await post(client, f"https://localhost:{port}/")
            else:
                assert (await post(client, f"https://localhost:{port}/")).body == b"all of it"

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(story())


class Early(Counts):
    """Answers once it has read the head."""

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        await reader.read(-1)


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("large", [b"x" * 20_000_000, [b"x" * 200_000] * 100], ids=["whole", "pieces"])
def test_under_tls_too_a_200_to_a_body_that_has_not_left_is_early(
    authority: trustme.CA, loop: Callable[[], asyncio.AbstractEventLoop], large: bytes | list[bytes]
) -> None:
    async def story() -> None:
        headers = [] if isinstance(large, bytes) else [("content-length", "20000000")]
        async with over_tls(authority, "localhost", Early()) as early, direct() as client:
            deadline = asyncio.get_running_loop().time() + 60
            answer = await client.post(f"https://localhost:{early}/", headers, large, deadline)
            assert (answer.status, answer.early) == (200, True)
        counts = Counts(requests=2)
        async with over_tls(authority, "localhost", counts) as port, direct() as client:
            for _ in range(2):
                assert (await client.post(f"https://localhost:{port}/", headers, large, deadline)).early is False
        assert [len(head.partition(b"\r\n\r\n")[2]) for head in counts.heads] == [20_000_000] * 2
        assert counts.connections == 1

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(story())


# -------------------------------------------- what the kernel knows and the loop does not

LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]


class Thread:
    """A receiver in a thread of its own: it speaks while the client's loop does not look."""

    def __init__(self, context: ssl.SSLContext | None = None, small: bool = False) -> None:
        self._context = context
        self._listening = socket.socket()
        if small:
            self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._listening.bind(("127.0.0.1", 0))
        self._listening.listen()
        self._listening.settimeout(20)
        self.port = self._listening.getsockname()[1]
        self.now = threading.Event()
        self.said = threading.Event()

    def accept(self) -> socket.socket:
        sock, _ = self._listening.accept()
        sock.settimeout(20)
        return sock if self._context is None else self._context.wrap_socket(sock, server_side=True)

    def close(self) -> None:
        self.now.set()
        self._listening.close()


@asynccontextmanager
async def in_a_thread(receiver: Thread, talk: Callable[[Thread], None]) -> AsyncIterator[int]:
    task = asyncio.create_task(asyncio.to_thread(talk, receiver))
    try:
        yield receiver.port
    finally:
        receiver.now.set()
        await asyncio.wait_for(task, 20)
        receiver.close()


def serving(ca: trustme.CA, tls: bool) -> ssl.SSLContext | None:
    if not tls:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("localhost").configure_cert(context)
    return context


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells what was not acknowledged")
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("size", [300_000, 2_000_000])
def test_a_200_while_the_kernel_still_has_the_body_is_early(
    authority: trustme.CA, size: int, tls: bool, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    def talk(receiver: Thread) -> None:
        with receiver.accept() as sock:
            sock.recv(100)
            sock.sendall(OK)
            receiver.now.wait(20)

    async def story() -> None:
        async with in_a_thread(Thread(serving(authority, tls), small=True), talk) as port, direct() as client:
            url = f"http{'s' if tls else ''}://localhost:{port}/"
            answer = await client.post(url, [], b"x" * size, asyncio.get_running_loop().time() + 30)
            assert (answer.status, answer.early) == (200, True)
            assert not client._target or not client._target.origin.idle

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(story())


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("tls", [False, True])
def test_an_honest_200_to_a_large_body_is_never_early(
    authority: trustme.CA, tls: bool, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    sizes = [65_536, 65_537, 131_072, 300_000, 1_000_000, 3_000_000] * 3

    def talk(receiver: Thread) -> None:
        with receiver.accept() as sock:
            for size in sizes:
                octets = b""
                while b"\r\n\r\n" not in octets:
                    octets += sock.recv(65536)
                left = size - len(octets.partition(b"\r\n\r\n")[2])
                while left > 0:
                    left -= len(sock.recv(min(left, 1 << 20)))
                sock.sendall(OK)

    async def story() -> None:
        async with in_a_thread(Thread(serving(authority, tls)), talk) as port, direct() as client:
            url = f"http{'s' if tls else ''}://localhost:{port}/"
            for size in sizes:
                answer = await client.post(url, [], b"x" * size, asyncio.get_running_loop().time() + 30)
                assert (answer.status, answer.early) == (200, False), size

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(story())


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("more", [OK, b"HTTP/1.1 202 ", b""], ids=["answer", "part", "end"])
def test_what_a_busy_loop_has_not_read_yet_answers_nothing(
    authority: trustme.CA, more: bytes, tls: bool, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    def talk(receiver: Thread) -> None:
        with receiver.accept() as first:
            first.recv(9999)
            first.sendall(OK)
            receiver.now.wait(20)
            if more:
                first.sendall(more)
            else:
                first.shutdown(socket.SHUT_RDWR)
            receiver.said.set()
            with receiver.accept() as second:
                second.recv(9999)
                second.sendall(b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n")

    async def story() -> None:
        receiver = Thread(serving(authority, tls))
        async with in_a_thread(receiver, talk) as port, direct() as client:
            url = f"http{'s' if tls else ''}://localhost:{port}/"
            assert (await post(client, url)).status == 200
            receiver.now.set()
            # Of set purpose on the loop: it must not see what comes.
            assert receiver.said.wait(20)
            assert (await post(client, url)).status == 503

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(story())


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("size", [4, 40_000])
def test_of_the_requests_of_one_turn_another_connection_carries_what_would_leave_on_one_that_has_spoken(
    size: int, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """They are asked together, right before the requests leave, large ones too."""
    body = b"x" * size

    def request(sock: socket.socket) -> bytes:
        octets = b""
        while (part := sock.recv(65536)) and not (octets := octets + part).endswith(b"\r\n\r\n" + body):
            pass
        return octets

    spoken: list[bytes] = []

    def talk(receiver: Thread) -> None:
        with receiver.accept() as first, receiver.accept() as second, receiver.accept() as third:
            for sock in (first, second, third):
                assert request(sock)
                sock.sendall(OK)
            receiver.now.wait(20)
            second.sendall(OK)
            receiver.said.set()
            for sock in (first, third):
                assert request(sock)
                sock.sendall(b"HTTP/1.1 202 Accepted\r\ncontent-length: 0\r\n\r\n")
            with receiver.accept() as another:
                assert request(another)
                another.sendall(b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n")
            try:
                spoken.append(second.recv(65536))
            except ConnectionResetError:
                spoken.append(b"")

    async def story() -> None:
        receiver = Thread()
        async with in_a_thread(receiver, talk) as port, direct(connections=4) as client:

            async def three() -> list[int]:
                deadline = asyncio.get_running_loop().time() + 20
                answers = await asyncio.gather(*(client.post(f"http://127.0.0.1:{port}/", [], body, deadline) for _ in range(3)))
                return sorted(answer.status for answer in answers)

            assert await three() == [200, 200, 200]
            assert len(client._open) == 3
            receiver.now.set()
            assert receiver.said.wait(20)
            assert await three() == [202, 202, 503]
        assert spoken == [b""], "nothing left on the one that had spoken"

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(story())


async def test_a_field_that_was_sent_before_is_looked_at_when_it_changes() -> None:
    stage = Stage()
    deadline = asyncio.get_running_loop().time() + 60

    def sent(value: str) -> bytes:
        stage.client.begin(URL, [("x-one", value), ("x-two", "b")], b"body", deadline, tells, stage.results)
        stage.client.deliver()
        octets, stage.wire.sent = stage.wire.sent, b""
        stage.connection.data_received(OK)
        return octets

    for value in ("a", "a", "é\t", "", "a"):
        assert f"\r\nx-one: {value}\r\nx-two: b\r\ncontent-length: 4\r\n\r\nbody".encode() in sent(value)
        for control in ("a\r\nx-evil: 1", "a\n", "\0", "\x7f", "\x1f", "\ud800", "\udfff"):
            with pytest.raises(ValueError, match="x-one has characters that none may hold"):
                sent(control)
            assert stage.connection in stage.connection.origin.idle
    assert len(stage.results) == 5
    stage.forget()


async def test_the_length_of_the_body_is_said_anew_where_it_changes() -> None:
    stage = Stage()
    deadline = asyncio.get_running_loop().time() + 60
    for body in (b"", b"body", b"b", b"x" * (JOINED + 1), b"b", b""):
        stage.client.begin(URL, [], body, deadline, tells, stage.results)
        stage.client.deliver()
        assert stage.wire.sent.endswith(b"\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        stage.wire.sent = b""
        stage.connection.data_received(OK)
    assert [result.early for result in stage.results if isinstance(result, Answer)] == [False] * 6
    stage.forget()
