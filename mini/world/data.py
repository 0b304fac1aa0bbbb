"""The pictures that the mini world is trained on: drawn once, kept as bytes, several pictures a person.

Slots 0 and 1 of every person are photos, the others show the other styles, each once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...lookahead.files.atomic import atomic
from . import things
from .faces import STYLES, Faces, captions, identity_vector, render, sample_identities, sample_nuisance, skin_class

SEEDS = {"train": 1000, "evaluation": 2000, "held_out": 3000, "portraits": 5000}  # groups of people that never meet
THING_SEEDS = {"things": 6000, "things_judge": 7000, "things_held_out": 8000}  # groups of things, the same
ATTRIBUTES = ("hair_colour", "hair", "glasses", "moustache", "beard", "mole", "iris")


class Pictures(NamedTuple):
    """n pictures of n / per_person people, those of one person next to each other."""

    pixels: np.ndarray  # uint8 [n, 3, size, size], mapped from disk
    long: list[str]  # captions that describe the person
    short: list[str]  # captions that do not
    labels: dict[str, Tensor]  # style, place, skin, ... [n]; identity [n, IDENTITY_SIZE]
    per_person: int

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, index: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """float32 [len(index), 3, size, size] in [0, 1]."""
        return torch.from_numpy(self.pixels[index.numpy()]).to(device).float() / 255


def group_of_people(group: str, people: int, styles: tuple[str, ...]) -> Faces:
    """Who and how: len(styles) + 1 pictures a person, two photos first, then the other styles in random order."""
    numbers = torch.Generator().manual_seed(SEEDS[group])
    identities = sample_identities(people, numbers)
    others = torch.tensor([STYLES.index(s) for s in styles if s != "photo"], dtype=torch.long)
    order = torch.rand(people, len(others), generator=numbers).argsort(1)
    style = torch.cat([torch.zeros(people, 2, dtype=torch.long), others[order]], 1)
    per_person = style.shape[1]
    nuisance = sample_nuisance(people * per_person, numbers, style=style.flatten())
    return Faces({k: v.repeat_interleave(per_person, 0) for k, v in identities.items()}, nuisance)


def pictures(folder: Path, group: str, people: int, styles: tuple[str, ...], size: int) -> Pictures:
    """The pictures of one group, drawn on the first call (about 10 ms each on one core) and mapped afterwards."""
    faces = group_of_people(group, people, styles)
    path = folder / f"{group}-{people}x{len(styles) + 1}-{size}.npy"
    if not path.exists():
        _draw(path, lambda rows, seed: render(faces.rows(rows), size, seed=seed), len(faces), size, SEEDS[group])
    known = described(group, people, styles)
    return Pictures(np.load(path, mmap_mode="r"), known.long, known.short, known.labels, known.per_person)


def described(group: str, people: int, styles: tuple[str, ...]) -> Pictures:
    """A group's captions and labels without its pixels, which are [n, 3, 0, 0]."""
    faces = group_of_people(group, people, styles)
    labels = {k: faces.nuisance[k] for k in ("style", "place")} | {k: faces.identity[k] for k in ATTRIBUTES}
    labels |= {
        "smile": (faces.nuisance["smile"] > 0.5).long(),
        "skin": skin_class(faces.identity),
        "identity": identity_vector(faces.identity),
    }
    none = np.empty((len(faces), 3, 0, 0), np.uint8)
    return Pictures(none, captions(faces, True), captions(faces, False), labels, len(styles) + 1)


def group_of_things(group: str, count: int, kinds: int = len(things.CLASSES)) -> things.Things:
    """`count` things, each in one picture of any style and place; the first `kinds` classes take turns."""
    numbers = torch.Generator().manual_seed(THING_SEEDS[group])
    identity = things.sample_things(count, numbers, kind=torch.arange(count) % kinds)
    return things.Things(identity, things.sample_nuisance(count, numbers))


def thing_pictures(folder: Path, group: str, count: int, size: int) -> Pictures:
    """The pictures of one group of things of all classes, drawn on the first call and mapped afterwards; their captions
    name class, style and place, never shape, colour or pattern, so the long ones are the short ones."""
    made = group_of_things(group, count)
    path = folder / f"{group}-{count}-{size}.npy"
    if not path.exists():
        _draw(
            path,
            lambda rows, seed: things.render(made.rows(rows), size, seed=seed),
            count,
            size,
            THING_SEEDS[group],
        )
    labels = {k: made.nuisance[k] for k in ("style", "place")} | {
        "kind": made.identity["kind"],
        "identity": things.identity_vector(made.identity),
    }
    captions_ = things.captions(made)
    return Pictures(np.load(path, mmap_mode="r"), captions_, captions_, labels, 1)


def _draw(
    path: Path, render: Callable[[slice, int], Tensor], count: int, size: int, seed: int, chunk: int = 120
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as part:
        out = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=(count, 3, size, size))
        for start in range(0, count, chunk):
            rows = slice(start, min(start + chunk, count))
            out[rows] = (render(rows, seed + start) * 255).round().byte().numpy()
            if start % (chunk * 25) == 0:
                print(f"{path.stem}: {start}/{count} drawn", flush=True)
        out.flush()
        del out  # a file that is mapped cannot be renamed everywhere
