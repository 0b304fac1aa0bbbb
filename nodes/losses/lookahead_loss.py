"""What travels as LOOKAHEAD_LOSS: a loss of previews, with the networks that it reads with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...lookahead.losses.base import Loss

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


@dataclass(frozen=True, eq=False)
class LookaheadLoss:
    """What travels as LOOKAHEAD_LOSS.

    loss: how far previews are from what is wanted, `lookahead.losses.Loss`; a run calls `bind_rng(loss, generator)`
        first, so that its random views repeat.
    patchers: the networks that it reads with, to be loaded together with the UNet and the VAE.
    name: in a word or two, for logs and plots.
    """

    loss: Loss = field(repr=False)
    patchers: tuple[ModelPatcher, ...] = field(default=(), repr=False)
    name: str = "loss"
