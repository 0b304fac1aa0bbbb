"""Guidance: how several predictions for one noised picture are put together, and how a latent is moved until the
preview of its picture pleases.

The second, lookahead guidance (arXiv 2404.03620, section 5.1), repeats at one early step: preview, picture, loss,
gradient, step of the latent; then the run goes on without it. The paper fixes neither iterations nor step size;
normalisation, momentum, norm and best iterate are as in DOODL (2303.13703) and ReNO (2406.04312). It works on callables
and on latents z_t of variance about 1 (see schedule.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

RAW, UNIT_RMS, RELATIVE = "raw", "unit rms", "relative"

Predict = Callable[[Tensor], Tensor]  # z_t [n, c, h, w] -> preview latent [n, c, h, w], float32
Decode = Callable[[Tensor], Tensor]  # preview latent -> picture [n, 3, H, W], about [-1, 1]
# picture, numbers of its images in the batch (None: all) -> values [n], lower is better; which count [n], bool
Loss = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


def three_scale_guidance(
    uncond: Tensor,
    text: Tensor | None,
    full_uncond: Tensor | None,
    full: Tensor | None,
    text_scale: float = 3.0,
    full_scale: float = 2.0,
    kv_scale: float = 2.0,
) -> Tensor:
    """The guidance of LCM-Lookahead (arXiv 2404.03620, supplement) over text, image prompt and reference KV.

    e = e_nu + text_scale (e_nt - e_nu) + full_scale (e_ft - e_nu) + kv_scale (e_fu - e_nu), with
    uncond = e_nu: null text, null tokens, no KV;     text = e_nt: text, image prompt, no KV;
    full_uncond = e_fu: null text, null tokens, KV;   full = e_ft: text, image prompt, KV.
    All [B, C, H, W] and all eps, all v or all denoised (the weights add up to 1, so the kind does not matter). Without
    an effect of the KV it is classifier-free guidance at text_scale + full_scale. A prediction whose scale is 0 may be
    None. Raises ValueError where one is None whose scale is not 0.
    """
    out = uncond
    for name, prediction, scale in (
        ("text", text, text_scale),
        ("full", full, full_scale),
        ("full_uncond", full_uncond, kv_scale),
    ):
        if scale == 0:
            continue
        if prediction is None:
            raise ValueError(f"the prediction {name} is missing, and its scale is {scale}")
        out = out + scale * (prediction - uncond)
    return out


# The predictions of `three_scale_guidance`, by its arguments' names; those without reference KV, and those with it.
PLAIN, EXTENDED = ("uncond", "text"), ("full_uncond", "full")


@dataclass(frozen=True)
class Scales:
    """The scales of `three_scale_guidance`: prompt without reference KV, prompt with it, reference KV alone."""

    text: float = 3.0
    full: float = 2.0
    kv: float = 2.0

    @property
    def without_kv(self) -> Scales:
        """Classifier-free guidance as strong as where the reference KV has no effect."""
        return Scales(self.text + self.full, 0.0, 0.0)

    @property
    def needed(self) -> tuple[str, ...]:
        """The predictions whose weight in the sum is not 0. (That of the first is 1 less the three scales.)"""
        alone = math.isclose(self.text + self.full + self.kv, 1.0)
        weights = {"uncond": not alone, "text": self.text, "full_uncond": self.kv, "full": self.full}
        return tuple(name for name, weight in weights.items() if weight)


def guided(predict: Callable[[Sequence[str]], Sequence[Tensor]], scales: Scales) -> Tensor:
    """`three_scale_guidance` over those predictions that it needs.

    predict: names -> one prediction [B, C, H, W] each. It is called at most twice, with names of PLAIN and of EXTENDED:
    self-attentions are longer with reference KV, so only predictions of one kind can be rows of one batch.
    """
    made: dict[str, Tensor] = {}
    for kind in (PLAIN, EXTENDED):
        if names := [name for name in kind if name in scales.needed]:
            made |= zip(names, predict(names), strict=True)
    if "uncond" not in made:
        made["uncond"] = torch.zeros_like(next(iter(made.values())))  # its weight is 0
    parts = (made.get(name) for name in ("uncond", "text", "full_uncond", "full"))
    return three_scale_guidance(*parts, scales.text, scales.full, scales.kv)


@dataclass(frozen=True)
class Optimisation:
    """How a latent is optimised.

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
    """values, counts: [n]; picture: [n, 3, H, W]; gradient: as the latent, None where it was not asked for."""

    values: Tensor
    counts: Tensor
    picture: Tensor
    gradient: Tensor | None


def evaluate_preview(
    z: Tensor, predict: Predict, decode: Decode, loss: Loss, gradient: bool = True, together: int | None = None
) -> Evaluation:
    """The loss of each picture's preview, and its gradient by the latent z [n, c, h, w].

    together: how many pictures are decoded and judged at once (all by default; fewer take less memory).

    The chain is differentiated in three parts, from the loss back, and what enters each part is scaled to rms 1 for
    each picture: networks in 16 bit would else lose small gradients. The result is not scaled. A picture that does not
    count, or whose gradient is not finite, has gradient 0. Gradients must be possible where this is called.
    """
    n = len(z)
    with torch.set_grad_enabled(gradient):
        leaf = z.detach().requires_grad_(gradient)
        latent = predict(leaf)
    parts = []
    for first in range(0, n, together or n):
        rows = slice(first, first + (together or n))
        numbers = None if together is None or together >= n else torch.arange(n)[rows]
        parts.append(_judge(latent.detach()[rows], numbers, decode, loss, gradient))
    values, counts, pictures, gradients, scales = (
        torch.cat(found) if found[0] is not None else None for found in zip(*parts, strict=True)
    )
    if not gradient:
        return Evaluation(values, counts, pictures, None)
    (g,) = torch.autograd.grad(latent, leaf, gradients.to(latent))
    g = g.float() * scales.to(g.device)
    counts = counts.to(g.device) & g.flatten(1).isfinite().all(1)
    return Evaluation(values, counts, pictures, torch.where(_each(counts, g), g, 0.0))


def _judge(latent: Tensor, rows: Tensor | None, decode: Decode, loss: Loss, gradient: bool) -> tuple:
    """Values, which count, pictures, and the gradient by the latent as rms 1 and a scale for each picture."""
    with torch.set_grad_enabled(gradient):
        leaf = latent.requires_grad_(gradient)
        decoded = decode(leaf)
        picture = decoded.detach().float().requires_grad_(gradient)
        values, counts = loss(picture, rows)
    found = values.detach().float(), counts, picture.detach()
    if not gradient:
        return *found, None, None
    if not values.requires_grad:  # no picture counts
        return *found, torch.zeros_like(latent), torch.zeros(len(latent), 1, 1, 1, device=latent.device)
    (g,) = torch.autograd.grad(torch.where(counts, values, 0).sum(), picture)
    g, first = _unit(g)
    (g,) = torch.autograd.grad(decoded, leaf, g.to(decoded))
    g, second = _unit(g.float())
    return *found, g, first.to(g.device) * second


def optimise_latent(
    z: Tensor,
    evaluation: Callable[[Tensor, bool], Evaluation],
    settings: Optimisation,
    mask: Tensor | None = None,
    on_iterate: Callable[[int, Evaluation], None] | None = None,
) -> Tensor:
    """The latent [n, c, h, w] after the iterations; each picture has its own gradient, momentum and best iterate.

    evaluation: (latent, with gradient) -> Evaluation; mask: [n or 1, 1, h, w] in [0, 1], where the latent may move (the
    rest keeps its bits). on_iterate is told of each evaluation, the last of which is that of the final iterate.
    """
    region = None if mask is None else (mask > 0).expand_as(z)
    norm = _norm(z, region)
    best, lowest = z, torch.full((len(z),), float("inf"), device=z.device)
    velocity = torch.zeros_like(z)

    def keep(e: Evaluation) -> None:
        nonlocal best, lowest
        better = e.counts & (e.values < lowest)
        best = torch.where(_each(better, z), z, best)
        lowest = torch.where(better, e.values.to(lowest), lowest)

    for i in range(settings.iterations):
        e = evaluation(z, True)
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
        z = torch.where(_each(e.counts, z), moved, z)
    if not settings.iterations:
        return z
    e = evaluation(z, False)
    keep(e)
    if on_iterate:
        on_iterate(settings.iterations, e)
    return torch.where(_each(lowest.isfinite(), z), best, z) if settings.keep_best else z


def travel_back(x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor) -> Tensor:
    """One step of DDIM from sigma to sigma_next, and noise again up to sigma (FreeDoM's "time travel", 2303.09833).

    x, denoised, noise: in the host's scale. It mends what the guidance has made unlikely.
    """
    there = denoised + (x - denoised) * (sigma_next / sigma)
    return there + (sigma**2 - sigma_next**2).clamp_min(0).sqrt() * noise


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
