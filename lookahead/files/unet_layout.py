"""The layout of an SDXL-like UNet, and its two spellings: diffusers' configuration and the host's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class UNetLayout:
    """Sizes of a UNet; the defaults are SDXL's.

    channels: of each level, highest resolution first; depth: transformer blocks of each attention there, 0 where a
    level has none (the middle block has the last level's); context, pooled: widths of the text; head: width of an
    attention head; res_blocks: residual blocks a level of the encoder half, the decoder half has one more.
    """

    channels: tuple[int, ...] = (320, 640, 1280)
    depth: tuple[int, ...] = (0, 2, 10)
    context: int = 2048
    pooled: int = 1280
    head: int = 64
    res_blocks: int = 2

    @property
    def vector(self) -> int:
        """Width of what is added to the time embedding: six size numbers of 256 channels, and the pooled text."""
        return 6 * 256 + self.pooled

    def diffusers(self) -> dict[str, Any]:
        """Configuration of `UNet2DConditionModel`."""
        blocks = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in self.depth]
        return {
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": blocks,
            "up_block_types": [name.replace("Down", "Up") for name in reversed(blocks)],
            "block_out_channels": list(self.channels),
            "layers_per_block": self.res_blocks,
            "transformer_layers_per_block": [max(depth, 1) for depth in self.depth],
            "attention_head_dim": [width // self.head for width in self.channels],  # their name for the number of heads
            "cross_attention_dim": self.context,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": self.vector,
            "use_linear_projection": True,
        }

    def host(self) -> dict[str, Any]:
        """What the host's detection finds in a checkpoint."""
        return {
            "use_checkpoint": False,
            "image_size": 32,
            "out_channels": 4,
            "in_channels": 4,
            "use_spatial_transformer": True,
            "legacy": False,
            "num_classes": "sequential",
            "adm_in_channels": self.vector,
            "model_channels": self.channels[0],
            "num_res_blocks": [self.res_blocks] * len(self.channels),
            "channel_mult": [width // self.channels[0] for width in self.channels],
            "transformer_depth": [depth for depth in self.depth for _ in range(self.res_blocks)],
            "transformer_depth_output": [depth for depth in self.depth for _ in range(self.res_blocks + 1)],
            "transformer_depth_middle": self.depth[-1],
            "use_linear_in_transformer": True,
            "context_dim": self.context,
            "num_heads": -1,
            "num_head_channels": self.head,
            "use_temporal_attention": False,
        }


SDXL = UNetLayout()
