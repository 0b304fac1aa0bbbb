"""Lookahead losses: how far a preview is from what is wanted, with gradients (arXiv 2404.03620, eq. 4 and section 5.1).

One interface for the sampler and the trainer, `Loss`. A loss knows its references; a preview is compared with the one
that its row names. A loss never changes: what varies from run to run is drawn from a run's own generator (`bind_rng`).
Each loss has a file of its own here; its networks come from `vision`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..vision.images import cover, shorter_side

UNLIKE = 1.0  # the value of pictures that have nothing in common: cosine 0, and about the highest LPIPS


class Loss(Protocol):
    """A loss says how far previews are from what is wanted."""

    def __call__(self, preview: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss of each preview [n, 3, h, w] in [-1, 1], float32, is returned as values [n] and valid [n].

        values: float32, lower is better, 0 is perfect, about 1 is nothing in common. valid: bool, the samples whose
        value means something; the others carry no gradient (an identity loss that sees no face).
        rows: [n] long, the number in its batch of the image that each preview is of; its reference is that number
        modulo the count of references. None: the previews are a whole batch, in order.
        """
        ...


@runtime_checkable
class Showing(Protocol):
    """A loss that can show what it asks for: its references, put into a preview."""

    @property
    def shows(self) -> bool:
        """Says whether it has pictures to show."""
        ...

    def shown(self, preview: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Puts references where previews [n, 3, h, w] in [-1, 1] have what is compared with them: pictures of that
        shape and range, and where these count, [n, 1, h, w] in [0, 1] (nowhere, where nothing was found).

        rows: as in `Loss`. Without a gradient.
        """
        ...


def showing_in(loss: Loss) -> Showing | None:
    """Finds what can show what a loss asks for: the loss itself, or the first of those that it combines."""
    parts = loss.parts if isinstance(loss, Combined) else ((1.0, loss),)
    return next((part for weight, part in parts if weight and isinstance(part, Showing) and part.shows), None)


def bind_rng(loss: Loss, generator: torch.Generator) -> Loss:
    """Binds a run's random numbers to a loss: random views are drawn from `generator` (a CPU one), call after call.

    The same seed gives the same run. Losses that draw nothing are returned as they are; one that draws and has no
    generator looks at whole pictures alone.
    """
    bind = getattr(loss, "bind_rng", None)
    return loss if bind is None else bind(generator)


def rebind_rng(loss: Loss, generator: torch.Generator) -> Loss:
    """A run's loss with other random numbers, to judge by: it knows what the run has seen, and adds nothing to it."""
    rebind = getattr(loss, "rebind_rng", None)
    return bind_rng(loss, generator) if rebind is None else rebind(generator)


def draws(loss: Loss) -> bool:
    """Says whether a loss draws anything by chance: random views, or cuts of a picture."""
    return bool(getattr(loss, "draws", hasattr(loss, "bind_rng")))


def clamp_preview(preview: Tensor) -> Tensor:
    """Clamps the preview to [-1, 1], as it will be seen: a loss must not pay for what saving cuts off.

    Raises ValueError, one sentence, where it is no batch of colour pictures.
    """
    if preview.ndim != 4 or preview.shape[1] != 3:
        raise ValueError(
            f"A preview must be of shape [n, 3, h, w], not {list(preview.shape)}: decode the latent first."
        )
    return preview.clamp(-1, 1)


def select_references(references: Tensor, preview: Tensor, rows: Tensor | None) -> Tensor:
    """Selects the reference of each preview from [m, ...]: [n, ...], on the preview's device and in its precision."""
    n = preview.shape[0]
    if rows is not None and rows.shape != (n,):
        raise ValueError(f"There are {n} previews and rows of shape {list(rows.shape)}: give one row for each preview.")
    index = torch.arange(n, device=preview.device) if rows is None else rows.to(preview.device)
    return references.to(preview)[index % len(references)]


def match_references(preview: Tensor, references: Tensor, rows: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Previews and their references become comparable place by place: both [n, 3, h, w] in [-1, 1].

    references: [m, 3, H, W] in [-1, 1], cropped about the centre to the preview's shape. size: shorter side in pixels
    to which both are made smaller; 0, or a smaller preview, stays as it is.
    """
    small = shorter_side(clamp_preview(preview), size)
    matched = cover(select_references(references, preview, rows), *small.shape[-2:]).clamp(-1, 1)
    return small, matched


def all_valid(preview: Tensor) -> Tensor:
    """`valid` [n] of a loss for which every sample is valid."""
    return torch.ones(preview.shape[0], dtype=torch.bool, device=preview.device)


@dataclass(frozen=True)
class Combined:
    """Several losses act as one, the weighted mean of their values; weights are relative, and 0 leaves a part out.

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

    @property
    def draws(self) -> bool:
        """Says whether a part that counts draws by chance."""
        return any(draws(loss) for weight, loss in self.parts if weight)

    def bind_rng(self, generator: torch.Generator) -> Combined:
        return replace(self, parts=tuple((weight, bind_rng(loss, generator)) for weight, loss in self.parts))

    def rebind_rng(self, generator: torch.Generator) -> Combined:
        return replace(self, parts=tuple((weight, rebind_rng(loss, generator)) for weight, loss in self.parts))

    def __call__(self, preview: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = sum(weight for weight, _ in self.parts)
        value, valid = torch.zeros(len(preview), device=preview.device), torch.zeros_like(all_valid(preview))
        for weight, loss in self.parts:
            if weight:
                values, part_valid = loss(preview, rows)
                value = value + weight / total * torch.where(part_valid, values, UNLIKE)
                valid = valid | part_valid
        return value, valid
