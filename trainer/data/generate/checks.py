"""What is seen in drawn pictures, and which of them are kept: faces, identity, copies, style, size, sharpness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ....lookahead.losses.identity import embed, largest
from ....lookahead.vision.arcface import Recogniser
from ....lookahead.vision.faces import Detector, Face, usable
from .config import Checks
from .prompts import PicturePlan

Scorer = Callable[[Tensor, Sequence[str]], Tensor]  # pictures [n, 3, h, w] in [0, 1], styles -> probability of each [n]
_SMALL = 16  # side of the grey picture that copies are told by
_COPY = 0.006  # mean difference of grey values below which a picture is a copy

# Why a picture or a person is left out, in the order in which it is asked.
NO_FACE, SEVERAL, SMALL_FACE, NOT_SHARP = "no face", "several faces", "face too small", "not sharp"
OTHER_STYLE, COPY, UNLIKE = "asked style not shown", "copy of another picture", "unlike the person's others"
NO_PLAIN, TOO_FEW, LIKE_ANOTHER = (
    "person without a plain picture",
    "person with too few pictures",
    "like another person",
)


@dataclass(frozen=True, eq=False)
class Looked:
    """What is seen in one picture. None where it was not looked for, or there is no face."""

    faces: int | None = None
    face: Face | None = None
    embedding: Tensor | None = None  # float32 [d], of unit length
    face_size: float | None = None  # height of the face as a share of the picture's
    sharpness: float = 0.0  # mean absolute difference of neighbouring values, in [0, 1]
    style: float | None = None  # probability of the asked style
    small: Tensor | None = None  # float32 [16, 16], grey
    similarity: float | None = None  # mean cosine to the person's other pictures, of those that were compared


@dataclass(frozen=True, eq=False)
class Inspector:
    """Looks at pictures. scorer: tells styles. digest: of the weights of all three."""

    detector: Detector | None
    recogniser: Recogniser | None
    scorer: Scorer | None
    about: dict[str, dict[str, str]]  # name and licence of detector and recogniser, for the samples
    digest: str

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Tensor], plans: Sequence[PicturePlan]) -> list[Looked]:
        """Of pictures uint8 [3, h, w]; each is looked at alone, so what is seen does not depend on the others."""
        return [self._look(picture[None] / 255, plan.style) for picture, plan in zip(pictures, plans, strict=True)]

    def _look(self, picture: Tensor, style: str) -> Looked:
        grey = F.interpolate(picture.mean(1, keepdim=True), (_SMALL, _SMALL), mode="bilinear", antialias=True)[0, 0]
        looked = Looked(sharpness=sharpness(picture), small=grey)
        if self.scorer is not None:
            score = float(self.scorer(picture, [style])[0])
            looked = replace(looked, style=None if score != score else score)
        if self.detector is None:
            return looked
        faces = [face for face in self.detector(picture)[0] if bool(usable(face.points[None]))]
        face = largest(faces)
        if face is None:
            return replace(looked, faces=0)
        height = float(face.box[3] - face.box[1]) / picture.shape[-2]
        person = None if self.recogniser is None else embed(self.recogniser, picture, face.points[None])[0].cpu()
        return replace(looked, faces=len(faces), face=face, face_size=height, embedding=person)


def sharpness(picture: Tensor) -> float:
    """Of [1, 3, h, w] in [0, 1]."""
    rows, columns = picture[..., 1:, :] - picture[..., :-1, :], picture[..., 1:] - picture[..., :-1]
    return float((rows.abs().mean() + columns.abs().mean()) / 2)


def own_fault(checks: Checks, looked: Looked) -> str | None:
    """Why a picture is left out whatever the person's others are, None where it is not."""
    if looked.faces is not None:  # faces were looked for
        if looked.face is None:
            return NO_FACE
        if checks.one_face and looked.faces > 1:
            return SEVERAL
        if checks.face_size is not None and looked.face_size < checks.face_size:
            return SMALL_FACE
    if checks.sharpness is not None and looked.sharpness < checks.sharpness:
        return NOT_SHARP
    if checks.style is not None and looked.style is not None and looked.style < checks.style:
        return OTHER_STYLE
    return None


def choose(
    checks: Checks, plans: Sequence[PicturePlan], looked: Sequence[Looked]
) -> tuple[list[Looked], list[str | None]]:
    """Of the pictures of one person: what is seen, with the similarities, and why each is left out (None: it is kept).

    Of the pictures that are unlike the others the worst is taken out and the rest compared again, until all are alike.
    A person of whom too little is left is left out with all pictures.
    """
    faults = [own_fault(checks, each) for each in looked]
    out = list(looked)
    for n, each in enumerate(looked):
        earlier = (looked[m].small for m in range(n) if faults[m] is None)
        if faults[n] is None and any(float((each.small - small).abs().mean()) < _COPY for small in earlier):
            faults[n] = COPY
    left = [n for n, fault in enumerate(faults) if fault is None and looked[n].embedding is not None]
    while len(left) > 1:
        people = torch.stack([looked[n].embedding for n in left])
        alike = ((people @ people.T).sum(1) - 1) / (len(left) - 1)
        for n, similarity in zip(left, alike.tolist(), strict=True):
            out[n] = replace(out[n], similarity=similarity)
        worst = int(alike.argmin())
        if checks.similarity is None or alike[worst] >= checks.similarity:
            break
        faults[left.pop(worst)] = UNLIKE
    kept = [n for n, fault in enumerate(faults) if fault is None]
    why = TOO_FEW if len(kept) < checks.pictures else None
    why = NO_PLAIN if not any(plans[n].plain for n in kept) else why
    return out, [fault or why for fault in faults]


def mean_person(looked: Sequence[Looked]) -> Tensor | None:
    """The mean of the pictures' embeddings, of unit length; None where nobody was recognised."""
    people = [each.embedding for each in looked if each.embedding is not None]
    return F.normalize(torch.stack(people).mean(0), dim=0) if people else None
