"""Means over people with bootstrap intervals: of one method, and of the difference of two, person by person."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap as resampled
from scipy.stats import norm, t

from .stats import Interval

ROUNDS = 2000
LEVEL = 0.95

#: Values by person, [people]; NaN where a person has none
Column = NDArray[np.float64]


def column(rows: Sequence[Sequence[float | None]]) -> Column:
    """The mean of each person's scores, [people]; None does not count, and a person without any is NaN."""
    counted = [[value for value in row if value is not None] for row in rows]
    return np.array([np.mean(row) if row else np.nan for row in counted], dtype=np.float64)


def mean(values: Column, seed: int = 0, rounds: int = ROUNDS) -> Interval:
    """The mean over people and its 95 % interval, by drawing people. With one person, the interval is unbounded.

    The interval is the percentile bootstrap's, expanded for few people (Hesterberg 2015, The American Statistician
    69:371): quantiles are taken where Student's t with n - 1 degrees would have them, which the plain one's, too
    narrow by sqrt((n - 1) / n) and by normal quantiles, are not.
    """
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    if len(values) == 1:
        return Interval(float(values[0]), float("-inf"), float("inf"))
    return of_people(lambda index: values[index].mean(-1), len(values), seed, rounds)


def difference(values: Column, over: Column, seed: int = 0, rounds: int = ROUNDS) -> Interval:
    """The mean of the differences person by person, and its interval. Raises ValueError for other people."""
    if values.shape != over.shape:
        raise ValueError(f"a paired difference needs the same people, got {len(values)} and {len(over)}")
    return mean(values - over, seed, rounds)


def of_people(
    figure: Callable[[NDArray[np.int64]], NDArray[np.float64]], people: int, seed: int = 0, rounds: int = ROUNDS
) -> Interval:
    """A figure of people with its interval. figure: numbers of people [..., n] -> figures [...], NaN where none."""
    everyone = np.arange(people)
    value = float(figure(everyone))
    level = 1 - 2 * float(norm.cdf(-np.sqrt(people / (people - 1)) * t.ppf((1 + LEVEL) / 2, people - 1)))
    drawn = resampled(
        (everyone,),
        lambda index, axis=-1: figure(np.moveaxis(index, axis, -1)),
        n_resamples=rounds,
        confidence_level=level,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    found = drawn.bootstrap_distribution[~np.isnan(drawn.bootstrap_distribution)]
    if len(found) < 0.9 * rounds:  # where it mostly cannot be told, its interval cannot either
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def at_level(
    xs: NDArray[np.float64], ys: NDArray[np.float64], level: NDArray[np.float64] | float
) -> NDArray[np.float64]:
    """The best that a trade-off curve reaches at a level of x: [...], NaN where the curve does not come there.

    xs, ys: [..., points] in the order of the weights; level: [...] or a number. Between two
    points the curve is straight, and where it comes to the level several times, the best y counts.
    """
    level = np.asarray(level)[..., None]
    x0, x1, y0, y1 = xs[..., :-1], xs[..., 1:], ys[..., :-1], ys[..., 1:]
    crosses = (np.minimum(x0, x1) <= level) & (level <= np.maximum(x0, x1))
    run = np.where(x1 == x0, 1.0, x1 - x0)
    share = np.where(x1 == x0, np.where(y1 > y0, 1.0, 0.0), (level - x0) / run)
    reached = np.where(crosses, y0 + share * (y1 - y0), -np.inf).max(-1, initial=-np.inf)
    return np.where(np.isneginf(reached), np.nan, reached)
