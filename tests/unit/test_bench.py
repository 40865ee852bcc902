"""``gateway bench``: its corpora, its answers, its order of runs, and what it prints."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gateway._parser import Receiver, stuff
from gateway.cli import cli
from gateway.tools.bench import ROUNDS, Report, run
from gateway.tools.bench.corpora import Corpus, envelopes, mails, own
from gateway.tools.bench.implementations import BrokenError, Gateway, Implementation, StandardLibrary, Work
from gateway.tools.bench.peers import Aiosmtpd, Child, Node
from gateway.tools.bench.report import as_json, bar, figure, page, table
from gateway.tools.bench.tasks import KINDS, Task, difference, tasks

from ..servers import ROOT, program

NODE_MODULES = ROOT / "tests" / "integration" / "node" / "node_modules"
EVERY = list(tasks([*envelopes(), *mails()]))

MAIL = b"From: Ann <ann@example.org>\r\nTo: bob@example.net, =?utf-8?q?C=C3=A9cile?= <cecile@example.net>\r\nSubject: one's own\r\n\r\n.dotted\r\n"


def bench(*arguments: str | Path, code: int = 0, environment: dict[str, str | None] | None = None) -> Result:
    result = CliRunner(env=environment).invoke(cli, ["bench", *map(str, arguments)], prog_name="gateway")
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def alone(tmp_path: Path) -> dict[str, str | None]:
    """An environment without programs and Node packages."""
    return {"PATH": str(tmp_path), "NODE_PATH": None}


# ------------------------------------------------------------------------------- corpora


def test_the_corpora_are_the_same_everywhere() -> None:
    digest = hashlib.sha256()
    for corpus in [*envelopes(), *mails()]:
        for octets in (*corpus.contents, *(line for envelope in corpus.envelopes for line in envelope)):
            digest.update(octets)
    assert digest.hexdigest() == "098f0e6b1493e30f24e38cca6541f8783b9cb940a7417084770d4fe82714c183"


@pytest.mark.parametrize("corpus", mails(), ids=lambda corpus: corpus.name)
def test_the_corpora_are_content_that_data_can_carry(corpus: Corpus) -> None:
    for content in corpus.contents:
        receiver = Receiver()
        receiver.begin()
        receiver.feed(stuff(content) + b".\r\n")
        pieces = []
        while (piece := receiver.content()) is not None:
            pieces.append(piece)
        assert receiver.finished
        assert receiver.content_fault is None
        assert b"".join(pieces) == content


def test_every_line_of_dotted_is_dotted() -> None:
    (content,) = next(corpus for corpus in mails() if corpus.name == "dotted").contents
    body = content.partition(b"\r\n\r\n")[2]
    assert len(content) > 60_000
    assert all(line.startswith(b".") for line in body.split(b"\r\n")[:-1])


def test_own_mail_is_taken_as_smtp_would_carry_it(tmp_path: Path) -> None:
    good, unix = tmp_path / "good.eml", tmp_path / "unix.eml"
    good.write_bytes(MAIL)
    unix.write_bytes(MAIL.replace(b"\r\n", b"\n").rstrip(b"\n"))
    found = own([good, unix])
    assert found.corpus.contents == [MAIL, MAIL]
    assert found.notes == ["1 of 2 files: line ends made CRLF, as SMTP carries them"]
    assert found.corpus.envelopes[0] == [
        b"MAIL FROM:<ann@example.org> SIZE=%d" % len(MAIL),
        b"RCPT TO:<bob@example.net>",
        b"RCPT TO:<cecile@example.net>",
    ]


def test_own_mail_that_cannot_be_carried_is_left_out(tmp_path: Path) -> None:
    octets = {"empty": b" \n", "nul": b"a: b\r\n\r\n\0\r\n", "cr": b"a: b\r\n\r\na\rb\r\n", "good": MAIL}
    for name, content in octets.items():
        (tmp_path / name).write_bytes(content)
    found = own([tmp_path / name for name in (*octets, "missing")])
    assert found.corpus.contents == [MAIL]
    assert [note.removeprefix(str(tmp_path)) for note in found.notes] == [
        "/empty: left out, it is empty",
        "/nul: left out, it holds a NUL",
        "/cr: left out, it holds a CR without LF",
        "/missing: left out, No such file or directory",
    ]
    with pytest.raises(ValueError, match="it holds a NUL"):
        own([tmp_path / "nul"])


def test_own_mail_is_bounded(tmp_path: Path) -> None:
    third, most = 2**20, 3 * 2**20
    for name, size in (("a", third), ("b", third), ("c", third), ("d", third), ("huge", most + 1)):
        (tmp_path / name).write_bytes(b"a: b\r\n\r\n" + b"x" * (size - 10) + b"\r\n")
    found = own(sorted(tmp_path.iterdir()), most)
    assert [len(content) for content in found.corpus.contents] == [third] * 3
    assert found.notes[0].endswith("huge: left out, it has more than 3 MiB")
    assert found.notes[1] == "3 of 4 mails are measured, drawn by a fixed seed: 3 MiB at most"


@pytest.mark.parametrize(
    "header",
    [
        b"From: \xff\xfe <a@b\xff>\r\nTo: ,,,<>;:\r\n",
        b"From: " + b"(" * 2000 + b"\r\n",
        b"To: " + b"a@b.example, " * 5000 + b"\r\n",
        b"\xff" * 70000,
    ],
)
def test_a_broken_header_still_gives_an_envelope(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "broken.eml"
    path.write_bytes(header + b"\r\nx\r\n")
    corpus = own([path]).corpus
    assert 2 <= len(corpus.envelopes[0]) <= 101
    (task,) = (task for task in tasks([corpus]) if task.kind == "commands")
    receiver = Receiver()
    receiver.feed(task.wire)
    while (command := receiver.command()) is not None:
        assert command.fault is None


# ------------------------------------------------------------------------------- answers


def test_there_is_a_task_of_every_kind() -> None:
    assert tuple(dict.fromkeys(task.kind for task in EVERY)) == KINDS
    assert len({task.id for task in EVERY}) == len(EVERY)


def answer(implementation: Implementation, task: Task) -> Any:
    work = implementation.work(task)
    assert work is not None
    try:
        return work.answer()
    finally:
        work.close()


@pytest.mark.parametrize("task", [task for task in EVERY if task.kind == "dialogue"], ids=lambda task: task.id)
def test_our_dialogues_carry_the_corpus(task: Task) -> None:
    corpus = next(corpus for corpus in mails() if task.name.startswith(corpus.name))
    found = answer(Gateway(), task)
    assert [mail["sha256"] for mail in found["mails"]] == [hashlib.sha256(content).hexdigest() for content in corpus.contents]
    assert found["mails"][0]["to"] == ["recipient0@dest.example.com"]
    assert found["replies"] == [250, 250, 354, 250] * len(corpus.contents)


@pytest.mark.parametrize("kind", [StandardLibrary, Aiosmtpd])
@pytest.mark.parametrize("task", EVERY, ids=lambda task: task.id)
def test_peers_of_this_process_answer_as_we_do(kind: Callable[[], Implementation], task: Task) -> None:
    peer = kind()
    if (peer.name == "standard library" and task.kind == "dialogue") or (peer.name == "aiosmtpd" and task.kind == "mime"):
        assert peer.work(task) is None
    elif peer.name == "aiosmtpd" and task.id == "content: pathological, reads of 64 KiB":
        with pytest.raises(BrokenError, match="refuses it with 500"):  # a line of 32 KiB
            answer(peer, task)
    else:
        assert difference(answer(Gateway(), task), answer(peer, task)) is None


def test_nodes_smtp_server_answers_as_we_do(monkeypatch: pytest.MonkeyPatch) -> None:
    if program("node") is None or not (NODE_MODULES / "smtp-server").is_dir():
        pytest.skip("smtp-server is not installed (make node)")
    monkeypatch.setenv("NODE_PATH", str(NODE_MODULES))
    peer = Node()
    try:
        assert re.fullmatch(r"\d+\.\d+\.\d+, node \d+\.\d+\.\d+", peer.version)
        for task in EVERY:
            if task.kind == "mime":
                assert peer.work(task) is None
            else:
                work = peer.work(task)
                assert work is not None
                assert difference(answer(Gateway(), task), work.answer()) is None, task.id
                assert 0 < work.seconds(0.001) < 5
    finally:
        peer.close()


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ([1, 2], [1, 2], None),
        ((1, {"a": None}), [1, {"a": None}], None),
        ([{"octets": 10}], [{"octets": 9}], "1 octets: 9 instead of 10"),
        ([1], [1, 2], "has 2 instead of 1"),
        ({"mails": [1, 2]}, {"mails": []}, "mails has 0 instead of 2"),
        ({"a": 1}, {"b": 1}, "a: only ours"),
        ({}, {"b": 1}, "b: only theirs"),
        ("ü", "\x1b" * 100, "'\\x1b\\x1b\\x1b\\x1b\\x1b\\x1b\\x1b\\x1b\\x1b… instead of '\\xfc'"),
    ],
)
def test_difference(ours: Any, theirs: Any, said: str | None) -> None:
    found = difference(ours, theirs)
    assert found == said or (said is not None and found is not None and found.strip(": ") == said)


# ------------------------------------------------------------------------------ the runs


class Planted(Implementation):
    """A peer whose answer and speed the test says."""

    version = "1"
    notes = {"": "planted"}  # noqa: RUF012 - never changed

    def __init__(self, name: str, told: Callable[[Any], Any], order: list[str], takes: float = 0.001) -> None:
        self.name = name
        self.told, self.order, self.takes = told, order, takes

    def work(self, task: Task) -> Work:
        peer = self

        class Told(Work):
            def answer(self) -> Any:
                return peer.told(answer(Gateway(), task))

            def seconds(self, least: float) -> float:
                peer.order.append(peer.name)
                return peer.takes

            def close(self) -> None:
                peer.order.append(f"{peer.name} closed")

        return Told()


def broken(_: Any) -> Any:
    raise BrokenError("refuses it with 500")


def planted(told: Callable[[Any], Any], only: str = "content: base64", order: list[str] | None = None) -> Report:
    order = [] if order is None else order
    present = [Planted("ours", lambda found: found, order), Planted("peer", told, order, takes=0.004)]
    return run(mails(), present, {"gone": "why it is not here"}, only=[only], seconds=0.01, notes=["a note"])


def test_runs_alternate_and_are_closed() -> None:
    order: list[str] = []
    planted(lambda found: found, order=order)
    assert order == [*["ours", "peer", "peer", "ours"] * (ROUNDS // 2), "ours", "peer", "ours closed", "peer closed"]


def test_who_answers_the_same_is_compared() -> None:
    report = planted(lambda found: found)
    ((ours, peer),) = (row.results for row in report.rows)
    assert report.rows[0].ratio(peer) == pytest.approx(4)
    assert report.rows[0].ratio(ours) is None
    assert ours.median == pytest.approx(report.rows[0].task.amount / 0.001)


def test_who_answers_otherwise_is_shown_but_not_compared() -> None:
    report = planted(lambda found: [{**found[0], "octets": 3}])
    peer = report.rows[0].results[1]
    assert peer.median > 0
    assert report.rows[0].ratio(peer) is None
    assert re.search(r"^  peer .* differs \[1\]$", text := "\n".join(table(report)), re.MULTILINE)
    assert "[1] peer, content: base64, reads of 64 KiB: another answer than the gateway's: 1 octets: 3 instead of 65462" in text


def test_a_known_reason_for_other_content_is_told() -> None:
    report = planted(lambda found: [{**found[0], "octets": 3}])
    report.implementations[1].otherwise = "it gives LF"
    assert "1 octets: 3 instead of 65462 (it gives LF)" in "\n".join(table(report))
    # Only of content: replies that are others have another reason.
    report = planted(lambda found: {**found, "replies": [250]}, "dialogue: short, lock-step")
    report.implementations[1].otherwise = "it gives LF"
    assert "it gives LF" not in "\n".join(table(report))


@pytest.mark.parametrize(
    ("told", "only", "said"),
    [
        (broken, "content: base64", "refuses [1]"),
        (lambda found: {**found, "replies": [250]}, "dialogue: short, lock-step", "differs [1]"),
    ],
)
def test_who_does_something_else_is_not_measured(told: Callable[[Any], Any], only: str, said: str) -> None:
    order: list[str] = []
    report = planted(told, only, order)
    assert report.rows[0].results[1].median == 0
    assert "peer" not in order
    assert said in "\n".join(table(report))


def test_a_faulty_gateway_is_told_too() -> None:
    present = [Planted("ours", broken, []), Planted("peer", lambda found: found, [])]
    report = run(mails(), present, {}, only=["content: base64"], seconds=0.01)
    ours, peer = report.rows[0].results
    assert (ours.broken, peer.differs, report.rows[0].ratio(peer)) == ("refuses it with 500", None, None)


def test_the_table_names_who_is_not_here_and_what_each_does() -> None:
    text = "\n".join(table(planted(lambda found: found)))
    assert "  gone: not here: why it is not here" in text
    assert "  peer: planted" in text
    assert "note: a note" in text


def test_a_name_cannot_steer_the_terminal() -> None:
    report = planted(lambda found: found)
    report.notes = ["\x1b[2Jmail.eml: left out"]
    report.absent = {"gone": "\x1b]0;title\x07"}
    for text in ("\n".join(table(report)), page(report)):
        assert "\x1b" not in text
        assert "\x07" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1250.4, "1,250"), (99.94, "99.9"), (3.409, "3.41"), (0.158, "0.158"), (0.0206, "0.0206"), (0.00043, "0.00043")],
)
def test_figures(value: float, text: str) -> None:
    assert figure(value) == text


def test_bars() -> None:
    assert bar(1, 4) == "████"
    assert bar(0.5, 4) == "██"
    assert bar(0.55, 4) == "██▎"
    assert bar(0.0001, 4) == "▏"


# ---------------------------------------------------------------------- a child process


def child(source: str, patience: float = 20.0) -> Child:
    return Child(
        [sys.executable, "-u", "-c", f"import json, sys\nfor line in sys.stdin:\n    asked = json.loads(line)\n    {source}"], patience
    )


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("print(json.dumps({'broken': 'no such kind'}))", "no such kind"),
        ("raise ValueError('cannot')", "ValueError: cannot"),
        ("sys.exit(3)", "its process ended with 3"),
    ],
)
def test_a_child_that_fails_says_why(source: str, why: str) -> None:
    asked = child(source)
    try:
        with pytest.raises(BrokenError, match=re.escape(why)):
            asked.ask({"answer": True})
    finally:
        asked.close()


def test_a_child_that_says_nothing_is_given_up() -> None:
    asked = child("import time; time.sleep(60)", patience=0.5)
    try:
        with pytest.raises(BrokenError, match="ended with -9"):
            asked.ask({"answer": True})
        with pytest.raises(BrokenError, match="ended with -9"):
            asked.ask({"answer": True})
    finally:
        asked.close()


def test_a_large_question_gets_its_large_answer() -> None:
    asked = child("print(json.dumps({'answer': asked['text']}))")
    try:
        assert asked.ask({"text": "x" * 3_000_000})["answer"] == "x" * 3_000_000
    finally:
        asked.close()


# --------------------------------------------------------------------------- the command


def test_json(alone: dict[str, str | None]) -> None:
    told = json.loads(bench("--seconds", "0.005", "--only", "short", "--json", environment=alone).stdout)
    assert told["format"] == 1
    assert (told["seconds"], told["rounds"]) == (0.005, 5)
    assert [row["kind"] for row in told["rows"]] == ["content", "dialogue", "dialogue", "mime"]
    row = told["rows"][1]
    assert (row["name"], row["unit"]) == ("short, lock-step", "k mails/s")
    ours, peer = row["results"][:2]
    assert set(ours) == {"implementation", "median", "low", "high", "ratio", "differs", "failed"}
    assert (ours["implementation"], ours["ratio"], peer["implementation"]) == ("gateway", None, "aiosmtpd")
    assert 0 < ours["low"] <= ours["median"] <= ours["high"]
    assert peer["ratio"] == pytest.approx(ours["median"] / peer["median"])
    assert (peer["differs"], peer["failed"]) == (None, None)


def test_peers_that_are_absent_say_why(alone: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    # None in sys.modules is what Python has for a module that must not be imported.
    monkeypatch.setitem(sys.modules, "aiosmtpd.smtp", None)
    monkeypatch.setitem(sys.modules, "slimta.smtp.server", None)
    told = json.loads(bench("--seconds", "0.005", "--only", "plain", "--json", environment=alone).stdout)
    why = {one["name"]: one["why"] for one in told["implementations"] if not one["present"]}
    assert set(why) == {"aiosmtpd", "python-slimta", "smtp-server (Node)", "go-smtp"}
    assert why["aiosmtpd"].startswith("ModuleNotFoundError: ")
    assert (why["smtp-server (Node)"], why["go-smtp"]) == ("there is no node", "there is no go")
    assert [result["implementation"] for result in told["rows"][0]["results"]] == ["gateway", "standard library"]
    assert "  go-smtp: not here: there is no go\n" in bench("--seconds", "0.005", "--only", "plain", environment=alone).stdout


def test_node_without_the_package_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = program("node")
    if node is None:
        pytest.skip("node is not installed")
    (tmp_path / "node").symlink_to(node)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("NODE_PATH", raising=False)
    monkeypatch.chdir(tmp_path)
    told = json.loads(bench("--seconds", "0.005", "--only", "plain", "--json").stdout)
    (why,) = (one["why"] for one in told["implementations"] if one["name"] == "smtp-server (Node)")
    assert "Cannot find module 'smtp-server'" in why
    assert why.endswith("(looked for from this folder and in NODE_PATH)")


def test_own_mails_and_a_chart(tmp_path: Path, alone: dict[str, str | None]) -> None:
    (tmp_path / "good.eml").write_bytes(MAIL)
    (tmp_path / "garbage.eml").write_bytes(bytes(octet for octet in range(256) if octet not in b"\0\r") * 20)
    (tmp_path / "nul.eml").write_bytes(b"\0")
    files = [tmp_path / name for name in ("good.eml", "garbage.eml", "nul.eml")]
    text = bench(*files, "--seconds", "0.005", "--chart", environment={**alone, "COLUMNS": "120"}).stdout
    assert f"note: {tmp_path}/nul.eml: left out, it holds a NUL" in text
    for name in ("MAIL and RCPT, your mail", "your mail, reads of 1,460 octets", "your mail, pipelined", "your mail, MB/s"):
        assert name in text
    assert max(map(len, re.findall("█+", text))) == 40
    assert "█" not in bench(files[0], "--seconds", "0.005", "--only", "mime", environment=alone).stdout


def test_no_mail_that_can_be_carried(tmp_path: Path) -> None:
    path = tmp_path / "nul.eml"
    path.write_bytes(b"\0")
    assert bench(path, code=1).stderr == f"{path}: left out, it holds a NUL\n"


def test_nothing_is_called_so(alone: dict[str, str | None]) -> None:
    lines = bench("--only", "nonsense", code=2, environment=alone).stderr.splitlines()
    at = lines.index("Error: no task has 'nonsense' in its name; there are:")
    assert lines[at + 1] == "  commands: MAIL and RCPT, plain"
    assert lines[-1] == "  mime: pathological"


def test_nothing_of_own_mail_is_called_so(tmp_path: Path, alone: dict[str, str | None]) -> None:
    path = tmp_path / "a.eml"
    path.write_bytes(b"Subject: a\n\nb\n")
    lines = bench("--only", "short", path, code=2, environment=alone).stderr.splitlines()
    at = lines.index("Error: no task has 'short' in its name; there are:")
    assert lines[at + 1 :]
    assert all("your mail" in line for line in lines[at + 1 :])


class Addresses(HTMLParser):
    """What a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [f"{tag} {name}" for name, _ in attributes if name in ("src", "href", "xlink:href", "data", "srcset", "action")]


def test_the_page_is_whole_by_itself(tmp_path: Path, alone: dict[str, str | None]) -> None:
    path = tmp_path / "report.html"
    bench("--seconds", "0.005", "--only", "short", "--html", path, environment=alone)
    text = path.read_text()
    seen = Addresses()
    seen.feed(text)
    assert seen.found == []
    assert {"script", "link", "img", "iframe"}.isdisjoint(seen.tags)
    assert not re.search(r"https?:|url\(|@import", text)
    assert seen.tags.count("svg") == 4
    assert "there is no node" in text


def test_the_page_escapes_what_is_not_ours() -> None:
    report = planted(lambda found: [{**found[0], "octets": "<script>"}])
    assert "<script>" not in page(report)
    assert "&lt;script&gt;" in page(report)
    assert as_json(report)["rows"][0]["results"][1]["differs"] is not None


@pytest.mark.long
def test_the_suites_of_make_bench_run() -> None:
    """Each once, unmeasured: their answers are asserted there."""
    command = [sys.executable, "-m", "pytest", "-q", "bench", "--benchmark-disable", "-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^\d{2,} passed", result.stdout, re.MULTILINE)


@pytest.mark.long
def test_go_smtp_is_measured_or_the_table_says_why() -> None:
    """Where go can build it, it must be compared; a machine without it is none to fail on."""
    told = json.loads(bench("--seconds", "0.01", "--only", "short, ", "--json").stdout)
    (peer,) = (one for one in told["implementations"] if one["name"] == "go-smtp")
    if not peer["present"]:
        assert peer["why"]
        return
    for row in told["rows"]:
        if row["kind"] != "mime":
            (found,) = (result for result in row["results"] if result["implementation"] == "go-smtp")
            assert found["failed"] is None
            assert found["median"] > 0
