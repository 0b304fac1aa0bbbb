"""What a build reports of itself, on held-out people: autoencoder, evaluation networks, base model."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ..evaluate import auc
from . import base, data, evaluators, vae
from .faces import STYLES
from .plan import IMAGE_SIZE, LATENT_SIZE, Plan
from .text import TextEncoders, tokenize, tokenizer


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1]."""
    return (-10 * (a - b).square().mean().log10()).item()


@torch.no_grad()
def report(folder: Path, plan: Plan) -> dict[str, float]:
    """Figures of a finished build; also draws `samples.png` (a column a style) and `reconstructions.png`."""
    held_out = data.pictures(folder, "held_out", plan.held_out_people, plan.styles, IMAGE_SIZE)
    recogniser, scorer = evaluators.load(folder)
    autoencoder = vae.load(folder)
    everyone = held_out.images(torch.arange(len(held_out)))
    style = held_out.labels["style"]
    seen = torch.cat([recogniser.embed(x) for x in everyone.split(200)])
    said = zip(*(scorer(x) for x in everyone.split(200)), strict=True)
    said_style, said_place = (torch.cat(z).argmax(1) for z in said)
    figures = {
        "recogniser AUC": _pair_auc(seen, held_out.per_person),
        "style scorer accuracy": (said_style == style).float().mean().item(),
        "place scorer accuracy": (said_place == held_out.labels["place"]).float().mean().item(),
    }
    few = everyone[: 40 * held_out.per_person]
    rebuilt = (autoencoder.decoder(autoencoder.encoder(few * 2 - 1)) / 2 + 0.5).clamp(0, 1)
    for s in plan.styles:
        rows = style[: len(few)] == STYLES.index(s)
        figures[f"VAE PSNR, {s}"] = psnr(few[rows], rebuilt[rows])
    kept = (recogniser.embed(rebuilt) * seen[: len(few)]).sum(1)
    figures["VAE identity kept"] = kept.mean().item()
    unet, text = base.load(folder)
    drawn = []
    for s in plan.styles:
        prompt = f"{'an' if s[0] in 'aeiou' else 'a'} {s} of a face"
        z = sample(unet, text, [prompt] * plan.report_samples, torch.Generator().manual_seed(plan.seed))
        x = (autoencoder.decoder(z) / 2 + 0.5).clamp(0, 1)
        figures[f"base style accuracy, {s}"] = (scorer(x)[0].argmax(1) == STYLES.index(s)).float().mean().item()
        drawn.append(x[:6])
    save_grid(torch.stack(drawn, 1).flatten(0, 1), len(plan.styles), folder / "samples.png")
    save_grid(torch.stack([few[:18], rebuilt[:18]], 1).flatten(0, 1), 12, folder / "reconstructions.png")
    return figures


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    text: TextEncoders,
    prompts: list[str],
    numbers: torch.Generator,
    steps: int = 25,
    guidance: float = 3.0,
) -> Tensor:
    """DDIM samples in plain diffusers: latents [n, 4, h, w]."""
    steps_of = base.scheduler()
    steps_of.set_timesteps(steps)
    tokens = tokenizer()
    context, pooled = text(torch.cat([tokenize(tokens, [""] * len(prompts)), tokenize(tokens, prompts)]))
    z = torch.randn(len(prompts), 4, LATENT_SIZE, LATENT_SIZE, generator=numbers)
    for t in steps_of.timesteps:
        e = unet(torch.cat([z, z]), t, context, added_cond_kwargs=base.added(pooled)).sample
        without, with_text = e.chunk(2)
        z = steps_of.step(without + guidance * (with_text - without), t, z).prev_sample
    return z


def save_grid(pictures: Tensor, columns: int, path: Path) -> None:
    """Pictures [n, 3, h, w] in [0, 1] as one PNG, row by row."""
    from PIL import Image

    n, _, h, w = pictures.shape
    rows = -(-n // columns)
    sheet = torch.zeros(rows * columns, 3, h, w)
    sheet[:n] = pictures
    sheet = sheet.view(rows, columns, 3, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, 3)
    Image.fromarray((sheet * 255).round().byte().numpy()).save(path)


def _pair_auc(embedding: Tensor, per_person: int) -> float:
    person = torch.arange(len(embedding)) // per_person
    similarity = embedding @ embedding.T
    same = person[:, None] == person[None]
    pair = torch.triu(torch.ones_like(same), 1)
    return auc(similarity[same & pair], similarity[~same & pair])
