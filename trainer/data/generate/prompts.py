"""What is drawn of a person: prompt, caption and seed of each picture, as functions of its numbers alone."""

from __future__ import annotations

from dataclasses import dataclass

from .config import Prompts
from .people import Person, random_numbers, weighted_choice, weighted_order


@dataclass(frozen=True)
class PicturePlan:
    """One picture to draw. plain: whether it is a reference by design."""

    person: Person
    number: int
    style: str
    context: str
    accessory: str
    plain: bool
    prompt: str
    caption: str
    seed: int  # in 32 bits, all that torch's CPU generator reads


def plan_pictures(prompts: Prompts, person: Person, key: str) -> list[PicturePlan]:
    """The pictures of a person, the plain ones first. key: of whom the people are, and of the data set's seed."""
    numbers = random_numbers(key, "pictures", person.number)
    styles: list[str] = []
    while len(styles) < prompts.per_person - prompts.plain_count:
        styles += weighted_order(prompts.styles, numbers)
    out = []
    for number in range(prompts.per_person):
        plain = number < prompts.plain_count
        context, accessory = (weighted_choice(w, numbers.random()) for w in (prompts.contexts, prompts.accessories))
        seed = int(numbers.integers(2**32))
        parts = {
            "style": prompts.plain if plain else styles[number - prompts.plain_count],
            "context": "" if plain else context,
            "accessory": "" if plain else accessory,
        }
        prompt, caption = (
            " ".join(prompts.template.format(**parts, person=who).split()).replace(" ,", ",")
            for who in (person.description, prompts.face)
        )
        out.append(PicturePlan(person, number, plain=plain, prompt=prompt, caption=caption, seed=seed, **parts))
    return out
