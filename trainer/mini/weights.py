"""The mini world's shipped files: from trained stages to `weights/`, and back to networks."""

from __future__ import annotations

from pathlib import Path

from . import stage, vae
from .checkpoint import sdxl_checkpoint
from .networks import Recogniser, StyleScorer
from .plan import WEIGHTS

CHECKPOINT = "mini_sdxl.safetensors"
CLIP_VISION = "mini_clip_vision.safetensors"
IMAGE_PROMPT = "mini_ip_adapter_plus_face.safetensors"
RECOGNISER = "mini_evaluation_recogniser.safetensors"
STYLE_SCORER = "mini_evaluation_style_scorer.safetensors"
FILES = (CHECKPOINT, CLIP_VISION, IMAGE_PROMPT, RECOGNISER, STYLE_SCORER)


def export(folder: Path, to: Path = WEIGHTS) -> None:
    """Write the shipped files (16 bit, public layouts) from the stages' results in `folder`."""
    base = stage.read_tensors(folder / "base.safetensors")
    unet, text_l, text_g = (
        {k.removeprefix(p): v for k, v in base.items() if k.startswith(p)} for p in ("unet.", "text.l.", "text.g.")
    )
    checkpoint = sdxl_checkpoint(unet, text_l, text_g, vae.load(folder).state_dict())
    metadata = {"modelspec.title": "LCM-Lookahead mini SDXL (drawn faces, 128 px)", "modelspec.license": "Apache-2.0"}
    stage.write_tensors(to / CHECKPOINT, stage.half(checkpoint), metadata)
    for name, source in {
        CLIP_VISION: "image_encoder",
        IMAGE_PROMPT: "image_prompt",
        RECOGNISER: "recogniser",
        STYLE_SCORER: "style_scorer",
    }.items():
        stage.write_tensors(to / name, stage.half(stage.read_tensors(folder / f"{source}.safetensors")))


def evaluators(weights: Path = WEIGHTS) -> tuple[Recogniser, StyleScorer]:
    """The two networks that only measure, from the shipped files."""
    nets = Recogniser(), StyleScorer()
    for net, name in zip(nets, (RECOGNISER, STYLE_SCORER), strict=True):
        stored = stage.read_tensors(weights / name)
        net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in stored.items()})
        net.eval().requires_grad_(False)
    return nets
