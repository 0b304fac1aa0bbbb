"""The public file of IP-Adapter FaceID Plus v2 for SDXL: the second kind of encoder, which reads face embeddings.

Read as strictly as other encoders (`encoder_file`), and by its contents: its projection has both a face embedding's
layers and those that look at image features. Processors are numbered as in all public files, even ones are
self-attentions.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..method.face_id import FaceIDSizes
from . import encoder_file
from .encoder_file import EncoderFile, EncoderFileError
from .tensors import read_tensors

KIND = "IP-Adapter FaceID Plus v2"
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")  # of every attention, as the LoRA's weights are named
_IP = re.compile(r"ip_adapter\.(\d+)\.to_k_ip\.weight")
_MARK = "image_proj.perceiver_resampler.proj_in.weight"


@dataclass(frozen=True, eq=False)
class FaceIDFile:
    """A checked file.

    name: the file's, for messages; image_proj: weights of the projection, by its parameter names; ip_adapter: one
    (to_k, to_v) a cross-attention, in the order of `block_names`; lora: (A [rank, in], B [out, rank]) by layer, as
    `AttentionLoRA` names them, empty for a file without; metadata: as in the file.
    """

    name: str
    sizes: FaceIDSizes
    image_proj: dict[str, Tensor]
    ip_adapter: list[tuple[Tensor, Tensor]]
    lora: dict[str, tuple[Tensor, Tensor]]
    metadata: dict[str, str] = field(default_factory=dict)
    kind: str = KIND

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each cross-attention, in the order of `block_names`."""
        return tuple(to_k.shape[0] for to_k, _ in self.ip_adapter)


def read_encoder(path: str | os.PathLike[str]) -> EncoderFile | FaceIDFile:
    """Read an encoder file of either kind. Raises EncoderFileError as `encoder_file.read`."""
    tensors, metadata = read_tensors(path)
    reader = from_tensors if _MARK in tensors else encoder_file.from_tensors
    return reader(tensors, metadata, Path(path).name)


def provenance(file: FaceIDFile) -> str:
    """Describes the file, a line a field."""
    rank = next((a.shape[0] for a, _ in file.lora.values()), 0)
    return "\n".join(
        [
            f"{file.name}: {file.kind}",
            f"{file.sizes.tokens} tokens a picture, {len(file.ip_adapter)} cross-attentions, face embeddings of width "
            f"{file.sizes.face_width}, image features of width {file.sizes.image_width}",
            f"LoRA of rank {rank} on {len(file.lora)} projections, applied with the image prompt"
            if rank
            else "no LoRA",
            "for research only, as its authors publish it: it was trained with insightface's recogniser",
        ]
    )


def from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], name: str) -> FaceIDFile:
    """Check flat tensors as they stand in a file. `name` is used in messages only.

    Raises EncoderFileError, one sentence, for missing, surplus, misshapen or non-finite weights.
    """
    image_proj = {k.removeprefix("image_proj."): v for k, v in tensors.items() if k.startswith("image_proj.")}
    try:
        sizes = FaceIDSizes.from_state_dict(image_proj)
        expected = {f"image_proj.{key}": shape for key, shape in sizes.shapes().items()}
    except KeyError as error:
        raise _missing(name, f"image_proj.{error.args[0]}") from error
    except (ValueError, IndexError, RuntimeError) as error:
        raise EncoderFileError(
            f"{name}: the shapes of image_proj are not those of {KIND} ({error}): it is of another kind."
        ) from error
    blocks = len([key for key in tensors if _IP.fullmatch(key)])
    if sizes.context_width == 768 or blocks == 16:
        raise EncoderFileError(
            f"{name} is an IP-Adapter FaceID for Stable Diffusion 1.5, and this pack works with SDXL: use "
            "ip-adapter-faceid-plusv2_sdxl.bin."
        )
    with_lora = any("_lora." in key for key in tensors)
    for n in range(blocks):
        expected |= _block(tensors, n, sizes.context_width, with_lora, name)
    for key, shape in expected.items():
        if key not in tensors:
            raise _missing(name, key)
        if tuple(tensors[key].shape) != shape:
            raise EncoderFileError(
                f"{name}: {key} has shape {list(tensors[key].shape)} where {list(shape)} fits the rest of the file: it "
                "is damaged or was put together from two files."
            )
    if surplus := sorted(tensors.keys() - expected.keys()):
        raise EncoderFileError(f"{name} has weights that {KIND} does not have ({surplus[0]}): it is of another kind.")
    if not blocks:
        raise _missing(name, "ip_adapter.1.to_k_ip.weight")
    for key, value in tensors.items():
        plain = value.layout == torch.strided and not value.is_meta and value.dtype in encoder_file.DTYPES
        if not plain or not bool(torch.isfinite(value).all()):
            raise EncoderFileError(
                f"{name}: {key} does not hold finite numbers in 32 or 16 bit: it is damaged or quantised; use the "
                "original file."
            )
    pairs = [tuple(tensors[f"ip_adapter.{2 * n + 1}.to_{x}_ip.weight"] for x in "kv") for n in range(blocks)]
    lora = {}
    for n in range(2 * blocks if with_lora else 0):
        for to in PROJECTIONS:
            halves = (tensors[f"ip_adapter.{n}.{to}_lora.{half}.weight"] for half in ("down", "up"))
            lora[f"{n // 2}.attn{n % 2 + 1}.{to}"] = (next(halves), next(halves))
    return FaceIDFile(name, sizes, image_proj, [(k, v) for k, v in pairs], lora, dict(metadata))


def _block(
    tensors: Mapping[str, Tensor], n: int, context: int, with_lora: bool, name: str
) -> dict[str, tuple[int, ...]]:
    """The names and shapes of one transformer block's weights, whose widths and ranks are read from some of them."""
    key = f"ip_adapter.{2 * n + 1}.to_k_ip.weight"
    if key not in tensors:
        raise _missing(name, key)
    width = tensors[key].shape[0] if tensors[key].ndim else 0
    shapes: dict[str, tuple[int, ...]] = {f"ip_adapter.{2 * n + 1}.to_{x}_ip.weight": (width, context) for x in "kv"}
    for attention in (2 * n, 2 * n + 1) if with_lora else ():
        for to in PROJECTIONS:
            layer = f"ip_adapter.{attention}.{to}_lora"
            if f"{layer}.down.weight" not in tensors:
                raise _missing(name, f"{layer}.down.weight")
            down = tensors[f"{layer}.down.weight"]
            rank = max(1, down.shape[0] if down.ndim else 0)
            reads_text = attention % 2 == 1 and to in ("to_k", "to_v")
            shapes[f"{layer}.down.weight"] = (rank, context if reads_text else width)
            shapes[f"{layer}.up.weight"] = (width, rank)
    return shapes


def _missing(name: str, key: str) -> EncoderFileError:
    return EncoderFileError(f"{name}: the weight {key} is missing: the file is incomplete; download it again.")
