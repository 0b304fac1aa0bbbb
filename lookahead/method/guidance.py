"""Classifier-free guidance with three scales: how the predictions for one noised picture are put together."""

from __future__ import annotations

from torch import Tensor


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
