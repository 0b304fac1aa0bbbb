"""A workflow as a person thinks of it (nodes by name, links by name, columns), and how a part of it is folded into a
subgraph in ComfyUI's save format."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Of the ids of graphs and subgraphs, by their names: they stay the same whenever the files are written.
NAMESPACE = uuid.UUID("15d8a7ae-1bce-57e9-80ac-76a2e697c8bd")
INPUT_NODE, OUTPUT_NODE = -10, -20  # ids of the boxes at the edges of a subgraph

#: The title of the frame around nodes of a type.
GROUPS = {"CLIPTextEncode": "Prompt", "LookaheadEncodeConceptPrompt": "Prompt"} | dict.fromkeys(
    ("VAEDecode", "ImageStitch", "PreviewImage", "SaveImage"), "Result"
)

GraphEntry = dict[str, Any]


def identifier(*names: str) -> str:
    """A UUID made of names."""
    return str(uuid.uuid5(NAMESPACE, "/".join(names)))


@dataclass(frozen=True)
class Node:
    """A node: its class, the values of its widgets, and its links: an input's name -> the name of the node it comes
    from, or "node.output".

    height: least height in units; below: units that stay free under it (for previews that make it grow); off: muted.
    """

    type: str
    title: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    height: float = 0.0
    below: float = 0.0
    colour: str = ""
    off: bool = False


@dataclass(frozen=True)
class Subgraph:
    """A part of a graph that is folded into one node.

    nodes: names of its nodes; inputs: the new node's inputs -> (node, input) pairs that each of them feeds; widgets:
    its values -> (node, widget); outputs: its outputs -> "node" or "node.output".
    """

    name: str
    description: str
    nodes: Sequence[str]
    inputs: Mapping[str, Sequence[tuple[str, str]]]
    widgets: Mapping[str, tuple[str, str]]
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class Template:
    """A workflow file to be: nodes by name, subgraphs, columns of names from left to right with their widths, and what
    its app asks for (node, widget) and shows (node)."""

    nodes: Mapping[str, Node]
    columns: Sequence[tuple[float, Sequence[str]]]
    parts: Sequence[Subgraph] = ()
    asks: Sequence[tuple[str, str]] = ()
    shows: Sequence[str] = ()
    app: bool = False


def source(link: str) -> tuple[str, str | None]:
    """ "node.output" -> its halves; None for the first output."""
    name, _, output = link.partition(".")
    return name, output or None


def group_of(node: Node) -> str:
    """The group in which a workflow frames a node, with its like beside it in the column; "" for none."""
    if node.type == "LoadImage" and not node.title.startswith("Picture"):  # a pose, a scene: none of who is drawn
        return "Reference"
    return GROUPS.get(node.type, "")


def framed(graph: Template) -> list[tuple[str, list[str]]]:
    """The groups of a workflow: each a title and the names of nodes that stand one below the other.

    What only shows pictures is framed with a node that saves them, not alone.
    """
    groups: list[tuple[str, list[str]]] = []
    for _, names in graph.columns:
        titles = [group_of(graph.nodes[name]) if name in graph.nodes else "" for name in names]
        for title, run in itertools.groupby(zip(titles, names, strict=True), key=lambda pair: pair[0]):
            members = [name for _, name in run]
            saves = any(graph.nodes[name].type == "SaveImage" for name in members if name in graph.nodes)
            if title and (saves or title != "Result"):
                groups.append((title, members))
    return groups


def slot_at(slots: Sequence[GraphEntry], name: str | None) -> int:
    """The place of a socket by its name, the first without one. Raises LookupError."""
    if name is None:
        return 0
    for place, slot in enumerate(slots):
        if name in (slot["name"], slot.get("localized_name")):
            return place
    raise LookupError(f"there is no socket {name!r} among {[slot['name'] for slot in slots]}")


class Folding:
    """Folds one part of a saved graph into a subgraph, in place.

    Args:
        file: the graph in the save format.
        ids: the id of each node by its name.
    """

    def __init__(self, file: GraphEntry, ids: Mapping[str, int], part: Subgraph) -> None:
        self.file, self.ids, self.part = file, ids, part
        self.nodes = {node["id"]: node for node in file["nodes"]}
        self.host_id = max(self.nodes) + 1
        self.last_link = file["last_link_id"]
        inside = {ids[name] for name in part.nodes}
        self.members = [node for node in file["nodes"] if node["id"] in inside]
        self.outer = {link[0]: link for link in file["links"] if not (link[1] in inside and link[3] in inside)}
        keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        self.inner = [dict(zip(keys, link, strict=True)) for link in file["links"] if link[0] not in self.outer]
        self.inputs: list[GraphEntry] = []  # of the definition
        self.outputs: list[GraphEntry] = []
        self.host: GraphEntry = {
            "id": self.host_id,
            "type": identifier("subgraph", part.name),
            "title": part.name,
            "pos": [40, 60],
            "size": [340, 100],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "properties": {},
            "widgets_values": [],
        }

    def _link(self, origin: tuple[int, int], target: tuple[int, int], kind: str) -> int:
        self.last_link += 1
        ends = dict(zip(("origin_id", "origin_slot", "target_id", "target_slot"), (*origin, *target), strict=True))
        self.inner.append({"id": self.last_link, **ends, "type": kind})
        return self.last_link

    def _slot(self, kind: str, name: str, type_: str, links: list[int]) -> GraphEntry:
        return {"id": identifier(self.part.name, kind, name), "name": name, "type": type_, "linkIds": links}

    def _input(self, name: str, targets: Sequence[tuple[str, str]], widget: bool) -> None:
        place, links, kind, arriving = len(self.inputs), [], "*", None
        for target, entry_name in targets:
            node = self.nodes[self.ids[target]]
            at = slot_at(node["inputs"], entry_name)
            entry = node["inputs"][at]
            if entry["link"] is not None:
                arriving = self.outer.pop(entry["link"])
            kind = entry["type"]
            entry["link"] = self._link((INPUT_NODE, place), (node["id"], at), kind)
            links.append(entry["link"])
        self.inputs.append(self._slot("input", name, kind, links))
        entry = {"name": name, "type": kind, "link": None}
        if widget:
            entry["widget"] = {"name": name}
        if arriving is not None:  # one of several that carry the same
            self.outer[arriving[0]] = [*arriving[:3], self.host_id, place, arriving[5]]
            entry["link"] = arriving[0]
        self.host["inputs"].append(entry)

    def _output(self, name: str, link: str) -> None:
        target, output_name = source(link)
        place, node = len(self.outputs), self.nodes[self.ids[target]]
        at = slot_at(node["outputs"], output_name)
        output = node["outputs"][at]
        leaving = [number for number, one in self.outer.items() if one[1] == node["id"] and one[2] == at]
        for number in leaving:
            self.outer[number][1:3] = [self.host_id, place]
        inner = self._link((node["id"], at), (OUTPUT_NODE, place), output["type"])
        output["links"] = [number for number in output["links"] or [] if number not in leaving] + [inner]
        self.outputs.append(self._slot("output", name, output["type"], [inner]))
        self.host["outputs"].append({"name": name, "type": output["type"], "links": leaving})

    def fold(self, values: Mapping[str, Any]) -> int:
        """Fold; values: of the part's widgets. Answers the id of the new node."""
        for name, targets in self.part.inputs.items():
            self._input(name, targets, False)
        for name, target in self.part.widgets.items():
            self._input(name, [target], True)
            self.host["widgets_values"].append(values[name])
        for name, link in self.part.outputs.items():
            self._output(name, link)
        inside = {node["id"] for node in self.members}
        rest = [node for node in self.file["nodes"] if node["id"] not in inside]
        for node in rest:
            for output in node["outputs"]:
                output["links"] = [number for number in output["links"] or [] if number in self.outer]
        left = 0.0
        for node in self.members:
            node["pos"] = [left, 40]
            left += node["size"][0] + 60
        definition = {
            "id": self.host["type"],
            "version": 1,
            "state": {"lastGroupId": 0, "lastNodeId": self.host_id, "lastLinkId": self.last_link, "lastRerouteId": 0},
            "revision": 0,
            "config": {},
            "name": self.part.name,
            "inputNode": {"id": INPUT_NODE, "bounding": [-260, 40, 140, 40 + 20 * len(self.inputs)]},
            "outputNode": {"id": OUTPUT_NODE, "bounding": [left, 40, 140, 40 + 20 * len(self.outputs)]},
            "inputs": self.inputs,
            "outputs": self.outputs,
            "widgets": [],
            "nodes": self.members,
            "groups": [],
            "links": self.inner,
            "extra": {},
            "category": "lookahead",
            "description": self.part.description,
        }
        self.file |= {"nodes": [*rest, self.host], "links": list(self.outer.values())}
        self.file |= {"last_node_id": self.host_id, "last_link_id": self.last_link}
        self.file.setdefault("definitions", {}).setdefault("subgraphs", []).append(definition)
        return self.host_id
