"""Sizes (`SIZES`, shared with the host extension) and lengths (`Plan`) of the mini world."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"
SIZES: dict[str, Any] = json.loads((HERE / "sizes.json").read_text())
IMAGE_SIZE: int = SIZES["image_size"]
LATENT_SIZE: int = IMAGE_SIZE // 8
CONTEXT: int = SIZES["text"]["width_l"] + SIZES["text"]["width_g"]


@dataclass(frozen=True)
class Plan:
    """Lengths of one build. `quick` is the first generation: under 90 minutes on two cores."""

    styles: tuple[str, ...] = ("photo", "pencil drawing", "oil painting", "comic", "wanted poster")
    people: int = 3000  # of the training group
    portraits: int = 8000  # more people, in photos alone, for the image encoder: telling people apart takes many
    evaluation_people: int = 1500  # whom only the evaluation networks see
    held_out_people: int = 200  # whom nothing is trained on
    vae_steps: int = 2000
    decoder_steps: int = 3000
    base_steps: int = 5000
    image_encoder_steps: int = 6000
    image_prompt_steps: int = 4500
    recogniser_steps: int = 2500
    style_steps: int = 600
    report_samples: int = 20  # pictures a style that the report counts
    seed: int = 1


QUICK = Plan()
