"""Our socket types and what travels through them. Socket names are frozen: they stand in people's workflow files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io
from torch import Tensor

from ..lookahead.losses.base import Loss
from .reference.encoder import Encoder
from .reference.kv_cache import KVCache

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

    from .guidance.guidance_report import Run

ENCODER = io.Custom("LOOKAHEAD_ENCODER")
REFERENCE = io.Custom("LOOKAHEAD_REFERENCE")
FACE_ANALYSIS = io.Custom("LOOKAHEAD_FACE_ANALYSIS")  # carries `lookahead.face_models.FaceModels`
SHORTCUT = io.Custom("LOOKAHEAD_SHORTCUT")
LOSS = io.Custom("LOOKAHEAD_LOSS")
GUIDANCE_REPORT = io.Custom("LOOKAHEAD_GUIDANCE_REPORT")


@dataclass(frozen=True, eq=False)
class Subject:
    """One person (or thing), known from one or several pictures, and all that is derived from these.

    encoder: what read the pictures, or None (KV injection without training needs none).
    pixels: [pictures, size, size, 3] in [0, 1], shorter side resized and centre-cropped.
    mask: [pictures, size, size] in [0, 1], the part of each picture that counts, or None for all of it.
    keys_values, null_keys_values: the image prompt behind the projections of every cross-attention, packed as
        `Encoder.keys_values` says, [rows, tokens, channels] and [1, tokens, channels] on the intermediate device.
        One row holds for every picture of a batch; several rows go one to each picture, in turn. None without encoder.
    latents: [pictures, 4, size / 8, size / 8] as the VAE gives them, or None without a VAE.
    kv_prompt: conditioning for the reference pass, or None.
    one_each: the first picture is for the first image of a batch, the second for the second, and so on.
    cache: what is kept of reference passes; it alone changes.
    """

    encoder: Encoder | None
    pixels: Tensor
    mask: Tensor | None
    keys_values: Tensor | None
    null_keys_values: Tensor | None
    latents: Tensor | None = None
    kv_prompt: Any = None
    one_each: bool = False
    cache: KVCache = field(default_factory=KVCache)


@dataclass(frozen=True, eq=False)
class Reference:
    """What travels as LOOKAHEAD_REFERENCE: one subject or several. Never changed once made."""

    subjects: tuple[Subject, ...]


@dataclass(frozen=True, eq=False)
class LookaheadLoss:
    """What travels as LOOKAHEAD_LOSS.

    loss: how far previews are from what is wanted, `lookahead.losses.Loss`; a run calls `started(loss, generator)`
        first, so that its random views repeat.
    patchers: the networks that it reads with, to be loaded together with the UNet and the VAE.
    name: in a word or two, for logs and plots.
    """

    loss: Loss = field(repr=False)
    patchers: tuple[ModelPatcher, ...] = field(default=(), repr=False)
    name: str = "loss"


@dataclass(frozen=True, eq=False)
class Shortcut:
    """What travels as LOOKAHEAD_SHORTCUT: how to look ahead in one step.

    model: the base with a few-step LoRA, or a distilled model; vae: decodes previews; one_step: use the model (with the
    scaling of consistency models), else the x0 prediction of the model that is sampled. networks: what was made of the
    LoRA for a base, by the base's patches; it alone changes.
    """

    model: ModelPatcher
    vae: VAE
    one_step: bool = True
    networks: dict[Any, ModelPatcher | None] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class GuidanceReport:
    """What travels as LOOKAHEAD_GUIDANCE_REPORT: the last guided runs, by a mark of their latents; it alone changes."""

    runs: dict[str, Run] = field(default_factory=dict)
