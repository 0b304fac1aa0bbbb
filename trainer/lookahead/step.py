"""One training step: the diffusion loss (arXiv 2404.03620, eq. 2) and the lookahead loss (eq. 3 and 4).

`Step` is one module that DDP wraps once and `gradients.gradients` calls twice, with a backward in between, so that the
graphs of the two losses never stand in memory together. The optimiser steps once, on the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ...lookahead.losses.base import Loss
from ...lookahead.losses.identity import IdentityLoss
from ...lookahead.method.attention import Attention, softmax_attention
from ...lookahead.method.schedule import add_noise, alphas_cumprod, pred_original_sample, preview_latent
from ...sdxl.encoder import Encoder
from ...sdxl.lora import LoRA
from ...sdxl.shared_unet import Condition, SharedUNet, TextRead
from ..recipe import Outcome
from .alignment import consistency, person_alignment, score_distillation
from .config import Config
from .draws import Draws

Part = Literal["diffusion", "lookahead"]


def parts(config: Config) -> tuple[Part, ...]:
    """The losses of a step, in the order in which they run."""
    return ("diffusion",) if config.lookahead.arm == "none" else ("diffusion", "lookahead")


@dataclass(frozen=True, eq=False)
class Batch:
    """B samples (`recipe.SampleBatch`). A target shows the same person as its reference, in another picture."""

    names: Sequence[str]  # what to call a sample in a message
    target: Tensor  # latents [B, 4, h, w], scaled as the UNet reads them
    reference: Tensor  # latents of the references, of the same shape
    text: Condition  # of the targets
    reference_text: Condition  # of the references, which the KV encoder reads
    features: Tensor  # [B, patches, width]: what the image encoder sees in the references
    loss: Loss | None = None  # of previews, with these references; None without lookahead

    def rows(self, chosen: slice) -> Batch:
        """Some of the samples, without a loss, which belongs to all."""
        texts = self.text.rows(chosen), self.reference_text.rows(chosen)
        return Batch(self.names[chosen], self.target[chosen], self.reference[chosen], *texts, self.features[chosen])


class Step(nn.Module):
    """The losses of a batch. Only `encoder` is trained.

    decode_preview: preview latents [B, 4, h, w] -> pictures [B, 3, H, W] in about [-1, 1], with gradients; needed with
    lookahead. null_features [1, patches, width]: of no picture (zeros in the image encoder's normalised space).
    """

    null_features: Tensor
    alpha_bar: Tensor

    def __init__(
        self,
        config: Config,
        unet: UNet2DConditionModel,
        encoder: Encoder,
        null_features: Tensor,
        shortcut: LoRA | None = None,
        decode_preview: Callable[[Tensor], Tensor] | None = None,
        attention: Attention = softmax_attention,
    ):
        super().__init__()
        if config.lookahead.arm == "shortcut" and shortcut is None:
            raise ValueError("lookahead.arm is 'shortcut', and there is no few-step LoRA: give model.shortcut.")
        if bool(encoder.kv) != config.model.kv:
            raise ValueError(f"model.kv is {config.model.kv}, and the encoder was made the other way.")
        self.config = config
        self.unet, self.encoder, self.shortcut = unet.eval().requires_grad_(False), encoder, shortcut
        self.roles = SharedUNet(self.unet, encoder, shortcut, attention).inject(config.checkpointing)
        self.decode_preview = decode_preview
        self.register_buffer("null_features", null_features, persistent=False)
        self.register_buffer("alpha_bar", alphas_cumprod().float(), persistent=False)

    def forward(self, part: Part, batch: Batch, draws: Draws) -> Outcome:
        return self.diffusion(batch, draws) if part == "diffusion" else self.lookahead(batch, draws)

    def diffusion(self, batch: Batch, draws: Draws) -> Outcome:
        """Equation 2: the squared error of the predicted noise."""
        predicted, _ = self._predict(batch, draws, draws.t)
        values = (predicted.float() - draws.noise).square().mean((1, 2, 3))
        return Outcome(values.mean(), values.detach(), torch.ones_like(values, dtype=torch.bool))

    def lookahead(self, batch: Batch, draws: Draws) -> Outcome:
        """Equations 3 and 4: an image loss on the one-step preview of the shortcut model (or on the base's own x0).

        A sample is not valid when the loss says so (no face), nor when it has neither image prompt nor reference KV,
        since nothing that is trained could change its preview. The sum is divided by B whatever is valid: a step in
        which few previews show a face weighs less, and several processes equal one (but for `contrast`, whose others
        are the samples of one forward pass).
        """
        ahead, t = self.config.lookahead, draws.t_lookahead
        shortcut = draws.strength if ahead.arm == "shortcut" else 0.0
        reads: dict[str, TextRead] | None = {} if ahead.aligns_person else None
        predicted, z_t = self._predict(batch, draws, t, shortcut, reads=reads)
        predicted, alpha_bar = predicted.float(), self.alpha_bar[t]
        if ahead.arm == "shortcut":
            latent = preview_latent(z_t, predicted, t, alpha_bar)
        else:
            latent = pred_original_sample(z_t, predicted, alpha_bar)
        assert batch.loss is not None and self.decode_preview is not None  # with this loss both are needed
        picture, terms = self.decode_preview(latent).float(), dict[str, Tensor]()
        contrast = None
        if ahead.contrast:
            assert isinstance(batch.loss, IdentityLoss)  # every source gives this one
            values, valid, contrast = batch.loss.among(picture)
        else:
            values, valid = batch.loss(picture)
        uncond = draws.no_image_prompt & draws.no_kv if self.config.model.kv else draws.no_image_prompt
        valid = valid & ~uncond
        # Values of samples that are not valid may be anything: they must not get into the sum, not even times zero.
        counted = torch.where(valid, values, 0.0)
        weighed = counted * draws.strength if ahead.weigh_by_strength else counted
        loss = ahead.weight * weighed.sum() / len(values)
        if contrast is not None:
            contrast = torch.where(valid, contrast, 0.0)
            terms["contrast"] = contrast.detach()
            weighed = contrast * draws.strength if ahead.weigh_by_strength else contrast
            loss = loss + ahead.contrast * weighed.sum() / len(values)
        if ahead.align != "strength":

            def predict(z: Tensor, draws: Draws, t: Tensor, strength: float) -> Tensor:
                return self._predict(batch, draws, t, strength, z)[0].float()

            if ahead.align == "sds":
                alignment = score_distillation(predict, self.alpha_bar, latent, draws)
            else:
                alignment = consistency(predict, self.alpha_bar, latent, z_t, t, draws)
            loss = loss + ahead.align_weight * alignment.mean()
            terms["alignment"] = alignment.detach()
        if reads is not None:
            aligned = person_alignment(reads, self._without_person(batch, draws, z_t, t, shortcut))
            weights = {"semantic": ahead.semantic_alignment, "layout": ahead.layout_alignment}
            for (name, weight), difference in zip(weights.items(), aligned, strict=True):
                difference = torch.where(uncond, 0.0, difference)
                loss = loss + weight * difference.mean()
                terms[name] = difference.detach()
        return Outcome(loss, values.detach(), valid, terms)

    @torch.no_grad()
    def _without_person(
        self, batch: Batch, draws: Draws, z_t: Tensor, t: Tensor, shortcut: float | Tensor
    ) -> dict[str, TextRead]:
        """What the same pass asks the text without image prompt and KV: that of the frozen models."""
        reads: dict[str, TextRead] = {}
        self.roles.predict(z_t, t, batch.text.where(~draws.no_text), shortcut=shortcut, reads=reads)
        return reads

    def _predict(
        self,
        batch: Batch,
        draws: Draws,
        t: Tensor,
        shortcut: float | Tensor = 0.0,
        z_t: Tensor | None = None,
        reads: dict[str, TextRead] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict the noise [B, 4, h, w] under the encoder's conditions; returns it and z_t, else the noised target."""
        has_text, kv = ~draws.no_text, None
        if z_t is None:
            z_t = self.noised(batch.target, draws.noise, t)
        if self.config.model.kv:
            z_c = self.noised(batch.reference, draws.noise, t)
            kv = self.roles.export(z_c, t, batch.reference_text.where(has_text))
        features = torch.where(draws.no_image_prompt.view(-1, 1, 1), self.null_features, batch.features)
        prompt = self.encoder.image_prompt(self.encoder.image_proj(features))
        text = batch.text.where(has_text)
        return self.roles.predict(z_t, t, text, prompt, kv, draws.no_kv, shortcut, reads=reads), z_t

    def noised(self, latent: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noise latents [B, 4, h, w] to the time steps t [B]."""
        return add_noise(latent, noise, self.alpha_bar[t])
