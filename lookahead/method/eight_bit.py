"""Tokens in 8 bit: a channel's numbers between the least and the greatest that it has among the tokens.

What is kept of a reference is the normed input of a self-attention, one vector a token. Its channels differ in where
they lie and how far they reach (a layer norm ends in a weight and a bias for each), so each has a scale of its own; a
token's length is nearly the same for all, so tokens need none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 127  # on either side of the middle


class EightBit(NamedTuple):
    """Tokens in 8 bit: numbers int8 [..., N, C] in -127..127; middle, step: float32 [..., 1, C]."""

    numbers: Tensor
    middle: Tensor
    step: Tensor


def to_eight_bit(x: Tensor) -> EightBit:
    """Round tokens x [..., N, C] to 255 levels a channel: x ~ middle + step * numbers.

    middle = (max + min) / 2 and step = (max - min) / 254 over the N tokens, so each number is off by at most step / 2.
    """
    low, high = (limit.float() for limit in torch.aminmax(x, dim=-2, keepdim=True))
    middle, step = (high + low) / 2, (high - low) / (2 * LEVELS)
    safe = torch.where(step > 0, step, torch.ones_like(step))  # a channel that is the same in all tokens
    numbers = ((x.float() - middle) / safe).round().clamp(-LEVELS, LEVELS)
    return EightBit(numbers.to(torch.int8), middle, step)


def from_eight_bit(kept: EightBit, dtype: torch.dtype) -> Tensor:
    """The tokens [..., N, C] that 8 bit stand for, in a precision."""
    return torch.addcmul(kept.middle, kept.step, kept.numbers.float()).to(dtype)
