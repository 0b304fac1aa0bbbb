"""Reference pictures for demos and measurements: portraits of held-out people, whom nothing was trained on, and one
photo each of things and people that become concepts."""

from __future__ import annotations

import torch
from torch import Tensor

from . import things
from .data import SEEDS
from .faces import STYLES, Faces, frontal, render, sample_identities, sample_nuisance

GROUND = 0.85  # grey of the ground of concepts' pictures: as light as the base has seen grounds


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


def concept_things(count: int, seed: int, kind: Tensor | None = None) -> things.Things:
    """Things, each in one photo on a light ground, upright in the middle, as a shop would take it.

    All on the same ground: where each had a colour of its own, the colour told a training more of a picture than what
    was on it, and the word that it learnt was that of the ground.

    kind: int64 [count], by default drawn among the classes that training sees.
    """
    numbers = torch.Generator().manual_seed(seed)
    identity = things.sample_things(count, numbers, kind)
    nuisance = things.sample_nuisance(count, numbers, *_plain_photos(count))
    return things.Things(identity, things.straight(nuisance | _ground(count)))


def concept_people(count: int, seed: int) -> Faces:
    """People, each in one photo on the same light ground, from the front."""
    numbers = torch.Generator().manual_seed(seed)
    identity = sample_identities(count, numbers)
    nuisance = sample_nuisance(count, numbers, *_plain_photos(count))
    return Faces(identity, frontal(nuisance | _ground(count)))


def _plain_photos(count: int) -> tuple[Tensor, Tensor]:
    """Style and place of each."""
    plain = torch.zeros(count, dtype=torch.long)
    return plain + STYLES.index("photo"), plain


def _ground(count: int) -> dict[str, Tensor]:
    """The light ground, the same of each."""
    return {"background": torch.full((count, 3), GROUND)}
