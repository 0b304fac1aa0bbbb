"""What do the presets of the nodes that apply a reference, and of the guider, give up for what?

Each with all else as a new node has it, against the one that is nearest to a new node. Writes reference_presets.md,
.json and .jpg.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ...lookahead.method import reference_presets as presets
from .against import COLOUR, compared, marked, measured
from .drawing import BOTH, MEASURED_WITH, ReferenceArm, draw
from .study import CFG, SIMILARITY, STYLE, STYLES, Table, render, sheet, write_page

NOTHING = "nothing"
SDXL_CFG = 5.0  # the scale for which the guider's presets are; the mini world's is CFG
IMAGE_PROMPT, KV, GUIDER = "Apply Lookahead Image Prompt", "Apply Lookahead KV Injection", "Lookahead Guider"
USUAL = replace(  # of new nodes
    BOTH,
    image_prompt=presets.IMAGE_PROMPT[presets.BALANCED]["weight"],
    end=presets.KV_INJECTION[presets.BALANCED]["end"],
)


def _guided(scales: Mapping[str, float]) -> ReferenceArm:
    text, full, kv = (round(scale * CFG / SDXL_CFG, 6) for scale in scales.values())
    return replace(USUAL, text=text, full=full, kv_scale=kv)


#: By node its arms
TABLES: Mapping[str, Mapping[str, ReferenceArm]] = {
    IMAGE_PROMPT: {
        f"image prompt, {name}": ReferenceArm(image_prompt=of["weight"]) for name, of in presets.IMAGE_PROMPT.items()
    },
    KV: {f"KV, {name}": replace(USUAL, kv=of["weight"], end=of["end"]) for name, of in presets.KV_INJECTION.items()},
    GUIDER: {f"guider, {name}": _guided(scales) for name, scales in presets.GUIDER.items()},
}
BASELINES = {IMAGE_PROMPT: "image prompt, balanced", KV: "KV, balanced", GUIDER: "guider, paper"}
AGAINST = {arm: BASELINES[table] for table, arms in TABLES.items() for arm in arms if arm != BASELINES[table]}
ARMS = {NOTHING: ReferenceArm()} | {name: arm for arms in TABLES.values() for name, arm in arms.items()}


def measure(faces: Tensor, drawn: Mapping[str, Tensor]) -> Table:
    """Gives each arm's figures, and under "<arm> - <other>" the paired differences of AGAINST.

    faces: [n, 3, H, W]; drawn: [n, styles, 3, H, W], both in [0, 1].
    """
    values = measured(faces, drawn, [STYLES] * len(faces))
    return compared(values, {f"{arm} - {other}": (arm, other) for arm, other in AGAINST.items()})


def page(figures: Table, references: int, first: int) -> str:
    """docs/reference_presets.md. first: number of the first of the people."""

    def gain(arm: str, name: str) -> str:
        return marked(figures, f"{arm} - {AGAINST[arm]}", name) if arm in AGAINST else ""

    return render(
        "reference_presets.md.jinja",
        figures=figures,
        tables={table: [NOTHING, *arms] for table, arms in TABLES.items()},
        baselines=BASELINES,
        gain=gain,
        names=(SIMILARITY, STYLE, COLOUR),
        references=references,
        people=range(first, first + references),
        styles=STYLES,
        usual=USUAL,
        share=CFG / SDXL_CFG,
        **MEASURED_WITH,
    )


def evaluate(references: int, out: Path, first: int = 0) -> None:
    """Draw, measure and write reference_presets.md, .json and .jpg (some people in the last style) into `out`."""
    faces, drawn = draw(references, ARMS, STYLES, first=first)
    figures = measure(faces, drawn)
    write_page(out, "reference_presets", figures, page(figures, references, first))
    save_sheet(faces, drawn, out / "reference_presets.jpg")


def save_sheet(faces: Tensor, drawn: Mapping[str, Tensor], path: Path) -> None:
    """Some people in the last style; the guider's arms hardly differ and are left out."""
    shown = [NOTHING, *TABLES[IMAGE_PROMPT], *TABLES[KV]]
    sheet({"reference": faces, **{arm: drawn[arm][:, -1] for arm in shown}}, path, columns=8)
