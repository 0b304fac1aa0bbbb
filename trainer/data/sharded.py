"""Shards of people's pictures as something to train on (`pictures.PeoplePictures`): opened by their indexes alone.

A target is any picture that has another one of its person beside it which may be a reference. Captions and landmarks
are those of the shards.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...lookahead.vision.faces import Face, square_around
from ...sdxl.images import PictureError, read
from ..lookahead.config import Config, cache_folder
from .pairs import DataError
from .pictures import Crop, cut
from .shards import Shards, shards_in
from .store import Store, is_remote

_REMEMBERED = 256  # samples whose JSON is not read again at once


def holds_shards(source: str) -> bool:
    """Says whether there are shards at an address. What is not on this machine is taken to be shards."""
    return is_remote(source) or bool(shards_in(Store(source)))


class ShardPictures:
    """Pictures of `data.source`, a folder or an address with shards."""

    def __init__(self, config: Config, faces: bool):
        """faces: whether it must be known where they are. Raises ShardError, StoreError or DataError, one sentence,
        where nothing can be trained on."""
        self.data = config.data
        self.shards = Shards(Store(self.data.source, cache_folder(self.data)))
        self._abouts: dict[int, dict[str, Any]] = {}
        people = len(self.shards.keys)
        references = np.bincount(self.shards.sample_of[self.shards.reference], minlength=people)
        paired = references[self.shards.sample_of] > self.shards.reference  # another one than itself
        # Whom training does not see: a tenth at most, the same with and without validation.
        able = np.unique(self.shards.sample_of[paired])
        few = min(config.validation.people, len(able) // 10)
        self.held_out: list[int] = sorted(able.tolist(), key=self._rank)[:few]
        seen = paired & ~np.isin(self.shards.sample_of, self.held_out)
        self.targets: list[int] = np.nonzero(seen)[0].tolist()
        if not self.targets:
            raise DataError(
                f"{self.data.source} holds {len(self.shards)} pictures and not one pair to train on: two pictures of a "
                "person, one of which may be a reference."
            )
        if (faces or self.data.reference_margin is not None) and face_of(self.about(0)) is None:
            raise DataError(
                f"The shards in {self.data.source} say nothing of where faces are, which the identity loss and "
                "data.reference_margin need: make them with checks.detector."
            )

    def digest(self) -> str:
        return hashlib.sha256(f"{self.shards.digest} {self.held_out}".encode()).hexdigest()

    def references(self, place: int) -> Sequence[int]:
        sample = self.shards.sample_of[place]
        theirs = range(self.shards.first[sample], self.shards.first[sample + 1])
        return [n for n in theirs if self.shards.reference[n] and n != place]

    def caption(self, place: int) -> str:
        return str(self.about(place)["caption"])

    def name(self, place: int) -> str:
        """Names a picture in a message: its name in the tar."""
        return f"{self.shards.keys[self.shards.sample_of[place]]:08}.{self.about(place)['file']}"

    def key(self, place: int, as_reference: bool, face: bool = False) -> tuple[object, ...]:
        margin = self.data.reference_margin if as_reference else None  # where the face is stands in the shard
        return *self.shards.place(place), margin, self.data.size

    def crop(self, place: int, as_reference: bool) -> Crop:
        face = face_of(self.about(place))
        try:
            picture = read(io.BytesIO(self.shards.picture(place)))
        except PictureError:
            raise DataError(
                f"{self.name(place)} in {self.data.source} is no picture: `lookahead generate --verify` with the "
                "configuration that made it says which shards are damaged."
            ) from None
        height, width = picture.shape[-2:]
        if face is None:
            side = min(height, width)
            return cut(picture, ((width - side) // 2, (height - side) // 2, side), None, self.data.size)
        square = square_around(face, height, width, self.data.reference_margin if as_reference else None)
        return cut(picture, square, face.points, self.data.size)

    def shown(self, people: int) -> list[tuple[int, str]]:
        who = self.held_out or np.unique(self.shards.sample_of[self.targets])[:people].tolist()
        first = {int(self.shards.sample_of[n]): int(n) for n in np.nonzero(self.shards.reference)[0][::-1]}
        return [(first[sample], self.name(first[sample])) for sample in who]

    def about(self, place: int) -> dict[str, Any]:
        """Gives what the shard says of a picture."""
        sample = int(self.shards.sample_of[place])
        if sample not in self._abouts:
            if len(self._abouts) >= _REMEMBERED:
                self._abouts.clear()
            self._abouts[sample] = self.shards.about(sample)
        return self._abouts[sample]["pictures"][place - int(self.shards.first[sample])]

    def _rank(self, sample: int) -> bytes:
        return hashlib.sha256(str(self.shards.keys[sample]).encode()).digest()


def face_of(about: Mapping[str, Any]) -> Face | None:
    """The face in a picture's JSON. Landmarks that are known exactly come before those that were found."""
    known = {**about, **about.get("exact", {})}
    if "landmarks" not in known:
        return None
    box, points = (torch.tensor(known[name], dtype=torch.float32) for name in ("box", "landmarks"))
    return Face(box, points, known.get("face_score", 1.0))
