"""What SDXL's models are, for files that hold weights alone: a single checkpoint, an image encoder, a preview decoder.

The values are those of stabilityai/stable-diffusion-xl-base-1.0 and h94/IP-Adapter.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTokenizer

from ..lookahead.files.unet_layout import SDXL
from ..lookahead.method.schedule import BETA_END, BETA_START

UNET: dict[str, Any] = {"sample_size": 128, **SDXL.diffusers()}
VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
_TEXT = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407}
TEXT: dict[str, Any] = _TEXT | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
TEXT_2: dict[str, Any] = _TEXT | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
VIT_H: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
_PARTS = {  # of the folder, with the class of each
    "scheduler": ("diffusers", "EulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}


def unet(values: Mapping[str, Any] = UNET, device: str = "meta") -> UNet2DConditionModel:
    """SDXL's UNet with no weights in it (`meta`), or with random ones."""
    with torch.device(device):
        return UNet2DConditionModel(**values)


def find_tokenizer() -> Path:
    """Folder with CLIP's vocabulary, which every ComfyUI carries; none is kept in this repository."""
    root = Path(__file__).parents[1]
    hosts = sorted((root / ".host").glob("*"))
    if root.parent.name == "custom_nodes":
        hosts.append(root.parents[1])  # where the pack is installed
    if os.environ.get("COMFYUI_DIR"):
        hosts = [Path(os.environ["COMFYUI_DIR"])]
    for host in reversed(hosts):
        if (host / "comfy" / "sd1_tokenizer" / "vocab.json").exists():
            return host / "comfy" / "sd1_tokenizer"
    raise FileNotFoundError(
        "No ComfyUI with comfy/sd1_tokenizer was found (CLIP's vocabulary is read from there): run `make host`, "
        "or set COMFYUI_DIR to a ComfyUI folder."
    )


def tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """SDXL's two: CLIP-L pads with its end token, bigG with token 0."""
    folder = str(find_tokenizer())
    return tuple(
        CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=77) for pad in ("<|endoftext|>", "!")
    )


def write_configs(
    to: Path,
    unet: Mapping[str, Any] = UNET,
    text: Mapping[str, Any] = TEXT,
    text_2: Mapping[str, Any] = TEXT_2,
    vae: Mapping[str, Any] = VAE,
) -> Path:
    """A diffusers folder of SDXL with everything but weights, which diffusers reads a single checkpoint by."""
    values = {
        "unet": {"_class_name": "UNet2DConditionModel", **unet},
        "vae": {"_class_name": "AutoencoderKL", **vae},
        "text_encoder": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **text},
        "text_encoder_2": {
            "architectures": ["CLIPTextModelWithProjection"],
            "model_type": "clip_text_model",
            **text_2,
        },
        "scheduler": SCHEDULER,
    }
    for part, config in values.items():
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        _write(to / part / name, config)
    for part, tokenizer in zip(("tokenizer", "tokenizer_2"), tokenizers(), strict=True):
        tokenizer.save_pretrained(to / part)
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    _write(to / "model_index.json", index | {part: list(kind) for part, kind in _PARTS.items()})
    return to


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1))
