"""Stage: the few-step LoRA, by latent consistency distillation (LCM-LoRA, arXiv 2311.05556) of the base.

The student maps a latent at any time step to the end of the base's guided path in one step. It is taught by itself:
one DDIM step of the guided base (a fiftieth of the way) leads from x_t to x_s, and the student's answer at t is pulled
to the answer of its running average at s. At t = 0 the answer is the latent itself, so the truth spreads from there
upwards. No guidance embedding: the strength of the guidance is built in, as in the public LCM-LoRA.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ...sdxl import lora
from ..plan import LATENT_SIZE, Plan
from ..world.data import Pictures
from . import base, stage
from .text import TextEncoders, tokenize, tokenizer

RANK, CONV_RANK = 12, 8
BATCH = 16
SKIP = base.STEPS // 50  # what one DDIM step of fifty covers
GUIDANCE = 3.0  # what the base is sampled with everywhere
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0  # the boundary scaling of the public LCMs
HUBER = 1e-3
TARGET_DECAY = 0.95
RATE = 1e-3


class Steps:
    """The arithmetic of noised latents [n, 4, h, w] at integer time steps [n], in float32."""

    def __init__(self, device: torch.device | str = "cpu"):
        alphas = base.scheduler().alphas_cumprod.to(device)
        self._signal, self._noise = alphas.sqrt(), (1 - alphas).sqrt()

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of signal and noise at t, [n, 1, 1, 1] each."""
        return self._signal[t].view(-1, 1, 1, 1), self._noise[t].view(-1, 1, 1, 1)

    def noised(self, latent: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        signal, rate = self.rates(t)
        return signal * latent + rate * noise

    def x0(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The clean latent that a prediction of the noise amounts to."""
        signal, rate = self.rates(t)
        return (x - rate * eps) / signal

    def preview(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The answer of a few-step model: x0, except that at t = 0 it is x itself (the boundary condition)."""
        s = (TIMESTEP_SCALING * t.float()).view(-1, 1, 1, 1)
        skip, out = SIGMA_DATA**2 / (s**2 + SIGMA_DATA**2), s / (s**2 + SIGMA_DATA**2).sqrt()
        return out * self.x0(x, t, eps) + skip * x


def predict(unet: UNet2DConditionModel, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    """The UNet's prediction of the noise, float32."""
    return unet(x, t, context, added_cond_kwargs=base.added(pooled.float())).sample.float()


def guided(
    unet: UNet2DConditionModel,
    x: Tensor,
    t: Tensor,
    positive: tuple[Tensor, Tensor],
    negative: tuple[Tensor, Tensor],
    guidance: float,
) -> Tensor:
    """Classifier-free guidance; positive and negative are (context, pooled), the negative of one row or n."""
    context, pooled = (torch.cat([n.expand_as(p), p]) for n, p in zip(negative, positive, strict=True))
    without, with_text = predict(unet, torch.cat([x, x]), torch.cat([t, t]), context, pooled).chunk(2)
    return without + guidance * (with_text - without)


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
    steps = Steps(device)
    with torch.no_grad():
        nothing = text(empty.to(device))

    def loss(step: int) -> Tensor:
        torch._foreach_lerp_(list(target.parameters()), [p.detach() for p in student.parameters()], 1 - TARGET_DECAY)
        numbers = stage.numbers_of_step(plan.seed + 10, step)
        index = torch.randint(len(pictures), (BATCH,), generator=numbers)
        described = torch.rand(BATCH, 1, 1, generator=numbers) < 0.5
        ids = torch.where(described, long[index], short[index]).to(device)
        t = torch.randint(1, base.STEPS, (BATCH,), generator=numbers).to(device)
        s = (t - SKIP).clamp(min=0)
        noise = torch.randn(latents[index].shape, generator=numbers).to(device)
        x = steps.noised(latents[index].float().to(device), t, noise)
        with torch.autocast(device.type, torch.bfloat16):
            with torch.no_grad():
                condition = text(ids)
                eps = guided(unet, x, t, condition, nothing, GUIDANCE)
                x_s = steps.noised(steps.x0(x, t, eps), s, eps)  # one DDIM step
                with target.at(1.0):
                    wanted = steps.preview(x_s, s, predict(unet, x_s, s, *condition))
            with student.at(1.0):
                answer = steps.preview(x, t, predict(unet, x, t, *condition))
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
    arithmetic = Steps()
    context, pooled = text(tokenize(tokenizer(), prompts))
    x = torch.randn(len(prompts), 4, LATENT_SIZE, LATENT_SIZE, generator=numbers)
    for step in range(steps):
        t = torch.full((len(prompts),), (base.STEPS - 1) * (steps - step) // steps)
        if step:
            x = arithmetic.noised(x, t, torch.randn(x.shape, generator=numbers))
        x = arithmetic.preview(x, t, predict(unet, x, t, context, pooled))
    return x
