"""ComfyUI's own page says what is missing, and shows the help of our nodes."""

import re

import pytest
from lcm_lookahead.host.page import TOASTS
from lcm_lookahead.host.workflow import load
from lcm_lookahead.tools.common import ROOT
from lcm_lookahead.tools.help_pictures import PICTURES
from lcm_lookahead.tools.templates import COLOURS
from PIL import Image


@pytest.fixture
def page(browser):
    """The page, loaded anew."""
    browser.load()
    return browser


def words(text):
    """A text without Markdown's marks and line ends."""
    return " ".join(re.sub(r"\[(.*?)\]\(.*?\)|[`*]", r"\1", text).split())


def test_a_missing_node_and_a_missing_file_are_seen(page):
    """What the tests of the workflows rely on."""
    broken = load(ROOT / "tests/browser/saved/image_prompt_and_kv_0.1.0.json")
    encoder = next(node for node in broken["nodes"] if node["type"] == "LookaheadLoadEncoder")
    encoder["type"] = "NobodyHasThisNode"
    checkpoint = next(node for node in broken["nodes"] if node["type"] == "CheckpointLoaderSimple")
    checkpoint["widgets_values"] = ["nobody_has_this.safetensors"]
    page.open(broken)
    page.wait_for("document.querySelector('[data-testid=error-overlay]')")
    complaints = " ".join(page.complaints())
    assert "NobodyHasThisNode" in complaints and "nobody_has_this.safetensors" in complaints


def test_every_node_of_ours_has_a_help_page_and_tooltips(page, host):
    ours = {name: node for name, node in host.object_info().items() if name.startswith("Lookahead")}
    assert ours
    for name, node in ours.items():
        for kind in node["input"].keys() & {"required", "optional"}:  # nobody sees the "hidden" ones
            assert all(options[0].get("tooltip") for _, *options in node["input"][kind].values()), name
        assert len(node["output_tooltips"]) == len(node["output"]) and all(node["output_tooltips"]), name
        title, text = (ROOT / "web" / "docs" / f"{name}.md").read_text().split("\n\n")[:2]
        shown = words(page.help_of(name))
        assert shown.startswith(node["display_name"]) and title == f"# {node['display_name']}"
        assert words(text) in shown
        if (PICTURES / f"{name}.png").exists():  # tests/host/test_completeness.py names those that lack it
            picture = "document.querySelector('.node-help-content img')"
            page.wait_for(f"{picture}?.complete")
            with Image.open(PICTURES / f"{name}.png") as drawn:
                assert page.evaluate(f"[{picture}.naturalWidth, {picture}.naturalHeight]") == list(drawn.size), name


ADD = """(type => {
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    window.field = name => node.widgets.find(widget => widget.name === name);
    window.set = (name, value) => field(name).setValue(value, { e: {}, node, canvas: app.canvas });
    window.values = (...names) => names.map(name => field(name).value);
    return [node.color, node.bgcolor];
})"""


EMPTY = {"id": "b7b2f7e4-44c7-4f3b-a3a4-d9d1a1f0a001", "nodes": [], "links": [], "version": 0.4}


def test_a_new_node_has_our_colour_and_its_fields_show_what_its_preset_does(page):
    page.open(EMPTY)
    assert page.evaluate(f"{ADD}('LookaheadGuider')") == list(COLOURS["ours"])
    page.evaluate("set('preset', 'more likeness')")
    assert page.evaluate("values('text', 'full', 'kv', 'preset')") == [2, 4, 2, "more likeness"]
    page.evaluate("set('kv', 1)")
    assert page.evaluate("values('text', 'full', 'kv', 'preset')") == [2, 4, 1, "as set below"]
    assert page.toasts() == []  # the numbers were all there was to it
    page.evaluate(f"{ADD}('LookaheadGuidanceSampler')")
    page.evaluate("set('preset', 'strong')")
    assert page.evaluate("values('iterations', 'lean', 'preset')") == [10, 0.8, "strong"]
    page.evaluate("field('step_size').value = 1; set('iterations', 30)")  # as in a file whose numbers do not count
    assert page.evaluate("values('iterations', 'step_size', 'preset')") == [30, 0.02, "as set below"]
    page.wait_for(f"{TOASTS}.length")
    assert "sphere of the noise" in " ".join(page.toasts())


def test_in_nodes_2_a_chosen_preset_shows_in_the_fields_and_a_changed_field_leaves_it(page):
    node = "document.querySelector('[data-node-id]')"
    page.nodes_2(True)
    try:
        page.open(EMPTY)
        page.evaluate(f"{ADD}('LookaheadGuider')")
        page.evaluate("(app.graph.nodes[0].pos = [300, 300], app.canvas.ds.offset = [0, 0], app.canvas.ds.scale = 1)")
        page.click(f"{node}?.querySelector('[data-testid=widget-select-default-trigger]')")
        page.click("[...document.querySelectorAll('[role=option]')].find(e => e.innerText.includes('more likeness'))")
        page.wait_for(f"[...{node}.querySelectorAll('input')].map(e => Number(e.value)).join() === '2,4,2'")
        page.click(f"{node}.querySelectorAll('[data-testid=increment]')[2]")
        page.wait_for("values('preset')[0] === 'as set below'")
        assert page.evaluate("values('text', 'full', 'kv')") == [2, 4, 2.1]
    finally:
        page.nodes_2(False)


def test_a_file_keeps_its_numbers_and_its_colours_beside_a_preset(page):
    """As files from before have them: numbers that a preset overrides, and nodes without a colour."""
    page.open(EMPTY)
    page.evaluate(f"{ADD}('LookaheadGuider')")
    file = page.saved()
    file["nodes"][0]["widgets_values"] = [1.5, 1, 0, "paper", 0, 1]
    del file["nodes"][0]["color"], file["nodes"][0]["bgcolor"]
    page.open(file)
    (saved,) = page.saved()["nodes"]
    assert saved["widgets_values"] == [1.5, 1, 0, "paper", 0, 1] and "color" not in saved
