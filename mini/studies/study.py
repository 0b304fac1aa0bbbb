"""What the studies share: prompts, how many people each draws, pictures in and out of a host, and how figures become a
page of docs/."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from ...evaluation.pages import templates
from ...evaluation.stats import Intervals
from ...host.client import Client, Result
from ...host.graph import Graph
from ...lookahead.files.atomic import atomic

SIZE, CFG = 128, 3.0  # side of references and pictures in pixels, and CFG scale, of the mini world
STYLES = ("photo", "oil painting", "comic", "wanted poster")
SIMILARITY, STYLE = "similarity to the own reference", "style accuracy"

#: The figures of several arms, by arm
Table = dict[str, Intervals]
PEOPLE = {
    "reference": 100,
    "knobs": 20,
    "guidance": 96,
    "presets": 96,
    "encoders": 96,
    "null-text": 20,
    "people": 48,
    "layers": 20,
    "reference-presets": 24,
    "concepts": 144,
}  # by study, how many unless said


def prompt_of(style: str) -> str:
    """The prompt that asks for a style and says nothing else."""
    return f"{'an' if style[0] in 'aeiou' else 'a'} {style} of a face"


# Graphs and pictures


def complete(nodes: Graph, info: dict[str, Any]) -> Graph:
    """Nodes in API format with the default of every input that is not given, as the page sends them."""
    for node in nodes.values():
        for name, (kind, *options) in info[node["class_type"]]["input"].get("required", {}).items():
            choices = kind if isinstance(kind, list) and kind else [None]
            default = (options[0] if options else {}).get("default", choices[0])
            if default is not None:
                node["inputs"].setdefault(name, default)
    return nodes


def to_image(pixels: Tensor) -> Image.Image:
    """A picture [3, H, W] in [0, 1] for Pillow."""
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())


def saved_pictures(host: Client, result: Result, node: str) -> Tensor:
    """The pictures that a SaveImage node of a run has saved, [n, 3, H, W] in [0, 1]."""

    def read(path: Path) -> Tensor:
        return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).float() / 255

    images = result.outputs[node]["images"]
    return torch.stack([read(host.folder("output") / image["subfolder"] / image["filename"]) for image in images])


def sheet(drawn: Mapping[str, Tensor], path: Path, columns: int = 12) -> None:
    """A row an arm, [n, 3, H, W] each; the pictures shown are spread over all."""
    count = len(next(iter(drawn.values())))
    chosen = torch.linspace(0, count - 1, min(columns, count)).long()
    rows = [torch.cat(list(pictures[chosen]), 2) for pictures in drawn.values()]
    to_image(torch.cat(rows, 1)).save(path, quality=88)


# What pictures depend on


def without_words(source: str) -> str:
    """A module as what it does: its syntax tree without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            del body[0]
    return ast.dump(tree)


# Pages


def render(template: str, **values: Any) -> str:
    """A page made from one of the templates beside this module."""
    pages = templates(Path(__file__).parent)
    return pages.get_template(template).render(values).rstrip("\n") + "\n"


def write_page(out: Path, name: str, figures: Mapping[str, Any], page: str) -> None:
    """Write NAME.json (an interval is a list: value, low, high) and NAME.md into `out`, and print the page."""
    out.mkdir(parents=True, exist_ok=True)
    for path, text in ((out / f"{name}.json", json.dumps(figures, indent=1) + "\n"), (out / f"{name}.md", page)):
        with atomic(path) as part:
            part.write_text(text)
    print(page)


def pyplot() -> ModuleType:
    """matplotlib's pyplot, drawing into files alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure without wasted margins."""
    figure.tight_layout()
    figure.savefig(path, dpi=110)
