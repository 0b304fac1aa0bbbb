"""What travels as LOOKAHEAD_SCORES: a score a picture, under its measure's name, so that measures are never mixed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scores:
    """LOOKAHEAD_SCORES holds what a measure says of the pictures of a batch.

    measure: its name and its judge's. values: float32 [n] on the CPU, more is better; NaN where it cannot tell.
    """

    measure: str
    values: Tensor = field(repr=False)

    @property
    def mean(self) -> float:
        """The mean of what could be told; NaN where nothing could."""
        return float(self.values.nanmean())

    def text(self) -> str:
        """Says the scores, a line a picture."""
        lines = [f"{self.measure}, mean {self.mean:.3f}"]
        shown = ("no face" if v != v else f"{v:.3f}" for v in self.values.tolist())
        return "\n".join(lines + [f"picture {n}: {value}" for n, value in enumerate(shown, 1)])


def best_first(values: Tensor, limit: Tensor | None = None, at_least: float = 0.0) -> list[int]:
    """Numbers of the pictures, the best first; those that a limit rules out, then those without a score, come last.

    values, limit: [n], NaN where nothing could be told, which rules a picture out. Equal ones keep their order.
    """
    out = torch.zeros_like(values, dtype=torch.bool) if limit is None else ~(limit >= at_least)
    return sorted(range(len(values)), key=lambda n: (bool(values[n].isnan()), bool(out[n]), -float(values[n])))
