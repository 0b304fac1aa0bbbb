"""The validation of a concept encoder: how well it fits pictures that it was not trained on, and how its words move."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ...lookahead.method.concept import ConceptEncoder, nearest_words
from ...lookahead.method.schedule import TIMESTEPS, add_noise, pred_original_sample
from ..seeds import generator
from .step import ConceptBatch, ConceptDraws, ConceptStep


class FitValidator:
    """Measures how well predicted concepts fit pictures that training does not see (`fit`: minus the loss on fixed
    noise), how near their words are to real ones (`nearest`), and which share changed its nearest word since the last
    time (`changed`)."""

    by = "the loss on held-out pictures under fixed noise"

    def __init__(self, step: ConceptStep, batch: ConceptBatch, seed: int):
        g, shape = generator(seed, 9000), batch.latents.shape
        self.step, self.batch = step, batch
        noise = torch.randn(shape, generator=g).to(batch.latents.device)
        t = ((torch.arange(shape[0]) + 0.5) * TIMESTEPS / shape[0]).long().to(noise.device)
        self.draws = ConceptDraws(noise, t, torch.zeros(shape[0], dtype=torch.long), 0)
        self._before: Tensor | None = None

    @torch.no_grad()
    def __call__(self, trained: ConceptEncoder, rows: int, grid: Path) -> dict[str, float]:
        values, places, cosines, seen = [], [], [], []
        for at in torch.arange(len(self.batch.names)).split(rows):
            batch = ConceptBatch([self.batch.names[i] for i in at], self.batch.latents[at], self.batch.features[at])
            draws = ConceptDraws(self.draws.noise[at], self.draws.t[at], self.draws.template[at], 0)
            predicted = self.step.read(trained, batch, draws)
            noise = self.step.predict(predicted, batch, draws)
            values.append((noise.float() - draws.noise).square().mean((1, 2, 3)))
            x = add_noise(batch.latents, draws.noise, self.step.alpha_bar[draws.t])
            seen.append(pred_original_sample(x, noise.float(), self.step.alpha_bar[draws.t]))
            dictionary = self.step.words(predicted.word_l)
            place, cosine = nearest_words(predicted.word_l.float(), predicted.word_g.float(), dictionary)
            places.append(place[:, 0])
            cosines.append(cosine[:, 0])
        nearest = torch.cat(places)
        changed = float("nan") if self._before is None else float((nearest != self._before).float().mean())
        self._before = nearest
        _draw(torch.cat(seen), grid)
        fit = -float(torch.cat(values).mean())
        return {"fit": fit, "nearest": float(torch.cat(cosines).mean()), "changed": changed}


def _draw(latents: Tensor, grid: Path) -> None:
    """The estimates of the clean latents beside each other, their first three channels as colours."""
    channels = latents[:, :3].float().cpu()
    low, high = channels.quantile(0.01), channels.quantile(0.99)
    picture = ((channels - low) / (high - low + 1e-6)).clamp(0, 1).permute(2, 0, 3, 1).flatten(1, 2)
    grid.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((picture * 255).round().byte().numpy()).save(grid)
