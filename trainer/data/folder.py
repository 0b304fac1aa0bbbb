"""Training on a folder of people's pictures (`recipe.Source`): pairs, crops, and what the frozen models see in them.

Latents, image features, face embeddings and texts never change during a run, and the autoencoder alone costs a sixth of
a step. So each is computed once, and alone (what is seen in a picture must not depend on its batch), and kept in a
folder beside the data: 1 MB a picture of 1024 pixels, 0.3 MB a text. Then the models that made them (3 GB) leave the
GPU.
Only what the run will use is computed; another crop, size or model has other names in the folder.
`data.keep: false` computes all of it each time instead, for data sets that do not fit on the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...lookahead.files.tensors import EncoderFileError, read_tensors, write_tensors
from ...lookahead.losses.identity import NONE, FaceReferences, IdentityLoss, embed
from ...lookahead.vision.arcface import Recogniser
from ...lookahead.vision.faces import Detector, square_around
from ...lookahead.vision.images import resize_square
from ...sdxl.images import read
from ...sdxl.load import Frozen
from ...sdxl.shared_unet import Condition
from ..lookahead.config import Config, Data, cache_folder
from ..lookahead.judges import read_judges
from ..lookahead.step import Batch
from ..lookahead.validate import Probes
from ..seeds import generator, order
from .pairs import QUIET, DataError, PairIndex, Seen, listing, make_pairs, passed_over, scan

SEED = 7000  # of the choice of references
MANY = 1_000_000  # pairs
_Item = tuple[str, int | str]  # a kind, and the place of a picture or a text


class FolderSource:
    """Pictures of `data.source`. A target is any picture, its reference another one of the same person with a face."""

    def __init__(self, config: Config, models: Frozen, recogniser: Recogniser | None, detector: Detector | None):
        """Raises DataError, one sentence, where nothing can be trained on."""
        self.data, self.seed, self.samples = config.data, config.seed, config.steps * config.batch
        self.models, self.recogniser, self.detector = models, recogniser, detector
        self.latent_shape = (4, self.data.size // 8, self.data.size // 8)
        self.folder, self.cache = Path(self.data.source), cache_folder(self.data)
        self.judges = read_judges(config, recogniser, detector, models.text) if config.validate_every else None
        self.pairs = read_pairs(self.data, detector, config.model.detector or config.model.base, Path(config.out))
        targets = [n for n, fit in enumerate(self.pairs.references) if fit]
        names = list(dict.fromkeys(self.pairs.pictures[n].person for n in targets))
        # Whom training does not see: a tenth at most, the same whatever else is in the folder, and with or without
        # validation, so that it can be turned on later.
        few = min(config.validation.people, len(names) // 10)
        self.held_out = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:few]
        self.targets = [n for n in targets if self.pairs.pictures[n].person not in self.held_out]
        self._latent_by, self._text_by = _fingerprint(models.vae), _fingerprint(models.text)
        self._person_by = _fingerprint(models.vision, recogniser)
        self._inside = False

    def __len__(self) -> int:
        return len(self.targets)

    def digest(self) -> str:
        def known(n: int) -> tuple[object, ...]:
            picture = self.pairs.pictures[n]
            return picture.file, self.pairs.seen[picture.file].pixels, picture.person, self.caption(n)

        pairs: list[tuple[object, object]]
        if sum(len(self.pairs.references[n]) for n in self.targets) <= MANY:
            pairs = [(known(n), [known(r) for r in self.pairs.references[n]]) for n in self.targets]
        else:  # (from the pictures follow the pairs, which would take gigabytes to write down)
            pairs = [(known(n), n in self.pairs.used) for n in range(len(self.pairs.pictures))]
        return hashlib.sha256(repr((pairs, self.held_out)).encode()).hexdigest()

    def reference_of(self, target: int, number: int) -> int:
        """Place of the reference for the sample of this number, whose target is the picture at place `target`."""
        fit = self.pairs.references[target]
        return fit[int(torch.randint(len(fit), (1,), generator=generator(SEED, self.seed, number)))]

    def prepare(self, device: torch.device) -> None:
        """Compute what the whole run will read, before it starts.

        Several processes share the work without waiting for each other: each begins at its own place, and leaves out
        what is there already.
        """
        if not self.data.keep:
            return
        wanted: dict[Path, _Item] = {}
        for number, place in enumerate(order(len(self), self.seed, range(self.samples))):
            target = self.targets[place]
            reference = self.reference_of(target, number)
            items: list[_Item] = [("latent", target), ("reference", reference), ("person", reference)]
            items += [("text", self.caption(target)), ("text", self.caption(reference))]
            wanted |= {self._path(item): item for item in items}
        missing = [item for path, item in wanted.items() if not path.exists()]
        begin = len(missing) * int(os.environ.get("RANK", 0)) // int(os.environ.get("WORLD_SIZE", 1))
        with self._reading(device):
            for item in tqdm(missing[begin:] + missing[:begin], "Images and captions encoded", delay=QUIET):
                self._get(item, device)

    def batch(self, targets: Sequence[int], numbers: Sequence[int], device: torch.device) -> Batch:
        places = [self.targets[t] for t in targets]
        references = [self.reference_of(p, n) for p, n in zip(places, numbers, strict=True)]

        def stacked(kind: str, name: str, rows: Sequence[int]) -> Tensor:
            return torch.stack([self._get((kind, row), device)[name] for row in rows])

        return Batch(
            [self.pairs.pictures[p].file for p in places],
            stacked("latent", "latent", places).to(device),
            stacked("reference", "latent", references).to(device),
            self._condition([self.caption(p) for p in places], device),
            self._condition([self.caption(r) for r in references], device),
            stacked("person", "features", references).to(device),
            self._loss(references, device),
        )

    def _loss(self, references: Sequence[int], device: torch.device) -> IdentityLoss | None:
        if self.recogniser is None or self.detector is None:
            return None
        self.recogniser.to(device)
        persons = [self._get(("person", row), device) for row in references]
        embeddings, points = (torch.stack([one[k] for one in persons]) for k in ("embedding", "points"))
        sizes = torch.full((len(references), 2), self.data.size)
        return IdentityLoss(self.recogniser, self.detector, FaceReferences(embeddings, points, sizes), NONE)

    def probes(self, config: Config, device: torch.device) -> Probes:
        with self._reading(device):
            return self._probes(config, device)

    def _probes(self, config: Config, device: torch.device) -> Probes:
        """Validation (`validate.Probing`) with the people who are held out; of a small folder, with some of those that
        are trained on."""
        who = self.held_out or list(dict.fromkeys(self.pairs.pictures[n].person for n in self.targets))
        first = {self.pairs.pictures[n].person: n for n in sorted(self.pairs.used, reverse=True)}
        places = [first[name] for name in who[: config.validation.people]]
        prompts = list(config.validation.prompts)
        rows = [place for place in places for _ in prompts]
        latents = torch.stack([self._get(("reference", row), device)["latent"] for row in rows]).to(device)
        features = torch.stack([self._get(("person", row), device)["features"] for row in rows]).to(device)
        text = self._condition(prompts * len(places), device)
        own = self._condition([self.data.kv_prompt] * len(rows), device)
        names = [f"{prompt}, {self.pairs.pictures[p].person}" for p in places for prompt in prompts]
        crops = [self.crop(place, True) for place in places]
        shown = torch.cat([picture for picture, _ in crops])
        points = torch.cat([torch.zeros(1, 5, 2) if points is None else points for _, points in crops])
        batch = Batch(names, latents, latents, text, own, features)
        judges = self.judges or read_judges(config, self.recogniser, self.detector, self.models.text)
        by = f"{judges.by} on people who are "
        by += "held out" if self.held_out else "trained on (there are fewer than ten)"
        return Probes(batch, len(prompts), shown.to(device), judges.score(shown, points, device), by)

    def caption(self, place: int) -> str:
        """Says what the picture shows: its text in the data, else `data.caption`."""
        return self.pairs.pictures[place].text or self.data.caption

    def crop(self, place: int, as_reference: bool) -> tuple[Tensor, Tensor | None]:
        """The picture as it is trained on, [1, 3, size, size] in [0, 1], and the face's landmarks in it [1, 5, 2]."""
        entry, seen = self.pairs.pictures[place], self.pairs.seen[self.pairs.pictures[place].file]
        face = seen.found()
        left, top, side = square_of(seen, self.data.reference_margin if as_reference else None)
        picture = read(self.folder / entry.file)[None, :, top : top + side, left : left + side]
        zoom = self.data.size / side
        points = None if face is None else (face.points[None] - torch.tensor([left, top]) + 0.5) * zoom - 0.5
        return resize_square(picture, self.data.size), points

    def _condition(self, captions: Sequence[str], device: torch.device) -> Condition:
        parts = [self._get(("text", caption), device) for caption in captions]
        context, pooled = (torch.cat([part[k] for part in parts]).to(device) for k in ("context", "pooled"))
        size = self.data.size
        time_ids = torch.tensor([size, size, 0, 0, size, size], device=device).float().expand(len(captions), 6)
        return Condition(context, pooled, time_ids)

    # --- what the frozen models see, and what is kept of it

    def _get(self, item: _Item, device: torch.device) -> dict[str, Tensor]:
        """On the CPU: `latent` of a picture as a target or as a reference; of a `person` features and, where there is
        a recogniser, points and embedding; of a `text` context and pooled."""
        path = self._path(item)
        if self.data.keep and path.exists():
            try:
                return read_tensors(path)[0]
            except EncoderFileError:  # cut short by a full disk or a power failure: made again
                pass
        with self._reading(device):
            made = {k: v.cpu().contiguous() for k, v in self._make(item, device).items()}
        if self.data.keep:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_tensors(path, made, {})
            except (OSError, EncoderFileError) as error:
                why = error.__cause__ or error  # what the system says, without the advice for files of other kinds
                raise DataError(
                    f"What the models see in the pictures cannot be kept in {path.parent} ({why}): free some space, "
                    "set data.cache to another folder, or data.keep to false."
                ) from None
        return made

    @torch.no_grad()
    def _make(self, item: _Item, device: torch.device) -> dict[str, Tensor]:
        kind, what = item
        if isinstance(what, str):
            return dict(zip(("context", "pooled"), self.models.text(what), strict=True))
        picture, points = self.crop(what, kind != "latent")
        if kind != "person":
            return {"latent": self.models.latents(picture)[0]}
        made = {"features": self.models.features(picture)[0]}
        if self.recogniser is not None:
            assert points is not None  # a recogniser comes with a detector, and then references are those with a face
            person = embed(self.recogniser.to(device), picture.to(device), points)
            made |= {"points": points[0], "embedding": person[0]}
        return made

    def _path(self, item: _Item) -> Path:
        kind, what = item
        if isinstance(what, str):
            key: tuple[object, ...] = (what, self._text_by)
        else:
            seen = self.pairs.seen[self.pairs.pictures[what].file]
            square = square_of(seen, None if kind == "latent" else self.data.reference_margin)
            key = (seen.pixels, square, self.data.size)
            key += (seen.face, self._person_by) if kind == "person" else (self._latent_by,)
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:40]
        return self.cache / digest[:2] / f"{digest}.safetensors"

    @contextmanager
    def _reading(self, device: torch.device) -> Iterator[None]:
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


def read_pairs(data: Data, detector: Detector | None, name: str, out: Path) -> PairIndex:
    """The usable pictures. Files that cannot be read are left out and listed in `quarantine.jsonl` in `out`.

    Raises DataError where there are more of these than `data.damaged` allows, or nothing is left to train on.
    """
    folder = Path(data.source)
    entries, gone = listing(folder, data.metadata)
    if gone:
        said = f"The metadata names {len(gone):,} files that are not there, or are no pictures ({gone[0]})"
        print(f"{said}: they are left out.", file=sys.stderr)
    if others := passed_over(folder):
        print(others, file=sys.stderr)
    found = make_pairs(
        entries, scan(folder, entries, detector, name, cache_folder(data) / "scan.jsonl"), detector is not None
    )
    broken = {e.file: why for e in entries if (why := found.seen[e.file].error)}
    (out / "quarantine.jsonl").unlink(missing_ok=True)
    if broken:
        out.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"file": file, "why": why}) + "\n" for file, why in broken.items()]
        (out / "quarantine.jsonl").write_text("".join(lines))
        said = f"{len(broken)} of {len(entries)} pictures cannot be read (listed in {out / 'quarantine.jsonl'})"
        if len(broken) > max(1, data.damaged * len(entries)):
            raise DataError(f"{said}, and data.damaged allows a share of {data.damaged}: repair or remove them.")
        print(f"{said}: they are left out.", file=sys.stderr)
    if not any(found.references):
        raise DataError(
            f"{folder} holds {len(entries)} pictures and not one pair to train on: two different pictures of a person, "
            f"one of them with a face. `lookahead doctor {folder}` says what is missing."
        )
    return found


def square_of(seen: Seen, margin: float | None) -> tuple[int, int, int]:
    """(left, top, side) of what is cut out of a picture: the largest square, as near to the face's middle as it goes;
    or, with a margin (share of its box's longer side, on each side), that around the face, as LookaheadCropFace has it.
    """
    height, width = seen.height, seen.width
    side, face = min(height, width), seen.found()
    if face is None:
        return (width - side) // 2, (height - side) // 2, side
    return square_around(face, height, width, margin)


def _fingerprint(*modules: nn.Module | None) -> str:
    """Of weights: names, shapes, types, and some values of each."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict().items() if module is not None else ():
            few = tensor.flatten()[:: max(1, tensor.numel() // 64)].double().tolist()
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype} {few}".encode())
    return digest.hexdigest()
