"""The node that wraps a SAMPLER with lookahead guidance."""

from __future__ import annotations

import copy
import functools
import logging
from dataclasses import replace
from typing import Any

import comfy.samplers
import torch
from comfy_api.latest import io
from torch import Tensor

from ...lookahead.losses.base import showing_in
from ...lookahead.method.guidance_presets import PRESETS, GuidanceSettings
from ...lookahead.method.latent_optimisation import RAW, RELATIVE, UNIT_RMS, Optimisation
from ...lookahead.method.schedule import chosen_steps
from ..losses.lookahead_loss import LookaheadLoss
from ..presets import AS_SET, log_ignored, told_to_the_page
from ..schema import schema
from ..sockets import GUIDANCE_REPORT, LOSS, NOISE_GUIDE, SHORTCUT
from .guidance_report import GuidanceReport, keep
from .guided_run import Guidance, GuidedRun
from .interceptor import Interceptor
from .memory import ALWAYS, AUTO, NEVER
from .noise_guide import LoadedNoiseGuide
from .preset_numbers import beyond_numbers, numbers_of
from .preview import Call
from .sampler_steps import GuidedStep, guided_steps
from .shortcut import Shortcut

_NOTHING = "[LCM-Lookahead] no step of this run is guided: it ends at noise level %.3g, before start (%.3g)."


def guided(sampler: Any, guidance: Guidance, report: GuidanceReport) -> Any:
    """A SAMPLER that runs `sampler` with lookahead guidance.

    One of the host's KSAMPLER kind keeps its class and its function, which is guided from within; of any other kind the
    schedule is split at the guided steps.
    """
    if hasattr(sampler, "lookahead"):
        raise ValueError(
            "The sampler comes from another Lookahead Guidance Sampler, and one of them guides a run: connect "
            "KSamplerSelect here; for several losses there is Combine Lookahead Losses, for several steps guided_steps."
        )
    own_sample = type(sampler).sample is comfy.samplers.KSAMPLER.sample
    if isinstance(sampler, comfy.samplers.KSAMPLER) and own_sample:
        out = copy.copy(sampler)
        out.__class__ = _guided_class(type(sampler))
        out.sampler_function = _refused(sampler.sampler_function)
        out.lookahead = guidance, report
        return out
    return SplitSampler(sampler, guidance, report)


def _refused(function: Any) -> Any:
    """In the place of a guided sampler's function: who calls that by itself would draw without guidance."""

    @functools.wraps(function)
    def sample(*_: Any, **__: Any) -> Tensor:
        raise ValueError(
            "Another node runs the function of the sampler of Lookahead Guidance Sampler, which leaves the guidance "
            "out: connect that node's sampler to Lookahead Guidance Sampler, not the other way round."
        )

    return sample


@functools.cache
def _guided_class(base: type) -> type:
    """A subclass whose runs are guided; nodes that look for the class of a sampler find the one they know."""

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, *args, **kwargs):
        guidance, report = self.lookahead
        run = GuidedRun(guidance, model_wrap, noise, latent_image, extra_args.get("seed"))
        plain = copy.copy(self)
        plain.__class__ = base
        plain.sampler_function = _guided_function(self.sampler_function.__wrapped__, run)
        try:
            run.load()
            samples = plain.sample(model_wrap, sigmas, extra_args, callback, noise, latent_image, *args, **kwargs)
        finally:
            run.close()
        keep(report, model_wrap.inner_model.process_latent_out(samples.to(torch.float32)), run.report)
        return samples

    return type(f"Guided{base.__name__}", (base,), {"sample": sample})


def _guided_function(function: Any, run: GuidedRun) -> Any:
    @functools.wraps(function, updated=())
    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        guidance, total = run.guidance, len(sigmas) - 1
        steps = []
        if guidance.acts and total > 0:
            steps = guided_steps(function, options, model, sigmas, run.start_sigma, guidance.settings.steps)
            if not steps:
                logging.warning(_NOTHING, float(sigmas[-1]), run.start_sigma)
        interceptor = Interceptor(model, {step.call: step for step in steps}, run.guide)

        def show(info):
            if callback is not None:
                callback(info)
            n = info["i"]
            if guidance.live and n % guidance.live == 0 and n + 1 < total:
                run.live(interceptor.last.x, interceptor.last, n, total)

        return function(interceptor, x, sigmas, extra_args=extra_args, callback=show, disable=disable, **options)

    return sample


class SplitSampler(comfy.samplers.Sampler):
    """Guides a Sampler of another kind between two runs of it; its history begins anew there."""

    def __init__(self, sampler: Any, guidance: Guidance, report: GuidanceReport):
        self._sampler, self.lookahead = sampler, (guidance, report)

    def sample(
        self,
        model_wrap,
        sigmas,
        extra_args,
        callback,
        noise,
        latent_image=None,
        denoise_mask=None,
        disable_pbar=False,
    ):
        if denoise_mask is not None:
            raise ValueError(
                f"The sampler {type(self._sampler).__name__} is of a kind that cannot be guided under an inpainting "
                "mask: use a sampler of KSamplerSelect, or take the mask off."
            )
        guidance, report = self.lookahead
        run = GuidedRun(guidance, model_wrap, noise, latent_image, extra_args.get("seed"))
        sampling = model_wrap.inner_model.model_sampling
        levels = sigmas.tolist()
        count = guidance.settings.steps if guidance.acts else 0
        steps = chosen_steps(levels[:-1], run.start_sigma, count, levels[-1])
        total = len(levels) - 1

        def part(first: int, last: int, noise: Tensor, latent_image: Tensor | None) -> Tensor:
            def on_step(step, denoised, x, _):
                if callback is not None:
                    callback(first + step, denoised, x, total)

            return self._sampler.sample(
                model_wrap, sigmas[first : last + 1], extra_args, on_step, noise, latent_image, None, disable_pbar
            )

        try:
            run.load()
            x, begin = None, 0
            for n in steps:
                if n > begin:
                    x = part(
                        begin, n, noise if x is None else torch.zeros_like(noise), latent_image if x is None else x
                    )
                elif x is None:
                    at_most = self.max_denoise(model_wrap, sigmas)
                    x = sampling.noise_scaling(sigmas[0], noise.clone(), latent_image, at_most)
                sigma = sigmas[n].expand(len(x))
                call = Call(model_wrap, sigma, {"model_options": extra_args["model_options"], "seed": run.seed})
                x = x.clone()
                run.guide(x, call, GuidedStep(n, n, levels[n], levels[n + 1], n == steps[0], n == steps[-1]))
                begin = n
            if not steps and guidance.acts:
                logging.warning(_NOTHING, levels[-1], run.start_sigma)
            if x is None:
                samples = part(0, total, noise, latent_image)
            else:
                samples = part(begin, total, torch.zeros_like(noise), x)
        finally:
            run.close()
        keep(report, model_wrap.inner_model.process_latent_out(samples.to(torch.float32)), run.report)
        return samples


class LookaheadGuidanceSampler(io.ComfyNode):
    """SAMPLER, SHORTCUT, LOSS -> SAMPLER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        settings = GuidanceSettings()
        defaults = settings.optimisation
        return schema(
            node_id="LookaheadGuidanceSampler",
            display_name="Lookahead Guidance Sampler",
            category="lookahead/sampling",
            description="At an early step it looks ahead in one step, measures what the picture will be like, and "
            "moves the picture's noise until that is closer to what you want: a face, a look, words. Then the "
            "sampling goes on as usual. For SamplerCustomAdvanced.",
            search_aliases=[
                "gradient guidance",
                "classifier guidance",
                "identity",
                "lcm lookahead",
                "latent optimisation",
            ],
            inputs=[
                io.Sampler.Input("sampler", tooltip="The sampler to guide, for example from KSamplerSelect."),
                SHORTCUT.Input("shortcut", tooltip="How to look ahead, from Lookahead Shortcut."),
                LOSS.Input("loss", tooltip="What to steer by: identity, CLIP, LPIPS, or several combined."),
                io.Float.Input(
                    "start",
                    default=0.12,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Where in the sampling to guide: 0 is pure noise, 1 the finished picture. At 0.12 it is "
                    "the paper's step (44 of 50 remain): the layout is decided, and the face is not.",
                ),
                io.Int.Input(
                    "iterations",
                    default=defaults.iterations,
                    min=0,
                    max=1000,
                    advanced=True,
                    tooltip="How often the noise is moved at a guided step. Each takes as long as one to two steps "
                    "without guidance, and the decoder's time. 0 does not guide.",
                ),
                io.Float.Input(
                    "step_size",
                    default=defaults.step_size,
                    min=0.0,
                    max=1000.0,
                    step=0.001,
                    round=0.0001,
                    advanced=True,
                    tooltip="How far the noise is moved each time. Lower it when the picture gets noisy or odd, "
                    "raise it when the loss hardly falls.",
                ),
                io.Int.Input(
                    "guided_steps",
                    default=1,
                    min=1,
                    max=1000,
                    advanced=True,
                    tooltip="How many steps in a row are guided, from start on.",
                ),
                io.Combo.Input(
                    "normalisation",
                    options=[RELATIVE, UNIT_RMS, RAW],
                    default=defaults.normalisation,
                    advanced=True,
                    tooltip="What step_size is measured in: parts of the latent's own size (relative), 1 (unit rms), "
                    "or the gradient as it is (raw), where weights of the loss count.",
                ),
                io.Float.Input(
                    "momentum",
                    default=defaults.momentum,
                    min=0.0,
                    max=0.99,
                    step=0.01,
                    advanced=True,
                    tooltip="How much of the last move goes on. 0 follows each gradient alone.",
                ),
                io.Float.Input(
                    "clamp",
                    display_name="largest move",
                    default=defaults.clamp,
                    min=0.0,
                    max=10.0,
                    step=0.001,
                    advanced=True,
                    tooltip="The most that any number of the latent may move at once; 0 for no bound.",
                ),
                io.Boolean.Input(
                    "keep_norm",
                    display_name="keep noise strength",
                    default=defaults.keep_norm,
                    advanced=True,
                    tooltip="Keep the strength of the noise as it was. Off, pictures may get washed out or burnt.",
                ),
                io.Boolean.Input(
                    "keep_best",
                    default=defaults.keep_best,
                    advanced=True,
                    tooltip="Go on from the best of all iterations, else from the last one.",
                ),
                io.Float.Input(
                    "preview_cfg",
                    default=1.0,
                    min=1.0,
                    max=20.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Guidance of the preview. 1 is right for few-step models; with plain x0 more may help, and "
                    "takes twice the time.",
                ),
                io.Int.Input(
                    "time_travel",
                    display_name="time travel",
                    default=0,
                    min=0,
                    max=20,
                    advanced=True,
                    tooltip="How often to go a step on, back by fresh noise, and guide again: it mends what the "
                    "guidance has made unlikely.",
                ),
                io.Float.Input(
                    "jitter",
                    display_name="LoRA jitter",
                    default=settings.jitter,
                    min=0.0,
                    max=0.9,
                    step=0.05,
                    advanced=True,
                    tooltip="How far the few-step LoRA is weakened by chance, anew each time: against changes that "
                    "please this one preview alone. 0.9 draws its strength from 0.1 to 1, as the paper does.",
                ),
                io.Int.Input(
                    "live_previews",
                    default=0,
                    min=0,
                    max=1000,
                    advanced=True,
                    tooltip="Every how many steps a sharp one-step preview is shown while sampling, at the cost of one "
                    "evaluation; 0 for the host's own previews.",
                ),
                io.Combo.Input(
                    "checkpointing",
                    options=[AUTO, ALWAYS, NEVER],
                    default=AUTO,
                    advanced=True,
                    tooltip="Whether parts of the network are computed twice to save memory: as many as must be "
                    "(auto), all (always), none (never).",
                ),
                io.Conditioning.Input(
                    "positive",
                    optional=True,
                    advanced=True,
                    tooltip="What the preview should show, in place of the guider's own positive.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the picture the noise may be moved (white), stretched over the picture. One mask "
                    "for all images of a batch, or several in turn.",
                ),
                # Last of all, since files keep values by place. Files and graphs from before have no preset, and mean
                # their numbers. So does a new node: they are the paper's way.
                io.Combo.Input(
                    "preset",
                    options=[AS_SET, *PRESETS],
                    default=AS_SET,
                    optional=True,
                    extra_dict=told_to_the_page(
                        {name: numbers_of(preset) for name, preset in PRESETS.items()},
                        {name: beyond_numbers(preset) for name, preset in PRESETS.items()},
                    ),
                    tooltip="How strongly and at which cost to guide: by the numbers of this node (as set below), or "
                    "by a preset, which writes its own into the fields. A field that you change goes back to as set "
                    "below. DPS to TFG-like follow published methods, to compare with.",
                ),
                io.Int.Input(
                    "best_of",
                    display_name="best of N noises",
                    default=settings.best_of,
                    min=1,
                    max=1000,
                    optional=True,
                    advanced=True,
                    tooltip="How many noises are looked at before the iterations, of which each picture takes its "
                    "best. Each takes one evaluation. With 0 iterations and start 0 that is all: the best of so many "
                    "seeds. 1 keeps the picture's own.",
                ),
                io.Boolean.Input(
                    "backward",
                    display_name="gradient through the network",
                    default=defaults.backward,
                    optional=True,
                    advanced=True,
                    tooltip="Have the gradient go back through the network. Off, it is carried from the preview to the "
                    "noise as it is: rougher, but an iteration takes one evaluation and much less memory.",
                ),
                NOISE_GUIDE.Input(
                    "noise_guide",
                    optional=True,
                    advanced=True,
                    tooltip="From Load Lookahead Noise Guide: moves the noise in one pass, in the place of the warm "
                    "start and before the iterations, or alone with preset off. The loss must be Lookahead Identity "
                    "Loss, alone or combined.",
                ),
                io.Float.Input(
                    "lean",
                    display_name="warm start",
                    default=settings.lean,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="How far the preview's face gives way to the reference's, put in its place, before the "
                    "iterations: 0 not at all, 1 wholly. It takes one evaluation, and acts most where `start` is 0.3 "
                    "to 0.5. For losses of likeness.",
                ),
            ],
            outputs=[
                io.Sampler.Output("SAMPLER", display_name="sampler", tooltip="For SamplerCustomAdvanced."),
                GUIDANCE_REPORT.Output(
                    "REPORT", display_name="report", tooltip="For Lookahead Guidance Report: losses and previews."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        sampler,
        shortcut: Shortcut,
        loss: LookaheadLoss,
        start: float = 0.12,
        iterations: int = 20,
        step_size: float = 0.02,
        guided_steps: int = 1,
        normalisation: str = RELATIVE,
        momentum: float = 0.9,
        clamp: float = 0.0,
        keep_norm: bool = True,
        keep_best: bool = True,
        preview_cfg: float = 1.0,
        time_travel: int = 0,
        jitter: float = 0.9,
        live_previews: int = 0,
        checkpointing: str = AUTO,
        positive=None,
        mask: Tensor | None = None,
        preset: str = AS_SET,
        best_of: int = 1,
        backward: bool = True,
        noise_guide: LoadedNoiseGuide | None = None,
        lean: float = 0.0,
    ) -> io.NodeOutput:
        if mask is not None and not (mask > 0).any():
            logging.warning("[LCM-Lookahead] the mask of the guidance is empty, so nothing is moved: invert it.")
        # What else the optimiser can do is no input, and comes by a preset: the node has numbers enough.
        settings = own = GuidanceSettings(
            Optimisation(
                iterations, step_size, normalisation, momentum, clamp, keep_norm, keep_best, backward=backward
            ),
            start,
            guided_steps,
            time_travel,
            jitter,
            best_of,
            lean=lean,
        )
        if preset in PRESETS:
            settings = PRESETS[preset]
            if showing_in(loss.loss) is None:
                settings = settings.with_nobody_shown()
            if not settings.acts and noise_guide is not None:  # the guide alone, where it was trained to act
                settings = replace(settings, start=noise_guide.file.start)
            log_ignored("Lookahead Guidance Sampler", preset, numbers_of(settings), numbers_of(own))
        guidance = Guidance(
            shortcut=shortcut,
            loss=loss,
            settings=settings,
            cfg=preview_cfg,
            positive=positive,
            mask=None if mask is None else mask.reshape(-1, *mask.shape[-2:]).float().clamp(0, 1),
            checkpointing=checkpointing,
            live=live_previews,
            noise_guide=noise_guide,
        )
        report = GuidanceReport()
        return io.NodeOutput(guided(sampler, guidance, report), report)
