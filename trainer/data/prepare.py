"""`lookahead prepare`: what a run will read of its pictures, made ahead as shards by all workers of all machines.

Only what the run will see is made: the samples' order is known in advance. A shard holds what is missing of a fixed
stretch of pictures, so any worker can make any, twice gives the same bytes, and what a killed run has finished stays.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ..ahead import Ahead
from ..lookahead.config import Config
from ..progress import counter
from ..seeds import order
from .features import FeatureReader, Item, PreparedFeatures, Tensors, View, features_folder, finished, write_features
from .loader import PairLoader
from .pairs import DataError
from .pictures import Crop, PeoplePictures

STRETCH = 256  # places of pictures whose features go into one shard


@dataclass(frozen=True)
class Chunk:
    """A chunk is what one shard will hold, by key; the pictures in the order of their places, then the texts."""

    stretch: int
    items: Mapping[str, Item]

    @cached_property
    def name(self) -> str:
        digest = hashlib.sha256("".join(self.items).encode()).hexdigest()
        return f"features-{self.stretch:06d}-{digest[:16]}.tar"


@dataclass(frozen=True)
class Work:
    """The work is what is missing. bytes: of it; there: how many items of the run are kept already."""

    folder: Path
    chunks: Sequence[Chunk]
    bytes: int
    there: int

    def __str__(self) -> str:
        pictures = {item.what for chunk in self.chunks for item in chunk.items.values() if item.view != "text"}
        texts = sum(item.view == "text" for chunk in self.chunks for item in chunk.items.values())
        return (
            f"To see with the frozen models: {len(pictures):,} pictures and {texts:,} texts, {self.bytes / 1e9:.3g} GB "
            f"in {len(self.chunks):,} shards of {self.folder} ({free(self.folder) / 1e9:.3g} GB are free there)."
        )

    def check(self) -> None:
        """Raises DataError, one sentence, where the disk cannot hold it."""
        there = free(self.folder)
        if self.bytes > there:
            raise DataError(
                f"What the models see in the pictures takes {self.bytes / 1e9:.3g} GB, and {self.folder} has "
                f"{there / 1e9:.3g} GB free: free some space, set data.cache to another disk, or data.keep to false."
            )


def plan(config: Config, loader: PairLoader, reader: FeatureReader) -> Work:
    """Finds what the run of this source will read and is not there yet."""
    folder = features_folder(config.data)
    kept = PreparedFeatures(folder)
    wanted: defaultdict[int, dict[str, Item]] = defaultdict(dict)
    first: dict[str, int] = {}  # the stretch that a text belongs to, the first where it is read
    places: dict[View, set[int]] = {"target": set(), "reference": set(), "person": set()}
    pictures, samples = loader.pictures, range(config.steps * config.batch)
    for number, target in enumerate(order(len(pictures.targets), config.seed, samples)):
        place = int(pictures.targets[target])
        reference = loader.reference_of(place, number)
        places["target"].add(place)
        places["reference"].add(reference)
        places["person"].add(reference)
    for place in sorted(places["target"] | places["reference"]):
        first.setdefault(pictures.caption(place), place // STRETCH)
        for view, those in places.items():
            if place in those:
                item = Item(view, place)
                wanted[place // STRETCH].setdefault(loader.keys(item), item)
    for caption, stretch in first.items():
        item = Item("text", caption)
        wanted[stretch][loader.keys(item)] = item
    chunks, there, sizes, total = [], 0, reader.sizes(), 0
    for stretch, items in sorted(wanted.items()):
        known = kept.there(list(items))
        missing = {key: item for (key, item), is_there in zip(items.items(), known, strict=True) if not is_there}
        there += len(items) - len(missing)
        total += sum(sizes[item.view] + 1024 for item in missing.values())  # in a tar, with its header
        if missing:
            chunks.append(Chunk(stretch, missing))
    return Work(folder, chunks, total, there)


def prepare(
    config: Config,
    loader: PairLoader,
    reader: FeatureReader,
    device: torch.device,
    worker: tuple[int, int] | None = None,
) -> None:
    """Make what is missing for the run, and have the loader read it.

    worker: which this is, from 0, of how many: it makes its share and leaves the rest. None: of several processes that
    train (torchrun) each begins at its own place, leaves out what is there, and goes on until all is there.

    Raises DataError, one sentence.
    """
    work = plan(config, loader, reader)
    if work.chunks:
        work.check()
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if rank == 0:
            print(work, file=sys.stderr)
        if worker is None:
            begin = len(work.chunks) * rank // world
            mine = [*work.chunks[begin:], *work.chunks[:begin]]
        else:
            mine = list(work.chunks[worker[0] :: worker[1]])
        make(config, loader.pictures, reader, mine, device)
    loader.kept = PreparedFeatures(work.folder)


@dataclass(frozen=True)
class _Job:
    """Crops of a chunk that are read together. last: whether they are its last."""

    chunk: int
    crops: tuple[tuple[int, bool], ...]
    last: bool


def make(
    config: Config, pictures: PeoplePictures, reader: FeatureReader, chunks: Sequence[Chunk], device: torch.device
) -> None:
    """Make these shards, but for those that somebody else has finished when it is their turn."""
    folder, size = features_folder(config.data), config.data.read_batch
    asked = [_crops(pictures, chunk) for chunk in chunks]

    def jobs() -> Iterator[_Job]:
        for number, chunk in enumerate(chunks):
            if not finished(folder, chunk.name):
                crops = list(asked[number])
                for start in range(0, max(1, len(crops)), size):
                    yield _Job(number, tuple(crops[start : start + size]), start + size >= len(crops))

    read = Ahead(_CropReader(pictures), jobs(), config.workers, device.type == "cuda")
    seen: dict[Item, Tensors] = {}
    with (
        reader.reading(device),
        counter("Pictures seen", sum(map(len, asked)), unit=" pictures") as bar,
    ):
        try:
            for job, crops in read:
                wanted = asked[job.chunk]
                views = [sorted(wanted[crop]) for crop in job.crops]
                if crops:
                    for (place, _), found in zip(job.crops, reader.see(crops, views, device), strict=True):
                        seen |= {Item(view, place): tensors for view, tensors in found.items()}
                    bar.update(len(crops))
                if job.last:
                    chunk = chunks[job.chunk]
                    _texts(reader, chunk, seen, size)
                    write_features(folder, chunk.name, ((key, seen[item]) for key, item in chunk.items.items()))
                    seen = {}
        finally:
            read.close()


def _crops(pictures: PeoplePictures, chunk: Chunk) -> dict[tuple[int, bool], set[View]]:
    """By place and whether it is cut as a reference, what is asked for; once where both cuts are one."""
    asked: defaultdict[tuple[int, bool], set[View]] = defaultdict(set)
    for view, what in chunk.items.values():
        if isinstance(what, int):
            reference = view != "target" and pictures.key(what, True) != pictures.key(what, False)
            asked[what, reference].add(view)
    return dict(asked)


def _texts(reader: FeatureReader, chunk: Chunk, seen: dict[Item, Tensors], size: int) -> None:
    texts = [str(item.what) for item in chunk.items.values() if item.view == "text"]
    for start in range(0, len(texts), size):
        some = texts[start : start + size]
        seen |= {Item("text", text): found for text, found in zip(some, reader.text(some), strict=True)}


@dataclass(frozen=True)
class _CropReader:
    """Reads the crops of a job, in a worker."""

    pictures: PeoplePictures

    def __call__(self, job: _Job) -> tuple[_Job, list[Crop]]:
        return job, [self.pictures.crop(place, reference) for place, reference in job.crops]


def free(folder: Path) -> int:
    """Bytes that are free where a folder is or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
