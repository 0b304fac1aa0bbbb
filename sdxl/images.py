"""Pictures on their way into the frozen models: turned as their camera says, never squashed, in the encoders' form."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..lookahead.files.atomic import first_line


class PictureError(ValueError):
    """Why a file cannot be used as a picture, in one sentence."""


def read(path: Path | BinaryIO) -> Tensor:
    """A picture file, by its path or open, as [3, h, w] in [0, 1]; what is transparent becomes white.

    Raises PictureError for a file that is missing, cut short or no picture.
    """
    try:
        with Image.open(path) as file:
            image: Image.Image = ImageOps.exif_transpose(file)
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            bytes_ = np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow has an exception a format and kind of damage
        raise PictureError(f"{path} cannot be read as a picture ({first_line(error)}).") from error
    return torch.from_numpy(bytes_.copy()).permute(2, 0, 1) / 255


def as_pixels(image: Image.Image | Tensor) -> Tensor:
    """A picture, or pixels [1, H, W, 3] in [0, 1], as such pixels; turned as its camera says.

    Raises ValueError, one sentence, for anything else.
    """
    if isinstance(image, Image.Image):
        rgb = ImageOps.exif_transpose(image).convert("RGB")
        return torch.from_numpy(np.asarray(rgb).copy()).unsqueeze(0) / 255.0
    if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[0] != 1 or image.shape[-1] != 3:
        what = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(
            f"The reference is {what}, and a picture or pixels of shape [1, H, W, 3] are needed: pass one."
        )
    return image.float()
