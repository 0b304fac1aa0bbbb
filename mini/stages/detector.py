"""Stage: the face detector, a small SCRFD that insightface loads, on scenes made of the drawn faces.

A scene is a drawn picture at a random size and place, two of them side by side, or none; then light, blur and noise
are disturbed, because generated pictures and one-step previews are less exact than drawn ones. Boxes and landmarks
are those that the faces were drawn with, in insightface's pixels: the centre of the first is 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..plan import Plan
from ..world.data import Pictures, group_of_people
from ..world.faces import STYLES, boxes, landmarks, render_empty, sample_nuisance
from ..world.styles import blur
from . import stage
from .face_networks import ANCHORS, DETECTOR_SIZE, STRIDES, FaceDetector

ONE, TWO, EMPTY = 20, 6, 6  # scenes a batch with one face, with two, with none
BATCH = ONE + TWO + EMPTY
SIZES = (0.22, 0.98)  # height of a face, as a share of the picture's
RANGES = ((0.0, 32.0), (32.0, 72.0), (72.0, 1e9))  # pixels: the faces that each stride is to find
_S = DETECTOR_SIZE


class Scenes(NamedTuple):
    """n pictures with up to two faces."""

    picture: Tensor  # [n, 3, 128, 128] in [0, 1]
    box: Tensor  # [n, 2, 4]
    points: Tensor  # [n, 2, 5, 2]
    there: Tensor  # bool [n, 2]


class SceneParts(NamedTuple):
    """Scenes are made of these: drawn pictures with what is known about them, and pictures without a person."""

    pictures: Pictures
    box: Tensor  # [pictures, 4]
    points: Tensor  # [pictures, 5, 2]
    empty: Tensor  # uint8 [m, 3, 128, 128]


def source(pictures: Pictures, group: str, people: int, plan: Plan, empty: int = 1000) -> SceneParts:
    faces = group_of_people(group, people, plan.styles)
    return SceneParts(
        pictures, boxes(faces, _S), landmarks(faces, _S), empty_pictures(empty, plan.seed + 7, plan.styles)
    )


def empty_pictures(n: int, seed: int, styles: tuple[str, ...] = STYLES) -> Tensor:
    """uint8 [n, 3, 128, 128]: places in every style, without a person."""
    numbers = torch.Generator().manual_seed(seed)
    style = torch.tensor([STYLES.index(s) for s in styles])[torch.randint(len(styles), (n,), generator=numbers)]
    nuisance = sample_nuisance(n, numbers, style=style)
    drawn = [render_empty({k: v[i : i + 100] for k, v in nuisance.items()}, _S, seed + i) for i in range(0, n, 100)]
    return (torch.cat(drawn) * 255).round().byte()


def scenes(s: SceneParts, numbers: torch.Generator) -> Scenes:
    """One batch: first the scenes with two faces, then those with one, then those with none."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=numbers)

    faces = TWO + ONE
    index = torch.randint(len(s.pictures), (faces + TWO,), generator=numbers)
    box, points = s.box[index], s.points[index]
    centre, extent = (box[:, :2] + box[:, 2:]) / 2, box[:, 2:] - box[:, :2]

    # How large, and where. Every second single face is about as it was drawn, the others of any size.
    low, high = (torch.tensor(v).log() for v in SIZES)
    share = (low + (high - low) * uniform(len(index))).exp()
    share[:TWO], share[faces:] = share[:TWO].clamp(max=0.45), share[faces:].clamp(max=0.45)
    zoom = share * _S / extent[:, 1]
    inside = 0.45 * extent * zoom[:, None]  # a twentieth of the face may leave the picture on a side
    to = inside + (_S - 2 * inside) * uniform(len(index), 2)
    for rows, left in ((slice(0, TWO), 0), (slice(faces, None), _S // 2)):
        to[rows, 0] = left + inside[rows, 0] + (_S / 2 - 2 * inside[rows, 0]) * uniform(TWO)
    drawn = TWO + ONE // 2
    zoom[drawn:faces] = 0.88 + 0.24 * uniform(faces - drawn)
    to[drawn:faces] = _S / 2 + zoom[drawn:faces, None] * (centre[drawn:faces] - _S / 2)
    to[drawn:faces] += 16 * uniform(faces - drawn, 2) - 8
    pasted, mask = paste(s.pictures.images(index), centre, zoom, to)
    box = box.view(-1, 2, 2).sub(centre[:, None]).mul(zoom[:, None, None]).add(to[:, None]).flatten(1) - 0.5
    points = (points - centre[:, None]) * zoom[:, None, None] + to[:, None] - 0.5

    # What is around the pasted picture: another place, black (as insightface pads), a flat colour, or its own rim.
    fill = s.empty[torch.randint(len(s.empty), (BATCH,), generator=numbers)].float() / 255
    kind = torch.randint(4, (faces, 1, 1, 1), generator=numbers)
    around = torch.where(kind == 1, 0.0, torch.where(kind == 2, uniform(faces, 3, 1, 1), fill[:faces]))
    picture = torch.where(mask[:faces] | (kind == 3), pasted[:faces], around)
    half = torch.arange(_S) >= _S // 2
    picture[:TWO] = torch.where(mask[faces:] & half, pasted[faces:], picture[:TWO])

    # None: places, pictures of people in shuffled pieces, coarse noise.
    nobody = fill[faces:].clone()
    pieces = nobody.new_empty(2, 16, 3, _S // 4, _S // 4)
    for row in range(2):
        cut = pasted[faces + row].unfold(1, _S // 4, _S // 4).unfold(2, _S // 4, _S // 4).permute(1, 2, 0, 3, 4)
        pieces[row] = cut.flatten(0, 1)[torch.randperm(16, generator=numbers)]
    nobody[3:5] = pieces.view(2, 4, 4, 3, _S // 4, _S // 4).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, _S, _S)
    nobody[5:] = F.interpolate(uniform(1, 3, 8, 8), size=(_S, _S), mode="bicubic").clamp(0, 1)

    boxes_of, points_of = torch.zeros(BATCH, 2, 4), torch.zeros(BATCH, 2, 5, 2)
    there = torch.zeros(BATCH, 2, dtype=torch.bool)
    boxes_of[:faces, 0], points_of[:faces, 0], there[:faces, 0] = box[:faces], points[:faces], True
    boxes_of[:TWO, 1], points_of[:TWO, 1], there[:TWO, 1] = box[faces:], points[faces:], True
    return Scenes(disturb(torch.cat([picture, nobody]), numbers), boxes_of, points_of, there)


def paste(picture: Tensor, centre: Tensor, zoom: Tensor, to: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures [n, 3, s, s] zoomed [n] about `centre` [n, 2] and moved so that it lies at `to` [n, 2]; and where in
    the result they are [n, 1, s, s]. Outside is the nearest pixel of the rim."""
    axis = (torch.arange(_S) + 0.5).expand(len(zoom), _S)
    x, y = ((axis - to[:, i : i + 1]) / zoom[:, None] + centre[:, i : i + 1] for i in (0, 1))
    grid = torch.stack([x[:, None].expand(-1, _S, -1), y[:, :, None].expand(-1, -1, _S)], -1) * 2 / _S - 1
    mask = (grid.abs() <= 1).all(-1)[:, None]
    return F.grid_sample(picture, grid, padding_mode="border", align_corners=False), mask


def disturb(x: Tensor, numbers: torch.Generator) -> Tensor:
    """Light, colour, blur and noise (fine and coarse) at random, [n, 3, h, w] in [0, 1]."""
    n = len(x)
    contrast, light = 0.6 + 0.6 * torch.rand(n, 1, 1, 1, generator=numbers), torch.randn(n, 3, 1, 1, generator=numbers)
    x = (x - 0.5) * contrast + 0.5 + 0.06 * light
    coarse, noise, soft, sigma = torch.rand(4, generator=numbers).tolist()
    strength = torch.rand(n, 1, 1, 1, generator=numbers)
    if coarse < 0.3:
        cells = torch.randn(n, 3, 16, 16, generator=numbers)
        x = x + 0.12 * strength * F.interpolate(cells, size=x.shape[2:], mode="bilinear")
    if noise < 0.4:
        x = x + 0.12 * strength * torch.randn(x.shape, generator=numbers)
    if soft < 0.4:
        x = blur(x, 0.5 + 2.5 * sigma)
    return x.clamp(0, 1)


def loss_of(net: FaceDetector, s: Scenes, device: torch.device) -> Tensor:
    """Focal loss of the scores, GIoU of the boxes, smooth L1 of the landmarks in shares of the face's size."""
    x = (s.picture * 255 - 127.5) / 128
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        out = net.maps(x.to(device, memory_format=torch.channels_last))
    parts, positives = [], 0.0
    for stride, limits, maps in zip(STRIDES, RANGES, out, strict=True):
        target = [t.repeat_interleave(ANCHORS, 1).to(device) for t in _targets(s, stride, limits)]
        score, box, points = (m.float() for m in maps)
        parts.append(_loss_of_stride(score[..., 0], box, points, *target))
        positives += target[0].sum().item()
    score, box, points = (sum(p) / max(1.0, positives) for p in zip(*parts, strict=True))
    return 4 * score + 1.5 * box + 3 * points


def _targets(s: Scenes, stride: int, limits: tuple[float, float]) -> tuple[Tensor, ...]:
    """For every cell of a stride: is a face to be found here (bool [n, m]), may the score be anything [n, m], the box
    [n, m, 4] and the landmarks [n, m, 10] in strides from the anchor."""
    axis = torch.arange(_S // stride) * float(stride)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    anchor = torch.stack([x, y], -1).view(-1, 2)
    centre, extent = (s.box[..., :2] + s.box[..., 2:]) / 2, s.box[..., 2:] - s.box[..., :2]
    size = extent.prod(-1).sqrt()
    away = anchor - centre[:, :, None]  # [n, 2, m, 2]
    near = (away.abs() <= (0.22 * extent).clamp(min=stride / 2)[:, :, None]).all(-1)
    distance = away.square().sum(-1)
    near |= distance == distance.amin(-1, keepdim=True)
    around = (away.abs() <= 0.35 * extent[:, :, None]).all(-1)
    mine = s.there & (size >= limits[0]) & (size < limits[1])
    almost = s.there & (size >= limits[0] / 1.35) & (size < limits[1] * 1.35)
    positive = near & mine[..., None]
    found = positive.any(1)
    ignore = (around & almost[..., None]).any(1) & ~found
    face = positive.long().argmax(1)  # which of the two
    box = s.box.gather(1, face[..., None].expand(-1, -1, 4))
    points = s.points.flatten(2).gather(1, face[..., None].expand(-1, -1, 10))
    box = torch.cat([anchor - box[..., :2], box[..., 2:] - anchor], -1) / stride
    return found, ignore, box, (points - anchor.repeat(1, 5)) / stride


def _loss_of_stride(
    score: Tensor, box: Tensor, points: Tensor, found: Tensor, ignore: Tensor, true_box: Tensor, true_points: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over a stride's anchors of the three losses."""
    p = score.sigmoid()
    wrong = torch.where(found, 1 - p, p)
    weight = torch.where(found, 0.35, 0.65) * wrong.square() * ~ignore
    focal = (weight * F.binary_cross_entropy_with_logits(score, found.float(), reduction="none")).sum()
    a, b = box[found].clamp(min=0.01), true_box[found].clamp(min=0.01)
    both, hull = ((f(a, b)[:, :2] + f(a, b)[:, 2:]).prod(1) for f in (torch.minimum, torch.maximum))
    area_a, area_b = ((t[:, :2] + t[:, 2:]).prod(1) for t in (a, b))
    union = area_a + area_b - both
    giou = (1 - both / union + (hull - union) / hull).sum()
    giou = giou + 0.05 * F.l1_loss(box[found], true_box[found], reduction="sum")
    scale = 20 / area_b.sqrt()[:, None]
    return focal, giou, 0.1 * F.smooth_l1_loss(points[found] * scale, true_points[found] * scale, reduction="sum")


def train(folder: Path, pictures: Pictures, plan: Plan) -> None:
    """On the training group's pictures, which show `plan.people` people."""
    out = folder / "detector.safetensors"
    if out.exists():
        return
    torch.manual_seed(plan.seed + 7)
    device = stage.device()
    net = FaceDetector().to(device, memory_format=torch.channels_last)
    drawn = source(pictures, "train", plan.people, plan)

    def loss(step: int) -> Tensor:
        return loss_of(net, scenes(drawn, stage.numbers_of_step(plan.seed + 7, step)), device)

    stage.train("detector", folder, {"detector": net}, loss, steps=plan.detector_steps, rate=3e-3, clip=10.0)
    stage.write_tensors(out, net.state_dict())
    stage.finish("detector", folder)


def load(folder: Path) -> FaceDetector:
    net = FaceDetector()
    net.load_state_dict(stage.read_tensors(folder / "detector.safetensors"))
    return net.eval().requires_grad_(False)
