"""How fast the bytes are read: command lines a second, content in GB/s. ``python -m bench.parser``

One process, one thread, everything in cache, medians of short runs. The rows are those of
the speed table: MAIL and RCPT lines fully validated; content out of DATA at 64 KiB a read,
as base64 (lines of 76), text (mean 40 octets a line, one stuffed dot in 200 lines) and
every line dotted. Beside them, in the same run: the same lines through ``str.split``
(nothing validated), the same content through ``bytes.replace`` (no end, no faults).
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

from gateway._parser import Receiver, ReplyReceiver, stuff

READ = 65536


def seconds(work: Callable[[], object], least: float) -> float:
    """Of one call of ``work``, over at least ``least`` seconds."""
    times, spent = 1, 0.0
    while True:
        start = time.perf_counter()
        for _ in range(times):
            work()
        spent = time.perf_counter() - start
        if spent >= least:
            return spent / times
        times = max(times * 2, int(times * least / max(spent, 1e-9)))


def median(work: Callable[[], object], runs: int, least: float) -> tuple[float, float, float]:
    """``(median, least, most)`` seconds of one call."""
    found = sorted(seconds(work, least) for _ in range(runs))
    return statistics.median(found), found[0], found[-1]


# --- what is read -----------------------------------------------------------------------


def whole_lines(lines: list[bytes], size: int) -> bytes:
    """Lines over and over, cut behind the last one that fits into ``size`` octets."""
    octets = b"".join(lines)
    octets = octets * (size // len(octets) + 1)
    return octets[: octets.rindex(b"\r\n", 0, size) + 2]


def contents(seed: int = 7) -> dict[str, bytes]:
    chance = random.Random(seed)
    base = base64.b64encode(chance.randbytes(57 * 1200))
    words = ["mail", "the", "gateway", "of", "lines", "a", "carried", "below.", "octets,", "and", "so"]
    text = []
    for i in range(3000):
        line = ""
        want = chance.randint(0, 80)
        while len(line) < want:
            line += chance.choice(words) + " "
        text.append((b"." if i % 200 == 99 else b"") + (b"." if i % 200 == 99 else b"") + line[:want].encode() + b"\r\n")
    return {
        "base64": whole_lines([base[i : i + 76] + b"\r\n" for i in range(0, len(base), 76)], READ),
        "text": whole_lines(text, READ),
        "dotted": whole_lines([b".." + base[i : i + 74] + b"\r\n" for i in range(0, len(base), 74)], READ),
        "short": whole_lines([b"a\r\n", b"\r\n", b"bc\r\n"], READ),
    }


def command_lines() -> dict[str, bytes]:
    plain = [b"MAIL FROM:<sender%d@example.org>\r\nRCPT TO:<recipient%d@dest.example.com>\r\n" % (i, i) for i in range(64)]
    params = [
        b"MAIL FROM:<bounce+%d=user=example.com@lists.example.org> SIZE=%d BODY=8BITMIME\r\nRCPT TO:<first.last%d@dest.example.com>\r\n"
        % (i, 1000 + i, i)
        for i in range(64)
    ]
    wide = [f"MAIL FROM:<绯{i}@例え.example> SMTPUTF8\r\nRCPT TO:<用户{i}@dest.example.com>\r\n".encode() for i in range(64)]
    return {"mail and rcpt": b"".join(plain), "with parameters": b"".join(params), "utf-8": b"".join(wide)}


# --- the work ---------------------------------------------------------------------------


def read_commands(octets: bytes, everything: bool) -> Callable[[], object]:
    receiver = Receiver()

    def turn() -> None:
        receiver.feed(octets)
        command = receiver.command
        while command() is not None:
            pass

    def turn_and_look() -> None:
        receiver.feed(octets)
        while (command := receiver.command()) is not None:
            _ = command.verb, command.fault, command.address, command.local, command.domain, command.params, command.ascii

    return turn_and_look if everything else turn


def split_commands(octets: bytes) -> Callable[[], object]:
    def turn() -> None:
        for line in octets.split(b"\r\n")[:-1]:
            verb, _, argument = line.decode().partition(" ")
            words = argument.split(" ")
            _path = verb.upper(), words[0].partition("<")[2].rstrip(">").rpartition("@")
            _params = dict(word.partition("=")[::2] for word in words[1:])

    return turn


def read_content(octets: bytes) -> Callable[[], object]:
    receiver = Receiver()
    receiver.begin()
    receiver.feed(b"\r\n")
    receiver.content()

    def turn() -> None:
        receiver.feed(octets)
        receiver.content()

    turn()
    if receiver.content_fault or receiver.pending or receiver.finished:
        raise RuntimeError("the corpus is not clean content")
    return turn


def read_message(octets: bytes) -> Callable[[], object]:
    receiver = Receiver()

    def turn() -> None:
        receiver.begin()
        receiver.feed(octets)
        receiver.content()

    return turn


def read_chunk(octets: bytes) -> Callable[[], object]:
    receiver = Receiver()
    receiver.begin()
    receiver.feed(b"\r\n")
    receiver.chunk(2)

    def turn() -> None:
        receiver.feed(octets)
        receiver.chunk(READ)

    return turn


def read_replies(octets: bytes) -> Callable[[], object]:
    receiver = ReplyReceiver()

    def turn() -> None:
        receiver.feed(octets)
        while receiver.reply() is not None:
            pass

    return turn


MESSAGE = (
    b"Received: from client.example (client.example [192.0.2.1])\r\n\tby mx.example with ESMTP id 1234\r\n"
    b"Date: Mon, 1 Jan 2024 00:00:00 +0000\r\nFrom: A <a@example.org>\r\nTo: B <b@example.com>\r\n"
    b"Message-ID: <1@example.org>\r\nSubject: a message of one KiB\r\nMIME-Version: 1.0\r\n"
    b"Content-Type: text/plain; charset=utf-8\r\n\r\n"
)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=7)
    options.add_argument("--seconds", type=float, default=0.1, help="of one run (default 0.1)")
    options.add_argument("--json", action="store_true")
    chosen = options.parse_args()
    rows: list[dict[str, object]] = []

    def row(what: str, unit: str, amount: float, work: Callable[[], object]) -> None:
        middle, least, most = median(work, chosen.runs, chosen.seconds)
        rows.append({"what": what, "unit": unit, "median": amount / middle, "low": amount / most, "high": amount / least})
        if not chosen.json:
            print(f"{what:44} {amount / middle:8.2f} {unit:8} [{amount / most:.2f}-{amount / least:.2f}]", flush=True)

    for name, octets in command_lines().items():
        lines = octets.count(b"\r\n") / 1e6
        row(f"lines: {name}", "M/s", lines, read_commands(octets, False))
        row(f"lines: {name}, every attribute read", "M/s", lines, read_commands(octets, True))
        row(f"lines: {name}, str.split", "M/s", lines, split_commands(octets))
    for name, octets in contents().items():
        row(f"content 64 KiB: {name}", "GB/s", len(octets) / 1e9, read_content(octets))
        row(f"content 64 KiB: {name}, bytes.replace", "GB/s", len(octets) / 1e9, partial(octets.replace, b"\r\n.", b"\r\n"))
        row(f"chunk 64 KiB: {name}", "GB/s", len(octets) / 1e9, read_chunk(octets))
        row(f"stuff 64 KiB: {name}", "GB/s", len(octets) / 1e9, partial(stuff, octets))
    for size in (1024, 10240):
        message = MESSAGE + whole_lines([b"x" * 76 + b"\r\n"], size - len(MESSAGE)) + b".\r\n"
        row(f"message of {size} octets, header counted", "M/s", 1e-6, read_message(message))
    row("replies: 250 2.1.0 Ok", "M/s", 1e-4, read_replies(b"250 2.1.0 Ok\r\n" * 100))
    if chosen.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
