"""Plots as SVG and a page that needs nothing else: for ``bench.scale --html``.

The horizontal axis is logarithmic (what grows does so by tens). The vertical one begins at zero, so that a flat cost
looks flat; where the values are more than fifty times apart it is logarithmic as well, so that a cost in proportion is a
straight line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDE, HIGH = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 20, 44
#: Values that are further apart have a logarithmic axis.
APART = 50.0
COLOURS = ("#2f6fdb", "#c2571a", "#3a8f4d", "#8a4fb0")

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } td, th { padding: .1rem .7rem; border-bottom: 1px solid #8884; text-align: right; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; } svg text { fill: currentColor; }
.grid { stroke: #8884; } .quiet { opacity: .7; }
"""

Points = Sequence[tuple[float, float]]


def figure(value: float) -> str:
    """Three digits that count, and no more: 0.021, 3.41, 1,250."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}" if digits < 6 else f"{value:.2g}"


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * (1 - 1e-9))


def _short(value: float) -> str:
    for bound, letter in ((1e6, "M"), (1e3, "k")):
        if value >= bound:
            return f"{value / bound:.3g}{letter}"
    return f"{value:g}"


def plot(series: Mapping[str, Points], across: str, up: str) -> str:
    """One SVG. ``across``, ``up``: what the axes show, with the unit. Points need x above 0. Raises ValueError without any."""
    every = [point for points in series.values() for point in points]
    if not every or min(x for x, _ in every) <= 0:
        raise ValueError("a plot wants points, and right of zero")
    first, last = math.log10(min(x for x, _ in every)), math.log10(max(x for x, _ in every))
    span = last - first or 1.0
    most, least = max(y for _, y in every), min(y for _, y in every)
    if least > 0 and most / least > APART:
        low, high = math.floor(math.log10(least)), math.ceil(math.log10(most))
        grid = [10.0**power for power in range(low, high + 1)]
    else:
        low, high = 0, 0
        grid = [_round_up(most) * quarter / 4 for quarter in range(5)]

    def place(x: float, y: float) -> tuple[float, float]:
        share = (math.log10(y) - low) / (high - low) if high > low else y / grid[-1]
        return LEFT + (math.log10(x) - first) / span * (WIDE - LEFT - RIGHT), HIGH - BOTTOM - share * (HIGH - TOP - BOTTOM)

    lines = [f'<svg viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="{escape(f"{up} over {across}", quote=True)}">']
    for value in grid:
        _, y = place(10**first, value)
        lines.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDE - RIGHT}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(figure(value))}</text>')
    for x in sorted({x for x, _ in every}):
        at, _ = place(x, grid[0])
        lines.append(f'<text x="{at:.1f}" y="{HIGH - BOTTOM + 16}" text-anchor="middle">{_short(x)}</text>')
    lines.append(f'<text x="{(LEFT + WIDE - RIGHT) / 2}" y="{HIGH - 8}" text-anchor="middle">{escape(across)}</text>')
    lines.append(f'<text x="{LEFT - 56}" y="{TOP - 7}">{escape(up)}</text>')
    for number, (name, points) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        placed = [place(x, y) for x, y in sorted(points)]
        lines.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in placed)}"/>'
        )
        for (x, y), (_, value) in zip(placed, sorted(points), strict=True):
            lines.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{escape(name)}: {figure(value)}</title></circle>'
            )
        if len(series) > 1:
            lines.append(f'<text x="{LEFT + 8 + 150 * number}" y="{HIGH - BOTTOM - 8}" style="fill:{colour}">{escape(name)}</text>')
    return "\n".join([*lines, "</svg>"])


def html_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr>{body}</table>"


def page(title: str, about: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole HTML document; sections are a heading and HTML."""
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">',
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(about)}</p>',
        *(f"<h2>{escape(head)}</h2>\n{content}" for head, content in sections),
    ]
    return "\n".join([*parts, "</body>\n</html>\n"])
