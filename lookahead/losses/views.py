"""Pictures made ready for a network: squares of the size it reads, and random views against adversarial texture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def resized(pictures: Tensor, height: int, width: int) -> Tensor:
    """Pictures [n, 3, h, w] -> [n, 3, height, width]: resized to cover, then cropped about the centre.

    Bicubic with antialiasing, as CLIP's own preprocessing, and differentiable. May overshoot the range of its input.
    """
    h, w = pictures.shape[-2:]
    if (h, w) == (height, width):
        return pictures
    scale = max(height / h, width / w)
    size = (max(height, round(h * scale)), max(width, round(w * scale)))
    if size != (h, w):
        pictures = F.interpolate(pictures, size=size, mode="bicubic", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pictures[..., top : top + height, left : left + width]


def centre_square(image: Tensor, size: int) -> Tensor:
    """IMAGE [n, H, W, C] in [0, 1] -> [n, size, size, C]: shorter side resized, then cropped about the centre."""
    _, height, width, _ = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[:, top : top + side, left : left + side].movedim(-1, 1)
    if side != size:
        square = F.interpolate(square, (size, size), mode="bicubic", antialias=True)
    return square.movedim(1, -1).clamp(0, 1)


@dataclass(frozen=True)
class Views:
    """Random views of pictures. What fools a network seen whole and straight seldom fools it in all of them.

    count: views beside the whole picture. smallest: least side of a view, as a part of the shorter side; each side is
    drawn evenly from there to 1. flip: mirror every other view, by chance. colour: brightness is changed by up to this,
    contrast by up to this part.
    """

    count: int = 4
    smallest: float = 0.5
    flip: bool = True
    colour: float = 0.1

    def __post_init__(self) -> None:
        if self.count < 0 or not 0 < self.smallest <= 1 or not 0 <= self.colour < 1:
            raise ValueError(
                f"Random views must have a count of at least 0, a smallest side above 0 and up to 1 and a colour from "
                f"0 to 1, not {self.count}, {self.smallest} and {self.colour}."
            )

    def of(self, size: int, generator: torch.Generator, *pictures: Tensor) -> list[Tensor]:
        """Each [n, 3, h, w] in [0, 1] -> [count * n, 3, size, size] in [0, 1], view after view.

        All are cut and changed alike: row i of one and row i of another still belong together. Shapes must agree.
        The numbers are drawn on the generator's device, six for each row, and read on the host: use a CPU generator.
        """
        n, _, h, w = pictures[0].shape
        draws = torch.rand(self.count * n, 6, generator=generator, device=generator.device).tolist()
        return [torch.cat([self._view(p[i % n], size, *draw) for i, draw in enumerate(draws)]) for p in pictures]

    def _view(self, picture: Tensor, size: int, side, down, right, mirror, brighter, harder) -> Tensor:
        h, w = picture.shape[-2:]
        pixels = max(1, round(min(h, w) * (self.smallest + (1 - self.smallest) * side)))
        top, left = round(down * (h - pixels)), round(right * (w - pixels))
        view = resized(picture[None, :, top : top + pixels, left : left + pixels], size, size)
        if self.flip and mirror < 0.5:
            view = view.flip(-1)
        brightness, contrast = self.colour * (2 * brighter - 1), 1 + self.colour * (2 * harder - 1)
        return ((view - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)
