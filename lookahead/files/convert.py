"""Conversion between encoder files: stock IP-Adapter Plus, the authors' published checkpoint, our own format.

The published checkpoint (`model_ckpt.pt` of the paper's code) is the state dict of a module that holds a whole copy of
SDXL, of the image encoder, and under other names the weights that were trained. It has about 14 GB, of which less than
one is wanted: the tensors stay in the file until they are used, one at a time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..method.kv_encoder import KV_ENCODER, KV_EXPORT, layers
from . import encoder_file
from .block_names import block_names, ip_adapter_key
from .encoder_file import METADATA_FIELDS, EncoderFile, EncoderFileError
from .tensors import read_tensors, sha256, write_tensors

__all__ = ["ENCODER", "IP_ADAPTER", "PRECISIONS", "PublishedNames", "convert", "read_any"]

ENCODER, IP_ADAPTER = "encoder", "ip-adapter"  # what a file is converted to: our own format, the public one
AS_STORED = "as stored"
PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, AS_STORED: None}

SAME_BASE = 3e-3  # relative rms difference: above the rounding of a copy in 16 bit, far below that of a fine-tune

_BLOCK = r"(?P<block>(?:(?:down|up)_blocks\.\d+|mid_block)\.attentions\.\d+\.transformer_blocks\.\d+)"
_LOW_RANK = re.compile(rf"{_BLOCK}\.(?P<layer>attn[12]\.(?:to_[qkv]|to_out\.0))\.lora_layer\.(?P<half>down|up)\.weight")
_EXPORT = re.compile(rf"{_BLOCK}\.extract_kv1\.(?P<layer>to_[kv])\.lora_layer\.(?P<half>down|up)\.weight")
_EXPORT_BASE = re.compile(rf"{_BLOCK}\.extract_kv1\.(?P<layer>to_[kv])\.weight")
_IP = re.compile(rf"{_BLOCK}\.extract_kv2\.to_(?P<which>[kv])\.weight")
_ALIAS = re.compile(rf"{_BLOCK}\.extract_kv[12]\.source_attention_block\.")
_HALF = {"down": "A", "up": "B"}


@dataclass(frozen=True)
class PublishedNames:
    """Which weight of a published checkpoint is which; every value is a name in that file.

    image_proj: by the Resampler's parameter name; ip_adapter: (to_k, to_v) a cross-attention in the order of
    `block_names`; kv: by the encoder file's name; export: the whole projections that the export's low-rank weights are
    added to, by layer ("kv_export.<block>.attn1.to_k"); copy: SDXL's own weights, by diffusers' name.
    """

    blocks: tuple[str, ...]
    image_proj: dict[str, str]
    ip_adapter: list[tuple[str, str]]
    kv: dict[str, str]
    export: dict[str, str]
    copy: dict[str, str]

    @classmethod
    def find(cls, names: Iterable[str], file: str) -> PublishedNames:
        """Sort a file's names; `file` is its own. Raises EncoderFileError for strange or missing ones."""
        image_proj, ip, kv, export, copy, unknown = {}, {}, {}, {}, {}, []
        for full in names:
            name = full.removeprefix("module.")  # as DistributedDataParallel saves
            if name.startswith("image_proj_model."):
                image_proj[name.removeprefix("image_proj_model.")] = full
            elif name.startswith("encoder_unet."):
                name = name.removeprefix("encoder_unet.")
                if match := _LOW_RANK.fullmatch(name):
                    kv[f"kv_encoder.{match['block']}.{match['layer']}.lora_{_HALF[match['half']]}.weight"] = full
                elif match := _EXPORT.fullmatch(name):
                    kv[f"kv_export.{match['block']}.attn1.{match['layer']}.lora_{_HALF[match['half']]}.weight"] = full
                elif match := _EXPORT_BASE.fullmatch(name):
                    export[f"kv_export.{match['block']}.attn1.{match['layer']}"] = full
                elif match := _IP.fullmatch(name):
                    ip[match["block"], match["which"]] = full
                elif not _ALIAS.match(name) and not name.startswith("embedding_prediction_head."):
                    copy[name] = full
            elif not name.startswith("image_encoder."):
                unknown.append(full)
        if unknown:
            raise EncoderFileError(
                f"{file} has weights that a checkpoint of the paper's code does not have ({', '.join(unknown[:3])}): "
                "it is of another kind."
            )
        blocks = tuple(sorted({block for block, _ in ip}, key=_order))
        wanted = [f"encoder_unet.{b}.extract_kv2.to_{which}.weight" for b in blocks for which in "kv"]
        wanted += [f"encoder_unet.{b}.extract_kv1.to_{which}.weight" for b in blocks for which in "kv"]
        missing = [name for name in wanted if name not in names and f"module.{name}" not in names]
        if missing or not any(block.startswith("up") for block in blocks):
            what = missing[0] if missing else "encoder_unet.up_blocks.<block>.extract_kv2.to_k.weight"
            raise EncoderFileError(
                f"{file}: the weight {what} is missing, which a checkpoint of the paper's code has in every block: the "
                "file is incomplete; download it again."
            )
        return cls(blocks, image_proj, [(ip[b, "k"], ip[b, "v"]) for b in blocks], kv, export, copy)


def _order(block: str) -> tuple[int, ...]:
    """Place of a block among all: down, up, middle, as the public files count."""
    return ("dum".index(block[0]), *(int(n) for n in re.findall(r"\d+", block)))


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str = ENCODER,
    base: str | os.PathLike[str] | None = None,
    precision: str = "float16",
) -> str:
    """Convert an encoder file and return what was done, a line each.

    source: our own format, a stock IP-Adapter Plus, or the authors' published checkpoint; target: a .safetensors file
    that does not exist yet; to: ENCODER (our own format) or IP_ADAPTER (the public one: the image prompt alone, which
    other packs and diffusers load); base: SDXL's checkpoint or diffusers UNet (.safetensors), which a published
    checkpoint's own copy of SDXL is compared with; precision: one of PRECISIONS, of the weights that are written.
    Raises EncoderFileError, one sentence, where the source is not such a file or was made for another base, and where
    the target exists.
    """
    source, target = Path(source), Path(target)
    if to not in (ENCODER, IP_ADAPTER):
        raise EncoderFileError(f"An encoder file is converted to {ENCODER!r} or {IP_ADAPTER!r}, not to {to!r}.")
    if precision not in PRECISIONS:
        raise EncoderFileError(f"The precision is {precision!r}, and known are {', '.join(PRECISIONS)}.")
    if target.suffix != ".safetensors":
        raise EncoderFileError(f"{target.name} is no name of an encoder file: let it end in .safetensors.")
    if target.exists():
        raise EncoderFileError(f"{target.name} exists already: choose another name, or remove it first.")
    if not target.parent.is_dir():
        raise EncoderFileError(f"There is no folder {target.parent} for {target.name}: make it first.")
    file, notes = read_any(source, base, PRECISIONS[precision])
    if to == ENCODER:
        metadata = {k: v for k, v in file.metadata.items() if k in METADATA_FIELDS or k.startswith("modelspec.")}
        anew = ("format", "format_version", "tokens")
        metadata = {k: v for k, v in metadata.items() if k not in anew}
        encoder_file.write(target, file.image_proj, file.ip_adapter, metadata, file.kv)
    else:
        write_ip_adapter(target, file)
        if file.kv:
            notes.append("left out: the KV encoder, which IP-Adapter files have no place for")
    return "\n".join([encoder_file.provenance(encoder_file.read(target)), *notes])


def write_ip_adapter(path: str | os.PathLike[str], file: EncoderFile) -> None:
    """Write the image prompt of an encoder file as a stock IP-Adapter Plus (.safetensors), with its provenance."""
    tensors = encoder_file.image_prompt_tensors(file.image_proj, file.ip_adapter)
    metadata = {k: v for k, v in file.metadata.items() if k not in ("format", "format_version")}
    write_tensors(path, {k: v.contiguous() for k, v in tensors.items()}, metadata)


def read_any(
    path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, dtype: torch.dtype | None = None
) -> tuple[EncoderFile, list[str]]:
    """Read an encoder file of any kind that is known, with what is to be said about it.

    base: as in `convert`; dtype: of the weights, None as they are stored. Errors as in `encoder_file.read`.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path, mapped=True)
    notes: list[str] = []
    if any(re.match(r"(module\.)?encoder_unet\.", name) for name in tensors):
        tensors, metadata, notes = _published(tensors, path.name, base, dtype)
    elif dtype is not None:
        tensors = {k: _cast(v, dtype) for k, v in tensors.items()}
    return encoder_file.from_tensors(tensors, metadata, path.name), notes


def _cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Only between the kinds that encoder files hold: what else there is must be refused as it stands."""
    if dtype is None or value.dtype not in encoder_file.DTYPES or value.is_meta or value.layout != torch.strided:
        return value
    return value.to(dtype)


def _published(
    tensors: Mapping[str, Tensor], name: str, base: str | os.PathLike[str] | None, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """The weights of a published checkpoint under the encoder file's names, metadata, and notes."""
    names = PublishedNames.find(tensors, name)
    metadata = {
        "format": encoder_file.FORMAT,
        "format_version": encoder_file.FORMAT_VERSION,
        "base_model": "stable-diffusion-xl-base-1.0",
        "kv_prompt": encoder_file.DEFAULT_KV_PROMPT,
        "size": "1024",
        "config": f"converted from {name}, a checkpoint of the paper's own code",
    }
    if base is None:
        notes = ["its own copy of SDXL was not compared with a checkpoint: name one as the base to have that checked"]
    else:
        compared = _compare(tensors, names, name, Path(base))
        metadata |= {"base_model": Path(base).name, "base_model_hash": sha256(base)}
        notes = [f"its own copy of SDXL is that of {Path(base).name} ({compared} weights compared)"]
    renamed = {f"image_proj.{k}": tensors[v] for k, v in names.image_proj.items()}
    for n, (k, v) in enumerate(names.ip_adapter):
        renamed |= {ip_adapter_key(n, "k"): tensors[k], ip_adapter_key(n, "v"): tensors[v]}
    renamed |= (kv := _kv(tensors, names, name, notes))
    ranks = sorted({value.shape[0] for key, value in kv.items() if key.endswith("lora_A.weight")})
    if ranks:
        metadata["kv_rank"] = ", ".join(map(str, ranks))
    return {k: _cast(v, dtype) for k, v in renamed.items()}, metadata, notes


def _kv(tensors: Mapping[str, Tensor], names: PublishedNames, file: str, notes: list[str]) -> dict[str, Tensor]:
    """The KV encoder's low-rank weights. Where the export's whole projections were trained, as the paper's code does
    without LoRA, their change is written as a product too, of full rank: identity times change, added exactly."""
    kv = {key: tensors[full] for key, full in names.kv.items()}
    whole = 0
    for layer, full in names.export.items():
        base = layer.removeprefix("kv_export.") + ".weight"
        if base not in names.copy:
            raise EncoderFileError(
                f"{file}: the weight encoder_unet.{base} is missing, which the exported projection is compared with: "
                "the file is incomplete; download it again."
            )
        trained, frozen = tensors[full], tensors[names.copy[base]]
        if {trained.dtype, frozen.dtype} - set(encoder_file.DTYPES):
            raise EncoderFileError(
                f"{file}: {full} or what it was made of is stored as {trained.dtype} and {frozen.dtype}, and 32 or 16 "
                "bit are needed to compare them: use the original, unquantised file."
            )
        if trained.shape != frozen.shape:
            raise EncoderFileError(
                f"{file}: {full} has shape {list(trained.shape)} where {list(frozen.shape)} fits the rest of the file: "
                "it is damaged."
            )
        if torch.equal(trained, frozen):
            continue
        whole += 1
        change = trained.float() - frozen.float()
        a, b = [change], [torch.eye(len(change))]
        if f"{layer}.lora_A.weight" in kv:
            a.append(kv[f"{layer}.lora_A.weight"].float())
            b.append(kv[f"{layer}.lora_B.weight"].float())
        kv[f"{layer}.lora_A.weight"], kv[f"{layer}.lora_B.weight"] = torch.cat(a), torch.cat(b, dim=1)
    if whole:
        notes.append(f"{whole} exported projections were trained whole: their change is kept at full rank")
    if not any(value.any() for key, value in kv.items() if key.endswith("lora_B.weight")):
        notes.append("its KV encoder is untrained (all changes are zero) and was left out: injection works without")
        return {}
    return kv | _untuned(names, kv, tensors)


def _untuned(names: PublishedNames, kv: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for a half that the paper's code left untuned (rank 0): an encoder file's KV encoder is whole."""
    out = {}
    has_encoder = any(key.startswith(KV_ENCODER) for key in kv)  # what is missing of it is found in the file's check
    for half, path, projection in layers(names.blocks):
        layer, base = f"{half}.{path}.{projection}", f"{path}.{projection}.weight"
        if (half == KV_EXPORT or not has_encoder) and f"{layer}.lora_A.weight" not in kv and base in names.copy:
            rows, columns = tensors[names.copy[base]].shape
            out[f"{layer}.lora_A.weight"], out[f"{layer}.lora_B.weight"] = torch.zeros(1, columns), torch.zeros(rows, 1)
    return out


def _compare(tensors: Mapping[str, Tensor], names: PublishedNames, file: str, base: Path) -> int:
    """Compare the transformer blocks of the file's copy of SDXL with the base's, and return how many weights.

    base: one file with the host's names (`model.diffusion_model.*`) or a diffusers UNet.
    """
    weights, _ = read_tensors(base, mapped=True)
    prefix = "model.diffusion_model."
    if any(key.startswith(prefix) for key in weights):
        # The layout does not depend on the depth, so the deepest that there is gives names to all.
        folder = {"input": "input_blocks.{}.1", "output": "output_blocks.{}.1", "middle": "middle_block.1"}
        hosts = {n.diffusers: n.host for n in block_names((16, 16, 16), 16)}
        base_names = {}
        for ours in names.copy:
            match = re.match(_BLOCK, ours)
            if match:
                group, block, index = hosts[match["block"]]
                path = f"{prefix}{folder[group].format(block)}.transformer_blocks.{index}"
                base_names[ours] = path + ours[match.end() :]
    else:
        base_names = {ours: ours for ours in names.copy if re.match(_BLOCK, ours)}
    if not base_names or not any(key in weights for key in base_names.values()):
        raise EncoderFileError(
            f"{base.name} is no SDXL checkpoint to compare {file} with: give sd_xl_base_1.0.safetensors or the "
            "safetensors file of a diffusers UNet."
        )
    for ours, key in base_names.items():
        a = tensors[names.copy[ours]].float()
        b = weights[key].float() if key in weights else None
        if b is None or a.shape != b.shape or not (a - b).norm() <= SAME_BASE * b.norm():  # (also of NaN)
            raise EncoderFileError(
                f"{file} was trained on another base model than {base.name}: its copy of {ours} differs; give the "
                "checkpoint that it was trained on."
            )
    return len(base_names)
