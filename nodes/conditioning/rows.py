"""Which row of a batch plays which role, and which part of the picture it sees.

A row's index means nothing by itself: guiders order their condition lists as they like (DualCFG has the negative
first, PerpNeg has three lists), nodes evaluate one list alone, and batches split by free memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...lookahead.method.attention import mask_on_tokens
from ...lookahead.method.layer_weights import at_share, share_of

UNCONDITIONAL = ("negative", "empty_negative_prompt")  # names of such lists in the host's guiders

CondList = list[dict[str, Any]]


def conditional_roles(conds: Sequence[CondList | None], guider_conds: Mapping[str, CondList]) -> tuple[bool, ...]:
    """For each evaluated list whether it is conditional: by which list of the guider it IS.

    A list that the guider does not hold (a copy, or encoded anew) takes the role of the guider's list that begins with
    the same text, else it is unconditional.
    """

    def role(cond: CondList | None) -> bool:
        for name, known in guider_conds.items():
            if cond is known:
                return name not in UNCONDITIONAL
        # Only the first condition of a list is surely its own: the host appends the areas of other lists.
        for mark in ("uuid", "cross_attn"):
            own = cond[0].get(mark) if cond else None
            for name, known in guider_conds.items():
                if own is not None and known and known[0].get(mark) is own:
                    return name not in UNCONDITIONAL
        return False

    return tuple(role(cond) for cond in conds)


@dataclass(frozen=True)
class Area:
    """A rectangle of the latent picture, in latent pixels."""

    height: int
    width: int
    top: int
    left: int

    @classmethod
    def of(cls, cond: dict[str, Any]) -> Area | None:
        """The area of a condition, None for the whole picture."""
        area = cond.get("area")
        return None if area is None or len(area) != 4 else cls(*area)

    def crop(self, picture: Tensor) -> Tensor:
        """[n, H, W] -> [n, height, width], less where the area reaches beyond the picture (as the host does)."""
        return picture[:, self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class CondBatch:
    """The condition lists of one evaluation (the host's `calc_cond_batch`), by which rows of a UNet pass are read.

    roles: for each list whether it is conditional; areas: by a condition's uuid; latent: height and width of the
    picture; pictures: how many the batch holds, which is the number of rows of each condition.
    """

    roles: tuple[bool, ...]
    areas: Mapping[Any, Area | None]
    latent: tuple[int, int]
    pictures: int

    def roles_of(self, options: Mapping[str, Any]) -> tuple[bool, ...]:
        """For each chunk of a UNet pass whether it is conditional."""
        return tuple(0 <= i < len(self.roles) and self.roles[i] for i in options.get("cond_or_uncond") or [0])

    def areas_of(self, options: Mapping[str, Any]) -> tuple[Area | None, ...]:
        """For each chunk of a UNet pass its area."""
        chunks = len(options.get("cond_or_uncond") or [0])
        return tuple(self.areas.get(uuid) for uuid in options.get("uuids") or [None] * chunks)


class RowLayout:
    """Which image and which role every row of one UNet pass has; iterates as (image, conditional).

    problem: what to log where the rows are of a kind that cannot be followed, else None.
    """

    def __init__(self, x: Tensor, options: Mapping[str, Any], batch: CondBatch | None):
        self.rows = x.shape[0]
        self.problem: str | None = None
        chunks = len(options.get("cond_or_uncond") or [0])
        self.images = batch.pictures if batch is not None else max(self.rows // chunks, 1)
        # Nodes that draw in tiles (MultiDiffusion) pass several tiles at once: all chunks of one tile, then the next.
        self.copies, rest = divmod(self.rows, chunks * self.images)
        if rest or self.copies == 0:
            self.problem = "another node puts together a batch that the reference cannot follow: it runs without it."
        # A pass that no known list of the guider asked for counts as unconditional.
        self._roles = batch.roles_of(options) if batch is not None else (False,) * chunks
        self._areas = batch.areas_of(options) if batch is not None else (None,) * chunks
        self._latent = batch.latent if batch is not None else tuple(x.shape[-2:])
        self._seen = tuple(x.shape[-2:])

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        for _ in range(self.copies):
            for conditional in self._roles:
                for image in range(self.images):
                    yield image, conditional

    def mask(self, mask: Tensor) -> Tensor | None:
        """A mask over whole pictures [masks, H, W] for every row: [rows, h, w]; None where rows are tiles."""
        height, width = self._latent
        full = mask_on_tokens(mask, height, width).unflatten(1, (height, width)).squeeze(-1)
        full = full[torch.arange(self.images, device=full.device) % full.shape[0]]
        parts = [full if area is None else area.crop(full) for area in self._areas]
        if self.copies != 1 or any(tuple(part.shape[-2:]) != self._seen for part in parts):
            return None
        return torch.cat(parts)


@dataclass(frozen=True)
class When:
    """The part of the sampling in which something acts, from 0 (first step) to 1, by the host's own convention.

    steps: how strongly it acts there, spread evenly from 0 to 1 (`layer_weights.at_share`); empty is 1 everywhere.
    """

    start: float = 0.0
    end: float = 1.0
    steps: tuple[float, ...] = ()

    def acts(self, sigma: Tensor, model_sampling: Any) -> bool:
        """Tells whether it acts at this noise level at all."""
        if self.start > 0 or self.end < 1:  # else the device need not be asked for the value of sigma
            now = float(sigma.flatten()[0])
            if not model_sampling.percent_to_sigma(self.end) <= now <= model_sampling.percent_to_sigma(self.start):
                return False
        return self.factor(sigma, model_sampling) != 0

    def factor(self, sigma: Tensor, model_sampling: Any) -> float:
        """Says how strongly it acts at a noise level where it does."""
        if not self.steps:
            return 1.0
        return at_share(self.steps, share_of(float(sigma.flatten()[0]), model_sampling.percent_to_sigma))
