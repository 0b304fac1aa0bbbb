"""Random views (cutouts, also augmentations): a loss that sees an image in several of them is not fooled by
adversarial texture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..vision.images import cover


@dataclass(frozen=True)
class Cutouts:
    """Random views are crops of pictures, mirrored and changed in colour. What fools a network in the whole picture
    seldom fools it in all of them.

    count: views beside the whole picture. smallest: least side of one, as a part of the shorter side; each side is
    drawn evenly from there to 1. flip: mirror every other one, by chance. colour: brightness is changed by up to this,
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

    def cut(self, size: int, generator: torch.Generator, *pictures: Tensor) -> list[Tensor]:
        """Each [n, 3, h, w] in [0, 1] -> [count * n, 3, size, size] in [0, 1], one cutout of all after another.

        All are cut and changed alike: row i of one and row i of another still belong together. Shapes must agree.
        The numbers are drawn on the generator's device, six for each row, and read on the host: use a CPU generator.
        """
        n, _, h, w = pictures[0].shape
        draws = torch.rand(self.count * n, 6, generator=generator, device=generator.device).tolist()
        return [torch.cat([self._cutout(p[i % n], size, *draw) for i, draw in enumerate(draws)]) for p in pictures]

    def _cutout(
        self,
        picture: Tensor,
        size: int,
        side: float,
        down: float,
        right: float,
        mirror: float,
        brighter: float,
        harder: float,
    ) -> Tensor:
        h, w = picture.shape[-2:]
        pixels = max(1, round(min(h, w) * (self.smallest + (1 - self.smallest) * side)))
        top, left = round(down * (h - pixels)), round(right * (w - pixels))
        cutout = cover(picture[None, :, top : top + pixels, left : left + pixels], size, size)
        if self.flip and mirror < 0.5:
            cutout = cutout.flip(-1)
        brightness, contrast = self.colour * (2 * brighter - 1), 1 + self.colour * (2 * harder - 1)
        return ((cutout - 0.5) * contrast + 0.5 + brightness).clamp(0, 1)
