"""What a service manager is told about this process (sd_notify(3), ``Type=notify``).

One datagram a word, to the socket that NOTIFY_SOCKET names; without one nothing happens. A manager
that does not listen is no fault of ours: nothing is raised and nothing waits.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress


def notify(*words: str, environment: Mapping[str, str] | None = None) -> bool:
    """Say ``READY=1``, ``STOPPING=1``, ``STATUS=…``. True if the manager has it."""
    path = (os.environ if environment is None else environment).get("NOTIFY_SOCKET", "")
    if path[:1] not in ("/", "@"):
        return False
    # "@" is how the abstract namespace is written.
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, suppress(OSError):
        sock.setblocking(False)
        sock.sendto("\n".join(words).encode(), address)
        return True
    return False


def ready() -> None:
    notify("READY=1", "STATUS=taking mail")


def reloading() -> None:
    """``ready`` must follow (``Type=notify-reload`` wants the time)."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping() -> None:
    notify("STOPPING=1", "STATUS=draining")
