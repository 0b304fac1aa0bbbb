"""The memory that a concept costs, counted on torch's meta device, part by part: predicting it, tuning it, and training
the encoder. Weights need not be there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ...lookahead.method.concept import Concept, ConceptEncoder, ConceptSizes
from ...lookahead.method.concept_input import TEMPLATES
from ...sdxl import configs
from ...sdxl.concept import projections
from ...sdxl.concept_maker import ConceptTuner
from ...sdxl.load import Frozen, PromptEncoder
from ..ledger import Ledger, MixedPrecision
from ..precision import DTYPES
from .config import ConceptConfig

GB = 1e9
CONTEXT = 0.8e9  # bytes of driver, kernels, and what the allocator loses between blocks: not counted from shapes


@dataclass(frozen=True)
class ConceptShapes:
    """Configurations of the frozen models, as JSON. The defaults are those of SDXL and CLIP ViT-H/14."""

    unet: str = field(default_factory=lambda: json.dumps(configs.UNET))
    text: str = field(default_factory=lambda: json.dumps(configs.TEXT))
    text_2: str = field(default_factory=lambda: json.dumps(configs.TEXT_2))
    vision: str = field(default_factory=lambda: json.dumps(configs.VIT_H))
    vae: str = field(default_factory=lambda: json.dumps(configs.VAE))


def _bytes(module: nn.Module, dtype: torch.dtype) -> int:
    return sum(p.numel() for p in module.parameters()) * dtype.itemsize


def _models(shapes: ConceptShapes, dtype: torch.dtype) -> Frozen:
    with torch.device("meta"):
        unet = configs.unet(json.loads(shapes.unet))
        first = CLIPTextModel(CLIPTextConfig(**json.loads(shapes.text)))
        second = CLIPTextModelWithProjection(CLIPTextConfig(**json.loads(shapes.text_2)))
        vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**json.loads(shapes.vision)))
        vae = AutoencoderKL(**json.loads(shapes.vae))
    for module in (unet, first, second, vision):
        nn.Module.to(module, dtype)
    return Frozen(unet, PromptEncoder(configs.tokenizers(), first, second), vae, vision)


def _sizes(frozen: Frozen, rank: int, basis: int, hidden: int, offsets: bool = True) -> ConceptSizes:
    first, second = (model.config.hidden_size for model in (frozen.text.first, frozen.text.second))
    width = frozen.vision.config.hidden_size
    changed = projections(frozen.unet) if offsets else {}
    return ConceptSizes(changed, width, 0, hidden, first, second, rank, basis)


def _concept(sizes: ConceptSizes) -> Concept:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", requires_grad=True)

    offsets = {name: (empty(sizes.rank, i), empty(o, sizes.rank)) for name, (i, o) in sizes.projections.items()}
    return Concept(empty(sizes.word_l), empty(sizes.word_g), "mug", 1, offsets, 0.25)


@lru_cache(maxsize=4)
def _tuned_sample(
    shapes: ConceptShapes, size: int, rank: int, precision: str, checkpointing: str, blend: float
) -> tuple[int, int, int]:
    """Bytes that one sample of the tuning allocates with its gradients, bytes of the concept's gradients, and its
    numbers."""
    frozen = _models(shapes, DTYPES[precision])
    concept = _concept(_sizes(frozen, rank, 1, 8))
    leaves = [concept.word_l, concept.word_g, *(m for pair in concept.offsets.values() for m in pair)]
    tuner = ConceptTuner(frozen, checkpointing)
    x = torch.empty(1, 4, size // 8, size // 8, device="meta")
    before = [*frozen.unet.parameters(), *frozen.text.parameters(), x, *leaves]
    with Ledger(before) as ledger, MixedPrecision(None) as mixed:
        predict = tuner.predictor(TEMPLATES, blend, size)
        noise = predict(concept, x, torch.empty(1, dtype=torch.long, device="meta"), 0)
        mixed.backward(noise.float().square().mean())
    tuner.close()
    numbers = sum(leaf.numel() for leaf in leaves)
    return ledger.peak, 4 * numbers, numbers


def tuning_memory(
    size: int = 1024,
    rank: int = 4,
    precision: str = "bf16",
    checkpointing: str = "blocks",
    blend: float = 0.25,
    shapes: ConceptShapes | None = None,
) -> dict[str, float]:
    """GB that tuning a concept takes at most, by part. The picture is encoded before the tuning begins, and its
    autoencoder is not on the device meanwhile."""
    shapes, dtype = shapes or ConceptShapes(), DTYPES[precision]
    frozen = _models(shapes, dtype)
    peak, gradients, numbers = _tuned_sample(shapes, size, rank, precision, checkpointing, blend)
    parts = {
        "frozen UNet": _bytes(frozen.unet, dtype),
        "text encoders": _bytes(frozen.text, dtype),
        "the concept, 32 bit": 4 * numbers,
        "its gradients": gradients,
        "AdamW's state": 8 * numbers,
        "activations of one sample": max(0, peak - gradients),
        "the device itself": CONTEXT,
    }
    return {name: value / GB for name, value in parts.items()}


def prediction_memory(
    rank: int = 4, basis: int = 16, hidden: int = 1280, precision: str = "bf16", shapes: ConceptShapes | None = None
) -> dict[str, float]:
    """GB that predicting a concept takes at most, by part: one pass of the image encoder and of the concept encoder."""
    shapes, dtype = shapes or ConceptShapes(), DTYPES[precision]
    frozen = _models(shapes, dtype)
    with torch.device("meta"):
        encoder = ConceptEncoder(_sizes(frozen, rank, basis, hidden))
    side = frozen.vision.config.image_size
    pixels = torch.empty(1, 3, side, side, dtype=dtype, device="meta")
    features = torch.empty(1, encoder.sizes.image_width, device="meta")
    with torch.no_grad(), Ledger([*frozen.vision.parameters(), *encoder.parameters(), pixels]) as ledger:
        with MixedPrecision(None):
            frozen.vision(pixel_values=pixels, output_hidden_states=True)
            encoder(features)
    parts = {
        "image encoder": _bytes(frozen.vision, dtype),
        "concept encoder, 32 bit": _bytes(encoder, torch.float32),
        "word tables": _bytes(frozen.text.first.get_input_embeddings(), dtype)
        + _bytes(frozen.text.second.get_input_embeddings(), dtype),
        "activations": ledger.peak,
        "the device itself": CONTEXT,
    }
    return {name: value / GB for name, value in parts.items()}


def training_memory(config: ConceptConfig, processes: int = 1, shapes: ConceptShapes | None = None) -> dict[str, float]:
    """GB that a process of a training run takes at most, by part: a sample as in tuning, and the encoder with its
    gradients and AdamW's state."""
    shapes, dtype, model = shapes or ConceptShapes(), DTYPES[config.precision], config.model
    frozen = _models(shapes, dtype)
    with torch.device("meta"):
        encoder = ConceptEncoder(_sizes(frozen, model.rank, model.basis, model.hidden, model.offsets))
    rows = max(1, config.batch // (processes * config.accumulate))
    peak, _, _ = _tuned_sample(
        shapes, config.data.size, model.rank, config.precision, config.checkpointing, config.blend
    )
    weights = _bytes(encoder, torch.float32)
    parts = {
        "frozen UNet": _bytes(frozen.unet, dtype),
        "text encoders": _bytes(frozen.text, dtype),
        "concept encoder, 32 bit": weights,
        "its gradients": weights,
        "AdamW's state": (2 if config.optimiser.eight_bit else 8) * weights / 4,
        "their average (ema)": weights if config.ema else 0,
        f"activations, samples at a time: {rows}": rows * peak,
        "the device itself": CONTEXT,
    }
    return {name: value / GB for name, value in parts.items() if value}


def concept_savings(config: ConceptConfig, processes: int) -> Mapping[str, float]:
    """GB that each of some changes of a configuration saves, for those that save something."""
    whole, out = sum(training_memory(config, processes).values()), {}
    each = config.batch // processes
    changes: list[tuple[str, dict[str, Any]]] = [
        (f"accumulate={each}", {"accumulate": each}),
        ("checkpointing=all", {"checkpointing": "all"}),
        ("optimiser.eight_bit=true", {"optimiser": config.optimiser.model_copy(update={"eight_bit": True})}),
    ]
    for name, update in changes:
        saved = whole - sum(training_memory(config.model_copy(update=update), processes).values())
        if saved > 0.05:
            out[name] = saved
    return out
