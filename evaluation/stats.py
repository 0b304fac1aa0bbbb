"""Identity and prompt scores with their 95 % intervals: pure functions over tensors, seeded."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.stats import binomtest, mannwhitneyu
from torch import Tensor


class Interval(NamedTuple):
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


Intervals = dict[str, Interval]  # by the name of the figure


def auc(own: Tensor, other: Tensor) -> float:
    """Area under the ROC curve: the chance that a value of `own` [n] exceeds one of `other` [m]; ties count half."""
    if not len(own) or not len(other):
        raise ValueError(f"AUC needs values on both sides, got {len(own)} own and {len(other)} other")
    u = mannwhitneyu(own.double().numpy(), other.double().numpy(), method="asymptotic").statistic
    return float(u) / (len(own) * len(other))


def bootstrap(figure: Callable[[Tensor], float], groups: int, rounds: int = 1000, seed: int = 0) -> Interval:
    """`figure(index)` over resampled groups (references, say), with the percentile interval of `rounds` draws.

    index [groups] holds the drawn groups, with repetition; `arange(groups)` gives the figure itself. Groups are drawn,
    not pictures, because pictures of one reference are not independent (the cluster bootstrap).
    """
    # scipy.stats.bootstrap would do the same over `arange(groups)`, but draws by numpy's generators alone: all
    # published intervals, which are seeded by torch's, would move in their last digits.
    numbers = torch.Generator().manual_seed(seed)
    drawn = [figure(torch.randint(groups, (groups,), generator=numbers)) for _ in range(rounds)]
    low, high = torch.tensor(drawn, dtype=torch.double).quantile(torch.tensor([0.025, 0.975], dtype=torch.double))
    return Interval(figure(torch.arange(groups)), low.item(), high.item())


def own_and_other(similarity: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities of pictures to their own and to all other references.

    similarity [references, pictures per reference, references]: of picture (r, p) to reference s; index [k]: which
    references count (with repetition in a bootstrap; a repeated reference is never its own "other").
    """
    own = similarity[index, :, index].flatten()
    rows = similarity[index][:, :, index]
    different = (index[:, None] != index[None])[:, None].expand_as(rows)
    return own, rows[different]


def identity_auc(similarity: Tensor, rounds: int = 200, seed: int = 0) -> Interval:
    """AUC between similarity to the own and to other references, interval by drawing references.

    The same as `auc(*own_and_other(similarity, index))` for every draw, but sorted once: a reference that is drawn k
    times is one of weight k, and a pair weighs the product of its two references' weights.
    """
    n, pictures, _ = similarity.shape
    own_rows = torch.arange(n).repeat_interleave(pictures)
    own = similarity[torch.arange(n), :, torch.arange(n)].flatten()
    r, _, s = torch.where((~torch.eye(n, dtype=torch.bool))[:, None].expand_as(similarity))
    other, order = similarity[(~torch.eye(n, dtype=torch.bool))[:, None].expand_as(similarity)].sort()
    r, s = r[order], s[order]
    lower, upper = torch.searchsorted(other, own), torch.searchsorted(other, own, right=True)

    def figure(index: Tensor) -> float:
        weight = torch.bincount(index, minlength=n).double()
        below = torch.cat([torch.zeros(1, dtype=torch.double), (weight[r] * weight[s]).cumsum(0)])
        if below[-1] == 0:
            raise ValueError("AUC needs at least two different references")
        above = (below[lower] + below[upper]) / 2  # ties count half
        own_weight = weight[own_rows]
        return ((own_weight * above).sum() / (own_weight.sum() * below[-1])).item()

    return bootstrap(figure, n, rounds, seed)


def proportion(hits: Tensor) -> Interval:
    """Share of hits [n] (bool) among independent pictures, with Wilson's score interval.

    Unlike the bootstrap's, it does not shrink to a point where all or none hit.
    """
    if not len(hits):
        raise ValueError("a share needs at least one picture")
    test = binomtest(int(hits.sum()), len(hits))
    ends = test.proportion_ci(method="wilson")
    return Interval(float(test.statistic), float(ends.low), float(ends.high))


def share(hits: Tensor, rounds: int = 1000, seed: int = 0) -> Interval:
    """Mean of hits [references, pictures] (0 or 1, or any score), interval by drawing references."""
    return bootstrap(lambda index: hits[index].double().mean().item(), len(hits), rounds, seed)
