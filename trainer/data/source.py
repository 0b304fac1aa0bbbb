"""Training on people's pictures (`recipe.Source`): pairs, and what the frozen models see in them.

Latents, image features, face embeddings and texts never change during a run, and the autoencoder alone costs a sixth of
a step. So they are made ahead (`prepare.py`), as shards in a folder beside the data, and the models that made them (3
GB) leave the GPU; workers then read batches ahead of the step. What is not there is computed when it is asked for, each
picture alone: everything, with `data.keep: false`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...lookahead.losses.identity import NONE, FaceReferences, IdentityLoss
from ...lookahead.vision.arcface import Recogniser
from ...lookahead.vision.faces import Detector
from ...sdxl.load import Frozen
from ...sdxl.shared_unet import Condition
from ..lookahead.config import Config
from ..lookahead.judges import read_judges
from ..lookahead.step import Batch
from ..lookahead.validate import Probes
from .features import FeatureReader, PreparedFeatures, Tensors, View, features_folder
from .loader import PairLoader
from .pictures import Crop, PeoplePictures
from .prepare import Work, plan, prepare

TEXTS = 512  # that are remembered where nothing is kept: 0.6 MB each for SDXL


class PictureSource:
    """People's pictures of `data.source` as a source of batches."""

    def __init__(
        self,
        config: Config,
        pictures: PeoplePictures,
        models: Frozen,
        recogniser: Recogniser | None,
        detector: Detector | None,
    ):
        """Raises what `read_judges` raises."""
        self.config, self.data, self.pictures = config, config.data, pictures
        self.models, self.recogniser, self.detector = models, recogniser, detector
        self.latent_shape = (4, self.data.size // 8, self.data.size // 8)
        self.judges = read_judges(config, recogniser, detector, models.text) if config.validate_every else None
        self.reader = FeatureReader(models, recogniser, self.data)
        kept = PreparedFeatures(features_folder(self.data)) if self.data.keep else None
        self.loader = PairLoader(pictures, self.reader.keys(pictures), config.seed, kept)
        self._text = lru_cache(TEXTS)(lambda caption: self.reader.text([caption])[0])

    def __len__(self) -> int:
        return len(self.pictures.targets)

    def digest(self) -> str:
        return self.pictures.digest()

    def missing(self) -> Work:
        """Finds what the run will read and is not kept yet."""
        return plan(self.config, self.loader, self.reader)

    def prepare(self, device: torch.device, worker: tuple[int, int] | None = None) -> None:
        """Have made what the whole run will read, before it starts; worker: as `prepare.prepare` has it.

        Raises DataError, one sentence.
        """
        if self.data.keep:
            prepare(self.config, self.loader, self.reader, device, worker)

    def batch(self, targets: Sequence[int], numbers: Sequence[int], device: torch.device) -> Batch:
        return self.finish(self.loader((targets, numbers)), device)

    def finish(self, loaded: dict[str, Any], device: torch.device) -> Batch:
        """A batch of what the loader has read."""
        if "stored" in loaded:
            stored = loaded["stored"]
            faces = stored.get("embedding"), stored.get("points")
            stored = {name: tensor.to(device, non_blocking=True) for name, tensor in stored.items()}
        else:
            with self.reader.reading(device):
                stored, faces = self._computed(loaded, device)
        text, own = (
            self._condition(stored[f"{name}_context"], stored[f"{name}_pooled"]) for name in ("text", "reference_text")
        )
        latents = stored["target"], stored["reference"]
        return Batch(loaded["names"], *latents, text, own, stored["features"], self._loss(*faces, device))

    def _computed(
        self, loaded: dict[str, Any], device: torch.device
    ) -> tuple[dict[str, Tensor], tuple[Tensor | None, Tensor | None]]:
        """What `stored` would hold."""
        target = [self._see(crop, ("target",), device)["target"]["latent"] for crop in loaded["targets"]]
        references = [self._see(crop, ("reference", "person"), device) for crop in loaded["references"]]
        batch = {"target": target, "reference": [one["reference"]["latent"] for one in references]}
        batch["features"] = [one["person"]["features"] for one in references]
        for name, captions in zip(("text", "reference_text"), loaded["texts"], strict=True):
            for tensor in ("context", "pooled"):
                batch[f"{name}_{tensor}"] = [self._text(caption)[tensor] for caption in captions]
        persons = [one["person"] for one in references]
        embedding, points = (
            torch.stack([one[name] for one in persons]) if name in persons[0] else None
            for name in ("embedding", "points")
        )
        return {name: torch.stack(rows).to(device) for name, rows in batch.items()}, (embedding, points)

    def _see(self, crop: Crop, views: Sequence[View], device: torch.device) -> dict[View, Tensors]:
        """Alone: what is seen in a picture must not depend on who else is in its batch."""
        return self.reader.see([crop], [views], device)[0]

    def _loss(self, embedding: Tensor | None, points: Tensor | None, device: torch.device) -> IdentityLoss | None:
        if self.recogniser is None or self.detector is None:
            return None
        assert embedding is not None and points is not None  # as the recogniser is there
        self.recogniser.to(device)
        sizes = torch.full((len(points), 2), self.data.size)
        return IdentityLoss(self.recogniser, self.detector, FaceReferences(embedding, points, sizes), NONE)

    def _condition(self, context: Tensor, pooled: Tensor) -> Condition:
        size = self.data.size
        time_ids = torch.tensor([size, size, 0, 0, size, size], device=context.device).float()
        return Condition(context, pooled, time_ids.expand(len(context), 6))

    def probes(self, config: Config, device: torch.device) -> Probes:
        """Validation (`validate.Probing`) with the people who are held out; of few people, with some of those that are
        trained on."""
        shown, prompts = self.pictures.shown(config.validation.people), list(config.validation.prompts)
        crops = [self.pictures.crop(place, True) for place, _ in shown]
        with self.reader.reading(device):
            seen = [self._see(crop, ("reference", "person"), device) for crop in crops]
            texts = {caption: self._text(caption) for caption in (*prompts, self.data.kv_prompt)}
        latents = torch.stack([one["reference"]["latent"] for one in seen]).to(device)
        features = torch.stack([one["person"]["features"] for one in seen]).to(device)
        latents, features = (each.repeat_interleave(len(prompts), 0) for each in (latents, features))
        text, own = (
            self._condition(*(torch.stack([texts[c][k] for c in rows]).to(device) for k in ("context", "pooled")))
            for rows in (prompts * len(shown), [self.data.kv_prompt] * len(latents))
        )
        names = [f"{prompt}, {name}" for _, name in shown for prompt in prompts]
        pictures = torch.cat([picture for picture, _ in crops])
        points = torch.cat([torch.zeros(1, 5, 2) if five is None else five for _, five in crops])
        batch = Batch(names, latents, latents, text, own, features)
        judges = self.judges or read_judges(config, self.recogniser, self.detector, self.models.text)
        by = f"{judges.by} on people who are "
        by += "held out" if self.pictures.held_out else "trained on (there are fewer than ten)"
        return Probes(batch, len(prompts), pictures.to(device), judges.score(pictures, points, device), by)
