"""How mail comes to a gateway that really runs, other than by its own address alone: behind a proxy,
from a mail server that speaks for others, over unix sockets, through systemd's sockets; and what
happens when descriptors run out."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import smtplib
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import trustme

from ..certificates import certified
from ..conftest import Start
from ..servers import PATIENCE, ROOT, GatewayProcess, HttpReceiver, Postfix, Request, free_port, maildir, mails, program, wait_until

CONFIG = """
hostname = "mx.gateway.example"
{head}
[[listeners]]
{listener}

[sinks.box]
type = "file"
path = "{folder}/box"

[[routes]]
recipients = ["*@box.example"]
sink = "box"
"""
TCP = 'address = "127.0.0.1:0"\n'


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short path, that other users can reach: for unix sockets."""
    folder = Path(tempfile.mkdtemp(prefix="gw-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def swaks(server: str, *options: str) -> tuple[int, str]:
    if program("swaks") is None:
        pytest.skip("swaks is not installed")
    done = subprocess.run(
        ["swaks", "--server", server, "--helo", "swaks.example", "--to", "b@box.example", *options],
        capture_output=True,
        text=True,
        timeout=5 * PATIENCE,
        check=False,
    )
    return done.returncode, done.stdout


# -------------------------------------------------------------------- swaks --proxy

ADDRESSES = ["--proxy-source", "192.0.2.7", "--proxy-source-port", "4711", "--proxy-dest", "198.51.100.1", "--proxy-dest-port", "25"]
OF_A_CLIENT = [
    ["--proxy-version", "1", "--proxy-family", "TCP4", *ADDRESSES],
    ["--proxy-version", "2", "--proxy-family", "AF_INET", *ADDRESSES],
]


@pytest.mark.parametrize("options", OF_A_CLIENT, ids=["v1", "v2"])
def test_swaks_behind_a_proxy(gateway: Start, tmp_path: Path, options: list[str]) -> None:
    house = gateway(CONFIG.format(head="", folder=tmp_path, listener=TCP + 'proxy_protocol_from = ["127.0.0.0/8"]'))
    code, dialogue = swaks(house.server, *options)
    assert code == 0, dialogue
    assert house.event("connected")["client"] == "192.0.2.7"
    assert house.event("accepted")["client"] == "192.0.2.7"
    (mail,) = mails(tmp_path / "box", 1)
    assert mail.startswith(b"Received: from swaks.example ([192.0.2.7])")


def test_swaks_without_an_address_and_nonsense(gateway: Start, tmp_path: Path) -> None:
    house = gateway(CONFIG.format(head="", folder=tmp_path, listener=TCP + 'proxy_protocol_from = ["127.0.0.0/8"]'))
    code, dialogue = swaks(house.server, "--proxy", "UNKNOWN")
    assert code == 0, dialogue
    assert house.event("connected")["client"] == "127.0.0.1"
    for nonsense in (["--proxy", "TCP4 nobody"], ["--proxy", "UNKNOWN " + "x" * 100], OF_A_CLIENT[1] + ["--proxy-protocol", "DGRAM"]):
        code, dialogue = swaks(house.server, *nonsense)
        assert code != 0
        assert "220" not in dialogue
    house.event("shed", count=3)
    assert len(house.found("connected")) == 1


@pytest.mark.parametrize("options", OF_A_CLIENT, ids=["v1", "v2"])
def test_swaks_is_no_proxy_of_ours(gateway: Start, tmp_path: Path, options: list[str]) -> None:
    house = gateway(CONFIG.format(head="", folder=tmp_path, listener=TCP + 'proxy_protocol_from = ["10.0.0.0/8"]'))
    code, _ = swaks(house.server, *options)
    assert code != 0
    refused = house.event("refused")
    assert refused["code"] in (500, 554), refused  # 554: where it was greeted before its first octets came
    assert refused["client"] == "127.0.0.1"
    assert not maildir(tmp_path / "box")


# ------------------------------------------------------------ a proxy in front of TLS

AUTHORITY = trustme.CA()
#: PROXY v2, TCP over IPv4: 192.0.2.7:4711 to 198.51.100.1:465.
HEADER = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes([192, 0, 2, 7, 198, 51, 100, 1]) + (4711).to_bytes(2) + (465).to_bytes(2)


@contextmanager
def behind(house: GatewayProcess, cork: bool) -> Iterator[ssl.SSLSocket]:
    """TLS from the first octet on, behind a PROXY header. ``cork``: both in one segment."""
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    with socket.create_connection(("127.0.0.1", house.port), timeout=PATIENCE) as clear:
        clear.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, cork)
        clear.sendall(HEADER)
        if not cork:
            time.sleep(0.1)
        with context.wrap_socket(clear, server_hostname="mx.gateway.example") as secure:
            secure.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, False)
            yield secure


def implicit(gateway: Start, tmp_path: Path, greet_delay: str) -> GatewayProcess:
    certified(AUTHORITY, tmp_path / "tls", "mx.gateway.example")
    listener = f"""
tls = "implicit"
certificate = "{tmp_path}/tls/certificate.pem"
key = "{tmp_path}/tls/key.pem"
proxy_protocol_from = ["127.0.0.0/8"]
greet_delay = "{greet_delay}"
"""
    return gateway(CONFIG.format(head="", folder=tmp_path, listener=TCP + listener))


@pytest.mark.parametrize("cork", [True, False], ids=["together", "apart"])
def test_a_proxy_in_front_of_implicit_tls(gateway: Start, tmp_path: Path, cork: bool) -> None:
    house = implicit(gateway, tmp_path, "500ms")
    with behind(house, cork) as secure, smtplib.SMTP(timeout=PATIENCE) as client:
        client.sock = secure
        assert client.getreply()[0] == 220
        client.ehlo("client.example")
        assert "starttls" not in client.esmtp_features
        client.sendmail("a@client.example", ["b@box.example"], b"Subject: x\r\n\r\nhi\r\n")
    connected = house.event("connected")
    assert (connected["client"], connected["proxy"]) == ("192.0.2.7", "127.0.0.1")
    (octets,) = mails(tmp_path / "box", 1)
    trace = octets.partition(b"Subject: ")[0]
    assert b"[192.0.2.7]" in trace
    assert b" with ESMTPS\r\n" in trace


def test_who_talks_within_the_delay_behind_tls(gateway: Start, tmp_path: Path) -> None:
    # So long that nobody is late; the answer comes at once.
    house = implicit(gateway, tmp_path, "60s")
    with behind(house, cork=False) as secure:
        secure.sendall(b"EHLO client.example\r\n")
        assert secure.recv(4096).startswith(b"554 5.5.0 ")
        assert secure.recv(4096) == b""
    assert house.event("refused")["stage"] == "connect"


# ------------------------------------------------------------------ swaks --xclient


def test_swaks_speaks_for_others(gateway: Start, tmp_path: Path) -> None:
    house = gateway(CONFIG.format(head="", folder=tmp_path, listener=TCP + 'xclient_from = ["127.0.0.0/8"]'))
    code, dialogue = swaks(
        house.server,
        *("--xclient-addr", "IPV6:2001:db8::9", "--xclient-name", "mail.client.example", "--xclient-port", "4711"),
        *("--xclient-helo", "helo string", "--xclient-proto", "ESMTP", "--xclient-login", "me@client.example"),
    )
    assert code == 0, dialogue
    introduced = house.event("introduced")
    assert (introduced["client"], introduced["by"], introduced["name"]) == ("2001:db8::9", "127.0.0.1", "mail.client.example")
    assert house.event("accepted")["client"] == "2001:db8::9"
    (mail,) = mails(tmp_path / "box", 1)
    assert mail.startswith(b"Received: from swaks.example ([IPv6:2001:db8::9])")
    assert b"with ESMTPA" in mail


def test_swaks_may_not_speak_for_others(gateway: Start, tmp_path: Path) -> None:
    house = gateway(CONFIG.format(head="", folder=tmp_path, listener=TCP + 'xclient_from = ["10.0.0.0/8"]'))
    code, dialogue = swaks(house.server, "--xclient-addr", "10.0.0.1")
    assert code == 33, dialogue  # swaks: XCLIENT is not advertised
    with smtplib.SMTP("127.0.0.1", house.port, timeout=PATIENCE) as client:
        client.ehlo()
        assert not client.has_extn("xclient")
        assert not client.has_extn("xforward")
        for command in ("XCLIENT", "XFORWARD"):
            assert client.docmd(command, "ADDR=10.0.0.1") == (550, b"5.7.0 not allowed from your address")
    assert not maildir(tmp_path / "box")


def test_postfix_forwards_where_a_mail_came_from(gateway: Start, tmp_path: Path, postfix_to: Callable[..., Postfix]) -> None:
    house = gateway(CONFIG.format(head="", folder=tmp_path, listener=TCP + 'xclient_from = ["127.0.0.0/8"]'))
    postfix = postfix_to(house.port, "smtp_send_xforward_command = yes\n")
    with smtplib.SMTP("127.0.0.1", postfix.port, local_hostname="origin.example") as client:
        client.sendmail("a@client.example", ["b@box.example"], "Subject: x\r\n\r\nx\r\n")
    accepted = house.event("accepted")
    assert accepted["forwarded"]["addr"] == "127.0.0.1"
    assert accepted["forwarded"]["helo"] == "origin.example"
    assert accepted["forwarded"]["proto"] == "ESMTP"
    assert accepted["forwarded"]["ident"] in postfix.log()


# ------------------------------------------------------------------- LMTP, end to end

TWO_SINKS = """
[sinks.hook]
type = "webhook"
url = "{url}"

[[routes]]
recipients = ["*@hook.example"]
sink = "hook"
acknowledge = "delivered"
acknowledge_timeout = "60s"
fallback = "refuse"

[[routes]]
recipients = ["*@silent.example"]
sink = "hook"
acknowledge = "delivered"
acknowledge_timeout = "6s"
fallback = "refuse"

[[routes]]
recipients = ["*@quick.example"]
sink = "box"
acknowledge = "delivered"
acknowledge_timeout = "6s"
fallback = "refuse"
"""


def lmtp(short: Path, tmp_path: Path, webhook: HttpReceiver, unix: bool) -> str:
    listener = f'address = "unix:{short}/lmtp"\nmode = "0666"' if unix else 'address = "127.0.0.1:0"'
    config = CONFIG.format(head="", folder=tmp_path, listener=listener + '\nprotocol = "lmtp"')
    return config + 'acknowledge = "delivered"\nacknowledge_timeout = "60s"\nfallback = "refuse"\n' + TWO_SINKS.format(url=webhook.url)


@pytest.mark.parametrize("unix", [True, False], ids=["unix", "tcp"])
def test_smtplib_lmtp_each_recipient_hears_its_own_truth(
    gateway: Start, webhook: HttpReceiver, tmp_path: Path, short: Path, unix: bool
) -> None:
    house = gateway(lmtp(short, tmp_path, webhook, unix))
    heard = threading.Event()

    def silent(request: Request) -> tuple[int, dict[str, str]]:
        heard.wait(PATIENCE)
        return 200, {}

    webhook.answer = lambda request: (422, {})
    address = {"host": f"{short}/lmtp"} if unix else {"host": "127.0.0.1", "port": house.port}
    with smtplib.LMTP(**address, timeout=PATIENCE) as client:
        client.ehlo_or_helo_if_needed()
        client.mail("a@client.example")
        for name in ("one@box.example", "two@hook.example", "three@elsewhere.example", "four@box.example"):
            client.rcpt(name)
        code, _ = client.docmd("DATA")
        assert code == 354
        client.send(b"Subject: x\r\n\r\nx\r\n.\r\n")
        assert [client.getreply()[0] for _ in range(3)] == [250, 554, 250]
        # And where the sink is silent for too long, it alone has no verdict.
        webhook.answer = silent
        client.mail("a@client.example")
        assert client.rcpt("one@quick.example")[0] == 250
        assert client.rcpt("two@silent.example")[0] == 250
        client.docmd("DATA")
        client.send(b"Subject: y\r\n\r\ny\r\n.\r\n")
        assert [client.getreply()[0] for _ in range(2)] == [250, 451]
        heard.set()
    mails(tmp_path / "box", 2)
    assert house.event("connected")["client"] == (None if unix else "127.0.0.1")


@pytest.mark.parametrize("unix", [True, False], ids=["unix", "tcp"])
def test_postfix_lmtp_client(
    gateway: Start, webhook: HttpReceiver, tmp_path: Path, short: Path, postfix_to: Callable[..., Postfix], unix: bool
) -> None:
    house = gateway(lmtp(short, tmp_path, webhook, unix))
    webhook.answer = lambda request: (422, {})
    way = f"unix:{short}/lmtp" if unix else f"inet:127.0.0.1:{house.port}"
    postfix = postfix_to(0, f"default_transport = lmtp:{way}\nlmtp_destination_recipient_limit = 10\n")
    with smtplib.SMTP("127.0.0.1", postfix.port) as client:
        client.sendmail("a@client.example", ["one@box.example", "two@hook.example", "three@box.example"], "Subject: x\r\n\r\nx\r\n")
    wait_until(lambda: postfix.log().count("status=") >= 3, "Postfix delivers")
    log = postfix.log()
    for name, status in (("one@box.example", "sent"), ("two@hook.example", "bounced"), ("three@box.example", "sent")):
        (line,) = [line for line in log.splitlines() if f"to=<{name}>" in line]
        assert f"status={status}" in line, line
    (mail,) = mails(tmp_path / "box", 1)
    assert b"with LMTP" in mail


# ---------------------------------------------------------------------- unix sockets


@pytest.mark.parametrize("workers", [1, 2])
def test_a_unix_socket_from_start_to_end(gateway: Start, tmp_path: Path, short: Path, workers: int) -> None:
    path = short / "smtp"
    subprocess.run([sys.executable, "-c", f"import socket; socket.socket(socket.AF_UNIX).bind({str(path)!r})"], check=True)
    config = CONFIG.format(head=f"workers = {workers}", folder=tmp_path, listener=f'address = "unix:{path}"\nmode = "0640"')
    house = gateway(config)
    assert house.addresses == [f"unix:{path}"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(str(path))
        assert sock.recv(100).startswith(b"220 ")
    # Another one finds somebody there, and the first goes on.
    other = GatewayProcess(tmp_path / "other", config)
    other.launch()
    assert other.wait() == 1
    assert "somebody listens there already" in other.told()
    assert path.exists()
    assert house.stop() == 0
    assert not path.exists()


# ------------------------------------------------------------------ systemd's sockets


@contextmanager
def activated(folder: Path, config: str, *listen: str, names: str, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    activate = program("systemd-socket-activate")
    if activate is None:
        pytest.skip("systemd-socket-activate is not installed")
    file = folder / "activated.toml"
    file.write_text(config + f'\n[spool]\npath = "{folder}/spool"\n')
    command = [activate, *(f"--listen={address}" for address in listen), f"--fdname={names}"]
    command += [f"--setenv={name}={value}" for name, value in environment.items()]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [*command, sys.executable, "-m", "gateway", "serve", "-c", str(file)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("names", ["numbers", "names"])
def test_sockets_of_systemd(tmp_path: Path, short: Path, workers: int, names: str) -> None:
    port = free_port()
    path = short / "smtp"
    one, two = ("fd:3", "fd:4") if names == "numbers" else ("fd:smtp", "fd:local")
    config = CONFIG.format(
        head=f"workers = {workers}", folder=tmp_path, listener=f'address = "{one}"\n[[listeners]]\naddress = "{two}"\nprotocol = "lmtp"'
    )
    with ExitStack() as stack:
        manager = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        manager.bind(str(short / "notify"))
        manager.settimeout(PATIENCE)
        process = stack.enter_context(
            activated(
                tmp_path, config, f"127.0.0.1:{port}", str(path), names="smtp:local", environment={"NOTIFY_SOCKET": str(short / "notify")}
            )
        )
        wait_until(path.exists, "systemd listens")
        # The first client starts it, and is served by it.
        with smtplib.SMTP("127.0.0.1", port, timeout=PATIENCE) as client:
            client.sendmail("a@client.example", ["b@box.example"], "Subject: x\r\n\r\nx\r\n")
        assert manager.recv(4096).startswith(b"READY=1\n")
        with smtplib.LMTP(str(path)) as client:
            client.sendmail("a@client.example", ["b@box.example"], "Subject: y\r\n\r\ny\r\n")
        mails(tmp_path / "box", 2)
        os.kill(process.pid, signal.SIGHUP)
        assert manager.recv(4096).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert manager.recv(4096).startswith(b"READY=1")
        os.kill(process.pid, signal.SIGTERM)
        assert manager.recv(4096).startswith(b"STOPPING=1")
        assert process.wait(PATIENCE) == 0, (tmp_path / "log").read_text()
        assert path.exists(), "it is systemd's"


def test_a_socket_that_nobody_passed_on(tmp_path: Path) -> None:
    house = GatewayProcess(tmp_path / "gateway", CONFIG.format(head="", folder=tmp_path, listener='address = "fd:smtp"'))
    house.launch()
    assert house.wait() == 1
    assert "listeners[0].address: cannot listen on fd:smtp: no socket was passed on to this process (LISTEN_PID)" in house.told()


# ------------------------------------------------------------------------- pressure


def test_out_of_descriptors(gateway: Start, tmp_path: Path) -> None:
    """A2: clients hear why, the process rests instead of spinning, and takes mail again at once when it can."""
    if not hasattr(resource, "prlimit"):
        pytest.skip("prlimit is Linux's")
    house = gateway(CONFIG.format(head="", folder=tmp_path, listener=TCP))
    whole = resource.prlimit(house.pid, resource.RLIMIT_NOFILE)
    house.spare(8)

    def spent() -> float:
        fields = Path(f"/proc/{house.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def starved() -> int:
        """Times that accepting failed; the log may come late, but not out of order."""
        wait_until(lambda: len(house.found("shed", reason="out of resources, try again later")) >= told, "shed")
        return len(house.found("shed", reason="cannot accept: Too many open files"))

    with ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", house.port))) for _ in range(40)]
        for client in clients:
            client.settimeout(PATIENCE)
        heard = [client.recv(200)[:9] for client in clients]
        assert heard.count(b"421 4.3.2") >= 30, heard
        assert {line[:3] for line in heard} <= {b"220", b"421"}
        told = heard.count(b"421 4.3.2")
        assert told < 40
        # One more, and nobody goes: its turn comes with each rest, and nothing runs in between.
        before, shed, since = spent(), starved(), time.monotonic()
        waiting = stack.enter_context(socket.create_connection(("127.0.0.1", house.port)))
        waiting.settimeout(PATIENCE)
        assert waiting.recv(200).startswith(b"421 4.3.2")
        time.sleep(1.0)
        again, used_up = starved() - shed, spent() - before
        seconds = time.monotonic() - since
        assert again <= 8 * seconds
        assert used_up <= 0.5 * seconds
        for client in clients:
            client.close()
    resource.prlimit(house.pid, resource.RLIMIT_NOFILE, whole)
    with smtplib.SMTP("127.0.0.1", house.port, timeout=PATIENCE) as smtp:
        smtp.sendmail("a@client.example", ["b@box.example"], "Subject: x\r\n\r\nx\r\n")
    mails(tmp_path / "box", 1)


def test_the_greet_delay(gateway: Start, tmp_path: Path) -> None:
    listeners = TCP + f'greet_delay = "1s"\n[[listeners]]\n{TCP}greet_delay = "60s"'
    house = gateway(CONFIG.format(head="", folder=tmp_path, listener=listeners))
    began = time.monotonic()
    with smtplib.SMTP("127.0.0.1", house.port, timeout=PATIENCE) as client:
        # A timer of the loop counts in whole milliseconds, and may be called in the last of them.
        assert time.monotonic() - began >= 0.99
        client.sendmail("a@client.example", ["b@box.example"], "Subject: x\r\n\r\nx\r\n")
    # So long that nobody is late; the answer comes at once.
    with socket.create_connection(("127.0.0.1", int(house.addresses[1].rpartition(":")[2])), timeout=PATIENCE) as hasty:
        house.event("connected", count=2)
        hasty.sendall(b"EHLO x\r\n")
        assert hasty.recv(200).startswith(b"554 5.5.0")
