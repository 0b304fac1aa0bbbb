"""IP-Adapter FaceID Plus v2: image-prompt tokens from who it is (a face embedding) and how it looks (CLIP features).

Of the authors' public files for SDXL; the paper is IP-Adapter's (arXiv 2308.06721). Parameter names are those of the
files, so their weights load as they are. Beside it a LoRA on every attention of the UNet was trained, which is kept
apart from the weights (`AttentionLoRA`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from .image_prompt import Projections
from .kv_encoder import LowRank
from .module_list import ModuleListOf
from .resampler import HEAD_DIM, PerceiverAttention, feed_forward


@dataclass(frozen=True)
class FaceIDSizes:
    """Sizes of the projection; the defaults are those of FaceID Plus v2 for SDXL.

    tokens: number of output tokens; context_width: channels of the UNet's text context; face_width: of the recogniser's
    embedding; hidden: width between; image_width: channels of the image encoder's features; depth, heads, ff_width: of
    the layers that look at these.
    """

    tokens: int = 4
    context_width: int = 2048
    face_width: int = 512
    hidden: int = 1024
    image_width: int = 1280
    depth: int = 4
    heads: int = 32
    ff_width: int = 8192

    @classmethod
    def from_state_dict(cls, weights: Mapping[str, Tensor]) -> FaceIDSizes:
        """Infer the sizes from the shapes. Raises KeyError or ValueError where the names are not those of the files."""
        context = weights["norm.weight"].shape[0]
        hidden, face = weights["proj.0.weight"].shape
        out = weights["proj.2.weight"].shape[0]
        inner = weights["perceiver_resampler.layers.0.0.to_q.weight"].shape[0]
        if not context or out % context or inner % HEAD_DIM:
            raise ValueError(f"{out} outputs do not make tokens of width {context}, or {inner} no heads of {HEAD_DIM}")
        depth = 0
        while f"perceiver_resampler.layers.{depth}.0.to_q.weight" in weights:
            depth += 1
        return cls(
            tokens=out // context,
            context_width=context,
            face_width=face,
            hidden=hidden,
            image_width=weights["perceiver_resampler.proj_in.weight"].shape[1],
            depth=depth,
            heads=inner // HEAD_DIM,
            ff_width=weights["perceiver_resampler.layers.0.1.1.weight"].shape[0],
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter that a projection of these sizes has."""
        with torch.device("meta"):
            return {name: tuple(value.shape) for name, value in FaceIDProjection(self).state_dict().items()}


class FacePerceiver(nn.Module):
    """Lets tokens [n, T, context] look at image features [n, patches, image_width]: -> [n, T, context]."""

    def __init__(self, sizes: FaceIDSizes, operations: ModuleType = nn):
        super().__init__()
        width = sizes.context_width
        self.proj_in = operations.Linear(sizes.image_width, width)
        self.proj_out = operations.Linear(width, width)
        self.norm_out = operations.LayerNorm(width)
        self.layers = ModuleListOf(
            ModuleListOf(
                [PerceiverAttention(width, sizes.heads, operations), feed_forward(width, sizes.ff_width, operations)]
            )
            for _ in range(sizes.depth)
        )

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        features = self.proj_in(features)
        for attention, mlp in self.layers:
            tokens = attention(features, tokens) + tokens
            tokens = mlp(tokens) + tokens
        return self.norm_out(self.proj_out(tokens))


class FaceIDProjection(nn.Module):
    """Face embeddings and image features -> image-prompt tokens [n, T, context], as the second version adds them up."""

    def __init__(self, sizes: FaceIDSizes, operations: ModuleType = nn):
        super().__init__()
        self.sizes = sizes
        self.proj = nn.Sequential(
            operations.Linear(sizes.face_width, sizes.hidden),
            nn.GELU(),
            operations.Linear(sizes.hidden, sizes.tokens * sizes.context_width),
        )
        self.norm = operations.LayerNorm(sizes.context_width)
        self.perceiver_resampler = FacePerceiver(sizes, operations)

    def forward(self, faces: Tensor, features: Tensor) -> Tensor:
        """faces: unit vectors of the recogniser, [n, face_width], or zeros for nobody; features: of the image encoder's
        last but one layer, [n, patches, image_width], of the aligned face."""
        tokens = self.norm(self.proj(faces).unflatten(-1, (self.sizes.tokens, self.sizes.context_width)))
        return tokens + self.perceiver_resampler(tokens, features)


class FaceIDNetwork(nn.Module):
    """The projection, and keys and values for every cross-attention in the public files' order (`block_names`)."""

    def __init__(self, sizes: FaceIDSizes, widths: Sequence[int], operations: ModuleType = nn):
        super().__init__()
        self.image_proj = FaceIDProjection(sizes, operations)
        self.ip_adapter = ModuleListOf(Projections(sizes.context_width, width, operations) for width in widths)

    @classmethod
    def from_weights(
        cls,
        sizes: FaceIDSizes,
        image_proj: Mapping[str, Tensor],
        ip_adapter: Sequence[tuple[Tensor, Tensor]],
        operations: ModuleType = nn,
    ) -> FaceIDNetwork:
        """Builds a file's network, frozen, in the file's precision. The tensors are taken, not copied."""
        with torch.device("meta"):
            network = cls(sizes, [to_k.shape[0] for to_k, _ in ip_adapter], operations)
        network.image_proj.load_state_dict(image_proj, assign=True)
        for projections, (to_k, to_v) in zip(network.ip_adapter, ip_adapter, strict=True):
            projections.load_state_dict({"to_k_ip.weight": to_k, "to_v_ip.weight": to_v}, assign=True)
        return network.requires_grad_(False).eval()

    def keys_values(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Tokens [rows, T, context] -> keys and values [rows, T, width] of every cross-attention."""
        return [projections(tokens) for projections in self.ip_adapter]


class AttentionLoRA(nn.Module):
    """Low-rank changes of the projections of attentions, beside weights that stay as they are: W x + B A x.

    A layer is named by the number of its transformer block in the public files' order, attention and projection:
    "12.attn1.to_q".
    """

    def __init__(self, layers: Iterable[str]):
        super().__init__()
        self._numbers = {layer: number for number, layer in enumerate(layers)}  # names of modules hold no dots
        self.changes: ModuleListOf[LowRank] = ModuleListOf([])

    @classmethod
    def from_weights(cls, weights: Mapping[str, tuple[Tensor, Tensor]], operations: ModuleType = nn) -> AttentionLoRA:
        """Builds a file's LoRA, frozen, in the file's precision: A [rank, in] and B [out, rank] by layer."""
        lora = cls(weights)
        for a, b in weights.values():
            with torch.device("meta"):
                change = LowRank(a.shape[1], b.shape[0], a.shape[0], operations=operations)
            change.load_state_dict({"lora_A.weight": a, "lora_B.weight": b}, assign=True)
            lora.changes.append(change)
        return lora.requires_grad_(False).eval()

    def add(self, layer: str, projected: Tensor, x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        """Adds the change of one layer to what the base's own makes of x, [..., in] -> [..., out]; none where it has
        none."""
        number = self._numbers.get(layer)
        return projected if number is None else projected + weight * self.changes[number](x)

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Maps each layer to the widths of its change, in and out."""
        changes = {layer: self.changes[number] for layer, number in self._numbers.items()}
        return {k: (c.lora_A.weight.shape[1], c.lora_B.weight.shape[0]) for k, c in changes.items()}
