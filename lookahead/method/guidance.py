"""Classifier-free guidance with three scales: how the predictions for one noised picture are put together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def classifier_free_guidance(uncond: Tensor, text: Tensor, scale: float) -> Tensor:
    """Two predictions [B, C, H, W] of one kind put together (arXiv 2207.12598): e_nu + scale (e_nt - e_nu)."""
    return uncond + scale * (text - uncond)


def three_scale_guidance(
    uncond: Tensor,
    text: Tensor | None,
    full_uncond: Tensor | None,
    full: Tensor | None,
    text_scale: float = 3.0,
    full_scale: float = 2.0,
    kv_scale: float = 2.0,
) -> Tensor:
    """The guidance of LCM-Lookahead (arXiv 2404.03620, supplement) over text, image prompt and reference KV.

    e = e_nu + text_scale (e_nt - e_nu) + full_scale (e_ft - e_nu) + kv_scale (e_fu - e_nu), with
    uncond = e_nu: null text, null tokens, no KV;     text = e_nt: text, image prompt, no KV;
    full_uncond = e_fu: null text, null tokens, KV;   full = e_ft: text, image prompt, KV.
    All [B, C, H, W] and all eps, all v or all denoised (the weights add up to 1, so the kind does not matter). Without
    an effect of the KV it is classifier-free guidance at text_scale + full_scale. A prediction whose scale is 0 may be
    None. Raises ValueError where one is None whose scale is not 0.
    """
    out = uncond
    for name, prediction, scale in (
        ("text", text, text_scale),
        ("full", full, full_scale),
        ("full_uncond", full_uncond, kv_scale),
    ):
        if scale == 0:
            continue
        if prediction is None:
            raise ValueError(f"the prediction {name} is missing, and its scale is {scale}")
        out = out + scale * (prediction - uncond)
    return out


# The predictions of `three_scale_guidance`, by its arguments' names; those without reference KV, and those with it.
PLAIN, EXTENDED = ("uncond", "text"), ("full_uncond", "full")


@dataclass(frozen=True)
class Scales:
    """The scales of `three_scale_guidance`: prompt without reference KV, prompt with it, reference KV alone."""

    text: float = 3.0
    full: float = 2.0
    kv: float = 2.0

    @property
    def without_kv(self) -> Scales:
        """Classifier-free guidance as strong as where the reference KV has no effect."""
        return Scales(self.text + self.full, 0.0, 0.0)

    @property
    def needed(self) -> tuple[str, ...]:
        """The predictions whose weight in the sum is not 0. (That of the first is 1 less the three scales.)"""
        alone = math.isclose(self.text + self.full + self.kv, 1.0)
        weights = {"uncond": not alone, "text": self.text, "full_uncond": self.kv, "full": self.full}
        return tuple(name for name, weight in weights.items() if weight)


def guided(predict: Callable[[Sequence[str]], Sequence[Tensor]], scales: Scales) -> Tensor:
    """`three_scale_guidance` over those predictions that it needs.

    predict: names -> one prediction [B, C, H, W] each. It is called at most twice, with names of PLAIN and of EXTENDED:
    self-attentions are longer with reference KV, so only predictions of one kind can be rows of one batch.
    """
    made: dict[str, Tensor] = {}
    for kind in (PLAIN, EXTENDED):
        if names := [name for name in kind if name in scales.needed]:
            made |= zip(names, predict(names), strict=True)
    if "uncond" not in made:
        made["uncond"] = torch.zeros_like(next(iter(made.values())))  # its weight is 0
    text, full_uncond, full = (made.get(name) for name in ("text", "full_uncond", "full"))
    return three_scale_guidance(made["uncond"], text, full_uncond, full, scales.text, scales.full, scales.kv)
