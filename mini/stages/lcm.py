"""Stage: the few-step LoRA, by latent consistency distillation (LCM-LoRA, arXiv 2311.05556) of the base.

The student maps a latent at any time step to the end of the base's guided path in one step. It is taught by itself:
one DDIM step of the guided base (a fiftieth of the way) leads from x_t to x_s, and the student's answer at t is pulled
to the answer of its running average at s. At t = 0 the answer is the latent itself, so the truth spreads from there
upwards. No guidance embedding: the strength of the guidance is built in, as in the public LCM-LoRA.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ...lookahead.method.sampling import sample_lcm
from ...lookahead.method.schedule import TIMESTEPS, add_noise, ddim_step, preview_latent
from ...sdxl import lora
from ..plan import LATENT_SIZE, Plan
from ..world.data import Pictures
from . import base, stage
from .text import TextEncoders, tokenize, tokenizer

RANK, CONV_RANK = 12, 8
BATCH = 16
SKIP = TIMESTEPS // 50  # what one DDIM step of fifty covers
GUIDANCE = 3.0  # what the base is sampled with everywhere
HUBER = 1e-3
TARGET_DECAY = 0.95
RATE = 1e-3


def train(folder: Path, pictures: Pictures, latents: Tensor, plan: Plan) -> None:
    out = folder / "lcm_lora.safetensors"
    if out.exists():
        return
    torch.manual_seed(plan.seed + 10)
    device = stage.device()
    unet, text = (m.to(device) for m in base.load(folder))
    student = lora.build(unet, RANK, conv_rank=CONV_RANK).to(device)
    target = copy.deepcopy(student).requires_grad_(False)
    for each in (student, target):
        each.attach(unet).scale = 0.0
    tokens = tokenizer()
    long, short, empty = (tokenize(tokens, t) for t in (pictures.long, pictures.short, [""]))
    alpha_bar = base.alpha_bar(device)
    with torch.no_grad():
        nothing = base.condition(*text(empty.to(device)))

    def loss(step: int) -> Tensor:
        torch._foreach_lerp_(list(target.parameters()), [p.detach() for p in student.parameters()], 1 - TARGET_DECAY)
        numbers = stage.numbers_of_step(plan.seed + 10, step)
        index = torch.randint(len(pictures), (BATCH,), generator=numbers)
        described = torch.rand(BATCH, 1, 1, generator=numbers) < 0.5
        ids = torch.where(described, long[index], short[index]).to(device)
        t = torch.randint(1, TIMESTEPS, (BATCH,), generator=numbers).to(device)
        s = (t - SKIP).clamp(min=0)
        noise = torch.randn(latents[index].shape, generator=numbers).to(device)
        x = add_noise(latents[index].float().to(device), noise, alpha_bar[t])
        with stage.autocast(device):
            with torch.no_grad():
                condition = base.condition(*text(ids))
                eps = base.classifier_free(partial(base.predict, unet), condition, nothing, GUIDANCE)(x, t)
                x_s = ddim_step(x, eps, alpha_bar[t], alpha_bar[s])
                with target.at(1.0):
                    wanted = preview_latent(x_s, base.predict(unet, x_s, s, condition), s, alpha_bar[s])
            with student.at(1.0):
                answer = preview_latent(x, base.predict(unet, x, t, condition), t, alpha_bar[t])
        return ((answer - wanted).square() + HUBER**2).sqrt().mean() - HUBER

    stage.train(
        "lcm_lora",
        folder,
        {"student": student, "target": target},
        loss,
        steps=plan.lcm_lora_steps,
        rate=RATE,
        decay=0.0,
        ema=0.99,
    )
    stage.write_tensors(out, lora.public_tensors(student))
    stage.finish("lcm_lora", folder)


def load(folder: Path, unet: UNet2DConditionModel, name: str = "lcm_lora") -> lora.LoRA:
    """The stage's LoRA (or another stage's), attached to `unet`."""
    return lora.load(stage.read_tensors(folder / f"{name}.safetensors"), unet).attach(unet)


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel, text: TextEncoders, prompts: list[str], numbers: torch.Generator, steps: int = 4
) -> Tensor:
    """Few-step samples [n, 4, h, w] of a UNet with its few-step LoRA: answer, noise again to the next step, answer.

    The time steps are those of the host's `lcm` sampler with the schedule `sgm_uniform`; no guidance.
    """
    text_of_all = base.condition(*text(tokenize(tokenizer(), prompts)))
    x = torch.randn(len(prompts), 4, LATENT_SIZE, LATENT_SIZE, generator=numbers)
    timesteps = [(TIMESTEPS - 1) * (steps - step) // steps for step in range(steps)]

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return base.predict(unet, x, t, text_of_all)

    def noise(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=numbers)

    return sample_lcm(predict, x, timesteps, base.alpha_bar(), noise)
