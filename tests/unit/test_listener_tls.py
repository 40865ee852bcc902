"""TLS on a listener over real sockets, on both event loops: rows T1, T2, T4, F10 and P1 of the
reference where octets and moments decide; what is said about commands is told by the transcripts."""

from __future__ import annotations

import asyncio
import os
import re
import select
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from gateway import listener as module
from gateway.message import TLS
from gateway.net import secure
from gateway.net.tls import Identity
from gateway.reply import Reply

from ..certificates import Certified, certified
from ..loops import on_both_loops, until
from .test_listener import OK, Bounds, Dialled, House, Inbox, fast, house, watch

__all__ = ["fast"]

AUTHORITY = trustme.CA()
STRANGERS = trustme.CA()


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Certified:
    return certified(AUTHORITY, tmp_path_factory.mktemp("certificates"), "mx.example")


@asynccontextmanager
async def tls_house(
    mine: Certified, tls: str = "starttls", inbox: Inbox | None = None, bounds: Bounds | None = None, **rules: Any
) -> AsyncIterator[House]:
    async with house(bounds, inbox, tls=tls, **rules) as here:
        here.listener.context = Identity((mine.pair,)).context()
        yield here


def trusting(authority: trustme.CA = AUTHORITY, **settings: Any) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    for name, value in settings.items():
        setattr(context, name, value)
    return context


async def secured(client: Dialled, context: ssl.SSLContext | None = None, name: str = "mx.example") -> ssl.SSLObject:
    """The client's handshake, now."""
    await client.writer.start_tls(context or trusting(), server_hostname=name)
    found = client.writer.get_extra_info("ssl_object")
    assert isinstance(found, ssl.SSLObject)
    return found


async def upgraded(here: House, context: ssl.SSLContext | None = None, sock: socket.socket | None = None) -> Dialled:
    client = await here.dial(sock)
    await client.hello()
    assert (await client.say(b"STARTTLS"))[0] == b"220 2.0.0 begin TLS now\r\n"
    await secured(client, context)
    assert (await client.say(b"EHLO me.example"))[0].startswith(b"250")
    return client


# ------------------------------------------------------------------ all is well


@on_both_loops
async def test_a_mail_by_starttls(mine: Certified) -> None:
    async with tls_house(mine) as here:
        client = await upgraded(here)
        await client.say(b"MAIL FROM:<a@me.example>", b"RCPT TO:<b@here.example>", b"DATA")
        assert await client.say(b"Subject: x\r\n\r\n..dot\r\n.") == [OK.wire]
        assert (await client.say(b"QUIT"))[0].startswith(b"221")
        assert await client.rest() == b""
        (mail,) = here.inbox.mails
        assert b"".join(mail.pieces) == b"Subject: x\r\n\r\n.dot\r\n"
        told = mail.transaction.client
        assert told.tls == TLS("TLSv1.3", "TLS_AES_256_GCM_SHA384")
        assert (told.protocol, told.helo) == ("ESMTPS", "me.example")
        await client.close()
        await here.empty()


@on_both_loops
async def test_implicit_tls_greets_after_the_handshake(mine: Certified) -> None:
    async with tls_house(mine, "implicit") as here:
        client = await here.dial()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.reader.readline(), 0.1)
        await secured(client)
        await client.hello()
        assert (await client.say(b"STARTTLS"))[0].startswith(b"554 5.5.1 ")


@on_both_loops
async def test_tls_1_2(mine: Certified) -> None:
    async with tls_house(mine) as here:
        client = await upgraded(here, trusting(maximum_version=ssl.TLSVersion.TLSv1_2))
        await client.say(b"MAIL FROM:<a@me.example>", b"RCPT TO:<b@here.example>", b"DATA", b"x\r\n.")
        told = here.inbox.mails[0].transaction.client.tls
        assert told is not None
        assert told.version == "TLSv1.2"
        assert told.cipher.startswith("ECDHE-")


@on_both_loops
async def test_large_content_and_large_records(mine: Certified) -> None:
    """Records are taken apart whatever the pieces they come in, and nothing of them stays."""
    content = bytes(range(1, 10)) * 100_000
    lines = b"".join(
        b"x" + content[at : at + 900].replace(b"\n", b"l").replace(b"\r", b"r") + b"\r\n" for at in range(0, len(content), 900)
    )
    async with tls_house(mine) as here:
        client = await upgraded(here)
        await client.say(b"MAIL FROM:<a@me.example>", b"RCPT TO:<b@here.example>", b"DATA")
        client.writer.write(lines + b".\r\n")
        assert await client.line() == OK.wire
        assert b"".join(here.inbox.mails[0].pieces) == lines


@on_both_loops
async def test_a_full_draft_stops_reading_under_tls_too(mine: Certified) -> None:
    async with tls_house(mine) as here:
        client = await upgraded(here)
        await client.say(b"MAIL FROM:<a@me.example>", b"RCPT TO:<b@here.example>", b"DATA")
        (mail,) = here.inbox.mails
        mail.full = True
        line = b"x" * 998 + b"\r\n"
        client.writer.write(line * 20_000)
        await until(lambda: mail.pieces)
        await asyncio.sleep(0.3)
        held = sum(map(len, mail.pieces))
        assert held < 2 * 2**20, "it reads on"
        mail.full = False
        mail.drained()
        client.writer.write(b".\r\n")
        assert await client.line() == OK.wire
        assert sum(map(len, mail.pieces)) == 20_000_000


@on_both_loops
async def test_a_client_that_does_not_read_is_cut_under_tls_too(fast: None, mine: Certified) -> None:
    async with tls_house(mine) as here:
        here.listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", here.port))
        client = await upgraded(here, sock=sock)
        (connection,) = here.listener.connections
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.writer.write(b"MAIL FROM:<a@me.example>\r\n")
        for _ in range(200):
            client.writer.write(b"RCPT TO:<nobody@else.example>\r\n" * 200)
        await until(lambda: connection._stuck)
        assert connection._stopped
        assert connection._transport.get_write_buffer_size() < 512 * 1024
        here.bounds.command_timeout = 0.3
        await here.empty()


# ---------------------------------------------------- T1: what comes too early


@on_both_loops
async def test_octets_that_are_there_before_the_220(mine: Certified) -> None:
    """T1: they wait in the socket while STARTTLS is judged, and came in clear."""
    async with tls_house(mine) as here:
        client: Any = None

        def inject(data: bytes) -> None:
            if data == b"STARTTLS\r\n":
                os.write(client.writer.get_extra_info("socket").fileno(), b"EHLO injected.example\r\n")
                (connection,) = here.listener.connections
                assert select.select([connection._sock], [], [], 20)[0], "they are there"

        with pytest.MonkeyPatch.context() as patch:
            watch(here.listener, patch, inject)
            client = await here.dial()
            await client.hello()
            client.writer.write(b"STARTTLS\r\n")
            told = await client.rest()
        assert told == b"554 5.5.0 you sent on before our reply, closing\r\n"
        assert not here.inbox.mails


@pytest.mark.parametrize("injected", [b"EHLO injected.example\r\n", b"MAIL FROM:<a@b.example>\r\n" * 400, b"\r\n", b"\x16\x03\x01"])
@on_both_loops
async def test_clear_octets_that_race_the_handshake(mine: Certified, injected: bytes) -> None:
    """T1: after the 220 they are the begin of a handshake that fails."""
    async with tls_house(mine) as here:
        client = await here.dial()
        await client.hello()
        await client.say(b"STARTTLS")
        client.writer.write(injected)
        if injected in (b"\r\n", b"\x16\x03\x01"):
            here.bounds.handshake_timeout = 0.3
            # Less than a record's head: our handshake waits, and a real one behind it is spoilt.
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await secured(client)
        else:
            told = await client.rest()
            assert b"250" not in told
            assert b"injected" not in told
        await client.close()
        await here.empty()
        assert len(here.told.named("tls_failed")) == 1
        assert not here.inbox.mails
        assert not here.told.named("bug")


@on_both_loops
async def test_who_talks_before_the_greeting_under_implicit_tls(mine: Certified) -> None:
    """P1: the same offence, one layer up."""
    async with tls_house(mine, "implicit") as here:
        wire, tls, network = await asyncio.to_thread(_shaken_by_hand, here.port)
        with wire:
            # Its Finished and a command in one segment.
            tls.write(b"EHLO me.example\r\n")
            wire.sendall(network.read())
            assert (await asyncio.to_thread(_plain, wire, tls)).startswith(b"554 5.5.0 ")
        await here.empty()


def _shaken_by_hand(port: int) -> tuple[socket.socket, ssl.SSLObject, ssl.MemoryBIO]:
    """A handshake of which the client's last flight is not sent yet."""
    wire = socket.create_connection(("127.0.0.1", port))
    wire.settimeout(30)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = trusting().wrap_bio(incoming, outgoing, server_hostname="mx.example")
    tls.incoming = incoming  # type: ignore[attr-defined]
    while True:
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            wire.sendall(outgoing.read())
            incoming.write(wire.recv(65536))
        else:
            return wire, tls, outgoing


def _plain(wire: socket.socket, tls: ssl.SSLObject) -> bytes:
    """The next words of the server."""
    while True:
        try:
            return tls.read(65536)
        except ssl.SSLZeroReturnError:
            return b""
        except ssl.SSLWantReadError:
            tls.incoming.write(wire.recv(65536))  # type: ignore[attr-defined]


# ----------------------------------------------------------------- T4: refusals


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@on_both_loops
async def test_old_versions_get_an_alert(mine: Certified, version: ssl.TLSVersion, tls: str) -> None:
    with pytest.warns(DeprecationWarning, match="TLS"):
        context = trusting(minimum_version=version, maximum_version=version)
    context.set_ciphers("ALL:@SECLEVEL=0")
    async with tls_house(mine, tls) as here:
        client = await here.dial()
        if tls == "starttls":
            await client.hello()
            await client.say(b"STARTTLS")
        with pytest.raises(ssl.SSLError, match=r"(?i)protocol.version"):
            await secured(client, context)
        await here.empty()
        (failed,) = here.told.named("tls_failed")
        assert failed["reason"] == "unsupported protocol"


@pytest.mark.parametrize(
    "hello",
    [
        # SSL 3.0: no library at hand says it any more.
        b"\x16\x03\x00\x00\x2d\x01\x00\x00\x29\x03\x00" + b"r" * 32 + b"\x00\x00\x02\x00\x2f\x01\x00",
        # The same in SSL 2.0's clothes.
        b"\x80\x1c\x01\x03\x00\x00\x03\x00\x00\x00\x10\x00\x00\x2f" + b"r" * 16,
    ],
    ids=["ssl3", "ssl2"],
)
@on_both_loops
async def test_ssl_is_none_any_more(mine: Certified, hello: bytes) -> None:
    """T4: an alert where there is a version to say it in, and the end."""
    async with tls_house(mine, "implicit") as here:
        client = await here.dial()
        client.writer.write(hello)
        told = await client.rest()
        assert told[:1] == b"\x15", told
        assert len(told) == 7, told
        await here.empty()
        assert len(here.told.named("tls_failed")) == 1


@on_both_loops
async def test_weak_ciphers_are_refused(mine: Certified) -> None:
    context = trusting(maximum_version=ssl.TLSVersion.TLSv1_2)
    context.set_ciphers("AES128-SHA:AES256-GCM-SHA384:ECDHE-RSA-AES128-SHA:ECDHE-ECDSA-AES128-SHA256:@SECLEVEL=0")
    async with tls_house(mine, "implicit") as here:
        client = await here.dial()
        with pytest.raises(ssl.SSLError, match=r"(?i)handshake.failure"):
            await secured(client, context)
        await here.empty()


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01"])
@on_both_loops
async def test_a_handshake_that_stalls_is_closed(fast: None, mine: Certified, sent: bytes, tls: str) -> None:
    async with tls_house(mine, tls, bounds=Bounds(handshake_timeout=0.3)) as here:
        began = asyncio.get_running_loop().time()
        client = await here.dial()
        if tls == "starttls":
            await client.hello()
            began = asyncio.get_running_loop().time()
            await client.say(b"STARTTLS")
        client.writer.write(sent)
        with suppress(ConnectionResetError):
            assert await client.rest() == b""
        assert asyncio.get_running_loop().time() - began > 0.2
        await here.empty()
        (failed,) = here.told.named("tls_failed")
        assert failed["reason"] == "the handshake took too long"


@on_both_loops
async def test_a_handshake_that_drips_has_one_deadline(fast: None, mine: Certified) -> None:
    async with tls_house(mine, "implicit", bounds=Bounds(handshake_timeout=0.4)) as here:
        client = await here.dial()
        hello = b"\x16\x03\x01\x02\x00" + b"\x01\x00\x01\xfc\x03\x03" + b"x" * 506
        sent = 0
        for octet in hello:
            if not here.listener.connections and sent:
                break
            client.writer.write(bytes([octet]))
            sent += 1
            await asyncio.sleep(0.02)
        assert sent < 100
        await here.empty()


@on_both_loops
async def test_under_stress_a_handshake_has_less_time(fast: None, mine: Certified, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STRESS_HANDSHAKE", 0.2)
    async with tls_house(mine, "implicit", bounds=Bounds(connections=1)) as here:
        await here.dial()
        await until(lambda: here.told.named("tls_failed"))
        await here.empty()


@on_both_loops
async def test_no_renegotiation(mine: Certified) -> None:
    """T4: the client that asks is told no by an alert, and the connection ends."""
    async with tls_house(mine, "implicit") as here:
        process = await asyncio.create_subprocess_exec(
            "openssl", "s_client", "-connect", f"127.0.0.1:{here.port}", "-tls1_2", "-quiet", "-no_ign_eof", "-verify_quiet",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        # Only what begins a read of its own is an order to it.
        assert (await process.stdout.readline()).startswith(b"220 ")
        process.stdin.write(b"R\n")
        out, told = await asyncio.wait_for(process.communicate(), 30)
        assert b"no renegotiation" in told.lower() or b"no_renegotiation" in told.lower(), (out, told)
        await here.empty()
        assert [failed["reason"] for failed in here.told.named("tls_failed")] == ["renegotiation"]


@on_both_loops
async def test_keys_may_be_changed(mine: Certified) -> None:
    """RFC 8446 §4.6.3: a client may do so, and ask us to; the conversation goes on."""
    async with tls_house(mine, "implicit") as here:
        process = await asyncio.create_subprocess_exec(
            "openssl", "s_client", "-connect", f"127.0.0.1:{here.port}", "-tls1_3", "-quiet", "-no_ign_eof", "-verify_quiet", "-crlf",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        assert (await process.stdout.readline()).startswith(b"220 ")
        for order in (b"K\n", b"k\n"):
            process.stdin.write(order)
            while b"KEYUPDATE" not in await asyncio.wait_for(process.stderr.readline(), 30):
                pass
            process.stdin.write(b"NOOP\n")
            assert (await asyncio.wait_for(process.stdout.readline(), 30)).startswith(b"250 ")
        process.stdin.close()
        await process.wait()
        assert not here.told.named("tls_failed")


@pytest.mark.parametrize("asked", [False, True], ids=["its-own", "ours-too"])
@on_both_loops
async def test_changes_of_keys_without_end(mine: Certified, tmp_path: Path, asked: bool) -> None:
    """Records cost us more than the client: who sends nothing but those is let go, however it reads."""
    keys = tmp_path / "keys"
    async with tls_house(mine, "implicit") as here:
        with closing(socket.create_connection(("127.0.0.1", here.port))) as wire:
            wire.settimeout(30)
            await asyncio.to_thread(_shaken_in_full, wire, trusting(keylog_filename=str(keys)))
            (secret,) = re.findall(r"CLIENT_TRAFFIC_SECRET_0 \S+ (\S+)", keys.read_text())
            sent = await asyncio.to_thread(_change_keys, wire, bytes.fromhex(secret), asked)
        await here.empty()
        assert [failed["reason"] for failed in here.told.named("tls_failed")] == ["records without content"]
        # What it wrote beyond that stood in the buffers of the kernel.
        assert sent < ENOUGH


#: Far more octets of changed keys than are borne.
ENOUGH = 32 * 2**20


def _shaken_in_full(wire: socket.socket, context: ssl.SSLContext) -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="mx.example")
    while True:
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            wire.sendall(outgoing.read())
            incoming.write(wire.recv(65536))
        else:
            wire.sendall(outgoing.read())
            return


def _change_keys(wire: socket.socket, secret: bytes, asked: bool) -> int:
    """KeyUpdate after KeyUpdate (RFC 8446 §4.6.3, §5.2, §7.1, §7.2) until the server has gone; octets."""

    def expanded(label: bytes, size: int) -> bytes:
        info = size.to_bytes(2, "big") + bytes([6 + len(label)]) + b"tls13 " + label + b"\0"
        return HKDFExpand(hashes.SHA384(), size, info).derive(secret)

    sent = 0
    with suppress(ConnectionError):
        while sent < ENOUGH:
            batch = b""
            for _ in range(100):
                head = b"\x17\x03\x03" + (6 + 16).to_bytes(2, "big")
                message = b"\x18\0\0\x01" + bytes([asked]) + b"\x16"
                # The first record under each key: the nonce is the IV.
                batch += head + AESGCM(expanded(b"key", 32)).encrypt(expanded(b"iv", 12), message, head)
                secret = expanded(b"traffic upd", 48)
            wire.sendall(batch)
            sent += len(batch)
    return sent


@on_both_loops
async def test_clear_smtp_at_an_implicit_listener(mine: Certified) -> None:
    async with tls_house(mine, "implicit") as here:
        client = await here.dial()
        client.writer.write(b"EHLO me.example\r\n")
        told = await client.rest()
        assert told[:1] in (b"", b"\x15"), told
        await here.empty()
        assert len(here.told.named("tls_failed")) == 1


@on_both_loops
async def test_who_is_not_let_in_hears_nothing_in_clear(mine: Certified) -> None:
    async with tls_house(mine, "implicit", bounds=Bounds(connections=1)) as here:
        await secured(await here.dial())
        assert await (await here.dial()).rest() == b""


# ------------------------------------------------------------------ F10: the end


@pytest.mark.parametrize("after", [b"", b"x", b"\r\n.\r\n", b"MAIL FROM:<x@y.example>\r\n"])
@pytest.mark.parametrize("wire", [b"DATA", b"BDAT 1000"])
@on_both_loops
async def test_close_notify_in_the_middle_of_content(mine: Certified, wire: bytes, after: bytes) -> None:
    async with tls_house(mine, "implicit") as here:
        raw, tls, network = await asyncio.to_thread(_shaken_by_hand, here.port)
        with raw:

            def say(words: bytes) -> bytes:
                tls.write(words)
                raw.sendall(network.read())
                return _plain(raw, tls)

            raw.sendall(network.read())
            assert (await asyncio.to_thread(_plain, raw, tls)).startswith(b"220")
            await asyncio.to_thread(say, b"EHLO me.example\r\n")
            for line in (b"MAIL FROM:<a@me.example>\r\n", b"RCPT TO:<b@here.example>\r\n"):
                await asyncio.to_thread(say, line)
            tls.write(wire + b"\r\n")
            raw.sendall(network.read())
            await until(lambda: here.inbox.mails)
            tls.write(b"Subject: half\r\n")
            with pytest.raises(ssl.SSLError):
                tls.unwrap()
            raw.sendall(network.read() + after)
            raw.shutdown(socket.SHUT_WR)
            await here.empty()
        (mail,) = here.inbox.mails
        assert mail.aborted
        assert mail.answer is None
        assert not here.told.named("bug")


@on_both_loops
async def test_what_is_owed_goes_out_after_close_notify(mine: Certified) -> None:
    async with tls_house(mine, "implicit", inbox=Inbox(reply=None)) as here:
        raw, tls, network = await asyncio.to_thread(_shaken_by_hand, here.port)
        with raw:
            raw.sendall(network.read())
            assert (await asyncio.to_thread(_plain, raw, tls)).startswith(b"220")
            tls.write(b"EHLO me.example\r\n")
            raw.sendall(network.read())
            await asyncio.to_thread(_plain, raw, tls)
            tls.write(b"MAIL FROM:<a@me.example>\r\nRCPT TO:<b@here.example>\r\nBDAT 3 LAST\r\nx\r\n")
            with pytest.raises(ssl.SSLError):
                tls.unwrap()
            raw.sendall(network.read())
            await until(lambda: here.inbox.mails and here.inbox.mails[0].answer)
            here.inbox.mails[0].say(Reply(250, "2.0.0", "late"))
            # close_notify of ours comes behind it, and the connection ends.
            told = b""
            while piece := await asyncio.to_thread(_plain, raw, tls):
                told += piece
            assert told.endswith(b"\r\n250 2.0.0 late\r\n")
            assert await asyncio.to_thread(raw.recv, 1) == b""
        await here.empty()
        assert not here.inbox.mails[0].aborted


@on_both_loops
async def test_a_spoilt_record(mine: Certified) -> None:
    async with tls_house(mine) as here:
        client = await upgraded(here)
        await client.say(b"MAIL FROM:<a@me.example>", b"RCPT TO:<b@here.example>", b"DATA")
        sock = socket.socket(fileno=socket.dup(client.writer.get_extra_info("socket").fileno()))
        with sock:
            sock.setblocking(True)
            sock.sendall(b"\x17\x03\x03\x00\x20" + b"y" * 32)
        await here.empty()
        (mail,) = here.inbox.mails
        assert mail.aborted
        assert here.told.named("tls_failed")[0]["reason"]
        assert not here.told.named("bug")


@on_both_loops
async def test_the_client_goes_within_the_handshake(mine: Certified) -> None:
    async with tls_house(mine, "implicit") as here:
        for how in ("eof", "reset"):
            client = await here.dial()
            client.writer.write(b"\x16\x03\x01\x02\x00\x01")
            await client.writer.drain()
            await until(lambda: here.listener.connections)
            if how == "eof":
                await client.close()
            else:
                client.reset()
            await here.empty()
        assert len(here.told.named("tls_failed")) == 2


@on_both_loops
async def test_draining_under_tls(mine: Certified) -> None:
    async with tls_house(mine) as here:
        idle = await upgraded(here)
        shaking = await here.dial()
        await shaking.hello()
        await shaking.say(b"STARTTLS")
        here.listener.drain()
        assert (await idle.rest()).startswith(b"421 ")
        assert await shaking.rest() == b""
        await idle.close()
        await here.empty()


# ------------------------------------------------------ certificates and names


@on_both_loops
async def test_sni(tmp_path: Path) -> None:
    pairs = [certified(AUTHORITY, tmp_path / str(number), *names) for number, names in enumerate(
        [("mx.example",), ("other.example", "third.example"), ("*.wild.example",)])]  # fmt: skip
    async with house(tls="implicit") as here:
        here.listener.context = Identity(tuple(pair.pair for pair in pairs)).context()
        for name, pair in (
            ("mx.example", pairs[0]),
            ("other.example", pairs[1]),
            ("THIRD.example", pairs[1]),
            ("a.wild.example", pairs[2]),
            ("a.b.wild.example", pairs[0]),
            ("wild.example", pairs[0]),
            ("unknown.example", pairs[0]),
        ):
            context = trusting(check_hostname=False)
            found = await secured(await here.dial(), context, name)
            assert found.getpeercert(True) == pair.der, name
        nameless = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        nameless.check_hostname = False
        AUTHORITY.configure_trust(nameless)
        found = await secured(await here.dial(), nameless, "")
        assert found.getpeercert(True) == pairs[0].der


@on_both_loops
async def test_rsa_and_ecdsa_for_the_same_name(tmp_path: Path) -> None:
    both = [certified(AUTHORITY, tmp_path / kind.name, "mx.example", kind=kind) for kind in (trustme.KeyType.RSA, trustme.KeyType.ECDSA)]
    async with house(tls="implicit") as here:
        here.listener.context = Identity(tuple(pair.pair for pair in both)).context()
        for ciphers, pair in (("ECDHE-RSA-AES128-GCM-SHA256", both[0]), ("ECDHE-ECDSA-AES128-GCM-SHA256", both[1])):
            context = trusting(maximum_version=ssl.TLSVersion.TLSv1_2)
            context.set_ciphers(ciphers)
            found = await secured(await here.dial(), context)
            assert found.getpeercert(True) == pair.der


@on_both_loops
async def test_client_certificates(mine: Certified, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    AUTHORITY.cert_pem.write_to_path(ca)
    good, bad, none = trusting(), trusting(), trusting()
    AUTHORITY.issue_cert(
        "app@client.example", common_name="App, one", organization_name="Example", organization_unit_name="Mail"
    ).configure_cert(good)
    STRANGERS.issue_cert("app@client.example").configure_cert(bad)
    for demanded in (False, True):
        async with house(tls="starttls") as here:
            here.listener.context = Identity((mine.pair,), ca, demanded).context()
            client = await upgraded(here, good)
            await client.say(b"MAIL FROM:<a@me.example>", b"RCPT TO:<b@here.example>", b"DATA", b"x\r\n.")
            told = here.inbox.mails[0].transaction.client.tls
            assert told is not None
            assert told.peer == "CN=App\\, one,OU=Mail,O=Example"
            refused = [bad] if not demanded else [bad, none]
            for context in refused:
                with pytest.raises((ssl.SSLError, AssertionError, ConnectionError)):
                    await upgraded(here, context)
            if not demanded:
                client = await upgraded(here, none)
                await client.say(b"MAIL FROM:<a@me.example>", b"RCPT TO:<b@here.example>", b"DATA", b"x\r\n.")
                told = here.inbox.mails[1].transaction.client.tls
                assert told is not None
                assert told.peer is None
            await until(partial(_told, here, len(refused)))
            assert not here.told.named("bug")


@on_both_loops
@pytest.mark.parametrize("record", [b"\x15\x03\x03\0\2\2\0", b"\x15\x03\x03\0\2\2\x78", b"\x15\x03\x03\0\2\1\0"], ids=["0", "120", "bye"])
async def test_an_alert_without_a_name(mine: Certified, record: bytes) -> None:
    """Python knows no reason for these, and says None."""
    async with tls_house(mine, "implicit") as here:
        client = await here.dial()
        outgoing = ssl.MemoryBIO()
        with pytest.raises(ssl.SSLWantReadError):
            trusting().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="mx.example").do_handshake()
        client.writer.write(outgoing.read())
        assert await client.reader.read(1)
        client.writer.write(record)
        await until(lambda: here.told.named("tls_failed"))
        await client.rest()
        (failed,) = here.told.named("tls_failed")
        assert failed["reason"]
        assert failed["reason"] != "the connection was lost within the handshake"
        assert not here.told.named("bug")


@on_both_loops
async def test_a_client_of_large_mail_is_read_into_the_buffer(mine: Certified) -> None:
    """From its first long read on uvloop reads into the listener's buffer, short reads too, until there is TLS."""
    content = b"Subject: x\r\n\r\n" + b"a line without a dot\r\n" * 30_000
    filled: list[int] = []
    async with tls_house(mine) as here:
        listener = here.listener
        uvloop = type(listener.loop).__module__.startswith("uvloop")
        told = listener.filled

        def tell(n: int) -> None:
            filled.append(n)
            told(n)

        listener.filled = tell
        client = await here.dial()
        await client.hello()

        async def mail(number: int) -> None:
            for line in (b"MAIL FROM:<a@me.example>", b"RCPT TO:<b@here.example>"):
                assert (await client.say(line))[0].startswith(b"250")
            client.writer.write(b"BDAT 12\r\nSubject: one\r\n"[:-2] + b"BDAT %d LAST\r\n" % len(content) + content)
            assert [(await client.reply())[:3] for _ in range(2)] == [b"250"] * 2
            assert len(here.inbox.mails) == number
            assert b"".join(here.inbox.mails[-1].pieces) == b"Subject: one" + content

        await mail(1)
        filled.clear()
        await mail(2)
        assert (sum(filled) > len(content)) is uvloop
        assert (await client.say(b"STARTTLS"))[0].startswith(b"220")
        await secured(client)
        filled.clear()
        assert (await client.say(b"EHLO me.example"))[0].startswith(b"250")
        await mail(3)
        assert not filled
        assert not here.told.named("bug")


@on_both_loops
async def test_certificates_change_under_handshakes(tmp_path: Path) -> None:
    """T4: two hundred handshakes, and all the while another certificate every moment; none fails.

    Twenty at a time may well go in step with the changes, so it goes on until both were shown."""
    pairs = [certified(AUTHORITY, tmp_path / str(number), "mx.example") for number in range(2)]
    contexts = [Identity((pair.pair,)).context() for pair in pairs]
    seen: list[bytes | None] = []
    async with house(tls="starttls") as here:
        here.listener.context = contexts[0]

        async def change() -> None:
            for context in cycle(contexts):
                here.listener.go_by(here.listener.rules, context=context)
                await asyncio.sleep(0.001)

        async def one() -> None:
            client = await upgraded(here)
            seen.append(client.writer.get_extra_info("ssl_object").getpeercert(True))
            assert (await client.say(b"NOOP"))[0].startswith(b"250")
            await client.close()

        changing = asyncio.ensure_future(change())
        while len(seen) < 200 or (len(set(seen)) < 2 and len(seen) < 2_000):
            # Each lot begins with the other one: whoever only ever sees the first of a lot sees both all the same.
            here.listener.go_by(here.listener.rules, context=contexts[len(seen) // 20 % 2])
            await asyncio.gather(*(one() for _ in range(20)))
        changing.cancel()
        await here.empty()
        assert not here.told.named("tls_failed")
    assert set(seen) == {pair.der for pair in pairs}


def _told(here: House, times: int) -> bool:
    return len(here.told.named("tls_failed")) == times


# ----------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("certificate", "expected"),
    [
        (None, None),
        ({}, None),
        ({"subject": ((("commonName", "app"),),)}, "CN=app"),
        ({"subject": ((("countryName", "DE"),), (("organizationName", "A+B"),), (("commonName", " #x "),))}, "CN=\\ #x\\ ,O=A\\+B,C=DE"),
        ({"subject": ((("commonName", "a\r\nb"), ("emailAddress", "x@y.example")),)}, "CN=a\\0d\\0ab+emailAddress=x@y.example"),
        ({"subject": (), "subjectAltName": (("DNS", "app.example"),)}, "DNS:app.example"),
        ({"subject": (), "serialNumber": "1"}, ""),
    ],
)
def test_subjects_as_they_are_told(certificate: dict[str, Any] | None, expected: str | None) -> None:
    assert secure.subject(certificate) == expected
