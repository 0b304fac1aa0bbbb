"""SDXL's noise schedule, the one-step preview, and which steps of a run are chosen.

Two scales of the same latent are in use. The paper and diffusers have z_t = sqrt(alpha_bar) z_0 + sqrt(1 - alpha_bar) e
of variance 1, the host has x = z_0 + sigma e: x = z_t sqrt(1 + sigma^2), with alpha_bar = 1 / (1 + sigma^2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON, V_PREDICTION = "epsilon", "v_prediction"


def alphas_cumprod(steps: int = 1000, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """alpha_bar of SDXL's timesteps, [steps] in float64: the cumulative product of 1 - beta, beta "scaled linear"."""
    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


def sigma_of(alpha_bar: Tensor) -> Tensor:
    """sigma = sqrt((1 - alpha_bar) / alpha_bar), the host's measure of noise."""
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def alpha_bar_of(sigma: Tensor) -> Tensor:
    """alpha_bar = 1 / (1 + sigma^2), the inverse of `sigma_of`."""
    return 1 / (1 + sigma**2)


def timestep_of(sigma: Tensor, sigmas: Tensor) -> Tensor:
    """The timestep of a noise level, a fraction where it lies between two: linear in log sigma, as the host has it.

    sigma: any shape, greater than 0; sigmas: [steps] rising, of the timesteps 0, 1, ... Beyond the ends, the ends.
    """
    wanted, known = sigma.log().to(sigmas.dtype), sigmas.log()
    low = (torch.searchsorted(known, wanted.contiguous()) - 1).clamp(0, len(sigmas) - 2)
    part = (wanted - known[low]) / (known[low + 1] - known[low])
    return low + part.clamp(0, 1)


def sigma_at(timestep: Tensor, sigmas: Tensor) -> Tensor:
    """The inverse of `timestep_of`."""
    low = timestep.floor().long().clamp(0, len(sigmas) - 2)
    part = (timestep - low).clamp(0, 1).to(sigmas.dtype)
    return torch.lerp(sigmas.log()[low], sigmas.log()[low + 1], part).exp()


def predicted_original(z_t: Tensor, prediction: Tensor, alpha_bar: Tensor, kind: str = EPSILON) -> Tensor:
    """z_0 as a network's prediction has it: equation 3 of the paper for epsilon, and the same for v.

    z_t, prediction: [B, ...]; alpha_bar: [B] or one number as a tensor. Raises ValueError for another kind.
    """
    a = _like(alpha_bar, z_t)
    if kind == EPSILON:  # (z_t - sqrt(1 - alpha_bar) e) / sqrt(alpha_bar)
        return (z_t - (1 - a).sqrt() * prediction) / a.sqrt()
    if kind == V_PREDICTION:  # v = sqrt(alpha_bar) e - sqrt(1 - alpha_bar) z_0
        return a.sqrt() * z_t - (1 - a).sqrt() * prediction
    raise ValueError(f"the kind of prediction is {kind!r}, and {EPSILON!r} or {V_PREDICTION!r} is known")


def boundary_scaling(
    timestep: Tensor, sigma_data: float = 0.5, timestep_scaling: float = 10.0
) -> tuple[Tensor, Tensor]:
    """c_skip, c_out of a latent consistency model: its input at t = 0, from t = 1 on hardly anything of it."""
    s = timestep_scaling * timestep.float()
    return sigma_data**2 / (s**2 + sigma_data**2), s / (s**2 + sigma_data**2).sqrt()


def one_step(z_0: Tensor, z_t: Tensor, timestep: Tensor) -> Tensor:
    """The preview c_out z_0 + c_skip z_t of a few-step model, from its predicted original.

    z_0, z_t: [B, ...]; timestep: [B] or one number as a tensor, 0 to 999.
    """
    c_skip, c_out = (_like(c, z_t) for c in boundary_scaling(timestep))
    return c_out * z_0 + c_skip * z_t


def preview_latent(z_t: Tensor, prediction: Tensor, timestep: Tensor, alpha_bar: Tensor, kind: str = EPSILON) -> Tensor:
    """The paper's preview, equation 3 with the boundary scaling of consistency models. Shapes as above."""
    return one_step(predicted_original(z_t, prediction, alpha_bar, kind), z_t, timestep)


def chosen_steps(sigmas: Sequence[float], start_sigma: float, count: int) -> list[int]:
    """Numbers of the steps of a run that are chosen: the first whose noise is at most `start_sigma`, and the next ones.

    sigmas: the noise levels at which the steps begin, falling. A run that begins later (img2img) has its first step
    chosen; one that ends earlier has none.
    """
    first = next((i for i, sigma in enumerate(sigmas) if sigma <= start_sigma * (1 + 1e-4)), len(sigmas))
    return list(range(first, min(first + count, len(sigmas))))


def _like(values: Tensor, z: Tensor) -> Tensor:
    values = values.to(device=z.device, dtype=torch.promote_types(z.dtype, torch.float32))
    return values.reshape(-1, *[1] * (z.ndim - 1)) if values.ndim else values
