"""The mini world's weights in the public formats: one SDXL checkpoint in the layout that the host loads.

Trained modules have diffusers' and transformers' names; the file has those of the original SDXL release: ldm names for
the UNet, transformers' for CLIP-L, OpenCLIP's for bigG, TAESD's for the autoencoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ...lookahead.files.original_names import ldm_unet

VAE_SCALE = 0.13025  # SDXL's latent scaling factor: the host divides by it, so TAESD's raw latents go to the UNet as is


def cldm_controlnet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' ControlNet names (two residual blocks a level) -> cldm's, with the prefix of the original release."""
    blocks = sum(bool(re.fullmatch(r"controlnet_cond_embedding\.blocks\.\d+\.weight", k)) for k in state)

    def hint(match: re.Match[str]) -> str:
        order = {"conv_in": 0, "conv_out": blocks + 1}.get(match[1])
        return f"input_hint_block.{2 * (int(match[2]) + 1 if order is None else order)}"  # an activation between each

    out = {}
    for name, tensor in state.items():
        new = re.sub(r"^controlnet_cond_embedding\.(conv_in|conv_out|blocks\.(\d+))", hint, name)
        new = re.sub(r"^controlnet_down_blocks\.(\d+)", r"zero_convs.\1.0", new)
        new = new.replace("controlnet_mid_block", "middle_block_out.0")
        out |= {new: tensor} if new != name else ldm_unet({name: tensor})
    return {f"control_model.{k}": v for k, v in out.items()}


def clip_l(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names as they stand in SDXL's file; newer transformers leave "text_model." out."""
    return {"text_model." + k.removeprefix("text_model."): v for k, v in state.items()}


def open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' CLIPTextModelWithProjection -> OpenCLIP's text tower (q, k and v in one matrix)."""
    state = {k.removeprefix("text_model."): v for k, v in state.items()}
    out = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "logit_scale": torch.tensor(4.6052),
    }
    layers = 1 + max(int(m[1]) for k in state if (m := re.match(r"encoder\.layers\.(\d+)\.", k)))
    names = {
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    for i in range(layers):
        old, new = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for leaf in ("weight", "bias"):
            out[f"{new}attn.in_proj_{leaf}"] = torch.cat([state[f"{old}self_attn.{p}_proj.{leaf}"] for p in "qkv"])
            for a, b in names.items():
                out[f"{new}{b}.{leaf}"] = state[f"{old}{a}.{leaf}"]
    return out


def taesd(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' AutoencoderTiny -> TAESD's two stacks; the decoder's clamp takes its place 0."""
    out = {"vae_scale": torch.tensor(VAE_SCALE), "vae_shift": torch.tensor(0.0)}
    for name, tensor in state.items():
        side, _, index, leaf = name.split(".", 3)
        out[f"taesd_{side}.{int(index) + (side == 'decoder')}.{leaf}"] = tensor
    return out


def sdxl_checkpoint(
    unet: Mapping[str, Tensor], text_l: Mapping[str, Tensor], text_g: Mapping[str, Tensor], vae: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All parts under their names in one file."""
    parts = {
        "model.diffusion_model.": ldm_unet(unet),
        "conditioner.embedders.0.transformer.": clip_l(text_l),
        "conditioner.embedders.1.model.": open_clip(text_g),
        "first_stage_model.": taesd(vae),
    }
    return {prefix + k: v for prefix, part in parts.items() for k, v in part.items()}
