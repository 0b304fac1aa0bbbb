"""SDXL's noise schedule and what is computed from it alone: noising, DDIM, the preview, and how a training sample's
timestep and LoRA scale are drawn (LCM-Lookahead, arXiv 2404.03620).

Two scales of the same latent are in use. The paper and diffusers have the variance-preserving z_t = sqrt(alpha_bar) z_0
+ sqrt(1 - alpha_bar) e, the host has the variance-exploding x = z_0 + sigma e: x = z_t sqrt(1 + sigma^2), with
alpha_bar = 1 / (1 + sigma^2). `to_vp` and `to_ve` lead from one to the other.

Everywhere z, x, noise and predictions are [B, ...]; alpha_bar, sigma and timestep are [B] or one number as a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012  # of "scaled linear": their roots lie evenly
EPSILON, V_PREDICTION = "epsilon", "v_prediction"


def alphas_cumprod(steps: int = TIMESTEPS, start: float = BETA_START, end: float = BETA_END) -> Tensor:
    """alpha_bar of SDXL's timesteps, [steps] in float64: the cumulative product of 1 - beta, beta "scaled linear"."""
    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


def to_vp(x: Tensor, sigma: Tensor) -> Tensor:
    """The paper's z_t = x / sqrt(1 + sigma^2), of variance about 1, from the host's x = z_0 + sigma e."""
    return x / (_like(sigma, x) ** 2 + 1).sqrt()


def to_ve(z: Tensor, sigma: Tensor) -> Tensor:
    """The host's x = z_t sqrt(1 + sigma^2), the inverse of `to_vp`. Both are linear: they scale differences as well."""
    return z * (_like(sigma, z) ** 2 + 1).sqrt()


def alpha_bar_of(sigma: Tensor, flow: bool = False) -> Tensor:
    """alpha_bar = 1 / (1 + sigma^2) of the host's noise level, any shape: the square of what `to_vp` leaves of z_0.

    flow: the host's latent is (1 - sigma) z_0 + sigma e, as in flow matching.
    """
    return (1 - sigma) ** 2 * (1 / (sigma**2 + 1)) if flow else 1 / (sigma**2 + 1)


def alpha_bar_at(alphas: Tensor, timestep: Tensor) -> Tensor:
    """alpha_bar at time steps, of a schedule's [steps]; between two of them log sigma is interpolated."""
    below, above = timestep.floor().long(), timestep.ceil().long().clamp(max=len(alphas) - 1)
    log_sigma = [0.5 * torch.log((1 - alphas[i]) / alphas[i]) for i in (below, above)]
    between = torch.sigmoid(-2 * torch.lerp(log_sigma[0], log_sigma[1], timestep.double() - below))
    return torch.where(below == above, alphas[below], between)


def signal_scale(alpha_bar: Tensor, z_t: Tensor) -> Tensor:
    """sqrt(alpha_bar), what z_t has of its picture: in its precision, in a shape to multiply it, [B or 1, 1, ...]."""
    return alpha_bar.to(z_t).sqrt().reshape(-1, *[1] * (z_t.ndim - 1))


def signal_to_noise(alpha_bar: Tensor) -> Tensor:
    """SNR = alpha_bar / (1 - alpha_bar), by which losses are weighted (Min-SNR, arXiv 2303.09556), any shape."""
    return alpha_bar / (1 - alpha_bar)


def add_noise(z_0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The forward process (DDPM, arXiv 2006.11239, eq. 4): z_t = sqrt(alpha_bar) z_0 + sqrt(1 - alpha_bar) noise."""
    a = _like(alpha_bar, z_0)
    return a.sqrt() * z_0 + (1 - a).sqrt() * noise


def pred_original_sample(z_t: Tensor, prediction: Tensor, alpha_bar: Tensor, kind: str = EPSILON) -> Tensor:
    """z_0 as a network's prediction has it: equation 3 of the paper for epsilon, and the same for v (2202.00512).

    Raises ValueError for another kind of prediction.
    """
    a = _like(alpha_bar, z_t)
    if kind == EPSILON:  # (z_t - sqrt(1 - alpha_bar) e) / sqrt(alpha_bar)
        return (z_t - (1 - a).sqrt() * prediction) / a.sqrt()
    if kind == V_PREDICTION:  # v = sqrt(alpha_bar) e - sqrt(1 - alpha_bar) z_0
        return a.sqrt() * z_t - (1 - a).sqrt() * prediction
    raise ValueError(f"the kind of prediction is {kind!r}, and {EPSILON!r} or {V_PREDICTION!r} is known")


def ddim_step(z_t: Tensor, noise: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """One step of DDIM with eta 0 (arXiv 2010.02502, eq. 12), from alpha_bar to the cleaner alpha_bar_prev.

    noise: as the network predicts it in z_t (epsilon).
    """
    return add_noise(pred_original_sample(z_t, noise, alpha_bar), noise, alpha_bar_prev)


def time_travel(
    x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor, flow: bool = False
) -> Tensor:
    """FreeDoM's time travel (arXiv 2303.09833): one step of DDIM from sigma to sigma_next, and noise up to sigma again.

    x, denoised, noise: in the host's scale, z_0 + sigma e, or (1 - sigma) z_0 + sigma e of a model of flow matching. It
    mends what the guidance has made unlikely.
    """
    x_next = denoised + (x - denoised) * (sigma_next / sigma)
    kept = (1 - sigma) / (1 - sigma_next) if flow else torch.ones_like(sigma)  # of z_0
    return kept * x_next + (sigma**2 - (kept * sigma_next) ** 2).clamp_min(0).sqrt() * noise


def boundary_scaling(
    timestep: Tensor, sigma_data: float = 0.5, timestep_scaling: float = 10.0
) -> tuple[Tensor, Tensor]:
    """c_skip, c_out of a latent consistency model (arXiv 2310.04378): its output is its input at t = 0, and from t = 1
    on hardly anything of it."""
    s = timestep_scaling * timestep.float()
    return sigma_data**2 / (s**2 + sigma_data**2), s / (s**2 + sigma_data**2).sqrt()


def consistency_output(z_0: Tensor, z_t: Tensor, timestep: Tensor) -> Tensor:
    """c_out z_0 + c_skip z_t, what a consistency model answers to z_t; z_0: its `pred_original_sample`; timestep: 0 to
    999."""
    c_skip, c_out = (_like(c, z_t) for c in boundary_scaling(timestep))
    return c_out * z_0 + c_skip * z_t


def preview_latent(z_t: Tensor, prediction: Tensor, timestep: Tensor, alpha_bar: Tensor, kind: str = EPSILON) -> Tensor:
    """The paper's preview: equation 3 with the boundary scaling of consistency models."""
    return consistency_output(pred_original_sample(z_t, prediction, alpha_bar, kind), z_t, timestep)


def timestep_density(alpha: float, steps: int = TIMESTEPS) -> Tensor:
    """The probability of each timestep in training, [steps] in float64: f(t) ~ 1 - alpha cos(pi t / T).

    The paper's importance sampling (implementation details; after ReVersion, arXiv 2303.13495): it prefers noisy
    timesteps, where the picture's content is decided. alpha: 0 (uniform) to 1; the paper has 0.2.
    """
    t = torch.arange(steps, dtype=torch.float64)
    f = 1 - alpha * torch.cos(math.pi * t / steps)
    return f / f.sum()


def sample_timestep(u: Tensor, alpha: float) -> Tensor:
    """Timesteps by importance sampling, the inverse of `timestep_density`'s cumulative sum at u.

    u: uniform numbers in [0, 1) of float64, any shape; the result is int64 of that shape.
    """
    return torch.searchsorted(timestep_density(alpha).cumsum(0), u, right=True).clamp(max=TIMESTEPS - 1)


def lora_scale(u: Tensor, first: float, last: float, full: Tensor | None = None) -> Tensor:
    """The few-step LoRA's scale by LoRA interpolation, with which the paper keeps previews aligned with the base model:
    1 with some probability, else uniform between two ends (0.1 and 1 in the paper, full in half of the iterations).

    u: uniform numbers in [0, 1), any shape, that lead from `first` to `last`; full: bool of that shape, where the scale
    is 1 (None: nowhere).
    """
    scale = first + (last - first) * u
    return scale if full is None else torch.where(full, 1.0, scale)


def chosen_steps(sigmas: Sequence[float], start_sigma: float, count: int, end_sigma: float = math.inf) -> list[int]:
    """Numbers of the steps of a run that are chosen: the first whose noise is at most `start_sigma`, and the next ones.

    sigmas: the noise levels at which the steps begin, falling; end_sigma: at which the last one ends. A run that begins
    later (img2img) has its first step chosen; one of few steps, whose last leads past `start_sigma`, has that one; one
    that ends earlier has none.
    """
    otherwise = max(len(sigmas) - (end_sigma < start_sigma), 0)
    first = next((i for i, sigma in enumerate(sigmas) if sigma <= start_sigma * (1 + 1e-4)), otherwise)
    return list(range(first, min(first + count, len(sigmas))))


def _like(values: Tensor, z: Tensor) -> Tensor:
    values = values.to(device=z.device, dtype=torch.promote_types(z.dtype, torch.float32))
    return values.reshape(-1, *[1] * (z.ndim - 1)) if values.ndim else values
