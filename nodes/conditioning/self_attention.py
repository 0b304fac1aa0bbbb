"""In a pass of the host's UNet, self-attentions also read the keys and values of references."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...lookahead.method.attention import (
    adain,
    extended_self_attention,
    mask_on_tokens,
    pooled_statistics,
    with_statistics,
)
from .effect import Replacements
from .rows import RowLayout
from .unet_blocks import BlockKey, KVBlock, host_attention

if TYPE_CHECKING:
    from ..reference.kv_cache import KVByRole

NO_ADAIN, PICTURE, REFERENCE = "off", "picture to the reference", "reference to the picture"
ADAIN = (NO_ADAIN, PICTURE, REFERENCE)  # what takes over whose statistics before both are read under one softmax


class KVRows:
    """The keys and values of one reference laid out for the rows of one UNet pass. Lives as long as the pass.

    blocks: the self-attentions that read them; weights: of each, by its key (1 where it is not named); mask: [masks, H,
    W] over whole pictures, or None; adain: one of ADAIN.
    missing: the pass could not be laid out (a mask over tiles of a picture).
    """

    def __init__(
        self,
        kv: KVByRole,
        layout: RowLayout,
        blocks: Sequence[KVBlock],
        weights: Mapping[BlockKey, float] | None = None,
        mask: Tensor | None = None,
        adain: str = NO_ADAIN,
    ):
        self._kv, self.blocks, self.rows, self.adain = kv, blocks, layout.rows, adain
        self._weights = weights or {}
        self._layout = list(layout)
        self.mask = None if mask is None else layout.mask(mask)
        self.missing = mask is not None and self.mask is None
        self._grids: dict[tuple[tuple[int, int], float], Tensor] = {}

    def weight(self, key: BlockKey) -> float:
        """Says how far the plain output of a self-attention moves to the extended one."""
        return self._weights.get(key, 1.0)

    def tokens(self, key: BlockKey, like: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each row its reference's keys and values, each [tokens, channels]."""
        out = []
        for image, conditional in self._layout:
            stack = self._kv[conditional][key]
            k, v = stack[image % len(stack)][:2]
            out.append((k.to(like, non_blocking=True), v.to(like, non_blocking=True)))
        return out

    def query_statistics(self, key: BlockKey, like: Tensor) -> list[Tensor]:
        """For each row the statistics of its reference's queries, [2, channels]."""
        stacks = ((image, self._kv[conditional][key]) for image, conditional in self._layout)
        return [stack[image % len(stack)][2].to(like, non_blocking=True) for image, stack in stacks]

    def coefficient(self, key: BlockKey, grid: tuple[int, int], like: Tensor) -> Tensor | float:
        """weight * mask for every token: a number, or [rows, tokens, 1]."""
        weight = self.weight(key)
        if self.mask is None:
            return weight
        if (grid, weight) not in self._grids:
            mask = mask_on_tokens(self.mask.to(like.device), *grid).to(like.dtype)
            self._grids[grid, weight] = mask * weight
        return self._grids[grid, weight]


def replacements(references: list[KVRows], attn1: Replacements, once: Callable[[str], None]) -> Replacements:
    """`attn1` (the host's replacements of self-attentions) with ours where no other node's stands."""
    if any(reference.missing for reference in references):
        once(
            "another node cuts the picture into tiles, which a KV injection with a mask cannot follow: it is left out."
        )
        references = [reference for reference in references if not reference.missing]
    by_key: dict[BlockKey, list[KVRows]] = {}
    for reference in references:
        for block in reference.blocks:
            by_key.setdefault(block.key, []).append(reference)
    taken = [key for key in by_key if key in attn1 or key[:2] in attn1]
    if taken:
        once(
            f"another node replaces {len(taken)} of {len(by_key)} self-attentions: these run without the reference KV."
        )
    ours = {key: self_attention(key, read, once) for key, read in by_key.items() if key not in taken}
    return {**attn1, **ours}


def _take_over(own: Tensor, external: list[Tensor]) -> list[Tensor]:
    """External tokens with the statistics of the picture's own, row by row: all tiles of a row are one picture."""
    rows = own.chunk(len(external))
    return [adain(tokens, row.flatten(0, 1)) for tokens, row in zip(external, rows, strict=True)]


def self_attention(key: BlockKey, references: list[KVRows], once: Callable[[str], None]) -> Callable:
    """The replacement for one self-attention: it also reads the references' keys and values.

    References of one weight and without a mask are read together, under one softmax. Other weights and a mask blend:
    out = plain + weight * mask * (extended - plain); the changes of references read apart add up.
    """
    by_weight: dict[tuple[float, str], list[KVRows]] = {}
    masked: list[list[KVRows]] = []
    for reference in references:
        if reference.mask is None:
            by_weight.setdefault((reference.weight(key), reference.adain), []).append(reference)
        else:
            masked.append([reference])
    groups = [*by_weight.values(), *masked]

    def replacement(q, k, v, extra):
        attention = host_attention(extra)
        heads, grid = extra["n_heads"], tuple(extra["activations_shape"][-2:])
        rows = references[0].rows
        tiles, rest = divmod(k.shape[0], rows)
        mask_misfits = bool(masked) and (tiles != 1 or q.shape[1] != grid[0] * grid[1])
        if rest or tiles == 0 or q.shape[0] != k.shape[0] or mask_misfits:
            once(
                "another node reshapes the tokens of some self-attentions in a way that the reference KV cannot "
                "follow: these run without it."
            )
            return attention(q, k, v, heads)

        def extended(group: list[KVRows]) -> Tensor:
            read = [reference.tokens(key, k) for reference in group]
            k_ext = [torch.cat([tokens[row][0] for tokens in read]) for row in range(rows)]
            v_ext = [torch.cat([tokens[row][1] for tokens in read]) for row in range(rows)]
            asking, own = q, k
            if group[0].adain == REFERENCE:
                k_ext, v_ext = _take_over(k, k_ext), _take_over(v, v_ext)
            elif group[0].adain == PICTURE:
                own = torch.cat([adain(tokens, e) for tokens, e in zip(k.chunk(rows), k_ext, strict=True)])
                wanted = map(pooled_statistics, zip(*(r.query_statistics(key, q) for r in group), strict=True))
                asking = torch.cat([with_statistics(*row) for row in zip(q.chunk(rows), wanted, strict=True)])
            lengths = [len(row) for row in k_ext]
            if len(set(lengths)) == 1:
                # Each row was cut into tiles (as HyperTile does): all tiles of a row read the whole reference.
                k_all, v_all = (torch.stack(rows).repeat_interleave(tiles, dim=0) for rows in (k_ext, v_ext))
                return extended_self_attention(asking, own, v, k_all, v_all, heads, attention=attention)
            parts = []  # masks of different sizes: every row by itself
            for row in range(rows):
                at = slice(row * tiles, (row + 1) * tiles)
                one = (t[row].expand(tiles, -1, -1) for t in (k_ext, v_ext))
                parts.append(extended_self_attention(asking[at], own[at], v[at], *one, heads, attention=attention))
            return torch.cat(parts)

        if len(groups) == 1 and groups[0][0].mask is None and groups[0][0].weight(key) == 1:
            return extended(groups[0])
        plain = attention(q, k, v, heads)
        out = plain
        for group in groups:
            out = out + group[0].coefficient(key, grid, q) * (extended(group) - plain)
        return out

    return replacement
