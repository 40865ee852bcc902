"""What senders ask of the queue, on real sockets and a real disk: Python's smtplib, the gateway as a process, upstreams that
offer DELIVERBY and MT-PRIORITY or do not."""

from __future__ import annotations

import json
import re
import smtplib
import subprocess
import sys
import time
from datetime import UTC, datetime
from typing import Any

from ..conftest import Start
from ..servers import EVERYTHING, PATIENCE, ROOT, GatewayProcess, Upstream, wait_until

CONFIG = """
hostname = "mx.gateway.example"

[[listeners]]
address = "127.0.0.1:0"
protocol = "submission"

[extensions]
hold_limit = "1h"
priorities_from = ["127.0.0.0/8"]

[retry]
delays = ["1s"]

[sinks.out]
type = "relay"
hosts = ["{out}"]
tls = "off"
concurrency = 1

[sinks.home]
type = "relay"
hosts = ["{home}"]
tls = "off"

[bounces]
sink = "home"

[[routes]]
recipients = ["*@away.example"]
sink = "out"
"""


def send(port: int, recipient: str, *options: str, sender: str = "a@client.example") -> None:
    with smtplib.SMTP("127.0.0.1", port, local_hostname="client.example", timeout=PATIENCE) as client:
        client.sendmail(sender, [recipient], b"Subject: x\r\n\r\nhello\r\n", mail_options=options)


def rows(gateway: GatewayProcess) -> list[dict[str, Any]]:
    told = subprocess.run(
        [sys.executable, "-m", "gateway", "queue", "list", "--config", str(gateway.config), "--json"],
        capture_output=True,
        check=True,
        cwd=ROOT,
        timeout=PATIENCE,
    )
    found: list[dict[str, Any]] = json.loads(told.stdout)
    return found


def change(gateway: GatewayProcess, *words: str) -> str:
    command = [sys.executable, "-m", "gateway", "queue", *words, "--config", str(gateway.config)]
    return subprocess.run(command, capture_output=True, check=True, cwd=ROOT, timeout=PATIENCE, text=True).stdout


def test_a_hold_outlives_a_restart_and_ends_on_time(gateway: Start) -> None:
    with Upstream() as out:
        process = gateway(CONFIG.format(out=out.address, home=out.address))
        with smtplib.SMTP("127.0.0.1", process.port, timeout=PATIENCE) as client:
            client.ehlo()
            interval, until = client.esmtp_features["futurerelease"].split()
            assert interval == "3600"
            assert 3500 < (datetime.fromisoformat(until) - datetime.now(UTC)).total_seconds() <= 3600
            assert "deliverby" in client.esmtp_features
            assert "mt-priority" in client.esmtp_features
        send(process.port, "for@away.example", "HOLDFOR=3000")
        for seconds in (5, 20, 60):
            # Longer where this machine needs longer than that for all that has to happen while it is held.
            release = int(time.time()) + seconds
            send(process.port, f"until{seconds}@away.example", f"HOLDUNTIL={datetime.fromtimestamp(release, UTC):%Y-%m-%dT%H:%M:%SZ}")
            # Killed, not drained: what was acknowledged is on the disk.
            process.kill()
            process.start()
            held = {row["recipients"][0]: row for row in rows(process)}
            changed = change(process, "retry", "--sink", "out")
            if time.time() < release:
                break
        assert held["for@away.example"]["attempts"] == held[f"until{seconds}@away.example"]["attempts"] == 0
        assert held["for@away.example"]["due"] == held["for@away.example"]["not_before"] > time.time() + 2000
        assert changed.startswith("0 changed"), "what is held is not what a whole sink owes"

        def came(name: str) -> bool:
            return any(each.recipients == [f"<{name}@away.example>"] for each in out.taken)

        wait_until(lambda: came(f"until{seconds}"), "the hold is over", seconds + PATIENCE)
        tried = process.event("attempted", id=held[f"until{seconds}@away.example"]["message_id"])
        assert datetime.fromisoformat(tried["time"]).timestamp() >= release
        assert not came("for")
        assert not any("HOLD" in each.mail for each in out.taken), "a hold that is over is nobody else's"
        # A person may send it earlier, by its name.
        change(process, "retry", held["for@away.example"]["message_id"])
        wait_until(lambda: came("for"), "it goes earlier")


def test_an_outage_ends_and_the_backlog_goes_by_priority(gateway: Start) -> None:
    # It listens, and until it is entered nobody answers: a try that was begun lasts as long as is wanted here.
    out = Upstream([*EVERYTHING, "MT-PRIORITY"])
    process = gateway(CONFIG.format(out=out.address, home="127.0.0.1:9"))
    wishes = [0, 3, -2, 9, 0, 6]
    for number, wish in enumerate(wishes):
        send(process.port, f"p{number}@away.example", *([f"MT-PRIORITY={wish}"] if wish else []))
        if not number:
            first = out.accept()
    # None of the others was tried so far: there is place for one.
    first.close()
    process.event("sink_down", sink="out")
    with out:
        taken = out.wait(len(wishes))
        order = [each.recipients[0].strip("<>").partition("@")[0] for each in taken]
        # The first of them all waits for the sink; it goes once that is known to be back.
        assert [name for name in order if name != "p0"] == ["p3", "p5", "p1", "p4", "p2"]
        said = {each.recipients[0].strip("<>").partition("@")[0]: each.mail for each in taken}
        assert "MT-PRIORITY=9" in said["p3"]
        assert "MT-PRIORITY=-2" in said["p2"]
        assert "MT-PRIORITY" not in said["p4"]
        assert b"\r\n\tPRIORITY 9;" in next(each.content for each in taken if each.recipients == ["<p3@away.example>"])
        assert [event["priority"] for event in process.found("accepted") if "priority" in event] == [3, -2, 9, 6]


def test_a_time_to_deliver_by_is_handed_on_or_comes_back(gateway: Start) -> None:
    with Upstream([*EVERYTHING, "DELIVERBY 30"]) as out, Upstream() as home:
        process = gateway(CONFIG.format(out=out.address, home=home.address))
        send(process.port, "in-time@away.example", "BY=600;RT", "RET=HDRS")
        [taken] = out.wait(1)
        assert (left := re.search(r" BY=(\d+);RT", taken.mail)), taken.mail
        # Less what it took to come by here.
        assert 600 - PATIENCE < int(left[1]) <= 600
        [relayed] = home.wait(1)
        assert b"Action: relayed" in relayed.content
        send(process.port, "too-short@away.example", "BY=20;R")
        report = home.wait(2)[1].content
        assert b"Action: failed" in report
        assert b"Status: 5.4.7" in report
        assert b"Deliver-By-Date: " in report
        out.offers = EVERYTHING
        send(process.port, "unknown@away.example", "BY=600;R", sender="b@client.example")
        # The connection that knows DELIVERBY is warm: this one still goes by it.
        assert len(out.wait(2)) == 2
    with Upstream() as plain, Upstream() as home:
        process = gateway(CONFIG.format(out=plain.address, home=home.address))
        send(process.port, "r@away.example", "BY=600;R")
        report = home.wait(1)[0].content
        assert b"Status: 5.4.7" in report
        assert plain.taken == []
        send(process.port, "n@away.example", "BY=600;N")
        assert "BY=" not in plain.wait(1)[0].mail
        assert b"Action: relayed" in home.wait(2)[1].content
