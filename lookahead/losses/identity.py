"""The identity loss: is the person in a preview the one of the reference? (arXiv 2404.03620, section 4.2 and 5.1.)"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..vision.arcface import Recogniser
from ..vision.faces import (
    Detector,
    Face,
    align,
    area,
    head_around,
    moved_onto,
    nearest,
    rescale_landmarks,
    samples_for,
    template,
    usable,
)
from .base import clamp_preview, select_references
from .face_views import FaceViews

# Where the face of a preview is taken to be when none is found in it: where it was last in this image, else where the
# reference has it; where it was last alone; nowhere.
REFERENCE, LAST, NONE = "reference", "last", "none"
FALLBACKS = (REFERENCE, LAST, NONE)
TEMPERATURE = 0.1  # of InfoNCE, in cosines


class NoFaceError(ValueError):
    """No face was found where one is needed: one sentence for the user."""


def largest(faces: Sequence[Face]) -> Face | None:
    """The face with the largest box."""
    return max(faces, key=area, default=None)


def embed(recogniser: Recogniser, pictures: Tensor, points: Tensor) -> Tensor:
    """Unit vectors [n, d] of the people in pictures [n, 3, h, w] in [0, 1], whose landmarks are [n, 5, 2] (on the CPU).

    Differentiable in the pictures. Shrunken faces are averaged, not sampled (`faces.align`).
    """
    size = recogniser.size
    return recogniser(align(pictures, points, size=size, samples=samples_for(points, size)))


def see(
    recogniser: Recogniser,
    pictures: Tensor,
    points: Tensor,
    views: FaceViews | None,
    generator: torch.Generator | None,
) -> Tensor:
    """The mean of the unit vectors of a face's views, [n, d], whose product with a reference is the mean cosine; the
    unit vector of its one crop (`embed`) where there are no views or nothing to draw them from.
    """
    if views is None or not views.count or generator is None:
        return embed(recogniser, pictures, points)
    return views.embed(recogniser, pictures, points, generator).mean(1)


@dataclass(frozen=True, eq=False)
class FaceReferences:
    """The m people with whom an identity loss compares."""

    embeddings: Tensor  # [m, d], of unit length
    points: Tensor | None = None  # [m, 5, 2], where the face was; None where no picture is known
    sizes: Tensor | None = None  # int64 [m, 2], height and width of the picture that it was in, or None likewise
    pictures: tuple[Tensor, ...] = ()  # those pictures [3, h, w] in [0, 1], m of them, or none where nobody leans

    def place(self, row: int, size: tuple[int, int]) -> Tensor:
        """Says where a row's face would be in a picture of height and width `size`: landmarks [5, 2]."""
        if self.points is None or self.sizes is None:
            return template(min(size))  # any place where a crop can be cut
        m = row % len(self.points)
        height, width = self.sizes[m].tolist()
        return rescale_landmarks(self.points[m], (height, width), size)


def read_references(
    recogniser: Recogniser, detector: Detector, pictures: Sequence[Tensor], average: bool
) -> FaceReferences:
    """Reads the largest face of each reference picture [3, h, w] in [0, 1], of any size, on the recogniser's device.

    average: all show one person, whose embedding is the mean; pictures without a face are then left out. Else each is
    a reference of its own. Raises NoFaceError where no face is left.
    """
    faces = [largest(detector(picture[None])[0]) for picture in pictures]
    without = [i for i, face in enumerate(faces) if face is None]
    if len(without) == len(faces) or (without and not average):
        which = "the reference" if len(faces) == 1 else f"reference picture {without[0] + 1} of {len(faces)}"
        raise NoFaceError(
            f"No face was found in {which}: use a picture that shows one clearly, with some room around the head."
        )
    if without:
        logging.warning(
            "[LCM-Lookahead] no face was found in %d of %d reference pictures, which are left out.",
            len(without),
            len(faces),
        )
    shown = [(picture, face) for picture, face in zip(pictures, faces, strict=True) if face is not None]
    with torch.no_grad():
        embeddings = torch.cat([embed(recogniser, picture[None], face.points[None]) for picture, face in shown]).cpu()
    points = torch.stack([face.points for _, face in shown])
    sizes = torch.tensor([picture.shape[-2:] for picture, _ in shown])
    kept = tuple(picture.cpu() for picture, _ in shown)  # large photos would fill a GPU
    if average:
        mean = F.normalize(embeddings.mean(0, keepdim=True), dim=-1)
        return FaceReferences(mean, points[:1], sizes[:1], kept[:1])
    return FaceReferences(embeddings, points, sizes, kept)


def put_in_place(references: FaceReferences, row: int, to: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """A row's reference with its face where landmarks `to` [5, 2] are: [3, H, W] in [0, 1] of the height, width and
    device of pictures `like`, and where its head is, [1, H, W] in [0, 1]."""
    assert references.points is not None  # who has pictures knows where the faces are in them
    m, size = row % len(references.points), (like.shape[-2], like.shape[-1])
    goal, covered = moved_onto(references.pictures[m].to(like.device), references.points[m], to, size)
    return goal.to(like), (head_around(to, size).to(covered) * covered).to(like)


@dataclass(eq=False)
class Memory:
    """One run remembers here where the faces of its previews were."""

    places: dict[int, Tensor] = field(default_factory=dict)  # the last landmarks [5, 2] by number of the image
    size: tuple[int, int] | None = None  # height and width of the previews that they are in
    warned: bool = False  # that some have no face

    def copy(self) -> Memory:
        """Copies what is remembered, so that each changes by itself."""
        return replace(self, places=dict(self.places))


@dataclass(frozen=True, eq=False)
class IdentityLoss:
    """1 - cosine of the face embeddings of preview and reference, from 0 (the same) to 2; 1 is unlike.

    The preview's face is found without gradient (of several, the nearest to where it was last, at first the largest),
    cut out by a similarity without reflection, and recognised; the gradient goes through recogniser and cut to the
    pixels. Whoever calls has the recogniser, a module, on the previews' device. Only a loss of one run (`bind_rng`)
    remembers, in its `memory`, where a face was last, and warns once where previews show no face (training counts).

    views: the value is the mean over so many random views of the face (`FaceViews`), which a pattern that pleases the
    recogniser in one crop seldom outlives; drawn from the run's generator, so without `bind_rng` the plain crop counts.
    """

    recogniser: Recogniser
    detector: Detector
    references: FaceReferences
    fallback: str = REFERENCE
    memory: Memory | None = None
    views: FaceViews | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.fallback not in FALLBACKS:
            raise ValueError(f"The fallback is {self.fallback!r}: use one of {', '.join(FALLBACKS)}.")

    @property
    def draws(self) -> bool:
        """Says whether it draws views of faces."""
        return self.views is not None and self.views.count > 0

    def bind_rng(self, generator: torch.Generator | None = None) -> IdentityLoss:
        """Gives the loss a memory for one run; its views are drawn from the generator."""
        return replace(self, memory=Memory(), generator=generator)

    def rebind_rng(self, generator: torch.Generator) -> IdentityLoss:
        """Gives this run's loss another generator, and a copy of what it remembers."""
        return replace(self, memory=None if self.memory is None else self.memory.copy(), generator=generator)

    def __call__(self, preview: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Computes `Loss`. A preview without a face (`fallback`) is not valid: its value is 0, without a gradient."""
        _, values, valid = self._compared(preview, rows)
        return values, valid

    def among(self, preview: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Computes `Loss` and how hard it is to tell whose of all references a preview [n, 3, h, w] is: values, valid
        and InfoNCE [n], -log of the share that the own reference has of exp(cosine / TEMPERATURE) over all of them, 0
        where it alone counts and log(m) where all are alike (WithAnyone, arXiv 2510.14975)."""
        seen, values, valid = self._compared(preview, rows)
        everyone = self.references.embeddings.to(seen)
        index = torch.arange(len(seen), device=seen.device) if rows is None else rows.to(seen.device)
        contrast = F.cross_entropy(seen @ everyone.T / TEMPERATURE, index % len(everyone), reduction="none")
        return values, valid, torch.where(valid, contrast, 0.0)

    def _compared(self, preview: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Whom previews show, unit vectors [n, d], and `Loss`."""
        pictures = (clamp_preview(preview.to(torch.promote_types(preview.dtype, torch.float32))) + 1) / 2
        memory = self.memory or Memory()
        rows = torch.arange(len(pictures)) if rows is None else rows.cpu()
        points, valid = self._find(pictures.detach(), rows.tolist(), memory)
        if self.memory and not self.memory.warned and not valid.all():
            self.memory.warned = True
            logging.warning(
                "[LCM-Lookahead] no face was found in %d of %d previews, which do not count for the identity loss.",
                int((~valid).sum()),
                len(valid),
            )
        seen = see(self.recogniser, pictures, points, self.views, self.generator)
        values = 1 - (seen * select_references(self.references.embeddings, seen, rows)).sum(-1)
        valid = valid.to(values.device)
        return seen, torch.where(valid, values, 0.0), valid

    @property
    def shows(self) -> bool:
        """Says whether it has pictures of its references."""
        return bool(self.references.pictures)

    @torch.no_grad()
    def shown(self, preview: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The references in the place of the faces of previews: see `base.Showing`."""
        pictures = (clamp_preview(preview.float()) + 1) / 2
        rows = torch.arange(len(pictures)) if rows is None else rows.cpu()
        points, valid = self._find(pictures, rows.tolist(), self.memory or Memory())
        seen = [put_in_place(self.references, row, to, pictures) for row, to in zip(rows.tolist(), points, strict=True)]
        goals, heads = (torch.stack(parts) for parts in zip(*seen, strict=True))
        return goals * 2 - 1, heads * valid.to(heads).reshape(-1, 1, 1, 1)

    def _find(self, pictures: Tensor, rows: list[int], memory: Memory) -> tuple[Tensor, Tensor]:
        """Finds landmarks [n, 5, 2] and whether they are valid [n], on the CPU; a crop can be cut by any of them."""
        height, width = pictures.shape[-2:]
        size, references = (height, width), self.references
        if memory.size != size:
            memory.size, memory.places = size, {}
        points, valid = [], []
        for row, faces in zip(rows, self.detector(pictures), strict=True):
            faces = [face for face in faces if bool(usable(face.points[None]))]
            last = memory.places.get(row)
            if faces:
                last = (max(faces, key=area) if last is None else nearest(faces, last)).points
                memory.places[row] = last
            placed = self.fallback == REFERENCE and references.points is not None
            valid.append(bool(faces) or placed or (self.fallback != NONE and last is not None))
            points.append(references.place(row, size) if last is None else last)
        return torch.stack(points), torch.tensor(valid)
