"""What is the null text: the encoding of an empty prompt, as workflows have it, or zeros, as the paper trains with?

Both without a reference, with the image prompt, with KV injection and the guider too, and under lookahead guidance.
Writes null_text.md, .json and .jpg.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from ...lookahead.method.guidance_presets import BALANCED, INSTANT
from . import guidance
from .against import compared, is_clear, marked, measured
from .drawing import BOTH, MEASURED_WITH, ReferenceArm, draw
from .guidance import GuidanceArm
from .study import SIMILARITY, STYLE, Table, render, sheet, write_page

AnyArm = TypeVar("AnyArm", ReferenceArm, GuidanceArm)

EMPTY, ZEROS = "empty prompt", "zeros"
NULL_TEXTS = {EMPTY: False, ZEROS: True}
ARMS = {"nothing": ReferenceArm(), "image prompt": ReferenceArm(image_prompt=1.0), "image prompt + KV": BOTH}
STYLES = ("photo", "comic")
GUIDED = {guidance.NONE: GuidanceArm()} | {
    f"guidance, {preset}": GuidanceArm(guidance.LOOKAHEAD, {"preset": preset}) for preset in (INSTANT, BALANCED)
}
GUIDED_PEOPLE = range(300, 348)  # the numbers of those who are steered to; they are in no other study


def with_both(arms: Mapping[str, AnyArm]) -> dict[str, AnyArm]:
    """Each arm under both null texts: "<arm>, <null text>"."""
    return {
        f"{name}, {text}": replace(arm, zeros=zeros) for name, arm in arms.items() for text, zeros in NULL_TEXTS.items()
    }


def change_of(arm: str) -> str:
    """The name under which figures have what zeros change of an arm."""
    return f"{arm}, {ZEROS} - {EMPTY}"


def measure(faces: Tensor, drawn: Mapping[str, Tensor], arms: Sequence[str], styles: Sequence[Sequence[str]]) -> Table:
    """Gives the figures of each of `arms` under both null texts, and by `change_of` their paired difference.

    faces: [n, 3, H, W]; drawn: by `with_both` [n, pictures, 3, H, W], both in [0, 1]; styles: those that the prompts
    ask for, by person and picture.
    """
    found = measured(faces, drawn, styles)
    values = {arm: {name: of_arm[name] for name in (SIMILARITY, STYLE)} for arm, of_arm in found.items()}
    return compared(values, {change_of(arm): (f"{arm}, {ZEROS}", f"{arm}, {EMPTY}") for arm in arms})


def page(figures: Table, references: int, guided: range = GUIDED_PEOPLE) -> str:
    """docs/null_text.md. guided: the numbers of the people whom guidance steers to."""

    arms, names = [*ARMS, *GUIDED], (SIMILARITY, STYLE)

    def change(arm: str, name: str) -> str:
        return marked(figures, change_of(arm), name)

    def within(of: Sequence[str], name: str) -> float:
        """The smallest hundredth that no change of these arms reaches, by their intervals."""
        ends = (abs(end) for arm in of for end in figures[change_of(arm)][name][1:])
        return (math.floor(100 * max(ends)) + 1) / 100

    return render(
        "null_text.md.jinja",
        figures=figures,
        tables={"arms": list(ARMS), "guided": list(GUIDED)},
        texts=list(NULL_TEXTS),
        names=names,
        change=change,
        within=within,
        beyond=[f"{name} of {arm}" for arm in arms for name in names if is_clear(figures, change_of(arm), name)],
        references=references,
        guided=guided,
        styles=STYLES,
        guided_with={"sampler": guidance.SAMPLER, "scheduler": guidance.SCHEDULER, "steps": guidance.STEPS},
        **MEASURED_WITH,
    )


def evaluate(references: int, out: Path, guided: range = GUIDED_PEOPLE) -> None:
    """Draw, measure and write null_text.md, .json and .jpg (of the guided) into `out`."""
    targets, steered, _ = guidance.draw(guidance.IDENTITY, with_both(GUIDED), len(guided), guided.start)
    asked = [[guidance.style_of(number // guidance.BATCH)] for number in range(len(guided))]
    faces, drawn = draw(references, with_both(ARMS), STYLES)
    figures = measure(faces, drawn, list(ARMS), [STYLES] * references)
    figures |= measure(targets, {arm: pictures[:, None] for arm, pictures in steered.items()}, list(GUIDED), asked)
    write_page(out, "null_text", figures, page(figures, references, guided))
    sheet({"reference": targets, **steered}, out / "null_text.jpg")
