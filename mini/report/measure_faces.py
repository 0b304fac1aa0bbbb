"""What insightface finds with the mini face models, on held-out people.

Everything goes through insightface's own FaceAnalysis: it detects, aligns by the landmarks that it found, and embeds.
Intervals are those of drawing people, or Wilson's for shares of pictures. Lengths are shares of the eye distance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from scipy.stats import spearmanr
from torch import Tensor

from ...evaluation.stats import Interval, auc, bootstrap, identity_auc, proportion, share
from ...lookahead.vision.face_models import find_and_embed
from ...lookahead.vision.faces import align
from ..plan import IMAGE_SIZE, Plan
from ..stages.detector import empty_pictures, paste
from ..stages.face_networks import FaceRecogniser, embed
from ..world import data
from ..world.faces import STYLES, boxes, landmarks

if TYPE_CHECKING:
    from insightface.app import FaceAnalysis

SIZES = (0.25, 0.4, 0.6, 0.9)  # heights of a face, as shares of the picture's
EMPTY = 800  # pictures without a person
RESIZED = 50  # people whose pictures are also shown at those sizes
ROUNDS = 100  # of the bootstrap over AUC and rank correlation
_EMPTY_SEED = 4000  # far from the seeds of training


class Found(NamedTuple):
    """It holds what was found in n pictures: the best face of each, zeros where there is none."""

    faces: Tensor  # int64 [n], how many
    score: Tensor  # [n]
    box: Tensor  # [n, 4] pixels, the centre of the first being 0
    points: Tensor  # [n, 5, 2], likewise
    embedding: Tensor  # [n, 128], unit length

    @property
    def there(self) -> Tensor:
        return self.faces > 0


def look(app: FaceAnalysis, pictures: Tensor) -> Found:
    """Run insightface over pictures [n, 3, h, w] in [0, 1]."""
    n = len(pictures)
    out = Found(torch.zeros(n).long(), torch.zeros(n), torch.zeros(n, 4), torch.zeros(n, 5, 2), torch.zeros(n, 128))
    for i, faces in enumerate(find_and_embed(app, pictures)):
        out.faces[i] = len(faces)
        if faces:
            best = faces[0]
            values = (best.det_score, best.bbox, best.kps, best.normed_embedding)
            for whole, value in zip(out[1:], values, strict=True):
                whole[i] = torch.as_tensor(value)
    return out


def landmark_error(found: Tensor, true: Tensor) -> Tensor:
    """Mean distance of five landmarks [n, 5, 2] from others, in shares of the others' eye distance: [n]."""
    return (found - true).norm(dim=-1).mean(1) / (true[:, 1] - true[:, 0]).norm(dim=-1)


def report(app: FaceAnalysis, recogniser: FaceRecogniser, held_out: data.Pictures, plan: Plan) -> dict[str, Interval]:
    """All figures on the held-out people, who are drawn anew for what is known about them."""
    people, per_person = len(held_out) // held_out.per_person, held_out.per_person
    faces = data.group_of_people("held_out", people, plan.styles)
    true = landmarks(faces, IMAGE_SIZE) - 0.5
    pictures = held_out.images(torch.arange(len(held_out)))
    found = look(app, pictures)
    style = held_out.labels["style"].view(people, per_person)
    error = torch.where(found.there, landmark_error(found.points, true), torch.nan).view(people, per_person)
    figures = {}
    for s in plan.styles:
        rows = style == STYLES.index(s)
        figures[f"detector recall, {s}"] = proportion(found.there[rows.flatten()])
        figures[f"detector landmark error, {s}"] = _mean(_a_person(error, rows))
    figures["detector recall"] = proportion(found.there)
    figures["detector landmark error"] = _mean(error)
    figures["detector: share of pictures with a second face"] = proportion(found.faces > 1)
    few = slice(RESIZED * per_person)
    box = boxes(faces, IMAGE_SIZE)
    for size in SIZES:
        there, wrong = _resized(app, pictures[few], box[few], true[few], size)
        figures[f"detector recall, face of {size:.0%} of the picture"] = proportion(there)
        figures[f"detector landmark error, face of {size:.0%} of the picture"] = _mean(wrong.view(-1, per_person))
    empty = empty_pictures(EMPTY, _EMPTY_SEED, plan.styles).float() / 255
    figures["detector: share of empty pictures with a face"] = proportion(look(app, empty).there)
    with torch.no_grad():
        parts = zip(pictures.split(100), true.split(100), strict=True)
        drawn = torch.cat([embed(recogniser, align(p, k)) for p, k in parts])
    alike = alike_people(held_out.labels["identity"].view(people, per_person, -1)[:, 0])
    for name, embedding in (("", found.embedding), (", drawn landmarks", drawn)):
        of_person = embedding.view(people, per_person, -1)
        for pairs, slots in _pairs(per_person).items():
            if slots:
                figures[f"face recogniser AUC, {pairs}{name}"] = identity_auc(_similarity(of_person, slots), ROUNDS)
        if slots := _pairs(per_person)["photo to styled"]:
            hard = _auc_of_alike(_similarity(of_person, slots), alike)
            figures[f"face recogniser AUC, photo to styled, nearest tenth of people{name}"] = hard
        own = (of_person[:, :1] * of_person[:, 1:]).sum(-1)
        figures[f"face recogniser similarity of a person's pictures{name}"] = share(own)
    return figures


def _pairs(per_person: int) -> dict[str, list[tuple[int, int]]]:
    """Slots of the reference and of the picture; slots 0 and 1 are photos."""
    return {
        "photo to photo": [(0, 1)],
        "photo to styled": [(0, i) for i in range(2, per_person)],
        "any to any": [(i, (i + 1) % per_person) for i in range(per_person)],
    }


def _similarity(of_person: Tensor, slots: list[tuple[int, int]]) -> Tensor:
    """[people, slots, people] from embeddings [people, per_person, d]: of pictures to everybody's reference."""
    return torch.stack([of_person[:, picture] @ of_person[:, reference].T for reference, picture in slots], 1)


def _a_person(values: Tensor, rows: Tensor) -> Tensor:
    """Those of `values` where rows [people, pictures] is true, as [people, pictures of each]."""
    return values.view(rows.shape)[rows].view(len(rows), -1)


def _mean(values: Tensor) -> Interval:
    """Mean of [people, pictures] without the missing ones."""
    return bootstrap(lambda index: values[index].double().nanmean().item(), len(values))


def _resized(app: FaceAnalysis, pictures: Tensor, box: Tensor, true: Tensor, size: float) -> tuple[Tensor, Tensor]:
    """Is the face found [n] and how wrong are its landmarks [n], when it has this share of the picture's height and
    the rest is black, as insightface pads."""
    centre, zoom = (box[:, :2] + box[:, 2:]) / 2, size * IMAGE_SIZE / (box[:, 3] - box[:, 1])
    to = torch.full_like(centre, IMAGE_SIZE / 2)
    whole = [paste(*part) for part in zip(*(t.split(100) for t in (pictures, centre, zoom, to)), strict=True)]
    found = look(app, torch.cat([picture * mask for picture, mask in whole]))
    true = (true + 0.5 - centre[:, None]) * zoom[:, None, None] + to[:, None] - 0.5
    return found.there, torch.where(found.there, landmark_error(found.points, true), torch.nan)


def alike_people(identity: Tensor, hardest: float = 0.1) -> Tensor:
    """bool [people, people]: the pairs of different people that are nearest in the parameters [people, k] that they
    were drawn with."""
    distance, other = torch.cdist(identity, identity), ~torch.eye(len(identity), dtype=torch.bool)
    return other & (distance <= distance[other].quantile(hardest))


def _of_alike(similarity: Tensor, alike: Tensor, index: Tensor) -> Tensor:
    """Of similarity [people, pictures, people], those between alike people among the drawn ones (index)."""
    return similarity[index][:, :, index].transpose(1, 2)[alike[index][:, index]].flatten()


def _auc_of_alike(similarity: Tensor, alike: Tensor) -> Interval:
    """As identity_auc, but the others are those people alone who look alike."""

    def figure(index: Tensor) -> float:
        return auc(similarity[index, :, index].flatten(), _of_alike(similarity, alike, index))

    return bootstrap(figure, len(similarity), ROUNDS)


def rank_correlation(
    ours: Tensor, judge: Tensor, identity: Tensor, hardest: float = 0.1, rounds: int = ROUNDS
) -> dict[str, Interval]:
    """Do two recognisers order hard pairs alike? Spearman's correlation of their similarities, photo to styled.

    ours [people, pictures, d] and judge [people, pictures, e]: unit vectors of the same pictures, of which the first
    is the reference. identity [people, k]: the parameters that people were drawn with; hard are the pairs of people
    that are nearest in them (which favours neither recogniser), and all pairs of a person's own pictures.
    """
    people, pictures = ours.shape[:2]
    slots = _pairs(pictures)["photo to styled"]
    a, b = _similarity(ours, slots), _similarity(judge, slots)
    alike = alike_people(identity, hardest)

    def over(own: bool, others: bool) -> Interval:
        def figure(index: Tensor) -> float:
            rows = []
            for t in (a, b):
                parts = [t[index, :, index].flatten()] if own else []
                parts += [_of_alike(t, alike, index)] if others else []
                rows.append(torch.cat(parts))
            return float(spearmanr(*(row.numpy() for row in rows)).statistic)

        return bootstrap(figure, people, rounds)

    return {
        "rank correlation, hard pairs": over(True, True),
        "rank correlation, pairs of similar people": over(False, True),
        "rank correlation, a person's own pairs": over(True, False),
    }
