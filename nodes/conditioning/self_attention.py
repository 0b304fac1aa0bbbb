"""Reference KV in one pass of the host's UNet: self-attentions also read the keys and values of the reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...lookahead.method.attention import extended_self_attention, mask_on_tokens
from .rows import RowLayout, When
from .unet_blocks import BlockKey, KVBlock, host_attention

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ..reference.kv_cache import KeysValues
    from ..reference.kv_encoder import KVNetwork
    from ..reference.subject import Subject

SHARED, FIXED = "shared", "fixed"


@dataclass(frozen=True, eq=False)
class KVInjection:
    """One reference whose keys and values join the picture's. Immutable: clones of the MODEL share it.

    blocks: the self-attentions that take part, out of all_blocks, both in the order in which the host runs them;
    weight: in (0, 1], how far the plain output moves to the extended one; noise, noise_seed: what the reference is
    noised with; cache_bytes: bound of what is kept of the passes; network: the host's handle of the KV encoder's
    low-rank weights, or None (without training);
    mask: [masks, H, W] in [0, 1], where in the picture the reference is read, or None; when: the part of the sampling.
    """

    subject: Subject
    blocks: tuple[KVBlock, ...]
    all_blocks: tuple[KVBlock, ...]
    weight: float = 1.0
    noise: str = SHARED
    noise_seed: int = 0
    cache_bytes: int = 2 << 30
    network: ModelPatcher | None = None
    mask: Tensor | None = None
    when: When = field(default_factory=When)

    @property
    def low_rank(self) -> KVNetwork | None:
        return None if self.network is None else self.network.model

    def to(self, device: torch.device) -> KVInjection:
        """A copy with its mask on a device."""
        return self if self.mask is None else replace(self, mask=self.mask.to(device))

    def grid(self, level: int) -> tuple[int, int]:
        """Height and width of the reference in tokens at a level of the UNet."""
        height, width = self.subject.latents.shape[-2:]
        return math.ceil(height / 2**level), math.ceil(width / 2**level)

    def numbers_a_row(self) -> int:
        """How many numbers a row of reference KV holds: keys and values of all blocks, of all pictures read at once."""
        pictures = 1 if self.subject.one_each else len(self.subject.latents)
        return 2 * pictures * sum(math.prod(self.grid(block.level)) * block.width for block in self.blocks)


class EstimatedRows(NamedTuple):
    """In rows of a picture: what is kept beside the picture's own rows, and the largest batch of the reference pass."""

    kept: int
    evaluated: int


def estimated_rows(model: Any, injections: tuple[KVInjection, ...], noise_shape: list[int]) -> EstimatedRows:
    """What reference KV takes, in the unit of the host's memory estimate: rows of the picture's shape."""
    dtype = model.get_dtype_inference()
    a_row = max(model.memory_required([1, *noise_shape[1:]]), 1)
    kept = evaluated = 0
    for injection in injections:
        pictures, _, *size = injection.subject.latents.shape
        shared = injection.noise == SHARED and tuple(size) == tuple(noise_shape[-2:])
        images = noise_shape[0] if shared else 1
        kept += 2 * images * injection.numbers_a_row() * dtype.itemsize
        area = math.prod(size) / math.prod(noise_shape[-2:])
        evaluated = max(evaluated, math.ceil(images * pictures * area))
    return EstimatedRows(math.ceil(kept / a_row), evaluated)


class KVRows:
    """One reference's keys and values laid out for the rows of one UNet pass. Lives as long as the pass.

    missing: the pass could not be laid out (a mask over tiles of a picture).
    """

    def __init__(self, injection: KVInjection, known: KeysValues, layout: RowLayout):
        self.injection, self._known, self.rows = injection, known, layout.rows
        self._layout = list(layout)
        self.mask = None if injection.mask is None else layout.mask(injection.mask)
        self.missing = injection.mask is not None and self.mask is None
        self._grids: dict[tuple[int, int], Tensor] = {}

    def tokens(self, key: BlockKey, like: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each row its reference's keys and values, each [tokens, channels]."""
        out = []
        for image, conditional in self._layout:
            stack = self._known[conditional][key]
            k, v = stack[image % len(stack)]
            out.append((k.to(like, non_blocking=True), v.to(like, non_blocking=True)))
        return out

    def coefficient(self, grid: tuple[int, int], like: Tensor) -> Tensor | float:
        """weight * mask for every token: a number, or [rows, tokens, 1]."""
        if self.mask is None:
            return self.injection.weight
        if grid not in self._grids:
            mask = mask_on_tokens(self.mask.to(like.device), *grid).to(like.dtype)
            self._grids[grid] = mask * self.injection.weight
        return self._grids[grid]


def replacements(
    injections: tuple[KVInjection, ...],
    known: tuple[KeysValues, ...],
    layout: RowLayout,
    attn1: dict,
    once: Callable[[str], None],
) -> dict[Any, Callable]:
    """`attn1` (the host's replacements of self-attentions) with ours where no other node's stands."""
    references = [KVRows(i, k, layout) for i, k in zip(injections, known, strict=True)]
    if any(reference.missing for reference in references):
        once(
            "another node cuts the picture into tiles, which a KV injection with a mask cannot follow: it is left out."
        )
        references = [reference for reference in references if not reference.missing]
    by_key: dict[BlockKey, list[KVRows]] = {}
    for reference in references:
        for block in reference.injection.blocks:
            by_key.setdefault(block.key, []).append(reference)
    taken = [key for key in by_key if key in attn1 or key[:2] in attn1]
    if taken:
        once(
            f"another node replaces {len(taken)} of {len(by_key)} self-attentions: these run without the reference KV."
        )
    ours = {key: self_attention(key, read, once) for key, read in by_key.items() if key not in taken}
    return {**attn1, **ours}


def self_attention(key: BlockKey, references: list[KVRows], once: Callable[[str], None]) -> Callable:
    """The replacement for one self-attention: it also reads the references' keys and values.

    References of one weight and without a mask are read together, under one softmax. A weight below 1 and a mask blend:
    out = plain + weight * mask * (extended - plain); the changes of references read apart add up.
    """
    together: dict[float, list[KVRows]] = {}
    apart: list[list[KVRows]] = []
    for reference in references:
        if reference.mask is None:
            together.setdefault(reference.injection.weight, []).append(reference)
        else:
            apart.append([reference])
    groups = [*together.values(), *apart]

    def replacement(q, k, v, extra):
        attention = host_attention(extra)
        heads, grid = extra["n_heads"], tuple(extra["activations_shape"][-2:])
        rows = references[0].rows
        tiles, rest = divmod(k.shape[0], rows)
        masked = bool(apart) and (tiles != 1 or q.shape[1] != grid[0] * grid[1])
        if rest or tiles == 0 or q.shape[0] != k.shape[0] or masked:
            once(
                "another node reshapes the tokens of some self-attentions in a way that the reference KV cannot "
                "follow: these run without it."
            )
            return attention(q, k, v, heads)

        def extended(group: list[KVRows]) -> Tensor:
            read = [reference.tokens(key, k) for reference in group]
            k_ext = [torch.cat([tokens[row][0] for tokens in read]) for row in range(rows)]
            v_ext = [torch.cat([tokens[row][1] for tokens in read]) for row in range(rows)]
            lengths = [len(row) for row in k_ext]
            if len(set(lengths)) == 1:
                # Each row was cut into tiles (as HyperTile does): all tiles of a row read the whole reference.
                k_all, v_all = (torch.stack(rows).repeat_interleave(tiles, dim=0) for rows in (k_ext, v_ext))
                return extended_self_attention(q, k, v, k_all, v_all, heads, attention=attention)
            parts = []  # masks of different sizes: every row by itself
            for row in range(rows):
                at = slice(row * tiles, (row + 1) * tiles)
                one = (t[row].expand(tiles, -1, -1) for t in (k_ext, v_ext))
                parts.append(extended_self_attention(q[at], k[at], v[at], *one, heads, attention=attention))
            return torch.cat(parts)

        if len(groups) == 1 and groups[0][0].mask is None and groups[0][0].injection.weight == 1:
            return extended(groups[0])
        plain = attention(q, k, v, heads)
        out = plain
        for group in groups:
            out = out + group[0].coefficient(grid, q) * (extended(group) - plain)
        return out

    return replacement
