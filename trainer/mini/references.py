"""Reference pictures for demos and measurements: portraits of held-out people, whom nothing was trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from .data import SEEDS
from .faces import STYLES, Faces, frontal, render, sample_identities, sample_nuisance


def reference_faces(people: int, size: int = 128, first: int = 0) -> Tensor:
    """Photos [people, 3, size, size] in [0, 1] of held-out people number `first` and on, straight from the front."""
    numbers = torch.Generator().manual_seed(SEEDS["held_out"])
    # Each person is drawn alone, so that who is number 7 does not depend on how many are asked for.
    drawn = []
    for _ in range(first + people):
        photo = torch.full((1,), STYLES.index("photo"))
        one = Faces(sample_identities(1, numbers), frontal(sample_nuisance(1, numbers, style=photo)))
        drawn.append(one)
    faces = Faces(*({k: torch.cat([f[part][k] for f in drawn[first:]]) for k in drawn[0][part]} for part in (0, 1)))
    return render(faces, size, seed=first)
