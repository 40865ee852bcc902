"""The commands ``gateway load`` and ``gateway receive``: what is typed and what is printed.

The tables go to standard output, progress to standard error and only to a terminal. What servers
said is shown with its control characters escaped. Exit codes: 0 every message was taken, 1 not
(or nothing could be sent), 2 usage, and targets that are refused.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

if TYPE_CHECKING:
    from ._wire import Generator, Histogram
    from .load import Report
    from .receive import Tally

_UNITS = {"": 1, "b": 1, "kib": 2**10, "k": 2**10, "mib": 2**20, "m": 2**20, "kb": 10**3, "mb": 10**6}
#: The largest made mail: it is held in memory once for each size.
LARGEST = 2**30


def size(text: str) -> int:
    """Octets: 1024, 10KiB, 1 MiB, 1k, 2MB. Raises click.BadParameter."""
    found = re.fullmatch(r"(\d{1,12})\s*([a-zA-Z]*)", text.strip(), re.ASCII)
    if found is None or found[2].lower() not in _UNITS:
        raise click.BadParameter(f"{text!r} is no size: 1024, 10KiB, 1MiB.")
    octets = int(found[1]) * _UNITS[found[2].lower()]
    if octets > LARGEST:
        raise click.BadParameter(f"{text!r} is over 1 GiB.")
    return octets


@click.command()
@click.argument("target", metavar="host:port|unix:/path")
@click.option("-s", "--sessions", type=click.IntRange(1, 100_000), default=10, show_default=True, help="Connections at the same time.")
@click.option("-m", "--messages", type=click.IntRange(1), help="End after so many. This or --seconds is a must.")
@click.option("-t", "--seconds", type=click.FloatRange(0, min_open=True), help="End after so long.")
@click.option(
    "-l", "--size", "sizes", type=size, metavar="SIZE", multiple=True, help="Octets of the content (1024, 10KiB, 1MiB); several take turns."
)
@click.option(
    "--message",
    "files",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="Send this .eml instead; several take turns.",
)
@click.option("--recipients", type=click.IntRange(1, 100_000), default=1, show_default=True, help="Of each message.")
@click.option("--per-connection", type=click.IntRange(1), help="QUIT and a new connection after so many messages; never unless said.")
@click.option("-p", "--pipeline", is_flag=True, help="MAIL, RCPT and DATA in one write, the body with the next group.")
@click.option("--bdat", is_flag=True, help="BDAT in the place of DATA (with --pipeline all of a message in one write).")
@click.option("--lmtp", is_flag=True, help="Speak LMTP.")
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Messages a second, sent when due whatever the server does.")
@click.option("--tls", type=click.Choice(["starttls", "implicit"]))
@click.option(
    "--ca-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Trust these authorities; anybody unless said (or --verify).",
)
@click.option("--verify", is_flag=True, help="The certificate must be good.")
@click.option("--auth", metavar="USER:PASSWORD", help="AUTH PLAIN.")
@click.option("--from", "sender", default="load@client.example", show_default=True, metavar="ADDRESS")
@click.option("--to", "recipient", default="load@bench.example", show_default=True, metavar="ADDRESS")
@click.option("--helo", default="client.example", show_default=True, metavar="NAME")
@click.option("--timeout", type=click.FloatRange(0, 3600, min_open=True), default=60.0, show_default=True, help="Seconds for each reply.")
@click.option("--anywhere", is_flag=True, help="The target may be a public address. It must be yours.")
@click.option("--json", "as_json", is_flag=True, help="JSON instead of text.")
def load(
    target: str,
    sessions: int,
    messages: int | None,
    seconds: float | None,
    sizes: tuple[int, ...],
    files: tuple[Path, ...],
    recipients: int,
    per_connection: int | None,
    pipeline: bool,
    bdat: bool,
    lmtp: bool,
    rate: float | None,
    tls: Literal["starttls", "implicit"] | None,
    ca_file: Path | None,
    verify: bool,
    auth: str | None,
    sender: str,
    recipient: str,
    helo: str,
    timeout: float,
    anywhere: bool,
    as_json: bool,
) -> None:
    """Send many messages and tell rate, latencies and replies.

    gateway load 127.0.0.1:2525 --messages 100000 --sessions 100 --pipeline
    """
    from . import load as tool

    if files and sizes:
        raise click.UsageError("--message is the whole mail: --size has nothing to say.")
    if auth is not None and ":" not in auth:
        raise click.BadParameter("USER:PASSWORD", param_hint="--auth")
    if tls is None and (ca_file is not None or verify):
        raise click.UsageError("--ca-file and --verify want --tls.")
    user, _, password = (auth or "").partition(":")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        plan = tool.Plan(
            target=target,
            sessions=sessions,
            messages=messages or 0,
            seconds=seconds or 0.0,
            sizes=sizes or (1024,),
            contents=[tool.read(path) for path in files],
            recipients=recipients,
            per_connection=per_connection or 0,
            pipeline=pipeline,
            bdat=bdat,
            lmtp=lmtp,
            tls=tls or "off",
            ca_file=ca_file,
            verify=verify,
            auth=None if auth is None else (user, password),
            rate=rate or 0.0,
            sender=sender,
            recipient=recipient,
            hello=helo,
            timeout=timeout,
            anywhere=anywhere,
        )
        report = tool.run(plan, _progress if sys.stderr.isatty() else None)
    except (tool.PlanError, OSError) as error:
        raise click.UsageError(f"{error}") from None
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", nl=False, err=True)
    click.echo(json.dumps(report.as_dict(), indent=2, ensure_ascii=True) if as_json else _table(report))
    sys.exit(0 if report.good and not report.interrupted else 1)


@click.command()
@click.argument("protocol", type=click.Choice(["smtp", "lmtp", "http"]))
@click.option("--listen", default="127.0.0.1:2526", show_default=True, metavar="ADDR", help="host:port (port 0: any) or unix:/path.")
@click.option("--delay", type=click.FloatRange(0), default=0.0, help="Seconds before the answer to each message.")
@click.option(
    "--fail",
    "fails",
    multiple=True,
    metavar="STAGE:PERCENT/CODE",
    help="At connect, hello, mail, rcpt, data or content (after it); drop:PERCENT closes after it without an answer. "
    "http knows connect (closed at once, without a code), content and drop. May be repeated; shares of one stage add up: "
    "content:10/452 and content:5/554 fail 15 in 100.",
)
@click.option("-m", "--messages", type=click.IntRange(1), help="End after so many.")
@click.option("-t", "--seconds", type=click.FloatRange(0, min_open=True), help="End after so long.")
@click.option("--connections", type=click.IntRange(1, 1_000_000), default=10_000, show_default=True, help="At the same time.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Of the dice that choose what fails.")
def receive(
    protocol: Literal["smtp", "lmtp", "http"],
    listen: str,
    delay: float,
    fails: tuple[str, ...],
    messages: int | None,
    seconds: float | None,
    connections: int,
    seed: int,
) -> None:
    """Take everything, keep nothing, count: a receiver for load tests.

    Ends by its bounds, SIGTERM or Ctrl-C, cuts off who is talking then, and prints its counts as JSON. Offers
    neither TLS nor AUTH.
    """
    from . import receive as tool

    try:
        order = tool.Order(
            protocol, listen, messages or 0, seconds or 0.0, delay, [tool.Failure.read(text) for text in fails], connections, seed
        )
        receiver = tool.Receiver(order)
    except tool.OrderError as error:
        raise click.UsageError(f"{error}") from None
    except OSError as error:
        raise click.ClickException(f"{error}") from None
    with receiver:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: receiver.end())
        click.echo(f"listening on {receiver.address}", err=True)
        tally = receiver.run(_counted if sys.stderr.isatty() else None)
    click.echo(json.dumps(tally.as_dict()))


def _counted(tally: Tally) -> None:
    bad = f", {tally.refused:,} refused, {tally.dropped:,} dropped" if tally.refused or tally.dropped else ""
    click.echo(f"{tally.each[-1]:>10,}/s  {tally.messages:,} taken{bad}, {tally.connections:,} connections", err=True)


def _progress(engine: Generator, seconds: float) -> None:
    ended = engine.accepted + engine.refused
    latency = f", p99 {_ms(engine.latency.at(0.99))}" if engine.latency.count else ""
    bad = f", {engine.refused:,} refused, {engine.broken:,} broken off" if engine.refused or engine.broken else ""
    click.echo(
        f"\r\x1b[K{seconds:6.1f} s  {ended:,} messages, {engine.accepted / max(engine.elapsed, 1e-9):,.0f}/s{latency}{bad}",
        nl=False,
        err=True,
    )


def _ms(nanoseconds: float) -> str:
    value = nanoseconds / 1e6
    return f"{value:,.3f} ms" if value < 1 else f"{value:,.2f} ms" if value < 100 else f"{value:,.0f} ms"


def _plainly(text: str) -> str:
    """What a server said, fit for a terminal."""
    return "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in text)


def _latencies(seen: Histogram) -> str:
    from .load import SHARES

    return "  ".join(f"{name.replace('p999', 'p99.9')} {_ms(seen.at(share))}" for name, share in SHARES.items())


def _left_out(report: Report) -> str:
    """Which messages the latencies do not know of."""
    if not report.unsent and not report.broken:
        return ""
    why = [f"{report.unsent:,} were never sent"] * (report.unsent > 0) + [f"{report.broken:,} broken off"] * (report.broken > 0)
    return f"  of {report.latency.count:,} of {report.due:,} ({', '.join(why)})"


def _table(report: Report) -> str:
    from .load import contents_of

    plan = report.plan
    sizes = ", ".join(f"{size:,}" for size in sorted({len(content) for content in contents_of(plan)}))
    words = [f"{plan.sessions} session{'s' * (plan.sessions > 1)}", f"{sizes} octets"]
    words += [f"{plan.recipients} recipients"] * (plan.recipients > 1)
    words += [word for word, said in (("LMTP", plan.lmtp), ("pipelined", plan.pipeline), ("BDAT", plan.bdat), ("AUTH", plan.auth)) if said]
    words += [f"TLS ({plan.tls})"] * (plan.tls != "off")
    words += [f"{plan.per_connection} a connection"] * (plan.per_connection > 0)
    words += [f"{plan.rate:,.6g} a second asked for"] * (plan.rate > 0)
    unsent = f", {report.unsent:,} found no session in time" if report.unsent else ""
    lines = [f"{plan.target}: {', '.join(words)}{' (interrupted)' if report.interrupted else ''}"]
    # Figures of what never was only hide the line that says why.
    if report.accepted + report.refused:
        speed = f"{report.octets / max(report.seconds, 1e-9) / 1e6:,.1f} MB/s over {report.seconds:.2f} s"
        lines.append(f"rate       {report.rate:,.0f} messages/s, {speed}")
    if report.begun or not report.failure:
        lines.append(f"messages   {report.accepted:,} taken, {report.refused:,} refused, {report.broken:,} broken off{unsent}")
    if report.latency.count:
        lines.append(f"latency    {_latencies(report.latency)}{_left_out(report)}")
    if report.setup.count:
        lines.append(f"sessions   {report.connections:,} connections, ready after {_latencies(report.setup)}")
    # Of the stages between only what is out of the ordinary; the replies after the data are the result.
    for stage, codes in report.replies.items():
        for code, count in codes.items():
            if stage == "content" or code >= 400:
                text = report.texts.get((stage, code), "")
                said = f'  "{_plainly(text)}"' if text else ""
                lines.append(f"reply      {stage} {code}: {count:,}{said}")
    lines += [f"error      {_plainly(what)}: {count:,}" for what, count in report.errors.items() if what not in report.failure]
    if report.accepted + report.refused:
        lines.append(f"generator  {report.cost:.1f} µs of CPU a message")
    if report.failure:
        lines.append(f"failed     {_plainly(report.failure)}")
    return "\n".join(lines)
