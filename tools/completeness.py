"""What a node that works still lacks before it is merged, a line each, with the command that makes it.

python -m lcm_lookahead.tools.completeness       picture of the help, translations, workflow, line in the changelog

None of it keeps the node from working: where a translation is missing, ComfyUI's page shows the English.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..host.server import Host
from .common import ROOT, run_main
from .help_pictures import PICTURES, inputs_of
from .locales import LANGUAGES, OURS, Locales, texts

RUN = "python -m lcm_lookahead.tools"
#: Nodes that no workflow and no blueprint shows, with the reason.
WITHOUT_WORKFLOW: dict[str, str] = {}


def lacking(object_info: Mapping[str, Mapping[str, Any]], locales: Locales, root: Path = ROOT) -> list[str]:
    """All that our nodes lack, a line each.

    Args:
        object_info: as for `locales.english`.
        locales: the texts of the same nodes.
        root: the repository.
    """
    ours = {id: node for id, node in sorted(object_info.items()) if id.startswith(OURS)}
    return [
        *(f"{id}: {line}" for id, node in ours.items() for line in _picture(id, node, root)),
        *(f"{id}: {line}" for id in ours for line in _translations(id, locales)),
        *(f"{id}: {line}" for id in ours for line in _shown(id, root)),
    ]


def _picture(id: str, node: Mapping[str, Any], root: Path) -> Iterator[str]:
    path = root / PICTURES.relative_to(ROOT) / f"{id}.png"
    if not path.is_file():
        yield f"its help has no picture: {RUN}.help_pictures {id}, which the page shows by ![...](pictures/{id}.png)"
    else:
        with Image.open(path) as picture:
            if getattr(picture, "text", {}).get("inputs") != inputs_of(node):
                yield f"the picture of its help has other inputs: {RUN}.help_pictures {id}"
    page = root / "web" / "docs" / f"{id}.md"
    if not page.is_file():
        yield f"it has no help page: write web/docs/{id}.md as that of a node beside it"
    elif path.is_file() and f"](pictures/{id}.png)" not in page.read_text(encoding="utf-8"):
        yield f"its help page does not show its picture: put ![...](pictures/{id}.png) under the first paragraph"


def _translations(id: str, locales: Locales) -> Iterator[str]:
    own = set(texts(locales.trees["nodeDefs"][id]))
    without = {code: [text for text in own if not locales.translation(code, text, id)] for code in LANGUAGES}
    if codes := [code for code, missing in without.items() if missing]:
        number = len(set().union(*without.values()))
        yield (
            f"texts without a translation ({number}; {', '.join(codes)}): put them into locales/<code>.json, then "
            f"{RUN}.locales --write, which names each"
        )
    if codes := [code for code in LANGUAGES if not (locales.pages / id / f"{code}.md").is_file()]:
        yield (
            f"its help page is not translated ({', '.join(codes)}): write web/docs/{id}/<code>.md, then "
            f"{RUN}.locales --take"
        )


def _shown(id: str, root: Path) -> Iterator[str]:
    graphs = [*root.glob("workflows/*.json"), *root.glob("subgraphs/*.json")]
    shown = any(f'"{id}"' in graph.read_text(encoding="utf-8") for graph in graphs)
    if not shown and id not in WITHOUT_WORKFLOW:
        yield (
            f"no workflow shows it: put it into tools/template_workflows.py, then {RUN}.templates; or say in "
            "WITHOUT_WORKFLOW (tools/completeness.py) why none does"
        )
    if shown and id in WITHOUT_WORKFLOW:
        yield "a workflow shows it, so it is no longer WITHOUT_WORKFLOW (tools/completeness.py): take it out there"
    if id not in (root / "CHANGELOG.md").read_text(encoding="utf-8"):
        yield "CHANGELOG.md does not name it: write a line there"


def main(arguments: list[str]) -> int:
    """Entry point of `python -m lcm_lookahead.tools.completeness`."""
    parser = argparse.ArgumentParser(prog="tools.completeness", description="Names what a node lacks to be merged.")
    parser.parse_args(arguments)
    with Host() as host:
        object_info = host.object_info()
    found = lacking(object_info, Locales(object_info))
    print("\n".join(found) or "Every node has its picture, its translations, its workflow and its line.")
    return 1 if found else 0


if __name__ == "__main__":
    run_main(main)
