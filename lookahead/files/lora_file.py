"""LoRA files for SDXL's UNet, under all names by which they are published: read by the trainer as the nodes read them.

A file names a layer by diffusers' path or by that of the original release, with dots or underscores, and the two halves
in one of several ways. What is no plain LoRA (DoRA, LoHa, LoKr, ...) is refused here and in the nodes alike, since it
would act without the part that makes it so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .original_names import ldm_unet
from .tensors import LARGEST, EncoderFileError, check_numbers

_ENDINGS = {  # the longest that fits
    ending: part
    for part, endings in {
        "down": (
            ".lora_down.weight",
            ".lora_A.weight",
            ".lora_A.default.weight",
            ".lora_A",
            "_lora.down.weight",
            ".lora.down.weight",
            ".lora_linear_layer.down.weight",
        ),
        "up": (
            ".lora_up.weight",
            ".lora_B.weight",
            ".lora_B.default.weight",
            ".lora_B",
            "_lora.up.weight",
            ".lora.up.weight",
            ".lora_linear_layer.up.weight",
        ),
        "mid": (".lora_mid.weight",),
        "alpha": (".alpha",),
    }.items()
    for ending in endings
}
_KINDS = {  # by what a name holds
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
}
_TEXTS = ("lora_te", "lycoris_te", "text_encoder.", "text_encoder_2.", "text_model.", "bundle_emb.")


class LayerLoRA(NamedTuple):
    """A LoRA's part beside one layer: up(down(x)) * alpha / rank.

    down: [rank, in], of a convolution [rank, in, kernel, kernel]; up: [out, rank].
    """

    down: Tensor
    up: Tensor
    alpha: float


def low_rank(tensors: Mapping[str, Tensor], layers: Mapping[str, torch.Size], name: str) -> dict[str, LayerLoRA]:
    """The LoRA of a file by diffusers' path of each layer that it changes.

    tensors: the file's; layers: by path, the weights' shapes of all linear and convolution layers of the UNet; name: of
    the file, for errors. Weights of text encoders and embeddings are passed over. Raises EncoderFileError, one
    sentence, for what is no plain LoRA, is for another base, or is damaged.
    """
    known = names_of(layers)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if not key.startswith(_TEXTS):
            layer, part = _split(key, name)
            if layer not in known:
                raise EncoderFileError(
                    f"{name} is no LoRA for this base: it has {key}, and the UNet no such layer; use one for SDXL."
                )
            parts.setdefault(known[layer], {})[part] = tensor
    if not parts:
        raise EncoderFileError(f"{name} holds no LoRA of a UNet: use one for SDXL.")
    check_numbers(tensors, name, LARGEST)
    return {path: _joined(parts[path], layers[path], path, name) for path in layers if path in parts}


def rank(tensors: Mapping[str, Tensor]) -> int:
    """The greatest rank in a file, 0 where it holds no LoRA."""
    return max(
        (len(tensor) for key, tensor in tensors.items() if tensor.ndim and _ENDINGS.get(_ending(key) or "") == "down"),
        default=0,
    )


def names_of(paths: Iterable[str]) -> dict[str, str]:
    """Every name by which a file may call a layer -> diffusers' path of it."""
    out: dict[str, str] = {}
    original = ldm_unet({f"{path}.weight": path for path in paths})
    for weight, path in original.items():
        of_old_files = path.replace(".to_", ".processor.to_").removesuffix(".0")  # processors had no Dropout beside it
        of_classes = path.replace("add_embedding.", "class_embedding.")  # as other models have it in that place
        for dotted in (path, of_old_files, of_classes):
            out |= {dotted: path, f"unet.{dotted}": path}
            out |= {f"{prefix}{dotted.replace('.', '_')}": path for prefix in ("lora_unet_", "lycoris_")}
        layer = weight.removesuffix(".weight")
        out |= {f"diffusion_model.{layer}": path, f"lora_unet_{layer.replace('.', '_')}": path}
    return out


def _ending(key: str) -> str | None:
    return max((ending for ending in _ENDINGS if key.endswith(ending)), key=len, default=None)


def _split(key: str, name: str) -> tuple[str, str]:
    ending = _ending(key)
    if ending is None:
        kind = next((kind for mark, kind in _KINDS.items() if mark in key), None)
        if kind is None:
            raise EncoderFileError(
                f"{name} is no LoRA for this base: it has {key}, which is no part of a plain one; use one for SDXL."
            )
        raise EncoderFileError(
            f"{name} is a {kind} ({key}), and plain LoRA alone is taken: use a LoRA file of up and down matrices."
        )
    return key.removesuffix(ending), _ENDINGS[ending]


def _joined(parts: Mapping[str, Tensor], shape: torch.Size, path: str, name: str) -> LayerLoRA:
    if missing := [half for half in ("down", "up") if half not in parts]:
        raise EncoderFileError(f"{name} has no {missing[0]} matrix of {path}: it is incomplete; download it again.")
    down, up, mid = parts["down"].float(), parts["up"].float(), parts.get("mid")
    try:
        alpha = float(parts["alpha"].flatten()[0]) if "alpha" in parts else float(len(down))
        if mid is not None:  # in three: mid(down) is one convolution
            inner = down.reshape(mid.shape[1], -1)
            down = torch.einsum("oikl,ic->ockl", mid.float(), inner)
        low = LayerLoRA(down.reshape(len(down), *shape[1:]), up.reshape(shape[0], len(down)), alpha)
    except (RuntimeError, IndexError, TypeError) as error:  # (TypeError: a number has no length)
        given = " and ".join(str(list(parts[half].shape)) for half in ("down", "up"))
        raise EncoderFileError(
            f"{name} is no LoRA for this base: its matrices of {path} have shapes {given}, and the layer "
            f"{list(shape)}; use one for SDXL."
        ) from error
    return low
