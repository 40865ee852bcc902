"""The command ``gateway``.

Owns what is typed and what is printed; every command asks the part that knows. Whatever
costs time to import is imported in the command that needs it, so that ``--help`` is there at
once.

Exit codes: 0 good, 1 refused or faulty input, 2 usage. Faults of a configuration go to
standard error, one a line, with their place in the file. Text that came out of mail is never
printed raw: a terminal must not be steered by an address.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click

from . import __version__
from .tools import commands

if TYPE_CHECKING:
    from .config import Config, ListenerConfig
    from .route import Route, Routes
    from .smtp.server import Event, Rules

#: Taken where nothing else is said, if it is there.
DEFAULT_FILE = Path("gateway.toml")
#: Seconds for which ``queue`` waits for a gateway that opens or closes a shard.
IN_BETWEEN = 5.0
#: Rows that ``queue list`` shows unless told otherwise.
LIST_LIMIT = 100
#: Days before its end from which ``check`` speaks of a certificate.
EXPIRES_SOON = 14

CONFIG = click.option(
    "-c", "--config", "file", type=click.Path(path_type=Path), help="The configuration; gateway.toml here if it is there."
)
JSON = click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="gateway %(version)s")
def cli() -> None:
    """An SMTP gateway: takes mail, promises only what is safe, carries it to relays and webhooks."""


def main() -> None:
    """What ``gateway`` and ``python -m gateway`` run."""
    cli(prog_name="gateway")


# ---------------------------------------------------------------------------- the file


class Refused(click.ClickException):
    """Faulty or refused input: its lines on standard error, exit code 1."""

    exit_code = 1

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))

    def show(self, file: Any = None) -> None:
        click.echo(self.message, err=True)


def _file(file: Path | None) -> Path:
    if file is not None:
        return file
    if DEFAULT_FILE.is_file():
        return DEFAULT_FILE
    raise click.UsageError("Name the configuration with -c FILE (there is no gateway.toml here).")


def _load(file: Path, flags: dict[str, Any] | None = None) -> Config:
    from .config import Config, ConfigError

    try:
        return Config.load(file, flags=flags)
    except ConfigError as error:
        raise Refused(error.faults) from None


# -------------------------------------------------------------------------- the commands


@cli.command()
@CONFIG
@click.option("--listen", multiple=True, metavar="ADDR", help="Without a file: host:port to listen on; may be repeated.")
@click.option(
    "--to",
    multiple=True,
    metavar="URL",
    help="Without a file: http(s)://…, smtp://host:port, lmtp://host:port, file:///folder, stdout: or discard:; each gets a copy.",
)
@click.option("--clients", multiple=True, metavar="NETWORK", help="Without a file: who may send (toward smtp and lmtp: loopback only).")
@click.option("--spool", type=click.Path(file_okay=False, path_type=Path), help="Folder for what was promised and is not yet carried.")
@click.option("--hostname", help="The name in the banner, EHLO and Received.")
@click.option("--workers", type=click.IntRange(min=0), help="Processes; 0 is one per core.")
@click.option("--log", type=click.Choice(["json", "text", "none"]), default="json", show_default=True, help="Events on standard error.")
def serve(
    file: Path | None,
    listen: tuple[str, ...],
    to: tuple[str, ...],
    clients: tuple[str, ...],
    spool: Path | None,
    hostname: str | None,
    workers: int | None,
    log: str,
) -> None:
    """Take mail and carry it, until SIGTERM or Ctrl-C.

    With a file (-c), or without one: gateway serve --listen 127.0.0.1:2525 --to http://127.0.0.1:8000/inbound
    """
    from .config import Config, ConfigError

    flags: dict[str, Any] = {"hostname": hostname, "workers": workers}
    flags = {key: value for key, value in flags.items() if value is not None}
    quick = bool(listen or to or clients)
    if quick and file is not None:
        raise click.UsageError("--listen, --to and --clients stand in the place of a file: give them or -c.")
    if quick and not to:
        raise click.UsageError("Say where mail goes: --to URL.")
    try:
        if quick:
            path = None
            config = Config.quick(listen or ("127.0.0.1:2525",), to, clients or None, spool, flags=flags)
        else:
            path = str(_file(file))
            if spool is not None:
                flags["spool.path"] = str(spool.absolute())
            config = Config.load(path, flags=flags)

        from . import app

        code = app.serve(config, log=cast("Literal['json', 'text', 'none']", log), config_path=path)
    except ConfigError as error:
        from .net import handover

        handover.refuse(error.faults)
        raise Refused(error.faults) from None
    sys.exit(code)


@cli.command()
@CONFIG
@JSON
def check(file: Path | None, as_json: bool) -> None:
    """Tell every fault of a configuration at once; opens no port and no spool."""
    from .config import Config, ConfigError

    path = _file(file)
    faults: list[str] = []
    warnings: list[str] = []
    try:
        config = Config.load(path)
        warnings = config.warnings() + _expiring(config)
    except ConfigError as error:
        faults = error.faults
    if as_json:
        _print_json({"file": str(path), "faults": faults, "warnings": warnings})
        sys.exit(1 if faults else 0)
    if faults:
        raise Refused(faults)
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(f"{path}: good")


@cli.command()
@CONFIG
@click.option("--client", required=True, metavar="IP", help="Who sends.")
@click.option("--from", "sender", required=True, metavar="ADDRESS", help="Reverse-path; '' is the null one of bounces.")
@click.option("--to", "recipient", required=True, metavar="ADDRESS")
@click.option("--helo", default="client.example", show_default=True, metavar="NAME")
@click.option("--user", metavar="NAME", help="As if this user had logged in.")
@click.option("--tls/--clear", default=None, help="With TLS or without; as much as the listener demands unless said.")
@click.option(
    "--certificate", metavar="NAME", help="The client shows this certificate (a name as in [client_certificates]); under TLS unless said."
)
@click.option("--requiretls", is_flag=True, help="The mail asks for REQUIRETLS (RFC 8689); under TLS unless said.")
@click.option("--listener", "address", metavar="ADDR", help="Which listener, if there are several; the first unless said.")
@JSON
def explain(
    file: Path | None,
    client: str,
    sender: str,
    recipient: str,
    helo: str,
    user: str | None,
    tls: bool | None,
    certificate: str | None,
    requiretls: bool,
    address: str | None,
    as_json: bool,
) -> None:
    """Tell what would become of one mail: listener, checks, route, sinks and the reply.

    Says the mail to a real session of the listener, up to DATA. Checks are named but not asked.
    """
    from ipaddress import ip_address

    from .config import certificate_name

    for hint, value in (("--from", sender), ("--to", recipient), ("--helo", helo)):
        if not value.isprintable():
            raise click.BadParameter("Has a control character.", param_hint=hint)
    config = _load(_file(file))
    try:
        ip = str(ip_address(client))
    except ValueError:
        raise click.BadParameter(f"{client!r} is no IP address.", param_hint="--client") from None
    listeners = {listener.address: listener for listener in config.listeners}
    if address is not None and address not in listeners:
        raise click.BadParameter(f"The file has {', '.join(listeners)}.", param_hint="--listener")
    listener = listeners[address] if address else config.listeners[0]
    if tls and listener.tls == "off":
        raise click.BadParameter(f"{listener.address} has no TLS.", param_hint="--tls")
    if tls is False and listener.tls == "implicit":
        raise click.BadParameter(f"{listener.address} has TLS from the first octet.", param_hint="--clear")
    if tls is None:
        tls = listener.tls in ("required", "implicit") or ((requiretls or certificate is not None) and listener.tls != "off")
    if certificate is not None:
        try:
            certificate = certificate_name(certificate)
        except ValueError as error:
            raise click.BadParameter(f"{certificate!r} {error}.", param_hint="--certificate") from None
        if listener.client_ca is None:
            raise click.BadParameter(f"{listener.address} has no client_ca: it asks for none.", param_hint="--certificate")
        if not tls or user is not None:
            raise click.UsageError("A certificate is shown under TLS, and says itself who the client is: leave out --clear and --user.")
    told = _explained(config, listener, ip, sender, recipient, helo, user, tls, certificate=certificate, requiretls=requiretls)
    if as_json:
        _print_json(told)
    else:
        _print_explained(told)
    sys.exit(0 if told["accepted"] else 1)


@cli.command()
@click.argument("server", required=False)
@click.option("--server", "server_option", metavar="ADDR", help="host:port or unix:/path; 127.0.0.1:2525 unless said.")
@click.option("--from", "sender", default="sender@client.example", show_default=True, metavar="ADDRESS")
@click.option("--to", "recipients", multiple=True, required=True, metavar="ADDRESS", help="May be repeated.")
@click.option("--subject")
@click.option("--text", help="The text of the mail.")
@click.option("--attach", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), help="May be repeated.")
@click.option("--message", type=click.Path(path_type=Path), help="Send this file instead, octet for octet; '-' is standard input.")
@click.option("--lmtp", is_flag=True, help="Speak LMTP.")
@click.option("--tls", is_flag=True, help="By STARTTLS; nothing of the mail is said in clear.")
@click.option("--implicit-tls", is_flag=True, help="TLS from the first octet (port 465).")
@click.option("--ca-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Trust these authorities, not the machine's.")
@click.option("--insecure", is_flag=True, help="Take any certificate.")
@click.option("--certificate", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Ours, PEM.")
@click.option("--key", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Its key, if it is in a file of its own.")
@click.option("--helo", default="", metavar="NAME", help="The machine's name unless said.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=30.0, show_default=True, help="Seconds for each reply.")
@click.option("-q", "--quiet", is_flag=True, help="Do not show the dialogue.")
def send(
    server: str | None,
    server_option: str | None,
    sender: str,
    recipients: tuple[str, ...],
    subject: str | None,
    text: str | None,
    attach: tuple[Path, ...],
    message: Path | None,
    lmtp: bool,
    tls: bool,
    implicit_tls: bool,
    ca_file: Path | None,
    insecure: bool,
    certificate: Path | None,
    key: Path | None,
    helo: str,
    timeout: float,
    quiet: bool,
) -> None:
    """Send one test mail and show the dialogue."""
    from .tools import send as tool

    if server is not None and server_option is not None:
        raise click.UsageError("Name the server once.")
    if message is not None and (subject is not None or text is not None or attach):
        raise click.UsageError("--message is the whole mail: --subject, --text and --attach cannot be added.")
    if tls and implicit_tls:
        raise click.UsageError("Give --tls or --implicit-tls.")
    if not (tls or implicit_tls) and (ca_file or insecure or certificate or key):
        raise click.UsageError("--ca-file, --insecure, --certificate and --key want --tls or --implicit-tls.")
    if key is not None and certificate is None:
        raise click.UsageError("--key wants --certificate.")
    code = tool.run(
        server or server_option or "127.0.0.1:2525",
        sender,
        recipients,
        subject=subject,
        text=text,
        attachments=attach,
        message=message,
        protocol="lmtp" if lmtp else "smtp",
        helo=helo,
        timeout=timeout,
        tls=tool.Security(implicit_tls, ca_file, insecure, certificate, key) if tls or implicit_tls else None,
        quiet=quiet,
    )
    sys.exit(code)


cli.add_command(commands.load)
cli.add_command(commands.receive)


@cli.command()
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="[MAIL.eml]...")
@click.option(
    "--seconds", type=click.FloatRange(0, min_open=True), default=0.5, show_default=True, help="For each line, all rounds together."
)
@click.option(
    "--only", multiple=True, metavar="TEXT", help="Only tasks with this in their name, as content, base64 or pipelined; may be repeated."
)
@click.option("--chart/--no-chart", default=None, help="Bars behind the figures; on a terminal unless said.")
@click.option("--html", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Write a page with plots, too.")
@JSON
def bench(files: tuple[Path, ...], seconds: float, only: tuple[str, ...], chart: bool | None, html: Path | None, as_json: bool) -> None:
    """Measure the parsers, beside whichever others are installed; about a minute.

    Command lines, content out of DATA, whole dialogues and MIME, on mails made here from a fixed seed or on your own
    (gateway bench mail/*.eml). No socket is opened and nothing is downloaded. Runs alternate; told are the median, the
    slowest and the fastest of five, and how many times the gateway is faster (under 1: slower).

    Everybody must first give the same answer as the gateway; who does not is shown, not compared.

    \b
    Beside:
      the standard library
      aiosmtpd             pip install gateway-smtp[bench]
      python-slimta        pip install python-slimta
      smtp-server (Node)   if node finds it from this folder or in NODE_PATH
      go-smtp              if go can build it from its module cache or GOPATH
    """
    import shutil

    from .tools import bench as tool
    from .tools.bench import corpora, peers, report

    notes: list[str] = []
    chosen = [] if files else [*corpora.envelopes(), *corpora.mails()]
    try:
        if files:
            mails = corpora.own(files)
            chosen, notes = [mails.corpus], mails.notes
    except ValueError as error:
        from .observe import quiet

        raise Refused([quiet(line) for line in str(error).splitlines()]) from None
    loud = sys.stderr.isatty()

    def progress(text: str) -> None:
        if loud:
            click.echo(f"\r\x1b[K{text}", nl=False, err=True)

    present, absent = peers.implementations()
    try:
        found = tool.run(chosen, present, absent, only=only, seconds=seconds, notes=notes, progress=progress)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    finally:
        for one in present:
            one.close()
    if html is not None:
        html.write_text(report.page(found), encoding="utf-8", errors="backslashreplace")
    if as_json:
        _print_json(report.as_json(found))
        return
    bars = sys.stdout.isatty() if chart is None else chart
    for line in report.table(found, shutil.get_terminal_size().columns if bars else 0):
        click.echo(line)


@cli.command()
@click.option("--once", is_flag=True, help="End after the first mail.")
def demo(once: bool) -> None:
    """The first minute: gateway, webhook receiver, and one mail through both."""
    from .tools import demo as tool

    sys.exit(tool.run(once))


@cli.command()
@JSON
def version(as_json: bool) -> None:
    """Versions of the gateway and of what it stands on."""
    import platform
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    versions = {"gateway": __version__, "python": platform.python_version(), "system": platform.platform()}
    for package in ("uvloop", "apsw", "orjson", "pydantic", "pyreqwest", "aiohttp", "prometheus-client", "click", "argon2-cffi"):
        try:
            versions[package] = installed(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    if as_json:
        _print_json(versions)
        return
    for name, number in versions.items():
        click.echo(f"{name:<18}{number}")


def _expiring(config: Config) -> list[str]:
    """Reads the certificates. Raises ConfigError where they cannot be used."""
    import time

    if all(listener.tls == "off" for listener in config.listeners):
        return []
    from .build import contexts
    from .net.tls import ends_at

    contexts(config)
    found = []
    for number, listener in enumerate(config.listeners):
        for certificate, _ in listener.pairs if listener.tls != "off" else ():
            left = (ends_at(certificate) - time.time()) / 86400
            if left < EXPIRES_SOON:
                when = "has expired" if left < 0 else f"expires in {left:.0f} days"
                found.append(f"listeners[{number}]: {certificate} {when}")
    return found


@cli.command("hash-password")
@click.option("--scram", "kind", flag_value="scram", help="SCRAM keys, for clients that log in with SCRAM-SHA-256 (and any other way).")
@click.option("--argon2", "kind", flag_value="argon2", help="An argon2id hash.")
@click.option("--scrypt", "kind", flag_value="scrypt", default=True, help="A scrypt hash; this unless said otherwise.")
@click.option("--name", metavar="NAME", help="Print a whole line of a users_file.")
def hash_password(kind: str, name: str | None) -> None:
    """Make what [users] and users_file keep of a password.

    Asks for the password, or takes the first line of standard input. It is never an argument: others could read it there.
    """
    from . import passwords

    if name is not None and (":" in name or (fault := passwords.name_fault(name)) is not None):
        raise click.BadParameter("Has a colon." if ":" in name else f"The name {fault}.", param_hint="--name")
    if sys.stdin.isatty():
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    else:
        try:
            password = sys.stdin.buffer.readline().decode().rstrip("\r\n")
        except UnicodeDecodeError:
            raise Refused(["the password is not UTF-8 text"]) from None
    try:
        made = passwords.made(password, cast("passwords.Kind", kind))
    except ValueError as error:
        raise Refused([str(error)]) from None
    click.echo(f"{made}" if name is None else f"{name}:{made}")


# -------------------------------------------------------------------------------- queue


SPOOL = click.option("--spool", type=click.Path(file_okay=False, path_type=Path), help="The spool's folder, instead of a configuration.")
SINK = click.option("--sink", metavar="NAME", help="Only what this sink is owed.")
STATE = click.option("--state", type=click.Choice(["queued", "held", "dead"]), help="Only rows in this state.")
IDS = click.argument("ids", nargs=-1, metavar="[ID]...")
ALL = click.option("--all", "everything", is_flag=True, help="Without IDs and --sink: all of them.")


@cli.group()
def queue() -> None:
    """See and change what was promised and is not yet carried.

    Works on a running gateway and on a stopped one. An ID is that of a message or of one of its deliveries.
    """


@queue.command("list")
@CONFIG
@SPOOL
@SINK
@STATE
@click.option("--limit", type=click.IntRange(min=1), default=LIST_LIMIT, show_default=True, help="Rows, the oldest first.")
@JSON
def queue_list(file: Path | None, spool: Path | None, sink: str | None, state: str | None, limit: int, as_json: bool) -> None:
    """What waits, for whom, since when, and why."""
    # One more than is shown tells whether there are more.
    rows = _Shards(file, spool).rows(sink=sink, state=state, limit=limit + 1)
    rows, more = rows[:limit], len(rows) > limit
    if as_json:
        _print_json(rows)
        return
    _print_rows(rows)
    if more:
        click.echo(f"There are more than {limit}; --limit shows them.", err=True)


@queue.command("show")
@CONFIG
@SPOOL
@click.argument("id")
@JSON
def queue_show(file: Path | None, spool: Path | None, id: str, as_json: bool) -> None:
    """All that is known of one message, and its header."""
    from .observe import quiet

    shards = _Shards(file, spool)
    rows = shards.rows(message_id=id, limit=10_000)
    if not rows:
        raise Refused([f"{quiet(id)}: no such message in the queue"])
    header = shards.export(id).partition(b"\r\n\r\n")[0].decode("utf-8", "replace")
    if as_json:
        _print_json({"rows": rows, "header": header})
        return
    for row in rows:
        for name, value in row.items():
            click.echo(f"{name:<14}{quiet(_shown(name, value))}")
        click.echo()
    for line in header.split("\r\n"):
        click.echo(quiet(line))


@queue.command("retry")
@CONFIG
@SPOOL
@IDS
@SINK
@ALL
def queue_retry(file: Path | None, spool: Path | None, ids: tuple[str, ...], sink: str | None, everything: bool) -> None:
    """Try now what waits for its time (or for its sink)."""
    _change(file, spool, "retry", ids, sink, "queued", everything)


@queue.command("replay")
@CONFIG
@SPOOL
@IDS
@SINK
@ALL
def queue_replay(file: Path | None, spool: Path | None, ids: tuple[str, ...], sink: str | None, everything: bool) -> None:
    """Try dead letters once more, with as much time again."""
    _change(file, spool, "retry", ids, sink, "dead", everything)


@queue.command("hold")
@CONFIG
@SPOOL
@IDS
@SINK
@ALL
def queue_hold(file: Path | None, spool: Path | None, ids: tuple[str, ...], sink: str | None, everything: bool) -> None:
    """Try these no more until they are released."""
    _change(file, spool, "hold", ids, sink, "queued", everything)


@queue.command("release")
@CONFIG
@SPOOL
@IDS
@SINK
@ALL
def queue_release(file: Path | None, spool: Path | None, ids: tuple[str, ...], sink: str | None, everything: bool) -> None:
    """Go on with what was held."""
    _change(file, spool, "release", ids, sink, "held", everything)


@queue.command("drop")
@CONFIG
@SPOOL
@IDS
@SINK
@STATE
@ALL
def queue_drop(file: Path | None, spool: Path | None, ids: tuple[str, ...], sink: str | None, state: str | None, everything: bool) -> None:
    """Forget these for good: nobody gets them, and nobody is told."""
    _change(file, spool, "drop", ids, sink, state, everything)


@queue.command("export")
@CONFIG
@SPOOL
@click.argument("id")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Into this file instead of standard output.")
def queue_export(file: Path | None, spool: Path | None, id: str, output: Path | None) -> None:
    """The octets of one message, with our trace header, as they would be relayed."""
    content = _Shards(file, spool).export(id)
    if output is None:
        sys.stdout.buffer.write(content)
        return
    try:
        output.write_bytes(content)
    except OSError as error:
        raise Refused([f"{output}: cannot be written: {error.strerror}"]) from None


def _change(
    file: Path | None, spool: Path | None, action: str, ids: tuple[str, ...], sink: str | None, state: str | None, everything: bool
) -> None:
    if ids and everything:
        raise click.UsageError("Give IDs or --all.")
    if not ids and sink is None and not everything:
        raise click.UsageError("Say which: IDs, --sink NAME or --all.")
    changed = _Shards(file, spool).change(action=action, ids=list(ids) or None, sink=sink, state=state)
    click.echo(f"{changed} changed")
    if ids and not changed:
        raise Refused(
            [f"{'no such' if state is None else f'no {state}'} message in the queue under {'this ID' if len(ids) == 1 else 'these IDs'}"]
        )


class _Shards:
    """The shards of a spool: each asked through its living worker, or opened where none lives."""

    def __init__(self, file: Path | None, spool: Path | None) -> None:
        """Raises Refused where there is no spool."""
        if spool is None:
            spool = _spool_of(file)
        try:
            folders = [folder for folder in spool.iterdir() if folder.name.isdigit() and folder.is_dir()]
        except OSError as error:
            raise Refused([f"{spool}: there is no spool: {error.strerror}"]) from None
        if not folders:
            raise Refused([f"{spool}: there is no spool in this folder"])
        self._folders = sorted(folders, key=lambda folder: int(folder.name))

    def rows(self, **filters: Any) -> list[dict[str, Any]]:
        """The oldest first."""
        limit = filters["limit"]
        rows = [row for folder in self._folders for row in self._ask(folder, "rows", **filters)]
        return sorted(rows, key=lambda row: float(row["received_at"]))[:limit]

    def change(self, **what: Any) -> int:
        return sum(int(self._ask(folder, "change", **what)) for folder in self._folders)

    def export(self, message_id: str) -> bytes:
        """Raises Refused where no shard has it."""
        import base64

        from .observe import quiet

        for folder in self._folders:
            # Asked first, so that a refusal of ``export`` is about the message and not about the shard.
            if self._ask(folder, "rows", message_id=message_id, limit=1):
                content = self._ask(folder, "export", message_id=message_id)
                return content if isinstance(content, bytes) else base64.b64decode(content)
        raise Refused([f"{quiet(message_id)}: no such message in the queue"])

    def _ask(self, folder: Path, op: str, **arguments: Any) -> Any:
        import time

        from .admin import control
        from .contracts import SpoolError
        from .spool.sqlite import InUseError

        until = time.monotonic() + IN_BETWEEN
        while True:
            try:
                return control.call(folder / control.NAME, op, **arguments)
            except control.ControlError as error:
                raise Refused([f"{folder}: {error}"]) from None
            except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError):
                pass
            except OSError as error:
                raise Refused([f"{folder}: cannot speak to the gateway: {error.strerror or error}"]) from None
            try:
                return self._stopped(folder, op, arguments)
            except InUseError as error:
                # A gateway opens it, or closes it, at this moment.
                if time.monotonic() > until:
                    raise Refused([f"{folder}: {error}"]) from None
                time.sleep(0.05)
            except (SpoolError, OSError, LookupError) as error:
                raise Refused([f"{folder}: {error}"]) from None

    @staticmethod
    def _stopped(folder: Path, op: str, arguments: dict[str, Any]) -> Any:
        """Ask the spool itself: nobody lives there. Raises SpoolError, OSError, LookupError."""
        import asyncio
        from dataclasses import asdict

        from .observe import Telemetry
        from .spool.sqlite import SqliteSpool

        if not (folder / "spool.db").exists():
            # It was empty, and whoever emptied it took it away.
            return [] if op == "rows" else 0

        async def ask() -> Any:
            telemetry = Telemetry("none")
            spool = SqliteSpool(folder, observer=telemetry)
            await spool.open()
            try:
                match op:
                    case "rows":
                        return [asdict(row) for row in await spool.rows(**arguments)]
                    case "change":
                        return await spool.change(**arguments)
                    case _:
                        return await spool.export(**arguments)
            finally:
                await spool.close()

        return asyncio.run(ask())


def _spool_of(file: Path | None) -> Path:
    """The folder that this configuration names; without one, that of ``serve --listen --to``."""
    from .config import state_folder

    if file is None and not DEFAULT_FILE.is_file():
        usual = state_folder()
        if usual.is_dir():
            return usual
    return _load(_file(file)).spool.path


def _print_rows(rows: Sequence[dict[str, Any]]) -> None:
    from .observe import quiet

    if not rows:
        click.echo("Nothing is queued.", err=True)
        return
    columns = ("ID", "STATE", "SINK", "SIZE", "TRIES", "AGE", "NEXT", "FROM", "TO", "NOTE")
    table = [columns] + [
        (
            row["id"],
            row["state"],
            row["sink"],
            str(row["size"]),
            str(row["attempts"]),
            _span(-_until(row["received_at"])),
            _span(_until(row["due"])) if row["state"] == "queued" else "",
            f"<{row['mail_from']}>",
            ", ".join(row["recipients"][:3]) + (f" and {len(row['recipients']) - 3} more" if len(row["recipients"]) > 3 else ""),
            row["note"] or _waits(row),
        )
        for row in rows
    ]
    table = [tuple(quiet(cell) for cell in line) for line in table]
    widths = [max(len(line[column]) for line in table) for column in range(len(columns))]
    for line in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _waits(row: Mapping[str, Any]) -> str:
    """Why nothing was tried, where its sender wants it so."""
    waits = row["state"] == "queued" and not row["attempts"] and _until(row["not_before"]) > 0
    return f"held by its sender until {_shown('not_before', row['not_before'])}" if waits else ""


def _until(moment: float) -> float:
    import time

    return moment - time.time()


def _span(seconds: float) -> str:
    """Short and good enough: 45s, 12m, 7h, 3d."""
    if seconds < 1:
        return "now"
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.0f}s"


def _shown(name: str, value: Any) -> str:
    if name == "not_before" and not value:
        return ""
    if name in ("due", "received_at", "expires_at", "not_before"):
        from datetime import UTC, datetime

        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return ", ".join(value) if isinstance(value, list) else str(value)


# ------------------------------------------------------------------------------ explain


def _rules(config: Config, listener: ListenerConfig, routes: Routes) -> Rules:
    from .build import rules
    from .users import mechanisms

    logins = config.authentication
    offered = mechanisms(
        config.accounts(),
        logins is not None and logins.url is not None,
        logins is not None and logins.jwks_url is not None,
        None if logins is None or logins.mechanisms is None else frozenset(logins.mechanisms),
    )
    return rules(config, listener, routes, offered)


def _explained(
    config: Config,
    listener: ListenerConfig,
    ip: str,
    sender: str,
    recipient: str,
    helo: str,
    user: str | None,
    tls: bool,
    *,
    certificate: str | None = None,
    requiretls: bool = False,
) -> dict[str, Any]:
    """What a session of this listener says to this mail, and why."""
    from dataclasses import replace

    from .build import door
    from .contracts import Verdict
    from .message import TLS, Client
    from .smtp.server import Asked, MailStarted, ServerSession, TLSWanted

    routes = config.table()
    trusted = door(listener).trusts(ip)
    rules = _rules(config, listener, routes)
    session = ServerSession(rules, Client(ip, helo=helo, user=user), "explain", listener.address, trusted)
    checks: list[dict[str, str]] = []
    taken: list[Route] = []
    dialogue: list[str] = []

    def follow(events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Asked):
                checks.extend({"check": name, "stage": event.question.stage} for name in event.checks)
                follow(session.verdict(Verdict()))
            elif isinstance(event, TLSWanted):
                follow(session.secure())
            elif isinstance(event, MailStarted):
                taken.extend(event.transaction.routes)

    def say(line: str | None) -> str:
        """The last line of the reply."""
        if line is None:
            follow(session.start())
        else:
            dialogue.append(f"> {line}")
            follow(session.receive(line.encode("utf-8", "surrogateescape") + b"\r\n"))
        while session.more:
            follow(session.proceed())
        lines = session.outgoing().decode("utf-8", "replace").splitlines()
        dialogue.extend(f"< {one}" for one in lines)
        return lines[-1] if lines else ""

    def secure() -> None:
        session.secured(TLS("", "", certificate, names=() if certificate is None else (certificate,)))
        if certificate is None:
            # Whoever logs in does so under TLS.
            session.client = replace(session.client, user=user)

    utf8 = "" if sender.isascii() and recipient.isascii() else " SMTPUTF8"
    wish = " REQUIRETLS" if requiretls else ""
    hello = f"{'LHLO' if listener.protocol == 'lmtp' else 'EHLO'} {helo}"
    known = certificate in config.client_certificates and listener.certificate_identity != "off"
    login = known and listener.certificate_identity == "external"
    if listener.tls == "implicit":
        secure()
    reply, stage = say(None), "connect"
    if tls and listener.tls != "implicit" and reply.startswith("2"):
        reply, stage = say("STARTTLS"), "command"
        if reply.startswith("2"):
            secure()
    for next_stage, line in (
        ("hello", hello),
        *([("auth", "AUTH EXTERNAL =")] if login else []),
        ("mail", f"MAIL FROM:<{sender}>{utf8}{wish}"),
        ("recipient", f"RCPT TO:<{recipient}>"),
    ):
        if reply.startswith("2"):
            reply, stage = say(line), next_stage
    accepted = reply.startswith("2")
    if accepted:
        answer = reply
        # Only once content is to come does the session tell which route it took.
        say("DATA")
        reply = answer
    unrouted = stage == "recipient" and reply.startswith("550")
    route = taken[0] if taken else None
    numbers = [number for number, known in enumerate(routes.routes) if known is route]
    if route is not None:
        judging = set(config.checks_at("content"))
        checks.extend({"check": name, "stage": "content"} for name in route.checks if name in judging)
    return {
        "listener": listener.address,
        "door": _door(listener, ip),
        "limits": config.limits.model_dump(),
        "tls": {"offered": listener.tls, "used": tls},
        "extensions": list(rules.extensions.offered(listener.protocol, session.client)),
        "client": ip,
        "from": sender,
        "to": recipient,
        "auth": {
            "listener": listener.auth,
            "mechanisms": [*(["EXTERNAL"] if known else []), *rules.mechanisms] if listener.auth != "off" else [],
            "without_tls": listener.auth_without_tls,
            "user": session.client.user,
            "certificate": certificate,
        },
        "checks": checks,
        "route": None if route is None else {"number": numbers[0], "recipients": list(route.recipients), "acknowledge": route.acknowledge},
        "sinks": [] if route is None else [{"name": name, "type": config.sinks[name].type} for name in route.sinks],
        "reply": reply,
        "stage": stage,
        "accepted": accepted,
        "why": list(_reasons(config, routes, recipient, ip, session.client.user, requiretls)) if unrouted else [],
        "dialogue": dialogue[:-2] if accepted else dialogue,
    }


def _door(listener: ListenerConfig, ip: str) -> dict[str, Any]:
    """How this client comes in."""
    from .build import door
    from .listener import by_client

    here = door(listener)
    return {
        "protocol": listener.protocol,
        "tls": listener.tls,
        "auth": listener.auth,
        "proxy_header": "demanded" if here.demands_header(ip) else "refused",
        "proxies": [str(network) for network in here.proxies],
        "xclient": here.trusts(ip),
        "greet_delay": 0.0 if here.trusts(ip) else here.greet_delay,
        "counted_by_client": by_client(ip) != "" and not (here.trusts(ip) or here.demands_header(ip)),
    }


def _told_door(told: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is worth a line."""
    here, limits = told["door"], told["limits"]
    if here["proxy_header"] == "demanded":
        yield "proxy", "must begin with a PROXY header, or is cut off unheard; explained is one that keeps this address (LOCAL)"
    elif here["proxies"]:
        yield "proxy", f"a PROXY header from here is refused; only {', '.join(here['proxies'])} may send one"
    if here["xclient"]:
        yield "xclient", "may speak for others (XCLIENT, XFORWARD)"
    if here["greet_delay"]:
        yield "greeting", f"after {here['greet_delay']:g} s of silence"
    each = f"{limits['connections_per_client']} of one client" if here["counted_by_client"] else "not counted by client"
    yield (
        "limits",
        f"{limits['connections']} connections, {each}; {limits['message_size']} octets, {limits['recipients']} recipients; "
        f"{limits['idle_timeout']:g} s between commands, {limits['command_timeout']:g} s for one, {limits['data_timeout']:g} s of silence "
        f"and {limits['minimum_rate']} octets a second in content",
    )


def _reasons(config: Config, routes: Routes, recipient: str, ip: str, user: str | None, requiretls: bool) -> Iterator[str]:
    """Why no route takes this recipient, as far as patterns and clients go."""
    from dataclasses import replace

    from .message import Client
    from .reply import Reply
    from .route import ODD_LOCAL_PART, Routes

    local, _, domain = recipient.rpartition("@")
    for number, route in enumerate(routes.routes):
        alone = Routes([replace(route, clients=None, authenticated=False)], config.hostname)
        found = alone.find(local, domain.lower(), Client(ip))
        if isinstance(found, Reply) and found is not ODD_LOCAL_PART:
            continue
        if route.authenticated and user is None:
            yield f"routes[{number}] fits, but wants an authenticated client"
        elif not route.admits(Client(ip, user=user)):
            yield f"routes[{number}] fits, but not for clients at {ip}"
        elif found is ODD_LOCAL_PART:
            yield f"routes[{number}] fits, but does not relay local parts with %, ! or @ (odd_local_parts)"
        elif requiretls and not route.requiretls:
            unable = [name for name in route.sinks if not config.sinks[name].carries_requiretls]
            yield f"routes[{number}] fits, but cannot promise TLS: see tls (a webhook's url) of {', '.join(unable)}"


def _print_explained(told: dict[str, Any]) -> None:
    from .observe import quiet

    route = told["route"]
    listed = ", ".join(repr(pattern) for pattern in route["recipients"]) if route else ""
    rows = [
        ("listener", told["listener"]),
        ("protocol", told["door"]["protocol"]),
        ("tls", _tls_shown(told["tls"])),
        ("auth", _login(told["auth"])),
        *_told_door(told),
        ("may ask", "; ".join(told["extensions"]) or "nothing of the queue"),
        ("checks", ", ".join(f"{check['check']} ({check['stage']})" for check in told["checks"]) or "none"),
        ("route", f"routes[{route['number']}]: {listed}, acknowledge {route['acknowledge']}" if route else "none"),
        ("sinks", ", ".join(f"{sink['name']} ({sink['type']})" for sink in told["sinks"]) or "none"),
        ("reply", told["reply"] + ("" if told["accepted"] else f"  ({told['stage']})")),
    ]
    for name, text in rows:
        click.echo(f"{name:<10}{quiet(text)}")
    for reason in told["why"]:
        click.echo(f"{'':<10}{quiet(reason)}")


def _tls_shown(tls: dict[str, Any]) -> str:
    way = {"off": "off", "starttls": "STARTTLS offered", "required": "STARTTLS required", "implicit": "from the first octet"}[
        tls["offered"]
    ]
    return way if tls["offered"] == "off" else f"{way}; this mail {'with it' if tls['used'] else 'in clear'}"


def _login(auth: dict[str, Any]) -> str:
    """How one may log in here, and as whom this client did."""
    user = "not logged in" if auth["user"] is None else f"as {auth['user']}"
    if auth["certificate"] is not None:
        user += f" ({auth['certificate']} {'stands for nobody here' if auth['user'] is None else 'says so'})"
    if auth["listener"] == "off":
        if auth["certificate"] is not None:
            return f"off, {user}"
        return "off" + ("" if auth["user"] is None else f"; nobody could be {auth['user']} here")
    where = "" if auth["without_tls"] else " under TLS"
    return f"{auth['listener']}{where} ({' '.join(auth['mechanisms']) or 'no mechanism'}), {user}"


def _print_json(value: Any) -> None:
    import json

    click.echo(json.dumps(value, indent=2, ensure_ascii=True))
