"""The LPIPS loss: layout, shape and texture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .base import all_valid, match_references
from .cutouts import Cutouts


@dataclass(frozen=True, eq=False)
class LPIPSLoss:
    """LPIPS (Zhang et al. 2018, arXiv 1801.03924) between preview and reference, from 0: layout, shape and texture.

    distance: pictures a and b [n, 3, h, w] in [-1, 1] -> n numbers: `perceptual.lpips_network`.
    references: [m, 3, H, W] in [-1, 1]; cropped about the centre to the preview's shape. size: both are made smaller so
    that the shorter side has this many pixels (LPIPS was fitted on small patches, and memory grows with the area); 0,
    or a smaller preview, stays as it is. Random views are cut from both alike.
    """

    distance: Callable[[Tensor, Tensor], Tensor]
    references: Tensor
    size: int = 256
    cutouts: Cutouts | None = None
    generator: torch.Generator | None = None

    @property
    def draws(self) -> bool:
        """Says whether it cuts random views out of pictures."""
        return self.cutouts is not None and self.cutouts.count > 0

    def bind_rng(self, generator: torch.Generator) -> LPIPSLoss:
        return replace(self, generator=generator)

    def __call__(self, preview: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        n = preview.shape[0]
        preview, references = match_references(preview, self.references, rows, self.size)
        values = [self.distance(preview, references).flatten()]
        if self.cutouts is not None and self.generator is not None and self.cutouts.count:
            a, b = self.cutouts.cut(min(preview.shape[-2:]), self.generator, (preview + 1) / 2, (references + 1) / 2)
            values.append(self.distance(2 * a - 1, 2 * b - 1).flatten())
        return torch.cat(values).unflatten(0, (-1, n)).mean(0), all_valid(preview)
