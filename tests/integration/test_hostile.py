"""Rows of the table of hostile input that need a whole gateway to be seen: which files it opens,
what it executes, what it holds in memory, what it logs, what leaves it. The table with all its
tests: ``tests/test_bad_input.py``."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import smtplib
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gateway.spool.files import Files

from ..conftest import Start
from ..rebuilt import Rebuilt
from ..servers import PATIENCE, ROOT, Client, GatewayProcess, HttpReceiver, Upstream, maildir, program, wait_until, without_trace
from ..unit.test_app import dialled, file, running

# ---------------------------------------------------------------- R2: no shell, no path

#: Stands in all that a client says, so that it is found wherever it ends up.
MARK = "zq7zq"
HOSTILE = [
    f'"; touch {MARK}"',
    f"`touch${{IFS}}{MARK}`",
    f"${{run{{{MARK}}}}}",
    f"|{MARK}",
    f"/tmp/{MARK}",
    f'"../../../{MARK}"',
    f'"$(touch {MARK})"',
    f'"|/bin/sh -c {MARK}"',
    f'"a\\\\n{MARK}"',
]
ODD_MAIL = (
    f"Subject: $(touch {MARK})\r\nMessage-ID: <../../{MARK}>\r\nX-{MARK}: /etc/passwd\r\nMIME-Version: 1.0\r\n"
    f'Content-Type: multipart/mixed; boundary="{MARK}/../x"\r\n\r\n--{MARK}/../x\r\n'
    f'Content-Disposition: attachment; filename="../../{MARK}.sh"\r\nContent-Type: application/x-sh\r\n\r\ntouch {MARK}\r\n'
    f"--{MARK}/../x--\r\n"
).encode()

TO_A_BOX_AND_A_HOOK = """
hostname = "mx.gateway.example"

[[listeners]]
address = "127.0.0.1:0"

[sinks.box]
type = "file"
path = "{folder}/box"

[sinks.hook]
type = "webhook"
url = "{url}"

[[routes]]
recipients = ["*@box.example"]
sinks = ["box", "hook"]
"""


def test_nothing_is_executed_and_no_path_is_built_from_input(tmp_path: Path, webhook: HttpReceiver) -> None:
    """R2, under strace: from ready to the end no program is started, and no name of a file that is
    opened, made, renamed or asked about holds anything a client said. Small mail and large, which
    has a file of its own while it comes; one goes to a Maildir, one is taken apart for a webhook."""
    if program("strace") is None:
        pytest.skip("strace is not installed")
    trace = tmp_path / "trace"
    under = ["strace", "-D", "-f", "-qq", "-s", "4096", "-e", "trace=%file,execve,execveat,fork,vfork", "-o", str(trace)]
    config = TO_A_BOX_AND_A_HOOK.format(folder=tmp_path, url=webhook.url)
    with GatewayProcess(tmp_path / "gateway", config, under=under) as house:
        begun = len(trace.read_text().splitlines())
        large = ODD_MAIL + (b"x" * 70 + b"\r\n") * 6000
        with Client(house.server) as client:
            client.command(f"EHLO ../../{MARK}")
            for local in HOSTILE:
                reply = client.mail(f"{local}@{MARK}.example", [f"{local}@box.example"], ODD_MAIL)
                assert reply.startswith("250"), (local, reply)
            assert client.mail(f"{HOSTILE[0]}@client.example", [f"{local}@box.example" for local in HOSTILE], large).startswith("250")
            client.command(f"VRFY {HOSTILE[-1]}")
            client.command(f"{MARK}; id")
        count = len(HOSTILE) + 1
        wait_until(lambda: len(maildir(tmp_path / "box")) == count, "the Maildir", PATIENCE)
        assert len(webhook.wait(count)) >= count
        assert house.stop() == 0
    lines = trace.read_text(errors="replace").splitlines()
    assert any("execve(" in line for line in lines[:begun]), "strace does not see the start"
    while_it_ran = lines[begun:]
    assert any("/new/" in line for line in while_it_ran), "strace does not see the files of the Maildir"
    assert any("/spool/" in line for line in while_it_ran), "strace does not see the spool"
    assert not [line for line in while_it_ran if re.search(r"\b(execve|execveat|v?fork)\(", line)]
    assert not [line for line in while_it_ran if MARK in line]
    assert not [path for path in tmp_path.rglob("*") if MARK in path.name]
    assert not (ROOT / MARK).exists()


# ----------------------------------------------------------------------- S1: the event log


def test_what_clients_call_themselves_stays_one_line_of_the_log(gateway: Start, tmp_path: Path, webhook: HttpReceiver) -> None:
    """S1: ESC, CR, LF, U+2028 and 10 kB in names and addresses: every line is JSON, none is long."""
    house = gateway(TO_A_BOX_AND_A_HOOK.format(folder=tmp_path, url=webhook.url))
    steps = [
        b"EHLO \x1b[2Jx\r\n",
        b'EHLO {"event":"accepted"}\r\n',
        "EHLO a\u2028b\u202e\r\n".encode(),
        b"EHLO " + b"h" * 10_000 + b"\r\n",
        b"EHLO " + b"h" * 255 + b"\r\n",
        b"MAIL FROM:<a@client.example> SMTPUTF8\r\n",
        'RCPT TO:<"a\u2028b"@nowhere.example>\r\n'.encode(),
        "RCPT TO:<\u202egnp.exe\u200b@nowhere.example>\r\n".encode(),
        b'RCPT TO:<"a\rb"@nowhere.example>\r\n',
        b'RCPT TO:<"\\"},{\\"event\\":\\"accepted"@nowhere.example>\r\n',
        b"RCPT TO:<" + b"r" * 230 + b"@nowhere.example>\r\n",
        b"RCPT TO:<" + b"r" * 10_000 + b"@nowhere.example>\r\n",
        b"X" * 10_000 + b"\r\n",
        # The third with a control, and the last.
        b'RCPT TO:<"\x1b[2J"@nowhere.example>\r\n',
    ]
    with Client(house.server) as client:
        for octets in steps:
            client.send(octets)
            client.reply()
    assert house.stop() == 0
    refused = house.found("refused")
    assert len(refused) >= 10
    assert not house.found("accepted")
    assert not house.noise, "a line that is no JSON"

    def texts(value: Any) -> Sequence[str]:
        if isinstance(value, dict):
            return [text for pair in value.items() for one in pair for text in texts(one)]
        return [value] if isinstance(value, str) else []

    for event in house.events:
        for text in texts(event):
            assert len(text) < 300, text
            assert not re.search("[\x00-\x1f\x7f]", text), text
    assert "r" * 230 + "@nowhere.example" in [event.get("address") for event in refused]


# ------------------------------------------------------------------- F8: a line without an end


def test_a_line_of_64_mib_is_carried_and_costs_no_memory(gateway: Start, tmp_path: Path) -> None:
    config = f"""
[[listeners]]
address = "127.0.0.1:0"
[limits]
message_size = "80 MiB"
[sinks.box]
type = "file"
path = "{tmp_path}/box"
[[routes]]
recipients = ["*@box.example"]
sink = "box"
"""
    house = gateway(config)
    with Client(house.server) as client:
        assert client.mail("a@client.example", ["b@box.example"], b"Subject: warm\r\n\r\n").startswith("250")
        before = peak(house.pid)
        for command in ("MAIL FROM:<a@client.example>", "RCPT TO:<b@box.example>", "DATA"):
            client.command(command)
        client.send(b"Subject: long\r\n\r\n")
        for _ in range(64):
            client.send(b"x" * 2**20)
        client.send(b"\r\n.\r\n")
        assert client.reply().startswith("250")
    assert peak(house.pid) - before < 32 * 1024
    new = tmp_path / "box" / "new"
    wait_until(lambda: new.is_dir() and len(list(new.iterdir())) == 2, "the Maildir")
    largest = max(path.stat().st_size for path in new.iterdir())
    assert 64 * 2**20 < largest < 64 * 2**20 + 2000


def peak(pid: int) -> int:
    """The most memory that this process ever held, in KiB."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[0])


# ------------------------------------------------------------- F1 on the way out: smuggling in two


FALSE_ENDS = [b"\n.\n", b"\n.\r\n", b"\r\n.\n", b"\n.\n\r\n", b"\n\n.\r\n", b"\r\n\n.\r\n"]
SMUGGLED = b"MAIL FROM:<admin@box.example>\nRCPT TO:<victim@box.example>\nDATA\nsmuggled\n"


@pytest.mark.parametrize("offers", [[], ["PIPELINING", "CHUNKING", "8BITMIME"]], ids=["data", "bdat"])
def test_what_a_false_end_becomes_ends_nothing_further_on(gateway: Start, offers: list[str]) -> None:
    """F1 on the way out: smuggling needs two servers that read differently. A listener that takes a
    bare LF for CRLF sends on lines that end in CRLF alone, dots doubled: one mail stays one mail."""
    with Upstream(offers) as upstream:
        house = gateway(
            f"""
[[listeners]]
address = "127.0.0.1:0"
bare_newlines = "normalize"
[sinks.out]
type = "relay"
hosts = ["{upstream.address}"]
tls = "off"
[[routes]]
recipients = ["*@box.example"]
sink = "out"
"""
        )
        with Client(house.server) as client:
            for end in FALSE_ENDS:
                for command in ("MAIL FROM:<a@client.example>", "RCPT TO:<b@box.example>", "DATA"):
                    client.command(command)
                client.send(b"Subject: x\r\n\r\ntext" + end + SMUGGLED + b"\r\n.\r\n")
                assert client.reply().startswith("250")
        taken = upstream.wait(len(FALSE_ENDS))
    assert len(taken) == len(FALSE_ENDS)
    for mail in taken:
        assert mail.recipients == ["<b@box.example>"]
        assert not re.search(rb"(?<!\r)\n|\r(?!\n)", mail.content)
        assert without_trace(mail.content).endswith(b"DATA\r\nsmuggled\r\n\r\n")


# -------------------------------------------------------------------- A1: the disk is full


async def test_a_disk_that_fills_up_within_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A1: the content is read to its true end, then 452; the connection and smaller mail go on."""
    write = Files.write

    def full(self: Files, descriptor: int, pieces: Sequence[bytes]) -> None:
        if "content" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, descriptor, pieces)

    async with running(file(tmp_path)) as (gateway, told):
        client = await dialled(gateway.port)
        monkeypatch.setattr(Files, "write", full)
        with pytest.raises(smtplib.SMTPDataError) as refused:
            await _off_the_loop(client.sendmail, "a@client.example", ["b@here.example"], b"x" * 70 + b"\r\n" + b"y\r\n" * 1_000_000)
        assert (refused.value.smtp_code, refused.value.smtp_error) == (452, b"4.3.1 no space to store the message, try again later")
        assert await _off_the_loop(client.sendmail, "a@client.example", ["b@here.example"], b"Subject: small\r\n\r\n") == {}
        client.close()
        assert not told.named("bug")
    assert not [path for path in (tmp_path / "spool").rglob("content/*") if path.is_file()]


async def _off_the_loop(function: Any, *arguments: Any) -> Any:
    return await asyncio.to_thread(function, *arguments)


# ------------------------------------------------------------------ F10, F1: under a sanitizer


@pytest.mark.long
def test_rows_under_a_sanitizer(tmp_path: Path) -> None:
    """F10 and all others: the parser is built anew with AddressSanitizer and UBSan, and every
    transcript, cut and uncut, and every end within TLS runs on it."""
    compiler = program("gcc")
    if compiler is None:
        pytest.skip("gcc is not installed")
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    built = Rebuilt(tmp_path / "house", GATEWAY_CFLAGS=SANITIZED, GATEWAY_LDFLAGS=SANITIZED)
    assert b"__asan_init" in built.parser.read_bytes()
    built.environment |= {
        "LD_PRELOAD": os.path.realpath(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        # Each object in a place of its own, so that an octet beyond it is seen.
        "PYTHONMALLOC": "malloc",
    }
    assert built.imported() == built.parser
    done = built.pytest(*UNDER_IT)
    told = done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0, told
    assert "ERROR: AddressSanitizer" not in told
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 800, told


SANITIZED = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g"
#: With which the parser is driven under it; memory is another there.
UNDER_IT = [
    "-n2",
    "tests/unit/test_transcripts.py",
    "tests/unit/test_parser.py",
    "tests/unit/test_listener_tls.py",
    "-k",
    "(late or test_parser or close_notify or spoilt) and not memory and not leak",
]
