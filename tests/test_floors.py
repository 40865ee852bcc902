"""A file imports only from lower floors (DESIGN §4). One dict says which floor is where."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "gateway"

#: Longest matching prefix wins: (floor, name of the floor).
FLOORS: dict[str, tuple[int, str]] = {
    "_parser": (0, "bytes"),
    "reply": (1, "words"),
    "message": (1, "words"),
    "route": (1, "words"),
    "contracts": (1, "words"),
    "passwords": (1, "words"),
    "senders": (1, "words"),
    "config": (1, "words"),
    "observe": (1, "words"),
    "sayable": (1, "words"),
    "smtp": (2, "rules"),
    "mime": (2, "rules"),
    "net": (3, "means"),
    "exposition": (3, "means"),
    "listener": (4, "world"),
    "spool": (4, "world"),
    "sinks": (4, "world"),
    "checks": (4, "world"),
    "users": (4, "world"),
    "queue": (5, "time"),
    "intake": (6, "one message"),
    "shards": (7, "whole"),
    "build": (7, "whole"),
    "reload": (7, "whole"),
    "app": (7, "whole"),
    "supervisor": (7, "whole"),
    "admin": (7, "whole"),
    "cli": (8, "door"),
    "tools": (8, "door"),
    "__init__": (9, "package"),
    "__main__": (9, "package"),
}

#: Inside the words, in the order of use; elsewhere inside a floor only within one part.
WORDS = ["reply", "message", "passwords", "route", "senders", "contracts"]

#: What a floor may not import, whatever it is for.
FORBIDDEN: dict[str, set[str]] = {
    "bytes": {"asyncio", "logging", "time", "socket", "ssl", "os"},
    "words": {"socket", "ssl", "logging", "uvloop"},
    "rules": {"asyncio", "uvloop", "time", "logging", "socket", "ssl", "os", "pathlib", "threading"},
}

#: Values of the words floor that only the standard library may touch.
STDLIB_ONLY = {"reply", "message", "route", "contracts"}
THIRD_PARTY = {"uvloop", "orjson", "apsw", "pyreqwest", "aiohttp", "aiohappyeyeballs", "httptools"}
THIRD_PARTY |= {"pydantic", "click", "prometheus_client", "argon2", "jwt"}


def place(module: str) -> tuple[str, tuple[int, str]]:
    part = module.split(".")[0]
    if part not in FLOORS:
        pytest.fail(f"gateway/{module.replace('.', '/')} stands on no floor: name it in tests/test_floors.py")
    return part, FLOORS[part]


def imports(path: Path) -> list[tuple[str, bool]]:
    """``(module, ours)`` for every import of the file; ours are relative to ``gateway``."""
    here = path.relative_to(ROOT).with_suffix("").parts
    found: list[tuple[str, bool]] = []
    tree = ast.parse(path.read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name
                found.append((name.removeprefix("gateway."), True) if name.startswith("gateway.") else (name, False))
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = here[: len(here) - node.level]
                stem = [*base, *(node.module.split(".") if node.module else [])]
            elif node.module == "gateway" or (node.module or "").startswith("gateway."):
                stem = (node.module or "").split(".")[1:]
            else:
                found.append((node.module or "", False))
                continue
            if stem:
                found.append((".".join(stem), True))
            else:
                found.extend((alias.name, True) for alias in node.names)
    return found


def faults(path: Path) -> list[str]:
    name = str(path.relative_to(ROOT))
    module = name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    part, (floor, word) = place(module)
    result = []
    for target, ours in imports(path):
        if not ours:
            top = target.split(".")[0]
            if top in FORBIDDEN.get(word, ()):
                result.append(f"{name} ({word}) imports {target}")
            if part in STDLIB_ONLY and top in THIRD_PARTY:
                result.append(f"{name} ({word}, standard library only) imports {target}")
            continue
        if target == "__version__":
            continue
        other, (other_floor, other_word) = place(target)
        if other == part:
            continue
        if other_floor > floor:
            result.append(f"{name} ({word}) imports {target} of a higher floor ({other_word})")
        elif other_floor == floor:
            in_order = other in WORDS and (part not in WORDS or WORDS.index(other) < WORDS.index(part))
            if word != "whole" and word != "door" and not (word == "words" and in_order):
                result.append(f"{name} ({word}) imports {target} of its own floor; they meet through contracts")
    return result


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_floor(path: Path) -> None:
    found = faults(path)
    assert not found, "\n".join(found)


def test_the_rule_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "smtp").mkdir()
    bad = tmp_path / "smtp" / "server.py"
    bad.write_text("import asyncio\nfrom ..queue import Queue\nfrom ..reply import Reply\n")
    assert faults(bad) == ["smtp/server.py (rules) imports asyncio", "smtp/server.py (rules) imports queue of a higher floor (time)"]


def _waits(handler: ast.AST) -> bool:
    return any(isinstance(node, ast.Await | ast.AsyncFor | ast.AsyncWith | ast.Yield | ast.YieldFrom) for node in ast.walk(handler))


def test_no_compiled_coroutine_waits_while_it_handles_an_exception() -> None:
    """docs/performance.md: mypyc leaves the exception in the thread's state meanwhile, and other tasks find it there."""
    rules = (ROOT.parent / "setup.py").read_text().partition('RULES = """')[2].partition('"""')[0].split()
    assert len(rules) > 20
    found = []
    for name in rules:
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.Try):
                parts: list[ast.AST] = [*node.handlers, *node.finalbody]
                found += [f"{name}.py:{getattr(part, 'lineno', 0)}" for part in parts if _waits(part)]
    assert not found, found
