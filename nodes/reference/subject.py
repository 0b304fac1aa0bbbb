"""A LOOKAHEAD_REFERENCE carries the subjects that were read from reference pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .kv_cache import KVCache

if TYPE_CHECKING:
    from .encoder import LoadedEncoder


@dataclass(frozen=True, eq=False)
class Subject:
    """One person (or thing), known from one or several pictures, and all that is derived from these.

    encoder: what read the pictures, or None (KV injection without training needs none).
    pixels: [pictures, size, size, 3] in [0, 1], shorter side resized and centre-cropped; None where the subject comes
        from a file, which holds no picture.
    mask: [pictures, size, size] in [0, 1], the part of each picture that counts, or None for all of it.
    keys_values, null_keys_values: the image prompt behind the projections of every cross-attention, packed as
        `LoadedEncoder.keys_values` says, [rows, tokens, channels] and [1, tokens, channels] on the intermediate device.
        One row holds for every picture of a batch; several rows go one to each picture, in turn. None without encoder.
    latents: [pictures, 4, size / 8, size / 8] as the VAE gives them, or None without a VAE.
    kv_prompt: conditioning for the reference pass, or None.
    one_each: the first picture is for the first image of a batch, the second for the second, and so on.
    cache: what is kept of reference passes; it alone changes.
    tokens, null_tokens: what keys_values and null_keys_values were made of, [rows, tokens, context] in float32.
    face, recogniser: unit vectors of a face recogniser, [pictures, d], and its name; None and "" where not asked for.
    weight: a factor of the weight with which a node applies it; negative subtracts it.
    """

    encoder: LoadedEncoder | None
    pixels: Tensor | None
    mask: Tensor | None
    keys_values: Tensor | None
    null_keys_values: Tensor | None
    latents: Tensor | None = None
    kv_prompt: Any = None
    one_each: bool = False
    cache: KVCache = field(default_factory=KVCache)
    tokens: Tensor | None = None
    null_tokens: Tensor | None = None
    face: Tensor | None = None
    recogniser: str = ""
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Reference:
    """The value of a LOOKAHEAD_REFERENCE socket: one subject or several. It is never changed once made."""

    subjects: tuple[Subject, ...]
