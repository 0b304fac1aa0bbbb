"""The face models that insightface runs: a detector in SCRFD's output layout and a recogniser in ArcFace's."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ...lookahead.vision.faces import CROP  # pixels a side of what the recogniser sees

DETECTOR_SIZE = 128  # pixels a side of what the detector sees
STRIDES = (8, 16, 32)
ANCHORS = 2  # a cell; insightface takes nine outputs for three strides with two anchors
EMBEDDING = 128


def _conv(inner: int, outer: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU(True))


def _rows(maps: Tensor, width: int) -> Tensor:
    """[n, ANCHORS * width, h, w] -> [n, h * w * ANCHORS, width]: row, then column, then anchor."""
    return maps.permute(0, 2, 3, 1).reshape(maps.shape[0], -1, width)


class FaceDetector(nn.Module):
    """Faces with five landmarks, at three strides.

    Input [n, 3, 128, 128], RGB, (bytes - 127.5) / 128. Outputs, as SCRFD orders them: the scores [m, 1] of the three
    strides (after the sigmoid), their boxes [m, 4] (left, top, right, bottom of the anchor), their landmarks [m, 10];
    lengths in strides, anchors at (column, row) * stride.
    """

    def __init__(self, widths: tuple[int, ...] = (16, 24, 48, 80, 112), neck: int = 40):
        super().__init__()
        a, b, *levels = widths
        self.stem = nn.Sequential(_conv(3, a, 2), _conv(a, b, 2), _conv(b, b))
        pairs = zip([b, *levels], levels, strict=False)
        self.levels = nn.ModuleList(nn.Sequential(_conv(i, o, 2), _conv(o, o)) for i, o in pairs)
        self.lateral = nn.ModuleList(nn.Conv2d(w, neck, 1) for w in levels)
        self.heads = nn.ModuleList(nn.Sequential(*(_conv(neck, neck) for _ in range(3))) for _ in levels)
        self.score, self.box, self.points = (
            nn.ModuleList(nn.Conv2d(neck, ANCHORS * width, 3, 1, 1) for _ in levels) for width in (1, 4, 10)
        )
        for score, box in zip(self.score, self.box, strict=True):
            nn.init.normal_(score.weight, std=0.01)
            nn.init.constant_(score.bias, -4.0)  # few anchors see a face
            nn.init.constant_(box.bias, 2.0)

    def maps(self, x: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For every stride: logits [n, m, 1], boxes [n, m, 4] and landmarks [n, m, 10]."""
        x, seen = self.stem(x), []
        for level, lateral in zip(self.levels, self.lateral, strict=True):
            x = level(x)
            seen.append(lateral(x))
        for i in (1, 0):
            seen[i] = seen[i] + F.interpolate(seen[i + 1], scale_factor=2.0, mode="nearest")
        out = []
        for i, head in enumerate(self.heads):
            y = head(seen[i])
            out.append((_rows(self.score[i](y), 1), _rows(self.box[i](y), 4), _rows(self.points[i](y), 10)))
        return out

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        scores, boxes, points = zip(*self.maps(x), strict=True)
        return tuple(t.flatten(0, 1) for t in (*(s.sigmoid() for s in scores), *boxes, *points))


class _Block(nn.Module):
    """A residual pair of convolutions."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.PReLU(width),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class FaceRecogniser(nn.Module):
    """Who is it? [n, 3, 112, 112], aligned, RGB, (bytes - 127.5) / 127.5 -> embeddings [n, 128], not normalised."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 56, 80), reduced: int = 32):
        super().__init__()
        layers: list[nn.Module] = []
        for inner, outer in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(inner, outer, 3, 2, 1, bias=False), nn.BatchNorm2d(outer), nn.PReLU(outer)]
        layers += [_Block(widths[-1]), nn.Conv2d(widths[-1], reduced, 1, bias=False), nn.BatchNorm2d(reduced)]
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(reduced * (CROP // 16) ** 2, EMBEDDING, bias=False)
        self.norm = nn.BatchNorm1d(EMBEDDING)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.head(self.trunk(x)))


def embed(recogniser: nn.Module, crop: Tensor) -> Tensor:
    """Unit vectors [n, 128] of aligned crops [n, 3, 112, 112] in [0, 1]."""
    return F.normalize(recogniser(crop * 2 - 1), dim=-1)
