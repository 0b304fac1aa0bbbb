"""Noise guides (HyperNoise, arXiv 2508.09968, for likeness) as a recipe of the training loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ...lookahead.files import noise_guide_file
from ...lookahead.losses.identity import NONE, IdentityLoss, read_references
from ...lookahead.method.noise_guide import NoiseGuide
from ...lookahead.method.schedule import lora_scale
from ...lookahead.vision.arcface import Recogniser
from ...lookahead.vision.faces import Detector
from ..lookahead.recipe import compile_blocks
from ..lookahead.step import Batch
from ..lookahead.validate import STREAM, Probes, Probing, save_grid
from ..recipe import Outcome, Validator
from ..seeds import generator
from .config import NoiseGuideConfig
from .step import GuideDraws, GuideStep

# Figure of a log's line: its title, of those that no other recipe has.
PANELS = {
    "guide": "loss of the noise guide",
    "moved": "share of the noise that is moved",
    "unguided": "validation: identity without the guide",
    "gain": "validation: identity that the guide adds",
}


class NoiseGuideRecipe:
    """A noise guide over a frozen SDXL, trained by the identity loss on one-step previews.

    recogniser, detector: of that loss; signature: of that recogniser (`noise_guide.signature`); about: what the file
    says of the models (`noise_guide_file.NOISE_GUIDE_FIELDS`).
    """

    monitor = "identity"
    parts = ("guide",)

    def __init__(
        self,
        config: NoiseGuideConfig,
        step: GuideStep,
        recogniser: Recogniser,
        detector: Detector,
        signature: Tensor,
        about: Mapping[str, str] | None = None,
    ):
        self.config, self.losses, self.trained = config, step, step.guide
        self.recogniser, self.detector, self.signature = recogniser, detector, signature
        self.about = dict(about or {})

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """All of the guide's weights at one rate."""
        return [(list(self.trained.parameters()), self.config.optimiser.rate)]

    def draw(self, numbers: Sequence[int], batch: Batch) -> GuideDraws:
        """Noise, a noise level between the two ends of the opening, and a LoRA scale (LoRA interpolation)."""
        config, shape, device = self.config, tuple(batch.target.shape[1:]), batch.target.device
        noise, uniform = [], []
        for number in numbers:
            g = generator(config.seed, number)
            noise.append(torch.randn(shape, generator=g))
            uniform.append(torch.rand(3, generator=g, dtype=torch.float64))
        u_t, u_full, u_strength = torch.stack(uniform, 1)
        late, early = (config.opening.timestep(place) for place in (config.opening.end, config.opening.start))
        t = (late + u_t * (early - late)).round().long()
        strength = lora_scale(u_strength, config.loss.least_strength, 1.0, full=u_full < config.loss.full_strength)
        return GuideDraws(torch.stack(noise).to(device), t.to(device), strength.float().to(device))

    def figures(self, outcomes: Mapping[str, Outcome], mean: Callable[[Tensor], float]) -> dict[str, float]:
        """The loss (`guide`); the share of samples with a face (`counted`), the mean of their distance to the person
        (`distance`), and of how far the noise is moved (`moved`)."""
        outcome = outcomes["guide"]
        figures = {"guide": mean(outcome.loss), "counted": mean(outcome.valid.float().mean())}
        distance = mean(torch.where(outcome.valid, outcome.values, 0.0).mean())
        figures["distance"] = distance / figures["counted"] if figures["counted"] else float("nan")
        return figures | {name: mean(values.mean()) for name, values in outcome.terms.items()}

    def export(self, path: Path, trained: NoiseGuide, steps: int) -> Path:
        """Write the noise guide's file, in 16 bit. Raises EncoderFileError where it cannot be written."""
        shown = self.config.shareable()
        about = {
            "base_model": shown["model"]["base"],
            "shortcut": shown["model"]["shortcut"],
            "start": repr(self.config.opening.start),
            "end": repr(self.config.opening.end),
            "recogniser": shown["model"]["recogniser"],
            "data": shown["data"]["source"],
            "config": json.dumps(shown),
            "steps": str(steps),
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.title": self.config.name,
            "modelspec.architecture": "stable-diffusion-xl-v1-base/noise-guide",
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_guide_file.write(path, trained, self.signature, about | self.about)
        return path

    def validator(self, source: object, device: torch.device) -> Validator | None:
        """Makes a `GainValidator` of the people whom the source holds out, None where it holds none."""
        if not isinstance(source, Probing):
            return None
        probes = source.probes(self.config.reading(), device)
        with torch.no_grad():
            recogniser = self.recogniser.to(device)
            people = read_references(recogniser, self.detector, list(probes.shown), False)
        return GainValidator(self.losses, probes, IdentityLoss(recogniser, self.detector, people, NONE))

    def compile(self) -> None:
        """Compile the UNet's transformer blocks."""
        compile_blocks(self.losses.unet)

    def savings(self, processes: int) -> Mapping[str, float]:
        """Counts what some changes of the configuration would save."""
        from .estimate import guide_savings, shapes_of

        return guide_savings(self.config, processes, shapes_of(self.losses, self.about))


class GainValidator:
    """Draws people whom training does not see with and without the guide, from the same noise.

    Figures: likeness with the guide (`identity`) and without (`unguided`), their difference (`gain`), and what else the
    judges of the source measure, with the guide. A picture without a face has identity 0, and `faces` is the share of
    those with one.
    """

    def __init__(self, step: GuideStep, probes: Probes, likeness: IdentityLoss):
        """likeness: to those whom the probes show."""
        self.step, self.probes, self.likeness = step, probes, likeness
        self._unguided: Tensor | None = None

    @property
    def by(self) -> str:
        """Names the judge."""
        return self.probes.by

    @torch.no_grad()
    def __call__(self, trained: NoiseGuide, rows: int, grid: Path) -> dict[str, float]:
        if self._unguided is None:  # always the same
            self._unguided = self._drawn(None, rows)
        guided = self._drawn(trained, rows)
        shown = self.probes.shown
        columns = [
            shown[:, None],
            *(p.unflatten(0, (-1, self.probes.prompts)).to(shown) for p in (self._unguided, guided)),
        ]
        save_grid(torch.cat(columns, 1), grid)
        figures, before = self.probes.score(guided), self.probes.score(self._unguided)["identity"]
        faces = ~figures["identity"].isnan()
        identity, unguided = figures["identity"].where(faces, 0.0), before.where(~before.isnan(), 0.0)
        figures |= {"identity": identity, "unguided": unguided, "gain": identity - unguided, "faces": faces.float()}
        return {name: float(values.nanmean()) for name, values in figures.items()}

    def _drawn(self, guide: NoiseGuide | None, rows: int) -> Tensor:
        """Pictures [R, 3, H, W] in [0, 1], at most `rows` at a time; each prompt of a person from the same noise."""
        pictures, batch = [], self.probes.batch
        for first in range(0, len(batch.names), rows):
            chosen = slice(first, first + rows)
            some = batch.rows(chosen)
            numbers = [(first + i) // self.probes.prompts for i in range(len(some.names))]
            noise = torch.stack([torch.randn(some.target.shape[1:], generator=generator(STREAM, n)) for n in numbers])
            people = torch.arange(first, first + len(some.names)) // self.probes.prompts
            latents = self.step.draw(some.text, noise.to(some.target), guide, self.likeness, people)
            pictures.append((self.step.tiny(latents).float() / 2 + 0.5).clamp(0, 1))
        return torch.cat(pictures)
