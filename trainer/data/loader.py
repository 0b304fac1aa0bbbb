"""Reading the samples of a batch, in a worker too: pairs of pictures, and what is kept of them or their crops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..seeds import generator
from .features import Item, Keys, PreparedFeatures, Tensors, View
from .pictures import PeoplePictures

SEED = 7000  # of the choice of references
Samples = tuple[Sequence[int], Sequence[int]]  # targets as the source counts them, and numbers of samples in the run
# What a batch has of stored items: its name there, the view of an item, and the tensor's name in it.
_STORED: tuple[tuple[str, View, str], ...] = (
    ("target", "target", "latent"),
    ("reference", "reference", "latent"),
    ("features", "person", "features"),
    ("embedding", "person", "embedding"),
    ("points", "person", "points"),
)


@dataclass
class PairLoader:
    """Reads samples, in a worker too: it holds no model. kept: None where everything is computed when it is asked for.

    A batch is `stored` tensors where all that it needs is kept, else crops and captions for the models to read.
    """

    pictures: PeoplePictures
    keys: Keys
    seed: int
    kept: PreparedFeatures | None

    def __call__(self, samples: Samples) -> dict[str, Any]:
        targets, numbers = samples
        places = [int(self.pictures.targets[target]) for target in targets]
        references = [self.reference_of(p, n) for p, n in zip(places, numbers, strict=True)]
        batch: dict[str, Any] = {"names": [self.pictures.name(p) for p in places]}
        texts = [[self.pictures.caption(p) for p in rows] for rows in (places, references)]
        if (stored := self._stored(places, references, texts)) is not None:
            return batch | {"stored": stored}
        crops = [[self.pictures.crop(p, which) for p in rows] for rows, which in ((places, False), (references, True))]
        return batch | {"texts": texts, "targets": crops[0], "references": crops[1]}

    def reference_of(self, place: int, number: int) -> int:
        """Place of the reference for the sample of this number, whose target is the picture at `place`."""
        fit = self.pictures.references(place)
        return fit[int(torch.randint(len(fit), (1,), generator=generator(SEED, self.seed, number)))]

    def _stored(
        self, places: Sequence[int], references: Sequence[int], texts: Sequence[Sequence[str]]
    ) -> dict[str, Tensor] | None:
        if self.kept is None:
            return None
        rows: dict[View, Sequence[int]] = {"target": places, "reference": references, "person": references}
        items = [Item(view, place) for view, of in rows.items() for place in of]
        items += [Item("text", caption) for each in texts for caption in each]
        seen: dict[Item, Tensors] = {}
        for item in dict.fromkeys(items):
            if (found := self.kept.get(self.keys(item))) is None:
                return None
            seen[item] = found
        batch = {
            name: torch.stack([seen[Item(view, place)][tensor] for place in rows[view]])
            for name, view, tensor in _STORED
            if tensor in seen[Item(view, rows[view][0])]
        }
        for name, of in zip(("text", "reference_text"), texts, strict=True):
            for tensor in ("context", "pooled"):
                batch[f"{name}_{tensor}"] = torch.stack([seen[Item("text", caption)][tensor] for caption in of])
        return batch
