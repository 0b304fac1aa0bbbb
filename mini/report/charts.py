"""The charts of the report as SVG, from report.json's content."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for a in axes:
        a.spines[["top", "right"]].set_visible(False)
        a.tick_params(labelsize=8)
    return figure, axes


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "report", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def losses(report: dict[str, Any]) -> str | None:
    """The loss of every stage by step; None without one."""
    curves = {name: s["losses"] for name, s in report["stages"].items()}
    if not curves:
        return None
    columns = min(4, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = _figure(rows, columns, 11, 2.1 * rows)
    for a, (name, points) in zip(axes, curves.items(), strict=False):
        drawn = [(step, loss) for step, loss in points if loss is not None and loss > 0]
        a.plot(*zip(*drawn, strict=True), linewidth=1, color="#1f5fa8") if drawn else None
        a.set_yscale("log")
        a.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        a.yaxis.set_major_formatter("{x:.3g}")
        a.yaxis.set_minor_formatter("")
        a.set_title(name, fontsize=9)
    for a in axes[len(curves) :]:
        a.set_visible(False)
    return _svg(figure)


def roc(report: dict[str, Any]) -> str | None:
    """ROC curves of the recognisers and of the image prompt; None without one."""
    curves = {}
    for name, prefix in (("judges", ""), ("two_recognisers", ""), ("backbone", "image prompt: ")):
        for title, points in report["measures"][name].get("curves", {}).items():
            if points and len(points[0]) == 2:
                curves[prefix + title] = points
    if not curves:
        return None
    figure, (a,) = _figure(1, 1, 8, 4)
    for title, points in curves.items():
        a.plot(*zip(*points, strict=True), linewidth=1.3, label=title)
    a.set_xscale("log")
    a.set(xlim=(1e-3, 1), ylim=(0, 1.01))
    a.set_xlabel("false positive rate", fontsize=9)
    a.set_ylabel("true positive rate", fontsize=9)
    a.legend(fontsize=8, loc="lower right")
    return _svg(figure)


def weight(report: dict[str, Any]) -> str | None:
    """Draws what the image prompt's weight does; None where it was not measured."""
    curves = {
        title: points
        for title, points in report["measures"]["backbone"].get("curves", {}).items()
        if points and len(points[0]) == 4
    }
    if not curves:
        return None
    figure, (a,) = _figure(1, 1, 8, 3.6)
    for title, points in curves.items():
        weight, value, low, high = zip(*points, strict=True)
        (line,) = a.plot(weight, value, marker="o", markersize=3, linewidth=1.3, label=title.split(" by ")[0])
        a.fill_between(weight, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    a.set_xlabel("weight", fontsize=9)
    a.set_ylim(-0.05, 1.05)
    a.legend(fontsize=8)
    return _svg(figure)
