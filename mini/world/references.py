"""Reference pictures for demos and measurements: portraits of held-out people, whom nothing was trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from .data import SEEDS
from .faces import STYLES, Faces, frontal, render, sample_identities, sample_nuisance


def reference_people(people: int, first: int = 0, style: str = "photo") -> list[Faces]:
    """Held-out people number `first` and on, each as one picture straight from the front.

    Each person is drawn alone, so that who is number 7 does not depend on how many are asked for.
    """
    numbers = torch.Generator().manual_seed(SEEDS["held_out"])
    drawn = torch.full((1,), STYLES.index(style))
    return [
        Faces(sample_identities(1, numbers), frontal(sample_nuisance(1, numbers, style=drawn)))
        for _ in range(first + people)
    ][first:]


def reference_faces(people: int, size: int = 128, first: int = 0, style: str = "photo") -> Tensor:
    """Pictures [people, 3, size, size] in [0, 1] of `reference_people`."""
    everyone = reference_people(people, first, style)
    return torch.cat([render(one, size, seed=number) for number, one in enumerate(everyone, first)])
