"""Where the files of an evaluation lie, and the networks that judge, each opened once."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ...lookahead.files.tensors import sha256
from ...lookahead.losses.identity import embed, largest
from ...lookahead.vision import arcface, clip
from ...lookahead.vision.arcface import Recogniser
from ...lookahead.vision.face_models import SIZES, FaceModels
from ...lookahead.vision.faces import Face
from ...lookahead.vision.images import cover
from ...sdxl.configs import tokenizers
from ...sdxl.images import read

Opened = TypeVar("Opened")


class EvaluationError(ValueError):
    """Says what is wrong with an evaluation, in one sentence for the user."""


class Embedder(Protocol):
    """Says who is in a picture. name, digest: of the recogniser."""

    name: str
    digest: str

    def __call__(self, path: Path) -> Tensor | None:
        """Picture file -> unit vector [d]; None where no face is found."""
        ...


class Scorer(Protocol):
    """Says how well a picture follows a text. name, digest: of the network."""

    name: str
    digest: str

    def __call__(self, path: Path, text: str) -> float | None:
        """Picture file and prompt -> score; None where it cannot tell."""
        ...


class Looker(Protocol):
    """Says how far apart two pictures are. name, digest: of the network."""

    name: str
    digest: str

    def __call__(self, one: Path, other: Path) -> float:
        """Two picture files -> distance, 0 for the same."""
        ...


class FaceEmbedder:
    """The largest face of a picture, found by a pack and embedded by a recogniser (`Embedder`)."""

    def __init__(self, recogniser: Recogniser, find: Callable[[Path], Face | None], digest: str):
        self.name, self.digest = recogniser.name, digest
        self._recogniser, self._find = recogniser, find
        self._known: dict[Path, Tensor | None] = {}

    @torch.no_grad()
    def __call__(self, path: Path) -> Tensor | None:
        if path not in self._known:
            face = self._find(path)
            vector = None if face is None else embed(self._recogniser, read(path)[None], face.points[None])[0]
            self._known[path] = vector
        return self._known[path]


class CLIPJudge:
    """CLIP-T and CLIP-I: cosines of a picture with a text, and one less that with a picture (`Scorer`, `Looker`)."""

    def __init__(self, path: Path):
        file = clip.read(path)
        self.name, self.digest = path.parent.name if path.stem == "model" else path.stem, sha256(path)
        self._file, self._pictures = file, clip.CLIPPictures(file)
        self._seen: dict[Path, Tensor] = {}
        self._texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def picture(self, path: Path) -> Tensor:
        """Embeds a picture: unit vector [channels]."""
        if path not in self._seen:
            size = self._pictures.size
            pixels = cover(read(path)[None], size, size).clamp(0, 1)
            self._seen[path] = F.normalize(self._pictures(pixels), dim=-1)[0]
        return self._seen[path]

    def text(self, text: str) -> Tensor:
        """Embeds a text: unit vector [channels]; what is over 77 tokens is cut off."""
        if text not in self._texts:
            ids = tokenizers()[0](text, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
            self._texts[text] = clip.embed_texts(self._file, ids.input_ids)[0]
        return self._texts[text]

    def __call__(self, path: Path, text: str) -> float:
        return float(self.picture(path) @ self.text(text))

    def distance(self, one: Path, other: Path) -> float:
        """Tells how far apart two pictures are: 1 - cosine."""
        return 1 - float(self.picture(one) @ self.picture(other))


def read_public(path: Path, scale: tuple[float, float] | None) -> Recogniser:
    """Reads a recogniser in a public layout."""
    return arcface.read(path, scale)


@dataclass(eq=False)
class Library:
    """Finds files, and opens networks once. beside: folders that files are looked for in, after the path as it stands.

    embedders, scorers: those that are known by a name instead of a file. read_recogniser: of a file.
    """

    beside: tuple[Path, ...] = ()
    embedders: Mapping[str, Callable[[], Embedder]] = field(default_factory=dict)
    scorers: Mapping[str, Callable[[], Scorer]] = field(default_factory=dict)
    read_recogniser: Callable[[Path, tuple[float, float] | None], Recogniser] = read_public
    known_packs: Mapping[str, Path] = field(default_factory=dict)
    _opened: dict[tuple[str, ...], object] = field(default_factory=dict)

    def find(self, field_name: str, name: str) -> Path:
        """The file or folder of this name. Raises EvaluationError, naming the field and where it was looked for."""
        for path in (Path(name).expanduser(), *(folder / name for folder in self.beside)):
            if path.exists():
                return path
        looked = f" (also looked for in {', '.join(map(str, self.beside))})" if self.beside else ""
        raise EvaluationError(f"{field_name} names {name}, which is not there{looked}: give the path of a file.")

    def pack_folder(self, name: str) -> Path:
        """The folder of a face pack."""
        return self.known_packs.get(name) or self.find("pack", name)

    def pack(self, name: str) -> FaceModels:
        """An opened face pack; on one thread, since torch has the others."""
        return self._once(("pack", name), lambda: FaceModels(self.pack_folder(name), threads=1))

    def face(self, pack: str, path: Path) -> Face | None:
        """The largest face of a picture file."""
        models = self.pack(pack)
        sizes = (models.only_size,) if models.only_size else SIZES
        return self._once(("face", pack, str(path)), lambda: largest(models.find(read(path)[None], sizes)[0]))

    def embedder(self, recogniser: str, pack: str | None) -> Embedder:
        """A recogniser by a name that is known, or by its file with a pack that finds the faces.

        Raises EvaluationError where there is no pack; what `read_recogniser` and `FaceModels` raise.
        """
        if recogniser in self.embedders:
            return self._once(("embedder", recogniser), self.embedders[recogniser])
        if pack is None:
            raise EvaluationError(
                f"The recogniser {recogniser} sees faces that a detector has found: set `pack`, in the measure or in "
                "`models`, to the folder of an insightface pack."
            )
        path = self.find("recogniser", recogniser)

        def make() -> Embedder:
            models = self.pack(pack)
            own = models.recogniser is not None and path.resolve() == models.recogniser.resolve()
            network = self.read_recogniser(path, models.preprocessing if own else None)
            return FaceEmbedder(network, lambda picture: self.face(pack, picture), digest_of(path))

        return self._once(("embedder", recogniser, pack), make)

    def scorer(self, name: str) -> Scorer:
        """A scorer of prompts by a name that is known, or CLIP by its file."""
        if name in self.scorers:
            return self._once(("scorer", name), self.scorers[name])
        return self.clip(name)

    def clip(self, name: str) -> CLIPJudge:
        """CLIP by its file. Raises EvaluationError for a file that is none."""
        path = self.find("clip", name)
        path = path / "model.safetensors" if path.is_dir() else path
        try:
            return self._once(("clip", str(path)), lambda: CLIPJudge(path))
        except ValueError as error:
            raise EvaluationError(f"clip: {error}") from None

    def _once(self, key: tuple[str, ...], make: Callable[[], Opened]) -> Opened:
        if key not in self._opened:
            self._opened[key] = make()
        return cast(Opened, self._opened[key])


@functools.lru_cache(maxsize=256)
def digest_of(path: Path) -> str:
    """Hash of a file, or of all files of a folder with their names. Read once in a process."""
    if path.is_file():
        return sha256(path)
    parts = [f"{p.relative_to(path)} {sha256(p)}" for p in sorted(path.rglob("*")) if p.is_file()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
