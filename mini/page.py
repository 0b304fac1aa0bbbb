"""`make page`: ComfyUI with this pack and the mini world, in your own browser.

Model files stand under the names that the shared workflows have, and each workflow is there a second time at the mini
world's size (Workflows, w on the keyboard, folder `mini world`), with a note that says so. What you draw stays in
`output/page`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..host.page import page_host
from ..host.workflow import load
from ..tools.common import ROOT, run_main, say
from .demo import CFG, SCALES, SIZE, STEPS, STOCK
from .files.host_models import (
    MINI_EXTENSIONS,
    THINGS,
    THINGS_VISION,
    TRAINED,
    link_models,
    link_things,
    write_taesd,
)

WORKFLOWS = ROOT / "workflows"
FOLDER = Path("user", "default", "workflows", "mini world")
# What each node gets there: the encoder that was trained for it, 128 pixels, and the guidance that it looks best at.
VALUES: dict[str, dict[str, Any]] = {
    "CLIPTextEncode": {"text": "a photo of a face on a beach"},  # those with a title that begins with Prompt
    "LookaheadLoadEncoder": {"encoder_name": Path(TRAINED).name},
    "LookaheadEncodeConceptPrompt": {"text": "a comic of a S* on a beach"},
    "EmptyLatentImage": {"width": SIZE, "height": SIZE},
    "ImageScale": {"width": SIZE, "height": SIZE},
    "LookaheadEncodeReference": {"size": SIZE},
    "LookaheadLPIPSLoss": {"weights": "random", "backbone": "squeeze"},  # vgg's weights are not part of it
    "BasicScheduler": {"steps": STEPS},
    "KSampler": {"steps": STEPS, "cfg": CFG},
    "LookaheadPreviewGrid": {"steps": STEPS, "cfg": CFG},
    "CFGGuider": {"cfg": CFG},
    "LookaheadGuider": SCALES,
}
CONCEPT = {  # where there are concepts: what knows things
    "CheckpointLoaderSimple": {"ckpt_name": Path(THINGS).name},
    "CLIPVisionLoader": {"clip_name": Path(THINGS_VISION).name},
}
FEW_STEPS = 12  # with a few-step LoRA in the model, steps and guidance stay as they are
NOTE = (
    f"## The mini world\n\nA tiny SDXL that knows drawn faces alone. **Pictures are {SIZE}x{SIZE}**, {STEPS} steps, "
    f"guidance {CFG:g}: a picture takes a second or so on a CPU. At SDXL's 1024x1024 it draws nothing good.\n\n"
    "Prompts it knows: *a photo / a pencil drawing / an oil painting / a comic / a pixel art / a blueprint / a wanted "
    "poster of a face*, and *on a beach / in the snow / ...*. For concepts it knows things, too: *a mug, a "
    "fish, a robot*"
)


def at_mini_size(saved: dict[str, Any]) -> dict[str, Any]:
    """A workflow in the save format with the mini world's VALUES, also in its subgraphs, and a NOTE above its nodes."""
    workflow = copy.deepcopy(saved)
    graphs = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
    kinds = {node["type"] for graph in graphs for node in graph["nodes"]}
    values = VALUES | (CONCEPT if "LookaheadEncodeConceptPrompt" in kinds else {})
    nodes = [node for graph in graphs for node in graph["nodes"] if node["type"] in values]
    steps = [node["widgets_values"][place] for node in nodes for place, name in _widgets(node) if name == "steps"]
    few = bool(steps) and max(steps) <= FEW_STEPS
    for node in nodes:
        for place, name in _widgets(node):
            value = values[node["type"]].get(name)
            if node["type"] == "CLIPTextEncode":
                fixed = not node.get("title", "").startswith("Prompt")
            else:
                fixed = few and name in ("steps", "cfg", *SCALES)
            other = node["type"] == "LookaheadLoadEncoder" and node["widgets_values"][place] != STOCK  # of another kind
            if value is not None and not fixed and not other:
                node["widgets_values"][place] = value
    workflow["last_node_id"] = number = max(workflow["last_node_id"], *(node["id"] for node in workflow["nodes"])) + 1
    corners = [node["pos"] for node in workflow["nodes"]]
    left, top = (min(corner[k] for corner in corners) for k in (0, 1))
    note = {
        "id": number,
        "type": "MarkdownNote",
        "title": "The mini world",
        "pos": [left, top - 280],  # clear of the titles of nodes and groups
        "size": [560, 200],
        "mode": 0,
    }
    note |= {
        "flags": {},
        "inputs": [],
        "outputs": [],
        "properties": {},
        "widgets_values": [NOTE],
        "order": 0,
        "color": "#432",
    }
    workflow["nodes"].append(note)
    return workflow


def _widgets(node: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """Place and name of each value in a saved node's `widgets_values`."""
    place = 0
    for entry in node.get("inputs", []):
        if "widget" not in entry:
            continue
        name = entry["widget"]["name"]
        if place < len(node.get("widgets_values") or ()):
            yield place, name
        place += 2 if name in ("seed", "noise_seed") else 1  # a seed is followed by what becomes of it


def prepare(base: Path) -> None:
    """Put the mini world's models and workflows into a host's base directory. (The pack itself brings the faces.)"""
    link_models(base)
    write_taesd(base)
    link_things(base)
    paths = sorted(WORKFLOWS.glob("*.json"))
    saved = {path: load(path) for path in paths}
    saved = {path: workflow for path, workflow in saved.items() if "nodes" in workflow}
    (base / FOLDER).mkdir(parents=True, exist_ok=True)
    for path, workflow in saved.items():
        target = base / FOLDER / path.name
        if not target.exists():  # the user's own changes stay
            target.write_text(json.dumps(at_mini_size(workflow)), encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Entry point of `make page`."""
    parser = argparse.ArgumentParser(prog="make page", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--port", type=int, default=os.environ.get("PORT") or 0, help="of ComfyUI (default: a free one)"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "output" / "page", help="ComfyUI's base directory")
    parser.add_argument("--no-browser", action="store_true", help="print the address alone")
    chosen = parser.parse_args(arguments)
    options = {"base": chosen.folder, "port": chosen.port or None, "extensions": MINI_EXTENSIONS}
    with page_host(prepare, **options) as host:
        say(f"The mini world draws at {SIZE}x{SIZE} pixels, {STEPS} steps, guidance {CFG:g}.")
        say("Open its workflows at the left: Workflows (w), folder `mini world`. Ctrl+C ends ComfyUI.")
        print(host.url, flush=True)
        if not chosen.no_browser and not webbrowser.open(host.url):
            say("No browser could be opened: open that address in yours.")
        while True:
            try:
                host.check_alive()
                time.sleep(1)
            except KeyboardInterrupt:
                return 0


if __name__ == "__main__":
    run_main(main)
