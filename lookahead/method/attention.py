"""Attention of the method, over keys and values that are already projected.

Tensors are [batch, tokens, channels] with the heads folded into the channels, as both the host and diffusers hand them
on. `attention` is any function (q, k, v, heads) -> [batch, tokens, channels]; the host passes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Plain multi-head attention with scale 1/sqrt(channels/heads): q [B, N, C], k and v [B, M, C] -> [B, N, C]."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Multi-head attention as two products around a softmax: the numbers of `softmax_attention`, with a backward that
    is faster on a CPU at few tokens, above all in bfloat16."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weight = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return (weight @ v).transpose(1, 2).flatten(2)


def image_prompt_term(
    q: Tensor,
    k_ip: Tensor,
    v_ip: Tensor,
    heads: int,
    scale: float = 1.0,
    mask: Tensor | None = None,
    attention: Attention = softmax_attention,
) -> Tensor:
    """The image half of decoupled cross-attention: scale * mask * softmax(q k_ip^T / sqrt(d)) v_ip.

    q [B, N, C]; k_ip, v_ip [B, T, C]; mask [B, N, 1] in [0, 1] (where in the picture the image prompt holds) or None.
    Raises ValueError where the batch sizes differ: rows must be matched by the caller, who knows what each row is.
    """
    if k_ip.shape[0] != q.shape[0] or v_ip.shape != k_ip.shape:
        raise ValueError(f"image prompt keys {tuple(k_ip.shape)} do not fit queries {tuple(q.shape)}, row for row")
    out = attention(q, k_ip, v_ip, heads)
    if mask is not None:
        out = out * mask
    return out if scale == 1 else out * scale


def decoupled_cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ip: Tensor,
    v_ip: Tensor,
    heads: int,
    scale: float = 1.0,
    mask: Tensor | None = None,
    attention: Attention = softmax_attention,
) -> Tensor:
    """Attention to the text plus scaled attention to the image prompt, each with its own softmax.

    IP-Adapter (arXiv 2308.06721), equation 5: Z = Attention(Q, K, V) + scale * Attention(Q, K_ip, V_ip).
    q [B, N, C]; k, v [B, M, C]; k_ip, v_ip [B, T, C]; mask [B, N, 1] or None. The output projection comes after.
    """
    return attention(q, k, v, heads) + image_prompt_term(q, k_ip, v_ip, heads, scale, mask, attention)


def extended_self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_ext: Tensor,
    v_ext: Tensor,
    heads: int,
    absent: Tensor | None = None,
    attention: Attention = softmax_attention,
) -> Tensor:
    """Self-attention that also reads keys and values from elsewhere: own and external tokens under one softmax.

    LCM-Lookahead (arXiv 2404.03620), section 4.3: K = K_self (.) K_ext, V = V_self (.) V_ext, concatenated along the
    tokens, own ones first. q [B, N, C]; k, v [B, M, C]; k_ext, v_ext [B, T, C]; T = 0 is plain self-attention.
    absent: bool [B], rows without a reference: these read their own keys twice, which leaves every softmax average as
    it is, so they are plain self-attention without a mask and in a static shape; it takes T = M.
    Raises ValueError where the batch sizes differ, or where `absent` meets T != M.
    """
    if k_ext.shape[0] != k.shape[0] or v_ext.shape != k_ext.shape:
        raise ValueError(f"external keys {tuple(k_ext.shape)} do not fit own keys {tuple(k.shape)}, row for row")
    if absent is not None:
        if k_ext.shape != k.shape:
            raise ValueError(
                f"rows without a reference need as many external tokens as own ones, not {k_ext.shape[1]} for "
                f"{k.shape[1]}"
            )
        row = absent.view(-1, 1, 1)
        k_ext, v_ext = torch.where(row, k, k_ext), torch.where(row, v, v_ext)
    return attention(q, torch.cat([k, k_ext], dim=1), torch.cat([v, v_ext], dim=1), heads)


def statistics(x: Tensor) -> Tensor:
    """The mean and the deviation of each channel of tokens x [..., N, C]: [..., 2, C]."""
    deviation, mean = torch.std_mean(x, dim=-2, correction=0)
    return torch.stack([mean, deviation], dim=-2)


def with_statistics(x: Tensor, wanted: Tensor) -> Tensor:
    """Tokens x [..., N, C] with the mean and the deviation of each channel that are wanted [..., 2, C].

    AdaIN (arXiv 1703.06868), as StyleAligned (arXiv 2312.02133) shares attention with. Channels without any deviation
    in x get the mean alone.
    """
    (mean, deviation), (other_mean, other_deviation) = (s.split(1, dim=-2) for s in (statistics(x), wanted))
    return (x - mean) / (deviation + 1e-5) * other_deviation + other_mean


def adain(x: Tensor, like: Tensor) -> Tensor:
    """Tokens x [..., N, C] take over the mean and the deviation of each channel of the tokens `like` [..., M, C]."""
    return with_statistics(x, statistics(like))


def pooled_statistics(parts: Sequence[Tensor]) -> Tensor:
    """The statistics of several sets of as many tokens, taken together: [2, C] of each -> [2, C]."""
    if len(parts) == 1:
        return parts[0]
    means, deviations = torch.stack(list(parts), dim=-1).unbind(0)
    variance = (deviations**2 + means**2).mean(-1) - means.mean(-1) ** 2
    return torch.stack([means.mean(-1), variance.clamp_min(0).sqrt()])


def mask_on_tokens(mask: Tensor, height: int, width: int) -> Tensor:
    """A picture mask [B, H, W] in [0, 1] averaged onto a token grid: [B, height * width, 1].

    Each token gets the mean of the mask over its part of the picture (exact also where sizes do not divide).
    """
    grid = torch.nn.functional.adaptive_avg_pool2d(mask.unsqueeze(1), (height, width))
    return grid.flatten(2).transpose(1, 2)
