"""Named settings of the nodes that apply a reference, and of the guider's three scales: what is given up for what.

Chosen from docs/knobs.md, where one number is turned at a time, and measured in docs/reference_presets.md.
"""

from __future__ import annotations

from collections.abc import Mapping

LIKENESS, BALANCED, STYLE = "likeness", "balanced", "style"


def _acting(weight: float, end: float = 1.0) -> dict[str, float]:
    """The weight of a reference, and the part of the sampling in which it acts, from 0 to 1."""
    return {"weight": weight, "start": 0.0, "end": end}


#: The image prompt; `balanced` is what a new node begins with.
IMAGE_PROMPT: Mapping[str, Mapping[str, float]] = {
    LIKENESS: _acting(1.0),
    BALANCED: _acting(0.75),
    STYLE: _acting(0.5),
}
#: KV injection; `balanced` is what a new node begins with. A later end brings light and colours more than likeness.
KV_INJECTION: Mapping[str, Mapping[str, float]] = {
    LIKENESS: _acting(1.0),
    BALANCED: _acting(1.0, end=0.4),
    STYLE: _acting(1.0, end=0.2),
}
#: Scales of `guidance.three_scale_guidance`, for a model whose usual scale is 5.
GUIDER: Mapping[str, Mapping[str, float]] = {
    name: dict(zip(("text", "full", "kv"), scales, strict=True))
    for name, scales in {
        "paper": (3.0, 2.0, 2.0),
        "more likeness": (2.0, 4.0, 2.0),
        "more prompt": (4.0, 1.5, 0.5),
        "faster": (3.0, 3.0, 0.0),
        "without KV": (5.0, 0.0, 0.0),
    }.items()
}
