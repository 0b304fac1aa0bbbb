"""Validation: the same pictures drawn again and again while training goes on, with scores.

The noise belongs to the probe, not to the step, and nothing is drawn from any other generator: a run with validation
has the bits of one without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ...lookahead.method.guidance import three_scale_guidance
from ...lookahead.method.schedule import TIMESTEPS, ddim_step
from ...sdxl.encoder import Encoder
from ..seeds import generator
from .config import Config, Validation
from .step import Batch, Step

STREAM = 7_000_000  # of the noise: apart from the numbers of samples that training draws by
# Of the guidance, the shares of text, full and KV: the paper's 3, 2, 2 at SDXL's usual guidance of 5.
SHARES = (0.6, 0.4, 0.4)
Score = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Probes:
    """What a validation draws: R pictures, `prompts` of them for every person, one after another.

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
def sample(step: Step, encoder: Encoder, batch: Batch, noise: Tensor, steps: int, guidance: float) -> Tensor:
    """Latents [B, 4, h, w] drawn from noise of that shape by DDIM (eta 0) with the base itself, as users draw them.

    The shortcut model would need fewer steps; but it is what training pulls at, and what is measured must not be.
    With a KV encoder the guidance is that of three scales (`three_scale_guidance`), else the usual one.
    """
    text_scale, full_scale, kv_scale = (share * guidance for share in SHARES)
    roles, n, has_kv = step.roles, len(noise), bool(encoder.kv)
    no_text = torch.zeros(n, dtype=torch.bool, device=noise.device)
    tokens = encoder.image_proj(batch.features)
    null = encoder.image_proj(step.null_features).expand_as(tokens)
    conditions = (batch.text.where(no_text), null), (batch.text, tokens)
    stride = TIMESTEPS // steps
    times = range(1 + stride * (steps - 1), 0, -stride)
    x = noise
    with roles.using(encoder):
        for now in times:
            t = torch.full((n,), now, device=noise.device)
            # (float32: three scales multiply the rounding of 16 bit)
            (e_u, e_t) = (roles.decode(x, t, text, prompt).float() for text, prompt in conditions)
            if has_kv:
                z_c, own = step.noised(batch.reference, noise, t), batch.reference_text
                exports = (roles.export(z_c, t, c) for c in (own.where(no_text), own))
                e_fu, e_ft = (roles.decode(x, t, *c, kv).float() for c, kv in zip(conditions, exports, strict=True))
                e = three_scale_guidance(e_u, e_t, e_fu, e_ft, text_scale, full_scale, kv_scale)
            else:
                e = e_u + guidance * (e_t - e_u)
            x = ddim_step(x, e, step.alpha_bar[t], step.alpha_bar[max(now - stride, 0)])
    return x


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

    encoder: `step.encoder`, or an average of it.
    """
    pictures = []
    shape = probes.batch.target.shape[1:]
    for first in range(0, len(probes.batch.names), rows):
        batch = probes.batch.rows(slice(first, first + rows))
        # Every prompt of a person from the same noise: what differs is the prompt.
        people = [(first + i) // probes.prompts for i in range(len(batch.names))]
        noise = torch.stack([torch.randn(shape, generator=generator(STREAM, person)) for person in people])
        latents = sample(step, encoder, batch, noise.to(batch.target), settings.steps, settings.guidance)
        pictures.append((step.decode_preview(latents).float() / 2 + 0.5).clamp(0, 1))
    drawn = torch.cat(pictures)
    save_grid(torch.cat([probes.shown[:, None], drawn.unflatten(0, (-1, probes.prompts)).to(probes.shown)], 1), grid)
    figures = probes.score(drawn)
    if (identity := figures.get("identity")) is not None:
        faces = ~identity.isnan()
        figures |= {"identity": identity.where(faces, 0.0), "faces": faces.float()}
    return {name: float(values.nanmean()) for name, values in figures.items()}


def save_grid(pictures: Tensor, path: Path) -> None:
    """Pictures [rows, columns, 3, h, w] in [0, 1] as one PNG."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = pictures.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray((sheet * 255).round().byte().cpu().numpy()).save(path)
