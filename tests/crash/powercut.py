"""What a disk may hold after the power went, drawn at random from a log of operations.

``Disk`` takes the operations of ``faulty.py`` one by one. Between two of them, ``cut`` draws a
state that a power cut could leave: every octet and name that a sync had asked for is there, and
of everything since then any part. What is drawn from:

- of each file, each unsynced write and cut is there or not, whole, by pages of 4 KiB, or by
  sectors of 512 octets, in any mixture; a hole is zeros;
- what a *failed* sync was about may be there or not for good, whatever syncs come later
  (the kernel takes those pages for clean: ATC'20, "Can Applications Recover from fsync
  Failures?"), until it is written anew;
- of each name in a folder, any of the files it has meant since the folder was last synced;
  unlike on a journaling file system, one name's change says nothing of another's.

``Cut`` is such a state as a recipe: ``write`` makes the files. Two recipes of one disk with the same
``key`` are the same state.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.crash.faulty import Operation

SECTOR, PAGE = 512, 4096


@dataclass(slots=True, eq=False)
class Change:
    """One write (``octets`` at ``offset``) or cut (``size``) that no sync has covered. ``lost``: one
    failed over it. ``sure``: a later sync has covered it, but something before it in this file is
    in doubt for good."""

    number: int
    step: int
    offset: int
    octets: bytes
    size: int = -1
    lost: bool = False
    sure: bool = False


@dataclass(slots=True, eq=False)
class Inode:
    number: int
    folder: bool = False
    durable: bytearray = field(default_factory=bytearray)
    version: int = 0
    changes: list[Change] = field(default_factory=list)
    #: The first sync by SQLite of a file it made itself syncs the folder too.
    names_folder: bool = False


def _apply(content: bytearray, offset: int, octets: bytes) -> None:
    if offset > len(content):
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(octets)] = octets


class File(NamedTuple):
    """One file of a cut: its durable octets and what of the rest is there, in order."""

    path: str
    inode: Inode
    version: int
    pieces: tuple[tuple[int, int, int], ...]  # number of the change, from, to


@dataclass(slots=True)
class Cut:
    folders: tuple[str, ...]
    files: tuple[File, ...]

    @property
    def key(self) -> tuple[object, ...]:
        return (self.folders, *((path, inode.number, version, pieces) for path, inode, version, pieces in self.files))

    def content(self, file: File) -> bytearray:
        content = bytearray(file.inode.durable)
        changes = {change.number: change for change in file.inode.changes}
        for number, start, end in file.pieces:
            change = changes[number]
            if change.size >= 0:
                if change.size < len(content):
                    del content[change.size :]
                else:
                    content.extend(bytes(change.size - len(content)))
            else:
                _apply(content, change.offset + start, change.octets[start:end])
        return content

    def image(self) -> dict[str, bytes]:
        """All of it, by path below the root."""
        return {file.path: bytes(self.content(file)) for file in self.files}

    def write(self, target: Path) -> None:
        """Before the disk goes on. ``target`` is a folder that is there, empty."""
        for folder in self.folders:
            os.mkdir(target / folder)
        for file in self.files:
            # In one piece of code and without buffers: this is done a million times.
            descriptor = os.open(target / file.path, os.O_WRONLY | os.O_CREAT, 0o600)
            os.write(descriptor, self.content(file))
            os.close(descriptor)


class Disk:
    """The files below ``root``; ``image``: what lies there durably from the start."""

    def __init__(self, root: str, image: dict[str, bytes] | None = None, folders: tuple[str, ...] = ()) -> None:
        self._root = root
        self._count = 0
        #: Each name's past since its folder was synced; the last one is what it means now.
        self._names: dict[str, list[tuple[int, Inode | None]]] = {}
        for path in folders:
            self._names[path] = [(-1, self._inode(folder=True))]
        for path, octets in (image or {}).items():
            inode = self._inode()
            inode.durable[:] = octets
            self._names[path] = [(-1, inode)]
        self.steps = 0

    def _inode(self, folder: bool = False) -> Inode:
        self._count += 1
        return Inode(self._count, folder)

    def _change(self, inode: Inode, offset: int, octets: bytes, size: int = -1) -> None:
        self._count += 1
        inode.changes.append(Change(self._count, self.steps, offset, octets, size))

    def _means(self, path: str) -> Inode | None:
        past = self._names.get(path)
        return past[-1][1] if past else None

    def _name(self, path: str, inode: Inode | None) -> None:
        self._names.setdefault(path, [(-1, None)]).append((self.steps, inode))

    def take(self, step: Operation) -> None:
        """The next operation of the log."""
        path = os.path.relpath(step.path, self._root)
        inode = self._means(path)
        match step.kind:
            case "mkdir":
                self._name(path, self._inode(folder=True))
            case "open":
                made = self._inode()
                made.names_folder = path.endswith(("-wal", "-journal"))
                self._name(path, made)
            case "write" if inode is not None:
                self._change(inode, step.offset, step.octets)
            case "truncate" if inode is not None:
                self._change(inode, 0, b"", step.size)
            case "sync" if inode is not None:
                self._sync(inode, step.since)
                if inode.names_folder and step.named:
                    inode.names_folder = False
                    self._sync_names(os.path.dirname(path), step.since)
            case "unsynced" if inode is not None:
                for change in inode.changes:
                    if change.step < step.since and not change.sure:
                        change.lost = True
            case "delete":
                self._name(path, None)
            case "rename":
                self._name(os.path.relpath(step.target, self._root), inode)
                self._name(path, None)
            case "sync_dir":
                self._sync_names("" if path == "." else path, step.since)
        self.steps += 1

    def _sync(self, inode: Inode, since: int) -> None:
        asked = [change for change in inode.changes if change.step < since]
        if any(change.lost for change in inode.changes):
            for change in asked:
                change.sure = change.sure or not change.lost
            return
        for change in asked:
            self._keep(inode.durable, change)
        del inode.changes[: len(asked)]
        inode.version += bool(asked)

    def _keep(self, content: bytearray, change: Change) -> None:
        if change.size < 0:
            _apply(content, change.offset, change.octets)
        elif change.size < len(content):
            del content[change.size :]
        else:
            content.extend(bytes(change.size - len(content)))

    def _sync_names(self, folder: str, since: int) -> None:
        for path, past in list(self._names.items()):
            if os.path.dirname(path) == folder:
                # A sync that began before another one that is over by now has nothing to add.
                known = max((at for at, (when, _) in enumerate(past) if when < since), default=0)
                del past[:known]
                if len(past) == 1 and past[0][1] is None:
                    del self._names[path]

    @property
    def doubt(self) -> int:
        """How much is in doubt now: pages and names."""
        count = 0
        for past in self._names.values():
            count += len(past) - 1
            inode = past[-1][1]
            if inode is not None:
                count += sum(1 + len(change.octets) // PAGE for change in inode.changes if not change.sure)
        return count

    def cut(self, chance: random.Random | None) -> Cut:
        """The power goes now. ``chance`` None: everything is there, as after kill -9."""
        folders: list[str] = []
        files: list[File] = []
        names = None if chance is None else chance.choice(("all", "none", "any", "any"))
        missing: set[str] = set()
        for path, past in sorted(self._names.items()):
            if len(past) == 1 or chance is None or names == "all":
                inode = past[-1][1]
            else:
                inode = past[0][1] if names == "none" else chance.choice(past)[1]
            if os.path.dirname(path) in missing:
                continue
            if inode is None:
                missing.add(path)
            elif inode.folder:
                folders.append(path)
            else:
                files.append(File(path, inode, inode.version, self._pieces(inode, chance)))
        return Cut(tuple(folders), tuple(files))

    def _pieces(self, inode: Inode, chance: random.Random | None) -> tuple[tuple[int, int, int], ...]:
        changes = inode.changes
        if chance is None or not changes:
            return tuple((change.number, 0, len(change.octets)) for change in changes)
        grain = chance.choice((0, PAGE, PAGE, SECTOR))
        how = chance.choice(("any", "any", "any", "most", "few", "prefix", "all", "none"))
        share = {"any": 0.5, "most": 0.9, "few": 0.1, "prefix": 1.0, "all": 1.0, "none": 0.0}[how]
        end = chance.randrange(len(changes) + 1) if how == "prefix" else len(changes)
        pieces: list[tuple[int, int, int]] = []
        for place, change in enumerate(changes):
            size = len(change.octets)
            if change.sure:
                pieces.append((change.number, 0, size))
            elif place >= end:
                # The write that was under way when the power went: some of its sectors.
                if place == end and size and grain:
                    pieces.append((change.number, 0, min(size, chance.randrange(0, size + grain, grain))))
            elif not grain or share in (0.0, 1.0) or size <= grain:
                if share == 1.0 or chance.random() < share:
                    pieces.append((change.number, 0, size))
            else:
                start = 0
                while start < size:
                    # Up to the next boundary of the file's own pages or sectors.
                    stop = min(size, start + grain - (change.offset + start) % grain)
                    if chance.random() < share:
                        pieces.append((change.number, start, stop))
                    start = stop
        return tuple(pieces)
