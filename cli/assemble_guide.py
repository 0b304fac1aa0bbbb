"""From a noise guide's configuration to what the training loop takes: the recipe with all models, and the source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..lookahead.method.attention import softmax_attention
from ..lookahead.method.noise_guide import NoiseGuide, NoiseGuideSizes, signature
from ..sdxl.cpu_attention import cpu_attention
from ..trainer.data.source import PictureSource
from ..trainer.noise_guide.config import NoiseGuideConfig
from ..trainer.noise_guide.recipe import NoiseGuideRecipe
from ..trainer.noise_guide.step import GuideStep
from .assemble import base_hash, device, open_source, read_faces, read_frozen, read_shortcut
from .bases import check, known_base, resolve

if TYPE_CHECKING:
    from ..mini.drawn_people import DrawnPeople


def assemble_guide(config: NoiseGuideConfig) -> tuple[NoiseGuideRecipe, PictureSource | DrawnPeople]:
    """The recipe, with all its models, and the source of its data.

    Raises one of `main.USER_ERRORS` for a file that is missing or is none of its kind.
    """
    reading = config.reading()
    check(reading)
    base = known_base(config.model.base)
    files = resolve(reading.model, base)
    frozen, preview = read_frozen(reading, files)
    recogniser, detector, licence = read_faces(reading, files, base)
    assert preview is not None and recogniser is not None and detector is not None  # `reading` has a lookahead loss
    mark = signature(recogniser, recogniser.size)
    source = open_source(reading, frozen, recogniser, detector)
    torch.manual_seed(config.seed)  # of the guide's first weights
    guide = NoiseGuide(NoiseGuideSizes(len(mark), config.model.width, config.model.hidden))
    attention = cpu_attention if device().type == "cpu" else softmax_attention
    step = GuideStep(config, frozen.unet, guide, read_shortcut(files, frozen), preview, attention)
    about = {
        "base_model_hash": base_hash(base.checkpoint if base else Path(files.base)),
        "size": str(8 * source.latent_shape[-1]),
        "data_hash": source.digest(),
        "recogniser_licence": licence,
    }
    return NoiseGuideRecipe(config, step, recogniser, detector, mark, about), source
