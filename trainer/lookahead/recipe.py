"""LCM-Lookahead (arXiv 2404.03620) as a recipe of the training loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ...sdxl.encoder import Encoder
from ..recipe import Outcome
from .config import Config
from .draws import Draws, draw
from .export import export
from .step import Batch, Part, Step, parts
from .validate import ProbeValidator, Probing

# Figure of a log's line: its title. docs/training.md says what each should do.
PANELS = {
    "diffusion": "diffusion loss",
    "lookahead": "lookahead loss",
    "distance": "distance of previews",
    "counted": "share that counts",
    "contrast": "InfoNCE of previews",
    "alignment": "alignment loss",
    "semantic": "semantic alignment",
    "layout": "layout alignment",
    "norm": "gradient of both, before it is clipped",
    "norm_diffusion": "gradient of the diffusion loss",
    "norm_lookahead": "gradient of the lookahead loss",
    "identity": "validation: identity",
    "faces": "validation: share with a face",
    "prompt": "validation: prompt",
    "style": "validation: style",
    "previewed": "validation: identity of previews",
    "apart": "validation: distance of previews",
}


class LookaheadRecipe:
    """An encoder (image prompt, and KV encoder) over a frozen SDXL, by a diffusion loss and a lookahead loss.

    about: what the encoder file says of the models (`encoder_file.METADATA_FIELDS`).
    """

    monitor = "identity"

    def __init__(self, config: Config, step: Step, about: Mapping[str, str] | None = None):
        self.config, self.losses, self.trained = config, step, step.encoder
        self.about = dict(about or {})
        if not config.optimiser.kv_rate:
            self.trained.kv.requires_grad_(False)
        self.parts: tuple[Part, ...] = parts(config)

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Resampler and image prompt projections at one rate, and the KV encoder, where there is one, at its own."""
        settings = self.config.optimiser
        rates = {"adapter": settings.adapter_rate, "kv": settings.kv_rate}
        return [(group, rates[name]) for name, group in self.trained.groups().items() if rates[name]]

    def draw(self, numbers: Sequence[int], batch: Batch) -> Draws:
        return draw(self.config, numbers, tuple(batch.target.shape[1:])).to(batch.target.device)

    def figures(self, outcomes: Mapping[str, Outcome], mean: Callable[[Tensor], float]) -> dict[str, float]:
        """The losses; of the lookahead loss the share of samples that count (`counted`), the mean of their values
        (`distance`), and what an alignment loss came to."""
        figures = {part: mean(outcome.loss) for part, outcome in outcomes.items()}
        if ahead := outcomes.get("lookahead"):
            figures["counted"] = counted = mean(ahead.valid.float().mean())
            distance = mean(torch.where(ahead.valid, ahead.values, 0.0).mean())
            figures["distance"] = distance / counted if counted else float("nan")
            figures |= {name: mean(values.mean()) for name, values in ahead.terms.items()}
            if "contrast" in figures:  # of samples that count, as the distance
                figures["contrast"] = figures["contrast"] / counted if counted else float("nan")
        return figures

    def export(self, path: Path, trained: Encoder, steps: int) -> Path:
        return export(path, trained, self.config, steps, self.about)

    def validator(self, source: object, device: torch.device) -> ProbeValidator | None:
        if not isinstance(source, Probing):
            return None
        return ProbeValidator(self.losses, source.probes(self.config, device), self.config.validation)

    def compile(self) -> None:
        compile_blocks(self.losses.unet)

    def savings(self, processes: int) -> Mapping[str, float]:
        from .estimate import Shapes, estimate, savings

        step = self.losses
        shapes = Shapes(
            json.dumps({k: v for k, v in step.unet.config.items() if not k.startswith("_")}),
            step.encoder.image_proj.sizes,
            step.null_features.shape[1],
            len(step.shortcut.branches[0].lora_down.weight) if step.shortcut is not None else 0,
            int(self.about["size"]) if "size" in self.about else None,
        )
        return savings(estimate(self.config, processes, shapes))


def compile_blocks(unet: UNet2DConditionModel, **options: object) -> None:
    """torch.compile of the transformer blocks, all but their attention. options: of `torch.compile`."""
    # A graph for every width of block, role, and need of gradients; the default of 8 is too few for those.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    unet.compile_repeated_blocks(**options)
