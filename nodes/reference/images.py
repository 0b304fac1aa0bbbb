"""Reference pictures made ready for the image encoder and the VAE: checked, never squashed, masks beside them."""

from __future__ import annotations

import comfy.clip_model
import torch
from torch import Tensor

from ...lookahead.vision.images import centre_square

CENTRE, TOP, PADDED = "centre", "top", "padded"  # which square of a picture that is not square

SHORTEST_SIDE = 32  # pixels; below that there is nothing to see a face from


def split_alpha(image: Tensor) -> tuple[Tensor, Tensor | None]:
    """IMAGE [n, H, W, 1 to 4] in [0, 1] -> colour [n, H, W, 3] and alpha [n, H, W] (None without), both in float32.

    A host may hand on half precision (--fp16-intermediates), which a CPU cannot resize. One or two channels are grey
    (with alpha). Raises ValueError, one sentence, for what cannot be a reference.
    """
    if image.ndim != 4 or image.shape[0] == 0:
        raise ValueError(f"The reference must be a picture or a batch of pictures, not of shape {list(image.shape)}.")
    n, height, width, channels = image.shape
    if min(height, width) < SHORTEST_SIDE:
        raise ValueError(
            f"The reference picture has {width}x{height} pixels, and at least {SHORTEST_SIDE}x{SHORTEST_SIDE} are "
            "needed: use a larger picture."
        )
    if channels > 4:
        raise ValueError(f"The reference picture has {channels} channels, and 1 to 4 are known: use an RGB picture.")
    if not torch.isfinite(image).all():
        raise ValueError("The reference picture holds values that are not finite numbers: check the node before this.")
    colour, alpha = (image, None) if channels in (1, 3) else (image[..., :-1], image[..., -1])
    return colour.float().expand(-1, -1, -1, 3), None if alpha is None else alpha.float()


def join_masks(image: Tensor, *masks: Tensor | None) -> Tensor | None:
    """Multiply masks [m, h, w] (each resized to the picture's [n, H, W]; m = 1 or n), None where there is none.

    Raises ValueError where the number of masks is neither 1 nor that of the pictures, and where they leave nothing of a
    picture: a host gives a mask of zeros with every opaque picture, which would remove the person unnoticed.
    """
    n, height, width, _ = image.shape
    joined = None
    for mask in masks:
        if mask is None:
            continue
        mask = mask.reshape(-1, *mask.shape[-2:]).to(image)
        if mask.shape[0] not in (1, n):
            raise ValueError(
                f"There are {mask.shape[0]} masks for {n} reference pictures: connect one mask for all or one for each."
            )
        if mask.shape[-2:] != (height, width):
            mask = torch.nn.functional.interpolate(mask.unsqueeze(1), (height, width), mode="bilinear").squeeze(1)
        joined = mask if joined is None else joined * mask
    if joined is None:
        return None
    joined = joined.clamp(0, 1).expand(n, -1, -1)
    if not _leaves_something(joined):
        raise ValueError(
            "The mask leaves nothing of a reference picture: leave it open, or invert it (Load Image gives 1 where a "
            "picture is transparent)."
        )
    return joined


def _leaves_something(masks: Tensor) -> bool:
    return bool((masks > 0).flatten(1).any(dim=1).all())


def as_square(colour: Tensor, mask: Tensor | None, square: str) -> tuple[Tensor, Tensor | None]:
    """Pictures [n, H, W, 3] and masks [n, H, W] as squares: their upper part, or all of them with padding.

    Padding goes on with the colours of the edge, and is masked out. CENTRE leaves the pictures as they are: what
    follows crops them about the centre.
    """
    _, height, width, _ = colour.shape
    if square == CENTRE or height == width:
        return colour, mask
    if square == TOP:
        side, left = min(height, width), max(0, width - height) // 2
        part = slice(0, side), slice(left, left + side)
        return colour[:, *part], None if mask is None else mask[:, *part]
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    pad = (left, side - width - left, top, side - height - top)
    mask = torch.nn.functional.pad(colour.new_ones(colour.shape[:3]) if mask is None else mask, pad)
    return torch.nn.functional.pad(colour.movedim(-1, 1), pad, mode="replicate").movedim(1, -1), mask


def clip_pixels(colour: Tensor, mask: Tensor | None, clip_vision) -> Tensor:
    """Colour [n, H, W, 3] in [0, 1] -> the image encoder's input [n, 3, S, S], by the host's own preprocessing.

    Outside the mask the input is 0, which is what the null tokens are made of.
    """
    size = clip_vision.image_size
    pixels = comfy.clip_model.clip_preprocess(
        colour, size=size, mean=clip_vision.image_mean, std=clip_vision.image_std, crop=True
    ).float()
    if mask is None:
        return pixels
    as_picture = mask.unsqueeze(-1).expand(-1, -1, -1, 3)
    weights = comfy.clip_model.clip_preprocess(as_picture, size=size, mean=[0.0] * 3, std=[1.0] * 3, crop=True)
    return pixels * weights.float()


def centre_square_masks(masks: Tensor, size: int) -> Tensor:
    """Masks [n, H, W] in [0, 1] -> [n, size, size], cut as `centre_square` cuts their pictures.

    Raises ValueError, one sentence, where nothing of a picture is left in the square.
    """
    square = centre_square(masks.unsqueeze(-1), size).squeeze(-1)
    if not _leaves_something(square):
        raise ValueError(
            "The mask leaves nothing of a reference picture, which is cropped to the square about its centre: crop the "
            "picture to the face first."
        )
    return square
