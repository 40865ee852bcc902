"""Do the tests have teeth? ``make mutants`` breaks the product on purpose, once a row, and sees it caught.

Each mutant is made in a copy of this checkout, by replacing a piece of the product's own source that
must be there exactly as often as is said (so a mutant that no longer fits is an error, not a pass). Then the ordinary,
unmodified tests of ``make test`` run in the copy: first the files in which the fault is expected to
show, then, if these pass, all of them. A mutant that survives is a hole in the tests.

Before all that the same files run in a copy that nothing was done to: there they must pass.

``python -m tests.mutants [NAME …]`` tries some of them; ``--fit`` only sees that each still has its place
(``make check``), and each fault that is planted under the sanitizers.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .fuzz.test_sanitizers import FAULTS as PLANTED

ROOT = Path(__file__).resolve().parents[1]
#: Seconds for the whole suite in one copy, on a machine that is slow.
PATIENCE = 3600


@dataclass(frozen=True)
class Mutant:
    """``edits``: file, what stands there, what it becomes; ``tests``: where it should be caught first."""

    name: str
    says: str
    tests: str
    edits: tuple[tuple[str, str, str], ...]


ENGINE, SQLITE, CONTENT, RECORDS = (f"gateway/spool/{name}.py" for name in ("engine", "sqlite", "content", "records"))
FAULTS, DAMAGE, SPOOL = "tests/crash/test_faults.py", "tests/crash/test_damage.py", "tests/unit/test_spool.py"

MUTANTS = (
    Mutant(
        "a1 no sync of commits",
        "SQLite is told not to sync the WAL",
        FAULTS,
        ((ENGINE, '"synchronous = FULL",\n            "fullfsync', '"synchronous = OFF",\n            "fullfsync'),),
    ),
    Mutant(
        "a2 no sync of content",
        "a large content's file is not synced before its row",
        FAULTS,
        ((CONTENT, "            self._files.fsync(self._descriptor)\n", ""),),
    ),
    Mutant(
        "a3 no sync of the folder",
        "the name of a large content's file is not synced before its row",
        FAULTS,
        ((CONTENT, "            self._files.fsync_dir(self._contents.folder)\n", ""),),
    ),
    Mutant(
        "a4 no proof after a failed sync",
        "451 is said after a commit that failed, and its frames stay in the WAL",
        FAULTS,
        ((ENGINE, "            self._prove_gone(error)\n", ""),),
    ),
    Mutant(
        "b reply before commit",
        "250 leaves when the group closes, before it is written",
        "tests/unit/test_intake.py",
        (
            (
                "gateway/intake.py",
                '        self._phase = "closed"\n        return rows\n',
                '        self._say(Reply.ok(f"accepted as {self.message.id}"))\n        self._phase = "closed"\n        return rows\n',
            ),
        ),
    ),
    Mutant(
        "c1 no checksum of content",
        "what is read from a row is carried without being summed",
        DAMAGE,
        (
            (
                RECORDS,
                ' or crc32(content) != content_sum:\n        raise DamagedError("the checksum of the content',
                ':\n        raise DamagedError("the checksum of the content',
            ),
        ),
    ),
    Mutant(
        "c2 no checksum of content files",
        "what is read from a file is carried without being summed",
        DAMAGE,
        ((CONTENT, "(total, found) == (size, sum_)", "total == size"),),
    ),
    Mutant(
        "c3 no checksum of recipients",
        "who gets it is believed as it is read",
        DAMAGE,
        ((RECORDS, "    if pending_sum(key, sink, part, recipients) != sum_:\n", "    if False:\n"),),
    ),
    Mutant(
        "c4 no checksum of the envelope",
        "what a message is said to be is believed as it is read",
        DAMAGE,
        ((RECORDS, "    if message_sum(key, id, meta, trace) != sum_:\n", "    if False:\n"),),
    ),
    Mutant(
        "d1 LF.CRLF ends DATA",
        "a dot line after a bare LF ends the content: SMTP smuggling",
        "tests/unit/test_transcripts.py tests/unit/test_parser.py",
        (
            (
                "gateway/_parser.pyx",
                "        if w.place == DOT_CR:\n            w.finished",
                "        if w.place == DOT_CR or w.place == BARE_DOT_CR:\n            w.finished",
            ),
        ),
    ),
    Mutant(
        "d2 CRLF.LF ends DATA",
        "a dot and a bare LF end the content: SMTP smuggling",
        "tests/unit/test_transcripts.py tests/unit/test_parser.py",
        (
            (
                "gateway/_parser.pyx",
                "    if w.place == DOT or w.place == BARE_DOT:\n",
                '    if w.place == DOT or w.place == BARE_DOT:\n        if c == c"\\n":\n            w.finished = True\n            return out\n',
            ),
        ),
    ),
    Mutant(
        "e1 STARTTLS buffer kept",
        "what was said in clear behind STARTTLS is obeyed inside TLS",
        "tests/unit/test_transcripts.py tests/unit/test_server.py tests/unit/test_listener_tls.py",
        (
            (
                "gateway/smtp/server.py",
                "    def _starttls(self, command: Command) -> None:\n        if not self._ends_group():\n            return\n",
                "    def _starttls(self, command: Command) -> None:\n",
            ),
            ("gateway/smtp/server.py", "        self._receiver.discard()\n        self._verbs", "        self._verbs"),
        ),
    ),
    Mutant(
        "e2 early octets not looked for",
        "what the kernel holds when STARTTLS is answered is taken for the handshake",
        "tests/unit/test_listener_tls.py",
        (("gateway/listener.py", "self.session.secure(self._early())", "self.session.secure(False)"),),
    ),
    Mutant(
        "f1 done marks dropped",
        "the spool says that a mark is durable and never writes it",
        SPOOL,
        (
            (
                SQLITE,
                "        self._marks.append(_Marked(mark, self._here.time(), change, splits))\n",
                "        if mark.synced is not None:\n            self._here.call_soon(mark.synced)\n",
            ),
        ),
    ),
    Mutant(
        "f2 rows of done marks kept",
        "a mark is written, but the row that it ends stays",
        SPOOL,
        (
            (
                ENGINE,
                "            self._at.execute(_DELETE_PENDINGS, (orjson.dumps(gone).decode(),))\n            self._settle",
                "            self._settle",
            ),
        ),
    ),
    Mutant(
        "g the lock removed",
        "two processes open one shard",
        SPOOL,
        (
            (ENGINE, "if not self._files.lock(lock):", "if self._files.lock(lock) is None:"),
            (ENGINE, '        self._pragma("locking_mode = EXCLUSIVE")\n', ""),
        ),
    ),
)


def misfits() -> list[str]:
    """Mutants, and faults planted under the sanitizers, whose place is not there, or more than once."""
    places = [(mutant.name, name, before) for mutant in MUTANTS for name, before, _ in mutant.edits]
    places += [(name, "gateway/_parser.pyx", fault.right) for name, fault in PLANTED.items()]
    return [
        f"{what}: {count} times in {name}: {before!r}"
        for what, name, before in places
        if (count := (ROOT / name).read_text().count(before)) != 1
    ]


def copy(target: Path) -> None:
    """What git knows of this checkout as it lies here, and the parser that was compiled from it. The rules run as they stand."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True
    ).stdout
    names = [name for name in listed.decode().split("\0") if name] + [
        str(path.relative_to(ROOT)) for path in ROOT.glob("gateway/_parser*.so")
    ]
    for name in names:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    modules = ROOT / "tests/integration/node/node_modules"
    if modules.is_dir():
        (target / "tests/integration/node/node_modules").symlink_to(modules)


def edit(target: Path, mutant: Mutant) -> None:
    for name, before, after in mutant.edits:
        path = target / name
        path.write_text(path.read_text().replace(before, after))
    if any(name.endswith(".pyx") for name, *_ in mutant.edits):
        for old in target.glob("gateway/_parser*.so"):
            old.unlink()
        subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=target,
            env={**os.environ, "GATEWAY_PURE": "1"},
            check=True,
            capture_output=True,
        )


def run(target: Path, *tests: str) -> tuple[str | None, str]:
    """The first test that fails, None where all pass; and what pytest said."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:benchmark", "-p", "no:cacheprovider", "-m", "not long", "-rfE", *tests]
    if not tests:
        command += ["-n", "2"]
    done = subprocess.run(
        command,
        cwd=target,
        env={**os.environ, "PYTHONPATH": str(target), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode == 0:
        return None, done.stdout
    return found[1] if found else "", done.stdout + done.stderr


def main() -> int:
    if odd := misfits():
        print("\n".join(odd), file=sys.stderr)
        return 2
    if sys.argv[1:] == ["--fit"]:
        return 0
    wanted = [mutant for mutant in MUTANTS if not sys.argv[1:] or mutant.name.split()[0] in sys.argv[1:]]
    if not wanted:
        print(f"no such mutant; there are {', '.join(mutant.name.split()[0] for mutant in MUTANTS)}", file=sys.stderr)
        return 2
    survived = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        sound = Path(folder, "sound")
        copy(sound)
        files = sorted({file for mutant in wanted for file in mutant.tests.split()})
        failed, told = run(sound, *files)
        if failed is not None:
            print(f"{told}\nthe tests fail where nothing was changed: {failed}", file=sys.stderr)
            return 1
        print(f"{'mutant':32} {'s':>4}  caught by", flush=True)
        for mutant in wanted:
            started = time.monotonic()
            target = Path(folder, mutant.name.split()[0])
            copy(target)
            edit(target, mutant)
            caught, told = run(target, *mutant.tests.split())
            if caught is None:
                caught, told = run(target)
            if caught == "":
                print(told, file=sys.stderr)
            survived += not caught
            print(f"{mutant.name:32} {time.monotonic() - started:4.0f}  {caught or 'NOTHING: it survived'}", flush=True)
            shutil.rmtree(target)
    print(f"{len(wanted) - survived} of {len(wanted)} mutants were caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
