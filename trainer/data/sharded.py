"""Training on shards of people's pictures (`recipe.Source`): opened by their indexes, read a picture at a time.

A target is any picture that has another one of its person beside it which may be a reference. Captions and landmarks
are those of the shards. What the frozen models see is computed when it is asked for, each picture alone, so that it
does not depend on its batch; nothing is kept on the disk.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...lookahead.losses.identity import NONE, FaceReferences, IdentityLoss, embed
from ...lookahead.vision.arcface import Recogniser
from ...lookahead.vision.faces import Detector, Face, square_around
from ...lookahead.vision.images import resize_square
from ...sdxl.images import PictureError, read
from ...sdxl.load import Frozen
from ...sdxl.shared_unet import Condition
from ..lookahead.config import Config
from ..lookahead.judges import read_judges
from ..lookahead.step import Batch
from ..lookahead.validate import Probes
from ..seeds import generator
from .pairs import DataError
from .shards import Shards

SEED = 7000  # of the choice of references
TEXTS = 512  # that are remembered: 0.6 MB each for SDXL


def holds_shards(folder: Path) -> bool:
    return any(folder.glob("shard-*.tar"))


class ShardSource:
    """Pictures of `data.source`, a folder of shards."""

    def __init__(self, config: Config, models: Frozen, recogniser: Recogniser | None, detector: Detector | None):
        """Raises ShardError or DataError, one sentence, where nothing can be trained on."""
        self.data, self.seed = config.data, config.seed
        self.models, self.recogniser, self.detector = models, recogniser, detector
        self.latent_shape = (4, self.data.size // 8, self.data.size // 8)
        self.shards = Shards(Path(self.data.source))
        self.judges = read_judges(config, recogniser, detector, models.text) if config.validate_every else None
        people = len(self.shards.keys)
        references = np.bincount(self.shards.sample_of[self.shards.reference], minlength=people)
        paired = references[self.shards.sample_of] > self.shards.reference  # another one than itself
        # Whom training does not see: a tenth at most, the same with and without validation.
        able = np.unique(self.shards.sample_of[paired])
        few = min(config.validation.people, len(able) // 10)
        self.held_out = sorted(able.tolist(), key=self._rank)[:few]
        self.targets = np.nonzero(paired & ~np.isin(self.shards.sample_of, self.held_out))[0]
        if not len(self.targets):
            raise DataError(
                f"{self.data.source} holds {len(self.shards)} pictures and not one pair to train on: two pictures of a "
                "person, one of which may be a reference."
            )
        face = face_of(self.shards.about(0)["pictures"][0])
        if face is None and (recogniser is not None or self.data.reference_margin is not None):
            raise DataError(
                f"The shards in {self.data.source} say nothing of where faces are, which the identity loss and "
                "data.reference_margin need: make them with checks.detector."
            )
        self._text = lru_cache(TEXTS)(lambda caption: tuple(part.cpu() for part in models.text(caption)))

    def __len__(self) -> int:
        return len(self.targets)

    def digest(self) -> str:
        return hashlib.sha256(f"{self.shards.digest} {self.held_out}".encode()).hexdigest()

    def prepare(self, device: torch.device) -> None:
        """Nothing: pictures are read when they are asked for."""

    def reference_of(self, target: int, number: int) -> int:
        """The picture that is the reference for the sample of this number, whose target is picture `target`."""
        sample = self.shards.sample_of[target]
        theirs = range(self.shards.first[sample], self.shards.first[sample + 1])
        fit = [n for n in theirs if self.shards.reference[n] and n != target]
        return fit[int(torch.randint(len(fit), (1,), generator=generator(SEED, self.seed, number)))]

    @torch.no_grad()
    def batch(self, targets: Sequence[int], numbers: Sequence[int], device: torch.device) -> Batch:
        places = [int(self.targets[t]) for t in targets]
        references = [self.reference_of(p, n) for p, n in zip(places, numbers, strict=True)]
        about = {p: self._about(p) for p in (*places, *references)}
        self.models.readers(device)
        crops = [self.crop(r, about[r], True) for r in references]
        photos = [picture for picture, _ in crops]
        return Batch(
            [self.name(p, about[p]) for p in places],
            torch.cat([self.models.latents(self.crop(p, about[p], False)[0].to(device)) for p in places]),
            torch.cat([self.models.latents(photo.to(device)) for photo in photos]),
            self._condition([about[p]["caption"] for p in places], device),
            self._condition([about[r]["caption"] for r in references], device),
            torch.cat([self.models.features(photo.to(device)) for photo in photos]),
            self._loss(crops, device),
        )

    def _loss(self, crops: Sequence[tuple[Tensor, Tensor | None]], device: torch.device) -> IdentityLoss | None:
        if self.recogniser is None or self.detector is None:
            return None
        self.recogniser.to(device)
        people, points = [], []
        for photo, five in crops:
            assert five is not None  # shards of one configuration say of all faces where they are, or of none
            people.append(embed(self.recogniser, photo.to(device), five).cpu())
            points.append(five)
        sizes = torch.full((len(crops), 2), self.data.size)
        return IdentityLoss(
            self.recogniser, self.detector, FaceReferences(torch.cat(people), torch.cat(points), sizes), NONE
        )

    @torch.no_grad()
    def probes(self, config: Config, device: torch.device) -> Probes:
        """Validation (`validate.Probing`) with the people who are held out; of few people, with those trained on."""
        who = self.held_out or np.unique(self.shards.sample_of[self.targets])[: config.validation.people].tolist()
        first = {int(self.shards.sample_of[n]): int(n) for n in np.nonzero(self.shards.reference)[0][::-1]}
        places, prompts = [first[sample] for sample in who], list(config.validation.prompts)
        about = [self._about(place) for place in places]
        crops = [self.crop(place, a, True) for place, a in zip(places, about, strict=True)]
        shown = torch.cat([picture for picture, _ in crops])
        points = torch.cat([torch.zeros(1, 5, 2) if five is None else five for _, five in crops])
        self.models.readers(device)
        latents = torch.cat([self.models.latents(one.to(device)) for one in shown.split(1)])
        features = torch.cat([self.models.features(one.to(device)) for one in shown.split(1)])
        latents, features = (x.repeat_interleave(len(prompts), 0) for x in (latents, features))
        text = self._condition(prompts * len(places), device)
        own = self._condition([self.data.kv_prompt] * len(latents), device)
        names = [f"{prompt}, {self.name(p, a)}" for p, a in zip(places, about, strict=True) for prompt in prompts]
        judges = self.judges or read_judges(config, self.recogniser, self.detector, self.models.text)
        by = f"{judges.by} on people who are "
        by += "held out" if self.held_out else "trained on (there are fewer than ten)"
        score = judges.score(shown, points, device)
        batch = Batch(names, latents, latents, text, own, features)
        return Probes(batch, len(prompts), shown.to(device), score, by)

    def name(self, place: int, about: dict[str, Any]) -> str:
        """Names a picture in a message: its name in the tar."""
        return f"{self.shards.keys[self.shards.sample_of[place]]:08}.{about['file']}"

    def crop(self, place: int, about: dict[str, Any], as_reference: bool) -> tuple[Tensor, Tensor | None]:
        """The picture as it is trained on, [1, 3, size, size] in [0, 1], and the face's landmarks in it [1, 5, 2]."""
        try:
            picture = read(io.BytesIO(self.shards.picture(place)))
        except PictureError:
            raise DataError(
                f"{self.name(place, about)} in {self.data.source} is no picture: `lookahead generate --verify` with "
                "the configuration that made it says which shards are damaged."
            ) from None
        (height, width), face, points = picture.shape[-2:], face_of(about), None
        side = min(height, width)
        left, top = (width - side) // 2, (height - side) // 2
        if face is not None:
            margin = self.data.reference_margin if as_reference else None
            left, top, side = square_around(face, height, width, margin)
            points = (face.points[None] - torch.tensor([left, top]) + 0.5) * self.data.size / side - 0.5
        return resize_square(picture[None, :, top : top + side, left : left + side], self.data.size), points

    def _about(self, place: int) -> dict[str, Any]:
        sample = int(self.shards.sample_of[place])
        return self.shards.about(sample)["pictures"][place - int(self.shards.first[sample])]

    def _condition(self, captions: Sequence[str], device: torch.device) -> Condition:
        parts = [self._text(caption) for caption in captions]
        context, pooled = (torch.cat(part).to(device) for part in zip(*parts, strict=True))
        size = self.data.size
        time_ids = torch.tensor([size, size, 0, 0, size, size], device=device).float().expand(len(captions), 6)
        return Condition(context, pooled, time_ids)

    def _rank(self, sample: int) -> bytes:
        return hashlib.sha256(str(self.shards.keys[sample]).encode()).digest()


def face_of(about: Mapping[str, Any]) -> Face | None:
    """The face in a picture's JSON. Landmarks that are known exactly come before those that were found."""
    known = {**about, **about.get("exact", {})}
    if "landmarks" not in known:
        return None
    box, points = (torch.tensor(known[name], dtype=torch.float32) for name in ("box", "landmarks"))
    return Face(box, points, known.get("face_score", 1.0))
