"""The first minute: the gateway, a webhook receiver beside it, and one mail through both.

``gateway demo`` starts ``gateway serve`` as a process of its own with a file of four lines
(everything else is the defaults), on a free port, with its spool in a temporary folder. It
receives the webhooks itself, checks their signature the way any receiver would (Standard
Webhooks), and prints the JSON. With ``once`` it ends after the first mail; otherwise it
stays up and prints every further one until Ctrl-C.

It knows the gateway only from outside: the command, the file, the ``listening`` event.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import json
import os
import secrets
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from aiohttp import web

from . import send

#: Seconds: until the gateway listens, until the mail has come through, for the gateway to end.
START, ARRIVAL, END = 20.0, 20.0, 15.0
#: Octets of a webhook body that the receiver takes: base64 in JSON of the largest mail.
LARGEST = 64 * 2**20
#: Seconds a signature's timestamp may be off.
TOLERANCE = 300

CONFIG = """\
[[listeners]]
address = "127.0.0.1:0"

[spool]
path = "{spool}"

[sinks.inbox]
type = "webhook"
url = "{url}"
secret = "{secret}"

[[routes]]
recipients = ["*"]
sink = "inbox"
"""

NEXT = """\
Try next, from another terminal:

  swaks --server {server} --from you@client.example --to someone@demo.example --attach /etc/hostname
  printf 'Subject: hello\\r\\n\\r\\nIt works.\\r\\n' | \\
      curl --url smtp://{server} --mail-from you@client.example --mail-rcpt someone@demo.example --upload-file -
  python3 -c 'import smtplib; smtplib.SMTP("{host}", {port}).sendmail("you@client.example", "someone@demo.example", "Subject: hello\\r\\n\\r\\nIt works.")'

For your own application:

  gateway serve --listen 127.0.0.1:2525 --to webhook+http://127.0.0.1:8000/inbound
"""


class DemoError(Exception):
    """The demo cannot go on, with what a person should read."""


def signature_is_good(secret: str, headers: Any, body: bytes) -> bool:
    """Was this body signed with our secret just now? (Standard Webhooks: HMAC-SHA256 over ``id.timestamp.body``.)"""
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"))
        fresh = abs(time.time() - int(headers["webhook-timestamp"])) < TOLERANCE
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        wanted = base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
        given = headers["webhook-signature"].split(" ")
    except (KeyError, ValueError, binascii.Error):
        return False
    return fresh and any(hmac.compare_digest(f"v1,{wanted}", signature) for signature in given)


def shortened(value: Any) -> Any:
    """The JSON as a person wants to see it: long base64 is cut."""
    if isinstance(value, dict):
        return {key: _cut(inner) if key in ("content", "raw") else shortened(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shortened(inner) for inner in value]
    return value


def _cut(text: Any) -> Any:
    if not isinstance(text, str) or len(text) <= 60:
        return text
    return f"{text[:40]}… ({len(text)} characters of base64)"


class Receiver:
    """The webhook's far side. Every POST that is signed is shown and answered 200, any other 401.

    What comes before ``release`` is shown then: the webhook is called while the dialogue of the
    first mail still goes on, and a person wants to read one after the other."""

    def __init__(self, secret: str) -> None:
        self.url = ""
        self.arrived = asyncio.Event()
        self._secret = secret
        self._held: list[str] | None = []
        application = web.Application(client_max_size=LARGEST)
        application.router.add_post("/inbound", self._inbound)
        self._runner = web.AppRunner(application, access_log=None)

    async def __aenter__(self) -> Receiver:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/inbound"
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._runner.cleanup()

    async def _inbound(self, request: web.Request) -> web.Response:
        body = await request.read()
        if not signature_is_good(self._secret, request.headers, body):
            self._show(f"A request without a good signature was turned away ({len(body)} octets).")
            return web.Response(status=401)
        self._show(f"\nThe webhook got this, webhook-id {request.headers['webhook-id']}, signature checked:\n")
        self._show(json.dumps(shortened(json.loads(body)), indent=2, ensure_ascii=False))
        self.arrived.set()
        return web.Response()

    def _show(self, text: str) -> None:
        if self._held is None:
            show(text)
        else:
            self._held.append(text)

    def release(self) -> None:
        held, self._held = self._held or [], None
        for text in held:
            show(text)


class Served:
    """``gateway serve`` as a process of its own, with its event log read."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._told: list[str] = []
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, config: Path) -> Served:
        # A session of its own: Ctrl-C reaches the demo alone, which then ends the gateway in order.
        return cls(
            await asyncio.create_subprocess_exec(
                sys.executable, "-m", "gateway", "serve", "--config", str(config),
                stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE, start_new_session=True, limit=2**20,
            )
        )  # fmt: skip

    async def listening(self) -> str:
        """The real ``host:port``."""
        try:
            return await asyncio.wait_for(asyncio.shield(self._address), START)
        except TimeoutError:
            raise DemoError(f"the gateway did not listen within {START:.0f} s") from None

    async def _read(self) -> None:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            text = line.decode(errors="replace").rstrip()
            self._told = [*self._told[-19:], text]
            try:
                event = json.loads(text)
                name = event["event"]
            except (ValueError, TypeError, KeyError):
                continue
            if name == "listening" and not self._address.done():
                self._address.set_result(event["address"])
            elif name == "refused":
                show(f"Refused: {event.get('reply') or event.get('code')} ({event.get('address') or event.get('stage')})")
            elif name in ("deferred", "failed", "dead", "bug"):
                show(text)
        if not self._address.done():
            self._address.set_exception(DemoError("the gateway ended before it listened:\n" + "\n".join(self._told)))

    async def gone(self) -> int:
        """Waits until the process has ended by itself; its exit code."""
        return await self._process.wait()

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        # Not by the process object: asyncio's polls before it sends, and then the exit code of one that
        # has just ended is lost to whoever waits for it.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    async def end(self) -> int:
        """SIGTERM, and time to drain; its exit code."""
        self._signal(signal.SIGTERM)
        try:
            code = await asyncio.wait_for(self._process.wait(), END)
        except TimeoutError:
            self.kill()
            code = await self._process.wait()
        await self._reading
        if self._address.done():
            self._address.exception()
        return code


def show(text: str) -> None:
    """To standard output, at once."""
    print(text, flush=True)


async def demo(once: bool) -> int:
    """``run``, on a loop."""
    secret = "whsec_" + base64.b64encode(secrets.token_bytes(24)).decode()
    with tempfile.TemporaryDirectory(prefix="gateway-demo-") as folder:
        async with Receiver(secret) as receiver:
            config = Path(folder) / "gateway.toml"
            config.write_text(CONFIG.format(spool=Path(folder) / "spool", url=receiver.url, secret=secret))
            gateway = await Served.start(config)
            _on_signals(asyncio.current_task())
            try:
                await _first_mail(gateway, receiver)
                if not once:
                    server = await gateway.listening()
                    host, _, port = server.rpartition(":")
                    show("\n" + NEXT.format(server=server, host=host, port=port))
                    show("Mail you send is shown here. Ctrl-C ends the demo.")
                    raise DemoError(f"the gateway ended by itself, with exit code {await gateway.gone()}")
                good = True
            except asyncio.CancelledError:
                show("\nEnding …")
                good = receiver.arrived.is_set()
            except DemoError as failure:
                print(f"gateway demo: {failure}", file=sys.stderr)
                good = False
            # From here on a further Ctrl-C means: at once.
            _on_signals(gateway)
            code = await gateway.end()
            if good and code != 0:
                print(f"gateway demo: the gateway ended with exit code {code}", file=sys.stderr)
                good = False
    return 0 if good else 1


def _on_signals(target: asyncio.Task[int] | Served | None) -> None:
    assert target is not None
    act = target.kill if isinstance(target, Served) else target.cancel
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, act)


async def _first_mail(gateway: Served, receiver: Receiver) -> None:
    server = await gateway.listening()
    show(f"The gateway listens on {server} and posts what it takes to {receiver.url}.\nOne mail goes in:\n")
    sender, recipients = "ada@client.example", ["grace@demo.example"]
    content = send.make_mail(sender, recipients)
    result = await asyncio.to_thread(
        send.send, server, sender, recipients, content, helo="client.example", say=lambda line: show(f"  {line}")
    )
    if not result.accepted:
        raise DemoError("the mail was not taken")
    try:
        await asyncio.wait_for(receiver.arrived.wait(), ARRIVAL)
    except TimeoutError:
        raise DemoError(f"nothing came to the webhook within {ARRIVAL:.0f} s") from None
    finally:
        receiver.release()


def run(once: bool) -> int:
    """The command: 0, or 1 if the mail did not come through."""
    return asyncio.run(demo(once))
