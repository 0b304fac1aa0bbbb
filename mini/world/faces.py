"""Procedural faces: who a person is (identity), how a picture of them differs (nuisance), drawing, landmarks, captions.

Everything is batched torch on any device. A face is painted back to front from signed distances, so that edges are
smooth at any picture size. Coordinates run from -1 to 1, x to the right, y downwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .styles import Factors, draw_place, stylise

STYLES = ("photo", "pencil drawing", "oil painting", "comic", "pixel art", "blueprint", "wanted poster", "neon sign")
PLACES = ("", "in a forest", "on a beach", "in a city", "at night", "in the snow")

SKIN_NAMES = ("pale", "light", "tan", "brown", "dark")
HAIR_COLOUR_NAMES = ("black", "brown", "chestnut", "blond", "red", "grey")
HAIR_NAMES = ("bald", "short hair", "long hair", "afro hair", "a bun")
GLASSES_NAMES = ("no glasses", "round glasses", "square glasses")

SKIN = torch.tensor(
    [[0.98, 0.84, 0.74], [0.92, 0.72, 0.56], [0.78, 0.56, 0.40], [0.58, 0.38, 0.25], [0.38, 0.24, 0.16]]
)
HAIR = torch.tensor(
    [
        [0.08, 0.06, 0.05],
        [0.30, 0.18, 0.08],
        [0.55, 0.33, 0.12],
        [0.88, 0.72, 0.35],
        [0.70, 0.25, 0.10],
        [0.75, 0.75, 0.76],
    ]
)
IRIS = torch.tensor([[0.20, 0.12, 0.06], [0.15, 0.45, 0.25], [0.20, 0.45, 0.80], [0.45, 0.45, 0.48]])

# Identity: lengths are in picture half-widths, angles in slopes.
CONTINUOUS = {
    "skin": (0.0, 3.99),
    "face_width": (0.36, 0.52),
    "face_height": (0.48, 0.60),
    "jaw": (0.0, 0.55),
    "outline": (2.0, 3.4),
    "eye_distance": (0.14, 0.24),
    "eye_size": (0.065, 0.11),
    "eye_height": (-0.12, 0.0),
    "eye_opening": (0.55, 0.95),
    "eye_slant": (-0.30, 0.30),
    "brow_thickness": (0.018, 0.055),
    "brow_slope": (-0.35, 0.35),
    "brow_height": (0.045, 0.10),
    "nose_length": (0.10, 0.22),
    "nose_width": (0.045, 0.11),
    "mouth_height": (0.55, 0.68),
    "mouth_width": (0.10, 0.23),
    "lip": (0.018, 0.06),
    "ear": (0.05, 0.12),
}
DISCRETE = {  # name: probability of each value
    "hair_colour": (1 / 6,) * 6,
    "hair": (0.12, 0.25, 0.27, 0.18, 0.18),
    "iris": (0.25,) * 4,
    "glasses": (0.6, 0.2, 0.2),
    "moustache": (0.7, 0.3),
    "beard": (0.75, 0.25),
    "mole": (0.7, 0.3),
}
UNTRACKED = {"hair_tint": (-0.06, 0.06), "mole_x": (-0.3, 0.3), "mole_y": (0.05, 0.4)}  # not in identity_vector

NUISANCE = {
    "shift_x": (-0.08, 0.08),
    "shift_y": (-0.02, 0.10),
    "scale": (1.10, 1.34),
    "rotation": (-0.12, 0.12),
    "yaw": (-1.0, 1.0),
    "light_x": (-1.0, 1.0),
    "light_y": (-1.0, 0.3),
    "light": (0.1, 0.5),
    "gain": (0.85, 1.1),
    "smile": (-1.0, 1.0),
    "phase_a": (0.0, 6.28),
    "phase_b": (0.0, 6.28),
}


class Faces(NamedTuple):
    """n pictures: who is on them and how they were taken. Every tensor has n rows."""

    identity: Factors
    nuisance: Factors

    def __len__(self) -> int:
        return len(self.identity["skin"])

    def rows(self, index: Tensor | slice) -> Faces:
        return Faces(*({k: v[index] for k, v in part.items()} for part in self))


def sample_identities(n: int, generator: torch.Generator) -> Factors:
    """n people, every parameter drawn on its own. Continuous values are float32 [n], choices int64 [n]."""
    people = {k: _uniform(n, low, high, generator) for k, (low, high) in {**CONTINUOUS, **UNTRACKED}.items()}
    for name, weights in DISCRETE.items():
        people[name] = torch.multinomial(torch.tensor(weights), n, replacement=True, generator=generator)
    return people


def sample_nuisance(
    n: int, generator: torch.Generator, style: Tensor | None = None, place: Tensor | None = None
) -> Factors:
    """Draws how n pictures are taken, also style [n] and place [n] (indices into STYLES and PLACES) unless given."""
    nuisance = {k: _uniform(n, low, high, generator) for k, (low, high) in NUISANCE.items()}
    nuisance["background"] = torch.rand(n, 3, generator=generator) * 0.6 + 0.3
    nuisance["clothes"] = torch.rand(n, 3, generator=generator)
    styles = torch.randint(len(STYLES), (n,), generator=generator)
    places = torch.randint(len(PLACES), (n,), generator=generator)
    nuisance["style"] = styles if style is None else style
    nuisance["place"] = places if place is None else place
    return nuisance


def frontal(nuisance: Factors) -> Factors:
    """Returns the same pictures taken straight on: a portrait as one would choose for a reference."""
    still = {k: torch.zeros_like(nuisance[k]) for k in ("shift_x", "rotation", "yaw")}
    return {**nuisance, **still, "scale": torch.full_like(nuisance["scale"], 1.22)}


def identity_vector(identity: Factors) -> Tensor:
    """[n, IDENTITY_SIZE]: continuous parameters scaled to [-1, 1], then every choice as -0.7 / 1.3 (one hot)."""
    scaled = [(identity[k] - low) / (high - low) * 2 - 1 for k, (low, high) in CONTINUOUS.items()]
    choices = [F.one_hot(identity[k], len(w)).float() * 2 - 0.7 for k, w in DISCRETE.items()]
    return torch.cat([torch.stack(scaled, 1), *choices], 1)


IDENTITY_SIZE = len(CONTINUOUS) + sum(len(w) for w in DISCRETE.values())


def skin_class(identity: Factors) -> Tensor:
    """[n] index into SKIN_NAMES: the nearest named tone."""
    return (identity["skin"] + 0.5).floor().long().clamp(0, len(SKIN_NAMES) - 1)


def captions(faces: Faces, long: Tensor | bool) -> list[str]:
    """One caption a picture. Long ones describe the person in words, short ones give only style, smile and place."""
    many = torch.as_tensor(long).expand(len(faces))
    identity = {k: v.tolist() for k, v in faces.identity.items()}
    nuisance = {k: faces.nuisance[k].tolist() for k in ("style", "place", "smile")}
    skin = skin_class(faces.identity).tolist()
    out = []
    for i in range(len(faces)):
        style = STYLES[nuisance["style"][i]]
        words = [f"{'an' if style[0] in 'aeiou' else 'a'} {style} of a"]
        if many[i]:
            hair = identity["hair"][i]
            colour = HAIR_COLOUR_NAMES[identity["hair_colour"][i]]
            words += [SKIN_NAMES[skin[i]], "face", "bald" if hair == 0 else f"with {colour} {HAIR_NAMES[hair]}"]
            if identity["glasses"][i]:
                words.append(f"and {GLASSES_NAMES[identity['glasses'][i]]}")
            words += [f"and a {k}" for k in ("moustache", "beard") if identity[k][i]]
        else:
            words.append("face")
        if nuisance["smile"][i] > 0.5:
            words.append("smiling")
        words.append(PLACES[nuisance["place"][i]])
        out.append(" ".join(w for w in words if w))
    return out


def landmarks(faces: Faces, size: int) -> Tensor:
    """[n, 5, 2] pixels (x, y): left eye, right eye (as seen), nose tip, mouth corners; insightface's order."""
    a, b = faces
    shift = b["yaw"] * 0.07
    mouth_y = a["face_height"] * a["mouth_height"]
    corner = mouth_y - b["smile"] * 0.07 * 0.6
    nose = torch.stack([shift * 1.6, a["eye_height"] + 0.06 + a["nose_length"]], 1)
    points = [
        torch.stack([shift - a["eye_distance"], a["eye_height"]], 1),
        torch.stack([shift + a["eye_distance"], a["eye_height"]], 1),
        nose,
        torch.stack([shift - a["mouth_width"], corner], 1),
        torch.stack([shift + a["mouth_width"], corner], 1),
    ]
    return _to_picture(torch.stack(points, 1), b, size)


def boxes(faces: Faces, size: int) -> Tensor:
    """[n, 4] pixels (x0, y0, x1, y1) around the face's outline, not counting hair and ears."""
    w, h = faces.identity["face_width"], faces.identity["face_height"]
    angle = torch.linspace(0, 6.2832, 33)[:-1]
    rim = torch.stack([w[:, None] * angle.cos(), h[:, None] * angle.sin()], -1)
    points = _to_picture(rim, faces.nuisance, size)
    return torch.cat([points.amin(1), points.amax(1)], 1)


@torch.no_grad()
def render(faces: Faces, size: int = 128, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Draw n faces: float32 [n, 3, size, size] in [0, 1]. `seed` is that of the styles' own texture."""
    a, b = ({k: v.to(device) for k, v in part.items()} for part in faces)
    canvas = _Canvas(draw_place(b, size), size)
    x0, y0 = canvas.grid
    x, y = _to_face(x0, y0, b)
    _draw_face(canvas, x, y, a, b)
    picture = (canvas.picture * _column(b["gain"])[:, None]).clamp(0, 1)
    return stylise(picture, b["style"], torch.Generator(device).manual_seed(seed))


@torch.no_grad()
def render_empty(nuisance: Factors, size: int = 128, seed: int = 0) -> Tensor:
    """Draws the same places in the same styles without a person: float32 [n, 3, size, size] in [0, 1]."""
    picture = (draw_place(nuisance, size) * _column(nuisance["gain"])[:, None]).clamp(0, 1)
    return stylise(picture, nuisance["style"], torch.Generator().manual_seed(seed))


def _uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator) * (high - low) + low


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1)


def _to_face(x: Tensor, y: Tensor, b: Factors) -> tuple[Tensor, Tensor]:
    """Picture coordinates to the upright, centred face's."""
    cos, sin, scale = (_column(v) for v in (b["rotation"].cos(), b["rotation"].sin(), b["scale"]))
    x, y = (x - _column(b["shift_x"])) / scale, (y - _column(b["shift_y"])) / scale
    return cos * x + sin * y, -sin * x + cos * y


def _to_picture(points: Tensor, b: Factors, size: int) -> Tensor:
    """The inverse of `_to_face`, in pixels: points [n, k, 2] -> [n, k, 2]."""
    cos, sin = b["rotation"].cos()[:, None], b["rotation"].sin()[:, None]
    x, y = points.unbind(-1)
    x, y = cos * x - sin * y, sin * x + cos * y
    x = x * b["scale"][:, None] + b["shift_x"][:, None]
    y = y * b["scale"][:, None] + b["shift_y"][:, None]
    return (torch.stack([x, y], -1) + 1) * size / 2


class _Canvas:
    """A batch of pictures that layers are painted on."""

    def __init__(self, picture: Tensor, size: int):
        self.picture = picture
        self.pixel = 2 / size
        axis = (torch.arange(size, device=picture.device) + 0.5) * self.pixel - 1
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        self.grid = x[None], y[None]

    def inside(self, distance: Tensor) -> Tensor:
        """Signed distance -> coverage, with an edge 1.3 pixels wide."""
        return (0.5 - distance / (1.3 * self.pixel)).clamp(0, 1)

    def paint(self, coverage: Tensor, colour: Tensor) -> None:
        """coverage [n, h, w]; colour [n, 3], or [n, 3, h, w] where it varies."""
        if colour.dim() == 2:
            colour = colour[:, :, None, None]
        self.picture = self.picture + coverage[:, None] * (colour - self.picture)


def _ellipse(x: Tensor, y: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """About the signed distance to an ellipse with half axes a and b."""
    shortest = torch.minimum(torch.as_tensor(a, device=x.device), torch.as_tensor(b, device=x.device))
    return (((x / a) ** 2 + (y / b) ** 2 + 1e-6).sqrt() - 1) * shortest


def _draw_face(canvas: _Canvas, x: Tensor, y: Tensor, a: Factors, b: Factors) -> None:
    paint, inside = canvas.paint, canvas.inside
    tone = a["skin"]
    low = tone.floor().long().clamp(0, len(SKIN) - 2)
    palette, mix = SKIN.to(tone.device), (tone - low)[:, None]
    skin = palette[low] * (1 - mix) + palette[low + 1] * mix
    shade = skin * 0.62
    hair_colour = (HAIR.to(tone.device)[a["hair_colour"]] + a["hair_tint"][:, None]).clamp(0, 1)
    hair, width, height = (_column(a[k]) for k in ("hair", "face_width", "face_height"))
    yaw = _column(b["yaw"]) * 0.07
    xf = x - yaw  # features in front move with a turn of the head

    # Behind the face: long hair, afro, bun; then neck, clothes, ears.
    long_hair = torch.maximum(x.abs() - (width + 0.13), (y + 0.05).abs() - 0.62)
    long_hair = torch.where(y < -0.1, _ellipse(x, y + 0.12, width + 0.13, 0.58), long_hair)
    curls = 0.02 * (x * 40).sin() * (y * 40).sin()
    paint(inside(long_hair) * (hair == 2), hair_colour * 0.85)
    paint(inside(_ellipse(x, y + 0.24, width + 0.22, 0.54) + curls) * (hair == 3), hair_colour * 0.9)
    paint(inside(_ellipse(x, y + height + 0.09, 0.24, 0.15)) * (hair == 4), hair_colour * 0.9)
    paint(inside(torch.maximum(x.abs() - width * 0.5, -y)), shade * 0.95)
    paint(inside(_ellipse(x, y - 1.15, 0.85, 0.45)), b["clothes"])
    ear = _column(a["ear"])
    right = _ellipse(x - width - 0.01 + yaw * 0.5, y - 0.02, ear, ear * 1.5)
    left = _ellipse(x + width + 0.01 + yaw * 0.5, y - 0.02, ear, ear * 1.5)
    paint(inside(torch.minimum(left, right)), skin * 0.9)

    # The face: a superellipse that narrows to the jaw, lit from one side.
    power = _column(a["outline"])
    jaw = (width * (1 - _column(a["jaw"]) * (y.clamp(min=0) / height))).clamp(min=0.05)
    face = inside((((x.abs() / jaw) ** power + (y.abs() / height) ** power + 1e-6) ** (1 / power) - 1) * width)
    light = 1 + _column(b["light"]) * (x * _column(b["light_x"]) + y * _column(b["light_y"]) * 0.8)
    paint(face, (skin[:, :, None, None] * light[:, None]).clamp(0, 1))
    mouth_y = height * _column(a["mouth_height"])
    chin = inside(mouth_y - 0.17 - y + 0.10 * ((xf / 0.2) ** 2).clamp(max=1))
    lips_gap = 1 - inside(_ellipse(xf, y - mouth_y, 0.10, 0.05))
    paint(face * chin * lips_gap * _column(a["beard"]) * 0.92, hair_colour)

    # Hair in front, cut along a line that depends on its kind.
    line = -height * 0.55 + 0.05
    cut = torch.where(hair == 2, line + 0.10 * xf.abs() / width, line - 0.06 + 0.20 * (xf / width) ** 2)
    cut = torch.where(hair == 1, line + 0.11 * (xf / width).clamp(-1, 1), cut)
    skull = ((x / (width + 0.05)).abs() ** 2.2 + ((y + 0.03) / (height + 0.07)).abs() ** 2.2 + 1e-6) ** (1 / 2.2) - 1
    paint(inside(torch.maximum(skull * width, y - cut)) * (hair > 0), hair_colour)

    # Eyes and brows.
    distance, eye, eye_y = (_column(a[k]) for k in ("eye_distance", "eye_size", "eye_height"))
    gaze = _column(b["yaw"]) * 0.01
    white, black = torch.full_like(skin, 0.97), torch.full_like(skin, 0.02)
    opening, slant = eye * _column(a["eye_opening"]), _column(a["eye_slant"])
    for side in (-1, 1):
        ex = xf - side * distance
        ey = y - eye_y + slant * ex * side
        eyeball = inside(_ellipse(ex, ey, eye * 1.25, opening))
        paint(eyeball, white)
        paint(eyeball * inside(_ellipse(ex - gaze, ey, eye * 0.66, eye * 0.66)), IRIS.to(tone.device)[a["iris"]])
        paint(eyeball * inside(_ellipse(ex - gaze, ey, eye * 0.30, eye * 0.30)), black)
        lid = (ey + opening - 0.6 * opening * (ex / eye / 1.25) ** 2).abs() - 0.010
        paint(inside(lid) * (ex.abs() < eye * 1.3) * 0.8, shade * 0.4)
        brow = y - eye_y + opening + _column(a["brow_height"]) + _column(a["brow_slope"]) * ex * side
        brow = torch.maximum(brow.abs() - _column(a["brow_thickness"]), ex.abs() - eye * 1.45)
        paint(inside(brow), hair_colour * 0.75)

    # Nose, mouth, moustache, mole.
    length, nose = _column(a["nose_length"]), _column(a["nose_width"])
    nose_y, nose_x = eye_y + 0.06 + length, xf - yaw * 0.6
    bridge = torch.maximum((nose_x - 0.25 * nose).abs() - 0.016, (y - nose_y + length * 0.5).abs() - length * 0.5)
    paint(inside(bridge) * 0.55, shade)
    paint(inside(_ellipse(nose_x, y - nose_y, nose, nose * 0.45)) * 0.8, skin * 0.72)
    mouth, lip = _column(a["mouth_width"]), _column(a["lip"])
    curve = y - mouth_y + _column(b["smile"]) * 0.07 * ((xf / mouth) ** 2 - 0.4)
    lips = skin * torch.tensor([0.82, 0.45, 0.45], device=tone.device)
    paint(inside(torch.maximum(curve.abs() - lip, xf.abs() - mouth)), lips)
    paint(inside(torch.maximum(curve.abs() - 0.010, xf.abs() - mouth)), lips * 0.35)
    moustache = torch.maximum((y - mouth_y + 0.085 - 0.25 * xf.abs()).abs() - 0.033, xf.abs() - mouth * 0.95)
    paint(inside(moustache) * _column(a["moustache"]), hair_colour * 0.8)
    mole = ((xf - _column(a["mole_x"]) * 0.8) ** 2 + (y - _column(a["mole_y"]) * 0.8) ** 2).sqrt() - 0.032
    paint(inside(mole) * _column(a["mole"]), torch.full_like(skin, 0.12))

    # Glasses: rims, then the bridge and the arms.
    kind, frame = _column(a["glasses"]), torch.full_like(skin, 0.06)
    radius = (distance - 0.015).clamp(max=0.17)
    for side in (-1, 1):
        ex, ey = xf - side * distance, y - eye_y - 0.01
        square = torch.maximum(ex.abs() - radius, ey.abs() - radius * 0.75)
        rim = torch.where(kind == 1, (ex**2 + ey**2 + 1e-6).sqrt() - radius, square)
        paint(inside(rim.abs() - 0.020) * (kind > 0), frame)
    arms = torch.maximum((y - eye_y + 0.02).abs() - 0.014, (xf.abs() - distance).abs() - (width - distance))
    visible = (kind > 0) & ((xf.abs() - distance).abs() > radius) & (xf.abs() < width)
    paint(inside(arms) * visible, frame)
