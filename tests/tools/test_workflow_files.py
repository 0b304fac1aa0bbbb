"""What workflow files and blueprints say, inside of their subgraphs too, as their JSON has it."""

import itertools
import json
import re
import tomllib

import pytest
from lcm_lookahead.tools import template_specs as specs
from lcm_lookahead.tools.common import ROOT
from lcm_lookahead.tools.signatures import MOST_OPEN
from lcm_lookahead.tools.template_graph import identifier
from lcm_lookahead.tools.template_workflows import WORKFLOWS
from lcm_lookahead.tools.templates import all_nodes, properties

WORKFLOW_FILES = sorted((ROOT / "workflows").glob("*.json"))
BLUEPRINT_FILES = sorted((ROOT / "subgraphs").glob("*.json"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TITLE = 30  # of a node, above its place
NULL_TEXT = "docs/null_text.md"  # what the notes lead to


@pytest.fixture(params=[*WORKFLOW_FILES, *BLUEPRINT_FILES], ids=lambda path: f"{path.parent.name}/{path.stem}")
def file(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


@pytest.fixture(params=BLUEPRINT_FILES, ids=lambda path: path.stem)
def blueprint(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


def definitions(file):
    return file.get("definitions", {}).get("subgraphs", [])


def test_each_file_is_one_of_those_that_the_templates_describe_and_none_is_missing():
    apps = {f"{name}.app" for name, graph in WORKFLOWS.items() if graph.app}
    assert {path.stem for path in WORKFLOW_FILES} == WORKFLOWS.keys() | apps
    assert {path.stem for path in BLUEPRINT_FILES} == {graph.parts[0].name for graph in specs.BLUEPRINTS}


def test_every_node_names_its_pack_its_version_and_its_model_files_inside_of_subgraphs_too(file):
    for node in all_nodes(file):
        if node["type"] not in specs.NOTES:
            said, wanted = node["properties"], properties(node, PROJECT["version"])
            assert {name: said.get(name) for name in ("cnr_id", "ver", "models")} == {
                name: wanted.get(name) for name in ("cnr_id", "ver", "models")
            }, node["type"]


def test_every_file_that_a_node_of_a_blueprint_names_has_an_address_and_a_folder(blueprint):
    models = {m["name"]: m for node in all_nodes(blueprint) for m in node["properties"].get("models", ())}
    named = {str(value) for node in all_nodes(blueprint) for value in node.get("widgets_values") or ()}
    assert {name for name in named if name.endswith((".safetensors", ".pth", ".bin"))} <= models.keys() != set()
    for model in models.values():
        assert model["url"].startswith("https://") and model["directory"] and not model["directory"].startswith("/")
        assert re.fullmatch(r"[0-9a-f]{64}", model.get("hash", 64 * "0"))


def test_no_node_inside_of_a_subgraph_covers_another_or_the_boxes_at_its_edges(file):
    for one in definitions(file):
        boxes = [(x, y - TITLE, x + w, y + h) for (x, y), (w, h) in ((n["pos"], n["size"]) for n in one["nodes"])]
        edges = [one["inputNode"]["bounding"], one["outputNode"]["bounding"]]
        boxes += [(x, y, x + w, y + h) for x, y, w, h in edges]
        for (a, b, c, d), (e, f, g, h) in itertools.combinations(boxes, 2):
            assert c <= e or g <= a or d <= f or h <= b, one["name"]


def test_a_folded_node_shows_at_most_five_values(file):
    folded = {one["id"]: one["name"] for one in definitions(file)}
    hosts = [node for node in file["nodes"] if node["type"] in folded]
    assert len(hosts) == len(folded)
    for node in hosts:
        open_values = [entry["name"] for entry in node["inputs"] if "widget" in entry]
        assert len(open_values) <= MOST_OPEN, folded[node["type"]]
        assert len(open_values) == len(node["widgets_values"])


def test_links_inside_of_a_subgraph_join_sockets_of_their_type_that_know_of_them(file):
    for one in definitions(file):
        nodes = {node["id"]: node for node in one["nodes"]}
        for link in one["links"]:
            if link["origin_id"] in nodes:
                output = nodes[link["origin_id"]]["outputs"][link["origin_slot"]]
                assert output["type"] == link["type"] and link["id"] in output["links"]
            else:
                assert link["id"] in one["inputs"][link["origin_slot"]]["linkIds"]
            if link["target_id"] in nodes:
                entry = nodes[link["target_id"]]["inputs"][link["target_slot"]]
                assert entry["type"] == link["type"] and link["id"] == entry["link"]
            else:
                assert link["id"] in one["outputs"][link["target_slot"]]["linkIds"]


def test_a_blueprint_is_one_node_with_the_parts_the_sockets_and_the_values_of_its_template(blueprint):
    (host,), (inside,) = blueprint["nodes"], definitions(blueprint)
    (graph,) = [one for one in specs.BLUEPRINTS if one.parts[0].name == inside["name"]]
    (part,) = graph.parts
    assert (blueprint["id"], inside["id"]) == (identifier("blueprint", part.name), identifier("subgraph", part.name))
    assert host["type"] == inside["id"] and inside["description"] == part.description
    assert [node["type"] for node in inside["nodes"]] == [graph.nodes[name].type for name in part.nodes]
    for sockets in (host["inputs"], inside["inputs"]):
        assert [entry["name"] for entry in sockets] == [*part.inputs, *part.widgets]
    for sockets in (host["outputs"], inside["outputs"]):
        assert [entry["name"] for entry in sockets] == [*part.outputs]
    assert host["widgets_values"] == [graph.nodes[name].values[widget] for name, widget in part.widgets.values()]


@pytest.mark.parametrize("path", WORKFLOW_FILES, ids=lambda path: path.stem)
def test_a_workflow_that_draws_with_an_empty_negative_prompt_says_what_was_measured_of_it(path):
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    empty = [n for n in nodes if n["type"] == "CLIPTextEncode" and n["widgets_values"] == [""]]
    # The grid of previews compares what foretells a picture, whatever is in it.
    if empty and not any(node["type"] == "LookaheadPreviewGrid" for node in nodes):
        (note,) = [node for node in nodes if node["type"] in specs.NOTES]
        assert NULL_TEXT in note["widgets_values"][0]
