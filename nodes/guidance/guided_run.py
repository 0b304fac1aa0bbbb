"""One run with lookahead guidance: at a guided step it optimises the sampler's latent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.model_sampling
import comfy.utils
import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...lookahead.losses.base import bind_rng, draws, rebind_rng, showing_in
from ...lookahead.method.attention import mask_on_tokens
from ...lookahead.method.guidance_presets import GuidanceSettings
from ...lookahead.method.latent_optimisation import (
    Decode,
    Evaluation,
    PredictPreview,
    PreviewLoss,
    best_start,
    evaluate_preview,
    optimise_latent,
)
from ...lookahead.method.leaning import lean_towards
from ...lookahead.method.schedule import alpha_bar_of, lora_scale, time_travel, to_ve, to_vp
from .guidance_report import Iterate, RunReport, mean, shown_while_running
from .memory import AUTO, MemoryLadder
from .noise_guide import LoadedNoiseGuide, apply_noise_guide, identity_in, warn_of_level
from .preview import Call, Previewer, as_image
from .sampler_steps import GuidedStep

if TYPE_CHECKING:
    from ..losses.lookahead_loss import LookaheadLoss
    from .shortcut import Shortcut

FRESH, TRAVEL = 1, 2  # what noise is drawn for beside the run's own


@dataclass(frozen=True, eq=False)
class Guidance:
    """The settings of a guided SAMPLER. Immutable.

    settings: where and how the latent is moved; cfg, positive: of the preview; mask: [masks, H, W] in [0, 1] or None,
    where the latent may move; checkpointing: which blocks are computed twice; live: every how many steps a preview is
    shown, 0 for none; noise_guide: what moves the latent in one pass at the first guided step, in the place of `lean`.
    """

    shortcut: Shortcut
    loss: LookaheadLoss
    settings: GuidanceSettings = field(default_factory=GuidanceSettings)
    cfg: float = 1.0
    positive: Any = None
    mask: Tensor | None = None
    checkpointing: str = AUTO
    live: int = 0
    noise_guide: LoadedNoiseGuide | None = None

    @property
    def acts(self) -> bool:
        """Tells whether anything is moved at all."""
        return self.settings.acts or self.noise_guide is not None


class GuidedRun:
    """One run of a guided sampler; lives as long as it.

    guider: of the host; noise, latent_image: as the host gives them to a SAMPLER.
    """

    def __init__(self, guidance: Guidance, guider: Any, noise: Tensor, latent_image: Tensor | None, seed: int | None):
        self.guidance, self.guider = guidance, guider
        self.seed = seed
        self._noise, self._latent_image = noise, latent_image
        self.previewer = Previewer(guidance.shortcut, guider, guidance.positive, guidance.cfg)
        by_chance = draws(guidance.loss.loss) or (guidance.settings.jitter > 0 and self.previewer.bypasses is not None)
        self.settings = guidance.settings if by_chance else guidance.settings.without_chance()
        kept = "best" if self.settings.optimisation.keep_best else "last"
        self.report = RunReport(guidance.loss.name, kept=kept, decode=guidance.shortcut.vae.decode)
        self.report.notes += self.previewer.notes
        self._memory = MemoryLadder(guidance.checkpointing, self.report.notes)
        self._travel = _generator(TRAVEL, seed)
        # One for each picture: the first of a batch is drawn as if alone, as by the host.
        self._jitter = [torch.Generator().manual_seed(((seed or 0) + row) % 2**64) for row in range(len(noise))]
        self._fresh = [_generator(FRESH, seed, row) for row in range(len(noise))]
        self._started = False  # whether the best start was looked for, once a run
        self._before: Tensor | None = None  # the preview of the state that a guided step begins with, where it is known
        self._loss = bind_rng(guidance.loss.loss, torch.Generator().manual_seed(seed or 0))
        self._lora_scale: Tensor | None = None  # of the evaluation that runs

    @property
    def start_sigma(self) -> float:
        """The noise level at which the guidance begins."""
        return float(self.guider.inner_model.model_sampling.percent_to_sigma(self.settings.start))

    def load(self) -> None:
        """Bring all networks to their device. A gradient takes about three times the memory of a forward."""
        optimisation = self.settings.optimisation
        through = optimisation.iterations > 0 and optimisation.backward
        guide = self.guidance.noise_guide
        others = [*self.guidance.loss.patchers, *([] if guide is None else [guide.patcher])]
        self.previewer.load(others, self._noise, 3.0 if through else 1.0, decoder=3.0)

    def close(self) -> None:
        """Clean up after the run, also after one that failed."""
        self.previewer.close()

    def guide(self, x: Tensor, call: Call, step: GuidedStep) -> None:
        """Move the sampler's state x [n, c, h, w] at a guided step, in place."""
        self.previewer.prepare(call)
        conds = self.previewer.conds(self._noise, self._latent_image, call)
        before, self._before = x.clone(), None
        for again in range(self.settings.time_travel + 1):
            if again:
                x.copy_(self._time_travel(x, call, step))
            with torch.inference_mode(False):  # autograd does not work in it
                moved = self._optimise(x, call, conds, step)
            x.copy_(moved)  # here, in the host's own mode: x is an inference tensor
        if not (step.first or step.last):
            return  # the report shows the ends of the guided steps alone
        # Both with the few-step LoRA at its full strength, whatever the iterations drew.
        for when, state, latent in (("before", before, self._before), ("after", x, None)):
            latent = self.previewer.preview(state, call, conds) if latent is None else latent
            self.report.add(f"step {step.number + 1}, {when}", self.previewer.for_vae(latent))

    def live(self, x: Tensor, call: Call, step: int, total: int) -> None:
        """Show the one-step preview of the sampler's state in place of the host's preview picture."""
        self.previewer.prepare(call)
        conds = self.previewer.conds(self._noise, self._latent_image, call)
        image = self.previewer.decode_preview(x, call, conds)
        bar = comfy.utils.ProgressBar(total)
        bar.update_absolute(step + 1, total, shown_while_running(image, f"one-step preview at step {step + 1}"))

    # -- one step

    def _optimise(self, x: Tensor, call: Call, conds: dict[str, Any], step: GuidedStep) -> Tensor:
        settings = self.settings.optimisation
        call.sigma = sigma = call.sigma.clone()
        looks = 0 if self._started or self.settings.best_of < 2 else self.settings.best_of
        total = looks + settings.iterations
        bar = comfy.utils.ProgressBar(total)

        def show(done: int, e: Evaluation, what: str) -> list[float | None]:
            losses = [v if valid else None for v, valid in zip(e.values.tolist(), e.valid.tolist(), strict=True)]
            average = mean(losses)
            value = "does not count" if average is None else f"{average:.3f}"
            progress.set_postfix_str(f"{self.report.loss} {value}", refresh=False)
            progress.update(done - progress.n)
            text = f"{what}  {value}  {self.report.loss}"
            bar.update_absolute(done, total, shown_while_running(as_image(e.picture), text))
            return losses

        def on_iterate(number: int, e: Evaluation) -> None:
            losses = show(looks + number, e, f"{number}/{settings.iterations}")
            self.report.iterates.append(Iterate(step.number, step.sigma, losses, number == settings.iterations))

        def on_look(number: int, e: Evaluation) -> None:
            seen.append(show(number + 1, e, f"noise {number + 1}/{looks}"))

        def predict(z: Tensor) -> Tensor:
            return self.previewer.latent(to_ve(z, sigma), call, conds, self._lora_scale, grad=torch.is_grad_enabled())

        with (
            tqdm(
                total=total,
                desc=f"lookahead at step {step.number + 1}",
                leave=False,
                disable=not comfy.utils.PROGRESS_BAR_ENABLED,
            ) as progress,
            torch.enable_grad(),
        ):
            z = to_vp(x, sigma).detach()
            mask = self._update_mask(z, call.denoise_mask)
            share = self._signal_share(sigma)
            best, seen = z, list[list[float | None]]()
            if looks:
                best = best_start(
                    lambda at: self._judge(predict, self._decode, self._loss, at, False),
                    z,
                    [lambda: self._draw_noise(z)] * (looks - 1),
                    share,
                    mask,
                    self._signal(step),
                    on_look,
                )
                self.report.start = _said(seen, self.report.loss)
            if not self._started:
                best = self._begin(predict, best, share, mask, step)
            self._started = True
            best = optimise_latent(
                predict,
                self._decode,
                self._loss,
                best,
                settings,
                mask,
                on_iterate,
                self._evaluate,
                share,
                self._judge,
                step.last,
            )
            if progress.n < total:  # where the last iterate is not evaluated
                progress.update(total - progress.n)
                bar.update_absolute(total, total)
        return (x + to_ve(best - z, sigma)).detach()  # where nothing moved, the bits stay

    def _begin(
        self, predict: PredictPreview, z: Tensor, share: Tensor, mask: Tensor | None, step: GuidedStep
    ) -> Tensor:
        """Latents whose preview's faces give way to the loss's references, by the noise guide or by `lean`; as they are
        where there is neither, or nothing to show."""
        guide, lean = self.guidance.noise_guide, self.settings.lean
        if guide is None and not lean:
            return z
        showing = showing_in(self._loss) if guide is None else identity_in(self._loss)
        if showing is None:
            self.report.notes.append(
                "warm start: nothing to lean to, since no part of the loss has a picture of a person"
            )
            return z
        self._lora_scale = torch.ones(len(z), device=z.device)
        with torch.no_grad(), self.previewer.installed():
            preview = predict(z)
            self._before = preview if self.settings.best_of < 2 else None  # that of the best noise is another's
            goal, head = showing.shown(torch.cat([self.previewer.decode(one) for one in preview.split(1)]).float())
            place = nn.functional.interpolate(head, preview.shape[-2:], mode="area")
            place = place if mask is None else mask * place
            goal = self.previewer.encode(goal)
            what = f"faces give way to the reference's by {lean:g}" if guide is None else f"moved by {guide.file.name}"
            self.report.began = f"step {step.number + 1} (sigma {step.sigma:.3g}): {what}"
            if guide is None:
                return lean_towards(z, preview, goal, share, lean, place)
            warn_of_level(guide, self.guider.inner_model.model_sampling, step.sigma)
            return apply_noise_guide(guide, identity_in(self._loss), z, preview, goal, place, share)

    def _signal_share(self, sigma: Tensor) -> Tensor:
        """alpha_bar [n]: the square of what z_t has of z_0, in flow matching too."""
        flow = isinstance(self.guider.inner_model.model_sampling, comfy.model_sampling.CONST)
        return alpha_bar_of(sigma, flow)

    def _signal(self, step: GuidedStep) -> Tensor | None:
        """What is z_0 in the latent of a run that has just put its noise on it; None where that is not known."""
        return self._latent_image if step.number == 0 and bool(self._noise.any()) else None

    def _draw_noise(self, z: Tensor) -> Tensor:
        """Noise of the shape of z, that of each picture from a generator of its own."""
        return torch.stack([torch.randn(z.shape[1:], generator=generator) for generator in self._fresh])

    def _evaluate(
        self, predict: PredictPreview, decode: Decode, loss: PreviewLoss, z: Tensor, gradient: bool
    ) -> Evaluation:
        """`evaluate_preview` with a LoRA scale of its own, and as little memory as it takes."""
        self._lora_scale = self._draw_lora_scale(z)
        return self._evaluate_now(predict, decode, loss, z, gradient)

    def _judge(self, predict: PredictPreview, decode: Decode, _: PreviewLoss, z: Tensor, gradient: bool) -> Evaluation:
        """The same without chance: the LoRA at full strength, and the loss sees every candidate in the same views, with
        what the run knows by now of where the faces are, and whose."""
        self._lora_scale = torch.ones(len(z), device=z.device)
        loss = rebind_rng(self._loss, torch.Generator().manual_seed(self.seed or 0))
        return self._evaluate_now(predict, decode, loss, z, gradient)

    def _evaluate_now(
        self, predict: PredictPreview, decode: Decode, loss: PreviewLoss, z: Tensor, gradient: bool
    ) -> Evaluation:
        comfy.model_management.throw_exception_if_processing_interrupted()

        def once() -> Evaluation:
            with torch.set_grad_enabled(gradient), self._installed():
                return evaluate_preview(predict, decode, loss, z, gradient, self._memory.chunk_size)

        return self._memory.attempt(once, z, gradient)

    def _installed(self):
        losses = [p.model for p in self.guidance.loss.patchers if isinstance(p.model, nn.Module)]
        return self.previewer.installed(self._memory.checkpointing, losses)

    def _decode(self, latent: Tensor) -> Tensor:
        return self.previewer.decode(nn.functional.avg_pool2d(latent, 2) if self._memory.half_size else latent)

    def _draw_lora_scale(self, z: Tensor) -> Tensor:
        """The few-step LoRA's scale for each picture, [n]: 1, or by chance less, against what pleases one network
        alone (`schedule.lora_scale`)."""
        u = torch.cat([torch.rand(1, generator=generator) for generator in self._jitter])
        return lora_scale(u, 1.0, 1.0 - self.settings.jitter).to(z)

    def _update_mask(self, z: Tensor, denoise_mask: Tensor | None) -> Tensor | None:
        """Where the latent may move, [n, 1, h, w]: under the mask, and where the run paints at all."""
        mask = None
        if self.guidance.mask is not None:
            height, width = z.shape[-2:]
            tokens = mask_on_tokens(self.guidance.mask.to(z), height, width).reshape(-1, 1, height, width)
            mask = tokens[torch.arange(len(z), device=z.device) % len(tokens)]
        if denoise_mask is not None:
            painted = (denoise_mask.amax(1, keepdim=True) > 0).to(z)
            mask = painted if mask is None else mask * painted
        return mask

    def _time_travel(self, x: Tensor, call: Call, step: GuidedStep) -> Tensor:
        denoised = call.model(x, call.sigma, **call.options)
        noise = torch.randn(x.shape, generator=self._travel).to(x)
        sigma = call.sigma.reshape(-1, 1, 1, 1)
        flow = isinstance(self.guider.inner_model.model_sampling, comfy.model_sampling.CONST)
        return time_travel(x, denoised, sigma, torch.full_like(sigma, step.sigma_next), noise, flow)


def _generator(purpose: int, seed: int | None, row: int = 0) -> torch.Generator:
    """A generator of noise that the run does not have. (PyTorch's takes 32 bits of a seed: one that is larger by 2**63
    than the run's, from which the host draws, is the same.)"""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([purpose, seed or 0, row]).generate_state(1)[0]))


def _said(seen: list[list[float | None]], loss: str) -> str:
    """What the best of several noises gained, in a sentence: the mean loss with the run's own noise, and with each
    picture's best."""
    of_picture = ([v for v in values if v is not None] for values in zip(*seen, strict=True))
    ends = mean(seen[0]), mean([min(values, default=None) for values in of_picture])
    first, best = ("none counted" if value is None else f"{value:.4g}" for value in ends)
    return f"best of {len(seen)} noises: {loss} {first} -> {best}"
