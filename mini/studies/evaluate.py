"""`lookahead evaluate`: one of the studies, drawn in the real host, its figures and page written into docs/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...tools.common import Problem

PEOPLE = {
    "reference": 100,
    "knobs": 20,
    "guidance": 96,
    "presets": 96,
    "encoders": 96,
    "null-text": 20,
    "people": 48,
    "layers": 20,
}  # by study, how many unless said
FEWEST = 10  # fewer make no interval, and a draw may hold one person alone


def evaluate(study: str, out: Path, references: int | None = None, trained: Sequence[str] = (), first: int = 0) -> None:
    """Run a study and write its page into `out`.

    Args:
        study: one of PEOPLE.
        out: the folder of the page, its JSON file and pictures.
        references: how many held-out people (for "people" pairs of them); default: that of the study.
        trained: for "encoders" NAME=FILE[@WEIGHT] in turn; for "presets" names of some.
        first: for "encoders" alone, number of the first of the people.
    """
    references = PEOPLE[study] if references is None else references
    if references < FEWEST:
        raise Problem(f"--references is {references}, too few for figures with intervals: give at least {FEWEST}.")
    if first and (first < 0 or study != "encoders"):
        raise Problem(f"--first is {first}: give a number from 0, and only beside --encoders.")
    out.mkdir(parents=True, exist_ok=True)  # before hours of drawing, after which pictures and page are written
    if study == "encoders":
        from . import encoders

        encoders.evaluate(references, out, trained, first)
    elif study == "guidance":
        from . import guidance

        guidance.evaluate(references, out)
    elif study == "presets":
        from . import guidance

        guidance.evaluate_presets(references, out, trained)
    elif study == "knobs":
        from . import knobs

        knobs.evaluate(references, out)
    elif study == "null-text":
        from . import null_text

        null_text.evaluate(references, out)
    elif study == "people":
        from . import people

        people.evaluate(references, out)
    elif study == "layers":
        from . import layers

        layers.evaluate(references, out)
    else:
        from . import reference

        reference.evaluate(references, out)
