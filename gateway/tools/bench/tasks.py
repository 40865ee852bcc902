"""What is measured: a task is octets to go through and the question whose answer must come out.

Owns how a corpus becomes work, and what counts as the same answer. Four kinds, and the answer each must give:

========= ==================================================================================
commands  MAIL and RCPT lines taken apart: verb, address and parameters of each
content   what comes after 354, in reads of one size: octets and digest of each content,
          unstuffed (RFC 5321 §4.5.2), without its end
dialogue  whole mails, from MAIL to the reply after the end of data, lock-step or pipelined (RFC 2920):
          the codes of all replies; sender, recipients, octets and digest of each mail
mime      a content taken apart: subject, From, To, text, html, attachments
========= ==================================================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..._parser import stuff
from .corpora import READ, Corpus

Kind = Literal["commands", "content", "dialogue", "mime"]
KINDS: tuple[Kind, ...] = ("commands", "content", "dialogue", "mime")

#: What the client says (reads), and how many replies it then waits for.
Step = tuple[list[bytes], int]
#: Sizes of reads: what a fast connection brings at once, a page, a packet of an ordinary network.
READS = (READ, 4096, 1460)
#: Corpora whose content is also measured in the smaller reads, and that are carried through dialogues.
SMALL_READS = ("text", "your mail")
CONVERSED = ("short", "attachments", "your mail")


@dataclass(frozen=True)
class Task:
    """``amount``: how many of ``unit`` one pass goes through, so that the rate is ``amount / seconds``.
    ``steps``: a whole conversation after EHLO, for kinds content and dialogue. Which of the other fields
    is filled says the kind."""

    kind: Kind
    name: str
    unit: str
    amount: float
    wire: bytes = field(default=b"", repr=False)  # commands
    mails: Sequence[Sequence[bytes]] = field(default=(), repr=False)  # content: reads of each, with its end
    steps: Sequence[Step] = field(default=(), repr=False)
    contents: Sequence[bytes] = field(default=(), repr=False)  # mime

    @property
    def id(self) -> str:
        return f"{self.kind}: {self.name}"


def tasks(corpora: Sequence[Corpus]) -> Iterator[Task]:
    """Every task that these corpora allow, kind by kind."""
    for kind in KINDS:
        for corpus in corpora:
            if kind == "commands":
                yield from _commands(corpus)
            elif corpus.contents:
                yield from {"content": _content, "dialogue": _dialogue, "mime": _mime}[kind](corpus)


def _commands(corpus: Corpus) -> Iterator[Task]:
    # What envelopes the built-in mails have says nothing new.
    if corpus.contents and corpus.name != "your mail":
        return
    lines = [line for envelope in corpus.envelopes for line in envelope]
    wire = b"".join(line + b"\r\n" for line in lines)
    yield Task("commands", f"MAIL and RCPT, {corpus.name}", "M lines/s", len(lines) / 1e6, wire=wire)


def _content(corpus: Corpus) -> Iterator[Task]:
    wires = [stuff(content) + b".\r\n" for content in corpus.contents]
    for size in READS if corpus.name in SMALL_READS else READS[:1]:
        mails = [_cut(wire, size) for wire in wires]
        steps: list[Step] = []
        for number, reads in enumerate(mails):
            steps += [([line + b"\r\n"], 1) for line in (*corpus.envelopes[number], b"DATA")]
            steps.append((reads, 1))
        words = f"{size >> 10} KiB" if size % 1024 == 0 else f"{size:,} octets"
        yield Task("content", f"{corpus.name}, reads of {words}", "GB/s", sum(map(len, wires)) / 1e9, mails=mails, steps=steps)


def _dialogue(corpus: Corpus) -> Iterator[Task]:
    if corpus.name not in CONVERSED:
        return
    groups = [[line + b"\r\n" for line in (*envelope, b"DATA")] for envelope in corpus.envelopes]
    wires = [stuff(content) + b".\r\n" for content in corpus.contents]
    lockstep: list[Step] = []
    for group, wire in zip(groups, wires, strict=True):
        lockstep += [([line], 1) for line in group]
        lockstep.append((_cut(wire, READ), 1))
    # A client waits after DATA; what it says next leaves with the content.
    pipelined: list[Step] = [([b"".join(groups[0])], len(groups[0]))]
    for group, wire in zip(groups[1:], wires[:-1], strict=True):
        pipelined.append((_cut(wire + b"".join(group), READ), 1 + len(group)))
    pipelined.append((_cut(wires[-1], READ), 1))
    for name, steps in (("lock-step", lockstep), ("pipelined", pipelined)):
        yield Task("dialogue", f"{corpus.name}, {name}", "k mails/s", len(wires) / 1e3, steps=steps)


def _mime(corpus: Corpus) -> Iterator[Task]:
    yield Task("mime", corpus.name, "MB/s", corpus.octets / 1e6, contents=corpus.contents)


def _cut(octets: bytes, size: int) -> list[bytes]:
    return [octets[at : at + size] for at in range(0, len(octets), size)]


# ------------------------------------------------------------------------------- answers


def digest(octets: bytes) -> dict[str, Any]:
    """How a content is compared."""
    return {"octets": len(octets), "sha256": hashlib.sha256(octets).hexdigest()}


def difference(ours: Any, theirs: Any, where: str = "") -> str | None:
    """The first place where an answer is another than ours, in words; None where there is none. Lists are counted from 1."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            if key not in ours or key not in theirs:
                return f"{where}{key}: {'only theirs' if key not in ours else 'only ours'}"
            found = difference(ours[key], theirs[key], f"{where}{key} ")
            if found:
                return found
        return None
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
        for number, (one, other) in enumerate(zip(ours, theirs, strict=False), 1):
            found = difference(one, other, f"{where}{number} ")
            if found:
                return found
        return None if len(ours) == len(theirs) else f"{where}has {len(theirs)} instead of {len(ours)}"
    return None if ours == theirs else f"{where.rstrip()}: {_short(theirs)} instead of {_short(ours)}"


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:37]}…"
