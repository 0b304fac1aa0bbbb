"""Writes the workflow files, apps and blueprints: what `template_specs` says, made into files by ComfyUI's own page.

python -m lcm_lookahead.tools.templates                 write workflows/*.json and subgraphs/*.json again
python -m lcm_lookahead.tools.templates two             only those with `two` in their names
python -m lcm_lookahead.tools.templates --pictures      draw the example pictures and the thumbnails again (minutes)

So a node that has a new input gets it in every file, with its default, and no file is edited by hand.
"""

from __future__ import annotations

import argparse
import json
import tomllib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..host.fetch import DEFAULT_VERSION
from ..host.page import Page, page_host, text_of
from ..mini.files.host_models import touch_models
from . import template_specs as specs
from . import template_workflows
from .common import ROOT, run_main, say
from .template_graph import Folding, GraphEntry, Template, framed, identifier, source

OURS, COLOURS = "Lookahead", {"ours": ("#223", "#335"), "good": ("#232", "#353"), "bad": ("#322", "#533")}
TITLE, GAP, BESIDE = 30, 50, 50  # a node's title, which lies above its place; free room above it; and beside it
#: Of a group's frame: room beside and below its nodes, and above their titles for its own. Below GAP
#: together, so that two groups one below the other are apart.
FRAME, FRAME_TOP = 10, 36
GROUP_COLOURS = {"Reference": "#3f789e", "Prompt": "#8a8", "Result": "#b06634"}  # of the page's own list
#: Makes the nodes of a graph and joins them; answers the page's own file, and the id of each node.
BUILD = """(spec => {
  const nodes = {};
  const pick = (list, name, node) => {
    const at = (list ?? []).findIndex(one => one.name === name || one.localized_name === name || one.label === name);
    if (at < 0) throw Error(`${node.type} has no ${name}: ${(list ?? []).map(one => one.name)}`);
    return at;
  };
  for (const one of spec) {
    const node = LiteGraph.createNode(one.type);
    if (!node) throw Error(`no node ${one.type}`);
    app.graph.add(node);
    nodes[one.name] = node;
    const inputs = {...node.constructor.nodeData?.input?.required, ...node.constructor.nodeData?.input?.optional};
    for (const widget of node.widgets ?? []) widget.value = inputs[widget.name]?.[1]?.default ?? widget.value;
    // Beside a preset stand the numbers that it means, as where it is chosen by hand (nodes/presets.py).
    const told = inputs.preset?.[1]?.lookahead_presets?.[one.values.preset];
    for (const [name, value] of Object.entries({...told, ...one.values}))
      node.widgets[pick(node.widgets, name, node)].value = value;
  }
  for (const one of spec)
    for (const [input, name, output] of one.links) {
      const from = nodes[name], to = nodes[one.name];
      if (!from) throw Error(`${one.name} is linked to ${name}, which is not there`);
      from.connect(output === null ? 0 : pick(from.outputs, output, from), to, pick(to.inputs, input, to));
    }
  return [app.graph.serialize(), Object.fromEntries(spec.map(one => [one.name, Number(nodes[one.name].id)]))];
})"""


def version_of_pack() -> str:
    """The version in pyproject.toml, which stands on every node of ours."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def properties(node: GraphEntry, version: str) -> GraphEntry:
    """Makes what a file says of where a node comes from and which model files it names."""
    if node["type"] in specs.NOTES:
        return {}
    ours = node["type"].startswith(OURS) or "-" in node["type"]  # a subgraph's type is a UUID
    found: GraphEntry = (
        {"cnr_id": specs.PACK, "ver": version} if ours else {"cnr_id": "comfy-core", "ver": DEFAULT_VERSION}
    )
    if "-" not in node["type"]:
        found["Node name for S&R"] = node["type"]
    values = [value for value in node.get("widgets_values") or [] if isinstance(value, str)]
    models = [model for value in values for model in specs.MODELS.get(value, ())]
    return found | ({"models": models} if models else {})


def all_nodes(file: GraphEntry) -> Iterator[GraphEntry]:
    """Every node of a file, those inside of subgraphs too."""
    yield from file["nodes"]
    for definition in file.get("definitions", {}).get("subgraphs", ()):
        yield from definition["nodes"]


def drawn(page: Page, graph: Template) -> tuple[GraphEntry, dict[str, int]]:
    """The graph as the page makes it, folded, without places; and the id of each node by its name."""
    spec = [
        {
            "name": name,
            "type": node.type,
            "values": dict(node.values),
            "links": [[entry, *source(link)] for entry, link in node.links.items()],
        }
        for name, node in graph.nodes.items()
    ]
    # An empty graph of its own: the page remembers values by graph, node and name.
    page.open({"id": str(uuid.uuid4()), "nodes": [], "links": [], "version": 0.4})
    file, ids = page.evaluate(f"{BUILD}({json.dumps(spec)})")
    version = version_of_pack()
    named = {number: name for name, number in ids.items()}
    for node in file["nodes"]:
        node["size"] = [max(300, node["size"][0]), node["size"][1]]
        if graph.nodes[named[node["id"]]].title:
            node["title"] = graph.nodes[named[node["id"]]].title
        if graph.nodes[named[node["id"]]].off:
            node["mode"] = 2
    for part in graph.parts:
        values = {name: graph.nodes[node].values[widget] for name, (node, widget) in part.widgets.items()}
        ids[part.name] = Folding(file, ids, part).fold(values)
    for node in all_nodes(file):
        node["properties"] = properties(node, version)
    return file, ids


def placed(page: Page, graph: Template, file: GraphEntry, ids: dict[str, int]) -> GraphEntry:
    """The file with every node in its place, large enough for what it shows in the classic page and in Nodes 2.0."""
    page.open(file)
    file, needed = page.saved(), page.needed_sizes()
    by_id = {node["id"]: node for node in file["nodes"]}
    page.nodes_2(True)
    tall = {number: bottom - top - TITLE for number, (_, top, _, bottom) in page.boxes().items()}
    page.nodes_2(False)
    left = 40.0
    for width, names in graph.columns:
        top = 60.0 + TITLE
        for name in names:
            node, spec = by_id[ids[name]], graph.nodes.get(name, specs.FOLDED)
            least_width, least_height = needed[str(node["id"])]
            if least_width > width:
                raise ValueError(f"{name} needs a width of {least_width:.0f}, and its column has {width}.")
            folded = name not in graph.nodes
            grows = folded or node["type"].startswith(OURS)
            shown = tall[str(node["id"])] if grows else 0.0
            height = round(max(spec.height, least_height, shown))
            node |= {"pos": [left, top], "size": [width, height]}
            colour = spec.colour or ("ours" if node["properties"].get("cnr_id") == specs.PACK else "")
            if colour:
                node["color"], node["bgcolor"] = COLOURS[colour]
            top += height + spec.below + GAP + TITLE
        left += width + BESIDE
    missing = {node["id"] for node in file["nodes"]} - {ids[name] for _, names in graph.columns for name in names}
    if missing:
        raise ValueError(f"no column holds {[by_id[number]['type'] for number in missing]}.")
    file["groups"] = [
        group(number, title, [by_id[ids[name]] for name in names])
        for number, (title, names) in enumerate(framed(graph), 1)
    ]
    return file


def group(number: int, title: str, nodes: list[GraphEntry]) -> GraphEntry:
    """A frame around nodes that stand one below the other."""
    left, top = nodes[0]["pos"][0] - FRAME, nodes[0]["pos"][1] - TITLE - FRAME_TOP
    right, bottom = (max(node["pos"][k] + node["size"][k] for node in nodes) + FRAME for k in (0, 1))
    return {
        "id": number,
        "title": title,
        "bounding": [left, top, right - left, bottom - top],
        "color": GROUP_COLOURS[title],
        "flags": {},
    }


def write(page: Page, name: str, graph: Template) -> list[Path]:
    """Write a workflow file and, where the graph asks for one, its app."""
    file, ids = drawn(page, graph)
    file = placed(page, graph, file, ids)
    file["id"] = identifier("workflow", name)
    asks = [[ids[node], widget] for node, widget in graph.asks]
    file["extra"] = {"linearData": {"inputs": asks, "outputs": [ids[node] for node in graph.shows]}}
    written = [(ROOT / "workflows" / f"{name}.json", file)]
    if graph.app:
        app = {**file, "id": identifier("app", name), "extra": {**file["extra"], "linearMode": True}}
        written.append((ROOT / "workflows" / f"{name}.app.json", app))
    for path, one in written:
        path.write_text(text_of(normal(page, one)), encoding="utf-8")
    return [path for path, _ in written]


def normal(page: Page, file: GraphEntry) -> GraphEntry:
    """A file as the page saves it."""
    page.open({**file, "extra": {**file["extra"], "linearMode": False}})
    saved = page.saved()
    return {**saved, "extra": {**saved["extra"], **file["extra"]}}


def blueprint(page: Page, graph: Template) -> Path:
    """Write a graph that is one subgraph as a blueprint: the page offers it as a node of its own."""
    (part,) = graph.parts
    file, ids = drawn(page, graph)
    host = next(node for node in file["nodes"] if node["id"] == ids[part.name])
    for entry in (*host["inputs"], *host["outputs"]):
        entry["link" if "link" in entry else "links"] = None if "link" in entry else []
    alone: dict[str, Any] = {
        **file,
        "id": identifier("blueprint", part.name),
        "nodes": [host],
        "links": [],
        "extra": {},
    }
    page.open(alone)
    path = ROOT / "subgraphs" / f"{part.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text_of(page.saved()), encoding="utf-8")
    return path


def main(arguments: list[str]) -> int:
    """Entry point of `python -m lcm_lookahead.tools.templates`."""
    parser = argparse.ArgumentParser(prog="tools.templates", description="Writes workflow files and blueprints.")
    parser.add_argument("name", nargs="?", default="", help="a part of the names of those to write (default: all)")
    parser.add_argument("--pictures", action="store_true", help="draw example pictures and thumbnails, not the files")
    chosen = parser.parse_args(arguments)
    if chosen.pictures:
        from .template_pictures import draw_all

        draw_all(chosen.name)
        return 0
    with page_host(touch_models) as host, Page(host.url) as page:
        for name, graph in template_workflows.WORKFLOWS.items():
            if chosen.name.lower() in name.lower():
                for path in write(page, name, graph):
                    say(f"{path.relative_to(ROOT)} is written")
        for graph in specs.BLUEPRINTS:
            if chosen.name.lower() in graph.parts[0].name.lower():
                say(f"{blueprint(page, graph).relative_to(ROOT)} is written")
    return 0


if __name__ == "__main__":
    run_main(main)
