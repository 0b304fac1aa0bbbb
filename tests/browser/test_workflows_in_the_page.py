"""Every shared workflow and app does in ComfyUI's own page what its file says, and can be read there at once."""

import copy
import io
import re
import shutil
import tomllib
import urllib.parse
import urllib.request

import pytest
from lcm_lookahead.host import page as pages
from lcm_lookahead.host import workflow as converter
from lcm_lookahead.tools import templates
from lcm_lookahead.tools.common import ROOT
from lcm_lookahead.tools.template_specs import BLUEPRINTS, OWN_FILES
from lcm_lookahead.tools.template_workflows import WORKFLOWS
from PIL import Image
from visit import READABLE, covered

FILES = sorted((ROOT / "workflows").glob("*.json"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BLUEPRINT_FILES = sorted((ROOT / "subgraphs").glob("*.json"))
ROOM = 330  # units under a sampler for its live preview; a test that runs one says that it is enough
NOTE = "MarkdownNote"


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture(scope="module")
def workflow(path):
    return converter.load(path)


@pytest.fixture(scope="module")
def page(browser, workflow):
    """The page with this workflow open as a graph. The tests only look at it."""
    browser.open({**workflow, "extra": {**workflow["extra"], "linearMode": False}})
    return browser


def all_nodes(workflow):
    subgraphs = workflow.get("definitions", {}).get("subgraphs", ())
    return [*workflow["nodes"], *(node for one in subgraphs for node in one["nodes"])]


def without_titles(api):
    return {n: {"class_type": node["class_type"], "inputs": node["inputs"]} for n, node in api.items()}


def test_the_page_has_nothing_to_say_against_it(page):
    assert page.complaints() == []


def test_it_opens_so_near_that_its_text_is_drawn(page):
    assert page.evaluate("app.canvas.ds.scale") > READABLE


def plain(graph):
    """A saved graph without what newer pages write beside the values (their names) and leave out (lists of none)."""
    graph = copy.deepcopy(graph)
    for node in all_nodes(graph):
        values = node.get("widgets_values") or node.pop("widgets_values", [])
        named = node.pop("widgets_values_named", {})
        assert set(map(str, named.values())) <= set(map(str, values))
    return graph


def test_the_page_would_save_it_as_it_is(page, workflow):
    saved, written = plain(page.saved()), plain(workflow)
    by_id = {node["id"]: node for node in saved["nodes"]}
    for node in written["nodes"]:
        assert by_id[node["id"]] == node
    assert saved | {"extra": {}} == written | {"extra": {}}


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
        assert output["type"] == kind and ({kind, "*"} & set(entry["type"].split(",")))  # some take several
        assert number in output["links"] and number == entry["link"]
    linked = [entry["link"] for node in workflow["nodes"] for entry in node["inputs"] if entry["link"] is not None]
    assert sorted(linked) == sorted(link[0] for link in workflow["links"])


def test_no_node_covers_another_with_the_page_s_own_labels_and_previews(page, workflow):
    boxes = page.boxes()
    for node in workflow["nodes"]:
        if node["type"] in ("KSampler", "SamplerCustomAdvanced"):
            left, top, right, bottom = boxes[str(node["id"])]
            boxes[str(node["id"])] = (left, top, right, bottom + ROOM)
    assert covered(boxes) == []


def covered_inside(page):
    """For each subgraph of the open graph the pairs of nodes that cover each other at the sizes that the page needs."""
    subgraphs = page.evaluate(
        "[...app.graph.subgraphs.values()].map(graph => graph.nodes.map(n =>"
        " [n.id, ...n.pos, ...[...n.size].map((side, k) => Math.max(side, n.computeSize()[k]))]))"
    )
    return [covered({n: (x, y - pages.TITLE, x + w, y + h) for n, x, y, w, h in nodes}) for nodes in subgraphs]


def test_no_node_inside_of_a_subgraph_covers_another(page, workflow):
    subgraphs = workflow.get("definitions", {}).get("subgraphs", [])
    assert covered_inside(page) == [[] for _ in subgraphs]


def test_every_node_is_large_enough_for_its_inputs_and_values(page, workflow):
    needed = page.needed_sizes()
    for node in workflow["nodes"]:
        width, height = needed[str(node["id"])]
        assert node["size"][0] >= width and node["size"][1] >= height, node["type"]


def test_no_node_covers_another_in_nodes_2(page):
    """The last that looks at the open graph: Nodes 2.0 writes its own sizes into it."""
    page.nodes_2(True)
    try:
        assert covered(page.boxes()) == []
    finally:
        page.nodes_2(False)


def test_every_node_says_which_pack_and_version_it_is_of(workflow):
    for node in all_nodes(workflow):
        if node["type"] != NOTE:
            ours = node["type"].startswith("Lookahead") or "-" in node["type"]
            assert node["properties"]["cnr_id"] == (PROJECT["name"] if ours else "comfy-core"), node["type"]
            assert re.fullmatch(r"\d+\.\d+\.\d+", node["properties"]["ver"])


def test_every_model_file_that_it_names_has_an_address_and_a_folder_or_is_one_s_own(workflow):
    known = {}
    for node in all_nodes(workflow):
        for model in node["properties"].get("models", ()):
            known[model["name"]] = model
            assert model["url"].startswith("https://") and not model["directory"].startswith("/")
            assert re.fullmatch(r"[0-9a-f]{64}", model["hash"]) if "hash" in model else True
    values = {v for node in all_nodes(workflow) if node["type"] != NOTE for v in node.get("widgets_values") or ()}
    named = {v for v in values if str(v).endswith((".safetensors", ".pth"))}
    assert named <= {*known, *OWN_FILES}
    (note,) = [node for node in workflow["nodes"] if node["type"] == NOTE]
    assert all(file in note["widgets_values"][0] for file in named & {*OWN_FILES})  # how one comes by it


def test_its_note_names_the_pack_first_and_every_file_with_a_link(workflow):
    (note,) = [node for node in workflow["nodes"] if node["type"] == NOTE]
    text = note["widgets_values"][0]
    assert text.splitlines()[0] == f"Needs the node pack [LCM-Lookahead]({PROJECT['urls']['Repository']})."
    for node in all_nodes(workflow):
        for model in node["properties"].get("models", ()):
            assert model["url"] in text, model["name"]


def test_it_is_an_app_too(workflow):
    """What an app asks for and shows are nodes and values that are there."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    asked, shown = workflow["extra"]["linearData"]["inputs"], workflow["extra"]["linearData"]["outputs"]
    for number, name in asked:
        assert name in [entry["widget"]["name"] for entry in nodes[number]["inputs"] if "widget" in entry]
    assert asked and shown and set(shown) <= set(nodes)


def test_the_list_of_templates_has_it_with_a_picture(path, workflow, host):
    assert path.stem in host.call("/api/workflow_templates")[host.pack_name]
    address = f"/api/workflow_templates/{host.pack_name}/{urllib.parse.quote(path.stem)}"
    assert host.call(f"{address}.json") == workflow
    with urllib.request.urlopen(f"{host.url}{address}.jpg") as answer:
        picture = answer.read()
    assert answer.headers["Content-Type"] == "image/jpeg"
    assert min(Image.open(io.BytesIO(picture)).size) >= 400 and len(picture) < 200_000


@pytest.fixture(scope="module", params=BLUEPRINT_FILES, ids=lambda path: path.stem)
def blueprint(request):
    return converter.load(request.param)


@pytest.fixture(scope="module")
def opened(browser, blueprint):
    """The page with this blueprint as the open graph."""
    browser.open(blueprint)
    return browser


def test_the_page_takes_a_blueprint_without_a_complaint_and_would_save_it_as_it_is(opened, blueprint):
    assert opened.complaints() == []
    assert plain(opened.saved()) | {"extra": {}} == plain(blueprint) | {"extra": {}}


def test_no_node_inside_of_a_blueprint_covers_another(opened):
    assert covered_inside(opened) == [[]]


@pytest.fixture
def written(browser, tmp_path, monkeypatch):
    """The texts of files that the tool writes by this page: by their paths in the repository."""
    if pages.front_end_version() != pages.FRONT_END[0]:
        pytest.skip("the files are written by the default page")
    for folder in ("workflows", "subgraphs"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    monkeypatch.setattr(templates, "ROOT", tmp_path)
    return lambda: {path.relative_to(tmp_path): path.read_text() for path in tmp_path.glob("*/*.json")}


def others_than_shipped(files):
    there = {path: (ROOT / path).read_text(encoding="utf-8") for path in files if (ROOT / path).is_file()}
    return [path.name for path, text in files.items() if there.get(path) != text]


def test_the_tool_writes_the_blueprints_that_are_there(browser, written):
    for graph in BLUEPRINTS:
        templates.blueprint(browser, graph)
    assert others_than_shipped(written()) == [] and len(written()) == len(BLUEPRINT_FILES)


@pytest.mark.slow
def test_the_tool_writes_the_workflows_that_are_there(browser, written):
    for name, graph in WORKFLOWS.items():
        templates.write(browser, name, graph)
    assert others_than_shipped(written()) == [] and len(written()) == len(FILES)
