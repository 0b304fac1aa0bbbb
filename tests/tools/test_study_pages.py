"""The pages of the studies in docs/ are what their templates make of the figures beside them."""

import json

import pytest
from lcm_lookahead.evaluation.stats import Interval
from lcm_lookahead.mini.studies import (
    encoders,
    guidance,
    knobs,
    layers,
    null_text,
    people,
    reference,
    reference_presets,
)
from lcm_lookahead.tools.common import ROOT

DOCS = ROOT / "docs"


def figures(value):
    """What a JSON file says, with its lists of three numbers as intervals again."""
    return Interval(*value) if isinstance(value, list) else {name: figures(part) for name, part in value.items()}


def encoders_page(found):
    pairs = {name: part for name, part in found.items() if " - " in name}
    return encoders.page({name: part for name, part in found.items() if name not in pairs}, pairs, 96, 100)


PAGES = {
    "evaluation": lambda found: reference.page(found, 100),
    "knobs": lambda found: knobs.page(found, 20),
    "guidance": lambda found: guidance.page(found, 96),
    "guidance_strong": lambda found: guidance.page(found, 96, 200),
    "encoders": encoders_page,
    "layers": lambda found: layers.page(found, 20),
    "reference_presets": lambda found: reference_presets.page(found, 24, 100),
    "people": lambda found: people.page(found, 48, 200),
    "null_text": lambda found: null_text.page(found, 10),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_its_figures_make(name):
    found = figures(json.loads((DOCS / f"{name}.json").read_text()))
    assert PAGES[name](found) == (DOCS / f"{name}.md").read_text()


def test_without_a_second_arm_nothing_follows_another():
    rows = {"before": {}, "a": {}}
    text = encoders.page(rows, {}, 10)
    assert "less an earlier" not in text and "\n\nSimilarity by style" in text and "\n\n\n" not in text
