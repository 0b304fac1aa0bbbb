"""The concepts of the study of concepts: things and people that no training has seen, and the prompts they stand in.

Each is a function of its group and number alone, so that a larger study begins with the concepts of a smaller one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...lookahead.method.concept_input import PLACEHOLDER
from ..plan import IMAGE_SIZE, LATENT_SIZE
from ..world import faces, things
from ..world.faces import PLACES, STYLES
from ..world.references import concept_people, concept_things

CHUNK = 16  # concepts that are tuned and drawn together, and kept in one file
SWEPT_FROM = 5000  # number of the first concept that rates are chosen on, of each group
SEEN, UNSEEN, PEOPLE = "things of seen classes", "things of unseen classes", "people"
WHOLE = {SEEN: 64, UNSEEN: 32, PEOPLE: 48}
FACE = "face"
_TRUTH, _NOISE = 1_000_000, 2_000_000  # what is drawn of a concept, apart from itself, has seeds of its own


class Asked(NamedTuple):
    """A prompt asks for a style and a place."""

    style: str
    place: str

    @property
    def text(self) -> str:
        """The prompt, with the placeholder for the concept."""
        return f"{'an' if self.style[0] in 'aeiou' else 'a'} {self.style} of a {PLACEHOLDER} {self.place}"


# The styles in which colours survive, each in another place.
PROMPTS = (
    Asked("photo", "on a beach"),
    Asked("oil painting", "in a forest"),
    Asked("comic", "in a city"),
    Asked("pixel art", "in the snow"),
)


class Group(Protocol):
    """Concepts of one kind, by number."""

    @property
    def seed(self) -> int:
        """The first seed, apart from those of all other groups."""

    @property
    def classes(self) -> int:
        """The number of classes that take turns."""

    def noun(self, number: int) -> str:
        """The name of its class."""

    def picture(self, number: int) -> Tensor:
        """The one photo of it, [3, size, size] in [0, 1]."""

    def truth(self, number: int, asked: Asked, seed: int) -> Tensor:
        """Draws the same thing or person by the world itself, in a style and place: [3, size, size] in [0, 1]."""


@dataclass(frozen=True)
class ThingGroup:
    """Things of some classes in turn."""

    seed: int
    kinds: Sequence[int]

    @property
    def classes(self) -> int:
        return len(self.kinds)

    def noun(self, number: int) -> str:
        return things.CLASSES[self._kind(number)]

    def picture(self, number: int) -> Tensor:
        return things.render(self._thing(number), IMAGE_SIZE, seed=self.seed + number)[0]

    def truth(self, number: int, asked: Asked, seed: int) -> Tensor:
        nuisance = things.sample_nuisance(1, torch.Generator().manual_seed(seed), *_indices(asked))
        return things.render(things.Things(self._thing(number).identity, nuisance), IMAGE_SIZE, seed=seed)[0]

    def _kind(self, number: int) -> int:
        return self.kinds[number % len(self.kinds)]

    def _thing(self, number: int) -> things.Things:
        return concept_things(1, self.seed + number, torch.tensor([self._kind(number)]))


@dataclass(frozen=True)
class FaceGroup:
    """People, whose class is a face."""

    seed: int
    classes: int = 1

    def noun(self, number: int) -> str:
        return FACE

    def picture(self, number: int) -> Tensor:
        return faces.render(concept_people(1, self.seed + number), IMAGE_SIZE, seed=self.seed + number)[0]

    def truth(self, number: int, asked: Asked, seed: int) -> Tensor:
        nuisance = faces.sample_nuisance(1, torch.Generator().manual_seed(seed), *_indices(asked))
        person = concept_people(1, self.seed + number).identity
        return faces.render(faces.Faces(person, nuisance), IMAGE_SIZE, seed=seed)[0]


def _indices(asked: Asked) -> tuple[Tensor, Tensor]:
    return torch.tensor([STYLES.index(asked.style)]), torch.tensor([PLACES.index(asked.place)])


_SEEN = len(things.CLASSES) - things.HELD_OUT
GROUPS: dict[str, Group] = {
    SEEN: ThingGroup(20_000, range(_SEEN)),
    UNSEEN: ThingGroup(30_000, range(_SEEN, len(things.CLASSES))),
    PEOPLE: FaceGroup(40_000),
}


@dataclass(frozen=True)
class ConceptChunk:
    """Some concepts of one group, by their numbers."""

    group: str
    numbers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def nouns(self) -> tuple[str, ...]:
        """The name of the class of each."""
        return tuple(GROUPS[self.group].noun(number) for number in self.numbers)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each, which no concept of any group shares."""
        return tuple(GROUPS[self.group].seed + number for number in self.numbers)

    @cached_property
    def pictures(self) -> Tensor:
        """The photos, [n, 3, size, size] in [0, 1]."""
        return torch.stack([GROUPS[self.group].picture(number) for number in self.numbers])

    def truth(self) -> Tensor:
        """Draws what a perfect method would draw under the prompts, [n, prompts, 3, size, size]."""
        of_group = GROUPS[self.group]
        return torch.stack(
            [
                torch.stack([of_group.truth(number, asked, _TRUTH + 10 * seed + p) for p, asked in enumerate(PROMPTS)])
                for number, seed in zip(self.numbers, self.seeds, strict=True)
            ]
        )

    def noise(self) -> Tensor:
        """The noise that each picture begins with, the same for all arms: [n, prompts, 4, h, w]."""
        shape = (len(PROMPTS), 4, LATENT_SIZE, LATENT_SIZE)
        return torch.stack(
            [torch.randn(shape, generator=torch.Generator().manual_seed(_NOISE + seed)) for seed in self.seeds]
        )


def parts(count: int) -> dict[str, int]:
    """`count` concepts shared among the groups as the whole study shares them."""
    whole = sum(WHOLE.values())
    out = {group: round(count * size / whole) for group, size in WHOLE.items()}
    out[SEEN] += count - sum(out.values())
    return out


def chunks(count: int, first: int = 0) -> list[ConceptChunk]:
    """The first `count` concepts, or those from number `first` of each group on, group by group."""
    return [
        ConceptChunk(group, tuple(range(begin, min(begin + CHUNK, first + size))))
        for group, size in parts(count).items()
        for begin in range(first, first + size, CHUNK)
    ]
