"""The memory that training a noise guide takes and the work of its step, counted on torch's meta device. Weights need
not be there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from ...lookahead.losses.identity import FaceReferences, IdentityLoss
from ...lookahead.method.noise_guide import NoiseGuide, NoiseGuideSizes
from ...sdxl import configs, lora
from ...sdxl.load import Preview
from ...sdxl.shared_unet import Condition
from ..ledger import Ledger, MixedPrecision
from ..lookahead.estimate import CONTEXT, GB, READERS, RECOGNISER, Shapes
from ..lookahead.step import Batch
from ..precision import DTYPES
from .config import NoiseGuideConfig
from .step import GuideDraws, GuideStep

EMBEDDING = 512  # numbers of a face embedding, as ArcFace's networks have them


@dataclass(frozen=True, eq=False)
class _MetaIdentity(IdentityLoss):
    """In the place of the recogniser, whose share is known (`lookahead.estimate.RECOGNISER`)."""

    def __call__(self, preview: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return preview.abs().mean((1, 2, 3)), torch.empty(len(preview), dtype=torch.bool, device=preview.device)

    def shown(self, preview: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.empty_like(preview), torch.empty_like(preview[:, :1])


class _Sample(NamedTuple):
    """peak: bytes that the loss of one sample allocates, with the guide's gradients; work: FLOP; else parameters."""

    unet: int
    shortcut: int
    preview: int
    guide: int
    peak: int
    work: float


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@lru_cache(maxsize=8)
def _one_sample(shapes: Shapes, config_json: str) -> _Sample:
    config = NoiseGuideConfig.from_values(json.loads(config_json))
    low, unet = DTYPES[config.precision], configs.unet(json.loads(shapes.unet))
    side = (shapes.size or config.data.size) // 8

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with torch.device("meta"):
        guide = NoiseGuide(NoiseGuideSizes(EMBEDDING, config.model.width, config.model.hidden))
        shortcut = lora.build(unet, shapes.lora_rank).requires_grad_(False)
        preview = Preview(AutoencoderTiny().requires_grad_(False))
        for module in (unet, shortcut):
            if low != torch.float32:
                nn.Module.to(module, low)  # (diffusers' own warns of what does not matter here)
        step = GuideStep(config, unet, guide, shortcut, preview)
        step.alpha_bar = step.alpha_bar.to("meta")
    settings = unet.config
    pooled = settings.projection_class_embeddings_input_dim - 6 * settings.addition_time_embed_dim
    text = Condition(empty(1, 77, settings.cross_attention_dim), empty(1, pooled), empty(1, 6))
    people = FaceReferences(empty(1, EMBEDDING), empty(1, 5, 2), empty(1, 2))
    latent = empty(1, 4, side, side)
    loss = _MetaIdentity(None, None, people)  # type: ignore[arg-type]  # neither is asked
    batch = Batch(["?"], latent, latent, text, text, empty(1, 1, 1), loss)
    draws = GuideDraws(empty(1, 4, side, side), empty(1, dtype=torch.long), empty(1))
    with Ledger([*step.parameters(), *step.buffers(), latent, draws.noise]) as ledger, MixedPrecision(low) as mixed:
        mixed.backward(step("guide", batch, draws).loss)
    return _Sample(_count(unet), _count(shortcut), _count(preview), _count(guide), ledger.peak, ledger.work)


def _sample(config: NoiseGuideConfig, shapes: Shapes) -> _Sample:
    """The same for configurations that differ in what costs nothing."""
    values: dict[str, Any] = {
        "model": {"base": "?", "shortcut": "?", "vae": "?", "recogniser": "?"}
        | {name: getattr(config.model, name) for name in ("width", "hidden")},
        "data": {"source": "?", "size": config.data.size},
        "opening": {name: getattr(config.opening, name) for name in ("steps", "guidance")},
        "precision": config.precision,
        "checkpointing": config.checkpointing,
    }
    return _one_sample(replace(shapes, images=None), json.dumps(values))


def guide_memory(config: NoiseGuideConfig, processes: int = 1, shapes: Shapes | None = None) -> dict[str, float]:
    """GB that a process of a training run takes at most, by part."""
    shapes = shapes or Shapes()
    one, bits = _sample(config, shapes), DTYPES[config.precision].itemsize
    rows = max(1, config.batch // (processes * config.accumulate))
    weights = 4 * one.guide
    parts = {
        "frozen UNet": bits * one.unet,
        "few-step LoRA": bits * one.shortcut,
        "preview decoder and recogniser": 4 * one.preview + RECOGNISER[0],
        "noise guide, 32 bit": weights,
        "its gradients": weights,
        "AdamW's state": (2 if config.optimiser.eight_bit else 8) * one.guide,
        "its average (ema)": weights if config.ema else 0,
        "readers of pictures and texts (data.keep)": 0 if shapes.size or config.data.keep else READERS,
        f"activations, samples at a time: {rows}": rows * max(0, one.peak - weights),
        "the device itself": CONTEXT,
    }
    return {name: value / GB for name, value in parts.items() if value}


def guide_work(config: NoiseGuideConfig, processes: int = 1, shapes: Shapes | None = None) -> float:
    """FLOP of a step of a process."""
    return config.batch // processes * (_sample(config, shapes or Shapes()).work + RECOGNISER[1])


def guide_savings(config: NoiseGuideConfig, processes: int = 1, shapes: Shapes | None = None) -> Mapping[str, float]:
    """GB that each of some changes of a configuration saves, for those that save something."""
    whole, out = sum(guide_memory(config, processes, shapes).values()), {}
    changes: list[tuple[str, dict[str, Any]]] = [
        (f"accumulate={config.batch // processes}", {"accumulate": config.batch // processes}),
        ("checkpointing=blocks", {"checkpointing": "blocks"}),
        ("checkpointing=all", {"checkpointing": "all"}),
    ]
    for name, update in changes:
        saved = whole - sum(guide_memory(config.model_copy(update=update), processes, shapes).values())
        if saved > 0.05:
            out[name] = saved
    return out


def shapes_of(step: GuideStep, about: Mapping[str, str]) -> Shapes:
    """The sizes of a step's frozen models."""
    unet = json.dumps({k: v for k, v in step.unet.config.items() if not k.startswith("_")})
    rank = len(step.shortcut.branches[0].lora_down.weight)
    return Shapes(unet, lora_rank=rank, size=int(about["size"]) if "size" in about else None)
