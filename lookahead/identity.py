"""The identity loss: is the person in a preview the one of the reference? (Section 4.2 of the paper, L_ID.)"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from .faces import Detector, Face, align, area, elsewhere, nearest, samples_for, usable
from .recognisers import Recogniser

# Where the face of a preview is taken to be when the detector finds none in it.
REFERENCE, LAST, NONE = "reference", "last", "none"
FALLBACKS = (REFERENCE, LAST, NONE)


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


class Landmarks:
    """Where the face is in each picture of a batch, from call to call; remembers where it was last.

    Anew by the detector; where it finds none, the last place in this picture, else the reference's, as `fallback`
    allows. Of several faces it is that nearest to the last place, at first the largest. What is remembered belongs to a
    position in the batch: `forget` it before another run, and it is forgotten when batch or size change.
    """

    def __init__(self, detector: Detector, fallback: str):
        if fallback not in FALLBACKS:
            raise ValueError(f"The fallback is {fallback!r}, and known are {', '.join(FALLBACKS)}.")
        self.detector, self.fallback = detector, fallback
        self.forget()

    def forget(self) -> None:
        """Begin a run."""
        self._shape: tuple[int, ...] = ()
        self._last: list[Tensor | None] = []

    def __call__(self, pictures: Tensor, reference: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures [n, 3, h, w] in [0, 1] -> landmarks [n, 5, 2] and bool [n], whether they are any; both on the CPU.

        reference: [n, 5, 2], landmarks in each picture's reference, whose (height, width) are size [n, 2].
        Where there is no face, the landmarks are the reference's all the same: usable, and not to be counted.
        """
        if self._shape != pictures.shape:
            self._shape, self._last = tuple(pictures.shape), [None] * len(pictures)
        points, there = [], []
        for i, faces in enumerate(self.detector(pictures.detach())):
            faces, last = [face for face in faces if bool(usable(face.points[None]))], self._last[i]
            borrowed = elsewhere(reference[i], tuple(size[i].tolist()), tuple(pictures.shape[-2:]))
            if faces:
                face = largest(faces) if last is None else nearest(faces, last)
                self._last[i] = face.points
            known = self._last[i] if faces or self.fallback != NONE else None
            there.append(known is not None or self.fallback == REFERENCE)
            points.append(borrowed if known is None else known)
        return torch.stack(points), torch.tensor(there)


class IdentityLoss:
    """1 - cosine of the preview's embedding and its reference's: 0 (the same) to 2.

    The preview's face is found without gradient, cut out by a similarity without reflection, and recognised; the
    gradient goes through crop and recogniser to the preview's pixels. `recogniser` is a module: whoever calls has it on
    the previews' device.
    """

    unit = "1 - cosine of face embeddings"

    def __init__(
        self,
        recogniser: Recogniser,
        detector: Detector,
        pictures: Sequence[Tensor],
        together: bool = True,
        fallback: str = REFERENCE,
    ):
        """pictures: references [3, h, w] in [0, 1], on the recogniser's device, of any sizes. together: they all show
        one person, whose embedding is their mean; else each is a reference of its own (see `rows` of the call).

        Raises NoFaceError where a reference has no face; of several pictures of one person, some may have none.
        """
        self.recogniser, self.landmarks = recogniser, Landmarks(detector, fallback)
        faces = [largest(detector(picture[None])[0]) for picture in pictures]
        without = [i for i, face in enumerate(faces) if face is None]
        if len(without) == len(faces) or (without and not together):
            which = "the reference" if len(faces) == 1 else f"picture {without[0]} (of 0 to {len(faces) - 1})"
            raise NoFaceError(
                f"No face was found in {which}: use a picture that shows one clearly, with some room around the head."
            )
        if without:
            logging.warning(
                "[LCM-Lookahead] no face was found in %d of %d reference pictures, which are left out.",
                len(without),
                len(faces),
            )
        seen = [(picture, face) for picture, face in zip(pictures, faces, strict=True) if face is not None]
        with torch.no_grad():
            embeddings = torch.cat([embed(recogniser, picture[None], face.points[None]) for picture, face in seen])
        points = torch.stack([face.points for _, face in seen])
        size = torch.tensor([picture.shape[-2:] for picture, _ in seen])
        if together:
            embeddings = torch.nn.functional.normalize(embeddings.mean(0, keepdim=True), dim=-1)
            points, size = points[:1], size[:1]
        self.references = embeddings  # [references, d]
        self._points, self._size = points, size
        self._told = False

    def begin(self) -> None:
        """Forget the run before: where its faces were, and that missing ones were spoken of."""
        self.landmarks.forget()
        self._told = False

    def __call__(self, preview: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Preview [n, 3, h, w] in [-1, 1] -> values [n] (`unit`, lower is better) and bool [n], which of them count.

        rows: int64 [n], which reference each preview belongs to; without it the first goes to the first, and so on in
        turn. A value that does not count is 0 and has no gradient.
        """
        count = len(self.references)
        rows = torch.arange(len(preview)) % count if rows is None else rows.cpu()
        pictures = (preview.to(torch.promote_types(preview.dtype, torch.float32)) + 1) / 2
        points, there = self.landmarks(pictures, self._points[rows], self._size[rows])
        if not there.all() and not self._told:
            self._told = True
            logging.warning(
                "[LCM-Lookahead] no face was found in %d of %d previews, which do not count for the identity loss.",
                int((~there).sum()),
                len(there),
            )
        found = embed(self.recogniser, pictures, points)
        values = 1 - (found * self.references.to(found)[rows.to(found.device)]).sum(-1)
        counts = there.to(values.device)
        return torch.where(counts, values, 0.0), counts
