"""Every shared workflow does in ComfyUI's own page what its file says."""

import io
import itertools
import urllib.request

import pytest
from lcm_lookahead.host import workflow as converter
from lcm_lookahead.host.page import TITLE
from lcm_lookahead.tools.common import ROOT
from PIL import Image

FILES = sorted((ROOT / "workflows").glob("*.json"))


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture(scope="module")
def workflow(path):
    return converter.load(path)


@pytest.fixture(scope="module")
def page(browser, workflow):
    """The page with this workflow open. The tests only look at it."""
    browser.load()
    browser.open(workflow)
    return browser


def without_titles(api):
    return {n: {"class_type": node["class_type"], "inputs": node["inputs"]} for n, node in api.items()}


def test_the_page_has_nothing_to_say_against_it(page):
    assert page.complaints() == []


def test_the_page_would_save_it_as_it_is(page, workflow):
    saved = page.saved()
    by_id = {node["id"]: node for node in saved["nodes"]}
    for node in workflow["nodes"]:
        assert by_id[node["id"]] == node
    assert saved == workflow


def test_the_page_and_the_converter_make_the_same_prompt_of_it(page, workflow, host):
    assert without_titles(page.api()) == without_titles(converter.to_api(workflow, host.object_info()))


def test_every_input_has_a_value_that_it_takes(page, host):
    for node_id, node in page.api().items():
        schema = host.object_info()[node["class_type"]]["input"]
        assert set(schema["required"]) <= set(node["inputs"]), node["class_type"]
        inputs = {**schema["required"], **schema.get("optional", {})}
        for name, value in node["inputs"].items():
            kind, options = inputs[name][0], (inputs[name][1:] or [{}])[0]
            where = f"{name} of node {node_id} ({node['class_type']})"
            if isinstance(value, list):
                continue
            elif isinstance(kind, list) or kind == "COMBO":
                assert value in (kind if isinstance(kind, list) else options["options"]), where
            elif kind in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"], where
            elif kind == "BOOLEAN":
                assert isinstance(value, bool), where
            else:
                assert kind == "STRING" and isinstance(value, str), where


def test_every_link_joins_an_output_and_an_input_of_its_type(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, source, out, target, into, kind in workflow["links"]:
        output, entry = nodes[source]["outputs"][out], nodes[target]["inputs"][into]
        assert output["type"] == kind and entry["type"] in (kind, "*")  # Preview as Text takes anything
        assert number in output["links"] and number == entry["link"]
    linked = [entry["link"] for node in workflow["nodes"] for entry in node["inputs"] if entry["link"] is not None]
    assert sorted(linked) == sorted(link[0] for link in workflow["links"])


def test_no_node_covers_another(workflow):
    def overlap(a, b):
        (ax, ay), (aw, ah), (bx, by), (bw, bh) = a["pos"], a["size"], b["pos"], b["size"]
        return ax < bx + bw and bx < ax + aw and ay - TITLE < by + bh and by - TITLE < ay + ah

    pairs = itertools.combinations(workflow["nodes"], 2)
    assert [(a["type"], b["type"]) for a, b in pairs if overlap(a, b)] == []


def test_every_node_is_large_enough_for_its_inputs_and_values(page, workflow):
    needed = page.needed_sizes()
    for node in workflow["nodes"]:
        width, height = needed[str(node["id"])]
        assert node["size"][0] >= width and node["size"][1] >= height, node["type"]


def test_the_template_browser_has_it_with_a_picture(path, workflow, host):
    assert path.stem in host.call("/api/workflow_templates")[host.pack_name]
    address = f"/api/workflow_templates/{host.pack_name}/{path.stem}"
    assert host.call(f"{address}.json") == workflow
    with urllib.request.urlopen(f"{host.url}{address}.jpg") as answer:
        picture = answer.read()
    assert answer.headers["Content-Type"] == "image/jpeg"
    assert min(Image.open(io.BytesIO(picture)).size) >= 400 and len(picture) < 200_000
