"""The page of the study of concepts: its verdict in words, its curves and its sheet of pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...evaluation.contact_sheet import Cell, contact_sheet
from ...evaluation.stats import Interval, Intervals
from .concept_baselines import OURS, SWEPT
from .concept_bench import (
    ALL,
    BLENDED,
    PROMPT,
    SIMILARITY,
    USUAL,
    Bench,
    Shown,
)
from .concept_set import FACE, GROUPS, PROMPTS, ConceptChunk
from .concept_speed import Speed
from .study import CFG, pyplot, render, save_figure, to_image


def above(one: Interval, other: Interval) -> bool:
    """Says whether one is above the other with intervals that do not overlap."""
    return one.low > other.high


def verdict(compared: Mapping[str, Any], arm: Mapping[str, Intervals], speeds: Mapping[str, Speed]) -> list[str]:
    """Puts into words what the figures say of the aim: above both baselines at equal time, in both measures."""
    keys = [f"{measure}, {ALL}" for measure in (SIMILARITY, PROMPT)]
    said, met = [], []
    for name, budgets in compared.items():
        if "1" not in budgets:
            continue
        ours, theirs = budgets["1"]["ours"], budgets["1"]["figures"]
        wins = {key: above(ours[key], theirs[key]) for key in keys}
        loses = {key: above(theirs[key], ours[key]) for key in keys}
        met.append(all(wins.values()))
        words = [
            f"{'above' if wins[key] else 'below' if loses[key] else 'not told apart from'} it in {key.split(',')[0]} "
            f"({ours[key]} against {theirs[key]})"
            for key in keys
        ]
        said.append(f"At equal time ours is, against {name}, {words[0]} and {words[1]}.")
        said.append(_reached(name, budgets, arm, speeds))
    if met:
        state = "reached" if all(met) else "not reached"
        said.insert(
            0,
            f"The aim, above both baselines at equal time in similarity and in prompt, with intervals that do not "
            f"overlap, is {state}.",
        )
    return said


def _reached(name: str, budgets: Mapping[str, Any], arm: Mapping[str, Intervals], speeds: Mapping[str, Speed]) -> str:
    key = f"{SIMILARITY}, {ALL}"
    enough = [b for b in sorted(budgets, key=int) if budgets[b]["figures"][key].value >= budgets[b]["ours"][key].value]
    most = max(budgets, key=int)
    one = (
        f"It is as similar as ours at {enough[0]} times the time, of the budgets that were tried"
        if enough
        else f"It is not as similar as ours at {most} times the time either"
    )
    theirs = budgets["1"]["figures"][key].value
    ours = [step for step in sorted(arm, key=int) if arm[step][key].value >= theirs]
    if not ours:
        return f"{one}; ours does not become as similar as it is at equal time."
    ratio = speeds[OURS].seconds(USUAL) / speeds[OURS].seconds(int(ours[0]))
    return f"{one}; after {ours[0]} steps, in {ratio:.1f} times less time, ours is as similar as it is at equal time."


def page(found: Mapping[str, Any]) -> str:
    """docs/concepts.md."""
    return render(
        "concepts.md.jinja",
        **found,
        groups=(ALL, *GROUPS),
        prompts=[asked.text for asked in PROMPTS],
        cfg=CFG,
        face=FACE,
        seconds=seconds,
        usual=USUAL,
        swept=SWEPT,
        speed={name: Speed(**speed) for name, speed in found["speeds"].items()},
    )


def curves(found: Mapping[str, Any], path: Path) -> None:
    """Similarity against prompt: a line an arm over its tuning steps, and one over the blend; baselines as points."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True)

    def line(axis: Any, points: Mapping[str, Intervals], label: str, marker: str = "o") -> None:
        pairs = [(of[f"{PROMPT}, {ALL}"], of[f"{SIMILARITY}, {ALL}"]) for of in points.values()]
        x, y = ([pair[i].value for pair in pairs] for i in (0, 1))
        widths = [[[abs(getattr(p[i], end) - p[i].value) for p in pairs] for end in ("low", "high")] for i in (0, 1)]
        axis.errorbar(x, y, xerr=widths[0], yerr=widths[1], marker=marker, markersize=4, linewidth=1.2, label=label)
        for name, at_x, at_y in zip(points, x, y, strict=True):
            axis.annotate(name, (at_x, at_y), textcoords="offset points", xytext=(4, 4), fontsize=7)

    for name, steps in found["arms"].items():
        line(axes[0], steps, name)
    for name, budgets in found["baselines"].items():
        line(axes[0], {f"x{budget}": of["figures"] for budget, of in budgets.items()}, name, "s")
    line(axes[1], found["blends"], BLENDED)
    main = next(iter(found["arms"]))
    line(axes[1], {f"{found['step']} steps": found["arms"][main][str(found["step"])]}, main)
    for axis, title in zip(axes, ("over tuning steps", "over the blend of the drawing"), strict=True):
        axis.set(xlabel="prompt (style and place)", ylabel="similarity to the concept", title=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    save_figure(figure, path)


def sheet(bench: Bench, arms: Shown, of: Sequence[ConceptChunk], path: Path) -> None:
    """A row an arm and number of steps: the first concept of each group, its photo, and what was drawn of it."""
    firsts = [next(chunk for chunk in of if chunk.group == group) for group in GROUPS]
    headings = ["the concept", *(a.style for a in PROMPTS)] * len(firsts)

    def row(label: str, drawn: Sequence[Tensor]) -> list[Cell]:
        cells = []
        for n, (chunk, pictures) in enumerate(zip(firsts, drawn, strict=True)):
            cells.append(Cell(to_image(chunk.pictures[0]), "" if n else label))
            cells += [Cell(to_image(picture)) for picture in pictures]
        return cells

    rows = [row("drawn truth", [chunk.truth()[0] for chunk in firsts])]
    for name, steps in arms.items():
        for step, drawn in steps.items():
            rows.append(row(f"{name}, {step}", [drawn.pictures(bench.base, chunk)[0] for chunk in firsts]))
    contact_sheet(headings, rows, "Concepts from one photo", 112).save(path, quality=85)


def seconds(value: float) -> str:
    """Seconds for a table: three figures."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"
