"""Pictures on their way into the frozen models: turned as their camera says, never squashed, in the encoders' form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from ..lookahead.files.atomic import first_line

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class PictureError(ValueError):
    """Why a file cannot be used as a picture, in one sentence."""


def read(path: Path) -> Tensor:
    """A picture file as [3, h, w] in [0, 1]; what is transparent becomes white.

    Raises PictureError for a file that is missing, cut short or no picture.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            bytes_ = np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow has an exception a format and kind of damage
        raise PictureError(f"{path} cannot be read as a picture ({first_line(error)}).") from error
    return torch.from_numpy(bytes_.copy()).permute(2, 0, 1) / 255


def resized(picture: Tensor, size: int) -> Tensor:
    """Square pictures [n, 3, h, h] in [0, 1] -> [n, 3, size, size]."""
    if picture.shape[-1] == size:
        return picture
    return F.interpolate(picture, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


def clip_input(pictures: Tensor, size: int) -> Tensor:
    """Pictures [n, 3, h, w] in [0, 1] -> a CLIP image encoder's input [n, 3, size, size].

    The shorter side is resized, the rest cut off about the centre, and values are rounded to 8 bit, as the host does.
    """
    height, width = pictures.shape[-2:]
    if (height, width) != (size, size):
        scale = size / min(height, width)
        scaled = round(scale * height), round(scale * width)
        pictures = F.interpolate(pictures, scaled, mode="bicubic", antialias=True)
        top, left = (pictures.shape[2] - size) // 2, (pictures.shape[3] - size) // 2
        pictures = pictures[:, :, top : top + size, left : left + size]
    pictures = (255 * pictures).clamp(0, 255).round() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1).to(pictures) for values in (CLIP_MEAN, CLIP_STD))
    return (pictures - mean) / std
