"""A checkpoint that is derived from the shipped files when it is needed, and is not shipped: the base of things."""

from __future__ import annotations

from pathlib import Path

from ...lookahead.files.tensors import sha256
from ...tools.common import CACHE, Problem
from ..plan import BUILD, WEIGHTS
from ..stages import stage, things
from . import models
from .checkpoint import sdxl_checkpoint
from .weights import CHECKPOINT, CLIP_VISION

THINGS_LORA, THINGS_VISION = "mini_things_lora.safetensors", "mini_things_clip_vision.safetensors"


def write_things_base(lora: Path, to: Path, weights: Path = WEIGHTS) -> Path:
    """Merge what the stage `things_lora` has made into a copy of a mini SDXL; returns the checkpoint's path.

    The folder `to` then stands for a base (`model.base: <to>`), with the image encoder that knows things beside the
    checkpoint. `lora` is the stage's result or the shipped file, and its image encoder lies beside it, else in
    `weights`. Raises FileNotFoundError, one sentence, where one of them is missing.
    """
    if not lora.is_file():
        raise FileNotFoundError(
            f"There is no {lora}: train it with `lookahead mini build --only things_lora`, which takes about three "
            "and a half hours of one core and goes on where it was stopped."
        )
    built = lora.with_name("things_vision.safetensors")
    vision = built if built.is_file() else weights / THINGS_VISION
    if not vision.is_file():
        raise FileNotFoundError(
            f"There is no {vision}, the image encoder that knows things: train it with `lookahead mini build --only "
            "things_vision`, which takes ten minutes of one core."
        )
    unet, text, vae = models.load(weights)
    things.merge(stage.read_tensors(lora), unet, text)
    tensors = sdxl_checkpoint(unet.state_dict(), text.l.state_dict(), text.g.state_dict(), vae.state_dict())
    to.mkdir(parents=True, exist_ok=True)
    stage.write_tensors(to / CLIP_VISION, stage.half(stage.read_tensors(vision)), {"format": "pt"})
    stage.write_tensors(
        to / CHECKPOINT, stage.half(tensors), {"format": "pt", "modelspec.title": "mini SDXL of things"}
    )
    return to / CHECKPOINT


def things_base() -> Path:
    """The folder of the base that draws things: of a build, else made of the shipped LoRA. Raises Problem for none."""
    built = BUILD / "things"
    return built if (built / CHECKPOINT).is_file() else shipped_things_base().parent


def shipped_things_base() -> Path:
    """The checkpoint of the shipped base that draws things, made when it is first asked for. Raises Problem where a
    file of it is not there."""
    shipped, vision = WEIGHTS / THINGS_LORA, WEIGHTS / THINGS_VISION
    if not (shipped.is_file() and vision.is_file()):
        raise Problem(
            "There is no base that draws things: run `lookahead mini build --only things_lora,things_vision` to its "
            "end, then `lookahead mini things`."
        )
    made = CACHE / "mini" / f"things-{sha256(shipped)[:12]}-{sha256(vision)[:12]}"
    if not (made / CHECKPOINT).is_file():
        write_things_base(shipped, made)
    return made / CHECKPOINT


def stage_or_shipped(name: str, shipped: str) -> Path:
    """The result of a stage of the build, else the shipped file. Raises Problem where there is neither."""
    for path in (BUILD / f"{name}.safetensors", WEIGHTS / shipped):
        if path.is_file():
            return path
    raise Problem(f"There is no {name}.safetensors: run `lookahead mini build --only {name}` to its end.")
