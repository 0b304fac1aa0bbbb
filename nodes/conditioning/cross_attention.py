"""The image prompt in one pass of the host's UNet: every cross-attention also reads the reference's tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...lookahead.method.attention import image_prompt_term, mask_on_tokens
from .effect import ActiveEffect, CondEvaluation, Effect, Replacements, RunStart, UNetPass
from .rows import RowLayout, When
from .unet_blocks import BlockKey, host_attention


@dataclass(frozen=True, eq=False)
class ImagePrompt(Effect):
    """The image prompt of one subject on a MODEL.

    keys_values, null_keys_values: as in `Subject`; layout: for each cross-attention, by the host's key, the offset of
    its keys in the packed channels and its width; weight: a tensor without dimensions, since a compiled model keeps
    numbers as they were when it was compiled, and reads tensors anew; mask: [masks, H, W] in [0, 1] over the whole
    picture, or None; when: the part of the sampling in which it acts; layers: factors of the weight in some blocks.
    """

    keys_values: Tensor
    null_keys_values: Tensor
    layout: dict[BlockKey, tuple[int, int]]
    weight: Tensor
    when: When = field(default_factory=When)
    mask: Tensor | None = None
    layers: Mapping[BlockKey, float] = field(default_factory=dict)

    def to(self, device: torch.device, dtype: torch.dtype) -> ImagePrompt:
        """A copy with its tensors on a device and in a precision; itself where they are there already."""
        moved = self.keys_values.to(device, dtype)
        others = (self.weight,) if self.mask is None else (self.weight, self.mask)
        if moved is self.keys_values and all(tensor.device == moved.device for tensor in others):
            return self
        return replace(
            self,
            keys_values=moved,
            null_keys_values=self.null_keys_values.to(device, dtype),
            weight=self.weight.to(device),
            mask=None if self.mask is None else self.mask.to(device),
        )

    def begin(self, run: RunStart) -> ActiveImagePrompt:
        return ActiveImagePrompt(self.to(run.device, run.dtype))


class ActiveImagePrompt(ActiveEffect[ImagePrompt]):
    """An image prompt in one run: its term is added around what stands in each cross-attention."""

    order = 100

    def evaluate(self, evaluation: CondEvaluation) -> float:
        """The factor of its weight at this noise level."""
        return self.effect.when.factor(evaluation.timestep, evaluation.model.model_sampling)

    @classmethod
    def cross_attentions(
        cls, acting: Sequence[ActiveImagePrompt], unet_pass: UNetPass, attn2: Replacements
    ) -> Replacements:
        prompts = []
        for active in acting:
            prompt = active.effect.to(unet_pass.x.device, unet_pass.dtype)
            factor = unet_pass.evaluated.get(active, 1.0)
            prompts.append(prompt if factor == 1 else replace(prompt, weight=prompt.weight * factor))
        return replacements(prompts, unet_pass.layout, attn2, unet_pass.once)


def replacements(
    prompts: list[ImagePrompt], layout: RowLayout, attn2: Replacements, once: Callable[[str], None]
) -> Replacements:
    """`attn2` (the host's replacements of cross-attentions) with ours around whatever stands there."""
    terms = [PromptRows(p, layout) for p in prompts]
    if any(term.mask is None and term.prompt.mask is not None for term in terms):
        once(
            "another node cuts the picture into tiles, which an image prompt with a mask cannot follow: it runs "
            "without it."
        )
        terms = [term for term in terms if term.mask is not None or term.prompt.mask is None]
    for key in dict.fromkeys(key for term in terms for key in term.prompt.layout):
        inner = attn2.get(key, attn2.get(key[:2]))
        attn2[key] = cross_attention(key, inner, [term for term in terms if key in term.prompt.layout], once)
    return attn2


class PromptRows:
    """One image prompt laid out for the rows of one UNet pass. Lives as long as the pass.

    Only an index is kept for each row: keys and values of all layers for every row would be hundreds of megabytes.
    """

    def __init__(self, prompt: ImagePrompt, layout: RowLayout):
        self.prompt = prompt
        self.rows = layout.rows
        null = prompt.keys_values.shape[0]
        index = [image % null if conditional else null for image, conditional in layout]
        self.index = torch.tensor(index, device=prompt.keys_values.device)
        self.mask = None if prompt.mask is None else layout.mask(prompt.mask)
        self.grids: dict[tuple[int, int], Tensor] = {}
        # Tensors, and made here, for the reason that the weight itself is one.
        self.weights = {key: prompt.weight * factor for key, factor in prompt.layers.items()}

    def keys_values(self, channels: slice = slice(None)) -> Tensor:
        """Keys and values that each row reads, [rows, tokens, channels]: its reference's or the null tokens'."""
        known = [self.prompt.keys_values[..., channels], self.prompt.null_keys_values[..., channels]]
        return torch.cat(known).index_select(0, self.index)

    def attend(self, q: Tensor, key: BlockKey, extra: dict[str, Any], attention: Callable) -> Tensor | None:
        """weight * mask * attention to the image prompt, [rows, tokens, channels]; None where rows do not match."""
        grid = tuple(extra["activations_shape"][-2:])
        tiles = q.shape[0] // self.rows
        whole = q.shape[0] == self.rows and (self.mask is None or q.shape[1] == grid[0] * grid[1])
        tiled = self.mask is None and tiles * self.rows == q.shape[0] and tiles * q.shape[1] == grid[0] * grid[1]
        if not (whole or tiled):
            return None
        offset, width = self.prompt.layout[key]
        k, v = self.keys_values(slice(offset, offset + 2 * width)).to(q.dtype).chunk(2, dim=-1)
        v = v * self.weights.get(key, self.prompt.weight)  # attention is linear in v
        if tiles != 1:  # each row was cut into tiles (as HyperTile does): all tiles of a row see its image prompt
            k, v = k.repeat_interleave(tiles, dim=0), v.repeat_interleave(tiles, dim=0)
        mask = None
        if self.mask is not None:
            if grid not in self.grids:
                self.grids[grid] = mask_on_tokens(self.mask, *grid).to(q.dtype)
            mask = self.grids[grid]
        return image_prompt_term(q, k, v, extra["n_heads"], mask=mask, attention=attention)


def cross_attention(
    key: BlockKey, inner: Callable | None, terms: list[PromptRows], once: Callable[[str], None]
) -> Callable:
    """The replacement for one cross-attention: what was there (or the plain one), plus every image prompt."""

    def replacement(q, k, v, extra):
        attention = host_attention(extra)
        out = attention(q, k, v, extra["n_heads"]) if inner is None else inner(q, k, v, extra)
        for term in terms:
            added = term.attend(q, key, extra, attention)
            if added is None:
                once(
                    "another node reshapes the tokens of some cross-attentions in a way that the image prompt cannot "
                    "follow: these run without it."
                )
            else:
                out = out + added
        return out

    return replacement
