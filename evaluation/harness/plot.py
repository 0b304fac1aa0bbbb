"""A plot as plain SVG: identity against prompt, a curve a method over its weights, a cross for both intervals."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple
from unicodedata import east_asian_width

import numpy as np

from ..stats import Interval

COLOURS = ("#1f5fa8", "#c8501e", "#2a8a4a", "#8a4bb0", "#b0902a", "#3aa0a8", "#a83a6a", "#5a5a60")
LEFT, INNER, HEIGHT, BOTTOM, TOP = 62, 440, 460, 46, 16  # INNER: width of what has axes
LEGEND, LETTER = 34, 6.8  # where names begin right of it; width of a letter at their size, 12


class Point(NamedTuple):
    """An arm in the plot. label: beside it, its weight."""

    x: Interval
    y: Interval
    label: str = ""


def plot(curves: Sequence[tuple[str, Sequence[Point]]], x_title: str, y_title: str) -> str:
    """Draw the curves, each under a name, as an SVG; points whose figures are not numbers are left out."""
    shown = [(name, [p for p in points if np.isfinite([p.x.value, p.y.value]).all()]) for name, points in curves]
    xs, ys = ([i for _, points in shown for p in points for i in (p.x if axis == 0 else p.y)] for axis in (0, 1))
    x_ticks, y_ticks = (ticks([v for v in values if np.isfinite(v)]) for values in (xs, ys))

    def across(value: float) -> float:
        share = (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        return LEFT + min(1.0, max(0.0, share)) * INNER

    def up(value: float) -> float:
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return HEIGHT - BOTTOM - min(1.0, max(0.0, share)) * (HEIGHT - BOTTOM - TOP)

    end, low = LEFT + INNER, HEIGHT - BOTTOM
    width = round(end + LEGEND + LETTER * max((letters(name) for name, _ in shown), default=0) + 8)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" font-family="sans-serif">']
    parts.append(f'<rect width="{width}" height="{HEIGHT}" fill="#fff"/>')
    for value in x_ticks:
        x = across(value)
        parts.append(f'<path d="M{x:.1f} {TOP}V{low}" stroke="#e6e6e4"/>')
        parts.append(f'<text x="{x:.1f}" y="{low + 17}" font-size="11" text-anchor="middle">{value:g}</text>')
    for value in y_ticks:
        y = up(value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{end}" stroke="#e6e6e4"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" font-size="11" text-anchor="end">{value:g}</text>')
    middle = (LEFT + end) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" font-size="12" text-anchor="middle">{escape(x_title)}</text>')
    at = f"14 {(TOP + low) / 2}"
    parts.append(
        f'<text transform="translate({at}) rotate(-90)" font-size="12" text-anchor="middle">{escape(y_title)}</text>'
    )
    for number, (name, points) in enumerate(shown):
        colour = COLOURS[number % len(COLOURS)]
        if len(points) > 1:
            way = " ".join(f"{across(p.x.value):.1f},{up(p.y.value):.1f}" for p in points)
            parts.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for p in points:
            x, y = across(p.x.value), up(p.y.value)
            ends = [across(v) if np.isfinite(v) else x for v in (p.x.low, p.x.high)]
            ends += [up(v) if np.isfinite(v) else y for v in (p.y.low, p.y.high)]
            cross = f"M{ends[0]:.1f} {y:.1f}H{ends[1]:.1f}M{x:.1f} {ends[2]:.1f}V{ends[3]:.1f}"
            parts.append(f'<path d="{cross}" stroke="{colour}" opacity=".45"/>')
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
            if p.label:
                # Left of its point where it would get into the names.
                side, anchor = (6, "start") if x + 6 + LETTER * len(p.label) < end else (-6, "end")
                parts.append(
                    f'<text x="{x + side:.1f}" y="{y - 6:.1f}" font-size="10" text-anchor="{anchor}">'
                    f"{escape(p.label)}</text>"
                )
        y = TOP + 14 + 19 * number
        parts.append(f'<circle cx="{end + LEGEND - 10}" cy="{y - 4}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{end + LEGEND}" y="{y}" font-size="12">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def letters(text: str) -> int:
    """Counts the letters of a text, those of East Asia as two each."""
    return sum(2 if east_asian_width(letter) in "WF" else 1 for letter in text)


def ticks(values: Sequence[float], most: int = 6) -> list[float]:
    """Round numbers from below the least value to above the largest."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    span = max(high - low, 1e-3)
    rough = span / most
    size = 10.0 ** np.floor(np.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    first, last = int(np.floor(low / step)), int(np.ceil(high / step))
    return [round(n * step, 10) for n in range(first, max(last, first + 1) + 1)]
