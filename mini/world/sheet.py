"""Pictures side by side in one file, and such a sheet of the drawn faces."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .faces import STYLES, Faces, render, sample_identities, sample_nuisance


def save_grid(pictures: Tensor, columns: int, path: Path) -> None:
    """Save pictures [n, 3, h, w] in [0, 1] as one PNG, row by row; what is missing in the last row is black."""
    n, _, h, w = pictures.shape
    rows = -(-n // columns)
    sheet = torch.zeros(rows * columns, 3, h, w)
    sheet[:n] = pictures
    sheet = sheet.view(rows, columns, 3, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, 3)
    Image.fromarray((sheet * 255).round().byte().numpy()).save(path)


def draw_sheet(path: Path, people: int, seed: int, size: int = 128) -> None:
    """Draw one row a person, one column a style."""
    numbers = torch.Generator().manual_seed(seed)
    identities = {k: v.repeat_interleave(len(STYLES)) for k, v in sample_identities(people, numbers).items()}
    style = torch.arange(len(STYLES)).repeat(people)
    faces = Faces(identities, sample_nuisance(len(style), numbers, style=style))
    save_grid(render(faces, size, seed=seed), len(STYLES), path)
