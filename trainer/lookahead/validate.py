"""Validation: the same pictures drawn again and again while training goes on, with scores.

The noise belongs to the probe, not to the step, and nothing is drawn from any other generator: a run with validation
has the bits of one without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ...lookahead.method.guidance import Scales, guided
from ...lookahead.method.sampling import ddim_timesteps, sample_ddim
from ...lookahead.method.schedule import preview_latent
from ...sdxl.encoder import Encoder
from ..seeds import generator
from .config import Config, Validation
from .step import Batch, Step

STREAM = 7_000_000  # of the noise: apart from the numbers of samples that training draws by
# Of the guidance, the shares of text, full and KV: the paper's 3, 2, 2 at SDXL's usual guidance of 5.
SHARES = (0.6, 0.4, 0.4)
AHEAD = 0.2  # of the steps, after which it is seen whether the preview foresees the picture
Score = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Probes:
    """A validation draws R pictures, `prompts` of them for every person, one after another.

    batch: R rows, with the prompts as text, the KV prompt as reference_text, and the references as in training; its
    target is of no use but for the shape. shown: the references, [R / prompts, 3, H, W] in [0, 1].
    score: pictures [R, 3, H, W] in [0, 1] -> figures of each [R]; "identity" is the one by which the best checkpoint is
    kept, NaN where no face is found; others may be NaN where there is nothing to measure. by: what measured it.
    """

    batch: Batch
    prompts: int
    shown: Tensor
    score: Score
    by: str


@runtime_checkable
class Probing(Protocol):
    """A source of data that also holds people and prompts to validate with."""

    def probes(self, config: Config, device: torch.device) -> Probes:
        """People whom training does not see."""
        ...


@torch.no_grad()
def sample(
    step: Step,
    encoder: Encoder,
    batch: Batch,
    noise: Tensor,
    steps: int,
    guidance: float,
    foresee: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Latents [B, 4, h, w] drawn from noise of that shape by DDIM (eta 0) with the base itself, as users draw them.

    The shortcut model would need fewer steps, but the lookahead loss is a loss on its predictions: pictures of the base
    show what the encoder learned, and not how far the shortcut model's previews were optimised.
    With a KV encoder the guidance is that of three scales (`three_scale_guidance`), else the usual one. foresee: is
    given the shortcut model's one-step preview latents, of the same shape, when AHEAD of the steps are done.
    """
    roles = step.roles
    scales = Scales(*(share * guidance for share in SHARES)) if encoder.kv else Scales(guidance, 0.0, 0.0)
    no_text = torch.zeros(len(noise), dtype=torch.bool, device=noise.device)
    tokens = encoder.image_proj(batch.features)
    null = encoder.image_proj(step.null_features).expand_as(tokens)
    without = batch.text.where(no_text), encoder.image_prompt(null)
    prompted = batch.text, encoder.image_prompt(tokens)
    conditions = {"uncond": without, "text": prompted, "full_uncond": without, "full": prompted}
    kv_prompts = {"full_uncond": batch.reference_text.where(no_text), "full": batch.reference_text}

    def evaluate(x: Tensor, t: Tensor, name: str, shortcut: float = 0.0) -> Tensor:
        kv = None
        if name in kv_prompts:
            kv = roles.export(step.noised(batch.reference, noise, t), t, kv_prompts[name])
        # (three scales multiply the rounding of 16 bit)
        return roles.predict(x, t, *conditions[name], kv, shortcut=shortcut).float()

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return guided(lambda names: [evaluate(x, t, name) for name in names], scales)

    def look(now: dict[str, Any]) -> None:
        if foresee is not None and now["i"] == round(AHEAD * steps):
            x, t = now["x"], now["t"]
            few = evaluate(x, t, "full" if encoder.kv else "text", 1.0)
            foresee(preview_latent(x, few, t, step.alpha_bar[t]))

    with roles.using(encoder):
        return sample_ddim(predict, noise, ddim_timesteps(steps), step.alpha_bar, look)


@dataclass(frozen=True, eq=False)
class ProbeValidator:
    """A validation of the encoder on the same probes each time (`recipe.Validator`)."""

    step: Step
    probes: Probes
    settings: Validation

    @property
    def by(self) -> str:
        return self.probes.by

    def __call__(self, trained: Encoder, rows: int, grid: Path) -> dict[str, float]:
        return validate(self.step, trained, self.probes, self.settings, rows, grid)


@torch.no_grad()
def validate(
    step: Step, encoder: Encoder, probes: Probes, settings: Validation, rows: int, grid: Path
) -> dict[str, float]:
    """Draw the probes, at most `rows` at a time, save them as one PNG (a person a row, the reference first) and return
    the mean of each figure. A picture without a face has identity 0, and `faces` is the share of those with one: else
    a few good pictures would look better than many.

    With a shortcut model two figures say whether its previews still foresee what the base draws (section 4.2), or are
    alone in what they learnt: `previewed` is the identity of the one-step previews when AHEAD of the sampling is done,
    and `apart` the mean squared distance of their latents from those of the finished pictures.

    encoder: `step.encoder`, or an average of it.
    """
    assert step.decode_preview is not None  # a step that is validated can show its previews
    pictures, previews, apart = [], list[Tensor](), list[Tensor]()
    foresee = previews.append if step.shortcut is not None else None
    shape = probes.batch.target.shape[1:]
    for first in range(0, len(probes.batch.names), rows):
        batch = probes.batch.rows(slice(first, first + rows))
        # Every prompt of a person from the same noise: what differs is the prompt.
        people = [(first + i) // probes.prompts for i in range(len(batch.names))]
        noise = torch.stack([torch.randn(shape, generator=generator(STREAM, person)) for person in people])
        latents = sample(step, encoder, batch, noise.to(batch.target), settings.steps, settings.guidance, foresee)
        pictures.append(_picture(step, latents))
        if previews:
            apart.append((previews[-1] - latents).square().mean((1, 2, 3)))
            previews[-1] = _picture(step, previews[-1])
    drawn = torch.cat(pictures)
    save_grid(torch.cat([probes.shown[:, None], drawn.unflatten(0, (-1, probes.prompts)).to(probes.shown)], 1), grid)
    figures = probes.score(drawn)
    if previews:
        figures |= {"apart": torch.cat(apart)}
        if (foreseen := probes.score(torch.cat(previews)).get("identity")) is not None:
            figures |= {"previewed": foreseen.nan_to_num(0.0)}
    if (identity := figures.get("identity")) is not None:
        faces = ~identity.isnan()
        figures |= {"identity": identity.where(faces, 0.0), "faces": faces.float()}
    return {name: float(values.nanmean()) for name, values in figures.items()}


def _picture(step: Step, latents: Tensor) -> Tensor:
    """Latents as pictures in [0, 1]."""
    assert step.decode_preview is not None
    return (step.decode_preview(latents).float() / 2 + 0.5).clamp(0, 1)


def save_grid(pictures: Tensor, path: Path) -> None:
    """Pictures [rows, columns, 3, h, w] in [0, 1] as one PNG."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = pictures.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray((sheet * 255).round().byte().cpu().numpy()).save(path)
