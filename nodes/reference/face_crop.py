"""Which face of a picture is meant, what is cut out around it, and a drawing of all that was found."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from ...lookahead.vision.faces import CROP, Face, align, area, middle, pixels_per_sample, samples_for, template
from ...lookahead.vision.images import resize_square

SMALLEST = 64  # side of a crop in pixels
_CHOSEN, _OTHER, _POINTS = (80, 220, 100), (240, 180, 60), (240, 80, 80)


def _from_the_middle(face: Face, height: int, width: int) -> float:
    x, y = middle(face)
    return (x - (width - 1) / 2) ** 2 + (y - (height - 1) / 2) ** 2


# (face, height and width of the picture) -> what faces are sorted by, smallest first
ORDERS: dict[str, Callable[[Face, int, int], float]] = {
    "largest first": lambda face, h, w: -area(face),
    "left to right": lambda face, h, w: middle(face)[0],
    "top to bottom": lambda face, h, w: middle(face)[1],
    "middle first": _from_the_middle,
    "surest first": lambda face, h, w: -face.score,
}


def in_order(faces: list[Face], order: str, height: int, width: int) -> list[Face]:
    """The faces of a picture sorted by one of ORDERS."""
    return sorted(faces, key=lambda face: ORDERS[order](face, height, width))


def faces_in_boxes(boxes: Any, pictures: int, threshold: float) -> list[list[Face]]:
    """The boxes of the host's face finder (BOUNDING_BOX) as the faces of each picture, without landmarks.

    boxes: a list of dicts with x, y, width, height in pixels (and a score) for each picture; such a list, for one
    picture; or one dict, for all. Those with a score below the threshold are left out.
    Raises ValueError, one sentence, for anything else.
    """
    try:
        lists = [[boxes]] * pictures if isinstance(boxes, dict) else list(boxes)
        if lists and all(isinstance(one, dict) for one in lists) and pictures == 1:
            lists = [lists]
        numbers = [[[float(b[k]) for k in ("x", "y", "width", "height")] for b in of_one] for of_one in lists]
        scores = [[float(box.get("score", 1.0)) for box in of_one] for of_one in lists]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            "The boxes are not those of a face finder (x, y, width and height of each face): connect bboxes of the "
            "host's MediaPipe node."
        ) from error
    if len(numbers) != pictures or any(not math.isfinite(x) for of_one in numbers for box in of_one for x in box):
        raise ValueError(
            f"There are boxes of {len(numbers)} pictures for {pictures}, or boxes of no finite size: give the face "
            "finder the same pictures."
        )
    return [
        [
            Face(torch.tensor([x, y, x + w, y + h]), torch.zeros(0, 2), score)
            for (x, y, w, h), score in zip(of_one, scored, strict=True)
            if w > 0 and h > 0 and score >= threshold
        ]
        for of_one, scored in zip(numbers, scores, strict=True)
    ]


def plain_crop(picture: Tensor, square: tuple[int, int, int], size: int) -> Tensor:
    """The square (left, top, side) of a picture [channels, h, w] in [0, 1], resized: [channels, size, size].

    Where it reaches beyond the picture, the colours of the edge go on and the fourth channel (alpha) is 0.
    """
    left, top, side = square
    height, width = picture.shape[-2:]
    beyond = [max(0, n) for n in (-left, left + side - width, -top, top + side - height)]
    if any(beyond):
        colour, alpha = F.pad(picture[None, :3], beyond, mode="replicate"), F.pad(picture[None, 3:], beyond)
        picture, left, top = torch.cat([colour, alpha], 1)[0], left + beyond[0], top + beyond[2]
    return resize_square(picture[None, :, top : top + side, left : left + side], size)[0]


def natural_size(face: Face, margin: float) -> int:
    """Side in pixels of an aligned crop that is about as fine as the picture."""
    return max(SMALLEST, round(CROP * (1 + 2 * margin) * pixels_per_sample(face.points[None]).item()))


def aligned_crop(picture: Tensor, face: Face, size: int, margin: float) -> Tensor:
    """The face of a picture [channels, h, w] in [0, 1], upright, its landmarks as in ArcFace's crop: [channels, size,
    size].

    0 (black, transparent) where the picture ends.
    """
    points = face.points[None]
    samples = samples_for(points, max(1, round(size / (1 + 2 * margin))))
    return align(picture[None], points, template(size, margin), size, samples)[0].clamp(0, 1)


def drawing(picture: Tensor, faces: list[Face], chosen: int | None) -> Tensor:
    """A picture [3, h, w] in [0, 1] with the box, landmarks, number and score of each face: IMAGE [h, w, 3].

    chosen: the number of the face in the list that is drawn in green, None where there is none.
    """
    bytes_ = (picture.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().cpu().numpy()
    image = Image.fromarray(np.ascontiguousarray(bytes_))
    draw, line = ImageDraw.Draw(image), max(1, round(min(image.size) / 200))
    font = ImageFont.load_default(size=max(9, min(image.size) // 24))
    for number, face in enumerate(faces):
        colour = _CHOSEN if number == chosen else _OTHER
        x0, y0, x1, y1 = face.box.tolist()
        draw.rectangle([x0, y0, max(x0, x1), max(y0, y1)], outline=colour, width=line)
        for x, y in face.points.tolist():
            draw.ellipse([x - line, y - line, x + line, y + line], fill=_POINTS)
        words, at = f"{number}  {face.score:.2f}", (max(x0, 0) + 2 * line, max(y0, 0) + line)
        draw.rectangle(draw.textbbox(at, words, font=font), fill=(0, 0, 0))
        draw.text(at, words, fill=colour, font=font)
    return torch.from_numpy(np.asarray(image).copy()).float() / 255
