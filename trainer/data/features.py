"""What the frozen models see in pictures and captions, and shards of it on the disk.

    features-000003-5f2c….tar         <key>.safetensors: one file for each thing that was seen
    features-000003-5f2c….index.json  where each of them lies

A key says what was seen by whom (picture, crop, size, weights), so other data and other models have others, and a
picture that is added to a folder leaves what is there as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from ...lookahead.losses.identity import embed
from ...lookahead.vision.arcface import Recogniser
from ...sdxl.load import Frozen
from ..lookahead.config import Data, cache_folder
from .pictures import Crop, PeoplePictures
from .store import Store
from .tars import Kind, ShardError, index_name, make_index, members, read_index, write_index, write_tar

FEATURES = Kind(
    "lookahead feature index 1", ("items",), "run `lookahead prepare` with the same configuration, which makes it again"
)
View = Literal["target", "reference", "person", "text"]
Tensors = dict[str, Tensor]


class Item(NamedTuple):
    """One thing to see: the latent of a picture (by its place) as `target` or as `reference`; features, points and
    embedding of its `person`; context and pooled of a `text`."""

    view: View
    what: int | str


@dataclass(frozen=True)
class Keys:
    """Gives an item its key. The other fields are fingerprints of the models."""

    pictures: PeoplePictures
    autoencoder: str
    person: str
    text: str

    def __call__(self, item: Item) -> str:
        view, what = item
        if isinstance(what, str):
            key: tuple[object, ...] = (what, self.text)
        elif view == "person":
            key = (*self.pictures.key(what, True, face=True), self.person)
        else:
            key = (*self.pictures.key(what, view == "reference"), self.autoencoder)
        return hashlib.sha256(repr(key).encode()).hexdigest()[:40]


class FeatureReader:
    """The frozen models as readers of crops and captions."""

    def __init__(self, models: Frozen, recogniser: Recogniser | None, data: Data):
        self.models, self.recogniser, self.data = models, recogniser, data
        self._inside = False

    @contextmanager
    def reading(self, device: torch.device) -> Iterator[None]:
        """The models that read pictures and captions are on the device within; afterwards they leave it, if what they
        made is kept."""
        outermost, self._inside = not self._inside, True
        if outermost:
            self.models.readers(device)
        try:
            yield
        finally:
            if outermost:
                self._inside = False
                if self.data.keep:
                    self.models.readers("cpu")

    def keys(self, pictures: PeoplePictures) -> Keys:
        models = self.models
        return Keys(
            pictures, fingerprint(models.vae), fingerprint(models.vision, self.recogniser), fingerprint(models.text)
        )

    @torch.no_grad()
    def see(
        self, crops: Sequence[Crop], views: Sequence[Collection[View]], device: torch.device
    ) -> list[dict[View, Tensors]]:
        """Sees what is asked for in each crop, on the CPU; a latent is the same as a target's and as a reference's."""
        seen: list[dict[View, Tensors]] = [{} for _ in crops]
        shown = torch.cat([picture for picture, _ in crops]).to(device)
        latent = [n for n, asked in enumerate(views) if "target" in asked or "reference" in asked]
        person = [n for n, asked in enumerate(views) if "person" in asked]
        if latent:
            for n, one in zip(latent, _own(self.models.latents(shown[latent])), strict=True):
                seen[n] |= {view: {"latent": one} for view in views[n] if view != "person"}
        if person:
            for n, one in zip(person, _own(self.models.features(shown[person])), strict=True):
                seen[n]["person"] = {"features": one}
            if self.recogniser is not None:
                points = torch.cat([_there(crops[n][1]) for n in person])
                embeddings = embed(self.recogniser.to(device), shown[person], points)
                for n, five, one in zip(person, points, _own(embeddings), strict=True):
                    seen[n]["person"] |= {"points": five.clone(), "embedding": one}
        return seen

    def text(self, captions: Sequence[str]) -> list[Tensors]:
        """Reads captions: `context` [77, width] and `pooled` [width], on the CPU."""
        context, pooled = self.models.text(captions)
        pairs = zip(_own(context), _own(pooled), strict=True)
        return [{"context": one, "pooled": other} for one, other in pairs]

    def sizes(self) -> dict[View, int]:
        """Bytes of one item by its view."""
        vision, first, second = self.models.vision, self.models.text.first, self.models.text.second
        latent = 4 * 4 * (self.data.size // 8) ** 2
        patches = 1 + (vision.config.image_size // vision.config.patch_size) ** 2
        width = 77 * (first.config.hidden_size + second.config.hidden_size) + second.config.projection_dim
        person = patches * vision.config.hidden_size * vision.dtype.itemsize + (2048 if self.recogniser else 0)
        return {"target": latent, "reference": latent, "person": person, "text": width * first.dtype.itemsize}


def _own(rows: Tensor) -> list[Tensor]:
    """Rows on the CPU, each with memory of its own."""
    return [row.clone(memory_format=torch.contiguous_format) for row in rows.cpu()]


def _there(points: Tensor | None) -> Tensor:
    assert points is not None  # a recogniser comes with a detector, and then references are those with a face
    return points


class PreparedFeatures:
    """The features of a folder of shards, opened by their indexes. It can be sent to other processes.

    A shard that is damaged or not finished counts as not there.
    """

    def __init__(self, folder: Path):
        self.store = Store(folder)
        self.names: list[str] = []
        keys, places = [np.empty(0, "S40")], [np.empty((0, 3), np.int64)]
        there = self.store.names()
        for name in sorted(name for name in there if name.startswith("features-") and name.endswith(".tar")):
            try:
                items = read_index(self.store, name, FEATURES)["items"]
            except ShardError:
                continue
            keys.append(np.asarray(items["key"], "S40"))
            shard = [len(self.names)] * len(items["key"])
            places.append(np.stack([shard, items["offset"], items["size"]], 1).astype(np.int64))
            self.names.append(name)
        everything = np.concatenate(keys)
        order = np.argsort(everything, kind="stable")
        self._keys, self._places = everything[order], np.concatenate(places)[order]

    def __len__(self) -> int:
        return len(self._keys)

    def there(self, keys: Sequence[str]) -> np.ndarray:
        """Says of each key, bool [n], whether it is there."""
        asked = np.asarray(keys, "S40")
        if not len(self._keys):
            return np.zeros(len(asked), bool)
        at = np.searchsorted(self._keys, asked).clip(max=len(self._keys) - 1)
        return np.asarray(self._keys[at] == asked)

    def get(self, key: str) -> Tensors | None:
        """The tensors of a key; None where they are not there or damaged."""
        if not self.there([key])[0]:
            return None
        shard, offset, size = self._places[np.searchsorted(self._keys, np.asarray(key, "S40"))].tolist()
        try:
            return load(self.store.piece(self.names[shard], offset, size))
        except Exception:  # safetensors has its own error, and a file that is gone another: it is made again
            return None


def write_features(folder: Path, name: str, items: Iterable[tuple[str, Tensors]]) -> None:
    """Write a shard of (key, tensors) and its index, whole or not at all.

    Raises ShardError, one sentence, where the disk is full or cannot be written.
    """
    store = Store(folder)

    def files() -> Iterator[Mapping[str, Any]]:
        for key, tensors in items:
            yield {"__key__": key, "safetensors": save(tensors)}

    try:
        with store.writing(name) as path:
            write_tar(path, files())
            table: dict[str, list[Any]] = {"key": [], "offset": [], "size": []}
            with members(path, name, FEATURES) as (found, _):
                for file, member in found.items():
                    values = file.partition(".")[0], member.offset_data, member.size
                    for column, value in zip(table.values(), values, strict=True):
                        column.append(value)
            index = make_index(path, name, FEATURES, "", {"items": table})
        write_index(store, name, index)
    except OSError as error:
        raise ShardError(
            f"What the models see in the pictures cannot be kept in {folder} ({error.strerror}): free some space, set "
            "data.cache to another folder, or data.keep to false; what is finished there stays."
        ) from error


def features_folder(data: Data) -> Path:
    """The folder where what the models see is kept."""
    return cache_folder(data) / "features"


def finished(folder: Path, name: str) -> bool:
    """Says whether a shard is there, whole: its name tells its content."""
    if not (folder / index_name(name)).is_file():
        return False
    try:
        read_index(Store(folder), name, FEATURES)
    except ShardError:  # damaged: made again
        return False
    return True


def fingerprint(*modules: nn.Module | None) -> str:
    """A hash of weights: names, shapes, types, and some values of each."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items() if module is not None else ():
            few = tensor.flatten()[:: max(1, tensor.numel() // 64)].double().tolist()
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype} {few}".encode())
    return digest.hexdigest()
