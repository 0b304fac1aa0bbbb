"""What an estimate of a concept's memory has to know of the base: a known one's own sizes, else SDXL's."""

from __future__ import annotations

import json
from pathlib import Path

from ..trainer.concept.config import ConceptModels
from ..trainer.concept.estimate import ConceptShapes
from .bases import known_base


def concept_shapes(model: ConceptModels) -> ConceptShapes:
    """The sizes of the base that a section `model` names; its files need not be there where it is SDXL."""
    base = known_base(model.base)
    if base is None:
        return ConceptShapes()

    def config(folder: Path) -> str:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return json.dumps({k: v for k, v in values.items() if not k.startswith("_")})

    text, text_2 = (config(base.folder / name) for name in ("text_encoder", "text_encoder_2"))
    return ConceptShapes(config(base.folder / "unet"), text, text_2, config(base.own["image_encoder"]))
