"""From a table as TOML has it to the tables of the configuration, with every fault of it at once."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .faults import ConfigError, Fault, Place, lines, near
from .fit import cross_faults, login_faults, mail_server, not_yet
from .tables import (
    CHECKS,
    SINKS,
    Admin,
    Authentication,
    Bounces,
    Drain,
    ExtensionsConfig,
    Head,
    Limits,
    ListenerConfig,
    PluginCheckConfig,
    PluginSinkConfig,
    Retry,
    RouteConfig,
    SpoolConfig,
    Table,
)


def _sentence(error: Mapping[str, Any], place: Place, keys: Sequence[str]) -> str:
    """One sentence of pydantic's, in our words, with the way out."""
    kind, context = error["type"], error.get("ctx", {})
    match kind:
        case "value_error":
            return str(context["error"])
        case "missing":
            return "is missing; this key is needed"
        case "extra_forbidden":
            word = str(place[-1])
            return f"unknown key{near(word, keys) or '; known here: ' + ', '.join(sorted(keys))}"
        case "literal_error":
            known = re.findall(r"'([^']*)'", context["expected"])
            return f"must be one of {', '.join(known)}{near(str(error['input']), known)}"
        case "int_type" | "int_parsing" | "int_from_float":
            return "must be a whole number"
        case "float_type" | "float_parsing" | "finite_number":
            return "must be a number"
        case "bool_type" | "bool_parsing":
            return "must be true or false"
        case "string_type" | "path_type":
            return "must be text in quotes"
        case "list_type":
            return "must be a list; write [ … ] around it"
        case "dict_type" | "model_type" | "model_attributes_type":
            return "must be a table"
        case "too_short" | "string_too_short":
            return "must not be empty"
        case "greater_than_equal":
            return f"must be at least {context['ge']}"
        case "greater_than":
            return f"must be more than {context['gt']}"
        case "less_than_equal":
            return f"must be at most {context['le']}"
    return str(error["msg"])


class Reading:
    """One table on its way to a Config; gathers faults as it goes. ``fields``: the keys of a Config."""

    def __init__(self, folder: Path | None, environment: Mapping[str, str], fields: Sequence[str]) -> None:
        self.folder = folder
        self.environment = environment
        self.fields = fields
        self.faults: list[Fault] = []

    def parts(self, table: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
        """What a Config is made of. Raises ConfigError with every fault."""
        tree = self._expanded(dict(table), ())
        self._overlay(tree)
        for dotted, value in flags.items():
            self._put(tree, dotted.split("."), value)
        self.faults.extend(not_yet(tree))
        parts: dict[str, Any] = {}
        for key in tree:
            if key not in self.fields:
                self._add((key,), f"unknown key{near(key, self.fields) or '; known here: ' + ', '.join(self.fields)}")
        for key, model in _SINGLE.items():
            # The spool's default folder lies beside the file, so it is read even where nothing is said.
            if key in tree or key == "spool":
                parts[key] = self._table(model, tree.get(key, {}), (key,))
        for key, model in _LISTS.items():
            entries = self._entries(tree, key, list)
            parts[key] = {number: self._table(model, entry, (key, number)) for number, entry in enumerate(entries)}
        for key, models in (("sinks", SINKS), ("checks", CHECKS)):
            named = self._entries(tree, key, dict)
            parts[key] = {name: self._typed(key, models, entry, (key, name)) for name, entry in named.items()}
        plain = {key: tree[key] for key in Head.model_fields if key in tree}
        head = self._table(Head, plain, ())
        logins = {key: tree.get(key) for key in ("users", "users_file", "senders", "client_certificates")}
        if parts.get("authentication") is None:
            # Its own faults are told already.
            logins["unread_authentication"] = tree.get("authentication")
        relaying = {name for name, sink in self._entries(tree, "sinks", dict).items() if mail_server(sink)}
        self.faults.extend(cross_faults(parts, relaying, self._entries(tree, "routes", list)))
        self.faults.extend(login_faults(parts | logins))
        if self.faults:
            raise ConfigError(lines(self._first_at_each_place()))
        for key in _LISTS:
            parts[key] = list(parts[key].values())
        return {key: getattr(head, key) for key in plain} | parts

    def _add(self, place: Place, sentence: str) -> None:
        self.faults.append((place, sentence))

    def _first_at_each_place(self) -> list[Fault]:
        """In the order of the tables; a value that is wrong in itself is not told again for what
        follows from it."""
        order = [*Head.model_fields, *self.fields]
        first: dict[Place, Fault] = {}
        for fault in self.faults:
            first.setdefault(fault[0], fault)

        def rank(fault: Fault) -> tuple[int, int]:
            place = fault[0]
            entry = place[1] if len(place) > 1 and isinstance(place[1], int) else 0
            return (order.index(place[0]) if place[0] in order else -1, entry)

        return sorted(first.values(), key=rank)

    # ------------------------------------------------------------------- the words

    def _expanded(self, value: Any, place: Place) -> Any:
        if isinstance(value, dict):
            return {key: self._expanded(inner, (*place, key)) for key, inner in value.items()}
        if isinstance(value, list):
            return [self._expanded(inner, (*place, number)) for number, inner in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value

        def variable(match: re.Match[str]) -> str:
            if match[0] == "$${":
                return "${"
            name = match[1]
            if name is None:
                self._add(place, "has ${ without a name and }; write ${NAME}, or $${ for these very characters")
            elif name not in self.environment:
                self._add(place, f"the environment has no {name}; set it, or write $${{{name}}} for these very characters")
            return self.environment.get(name or "", "")

        return re.sub(r"\$\$\{|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)\})?", variable, value)

    def _overlay(self, tree: dict[str, Any]) -> None:
        """``GATEWAY_SECTION__KEY`` over the file. Lists and tables are written as in TOML. A name
        without ``__`` is only ours if it is a plain key (others may call theirs GATEWAY_…)."""
        for name in sorted(self.environment):
            if not name.startswith("GATEWAY_"):
                continue
            path = name.removeprefix("GATEWAY_").lower().split("__")
            if len(path) == 1 and path[0] not in Head.model_fields:
                continue
            text = self.environment[name]
            value: Any = text
            if text[:1] in ("[", "{"):
                try:
                    value = tomllib.loads(f"value = {text}")["value"]
                except tomllib.TOMLDecodeError:
                    self._add((name,), "is neither text nor a list or table as TOML writes it")
                    continue
            if path[0] not in self.fields or not all(path):
                self._add((name,), f"the file has no {'.'.join(path)}{near(path[0], self.fields)}")
                continue
            self._put(tree, path, value)

    def _put(self, tree: dict[str, Any], path: list[str], value: Any) -> None:
        node: Any = tree
        for depth, part in enumerate(path):
            last = depth == len(path) - 1
            if isinstance(node, list):
                if not part.isdigit() or int(part) > len(node):
                    self._add(
                        tuple(path[:depth]), f"the environment names entry {part!r}, and there are {len(node)}; entries are counted from 0"
                    )
                    return
                number = int(part)
                if number == len(node):
                    node.append({})
                if last:
                    node[number] = value
                node = node[number]
                continue
            if not isinstance(node, dict):
                return  # what is no table here is a fault of the file, told where the file is judged
            key = next((known for known in node if known.lower() == part), part)
            if last:
                node[key] = value
            else:
                node = node.setdefault(key, [] if depth == 0 and key in _LISTS else {})

    # ------------------------------------------------------------------ the tables

    def _entries(self, tree: dict[str, Any], key: str, kind: type) -> Any:
        value = tree.get(key)
        if value is None:
            if key in _NEEDED:
                self._add((key,), _NEEDED[key])
            return kind()
        if not isinstance(value, kind):
            self._add((key,), f"must be written as [[{key}]]" if kind is list else f"must be written as [{key}.NAME]")
            return kind()
        if not value and key in _NEEDED:
            self._add((key,), _NEEDED[key])
        return value

    def _table(self, model: type[Table], table: Any, place: Place) -> Any:
        if not isinstance(table, dict):
            self._add(place, "must be a table")
            return None
        table, misfits = model.prepare(table, self.folder)
        for key, sentence in misfits:
            self._add((*place, key), sentence)
        try:
            result = model.model_validate(table, context={"folder": self.folder, "prepared": True})
        except ValidationError as error:
            self._gather(error, place, model)
            return None
        return None if misfits else result

    def _typed(self, group: str, models: Mapping[str, type[Table]], table: Any, place: Place) -> Any:
        if not isinstance(table, dict):
            self._add(place, f"must be written as [{group}.NAME]")
            return None
        kind = table.get("type")
        if kind is None:
            self._add((*place, "type"), f"is missing; write one of {', '.join(models)}")
            return None
        if isinstance(kind, str) and kind in models:
            return self._table(models[kind], table, place)
        if isinstance(kind, str) and kind in (plugins := _plugins(f"gateway.{group}")):
            return self._table(PluginSinkConfig if group == "sinks" else PluginCheckConfig, table, place)
        if kind == "python":
            self._add((*place, "type"), "a function is no matter of a file; give it to gateway.Gateway in your program")
            return None
        known = [*models, *(plugins if isinstance(kind, str) else [])]
        self._add((*place, "type"), f"must be one of {', '.join(known)}{near(str(kind), known)}")
        return None

    def _gather(self, error: ValidationError, place: Place, model: type[Table]) -> None:
        for found in error.errors(include_url=False):
            where = (*place, *found["loc"])
            self._add(where, _sentence(found, where, list(model.model_fields)))


_SINGLE: dict[str, type[Table]] = {
    "limits": Limits,
    "drain": Drain,
    "spool": SpoolConfig,
    "retry": Retry,
    "extensions": ExtensionsConfig,
    "bounces": Bounces,
    "authentication": Authentication,
    "admin": Admin,
}
_LISTS: dict[str, type[Table]] = {"listeners": ListenerConfig, "routes": RouteConfig}
_NEEDED = {
    "listeners": 'no address to listen on; write [[listeners]] with address = "127.0.0.1:2525"',
    "sinks": "nobody to carry mail; write a table like [sinks.app]",
    "routes": "without a route every recipient is refused; write [[routes]] with recipients and sink",
}


def _plugins(group: str) -> list[str]:
    """Names that installed packages registered. Costs a walk over all of them, so only where needed."""
    from importlib.metadata import entry_points

    return sorted(point.name for point in entry_points(group=group))
