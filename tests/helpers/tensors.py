"""Tensors to test with, and how alike two are."""

import torch


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal noise of this shape, the same at each call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def half_masks(size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks [1, size, size] over the left and the right half of a picture."""
    left = torch.zeros(1, size, size)
    left[..., : size // 2] = 1
    return left, 1 - left


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The root mean square of the difference, relative to that of b."""
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


def close(a: torch.Tensor, b: torch.Tensor, bound: float = 1e-5) -> bool:
    """Whether no number of a is further from that of b than `bound` times b's largest."""
    return torch.allclose(a, b, atol=bound * float(b.abs().max()))
