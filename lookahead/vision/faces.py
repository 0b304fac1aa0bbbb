"""Where a face is and how it is cut out: five landmarks -> ArcFace's crop, differentiably; which face is meant.

Lengths are pixels, x to the right and y downwards, and the centre of a picture's first pixel is 0 (as insightface
counts). The five landmarks are the eye on the left of the picture, that on the right, the tip of the nose, and the
corners of the mouth, left and right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

CROP = 112  # pixels a side of what recognisers of ArcFace's family see

# Where the landmarks come to lie in that crop (arcface_dst of insightface).
TEMPLATE = torch.tensor(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)

MOST_SAMPLES = 8  # a pixel of a crop and a direction; finer ones of a larger picture are not worth their time


class Face(NamedTuple):
    """A face that was found in a picture."""

    box: Tensor  # float32 [4]: x0, y0, x1, y1
    points: Tensor  # float32 [5, 2]
    score: float  # how sure the detector is, 0 to 1


class Detector(Protocol):
    """Finds faces; runs without gradient."""

    def __call__(self, pictures: Tensor) -> list[list[Face]]:
        """Pictures [n, 3, h, w], RGB in [0, 1] -> the faces of each on the CPU, surest first, none where there is none.

        Values out of the range are clamped.
        """
        ...


def template(size: int = CROP, margin: float = 0.0) -> Tensor:
    """Places the landmarks in a square crop of `size` pixels: float32 [5, 2].

    margin: how much more is seen on each side, as a share of what the crop of 112 shows. Without it, a size of whole
    128s shows 8 more columns on each side than one of 112s, as insightface cuts them.
    """
    if not margin and size % CROP and size % 128 == 0:
        return (TEMPLATE + torch.tensor([8.0, 0.0])) * (size / 128)
    zoom = size / (CROP * (1 + 2 * margin))
    return (TEMPLATE + CROP * margin) * zoom


def umeyama(points: Tensor, to: Tensor | None = None) -> Tensor:
    """[n, 5, 2] -> [n, 2, 3]: rotation, scale and shift that bring the points nearest to `to` (default: TEMPLATE).

    Least squares without reflection (Umeyama), which for points of a plane is a complex regression. Differentiable.
    Five equal points, which have no scale, give the matrix of zeros and a shift: see `usable`.
    """
    to = (TEMPLATE if to is None else to).to(points)
    middle, goal = points.mean(1), to.mean(0)
    p, q = points - middle[:, None], to - goal
    power = p.square().sum((1, 2)).clamp_min(torch.finfo(p.dtype).tiny)
    a = (p * q).sum((1, 2)) / power
    b = (p[..., 0] * q[:, 1] - p[..., 1] * q[:, 0]).sum(1) / power
    turn = torch.stack([torch.stack([a, -b], -1), torch.stack([b, a], -1)], -2)
    return torch.cat([turn, (goal - (turn @ middle[..., None])[..., 0])[..., None]], -1)


def misfit(points: Tensor) -> Tensor:
    """[n, 5, 2] -> [n]: mean distance of the aligned landmarks from the template's, in pixels of the crop of 112.

    Some 2 to 8 for faces. Landmarks that form no face, or are named the wrong way round, lie far off, because a
    similarity does not mirror.
    """
    matrix = umeyama(points)
    aligned = points @ matrix[:, :, :2].transpose(1, 2) + matrix[:, None, :, 2]
    return (aligned - TEMPLATE.to(points)).norm(dim=-1).mean(1)


def usable(points: Tensor) -> Tensor:
    """[n, 5, 2] -> bool [n]: numbers that are finite, and not all in one place."""
    spread = (points - points.mean(1, keepdim=True)).norm(dim=-1).mean(1)
    return points.isfinite().all(-1).all(-1) & (spread > 0.5)


def pixels_per_sample(points: Tensor, size: int = CROP) -> Tensor:
    """[n, 5, 2] -> [n]: how many pixels of the picture one of the crop is wide."""
    return 1 / umeyama(points, template(size))[:, :, 0].norm(dim=1)


def align(pictures: Tensor, points: Tensor, to: Tensor | None = None, size: int = CROP, samples: int = 1) -> Tensor:
    """Square crops [n, 3, size, size] of pictures [n, 3, h, w], in which the landmarks [n, 5, 2] lie as in `to`.

    `to`: [5, 2], by default `template(size)`. Zero (black) where there is no picture. Computed in float32 at least, and
    differentiable in pictures and points. samples: each pixel of the crop is the mean of so many squared bilinear
    samples; one is what insightface does, more keep a crop of a large face from seeing few of its pixels, and its
    gradient from reaching few of them.
    """
    dtype = torch.promote_types(pictures.dtype, torch.float32)
    pictures, points = pictures.to(dtype), points.to(device=pictures.device, dtype=dtype)
    matrix = umeyama(points, template(size) if to is None else to)
    turn, shift = matrix[:, :, :2], matrix[:, :, 2]
    axis = (torch.arange(size * samples, device=pictures.device, dtype=dtype) + 0.5) / samples - 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    target = torch.stack([x, y], -1).view(1, -1, 2) - shift[:, None]
    scale = turn[:, :, 0].square().sum(1)[:, None, None]  # the inverse of a similarity is its transpose over this
    seen = target @ (turn / scale)
    width_height = torch.tensor(pictures.shape[:1:-1], device=pictures.device, dtype=dtype)
    grid = ((seen + 0.5) * 2 / width_height - 1).view(-1, len(axis), len(axis), 2)
    crops = F.grid_sample(pictures, grid, align_corners=False)
    return crops if samples == 1 else F.avg_pool2d(crops, samples)


def moved_onto(picture: Tensor, points: Tensor, to: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A picture [3, h, w] moved, turned and scaled so that its landmarks [5, 2] come nearest to others `to` [5, 2], in
    one of (height, width) `size`: [3, height, width], and where it has something to show, [1, height, width] in [0, 1].

    Beyond its edges the outermost pixels go on. Shrunk with antialiasing. Computed in float32 at least.
    """
    dtype = torch.promote_types(picture.dtype, torch.float32)
    picture, points, to = picture.to(dtype), points.to(picture.device, dtype), to.to(picture.device, dtype)
    zoom = float(umeyama(points[None], to)[0, :, 0].norm())
    if zoom < 1:
        smaller = [max(1, round(side * zoom)) for side in picture.shape[-2:]]
        shares = [new / old for new, old in zip(smaller, picture.shape[-2:], strict=True)]
        points = (points + 0.5) * points.new_tensor(shares[::-1]) - 0.5
        picture = F.interpolate(picture[None], smaller, mode="bilinear", antialias=True)[0]
    matrix = umeyama(points[None], to)[0]
    axes = (torch.arange(side, device=picture.device, dtype=dtype) for side in size)
    y, x = torch.meshgrid(*axes, indexing="ij")
    seen = (torch.stack([x, y], -1) - matrix[:, 2]) @ (matrix[:, :2] / matrix[:, 0].square().sum())
    width_height = torch.tensor(picture.shape[:0:-1], device=picture.device, dtype=dtype)
    grid = ((seen + 0.5) * 2 / width_height - 1)[None]
    moved = F.grid_sample(picture[None], grid, align_corners=False, padding_mode="border")[0]
    return moved, F.grid_sample(torch.ones_like(picture[None, :1]), grid, align_corners=False)[0]


def head_around(points: Tensor, size: tuple[int, int]) -> Tensor:
    """Tells where the head is whose landmarks are [5, 2], in a picture of (height, width) `size`: [1, height, width] in
    [0, 1]. It is 1 in a circle of 1.4 times the width of ArcFace's crop, and falls to 0 over half of that crop."""
    matrix = umeyama(points[None].float())[0]
    axes = (torch.arange(side, dtype=torch.float32) for side in size)
    y, x = torch.meshgrid(*axes, indexing="ij")
    in_crop = torch.stack([x, y], -1) @ matrix[:, :2].T + matrix[:, 2]
    away = (in_crop - (CROP - 1) / 2).norm(dim=-1) / CROP  # in widths of the crop, from its middle
    return (1 - (away - 0.7) / 0.5).clamp(0, 1)[None]


def samples_for(points: Tensor, size: int = CROP) -> int:
    """Counts the samples a pixel that `align` needs to see all of a picture that it shrinks: the most for [n, 5, 2].

    Reads values: call it where the landmarks are on the CPU.
    """
    return max(1, min(MOST_SAMPLES, int(pixels_per_sample(points, size).max().ceil())))


def area(face: Face) -> float:
    """The area of the face's box, in pixels."""
    x0, y0, x1, y1 = face.box.tolist()
    return max(0.0, x1 - x0) * max(0.0, y1 - y0)


def middle(face: Face) -> tuple[float, float]:
    """The centre (x, y) of the face's box."""
    x0, y0, x1, y1 = face.box.tolist()
    return (x0 + x1) / 2, (y0 + y1) / 2


def square_around(
    face: Face, height: int, width: int, margin: float | None = None, inside: bool = True
) -> tuple[int, int, int]:
    """The square (left, top, side) around a face's box with a margin (share of its longer side) on each side; without a
    margin the largest square of the picture, as near to the face as it goes.

    Moved into the picture [height, width] where it reaches over the edge, and no larger than its shorter side; not so
    with inside=False: then it may begin before 0 and end beyond the picture.
    """
    side = min(height, width)
    if margin is not None:
        x0, y0, x1, y1 = face.box.tolist()
        side = max(1, round(max(x1 - x0, y1 - y0) * (1 + 2 * margin)))
        side = min(side, height, width) if inside else side
    x, y = middle(face)
    if not inside:
        return round(x + 0.5 - side / 2), round(y + 0.5 - side / 2), side
    left, top = (min(max(round(centre + 0.5 - side / 2), 0), size - side) for centre, size in ((x, width), (y, height)))
    return left, top, side


def nearest(faces: Sequence[Face], points: Tensor) -> Face:
    """Finds the face whose landmarks are nearest to these [5, 2]."""
    return min(faces, key=lambda face: float((face.points - points).norm(dim=-1).mean()))


def rescale_landmarks(points: Tensor, seen: tuple[int, int], now: tuple[int, int]) -> Tensor:
    """Landmarks [..., 5, 2] of a picture of (height, width) `seen`, at the same place of one of size `now`.

    Relative to the middle, in shares of the shorter side, so that a face keeps its shape.
    """
    zoom = min(now) / min(seen)
    before, after = (points.new_tensor([width - 1, height - 1]) / 2 for height, width in (seen, now))
    return (points - before) * zoom + after
