"""Which generator draws consistent people: the same people, prompts and seeds by each, with intervals over people.

    python -m lcm_lookahead.tools.compare_generators 24           # people, two photos and two other styles each
    python -m lcm_lookahead.tools.compare_generators 48 --photos  # photos, three of four in places by chance
    python -m lcm_lookahead.tools.compare_generators 24 --arms 2  # the first two ways alone

Nothing is rejected: what is compared is what generators do, not what checks leave of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

ARMS: dict[str, tuple[str, ...]] = {  # overrides of mini.yaml
    "base, each picture alone": (
        "generator.lora=null",
        "generator.sampler=ddim",
        "generator.steps=12",
        "generator.guidance=4",
    ),
    "base, shared attention": ("generator.kind=consistent",),
    "LCM-LoRA, each picture alone": ("generator.lora=mini_lcm_lora.safetensors",),
    "collapsed LoRA, each picture alone": (),
}
ARMS["base, shared attention"] += ARMS["base, each picture alone"]
PER_PERSON = 4


def measure(arm: str, people: int, photos: bool = False) -> dict[str, Any]:
    """Measures of each person: mean cosine of two pictures (`identity`; NaN without two faces), mean probability of
    the asked style, mean distance of two faces' middles as a share of the picture (`layout`), share of pictures with a
    face. photos: all are photos, three of them in places by chance, in the place of two plain ones and two styles."""
    import torch

    from ..cli.engine import read_engine
    from ..trainer.config import CONFIGS
    from ..trainer.data.generate.config import load

    opened = [f"checks.{name}=null" for name in ("face_size", "sharpness", "similarity", "duplicate", "style")]
    size = [f"prompts.per_person={PER_PERSON}", f"generator.batch={PER_PERSON}"]
    size += ["prompts.plain_count=1", "prompts.styles={a photo: 1}"] if photos else []
    engine = read_engine(load(CONFIGS / "generate" / "mini.yaml", [*size, *opened, *ARMS[arm]]))
    figures: dict[str, list[float]] = {"identity": [], "style": [], "layout": [], "faces": []}
    for person in engine.generate(range(people)):
        seen = [picture.measured for picture in person.pictures]
        found = [one for one in seen if one.embedding is not None and one.face is not None]
        pairs = list(combinations(found, 2))
        figures["identity"].append(_mean([float(a.embedding @ b.embedding) for a, b in pairs]))
        figures["style"].append(_mean([one.style for one in seen]))
        figures["layout"].append(
            _mean([float((_middle(a) - _middle(b)).norm()) / engine.config.generator.size for a, b in pairs])
        )
        figures["faces"].append(len(found) / len(seen))
    return {name: torch.tensor(values) for name, values in figures.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _middle(one: Any) -> Any:
    return (one.face.box[:2] + one.face.box[2:]) / 2


def table(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """Means with 95 % intervals, and the difference of identity to the first arm, person by person."""
    from ..evaluation.stats import bootstrap

    first, *_ = measured.values()
    rows = ["| | identity | over the first | asked style | layout | face found |", "|---|---|---|---|---|---|"]
    for name, figures in measured.items():

        def mean(values: Any) -> str:
            known = values[~values.isnan()]
            return str(bootstrap(lambda index: float(known[index].mean()), len(known)))

        more = "" if figures is first else mean(figures["identity"] - first["identity"])
        cells = [mean(figures["identity"]), more, *(mean(figures[k]) for k in ("style", "layout", "faces"))]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("people", type=int, nargs="?", default=24)
    parser.add_argument("--photos", action="store_true", help="photos alone")
    parser.add_argument("--arms", type=int, default=len(ARMS), help="of how many ways, the first ones")
    chosen = parser.parse_args()
    done: dict[str, dict[str, Any]] = {}
    for arm in list(ARMS)[: chosen.arms]:
        done[arm] = measure(arm, chosen.people, chosen.photos)
        print(table(done), flush=True)


if __name__ == "__main__":
    main()
