"""Stage: a ControlNet for the mini base that follows edges (edges.py), in the cldm layout that the host's loader reads.

The base stays as it is; a copy of its encoder half learns to add to its skip connections, through convolutions that
begin at zero. The copy leaves the transformers out, as the small public ControlNets for SDXL do: where edges are, the
text need not say, and the file is half as large.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor

from ...sdxl.shared_unet import Condition
from ..files.checkpoint import cldm_controlnet
from ..plan import Plan
from ..world.data import Pictures
from ..world.edges import edges
from . import base, stage
from .text import tokenize, tokenizer

BATCH = 16
THRESHOLDS = (0.3, 1.0)  # of strong edges, drawn anew every step: users choose theirs


def build() -> ControlNetModel:
    same = ("block_out_channels", "layers_per_block", "addition_embed_type", "addition_time_embed_dim")
    same += ("projection_class_embeddings_input_dim", "attention_head_dim")  # there is no attention; diffusers asks
    layout = base.LAYOUT.diffusers()
    return ControlNetModel(
        down_block_types=("DownBlock2D",) * len(base.LAYOUT.channels),
        mid_block_type="UNetMidBlock2D",
        conditioning_embedding_out_channels=(16, 32, 96, 256),  # the host knows no other
        **{name: layout[name] for name in same},
    )


def start_from(net: ControlNetModel, unet: UNet2DConditionModel) -> None:
    """Copy what both have from the base: all but the hint's convolutions and those that begin at zero."""
    own = net.state_dict()
    net.load_state_dict(own | {k: v for k, v in unet.state_dict().items() if k in own})


def predict(
    unet: UNet2DConditionModel,
    net: ControlNetModel | None,
    x: Tensor,
    t: Tensor,
    text: Condition,
    hint: Tensor,
    strength: float = 1.0,
) -> Tensor:
    """The base's noise prediction [n, 4, h, w] under edges `hint` [n, 3, 8h, 8w]; without them if `net` is None."""
    extra = {}
    if net is not None:
        options = {"conditioning_scale": strength, "added_cond_kwargs": text.added, "return_dict": False}
        down, middle = net(x, t, text.context, hint, **options)
        extra = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    return unet(x, t, text.context, added_cond_kwargs=text.added, **extra).sample


def train(folder: Path, pictures: Pictures, latents: Tensor, plan: Plan) -> None:
    out = folder / "controlnet.safetensors"
    if out.exists():
        return
    torch.manual_seed(plan.seed + 21)
    device = stage.device()
    unet, text = (m.to(device) for m in base.load(folder))
    net = build().to(device)
    start_from(net, unet)
    tokens = tokenizer()
    long, short, empty = (tokenize(tokens, t) for t in (pictures.long, pictures.short, [""]))
    noised = base.Noising(device)

    def loss(step: int) -> Tensor:
        numbers = stage.numbers_of_step(plan.seed + 21, step)
        index = torch.randint(len(pictures), (BATCH,), generator=numbers)
        described = torch.rand(BATCH, 1, 1, generator=numbers) < 0.5
        ids, keep = base.drop_text(torch.where(described, long[index], short[index]), empty, numbers)
        t, noise, x = noised(latents[index].float().to(device), numbers)
        high = THRESHOLDS[0] + (THRESHOLDS[1] - THRESHOLDS[0]) * torch.rand(1, generator=numbers).item()
        hint = edges(pictures.images(index, device), high / 2, high)
        keep = keep.to(device)
        with torch.no_grad(), stage.autocast(device):
            context, pooled = text(ids.to(device))
        with stage.autocast(device):
            condition = base.condition(context * keep, pooled.float() * keep[:, 0])
            predicted = predict(unet, net, x, t, condition, hint)
        return noised.loss(predicted, noise, t)  # weighted to the steps in which a picture takes shape, as edges do

    stage.train("controlnet", folder, {"net": net}, loss, steps=plan.controlnet_steps, rate=1e-3, ema=0.995)
    stage.write_tensors(out, cldm_controlnet(net.state_dict()))
    stage.finish("controlnet", folder)


def load(tensors: Mapping[str, Tensor]) -> ControlNetModel:
    """A ControlNet from the tensors of a file in the cldm layout."""
    net = build()
    names = cldm_controlnet({k: k for k in net.state_dict()})
    net.load_state_dict({old: tensors[new].float() for new, old in names.items()})
    return net.eval().requires_grad_(False)
