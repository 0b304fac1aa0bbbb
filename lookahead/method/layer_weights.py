"""Weights of a reference by layer and over the steps: how strongly it acts where in the UNet, and when.

Layers are the UNet's attention blocks in the order in which it runs, 11 in SDXL: 0 to 3 in the encoder half, 4 in the
middle, 5 to 10 in the decoder half, as other packs count them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

# What two blocks of SDXL carry (InstantStyle, arXiv 2404.02733), by diffusers' names.
STYLE_BLOCK, COMPOSITION_BLOCK = "up_blocks.0.attentions.1", "down_blocks.2.attentions.1"
EVEN, LIKENESS, STYLE, COMPOSITION, BOTH, LIST = (
    "even",
    "likeness",
    "style",
    "composition",
    "style and composition",
    "list",
)

# The weight of a block by preset; those of LIST stand in a text.
PRESETS: dict[str, Callable[[str], float]] = {
    EVEN: lambda block: 1.0,
    LIKENESS: lambda block: float(block not in (STYLE_BLOCK, COMPOSITION_BLOCK)),
    STYLE: lambda block: float(block == STYLE_BLOCK),
    COMPOSITION: lambda block: float(block == COMPOSITION_BLOCK),
    BOTH: lambda block: float(block in (STYLE_BLOCK, COMPOSITION_BLOCK)),
}
LARGEST = 5.0  # of a weight, either sign


def numbers(text: str, what: str) -> list[float]:
    """Numbers between commas, semicolons or blanks, none for a text without any.

    Raises ValueError, one sentence that begins with `what` ("The steps are"), for other words and for numbers that are
    not finite or beyond LARGEST.
    """
    try:
        found = [float(word) for word in text.replace(",", " ").replace(";", " ").split()]
    except ValueError:
        found = [math.nan]
    if not all(abs(number) <= LARGEST for number in found):
        raise ValueError(
            f"{what} {text!r}: write numbers from -{LARGEST:g} to {LARGEST:g} with commas between them, such as 1, 0.5."
        )
    return found


def pairs(text: str) -> dict[int, float] | None:
    """Weights of single layers, written "3:1, 6:0.5"; None for a text without a colon.

    Raises ValueError, one sentence, for what is neither.
    """
    if ":" not in text:
        return None
    out = {}
    for part in text.replace(";", ",").strip(" ,").split(","):
        number, _, weight = part.partition(":")
        values = numbers(weight, "The layers are")
        if not number.strip().isdecimal() or len(values) != 1:
            raise ValueError(
                f"The layers are {text!r}: write the number of a layer and its weight, such as 3:1, 6:0.5."
            )
        out[int(number)] = values[0]
    return out


def block_of(path: str) -> str:
    """The attention block that a transformer block, by its path in diffusers' UNet, belongs to."""
    return path.rpartition(".transformer_blocks.")[0]


def layer_weights(paths: Sequence[str], preset: str, text: str = "") -> dict[str, float]:
    """The weight of each transformer block, by its path in diffusers' UNet.

    paths: all of them in the order in which the UNet runs; preset: one of PRESETS, or LIST for those in `text`: a
    number for every layer ("1, 1, 0, ..."), or single layers with the others 0 ("3:1, 6:0.5").
    Raises ValueError, one sentence, where the text does not fit the layers.
    """
    blocks = list(dict.fromkeys(map(block_of, paths)))
    if preset in PRESETS:
        weights = {block: PRESETS[preset](block) for block in blocks}
    elif (single := pairs(text)) is not None:
        if wrong := [number for number in single if number >= len(blocks)]:
            raise ValueError(f"There is no layer {wrong[0]}: this model has {len(blocks)}, numbered from 0.")
        weights = {block: single.get(number, 0.0) for number, block in enumerate(blocks)}
    else:
        listed = numbers(text, "The layers are")
        if len(listed) != len(blocks):
            raise ValueError(
                f"The layers are {len(listed)} numbers, and this model has {len(blocks)} layers: write one for each, "
                "or single ones such as 3:1, 6:0.5."
            )
        weights = dict(zip(blocks, listed, strict=True))
    return {path: weights[block_of(path)] for path in paths}


def at_share(values: Sequence[float], share: float) -> float:
    """The value at a share of the sampling in [0, 1]: `values` are spread evenly over it, with straight lines between.

    One value holds everywhere, none is 1.
    """
    if len(values) < 2:
        return values[0] if values else 1.0
    place = min(max(share, 0.0), 1.0) * (len(values) - 1)
    left = min(int(place), len(values) - 2)
    return values[left] + (place - left) * (values[left + 1] - values[left])


def sampled(points: Iterable[tuple[float, float]], count: int = 257) -> tuple[float, ...]:
    """Straight lines between points (share, value), at `count` even places; beyond the outermost their values hold."""
    known = sorted((float(x), float(y)) for x, y in points)
    out = []
    for n in range(count):
        x = n / (count - 1)
        right = next((i for i, point in enumerate(known) if point[0] >= x), None)
        if right is None or right == 0:
            out.append(known[-1 if right is None else 0][1])
        else:
            (x0, y0), (x1, y1) = known[right - 1], known[right]
            out.append(y0 + (x - x0) / (x1 - x0) * (y1 - y0))
    return tuple(out)


def share_of(sigma: float, percent_to_sigma: Callable[[float], float]) -> float:
    """The share of the sampling, 0 to 1, that has come to a noise level: the inverse of the host's falling function."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if percent_to_sigma(middle) > sigma else (low, middle)
    return (low + high) / 2
