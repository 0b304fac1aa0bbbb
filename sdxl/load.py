"""The frozen models that an encoder is trained with, from the public files, on this machine alone: nothing is fetched.

SDXL as a diffusers folder or as one checkpoint; an image encoder; a tiny autoencoder that decodes previews. (The
few-step LoRA is read by `lora`, the recogniser by `lookahead.vision.arcface`, the detector by `face_models` there.)
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ..lookahead.files.atomic import first_line
from ..lookahead.files.tensors import EncoderFileError, read_tensors
from ..lookahead.vision import clip
from ..lookahead.vision.images import clip_input
from . import configs

WANTED = {  # by field of the configuration: what it is, and where it comes from
    "base": ("SDXL as a diffusers folder or one .safetensors", "stabilityai/stable-diffusion-xl-base-1.0"),
    "start": ("an encoder file, or ip-adapter-plus-face_sdxl_vit-h.safetensors", "h94/IP-Adapter, sdxl_models"),
    "shortcut": ("a few-step LoRA such as LCM-LoRA's pytorch_lora_weights", "latent-consistency/lcm-lora-sdxl"),
    "vae": ("TAESD for SDXL, a folder or its decoder's .safetensors", "madebyollin/taesdxl"),
    "picture_vae": ("an autoencoder of SDXL as a diffusers folder", "madebyollin/sdxl-vae-fp16-fix"),
    "image_encoder": ("CLIP ViT-H/14 as a folder or a .safetensors", "h94/IP-Adapter, models/image_encoder"),
    "recogniser": ("model_ir_se50.pth or an ArcFace .onnx", "TreB1eN/InsightFace_Pytorch, or a pack of insightface"),
    "clip": ("a whole CLIP, the model.safetensors with its config.json", "openai/clip-vit-large-patch14"),
    "detector": ("the folder of an unpacked insightface pack such as buffalo_l", "deepinsight/insightface, releases"),
}


class ModelError(ValueError):
    """Says what is wrong with the files of a model, in one sentence for the user."""


def found(field: str, name: str | None, *beside: Path, section: str = "model") -> Path:
    """The file or folder that `<section>.<field>` names, as it stands or in one of the folders `beside`.

    Raises FileNotFoundError, one sentence that says what to get, from where, and where to write it down.
    """
    what, source = WANTED[field]
    if name is None:
        raise FileNotFoundError(f"{section}.{field} is not set: get {what} (from {source}) and write its path there.")
    for path in (Path(name).expanduser(), *(folder / name for folder in beside)):
        if path.exists():
            return path
    raise FileNotFoundError(
        f"There is no {name}, which {section}.{field} names: get {what} (from {source}) and write its path there."
    )


class PromptEncoder(nn.Module):
    """SDXL's two text encoders with their tokenizers."""

    def __init__(self, tokenizers: Sequence[CLIPTokenizer], first: CLIPTextModel, second: CLIPTextModelWithProjection):
        super().__init__()
        self.tokenizers, self.first, self.second = tuple(tokenizers), first, second

    @torch.no_grad()
    def forward(self, captions: str | Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions, one or n -> context [n, 77, width] and pooled [n, width]; what is over 77 tokens is cut off."""
        captions = [captions] if isinstance(captions, str) else list(captions)
        hidden = []
        for tokenizer, model in zip(self.tokenizers, (self.first, self.second), strict=True):
            length = model.config.max_position_embeddings
            ids = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            output = model(ids.input_ids.to(model.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
        return torch.cat(hidden, -1), output.text_embeds


class Preview(nn.Module):
    """A tiny autoencoder: latents [B, 4, h, w], as the UNet has them, -> pictures in about [-1, 1], and back."""

    def __init__(self, vae: AutoencoderTiny):
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> latents [B, 4, h, w], as the UNet has them."""
        return self.vae.encode(pictures).latents * self.vae.config.scaling_factor


@dataclass(frozen=True, eq=False)
class Frozen:
    """The frozen models of SDXL are in evaluation mode, with no gradients of their weights."""

    unet: UNet2DConditionModel
    text: PromptEncoder
    vae: AutoencoderKL | AutoencoderTiny
    vision: CLIPVisionModelWithProjection

    def __post_init__(self) -> None:
        for module in (self.unet, self.text, self.vae, self.vision):
            module.eval().requires_grad_(False)

    def readers(self, device: torch.device | str) -> None:
        """Move what reads captions and pictures. (The UNet goes with the step.)"""
        for module in (self.text, self.vae, self.vision):
            module.to(device)

    @torch.no_grad()
    def latents(self, pictures: Tensor) -> Tensor:
        """Pictures [n, 3, H, W] in [0, 1] -> [n, 4, H / 8, W / 8], scaled as the UNet reads them; the mean, nothing is
        drawn."""
        out = self.vae.encode((pictures * 2 - 1).to(self.vae.device, self.vae.dtype))
        latents = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents  # the tiny one has no spread
        return latents.float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def features(self, pictures: Tensor) -> Tensor:
        """Pictures [n, 3, H, W] in [0, 1] -> what the image prompt reads: penultimate hidden states [n, patches, w]."""
        pixels = clip_input(pictures, self.vision.config.image_size)
        return self._hidden(pixels)

    def null_features(self) -> Tensor:
        """Features of no picture, [1, patches, width]: those of zeros in the encoder's normalised pixel space, not of
        a black picture, as the public pipelines have it."""
        size = self.vision.config.image_size
        return self._hidden(torch.zeros(1, 3, size, size))

    @torch.no_grad()
    def _hidden(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.vision.device, self.vision.dtype)
        return self.vision(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]


LoadedBase = tuple[UNet2DConditionModel, PromptEncoder, nn.Module]  # the last reads pictures


def load_base(path: Path, dtype: torch.dtype, vae: Path | None = None) -> LoadedBase:
    """UNet, text encoders and the autoencoder that reads pictures, of a diffusers folder or a single checkpoint.

    vae: folder of an autoencoder in place of the base's. Autoencoders stay in 32 bit: SDXL's own overflows in 16, and
    a picture is encoded once. Raises ModelError for what is no SDXL.
    """
    try:
        reader = load_vae(vae) if vae else None
        unet, text, own_vae = (_folder if path.is_dir() else _checkpoint)(path, dtype, reader)
    except ModelError:
        raise
    except Exception as error:  # diffusers and transformers have many ways to say that a file is missing or misshapen
        raise ModelError(f"{path} cannot be read as SDXL ({first_line(error)}): get {_from('base')}.") from error
    kind, channels = unet.config.addition_embed_type, unet.config.in_channels
    if kind != "text_time" or channels != 4:
        raise ModelError(
            f"{path} is no SDXL base model ({channels} input channels, {kind or 'no'} added conditions): use "
            f"{_from('base')}."
        )
    return unet, text, own_vae


def _folder(path: Path, dtype: torch.dtype, vae: nn.Module | None) -> LoadedBase:
    parts = ("unet", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", *(() if vae else ("vae",)))
    if missing := [name for name in parts if not (path / name).is_dir()]:
        raise ModelError(f"{path} has no folder {' and no '.join(missing)}: get {_from('base')}, all of it.")
    unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", torch_dtype=dtype, **_files(path / "unet"))
    first, second = (
        kind.from_pretrained(path / name, dtype=dtype, **_files(path / name))
        for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection))
    )
    tokenizers = [CLIPTokenizer.from_pretrained(path / name, local_files_only=True) for name in parts[3:5]]
    return unet, PromptEncoder(tokenizers, first, second), vae or load_vae(path / "vae")


def _files(folder: Path) -> dict[str, Any]:
    """How to load the weights in a folder: from here, and the 16-bit variant where there is no other."""
    weights = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
    if not weights:
        raise ModelError(f"{folder} holds no weights (.safetensors): the download is incomplete, get the folder again.")
    only_16 = all(".fp16." in file.name for file in weights)
    return {"local_files_only": True} | ({"variant": "fp16"} if only_16 else {})


def _checkpoint(path: Path, dtype: torch.dtype, vae: nn.Module | None) -> LoadedBase:
    with tempfile.TemporaryDirectory() as folder:
        written = configs.write_configs(Path(folder))
        return read_checkpoint(path, written, dtype, vae)


def read_checkpoint(path: Path, configs: Path, dtype: torch.dtype, vae: nn.Module | None = None) -> LoadedBase:
    """Reads what `load_base` returns from a file in SDXL's own layout; configs: of `configs.write_configs`."""
    given = {} if vae is None else {"vae": vae}
    pipe = StableDiffusionXLPipeline.from_single_file(
        str(path), config=str(configs), local_files_only=True, torch_dtype=dtype, **given
    )
    text = PromptEncoder((pipe.tokenizer, pipe.tokenizer_2), pipe.text_encoder, pipe.text_encoder_2)
    return pipe.unet, text, vae or pipe.vae.float()


def load_vae(folder: Path) -> AutoencoderKL | AutoencoderTiny:
    """An autoencoder of SDXL from its diffusers folder, in 32 bit: AutoencoderKL or AutoencoderTiny."""
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"{folder} holds no config.json, so it is no autoencoder: get {_from('picture_vae')}.")
    kind = json.loads(config.read_text()).get("_class_name")
    kinds = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    if kind not in kinds:
        raise ModelError(f"{folder} holds {kind}, and AutoencoderKL and AutoencoderTiny are known: use one of these.")
    return kinds[kind].from_pretrained(folder, torch_dtype=torch.float32, **_files(folder))


def load_preview(path: Path) -> Preview:
    """TAESD for SDXL: a diffusers folder, or its decoder's weights alone under diffusers' or the author's names."""
    try:
        if path.is_dir():
            vae = load_vae(path)
            if not isinstance(vae, AutoencoderTiny):
                raise ModelError(f"{path} is no tiny autoencoder, whose previews are cheap: get {_from('vae')}.")
        else:
            tensors, _ = read_tensors(path)
            vae = AutoencoderTiny()
            vae.decoder.load_state_dict(_decoder_names(tensors))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{path} cannot be read as TAESD ({first_line(error)}): get {_from('vae')}.") from error
    return Preview(vae.eval().requires_grad_(False))


def _decoder_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in ("decoder.", "taesd_decoder."):
        if any(name.startswith(prefix) for name in tensors):
            tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    if any(name.startswith("layers.") for name in tensors):
        return tensors
    out = {}
    for name, tensor in tensors.items():  # the author's counts the clamp at the beginning
        number, _, rest = name.partition(".")
        out[f"layers.{int(number) - 1}.{rest}"] = tensor
    return out


def load_image_encoder(path: Path, dtype: torch.dtype) -> CLIPVisionModelWithProjection:
    """A CLIP image encoder in transformers' layout: its folder, or its weights alone where they are ViT-H/14's."""
    try:
        if path.is_dir():
            return CLIPVisionModelWithProjection.from_pretrained(path, dtype=dtype, **_files(path))
        tensors, _ = read_tensors(path)
        with torch.device("meta"):
            model = CLIPVisionModelWithProjection(CLIPVisionConfig(**configs.VIT_H))
        return clip.fill(model, tensors, dtype)
    except ModelError:
        raise
    except (Exception, EncoderFileError) as error:
        raise ModelError(
            f"{path} cannot be read as an image encoder ({first_line(error)}): get {_from('image_encoder')}; another "
            "one than ViT-H/14 needs its folder with config.json."
        ) from error


def _from(field: str) -> str:
    what, source = WANTED[field]
    return f"{what} (from {source})"
