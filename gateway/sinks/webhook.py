"""The ``webhook`` sink: one POST a delivery.

Owns what an HTTP status means for mail. Knows neither the body (a format of ``gateway.mime``)
nor the transport (``gateway.net.http``).

Invariants: one answer settles all recipients. Only 2xx, read to its end (of one longer than
``http.ANSWER_LIMIT``: that far, the rest is of no interest) and not said before the message had left
(as far as a client sees it: ``http.Answer.early``), is delivered; 400, 406, 413, 415 and 422 are failed; all else, faults included, is deferred and counts against the
sink, because a bad deploy or a rotated secret must not bounce promised mail. ``webhook-id`` is
the id of the delivery, the same on every try. Nothing that a mail or an answer holds becomes a
header field or a second line of a reply.

Standard Webhooks 1.0; RFC 9110 §10.2.3 (Retry-After), §15 (status codes).
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Final, cast

from .. import __version__
from ..contracts import BROKEN, INTERRUPTED, AsyncSink, Delivery, Outcome
from ..mime.formats import format_named
from ..mime.formats.payload import Payload
from ..net.addresses import not_public
from ..net.http import Answer, Body, HttpFault, http_client, shown
from ..net.signature import Signer
from ..reply import Reply
from .threads import Each, Threads

if TYPE_CHECKING:
    from ..config import WebhookConfig
    from ..net.direct import DirectClient, Done

#: Content over this many octets is taken apart and signed in a thread.
INLINE: Final = 64 * 1024
#: Threads of one sink that do so: more would only fight over the interpreter.
THREADS: Final = 2
#: Seconds that Retry-After can ask for.
RETRY_AFTER_LIMIT: Final = 86400.0
#: Statuses that this message will always get, and the code that says why (RFC 3463).
FAILED: Final = {400: "5.6.0", 406: "5.6.1", 413: "5.3.4", 415: "5.6.1", 422: "5.6.0"}
#: Characters of an answer's text that go into a reply.
TEXT: Final = 200

#: The file was changed since this mail was taken: its URL is in clear now (RFC 8689 §4.2.1).
IN_CLEAR: Final = Outcome("failed", Reply(550, "5.7.10", "encryption needed: the message has REQUIRETLS, and the webhook is not https"))

_time: Final = time.time
_TEXTUAL: Final = re.compile(r"text/plain|application/(?:[a-z0-9.+-]*\+)?json")
_ENHANCED: Final = re.compile(r"[245]\.\d{1,3}\.\d{1,3} ")


class WebhookSink(AsyncSink):
    """``type = "webhook"``. Raises ValueError for a secret that is no base64.

    With ``client = "direct"`` a delivery of small content has no task: it is posted as it starts, and
    settled as its answer comes."""

    def __init__(self, name: str, config: WebhookConfig, hostname: str) -> None:
        super().__init__(name)
        self._url = config.url
        self._carries_requiretls = config.carries_requiretls
        self._timeout = config.timeout
        self._remote = shown(config.url)
        self._format = format_named(config.format)
        self._signer = Signer([config.secret, config.previous_secret])
        standing = [*config.headers.items(), ("user-agent", f"gateway-smtp/{__version__}")]
        refusal = not_public if config.addresses == "public" else None
        self._http = http_client(config.client, config.concurrency, refusal, standing)
        self._direct = cast("DirectClient", self._http) if config.client == "direct" else None
        self._threads = Threads(f"webhook-{name}", THREADS)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told: Done = self._answered
        self._taken: dict[int, Outcome] = {}
        self._closed = False

    async def open(self) -> None:
        self._loop = asyncio.get_running_loop()

    def start(self, delivery: Delivery) -> None:
        if self._closed:
            # The client would refuse it, and a sink that closes is not one that is down.
            delivery.settle_all(INTERRUPTED)
            return
        direct, loop = self._direct, self._loop
        message = delivery.message
        if direct is None or loop is None or message.stored.path is not None or message.stored.size > INLINE or message.envelope.requiretls:
            super().start(delivery)
            return
        try:
            now = _time()
            payload: Payload = self._format(delivery, now)
            body = payload.octets()
            headers = payload.headers + self._signer.headers(delivery.id, int(now), (body,))
            direct.begin(self._url, headers, body, loop.time() + self._timeout, self._told, delivery)
        except Exception as error:
            self._broken(delivery, error)

    def _answered(self, delivery: Delivery, result: Answer | Exception) -> None:
        try:
            if isinstance(result, Answer):
                outcome = self._judged(result)
            elif isinstance(result, HttpFault):
                outcome = self._fault(result)
            else:
                raise result
        except Exception as error:
            self._broken(delivery, error)
            return
        delivery.settle_all(outcome)

    def _broken(self, delivery: Delivery, error: Exception) -> None:
        context = {"message": f"sink {self.name} failed on {delivery.id}", "exception": error}
        asyncio.get_running_loop().call_exception_handler(context)
        delivery.settle_all(BROKEN)

    async def carry(self, delivery: Delivery) -> Sequence[Outcome]:
        if delivery.message.envelope.requiretls and not self._carries_requiretls:
            return [IN_CLEAR] * len(delivery.recipients)
        deadline = asyncio.get_running_loop().time() + self._timeout
        body: Body = b""
        try:
            if delivery.message.stored.size > INLINE:
                async with asyncio.timeout_at(deadline):
                    headers, payload = await self._threads.run(lambda: self._request(delivery))
            else:
                headers, payload = self._request(delivery)
            body = self._body(payload)
            # In a task of its own: a compiled coroutine throws into what it awaits in a way that pyreqwest does not know.
            answer = await asyncio.create_task(self._http.post(self._url, headers, body, deadline))
        except HttpFault as fault:
            outcome = self._fault(fault)
        except TimeoutError:
            outcome = self._faulty("the body was not made in time", "4.4.2")
        except OSError as error:
            # Our own disk: the content could not be read.
            outcome = Outcome("deferred", Reply.untrusted(451, f"4.3.0 {error.strerror or 'content unreadable'}"))
        else:
            outcome = self._judged(answer)
        finally:
            if isinstance(body, Each):
                body.close()
        return [outcome] * len(delivery.recipients)

    def _request(self, delivery: Delivery) -> tuple[list[tuple[str, str]], Payload]:
        """Header fields and body of one try. May block on a file."""
        now = time.time()
        payload = self._format(delivery, now)
        signed = self._signer.headers(delivery.id, int(now), payload.chunks())
        headers = [*payload.headers, *signed]
        if payload.on_disk or payload.size > INLINE:
            headers.append(("content-length", str(payload.size)))
        return headers, payload

    def _body(self, payload: Payload) -> Body:
        if payload.on_disk:
            return self._threads.each(payload.chunks())
        return payload.chunks() if payload.size > INLINE else b"".join(payload.chunks())

    def _fault(self, fault: HttpFault) -> Outcome:
        return self._faulty(fault.reason, "4.4.2" if fault.late else "4.7.1" if fault.forbidden else "4.4.1")

    def _faulty(self, reason: str, enhanced: str) -> Outcome:
        return Outcome("deferred", Reply.untrusted(451, f"{enhanced} {reason}"), self._remote, down=True)

    def _judged(self, answer: Answer) -> Outcome:
        status = answer.status
        if 200 <= status <= 299 and answer.early:
            return self._faulty(f"HTTP {status} before the message was sent", "4.5.0")
        if 200 <= status <= 299:
            taken = self._taken.get(status)
            if taken is None:
                taken = self._taken[status] = Outcome("delivered", Reply.ok(f"HTTP {status}"), self._remote)
            return taken
        said = _said(answer)
        text = f"HTTP {status}: {said}" if said else f"HTTP {status}"
        if status in FAILED:
            return Outcome("failed", Reply.untrusted(552 if status == 413 else 554, f"{FAILED[status]} {text}"), self._remote)
        return Outcome(
            "deferred",
            Reply.untrusted(451, f"{'4.3.2' if status in (429, 503) else '4.3.0'} {text}"),
            self._remote,
            retry_after=_retry_after(answer.headers.get("retry-after"), time.time()),
            down=True,
            pause=status == 410,
        )

    async def close(self) -> None:
        self._closed = True
        await super().close()
        if self._direct is not None:
            for delivery in self._direct.withdraw_all():
                delivery.settle_all(INTERRUPTED)
        self._threads.close()
        await self._http.close()


def _said(answer: Answer) -> str:
    """The first words of an answer that is meant for people."""
    if not _TEXTUAL.match(answer.headers.get("content-type", "text/plain").lower()):
        return ""
    words = answer.body[: 4 * TEXT].decode("utf-8", "replace")
    if "\ufffd" in words[:-1]:
        return ""  # compressed, or another charset: no words (the last character may have been cut)
    text = " ".join(words.split())[:TEXT]
    # Its own enhanced code would stand in the middle of ours.
    return _ENHANCED.sub("", text, count=1)


def _retry_after(value: str | None, now: float) -> float | None:
    """Seconds to wait: a number, or a date (RFC 9110 §10.2.3). None for what is neither."""
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), RETRY_AFTER_LIMIT)
    try:
        seconds = parsedate_to_datetime(value[:64]).timestamp() - now
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return min(max(seconds, 0.0), RETRY_AFTER_LIMIT)
