"""Fixtures that start real servers, and what holds for every test.

Under ``CI=true`` a skipped test is a failed one: the machine there has everything."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from .servers import GatewayProcess, HttpReceiver, Postfix, SmtpSink, Upstream, program, smtp_sink

# How long an example takes says nothing on a busy machine.
settings.register_profile("gateway", deadline=None, print_blob=True)
settings.load_profile("gateway")

CI = os.environ.get("CI", "").lower() in ("true", "1", "yes")


def pytest_configure(config: pytest.Config) -> None:
    if sys.version_info >= (3, 12):
        # mypyc 2.4's own runtime throws into what is awaited with three arguments; no line of ours can change that.
        config.addinivalue_line("filterwarnings", r"ignore:the \(type, exc, tb\) signature of throw:DeprecationWarning")


def _skip_is_failure(report: Any) -> None:
    if CI and report.outcome == "skipped" and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{reason}\nUnder CI=true every test must run."


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _skip_is_failure(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _skip_is_failure(report)
    return report


Start = Callable[..., GatewayProcess]


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Start]:
    """``gateway(config, *arguments, environment=…)`` runs one with this TOML and returns once it is
    ready. At the end each must have ended cleanly and have called nothing a bug."""
    with ExitStack() as stack:
        count = 0

        def start(config: str, *arguments: str, environment: dict[str, str] | None = None) -> GatewayProcess:
            nonlocal count
            count += 1
            process = GatewayProcess(tmp_path / f"gateway-{count}", config, arguments, environment)
            stack.push(process.__exit__)
            return process.start()

        yield start


@pytest.fixture
def webhook() -> Iterator[HttpReceiver]:
    """Records what is posted to ``webhook.url``."""
    with HttpReceiver() as receiver:
        yield receiver


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    """An SMTP server at ``upstream.address`` that keeps every octet and offers everything."""
    with Upstream() as server:
        yield server


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[SmtpSink]:
    """Postfix's smtp-sink."""
    if program("smtp-sink") is None:
        pytest.skip("smtp-sink is not installed")
    with smtp_sink(tmp_path / "smtp-sink") as server:
        yield server


@pytest.fixture
def postfix_to() -> Iterator[Callable[..., Postfix]]:
    """``postfix_to(port)`` runs a Postfix that passes everything on to that port."""
    if reason := Postfix.missing():
        pytest.skip(reason)
    with ExitStack() as stack:
        yield lambda port, settings="": stack.enter_context(Postfix(port, settings))
