"""Arms that differ in one setting, each against the same without it: what is measured of their pictures, and what a
setting changes, person by person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ...evaluation import paired
from ...evaluation.stats import share
from ..files.weights import evaluators
from ..world.faces import STYLES as ALL_STYLES
from .study import SIMILARITY, STYLE, Table

COLOUR = "distance of the mean colour to the reference's"

#: By arm and measure a value a picture, [n, pictures]
ValuesByArm = dict[str, dict[str, Tensor]]


def measured(faces: Tensor, drawn: Mapping[str, Tensor], styles: Sequence[Sequence[str]]) -> ValuesByArm:
    """Measures pictures by recogniser and style scorer, which took part in nothing, and by their mean colour.

    faces: [n, 3, H, W]; drawn: by arm [n, pictures, 3, H, W], both in [0, 1]; styles: those that the prompts ask for,
    by person and picture.
    """
    recogniser, scorer = evaluators()
    asked = torch.tensor([[ALL_STYLES.index(style) for style in of_person] for of_person in styles])
    values: ValuesByArm = {}
    with torch.no_grad():
        targets = recogniser.embed(faces)
        for arm, pictures in drawn.items():
            flat, shape = pictures.flatten(0, 1), pictures.shape[:2]
            own = (recogniser.embed(flat).unflatten(0, shape) * targets[:, None]).sum(-1)
            hits = (scorer(flat)[0].argmax(1).unflatten(0, shape) == asked).float()
            colour = (pictures.mean((-2, -1)) - faces.mean((-2, -1))[:, None]).norm(dim=-1)
            values[arm] = {SIMILARITY: own, STYLE: hits, COLOUR: colour}
    return values


def compared(values: ValuesByArm, differences: Mapping[str, tuple[str, str]]) -> Table:
    """Gives the figures of each arm, and by the names of `differences` what the first of two arms has more, paired."""
    figures = {arm: {name: share(value) for name, value in of_arm.items()} for arm, of_arm in values.items()}
    for between, (arm, other) in differences.items():
        figures[between] = {
            name: paired.difference(_by_person(value), _by_person(values[other][name]))
            for name, value in values[arm].items()
        }
    return figures


def _by_person(value: Tensor) -> paired.Column:
    """The mean over the pictures of values [n, pictures], [n] in float64."""
    return np.asarray(value.mean(1).double().numpy())


def is_clear(figures: Table, between: str, name: str) -> bool:
    """Says whether the interval of a difference leaves out 0."""
    found = figures[between][name]
    return found.low > 0 or found.high < 0


def marked(figures: Table, between: str, name: str) -> str:
    """A difference with its interval, and a star where that leaves out 0."""
    return f"{figures[between][name]}{'*' if is_clear(figures, between, name) else ''}"
