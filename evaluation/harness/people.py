"""Who is drawn: a folder of pictures or of shards, or a world of its own; each person with one reference picture."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ...lookahead.files.atomic import atomic, first_line
from ...sdxl.images import PictureError, read, rgb
from ...trainer.data.pairs import ENDINGS, passed_over
from ...trainer.data.shards import Shards
from ...trainer.data.store import Store
from .library import EvaluationError
from .sections import People, Prompt

PICTURES = ENDINGS


@dataclass(frozen=True)
class ReferencePerson:
    """A person: a name, and the file of the reference. target: prompt -> file, where it is known."""

    name: str
    reference: Path
    digest: str
    target: Callable[[Prompt], Path | None] = lambda prompt: None

    def noise_seed(self, seed: int) -> int:
        """The seed of the noise: every person has noise of their own, the same for all methods."""
        return (seed * 1_000_003 + zlib.crc32(self.name.encode())) % 2**31


#: section, prompts, folder for pictures -> people
PeopleSource = Callable[[People, Sequence[Prompt], Path], list[ReferencePerson]]


def read_people(
    people: People, prompts: Sequence[Prompt], out: Path, worlds: Mapping[str, PeopleSource] | None = None
) -> list[ReferencePerson]:
    """The people of a protocol; their references are written as PNG into `out`.

    worlds: sources that are known by a name. Raises EvaluationError, one sentence, for a source that is none.
    """
    world = (worlds or {}).get(people.source)
    found = world(people, prompts, out) if world else _of_folder(people, out)
    if not found:
        raise EvaluationError(
            f"people.source is {people.source}, and no picture is left of it (first {people.first}, count "
            f"{people.count}): give a folder with a picture a person."
        )
    return found


def count_people(people: People, worlds: Mapping[str, int] | None = None) -> int:
    """Counts the people that a protocol draws, without reading a picture; as many as are asked for, where its source is
    not there. worlds: how many a source that is known by a name has unless said."""
    folder = Path(people.source).expanduser()
    if people.source in (worlds or {}) or not folder.is_dir():
        return people.count or (worlds or {}).get(people.source, 0)
    if any(folder.glob("shard-*.tar")):
        there = len(_of_shards(folder))
    else:
        there = sum(path.suffix.lower() in PICTURES for path in folder.iterdir())
    left = max(0, there - people.first)
    return left if people.count is None else min(left, people.count)


def _of_folder(people: People, out: Path) -> list[ReferencePerson]:
    folder = Path(people.source).expanduser()
    if not folder.is_dir():
        raise EvaluationError(f"people.source is {people.source}, which is no folder: give one with a face a picture.")
    chosen = slice(people.first, None if people.count is None else people.first + people.count)
    if any(folder.glob("shard-*.tar")):
        files = _of_shards(folder)[chosen]
    else:
        if others := passed_over(folder):
            print(others, file=sys.stderr)
        paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)[chosen]
        for first, second in itertools.pairwise(sorted(paths, key=lambda p: p.stem)):
            if first.stem == second.stem:
                raise EvaluationError(
                    f"people.source holds {first.name} and {second.name}, which would be one person, {first.stem}: "
                    "give one of them another name."
                )
        files = [(p.stem, p.read_bytes) for p in paths]  # read when their turn comes
    targets = Path(people.targets).expanduser() if people.targets else None
    return [one(name, load(), out, targets) for name, load in files]


def _of_shards(folder: Path) -> list[tuple[str, Callable[[], bytes]]]:
    shards = Shards(Store(folder))
    chosen: list[tuple[str, Callable[[], bytes]]] = []
    for sample, key in enumerate(shards.keys):
        first, last = int(shards.first[sample]), int(shards.first[sample + 1])
        fit = [n for n in range(first, last) if shards.reference[n]]
        if fit:
            chosen.append((f"{int(key):08}", functools.partial(shards.picture, fit[0])))
    return chosen


def one(name: str, file: bytes, out: Path, targets: Path | None = None) -> ReferencePerson:
    """A person of a picture file, whose reference is written as PNG, upright, into `out`.

    targets: folder with NAME/PROMPT.png. Raises EvaluationError, naming the person, for what is no picture.
    """
    try:
        with Image.open(io.BytesIO(file)) as image:
            upright = Image.fromarray((rgb(image) * 255).round().byte().numpy())
    except Exception as error:  # Pillow has an exception a format and kind of damage
        raise EvaluationError(
            f"The reference {name} cannot be read as a picture ({first_line(error)}): take it out."
        ) from None
    path = out / f"{name}.png"
    out.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(upright.tobytes() + repr(upright.size).encode()).hexdigest()
    if not _is(path, digest):
        with atomic(path) as part:
            upright.save(part, "PNG")

    def target(prompt: Prompt) -> Path | None:
        found = None if targets is None else targets / name / f"{prompt.number}.png"
        return found if found is not None and found.is_file() else None

    return ReferencePerson(name, path, digest, target)


def _is(path: Path, digest: str) -> bool:
    """Whether a file is there and holds these pixels."""
    try:
        read(path)
        with Image.open(path) as image:
            rgb = image.convert("RGB")
            return hashlib.sha256(rgb.tobytes() + repr(rgb.size).encode()).hexdigest() == digest
    except (OSError, PictureError):
        return False
