"""What is measured in generated pictures, and which of them are kept: faces, identity, copies, style, sharpness."""

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

ScoreStyles = Callable[[Tensor, Sequence[str]], Tensor]  # pictures [n, 3, h, w] in [0, 1], styles -> probabilities [n]
_THUMBNAIL = (16, 16)  # of the grey copy by which copies are told
_COPY = 0.006  # mean difference of thumbnails below which a picture is a copy of another

# Why a picture is rejected, in the order in which it is asked.
NO_FACE = "no face"
SEVERAL_FACES = "several faces"
SMALL_FACE = "small face"
BLURRED = "not sharp"
OTHER_STYLE = "asked style not shown"
COPY = "copy of another picture of the person"
UNLIKE = "unlike the person's other pictures"
# Why a person is rejected with all pictures.
NO_PLAIN = "person without a plain picture"
TOO_FEW = "person with too few pictures"
DUPLICATE = "person like an earlier one"


@dataclass(frozen=True, eq=False)
class Measurements:
    """Holds what is known of one picture: None where nothing measures it, or there is no face to measure.

    similarity: mean cosine to the person's other pictures, of those that were left when they were last compared.
    """

    sharpness: float  # mean absolute difference of neighbouring pixels in [0, 1]
    thumbnail: Tensor  # float32 [16, 16], grey
    face_count: int | None = None
    face: Face | None = None  # the largest
    face_size: float | None = None  # height of its box as a share of the picture's
    embedding: Tensor | None = None  # float32 [d], of unit length
    style: float | None = None  # probability of the asked style
    similarity: float | None = None


@dataclass(frozen=True, eq=False)
class Inspector:
    """Measures pictures. about: names and licences of detector and recogniser; digest: of all weights."""

    detector: Detector | None
    recogniser: Recogniser | None
    scorer: ScoreStyles | None
    about: dict[str, dict[str, str]]
    digest: str

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Tensor], plans: Sequence[PicturePlan]) -> list[Measurements]:
        """Of pictures uint8 [3, h, w]; each is measured alone, so that it does not depend on its batch."""
        return [self._measure(picture[None] / 255, plan.style) for picture, plan in zip(pictures, plans, strict=True)]

    def _measure(self, picture: Tensor, style: str) -> Measurements:
        grey = F.interpolate(picture.mean(1, keepdim=True), _THUMBNAIL, mode="bilinear", antialias=True)[0, 0]
        measured = Measurements(sharpness(picture), grey)
        if self.scorer is not None:
            measured = replace(measured, style=float(self.scorer(picture, [style])[0]))
        if self.detector is None:
            return measured
        faces = [face for face in self.detector(picture)[0] if bool(usable(face.points[None]))]
        measured = replace(measured, face_count=len(faces))
        face = largest(faces)
        if face is None:
            return measured
        height = float(face.box[3] - face.box[1]) / picture.shape[-2]
        embedding = None
        if self.recogniser is not None:
            embedding = embed(self.recogniser, picture.to(_device(self.recogniser)), face.points[None])[0].cpu()
        return replace(measured, face=face, face_size=height, embedding=embedding)


def sharpness(picture: Tensor) -> float:
    """Mean absolute difference of neighbouring pixels of [1, 3, h, w]."""
    rows, columns = picture[..., 1:, :] - picture[..., :-1, :], picture[..., 1:] - picture[..., :-1]
    return float((rows.abs().mean() + columns.abs().mean()) / 2)


def rejection_of(checks: Checks, measured: Measurements) -> str | None:
    """Why a picture is rejected whatever the person's others are; None where it is not."""
    if measured.face_count is not None:  # faces were looked for
        if measured.face is None:
            return NO_FACE
        if checks.one_face and measured.face_count > 1:
            return SEVERAL_FACES
        size = measured.face_size
        if checks.face_size is not None and size is not None and size < checks.face_size:
            return SMALL_FACE
    if checks.sharpness is not None and measured.sharpness < checks.sharpness:
        return BLURRED
    if checks.style is not None and measured.style is not None and measured.style < checks.style:
        return OTHER_STYLE
    return None


def select(
    checks: Checks, plans: Sequence[PicturePlan], measured: Sequence[Measurements]
) -> tuple[list[Measurements], list[str | None]]:
    """Completes one person's measurements with similarities, and says why each picture is rejected (None: kept).

    Of pictures that are unlike the others the worst is rejected and the rest compared again, until all are alike. With
    too little left the person is rejected with all pictures.
    """
    out, rejected = list(measured), [rejection_of(checks, each) for each in measured]
    for n, each in enumerate(measured):
        earlier = (measured[m].thumbnail for m in range(n) if rejected[m] is None)
        if rejected[n] is None and any(float((each.thumbnail - other).abs().mean()) < _COPY for other in earlier):
            rejected[n] = COPY
    known = {n: m.embedding for n, m in enumerate(measured) if rejected[n] is None and m.embedding is not None}
    left = list(known)
    while len(left) > 1:
        embeddings = torch.stack([known[n] for n in left])
        similarity = ((embeddings @ embeddings.T).sum(1) - 1) / (len(left) - 1)
        for n, value in zip(left, similarity.tolist(), strict=True):
            out[n] = replace(out[n], similarity=value)
        worst = int(similarity.argmin())
        if checks.similarity is None or similarity[worst] >= checks.similarity:
            break
        rejected[left.pop(worst)] = UNLIKE
    kept = [n for n, why in enumerate(rejected) if why is None]
    person = TOO_FEW if len(kept) < checks.pictures else None
    if not any(plans[n].plain for n in kept):
        person = NO_PLAIN
    return out, [why or person for why in rejected]


def mean_embedding(measured: Sequence[Measurements]) -> Tensor | None:
    """The mean of the pictures' embeddings, of unit length; None where there is none."""
    embeddings = [each.embedding for each in measured if each.embedding is not None]
    return F.normalize(torch.stack(embeddings).mean(0), dim=0) if embeddings else None


def _device(recogniser: Recogniser) -> torch.device:
    return next(iter(recogniser.state_dict().values())).device
