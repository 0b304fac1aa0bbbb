"""What is behind a drawn face (places) and how the picture is made (styles). Batched torch, values in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Factors = dict[str, Tensor]  # of variation, by name: [n] or [n, numbers] of n pictures
LUMA = (0.30, 0.59, 0.11)


def draw_place(b: Factors, size: int) -> Tensor:
    """Backgrounds [n, 3, size, size] for the `place` of each picture; 0 is a plain colour."""
    n, device = len(b["place"]), b["place"].device
    axis = (torch.arange(size, device=device) + 0.5) * 2 / size - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    picture = b["background"][:, :, None, None].expand(n, 3, size, size).clone()
    for index, place in enumerate((_forest, _beach, _city, _night, _snow), start=1):
        rows = (b["place"] == index).nonzero()[:, 0]
        if len(rows):
            phases = (b[k][rows].view(-1, 1, 1) for k in ("phase_a", "phase_b"))
            picture[rows] = place(_Scene(x, y, len(rows), 2 / size), *phases)
    return picture


class _Scene:
    """A stack of flat layers over the picture's plane."""

    def __init__(self, x: Tensor, y: Tensor, n: int, pixel: float):
        self.x, self.y, self.pixel = x.expand(n, *x.shape), y.expand(n, *y.shape), pixel
        self.picture = torch.zeros(n, 3, *x.shape, device=x.device)

    def add(self, coverage: Tensor | float, *colour: float) -> None:
        layer = torch.tensor(colour, device=self.x.device).view(1, 3, 1, 1)
        coverage = coverage[:, None] if isinstance(coverage, Tensor) else coverage
        self.picture = self.picture + coverage * (layer - self.picture)

    def inside(self, distance: Tensor) -> Tensor:
        return (0.5 - distance / (1.3 * self.pixel)).clamp(0, 1)


def _forest(s: _Scene, a: Tensor, b: Tensor) -> Tensor:
    s.add(1.0, 0.55, 0.75, 0.45)
    s.add((((s.x * 9 + a).sin() * 0.7 + (s.x * 17 + b).sin() * 0.3) * 3).clamp(0, 1), 0.28, 0.18, 0.10)
    s.add(((-0.3 + 0.12 * (s.x * 11 + b).sin() - s.y) * 8).clamp(0, 1), 0.08, 0.38, 0.12)
    return s.picture


def _beach(s: _Scene, a: Tensor, b: Tensor) -> Tensor:
    s.add(1.0, 0.55, 0.80, 0.98)
    s.add(s.inside(-0.1 - s.y), 0.10, 0.45, 0.75)
    s.add(s.inside(0.35 + 0.05 * (s.x * 6 + a).sin() - s.y), 0.95, 0.85, 0.60)
    s.add(s.inside(((s.x - 0.7 * a.sin()) ** 2 + (s.y + 0.75) ** 2).sqrt() - 0.16), 1.0, 0.95, 0.4)
    return s.picture


def _city(s: _Scene, a: Tensor, b: Tensor) -> Tensor:
    s.add(1.0, 0.75, 0.78, 0.82)
    height = ((((s.x + 1) * 3.5 + a).floor() * 12.9898 + b).sin() * 43758.5) % 1
    houses = s.inside(-0.75 + 0.9 * height - s.y)
    s.add(houses, 0.42, 0.42, 0.48)
    s.add(houses * ((s.x * 22).sin() > 0.2) * ((s.y * 22).sin() > 0.2) * 0.9, 0.95, 0.88, 0.5)
    return s.picture


def _night(s: _Scene, a: Tensor, b: Tensor) -> Tensor:
    s.add(1.0, 0.04, 0.05, 0.16)
    stars = ((s.x * 37 + a * 5).sin() * (s.y * 41 + b * 7).sin() > 0.93).float()
    s.add(stars, 0.95, 0.95, 0.8)
    s.add(s.inside(((s.x - 0.7 * a.cos()) ** 2 + (s.y + 0.7) ** 2).sqrt() - 0.17), 0.93, 0.93, 0.85)
    return s.picture


def _snow(s: _Scene, a: Tensor, b: Tensor) -> Tensor:
    s.add(1.0, 0.80, 0.87, 0.95)
    s.add(s.inside(0.25 + 0.10 * (s.x * 3 + a).sin() - s.y), 0.98, 0.98, 1.0)
    tree = ((s.x * 3.2 + a) % 2 - 1).abs()
    s.add(((s.y > -0.55 + tree * 0.9) & (s.y < 0.25)).float(), 0.20, 0.38, 0.32)
    return s.picture


def blur(picture: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of [n, c, h, w]; sigma in pixels."""
    channels, radius = picture.shape[1], max(1, int(3 * sigma + 0.5))
    offset = torch.arange(-radius, radius + 1, device=picture.device, dtype=picture.dtype)
    kernel = torch.exp(-(offset**2) / (2 * sigma * sigma))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1).repeat(channels, 1, 1, 1)
    picture = F.conv2d(F.pad(picture, (radius, radius, 0, 0), mode="replicate"), kernel, groups=channels)
    kernel = kernel.transpose(2, 3)
    return F.conv2d(F.pad(picture, (0, 0, radius, radius), mode="replicate"), kernel, groups=channels)


def stylise(picture: Tensor, style: Tensor, generator: torch.Generator) -> Tensor:
    """Redraw photos [n, 3, h, w] in the style of each row (an index into STYLES)."""
    out = picture.clone()
    for index, redraw in enumerate(_STYLES):
        rows = (style == index).nonzero()[:, 0]
        if len(rows):
            out[rows] = redraw(_Sheet(picture[rows], generator)).clamp(0, 1)
    return out


class _Sheet:
    """A batch of photos with what every style needs of them."""

    def __init__(self, photo: Tensor, generator: torch.Generator):
        self.photo, self._generator = photo, generator
        self.n, self.size = len(photo), photo.shape[-1]
        axis = torch.linspace(-1, 1, self.size, device=photo.device)
        self.y, self.x = torch.meshgrid(axis, axis, indexing="ij")
        self.luma = (photo * self.colour(*LUMA)).sum(1, keepdim=True)
        p = F.pad(photo, (1, 1, 1, 1), mode="replicate")
        across, down = p[:, :, 1:-1, 2:] - p[:, :, 1:-1, :-2], p[:, :, 2:, 1:-1] - p[:, :, :-2, 1:-1]
        self.edges = (across**2 + down**2).sum(1, keepdim=True).sqrt()

    def colour(self, *rgb: float) -> Tensor:
        return torch.tensor(rgb, device=self.photo.device).view(1, 3, 1, 1)

    def noise(self, channels: int, cells: int | None = None) -> Tensor:
        side = cells or self.size
        drawn = torch.randn(self.n, channels, side, side, generator=self._generator, device=self.photo.device)
        return drawn if cells is None else F.interpolate(drawn, size=(self.size, self.size), mode="nearest")


def _photo(s: _Sheet) -> Tensor:
    return s.photo + s.noise(3) * 0.012


def _pencil(s: _Sheet) -> Tensor:
    hatch = ((s.x + s.y) * 38).sin() * 0.5 + 0.5
    grey = 1 - 1.1 * s.edges.clamp(0, 0.8) - 0.26 * hatch * (1 - s.luma) + s.noise(1) * 0.015
    return grey * s.colour(1.0, 0.99, 0.96)


def _oil(s: _Sheet) -> Tensor:
    strokes = torch.stack([s.x, s.y], -1) + s.noise(2, 24).permute(0, 2, 3, 1) * 0.018
    smeared = F.grid_sample(blur(s.photo, 1.2), strokes, align_corners=True, padding_mode="border")
    grey = smeared.mean(1, keepdim=True)
    return (grey + (smeared - grey) * 1.5) * 1.02 + s.noise(1, 24) * 0.03


def _comic(s: _Sheet) -> Tensor:
    grey = s.photo.mean(1, keepdim=True)
    flat = ((grey + (s.photo - grey) * 1.9) * 3).round() / 3
    return flat * (1 - (s.edges * 1.5 - 0.35).clamp(0, 0.9))


def _pixel(s: _Sheet) -> Tensor:
    coarse = F.avg_pool2d(s.photo, max(1, s.size // 32))
    return (F.interpolate(coarse, size=(s.size, s.size), mode="nearest") * 5).round() / 5


def _blueprint(s: _Sheet) -> Tensor:
    lines = s.edges.clamp(0, 1) + 0.18 * (s.luma - 0.5)
    grid = (((s.x * 24).sin().abs() < 0.12) | ((s.y * 24).sin().abs() < 0.12)).float()
    return s.colour(0.05, 0.18, 0.50) + lines * s.colour(0.9, 0.8, 0.5) + grid * 0.06


def _wanted(s: _Sheet) -> Tensor:
    tone = 0.15 + 0.75 * ((s.luma - 0.5) * 1.3 + 0.5).clamp(0, 1)
    border = ((s.x.abs() > 0.88) | (s.y.abs() > 0.88)).float() * 0.9
    paper = tone * s.colour(1.05, 0.85, 0.58) + s.noise(1) * 0.02
    return paper * (1 - border) + border * s.colour(0.36, 0.24, 0.12)


def _neon(s: _Sheet) -> Tensor:
    tubes = blur((s.edges - 0.12).clamp(0, 1) * 1.6, 0.8)
    return tubes * (0.55 + 0.45 * (s.colour(0.0, 2.1, 4.2) + 3.0 * s.y + 1.0).sin()) + 0.03


# In the order of faces.STYLES.
_STYLES: tuple[Callable[[_Sheet], Tensor], ...] = (
    _photo,
    _pencil,
    _oil,
    _comic,
    _pixel,
    _blueprint,
    _wanted,
    _neon,
)
