"""The gate of the things: does the base draw each class, so that a judge who took no part in its training names it?

Nothing is trained on things before this holds: a concept encoder over a base that cannot draw a mug says nothing.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from ..files import models
from ..files.weights import thing_judge
from ..stages import base, stage, things
from ..world.faces import PLACES, STYLES
from ..world.sheet import save_grid
from ..world.things import CLASSES
from .measure import STEPS, sample

GATE = 0.9  # share of samples in which the judge must name the class, of every class
SEED, CHUNK = 26, 24
_ROW = 8  # pictures of a class on the sheet


def prompts_of(kind: int, count: int) -> list[str]:
    """`count` prompts of one class in the form of the captions, styles and places in turn."""
    noun = CLASSES[kind]
    named = [f"{_article(STYLES[n % len(STYLES)])} of {_article(noun)} {PLACES[n % len(PLACES)]}" for n in range(count)]
    return [name.strip() for name in named]


@torch.no_grad()
def check(lora: Path, judge: Path, samples: int, sheet: Path | None = None, steps: int = STEPS) -> dict[str, float]:
    """Measures by class which share of `samples`, drawn by the base with the LoRA `lora`, the judge names rightly.

    sheet: a PNG to write, a row a class; steps: of DDIM. Raises FileNotFoundError where a stage has not ended yet.
    """
    for path in (lora, judge):
        if not path.is_file():
            raise FileNotFoundError(f"There is no {path}: run `lookahead mini build --only {path.stem}` to its end.")
    unet, text, vae = models.load()
    things.merge(stage.read_tensors(lora), unet, text)
    net = thing_judge(judge)
    named, shown = {}, []
    for kind, noun in enumerate(CLASSES):
        numbers, said, pictures = torch.Generator().manual_seed(SEED + kind), [], []
        prompts = prompts_of(kind, samples)
        for start in range(0, samples, CHUNK):
            latents = sample(partial(base.predict, unet), text, prompts[start : start + CHUNK], numbers, steps)
            drawn = ((vae.decoder(latents) + 1) / 2).clamp(0, 1)
            said.append(net.kinds(drawn) == kind)
            pictures.append(drawn)
        named[noun] = float(torch.cat(said).float().mean())
        shown.append(torch.cat(pictures)[:_ROW])
        print(f"{noun}: {named[noun]:.0%} of {samples} named", flush=True)
    if sheet is not None:
        save_grid(torch.cat(shown), min(_ROW, samples), sheet)
    return named


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
