"""A host extension for tests and the demo: the stock loaders read the mini world's files.

`CheckpointLoaderSimple` learns a tiny SDXL (same UNet class, block layout, key names, two text encoders and
conditioning; only narrower and shallower), `ControlNetLoader` the ControlNet beside it, `CLIPVisionLoader` the mini
image encoder. All are known by their shapes, so real files are read as before. The sizes are those of
`mini/sizes.json`. There are no nodes here.
"""

import inspect
import json
import os
import tempfile
from pathlib import Path

import comfy.clip_vision
import comfy.supported_models
import torch
from comfy import sd1_clip, sdxl_clip, supported_models_base

SIZES = json.loads((Path(__file__).resolve().parents[1] / "sizes.json").read_text())
UNET, TEXT, VISION = SIZES["unet"], SIZES["text"], SIZES["clip_vision"]
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def text_config(width: int, activation: str) -> dict:
    """The configuration of one text encoder, in the layout of transformers."""
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "bos_token_id": 0,
        "eos_token_id": 49407,
        "pad_token_id": 1,
        "layer_norm_eps": 1e-5,
        "hidden_act": activation,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": TEXT["mlp_ratio"] * width,
        "num_attention_heads": TEXT["heads"],
        "num_hidden_layers": TEXT["layers"],
        "max_position_embeddings": TEXT["positions"],
        "vocab_size": TEXT["vocabulary"],
    }


def accepted(function, arguments: dict) -> dict:
    """The keyword arguments that this version of the host takes."""
    parameters = inspect.signature(function).parameters
    if any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


class MiniTokenizer(sdxl_clip.SDXLTokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None, **_):
        make = sd1_clip.SDTokenizer
        common = {"embedding_directory": embedding_directory, "tokenizer_data": tokenizer_data or {}}
        first = dict(common, embedding_size=TEXT["width_l"], embedding_key="clip_l")
        second = dict(common, embedding_size=TEXT["width_g"], embedding_key="clip_g", pad_with_end=False)
        self.clip_l = make(**accepted(make.__init__, first))
        self.clip_g = make(**accepted(make.__init__, second))


class MiniClip(sdxl_clip.SDXLClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None, **_):
        torch.nn.Module.__init__(self)
        make = sd1_clip.SDClipModel
        common = {
            "device": device,
            "dtype": dtype,
            "layer": "hidden",
            "layer_idx": -2,
            "layer_norm_hidden_state": False,
        }
        options = model_options or {}
        first = dict(
            common,
            textmodel_json_config=text_config(TEXT["width_l"], "quick_gelu"),
            model_options={**options, "model_name": "clip_l"},
        )
        second = dict(
            common,
            textmodel_json_config=text_config(TEXT["width_g"], "gelu"),
            model_options={**options, "model_name": "clip_g"},
            special_tokens={"start": 49406, "end": 49407, "pad": 0},
            return_projected_pooled=True,
        )
        self.clip_l = make(**accepted(make.__init__, first))
        self.clip_g = make(**accepted(make.__init__, second))
        self.dtypes = {dtype}


class MiniSDXL(comfy.supported_models.SDXL):
    unet_config = {
        "model_channels": UNET["model_channels"],
        "use_linear_in_transformer": True,
        "transformer_depth": [depth for depth in UNET["transformer_depth"] for _ in range(2)],
        "context_dim": TEXT["width_l"] + TEXT["width_g"],
        "adm_in_channels": TEXT["width_g"] + 6 * 256,  # six embedded sizes beside the pooled text, as in SDXL
        "use_temporal_attention": False,
    }
    unet_extra_config = {"num_heads": -1, "num_head_channels": UNET["head_channels"]}

    def clip_target(self, state_dict=None):
        return supported_models_base.ClipTarget(MiniTokenizer, MiniClip)


class MiniControlNet(MiniSDXL):
    """The mini ControlNet: the encoder half without transformers. As nothing in such a file tells the text's width,
    which the host's class insists on, it is told here."""

    unet_config = {
        "model_channels": UNET["model_channels"],
        "transformer_depth": [0] * 6,
        "adm_in_channels": MiniSDXL.unet_config["adm_in_channels"],
    }
    unet_extra_config = {**MiniSDXL.unet_extra_config, "context_dim": MiniSDXL.unet_config["context_dim"]}


def is_mini_vision(state_dict: dict) -> bool:
    """Tells the mini image encoder by its state dict: width, patch, positions and number of layers are its own."""
    patches = state_dict.get("vision_model.embeddings.patch_embedding.weight")
    positions = state_dict.get("vision_model.embeddings.position_embedding.weight")
    layer = "vision_model.encoder.layers.{}.layer_norm1.weight"
    return (
        patches is not None
        and positions is not None
        and tuple(patches.shape) == (VISION["hidden_size"], 3, VISION["patch_size"], VISION["patch_size"])
        and positions.shape[0] == (VISION["image_size"] // VISION["patch_size"]) ** 2 + 1
        and layer.format(VISION["num_hidden_layers"] - 1) in state_dict
        and layer.format(VISION["num_hidden_layers"]) not in state_dict
    )


def mini_vision(state_dict: dict):
    """The mini image encoder, loaded as the host loads its own (which know a few fixed sizes only)."""
    config = {
        "model_type": "clip_vision_model",
        "num_channels": 3,
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        **VISION,
    }
    # Older hosts take the path of a configuration only.
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
        json.dump(config, file)
    try:
        clip = comfy.clip_vision.ClipVisionModel(file.name)
    finally:
        os.unlink(file.name)
    missing, _ = clip.load_sd(state_dict)
    if missing:
        raise ValueError(f"the mini image encoder lacks {len(missing)} weights, the first is {sorted(missing)[0]}")
    return clip


def install() -> None:
    """Teach the host, once in a process."""
    if any(model.__name__ == MiniSDXL.__name__ for model in comfy.supported_models.models):
        return
    comfy.supported_models.models += [MiniSDXL, MiniControlNet]
    stock = comfy.clip_vision.load_clipvision_from_sd

    def load_clipvision_from_sd(sd, prefix="", convert_keys=False):
        return mini_vision(sd) if is_mini_vision(sd) else stock(sd, prefix=prefix, convert_keys=convert_keys)

    comfy.clip_vision.load_clipvision_from_sd = load_clipvision_from_sd


install()

NODE_CLASS_MAPPINGS: dict = {}
