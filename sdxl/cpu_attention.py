"""Attention on a CPU: written out where that is faster than torch's own."""

from __future__ import annotations

from torch import Tensor

from ..lookahead.method.attention import eager_attention, softmax_attention

MOST = 2**20  # products of queries and keys, a head; above, the matrix of weights takes too much memory


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """As `softmax_attention`: q [B, N, C], k and v [B, M, C] -> [B, N, C].

    The matrix of weights [B, heads, N, M] is written out where it is small: its backward is faster than SDPA's there.
    """
    if q.shape[1] * k.shape[1] > MOST:
        return softmax_attention(q, k, v, heads)
    return eager_attention(q, k, v, heads)
