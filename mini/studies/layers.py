"""What do the finer settings do: the presets by layer of the image prompt, and AdaIN in KV injection?

Each against the same arm without it, person by person. Writes layers.md, layers.json and layers.jpg.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ...lookahead.method.layer_weights import BOTH as STYLE_AND_COMPOSITION
from ...lookahead.method.layer_weights import COMPOSITION, EVEN, LIKENESS
from ...lookahead.method.layer_weights import STYLE as STYLE_LAYER
from .against import COLOUR, compared, marked, measured
from .drawing import KV, MEASURED_WITH, NO_ADAIN, TO_PICTURE, TO_REFERENCE, ReferenceArm, draw
from .study import SIMILARITY, STYLE, Table, render, sheet, write_page

IMAGE_PROMPT = ReferenceArm(image_prompt=1.0)
WINDOWS = (0.4, 1.0)  # ends of KV injection: the node's default, and the whole sampling
# Weights with which the single layers act, which at 1 do little.
STRONG = 3.0

LAYERS = {
    **{layers: replace(IMAGE_PROMPT, layers=layers) for layers in (EVEN, LIKENESS, STYLE_LAYER, COMPOSITION)},
    STYLE_AND_COMPOSITION: replace(IMAGE_PROMPT, layers=STYLE_AND_COMPOSITION),
    **{
        f"{layers}, weight {STRONG:g}": ReferenceArm(image_prompt=STRONG, layers=layers)
        for layers in (STYLE_LAYER, COMPOSITION)
    },
}
KINDS = (NO_ADAIN, TO_PICTURE, TO_REFERENCE)
ADAIN = {
    f"{adain}, end {end:g}": replace(KV, image_prompt=0.75, end=end, adain=adain) for end in WINDOWS for adain in KINDS
}
# By arm the one that it is compared with: the same without the setting.
AGAINST = {name: EVEN for name in LAYERS if name != EVEN} | {
    f"{adain}, end {end:g}": f"{NO_ADAIN}, end {end:g}" for end in WINDOWS for adain in KINDS if adain != NO_ADAIN
}
NOTHING = "nothing"
STYLES = ("photo", "comic")


def measure(faces: Tensor, drawn: Mapping[str, Tensor]) -> Table:
    """Gives each arm's figures, and under "<arm> - <other>" the paired differences of AGAINST.

    faces: [n, 3, H, W]; drawn: [n, styles, 3, H, W], both in [0, 1].
    """
    values = measured(faces, drawn, [STYLES] * len(faces))
    return compared(values, {f"{arm} - {other}": (arm, other) for arm, other in AGAINST.items()})


def page(figures: Table, references: int) -> str:
    """docs/layers.md."""

    def gain(arm: str, name: str) -> str:
        if arm not in AGAINST:
            return ""
        return marked(figures, f"{arm} - {AGAINST[arm]}", name)

    return render(
        "layers.md.jinja",
        figures=figures,
        tables={"Image prompt in some layers": [NOTHING, *LAYERS], "AdaIN in KV injection": list(ADAIN)},
        gain=gain,
        names=(SIMILARITY, STYLE, COLOUR),
        references=references,
        styles=STYLES,
        **MEASURED_WITH,
    )


def evaluate(references: int, out: Path) -> None:
    """Draw, measure and write layers.md, .json and .jpg (some people in the last style) into `out`."""
    faces, drawn = draw(references, {NOTHING: ReferenceArm(), **LAYERS, **ADAIN}, STYLES)
    figures = measure(faces, drawn)
    write_page(out, "layers", figures, page(figures, references))
    sheet({"reference": faces, **{arm: pictures[:, -1] for arm, pictures in drawn.items()}}, out / "layers.jpg")
