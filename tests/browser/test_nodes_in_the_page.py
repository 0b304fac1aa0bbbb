"""ComfyUI's own page says what is missing, and shows the help of our nodes."""

import re

import pytest
from lcm_lookahead.host.workflow import load
from lcm_lookahead.tools.common import ROOT
from lcm_lookahead.tools.help_pictures import PICTURES
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
