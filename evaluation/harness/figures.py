"""From scores to figures: means over people with intervals, differences person by person, curves at equal prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..paired import Column, at_level, column, difference, mean, of_people
from ..stats import Interval
from .measures import OpenedMeasure
from .run import Arm, EvaluationRun


@dataclass(frozen=True, eq=False)
class ArmFigures:
    """Figures of an arm. means, gains: by measure; gains are over the baseline, empty for the baseline itself.

    kinds: means by measure and kind of prompt. seconds, memory (bytes): of a picture. equal: identity at the baseline's
    prompt, on the method's curve; over_curve: how far the arm is above the baseline's curve, at its own prompt.
    """

    arm: Arm
    title: str
    means: Mapping[str, Interval]
    gains: Mapping[str, Interval]
    kinds: Mapping[str, Mapping[str, Interval]]
    seconds: float | None
    memory: float | None
    equal: Interval | None = None
    equal_gain: Interval | None = None
    over_curve: Interval | None = None


@dataclass(frozen=True, eq=False)
class Figures:
    """Figures of an evaluation, by back end. apart: the difference of two back ends by arm and measure, paired."""

    measures: Mapping[str, OpenedMeasure]
    baseline: str
    arms: tuple[ArmFigures, ...]
    apart: Mapping[str, Mapping[str, Interval]]


def figures(run: EvaluationRun) -> Figures:
    """Reckons all figures of a finished evaluation."""
    columns: dict[Arm, dict[str, Column]] = {}
    by_kind: dict[Arm, dict[str, dict[str, Interval]]] = {}
    kinds = list(dict.fromkeys(prompt.kind for prompt in run.prompts))
    of_job = [prompt.kind for prompt in run.prompts for _ in run.protocol.seeds]
    for arm in run.all_arms():
        columns[arm], by_kind[arm] = {}, {}
        for name, measure in run.measures.items():
            rows = run.values(arm, measure)
            columns[arm][name] = column(rows)
            by_kind[arm][name] = {
                kind: mean(column([[v for v, k in zip(row, of_job, strict=True) if k == kind] for row in rows]))
                for kind in (kinds if len(kinds) > 1 else ())
            }
    name = run.protocol.baseline or next(iter(run.methods))
    baseline = Arm(name, run.methods[name].weights[0], run.protocol.backends[0])
    out = []
    for arm, values in columns.items():
        base = Arm(name, run.methods[name].weights[0], arm.backend)
        known = columns.get(base)
        gains = {m: difference(v, known[m]) for m, v in values.items()} if known and arm != base else {}
        equal, equal_gain = _at_equal_prompt(run, columns, arm, base)
        over_curve = _over_curve(run, columns, arm, base)
        means = {m: mean(v) for m, v in values.items()}
        title = arm_title(run, arm)
        cost = run.seconds(arm), run.memory(arm)
        out.append(ArmFigures(arm, title, means, gains, by_kind[arm], *cost, equal, equal_gain, over_curve))
    title = arm_title(run, baseline)
    if len(run.protocol.backends) > 1:  # each is compared with its own
        title = title.removesuffix(f" ({baseline.backend})")
    return Figures(run.measures, title, tuple(out), _apart(run, columns))


def arm_title(run: EvaluationRun, arm: Arm) -> str:
    """Names an arm: its method, its weight where there are several, its back end where there are two."""
    method = run.methods[arm.method]
    title = method.title or arm.method
    if len(method.weights) > 1:
        title += f", {arm.weight:g}"
    return title + (f" ({arm.backend})" if len(run.protocol.backends) > 1 else "")


def _at_equal_prompt(
    run: EvaluationRun, columns: Mapping[Arm, Mapping[str, Column]], arm: Arm, base: Arm
) -> tuple[Interval | None, Interval | None]:
    """Identity where the method's curve over its weights has the baseline's prompt score, and its gain over the
    baseline; told once a method, at its first weight."""
    method = run.methods[arm.method]
    if len(method.weights) < 2 or arm.weight != method.weights[0] or arm.method == base.method:
        return None, None
    return _on_curve(run, columns, arm, base)


def _over_curve(
    run: EvaluationRun, columns: Mapping[Arm, Mapping[str, Column]], arm: Arm, base: Arm
) -> Interval | None:
    """How far the identity of an arm is above the baseline's curve over its weights, where that has the arm's prompt
    score."""
    if len(run.methods[base.method].weights) < 2 or arm.method == base.method:
        return None
    gain = _on_curve(run, columns, base, arm)[1]
    return gain and Interval(-gain.value, -gain.high, -gain.low)


def _on_curve(
    run: EvaluationRun, columns: Mapping[Arm, Mapping[str, Column]], of: Arm, other: Arm
) -> tuple[Interval | None, Interval | None]:
    """Identity on the curve of a method over its weights, where it has another arm's prompt score, and what it is above
    the identity of that arm."""
    plot = run.protocol.plot
    curve = [Arm(of.method, w, of.backend) for w in sorted(run.methods[of.method].weights)]
    if not {other, *curve} <= columns.keys() or plot.x not in run.measures or plot.y not in run.measures:
        return None, None
    xs, ys = (np.stack([columns[a][m] for a in curve], -1) for m in (plot.x, plot.y))
    level, reached = columns[other][plot.x], columns[other][plot.y]
    whole = ~np.isnan(np.column_stack([xs, ys, level, reached])).any(1)
    xs, ys, level, reached = xs[whole], ys[whole], level[whole], reached[whole]
    if len(xs) < 2:
        return None, None

    def value(index: NDArray[np.int64]) -> Column:
        return at_level(xs[index].mean(-2), ys[index].mean(-2), level[index].mean(-1))

    def gain(index: NDArray[np.int64]) -> Column:
        return value(index) - reached[index].mean(-1)

    return of_people(value, len(xs)), of_people(gain, len(xs))


def _apart(run: EvaluationRun, columns: Mapping[Arm, Mapping[str, Column]]) -> dict[str, dict[str, Interval]]:
    """The first back end less the second, person by person, of what both draw."""
    if len(run.protocol.backends) < 2:
        return {}
    one, other = run.protocol.backends[:2]
    out = {}
    for arm, values in columns.items():
        twin = Arm(arm.method, arm.weight, other)
        if arm.backend == one and twin in columns:
            title = arm_title(run, arm).removesuffix(f" ({one})")
            out[title] = {m: difference(v, columns[twin][m]) for m, v in values.items()}
    return out
