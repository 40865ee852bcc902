"""The shards of the spool that one process holds: its own, and those that nobody else carries.

Owns which folders below ``spool.path`` are ours, and how they come and go. A shard is a spool,
its queue and the control socket on which people reach both. Shard n belongs to worker n modulo
``workers``, so that every shard on disk has one process that looks for it, however many workers
wrote it. New mail goes to the *main* shard, as a rule the one with our own number. Others are
*adopted*: what is in them is carried, nothing new is put in, and an empty one is removed.

Nothing is ever copied from shard to shard, and the lock of a shard is all that says who has it:
a process that dies at any moment leaves shards as they always are, to be recovered by whoever
opens them next (DESIGN §8).

While a new version takes over (``net/handover.py``) the old one still has our shard, until its
last mail is answered and its last delivery is over. New mail then goes to another one (our
number plus a multiple of ``workers``). Once ours is free it becomes the main shard, and the
other is emptied and goes.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from .admin.control import NAME as CONTROL
from .admin.control import Control, Operation
from .contracts import Observer, SpoolError
from .queue import LaneSettings, Queue
from .spool.sqlite import InUseError, SqliteSpool

#: Seconds between looks for shards that nobody carries.
LOOK = 0.5
#: Looks until one that could not be opened, for another reason than that somebody has it, is tried again.
AGAIN = 60
#: Shards of ours that others may have before we give up.
MOST = 1000
#: Adopted shards that have mail due for a sink together get one in so many of its places, each at
#: least one; and of its rate.
SHARE = 4
#: One that has none keeps a place, and one in so many of the rate, for what a person replays there.
TOKEN = 100

Counts = dict[tuple[str, str], tuple[int, float]]


def _nobody() -> bool:
    return False


class Shard:
    """One spool with its queue. ``lanes``: the queue's settings, which may be changed at any time.
    ``wants``: sinks for which mail is queued there, as last seen. ``entered``: somebody may still put
    mail in."""

    def __init__(self, number: int, spool: SqliteSpool) -> None:
        self.number = number
        self.spool = spool
        self.queue: Queue | None = None
        self.lanes: dict[str, LaneSettings] = {}
        self.wants: set[str] = set()
        self.control: Control | None = None
        self.entered: Callable[[], bool] = _nobody

    @property
    def folder(self) -> Path:
        return Path(self.spool.folder)


class Shards:
    """See the module. ``number`` is ours of ``workers``. ``spool`` makes one for a folder,
    ``queue`` one for a spool with its settings; ``operations`` is what a shard's control socket
    answers; ``whole``: what each sink may have in all; ``moved(old, new)``: new mail goes to
    another main shard from now on."""

    def __init__(
        self,
        root: Path,
        number: int,
        workers: int,
        *,
        spool: Callable[[Path], SqliteSpool],
        queue: Callable[[SqliteSpool], tuple[Queue, dict[str, LaneSettings]]],
        operations: Callable[[Shard], Mapping[str, Operation]],
        whole: Callable[[], Mapping[str, LaneSettings]],
        moved: Callable[[Shard, Shard], None],
        observer: Observer,
    ) -> None:
        self.root = root
        self.number = number
        self.main: Shard | None = None
        self.adopted: dict[int, Shard] = {}
        self._workers = workers
        self._spool = spool
        self._queue = queue
        self._operations = operations
        self._whole = whole
        self._moved = moved
        self._observer = observer
        self._refused: dict[int, int] = {}
        self._looking: asyncio.Task[None] | None = None
        self._enough = asyncio.Event()

    def __iter__(self) -> Iterator[Shard]:
        if self.main is not None:
            yield self.main
        yield from self.adopted.values()

    # ------------------------------------------------------------------- life

    async def claim(self, *, handed: bool) -> Shard:
        """Open the main shard's spool. ``handed``: whom we take over from may have it still; then
        another one will do for now. Raises SpoolError, OSError."""
        number = self.number
        while True:
            try:
                self.main = await self._opened(number)
                return self.main
            except InUseError:
                number += self._workers
                if not handed or number > MOST * self._workers:
                    raise

    async def begin(self, shard: Shard) -> None:
        """Carry what is in it. Raises SpoolError."""
        shard.queue, shard.lanes = self._queue(shard.spool)
        await shard.queue.open()

    async def answer(self, shard: Shard) -> None:
        """Open its control socket. Raises OSError."""
        shard.control = Control(shard.folder / CONTROL, self._operations(shard))
        await shard.control.open()

    def look(self) -> None:
        """Look from now on for shards that nobody carries."""
        self._looking = asyncio.get_running_loop().create_task(self._look())

    async def stay(self) -> None:
        """Take no further shard. Waits for one that is being opened."""
        self._enough.set()
        if self._looking is not None:
            await self._looking

    # --------------------------------------------------------------- adoption

    def found(self) -> list[int]:
        """Shards on disk that are ours to carry and that we do not have, and our own."""
        numbers = {number for number in on_disk(self.root) if number % self._workers == self.number % self._workers}
        return sorted((numbers | {self.number}) - {shard.number for shard in self})

    async def _look(self) -> None:
        while not self._enough.is_set():
            try:
                for number in await asyncio.to_thread(self.found):
                    if self._enough.is_set():
                        return
                    await self._adopt(number)
                for shard in list(self.adopted.values()):
                    await self._let_go(shard)
                await self._weigh()
            except Exception as error:
                self._observer.event("bug", message=f"looking for shards: {error!r}", traceback=traceback.format_exc())
            with suppress(TimeoutError):
                await asyncio.wait_for(self._enough.wait(), LOOK)

    async def _adopt(self, number: int) -> None:
        if self._refused.get(number, 0) > 0:
            self._refused[number] -= 1
            return
        try:
            shard = await self._opened(number)
        except InUseError:
            return  # the old version, the queue command: not for long
        except (SpoolError, OSError) as error:
            self._refused[number] = AGAIN
            self._observer.event("adoption_failed", shard=number, reason=str(error))
            return
        self._refused.pop(number, None)
        # In our books before the first await: what is opened is closed, whatever comes.
        self.adopted[number] = shard
        try:
            if number != self.number and not await shard.spool.counts():
                await self._let_go(shard)
                return
            await self.begin(shard)
            await self.answer(shard)
        except (SpoolError, OSError) as error:
            self._refused[number] = AGAIN
            self._observer.event("adoption_failed", shard=number, reason=str(error))
            await self._ended(shard)
            return
        if number == self.number:
            self._move(shard)
        else:
            self._observer.event("adopted", shard=number, deliveries=sum(rows for rows, _ in (await shard.spool.counts()).values()))
        await self._weigh()
        self.deal()

    async def _opened(self, number: int) -> Shard:
        shard = Shard(number, self._spool(self.root / str(number)))
        await shard.spool.open()
        return shard

    def _move(self, home: Shard) -> None:
        """Our own shard is free at last: new mail goes there."""
        old = self.main
        assert old is not None
        del self.adopted[home.number]
        self.main, self.adopted[old.number] = home, old
        self._moved(old, home)
        self._observer.event("home", shard=home.number)

    async def _let_go(self, shard: Shard) -> None:
        """Remove it if nothing is in it, and nothing will be."""
        if shard.entered() or (shard.queue is not None and any(shard.queue.out().values())):
            return
        try:
            if await shard.spool.counts():
                return
        except SpoolError:
            return
        await self._ended(shard)
        self._observer.event("emptied", shard=shard.number)
        self.deal()

    async def _ended(self, shard: Shard) -> None:
        if shard.queue is not None:
            await shard.queue.close()
        if shard.control is not None:
            await shard.control.close()
        else:
            # A process that was killed may have left its own; we hold the lock.
            with suppress(OSError):
                (shard.folder / CONTROL).unlink()
        await shard.spool.remove()
        self.adopted.pop(shard.number, None)

    async def _weigh(self) -> None:
        """What each adopted shard still wants to carry; deal anew where that changed."""
        changed = False
        for shard in list(self.adopted.values()):
            with suppress(SpoolError):
                wants = {sink for sink, state in await shard.spool.counts() if state == "queued"}
                changed = changed or wants != shard.wants
                shard.wants = wants
        if changed:
            self.deal()

    def deal(self) -> None:
        """Each shard's part of the places, and of the rate, that a sink has."""
        for name, whole in self._whole().items():
            claims = sum(name in shard.wants for shard in self.adopted.values())
            place, rate = whole.concurrency, whole.rate
            for shard in self.adopted.values():
                lane = shard.lanes.get(name)
                if lane is None:
                    continue
                if name in shard.wants:
                    lane.concurrency, lane.rate = max(1, whole.concurrency // (SHARE * claims)), whole.rate / (SHARE * claims)
                else:
                    lane.concurrency, lane.rate = 1, whole.rate / TOKEN
                place, rate = place - lane.concurrency, rate - lane.rate
            if self.main is not None and (lane := self.main.lanes.get(name)) is not None:
                lane.concurrency, lane.rate = max(1, place), max(rate, whole.rate / TOKEN)

    # -------------------------------------------------------------- what it tells

    async def counts(self) -> Counts:
        """As ``Spool.counts``, of all of them. A spool that cannot be read now is left out."""
        total: Counts = {}
        for shard in tuple(self):
            with suppress(SpoolError):
                for place, (rows, oldest) in (await shard.spool.counts()).items():
                    known, since = total.get(place, (0, oldest))
                    total[place] = (known + rows, min(since, oldest))
        return total

    def out(self) -> dict[str, int]:
        """Deliveries out now by sink."""
        total: dict[str, int] = {}
        for shard in self:
            for name, out in shard.queue.out().items() if shard.queue is not None else ():
                total[name] = total.get(name, 0) + out
        return total


def on_disk(root: Path) -> list[int]:
    """Numbers of the shards that are in a spool folder, ascending."""
    try:
        return sorted(int(path.name) for path in root.iterdir() if path.name.isdecimal() and (path / "spool.db").exists())
    except OSError:
        return []
