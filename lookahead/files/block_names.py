"""Where the cross-attentions of an SDXL-like UNet sit: diffusers' names, the host's keys, the order of public files.

IP-Adapter files number the attentions of diffusers' `attn_processors`: down, then up, then the middle block, each
transformer block giving an even number to its self- and an odd one to its cross-attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .unet_layout import SDXL

RES_BLOCKS = SDXL.res_blocks


@dataclass(frozen=True)
class BlockName:
    """One transformer block. host: ("input" | "middle" | "output", id, index); diffusers: its module path."""

    host: tuple[str, int, int]
    diffusers: str


def block_names(
    depth: Sequence[int] = SDXL.depth, middle_depth: int = SDXL.depth[-1], res_blocks: int = RES_BLOCKS
) -> list[BlockName]:
    """All transformer blocks of a UNet in the order of the public files.

    depth: transformer depth of each level, highest resolution first (0 where a level has none); 70 names for SDXL.
    """
    names = []
    levels = len(depth)
    for level in range(levels):
        for i in range(res_blocks):
            block = 1 + level * (res_blocks + 1) + i  # 0 is the first convolution, the last of each level downsamples
            for t in range(depth[level]):
                path = f"down_blocks.{level}.attentions.{i}.transformer_blocks.{t}"
                names.append(BlockName(("input", block, t), path))
    for up, level in enumerate(reversed(range(levels))):
        for i in range(res_blocks + 1):
            block = up * (res_blocks + 1) + i
            for t in range(depth[level]):
                path = f"up_blocks.{up}.attentions.{i}.transformer_blocks.{t}"
                names.append(BlockName(("output", block, t), path))
    for t in range(middle_depth):
        # The host counts the whole middle as block 0: ("middle", 1, t) is never called.
        names.append(BlockName(("middle", 0, t), f"mid_block.attentions.0.transformer_blocks.{t}"))
    return names


def diffusers_path(key: tuple[str, int, int], res_blocks: int = RES_BLOCKS) -> str:
    """diffusers' module path of the transformer block that the host calls `key`; the inverse of `block_names`."""
    group, block, index = key
    if group == "middle":
        return f"mid_block.attentions.0.transformer_blocks.{index}"
    if group == "input":
        level, i = divmod(block - 1, res_blocks + 1)
        return f"down_blocks.{level}.attentions.{i}.transformer_blocks.{index}"
    level, i = divmod(block, res_blocks + 1)
    return f"up_blocks.{level}.attentions.{i}.transformer_blocks.{index}"


def level_of(key: tuple[str, int, int], levels: int = len(SDXL.depth), res_blocks: int = RES_BLOCKS) -> int:
    """How often the latent is halved where the block works: 0 at its own size, 2 in the deepest level of SDXL."""
    group, block, _ = key
    if group == "middle":
        return levels - 1
    return (block - 1) // (res_blocks + 1) if group == "input" else levels - 1 - block // (res_blocks + 1)


def ip_adapter_key(ordinal: int, which: str) -> str:
    """Name of a weight in the public files: ordinal counts the cross-attentions from 0, which is "k" or "v"."""
    return f"ip_adapter.{2 * ordinal + 1}.to_{which}_ip.weight"
