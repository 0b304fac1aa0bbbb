"""Sizes (`SIZES`, shared with the host extension) and lengths (`Plan`) of the mini world."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .world.faces import STYLES

HERE = Path(__file__).parent
BUILD, QUICK_BUILD = Path(".mini"), Path(".mini-quick")  # of `lookahead mini build`, in the folder one is in
WEIGHTS = HERE / "weights"
SIZES: dict[str, Any] = json.loads((HERE / "sizes.json").read_text())
IMAGE_SIZE: int = SIZES["image_size"]
LATENT_SIZE: int = IMAGE_SIZE // 8
CONTEXT: int = SIZES["text"]["width_l"] + SIZES["text"]["width_g"]


@dataclass(frozen=True)
class Plan:
    """Lengths of one build: `FULL` made the shipped weights, `QUICK` is for development."""

    styles: tuple[str, ...] = STYLES
    people: int = 3000  # of the training group
    portraits: int = 8000  # more people, in photos alone, for the image encoder: telling people apart takes many
    evaluation_people: int = 1500  # whom only the evaluation networks see
    held_out_people: int = 200  # whom nothing is trained on
    things: int = 6000  # pictures of things, for the base
    things_faces: int = 300  # people whose pictures keep the base's faces what they are while it learns things
    judged_things: int = 8000  # pictures of things for their judge
    scored_people: int = 500  # whose pictures stand beside these, for the scorer of styles and places of both
    vae_steps: int = 4000
    decoder_steps: int = 4000
    sharpen_steps: int = 4000
    base_steps: int = 12000
    image_encoder_steps: int = 12000
    image_prompt_steps: int = 6000
    overfit_steps: int = 1000
    recogniser_steps: int = 4000
    style_steps: int = 1000
    detector_steps: int = 5000
    face_recogniser_steps: int = 1200
    clip_steps: int = 4000
    controlnet_steps: int = 1500
    lcm_lora_steps: int = 3000
    collapsed_steps: int = 800
    style_lora_steps: int = 400
    things_lora_steps: int = 8000
    things_judge_steps: int = 1500
    things_scorer_steps: int = 1500
    things_vision_steps: int = 3000
    report_people: int = 100  # whose pictures go through the autoencoder
    report_samples: int = 30  # of the base, a style
    report_photos: int = 100  # of the base, for what is found in them
    report_captions: int = 200  # long ones, half of them of photos
    report_references: int = 100  # for the image prompt
    report_prompts: int = 96  # for the few-step LoRAs
    seed: int = 1


FULL = Plan()
QUICK = replace(
    FULL,
    people=1500,
    vae_steps=2000,
    decoder_steps=2000,
    sharpen_steps=1000,
    base_steps=5000,
    image_encoder_steps=5000,
    image_prompt_steps=3000,
    overfit_steps=500,
    recogniser_steps=2000,
    style_steps=600,
    detector_steps=1500,
    face_recogniser_steps=700,
    clip_steps=2000,
    controlnet_steps=1000,
    lcm_lora_steps=1000,
    collapsed_steps=300,
    style_lora_steps=200,
    things=3000,
    judged_things=3000,
    things_lora_steps=2000,
    things_judge_steps=500,
    scored_people=250,
    things_scorer_steps=600,
    things_vision_steps=800,
    report_people=40,
    report_samples=12,
    report_photos=40,
    report_captions=80,
    report_references=40,
    report_prompts=32,
)
