"""The drawn world as a generator of people (`trainer.data.generate.generators`): its labels are exact, not measured.

The words of a plan are those of `world.faces`: what a description says of a person is what is drawn, the rest of the
person is drawn by chance, from the person's number and the plan's seed alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..trainer.config import ConfigError
from ..trainer.data.generate.generators import GeneratedPicture, to_bytes
from ..trainer.data.generate.prompts import PicturePlan
from .plan import IMAGE_SIZE
from .world.faces import (
    GLASSES_NAMES,
    HAIR_COLOUR_NAMES,
    HAIR_NAMES,
    PLACES,
    SKIN_NAMES,
    STYLES,
    Faces,
    boxes,
    identity_vector,
    landmarks,
    render,
    sample_identities,
    sample_nuisance,
)
from .world.styles import Factors

_CHOICES = {  # attribute: its values' words, in the order of `world.faces`
    "hair": HAIR_NAMES,
    "hair_colour": HAIR_COLOUR_NAMES,
    "glasses": ("", *GLASSES_NAMES[1:]),
    "moustache": ("", "a moustache"),
    "beard": ("", "a beard"),
}


class DrawnWorld:
    """Draws the pictures of plans as `world.faces` renders them."""

    name, licence = "drawn faces of the mini world", "Apache-2.0"

    def __init__(self, size: int = IMAGE_SIZE):
        self.size = size
        self.digest = hashlib.sha256(f"{self.name} 1".encode()).hexdigest()

    def __call__(self, plans: Sequence[PicturePlan]) -> list[GeneratedPicture]:
        """Raises ConfigError, one sentence, for a word that the drawn world does not know."""
        return [self._draw(plan) for plan in plans]

    def _draw(self, plan: PicturePlan) -> GeneratedPicture:
        faces = Faces(identity_of(plan), nuisance_of(plan))
        exact = {
            "landmarks": _rounded(landmarks(faces, self.size)[0]),
            "box": _rounded(boxes(faces, self.size)[0]),
            "identity": _rounded(identity_vector(faces.identity)[0]),
        }
        return GeneratedPicture(to_bytes(render(faces, self.size, seed=plan.seed))[0], exact)


def identity_of(plan: PicturePlan) -> Factors:
    """Who is drawn: what the attributes say, else as the plan's person has it by chance."""
    person = plan.person
    key = hashlib.sha256(repr((person.number, sorted(person.attributes.items()))).encode()).digest()
    numbers = torch.Generator().manual_seed(int.from_bytes(key[:4], "big"))
    identity = sample_identities(1, numbers)
    for name, values in person.attributes.items():
        for value in values:
            if name == "skin":  # anywhere among the tones that are called so
                tone = _index(SKIN_NAMES, name, value) - 0.5 + torch.rand(1, generator=numbers)
                identity["skin"] = tone.clamp(0.0, 3.99)
            elif name in _CHOICES:
                identity[name] = torch.tensor([_index(_CHOICES[name], name, value)])
            else:
                raise ConfigError(f"The drawn world knows no attribute {name!r}: it has skin, {', '.join(_CHOICES)}.")
    return identity


def nuisance_of(plan: PicturePlan) -> Factors:
    """Says how the picture is taken: style and place as the plan says, a smile where it asks for one."""
    numbers = torch.Generator().manual_seed(plan.seed)
    style, place = _index(STYLES, "style", _bare(plan.style)), _index(PLACES, "context", plan.context)
    nuisance = sample_nuisance(1, numbers, torch.tensor([style]), torch.tensor([place]))
    smiles = _index(("", "smiling"), "accessory", plan.accessory)
    half = nuisance["smile"] / 2 + (0.75 if smiles else 0)  # above 0.5 is what captions call smiling
    nuisance["smile"] = half.clamp(0.51, 1.0) if smiles else half
    return nuisance


def _bare(style: str) -> str:
    """Without its article."""
    return style.removeprefix("an ").removeprefix("a ")


def _index(words: Sequence[str], what: str, word: str) -> int:
    if word not in words:
        raise ConfigError(f"The drawn world knows no {what} {word!r}: it has {', '.join(repr(w) for w in words)}.")
    return words.index(word)


def _rounded(values: Tensor) -> list[Any]:
    return torch.round(values.double(), decimals=3).tolist()
