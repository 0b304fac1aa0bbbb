"""How alike two pictures are, by plain formulas without a network."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d


def root_mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Root of the mean squared difference of pictures [n, c, h, w], one value each: [n]."""
    return (a - b).square().mean(dim=(1, 2, 3)).sqrt()


def structural_similarity(a: Tensor, b: Tensor, window: int = 7) -> Tensor:
    """SSIM (Wang et al. 2004) with a square window, of pictures [n, c, h, w] in [0, 1]: [n], 1 where they are the same.

    Raises ValueError for pictures smaller than the window.
    """
    if min(a.shape[-2:]) < window:
        raise ValueError(f"the pictures are {a.shape[-1]}x{a.shape[-2]}, smaller than the window of {window}")

    def local(x: Tensor) -> Tensor:
        return avg_pool2d(x, window, stride=1)

    mean_a, mean_b = local(a), local(b)
    var_a, var_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
    shared = local(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    ssim = (2 * mean_a * mean_b + c1) * (2 * shared + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return torch.mean(ssim, dim=(1, 2, 3))
