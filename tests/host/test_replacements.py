"""Renamed nodes: an entry reaches the host's own manager, which rewrites a graph that has the old id."""

import asyncio
import sys
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.contract


@pytest.fixture
def manager(pack, monkeypatch):
    """The host's manager of replacements, where its server would hold it: no server runs here."""
    from app.node_replace_manager import NodeReplaceManager

    made = NodeReplaceManager()
    holder = SimpleNamespace(instance=SimpleNamespace(node_replace_manager=made))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=holder))
    return made


@pytest.fixture
def module(pack):
    return pack.module("nodes.replacements")


def test_a_renamed_node_is_replaced_in_a_graph_with_its_inputs_under_their_new_names(module, manager):
    entry = module.Renamed(
        old="LookaheadOldRank",
        new="LookaheadRank",
        inputs={"pictures": "images", "scores": "scores"},
        values={"keep": 1},
        widgets=("keep",),
    )
    asyncio.run(module.register_replacements([entry]))
    graph = {
        "1": {"class_type": "LookaheadOldRank", "inputs": {"pictures": ["2", 0], "scores": ["3", 1]}, "_meta": {}},
        "2": {"class_type": "LoadImage", "inputs": {"image": "a.png"}, "_meta": {}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}, "_meta": {}},
    }
    manager.apply_replacements(graph)
    assert graph["1"]["class_type"] == "LookaheadRank"
    assert graph["1"]["inputs"] == {"images": ["2", 0], "scores": ["3", 1], "keep": 1}
    assert graph["4"]["inputs"] == {"images": ["1", 0]}
    (told,) = manager.as_dict()["LookaheadOldRank"]
    assert told["new_node_id"] == "LookaheadRank" and told["old_widget_ids"] == ["keep"]


def test_the_entries_of_this_version_lead_from_ids_that_are_gone_to_nodes_that_are_there(pack, module, manager):
    asyncio.run(module.register_replacements())
    assert manager.as_dict().keys() == {one.old for one in module.RENAMED}
    for one in module.RENAMED:
        assert one.old not in pack.nodes and one.new in pack.nodes


def test_a_host_without_the_hook_is_told_nothing(module, manager, monkeypatch):
    monkeypatch.setattr(module, "latest", SimpleNamespace(io=SimpleNamespace(), ComfyAPI=lambda: SimpleNamespace()))
    asyncio.run(module.register_replacements([module.Renamed("LookaheadOld", "LookaheadRank")]))
    assert manager.as_dict() == {}
