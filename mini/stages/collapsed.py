"""Stage: a second few-step LoRA whose diversity has collapsed, as SDXL-Turbo's has, by score distillation.

The data engine wants this flaw: from one description of a person, every seed draws nearly the same person. One step
turns noise into a picture; no picture of the data is seen. The generator follows the difference of two scores, that
of the guided base and that of its own pictures, which a second LoRA keeps learning (distribution matching
distillation, arXiv 2311.18828, without its regression loss). That minimises the reverse KL divergence to the guided
distribution: it pays to sit on the mode, and nothing asks to cover the rest.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ...lookahead.method.schedule import TIMESTEPS, add_noise, pred_original_sample, preview_latent
from ...sdxl import lora
from ..plan import LATENT_SIZE, Plan
from ..world.data import Pictures
from . import base, lcm, stage
from .text import tokenize, tokenizer

BATCH = 16
GUIDANCE = 6.0  # of the base's score: higher is narrower
FIRST = TIMESTEPS - 1  # the time step that noise is taken for
LOW, HIGH = 20, 980  # time steps at which the two scores are compared
RATE = 3e-4


def train(folder: Path, pictures: Pictures, plan: Plan) -> None:
    out = folder / "collapsed.safetensors"
    if out.exists():
        return
    torch.manual_seed(plan.seed + 11)
    device = stage.device()
    unet, text = (m.to(device) for m in base.load(folder))
    generator = lcm.load(folder, unet).to(device).train().requires_grad_(True)  # starts from the distilled LoRA
    own = lora.build(unet, lcm.RANK, conv_rank=lcm.CONV_RANK).to(device).attach(unet)  # knows the generator's pictures
    generator.scale = own.scale = 0.0
    tokens = tokenizer()
    long, empty = tokenize(tokens, pictures.long), tokenize(tokens, [""])
    alpha_bar = base.alpha_bar(device)
    predict = partial(base.predict, unet)
    with torch.no_grad():
        nothing = base.condition(*text(empty.to(device)))

    def loss(step: int) -> Tensor:
        numbers = stage.numbers_of_step(plan.seed + 11, step)
        index = torch.randint(len(pictures), (BATCH,), generator=numbers)
        z, noise = torch.randn(2, BATCH, 4, LATENT_SIZE, LATENT_SIZE, generator=numbers).to(device)
        t = torch.randint(LOW, HIGH + 1, (BATCH,), generator=numbers).to(device)
        first = torch.full_like(t, FIRST)
        with stage.autocast(device):
            with torch.no_grad():
                condition = base.condition(*text(long[index].to(device)))
            with generator.at(1.0):
                picture = preview_latent(z, predict(z, first, condition), first, alpha_bar[first])
            x = add_noise(picture.detach(), noise, alpha_bar[t])
            with torch.no_grad():
                guided = base.classifier_free(predict, condition, nothing, GUIDANCE)
                wanted = pred_original_sample(x, guided(x, t), alpha_bar[t])
            with own.at(1.0):
                eps = predict(x, t, condition)
        learn_own = F.mse_loss(eps, noise)
        with torch.no_grad():
            size = (picture - wanted).abs().mean((1, 2, 3), keepdim=True)
            direction = (pred_original_sample(x, eps, alpha_bar[t]) - wanted) / size
        # The gradient of this with respect to the picture is the direction; each LoRA gets its own term's gradient.
        follow = 0.5 * F.mse_loss(picture, picture.detach() - direction)
        return follow + learn_own

    models = {"generator": generator, "own": own}
    stage.train("collapsed", folder, models, loss, steps=plan.collapsed_steps, rate=RATE, decay=0.0, ema=0.98, clip=2.0)
    stage.write_tensors(out, lora.public_tensors(generator))
    stage.finish("collapsed", folder)
