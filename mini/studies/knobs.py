"""Which knob does what: one weight, window or scale is turned at a time. Writes knobs.md, .json and two plots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .drawing import BOTH, MEASURED_WITH, ReferenceArm, draw
from .reference import measure
from .study import SIMILARITY, STYLE, Table, pyplot, render, save_figure, write_page

KNOBS: dict[str, dict[float, ReferenceArm]] = {
    "image prompt weight": {w: replace(BOTH, image_prompt=w) for w in (0.0, 0.25, 0.5, 0.75, 1.0)},
    "KV weight": {w: replace(BOTH, kv=w) for w in (0.0, 0.25, 0.5, 0.75, 1.0)},
    "KV start": {s: replace(BOTH, start=s) for s in (0.0, 0.2, 0.4, 0.6, 0.8)},
    "KV end": {e: replace(BOTH, end=e) for e in (0.2, 0.4, 0.6, 0.8, 1.0)},
    "text": {s: replace(BOTH, text=s) for s in (0.0, 1.0, 1.8, 3.0, 5.0)},
    "full": {s: replace(BOTH, full=s) for s in (0.0, 0.6, 1.2, 2.4, 4.0)},
    "kv": {s: replace(BOTH, kv_scale=s) for s in (0.0, 0.6, 1.2, 2.4, 4.0)},
}
STYLES = ("photo", "comic")


def page(figures: Table, references: int) -> str:
    """docs/knobs.md."""
    usual = {knob: value for knob, arms in KNOBS.items() for value, arm in arms.items() if arm == BOTH}
    return render(
        "knobs.md.jinja",
        figures=figures,
        knobs=KNOBS,
        usual=usual,
        references=references,
        styles=STYLES,
        **MEASURED_WITH,
    )


def curves(figures: Table, knobs: tuple[str, ...], path: Path) -> None:
    """Similarity to the own reference and style accuracy over the values of each knob, with 95 % intervals."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(knobs), figsize=(2.9 * len(knobs), 2.8), sharey=True)
    for axis, knob in zip(axes, knobs, strict=True):
        values = list(KNOBS[knob])
        for name, colour in ((SIMILARITY, "tab:green"), (STYLE, "tab:blue")):
            points = [figures[f"{knob} {v:g}"][name] for v in values]
            axis.plot(values, [p.value for p in points], color=colour, marker="o", markersize=3, label=name)
            axis.fill_between(values, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.2)
        axis.set(xlabel=knob, ylim=(-0.05, 1.05), xticks=values)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7, loc="lower left")
    save_figure(figure, path)


def evaluate(references: int, out: Path) -> None:
    """Draw, measure and write: knobs.md, .json, knobs_weights.png and knobs_scales.png, into `out`."""
    arms = {f"{knob} {value:g}": arm for knob, settings in KNOBS.items() for value, arm in settings.items()}
    figures, _ = measure(*draw(references, arms, STYLES), STYLES)
    write_page(out, "knobs", figures, page(figures, references))
    curves(figures, ("image prompt weight", "KV weight", "KV start", "KV end"), out / "knobs_weights.png")
    curves(figures, ("text", "full", "kv"), out / "knobs_scales.png")
