"""The page of hosts as others have them: without the pack, with it in another folder, with no model at all."""

import contextlib
import re

import pytest
from lcm_lookahead.host import page as tool
from lcm_lookahead.host.fetch import DEFAULT_VERSION
from lcm_lookahead.host.workflow import load
from lcm_lookahead.mini.files.host_models import MINI_EXTENSIONS
from lcm_lookahead.tools.common import ROOT
from visit import make_small, run, wait_for_picture

FIRST = "01 Face under a new prompt"
# Every loader whose choice is empty, each with a node that makes the host want it.
LOADERS = """(names => names.map(name => {
    const node = LiteGraph.createNode(name);
    app.graph.add(node);
    if (!node.constructor.nodeData.output_node) {
        const shown = LiteGraph.createNode("PreviewAny");
        app.graph.add(shown);
        node.connect(0, shown, 0);
    }
    return node.title;
}))"""


@pytest.fixture
def visit(window, models):
    """Opens the page of a host with other options."""

    @contextlib.contextmanager
    def opened(prepare=models, **options):
        options |= {"version": DEFAULT_VERSION, "extensions": MINI_EXTENSIONS, "announce": False}
        with tool.page_host(prepare, **options) as host, tool.Page(host.url, window) as page:
            yield host, page

    return opened


@pytest.mark.slow  # a host and a browser each
def test_a_page_without_the_pack_names_it(visit, keep):
    with visit(pack=None) as (_, page):
        page.open(load(ROOT / "workflows" / f"{FIRST}.json"))
        said = " ".join(page.complaints())
        keep(page, "without the pack")
    assert "lcm-lookahead" in said and "Unknown pack" not in said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LCM-Lookahead-main", "comfyui-lcm-lookahead-0.1.0"])
def test_a_pack_in_a_folder_of_another_name_opens_and_draws(visit, keep, name):
    with visit(pack_name=name) as (host, page):
        page.open_templates(name)
        page.pick_template(FIRST)
        assert page.complaints() == []
        make_small(page)
        wait_for_picture(page, run(page, host))
        keep(page, name)
        assert page.toasts() == []


def test_loaders_say_in_a_sentence_that_there_is_no_file_and_where_it_belongs(visit, keep):
    with visit(prepare=None) as (host, page):
        empty = {
            name: one
            for name, node in host.object_info().items()
            for one, (kind, *options) in node["input"].get("required", {}).items()
            if name.startswith("Lookahead") and [] in (kind, (options or [{}])[0].get("options"))
        }
        assert {"LookaheadLoadEncoder", "LookaheadConvertEncoder", "LookaheadLoadReference"} <= set(empty)
        page.open({"nodes": [], "links": [], "version": 0.4})
        titles = page.evaluate(f"{LOADERS}({list(empty)})")
        page.evaluate("app.queuePrompt(0)")
        page.wait_for(f"{tool.TOASTS}.length >= {len(empty)}", 30)
        said = page.toasts()
        keep(page, "no models")
        for title in titles:
            assert any(re.search(rf"^{title}\n.*There is no .* yet: .*\.$", text) for text in said), (title, said)
        assert any("Required input is missing: image" in text for text in said)
        assert not re.search("positional argument|TypeError|Traceback", " ".join(said))
        assert "positional argument" not in host.log
