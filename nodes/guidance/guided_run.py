"""One run with lookahead guidance: what happens at a guided step, and around it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...lookahead.losses.base import started
from ...lookahead.method import guidance as method
from ...lookahead.method.attention import mask_on_tokens
from ...lookahead.method.schedule import lora_scale
from .autograd import Checkpointing
from .guidance_report import Iterate, Run, mean, shown_while_running
from .preview import Call, Previewer, as_image
from .sampler_steps import Step

if TYPE_CHECKING:
    from ..sockets import LookaheadLoss, Shortcut

AUTO, ALWAYS, NEVER = "auto", "always", "never"
JITTER = 0.9  # the strength of the LoRA is drawn from [0.1, 1], as in the paper's training (section 4.3)


@dataclass(frozen=True, eq=False)
class Guidance:
    """What a guided SAMPLER was made with. Immutable.

    start: where in the sampling it begins, by the host's convention (0 first step, 1 last); steps: how many in a row;
    cfg, positive: of the preview; time_travel: how often a guided step is gone back and guided again; jitter: how far
    the strength of the few-step LoRA is lowered by chance; mask: [masks, H, W] in [0, 1] or None, where the latent may
    move; checkpointing: which blocks are computed twice; live: every how many steps a preview is shown, 0 for none.
    """

    shortcut: Shortcut
    loss: LookaheadLoss
    optimisation: method.Optimisation = field(default_factory=method.Optimisation)
    start: float = 0.12
    steps: int = 1
    cfg: float = 1.0
    positive: Any = None
    time_travel: int = 0
    jitter: float = JITTER
    mask: Tensor | None = None
    checkpointing: str = AUTO
    live: int = 0


class GuidedRun:
    """One run of a guided sampler; lives as long as it.

    guider: of the host; noise, latent_image: as the host gives them to a SAMPLER.
    """

    def __init__(self, guidance: Guidance, guider: Any, noise: Tensor, latent_image: Tensor | None, seed: int | None):
        self.guidance, self.guider = guidance, guider
        self.seed = seed
        self._noise, self._latent_image = noise, latent_image
        self.report = Run(guidance.loss.name)
        self.previewer = Previewer(guidance.shortcut, guider, guidance.positive, guidance.cfg)
        self.report.notes += self.previewer.notes
        self._checkpointing = Checkpointing(enabled=guidance.checkpointing != NEVER)
        self._generator = torch.Generator().manual_seed(seed or 0)
        # One for each picture: the first of a batch is drawn as if alone, as by the host.
        self._jitter = [torch.Generator().manual_seed(((seed or 0) + row) % 2**64) for row in range(len(noise))]
        self._loss = started(guidance.loss.loss, torch.Generator().manual_seed(seed or 0))
        self._together: int | None = None  # how many pictures are decoded at once; None for all
        self._smaller = False  # previews at half their size

    @property
    def start_sigma(self) -> float:
        """The noise level at which the guidance begins."""
        return float(self.guider.inner_model.model_sampling.percent_to_sigma(self.guidance.start))

    def load(self) -> None:
        """Bring all networks to their device. A gradient takes about three times the memory of a forward."""
        self.previewer.load(list(self.guidance.loss.patchers), self._noise, factor=3.0)

    def close(self) -> None:
        """After the run, also after one that failed."""
        self.previewer.close()

    def guide(self, x: Tensor, call: Call, step: Step) -> None:
        """Move the sampler's state x [n, c, h, w] at a guided step, in place."""
        self.previewer.prepare(call)
        conds = self.previewer.conds(self._noise, self._latent_image, call)
        before = x.clone()
        for again in range(self.guidance.time_travel + 1):
            if again:
                x.copy_(self._gone_back(x, call, step))
            with torch.inference_mode(False):  # autograd does not work in it
                moved = self._optimised(x, call, conds, step)
            x.copy_(moved)  # here, in the host's own mode: x is an inference tensor
        # Both with the few-step LoRA at its full strength, whatever the iterations drew.
        for when, state in (("before", before), ("after", x)):
            image = self.previewer.look(state, call, conds, self._decode_one_by_one)
            self.report.add(f"step {step.number + 1}, {when}", image)

    def live(self, x: Tensor, call: Call, step: int, total: int) -> None:
        """Show the one-step preview of the sampler's state in place of the host's preview picture."""
        self.previewer.prepare(call)
        conds = self.previewer.conds(self._noise, self._latent_image, call)
        image = self.previewer.look(x, call, conds)
        bar = comfy.utils.ProgressBar(total)
        bar.update_absolute(step + 1, total, shown_while_running(image, f"one-step preview at step {step + 1}"))

    # -- one step

    def _optimised(self, x: Tensor, call: Call, conds: dict[str, Any], step: Step) -> Tensor:
        settings = self.guidance.optimisation
        call.sigma = call.sigma.clone()
        scale = (call.sigma.reshape(-1, 1, 1, 1) ** 2 + 1).sqrt()  # between the host's x and the paper's z_t
        bar = comfy.utils.ProgressBar(settings.iterations)

        def told(number: int, e: method.Evaluation) -> None:
            losses = [v if c else None for v, c in zip(e.values.tolist(), e.counts.tolist(), strict=True)]
            self.report.iterates.append(Iterate(step.number, step.sigma, losses))
            now = mean(losses)
            value = "does not count" if now is None else f"{now:.3f}"
            text = f"{number}/{settings.iterations}  {value}  {self.report.loss}"
            progress.set_postfix_str(f"{self.report.loss} {value}", refresh=False)
            progress.update(number - progress.n)
            image = as_image(e.picture)
            bar.update_absolute(number, settings.iterations, shown_while_running(image, text))

        with (
            tqdm(
                total=settings.iterations,
                desc=f"lookahead at step {step.number + 1}",
                leave=False,
                disable=not comfy.utils.PROGRESS_BAR_ENABLED,
            ) as progress,
            torch.enable_grad(),
        ):
            z = (x / scale).detach()
            mask = self._where(z, call.denoise_mask)

            def evaluation(z: Tensor, grad: bool) -> method.Evaluation:
                comfy.model_management.throw_exception_if_processing_interrupted()
                return self._evaluated(z, scale, call, conds, grad)

            best = method.optimise_latent(z, evaluation, settings, mask, told)
        return (x + (best - z) * scale).detach()  # where nothing moved, the bits stay

    def _evaluated(self, z: Tensor, scale: Tensor, call: Call, conds: dict[str, Any], grad: bool) -> method.Evaluation:
        """With less and less memory: all blocks computed twice; pictures decoded one by one; at half their size."""
        strength = self._strength(z)
        known = dict(self._checkpointing.saved)
        while True:
            try:
                with torch.set_grad_enabled(grad), self._installed():
                    found = method.evaluate_preview(
                        z,
                        lambda z: self.previewer.latent(z * scale, call, conds, strength, grad=grad),
                        self._decode,
                        self._loss,
                        grad,
                        self._together,
                    )
                if grad and not known and self._checkpointing.saved and self.guidance.checkpointing == AUTO:
                    self._settle(z.device)
                return found
            except Exception as error:
                if not _out_of_memory(error):
                    raise
                self._take_less(len(z))
            # Outside of the handler: until it ends, the error keeps everything alive that did not fit.
            comfy.model_management.soft_empty_cache()

    def _installed(self):
        losses = [p.model for p in self.guidance.loss.patchers if isinstance(p.model, nn.Module)]
        return self.previewer.installed(self._checkpointing, losses)

    def _decode(self, latent: Tensor) -> Tensor:
        return self.previewer.decode(nn.functional.avg_pool2d(latent, 2) if self._smaller else latent)

    def _decode_one_by_one(self, latent: Tensor) -> Tensor:
        return torch.cat([self._decode(one) for one in latent.split(1)])

    def _settle(self, device: torch.device) -> None:
        """The first iteration has measured every block: keep as many as fit into the memory that is free."""
        c = self._checkpointing
        free = comfy.model_management.get_free_memory(device)
        c.keep_what_fits(0.8 * free)
        logging.info(
            "[LCM-Lookahead] the gradient keeps %.2f GB where no block is computed twice, and %.2f GB are free: %d "
            "of %d blocks are computed twice.",
            *(c.total / 2**30, free / 2**30, len(c.saved) - len(c.kept), len(c.saved)),
        )

    def _take_less(self, images: int) -> None:
        if self._checkpointing.kept or not self._checkpointing.enabled:
            self._checkpointing.kept.clear()
            self._checkpointing.enabled = True
            what = "every block is computed twice"
        elif self._together is None and images > 1:
            self._together = 1
            what = "pictures are decoded one by one"
        elif not self._smaller:
            self._smaller = True
            what = "previews are decoded at half their size"
        else:
            raise ValueError(
                "The memory is too small for the gradient, even with previews of half the size: use a smaller picture "
                "or batch, TAESD as the shortcut's vae, or close other programs."
            )
        logging.warning("[LCM-Lookahead] out of memory: from now on, %s.", what)
        self.report.notes.append(f"Out of memory: from then on, {what}.")

    def _strength(self, z: Tensor) -> Tensor:
        """Of the few-step LoRA for each picture: 1, or by chance less, against what pleases one network alone."""
        chance = torch.cat([torch.rand(1, generator=generator) for generator in self._jitter])
        return lora_scale(chance, 1.0, 1.0 - self.guidance.jitter).to(z)

    def _where(self, z: Tensor, denoise_mask: Tensor | None) -> Tensor | None:
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

    def _gone_back(self, x: Tensor, call: Call, step: Step) -> Tensor:
        denoised = call.model(x, call.sigma, **call.options)
        noise = torch.randn(x.shape, generator=self._generator).to(x)
        sigma = call.sigma.reshape(-1, 1, 1, 1)
        return method.travel_back(x, denoised, sigma, torch.full_like(sigma, step.sigma_next), noise)


def _out_of_memory(error: Exception) -> bool:
    known = getattr(comfy.model_management, "is_oom", None)
    oom = getattr(comfy.model_management, "OOM_EXCEPTION", torch.OutOfMemoryError)
    return bool(known(error)) if known else isinstance(error, oom)
