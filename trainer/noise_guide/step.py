"""One training step of a noise guide: the lookahead loss on the preview of a latent whose noise the guide has moved.

L = D(D_VAE(z^_0(z')), I_c) + lambda |s|^2, z' = z_t leaned to the person and moved by s = guide(z_t, z^_0(z_t), t,
person): equations 3 and 4 of arXiv 2404.03620 where HyperNoise (2508.09968, eq. 10) has a reward, and its prior in
noise space. z_t is what a sampler has at the guided step: the base's own first steps from pure noise, under a prompt
that says nothing of the person.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from ...lookahead.losses.identity import IdentityLoss
from ...lookahead.method.attention import Attention, softmax_attention
from ...lookahead.method.guidance import classifier_free_guidance
from ...lookahead.method.noise_guide import Moved, NoiseGuide, guide_noise
from ...lookahead.method.sampling import ddim_timesteps
from ...lookahead.method.schedule import TIMESTEPS, alphas_cumprod, chosen_steps, ddim_step, preview_latent
from ...sdxl.load import Preview
from ...sdxl.lora import LoRA
from ...sdxl.shared_unet import Condition, SharedUNet
from ..lookahead.step import Batch
from ..recipe import Outcome
from .config import NoiseGuideConfig


@dataclass(frozen=True, eq=False)
class GuideDraws:
    """The random draws of B samples. noise [B, 4, h, w]: from which the sampling begins; t int64 [B]: where the guide
    acts; strength [B]: LoRA scale of the preview that is judged."""

    noise: Tensor
    t: Tensor
    strength: Tensor


class GuideStep(nn.Module):
    """The loss of a batch. Only `guide` is trained; gradients go through the frozen UNet to the latent it has moved."""

    alpha_bar: Tensor

    def __init__(
        self,
        config: NoiseGuideConfig,
        unet: UNet2DConditionModel,
        guide: NoiseGuide,
        shortcut: LoRA,
        tiny: Preview,
        attention: Attention = softmax_attention,
    ):
        super().__init__()
        self.config, self.guide, self.shortcut = config, guide, shortcut
        self.unet, self.tiny = unet.eval().requires_grad_(False), tiny
        self.roles = SharedUNet(self.unet, None, shortcut, attention).inject(config.checkpointing)
        self.register_buffer("alpha_bar", alphas_cumprod().float(), persistent=False)

    def forward(self, part: str, batch: Batch, draws: GuideDraws) -> Outcome:
        """The whole loss; there is one part. The lookahead loss of a sample without a face does not count, as in
        `trainer.lookahead.step`; how far its noise is moved does."""
        z = self.opening(batch.text, draws.noise, draws.t)
        likeness = self.likeness(batch)
        moved = self.guided(self.guide, z, draws.t, batch.text, likeness)
        picture = self.tiny(self.preview(moved.z, draws.t, batch.text, draws.strength))
        values, valid = likeness(picture.float())
        counted = torch.where(valid, values, 0.0).sum() / len(values)
        loss = counted + self.config.loss.shift_weight * moved.share.mean()
        return Outcome(loss, values.detach(), valid, {"moved": moved.share.detach()})

    @torch.no_grad()
    def likeness(self, batch: Batch) -> IdentityLoss:
        """The identity loss of a batch, which can show its references, as the tiny autoencoder decodes their latents:
        what is kept of a picture for training has no pixels."""
        assert isinstance(batch.loss, IdentityLoss)  # a noise guide's run has a recogniser, so sources give this one
        pictures = (self.tiny(batch.reference).float() / 2 + 0.5).clamp(0, 1)
        return replace(batch.loss, references=replace(batch.loss.references, pictures=tuple(pictures)))

    def guided(
        self,
        guide: NoiseGuide,
        z: Tensor,
        t: Tensor,
        text: Condition,
        likeness: IdentityLoss,
        rows: Tensor | None = None,
    ) -> Moved:
        """Latents [B, 4, h, w] at t [B] moved by a guide towards the people of a loss; the gradient goes to the guide
        alone. rows: [B], whose loss each is of (`losses.base.Loss`)."""
        with torch.no_grad():
            preview = self.preview(z, t, text, 1.0)
            shown, head = likeness.shown(self.tiny(preview).float(), rows)
            place = F.interpolate(head, preview.shape[-2:], mode="area")
            goal = self.tiny.encode(shown)
        people = likeness.references.embeddings
        people = people if rows is None else people[rows.cpu()]
        return guide_noise(guide, z, preview, goal, place, self.alpha_bar[t], people.to(z.device, torch.float32))

    def preview(self, z: Tensor, t: Tensor, text: Condition, strength: float | Tensor) -> Tensor:
        """The one-step preview latent of the shortcut model (equation 3)."""
        predicted = self.roles.predict(z, t, text, shortcut=strength)
        return preview_latent(z, predicted.float(), t, self.alpha_bar[t])

    @torch.no_grad()
    def opening(self, text: Condition, noise: Tensor, t: Tensor) -> Tensor:
        """Draws what a sampler has at t [B], from noise [B, 4, h, w]: `opening.steps` steps of DDIM."""
        settings, first = self.config.opening, TIMESTEPS - 1
        shares = torch.arange(settings.steps + 1, device=t.device) / settings.steps
        times = [(first + (t - first) * share).round().long() for share in shares]
        z = noise
        for now, following in zip(times[:-1], times[1:], strict=True):
            z = self._ddim(z, now, following, text, settings.guidance)
        return z

    @torch.no_grad()
    def draw(
        self,
        text: Condition,
        noise: Tensor,
        guide: NoiseGuide | None = None,
        likeness: IdentityLoss | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Latents [B, 4, h, w] drawn from noise of that shape by DDIM with the base itself, as users draw them; with a
        guide, they are moved once, at the first step from `opening.start` on (`guided`)."""
        settings = self.config.validation
        times = ddim_timesteps(settings.steps)
        start = self.config.opening.timestep(self.config.opening.start)
        at = chosen_steps([float(t) for t in times], float(start), 1)[0]
        z = noise
        for number, (now, following) in enumerate(zip(times, [*times[1:], 0], strict=True)):
            t, after = (torch.full((len(z),), time, device=z.device) for time in (now, following))
            if guide is not None and number == at:
                assert likeness is not None
                z = self.guided(guide, z, t, text, likeness, rows).z
            z = self._ddim(z, t, after, text, settings.guidance)
        return z

    def _ddim(self, z: Tensor, t: Tensor, following: Tensor, text: Condition, guidance: float) -> Tensor:
        e = self.roles.predict(z, t, text).float()
        if guidance != 1:
            without = text.where(torch.zeros(len(z), dtype=torch.bool, device=z.device))
            plain = self.roles.predict(z, t, without).float()
            e = classifier_free_guidance(plain, e, guidance)
        return ddim_step(z, e, self.alpha_bar[t], self.alpha_bar[following])
