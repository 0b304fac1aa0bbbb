"""The example pictures that the workflows name, and the thumbnails of the page's list of templates."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..mini.world.data import SEEDS
from ..mini.world.faces import STYLES, Faces, frontal, render, sample_identities, sample_nuisance
from .common import ROOT, say

INPUT = ROOT / "workflows" / "input"  # what `nodes/examples.py` copies into the host's input folder
SIDE = 512  # of an example picture


def person(number: int, style: str = "photo", still: bool = True, seed: int = 0) -> Faces:
    """Held-out person `number`, as `reference_faces` draws them; seed: of another photo, where not still."""
    numbers = torch.Generator().manual_seed(SEEDS["held_out"])
    drawn = torch.full((1,), STYLES.index(style))
    for _ in range(number + 1):
        identity, nuisance = sample_identities(1, numbers), sample_nuisance(1, numbers, style=drawn)
    if not still:
        nuisance = sample_nuisance(1, torch.Generator().manual_seed(seed), style=drawn)
        nuisance["scale"] = torch.full_like(nuisance["scale"], 1.1)
    return Faces(identity, frontal(nuisance) if still else nuisance)


def as_picture(pixels: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] -> a picture."""
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())


def examples() -> dict[str, Image.Image]:
    """The example pictures by file name: drawn people, who exist nowhere."""
    drawn = {
        "face_1": person(0),
        "face_1b": person(0, still=False, seed=3),
        "face_1c": person(0, still=False, seed=8),
        "face_2": person(1),
        "look": person(3, "comic"),
    }
    pictures = {name: as_picture(render(who, SIDE, seed=number)[0]) for number, (name, who) in enumerate(drawn.items())}
    group = [as_picture(render(person(number), 384, seed=number)[0]) for number in (0, 5, 9)]
    pictures["group"] = Image.new("RGB", (3 * 384, 384))
    for place, one in enumerate(group):
        pictures["group"].paste(one, (384 * place, 0))
    scene = as_picture(render(person(9), SIDE, seed=9)[0])
    mask = Image.new("L", scene.size, 255)
    ImageDraw.Draw(mask).ellipse((150, 30, 362, 470), fill=0)  # transparent: what Load Image gives as a mask
    scene.putalpha(mask)
    pictures["scene"] = scene
    return {f"lookahead_{name}.{'jpg' if picture.mode == 'RGB' else 'webp'}": picture for name, picture in pictures.items()}


def draw_examples(folder: Path = INPUT) -> None:
    """Write the example pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in examples().items():
        picture.save(folder / name, quality=90)
        say(f"{folder.relative_to(ROOT)}/{name} is drawn")
