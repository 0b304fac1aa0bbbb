"""A checkpoint that is derived from the shipped files when it is needed, and is not shipped: the base of things."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..plan import WEIGHTS
from ..stages import stage, things
from . import models
from .checkpoint import sdxl_checkpoint
from .weights import CHECKPOINT, CLIP_VISION


def write_things_base(lora: Path, to: Path, weights: Path = WEIGHTS) -> Path:
    """Merge what the stage `things_lora` has made into a copy of a mini SDXL; returns the checkpoint's path.

    The folder `to` then stands for a base (`model.base: <to>`), with the image encoder beside the checkpoint. `lora` is
    the stage's result or the shipped file. Raises FileNotFoundError, one sentence, where one of the two is missing.
    """
    if not lora.is_file():
        raise FileNotFoundError(
            f"There is no {lora}: train it with `lookahead mini build --only things_lora`, which takes about an hour "
            "and a half on two cores and goes on where it was stopped."
        )
    unet, text, vae = models.load(weights)
    things.merge(stage.read_tensors(lora), unet, text)
    tensors = sdxl_checkpoint(unet.state_dict(), text.l.state_dict(), text.g.state_dict(), vae.state_dict())
    to.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(weights / CLIP_VISION, to / CLIP_VISION)
    stage.write_tensors(
        to / CHECKPOINT, stage.half(tensors), {"format": "pt", "modelspec.title": "mini SDXL of things"}
    )
    return to / CHECKPOINT
