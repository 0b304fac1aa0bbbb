"""The mini world's models from the shipped files, as modules of diffusers and transformers.

The inverse of `checkpoint.py`, by its own functions: they are asked what becomes of each name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from ...lookahead.files.original_names import ldm_unet
from ...lookahead.vision import clip
from ..plan import WEIGHTS
from ..stages import base, image_encoder, stage, vae
from ..stages.text import TextEncoders
from . import checkpoint
from .weights import CHECKPOINT, CLIP_VISION


class Models(NamedTuple):
    """The parts of the mini SDXL, frozen, in 32 bit."""

    unet: UNet2DConditionModel
    text: TextEncoders
    vae: AutoencoderTiny


def load(weights: Path = WEIGHTS) -> Models:
    """All parts of the shipped checkpoint. Raises FileNotFoundError, one sentence, where it is not there."""
    path = weights / CHECKPOINT
    if not path.exists():
        raise FileNotFoundError(f"There is no {path}: it belongs to the repository, so get it back with git checkout.")
    stored = stage.read_tensors(path)

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v.float() for k, v in stored.items() if k.startswith(prefix)}

    models = Models(base.build_unet(), TextEncoders(), vae.build())
    _fill(models.unet, part("model.diffusion_model."), ldm_unet)
    _fill(models.text.l, part("conditioner.embedders.0.transformer."), checkpoint.clip_l)
    _fill(models.text.g, _split(part("conditioner.embedders.1.model.")), _open_clip_names)
    _fill(models.vae, part("first_stage_model."), lambda s: dict(list(checkpoint.taesd(s).items())[2:]))
    for module in models:
        module.eval().requires_grad_(False)
    return models


def load_image_encoder(weights: Path = WEIGHTS) -> CLIPVisionModelWithProjection:
    """The shipped image encoder, frozen, in 32 bit."""
    with torch.device("meta"):
        encoder = image_encoder.build()
    return clip.fill(encoder, stage.read_tensors(weights / CLIP_VISION), torch.float32)


def _fill(
    module: nn.Module,
    stored: Mapping[str, Tensor],
    convert: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
) -> None:
    own = module.state_dict()
    names = dict(zip(own, convert(own), strict=True))
    module.load_state_dict({name: stored[public].to(own[name].dtype) for name, public in names.items()})


def _split(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's joint matrices of queries, keys and values as three, its projection turned round."""
    out = {}
    for name, tensor in stored.items():
        if ".attn.in_proj_" in name:
            for which, third in zip("qkv", tensor.chunk(3), strict=True):
                out[name.replace("attn.in_proj_", f"attn.{which}_proj.")] = third
        else:
            out[name] = tensor.T.contiguous() if name == "text_projection" else tensor
    return out


def _open_clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names -> OpenCLIP's, one to one, after `_split`."""
    outer = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm": "ln_final",
        "text_projection.weight": "text_projection",
        "encoder.layers.": "transformer.resblocks.",
        "self_attn.": "attn.",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    out = {}
    for name, tensor in state.items():
        new = name.removeprefix("text_model.")
        for old, fresh in outer.items():
            new = new.replace(old, fresh)
        out[new] = tensor
    return out
