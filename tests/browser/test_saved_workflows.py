"""Files that were saved with an older pack open with the values that stood in them, whatever is the default now."""

import json
from pathlib import Path

import pytest
from lcm_lookahead.host.workflow import load

SAVED = Path(__file__).with_name("saved")
VALUES = json.loads((SAVED / "values.json").read_text())  # by file and node, in the names of the inputs at that time


@pytest.mark.parametrize("name", VALUES)
def test_an_older_file_keeps_its_values_and_links(page, name):
    graph = load(SAVED / f"{name}.json")
    page.open(graph)
    api = page.api()
    for number, values in VALUES[name].items():
        assert {key: api[number]["inputs"][key] for key in values} == values
    linked = sum(isinstance(value, list) for node in api.values() for value in node["inputs"].values())
    assert linked == len(graph["links"]) and not [error for error in page.complaints() if "node type" in error.lower()]


def test_a_new_guidance_sampler_begins_with_its_numbers_as_an_older_file_does(page):
    """The numbers are the paper's way; the workflows for likeness choose a preset."""
    node = "LiteGraph.createNode('LookaheadGuidanceSampler')"
    assert page.evaluate(f"{node}.widgets.find((widget) => widget.name === 'preset').value") == "as set below"
