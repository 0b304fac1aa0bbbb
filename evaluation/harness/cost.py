"""A dry run: files, pictures, work, disk and GPU hours of an evaluation, with nothing loaded and nothing drawn.

The work is counted, not guessed: UNet and decoder are run once on torch's meta device at the size of the protocol.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from ...sdxl import configs
from ...trainer.ledger import Ledger
from ...trainer.lookahead.estimate import CARDS, USED
from .library import EvaluationError, Library
from .methods import METHODS, Method, PictureWork
from .protocol import Protocol

BYTES_A_PIXEL = 1.6  # of a PNG, as photographs have
PICTURE = "pictures"
FILES = ("base", "image_encoder", "few_step", "pack", "file", "noise_guide", "recogniser", "clip", "lpips")


@dataclass(frozen=True)
class EvaluationCost:
    """Holds what an evaluation costs.

    arms: by method, arms, pictures and FLOP of a picture; files: field, name, bytes or None where it is not there;
    disk: bytes by part.
    """

    arms: dict[str, tuple[int, int, float]]
    files: list[tuple[str, str, int | None]]
    disk: dict[str, float]

    @property
    def flop(self) -> float:
        """All work, in FLOP."""
        return sum(pictures * each for _, pictures, each in self.arms.values())

    def hours(self, tflops: float) -> tuple[float, float]:
        """GPU hours on a card of that many TFLOP/s: where it is used well, and where badly."""
        seconds = self.flop / (tflops * 1e12)
        return seconds / USED[1] / 3600, seconds / USED[0] / 3600


def cost(
    protocol: Protocol, library: Library, people: int, methods: dict[str, type[Method]] | None = None
) -> EvaluationCost:
    """The cost of a protocol with so many people. Its files need not be there."""
    parsed = protocol.parsed_methods({**METHODS, **(methods or {})})
    drawing = protocol.drawing
    unet, decoder = work_of_a_pass(drawing.size)
    works: dict[str, PictureWork] = {}
    each = people * len(protocol.prompt_list()) * len(protocol.seeds)
    arms = {}
    for name, method in sorted(parsed.items(), key=lambda pair: pair[1].LATE):
        works[name] = method.work(drawing.steps, works)
        count = len(method.weights)
        needed = [parsed[n] for n in (name, *method.related())]
        backends = sum(all(b in one.drawn_by() for one in needed) for b in protocol.backends)
        arms[name] = (count, count * each * backends, works[name].unet * unet + works[name].decoder * decoder)
    pictures = sum(count for _, count, _ in arms.values())
    disk = {PICTURE: pictures * drawing.size**2 * BYTES_A_PIXEL, "references": people * 2e6}
    disk["scores"] = pictures * len(protocol.measures) * 200.0
    return EvaluationCost(arms, list(_files(protocol, library)), disk)


@functools.lru_cache(maxsize=4)
def work_of_a_pass(size: int) -> tuple[float, float]:
    """FLOP of one row through SDXL's UNet, and of one picture through its decoder, at `size` pixels a side."""
    side = size // 8
    with torch.device("meta"):
        unet: UNet2DConditionModel = configs.unet()
        vae = AutoencoderKL(**{k: v for k, v in configs.VAE.items() if not k.startswith("_")})
        x, t = torch.empty(1, 4, side, side), torch.ones(1)
        context, pooled, ids = torch.empty(1, 77, 2048), torch.empty(1, 1280), torch.empty(1, 6)
    counted = []
    with torch.no_grad():
        for run in (
            lambda: unet(x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}),
            lambda: vae.decode(x),
        ):
            with Ledger([*unet.parameters(), *vae.parameters()]) as ledger:
                run()
            counted.append(float(ledger.work))
    return counted[0], counted[1]


def _files(protocol: Protocol, library: Library) -> Iterator[tuple[str, str, int | None]]:
    """Every file that the protocol names: field, name, bytes."""
    sections: dict[str, dict[str, Any]] = {"models": protocol.models.model_dump()}
    sections |= {f"methods.{name}": values for name, values in protocol.methods.items()}
    sections |= {f"measures.{name}": values for name, values in protocol.measures.items()}
    known = {*library.embedders, *library.scorers, *library.known_packs, "random"}
    seen = set()
    for section, values in sections.items():
        nested = {**(values.get("by") or {}), **(values.get("guidance") or {})}
        for field, name in {**nested, **values}.items():
            wanted = field in FILES
            if not wanted or not isinstance(name, str) or name in known or name in seen:
                continue
            seen.add(name)
            try:
                path = library.find(field, name)
            except EvaluationError:
                yield f"{section}.{field}", name, None
            else:
                yield f"{section}.{field}", name, _bytes(path)


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def text(protocol: Protocol, found: EvaluationCost, command: str, card: str | None = None) -> str:
    """The dry run as text. Raises EvaluationError for a card that is not known."""
    if card is not None and card not in CARDS:
        raise EvaluationError(f"--card is {card}, and known are {', '.join(CARDS)}: use one of these.")
    lines = [protocol.title, "", "Files"]
    for field, name, size in found.files:
        lines.append(f"  {'is there, ' + _size(size) if size is not None else 'MISSING':>18}  {field}: {name}")
    lines += ["", "Commands", f"  {command}", f"  {command} --worker 0/4   (and 1/4, 2/4, 3/4: on as many GPUs)"]
    width = max(26, *map(len, found.arms))
    lines += ["", f"{'Pictures':<{width + 2}} arms  pictures  TFLOP a picture"]
    for name, (arms, pictures, flop) in found.arms.items():
        lines.append(f"  {name:<{width}} {arms:>4} {pictures:>9}  {flop / 1e12:>15.1f}")
    total = sum(pictures for _, pictures, _ in found.arms.values())
    lines.append(f"  {'in all':<{width}} {'':>4} {total:>9}  {found.flop / max(1, total) / 1e12:>15.1f}")
    disk = ", ".join(f"{part} {_size(size)}" for part, size in found.disk.items())
    lines += [
        "",
        f"Disk: {_size(sum(found.disk.values()))} ({disk})",
        "",
        "GPU hours, counted at 25 to 45 % of the peak",
    ]
    for name in [card] if card else CARDS:
        low, high = found.hours(CARDS[name][1])
        lines.append(f"  {name:<10} {low:.1f} to {high:.1f}")
    return "\n".join(lines)


def _size(size: float | None) -> str:
    value = float(size or 0)
    return f"{value / 1e9:.1f} GB" if value >= 1e8 else f"{value / 1e6:.2f} MB"
