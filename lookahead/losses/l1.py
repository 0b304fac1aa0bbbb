"""The L1 loss: colours, place by place."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import all_valid, match_references


@dataclass(frozen=True, eq=False)
class L1Loss:
    """Mean absolute difference of preview and reference, from 0 to 2; with a small `size`, of layout and colours alone.

    references: [m, 3, H, W] in [-1, 1], cropped about the centre to the preview's shape. size: shorter side in pixels
    to which both are averaged; 0 or a smaller preview: as it is.
    """

    references: Tensor
    size: int = 0

    def __call__(self, preview: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        seen, wanted = match_references(preview, self.references, rows, self.size)
        return (seen - wanted).abs().mean(dim=(1, 2, 3)), all_valid(preview)
