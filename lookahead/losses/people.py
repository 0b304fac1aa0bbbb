"""The identity loss for several people in one picture: which face is whose is found by one assignment over all faces
(as the matching reward of UMO does, arXiv 2509.06818), then each face is compared with its own person alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..vision.arcface import Recogniser
from ..vision.faces import Detector, Face, area, rescale_landmarks, usable
from .base import UNLIKE, clamp_preview
from .face_views import FaceViews
from .identity import FaceReferences, embed, put_in_place, see

# Which face is whose, at first: by total likeness, or the people from left to right.
LIKENESS, ORDER = "likeness", "order"
MATCHINGS = (LIKENESS, ORDER)

INSIDE = 0.5  # the least value of a person's mask at the centre of a face that may be theirs
# How far a face may have moved since the last preview, in its landmarks' mean distance from their middle: about its
# width. What lies further off is another face.
FURTHEST = 3.0
_NEVER = -1e6  # in the place of a score, far below any sum of real ones


def assign(scores: Tensor, allowed: Tensor) -> list[tuple[int, int]]:
    """Pairs (row, column) of the one assignment with the largest total score, as many as are allowed.

    scores: float [rows, columns], finite; allowed: bool, of its shape. Each row and column is in one pair at most.
    """
    rows, columns = linear_sum_assignment(torch.where(allowed, scores.double(), _NEVER).numpy(), maximize=True)
    return [(r, c) for r, c in zip(rows.tolist(), columns.tolist(), strict=True) if allowed[r, c]]


@dataclass(eq=False)
class Assignments:
    """One run remembers here which face is whose: the landmarks [5, 2] by number of the image, then of the person."""

    places: dict[int, dict[int, Tensor]] = field(default_factory=dict)
    size: tuple[int, int] | None = None  # height and width of the previews that they are in
    warned: bool = False  # that someone has no face

    def copy(self) -> Assignments:
        """Copies what is remembered, so that each changes by itself."""
        return replace(self, places={row: dict(of_row) for row, of_row in self.places.items()})

    def resize(self, size: tuple[int, int]) -> None:
        """The places in previews of another size."""
        if self.size and self.size != size:
            seen = self.size
            self.places = {
                row: {person: rescale_landmarks(points, seen, size) for person, points in of_row.items()}
                for row, of_row in self.places.items()
            }
        self.size = size


@dataclass(frozen=True, eq=False)
class PeopleLoss:
    """The mean over all people of 1 - cosine between a person and the face in the preview that is theirs.

    people: the p references of each person, of which a preview has that of its row, as in `IdentityLoss`. matching:
    which face is whose at first, LIKENESS (the assignment with the largest sum of cosines) or ORDER (the largest p
    faces from left to right are the people in their order). masks: for each person [m, h, w] in [0, 1], stretched over
    the preview, where the centre of their face may lie, or None for anywhere; row r has mask r modulo m.

    The assignment is computed without gradient; it picks the faces that the gradient goes through. A loss of one run
    (`bind_rng`) holds it for each image: a face stays whose it is, and is followed from preview to preview by its
    place. Matched anew each time, faces that are like nobody yet would change hands by the chance in the previews
    (`schedule.lora_scale`): the momentum of one person would move the other's face, and the best iterate would be
    chosen among values of different people. A person whose face is lost has it where it was last; one who never had a
    face counts as `UNLIKE` without a gradient, since a picture must not gain by losing somebody, and that is logged
    once a run. Faces beyond the people are left alone. views: as in `IdentityLoss`.
    """

    recogniser: Recogniser
    detector: Detector
    people: tuple[FaceReferences, ...]
    matching: str = LIKENESS
    masks: tuple[Tensor | None, ...] = ()
    memory: Assignments | None = None
    views: FaceViews | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not self.people:
            raise ValueError("There is nobody to compare with: give one person at least.")
        if self.matching not in MATCHINGS:
            raise ValueError(f"The matching is {self.matching!r}: use one of {', '.join(MATCHINGS)}.")
        if len(self.masks) not in (0, len(self.people)):
            raise ValueError(
                f"There are {len(self.people)} people and {len(self.masks)} masks: give a mask or None for each, or no "
                "masks at all."
            )

    @property
    def draws(self) -> bool:
        """Says whether it draws views of faces."""
        return self.views is not None and self.views.count > 0

    def bind_rng(self, generator: torch.Generator | None = None) -> PeopleLoss:
        """Gives the loss a memory for one run; its views are drawn from the generator."""
        return replace(self, memory=Assignments(), generator=generator)

    def rebind_rng(self, generator: torch.Generator) -> PeopleLoss:
        """Gives this run's loss another generator, and a copy of what it remembers."""
        return replace(self, memory=None if self.memory is None else self.memory.copy(), generator=generator)

    def __call__(self, preview: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Computes `Loss`. A preview in which nobody has a face is not valid: its value is 0, without a gradient."""
        pictures = (clamp_preview(preview.to(torch.promote_types(preview.dtype, torch.float32))) + 1) / 2
        memory = self.memory or Assignments()
        memory.resize((pictures.shape[-2], pictures.shape[-1]))
        images = list(range(len(pictures))) if rows is None else rows.tolist()
        whose = [
            self._whose(picture, faces, row, memory)
            for picture, faces, row in zip(pictures.detach(), self.detector(pictures.detach()), images, strict=True)
        ]
        self._warn(whose)
        values = torch.full((len(pictures), len(self.people)), UNLIKE, dtype=pictures.dtype, device=pictures.device)
        found = [(n, person, points) for n, places in enumerate(whose) for person, points in places.items()]
        if found:
            numbers, people, points = zip(*found, strict=True)
            pairs = torch.tensor([numbers, people], device=pictures.device)
            faces = see(self.recogniser, pictures[pairs[0]], torch.stack(points), self.views, self.generator)
            own = torch.stack([self._embedding(person, images[n]) for n, person, _ in found])
            values = values.index_put((pairs[0], pairs[1]), 1 - (faces * own.to(faces)).sum(-1))
        valid = torch.tensor([bool(places) for places in whose], device=pictures.device)
        return torch.where(valid, values.mean(1), 0.0), valid

    @property
    def shows(self) -> bool:
        """Says whether it has pictures of everybody."""
        return all(person.pictures for person in self.people)

    @torch.no_grad()
    def shown(self, preview: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The references of all people in the places of their faces in previews: see `base.Showing`."""
        pictures = (clamp_preview(preview.float()) + 1) / 2
        memory = self.memory or Assignments()
        memory.resize((pictures.shape[-2], pictures.shape[-1]))
        goals, heads = pictures.clone(), torch.zeros_like(pictures[:, :1])
        numbers = range(len(pictures)) if rows is None else rows.tolist()
        for n, (row, faces) in enumerate(zip(numbers, self.detector(pictures), strict=True)):
            for person, points in self._whose(pictures[n], faces, row, memory).items():
                goal, head = put_in_place(self.people[person], row, points, pictures)
                goals[n], heads[n] = torch.lerp(goals[n], goal, head), torch.maximum(heads[n], head)
        return goals * 2 - 1, heads

    def _embedding(self, person: int, row: int) -> Tensor:
        references = self.people[person].embeddings
        return references[row % len(references)]

    def _whose(self, picture: Tensor, faces: Sequence[Face], row: int, memory: Assignments) -> dict[int, Tensor]:
        """Landmarks [5, 2] on the CPU by person, of those who have a face in this picture [3, h, w]; remembers them."""
        faces = [face for face in faces if bool(usable(face.points[None]))]
        allowed = self._allowed(faces, row, picture.shape[-2:])
        held = memory.places.setdefault(row, {})
        if faces and held:
            scores, near = self._nearness(faces, held)
            for f, person in assign(scores, allowed & near):
                held[person] = faces[f].points
                allowed[f] = False
            allowed[:, list(held)] = False
        if allowed.any():  # faces that are nobody's, for who has none
            by_order = self.matching == ORDER
            pairs = in_order(faces, allowed) if by_order else assign(self._likeness(picture, faces, row), allowed)
            held |= {person: faces[f].points for f, person in pairs}
        return dict(sorted(held.items()))

    def _allowed(self, faces: Sequence[Face], row: int, size: torch.Size) -> Tensor:
        """Whose the faces may be by the masks: bool [faces, people]."""
        allowed = torch.ones(len(faces), len(self.people), dtype=torch.bool)
        for person, mask in enumerate(self.masks):
            if mask is not None:
                for f, face in enumerate(faces):
                    allowed[f, person] = inside(mask[row % len(mask)], face.points, size)
        return allowed

    def _nearness(self, faces: Sequence[Face], held: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
        """How near the faces are to where people were last, and whether they can be the same: [faces, people]."""
        points = torch.stack([face.points for face in faces])
        scores = torch.zeros(len(faces), len(self.people))
        near = torch.zeros(scores.shape, dtype=torch.bool)
        for person, last in held.items():
            distance = (points - last).norm(dim=-1).mean(1)
            scores[:, person] = -distance
            near[:, person] = distance < FURTHEST * (last - last.mean(0)).norm(dim=-1).mean()
        return scores, near

    @torch.no_grad()
    def _likeness(self, picture: Tensor, faces: Sequence[Face], row: int) -> Tensor:
        """Cosines between all faces and all people: [faces, people], on the CPU."""
        points = torch.stack([face.points for face in faces])
        seen = embed(self.recogniser, picture.expand(len(faces), -1, -1, -1), points).cpu()
        return seen @ torch.stack([self._embedding(p, row) for p in range(len(self.people))]).to(seen).T

    def _warn(self, whose: Sequence[dict[int, Tensor]]) -> None:
        lacking = [places for places in whose if len(places) < len(self.people)]
        if self.memory and not self.memory.warned and lacking:
            self.memory.warned = True
            logging.warning(
                "[LCM-Lookahead] in %d of %d previews fewer faces than %d people were found: who has none is not "
                "steered there. Say in the prompt how many people there are, or guide a little later.",
                len(lacking),
                len(whose),
                len(self.people),
            )


def in_order(faces: Sequence[Face], allowed: Tensor) -> list[tuple[int, int]]:
    """Pairs (face, person) without matching: those who lack a face get the largest ones that are left, from left to
    right. allowed: bool [faces, people]."""
    people = torch.nonzero(allowed.any(0)).flatten().tolist()
    free = torch.nonzero(allowed.any(1)).flatten().tolist()
    largest = sorted(free, key=lambda f: area(faces[f]), reverse=True)[: len(people)]
    pairs = zip(sorted(largest, key=lambda f: float(faces[f].points[:, 0].mean())), people, strict=False)
    return [(f, person) for f, person in pairs if allowed[f, person]]


def inside(mask: Tensor, points: Tensor, size: Sequence[int]) -> bool:
    """Tells whether the middle of landmarks [5, 2] lies in a mask [h, w] that is stretched over their picture.

    size: height and width of the picture.
    """
    (x, y), (height, width) = points.mean(0).tolist(), size
    place = (y + 0.5) / height * mask.shape[0], (x + 0.5) / width * mask.shape[1]
    row, column = (min(max(int(at), 0), side - 1) for at, side in zip(place, mask.shape, strict=True))
    return bool(mask[row, column] >= INSIDE)
