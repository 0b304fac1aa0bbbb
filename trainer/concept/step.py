"""One training step of a concept encoder: noise predicted under its prediction, and the regularisers of that.

L = |eps - eps(z_t; v, B A)|^2 + lambda_c(step) L_c + lambda_n (|v| - mean)^2 + lambda_w |B A|^2, after arXiv 2307.06925
with weights and schedules of our own (`config`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ...lookahead.method.attention import Attention, softmax_attention
from ...lookahead.method.concept import (
    ConceptEncoder,
    Dictionary,
    Prediction,
    contrast_neighbours,
    contrast_weight,
    nearest_words,
    norm_penalty,
    offset_penalty,
    word_contrast,
    word_logits,
    word_verdict,
)
from ...lookahead.method.schedule import add_noise, alphas_cumprod, signal_to_noise
from ...sdxl.concept import ConceptRows, encode_hard, encode_soft, prompt_ids, unet_features
from ...sdxl.concept_maker import no_text
from ...sdxl.load import PromptEncoder
from ...sdxl.shared_unet import Condition, SharedUNet
from ..recipe import Outcome
from .config import ConceptConfig

WORDS_COMPARED = 4  # real words a sample, while words come first
VERDICT = 0.1  # weight of the cross entropy of words, in nats: as large as the diffusion loss is at the start


@dataclass(frozen=True, eq=False)
class ConceptBatch:
    """B samples (`recipe.SampleBatch`). latents [B, 4, h, w]: of the pictures, scaled as the UNet reads them; features
    [B, width]: what the image encoder sees in them."""

    names: Sequence[str]
    latents: Tensor
    features: Tensor


@dataclass(frozen=True, eq=False)
class ConceptDraws:
    """The random draws of B samples, and the step that they belong to. noise [B, 4, h, w]; t int64 [B]; template int64
    [B]: the prompt of each; words [B, words] in (0, 1): what chance has to do with the real words that are compared."""

    noise: Tensor
    t: Tensor
    template: Tensor
    step: int
    words: Tensor = torch.empty(0)


class ConceptStep(nn.Module):
    """The loss of a batch. Only `encoder` is trained; gradients go through the frozen UNet and text encoders."""

    alpha_bar: Tensor

    def __init__(
        self,
        config: ConceptConfig,
        unet: UNet2DConditionModel,
        text: PromptEncoder,
        encoder: ConceptEncoder,
        dictionary: Dictionary,
        attention: Attention = softmax_attention,
    ):
        super().__init__()
        self.config, self.encoder, self.dictionary = config, encoder, dictionary
        self.unet, self.text = (module.eval().requires_grad_(False) for module in (unet, text))
        self.shared = SharedUNet(self.unet, attention=attention).inject(config.checkpointing)
        self.ids = prompt_ids(text, list(config.data.templates))
        self.register_buffer("alpha_bar", alphas_cumprod().float(), persistent=False)

    def forward(self, part: str, batch: ConceptBatch, draws: ConceptDraws) -> Outcome:
        """The whole loss; there is one part."""
        if draws.step < self.config.token.words_first * self.config.steps:
            return self.words_alone(batch, draws)
        predicted = self.read(self.encoder, batch, draws)
        noise = self.predict(predicted, batch, draws)
        values = (noise.float() - draws.noise).square().mean((1, 2, 3)) * self._weight(draws.t)
        return self._regularised(values.mean(), values, {"diffusion": values.detach()}, predicted, draws.step)

    def read(self, encoder: ConceptEncoder, batch: ConceptBatch, draws: ConceptDraws) -> Prediction:
        """An encoder's prediction of each picture; it may read what the UNet sees in the noised one."""
        if not encoder.sizes.unet_width:
            return encoder(batch.features)
        seen = encoder.standardised(self.seen(batch, draws), draws.t)
        return encoder(batch.features, seen)

    def words_alone(self, batch: ConceptBatch, draws: ConceptDraws) -> Outcome:
        """The loss while words come first (`token.words_first`): each soft word is to say which of a few real ones the
        base would take for the picture, before it is free and before there are offsets.

        Free from the first step, a soft word finds a direction that helps a little, beside a noun that is near, right
        or wrong, and the offsets take over what it should have said.
        """
        predicted = self.read(self.encoder, batch, draws)
        logits = word_logits(*self._soft(predicted), self.words(predicted.word_l))
        chance = -torch.log(-torch.log(draws.words.to(logits)))  # Gumbel's: drawn as the soft word believes in them
        places = (logits.detach() + chance).topk(min(WORDS_COMPARED, logits.shape[1]), dim=1).indices
        errors = torch.stack([self.under(place, batch, draws) for place in places.T], dim=1)
        verdict = word_verdict(logits.gather(1, places), errors, batch.latents[0].numel())
        values = errors.min(dim=1).values * self._weight(draws.t)
        terms = {"diffusion": values, "verdict": verdict.detach()}
        return self._regularised(VERDICT * verdict.mean(), values, terms, predicted, draws.step)

    def _regularised(
        self, loss: Tensor, values: Tensor, terms: dict[str, Tensor], predicted: Prediction, step: int
    ) -> Outcome:
        """A loss with its regularisers; terms: its parts [B], before their weights."""
        for name, (weight, term) in self.regularisers(predicted, step).items():
            loss = loss + weight * term.mean()
            terms[name] = term.detach()
        return Outcome(loss, values.detach(), torch.ones_like(values, dtype=torch.bool), terms)

    @torch.no_grad()
    def under(self, places: Tensor, batch: ConceptBatch, draws: ConceptDraws) -> Tensor:
        """The mean squared error [B] of the noise that the base predicts under real words at places [B] of the
        dictionary."""
        ids = self.ids.rows(draws.template.cpu())
        context, pooled = encode_hard(self.text, ids, self.dictionary.ids[places.cpu()])
        x = add_noise(batch.latents, draws.noise, self.alpha_bar[draws.t])
        noise = self.shared.predict(x, draws.t, Condition(context, pooled, self._sides(batch, context)))
        return (noise.float() - draws.noise).square().mean((1, 2, 3))

    @staticmethod
    def _sides(batch: ConceptBatch, like: Tensor) -> Tensor:
        height, width = (8 * side for side in batch.latents.shape[-2:])
        return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=like.device).expand(
            len(like), 6
        )

    def seen(self, batch: ConceptBatch, draws: ConceptDraws) -> Tensor:
        """The UNet's features of the noised pictures under the empty prompt."""
        x = add_noise(batch.latents, draws.noise, self.alpha_bar[draws.t])
        self.text.to(x.device)
        text = no_text(self.text, len(x), 8 * x.shape[-1])
        return unet_features(self.unet, x, draws.t, text.context, text.added)

    def predict(self, predicted: Prediction, batch: ConceptBatch, draws: ConceptDraws) -> Tensor:
        """The predicted noise [B, 4, h, w] of the noised pictures, each under its own concept."""
        blend, ids = self.config.blend, self.ids.rows(draws.template.cpu())
        context, pooled = encode_soft(self.text, ids, predicted.word_l, predicted.word_g)
        hard = None
        if blend < 1:
            places, _ = nearest_words(*self._soft(predicted), self.words(context))
            with torch.no_grad():
                hard, hard_pooled = encode_hard(self.text, ids, self.dictionary.ids[places[:, 0].cpu()])
            pooled = blend * pooled + (1 - blend) * hard_pooled
        condition = Condition(context, pooled, self._sides(batch, context))
        x = add_noise(batch.latents, draws.noise, self.alpha_bar[draws.t])
        return self.shared.predict(x, draws.t, condition, concept=ConceptRows(predicted.offsets, hard, blend))

    def regularisers(self, predicted: Prediction, step: int) -> dict[str, tuple[float, Tensor]]:
        """Weight and values [B] of each term beside the diffusion loss, at a step."""
        config, token = self.config, self.config.token
        words, dictionary = self._soft(predicted), self.words(predicted.word_l)
        share = contrast_weight(step, config.steps, token.warmup, token.ramp)
        out: dict[str, tuple[float, Tensor]] = {"norms": (token.norm_weight, norm_penalty(*words, dictionary))}
        if predicted.offsets:
            out["offsets"] = config.offset_weight, offset_penalty(predicted.offsets)
        if token.regulariser == "contrast":
            k = contrast_neighbours(step, config.steps, min(token.neighbours, max(1, len(dictionary.ids) // 3)))
            contrast = word_contrast(*words, dictionary, k, token.temperature, token.negatives)
            out["contrast"] = token.weight * share, contrast
        elif token.regulariser == "l2":
            away = sum(
                (word - rows.mean(0)).square().sum(-1)
                for word, rows in zip(words, (dictionary.rows_l, dictionary.rows_g), strict=True)
            )
            out["contrast"] = token.weight * share, torch.as_tensor(away)
        return out

    def _soft(self, predicted: Prediction) -> tuple[Tensor, Tensor]:
        return predicted.word_l.float(), predicted.word_g.float()

    def words(self, like: Tensor) -> Dictionary:
        """The dictionary, its rows on the device of `like`."""
        rows_l, rows_g = (rows.to(like.device) for rows in (self.dictionary.rows_l, self.dictionary.rows_g))
        self.dictionary = self.dictionary._replace(rows_l=rows_l, rows_g=rows_g)
        return self.dictionary

    def _weight(self, t: Tensor) -> Tensor:
        snr = signal_to_noise(self.alpha_bar[t])
        gamma = self.config.min_snr
        return snr.clamp(max=gamma) / snr if gamma else torch.ones_like(snr)
