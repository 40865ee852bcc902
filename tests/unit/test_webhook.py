"""gateway/sinks/webhook.py against real receivers: signature, status mapping, what is sent."""

from __future__ import annotations

import asyncio
import base64
import email.utils
import gc
import gzip
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from gateway import __version__
from gateway.config import WebhookConfig
from gateway.contracts import INTERRUPTED
from gateway.mime.formats.raw import escaped
from gateway.net.http import ANSWER_LIMIT, Answer
from gateway.net.signature import Signer
from gateway.sinks import make_sink
from gateway.sinks.threads import Threads
from gateway.sinks.webhook import RETRY_AFTER_LIMIT, WebhookSink

from ..deliveries import ID, MAIL, TRACE, Try, carried, mail, recipient
from ..loops import until
from ..receivers import (
    RECEIVERS,
    Misbehaviour,
    answers_before_the_body,
    misbehaving,
    never_answers,
    never_reads,
    read_request,
    receiving,
)

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()
OTHER = "whsec_" + base64.b64encode(b"another secret of some thirty-two").decode()


@asynccontextmanager
async def webhook(url: str, **keys: Any) -> AsyncIterator[WebhookSink]:
    sink = make_sink("app", WebhookConfig(url=url, **keys), "mx.example.net")
    assert isinstance(sink, WebhookSink)
    await sink.open()
    try:
        yield sink
    finally:
        await sink.close()


async def test_standard_is_one_json_object_with_its_headers() -> None:
    async with receiving() as receiver, webhook(receiver.url, headers={"Authorization": "Bearer t"}) as sink:
        outcome = await carried(sink, mail())
    assert (outcome.state, outcome.reply.code, outcome.remote) == ("delivered", 250, receiver.url)
    (request,) = receiver.requests
    assert request.one("content-type") == "application/json"
    assert request.one("webhook-id") == ID
    assert abs(int(request.one("webhook-timestamp")) - time.time()) < 30
    assert request.one("user-agent") == f"gateway-smtp/{__version__}"
    assert request.one("authorization") == "Bearer t"
    # Without a secret there is no signature.
    assert not request.all("webhook-signature")
    body = json.loads(request.body)
    assert body["type"] == "message.received"
    assert body["data"]["text"] == ".one\ntwo\n"
    assert body["data"]["envelope"]["rcpt_to"] == ["b@us.example"]


@pytest.mark.parametrize("form", ["standard", "raw"])
@pytest.mark.parametrize("size", [100, 300_000])
async def test_the_signature_is_what_the_published_library_verifies(form: str, size: int) -> None:
    message = mail(MAIL + b"x" * size)
    async with receiving() as receiver, webhook(receiver.url, format=form, secret=SECRET, previous_secret=OTHER) as sink:
        assert (await carried(sink, message)).state == "delivered"
    (request,) = receiver.requests
    signed = {name: request.one(name) for name in ("webhook-id", "webhook-timestamp", "webhook-signature")}
    assert len(signed["webhook-signature"].split(" ")) == 2
    text = request.body.decode()
    for secret in (SECRET, OTHER):
        if form == "raw":
            # The library parses JSON after it has verified; a mail is none.
            with pytest.raises(json.JSONDecodeError):
                Webhook(secret).verify(text, signed)
        else:
            Webhook(secret).verify(text, signed)
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(text + " ", signed)
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + base64.b64encode(b"a secret of somebody else, 32 oct").decode()).verify(text, signed)


async def test_a_smaller_set_of_recipients_has_its_own_id() -> None:
    message = mail(recipients=[recipient("b@us.example"), recipient("bcc@us.example")])
    async with receiving() as receiver, webhook(receiver.url) as sink:
        one = Try(message, message.envelope.recipients[1:], f"{ID}_2")
        sink.start(one.delivery)
        await one.outcomes()
    (request,) = receiver.requests
    assert request.one("webhook-id") == f"{ID}_2"
    data = json.loads(request.body)["data"]
    assert (data["id"], data["envelope"]["rcpt_to"]) == (ID, ["bcc@us.example"])


async def test_raw_is_the_content_as_relayed_with_the_envelope_beside_it(tmp_path: Path) -> None:
    content = b"Subject: dots\r\n\r\n.\r\n..\r\n\x00\xff\r\nno end"
    file = tmp_path / "content"
    file.write_bytes(content * 30_000)
    async with receiving() as receiver, webhook(receiver.url, format="raw") as sink:
        assert (await carried(sink, mail(content))).state == "delivered"
        assert (await carried(sink, mail(file))).state == "delivered"
    small, large = receiver.requests
    assert small.body == TRACE + content
    assert large.body == TRACE + content * 30_000
    for request in (small, large):
        assert request.one("content-type") == "message/rfc822"
        assert request.one("x-envelope-from") == "a@client.example"
        assert request.one("x-envelope-to") == "b@us.example"
        assert request.one("content-length") == str(len(request.body))


async def test_no_address_becomes_a_second_header() -> None:
    odd = ['"a\r\nx-evil: 1"@us.example', "grüße@us.example", '"a,b \\"c"@us.example', "a%41@us.example", "o'neil@us.example"]
    message = mail(recipients=[recipient(address) for address in odd], mail_from="\r\nx-evil: 2@client.example")
    async with receiving() as receiver, webhook(receiver.url, format="raw") as sink:
        assert (await carried(sink, message)).state == "delivered"
    (request,) = receiver.requests
    assert not request.all("x-evil")
    assert request.one("x-envelope-from") == "%0D%0Ax-evil:%202@client.example"
    assert request.one("x-envelope-to") == (
        "%22a%0D%0Ax-evil:%201%22@us.example, gr%C3%BC%C3%9Fe@us.example, %22a%2Cb%20\\%22c%22@us.example, a%2541@us.example, o'neil@us.example"
    )


def test_what_of_an_address_a_header_cannot_hold_is_escaped() -> None:
    for number in (*range(0x180), 0x20AC, 0x1F600):
        one = chr(number)
        plain = 0x21 <= number < 0x7F and one not in '%,"'
        said = one if plain else "".join(f"%{octet:02X}" for octet in one.encode())
        assert escaped(one) == said
        assert escaped(f"a{one}b@us.example") == f"a{said}b@us.example"
    assert escaped("\ud800@us.example") == "?@us.example", "half of a surrogate pair has no octets"


def test_the_timestamp_is_that_of_the_try() -> None:
    signer = Signer([])
    said = [dict(signer.headers("id", second, ()))["webhook-timestamp"] for second in (0, 1763856000, 1763856000, 1763856001, 1)]
    assert said == ["0", "1763856000", "1763856000", "1763856001", "1"]


async def test_a_long_list_of_recipients_repeats_its_header() -> None:
    addresses = [f"somebody.with.a.longer.name.{number}@us.example" for number in range(500)]
    async with receiving() as receiver, webhook(receiver.url, format="raw") as sink:
        assert (await carried(sink, mail(recipients=list(map(recipient, addresses))))).state == "delivered"
    fields = receiver.requests[0].all("x-envelope-to")
    assert len(fields) > 1
    assert all(len(value) <= 4096 for value in fields)
    assert ", ".join(fields).split(", ") == addresses


STATUSES = [
    (200, "delivered", "250"),
    (201, "delivered", "250"),
    (202, "delivered", "250"),
    (204, "delivered", "250"),
    (299, "delivered", "250"),
    (400, "failed", "554 5.6.0"),
    (406, "failed", "554 5.6.1"),
    (413, "failed", "552 5.3.4"),
    (415, "failed", "554 5.6.1"),
    (422, "failed", "554 5.6.0"),
    *(
        (status, "deferred", "451 4.3.0")
        for status in (300, 301, 304, 307, 308, 401, 403, 404, 405, 407, 408, 409, 410, 423, 500, 501, 502, 504, 599)
    ),
    (429, "deferred", "451 4.3.2"),
    (503, "deferred", "451 4.3.2"),
]


async def test_what_each_status_means_for_the_mail() -> None:
    answers = [(status, {"Location": "/elsewhere"}, b"") for status, _, _ in STATUSES]
    async with receiving(*answers) as receiver, webhook(receiver.url) as sink:
        for status, state, reply in STATUSES:
            outcome = await carried(sink, mail(recipients=[recipient("b@us.example"), recipient("c@us.example")]))
            assert outcome.state == state, status
            assert str(outcome.reply).startswith(reply), status
            assert f"HTTP {status}" in outcome.reply.text
            # What is wrong with this message says nothing about the sink; all else does.
            assert outcome.down == (state == "deferred"), status
            assert outcome.pause == (status == 410), status
    assert len(receiver.requests) == len(STATUSES)


async def test_retry_after_is_seconds_or_a_date_and_a_day_at_most() -> None:
    cases: list[tuple[str, float | None]] = [
        ("0", 0.0),
        (" 120 ", 120.0),
        ("86400", 86400.0),
        ("999999999999999999999", RETRY_AFTER_LIMIT),
        (email.utils.formatdate(time.time() + 600, usegmt=True), 600.0),
        (email.utils.formatdate(time.time() - 600, usegmt=True), 0.0),
        (email.utils.formatdate(time.time() + 40 * 86400, usegmt=True), RETRY_AFTER_LIMIT),
        ("-5", None),
        ("1.5", None),
        ("soon", None),
        ("²", None),
    ]
    answers = [(503, {"Retry-After": value}, b"") for value, _ in cases]
    async with receiving(*answers) as receiver, webhook(receiver.url) as sink:
        for value, expected in cases:
            outcome = await carried(sink, mail())
            if expected is None:
                assert outcome.retry_after is None, value
            else:
                assert outcome.retry_after == pytest.approx(expected, abs=60), value
                assert outcome.retry_after is not None
                assert 0 <= outcome.retry_after <= RETRY_AFTER_LIMIT


async def test_what_the_receiver_says_is_in_the_reply_and_is_one_line() -> None:
    answers = [
        (422, {"Content-Type": "text/plain"}, b"5.1.1 no such user\r\n250 2.0.0 all is well"),
        (422, {"Content-Type": "application/problem+json"}, b'{"title": "no \x00 such user"}'),
        (422, {"Content-Type": "text/html"}, b"<h1>secret stack trace</h1>"),
        (500, {"Content-Type": "text/plain; charset=utf-8"}, ("é" * 5000).encode()),
        (500, {"Content-Type": "text/plain", "Content-Encoding": "gzip"}, gzip.compress(b"Nothing was decompressed.", mtime=0)),
        (500, {"Content-Type": "text/plain; charset=utf-8"}, ("x" + "é" * 5000).encode()),
    ]
    async with receiving(*answers) as receiver, webhook(receiver.url) as sink:
        replies = [(await carried(sink, mail())).reply for _ in answers]
    assert str(replies[0]) == "554 5.6.0 HTTP 422: no such user 250 2.0.0 all is well"
    assert str(replies[1]) == '554 5.6.0 HTTP 422: {"title": "no ? such user"}'
    assert str(replies[2]) == "554 5.6.0 HTTP 422"
    assert replies[3].text == "HTTP 500: " + "é" * 200
    assert replies[4].text == "HTTP 500"
    assert replies[5].text == "HTTP 500: x" + "é" * 199
    assert all(reply.wire.count(b"\r\n") == 1 for reply in replies)


@pytest.mark.parametrize("behaviour", RECEIVERS, ids=lambda behaviour: behaviour.__name__)
async def test_no_misbehaving_receiver_counts_as_delivered(behaviour: Misbehaviour) -> None:
    async with misbehaving(behaviour) as url, webhook(url + "?token=secret", timeout=0.5) as sink:
        outcome = await carried(sink, mail())
    assert outcome.state == "deferred"
    assert outcome.down
    assert outcome.reply.code == 451
    assert outcome.remote == url
    assert "secret" not in outcome.reply.text


@pytest.mark.parametrize("client", ["direct", "pyreqwest", "aiohttp"])
@pytest.mark.parametrize("form", ["raw", "standard"])
async def test_a_200_before_the_body_was_sent_delivers_nothing(tmp_path: Path, form: str, client: str) -> None:
    file = tmp_path / "content"
    file.write_bytes(MAIL + b"x" * 20_000_000)
    async with misbehaving(answers_before_the_body) as url, webhook(url, format=form, client=client, timeout=50.0) as sink:
        outcome = await carried(sink, mail(file))
    assert (outcome.state, outcome.down) == ("deferred", True)
    assert str(outcome.reply) == "451 4.5.0 HTTP 200 before the message was sent"


@pytest.mark.parametrize("client", ["direct", "pyreqwest", "aiohttp"])
@pytest.mark.parametrize("form", ["raw", "standard"])
async def test_a_200_to_a_body_in_pieces_delivers_it(tmp_path: Path, form: str, client: str) -> None:
    file = tmp_path / "content"
    for size in (64 * 1024, 256 * 1024, 256 * 1024 + 1, 3_000_000):
        file.write_bytes(MAIL + b"x" * (size - len(MAIL)))
        async with receiving() as receiver, webhook(receiver.url, format=form, client=client) as sink:
            assert (await carried(sink, mail(file))).state == "delivered"


@pytest.mark.parametrize("client", ["direct", "pyreqwest", "aiohttp"])
async def test_nobody_there_is_a_sink_that_is_down(client: str) -> None:
    async with misbehaving(never_answers) as url:
        pass
    async with webhook(url, client=client) as sink:
        outcome = await carried(sink, mail())
    assert (outcome.state, outcome.down, outcome.reply.enhanced) == ("deferred", True, "4.4.1")


async def test_large_content_is_taken_apart_off_the_loop_and_arrives_whole(tmp_path: Path) -> None:
    octets = bytes(range(256)) * 20_000
    encoded = base64.encodebytes(octets).replace(b"\n", b"\r\n")
    file = tmp_path / "content"
    file.write_bytes(
        b"Subject: large\r\nContent-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n\r\nhello\r\n"
        b"--b\r\nContent-Type: application/x-y; name=large.bin\r\nContent-Transfer-Encoding: base64\r\n\r\n" + encoded + b"--b--\r\n"
    )
    async with receiving() as receiver, webhook(receiver.url, secret=SECRET) as sink:
        outcomes = await asyncio.gather(*(carried(sink, mail(file)) for _ in range(3)))
    assert {outcome.state for outcome in outcomes} == {"delivered"}
    for request in receiver.requests:
        data = Webhook(SECRET).verify(
            request.body, {name: request.one(name) for name in ("webhook-id", "webhook-timestamp", "webhook-signature")}
        )
        (attachment,) = data["data"]["attachments"]
        assert base64.b64decode(attachment["content"]) == octets
        assert (attachment["size"], data["data"]["text"]) == (len(octets), "hello")


@pytest.mark.parametrize("client", ["direct", "pyreqwest", "aiohttp"])
async def test_a_2xx_longer_than_is_read_delivers_and_one_that_is_cut_does_not(client: str) -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n" + b"x" * (ANSWER_LIMIT - 1))
        await writer.drain()

    async with receiving((200, {}, b"x" * 100_000)) as receiver, webhook(receiver.url, client=client) as sink:
        assert (await carried(sink, mail())).state == "delivered"
    async with misbehaving(cut) as url, webhook(url, client=client) as sink:
        assert (await carried(sink, mail())).state == "deferred"


@pytest.mark.parametrize("client", ["direct", "pyreqwest", "aiohttp"])
async def test_a_file_is_closed_when_its_delivery_is_given_up(tmp_path: Path, client: str) -> None:
    file = tmp_path / "content"
    file.write_bytes(b"x" * 20_000_000)

    def held() -> bool:
        return str(file) in {_behind(number) for number in os.listdir("/proc/self/fd")}

    gc.disable()
    try:
        async with misbehaving(never_reads) as url:
            async with webhook(url, client=client, format="raw") as sink:
                one = Try(mail(file))
                sink.start(one.delivery)
                await until(held)
            await one.outcomes()
            await until(lambda: not held())
    finally:
        gc.enable()


def _behind(number: str) -> str:
    """What this descriptor is of; threads close theirs while we look."""
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""


async def test_an_iterator_is_closed_after_the_thread_that_asks_it() -> None:
    asked, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def items() -> Iterator[bytes]:
        try:
            yield b"first"
            asked.set()
            go_on.wait(20)
            yield b"second"
        finally:
            closed.set()

    threads = Threads("test", 1)
    try:
        each = threads.each(items())
        assert await anext(each) == b"first"
        second = asyncio.ensure_future(anext(each))
        await asyncio.to_thread(asked.wait, 20)
        second.cancel()
        each.close()
        each.close()
        assert not closed.is_set()
        go_on.set()
        assert await asyncio.to_thread(closed.wait, 20)
        assert [item async for item in each] == []
        unasked = threads.each(items())
        assert await anext(unasked) == b"first"
        closed.clear()
        unasked.close()
        assert closed.is_set()
    finally:
        go_on.set()
        threads.close()


async def test_a_content_file_that_is_gone_is_our_fault_not_the_receivers(tmp_path: Path) -> None:
    file = tmp_path / "content"
    file.write_bytes(b"x" * 100_000)
    message = mail(file)
    file.unlink()
    async with receiving() as receiver:
        for form in ("standard", "raw"):
            async with webhook(receiver.url, format=form, secret=SECRET) as sink:
                outcome = await carried(sink, message)
            assert (outcome.state, outcome.down) == ("deferred", False)
    assert not receiver.requests


async def test_closing_settles_what_is_out() -> None:
    async with misbehaving(never_answers) as url:
        async with webhook(url) as sink:
            one = Try(mail())
            sink.start(one.delivery)
            await asyncio.sleep(0.1)
            assert not one.delivery.settled
        (outcome,) = await one.outcomes()
    assert outcome.state == "deferred"


@pytest.mark.parametrize("client", ["direct", "pyreqwest", "aiohttp"])
async def test_what_comes_to_a_closed_sink_is_interrupted_and_not_sent(client: str) -> None:
    async with receiving() as receiver:
        async with webhook(receiver.url, client=client) as sink:
            assert (await carried(sink, mail())).state == "delivered"
        for content in (MAIL, MAIL + b"x" * 100_000):
            assert await carried(sink, mail(content)) == INTERRUPTED
    assert len(receiver.requests) == 1


async def test_who_waited_for_a_connection_is_not_sent_by_a_sink_that_closes() -> None:
    async with receiving() as receiver, webhook(receiver.url, concurrency=2) as sink:
        assert (await carried(sink, mail())).state == "delivered"
        receiver.delay = 20.0
        tries = [Try(mail()) for _ in range(5)]
        for one in tries:
            sink.start(one.delivery)
        await until(lambda: len(receiver.requests) == 3)
        await sink.close()
        assert [await one.outcomes() for one in tries] == [[INTERRUPTED]] * 5
        await asyncio.sleep(0.05)
        assert len(receiver.requests) == 3


async def test_an_answer_that_nobody_waits_for_any_more_is_judged_all_the_same() -> None:
    async with misbehaving(never_answers) as url, webhook(url) as sink:
        one = Try(mail())
        sink._answered(one.delivery, Answer(200, {}, b""))
        assert (await one.outcomes())[0].state == "delivered"


async def test_no_more_than_concurrency_are_out_at_once() -> None:
    async with receiving() as receiver, webhook(receiver.url, concurrency=3) as sink:
        receiver.gate.clear()
        carrying = asyncio.gather(*(carried(sink, mail()) for _ in range(12)))
        await until(lambda: receiver.at_once == 3)
        await asyncio.sleep(0.1)  # a fourth would come now
        receiver.gate.set()
        outcomes = await carrying
    assert {outcome.state for outcome in outcomes} == {"delivered"}
    assert receiver.most_at_once == 3
