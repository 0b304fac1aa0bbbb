"""Lookahead losses: how far a preview is from what is wanted, with gradients (arXiv 2404.03620, eq. 4 and section 5.1).

One interface for the sampler and the trainer, `Loss`. A loss knows its references; a preview is compared with the one
that its row names. A loss never changes: what varies from run to run is drawn from a run's own generator (`bind_rng`).
The identity loss is in `identity.py`, the networks come from `clip.py` and `perceptual.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .views import Views, resized

UNLIKE = 1.0  # the value of pictures that have nothing in common: cosine 0, and about the highest LPIPS


class Loss(Protocol):
    """How far previews are from what is wanted."""

    def __call__(self, preview: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """preview [n, 3, h, w] in [-1, 1], float32 -> values [n] and valid [n].

        values: float32, lower is better, 0 is perfect, about 1 is nothing in common. valid: bool, the samples whose
        value means something; the others carry no gradient (an identity loss that sees no face).
        rows: [n] long, the number in its batch of the image that each preview is of; its reference is that number
        modulo the count of references. None: the previews are a whole batch, in order.
        """
        ...


class PictureEncoder(Protocol):
    """A network that reads square pictures of one size: [n, 3, size, size] in [0, 1] -> [n, channels]."""

    size: int

    def __call__(self, pictures: Tensor) -> Tensor: ...


def bind_rng(loss: Loss, generator: torch.Generator) -> Loss:
    """Binds a run's random numbers to a loss: random views are drawn from `generator` (a CPU one), call after call.

    The same seed gives the same run. Losses that draw nothing are returned as they are; one that draws and has no
    generator looks at whole pictures alone.
    """
    bind = getattr(loss, "bind_rng", None)
    return loss if bind is None else bind(generator)


def clamp_preview(preview: Tensor) -> Tensor:
    """The preview as it will be seen: clamped to [-1, 1], where a loss must not pay for what saving cuts off.

    Raises ValueError, one sentence, where it is no batch of colour pictures.
    """
    if preview.ndim != 4 or preview.shape[1] != 3:
        raise ValueError(
            f"A preview must be of shape [n, 3, h, w], not {list(preview.shape)}: decode the latent first."
        )
    return preview.clamp(-1, 1)


def select_references(references: Tensor, preview: Tensor, rows: Tensor | None) -> Tensor:
    """The reference of each preview: references [m, ...] -> [n, ...], on the preview's device and in its precision."""
    n = preview.shape[0]
    if rows is not None and rows.shape != (n,):
        raise ValueError(f"There are {n} previews and rows of shape {list(rows.shape)}: give one row for each preview.")
    index = torch.arange(n, device=preview.device) if rows is None else rows.to(preview.device)
    return references.to(preview)[index % len(references)]


def all_valid(preview: Tensor) -> Tensor:
    """`valid` [n] of a loss for which every sample is valid."""
    return torch.ones(preview.shape[0], dtype=torch.bool, device=preview.device)


@dataclass(frozen=True, eq=False)
class EmbeddingLoss:
    """1 - cosine of a picture's embedding and a target, from 0 to 2: CLIP with pictures or words, and DreamSim.

    targets: [m, channels]; embeddings of reference pictures or of texts (`clip.embed_texts`), or the way from one text
    to another (`clip.directions`). A picture that is not square is cropped about its centre.
    """

    encoder: PictureEncoder
    targets: Tensor
    views: Views | None = None
    generator: torch.Generator | None = None

    def bind_rng(self, generator: torch.Generator) -> EmbeddingLoss:
        return replace(self, generator=generator)

    def __call__(self, preview: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        pictures = (clamp_preview(preview) + 1) / 2
        size, n = self.encoder.size, preview.shape[0]
        seen = [resized(pictures, size, size).clamp(0, 1)]  # bicubic overshoots
        if self.views is not None and self.generator is not None and self.views.count:
            seen += self.views.of(size, self.generator, pictures)
        embeddings = self.encoder(torch.cat(seen)).unflatten(0, (-1, n))
        values = 1 - F.cosine_similarity(embeddings, select_references(self.targets, preview, rows), dim=-1)
        return values.mean(0), all_valid(preview)


@torch.no_grad()
def embed(encoder: PictureEncoder, pictures: Tensor) -> Tensor:
    """Unit vectors [n, channels] of references [n, 3, h, w] in [-1, 1], read as `EmbeddingLoss` reads previews."""
    squares = resized((clamp_preview(pictures) + 1) / 2, encoder.size, encoder.size).clamp(0, 1)
    return F.normalize(encoder(squares), dim=-1)


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
    views: Views | None = None
    generator: torch.Generator | None = None

    def bind_rng(self, generator: torch.Generator) -> LPIPSLoss:
        return replace(self, generator=generator)

    def __call__(self, preview: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        n = preview.shape[0]
        seen = shorter_side(clamp_preview(preview), self.size)
        wanted = resized(select_references(self.references, preview, rows), *seen.shape[-2:]).clamp(-1, 1)
        values = [self.distance(seen, wanted).flatten()]
        if self.views is not None and self.generator is not None and self.views.count:
            a, b = self.views.of(min(seen.shape[-2:]), self.generator, (seen + 1) / 2, (wanted + 1) / 2)
            values.append(self.distance(2 * a - 1, 2 * b - 1).flatten())
        return torch.cat(values).unflatten(0, (-1, n)).mean(0), all_valid(preview)


@dataclass(frozen=True, eq=False)
class L1Loss:
    """Mean absolute difference of preview and reference, from 0 to 2; with a small `size`, of layout and colours alone.

    references: [m, 3, H, W] in [-1, 1], cropped about the centre to the preview's shape. size: shorter side in pixels
    to which both are averaged; 0 or a smaller preview: as it is.
    """

    references: Tensor
    size: int = 0

    def __call__(self, preview: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        seen = shorter_side(clamp_preview(preview), self.size)
        wanted = resized(select_references(self.references, preview, rows), *seen.shape[-2:]).clamp(-1, 1)
        return (seen - wanted).abs().mean(dim=(1, 2, 3)), all_valid(preview)


def shorter_side(pictures: Tensor, size: int) -> Tensor:
    """Pictures [n, 3, h, w] in [-1, 1], made smaller so that the shorter side has `size` pixels; never larger."""
    h, w = pictures.shape[-2:]
    if not 0 < size < min(h, w):
        return pictures
    scale = size / min(h, w)
    return resized(pictures, round(h * scale), round(w * scale)).clamp(-1, 1)


@dataclass(frozen=True)
class Combined:
    """Several losses as one: the mean of their values, weighed; weights are relative, and 0 leaves a part out.

    A sample is valid when any part is for it. A part that is not (no face was found) enters as `UNLIKE`, without a
    gradient. Leaving it out of the mean instead would lower the value of a picture that has just lost its face, so the
    best of several pictures would be a faceless one; and it would double the other parts' gradients for that sample.
    Raises ValueError where no part has a weight, or one is negative.
    """

    parts: tuple[tuple[float, Loss], ...]

    def __post_init__(self) -> None:
        weights = [weight for weight, _ in self.parts]
        if not any(weights) or any(weight < 0 for weight in weights):
            raise ValueError(f"The weights of the losses are {weights}: use 0 or more, and above 0 for one at least.")

    def bind_rng(self, generator: torch.Generator) -> Combined:
        return replace(self, parts=tuple((weight, bind_rng(loss, generator)) for weight, loss in self.parts))

    def __call__(self, preview: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total, value, valid = sum(weight for weight, _ in self.parts), 0.0, torch.zeros_like(all_valid(preview))
        for weight, loss in self.parts:
            if weight:
                values, part_valid = loss(preview, rows)
                value = value + weight / total * torch.where(part_valid, values, UNLIKE)
                valid = valid | part_valid
        return value, valid
