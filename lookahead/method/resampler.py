"""The image prompt's network: the Resampler of IP-Adapter Plus (Ye et al. 2023, arXiv 2308.06721).

It turns the patch features of a CLIP image encoder (its last but one layer) into a few tokens that the cross-attentions
of the UNet read beside the text. Parameter names are those of the public files, so their weights load as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from .module_list import ModuleListOf

HEAD_DIM = 64  # fixed in all public Resamplers; it leaves no trace in the shapes


@dataclass(frozen=True)
class ResamplerSizes:
    """Sizes of a Resampler; the defaults are those of IP-Adapter Plus (Face) for SDXL.

    tokens: number of output tokens; dim: inner width; depth: layers; heads: attention heads of width 64;
    image_width: channels of the image encoder's features; context_width: channels of the UNet's text context;
    ff_width: hidden width of the feed-forward.
    """

    tokens: int = 16
    dim: int = 1280
    depth: int = 4
    heads: int = 20
    image_width: int = 1280
    context_width: int = 2048
    ff_width: int = 5120

    @classmethod
    def from_state_dict(cls, weights: Mapping[str, Tensor]) -> ResamplerSizes:
        """Infer the sizes from the shapes. Raises KeyError or ValueError where the names are not a Resampler's."""
        _, tokens, dim = weights["latents"].shape
        depth = 0
        while f"layers.{depth}.0.to_q.weight" in weights:
            depth += 1
        inner = weights["layers.0.0.to_q.weight"].shape[0]
        if inner % HEAD_DIM:
            raise ValueError(f"attention width {inner} is not a multiple of {HEAD_DIM}")
        return cls(
            tokens=tokens,
            dim=dim,
            depth=depth,
            heads=inner // HEAD_DIM,
            image_width=weights["proj_in.weight"].shape[1],
            context_width=weights["proj_out.weight"].shape[0],
            ff_width=weights["layers.0.1.1.weight"].shape[0],
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter that a Resampler of these sizes has."""
        with torch.device("meta"):
            return {name: tuple(value.shape) for name, value in Resampler(self).state_dict().items()}


class PerceiverAttention(nn.Module):
    """Queries from the latents; keys and values from image features and latents together."""

    def __init__(self, dim: int, heads: int, operations: ModuleType = nn):
        super().__init__()
        self.heads = heads
        inner = heads * HEAD_DIM
        self.norm1 = operations.LayerNorm(dim)
        self.norm2 = operations.LayerNorm(dim)
        self.to_q = operations.Linear(dim, inner, bias=False)
        self.to_kv = operations.Linear(dim, inner * 2, bias=False)
        self.to_out = operations.Linear(inner, dim, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        """features [batch, patches, dim], latents [batch, tokens, dim] -> [batch, tokens, dim]."""
        features, latents = self.norm1(features), self.norm2(latents)
        key, value = self.to_kv(torch.cat([features, latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, HEAD_DIM)).transpose(1, 2) for t in (self.to_q(latents), key, value))
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


def feed_forward(dim: int, hidden: int, operations: ModuleType = nn) -> nn.Sequential:
    """LayerNorm and a two-layer perceptron without biases (parameters 0, 1 and 3)."""
    return nn.Sequential(
        operations.LayerNorm(dim),
        operations.Linear(dim, hidden, bias=False),
        nn.GELU(),
        operations.Linear(hidden, dim, bias=False),
    )


class Resampler(nn.Module):
    """Image features [batch, patches, image_width] -> image-prompt tokens [batch, tokens, context_width].

    `operations` supplies the Linear and LayerNorm classes, so that a host can bring its own casting and offloading.
    """

    def __init__(self, sizes: ResamplerSizes, operations: ModuleType = nn):
        super().__init__()
        self.sizes = sizes
        self.latents = nn.Parameter(torch.randn(1, sizes.tokens, sizes.dim) / sizes.dim**0.5)
        self.proj_in = operations.Linear(sizes.image_width, sizes.dim)
        self.proj_out = operations.Linear(sizes.dim, sizes.context_width)
        self.norm_out = operations.LayerNorm(sizes.context_width)
        self.layers = ModuleListOf(
            ModuleListOf(
                [
                    PerceiverAttention(sizes.dim, sizes.heads, operations),
                    feed_forward(sizes.dim, sizes.ff_width, operations),
                ]
            )
            for _ in range(sizes.depth)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Equations of the Perceiver resampler: residual attention and feed-forward over learned latents."""
        features = self.proj_in(features)
        latents = self.latents.to(features).expand(features.shape[0], -1, -1)
        for attention, mlp in self.layers:
            latents = attention(features, latents) + latents
            latents = mlp(latents) + latents
        return self.norm_out(self.proj_out(latents))
