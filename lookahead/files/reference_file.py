"""The reference file: a person (or thing) as it was read from pictures, without the pictures.

One .safetensors of one subject or several, numbered from 0: image-prompt tokens, latents with their mask and prompt for
KV injection, face embeddings where they are known. Keys and values are not in it: the encoder makes them of the tokens
again, to the same bits, so the file names the encoder and a mark of its weights. Reading is as strict as of encoders.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .metadata import stated
from .tensors import LARGEST, EncoderFileError, check_numbers, read_tensors, write_tensors

FORMAT, VERSION = "lcm-lookahead-reference", "1"
MOST_SUBJECTS = 64
LARGEST_WEIGHT = 100
_KEY = re.compile(r"(0|[1-9]\d?)\.([a-z_]+)")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class ReferenceFileError(ValueError):
    """Says what is wrong with a reference file, in one sentence for the user."""


@dataclass(frozen=True, eq=False)
class SavedSubject:
    """One subject as a file holds it; what was not read is None or empty.

    tokens, null_tokens: of the image prompt, [rows, n, width] and [1, n, width]; latents: [pictures, 4, h, w] as the
    VAE gave them; mask: [pictures, 8 h, 8 w] in [0, 1], what counts of each picture; kv_text, kv_pooled: the
    reference's own prompt, [1, n, width] and [1, width]; face: unit vectors of a recogniser, [pictures, d];
    encoder, encoder_mark: name of the encoder file and `weights_mark` of its weights; recogniser: of `face`;
    one_each: picture i is for image i of a batch; weight: how strongly the subject acts, negative to subtract it.
    """

    tokens: Tensor | None = None
    null_tokens: Tensor | None = None
    latents: Tensor | None = None
    mask: Tensor | None = None
    kv_text: Tensor | None = None
    kv_pooled: Tensor | None = None
    face: Tensor | None = None
    encoder: str = ""
    encoder_mark: str = ""
    recogniser: str = ""
    one_each: bool = False
    weight: float = 1.0

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it has, by the names of its fields."""
        return {name: value for name in TENSORS if (value := getattr(self, name)) is not None}

    @property
    def settings(self) -> dict[str, Any]:
        """All that is no tensor, by the names of its fields."""
        return {name: getattr(self, name) for name in SETTINGS}


SETTINGS: dict[str, type] = {
    "encoder": str,
    "encoder_mark": str,
    "recogniser": str,
    "one_each": bool,
    "weight": float,
}
TENSORS = tuple(field.name for field in fields(SavedSubject) if field.name not in SETTINGS)
_DIMENSIONS = {"tokens": 3, "null_tokens": 3, "latents": 4, "mask": 3, "kv_text": 3, "kv_pooled": 2, "face": 2}


def weights_mark(weights: Iterable[tuple[str, Tensor]]) -> str:
    """A short mark by which a set of weights is known again: of names, shapes and the first values of each tensor.

    It tells files of other trainings apart in milliseconds; it is no protection against forgery.
    """
    digest = hashlib.sha256()
    for name, value in sorted(weights, key=lambda item: item[0]):
        digest.update(f"{name} {list(value.shape)} ".encode())
        digest.update(value.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def write(path: str | os.PathLike[str], subjects: Sequence[SavedSubject], about: str = "") -> None:
    """Write subjects as a file: checked first, then written beside its place and renamed into it.

    about: what the author says of it (who it is, where the pictures are from, what may be done with it).
    Raises ReferenceFileError where `read` would not accept the result or the place cannot be written.
    """
    path = Path(path)
    tensors = {
        f"{number}.{name}": value.detach().float().cpu().contiguous()
        for number, subject in enumerate(subjects)
        for name, value in subject.tensors.items()
    }
    settings = [subject.settings for subject in subjects]
    metadata = {"format": FORMAT, "format_version": VERSION, "about": about, "subjects": json.dumps(settings)}
    from_tensors(tensors, metadata, path.name)
    try:
        write_tensors(path, tensors, metadata)
    except EncoderFileError as error:
        raise ReferenceFileError(str(error)) from error


def read(path: str | os.PathLike[str]) -> tuple[list[SavedSubject], str]:
    """Read and check a reference file: its subjects, in float32, and what the author says of it.

    Raises ReferenceFileError, one sentence, for a file that is missing, cut short, of another kind, or that holds
    tensors that do not fit together or are not finite.
    """
    path = Path(path)
    try:
        tensors, metadata = read_tensors(path)
    except EncoderFileError as error:
        raise ReferenceFileError(str(error)) from error
    return from_tensors(tensors, metadata, path.name), metadata.get("about", "")


def from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], name: str) -> list[SavedSubject]:
    """Check flat tensors as they stand in a file. `name` is used in messages only; errors as in `read`."""
    if metadata.get("format") != FORMAT:
        raise ReferenceFileError(
            f"{name} is no reference file: choose one that Save Lookahead Reference has written (for an encoder "
            "there is Load Lookahead Encoder)."
        )
    if metadata.get("format_version") != VERSION:
        raise ReferenceFileError(
            f"{name} has reference format version {stated(metadata, 'format_version')}, and this version of the pack "
            f"reads {VERSION}: update the pack."
        )
    settings = _settings(metadata.get("subjects", ""), name)
    parts: list[dict[str, Any]] = [dict(own) for own in settings]
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if not match or match[2] not in TENSORS or int(match[1]) >= len(parts):
            raise ReferenceFileError(
                f"{name} holds {key}, which is not part of a reference of {len(parts)} subjects: it is damaged, or was "
                "written by a newer version of the pack."
            )
        parts[int(match[1])][match[2]] = _values(key, match[2], value, name)
    subjects = [SavedSubject(**part) for part in parts]
    for subject in subjects:
        _check(subject, name)
    return subjects


def provenance(subjects: Sequence[SavedSubject], about: str, name: str) -> str:
    """Describes a file, its author's words first and then a line for each subject."""
    lines = [f"{name}: {len(subjects)} subject{'s' if len(subjects) != 1 else ''}"]
    lines.append(f"about: {about.strip()}" if about.strip() else "about: its author says nothing")
    for number, subject in enumerate(subjects):
        parts = []
        if subject.tokens is not None:
            rows, tokens, _ = subject.tokens.shape
            parts.append(f"image prompt of {tokens} tokens" + (f" for each of {rows} pictures" if rows > 1 else ""))
        if subject.latents is not None:
            pictures, _, height, width = subject.latents.shape
            masked = ", masked" if subject.mask is not None else ""
            parts.append(f"latents of {pictures} pictures of {8 * width}x{8 * height}{masked} (they can be decoded)")
        if subject.face is not None:
            parts.append(f"face embedding by {subject.recogniser or 'an unnamed recogniser'}")
        parts.append(f"read with {subject.encoder}" if subject.encoder else "read without an encoder")
        weight = "" if subject.weight == 1 else f", weight {subject.weight:g}"
        lines.append(f"subject {number}{weight}: " + "; ".join(parts))
    return "\n".join(lines)


def _settings(text: str, name: str) -> list[dict[str, Any]]:
    """The settings of every subject out of the metadata's JSON."""
    try:
        listed = json.loads(text)
    except (ValueError, RecursionError):
        listed = None
    whole = isinstance(listed, list) and 1 <= len(listed) <= MOST_SUBJECTS
    if whole:
        for own in listed:
            known = isinstance(own, dict) and own.keys() == SETTINGS.keys()
            whole = (
                whole
                and known
                and all(isinstance(own[k], (int, float) if t is float else t) for k, t in SETTINGS.items())
            )
    if not whole:
        raise ReferenceFileError(
            f"{name} does not say which subjects it holds (1 to {MOST_SUBJECTS}, with {', '.join(SETTINGS)}): it is "
            "damaged; ask for another copy."
        )
    if any(not abs(own["weight"]) <= LARGEST_WEIGHT for own in listed):  # (NaN is not)
        raise ReferenceFileError(
            f"{name} has a subject whose weight is no finite number up to {LARGEST_WEIGHT}: ask for another copy."
        )
    return [{**own, "weight": float(own["weight"])} for own in listed]


def _values(key: str, field: str, value: Tensor, name: str) -> Tensor:
    if value.dtype not in _DTYPES or value.ndim != _DIMENSIONS[field] or not value.numel():
        raise ReferenceFileError(
            f"{name}: {key} is {value.dtype} of shape {list(value.shape)}, and floating-point numbers in "
            f"{_DIMENSIONS[field]} dimensions are expected: it is damaged; ask for another copy."
        )
    try:
        check_numbers({key: value}, name, LARGEST)
    except EncoderFileError as error:
        raise ReferenceFileError(str(error)) from error
    return value.float()


def _check(subject: SavedSubject, name: str) -> None:
    """Raise ReferenceFileError where the tensors of a subject do not belong together."""

    def shape(field: str) -> list[int] | None:
        value = getattr(subject, field)
        return None if value is None else list(value.shape)

    def refuse(field: str, expected: str) -> None:
        raise ReferenceFileError(
            f"{name}: {field} of a subject has shape {shape(field)}, and {expected} is expected beside the rest: it is "
            "damaged or was put together from two files; ask for another copy."
        )

    tokens, latents, text = shape("tokens"), shape("latents"), shape("kv_text")
    if tokens is None and latents is None:
        raise ReferenceFileError(
            f"{name} has a subject with neither tokens nor latents, which nothing can be drawn from: save it again."
        )
    if (tokens is None) != (subject.null_tokens is None) or (tokens and shape("null_tokens") != [1, *tokens[1:]]):
        refuse("null_tokens", str([1, *tokens[1:]] if tokens else None))
    if tokens and not subject.encoder_mark:
        raise ReferenceFileError(f"{name} does not say which encoder its tokens are from: save it again.")
    if latents and latents[1] != 4:
        refuse("latents", "[pictures, 4, height, width]")
    if subject.mask is not None:
        pictures, height, width = subject.mask.shape
        if latents is None or [pictures, height // 8, width // 8] != [latents[0], *latents[2:]]:
            refuse("mask", "eight pixels a side for each of the latents")
        if bool((subject.mask < 0).any() | (subject.mask > 1).any()) or not bool((subject.mask > 0).any()):
            raise ReferenceFileError(f"{name} has a mask outside 0 to 1, or one that leaves nothing: save it again.")
    if text and (latents is None or text[0] != 1):
        refuse("kv_text", "[1, tokens, width] beside latents")
    if subject.kv_pooled is not None and (text is None or subject.kv_pooled.shape[0] != 1):
        refuse("kv_pooled", "[1, width] beside kv_text")
