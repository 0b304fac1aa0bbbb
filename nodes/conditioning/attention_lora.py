"""The effect of a LoRA that belongs to an image prompt: changes beside the projections of the UNet's attentions.

The weights of the UNet are never patched, so it acts in its part of the sampling alone, and quantised or offloaded
models take it. It is the outermost of our effects: what stands in an attention is called with the changed projections.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .effect import ActiveEffect, Effect, Replacements, RunStart, UNetPass
from .rows import When
from .unet_blocks import BlockKey, host_attention

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

_INPUT, _OUTPUT = "lookahead_lora_input", "lookahead_lora_output"  # what a block passes to itself, in extra_options


@dataclass(frozen=True, eq=False)
class PromptLoRA(Effect):
    """The LoRA of an image prompt on a MODEL.

    patcher: the host's, of the `AttentionLoRA`; numbers: of each transformer block in the public files' order, by the
    host's key; weight: 1 as in training; when: the part of the sampling in which it acts.
    """

    patcher: ModelPatcher
    numbers: Mapping[BlockKey, int]
    weight: float = 1.0
    when: When = field(default_factory=When)

    def additional_models(self) -> tuple[ModelPatcher, ...]:
        return (self.patcher,)

    def begin(self, run: RunStart) -> ActivePromptLoRA:
        # A tensor, since a compiled model keeps numbers as they were when it was compiled; one that gradients may use.
        with torch.inference_mode(False):
            return ActivePromptLoRA(self, torch.tensor(self.weight, device=run.device, dtype=run.dtype))


class ActivePromptLoRA(ActiveEffect[PromptLoRA]):
    """A LoRA in one run. That of several prompts of one encoder acts once, with the largest weight."""

    order = 200

    def __init__(self, effect: PromptLoRA, weight: Tensor):
        super().__init__(effect)
        self.weight = weight

    @classmethod
    def cross_attentions(
        cls, acting: Sequence[ActivePromptLoRA], unet_pass: UNetPass, attn2: Replacements
    ) -> Replacements:
        return _installed(_once_each(acting), unet_pass, attn2, "attn2")

    @classmethod
    def self_attentions(
        cls, acting: Sequence[ActivePromptLoRA], unet_pass: UNetPass, attn1: Replacements
    ) -> Replacements:
        return _installed(_once_each(acting), unet_pass, attn1, "attn1")


def _once_each(acting: Sequence[ActivePromptLoRA]) -> list[ActivePromptLoRA]:
    by_network: dict[int, ActivePromptLoRA] = {}
    for active in acting:
        known = by_network.get(id(active.effect.patcher.model))
        if known is None or active.effect.weight > known.effect.weight:
            by_network[id(active.effect.patcher.model)] = active
    return list(by_network.values())


def _installed(
    loras: list[ActivePromptLoRA], unet_pass: UNetPass, replaced: Replacements, attention: str
) -> Replacements:
    """The replacements of one kind of attention with the changed projections around what stands there, and patches that
    note the projections' input and change the output's."""
    patches = dict(unet_pass.options.get("patches", {}))
    # Last among those before the projections, first among those after: others may reshape tokens between.
    patches[f"{attention}_patch"] = [*patches.get(f"{attention}_patch", []), _note_input]
    output = _output_patch(loras, attention)
    patches[f"{attention}_output_patch"] = [output, *patches.get(f"{attention}_output_patch", [])]
    unet_pass.options["patches"] = patches
    keys = dict.fromkeys(key for lora in loras for key in lora.effect.numbers)
    inner = {key: replaced.get(key, replaced.get(key[:2])) for key in keys}
    return {**replaced, **{key: _attention(loras, key, attention, inner[key]) for key in keys}}


def _note_input(n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]):
    extra[_INPUT] = (n, context, context if value is None else value)
    return n, context, value


def _changed(loras: list[ActivePromptLoRA], key: BlockKey, layer: str, projected: Tensor, x: Tensor) -> Tensor:
    for lora in loras:
        network, number = lora.effect.patcher.model, lora.effect.numbers.get(key)
        projected = network.add(f"{number}.{layer}", projected, x, lora.weight.to(projected))
    return projected


def _attention(loras: list[ActivePromptLoRA], key: BlockKey, attention: str, inner: Callable | None) -> Callable:
    """The replacement of one attention: its own with changed queries, keys and values."""

    def replacement(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
        inputs = zip(("to_q", "to_k", "to_v"), (q, k, v), extra.pop(_INPUT), strict=True)
        q, k, v = (_changed(loras, key, f"{attention}.{to}", projected, x) for to, projected, x in inputs)
        out = host_attention(extra)(q, k, v, extra["n_heads"]) if inner is None else inner(q, k, v, extra)
        extra[_OUTPUT] = out
        return out

    return replacement


def _output_patch(loras: list[ActivePromptLoRA], attention: str) -> Callable:
    def patch(n: Tensor, extra: dict[str, Any]) -> Tensor:
        before = extra.pop(_OUTPUT, None)
        if before is None:  # another node's replacement was put in the place of ours
            return n
        return _changed(loras, (*extra["block"], extra["block_index"]), f"{attention}.to_out", n, before)

    return patch
