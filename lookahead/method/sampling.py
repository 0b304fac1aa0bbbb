"""Samplers, as functions of the predicted noise: from the initial noise to the latents of pictures.

`predict` (x [B, 4, h, w], timesteps [B]) -> noise [B, 4, h, w] holds all that is conditioned or guided; x has variance
about 1 (see schedule.py). `callback` gets a dict at every step: i, t [B], x, and the prediction e made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .schedule import TIMESTEPS, add_noise, ddim_step, preview_latent

PredictNoise = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[dict[str, Any]], None]


def ddim_timesteps(steps: int) -> list[int]:
    """Timesteps of a run of DDIM, falling to 1: evenly spaced, "leading" with an offset of 1 in diffusers' terms."""
    stride = TIMESTEPS // steps
    return list(range(1 + stride * (steps - 1), 0, -stride))


@torch.no_grad()
def sample_ddim(
    predict: PredictNoise, x: Tensor, timesteps: Sequence[int], alpha_bar: Tensor, callback: Callback | None = None
) -> Tensor:
    """DDIM with eta 0 (arXiv 2010.02502). It ends at timestep 0, whose noise is hardly any.

    x: noise; alpha_bar: of all timesteps (`alphas_cumprod`), on x's device.
    """
    for i, (now, following) in enumerate(zip(timesteps, [*timesteps[1:], 0], strict=True)):
        t = torch.full((len(x),), now, device=x.device)
        e = predict(x, t)
        if callback is not None:
            callback({"i": i, "t": t, "x": x, "e": e})
        x = ddim_step(x, e, alpha_bar[t], alpha_bar[following])
    return x


@torch.no_grad()
def sample_lcm(
    predict: PredictNoise,
    x: Tensor,
    timesteps: Sequence[int],
    alpha_bar: Tensor,
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
    callback: Callback | None = None,
) -> Tensor:
    """Multistep consistency sampling (arXiv 2310.04378, algorithm 3): answer, noise again to the next step, answer.

    Arguments as for `sample_ddim`; noise: a latent -> new noise like it.
    """
    for i, now in enumerate(timesteps):
        t = torch.full((len(x),), now, device=x.device)
        if i:
            x = add_noise(x, noise(x), alpha_bar[t])
        e = predict(x, t)
        if callback is not None:
            callback({"i": i, "t": t, "x": x, "e": e})
        x = preview_latent(x, e, t, alpha_bar[t])
    return x
