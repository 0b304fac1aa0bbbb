"""Latent optimisation, the paper's lookahead guidance (LCM-Lookahead, arXiv 2404.03620, section 5.1): at one early step
the latent descends the gradient of a loss on its preview, and the run goes on from there.

Each iteration is preview, picture, loss, gradient, step of the latent. The paper fixes neither iterations nor step
size; normalisation, momentum, norm and best iterate are as in DOODL (2303.13703) and ReNO (2406.04312). Everything
works on three callables and on latents z_t of variance about 1 (`schedule.to_vp`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

RAW, UNIT_RMS, RELATIVE = "raw", "unit rms", "relative"

Predict = Callable[[Tensor], Tensor]  # z_t [n, c, h, w] -> preview latent [n, c, h, w], float32
Decode = Callable[[Tensor], Tensor]  # preview latent -> picture [n, 3, H, W], about [-1, 1]
# picture, numbers of its images in the batch (None: all) -> values [n], lower is better; which are valid [n], bool
Loss = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Optimisation:
    """Settings of the optimiser.

    normalisation: raw takes the gradient as it is, unit rms scales each picture's to rms 1, relative scales it to the
    rms of its latent; step_size multiplies that. clamp bounds how far a number may move in one iteration (0: no bound).
    keep_norm: each picture keeps the norm of its latent, on which the network relies. keep_best: the result is the
    iterate with the lowest loss, else the last one.
    """

    iterations: int = 20
    step_size: float = 0.02
    normalisation: str = RELATIVE
    momentum: float = 0.9
    clamp: float = 0.0
    keep_norm: bool = True
    keep_best: bool = True

    def __post_init__(self):
        if self.normalisation not in (RAW, UNIT_RMS, RELATIVE):
            raise ValueError(f"the normalisation is {self.normalisation!r}: choose {RAW}, {UNIT_RMS} or {RELATIVE}")


class Evaluation(NamedTuple):
    """The loss of n previews: values [n] and which of them are valid [n] (bool), the pictures [n, 3, H, W], and the
    gradient by the latent, of its shape (None where it was not asked for)."""

    values: Tensor
    valid: Tensor
    picture: Tensor
    gradient: Tensor | None


def evaluate_preview(
    predict: Predict, decode: Decode, loss: Loss, z: Tensor, gradient: bool = True, chunk_size: int | None = None
) -> Evaluation:
    """Evaluates the loss of each picture's preview and its gradient by the latent z [n, c, h, w].

    chunk_size: how many pictures are decoded and compared at once (None: all; fewer take less memory).

    The chain is differentiated in three parts, from the loss back, and what enters each part is scaled to rms 1 for
    each picture: networks in 16 bit would else lose small gradients. The result is not scaled. A picture that is not
    valid, or whose gradient is not finite, has gradient 0. Gradients must be possible where this is called.
    """
    n = len(z)
    with torch.set_grad_enabled(gradient):
        leaf = z.detach().requires_grad_(gradient)
        latent = predict(leaf)
    size = min(chunk_size or n, n)
    chunks = []
    for first in range(0, n, size):
        rows = None if size == n else torch.arange(first, min(first + size, n))
        chunks.append(_evaluate_chunk(decode, loss, latent.detach()[first : first + size], rows, gradient))
    values, valid, pictures, gradients, scales = (
        torch.cat(parts) if parts[0] is not None else None for parts in zip(*chunks, strict=True)
    )
    if not gradient:
        return Evaluation(values, valid, pictures, None)
    (g,) = torch.autograd.grad(latent, leaf, gradients.to(latent))
    g = g.float() * scales.to(g.device)
    valid = valid.to(g.device) & g.flatten(1).isfinite().all(1)
    return Evaluation(values, valid, pictures, torch.where(_each(valid, g), g, 0.0))


def _evaluate_chunk(decode: Decode, loss: Loss, latent: Tensor, rows: Tensor | None, gradient: bool) -> tuple:
    """Values, which are valid, pictures, and the gradient by the latent as rms 1 and a scale for each picture."""
    with torch.set_grad_enabled(gradient):
        leaf = latent.requires_grad_(gradient)
        decoded = decode(leaf)
        picture = decoded.detach().float().requires_grad_(gradient)
        values, valid = loss(picture, rows)
    forward = values.detach().float(), valid, picture.detach()
    if not gradient:
        return *forward, None, None
    if not values.requires_grad:  # no picture is valid
        return *forward, torch.zeros_like(latent), torch.zeros(len(latent), 1, 1, 1, device=latent.device)
    (g,) = torch.autograd.grad(torch.where(valid, values, 0).sum(), picture)
    g, loss_scale = _unit(g)
    (g,) = torch.autograd.grad(decoded, leaf, g.to(decoded))
    g, decode_scale = _unit(g.float())
    return *forward, g, loss_scale.to(g.device) * decode_scale


Evaluate = Callable[[Predict, Decode, Loss, Tensor, bool], Evaluation]  # as `evaluate_preview`


def optimise_latent(
    predict: Predict,
    decode: Decode,
    loss: Loss,
    z: Tensor,
    settings: Optimisation,
    mask: Tensor | None = None,
    on_iterate: Callable[[int, Evaluation], None] | None = None,
    evaluate: Evaluate = evaluate_preview,
) -> Tensor:
    """The latent z [n, c, h, w] descends the loss of its preview; each picture has its own gradient, momentum and best
    iterate. Returns the optimised latent.

    mask: [n or 1, 1, h, w] in [0, 1], where the latent may move (the rest keeps its bits). on_iterate is called with
    each evaluation, the last of which is that of the final iterate. evaluate: `evaluate_preview`, or a function around
    it that, for example, tries again with less memory.
    """
    region = None if mask is None else (mask > 0).expand_as(z)
    norm = _norm(z, region)
    best, lowest = z, torch.full((len(z),), float("inf"), device=z.device)
    velocity = torch.zeros_like(z)

    def keep(e: Evaluation) -> None:
        nonlocal best, lowest
        better = e.valid & (e.values < lowest)
        best = torch.where(_each(better, z), z, best)
        lowest = torch.where(better, e.values.to(lowest), lowest)

    for i in range(settings.iterations):
        e = evaluate(predict, decode, loss, z, True)
        keep(e)
        if on_iterate:
            on_iterate(i, e)
        gradient = e.gradient if mask is None else e.gradient * mask
        velocity = settings.momentum * velocity + _normalised(gradient, z, settings.normalisation)
        step = settings.step_size * velocity
        if settings.clamp:
            step = step.clamp(-settings.clamp, settings.clamp)
        moved = z - step
        if settings.keep_norm:
            moved = moved * (norm / _norm(moved, region).clamp_min(1e-12))
        if region is not None:
            moved = torch.where(region, moved, z)
        # A picture without a gradient stays where it is: momentum alone would move it unseen.
        z = torch.where(_each(e.valid, z), moved, z)
    if not settings.iterations:
        return z
    e = evaluate(predict, decode, loss, z, False)
    keep(e)
    if on_iterate:
        on_iterate(settings.iterations, e)
    return torch.where(_each(lowest.isfinite(), z), best, z) if settings.keep_best else z


def time_travel(x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor) -> Tensor:
    """FreeDoM's time travel (arXiv 2303.09833): one step of DDIM from sigma to sigma_next, and noise up to sigma again.

    x, denoised, noise: in the host's scale. It mends what the guidance has made unlikely.
    """
    x_next = denoised + (x - denoised) * (sigma_next / sigma)
    return x_next + (sigma**2 - sigma_next**2).clamp_min(0).sqrt() * noise


def _normalised(gradient: Tensor, z: Tensor, kind: str) -> Tensor:
    if kind == RAW:
        return gradient
    unit, _ = _unit(gradient)
    return unit if kind == UNIT_RMS else unit * _rms(z)


def _unit(g: Tensor) -> tuple[Tensor, Tensor]:
    """Each picture's g scaled to rms 1 (0 stays 0), and what to multiply it with to have it back."""
    rms = _rms(g)
    scale = torch.where((rms > 0) & rms.isfinite(), rms, 1.0)
    return g / scale, scale


def _rms(g: Tensor) -> Tensor:
    # The largest number is taken out first: squares of gradients fall below what 32 bit can hold.
    top = g.abs().amax(dim=(1, 2, 3), keepdim=True)
    top = torch.where((top > 0) & top.isfinite(), top, 1.0)
    return (g / top).square().mean(dim=(1, 2, 3), keepdim=True).sqrt() * top


def _norm(z: Tensor, region: Tensor | None) -> Tensor:
    inside = z if region is None else torch.where(region, z, 0.0)
    return inside.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()


def _each(picture: Tensor, like: Tensor) -> Tensor:
    return picture.reshape(-1, *[1] * (like.ndim - 1))
