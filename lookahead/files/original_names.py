"""Names of a UNet's weights in the original release of SDXL (ldm), which the host and many LoRA files have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}

# A trailing ".conv." is a sampler's: residual blocks have conv1 and conv2.
_BLOCK = re.compile(r"^(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(?:\.conv(?=\.))?")


def ldm_unet(state: Mapping[str, T]) -> dict[str, T]:
    """diffusers' UNet names (two residual blocks a level) -> ldm's, without prefix; of weights, all of them."""
    with_attention = {int(m[1]) for k in state if (m := re.match(r"up_blocks\.(\d+)\.attentions", k))}

    def block(match: re.Match[str]) -> str:
        side, level, kind, index = match[1], int(match[2]), match[3], int(match[4])
        if side == "down":
            if kind == "downsamplers":
                return f"input_blocks.{3 * (level + 1)}.0.op"
            return f"input_blocks.{3 * level + index + 1}.{0 if kind == 'resnets' else 1}"
        if kind == "upsamplers":
            return f"output_blocks.{3 * level + 2}.{2 if level in with_attention else 1}.conv"
        return f"output_blocks.{3 * level + index}.{0 if kind == 'resnets' else 1}"

    out = {}
    for name, tensor in state.items():
        new = _BLOCK.sub(block, name)
        for old, fresh in _OUTER.items():
            if new.startswith(old + "."):
                new = fresh + new[len(old) :]
        if ".resnets." in name:
            head, layer, leaf = new.rsplit(".", 2)
            new = f"{head}.{_RESNET[layer]}.{leaf}"
        out[new] = tensor
    return out
