"""``[extensions]``: what a listener offers follows from the file, and only what can be kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.build import rules
from gateway.config import Config, ConfigError
from gateway.message import Client
from gateway.smtp.extensions import Extensions

STRANGER = Client("192.0.2.1")
ALICE = Client("192.0.2.1", user="alice")


def made(folder: Path, *, acknowledge: str = "durable", bounces: bool = True, protocol: str = "submission", **asked: Any) -> Extensions:
    table: dict[str, Any] = {
        "hostname": "mx.example.net",
        "spool": {"path": str(folder)},
        "listeners": [{"address": "127.0.0.1:0", "protocol": protocol}],
        "sinks": {"box": {"type": "discard"}},
        "routes": [{"recipients": ["*@app.example"], "sink": "box", "acknowledge": acknowledge}],
        "extensions": asked,
        **({"bounces": {"sink": "box"}} if bounces else {}),
    }
    config = Config.parse(table)
    return rules(config, config.listeners[0], config.table(), ()).extensions


def names(extensions: Extensions, protocol: str = "submission", client: Client = STRANGER) -> list[str]:
    return [line.partition(" ")[0] for line in extensions.offered(protocol, client)]


def test_what_is_offered_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    extensions = made(tmp_path)
    assert names(extensions) == ["FUTURERELEASE", "DELIVERBY", "MT-PRIORITY"]
    assert extensions.offered("submission", STRANGER)[0].startswith(f"FUTURERELEASE {30 * 86400} 2")
    assert extensions.offered("submission", STRANGER)[1] == "DELIVERBY", "no minimum"
    assert names(extensions, "smtp") == names(extensions, "lmtp") == ["DELIVERBY", "MT-PRIORITY"]
    assert names(extensions, "smtp", ALICE) == ["FUTURERELEASE", "DELIVERBY", "MT-PRIORITY"]


def test_what_cannot_be_kept_is_not_offered(tmp_path: Path) -> None:
    assert "FUTURERELEASE" not in names(made(tmp_path, acknowledge="delivered")), "no route can hold"
    assert "DELIVERBY" not in names(made(tmp_path, bounces=False)), "nobody carries what comes back"


def test_what_is_off_is_not_offered(tmp_path: Path) -> None:
    assert names(made(tmp_path, hold_limit="0s", deliver_by="off", priorities="off")) == []
    assert made(tmp_path, hold_limit="90m", deliver_by="2m").offered("submission", STRANGER)[1] == "DELIVERBY 120"
    assert made(tmp_path, hold_limit="90m").hold == 5400


@pytest.mark.parametrize(
    ("asked", "fault"),
    [
        ({"hold_limit": "never"}, 'extensions.hold_limit: must be a duration like "250ms"'),
        ({"hold_limit": "20000w"}, "extensions.hold_limit: "),
        ({"deliver_by": "soon"}, 'extensions.deliver_by: must be a duration like "250ms"'),
        ({"deliver_by": -1}, "extensions.deliver_by: "),
        ({"priorities": "some"}, "extensions.priorities: "),
        ({"priorities_from": ["here"]}, "extensions.priorities_from[0]: "),
        ({"priorities": "everybody", "priorities_from": ["10.0.0.0/8"]}, 'extensions.priorities_from: is for priorities = "authenticated"'),
        ({"holdlimit": "1h"}, "extensions.holdlimit: unknown key"),
    ],
)
def test_faults_have_their_place(tmp_path: Path, asked: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as refused:
        made(tmp_path, **asked)
    [line] = refused.value.faults
    assert line.startswith(fault), line
