"""Pictures on their way into the frozen models: turned as their camera says, never squashed, in the encoders' form."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..lookahead.files.atomic import first_line

_BITS, _PHOTOMETRIC = 258, 262  # tags of a TIFF


class PictureError(ValueError):
    """Why a file cannot be used as a picture, in one sentence."""


def read(path: Path | BinaryIO) -> Tensor:
    """A picture file, by its path or open, as [3, h, w] in [0, 1]; what is transparent becomes white.

    Raises PictureError for a file that is missing, cut short, no picture, or of values whose white is not known.
    """
    try:
        with Image.open(path) as file:
            return rgb(file).permute(2, 0, 1)
    except PictureError as error:
        raise PictureError(f"{path} {error}") from None
    except Exception as error:  # Pillow has an exception a format and kind of damage
        raise PictureError(f"{path} cannot be read as a picture ({first_line(error)}).") from error


def rgb(image: Image.Image) -> Tensor:
    """A picture of any kind as [h, w, 3] in [0, 1], turned as its camera says; what is transparent becomes white.

    Grey of 16 bit (scans) keeps its depth, which Pillow's own conversion cuts off at 255: nearly all becomes white.
    Raises PictureError for numbers of 32 bit that are not in the range of 16 (whole) or 0 to 1 (floating point).
    """
    tags = getattr(image, "tag_v2", {})
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _deep(image, tags)[..., None].expand(-1, -1, 3)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()) / 255


def _deep(image: Image.Image, tags: Mapping[int, Any]) -> Tensor:
    """Grey of more than 8 bit as [h, w] in [0, 1]. tags: of a TIFF, which say how many bits, and whether 0 is white."""
    values = torch.from_numpy(np.asarray(image).astype(np.float64))
    if image.mode == "F":
        least, white = 0.0, 1.0
    elif image.mode == "I":  # Pillow's form of 16 bit too; but what reaches 255 only may have 255 for its white
        least, white = 256.0, 65535.0
    else:
        least, white = 0.0, float(2 ** tags.get(_BITS, (16,))[0] - 1)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and least <= high <= white):
        raise PictureError(
            f"has grey values of 32 bit from {low:g} to {high:g}, which do not say what is white: save it with 8 or 16 "
            "bit."
        )
    if (clear := image.info.get("transparency")) is not None:  # the one grey that is transparent, of a PNG
        values[values == clear] = white
    shares = (values / white).float()
    return 1 - shares if tags.get(_PHOTOMETRIC) == 0 else shares


def as_pixels(image: Image.Image | Tensor) -> Tensor:
    """A picture, as `rgb` reads it, or pixels [1, H, W, 3] in [0, 1], as such pixels.

    Raises ValueError, one sentence, for anything else.
    """
    if isinstance(image, Image.Image):
        try:
            return rgb(image).unsqueeze(0)
        except PictureError as error:
            raise PictureError(f"The reference {error}") from None
    if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[0] != 1 or image.shape[-1] != 3:
        what = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(
            f"The reference is {what}, and a picture or pixels of shape [1, H, W, 3] are needed: pass one."
        )
    return image.float()
