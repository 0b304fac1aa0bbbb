"""The random draws of a sample: a function of the run's seed and the sample's number, whatever ran before.

So a run that was stopped goes on exactly as it would have, on any number of processes, with nothing to save.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ...lookahead.method.schedule import TIMESTEPS, lora_scale, sample_timestep
from ..seeds import generator
from .config import Config


@dataclass(frozen=True, eq=False)
class Draws:
    """The random draws of B samples. Target and reference share one noise, and so do both losses, as in the paper."""

    noise: Tensor  # [B, 4, h, w], standard normal
    t: Tensor  # int64 [B], time steps of the diffusion loss
    t_lookahead: Tensor  # int64 [B], time steps of the lookahead loss
    strength: Tensor  # [B], LoRA scale of the shortcut model, in [0, 1]
    no_text: Tensor  # bool [B], conditioning dropout of the text
    no_image_prompt: Tensor  # bool [B], of the image prompt
    no_kv: Tensor  # bool [B], of the reference KV
    noise_align: Tensor  # [B, 4, h, w], noise of score distillation (`align: sds`)
    t_align: Tensor  # int64 [B], time steps of score distillation

    def to(self, device: torch.device) -> Draws:
        return Draws(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def draw(config: Config, numbers: Sequence[int], shape: tuple[int, ...]) -> Draws:
    """Draw for the samples of these numbers, counted from the start of the run. shape: of one latent, [4, h, w]."""
    noise, uniform, noise_align, u_align = [], [], [], []
    for number in numbers:
        g = generator(config.seed, number)
        noise.append(torch.randn(shape, generator=g))
        uniform.append(torch.rand(6, generator=g, dtype=torch.float64))
        noise_align.append(torch.randn(shape, generator=g))
        u_align.append(torch.rand((), generator=g, dtype=torch.float64))
    u_t, u_lookahead, u_full, u_strength, u_drop, u_kv = torch.stack(uniform, 1)
    ahead, drop = config.lookahead, config.drop
    least = ahead.least_strength
    if ahead.align != "strength":
        least = 1.0
    strength = lora_scale(u_strength, least, 1.0, full=u_full < ahead.full_strength)
    both = u_drop < drop.both
    text = both | ((u_drop >= drop.both) & (u_drop < drop.both + drop.text))
    image = both | ((u_drop >= drop.both + drop.text) & (u_drop < drop.both + drop.text + drop.image_prompt))
    return Draws(
        torch.stack(noise),
        sample_timestep(u_t, config.importance),
        sample_timestep(u_lookahead, ahead.importance),
        strength.float(),
        text,
        image,
        u_kv < drop.kv,
        torch.stack(noise_align),
        (TIMESTEPS * (0.02 + 0.96 * torch.stack(u_align))).long(),
    )
