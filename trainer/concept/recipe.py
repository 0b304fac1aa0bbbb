"""DATE (arXiv 2307.06925) as a recipe of the training loop: a concept encoder over a frozen SDXL."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...lookahead.files.concept_file import write_concept_encoder
from ...lookahead.method.concept import ConceptEncoder
from ...lookahead.method.schedule import TIMESTEPS
from ..recipe import Outcome, Source, Validator
from ..seeds import generator
from .config import ConceptConfig
from .fit import FitValidator
from .step import ConceptBatch, ConceptDraws, ConceptStep

MEASURED = 100  # pictures, whose noise levels are spread evenly


class ConceptRecipe:
    """A concept encoder, trained by noise that a frozen SDXL predicts under its words and offsets.

    words: the dictionary, token id -> text; about: what the encoder file says of the models.
    """

    monitor = "fit"
    parts = ("concept",)

    def __init__(
        self,
        config: ConceptConfig,
        step: ConceptStep,
        words: Mapping[int, str],
        about: Mapping[str, str] | None = None,
    ):
        self.config, self.losses, self.trained, self.words = config, step, step.encoder, dict(words)
        self.about = dict(about or {})

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Bases and the layers that mix them at one rate, trunk and words at another."""
        settings = self.config.optimiser
        basis: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in self.trained.named_parameters():
            (basis if name.startswith(("basis_", "coefficients_")) else rest).append(parameter)
        groups = [(basis, settings.basis_rate), (rest, settings.rate)]
        return [group for group in groups if group[0]]  # an encoder of words alone has no basis

    @torch.no_grad()
    def measure(self, source: Source, device: torch.device) -> None:
        """Note how the UNet's features of some of the pictures are spread, by noise level, before the training begins;
        nothing where the encoder does not read them."""
        if not self.trained.sizes.unet_width:
            return
        self.losses.to(device)
        seen, t = [], []
        for n in range(MEASURED):
            batch = source.batch([n % len(source)], [n], device)
            draws = self.draw([n], batch)
            level = torch.tensor([(2 * n + 1) * TIMESTEPS // (2 * MEASURED)], device=device)
            seen.append(self.losses.seen(batch, replace(draws, t=level)))
            t.append(level)
        self.trained.measure(torch.cat(seen), torch.cat(t))

    def draw(self, numbers: Sequence[int], batch: ConceptBatch) -> ConceptDraws:
        config, shape, device = self.config, tuple(batch.latents.shape[1:]), batch.latents.device
        noise, t, template, words = [], [], [], []
        for number in numbers:
            g = generator(config.seed, number)
            noise.append(torch.randn(shape, generator=g))
            t.append(torch.randint(TIMESTEPS, (), generator=g))
            template.append(torch.randint(len(config.data.templates), (), generator=g))
            words.append(torch.rand(len(self.words), generator=g).clamp(1e-6, 1 - 1e-6))
        step = numbers[0] // config.batch
        steps, compared = torch.stack(t).to(device), torch.stack(words).to(device)
        return ConceptDraws(torch.stack(noise).to(device), steps, torch.stack(template), step, compared)

    def figures(self, outcomes: Mapping[str, Outcome], mean: Callable[[Tensor], float]) -> dict[str, float]:
        """The whole loss (`concept`) and the mean of each term before its weight; `contrast` is the regulariser's."""
        outcome = outcomes["concept"]
        figures = {"concept": mean(outcome.loss)}
        return figures | {name: mean(values.mean()) for name, values in outcome.terms.items()}

    def export(self, path: Path, trained: ConceptEncoder, steps: int) -> Path:
        """Write the concept encoder's file, in 16 bit. Raises EncoderFileError where it cannot be written."""
        config = self.config
        shown = config.shareable()
        about = {
            "base_model": shown["model"]["base"],
            "data": shown["data"]["source"],
            "config": json.dumps(shown),
            "steps": str(steps),
            "features": config.model.features,
            "regulariser": config.token.regulariser,
            "blend": repr(config.tuning.blend),
            "tuning": json.dumps(config.tuning.model_dump()),
            "templates": "\n".join(config.data.templates),
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.title": config.name,
            "modelspec.architecture": "stable-diffusion-xl-v1-base/concept-encoder",
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_concept_encoder(path, trained, self.words, about | self.about)
        return path

    def validator(self, source: object, device: torch.device) -> Validator | None:
        """Makes a `FitValidator` of what the source holds out, None where it holds nothing out."""
        held_out = getattr(source, "held_out", None)
        batch = held_out(device) if held_out is not None else None
        return None if batch is None else FitValidator(self.losses, batch, self.config.seed)

    def compile(self) -> None:
        """Compile the UNet's transformer blocks."""
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self.losses.shared.unet.compile_repeated_blocks()

    def savings(self, processes: int) -> Mapping[str, float]:
        """Counts what one sample at a time would save."""
        from .estimate import concept_savings

        return concept_savings(self.config, processes)
