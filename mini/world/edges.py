"""The condition of the mini ControlNet: edges after Canny, as the host's stock node `Canny` finds them.

Written here because that node's library is not among the trainer's; a test compares the two.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

LOW, HIGH = 0.4, 0.8  # the stock node's own thresholds, of Sobel sums over a picture in [0, 1]
_LUMA = (0.299, 0.587, 0.114)
_NARROW = 0.41421356  # tan of 22.5 degrees: closer to an axis than to a diagonal


@torch.no_grad()
def edges(picture: Tensor, low: float = LOW, high: float = HIGH) -> Tensor:
    """[n, 3, h, w] in [0, 1] -> edges [n, 3, h, w], white (1) on black (0), the same in all three channels."""
    gray = (picture.float() * torch.tensor(_LUMA, device=picture.device).view(1, 3, 1, 1)).sum(1, keepdim=True)
    bell = torch.exp(-torch.arange(-2.0, 3.0, device=gray.device).square() / 2)
    bell = bell / bell.sum()
    soft = F.conv2d(F.pad(gray, (2, 2, 2, 2), mode="reflect"), torch.outer(bell, bell).view(1, 1, 5, 5))
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=gray.device)
    soft = F.pad(soft, (1, 1, 1, 1), mode="replicate")
    across, down = F.conv2d(soft, torch.stack([sobel, sobel.T])[:, None]).split(1, 1)
    strength = (across.square() + down.square() + 1e-6).sqrt()
    ridge = strength * _is_ridge(strength, across, down)
    weak, strong = ridge > low, ridge > high
    while True:  # weak edges count where they touch strong ones
        grown = _widened(_widened(strong, -1), -2) & weak
        if torch.equal(grown, strong):
            return strong.float().expand(-1, 3, -1, -1)
        strong = grown


def _widened(mask: Tensor, axis: int) -> Tensor:
    """True where the mask or one of its two neighbours along an axis is."""
    n = mask.shape[axis] - 1
    out = mask.clone()
    out.narrow(axis, 0, n).logical_or_(mask.narrow(axis, 1, n))
    out.narrow(axis, 1, n).logical_or_(mask.narrow(axis, 0, n))
    return out


def _is_ridge(strength: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """Where the gradient is larger than at its two neighbours along its own direction (or as large as at the right or
    lower one, so that of two equals one remains)."""
    h, w = strength.shape[-2:]
    padded = F.pad(strength, (1, 1, 1, 1), value=1e-3)

    def at(y: int, x: int) -> Tensor:
        return padded[..., 1 + y : 1 + y + h, 1 + x : 1 + x + w]

    level = (strength > at(0, -1)) & (strength >= at(0, 1))
    upright = (strength > at(-1, 0)) & (strength >= at(1, 0))
    falling = (strength > at(-1, -1)) & (strength > at(1, 1))
    rising = (strength > at(1, -1)) & (strength > at(-1, 1))
    flat, steep = down.abs() < _NARROW * across.abs(), across.abs() < _NARROW * down.abs()
    diagonal = torch.where(across * down > 0, falling, rising)
    return torch.where(flat, level, torch.where(steep, upright, diagonal))
