"""Marks the branches of the rules, so that libFuzzer sees which of them an input takes.

``install()`` comes before the first import of ``gateway``: from then on the modules below
``MARKED`` are compiled with a call of ``__edge__(n)`` at the start of every function and of
every way that a branch, a loop, a match, a conditional expression or a chain of ``and`` and
``or`` can go. ``__edge__`` gives None, so ``x and y`` becomes ``x and (__edge__(n) or y)``.
The harness (harness.c) counts; without it none of this is used.
"""

from __future__ import annotations

import ast
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from types import CodeType, ModuleType

#: What decides on octets: the sessions, and the values that they are made of.
MARKED = ("gateway.smtp.", "gateway.reply", "gateway.route", "gateway.senders", "gateway.message")

_count = 0


def made() -> int:
    """Marks so far."""
    return _count


def _mark() -> ast.Call:
    global _count
    number, _count = _count, _count + 1
    return ast.Call(ast.Name("__edge__", ast.Load()), [ast.Constant(number)], [])


def _marked(body: list[ast.stmt]) -> list[ast.stmt]:
    return [ast.Expr(_mark()), *body]


def _through(value: ast.expr) -> ast.expr:
    """``value``, and a mark on the way to it."""
    return ast.BoolOp(ast.Or(), [_mark(), value])


class _Marker(ast.NodeTransformer):
    """Functions alone: what runs at import is the same for every input."""

    def __init__(self) -> None:
        self._inside = 0

    def visit(self, node: ast.AST) -> ast.AST:
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        self._inside += function
        self.generic_visit(node)
        self._inside -= function
        if not (function or self._inside):
            return node
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                node.body = _marked(node.body)
            case ast.If() | ast.For() | ast.While():
                node.body = _marked(node.body)
                node.orelse = _marked(node.orelse)
            case ast.ExceptHandler() | ast.match_case():
                node.body = _marked(node.body)
            case ast.IfExp():
                node.body = _through(node.body)
                node.orelse = _through(node.orelse)
            case ast.BoolOp():
                node.values[1:] = [_through(value) for value in node.values[1:]]
        return node


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        # Never from a .pyc: that one has no marks.
        path = self.get_filename(fullname)
        tree = ast.parse(self.get_data(path), path)
        _Marker().visit(tree)
        code: CodeType = compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)
        return code


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not fullname.startswith("gateway.") or fullname in sys.builtin_module_names:
            return None
        spec = PathFinder.find_spec(fullname, path, target)  # type: ignore[arg-type]  # typeshed: Sequence[str]
        if spec is None or spec.origin is None or spec.submodule_search_locations is not None:
            return spec
        # What was compiled beside its source has no marks, and does not mix with what has.
        source = os.path.join(os.path.dirname(spec.origin), f"{fullname.rpartition('.')[2]}.py")
        if not os.path.exists(source):
            return None  # the parser: built in
        loader = _Loader if fullname.startswith(MARKED) else SourceFileLoader
        return spec_from_file_location(fullname, source, loader=loader(fullname, source))


def install() -> None:
    assert not any(name.startswith(MARKED) for name in sys.modules), "the rules were imported before they could be marked"
    # Behind the finder of built-in modules: the parser is one here.
    sys.meta_path.insert(1, _Finder())
