"""The seam between the host's wrappers and the methods of this pack that act inside of the UNet.

An `Effect` is what a node puts on a MODEL: the image prompt of one subject, the KV injection of another. It is
immutable and knows nothing of a run. When a run begins, each effect makes an `ActiveEffect`, which lives as long as the
run and does the work. `wrappers` calls the hooks below and names no effect; a new method subclasses both, implements
the hooks it needs, and its node calls `wrappers.add_effect`:

    Effect.additional_models    when it is put on a MODEL   patchers that the host loads together with the UNet
    Effect.estimated_rows       once a run                  what it adds to the host's memory estimate
    Effect.begin                once a run                  the ActiveEffect, with its tensors on the model's device
    ActiveEffect.acts           once a model call           whether it takes part at this noise level
    ActiveEffect.prefetch       before a gradient           what `evaluate` will need, made ahead of it
    ActiveEffect.evaluate       once an evaluation          of conditions: what its attentions will read
    ActiveEffect.cross_attentions, .self_attentions         once a UNet pass: replacements of attn2 and of attn1
    ActiveEffect.summary        after a run                 a sentence for the log

All hooks do nothing where they are not overridden.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from .rows import CondBatch, CondList, RowLayout, When

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher

Replacements = dict[Any, Callable]  # the host's, of the attn1 or the attn2 of all blocks, by block key


class EstimatedRows(NamedTuple):
    """Memory in the unit of the host's estimate, a row of the picture's latent shape.

    kept: held beside the picture's own rows; evaluated: the largest batch of a pass that the effect makes itself.
    """

    kept: int = 0
    evaluated: int = 0


@dataclass(frozen=True, eq=False)
class RunStart:
    """The run that begins, as an effect sees it.

    patcher: of the sampled UNet, to be run on `device` in `dtype`; noise: the run's, [images, 4, h, w]; seed: the
    guider's; sigmas: the noise levels of the steps, and that after the last, on any device.
    """

    patcher: ModelPatcher
    device: torch.device
    dtype: torch.dtype
    noise: Tensor
    seed: int
    sigmas: Tensor


@dataclass(frozen=True, eq=False)
class CondEvaluation:
    """One evaluation of condition lists (the host's `calc_cond_batch`).

    conds: the lists, None for one that is not evaluated; batch: which of them is conditional, and their areas;
    timestep: the noise level as the host gives it, [images]; active: all effects of the run, acting or not.
    """

    model: BaseModel
    conds: Sequence[CondList | None]
    batch: CondBatch
    timestep: Tensor
    active: tuple[ActiveEffect, ...]

    @property
    def roles(self) -> set[bool]:
        """Tells whether conditional (True) and unconditional (False) lists are among those evaluated."""
        return {role for role, cond in zip(self.batch.roles, self.conds, strict=True) if cond is not None}


@dataclass(frozen=True, eq=False)
class UNetPass:
    """One forward pass of the sampled UNet, as an effect sees it.

    layout: which image and which role each row has; x: the UNet's input [rows, 4, h, w]; dtype: that it computes in;
    options: its transformer_options, a copy: "patches_replace" holds the replacements of other nodes, and to "patches"
    an effect may add its own (in copies of the dict and its lists); evaluated: what `ActiveEffect.evaluate` gave, by
    effect; once: logs a sentence, once a run.
    """

    layout: RowLayout
    x: Tensor
    dtype: torch.dtype
    options: dict[str, Any]
    evaluated: Mapping[ActiveEffect, Any]
    once: Callable[[str], None] = field(repr=False)


class Effect:
    """A change of what the UNet's attentions compute, as a node puts it on a MODEL; clones of the MODEL share it.

    Subclasses are frozen dataclasses (`eq=False`) and define hash by identity; `when`, the part of the sampling in
    which it acts, is one of their fields.
    """

    when: When = When()

    def additional_models(self) -> tuple[ModelPatcher, ...]:
        """Networks that the host loads together with the model, and counts."""
        return ()

    @classmethod
    def estimated_rows(cls, effects: Sequence[Self], model: BaseModel, noise_shape: Sequence[int]) -> EstimatedRows:
        """The memory that all effects of this class on one MODEL take; noise_shape is that of the picture's latent."""
        return EstimatedRows()

    def begin(self, run: RunStart) -> ActiveEffect:
        """This effect in one run, its tensors on the run's device and in its precision."""
        return ActiveEffect(self)


E = TypeVar("E", bound=Effect)


class ActiveEffect(Generic[E]):
    """An effect in one run of the host; the run drops it when it ends. It may keep what it finds out on the way.

    order: of installation in each attention, the lowest innermost: a replacement that is installed later is called
    first, and gets the earlier one as the attention to go on with. Effects of one class are installed together.
    """

    order: ClassVar[int] = 0

    def __init__(self, effect: E):
        self.effect = effect

    def acts(self, timestep: Tensor, model_sampling: Any) -> bool:
        """Tells whether it takes part in a model call at this noise level, [images]."""
        return self.effect.when.acts(timestep, model_sampling)

    def prefetch(
        self, model: BaseModel, timestep: Tensor, roles: Collection[bool], active: tuple[ActiveEffect, ...]
    ) -> None:
        """Make ahead what `evaluate` will need at this noise level for these roles.

        Called before a gradient is taken through the UNet, so that no pass of the effect's own runs inside of it.
        """

    def evaluate(self, evaluation: CondEvaluation) -> Any:
        """Make what its attentions will read in the passes of one evaluation; it comes back in `UNetPass.evaluated`."""
        return None

    @classmethod
    def cross_attentions(cls, acting: Sequence[Self], unet_pass: UNetPass, attn2: Replacements) -> Replacements:
        """The replacements of cross-attentions `attn2` with those of all acting effects of this class."""
        return attn2

    @classmethod
    def self_attentions(cls, acting: Sequence[Self], unet_pass: UNetPass, attn1: Replacements) -> Replacements:
        """The replacements of self-attentions `attn1` with those of all acting effects of this class."""
        return attn1

    def summary(self) -> str | None:
        """A sentence for the log after the run, None where there is nothing to say."""
        return None
