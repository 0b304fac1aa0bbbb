"""Pictures to train a concept encoder on (`recipe.Source`): a folder of anything, with no labels and no captions.

What the frozen models see in a picture never changes, so it is computed once and kept in a folder beside the data: its
latent and the image encoder's features, 0.3 MB at 1024 pixels. Another size or model has other names in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ...lookahead.files.tensors import EncoderFileError, read_tensors, write_tensors
from ...lookahead.method.concept_input import ConceptError, check_picture
from ...sdxl.concept import image_features
from ...sdxl.concept_maker import squared
from ...sdxl.images import PictureError, read
from ...sdxl.load import Frozen
from ..progress import progress
from .config import ConceptConfig, picture_cache
from .step import ConceptBatch

HELD_OUT = 16  # pictures at most, a tenth of the data at most


class ConceptDataError(ValueError):
    """Says what is wrong with the pictures, in one sentence for the user."""


class ConceptPictures:
    """Pictures by number, of a folder or drawn: each is one concept, the target and what its encoder looks at.

    names: of all pictures; picture: the number of one -> [3, H, W] in [0, 1]; key: what identifies its pixels.
    """

    def __init__(
        self,
        config: ConceptConfig,
        models: Frozen,
        names: Sequence[str],
        picture: Callable[[int], Tensor],
        key: Callable[[int], str],
    ):
        self.size, self.models, self.cache = config.data.size, models, picture_cache(config.data)
        self.picture, self.key = picture, key
        self.keys = [key(n) for n in range(len(names))]
        by_chance = sorted(range(len(names)), key=lambda n: hashlib.sha256(self.keys[n].encode()).digest())
        few = min(HELD_OUT, len(names) // 10) if config.validate_every else 0
        self.unseen, chosen = by_chance[:few], sorted(by_chance[few:])
        self.names, self.targets = list(names), chosen
        self._models = fingerprint(models.vae, models.vision)

    def __len__(self) -> int:
        return len(self.targets)

    def digest(self) -> str:
        return hashlib.sha256(repr([self.keys[n] for n in self.targets]).encode()).hexdigest()

    def prepare(self, device: torch.device) -> None:
        """Compute what is not kept yet, of all pictures."""
        missing = [n for n in (*self.targets, *self.unseen) if not self._path(n).exists()]
        for n in progress(missing, "Pictures encoded"):
            self._seen(n, device)
        for model in (self.models.vae, self.models.vision):  # 3 GB of SDXL that training has no use for
            model.to("cpu")

    def batch(self, targets: Sequence[int], numbers: Sequence[int], device: torch.device) -> ConceptBatch:
        return self._batch([self.targets[t] for t in targets], device)

    def held_out(self, device: torch.device) -> ConceptBatch | None:
        """The pictures that training does not see; None where there are too few to hold one out."""
        return self._batch(self.unseen, device) if self.unseen else None

    def _batch(self, places: Sequence[int], device: torch.device) -> ConceptBatch:
        seen = [self._seen(n, device) for n in places]
        latents, features = (torch.stack([each[k] for each in seen]).to(device) for k in ("latent", "features"))
        return ConceptBatch([self.names[n] for n in places], latents, features)

    def _path(self, n: int) -> Path:
        digest = hashlib.sha256(f"{self.keys[n]} {self.size} {self._models}".encode()).hexdigest()[:40]
        return self.cache / digest[:2] / f"{digest}.safetensors"

    def _seen(self, n: int, device: torch.device) -> dict[str, Tensor]:
        path = self._path(n)
        if path.exists():
            try:
                return read_tensors(path)[0]
            except EncoderFileError:  # cut short by a full disk or a power failure: made again
                pass
        try:
            square = squared(self.picture(n), self.size)
        except (PictureError, ConceptError) as error:
            raise ConceptDataError(f"{self.names[n]}: {error}") from None
        self.models.readers(device)
        latent, features = self.models.latents(square), image_features(self.models, square)
        made = {"latent": latent[0].float().cpu(), "features": features[0].cpu()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, {k: v.contiguous() for k, v in made.items()}, {})
        except (OSError, EncoderFileError) as error:
            raise ConceptDataError(
                f"What the models see in the pictures cannot be kept in {path.parent} ({error.__cause__ or error}): "
                "free some space, or set data.cache to another folder."
            ) from None
        return made


def folder_source(config: ConceptConfig, models: Frozen, endings: Collection[str]) -> ConceptPictures:
    """The pictures of `data.source` and of the folders in it. Raises ConceptDataError, one sentence, where there are
    none, or one cannot be used."""
    folder = Path(config.data.source)
    files = picture_files(folder, endings)

    def key(n: int) -> str:
        return hashlib.sha256(files[n].read_bytes()).hexdigest()

    def picture(n: int) -> Tensor:
        pixels = read(files[n])
        check_picture(*pixels.shape[-2:])
        return pixels

    return ConceptPictures(config, models, [path.relative_to(folder).as_posix() for path in files], picture, key)


def picture_files(folder: Path, endings: Collection[str]) -> list[Path]:
    """The files with one of these endings in a folder and in the folders in it, by name. Raises ConceptDataError where
    there are none."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings) if folder.is_dir() else []
    if not files:
        what = "holds no pictures" if folder.is_dir() else "is no folder"
        raise ConceptDataError(f"{folder} {what}: name a folder of pictures of anything (data.source).")
    return files


def fingerprint(*modules: nn.Module) -> str:
    """Tells networks apart by names, shapes and some values of their weights."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            few = tensor.flatten()[:: max(1, tensor.numel() // 64)].double().tolist()
            digest.update(f"{name} {list(tensor.shape)} {few}".encode())
    return digest.hexdigest()[:16]
