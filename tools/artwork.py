"""`python -m lcm_lookahead.tools.artwork`: the icon and the banner of the registry, from the drawn world.

A person, and the same person in other styles: what the pack is for. Nobody real is in it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ..mini.world.faces import STYLES, Faces, frontal, render, sample_identities, sample_nuisance
from .common import ROOT, run_main

PERSON = 2  # seed of the person in the picture
INK, PAPER = (24, 26, 38), (246, 244, 238)


def portraits(styles: tuple[str, ...], side: int) -> list[Image.Image]:
    """One person in these styles, `side` pixels a side."""
    numbers = torch.Generator().manual_seed(PERSON)
    n = len(styles)
    identity = {k: v.expand(n) for k, v in sample_identities(1, numbers).items()}
    style = torch.tensor([STYLES.index(s) for s in styles])
    nuisance = frontal(sample_nuisance(n, numbers, style=style, place=torch.zeros(n, dtype=torch.long)))
    same = {"background": (0.62, 0.74, 0.86), "clothes": (0.16, 0.36, 0.52)}
    nuisance |= {k: torch.tensor([colour]).expand(n, 3) for k, colour in same.items()}
    nuisance["smile"] = torch.full((n,), 0.8)
    drawn = render(Faces(identity, nuisance), side, seed=PERSON)
    return [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in drawn]


def rounded(image: Image.Image, radius: int) -> Image.Image:
    """The picture with round corners, transparent outside; edges are smooth."""
    mask = Image.new("L", (4 * image.width, 4 * image.height))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, mask.width - 1, mask.height - 1), 4 * radius, fill=255)
    out = image.convert("RGBA")
    out.putalpha(mask.resize(image.size, Image.Resampling.LANCZOS))
    return out


def icon(side: int = 400) -> Image.Image:
    """A photo that is a comic on its right half."""
    photo, comic = portraits(("photo", "comic"), side)
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon([(side * 0.56, 0), (side, 0), (side, side), (side * 0.44, side)], fill=255)
    both = Image.composite(comic, photo, mask.filter(ImageFilter.GaussianBlur(0.8)))
    ImageDraw.Draw(both).line([(side * 0.56, -2), (side * 0.44, side + 2)], fill=PAPER, width=side // 50)
    return rounded(both, side // 8)


def banner(width: int = 1260, height: int = 540) -> Image.Image:
    """21:9: the person, an arrow, and the person in four styles, under the name."""
    sheet = Image.new("RGB", (width, height), INK)
    draw = ImageDraw.Draw(sheet)
    big, small, gap = 300, 170, 14
    styles = ("photo", "oil painting", "pencil drawing", "neon sign", "wanted poster")
    person = portraits(styles[:1], big)[0]
    top = height - big - 44
    sheet.paste(rounded(person, 24), (60, top), rounded(person, 24))
    middle = top + big // 2
    draw.line([(60 + big + 24, middle), (60 + big + 74, middle)], fill=PAPER, width=6)
    draw.polygon([(60 + big + 94, middle), (60 + big + 70, middle - 14), (60 + big + 70, middle + 14)], fill=PAPER)
    left = 60 + big + 116
    for number, image in enumerate(portraits(styles[1:], small)):
        tile = rounded(image, 18)
        sheet.paste(tile, (left + number * (small + gap), middle - small // 2), tile)
    draw.text((60, 44), "LCM-Lookahead", fill=PAPER, font=ImageFont.load_default(76))
    line = "a face, drawn again under a new prompt"
    draw.text((64, 132), line, fill=(172, 180, 205), font=ImageFont.load_default(30))
    return sheet


def main(arguments: list[str]) -> int:
    """Write docs/icon.png and docs/banner.png."""
    folder = Path(arguments[0]) if arguments else ROOT / "docs"
    for name, image in (("icon", icon()), ("banner", banner())):
        image.save(folder / f"{name}.png", optimize=True)
        print(folder / f"{name}.png")
    return 0


if __name__ == "__main__":
    run_main(main)
