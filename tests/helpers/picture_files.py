"""The files behind a link of a graph in the API format."""

from __future__ import annotations

from lcm_lookahead.host.graph import Graph, Link


def files_of(graph: Graph, link: Link) -> list[str]:
    """The files that a batch of pictures is of, in order."""
    inputs = graph[str(link[0])]["inputs"]
    return (
        [inputs["image"]]
        if "image" in inputs
        else files_of(graph, inputs["image1"]) + files_of(graph, inputs["image2"])
    )
