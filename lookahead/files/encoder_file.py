"""The encoder file: reading (own format and stock IP-Adapter Plus for SDXL), checking, writing.

A file's kind follows from its keys and its metadata, never from its name. Everything is checked before anything is
used; what is wrong is said in one sentence (EncoderFileError). Pickles are read without executing what is in them.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..method.kv_encoder import EXPORTED, KV_ENCODER, KV_EXPORT, TUNED
from ..method.resampler import ResamplerSizes
from .block_names import ip_adapter_key
from .metadata import check_metadata, shown, stated
from .tensors import LARGEST, EncoderFileError, check_numbers, check_plain, read_tensors, write_tensors

__all__ = [
    "EncoderFile",
    "EncoderFileError",
    "METADATA_FIELDS",
    "kv_prompt",
    "provenance",
    "read",
    "reference_size",
    "write",
]

FORMAT = "lcm-lookahead-encoder"
FORMAT_VERSION = "1"
OWN_KIND = "LCM-Lookahead encoder"
STOCK_KIND = "IP-Adapter Plus"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# The fields of the metadata, in the order in which they are shown. All values are text.
METADATA_FIELDS = {
    "format": "format name",
    "format_version": "format version",
    "base_model": "base model that the encoder was trained on",
    "base_model_hash": "hash of the base model",
    "image_encoder": "CLIP image encoder",
    "tokens": "number of image-prompt tokens",
    "size": "side in pixels of the reference picture",
    "kv_prompt": "prompt of the KV encoder",
    "kv_rank": "rank of the KV encoder's low-rank weights",
    "kv_alpha": "alpha of the KV encoder's low-rank weights",
    "recogniser": "face recogniser used in the loss",
    "recogniser_licence": "licence of that recogniser",
    "data": "training data",
    "data_hash": "hash of the training data: pictures, people, captions",
    "config": "training configuration",
    "steps": "training steps",
}
DEFAULT_SIZE = 1024  # of the reference picture where the metadata do not say: SDXL's own
DEFAULT_KV_PROMPT = "a photo of a face"
PROVENANCE_UNKNOWN = "no provenance in the file"

_IP_NAME = re.compile(r"ip_adapter\.(\d+)\.to_([kv])_ip\.weight")
_BLOCK = r"(?:(?:down|up)_blocks\.\d+|mid_block)\.attentions\.\d+\.transformer_blocks\.\d+"
KV_HALVES = {KV_ENCODER: TUNED, KV_EXPORT: EXPORTED}  # the projections of a block that each half changes
_KV_LAYER = "|".join(rf"{half}\.{_BLOCK}\.(?:{'|'.join(map(re.escape, own))})" for half, own in KV_HALVES.items())
_KV_NAME = re.compile(rf"(?P<layer>{_KV_LAYER})\.lora_(?P<half>[AB])\.weight")


@dataclass(frozen=True, eq=False)
class EncoderFile:
    """A checked encoder file.

    name: the file's name, for messages; kind: OWN_KIND or STOCK_KIND; image_proj: weights of the Resampler, by its
    parameter names; ip_adapter: one (to_k [C, context], to_v [C, context]) a cross-attention, in the order of
    `block_names`; kv: weights of the KV encoder, if any; metadata: as in the file.
    """

    name: str
    kind: str
    sizes: ResamplerSizes
    image_proj: dict[str, Tensor]
    ip_adapter: list[tuple[Tensor, Tensor]]
    kv: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def kv_layers(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The KV encoder's low-rank weights (A [rank, in], B [out, rank]) by layer, such as
        "kv_encoder.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"; empty where the file has none."""
        layers = dict.fromkeys(m["layer"] for m in map(_KV_NAME.fullmatch, self.kv) if m)
        return {k: (self.kv[f"{k}.lora_A.weight"], self.kv[f"{k}.lora_B.weight"]) for k in layers}

    def kv_scale(self, rank: int) -> float:
        """Computes the factor of a low-rank product: alpha / rank where the file gives an alpha, else 1."""
        alpha = self.metadata.get("kv_alpha")
        return float(alpha) / rank if alpha else 1.0

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels C of each cross-attention, in the order of `block_names`."""
        return tuple(k.shape[0] for k, _ in self.ip_adapter)


def read(path: str | os.PathLike[str]) -> EncoderFile:
    """Read and check an encoder file (.safetensors, or a .bin of plain tensors) into host memory.

    Raises EncoderFileError, one sentence, for a file that is missing, cut short, of another kind or base, or that has
    missing, surplus, misshapen or non-finite weights.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    return from_tensors(tensors, metadata, path.name)


def from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], name: str) -> EncoderFile:
    """Check flat tensors as they stand in a file. `name` is used in messages only; errors as in `read`."""
    is_own = metadata.get("format") == FORMAT
    if is_own and metadata.get("format_version") != FORMAT_VERSION:
        raise EncoderFileError(
            f"{name} has encoder format version {stated(metadata, 'format_version')}, and this version of the pack "
            f"reads {FORMAT_VERSION}: update the pack."
        )
    check_plain(tensors, name)
    other = None if is_own else _what_else(tensors)
    if other:
        raise EncoderFileError(f"{name} is {other}")
    image_proj = {k.removeprefix("image_proj."): v for k, v in tensors.items() if k.startswith("image_proj.")}
    kv = {k: v for k, v in tensors.items() if is_own and _KV_NAME.fullmatch(k)}
    _check_values(tensors, name)
    sizes = _check_resampler(image_proj, name)
    ip_adapter = _check_projections(tensors, sizes, name)
    _check_kv(kv, len(ip_adapter), name)
    check_metadata(metadata, name)
    count = len(image_proj) + 2 * len(ip_adapter) + len(kv)
    if count != len(tensors):
        surplus = [k for k in tensors if not k.startswith("image_proj.") and not _IP_NAME.fullmatch(k) and k not in kv]
        raise EncoderFileError(
            f"{name} has weights that are not part of an encoder file ({_some(surplus)}): it is of another kind, or "
            "was written by a newer version of the pack."
        )
    return EncoderFile(name, OWN_KIND if is_own else STOCK_KIND, sizes, image_proj, ip_adapter, kv, dict(metadata))


def image_prompt_tensors(
    image_proj: Mapping[str, Tensor], ip_adapter: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """The image prompt's weights under the names of the public IP-Adapter Plus files; arguments as in `write`."""
    tensors = {f"image_proj.{k}": v for k, v in image_proj.items()}
    for n, pair in enumerate(ip_adapter):
        tensors |= {ip_adapter_key(n, which): weight for which, weight in zip("kv", pair, strict=True)}
    return tensors


def write(
    path: str | os.PathLike[str],
    image_proj: Mapping[str, Tensor],
    ip_adapter: Sequence[tuple[Tensor, Tensor]],
    metadata: Mapping[str, str],
    kv: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an encoder file in our own format: checked first, then written beside its place and renamed into it.

    image_proj: the Resampler's state dict; ip_adapter: (to_k, to_v) a cross-attention in the order of `block_names`;
    metadata: text fields of METADATA_FIELDS and of modelspec ("modelspec.*"), without the format's own; kv: weights
    of the KV encoder under their full names. Raises EncoderFileError where `read` would not accept the result.
    """
    path = Path(path)
    unknown = [k for k in metadata if k not in METADATA_FIELDS and not k.startswith("modelspec.")]
    if unknown:
        raise EncoderFileError(f"Encoder files have no metadata field {_some(unknown)}; known are {METADATA_FIELDS}.")
    tensors = image_prompt_tensors(image_proj, ip_adapter) | dict(kv or {})
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    metadata = {
        **metadata,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "tokens": str(tensors["image_proj.latents"].shape[1]) if "image_proj.latents" in tensors else "0",
    }
    from_tensors(tensors, metadata, path.name)
    write_tensors(path, tensors, metadata)


def reference_size(metadata: Mapping[str, str]) -> int:
    """Side in pixels of the square that the VAE sees of a reference: what the encoder was trained with, or 1024."""
    size = metadata.get("size", "")
    return int(size) if size.isdecimal() and int(size) >= 64 else DEFAULT_SIZE


def kv_prompt(metadata: Mapping[str, str]) -> str:
    """The prompt that the KV encoder was trained with, or "a photo of a face"."""
    return metadata.get("kv_prompt") or DEFAULT_KV_PROMPT


def provenance(file: EncoderFile) -> str:
    """Describes the file, a line a field: kind, sizes, then its metadata."""
    sizes = file.sizes
    lines = [
        f"{file.name}: {file.kind}",
        f"{sizes.tokens} tokens a picture, {len(file.ip_adapter)} cross-attentions, "
        f"image features of width {sizes.image_width}, text context of width {sizes.context_width}",
    ]
    fields = [k for k in METADATA_FIELDS if k not in ("format", "format_version", "tokens")]
    fields += sorted(k for k in file.metadata if k.startswith("modelspec."))
    told = [f"{METADATA_FIELDS.get(k, k)}: {shown(file.metadata, k)}" for k in fields if file.metadata.get(k)]
    return "\n".join(lines + (told or [PROVENANCE_UNKNOWN]))


def _check_values(tensors: Mapping[str, Tensor], name: str) -> None:
    for key, value in tensors.items():
        if value.dtype not in DTYPES:
            raise EncoderFileError(
                f"{name}: {key} is stored as {value.dtype}, but encoder files hold float32, float16 or bfloat16: use "
                "the original, unquantised file."
            )
    check_numbers(tensors, name, LARGEST)


def _check_resampler(image_proj: Mapping[str, Tensor], name: str) -> ResamplerSizes:
    try:
        sizes = ResamplerSizes.from_state_dict(image_proj)
        expected = sizes.shapes()
    except KeyError as error:
        raise EncoderFileError(
            f"{name}: the weight image_proj.{error.args[0]} is missing: the file is incomplete; download it again."
        ) from error
    except (ValueError, IndexError) as error:
        raise EncoderFileError(
            f"{name}: the shapes of image_proj are not those of an IP-Adapter Plus Resampler ({error}): it is of "
            "another kind."
        ) from error
    for key, shape in expected.items():
        if key not in image_proj:
            raise EncoderFileError(
                f"{name}: the weight image_proj.{key} is missing: the file is incomplete; download it again."
            )
        if tuple(image_proj[key].shape) != shape:
            raise EncoderFileError(
                f"{name}: image_proj.{key} has shape {list(image_proj[key].shape)} where {list(shape)} fits the rest "
                "of the file: it is damaged or was put together from two files."
            )
    surplus = sorted(set(image_proj) - set(expected))
    if surplus:
        raise EncoderFileError(
            f"{name}: image_proj has weights that a Resampler does not have ({_some(surplus)}): it is of another kind."
        )
    return sizes


def _check_projections(tensors: Mapping[str, Tensor], sizes: ResamplerSizes, name: str) -> list[tuple[Tensor, Tensor]]:
    numbers = {int(m[1]) for m in map(_IP_NAME.fullmatch, tensors) if m}
    if not numbers or any(n % 2 == 0 for n in numbers):
        raise EncoderFileError(
            f"{name} has no cross-attention weights numbered 1, 3, 5, ... (ip_adapter.1.to_k_ip.weight and so on): the "
            "file is incomplete or of another kind."
        )
    pairs = []
    for ordinal in range((max(numbers) + 1) // 2):
        pair = []
        for which in "kv":
            key = ip_adapter_key(ordinal, which)
            if key not in tensors:
                raise EncoderFileError(
                    f"{name}: the weight {key} is missing: the file is incomplete; download it again."
                )
            value = tensors[key]
            if value.ndim != 2 or value.shape[1] != sizes.context_width:
                raise EncoderFileError(
                    f"{name}: {key} has shape {list(value.shape)} where [channels, {sizes.context_width}] fits the "
                    "Resampler: it is damaged or was put together from two files."
                )
            pair.append(value)
        if pair[0].shape != pair[1].shape:
            raise EncoderFileError(
                f"{name}: {ip_adapter_key(ordinal, 'k')} and its to_v_ip differ in shape ({list(pair[0].shape)} and "
                f"{list(pair[1].shape)}): the file is damaged."
            )
        pairs.append((pair[0], pair[1]))
    if sizes.context_width == 768 or len(pairs) == 16:
        raise EncoderFileError(
            f"{name} is an IP-Adapter Plus for Stable Diffusion 1.5 ({len(pairs)} cross-attentions, text width "
            f"{sizes.context_width}), and this pack works with SDXL: use the SDXL file, for example "
            "ip-adapter-plus-face_sdxl_vit-h.safetensors."
        )
    return pairs


def _check_kv(kv: Mapping[str, Tensor], blocks: int, name: str) -> None:
    """The KV encoder is whole or absent: a layer that is missing would change pictures unnoticed."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in kv.items():
        layer, half = key.removesuffix(".weight").split(".lora_")  # as _KV_NAME has it
        layers.setdefault(layer, {})[half] = value
    for layer, halves in layers.items():
        if halves.keys() != {"A", "B"}:
            missing = ({"A", "B"} - halves.keys()).pop()
            raise EncoderFileError(
                f"{name}: the weight {layer}.lora_{missing}.weight is missing: the file is incomplete; download it "
                "again."
            )
        a, b = halves["A"], halves["B"]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise EncoderFileError(
                f"{name}: {layer} has low-rank weights of shapes {list(a.shape)} and {list(b.shape)}, and [rank, in] "
                "and [out, rank] are needed: the file is damaged."
            )
    for half, projections in KV_HALVES.items() if layers else ():
        of_half = [layer for layer in layers if layer.startswith(half + ".")]
        of_block = Counter(layer.partition(".attn")[0] for layer in of_half)
        # The last block's attentions cannot change any key or value that is exported, so files leave it out.
        complete = {blocks} | ({blocks - 1} if half == KV_ENCODER else set())
        if len(of_block) not in complete or any(count != len(projections) for count in of_block.values()):
            raise EncoderFileError(
                f"{name} has {len(of_half)} layers of {half} where {blocks * len(projections)} fit its {blocks} "
                "attentions: the file is incomplete; download it again."
            )


_USE = "use IP-Adapter Plus (Face) for SDXL or an LCM-Lookahead encoder."


def _what_else(tensors: Mapping[str, Tensor]) -> str | None:
    """What a file is that is not IP-Adapter Plus, as the rest of a sentence; None where it may be one."""

    def has(pattern: str) -> bool:
        return any(re.match(pattern, key) for key in tensors)

    if has(r"(module\.)?encoder_unet\."):
        return (
            "a checkpoint of the paper's own code, which has to be converted once: use the node Convert Lookahead "
            "Encoder, or the command `lookahead convert`."
        )
    if has(r"model\.diffusion_model\.") or has(r"(input_blocks|down_blocks)\."):
        return "a diffusion model, not an encoder: load it with the checkpoint loader and " + _USE
    if has(r"image_proj_model\.") or has(r"adapter_modules\."):
        return "the training state of an IP-Adapter, not its exported file: export it first, or " + _USE
    if has(r"ip_adapter\.\d+\.to_[qkv](_ip)?_lora|ip_adapter\.\d+\.to_(q|out)_lora") or has(
        r"image_proj\.(perceiver_resampler\.|proj\.2\.)"
    ):
        if has(r"image_proj\.proj\.3\.") and not has(r"ip_adapter\.\d+\..*lora"):
            return "an IP-Adapter Full Face, which is not supported: " + _USE
        return "an IP-Adapter FaceID, which needs face embeddings and is not supported: " + _USE
    if has(r"image_proj\.proj\."):
        return "an IP-Adapter without Plus (it reads one global embedding), which is not supported: " + _USE
    if has(r"image_proj\.") and has(r"ip_adapter\."):
        proj_in = tensors.get("image_proj.proj_in.weight")
        if proj_in is not None and proj_in.ndim == 2 and proj_in.shape[1] == 512:
            return "an InstantID adapter, which reads face embeddings and is not supported: " + _USE
        return None
    if has(r"image_proj\.latents"):
        return "only half of an IP-Adapter (the cross-attention weights ip_adapter.* are missing): download it again."
    if has(r"ip_adapter\."):
        return "only half of an IP-Adapter (the weights image_proj.* are missing): download it again."
    if has(r".*lora"):
        return "a LoRA, not an encoder: load it with the LoRA loader and " + _USE
    if has(r"(vision_model|visual)\."):
        return "a CLIP vision model, not an encoder: load it with the CLIP vision loader and " + _USE
    return f"not an encoder file (its weights are {_some(tensors)}): " + _USE


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"
