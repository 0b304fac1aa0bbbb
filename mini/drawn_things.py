"""Pictures of the mini world for a concept encoder: drawn things of the classes that training sees, and people's faces.

The two last classes of `world.things` are in no training of an encoder; so are the things and people of other seeds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..sdxl.load import Frozen
from ..trainer.concept.config import ConceptConfig
from ..trainer.concept.source import ConceptPictures
from .plan import IMAGE_SIZE
from .world import things
from .world.faces import STYLES, Faces, frontal, sample_identities
from .world.faces import render as render_faces
from .world.faces import sample_nuisance as face_nuisance

SEED = 9000  # of things and people that no other stage or study has
PHOTO = STYLES.index("photo")
#: Nouns that the mini world's base knows, once it has learnt to draw things; without that "face" alone.
NOUNS = (*things.CLASSES, "face")


def concept_things(count: int, seed: int = SEED, kind: Tensor | None = None) -> things.Things:
    """Things, each in one photo on a plain ground, upright in the middle, as one would take it for reference.

    kind: int64 [count], by default drawn among the classes that training sees.
    """
    numbers = torch.Generator().manual_seed(seed)
    identity = things.sample_things(count, numbers, kind)
    plain = torch.zeros(count, dtype=torch.long)
    nuisance = things.sample_nuisance(count, numbers, style=plain + PHOTO, place=plain)
    return things.Things(identity, things.straight(nuisance))


def concept_people(count: int, seed: int = SEED + 1) -> Faces:
    """People, each in one photo on a plain ground, from the front."""
    numbers = torch.Generator().manual_seed(seed)
    identity = sample_identities(count, numbers)
    plain = torch.zeros(count, dtype=torch.long)
    return Faces(identity, frontal(face_nuisance(count, numbers, style=plain + PHOTO, place=plain)))


def drawn_source(config: ConceptConfig, models: Frozen) -> ConceptPictures:
    """`data.things` things and `data.people` people, drawn as they are asked for; a picture is a function of its
    number and of theirs."""
    count = config.data.things
    shown, people = concept_things(count), concept_people(config.data.people)
    names = [f"thing {n}" for n in range(count)] + [f"person {n}" for n in range(len(people))]

    def picture(n: int) -> Tensor:
        if n < count:
            return things.render(shown.rows(slice(n, n + 1)), IMAGE_SIZE, seed=SEED + n)[0]
        return render_faces(people.rows(slice(n - count, n - count + 1)), IMAGE_SIZE, seed=SEED + n)[0]

    return ConceptPictures(config, models, names, picture, lambda n: f"drawn {names[n]} of {count}, {len(people)}; 1")
