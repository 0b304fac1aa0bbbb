"""ComfyUI's page shows our nodes in the language of its settings."""

import json

import pytest
from lcm_lookahead.tools import locales
from lcm_lookahead.tools.common import ROOT

NODE = "LookaheadCropFace"
SHOWN = """(() => {
    const shown = {};
    for (const id of Object.keys(LiteGraph.registered_node_types).filter(id => id.startsWith("Lookahead"))) {
        const node = LiteGraph.createNode(id);
        app.graph.add(node);
        const label = slot => slot.label ?? slot.localized_name ?? slot.name;
        shown[id] = {
            title: node.title,
            inputs: Object.fromEntries(node.inputs.map(slot => [slot.name, label(slot)])),
            outputs: node.outputs.map(label),
            widgets: Object.fromEntries((node.widgets ?? []).map(widget => [widget.name, widget.label])),
            options: Object.fromEntries((node.widgets ?? []).filter(widget => widget.type === "combo").map(
                widget => [widget.name, Object.fromEntries((widget.options.values ?? []).map(
                    value => [value, widget.options.getOptionLabel(value)]))])),
        };
        app.graph.remove(node);
    }
    return shown;
})()"""


@pytest.fixture(scope="module", params=["zh", "fr"])
def code(browser, request):
    """The page is loaded in a language; afterwards it is English again."""

    def load(language):
        browser.evaluate(f"app.extensionManager.setting.set('Comfy.Locale', '{language}')")
        browser.load()

    load(request.param)
    yield request.param
    load("en")


@pytest.fixture(scope="module")
def texts(code):
    return locales.read(ROOT / "locales" / code / "nodeDefs.json")


def test_names_sockets_and_options_of_every_node_are_translated(browser, texts, host):
    """Or English, where a new node or input has no translation yet (tests/host/test_completeness.py names those)."""
    shown, english = browser.evaluate(SHOWN), locales.english(host.object_info())["nodeDefs"]
    assert set(shown) == set(english) and set(texts) <= set(english)
    for id, of_english in english.items():
        node = texts.get(id, {})
        assert shown[id]["title"] == node.get("display_name", of_english["display_name"])
        outputs = node.get("outputs", {})
        names = [outputs.get(number, {}).get("name", it["name"]) for number, it in of_english["outputs"].items()]
        assert shown[id]["outputs"] == names, id
        for name, it in of_english["inputs"].items():
            part = node.get("inputs", {}).get(name, {})
            places = [shown[id][kind][name] for kind in ("inputs", "widgets") if name in shown[id][kind]]
            assert places and set(places) == {part.get("name", it["name"])}, (id, name)
            for option, label in part.get("options", {}).items():
                assert shown[id]["options"][name][option] == label, (id, name)


def point_at(browser, place):
    """Move the mouse to a place of the only node in the graph."""
    x, y = browser.evaluate(f"(node => app.canvasPosToClientPos({place}))(app.graph.nodes[0])")
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x - 3, y=y)
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)


def test_tooltips_are_translated_and_what_is_queued_is_not(browser, texts):
    node = {"id": 1, "type": NODE, "pos": [0, 0], "size": [400, 400], "flags": {}, "order": 0, "mode": 0}
    browser.open({"nodes": [node], "links": [], "version": 0.4})
    places = {
        "image": "node.getInputPos(node.findInputSlot('image'))",
        "margin": "[100, node.widgets.find(widget => widget.name === 'margin').y + 10]",
    }
    for name, place in places.items():
        point_at(browser, place)
        tooltip = texts[NODE]["inputs"][name]["tooltip"]
        browser.wait_for(f"document.querySelector('.node-tooltip')?.innerText.trim() === {json.dumps(tooltip)}")
    first, label = next(iter(texts[NODE]["inputs"]["order"]["options"].items()))
    assert browser.api()["1"]["inputs"]["order"] == first != label


def test_help_is_in_the_language_where_it_has_a_page_and_else_english(browser, code):
    page = ROOT / "web" / "docs" / NODE / f"{code}.md"
    if not page.exists():
        page = ROOT / "web" / "docs" / f"{NODE}.md"
    text = page.read_text(encoding="utf-8").split("\n\n")[1]
    assert " ".join(text.replace("`", "").replace("**", "").split()) in " ".join(browser.help_of(NODE).split())
