"""A first visitor in ComfyUI's page: opens a template, chooses a picture, draws, looks, makes mistakes."""

import re
import time
from pathlib import Path

import pytest
from lcm_lookahead.host.workflow import load
from lcm_lookahead.mini import demo
from lcm_lookahead.mini.files.host_models import TRAINED
from lcm_lookahead.tools.common import ROOT, Stopwatch
from lcm_lookahead.tools.template_specs import BLUEPRINTS, SAMPLER_ROOM
from visit import NODES, READABLE, covered, forget_toasts, make_small, run, toast_with, wait_for_picture

FIRST, WITH_KV = "01 Face under a new prompt", "02 Face with more of its look (KV)"
KV_ALONE = "03 Face by KV alone (checkpoint only)"
GRAPHS = [path.stem for path in sorted((ROOT / "workflows").glob("*.json")) if not path.stem.endswith(".app")]
OF_FOUR_STEPS = ("fewer faces", "with 10 steps or more")  # what these draw is chance, and a noise guide wants more
PICTURE = f"{NODES}.find(n => n.type === 'LoadImage')"

FREE = """(() => {  // a place of the window where the canvas is seen, not a panel
    for (let y = 900; y > 100; y -= 50)
        for (let x = 1500; x > 100; x -= 50)
            if (document.elementFromPoint(x, y) === app.canvas.canvas) return [x, y];
})()"""
TAKE_THE_PLACE = """(id => {  // of the other node with this title: of all its links
    const put = app.graph.getNodeById(id);
    const old = app.graph.nodes.find(node => node.title === put.title && node !== put);
    const link = number => app.graph.links.get(number);
    for (const input of old.inputs.filter(input => input.link != null)) {
        const { origin_id, origin_slot } = link(input.link);
        const at = put.inputs.findIndex(other => other.name === input.name);
        app.graph.getNodeById(origin_id).connect(origin_slot, put, at);
    }
    for (const [at, output] of old.outputs.entries())
        for (const { target_id, target_slot } of (output.links ?? []).map(link))
            put.connect(at, app.graph.getNodeById(target_id), target_slot);
    app.graph.remove(old);
})"""


@pytest.fixture(scope="module")
def visitor(browser):
    """The page, loaded anew once, with live previews, which most artists have."""
    browser.load()
    browser.set("Comfy.Execution.PreviewMethod", "latent2rgb")
    yield browser
    browser.set("Comfy.Execution.PreviewMethod", "default")


@pytest.fixture
def page(visitor):
    forget_toasts(visitor)
    yield visitor
    visitor.nodes_2(False)


@pytest.fixture(scope="module")
def own_face(tmp_path_factory):
    """A visitor's own picture."""
    path = tmp_path_factory.mktemp("own") / "me.png"
    demo.draw_references(1, first=7)[0].save(path)
    return path


def open_template(page, host, name):
    page.open_templates(host.pack_name)
    page.pick_template(name)


def check_opened(page):
    """Nothing is red or missing, all can be read, no node covers another."""
    assert page.complaints() == []
    assert page.evaluate("app.canvas.ds.scale") > READABLE
    assert covered(page.boxes()) == []


def saved(name, **values):
    """A template with other values: {class: {place: value}}."""
    graph = load(ROOT / "workflows" / f"{name}.json")
    for node in graph["nodes"]:
        for place, value in values.get(node["type"], {}).items():
            node["widgets_values"][place] = value
    return graph


def press_upload(page):
    """The button of a Load Image on the canvas."""
    x, y = page.evaluate(
        "(n => { const w = n.widgets.find(w => w.type === 'button');"
        f" return app.canvasPosToClientPos([n.pos[0] + n.size[0] / 2, n.pos[1] + w.y + 10]); }})({PICTURE})"
    )
    page.click_at(x, y)


def press_upload_in_app(page):
    page.click("document.querySelector('input[type=file][aria-label=Upload]')")


@pytest.mark.parametrize(
    ("name", "upload"), [(FIRST, press_upload), (f"{FIRST}.app", press_upload_in_app)], ids=["graph", "app"]
)
def test_three_clicks_lead_from_the_list_of_templates_to_a_picture_of_oneself(page, host, keep, own_face, name, upload):
    page.open_templates(host.pack_name)
    keep(page, "templates")
    page.clicks = 0
    page.pick_template(name)
    assert page.complaints() == []
    page.choose_file(lambda: upload(page), own_face)
    page.wait_for(f"{PICTURE}.widgets[0].value.startsWith('me')")
    make_small(page)  # no click
    result = run(page, host)
    wait_for_picture(page, result)
    keep(page, name)
    assert page.clicks <= 3 and page.toasts() == [] and page.errors == []
    assert host.folder("input").joinpath(page.evaluate(f"{PICTURE}.widgets[0].value")).read_bytes() == (
        own_face.read_bytes()
    )


@pytest.mark.slow
@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "Nodes 2.0"])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_template_of_the_dialog_opens_without_a_complaint_readable_and_with_every_node_free(
    page, host, keep, name, nodes_2
):
    page.nodes_2(nodes_2)
    open_template(page, host, name)
    keep(page, f"{name}{' (Nodes 2.0)' if nodes_2 else ''}")
    check_opened(page)


@pytest.mark.slow
@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "Nodes 2.0"])
@pytest.mark.parametrize("name", GRAPHS)
def test_no_node_covers_another_after_a_run_with_live_previews(page, host, keep, name, nodes_2):
    page.load()  # 1.58.1 keeps live previews by a node's id, and shows those of another workflow on nodes of that id
    page.nodes_2(nodes_2)
    open_template(page, host, name)
    make_small(page)
    before = page.boxes()
    run(page, host).check()
    after = page.boxes()
    keep(page, f"{name} (drawn{', in Nodes 2.0' if nodes_2 else ''})")
    said = [text for text in page.toasts() if not any(words in text for words in OF_FOUR_STEPS)]
    assert said == [] and page.errors == []
    assert covered(after) == []
    assert all(after[n][3] - before[n][3] < SAMPLER_ROOM for n in after)
    page.nodes_2(not nodes_2)  # as one who tries the other
    assert covered(page.boxes()) == []


def test_files_that_are_missing_are_listed_with_their_folders_and_a_download(page, keep):
    """What the first visitor sees who has no model yet."""
    missing = "nobody_has_this.safetensors"
    graph = saved(FIRST, CheckpointLoaderSimple={0: missing}, LoadImage={0: "nobody_has_this.jpg"})
    (loader,) = [node for node in graph["nodes"] if node["type"] == "CheckpointLoaderSimple"]
    loader["properties"]["models"] = [
        {"name": missing, "url": loader["properties"]["models"][0]["url"], "directory": "checkpoints"}
    ]
    page.open(graph)
    said = " ".join(page.complaints())
    keep(page, "missing files")
    assert f"1 Missing Models Download a model, or open the node to replace it. {missing} checkpoints Download" in said
    assert "Reference face - image" in said and "ip-adapter" not in said


def test_previews_are_drawn_on_free_ground_in_nodes_2(page, host, keep):
    page.nodes_2(True)
    open_template(page, host, WITH_KV)
    check_opened(page)
    make_small(page)
    before = page.boxes()
    wait_for_picture(page, run(page, host))
    after = page.boxes()
    keep(page, f"{WITH_KV} (drawn in Nodes 2.0)")
    assert covered(after) == []
    assert any(after[n][3] > before[n][3] + 20 for n in after), "no node has grown: is there no preview?"


def test_the_provenance_of_an_encoder_stands_on_its_node_after_a_run(page, host, keep):
    open_template(page, host, WITH_KV)
    check_opened(page)
    make_small(page)
    trained = Path(TRAINED).name  # a file that no run before has read: what comes from the host's cache says nothing
    node = f"{NODES}.find(n => n.type === 'LookaheadLoadEncoder')"
    page.evaluate(f"{node}.widgets[0].value = {trained!r}")
    result = run(page, host).check()
    text = f"{node}.widgets.find(w => w.name.startsWith('$$'))?.value"
    page.wait_for(text)
    (said,) = result.outputs[str(page.evaluate(f"{node}.id"))]["text"]
    keep(page, "provenance")  # which takes a while: newer pages take texts away when a run ends
    assert page.evaluate(text) == said and said.startswith(trained) and "licence of that recogniser: Apache-2.0" in said
    make_small(page)  # another seed: the loader does not run again
    run(page, host).check()
    keep(page, "provenance, second run")
    assert page.evaluate(text) == said
    assert covered(page.boxes()) == []


def test_the_licence_of_a_face_pack_stands_on_its_node_after_a_run(page, host, keep):
    for package in ("insightface", "onnxruntime"):
        pytest.importorskip(package)
    page.open({"nodes": [], "links": [], "version": 0.4})
    page.evaluate(
        "['LookaheadLoadFaceAnalysis', 'PreviewAny'].map(type => app.graph.add(LiteGraph.createNode(type))),"
        " app.graph.nodes[0].connect(0, app.graph.nodes[1], 0)"
    )
    result = run(page, host).check()
    text = "app.graph.nodes[0].widgets.find(w => w.name.startsWith('$$'))?.value"
    page.wait_for(text)
    keep(page, "licence")
    (said,) = result.outputs[str(page.evaluate("app.graph.nodes[0].id"))]["text"]
    assert page.evaluate(text) == said and "Apache-2.0" in said


def test_the_sentence_of_a_node_that_fails_is_said(page, host, keep):
    page.open(saved(KV_ALONE, LookaheadApplyKVInjection={1: 0.9}))
    make_small(page)
    assert run(page, host).status == "error"
    said = toast_with(page, "The start (0.9) is later than the end (0.6)")
    assert said.startswith("Apply Lookahead KV Injection")
    keep(page, "error")


def test_the_sentence_of_a_value_that_the_host_refuses_is_said(page):
    page.open(saved(WITH_KV, LookaheadLoadEncoder={0: "nobody_has_this.safetensors"}))
    page.evaluate("app.queuePrompt(0)")
    toast_with(page, "There is no encoder file 'nobody_has_this.safetensors'")


def test_a_warning_of_the_log_is_said(page, host):
    """An empty mask is the usual mistake: the picture only has no likeness."""
    page.open(saved(KV_ALONE))
    page.evaluate(
        f"(apply => {PICTURE}.connect(1, apply, apply.inputs.findIndex(i => i.name === 'mask')))"
        f"({NODES}.find(n => n.type === 'LookaheadApplyKVInjection'))"
    )
    make_small(page)
    result = run(page, host)
    assert toast_with(page, "the mask of a KV injection is empty").startswith("LCM-Lookahead")
    wait_for_picture(page, result)


def test_a_node_made_by_hand_says_which_pack_it_is_of(page):
    made = page.evaluate("LiteGraph.createNode('LookaheadApplyImagePrompt').properties")
    assert made["cnr_id"] == "lcm-lookahead" and re.fullmatch(r"\d+\.\d+\.\d+", made["ver"])


@pytest.fixture
def new_page(page):
    """The page, loaded anew: what earlier tests opened takes the mouse from a node that hangs on it."""
    page.load()
    return page


def put_blueprint(page, name):
    """Search for a blueprint and put it into the graph, as a user does: the id of its node."""
    before = set(page.boxes())
    page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")  # a double click
    page.wait_for("document.activeElement.getAttribute('role') === 'combobox'")
    page.call("Input.insertText", text=name)
    option = "document.querySelector('[role=dialog] [role=option]')"
    page.wait_for(f"{option}?.innerText.replace(/\\n/g, '').startsWith({name!r})")
    page.click(option)
    page.wait_for(f"app.graph.nodes.length > {len(before)}")
    watch = Stopwatch()
    while page.evaluate("app.graph.nodes.some(n => n.flags.ghost)"):  # it hangs on the mouse, after a moment
        assert watch.seconds < 20, "the node of the blueprint could not be put down"
        if place := page.evaluate(FREE):  # none while the search is still closing
            page.click_at(*place)
        time.sleep(0.2)
    (number,) = set(page.boxes()) - before
    return int(number)


@pytest.mark.slow
@pytest.mark.parametrize("name", [graph.parts[0].name for graph in BLUEPRINTS])
def test_a_blueprint_is_found_and_put_as_one_node(new_page, keep, name):
    page = new_page
    page.open({"nodes": [], "links": [], "version": 0.4})
    number = put_blueprint(page, name)
    keep(page, f"blueprint {name}")
    title, inside = page.evaluate(
        f"(n => [n.title, n.subgraph.nodes.map(one => one.type)])(app.graph.getNodeById({number}))"
    )
    assert title == name and any(kind.startswith("Lookahead") for kind in inside)
    assert page.complaints() == []


@pytest.mark.slow
@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "Nodes 2.0"])
@pytest.mark.parametrize("name", [graph.parts[0].name for graph in BLUEPRINTS])
def test_inside_of_a_blueprint_no_node_covers_another(new_page, keep, name, nodes_2):
    page = new_page
    page.nodes_2(nodes_2)
    page.open(load(ROOT / "subgraphs" / f"{name}.json"))
    page.evaluate("app.canvas.setGraph(app.graph.nodes.find(node => node.subgraph).subgraph)")
    shown = "app.canvas.graph.nodes.every(node => document.querySelector(`[data-node-id='${node.id}']`))"
    page.wait_for(shown if nodes_2 else "app.canvas.graph !== app.graph")
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    time.sleep(1)  # nodes of Nodes 2.0 take their height when they are drawn
    keep(page, f"inside of {name}{' (Nodes 2.0)' if nodes_2 else ''}")
    boxes = page.boxes()
    assert len(boxes) >= 4 and covered(boxes) == []


@pytest.mark.slow
def test_a_graph_with_a_blueprint_put_by_hand_draws_a_picture(new_page, host, keep):
    """It takes the place of the template's own."""
    page = new_page
    name = BLUEPRINTS[0].parts[0].name
    open_template(page, host, FIRST)
    number = put_blueprint(page, name)
    page.evaluate(f"{TAKE_THE_PLACE}({number})")
    make_small(page)
    wait_for_picture(page, run(page, host))
    keep(page, f"{name} in a graph")
