"""From a configuration to shards. A shard is a function of the configuration, the models and its number: any worker may
make any of them, twice gives the same bytes, and a run that was killed goes on with what is missing.

(On one machine with one set of packages: other processors round otherwise.)
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..shards import Sample, finished, shard_path, write_shard
from .checks import LIKE_ANOTHER, Inspector, Looked, choose, mean_person
from .config import GenerateConfig, digest
from .generators import Drawing, PictureGenerator
from .people import Person, read_people
from .prompts import PicturePlan, plan_pictures

BINS = {"similarity": (-1.0, 1.0), "face_size": (0.0, 1.0), "sharpness": (0.0, 0.2), "style": (0.0, 1.0)}
BIN_COUNT = 100
_AHEAD = 4  # batches that may wait to be looked at


@dataclass(frozen=True, eq=False)
class DrawnPicture:
    """A picture of a plan, what is seen in it, its file, and why it is left out (None: it is kept)."""

    plan: PicturePlan
    drawing: Drawing
    looked: Looked
    file: bytes
    fault: str | None = None


@dataclass(frozen=True, eq=False)
class DrawnPerson:
    """fault: why the person is left out with all pictures, None where not."""

    person: Person
    pictures: list[DrawnPicture]
    fault: str | None = None

    def kept(self) -> list[DrawnPicture]:
        return [p for p in self.pictures if p.fault is None] if self.fault is None else []


Progress = Callable[[int, int], None]  # pictures drawn, and pictures kept, since the last call


def content_of(config: GenerateConfig, generator: PictureGenerator, inspector: Inspector) -> str:
    """Digest of all that decides what is in a shard."""
    return digest([config.content(), generator.digest, inspector.digest])


class Engine:
    """Draws, looks at, chooses and writes people. Drawing goes on while the pictures before are looked at."""

    def __init__(self, config: GenerateConfig, generator: PictureGenerator, inspector: Inspector):
        """Raises ConfigError, one sentence, where a list of names cannot be read."""
        self.config, self.generator, self.inspector = config, generator, inspector
        self.people = read_people(config)
        self.content = content_of(config, generator, inspector)
        self.seconds: Counter[str] = Counter()

    def missing(self, numbers: Sequence[int]) -> list[int]:
        """The shards of these numbers that are not finished. Raises ShardError for one of another content."""
        return [n for n in numbers if not finished(shard_path(Path(self.config.out), n), self.content)]

    def make_shard(self, number: int, progress: Progress = lambda drawn, kept: None) -> dict[str, Any]:
        """Make and write one shard; returns its side file's content. Raises ShardError where it cannot be written."""
        self.seconds, started = Counter(), time.perf_counter()
        size = self.config.people_per_shard
        people = self.draw(range(number * size, (number + 1) * size), progress)
        side = {"shard": number, "content": self.content, **self.about(), **describe(people)}
        shard = shard_path(Path(self.config.out), number)
        begun = time.perf_counter()
        write_shard(shard, [self.sample(p) for p in people if p.kept()], side, self.content)
        self.seconds["write"] += time.perf_counter() - begun
        self.seconds["all"] = time.perf_counter() - started
        # How long it took is no part of the shard: it differs from run to run.
        times = {"pictures": side["drawn"], "seconds": dict(self.seconds), "threads": torch.get_num_threads()}
        shard.with_suffix(".times.json").write_text(json.dumps(times))
        return side

    def draw(self, numbers: Sequence[int], progress: Progress = lambda drawn, kept: None) -> list[DrawnPerson]:
        """The people of these numbers, in their order, with all that was drawn of them."""
        plans = [plan for n in numbers for plan in plan_pictures(self.config.prompts, self.people(n), self.people.key)]
        per_person, waiting, people, means = self.config.prompts.per_person, [], [], []
        for picture in self._pictures(plans):
            waiting.append(picture)
            if len(waiting) == per_person:
                people.append(self._choose(waiting, means))
                progress(per_person, len(people[-1].kept()))
                waiting = []
        return people

    def pilot(self, numbers: Sequence[int]) -> tuple[list[DrawnPerson], list[DrawnPerson]]:
        """The people of these numbers with all thresholds open, and as the configuration keeps them."""
        thresholds = ("face_size", "sharpness", "similarity", "duplicate", "style")
        settings = self.config
        opened = settings.checks.model_copy(update=dict.fromkeys(thresholds))
        try:
            self.config = settings.model_copy(update={"checks": opened})
            everyone = self.draw(numbers)
        finally:
            self.config = settings
        means: list[Tensor] = []
        return everyone, [self._choose(person.pictures, means) for person in everyone]

    def _choose(self, pictures: list[DrawnPicture], means: list[Tensor]) -> DrawnPerson:
        checks, plans = self.config.checks, [p.plan for p in pictures]
        looked, faults = choose(checks, plans, [p.looked for p in pictures])
        out = [
            DrawnPicture(p.plan, p.drawing, seen, p.file, fault)
            for p, seen, fault in zip(pictures, looked, faults, strict=True)
        ]
        person, mean = plans[0].person, mean_person([p.looked for p in out if p.fault is None])
        if mean is None:
            return DrawnPerson(person, out)
        if checks.duplicate is not None and any(float(mean @ other) >= checks.duplicate for other in means):
            return DrawnPerson(person, out, LIKE_ANOTHER)
        means.append(mean)
        return DrawnPerson(person, out)

    def _pictures(self, plans: Sequence[PicturePlan]) -> Iterator[DrawnPicture]:
        """Drawn in batches here, looked at and packed in a thread beside it, handed on in the order of the plans."""
        size, queue = self.config.generator.batch, deque[Future[list[DrawnPicture]]]()
        with ThreadPoolExecutor(1) as beside:
            for start in range(0, len(plans), size):
                some, begun = plans[start : start + size], time.perf_counter()
                drawings = self.generator(some)
                self.seconds["draw"] += time.perf_counter() - begun
                queue.append(beside.submit(self._look, some, drawings))
                while queue and (len(queue) > _AHEAD or queue[0].done()):
                    yield from queue.popleft().result()
            while queue:
                yield from queue.popleft().result()

    def _look(self, plans: Sequence[PicturePlan], drawings: Sequence[Drawing]) -> list[DrawnPicture]:
        begun = time.perf_counter()
        looked = self.inspector([d.picture for d in drawings], plans)
        files = [pack(d.picture, self.config) for d in drawings]
        self.seconds["look"] += time.perf_counter() - begun
        return [DrawnPicture(*each) for each in zip(plans, drawings, looked, files, strict=True)]

    def about(self) -> dict[str, Any]:
        """Who drew and who looked, for samples and side files."""
        generator = {"name": self.generator.name, "licence": self.generator.licence}
        return {"generator": generator, **self.inspector.about}

    def sample(self, person: DrawnPerson) -> Sample:
        """The kept pictures of a person as a sample of a shard."""
        kept, ending = person.kept(), self.config.files.format
        files = {f"{p.plan.number:02}.{ending}": p.file for p in kept}
        about = {
            "person": person.person.number,
            "description": person.person.description,
            "attributes": person.person.attributes,
            "content": self.content,
            **self.about(),
            "pictures": [describe_picture(p, name) for p, name in zip(kept, files, strict=True)],
            "left_out": [
                {"number": p.plan.number, "prompt": p.plan.prompt, "why": p.fault}
                for p in person.pictures
                if p.fault is not None
            ],
        }
        return Sample(f"{person.person.number:08}", files, about)


def pack(picture: Tensor, config: GenerateConfig) -> bytes:
    """The file of a picture, uint8 [3, h, w]."""
    image, out = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()), io.BytesIO()
    if config.files.format == "png":
        image.save(out, "PNG")
    else:
        image.save(out, "JPEG", quality=config.files.quality, subsampling=0)
    return out.getvalue()


def describe_picture(picture: DrawnPicture, file: str) -> dict[str, Any]:
    """What a sample's JSON says of a picture. Embeddings are float16 in base64, little end first."""
    plan, looked = picture.plan, picture.looked
    _, height, width = picture.drawing.picture.shape
    about: dict[str, Any] = {
        "file": file,
        "prompt": plan.prompt,
        "caption": plan.caption,
        "style": plan.style,
        "context": plan.context,
        "accessory": plan.accessory,
        "reference": plan.plain,
        "seed": plan.seed,
        "width": width,
        "height": height,
        "sharpness": round(looked.sharpness, 4),
    }
    if looked.face is not None:
        face = looked.face
        about |= {"box": _rounded(face.box), "landmarks": _rounded(face.points), "score": round(face.score, 4)}
        about["face_size"] = round(looked.face_size, 4)
    if looked.embedding is not None:
        half = looked.embedding.numpy().astype("<f2")
        about["embedding"] = base64.b64encode(half.tobytes()).decode("ascii")
    for name in ("similarity", "style"):
        if (value := getattr(looked, name)) is not None:
            about["style_score" if name == "style" else name] = round(value, 4)
    return about | ({"exact": dict(picture.drawing.exact)} if picture.drawing.exact else {})


def embedding_of(about: dict[str, Any]) -> np.ndarray | None:
    """The embedding in a picture's JSON as float32 [d], None where there is none."""
    text = about.get("embedding")
    return None if text is None else np.frombuffer(base64.b64decode(text), "<f2").astype(np.float32)


def describe(people: Sequence[DrawnPerson]) -> dict[str, Any]:
    """What was drawn and kept of people, in counts and histograms (`BINS`), which add up over shards."""
    pictures = [p for person in people for p in person.pictures]
    kept = [person for person in people if person.kept()]
    reasons = Counter(p.fault or person.fault for person in people for p in person.pictures)
    measured = {name: [getattr(p.looked, name) for p in pictures] for name in BINS}
    return {
        "people": {"drawn": len(people), "kept": len(kept)},
        "drawn": len(pictures),
        "kept": sum(len(person.kept()) for person in kept),
        "left_out": {why: count for why, count in sorted(reasons.items(), key=str) if why is not None},
        "attributes": {"drawn": _attributes(people), "kept": _attributes(kept)},
        "histograms": {name: histogram(values, *BINS[name]) for name, values in measured.items()},
        "cosines": cosines(people),
    }


def cosines(people: Sequence[DrawnPerson]) -> dict[str, list[int]]:
    """Histograms over pairs of pictures with a face: of one person as drawn and as kept, and of different people."""
    rows = [
        (n, picture.looked.embedding, person.fault is None and picture.fault is None)
        for n, person in enumerate(people)
        for picture in person.pictures
        if picture.looked.embedding is not None
    ]
    if not rows:
        return {}
    who, kept = torch.tensor([n for n, _, _ in rows]), torch.tensor([keep for _, _, keep in rows])
    embeddings = torch.stack([e for _, e, _ in rows])
    alike = embeddings @ embeddings.T
    upper = torch.ones_like(alike, dtype=torch.bool).triu(1)
    same, both = who[:, None] == who[None], kept[:, None] & kept[None]
    chosen = {"within_drawn": same & upper, "within": same & both & upper, "across": ~same & both & upper}
    return {name: histogram(alike[mask].tolist(), *BINS["similarity"]) for name, mask in chosen.items()}


def histogram(values: Sequence[float | None], low: float, high: float) -> list[int]:
    """Counts in BIN_COUNT bins from low to high; what lies outside counts in the first or last."""
    there = np.clip([v for v in values if v is not None], low, high)
    return np.histogram(there, BIN_COUNT, (low, high))[0].tolist()


def _attributes(people: Sequence[DrawnPerson]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for person in people:
        for name, values in person.person.attributes.items():
            counts.setdefault(name, Counter()).update(values)
    return {name: dict(sorted(values.items())) for name, values in counts.items()}


def _rounded(values: Tensor) -> list:
    return torch.round(values.double(), decimals=2).tolist()


def worker_from_environment() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun, accelerate or an array job of SLURM says it."""
    known = os.environ
    if "RANK" in known and "WORLD_SIZE" in known:
        return int(known["RANK"]), int(known["WORLD_SIZE"])
    if "SLURM_ARRAY_TASK_ID" in known and "SLURM_ARRAY_TASK_COUNT" in known:
        first = int(known.get("SLURM_ARRAY_TASK_MIN", 0))
        return int(known["SLURM_ARRAY_TASK_ID"]) - first, int(known["SLURM_ARRAY_TASK_COUNT"])
    return 0, 1
