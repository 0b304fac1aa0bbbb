"""The files that the README's lines of Python name, of the mini world: to try them as they stand."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..lookahead.files.atomic import atomic_folder
from ..tools.common import Problem
from .demo import draw_references
from .drawn_people import write_folder
from .plan import HERE

BASE = Path("stabilityai", "stable-diffusion-xl-base-1.0")
IMAGE_ENCODER, ENCODER, PICTURE = "CLIP-ViT-H-14", "my_encoder.safetensors", "me.png"


def write_example(folder: Path) -> Path:
    """Write the mini world under the names of SDXL, its image encoder, an encoder and a picture into a new folder.

    Raises Problem where the folder holds something already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise Problem(f"{folder} is not empty: name a new folder.")
    with atomic_folder(folder) as part:
        write_folder(part / BASE)
        (part / BASE / "image_encoder").rename(part / IMAGE_ENCODER)
        shutil.copyfile(HERE / "trained" / "mini_encoder.safetensors", part / ENCODER)
        draw_references(1)[0].save(part / PICTURE)
    return folder
