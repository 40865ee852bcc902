"""A process that stores and settles as fast as it can until it is killed.

``python -m tests.crash.producer FOLDER PREFIX``. Tells on standard output, a line each, written
at once: ``stored ID CRC``, ``refused ID``, ``settling ID`` (before the mark), ``settled ID``.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import zlib

from gateway.contracts import Mark, Pending, Row, SpoolError
from gateway.spool.sqlite import SqliteSpool
from tests.crash.mail import Events, Ticket, large, message, pending

PRODUCERS = 60


def tell(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


async def produce(spool: SqliteSpool, name: str, chance: random.Random) -> None:
    number = 0
    while True:
        number += 1
        id = f"{name}-{number}"
        content = chance.randbytes(300_000 if chance.random() < 0.005 else chance.randrange(3000))
        mail = message(content, id=id)
        if len(content) >= 300_000:
            mail = await large(spool, content, id=id)
        row = pending(mail, "app")
        ticket = Ticket(Row(mail, [row]))
        spool.store(ticket)
        error: SpoolError | None = await ticket.done
        if error is not None:
            tell("refused", id)
            continue
        tell("stored", id, zlib.crc32(content))
        if chance.random() < 0.7:
            settle(spool, row, id)


def settle(spool: SqliteSpool, row: Pending, id: str) -> None:
    tell("settling", id)
    row.recipients = ()
    spool.mark(Mark(row, synced=lambda: tell("settled", id)))


async def main(folder: str, prefix: str) -> None:
    spool = SqliteSpool(folder, observer=Events(), minimum_free=0.0)
    await spool.open()
    chance = random.Random(prefix)
    await asyncio.gather(*(produce(spool, f"{prefix}-{number}", random.Random(chance.random())) for number in range(PRODUCERS)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
