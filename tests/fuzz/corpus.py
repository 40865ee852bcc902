"""Inputs that are known to matter: seeds made of the transcripts, and what fuzzing found.

``corpus/NAME.txt`` holds one input a line, escaped so that a person can read it: the smallest
set that reaches every edge known so far. ``seeds(name)`` needs no file.
"""

from __future__ import annotations

from pathlib import Path

from .. import dialogue, reference
from . import server
from .inputs import STRETCH, UNIT, WAIT

FOLDER = Path(__file__).parent / "corpus"
TARGETS = ("receiver", "replies", "server", "client")


def escaped(octets: bytes) -> str:
    return octets.decode("latin-1").encode("unicode_escape").decode("ascii")


def unescaped(text: str) -> bytes:
    return text.encode("ascii").decode("unicode_escape").encode("latin-1")


def kept(name: str) -> list[bytes]:
    path = FOLDER / f"{name}.txt"
    return [unescaped(line) for line in path.read_text("ascii").splitlines()] if path.exists() else []


def keep(name: str, inputs: list[bytes]) -> None:
    """Short ones first, so that a change shows where it belongs."""
    FOLDER.mkdir(exist_ok=True)
    lines = [escaped(octets) for octets in sorted(set(inputs), key=lambda octets: (len(octets), octets))]
    (FOLDER / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), "ascii")


def _stretchable(octets: bytes) -> bytes:
    """Long runs written short."""
    made = bytearray()
    at = 0
    while at < len(octets):
        run = 1
        while at + run < len(octets) and octets[at + run] == octets[at]:
            run += 1
        count = min((run - 1) // UNIT, 254)
        if count and octets[at] not in b"\r\n":
            made += bytes([octets[at], STRETCH, count])
            at += 1 + UNIT * count
        else:
            made.append(octets[at])
            at += 1
    return bytes(made)


def _transcripts() -> list[tuple[dialogue.Case, list[bytes]]]:
    """One variant of each, and what its client says between two waits."""
    found: dict[str, tuple[dialogue.Case, list[bytes]]] = {}
    for case in dialogue.cases():
        found.setdefault(case.name.partition("[")[0], (case, [_stretchable(group.octets) for group in case.groups]))
    return [*found.values()]


def _server_seeds() -> list[bytes]:
    made = []
    for case, groups in _transcripts():
        settings = case.settings
        first = (
            (3 if settings.certificate_identity != "off" else server.PROTOCOLS.index(settings.protocol))
            | server.TLS_KINDS.index(settings.tls) << 2
            | server.AUTH_KINDS.index(settings.auth) << 4
            | (64 if settings.senders else 0)
        )
        second = (
            (settings.long_lines == "reject")
            | (settings.bare_newlines == "normalize") << 1
            | (not settings.binarymime) << 2
            | settings.xclient << 3
            | (settings.message_size > 1000) << 6
        )
        octets = bytes([first, second, 6, 30]) + WAIT.join(group for group in groups if group)
        if len(octets) < 3000:
            made.append(octets)
    return made


def _receiver_seeds() -> list[bytes]:
    made = []
    for number, (_, groups) in enumerate(_transcripts()):
        stream = b"".join(groups)
        if len(stream) < 2000:
            made.append(bytes([0x30, 0x30 + number % 4, 0x30 + number % 16, 6, 30 + number]) + stream)
        content = max(groups, key=len)
        if len(content) < 2000:
            made += [bytes([0x30 + way, 0x30 + number % 8, 0x32, 3, 70]) + content for way in (1, 2, 3, 4, 5)]
        for command in reference.commands(stream):
            if command.address:
                made.append(b"600  " + command.address.encode())
    return made


def _replies_seeds() -> list[bytes]:
    made = []
    for case, _ in _transcripts():
        said = "".join(f"{line.rstrip('*')}\r\n" for group in case.groups for reply in group.expected for line in reply)
        made.append(b"3 0" + said.encode())
    return [*made, b"0 0250-a\r\n250 b\r\n", b"1 0250 \xff\xc2\x85\r\n251-x\r\n250 y\r\n", b"2 0220\r\n354 \xe2\x80\xa8\r\n5\n"]


_HELLO = b"220 up.example ESMTP\r\n\x1e250-up.example\r\n250-%s250 ENHANCEDSTATUSCODES\r\n\x1e"
_UPSTREAMS = (
    _HELLO % b"SIZE 1000\r\n" + b"250 ok\r\n\x1e250 ok\r\n\x1e354 go\r\n\x1e250 2.0.0 taken\r\n",
    _HELLO % b"PIPELINING\r\n250-8BITMIME\r\n" + b"250 ok\r\n250 2.1.5 ok\r\n550 5.1.1 no\r\n354 go\r\n\x1e250 taken\r\n\x1e250 ok\r\n",
    _HELLO % b"PIPELINING\r\n250-CHUNKING\r\n250-BINARYMIME\r\n250-8BITMIME\r\n" + b"250 ok\r\n250 ok\r\n250 taken\r\n\x1e" * 3,
    _HELLO % b"PIPELINING\r\n250-CHUNKING\r\n250-DSN\r\n250-SMTPUTF8\r\n250-LIMITS RCPTMAX=1 MAILMAX=2\r\n"
    + b"250 ok\r\n250 ok\r\n451 4.3.0 no\r\n",
    _HELLO % b"STARTTLS\r\n"
    + b"220 go\r\n\x1e250-up.example\r\n250-AUTH PLAIN LOGIN\r\n250 CHUNKING\r\n\x1e235 in\r\n\x1e250 ok\r\n\x1e552 many\r\n",
    _HELLO % b"STARTTLS\r\n" + b"454 no\r\n\x1e250 ok\r\n\x1e421 4.3.2 off\r\n",
    _HELLO % b"AUTH=LOGIN\r\n" + b"334 VXNlcm5hbWU6\r\n\x1e334 UGFzc3dvcmQ6\r\n\x1e235 in\r\n\x1e530 5.7.0 tls\r\n",
    b"220 up\r\n\x1e502 what\r\n\x1e250 up\r\n\x1e250 ok\r\n\x1e250 ok\r\n\x1e554 5.5.1 no\r\n\x1e250 reset\r\n\x1e250 ok\r\n",
    b"554 5.3.2 go away\r\n",
    b"421 4.3.2 full\r\n",
    b"220-hi\r\n220 there\r\n\x1e250 up\r\n\x1e250 ok\r\n\x1e250 ok\r\n\x1e354 go\r\n250 taken\r\n",
    b"220 up LMTP\r\n\x1e250-up\r\n250 PIPELINING\r\n\x1e250 ok\r\n250 ok\r\n250 ok\r\n354 go\r\n\x1e250 one\r\n452 two\r\n\x1e250 ok\r\n",
)


def _client_seeds() -> list[bytes]:
    settings = (b"\x00\x00\x00", b"\x00\x0d\x85", b"\x0a\x20\x04", b"\x0b\x02\x0c", b"\x48\x05\x03", b"\x01\x04\x04", b"\x31\x22\x41")
    return [way + bytes([7, 40]) + said for way in settings for said in _UPSTREAMS]


def seeds(name: str) -> list[bytes]:
    return {"receiver": _receiver_seeds, "replies": _replies_seeds, "server": _server_seeds, "client": _client_seeds}[name]()
