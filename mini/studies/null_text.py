"""What is the null text: the encoding of an empty prompt, as workflows have it, or zeros, as the paper trains with?

Both without a reference, with the image prompt, and with KV injection and the guider too. Writes null_text.md, .json.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from .drawing import BOTH, MEASURED_WITH, ReferenceArm, draw
from .reference import measure
from .study import SIMILARITY, STYLE, Table, render, write_page

NULL_TEXTS = {"empty prompt": False, "zeros": True}
ARMS = {"nothing": ReferenceArm(), "image prompt": ReferenceArm(image_prompt=1.0), "image prompt + KV": BOTH}
STYLES = ("photo", "comic")


def page(figures: Table, references: int) -> str:
    """docs/null_text.md."""
    rows = [(arm, text) for arm in ARMS for text in NULL_TEXTS]
    setup = {"rows": rows, "references": references, "styles": STYLES, **MEASURED_WITH}
    return render("null_text.md.jinja", figures=figures, **setup)


def evaluate(references: int, out: Path) -> None:
    """Draw, measure and write null_text.md and .json into `out`."""
    arms = {f"{arm}, {name}": replace(a, zeros=zeros) for arm, a in ARMS.items() for name, zeros in NULL_TEXTS.items()}
    found, _ = measure(*draw(references, arms, STYLES), STYLES)
    figures = {arm: {name: of_arm[name] for name in (SIMILARITY, STYLE)} for arm, of_arm in found.items()}
    write_page(out, "null_text", figures, page(figures, references))
