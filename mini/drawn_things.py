"""Pictures of the mini world for a concept encoder: drawn things of the classes that training sees, and people's faces.

The two last classes of `world.things` are in no training of an encoder; so are the things and people of other seeds.
"""

from __future__ import annotations

from torch import Tensor

from ..sdxl.load import Frozen
from ..tools.common import CACHE
from ..trainer.concept.config import ConceptConfig
from ..trainer.concept.source import ConceptPictures
from .plan import IMAGE_SIZE
from .world import things
from .world.faces import render as render_faces
from .world.references import concept_people, concept_things

SEED = 9000  # of things and people that no other stage or study has
#: Nouns that the mini world's base knows, once it has learnt to draw things; without that "face" alone.
NOUNS = (*things.CLASSES, "face")


def drawn_source(config: ConceptConfig, models: Frozen) -> ConceptPictures:
    """`data.things` things and `data.people` people, drawn as they are asked for; a picture is a function of its
    number and of theirs."""
    count = config.data.things
    shown, people = concept_things(count, SEED), concept_people(config.data.people, SEED + 1)
    names = [f"thing {n}" for n in range(count)] + [f"person {n}" for n in range(len(people))]

    def picture(n: int) -> Tensor:
        if n < count:
            return things.render(shown.rows(slice(n, n + 1)), IMAGE_SIZE, seed=SEED + n)[0]
        return render_faces(people.rows(slice(n - count, n - count + 1)), IMAGE_SIZE, seed=SEED + n)[0]

    if config.data.cache is None:  # beside the source, as of a folder, would be in the folder that one is in
        data = config.data.model_copy(update={"cache": str(CACHE / "concept_pictures")})
        config = config.model_copy(update={"data": data})
    return ConceptPictures(config, models, names, picture, lambda n: f"drawn {names[n]} of {count}, {len(people)}; 1")
