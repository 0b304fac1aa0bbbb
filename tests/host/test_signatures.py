"""What files rely on stays: inputs and outputs of the nodes, in their order; and no node shows too much at once."""

import copy

import pytest
from lcm_lookahead.tools import signatures
from lcm_lookahead.tools.common import Problem

pytestmark = pytest.mark.contract
#: Nodes with more than five sockets, and why: a socket that nothing is connected to asks for nothing.
MANY_SOCKETS = {
    "LookaheadEncodeReference": "reads a reference for the image prompt (three) and for KV injection (three others)",
    "LookaheadGuidanceSampler": "three are needed; prompt, mask and noise guide of its own are for who wants them",
    "LookaheadPeopleLoss": "a picture and a mask for each of three people, of which two pictures are needed",
    "LookaheadPredictConcept": "everything of a checkpoint, an image encoder and a picture take part in a prediction",
    "LookaheadPreviewGrid": "samples by itself, so it asks for what KSampler asks for, a shortcut and a loss",
}


@pytest.fixture(scope="module")
def now(object_info):
    return signatures.signatures(object_info)


def test_what_is_recorded_of_every_node_is_there_in_its_order(now):
    assert signatures.broken(signatures.read(), now) == []


def test_the_record_has_all_that_is_there_now(now):
    assert signatures.read() == now, "take it into the record: python -m lcm_lookahead.tools.signatures --write"


CHANGES = {
    "a node is gone": lambda s: s.pop("LookaheadGuider"),
    "an input is gone": lambda s: s["LookaheadGuider"]["inputs"].pop(),
    "an input is renamed": lambda s: s["LookaheadGuider"]["inputs"][3].__setitem__(0, "words"),
    "two inputs have changed places": lambda s: s["LookaheadGuider"]["inputs"].reverse(),
    "an input is put before others": lambda s: s["LookaheadGuider"]["inputs"].insert(
        0, ["a", "INT", "optional", "open"]
    ),
    "an input has another type": lambda s: s["LookaheadGuider"]["inputs"][3].__setitem__(1, "INT"),
    "an input is required now": lambda s: s["LookaheadGuider"]["inputs"][6].__setitem__(2, "required"),
    "a new input is required": lambda s: s["LookaheadGuider"]["inputs"].append(["a", "INT", "required", "open"]),
    "an option is gone": lambda s: s["LookaheadGuider"]["inputs"][6][4].remove("paper"),
    "a socket takes something else": lambda s: s["LookaheadGuider"]["inputs"][0].__setitem__(1, "IMAGE"),
    "an output is of several types": lambda s: s["LookaheadGuider"]["outputs"][0].__setitem__(1, "GUIDER,MODEL"),
    "an output is gone": lambda s: s["LookaheadGuider"]["outputs"].pop(),
    "an output is put before others": lambda s: s["LookaheadGuider"]["outputs"].insert(0, ["a", "INT"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_would_break_a_file_is_named_and_cannot_be_recorded(now, change, tmp_path):
    other, path = copy.deepcopy(now), tmp_path / "signatures.json"
    signatures.write(now, path)
    CHANGES[change](other)
    assert any("LookaheadGuider" in line for line in signatures.broken(now, other))
    with pytest.raises(Problem, match="put it back"):
        signatures.write(other, path)


def test_what_comes_last_may_come_and_is_recorded(now, tmp_path):
    other, path = copy.deepcopy(now), tmp_path / "signatures.json"
    signatures.write(now, path)
    node = other["LookaheadGuider"]
    node["inputs"].append(["more", "FLOAT", "optional", "folded"])
    node["outputs"].append(["more", "MODEL"])
    node["inputs"][6][4].append("another preset")
    node["inputs"][0][1] += ",IMAGE"  # a socket that takes more
    assert signatures.broken(now, other) == []
    signatures.write(other, path)
    assert path.read_text() != signatures.RECORD.read_text()


def test_a_node_shows_at_most_five_values_before_its_advanced_ones(now):
    shown = {name: [one[0] for one in node["inputs"] if one[3] == signatures.OPEN] for name, node in now.items()}
    assert {name: values for name, values in shown.items() if len(values) > signatures.MOST_OPEN} == {}


def test_a_node_with_more_than_five_sockets_says_why(now):
    counts = {name: sum(one[3] == signatures.SOCKET for one in node["inputs"]) for name, node in now.items()}
    assert {name for name, count in counts.items() if count > signatures.MOST_OPEN} == MANY_SOCKETS.keys()
