"""Small convolutional networks that look at pictures: the evaluation recogniser and the style scorer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..world import things
from ..world.faces import IDENTITY_SIZE, PLACES, STYLES

VIEW = 64  # pixels a side of what these networks see


class _Residual(nn.Module):
    def __init__(self, inner: int, outer: int, activation: Callable[[], nn.Module]):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inner, outer, 3, 2, 1, bias=False),
            nn.BatchNorm2d(outer),
            activation(),
            nn.Conv2d(outer, outer, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outer),
        )
        self.skip = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(inner, outer, 1))
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + self.skip(x))


def _trunk(widths: tuple[int, ...], activation: Callable[[], nn.Module]) -> nn.Sequential:
    stem = [nn.Conv2d(3, widths[0], 5, 2, 2, bias=False), nn.BatchNorm2d(widths[0]), activation()]
    blocks = [_Residual(a, b, activation) for a, b in zip(widths, widths[1:], strict=False)]
    return nn.Sequential(*stem, *blocks, nn.Flatten())


def _view(picture: Tensor) -> Tensor:
    """[n, 3, h, w] in [0, 1], any size -> what the trunk sees, in [-1, 1]."""
    return F.interpolate(picture, size=(VIEW, VIEW), mode="bilinear", antialias=True) * 2 - 1


class EvaluationRecogniser(nn.Module):
    """Who is it? Predicts the parameters that the face was drawn with; their direction is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 48, 80, 96)
        self.trunk = _trunk(widths, nn.GELU)
        self.parameters_head = nn.Linear(widths[-1] * (VIEW // 16) ** 2, IDENTITY_SIZE)
        self.register_buffer("centre", torch.zeros(IDENTITY_SIZE))  # the mean person of its training group

    def forward(self, picture: Tensor) -> Tensor:
        """[n, 3, h, w] in [0, 1] -> predicted identity vectors [n, IDENTITY_SIZE]."""
        return self.parameters_head(self.trunk(_view(picture)))

    def embed(self, picture: Tensor) -> Tensor:
        """Unit vectors [n, IDENTITY_SIZE]; the product of two is their similarity, from -1 to 1."""
        return F.normalize(self(picture) - self.centre, dim=-1)


class ThingJudge(nn.Module):
    """Predicts the parameters that a thing was drawn with (`things.identity_vector`), its class first."""

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 48, 80, 96)
        self.trunk = _trunk(widths, nn.GELU)
        self.parameters_head = nn.Linear(widths[-1] * (VIEW // 16) ** 2, things.IDENTITY_SIZE)
        self.register_buffer("centre", torch.zeros(things.IDENTITY_SIZE))  # the mean thing of its training group

    def forward(self, picture: Tensor) -> Tensor:
        """[n, 3, h, w] in [0, 1] -> predicted identity vectors [n, things.IDENTITY_SIZE]."""
        return self.parameters_head(self.trunk(_view(picture)))

    def kinds(self, picture: Tensor) -> Tensor:
        """The class of each picture, int64 [n], an index into `things.CLASSES`."""
        return self(picture)[:, : len(things.CLASSES)].argmax(1)

    def embed(self, picture: Tensor) -> Tensor:
        """Unit vectors [n, things.IDENTITY_SIZE]; the product of two is their similarity, from -1 to 1."""
        return F.normalize(self(picture) - self.centre, dim=-1)


class StyleScorer(nn.Module):
    """Which style and which place does a picture show?"""

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 24, 32, 48)
        self.trunk = _trunk(widths, nn.SiLU)
        self.head = nn.Linear(widths[-1] * (VIEW // 16) ** 2, len(STYLES) + len(PLACES))

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """[n, 3, h, w] in [0, 1] -> logits of style [n, 8] and place [n, 6]."""
        return self.head(self.trunk(_view(picture))).split([len(STYLES), len(PLACES)], 1)
