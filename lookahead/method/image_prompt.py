"""The image prompt's networks: IP-Adapter Plus (Ye et al. 2023, arXiv 2308.06721).

A Resampler turns image features into tokens, and each cross-attention of the UNet has projections of its own from these
tokens to keys and values. Parameter names are those of the public files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from .resampler import Resampler, ResamplerSizes


class Projections(nn.Module):
    """Keys and values of the image prompt for one cross-attention: tokens [B, T, context] -> two of [B, T, width]."""

    def __init__(self, context: int, width: int, operations: ModuleType = nn):
        super().__init__()
        self.to_k_ip = operations.Linear(context, width, bias=False)
        self.to_v_ip = operations.Linear(context, width, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_k_ip(tokens), self.to_v_ip(tokens)


class ImagePromptNetwork(nn.Module):
    """Resampler, and projections for every cross-attention, in the order of the public files (`block_names`).

    widths: channels of each cross-attention; operations: supplies the layers, so that a host can bring its own casting
    and offloading.
    """

    def __init__(self, sizes: ResamplerSizes, widths: Sequence[int], operations: ModuleType = nn):
        super().__init__()
        self.image_proj = Resampler(sizes, operations)
        self.ip_adapter = nn.ModuleList(Projections(sizes.context_width, width, operations) for width in widths)

    @classmethod
    def from_weights(
        cls,
        sizes: ResamplerSizes,
        image_proj: Mapping[str, Tensor],
        ip_adapter: Sequence[tuple[Tensor, Tensor]],
        operations: ModuleType = nn,
    ) -> ImagePromptNetwork:
        """That of an encoder file, by its fields of these names, frozen, in the file's precision. The tensors are
        taken, not copied."""
        with torch.device("meta"):  # the file's tensors take these places: nothing is allocated or initialised twice
            network = cls(sizes, [to_k.shape[0] for to_k, _ in ip_adapter], operations)
        network.assign(image_proj, ip_adapter)
        return network.requires_grad_(False).eval()

    def assign(self, image_proj: Mapping[str, Tensor], ip_adapter: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Put an encoder file's tensors in the place of the parameters."""
        self.image_proj.load_state_dict(image_proj, assign=True)
        for projections, (to_k, to_v) in zip(self.ip_adapter, ip_adapter, strict=True):
            projections.load_state_dict({"to_k_ip.weight": to_k, "to_v_ip.weight": to_v}, assign=True)

    @property
    def projection_weights(self) -> list[tuple[Tensor, Tensor]]:
        """to_k and to_v [width, context] of every cross-attention, as encoder files are written with."""
        return [(p.to_k_ip.weight, p.to_v_ip.weight) for p in self.ip_adapter]

    def keys_values(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Tokens [rows, T, context] -> keys and values [rows, T, width] of every cross-attention."""
        return [projections(tokens) for projections in self.ip_adapter]
