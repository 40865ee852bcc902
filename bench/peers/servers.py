"""The peers on Python, by the Python of ``build/peers``: it has them, and nothing of the gateway.

``python servers.py aiosmtpd discard|relay|webhook PORT FAR``: on uvloop. ``relay`` goes on with
aiosmtplib, over connections that are kept, ``webhook`` with aiohttp; the 250 follows the far side's own.
``python servers.py slimta discard PORT FAR``: on gevent.
"""

from __future__ import annotations

import sys
from typing import Any

BACKLOG = 1024


class Discard:
    """An aiosmtpd hook object (its names are aiosmtpd's)."""

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802 - aiosmtpd calls it so
        return "250 taken"


class Relay:
    def __init__(self, far: int) -> None:
        self._far = far
        self._free: list[Any] = []

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802 - aiosmtpd calls it so
        import aiosmtplib

        if self._free:
            client = self._free.pop()
        else:
            client = aiosmtplib.SMTP(hostname="127.0.0.1", port=self._far, start_tls=False, local_hostname="peer.example")
            await client.connect()
        try:
            await client.sendmail(envelope.mail_from, envelope.rcpt_tos, envelope.content)
        except (aiosmtplib.SMTPException, OSError):
            client.close()
            return "451 not taken"
        self._free.append(client)
        return "250 taken"


class Webhook:
    def __init__(self, far: int) -> None:
        self._url = f"http://127.0.0.1:{far}/"
        self._client: Any = None

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802 - aiosmtpd calls it so
        import aiohttp

        if self._client is None:
            self._client = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers={"content-type": "message/rfc822"})
        try:
            async with self._client.post(self._url, data=envelope.content) as answer:
                await answer.read()
                return "250 taken" if answer.status < 300 else "451 not taken"
        except (aiohttp.ClientError, OSError):
            return "451 not taken"


async def aiosmtpd(mode: str, port: int, far: int) -> None:
    import asyncio

    from aiosmtpd.smtp import SMTP

    hooks = Discard() if mode == "discard" else Relay(far) if mode == "relay" else Webhook(far)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: SMTP(hooks, enable_SMTPUTF8=True, hostname="peer.example"), "127.0.0.1", port, backlog=BACKLOG
    )
    await server.serve_forever()


def slimta(port: int) -> None:
    from gevent import socket
    from slimta.edge.smtp import SmtpEdge, SmtpSession

    class Session(SmtpSession):
        def BANNER_(self, reply: Any) -> None:  # noqa: N802 - slimta calls it so; its own asks DNS for the client's name
            self._call_validator("banner", reply, self.address)

    class Nowhere:
        def enqueue(self, envelope: Any) -> list[tuple[Any, str]]:
            return [(envelope, "taken")]

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(BACKLOG)
    edge = SmtpEdge(listener, Nowhere(), hostname="peer.example", session_class=Session)
    edge.start()
    edge.join()


def main() -> None:
    name, mode, port, far = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    if name == "slimta":
        slimta(port)
    else:
        import uvloop

        uvloop.run(aiosmtpd(mode, port, far))


if __name__ == "__main__":
    main()
