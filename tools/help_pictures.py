"""Draws the pictures of the help pages again: each node as ComfyUI's page shows it, with its default values.

python -m lcm_lookahead.tools.help_pictures                 all nodes
python -m lcm_lookahead.tools.help_pictures Score Rank      those with one of these in their names

A picture says in its text `inputs` which inputs the node had, so that a test sees one that is out of date.
"""

from __future__ import annotations

import argparse
import json
import uuid
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..host.page import Page, page_host
from ..lookahead.files.atomic import atomic
from ..mini.files.host_models import touch_models
from .common import ROOT, run_main, say
from .templates import BUILD, COLOURS, OURS

PICTURES = ROOT / "web" / "docs" / "pictures"
AROUND = 24  # pixels of the graph around a node
WIDTH = 320  # of a node, at least: about that of the panel which shows the help
SHADES = 64


def inputs_of(node: dict[str, Any]) -> str:
    """The names of a node's inputs in their order, by its description of the host."""
    return ", ".join(name for kind in ("required", "optional") for name in node["input"].get(kind, ()))


def drawn(page: Page, name: str) -> Image.Image:
    """A node alone, with its default values, in the colour that it has in the workflows."""
    page.open({"id": str(uuid.uuid4()), "nodes": [], "links": [], "version": 0.4})
    page.evaluate(f"{BUILD}({json.dumps([{'name': name, 'type': name, 'values': {}, 'links': []}])})")
    colour, inside = COLOURS["ours"]
    page.evaluate(
        f"app.graph.nodes.forEach(n => {{ n.color = '{colour}'; n.bgcolor = '{inside}';"
        f" const [width, height] = n.computeSize(); n.setSize([Math.max({WIDTH}, width), height]); }})"
    )
    return page.picture(margin=AROUND)


def write(picture: Image.Image, path: Path, inputs: str) -> None:
    """Write a picture with few colours, as a page of help needs no more."""
    about = PngInfo()
    about.add_text("inputs", inputs)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as part:
        picture.quantize(SHADES).save(part, "PNG", pnginfo=about, optimize=True)


def main(arguments: list[str]) -> int:
    """Entry point of the command."""
    parser = argparse.ArgumentParser(prog="help_pictures", description="Draws the pictures of the help pages again.")
    parser.add_argument("names", nargs="*", help="parts of the names of the nodes to draw; all without one")
    chosen = parser.parse_args(arguments)
    with page_host(touch_models) as host, Page(host.url, (1600, 1000)) as page:
        ours = {name: node for name, node in host.object_info().items() if name.startswith(OURS)}
        for name in ours:
            if chosen.names and not any(part in name for part in chosen.names):
                continue
            picture = drawn(page, name)
            write(picture, PICTURES / f"{name}.png", inputs_of(ours[name]))
            say(f"{name}: {picture.width} x {picture.height}")
    return 0


if __name__ == "__main__":
    run_main(main)
