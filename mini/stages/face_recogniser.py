"""Stage: the face recogniser of the identity loss, in ArcFace's layout, so that insightface loads it.

It is not the network that judges (evaluators.py): it sees other people, learns from pairs instead of from the
parameters of the drawing, and looks at aligned crops. Two pictures of a person, often a photo and a styled one,
must be more alike, by a margin, than either is to anybody else in the batch (NT-Xent with CosFace's margin; a softmax
over all the people of the training group hardly starts at this size).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ...lookahead.vision.faces import align
from ..plan import IMAGE_SIZE, Plan
from ..world.data import Pictures, group_of_people
from ..world.faces import landmarks
from . import stage
from .detector import disturb
from .face_networks import FaceRecogniser, embed

PEOPLE = 48  # in a batch, two pictures each
MARGIN, SCALE = 0.15, 16.0
JITTER = 2.0  # pixels: the landmarks that it will be given are a detector's


def pair_loss(embedding: Tensor) -> Tensor:
    """Mean over [2 * n, d] unit vectors, rows i and n + i of one person, of the cross-entropy that picks the pair."""
    n = len(embedding) // 2
    pair = torch.arange(2 * n, device=embedding.device).roll(n)
    same = F.one_hot(pair, 2 * n).to(embedding)
    logits = SCALE * (embedding @ embedding.T - MARGIN * same)
    itself = torch.eye(2 * n, dtype=torch.bool, device=embedding.device)
    return F.cross_entropy(logits.masked_fill(itself, -1e4), pair)


def jitter(points: Tensor, numbers: torch.Generator) -> Tensor:
    """Landmarks [n, 5, 2] as a detector might find them: each moved, and all together."""
    n = len(points)
    strength = JITTER * torch.rand(2, n, 1, 1, generator=numbers)
    alone = strength[0] * torch.randn(n, 5, 2, generator=numbers)
    return points + alone + 0.7 * strength[1] * torch.randn(n, 1, 2, generator=numbers)


def train(folder: Path, pictures: Pictures, plan: Plan) -> None:
    """On the training group's pictures, which show `plan.people` people."""
    out = folder / "face_recogniser.safetensors"
    if out.exists():
        return
    torch.manual_seed(plan.seed + 8)
    device = stage.device()
    net = FaceRecogniser().to(device, memory_format=torch.channels_last)
    points = landmarks(group_of_people("train", plan.people, plan.styles), IMAGE_SIZE) - 0.5
    per_person = pictures.per_person

    def loss(step: int) -> Tensor:
        numbers = stage.numbers_of_step(plan.seed + 8, step)
        person = torch.randperm(plan.people, generator=numbers)[:PEOPLE]
        slots = torch.rand(len(person), per_person, generator=numbers)
        photo = torch.rand(len(person), generator=numbers) < 0.5
        slots[photo, 0] += 1  # half of the pairs start from a photo: slot 0 is one
        chosen = slots.topk(2).indices
        index = (person[:, None] * per_person + chosen).T.flatten()
        crop = align(pictures.images(index), jitter(points[index], numbers))
        crop = disturb(crop, numbers).to(device, memory_format=torch.channels_last)
        with stage.autocast(device):
            seen = embed(net, crop)
        return pair_loss(seen.float())

    stage.train("face_recogniser", folder, {"net": net}, loss, steps=plan.face_recogniser_steps, rate=3e-3, decay=0.05)
    stage.write_tensors(out, net.state_dict())
    stage.finish("face_recogniser", folder)


def load(folder: Path) -> FaceRecogniser:
    net = FaceRecogniser()
    net.load_state_dict(stage.read_tensors(folder / "face_recogniser.safetensors"))
    return net.eval().requires_grad_(False)
