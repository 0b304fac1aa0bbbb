"""Figure 2 of the paper on the mini world, from the shipped files: what a one-step preview foresees, and when."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from ...evaluation.pages import templates
from ...evaluation.stats import Interval
from ..stages import style_lora
from . import measure_few_step
from .measure_few_step import DDIM_STEPS, METHODS, SHARES

PROMPTS = ["a photo of a face in a forest", "a pencil drawing of a face", "a comic of a face at night"]
NAME = "previews"  # of the page and its files
WITHOUT_PROMPT = "without a prompt"


def write(out: Path, count: int) -> Path:
    """Measure and write previews.md, .json and two pictures into `out`; returns the page's path.

    count: prompts, each a held-out person's caption with noise of its own; of base and LCM-LoRA alone, of both with the
    LoRA of one person, and as many runs without a prompt.
    """
    world = measure_few_step.shipped_world()
    out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, dict[str, Interval]] = {}
    for name, personal in {"base": False, "with a personal LoRA": True}.items():
        found = measure_few_step.previews(world, count, personal=personal)
        figures[name] = {_without_time(key): value for key, value in found.items()}
        prompts = [style_lora.named(p) for p in PROMPTS] if personal else PROMPTS
        drawn = out / f"{NAME}_{name.split()[-1].lower()}.png"
        measure_few_step.draw_previews(world, prompts, drawn, personal=personal)
        with Image.open(drawn) as image:
            image.convert("RGB").save(drawn.with_suffix(".jpg"), quality=88)
        drawn.unlink()
    found = measure_few_step.contents(world, count)
    figures[WITHOUT_PROMPT] = {_without_time(key): value for key, value in found.items()}
    (out / f"{NAME}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (out / f"{NAME}.md").write_text(page(figures, count), encoding="utf-8")
    return out / f"{NAME}.md"


def page(figures: Mapping[str, Mapping[str, Interval]], count: int) -> str:
    """previews.md."""
    pages = templates(Path(__file__).parent)
    return pages.get_template("previews.md.jinja").render(
        figures={name: found for name, found in figures.items() if name != WITHOUT_PROMPT},
        without=figures.get(WITHOUT_PROMPT),
        shares=[f"{share:.0%}" for share in SHARES],
        methods=METHODS,
        count=count,
        steps=DDIM_STEPS,
    )


def _without_time(key: str) -> str:
    """ "10% (t=881), x0: latent MSE" -> "10%, x0: latent MSE"."""
    share, rest = key.split(" (", 1)
    return f"{share},{rest.split('),', 1)[1]}"
