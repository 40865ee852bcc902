"""aiohttp's end of a connection, bounded: of all that a peer sends on it, only so much is ever parsed.

aiohttp parses whatever was read in one go, and an answer may be preceded by any number of interim
ones (1xx): a peer that sends nothing else would hold the loop for seconds and fill the memory,
and the deadline would come late. A connection of ours carries one request, so what one whole
answer may need is what is let through; then reading stops and the deadline decides.

Imports aiohttp: to be imported with the first client that needs it. RFC 9110 §15.2.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import aiohttp
from aiohttp.client_proto import ResponseHandler

#: Octets of one connection that are parsed: the heads, and as much of a body as is ever kept.
PARSED = 128 * 1024


class BoundedProtocol(ResponseHandler):
    """Parses the first ``PARSED`` octets and no more."""

    def connection_made(self, transport: Any) -> None:
        self._parsed = 0
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        room = PARSED - self._parsed
        if room > 0:
            self._parsed += len(data)
            super().data_received(data if len(data) <= room else bytes(memoryview(data)[:room]))
        if self._parsed >= PARSED and self.transport is not None:
            # aiohttp may resume it as its own buffer empties: then we are back here.
            self.transport.pause_reading()


class BoundedConnector(aiohttp.TCPConnector):
    """Connections whose end is a ``BoundedProtocol``; each must be for one request (``force_close``)."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # There is no parameter for it. The tests of floods fail where this no longer works.
        self._factory = cast("partial[ResponseHandler]", partial(BoundedProtocol, loop=self._loop))
