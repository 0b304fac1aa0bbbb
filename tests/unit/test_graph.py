"""Graphs in the API format that are put together by name."""

import pytest
from lcm_lookahead.host.graph import Graph
from picture_files import files_of


def test_several_batches_of_pictures_keep_their_own_files():
    graph, batches = Graph(), (["a", "b", "c"], ["d", "e", "f"], ["a", "b"], ["a", "e"], ["d"])
    links = [graph.pictures(files) for files in batches]
    assert [files_of(graph, link) for link in links] == [list(files) for files in batches]


def test_a_node_may_be_added_again_and_another_of_its_name_is_refused():
    graph = Graph()
    assert graph.add("face", "LoadImage", image="a.png") == graph.add("face", "LoadImage", image="a.png") == ["face", 0]
    with pytest.raises(ValueError, match="another node 'face'"):
        graph.add("face", "LoadImage", image="b.png")
    assert graph["face"]["inputs"] == {"image": "a.png"}
