"""Stage: a small LoRA of one person under a made-up name: a personalised model, as users train them from photos.

DreamBooth's recipe with LoRA: pictures of the person under the name, and as many of other people under their own
captions, so that the name stands for the person and a face without it stays anybody's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...sdxl import lora
from ..plan import IMAGE_SIZE, Plan
from ..world.data import Pictures
from ..world.faces import STYLES, Faces, captions, render, sample_identities, sample_nuisance
from . import base, stage, vae
from .text import tokenize, tokenizer

NAME = "zorka"
PERSON = 7002  # seed of one person, who is in none of the groups of data.py
SHOTS = 20
RANK = 4
BATCH = 16  # half of it the person, half others
RATE = 1e-3


def named(prompt: str) -> str:
    """A prompt of anybody ("a photo of a face at night") made one of the person."""
    return prompt.replace("a face", f"a {NAME} face")


def shots() -> tuple[Tensor, list[str]]:
    """SHOTS photos [n, 3, size, size] of the person, in different places and light, and their captions."""
    numbers = torch.Generator().manual_seed(PERSON)
    person = {k: v.expand(SHOTS) for k, v in sample_identities(1, numbers).items()}
    photo = torch.full((SHOTS,), STYLES.index("photo"))
    faces = Faces(person, sample_nuisance(SHOTS, numbers, style=photo))
    return render(faces, IMAGE_SIZE, seed=PERSON), [named(c) for c in captions(faces, False)]


def train(folder: Path, pictures: Pictures, latents: Tensor, plan: Plan) -> None:
    out = folder / "style_lora.safetensors"
    if out.exists():
        return
    torch.manual_seed(plan.seed + 12)
    device = stage.device()
    unet, text = (m.to(device) for m in base.load(folder))
    made = lora.build(unet, RANK, lora.TRANSFORMER).to(device).attach(unet)
    tokens = tokenizer()
    images, names = shots()
    with torch.no_grad():
        own = vae.load(folder).to(device).encoder(images.to(device) * 2 - 1).cpu()
    own_ids, short = tokenize(tokens, names), tokenize(tokens, pictures.short)
    noised = base.Noising(device)

    def loss(step: int) -> Tensor:
        numbers = stage.numbers_of_step(plan.seed + 12, step)
        mine = torch.randint(SHOTS, (BATCH // 2,), generator=numbers)
        others = torch.randint(len(pictures), (BATCH // 2,), generator=numbers)
        ids = torch.cat([own_ids[mine], short[others]]).to(device)
        t, noise, x = noised(torch.cat([own[mine], latents[others].float()]).to(device), numbers)
        with stage.autocast(device):
            with torch.no_grad():
                condition = base.condition(*text(ids))
            return noised.loss(base.predict(unet, x, t, condition), noise, t)

    stage.train("style_lora", folder, {"lora": made}, loss, steps=plan.style_lora_steps, rate=RATE, decay=0.0, ema=0.98)
    stage.write_tensors(out, lora.public_tensors(made))
    stage.finish("style_lora", folder)
