"""ArcFace's alignment: five landmarks -> a crop of 112 pixels, as insightface's `norm_crop` makes it.

Landmarks are in insightface's pixels here: the centre of the first is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .face_networks import CROP

# Where the eyes, the nose and the corners of the mouth come to lie (insightface's arcface_dst).
TEMPLATE = torch.tensor(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


def similarity(points: Tensor) -> Tensor:
    """[n, 5, 2] -> [n, 2, 3]: rotation, scale and shift that bring the points nearest to the template.

    Least squares without reflection (Umeyama), which for points of a plane is a complex regression.
    """
    template = TEMPLATE.to(points)
    middle, goal = points.mean(1), template.mean(0)
    p, q = points - middle[:, None], template - goal
    power = p.square().sum((1, 2))
    a = (p * q).sum((1, 2)) / power
    b = (p[..., 0] * q[:, 1] - p[..., 1] * q[:, 0]).sum(1) / power
    turn = torch.stack([torch.stack([a, -b], -1), torch.stack([b, a], -1)], -2)
    return torch.cat([turn, (goal - (turn @ middle[..., None])[..., 0])[..., None]], -1)


def align(picture: Tensor, points: Tensor) -> Tensor:
    """Crops [n, 3, 112, 112] of pictures [n, 3, h, w] by their landmarks [n, 5, 2]; black where there is no picture.

    Differentiable in both.
    """
    matrix = similarity(points)
    turn, shift = matrix[:, :, :2], matrix[:, :, 2]
    axis = torch.arange(CROP, device=picture.device, dtype=points.dtype)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    target = torch.stack([x, y], -1).view(1, -1, 2) - shift[:, None]
    scale = turn[:, :, 0].square().sum(1)[:, None, None]  # the inverse of a similarity is its transpose over this
    seen = target @ (turn / scale)
    size = torch.tensor(picture.shape[:1:-1], device=picture.device, dtype=points.dtype)
    grid = ((seen + 0.5) * 2 / size - 1).view(-1, CROP, CROP, 2)
    return F.grid_sample(picture, grid, align_corners=False)
