"""Latent optimisation, the paper's lookahead guidance (LCM-Lookahead, arXiv 2404.03620, section 5.1): at one early step
the latent descends the gradient of a loss on its preview, and the run goes on from there.

Each iteration is preview, picture, loss, gradient, step of the latent. The paper fixes neither iterations nor step
size; normalisation, momentum, norm and best iterate are as in DOODL (2303.13703) and ReNO (2406.04312), the sphere of
the noise as in DSG (2402.03201) and Riemannian gradient descent, the gradient that skips the UNet as in MPGD
(2311.16424), the mean of several draws as in TFG (2409.15761). Everything works on three callables and on latents z_t
of variance about 1 (`schedule.to_vp`). `guidance_presets` has named settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .schedule import signal_scale

RAW, UNIT_RMS, RELATIVE = "raw", "unit rms", "relative"

PredictPreview = Callable[[Tensor], Tensor]  # z_t [n, c, h, w] -> preview latent [n, c, h, w], float32
Decode = Callable[[Tensor], Tensor]  # preview latent -> picture [n, 3, H, W], about [-1, 1]
# picture, numbers of its images in the batch (None: all) -> values [n], lower is better; which are valid [n], bool
PreviewLoss = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Optimisation:
    """Settings of the optimiser.

    normalisation: raw takes the gradient as it is, unit rms scales each picture's to rms 1, relative scales it to the
    rms of its latent; step_size multiplies that. clamp bounds how far a number may move in one iteration (0: no bound).
    keep_norm: each picture keeps the norm of its latent, on which the network relies. keep_best: the result is the
    iterate with the lowest loss, else the last one. nesterov: the gradient is taken where the momentum leads. decay:
    the step size falls to zero over the iterations, as a cosine. sphere: gradient and momentum are projected on the
    tangent of the noise's sphere, and each step ends on it; in the place of keep_norm, which holds signal and noise
    together. judged: so many of the best iterates are judged again without chance, since a lucky draw (of the LoRA's
    scale, of views) is no better picture; 0 believes each loss as it was measured. backward: the gradient goes back
    through the network that looks ahead; without, that of the preview is carried to the latent as it is (`carried`),
    and an iteration takes one forward pass of the network. smoothing: over so many evaluations, each by chance of its
    own, loss and gradient of an iteration are averaged.
    """

    iterations: int = 20
    step_size: float = 0.02
    normalisation: str = RELATIVE
    momentum: float = 0.9
    clamp: float = 0.0
    keep_norm: bool = True
    keep_best: bool = True
    nesterov: bool = False
    decay: bool = False
    sphere: bool = False
    judged: int = 0
    backward: bool = True
    smoothing: int = 1

    def rate(self, iteration: int) -> float:
        """The step size of an iteration, counted from 0."""
        if not self.decay:
            return self.step_size
        return self.step_size * (1 + math.cos(math.pi * iteration / self.iterations)) / 2

    def __post_init__(self) -> None:
        if self.normalisation not in (RAW, UNIT_RMS, RELATIVE):
            raise ValueError(f"the normalisation is {self.normalisation!r}: choose {RAW}, {UNIT_RMS} or {RELATIVE}")
        if self.smoothing < 1:
            raise ValueError(f"smoothing is {self.smoothing}: give how many draws an iteration averages, 1 or more")


class Evaluation(NamedTuple):
    """The loss of n previews: values [n] and which of them are valid [n] (bool), the pictures [n, 3, H, W], the
    gradient by the latent, of its shape (None where it was not asked for), and the preview latents, of that shape."""

    values: Tensor
    valid: Tensor
    picture: Tensor
    gradient: Tensor | None
    preview: Tensor


def evaluate_preview(
    predict: PredictPreview,
    decode: Decode,
    loss: PreviewLoss,
    z: Tensor,
    gradient: bool = True,
    chunk_size: int | None = None,
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
    values, valid, pictures = (torch.cat(parts) for parts in zip(*(chunk.forward for chunk in chunks), strict=True))
    backward = [chunk.backward for chunk in chunks if chunk.backward is not None]
    if not backward:
        return Evaluation(values, valid, pictures, None, latent.detach())
    gradients, scales = (torch.cat(parts) for parts in zip(*backward, strict=True))
    (g,) = torch.autograd.grad(latent, leaf, gradients.to(latent))
    g = g.float() * scales.to(g.device)
    valid = valid.to(g.device) & g.flatten(1).isfinite().all(1)
    return Evaluation(values, valid, pictures, torch.where(_each(valid, g), g, 0.0), latent.detach())


class _Chunk(NamedTuple):
    """forward: values, which are valid, and pictures; backward: the gradient by the latent, as rms 1 and a scale for
    each picture, None where it was not asked for."""

    forward: tuple[Tensor, Tensor, Tensor]
    backward: tuple[Tensor, Tensor] | None


def _evaluate_chunk(decode: Decode, loss: PreviewLoss, latent: Tensor, rows: Tensor | None, gradient: bool) -> _Chunk:
    """Evaluates the loss of some pictures, and its gradient by the preview latent."""
    with torch.set_grad_enabled(gradient):
        leaf = latent.requires_grad_(gradient)
        decoded = decode(leaf)
        picture = decoded.detach().float().requires_grad_(gradient)
        values, valid = loss(picture, rows)
    forward = values.detach().float(), valid, picture.detach()
    if not gradient:
        return _Chunk(forward, None)
    if not values.requires_grad:  # no picture is valid
        zeros = torch.zeros_like(latent), torch.zeros(len(latent), 1, 1, 1, device=latent.device)
        return _Chunk(forward, zeros)
    (g,) = torch.autograd.grad(torch.where(valid, values, 0).sum(), picture)
    g, loss_scale = _unit(g)
    (g,) = torch.autograd.grad(decoded, leaf, g.to(decoded))
    g, decode_scale = _unit(g.float())
    return _Chunk(forward, (g, loss_scale.to(g.device) * decode_scale))


Evaluate = Callable[[PredictPreview, Decode, PreviewLoss, Tensor, bool], Evaluation]  # as `evaluate_preview`


def optimise_latent(
    predict: PredictPreview,
    decode: Decode,
    loss: PreviewLoss,
    z: Tensor,
    settings: Optimisation,
    mask: Tensor | None = None,
    on_iterate: Callable[[int, Evaluation], None] | None = None,
    evaluate: Evaluate = evaluate_preview,
    alpha_bar: Tensor | None = None,
    judge: Evaluate | None = None,
    measure_last: bool = True,
) -> Tensor:
    """The latent z [n, c, h, w] descends the loss of its preview; each picture has its own gradient, momentum and best
    iterate. Returns the optimised latent.

    mask: [n or 1, 1, h, w] in [0, 1], where the latent may move (the rest keeps its bits). on_iterate is called with
    each evaluation, numbered from 0; that of the final iterate has the number `settings.iterations`. evaluate:
    `evaluate_preview`, or a function around it that, for example, tries again with less memory. alpha_bar: of z, [n] or
    one number; `settings.sphere` needs it, and so does the way without `settings.backward`. judge: an evaluation in
    which nothing is drawn by chance, for `settings.judged`; `evaluate` where it is None. measure_last: whether the
    final iterate is evaluated also where nothing is chosen by it, for `on_iterate` alone.
    """
    if not settings.iterations:
        return z
    if alpha_bar is None and (settings.sphere or not settings.backward):
        raise ValueError(
            "the sphere of the noise and the way without backward need alpha_bar, the latent's noise level"
        )
    if not settings.backward:
        assert alpha_bar is not None
        predict = carried(predict, alpha_bar)
    region = None if mask is None else (mask > 0).expand_as(z)
    path = _Path(z, settings, region, alpha_bar)
    candidates = _Candidates(z, max(settings.judged, 1))
    for i in range(settings.iterations):
        at = path.look_ahead(i) if settings.nesterov else path.z
        e = _mean([evaluate(predict, decode, loss, at, True) for _ in range(settings.smoothing)])
        candidates.add(at, e)
        if on_iterate:
            on_iterate(i, e)
        assert e.gradient is not None  # it was asked for
        path.step(i, e.gradient if mask is None else e.gradient * mask, e)
    if settings.keep_best or measure_last:
        e = evaluate(predict, decode, loss, path.z, False)
        candidates.add(path.z, e)
        if on_iterate:
            on_iterate(settings.iterations, e)
    if not settings.keep_best:
        return path.z
    if settings.judged:
        candidates = candidates.judged(lambda at: (judge or evaluate)(predict, decode, loss, at, False))
    return torch.where(_each(candidates.lowest[0].isfinite(), z), candidates.latents[0], path.z)


def carried(predict: PredictPreview, alpha_bar: Tensor) -> PredictPreview:
    """No gradient is computed through this preview: that of the preview itself is carried to z_t as it is, by the share
    sqrt(alpha_bar) that z_0 has in z_t (MPGD, arXiv 2311.16424; FlowChef, 2412.00100).

    So autograd keeps nothing of the network. Each number of the latent answers for the one in its place alone, which
    fits a preview the better, the more smoothly it follows its latent.
    """

    def predicted(z: Tensor) -> Tensor:
        with torch.no_grad():
            latent = predict(z)
        return latent + signal_scale(alpha_bar, latent) * (z - z.detach())  # the sum adds 0 to the preview

    return predicted


def best_start(
    look: Callable[[Tensor], Evaluation],
    z: Tensor,
    noises: Sequence[Callable[[], Tensor]],
    alpha_bar: Tensor,
    mask: Tensor | None = None,
    signal: Tensor | None = None,
    on_look: Callable[[int, Evaluation], None] | None = None,
) -> Tensor:
    """Each picture gets the one with the lowest loss of latents that differ in their noise (best-of-N); z [n, c, h, w]
    itself is the first, so that the result is never worse by this measure.

    The others have the signal of z, sqrt(alpha_bar) z_0, and other noise of the same strength. At the first step of a
    run z_0 is known (`signal`: the picture that it began with, zeros for none), and a candidate is just what the run
    would have had from another seed. Later it is that of z's preview: a sample of z_0 given z_t, noised again, is one
    of z_t again (the move between the steps of a consistency model, 2303.01469), as far as the preview is a sample.

    look: evaluates latents, without chance, so that all are compared in the same way; noises: each gives noise
    [n, c, h, w]; alpha_bar: of z, [n] or one number; mask: [n or 1, 1, h, w], where the noise may change (above 0);
    on_look: is called with the number and evaluation of each.
    """
    region = None if mask is None else (mask > 0).expand_as(z)
    best, at = _Candidates(z, 1), z
    centre = strength = torch.zeros(())  # of the sphere that all lie on
    for number in range(len(noises) + 1):
        if number:
            noise = noises[number - 1]().to(z)
            at = centre + noise * (strength / _norm(noise, region).clamp_min(1e-12))
            at = at if region is None else torch.where(region, at, z)
        e = look(at)
        if not number:
            centre = signal_scale(alpha_bar, z) * (e.preview if signal is None else signal).to(z)
            strength = _norm(z - centre, region)
        best.add(at, e)
        if on_look:
            on_look(number, e)
    return best.latents[0]


def _mean(draws: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of several of the same latents: means over those that are valid, and a picture of the last."""
    last = draws[-1]
    if len(draws) == 1:
        return last
    valid = torch.stack([e.valid for e in draws])
    count = valid.sum(0).clamp_min(1)
    values = torch.stack([e.values for e in draws])
    values = torch.where(valid.to(values.device), values, 0.0).sum(0) / count.to(values)
    gradient = torch.stack([e.gradient for e in draws if e.gradient is not None]).sum(0)  # 0 of what is not valid
    return last._replace(values=values, valid=valid.any(0), gradient=gradient / _each(count, gradient))


class _Path:
    """Where the latents are on their way; each picture goes by itself."""

    def __init__(self, z: Tensor, settings: Optimisation, region: Tensor | None, alpha_bar: Tensor | None):
        self.z, self._settings, self._region = z, settings, region
        self._velocity = torch.zeros_like(z)
        self._signal = None if alpha_bar is None or not settings.sphere else signal_scale(alpha_bar, z)
        self._centre: Tensor | float = 0.0  # of the sphere: what is signal in the latent, by its first preview
        self._radius = _norm(z, region)

    def look_ahead(self, iteration: int) -> Tensor:
        """Where the momentum alone leads."""
        s = self._settings
        return self._moved(s.rate(iteration) * s.momentum * self._velocity)

    def step(self, iteration: int, gradient: Tensor, e: Evaluation) -> None:
        """Go along the gradient, which was evaluated where the path is (or looked ahead to)."""
        s = self._settings
        if self._signal is not None and iteration == 0:
            self._centre = self._signal * e.preview
            self._radius = _norm(self.z - self._centre, self._region)
        if s.sphere:
            gradient = self._tangent(gradient)
        self._velocity = s.momentum * self._velocity + _normalised(gradient, self.z, s.normalisation)
        if s.sphere:
            self._velocity = self._tangent(self._velocity)
        moved = self._moved(s.rate(iteration) * self._velocity)
        # A picture without a gradient stays where it is: momentum alone would move it unseen.
        self.z = torch.where(_each(e.valid, self.z), moved, self.z)

    def _moved(self, step: Tensor) -> Tensor:
        s = self._settings
        if s.clamp:
            step = step.clamp(-s.clamp, s.clamp)
        moved = self.z - step
        if s.sphere or s.keep_norm:
            noise = moved - self._centre
            moved = self._centre + noise * (self._radius / _norm(noise, self._region).clamp_min(1e-12))
        return moved if self._region is None else torch.where(self._region, moved, self.z)

    def _tangent(self, direction: Tensor) -> Tensor:
        """A direction without its part along the noise, which would change the noise's strength."""
        noise = self.z - self._centre
        if self._region is not None:
            noise = torch.where(self._region, noise, 0.0)
        along = (direction * noise).sum((1, 2, 3), keepdim=True) / self._radius.square().clamp_min(1e-24)
        return direction - along * noise


class _Candidates:
    """The best iterates of each picture so far, the best first: latents, a list of [n, c, h, w]; lowest, of [n]."""

    def __init__(self, z: Tensor, count: int):
        self.latents = [z] * count
        self.lowest = [torch.full((len(z),), float("inf"), device=z.device)] * count

    def add(self, z: Tensor, e: Evaluation) -> None:
        """Takes an iterate in at its place, for each picture."""
        value = torch.where(e.valid, e.values.to(self.lowest[0]), float("inf"))
        for place, (kept, lowest) in enumerate(zip(self.latents, self.lowest, strict=True)):
            better = value < lowest
            self.latents[place] = torch.where(_each(better, z), z, kept)
            self.lowest[place] = torch.where(better, value, lowest)
            z, value = torch.where(_each(better, z), kept, z), torch.where(better, lowest, value)

    def judged(self, evaluate: Callable[[Tensor], Evaluation]) -> _Candidates:
        """The best alone, by another evaluation of each."""
        best = _Candidates(self.latents[0], 1)
        for latents, lowest in zip(self.latents, self.lowest, strict=True):
            e = evaluate(latents)
            best.add(latents, e._replace(valid=e.valid & lowest.isfinite()))
        return best


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
