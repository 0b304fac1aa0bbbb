"""A face is seen in random views, so that what pleases a recogniser is the face and no pattern of its one crop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..vision.arcface import Recogniser
from ..vision.faces import align, samples_for

GRAIN = 2  # pixels of the crop that a grain measures


@dataclass(frozen=True)
class FaceViews:
    """Random views are crops of a face that is cut a little off its place, in another light and with grain.

    An aligned crop is one point of view, and descending its loss alone finds patterns that hold there only; the mean
    over views is what work on adversarial patterns calls expectation over transformations (arXiv 1707.07397).

    count: views of each face, 0 or more. turn: in radians; scale: as a natural logarithm; shift: as a part of the
    face's size (twice the mean distance of its landmarks from their middle); each up to this much, either way. light:
    the crop is brighter or darker by up to this part, each of its colours by up to half as much again; grain: standard
    deviation of the noise, where white is 1.
    """

    count: int = 4
    turn: float = 0.12
    scale: float = 0.08
    shift: float = 0.06
    light: float = 0.15
    grain: float = 0.08

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"The views of a face are {self.count}: use 0 or more.")

    def embed(self, recogniser: Recogniser, pictures: Tensor, points: Tensor, generator: torch.Generator) -> Tensor:
        """Computes unit vectors [n, count, d] of the people in pictures [n, 3, h, w] in [0, 1], whose landmarks are
        [n, 5, 2] on the CPU. Differentiable in the pictures. generator: of the CPU; numbers are drawn there on every
        device.
        """
        moved = [self._moved(points, generator) for _ in range(self.count)]
        samples = max(samples_for(points, recogniser.size) for points in moved)
        crops = torch.cat([align(pictures, points, size=recogniser.size, samples=samples) for points in moved])
        return recogniser(self._lit(crops, generator)).unflatten(0, (self.count, len(pictures))).transpose(0, 1)

    def _moved(self, points: Tensor, generator: torch.Generator) -> Tensor:
        n, points = len(points), points.float()
        turn, zoom = self.turn * _even(n, 1, generator=generator), self.scale * _even(n, 1, 1, generator=generator)
        middle = points.mean(1, keepdim=True)
        x, y = (points - middle).unbind(-1)
        turned = torch.stack([turn.cos() * x - turn.sin() * y, turn.sin() * x + turn.cos() * y], -1)
        size = 2 * (points - middle).norm(dim=-1).mean(1)[:, None, None]
        return middle + turned * zoom.exp() + self.shift * size * _even(n, 1, 2, generator=generator)

    def _lit(self, crops: Tensor, generator: torch.Generator) -> Tensor:
        n = len(crops)
        part = 1 + self.light * _even(n, 1, 1, 1, generator=generator)
        colour = self.light / 2 * _even(n, 3, 1, 1, generator=generator)
        size = crops.shape[-1]
        grain = self.grain * torch.randn(n, 3, size // GRAIN, size // GRAIN, generator=generator)
        grain = F.interpolate(grain, (size, size), mode="bilinear")
        return crops * part.to(crops) + (colour + grain).to(crops)


def _even(*shape: int, generator: torch.Generator) -> Tensor:
    """Numbers drawn evenly from -1 to 1."""
    return 2 * torch.rand(shape, generator=generator) - 1
