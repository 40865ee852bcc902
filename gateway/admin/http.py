"""Health and metrics over HTTP, for load balancers, orchestrators and Prometheus.

Owns the four paths that are open to everybody who can reach ``[admin].address``. Knows
neither queue nor workers: what is true is asked of a ``Source``. Loaded only once the
listeners are up, because aiohttp takes longer to import than the gateway to start.

``/livez`` touches nothing: it says that this process turns its loop. ``/readyz``: 200 while
new mail is welcome here. ``/healthz``: the same with what stands behind it, as JSON.
``/metrics``: Prometheus' text form.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any, Protocol

import orjson
from aiohttp import web

#: The form that every Prometheus since 2.0 reads.
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Source(Protocol):
    """What is true about one worker, or about all."""

    async def metrics(self) -> bytes: ...
    async def unready(self) -> str | None:
        """Why no new mail should be sent here; None if it is welcome."""

    async def status(self) -> Mapping[str, Any]:
        """Whatever a person wants to know beyond that; orjson can write it."""


class Site:
    """The HTTP side on a bound socket."""

    def __init__(self, sock: socket.socket, source: Source) -> None:
        self._sock = sock
        self._source = source
        application = web.Application()
        application.router.add_get("/livez", self._livez)
        application.router.add_get("/readyz", self._readyz)
        application.router.add_get("/healthz", self._healthz)
        application.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)

    async def open(self) -> None:
        await self._runner.setup()
        await web.SockSite(self._runner, self._sock).start()

    async def close(self) -> None:
        await self._runner.cleanup()

    async def _livez(self, request: web.Request) -> web.Response:
        return web.Response(text="alive\n")

    async def _readyz(self, request: web.Request) -> web.Response:
        reason = await self._source.unready()
        return web.Response(text="ready\n") if reason is None else web.Response(status=503, text=f"{reason}\n")

    async def _healthz(self, request: web.Request) -> web.Response:
        reason = await self._source.unready()
        told = {"ready": reason is None, "reason": reason, **await self._source.status()}
        return web.Response(status=200 if reason is None else 503, body=orjson.dumps(told), content_type="application/json")

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=await self._source.metrics(), headers={"Content-Type": METRICS_TYPE})
