"""The drawn world for `lookahead evaluate`: its people, whose targets are known exactly, and judges of its own."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..evaluation.harness.library import Library
from ..evaluation.harness.measures import LOWER, Case, MeasureKind, OpenedMeasure
from ..evaluation.harness.people import ReferencePerson, one
from ..evaluation.harness.sections import People, Prompt
from ..lookahead.files.atomic import atomic
from ..lookahead.files.tensors import sha256
from ..sdxl.images import read
from .files.weights import RECOGNISER, STYLE_SCORER, evaluators
from .plan import IMAGE_SIZE, WEIGHTS
from .world.faces import CONTINUOUS, PLACES, STYLES, Faces, identity_vector, render, sample_nuisance
from .world.references import reference_people

DRAWN = 24  # people, unless a protocol says how many
TARGETS = 7000  # seed of how targets are taken


def picture_of(faces: Faces, seed: int) -> bytes:
    """A picture as a PNG file."""
    pixels = (render(faces, IMAGE_SIZE, seed=seed)[0] * 255).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def drawn_people(people: People, prompts: Sequence[Prompt], out: Path) -> list[ReferencePerson]:
    """Held-out people (`PeopleSource`); a target is the same person in the style and at the place of the prompt."""
    count = people.count or DRAWN
    everyone = reference_people(count, people.first)
    found = []
    for number, faces in enumerate(everyone, people.first):
        name = f"person-{number:04}"
        for prompt in prompts:
            path = out / "targets" / name / f"{prompt.number}-{_key(prompt)}.png"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic(path) as part:
                    part.write_bytes(picture_of(target_of(faces, prompt, number), TARGETS + number))
        person = one(name, picture_of(faces, number), out)
        found.append(ReferencePerson(person.name, person.reference, person.digest, _Targets(out / "targets" / name)))
    return found


class _Targets:
    def __init__(self, folder: Path):
        self._folder = folder

    def __call__(self, prompt: Prompt) -> Path | None:
        path = self._folder / f"{prompt.number}-{_key(prompt)}.png"
        return path if path.exists() else None


def _key(prompt: Prompt) -> str:
    return f"{style_of(prompt.text) or 'photo'}-{place_of(prompt.text)}".replace(" ", "_")


def style_of(text: str) -> str | None:
    """The style that a prompt asks for, if it is one of the world's."""
    return next((style for style in STYLES if style in text), None)


def place_of(text: str) -> int:
    """The number of the place that a prompt asks for, 0 for none."""
    return next((n for n, place in enumerate(PLACES) if place and place in text), 0)


def target_of(faces: Faces, prompt: Prompt, number: int) -> Faces:
    """Makes the same person as the prompt asks for; pose and light are drawn, a person's the same under all prompts."""
    numbers = torch.Generator().manual_seed(TARGETS + number)
    style = torch.tensor([STYLES.index(style_of(prompt.text) or "photo")])
    place = torch.tensor([place_of(prompt.text)])
    return Faces(faces.identity, sample_nuisance(1, numbers, style=style, place=place))


class DrawnJudge:
    """The world's evaluation recogniser (`Embedder`), which took part in no training but its own."""

    name = "mini judge"

    def __init__(self) -> None:
        self.network = evaluators()[0]
        self.digest = sha256(WEIGHTS / RECOGNISER)

    @torch.no_grad()
    def __call__(self, path: Path) -> Tensor:
        return self.network.embed(read(path)[None])[0]


class DrawnScorer:
    """Style accuracy (`Scorer`): 1 where the world's scorer sees the style that the prompt asks for, else 0."""

    name = "style, mini scorer"

    def __init__(self) -> None:
        self.network = evaluators()[1]
        self.digest = sha256(WEIGHTS / STYLE_SCORER)

    @torch.no_grad()
    def __call__(self, path: Path, text: str) -> float | None:
        style = style_of(text)
        return None if style is None else float(int(self.network(read(path)[None])[0].argmax()) == STYLES.index(style))


class IdentityParameters(MeasureKind):
    """The mean error of the parameters that a face is drawn by, read off a picture, as a share of their ranges."""

    kind = "identity parameters"

    def open(self, library: Library, pack: str | None) -> OpenedMeasure:
        judge = DrawnJudge()

        @torch.no_grad()
        def score(case: Case) -> float:
            (person,) = reference_people(1, int(case.person.rpartition("-")[2]))
            seen, true = (v[0, : len(CONTINUOUS)] for v in (judge.network(read(case.picture)[None]), vector(person)))
            return float((seen - true).abs().mean() / 2)

        def vector(person: Faces) -> Tensor:
            return identity_vector(person.identity)

        return OpenedMeasure(f"error of the face's parameters ({judge.name})", judge.digest, score, better=LOWER)


EMBEDDERS = {"mini": DrawnJudge}
SCORERS = {"mini": DrawnScorer}
MEASURES = {IdentityParameters.kind: IdentityParameters}
