"""People's pictures to train on, wherever they lie: in a folder (`folder.py`) or in shards (`sharded.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ...lookahead.vision.images import resize_square
from .references import References

Crop = tuple[Tensor, Tensor | None]  # a picture as it is trained on [1, 3, size, size] in [0, 1]; landmarks [1, 5, 2]


class PeoplePictures(Protocol):
    """Places 0, 1, ... of pictures. It can be sent to other processes, and holds no model.

    targets: places that are trained on, each with a reference; held_out: people whom training does not see.
    """

    @property
    def targets(self) -> Sequence[int]: ...

    @property
    def held_out(self) -> Sequence[Any]: ...

    def digest(self) -> str:
        """Hashes all that decides which pair is which."""
        ...

    def references(self, place: int) -> Sequence[int] | References:
        """Places of the pictures that may be the reference of this one."""
        ...

    def caption(self, place: int) -> str:
        """Says what the picture shows."""
        ...

    def name(self, place: int) -> str:
        """Names the picture in a message."""
        ...

    def key(self, place: int, as_reference: bool, face: bool = False) -> tuple[object, ...]:
        """Tells by plain values what `crop` gives: pixels and square, with `face` the landmarks too."""
        ...

    def crop(self, place: int, as_reference: bool) -> Crop:
        """The picture as it is trained on, and where the face is in it. Raises DataError where it cannot be read."""
        ...

    def shown(self, people: int) -> list[tuple[int, str]]:
        """A reference each of people to validate with, held out (or trained on, of few), and what to call them."""
        ...


def cut(picture: Tensor, square: tuple[int, int, int], points: Tensor | None, size: int) -> Crop:
    """A square (left, top, side) of a picture [3, h, w] at `size` pixels, and its landmarks [5, 2] in it."""
    left, top, side = square
    moved = None if points is None else (points[None] - torch.tensor([left, top]) + 0.5) * size / side - 0.5
    return resize_square(picture[None, :, top : top + side, left : left + side], size), moved
