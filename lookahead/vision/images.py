"""Images are made ready for the frozen networks: resized without being squashed, cropped about their centre, and given
CLIP's mean and deviation.

Resizing is bicubic with antialiasing, as CLIP's own preprocessing, and differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Of all public CLIP models.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def cover(images: Tensor, height: int, width: int) -> Tensor:
    """Images [n, c, h, w] are resized to cover [n, c, height, width], then cropped about the centre.

    May overshoot the range of its input.
    """
    h, w = images.shape[-2:]
    if (h, w) == (height, width):
        return images
    scale = max(height / h, width / w)
    size = (max(height, round(h * scale)), max(width, round(w * scale)))
    if size != (h, w):
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return images[..., top : top + height, left : left + width]


def shorter_side(images: Tensor, size: int) -> Tensor:
    """Images [n, 3, h, w] in [-1, 1] are made smaller so that the shorter side has `size` pixels; never larger."""
    h, w = images.shape[-2:]
    if not 0 < size < min(h, w):
        return images
    scale = size / min(h, w)
    return cover(images, round(h * scale), round(w * scale)).clamp(-1, 1)


def resize_square(images: Tensor, size: int) -> Tensor:
    """Square images [n, c, h, h] in [0, 1] are resized to [n, c, size, size]."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


def centre_square(image: Tensor, size: int) -> Tensor:
    """IMAGE [n, H, W, C] in [0, 1] is cropped to the square about its centre, then resized: [n, size, size, C]."""
    _, height, width, _ = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[:, top : top + side, left : left + side].movedim(-1, 1)
    return resize_square(square, size).movedim(1, -1).clamp(0, 1)


def clip_normalise(images: Tensor) -> Tensor:
    """Images [n, 3, h, w] in [0, 1] get the mean and deviation that CLIP was trained with."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1).to(images) for values in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def clip_input(images: Tensor, size: int) -> Tensor:
    """Images [n, 3, h, w] in [0, 1] become a CLIP image encoder's input [n, 3, size, size].

    The shorter side is resized, the rest cut off about the centre, and values are rounded to 8 bit, as the host does.
    """
    height, width = images.shape[-2:]
    if (height, width) != (size, size):
        scale = size / min(height, width)
        scaled = round(scale * height), round(scale * width)
        images = F.interpolate(images, scaled, mode="bicubic", antialias=True)
        top, left = (images.shape[2] - size) // 2, (images.shape[3] - size) // 2
        images = images[:, :, top : top + size, left : left + size]
    return clip_normalise((255 * images).clamp(0, 255).round() / 255)
