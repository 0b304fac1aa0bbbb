"""Whose face pictures show, and whose a reference says it is."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...lookahead.losses.identity import FaceReferences
from ...lookahead.vision.arcface import Recogniser
from ...lookahead.vision.face_models import FaceModels
from ...lookahead.vision.faces import Face, area
from .subject import Reference


def largest_faces(face_analysis: FaceModels, pictures: Tensor) -> tuple[list[Face], Tensor]:
    """The largest face of each picture [n, 3, h, w] in [0, 1], and their embeddings [n, d].

    Raises ValueError, one sentence, for a picture without one.
    """
    found = face_analysis.embed(pictures)
    for number, faces in enumerate(found, 1):
        if not faces:
            which = "the picture" if len(found) == 1 else f"picture {number} of {len(found)}"
            raise ValueError(f"No face was found in {which}: use one in which it is larger and seen from the front.")
    largest = [max(faces, key=lambda one: area(one[0])) for faces in found]
    return [face for face, _ in largest], torch.stack([embedding for _, embedding in largest])


def known_people(reference: Reference, recogniser: Recogniser, device: torch.device, average: bool) -> FaceReferences:
    """The people whom a reference names by their face embeddings, without a picture of them.

    device: where the recogniser is; average: all are one person, whose embedding is the mean by the subjects' weights;
    else each is one of its own.
    Subjects that are subtracted do not count. Raises ValueError, one sentence, where an embedding is missing or of
    another recogniser.
    """
    subjects = [subject for subject in reference.subjects if subject.weight > 0]
    if not subjects or any(subject.face is None for subject in subjects):
        raise ValueError(
            "The reference does not say whose face it is: connect face_analysis at Encode Lookahead Reference (and "
            "save the reference again), or connect a picture here."
        )
    others = sorted({subject.recogniser for subject in subjects} - {recogniser.name})
    if others:
        raise ValueError(
            f"The reference's face was read by the recogniser {others[0] or 'without a name'}, and {recogniser.name} "
            "compares here: choose that recogniser or its face pack, or connect a picture."
        )
    rows = torch.cat([subject.face.float().cpu() for subject in subjects])
    with torch.no_grad():
        width = recogniser(torch.zeros(1, 3, recogniser.size, recogniser.size, device=device)).shape[-1]
    if rows.shape[-1] != width:
        raise ValueError(
            f"The reference's face has {rows.shape[-1]} numbers, and {recogniser.name} gives {width}: it is of another "
            "recogniser of that name, so encode the pictures again."
        )
    if not average:
        return FaceReferences(F.normalize(rows, dim=-1))
    shares = torch.cat([torch.full((len(subject.face), 1), subject.weight / len(subject.face)) for subject in subjects])
    return FaceReferences(F.normalize((rows * shares).sum(0, keepdim=True), dim=-1))
