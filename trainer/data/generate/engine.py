"""From a configuration to shards. A shard is a function of the configuration, the models and its number: any worker may
make any of them, twice gives the same bytes, and a run that was killed goes on with what is missing.

(On one kind of machine with one set of packages and as many threads: others round otherwise.)
"""

from __future__ import annotations

import base64
import io
import os
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..shards import Sample, finished, shard_name, write_shard
from ..store import Store
from .checks import DUPLICATE, Inspector, Measurements, mean_embedding, select
from .config import Files, GenerateConfig, digest
from .generators import GeneratedPicture, PictureGenerator
from .people import Person, read_people
from .prompts import PicturePlan, plan_pictures

# By measure, the range of its histogram, and how many bins there are.
RANGES = {"similarity": (-1.0, 1.0), "face_size": (0.0, 1.0), "sharpness": (0.0, 0.2), "style": (0.0, 1.0)}
BINS = 100
_AHEAD = 4  # batches that may wait to be measured


@dataclass(frozen=True, eq=False)
class CheckedPicture:
    """A picture of a plan as its file, what is measured in it, and why it is rejected (None: it is kept)."""

    plan: PicturePlan
    file: bytes
    height: int
    width: int
    exact: Mapping[str, Any]
    measured: Measurements
    rejected: str | None = None


@dataclass(frozen=True, eq=False)
class GeneratedPerson:
    """rejected: why the person is rejected with all pictures; None where not."""

    person: Person
    pictures: list[CheckedPicture]
    rejected: str | None = None

    def kept(self) -> list[CheckedPicture]:
        return [p for p in self.pictures if p.rejected is None] if self.rejected is None else []

    def mean(self) -> Tensor | None:
        """The mean embedding of the pictures that are not rejected themselves, of unit length."""
        return mean_embedding([p.measured for p in self.pictures if p.rejected is None])


CountPictures = Callable[[int, int], None]  # pictures generated, and pictures kept, since the last call


def silent(generated: int, kept: int) -> None:
    """Progress that nobody hears of."""


class Engine:
    """Generates, measures, selects and writes people. A batch is generated while those before it are measured.

    content: digest of all that decides what is in a shard.
    """

    def __init__(self, config: GenerateConfig, generator: PictureGenerator, inspector: Inspector):
        """Raises ConfigError, one sentence, where a list of names cannot be read."""
        self.config, self.generator, self.inspector = config, generator, inspector
        self.store, self.people = Store(config.out), read_people(config)
        self.content = digest([config.content(), generator.digest, inspector.digest])
        self.seconds: defaultdict[str, float] = defaultdict(float)  # by part of the work

    def missing(self, numbers: Sequence[int]) -> list[int]:
        """The shards of these numbers that are not finished. Raises ShardError for one of another content."""
        return [n for n in numbers if not finished(self.store, shard_name(n), self.content)]

    def make_shard(self, number: int, progress: CountPictures = silent) -> dict[str, Any]:
        """Make and write one shard; returns its side file's content. Raises ShardError where it cannot be written."""
        self.seconds, started = defaultdict(float), time.perf_counter()
        size = self.config.people_per_shard
        people = self.generate(range(number * size, (number + 1) * size), progress)
        side = {"shard": number, "content": self.content, **self.about(), **summary(people)}
        shard, begun = shard_name(number), time.perf_counter()

        def times() -> dict[str, Any]:
            now = time.perf_counter()
            seconds = {**self.seconds, "write": self.seconds["write"] + now - begun, "all": now - started}
            return {
                "pictures": side["pictures"]["generated"],
                "seconds": seconds,
                "threads": torch.get_num_threads(),
            }

        kept = [self.sample(p) for p in people if p.kept()]
        write_shard(self.store, shard, kept, side, self.content, times)
        return side

    def generate(self, numbers: Sequence[int], progress: CountPictures = silent) -> list[GeneratedPerson]:
        """The people of these numbers, in their order, those that are rejected too."""
        plans = [plan for n in numbers for plan in plan_pictures(self.config.prompts, self.people(n), self.people.key)]
        per_person, theirs = self.config.prompts.per_person, []
        people: list[GeneratedPerson] = []
        means: list[Tensor] = []
        for picture in self._pictures(plans):
            theirs.append(picture)
            if len(theirs) == per_person:
                people.append(self._select(theirs, means))
                progress(per_person, len(people[-1].kept()))
                theirs = []
        return people

    def pilot(self, numbers: Sequence[int]) -> tuple[list[GeneratedPerson], list[GeneratedPerson]]:
        """The people of these numbers with all thresholds open, and as the configuration selects them."""
        thresholds = ("face_size", "sharpness", "similarity", "duplicate", "style")
        opened = self.config.checks.model_copy(update=dict.fromkeys(thresholds))
        open_engine = Engine(self.config.model_copy(update={"checks": opened}), self.generator, self.inspector)
        everyone = open_engine.generate(numbers)
        means: list[Tensor] = []
        return everyone, [self._select(person.pictures, means) for person in everyone]

    def _select(self, pictures: Sequence[CheckedPicture], means: list[Tensor]) -> GeneratedPerson:
        """One person. means: of the kept people so far; this one's is added."""
        checks, plans = self.config.checks, [p.plan for p in pictures]
        measured, rejected = select(checks, plans, [p.measured for p in pictures])
        selected = [replace(p, measured=m, rejected=r) for p, m, r in zip(pictures, measured, rejected, strict=True)]
        person = GeneratedPerson(plans[0].person, selected)
        mean = person.mean()
        if mean is None:
            return person
        if checks.duplicate is not None and any(float(mean @ other) >= checks.duplicate for other in means):
            return replace(person, rejected=DUPLICATE)
        means.append(mean)
        return person

    def _pictures(self, plans: Sequence[PicturePlan]) -> Iterator[CheckedPicture]:
        """Generated in batches here, measured and packed in a thread beside it, handed on in the order of the plans."""
        size, queue = self.config.generator.batch, deque[Future[list[CheckedPicture]]]()
        with ThreadPoolExecutor(1) as beside:
            for start in range(0, len(plans), size):
                batch, begun = plans[start : start + size], time.perf_counter()
                generated = self.generator(batch)
                self.seconds["generate"] += time.perf_counter() - begun
                queue.append(beside.submit(self._check, batch, generated))
                while queue and (len(queue) > _AHEAD or queue[0].done()):
                    yield from queue.popleft().result()
            while queue:
                yield from queue.popleft().result()

    def _check(self, plans: Sequence[PicturePlan], generated: Sequence[GeneratedPicture]) -> list[CheckedPicture]:
        begun = time.perf_counter()
        out = []
        for plan, one, measured in zip(
            plans, generated, self.inspector([g.pixels for g in generated], plans), strict=True
        ):
            height, width = one.pixels.shape[-2:]
            out.append(CheckedPicture(plan, pack(one.pixels, self.config.files), height, width, one.exact, measured))
        self.seconds["check"] += time.perf_counter() - begun
        return out

    def about(self) -> dict[str, Any]:
        """Names and licences of who generates and who measures, for samples and side files."""
        return {"generator": {"name": self.generator.name, "licence": self.generator.licence}, **self.inspector.about}

    def sample(self, person: GeneratedPerson) -> Sample:
        """The kept pictures of a person as a sample of a shard."""
        kept = person.kept()
        files = {f"{p.plan.number:02}.{self.config.files.format}": p.file for p in kept}
        about = {
            "person": person.person.number,
            "description": person.person.description,
            "attributes": person.person.attributes,
            "content": self.content,
            **self.about(),
            "pictures": [describe(p, name) for p, name in zip(kept, files, strict=True)],
            "rejected": [
                {"number": p.plan.number, "prompt": p.plan.prompt, "why": p.rejected}
                for p in person.pictures
                if p.rejected is not None
            ],
        }
        return Sample(f"{person.person.number:08}", files, about)


def pack(pixels: Tensor, files: Files) -> bytes:
    """The file of a picture, uint8 [3, h, w]."""
    image, out = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()), io.BytesIO()
    if files.format == "png":
        image.save(out, "PNG")
    else:
        image.save(out, "JPEG", quality=files.quality, subsampling=0)
    return out.getvalue()


def describe(picture: CheckedPicture, file: str) -> dict[str, Any]:
    """Makes what a sample's JSON says of a picture. Embeddings are float16 in base64, little end first."""
    plan, measured = picture.plan, picture.measured
    about: dict[str, Any] = {
        "file": file,
        "prompt": plan.prompt,
        "caption": plan.caption,
        "style": plan.style,
        "context": plan.context,
        "accessory": plan.accessory,
        "reference": plan.plain,
        "seed": plan.seed,
        "width": picture.width,
        "height": picture.height,
        "sharpness": round(measured.sharpness, 4),
    }
    if measured.face is not None:
        box, points, score = measured.face
        about |= {"box": _rounded(box), "landmarks": _rounded(points), "face_score": round(score, 4)}
    if measured.face_size is not None:
        about["face_size"] = round(measured.face_size, 4)
    if measured.embedding is not None:
        about["embedding"] = base64.b64encode(measured.embedding.numpy().astype("<f2").tobytes()).decode("ascii")
    if measured.similarity is not None:
        about["similarity"] = round(measured.similarity, 4)
    if measured.style is not None:
        about["style_score"] = round(measured.style, 4)
    return about | ({"exact": dict(picture.exact)} if picture.exact else {})


def summary(people: Sequence[GeneratedPerson]) -> dict[str, Any]:
    """Sums up what was generated, kept and rejected, in counts and histograms (`RANGES`), which add up over shards."""
    pictures = [p for person in people for p in person.pictures]
    kept = [person for person in people if person.kept()]
    reasons = Counter(why for person in people for p in person.pictures if (why := p.rejected or person.rejected))
    return {
        "people": {"generated": len(people), "kept": len(kept)},
        "pictures": {"generated": len(pictures), "kept": sum(len(person.kept()) for person in kept)},
        "rejected": dict(sorted(reasons.items())),
        "attributes": {"generated": _attributes(people), "kept": _attributes(kept)},
        "histograms": {
            name: histogram([getattr(p.measured, name) for p in pictures], *limits) for name, limits in RANGES.items()
        },
        "cosines": cosines(people),
    }


def cosines(people: Sequence[GeneratedPerson]) -> dict[str, list[int]]:
    """Histograms over pairs of pictures with an embedding: `within` a person as generated and as kept, and `across`
    people as kept."""
    rows = [
        (n, p.measured.embedding, p in person.kept())
        for n, person in enumerate(people)
        for p in person.pictures
        if p.measured.embedding is not None
    ]
    if not rows:
        return {}
    who, kept = torch.tensor([n for n, _, _ in rows]), torch.tensor([keep for _, _, keep in rows])
    embeddings = torch.stack([embedding for _, embedding, _ in rows])
    values = embeddings @ embeddings.T
    pairs = torch.ones_like(values, dtype=torch.bool).triu(1)
    same, both = who[:, None] == who[None], kept[:, None] & kept[None]
    chosen = {"within_generated": same & pairs, "within": same & both & pairs, "across": ~same & both & pairs}
    return {name: histogram(values[mask].tolist(), *RANGES["similarity"]) for name, mask in chosen.items()}


def histogram(values: Sequence[float | None], low: float, high: float) -> list[int]:
    """Counts in BINS bins from low to high; what lies outside counts in the first or last, None in none."""
    known = np.clip([v for v in values if v is not None], low, high)
    return np.histogram(known, BINS, (low, high))[0].tolist()


def worker_from_environment() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun, accelerate or an array job of SLURM says it."""
    said = os.environ
    if "RANK" in said and "WORLD_SIZE" in said:
        return int(said["RANK"]), int(said["WORLD_SIZE"])
    if "SLURM_ARRAY_TASK_ID" in said and "SLURM_ARRAY_TASK_COUNT" in said:
        first = int(said.get("SLURM_ARRAY_TASK_MIN", 0))
        return int(said["SLURM_ARRAY_TASK_ID"]) - first, int(said["SLURM_ARRAY_TASK_COUNT"])
    return 0, 1


def _attributes(people: Sequence[GeneratedPerson]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for person in people:
        for name, values in person.person.attributes.items():
            counts.setdefault(name, Counter()).update(values)
    return {name: dict(sorted(values.items())) for name, values in counts.items()}


def _rounded(values: Tensor) -> list[Any]:
    return torch.round(values.double(), decimals=2).tolist()
