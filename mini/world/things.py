"""Procedural things: the drawn world's second domain, for methods that must not know the class of what they are shown.

A thing is one of ten classes with four numbers of shape, two colours and a pattern; a picture of it differs by place,
style, position, size, turn, mirroring and light. Painted like the faces, back to front from signed distances, so that
edges are smooth at any picture size. Coordinates run from -1 to 1, x to the right, y downwards. `draw_place` and
`stylise` are those of the faces, so that both domains share places and styles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .faces import PLACES, STYLES
from .styles import Factors, draw_place, stylise

#: Each is one token of CLIP, since a hard prompt has room for one. No encoder is trained on the last two.
CLASSES = ("mug", "car", "fish", "house", "lamp", "flower", "robot", "boat", "clock", "umbrella")
HELD_OUT = 2
PATTERNS = ("plain", "stripes", "dots")
SHAPE = 4

NUISANCE = {
    "shift_x": (-0.12, 0.12),
    "shift_y": (-0.08, 0.12),
    "scale": (0.85, 1.15),
    "rotation": (-0.15, 0.15),
    "light_x": (-1.0, 1.0),
    "light_y": (-1.0, 0.3),
    "light": (0.05, 0.35),
    "gain": (0.85, 1.1),
    "phase_a": (0.0, 6.28),
    "phase_b": (0.0, 6.28),
}


class Things(NamedTuple):
    """n pictures: what is on them and how they were taken. Every tensor has n rows.

    identity: kind int64 [n], an index into CLASSES; shape [n, 4] in [-1, 1]; first, second [n, 3], colours as hue
    (a turn is 1), saturation and value; pattern int64 [n], an index into PATTERNS.
    """

    identity: Factors
    nuisance: Factors

    def __len__(self) -> int:
        return len(self.identity["kind"])

    def rows(self, index: Tensor | slice) -> Things:
        return Things(*({k: v[index] for k, v in part.items()} for part in self))


def sample_things(n: int, generator: torch.Generator, kind: Tensor | None = None) -> Factors:
    """n things, every parameter drawn on its own; kind [n] is drawn among the classes that are not held out."""
    kinds = torch.randint(len(CLASSES) - HELD_OUT, (n,), generator=generator)
    first, second = torch.rand(n, 3, generator=generator), torch.rand(n, 3, generator=generator)
    # The second colour keeps away from the first, or the pattern would not be seen.
    hue = (first[:, :1] + 0.25 + 0.5 * second[:, :1]) % 1
    return {
        "kind": kinds if kind is None else kind,
        "shape": torch.rand(n, SHAPE, generator=generator) * 2 - 1,
        "first": torch.cat([first[:, :1], 0.55 + 0.45 * first[:, 1:2], 0.55 + 0.4 * first[:, 2:]], 1),
        "second": torch.cat([hue, 0.4 + 0.6 * second[:, 1:2], 0.45 + 0.5 * second[:, 2:]], 1),
        "pattern": torch.randint(len(PATTERNS), (n,), generator=generator),
    }


def sample_nuisance(
    n: int, generator: torch.Generator, style: Tensor | None = None, place: Tensor | None = None
) -> Factors:
    """Draws how n pictures are taken, also style [n] and place [n] (indices into STYLES and PLACES) unless given."""
    nuisance = {k: torch.rand(n, generator=generator) * (high - low) + low for k, (low, high) in NUISANCE.items()}
    nuisance["mirror"] = torch.randint(2, (n,), generator=generator) * 2.0 - 1
    nuisance["background"] = torch.rand(n, 3, generator=generator) * 0.6 + 0.3
    styles = torch.randint(len(STYLES), (n,), generator=generator)
    places = torch.randint(len(PLACES), (n,), generator=generator)
    nuisance["style"] = styles if style is None else style
    nuisance["place"] = places if place is None else place
    return nuisance


def straight(nuisance: Factors) -> Factors:
    """Returns the same pictures with the thing upright in the middle, as one would take its picture for reference."""
    still = {k: torch.zeros_like(nuisance[k]) for k in ("shift_x", "shift_y", "rotation")}
    return {
        **nuisance,
        **still,
        "scale": torch.ones_like(nuisance["scale"]),
        "mirror": torch.ones_like(nuisance["scale"]),
    }


def captions(things: Things) -> list[str]:
    """One caption a picture: style, class and place, nothing of shape, colour or pattern."""
    kind = things.identity["kind"].tolist()
    style, place = (things.nuisance[k].tolist() for k in ("style", "place"))
    return [
        " ".join(filter(None, (f"{_article(STYLES[s])} of {_article(CLASSES[k])}", PLACES[p])))
        for k, s, p in zip(kind, style, place, strict=True)
    ]


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def identity_vector(identity: Factors) -> Tensor:
    """[n, IDENTITY_SIZE]: the class as -0.7 / 1.3 (one hot), shape, both colours as a point in the cone of hue and
    saturation with its value, and the pattern (one hot)."""

    def cone(colour: Tensor) -> Tensor:
        turn = 6.2832 * colour[:, :1]
        return torch.cat([colour[:, 1:2] * turn.cos(), colour[:, 1:2] * turn.sin(), colour[:, 2:] * 2 - 1], 1)

    def one_hot(index: Tensor, size: int) -> Tensor:
        return F.one_hot(index, size).float() * 2 - 0.7

    kind, pattern = one_hot(identity["kind"], len(CLASSES)), one_hot(identity["pattern"], len(PATTERNS))
    return torch.cat([kind, identity["shape"], cone(identity["first"]), cone(identity["second"]), pattern], 1)


IDENTITY_SIZE = len(CLASSES) + SHAPE + 3 + 3 + len(PATTERNS)


@torch.no_grad()
def render(things: Things, size: int = 128, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Draw n things: float32 [n, 3, size, size] in [0, 1]. `seed` is that of the styles' own texture."""
    a, b = ({k: v.to(device) for k, v in part.items()} for part in things)
    picture = draw_place(b, size)
    for kind, draw in enumerate(_DRAW):
        rows = (a["kind"] == kind).nonzero()[:, 0]
        if len(rows):
            chosen = Things(a, b).rows(rows)
            sheet = _Sheet(picture[rows], *chosen, size)
            draw(sheet, *(sheet.identity["shape"][:, i].view(-1, 1, 1) for i in range(SHAPE)))
            picture[rows] = sheet.picture
    picture = (picture * b["gain"].view(-1, 1, 1, 1)).clamp(0, 1)
    return stylise(picture, b["style"], torch.Generator(device).manual_seed(seed))


def rgb(colour: Tensor) -> Tensor:
    """Hue (a turn is 1), saturation and value [n, 3] -> red, green and blue [n, 3], all in [0, 1]."""
    hue, saturation, value = colour.unbind(1)
    shift = torch.tensor([5.0, 3.0, 1.0], device=colour.device)
    k = (shift + 6 * hue[:, None]) % 6
    return value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


class _Sheet:
    """A batch of pictures of one class that layers are painted on, in the upright thing's own coordinates."""

    def __init__(self, picture: Tensor, identity: Factors, nuisance: Factors, size: int):
        self.picture, self.identity, self.pixel = picture, identity, 2 / size
        axis = (torch.arange(size, device=picture.device) + 0.5) * self.pixel - 1
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        turn, scale, mirror, shift_x, shift_y = (
            nuisance[k].view(-1, 1, 1) for k in ("rotation", "scale", "mirror", "shift_x", "shift_y")
        )
        x, y = (x[None] - shift_x) / scale, (y[None] - shift_y) / scale
        self.x, self.y = mirror * (turn.cos() * x + turn.sin() * y), -turn.sin() * x + turn.cos() * y
        light = nuisance["light"].view(-1, 1, 1)
        slope = x * nuisance["light_x"].view(-1, 1, 1) + y * nuisance["light_y"].view(-1, 1, 1)
        self.light = 1 + light * slope
        self.first, self.second = rgb(identity["first"]), rgb(identity["second"])
        wave = 0.5 + 0.5 * (18 * (self.x + 0.35 * self.y)).sin()
        stripes = (wave > 0.5).float()
        dots = ((18 * self.x).sin() * (18 * self.y).sin() > 0.35).float()
        pattern = identity["pattern"].view(-1, 1, 1)
        mark = stripes * (pattern == 1) + dots * (pattern == 2)
        #: The thing's main colour [n, 3, h, w], with its pattern.
        self.body = self.first[:, :, None, None] + mark[:, None] * (self.second - self.first)[:, :, None, None]

    def paint(self, distance: Tensor, colour: Tensor, shade: float = 1.0) -> None:
        """Fill where a signed distance [n, h, w] is below 0. colour: [n, 3], [3] or [n, 3, h, w]."""
        coverage = (0.5 - distance / (1.3 * self.pixel)).clamp(0, 1)[:, None]
        if colour.ndim < 4:
            colour = colour.view(-1, 3, 1, 1)
        colour = (colour * shade * self.light[:, None]).clamp(0, 1)
        self.picture = self.picture + coverage * (colour - self.picture)

    def grey(self, value: float) -> Tensor:
        return torch.full((3,), value, device=self.picture.device)

    def tint(self, *colour: float) -> Tensor:
        return torch.tensor(colour, device=self.picture.device)

    # Signed distances, about: to an ellipse, a box with round corners, a thick line, a ring.

    def ellipse(self, cx, cy, a, b) -> Tensor:
        x, y, a, b = self.x - cx, self.y - cy, torch.as_tensor(a), torch.as_tensor(b)
        return (((x / a) ** 2 + (y / b) ** 2 + 1e-6).sqrt() - 1) * torch.minimum(a, b)

    def box(self, cx, cy, a, b, round_: float = 0.02) -> Tensor:
        x, y = (self.x - cx).abs() - a + round_, (self.y - cy).abs() - b + round_
        outside = (x.clamp(min=0) ** 2 + y.clamp(min=0) ** 2 + 1e-9).sqrt()
        return outside + torch.maximum(x, y).clamp(max=0) - round_

    def line(self, x0, y0, x1, y1, width) -> Tensor:
        dx, dy = x1 - x0, y1 - y0
        along = (((self.x - x0) * dx + (self.y - y0) * dy) / (dx * dx + dy * dy + 1e-6)).clamp(0, 1)
        return ((self.x - x0 - along * dx) ** 2 + (self.y - y0 - along * dy) ** 2 + 1e-9).sqrt() - width

    def ring(self, cx, cy, radius, width) -> Tensor:
        return (((self.x - cx) ** 2 + (self.y - cy) ** 2 + 1e-9).sqrt() - radius).abs() - width


# Each paints one class; s, t, u, v [n, 1, 1] in [-1, 1] are the four numbers of its shape.


def _mug(p: _Sheet, s: Tensor, t: Tensor, u: Tensor, v: Tensor) -> None:
    width, height = 0.36 + 0.08 * s, 0.42 + 0.10 * t
    taper = 0.10 * v * (p.y / height)
    p.paint(p.ring(width + 0.08, 0.0, 0.20 + 0.06 * u, 0.05), p.first, 0.85)
    p.paint(torch.maximum(p.x.abs() - width + taper, p.y.abs() - height), p.body)
    p.paint(p.ellipse(0.0, -height, width + 0.10 * v, 0.09), p.second)
    p.paint(p.ellipse(0.0, -height + 0.01, (width + 0.10 * v) * 0.82, 0.06), p.tint(0.22, 0.12, 0.07))


def _car(p: _Sheet, s: Tensor, t: Tensor, u: Tensor, v: Tensor) -> None:
    length, roof, cabin = 0.66 + 0.10 * s, 0.26 + 0.07 * t, 0.36 + 0.09 * u
    p.paint(p.box(-0.05, -0.16, cabin, roof, 0.16), p.body)
    p.paint(p.box(-0.05, -0.20, cabin - 0.07, roof - 0.09, 0.09), p.tint(0.75, 0.88, 0.95))
    p.paint(p.box(-0.05, -0.20, torch.full_like(s, 0.025), roof, 0.01), p.first)
    p.paint(p.box(0.0, 0.14, length, 0.20, 0.09), p.body)
    radius = 0.15 + 0.035 * v
    for side in (-1, 1):
        p.paint(p.ellipse(side * length * 0.58, 0.34, radius, radius), p.grey(0.08))
        p.paint(p.ellipse(side * length * 0.58, 0.34, radius * 0.5, radius * 0.5), p.second)
    p.paint(p.ellipse(length - 0.05, 0.08, 0.06, 0.06), p.tint(1.0, 0.95, 0.6))


def _fish(p: _Sheet, s: Tensor, t: Tensor, u: Tensor, v: Tensor) -> None:
    length, height, tail = 0.52 + 0.10 * s, 0.28 + 0.09 * t, 0.24 + 0.08 * u
    back = -length + 0.06
    fin = torch.maximum((p.y.abs() - tail * (back - p.x).clamp(min=0) / 0.30 - 0.02) * 0.75, p.x - back)
    p.paint(torch.maximum(fin, back - 0.30 - p.x), p.second)
    top = torch.maximum((p.y + height - 0.05 - 0.35 * p.x.abs()).abs() - 0.10 - 0.05 * v, p.x.abs() - 0.24)
    p.paint(top, p.second, 0.9)
    p.paint(p.ellipse(0.0, 0.0, length, height), p.body)
    p.paint(p.ellipse(length * 0.62, -height * 0.22, 0.07, 0.07), p.grey(0.97))
    p.paint(p.ellipse(length * 0.65, -height * 0.22, 0.035, 0.035), p.grey(0.03))
    p.paint(p.line(length * 0.7, height * 0.35, length * 0.9, height * 0.22, 0.015), p.grey(0.1))


def _house(p: _Sheet, s: Tensor, t: Tensor, u: Tensor, v: Tensor) -> None:
    width, height, roof = 0.44 + 0.09 * s, 0.34 + 0.07 * t, 0.36 + 0.12 * u
    p.paint(p.box(width * 0.55, -height - 0.06, 0.06, roof * 0.75, 0.0), p.tint(0.45, 0.28, 0.22))
    p.paint(p.box(0.0, 0.24, width, height, 0.0), p.body)
    slope = (p.x.abs() - (width + 0.10) * ((p.y - 0.24 + height + roof) / roof)) * 0.7
    p.paint(torch.maximum(slope, p.y - 0.24 + height), p.second)
    p.paint(p.box(-width * 0.45 * v.sign(), 0.24 + height * 0.4, 0.09, height * 0.6, 0.0), p.tint(0.35, 0.2, 0.1))
    for side in (0.1, 0.62):
        p.paint(p.box(width * side * v.sign(), 0.16, 0.09 + 0.02 * v, 0.10, 0.0), p.tint(0.95, 0.92, 0.6))


def _lamp(p: _Sheet, s: Tensor, t: Tensor, u: Tensor, v: Tensor) -> None:
    shade, height, top = 0.40 + 0.10 * s, 0.30 + 0.07 * t, 0.20 + 0.10 * u
    p.paint(p.line(0.0, -0.1, 0.0, 0.62, 0.035), p.second, 0.8)
    p.paint(p.ellipse(0.0, 0.64, 0.26 + 0.08 * v, 0.07), p.second, 0.8)
    edge = top + (shade - top) * ((p.y + 0.30 + height) / (2 * height)).clamp(0, 1)
    p.paint(torch.maximum((p.x.abs() - edge) * 0.9, (p.y + 0.30).abs() - height), p.body)
    p.paint(p.ellipse(0.0, -0.30 + height, shade, 0.05), p.tint(1.0, 0.95, 0.7))


def _flower(p: _Sheet, s: Tensor, t: Tensor, u: Tensor, v: Tensor) -> None:
    radius, petal, long = 0.27 + 0.06 * s, 0.15 + 0.035 * t, 0.75 + 0.25 * u
    green = p.tint(0.15, 0.55, 0.2)
    p.paint(p.line(0.0, -0.2, 0.06 * v, 0.75, 0.03), green)
    p.paint(p.ellipse(0.17, 0.45, 0.17, 0.07), green, 0.9)
    count = torch.where(v > 0, 6.0, 8.0)
    for k in range(8):
        angle = k * 6.2832 / count
        cx, cy = radius * angle.cos(), radius * angle.sin() - 0.25
        along = (p.x - cx) * angle.cos() + (p.y - cy) * angle.sin()
        across = -(p.x - cx) * angle.sin() + (p.y - cy) * angle.cos()
        leaf = (((along / (petal / long)) ** 2 + (across / (petal * long)) ** 2 + 1e-6).sqrt() - 1) * petal * 0.7
        p.paint(torch.where(k < count, leaf, torch.ones_like(leaf)), p.body)
    p.paint(p.ellipse(0.0, -0.25, radius * 0.55, radius * 0.55), p.second)


def _robot(p: _Sheet, s: Tensor, t: Tensor, u: Tensor, v: Tensor) -> None:
    head, body, arm = 0.24 + 0.06 * s, 0.31 + 0.07 * t, 0.30 + 0.10 * u
    p.paint(p.line(0.0, -0.62, 0.0, -0.85, 0.02), p.grey(0.35))
    p.paint(p.ellipse(0.0, -0.85, 0.05, 0.05), p.second)
    for side in (-1, 1):
        p.paint(p.line(side * body, -0.05, side * (body + 0.16), -0.05 + arm, 0.06), p.second, 0.9)
        p.paint(p.box(side * body * 0.5, 0.62, 0.09, 0.18, 0.02), p.second, 0.8)
    p.paint(p.box(0.0, 0.16, body, 0.33, 0.04), p.body)
    p.paint(p.box(0.0, -0.42, head + 0.04, 0.22, 0.05), p.first, 0.9)
    for side in (-1, 1):
        p.paint(p.ellipse(side * head * 0.5, -0.46, 0.07 + 0.02 * v, 0.07 + 0.02 * v), p.tint(0.95, 0.95, 0.75))
        p.paint(p.ellipse(side * head * 0.5, -0.46, 0.03, 0.03), p.grey(0.05))
    p.paint(p.box(0.0, -0.30, head * 0.6, 0.025, 0.0), p.grey(0.1))


def _boat(p: _Sheet, s: Tensor, t: Tensor, u: Tensor, v: Tensor) -> None:
    length, sail, lean = 0.58 + 0.12 * s, 0.62 + 0.12 * t, 0.36 + 0.12 * u
    p.paint(p.line(0.0, 0.3, 0.0, -0.75, 0.025), p.tint(0.45, 0.3, 0.18))
    y = (p.y + 0.72) / sail
    p.paint(torch.maximum(torch.maximum(0.03 - p.x, p.x - 0.03 - lean * y), p.y + 0.72 - sail), p.body)
    jib = torch.maximum(torch.maximum(p.x + 0.04, -0.04 - (lean - 0.08) * y * (0.8 + 0.2 * v) - p.x), p.y + 0.72 - sail)
    p.paint(jib, p.second, 0.95)
    depth = 0.24
    hull = torch.maximum((p.x.abs() - length + 0.55 * (p.y - 0.16)) * 0.85, (p.y - 0.16 - depth / 2).abs() - depth / 2)
    p.paint(hull, p.first, 0.8)


def _clock(p: _Sheet, s: Tensor, t: Tensor, u: Tensor, v: Tensor) -> None:
    radius, rim = 0.52 + 0.08 * s, 0.09 + 0.03 * t
    for side in (-1, 1):
        p.paint(p.ellipse(side * radius * 0.62, -radius * 0.92, 0.15, 0.12), p.second, 0.85)
        p.paint(p.line(side * radius * 0.5, radius * 0.8, side * radius * 0.7, radius + 0.16, 0.05), p.second, 0.7)
    p.paint(p.ellipse(0.0, 0.0, radius, radius), p.body)
    p.paint(p.ellipse(0.0, 0.0, radius - rim, radius - rim), p.grey(0.96))
    for k in range(12):
        angle = torch.tensor(k * 6.2832 / 12)
        inner, outer = (radius - rim) * 0.80, (radius - rim) * 0.93
        p.paint(
            p.line(inner * angle.sin(), inner * angle.cos(), outer * angle.sin(), outer * angle.cos(), 0.014),
            p.grey(0.1),
        )
    for reach, angle, width in ((0.5, 3.0 * u, 0.035), (0.72, 3.0 * v, 0.024)):
        end = (radius - rim) * reach
        p.paint(p.line(0.0, 0.0, end * angle.sin(), -end * angle.cos(), width), p.grey(0.05))


def _umbrella(p: _Sheet, s: Tensor, t: Tensor, u: Tensor, v: Tensor) -> None:
    radius, dome = 0.62 + 0.10 * s, 0.46 + 0.10 * t
    p.paint(p.line(0.0, -0.55, 0.0, 0.55, 0.028), p.second, 0.7)
    hook = torch.maximum(p.ring(0.12, 0.55, 0.12 + 0.02 * u, 0.028), 0.55 - p.y)
    p.paint(hook, p.second, 0.7)
    scallop = 0.05 * (1.2 + 0.4 * v) * ((p.x / radius * 3 * 3.1416).cos().abs())
    p.paint(torch.maximum(p.ellipse(0.0, 0.0, radius, dome + 0.1), p.y + scallop - 0.02), p.body)
    p.paint(p.line(0.0, -dome - 0.08, 0.0, -dome - 0.20, 0.02), p.second, 0.7)


# In the order of CLASSES.
_DRAW: tuple[Callable[[_Sheet, Tensor, Tensor, Tensor, Tensor], None], ...] = (
    _mug,
    _car,
    _fish,
    _house,
    _lamp,
    _flower,
    _robot,
    _boat,
    _clock,
    _umbrella,
)
