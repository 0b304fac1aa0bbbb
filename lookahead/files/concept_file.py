"""Two file formats of concepts (`method.concept`): the encoder that predicts them, and one concept that was tuned.

Both are safetensors. A concept also leaves as stock files that any tool loads: a LoRA under the public names, and an
embedding with the keys `clip_l` and `clip_g`. Those are the concept alone, without the second attention path.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ..method.concept import NEAR, PROJECTIONS, Concept, ConceptEncoder, ConceptSizes, Offsets
from .atomic import first_line
from .metadata import LARGEST_SIZE, stated
from .tensors import LARGEST, EncoderFileError, check_numbers, read_tensors, write_tensors

ENCODER_FORMAT, CONCEPT_FORMAT, VERSION = "lcm-lookahead-concept-encoder", "lcm-lookahead-concept", "1"
VOCABULARY = 49408  # of CLIP
_BLOCK = r"(?:(?:down|up)_blocks\.\d+|mid_block)\.attentions\.\d+\.transformer_blocks\.\d+"
_NAME = re.compile(rf"{_BLOCK}\.(?:{'|'.join(map(re.escape, PROJECTIONS))})")


def _checked(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Tensors, metadata and name of a file of this kind, without numbers that are not finite."""
    tensors, metadata = read_tensors(path)
    name = Path(path).name
    other = {ENCODER_FORMAT: "concept encoder", CONCEPT_FORMAT: "concept"}
    if metadata.get("format") != kind:
        found = other.get(metadata.get("format", ""), "file of another kind")
        raise EncoderFileError(f"{name} is a {found}, and a {other[kind]} is needed: choose another file.")
    if metadata.get("format_version") != VERSION:
        raise EncoderFileError(
            f"{name} has {other[kind]} format version {stated(metadata, 'format_version')}, and this version of the "
            f"pack reads {VERSION}: update the pack."
        )
    check_numbers(tensors, name, LARGEST)
    return tensors, metadata, name


# --- a concept


def write_concept(path: str | os.PathLike[str], concept: Concept) -> None:
    """Write a concept in 16 bit (9 MB for SDXL at rank 4). Raises EncoderFileError where it cannot be written."""
    tensors = {"token.L": concept.word_l, "token.G": concept.word_g}
    for name, (a, b) in concept.offsets.items():
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    metadata = {
        **concept.about,
        "format": CONCEPT_FORMAT,
        "format_version": VERSION,
        "word": concept.word,
        "word_id": str(concept.word_id),
        "blend": repr(float(concept.blend)),
    }
    write_tensors(path, {k: v.detach().half().cpu().contiguous() for k, v in tensors.items()}, metadata)


def read_concept(path: str | os.PathLike[str]) -> Concept:
    """Read and check a concept, in float32. Raises EncoderFileError, one sentence, for what is none or is damaged."""
    tensors, metadata, name = _checked(path, CONCEPT_FORMAT)
    words = [tensors.pop(key, torch.empty(0)).float() for key in ("token.L", "token.G")]
    offsets: Offsets = {}
    for key in sorted(tensors):
        layer, _, half = key.partition(".lora_")
        a, b = tensors.get(f"{layer}.lora_A.weight"), tensors.get(f"{layer}.lora_B.weight")
        named = half in ("A.weight", "B.weight") and _NAME.fullmatch(layer)
        if not named or a is None or b is None or not a.ndim == b.ndim == 2 or a.shape[0] != b.shape[1]:
            raise EncoderFileError(f"{name} has a weight that is not part of a concept ({key}): make it again.")
        offsets[layer] = (a.float(), b.float())
    try:
        word_id, blend = int(metadata["word_id"]), float(metadata["blend"])
        whole = (
            all(w.ndim == 1 and len(w) for w in words)
            and 0 <= blend <= 1
            and 0 <= word_id < VOCABULARY
            and metadata["word"]
        )
    except (KeyError, ValueError):
        whole = False
    if not whole:
        raise EncoderFileError(f"{name} lacks its word or its blend: it is damaged; make or download it again.")
    _check_settings(metadata, name)
    _check_near(metadata, name)
    own = ("format", "format_version", "word", "word_id", "blend")
    about = {k: v for k, v in metadata.items() if k not in own}
    return Concept(words[0], words[1], metadata["word"], word_id, offsets, blend, about)


def stock_lora(offsets: Offsets) -> dict[str, Tensor]:
    """The offsets under the names of the public LoRA files (`lora_unet_<path>.lora_down.weight` ...), alpha = rank."""
    out = {}
    for name, (a, b) in offsets.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        out[f"{key}.lora_down.weight"], out[f"{key}.lora_up.weight"] = a, b
        out[f"{key}.alpha"] = torch.tensor(float(len(a)))
    return out


def write_stock(
    folder: str | os.PathLike[str], name: str, concept: Concept, embeddings: str | os.PathLike[str] | None = None
) -> tuple[Path, Path]:
    """Write `<name>_lora.safetensors` and `<name>_embedding.safetensors`; returns both paths.

    embeddings: the folder of the second, where it is another.

    In a prompt the embedding's name stands for the concept. It is what blend 1 draws: the second path stays behind.
    """
    lora = Path(folder) / f"{name}_lora.safetensors"
    embedding = Path(folder if embeddings is None else embeddings) / f"{name}_embedding.safetensors"
    half = {
        k: v.detach().half().contiguous() if "lora_" in k.rpartition(".")[0] else v
        for k, v in stock_lora(concept.offsets).items()
    }
    write_tensors(lora, half, {"ss_base_model_version": "sdxl_base_v1-0", **concept.about})
    words = {"clip_l": concept.word_l[None], "clip_g": concept.word_g[None]}
    write_tensors(embedding, {k: v.detach().float().contiguous() for k, v in words.items()}, dict(concept.about))
    return lora, embedding


# --- the encoder


def write_concept_encoder(
    path: str | os.PathLike[str], encoder: ConceptEncoder, words: Mapping[int, str], about: Mapping[str, str]
) -> None:
    """Write a concept encoder in 16 bit. words: the dictionary, token id -> text, whose rows come from the base's own
    text encoders; about: where it comes from. Raises EncoderFileError where the place cannot be written."""
    tensors = {k: v.detach().half().cpu().contiguous() for k, v in encoder.state_dict().items()}
    tensors["dictionary"] = torch.tensor(list(words), dtype=torch.int32)
    metadata = {**about, "format": ENCODER_FORMAT, "format_version": VERSION, "words": "\n".join(words.values())}
    write_tensors(path, tensors, metadata)


def read_concept_encoder(
    path: str | os.PathLike[str], operations: ModuleType = torch.nn
) -> tuple[ConceptEncoder, dict[int, str], dict[str, str]]:
    """A concept encoder, its dictionary (token id -> text) and its metadata. The sizes follow from the shapes.

    Raises EncoderFileError, one sentence, for a file that is none, is damaged or has other weights than its sizes ask
    for.
    """
    tensors, metadata, name = _checked(path, ENCODER_FORMAT)
    ids = tensors.pop("dictionary", torch.empty(0))
    texts = metadata.pop("words", "").split("\n")
    try:
        sizes = _sizes(tensors)
        with torch.device("meta"):
            encoder = ConceptEncoder(sizes, operations)
        encoder.load_state_dict({k: v.float() for k, v in tensors.items()}, assign=True)
    except (KeyError, IndexError, ValueError, RuntimeError, TypeError) as error:  # (TypeError: the length of a number)
        raise EncoderFileError(
            f"{name} is not a whole concept encoder ({first_line(error)}): download it again."
        ) from error
    words = dict(zip(ids.flatten().tolist(), texts, strict=False))
    if ids.is_floating_point() or len(words) != ids.numel() or len(words) != len(texts) or not all(texts):
        raise EncoderFileError(
            f"{name} has a dictionary of {ids.numel()} ids and {len(texts)} words, and one word for each of different "
            "whole numbers is needed: download it again."
        )
    _check_settings(metadata, name)
    return encoder.eval().requires_grad_(False), words, metadata


def _check_settings(metadata: Mapping[str, str], name: str) -> None:
    """Raise EncoderFileError for a side of the picture, a blend or a tuning that cannot be used as they stand."""
    size, blend = metadata.get("size", "1024"), metadata.get("blend", "0.25")
    try:
        sensible = size.isdecimal() and len(size) < 9 and 8 <= int(size) <= LARGEST_SIZE and 0 <= float(blend) <= 1
    except ValueError:
        sensible = False
    if not sensible:
        raise EncoderFileError(
            f"{name} states the size {stated(metadata, 'size')} and the blend {stated(metadata, 'blend')}, and 8 to "
            f"{LARGEST_SIZE} pixels and 0 to 1 are possible: download it again."
        )
    try:
        tuning = json.loads(metadata.get("tuning", "{}"))
        sensible = isinstance(tuning, dict) and all(isinstance(value, int | float) for value in tuning.values())
    except (ValueError, RecursionError):
        sensible = False
    if not sensible:
        raise EncoderFileError(
            f"{name} states the tuning {stated(metadata, 'tuning')}, and numbers by name are needed: download it again."
        )


def _check_near(metadata: Mapping[str, str], name: str) -> None:
    """Raise EncoderFileError for near words that are none."""
    try:
        near = json.loads(metadata.get("near", "[]"))
        sensible = isinstance(near, list) and len(near) <= NEAR
        sensible &= all(0 <= int(token) < VOCABULARY and isinstance(text, str) and text for token, text in near)
    except (ValueError, TypeError, RecursionError, OverflowError):
        sensible = False
    if not sensible:
        raise EncoderFileError(
            f"{name} states the near words {stated(metadata, 'near')}, and at most {NEAR} pairs of a token of CLIP and "
            "its text are possible: make it again."
        )


def _sizes(tensors: Mapping[str, Tensor]) -> ConceptSizes:
    keys = [key.removeprefix("basis_a.") for key in tensors if key.startswith("basis_a.")]
    if strange := [key for key in keys if not _NAME.fullmatch(key.replace("/", "."))]:
        raise ValueError(f"{strange[0]} is no attention projection of SDXL")
    # Without a basis the encoder predicts words alone.
    basis, rank, _ = tensors[f"basis_a.{keys[0]}"].shape if keys else (1, 1, 0)
    projections = {
        key.replace("/", "."): (tensors[f"basis_a.{key}"].shape[2], tensors[f"basis_b.{key}"].shape[1]) for key in keys
    }
    return ConceptSizes(
        projections,
        image_width=len(tensors["norm_image.weight"]),
        unet_width=len(tensors.get("norm_unet.weight", ())),
        hidden=len(tensors["trunk.0.bias"]),
        word_l=len(tensors["head_l.bias"]),
        word_g=len(tensors["head_g.bias"]),
        rank=rank,
        basis=basis,
    )
