"""What ``gateway bench`` found, for people and for programs: a table, JSON, a page.

Owns the wording. Ratios say how many times the gateway is faster; under 1 the other one is. The page needs nothing from the
network: its plots are SVG written here.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from ...observe import quiet
from . import ROUNDS, Report, Result, Row
from .tasks import Kind

#: Of the JSON: changes when a key changes its meaning or goes.
FORMAT = 1
TITLES: dict[Kind, str] = {
    "commands": "Command lines, every attribute read",
    "content": "Content out of DATA",
    "dialogue": "Whole dialogues, from MAIL to the last 250",
    "mime": "A mail taken apart",
}

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_NAME, _VALUE, _SPAN, _RATIO = 20, 9, 19, 14


def figure(value: float) -> str:
    """Three digits that count: 0.0206, 3.41, 1,250."""
    if value >= 100:
        return f"{value:,.0f}"
    for bound, digits in ((10, 1), (1, 2), (0.1, 3), (0.01, 4)):
        if value >= bound:
            return f"{value:.{digits}f}"
    return f"{value:.2g}"


def bar(share: float, width: int) -> str:
    """A bar of ``share`` (0 to 1) of ``width`` columns, to an eighth of a column."""
    eighths = max(1, round(share * width * 8))
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _said(row: Row, result: Result) -> str:
    """What stands where the ratio would."""
    if result.broken is not None:
        return "failed" if not result.broken.startswith("refuses") else "refuses"
    if result.differs is not None:
        return "differs"
    ratio = row.ratio(result)
    return "" if ratio is None else f"{figure(ratio)} ×"


def _footnotes(report: Report) -> tuple[list[str], dict[int, int]]:
    """Texts, and by ``id`` of a Result the number of its text: one for each implementation, kind and way to fall out."""
    reasons = {one.name: one.otherwise for one in report.implementations}
    found: dict[tuple[str, Kind, str], list[tuple[Row, Result]]] = {}
    for row in report.rows:
        for result in row.results:
            if result.broken is not None or result.differs is not None:
                found.setdefault((result.implementation, row.task.kind, _said(row, result)), []).append((row, result))
    texts: list[str] = []
    numbers: dict[int, int] = {}
    for (name, kind, _), fallen in found.items():
        row, result = fallen[0]
        why = result.broken if result.broken is not None else f"another answer than the gateway's: {result.differs}"
        if reasons.get(name) and result.differs is not None and "octets: " in result.differs:
            why += f" ({reasons[name]})"
        more = f" (and {len(fallen) - 1} more)" if len(fallen) > 1 else ""
        texts.append(quiet(f"{name}, {kind}: {row.task.name}{more}: {why}"))
        numbers |= {id(one): len(texts) for _, one in fallen}
    return texts, numbers


def table(report: Report, width: int = 0) -> Iterator[str]:
    """The table, line by line. ``width``: columns of the terminal, for bars; 0: none."""
    texts, numbers = _footnotes(report)
    columns = min(40, width - 2 - _NAME - _VALUE - _SPAN - _RATIO - 2) if width else 0
    kind = None
    for row in report.rows:
        if row.task.kind != kind:
            kind = row.task.kind
            yield ""
            yield f"{TITLES[kind]}"
            yield f"  {'':<{_NAME}}{'median':>{_VALUE}}{'lowest – highest':>{_SPAN}}{'gateway is':>{_RATIO}}"
        yield f"{row.task.name}, {row.task.unit}"
        most = max((result.median for result in row.results), default=0.0)
        for result in row.results:
            value = span = ""
            if result.median:
                value, span = figure(result.median), f"{figure(result.low)} – {figure(result.high)}"
            mark = f"{_said(row, result)}{f' [{numbers[id(result)]}]' if id(result) in numbers else ''}"
            line = f"  {result.implementation:<{_NAME}}{value:>{_VALUE}}{span:>{_SPAN}}{mark:>{_RATIO}}"
            if columns >= 8 and result.median:
                line += " " + bar(result.median / most, columns)
            yield line.rstrip()
    yield ""
    yield f"Median of {ROUNDS} rounds, {report.seconds:g} s for each line, runs in turn. {report.machine}."
    yield from (f"  {one.name} {one.version}" for one in report.implementations[1:])
    yield from (f"  {name}: not here: {quiet(why)}" for name, why in report.absent.items())
    if texts:
        yield ""
        yield from (f"[{number}] {text}" for number, text in enumerate(texts, 1))
    yield ""
    yield "What each does:"
    yield from (f"  {name}{f', {kind}' if kind else ''}: {note}" for name, kind, note in report.noted())
    yield from (f"note: {quiet(note)}" for note in report.notes)


def as_json(report: Report) -> dict[str, Any]:
    """The same as a value. Rates in the row's unit; ``ratio``: how many times the gateway is faster."""
    notes = list(report.noted())
    return {
        "format": FORMAT,
        "machine": report.machine,
        "seconds": report.seconds,
        "rounds": ROUNDS,
        "notes": list(report.notes),
        "implementations": [
            {
                "name": one.name,
                "version": one.version,
                "present": True,
                "why": None,
                "notes": [f"{kind}: {note}" if kind else note for name, kind, note in notes if name == one.name],
            }
            for one in report.implementations
        ]
        + [{"name": name, "version": None, "present": False, "why": why, "notes": []} for name, why in report.absent.items()],
        "rows": [
            {
                "kind": row.task.kind,
                "name": row.task.name,
                "unit": row.task.unit,
                "results": [
                    {
                        "implementation": result.implementation,
                        "median": result.median or None,
                        "low": result.low or None,
                        "high": result.high or None,
                        "ratio": row.ratio(result),
                        "differs": result.differs,
                        "failed": result.broken,
                    }
                    for result in row.results
                ],
            }
            for row in report.rows
        ],
    }


# -------------------------------------------------------------------------------- the page

_STYLE = """
:root { color-scheme: light dark; --ours: #2f6fdb; --others: #8a94a6; --line: #8886; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; } h3 { font-size: 1rem; font-weight: 600; margin: 1.2rem 0 .2rem; }
h3 small, .quiet { font-weight: 400; opacity: .7; }
svg { display: block; width: 100%; height: auto; font: 13px system-ui, sans-serif; }
svg text { fill: currentColor; } .ours { fill: var(--ours); } .others { fill: var(--others); } .span { stroke: currentColor; stroke-width: 1.5; }
li { overflow-wrap: anywhere; }
"""

#: Of a plot, in its own units: names, bars, what is written behind a bar; the height of a line.
_LEFT, _BARS, _RIGHT, _HIGH = 150, 440, 330, 26


def page(report: Report) -> str:
    """A whole HTML document."""
    texts, numbers = _footnotes(report)
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">',
        f"<title>gateway bench</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>gateway bench</h1>",
        f'<p class="quiet">{escape(report.machine)}. Median of {ROUNDS} rounds, {report.seconds:g} s for each bar, runs in turn; '
        "the thin line goes from the slowest round to the fastest. × says how many times the gateway is faster.</p>",
    ]
    kind = None
    for row in report.rows:
        if row.task.kind != kind:
            kind = row.task.kind
            parts.append(f"<h2>{escape(TITLES[kind])}</h2>")
        parts.append(f"<h3>{escape(row.task.name)} <small>{escape(row.task.unit)}</small></h3>\n{_plot(row, numbers)}")
    parts += ["<h2>Who was measured</h2>\n<ul>"]
    parts += [f"<li>{escape(one.name)} {escape(one.version)}</li>" for one in report.implementations]
    parts += [f"<li>{escape(name)}: not here: {escape(quiet(why))}</li>" for name, why in report.absent.items()]
    parts.append("</ul>")
    if texts:
        parts.append("<h2>Other answers</h2>\n<ol>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ol>")
    parts.append("<h2>What each does</h2>\n<ul>")
    parts += [f"<li>{escape(name)}{f', {kind}' if kind else ''}: {escape(note)}</li>" for name, kind, note in report.noted()]
    parts += [f"<li>note: {escape(quiet(note))}</li>" for note in report.notes]
    parts.append("</ul>\n</body>\n</html>\n")
    return "\n".join(parts)


def _plot(row: Row, numbers: dict[int, int]) -> str:
    # The scale ends at the fastest round, so that its line stays inside.
    most = max((result.high for result in row.results), default=0.0) or 1.0
    scale = _BARS / most
    lines = [
        f'<svg viewBox="0 0 {_LEFT + _BARS + _RIGHT} {_HIGH * len(row.results)}" role="img" aria-label="{escape(row.task.id, quote=True)}">'
    ]
    for number, result in enumerate(row.results):
        middle = number * _HIGH + _HIGH / 2
        lines.append(f'<text x="{_LEFT - 10}" y="{middle + 4:.0f}" text-anchor="end">{escape(result.implementation)}</text>')
        end = float(_LEFT)
        said = _said(row, result) + (f" [{numbers[id(result)]}]" if id(result) in numbers else "")
        if result.median:
            kind = "others" if number else "ours"
            wide = max(1.0, result.median * scale)
            lines.append(f'<rect class="{kind}" x="{_LEFT}" y="{middle - 8:.0f}" width="{wide:.1f}" height="16" rx="2"/>')
            low, high = _LEFT + result.low * scale, _LEFT + result.high * scale
            lines.append(f'<line class="span" x1="{low:.1f}" y1="{middle:.0f}" x2="{high:.1f}" y2="{middle:.0f}"/>')
            end = max(_LEFT + wide, high)
            said = figure(result.median) + (f"   {said}" if said else "")
        lines.append(f'<text x="{end + 8:.1f}" y="{middle + 4:.0f}" xml:space="preserve">{escape(said)}</text>')
    return "\n".join([*lines, "</svg>"])
