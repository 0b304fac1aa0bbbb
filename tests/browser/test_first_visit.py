"""What a first visitor does in ComfyUI's page: opens a template, draws, looks, makes mistakes."""

import json
import re
import time

import pytest
from lcm_lookahead.host.workflow import load
from lcm_lookahead.tools.common import ROOT
from lcm_lookahead.tools.template_specs import BLUEPRINTS, SAMPLER_ROOM

FIRST = "01 Face under a new prompt"
PACK = "[...document.querySelectorAll('[role=dialog] nav span')].find(e => e.textContent.trim().startsWith('{}'))"
SMALL = (  # no click: the mini world's pictures have 128 pixels, and a few steps are enough to look at
    "app.graph.nodes.forEach(n => n.widgets?.forEach(w => { if (['width', 'height'].includes(w.name)) w.value = 128;"
    " if (w.name === 'steps') w.value = 4; }))"
)
RUN = "[...document.querySelectorAll('button')].find(e => e.innerText.trim() === 'Run')"
SAVED = "app.graph.nodes.find(n => n.type === 'SaveImage')"


def template(name):
    return load(ROOT / "workflows" / f"{name}.json")


def changed(name, **values):
    """A workflow with other values of its widgets, by names of nodes' classes: {class: {place: value}}."""
    graph = template(name)
    for node in graph["nodes"]:
        for place, value in values.get(node["type"], {}).items():
            node["widgets_values"][place] = value
    return graph


def run_small(page, *arguments):
    page.evaluate(SMALL)
    page.evaluate("app.queuePrompt(0)")


def covered(boxes):
    pairs = [(a, b) for a in boxes for b in boxes if a < b]
    return [
        (a, b)
        for a, b in pairs
        if boxes[a][0] + 1 < boxes[b][2]
        and boxes[b][0] + 1 < boxes[a][2]
        and boxes[a][1] + 1 < boxes[b][3]
        and boxes[b][1] + 1 < boxes[a][3]
    ]


@pytest.fixture(scope="module", autouse=True)
def with_previews(browser):
    """What most artists have switched on."""
    browser.load()
    browser.set("Comfy.Execution.PreviewMethod", "latent2rgb")


@pytest.mark.parametrize("name", [FIRST, f"{FIRST}.app"])
def test_three_clicks_lead_from_the_templates_to_a_picture(page, host, keep, name):
    page.click("document.querySelector('button[aria-label=Templates]')")
    page.wait_for("document.querySelector('[role=dialog] nav')")
    page.click(PACK.format(host.pack_name))  # one
    page.wait_for("document.querySelector('[data-testid^=template-workflow-]')")
    keep(page, "templates")
    page.click(f"document.querySelector('[data-testid={json.dumps(f'template-workflow-{name}')}]')")  # two
    page.wait_for("app.graph.nodes.some(n => n.title === 'Reference face')")
    time.sleep(1)  # the page looks for missing files after that
    assert page.complaints() == []
    page.evaluate(SMALL)
    page.click(RUN)  # three
    if name.endswith(".app"):
        page.wait_for("[...document.querySelectorAll('img')].some(e => /output/.test(e.src) && e.naturalWidth)")
        labels = page.evaluate("document.body.innerText")
        assert all(re.search(rf"^{label}$", labels, re.M) for label in ("image", "text", "weight", "seed"))
    else:
        page.wait_for(f"{SAVED}.imgs?.length")
    keep(page, name)
    assert page.toasts() == [] and page.errors == []


def test_the_templates_stand_in_the_order_of_their_numbers(page, host):
    names = page.evaluate(f"app.api.getWorkflowTemplates().then(t => t[{json.dumps(host.pack_name)}])")
    assert names == sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes 2.0"])
@pytest.mark.parametrize("name", ["02 Face with more of its look (KV)"])
def test_a_run_with_live_previews_covers_nothing(page, keep, name, nodes_2):
    page.nodes_2(nodes_2)
    try:
        page.open(template(name))
        before = page.boxes()
        run_small(page)
        if not nodes_2:
            page.wait_for("app.graph.nodes.find(n => n.type === 'SamplerCustomAdvanced').imgs?.length")
        page.wait_for(f"app.nodeOutputs?.[{SAVED}.id]?.images?.length || {SAVED}.imgs?.length")
        keep(page, f"previews {'nodes 2.0' if nodes_2 else 'classic'}")
        after = page.boxes()
        assert covered(after) == []
        grown = {n: after[n][3] - before[n][3] for n in after}
        assert max(grown.values()) < SAMPLER_ROOM
    finally:
        page.nodes_2(False)


def test_our_sentence_is_said_when_a_node_fails(page, keep):
    graph = changed("03 Face by KV alone (checkpoint only)", LookaheadApplyKVInjection={1: 0.9})
    page.open(graph)
    run_small(page)
    page.wait_for("document.querySelector('.p-toast-message')")
    keep(page, "error")
    (said,) = page.toasts()
    assert "Apply" in said and "The start (0.9) is later than the end (0.6)" in said


def test_our_sentence_is_said_when_the_host_refuses_a_value(page):
    graph = changed("02 Face with more of its look (KV)", LookaheadLoadEncoder={0: "nobody_has_this.safetensors"})
    page.open(graph)
    run_small(page)
    page.wait_for("document.querySelector('.p-toast-message')")
    assert any("There is no encoder file 'nobody_has_this.safetensors'" in said for said in page.toasts())


def test_a_warning_of_the_log_is_said_in_the_page(page, host):
    """An empty mask: the usual mistake, which only leaves the likeness out."""
    graph = template("03 Face by KV alone (checkpoint only)")
    page.open(graph)
    page.evaluate(
        "app.graph.nodes.find(n => n.type === 'LoadImage').connect(1, app.graph.nodes.find(n => n.type ==="
        " 'LookaheadApplyKVInjection'), app.graph.nodes.find(n => n.type === 'LookaheadApplyKVInjection')"
        ".inputs.findIndex(i => i.name === 'mask'))"
    )
    run_small(page)
    page.wait_for("document.querySelector('.p-toast-message')")
    (said,) = page.toasts()
    assert "LCM-Lookahead" in said and "the mask of a KV injection is empty" in said
    page.wait_for(f"{SAVED}.imgs?.length")


def test_provenance_stands_on_the_node(page, keep):
    page.open(template("02 Face with more of its look (KV)"))
    run_small(page)
    loader = "app.graph.nodes.find(n => n.type === 'LookaheadLoadEncoder')"
    page.wait_for(f"{loader}.widgets.some(w => /IP-Adapter/i.test(String(w.value)) && w.name.startsWith('$$'))")
    page.wait_for(f"{SAVED}.imgs?.length")
    assert covered(page.boxes()) == []
    keep(page, "provenance")


def test_a_node_made_by_hand_says_which_pack_it_is_of(page):
    made = page.evaluate("LiteGraph.createNode('LookaheadApplyImagePrompt').properties")
    assert made["cnr_id"] == "lcm-lookahead" and re.fullmatch(r"\d+\.\d+\.\d+", made["ver"])


def test_every_blueprint_is_offered_and_stands_in_the_graph_as_one_node(page, host, keep):
    names = [graph.parts[0].name for graph in BLUEPRINTS]
    offered = page.evaluate("app.api.getGlobalSubgraphs().then(all => Object.values(all).map(one => one.name))")
    assert set(names) <= set(offered)
    page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.wait_for("document.activeElement.getAttribute('role') === 'combobox'")
    page.call("Input.insertText", text=names[0])
    page.wait_for("document.querySelector('[role=dialog] [role=option]')")
    keep(page, "search")
    assert names[0] in page.evaluate(
        "document.querySelector('[role=dialog] [role=option]').innerText.replace(/\\n/g, '')"
    )
    for name in names:
        page.open(load(ROOT / "subgraphs" / f"{name}.json"))
        assert page.complaints() == []
        (title,) = page.evaluate("app.graph.nodes.map(n => n.title)")
        assert title == name
