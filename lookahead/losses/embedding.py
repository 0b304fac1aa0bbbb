"""The embedding loss: CLIP with pictures or words, and DreamSim."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..vision.images import cover
from .base import all_valid, clamp_preview, select_references
from .cutouts import Cutouts


class PictureEncoder(Protocol):
    """A network that reads square pictures of one size: [n, 3, size, size] in [0, 1] -> [n, channels]."""

    size: int

    def __call__(self, pictures: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class EmbeddingLoss:
    """1 - cosine of a picture's embedding and a target, from 0 to 2: CLIP with pictures or words, and DreamSim.

    targets: [m, channels]; embeddings of reference pictures or of texts (`clip.embed_texts`), or the way from one text
    to another (`clip.directions`). A picture that is not square is cropped about its centre.
    """

    encoder: PictureEncoder
    targets: Tensor
    cutouts: Cutouts | None = None
    generator: torch.Generator | None = None

    @property
    def draws(self) -> bool:
        """Says whether it cuts random views out of pictures."""
        return self.cutouts is not None and self.cutouts.count > 0

    def bind_rng(self, generator: torch.Generator) -> EmbeddingLoss:
        return replace(self, generator=generator)

    def __call__(self, preview: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        pictures = (clamp_preview(preview) + 1) / 2
        size, n = self.encoder.size, preview.shape[0]
        crops = [cover(pictures, size, size).clamp(0, 1)]  # bicubic overshoots
        if self.cutouts is not None and self.generator is not None and self.cutouts.count:
            crops += self.cutouts.cut(size, self.generator, pictures)
        embeddings = self.encoder(torch.cat(crops)).unflatten(0, (-1, n))
        values = 1 - F.cosine_similarity(embeddings, select_references(self.targets, preview, rows), dim=-1)
        return values.mean(0), all_valid(preview)


@torch.no_grad()
def embed(encoder: PictureEncoder, pictures: Tensor) -> Tensor:
    """Unit vectors [n, channels] of references [n, 3, h, w] in [-1, 1], read as `EmbeddingLoss` reads previews."""
    squares = cover((clamp_preview(pictures) + 1) / 2, encoder.size, encoder.size).clamp(0, 1)
    return F.normalize(encoder(squares), dim=-1)
