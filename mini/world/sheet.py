"""Picture sheets of the drawn faces."""

from __future__ import annotations

from pathlib import Path

import torch

from ..report.measure import save_grid
from .faces import STYLES, Faces, render, sample_identities, sample_nuisance


def draw_sheet(path: Path, people: int, seed: int, size: int = 128) -> None:
    """One row a person, one column a style."""
    numbers = torch.Generator().manual_seed(seed)
    identities = {k: v.repeat_interleave(len(STYLES)) for k, v in sample_identities(people, numbers).items()}
    style = torch.arange(len(STYLES)).repeat(people)
    faces = Faces(identities, sample_nuisance(len(style), numbers, style=style))
    save_grid(render(faces, size, seed=seed), len(STYLES), path)
