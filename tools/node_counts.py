"""The table of nodes and their open values in `docs/compared.md`, counted from the signatures and the workflow files.

python -m lcm_lookahead.tools.node_counts     write it anew
"""

from __future__ import annotations

import json
from pathlib import Path

from ..lookahead.files.atomic import atomic
from .common import ROOT, run_main
from .signatures import FOLDED, OPEN, SOCKET, read

PAGE = ROOT / "docs" / "compared.md"
BEGIN, END = "<!-- counted by tools/node_counts.py -->\n", "<!-- end -->\n"
NOTES = ("MarkdownNote", "Note")
#: Nodes and links of a graph without notes, at commit 74cc9a8, which an artist has tried: what it is called, its file
#: now, and what it had.
GRAPHS = (
    ("A face by image prompt", "01 Face under a new prompt", (12, 14)),
    ("A face by KV injection", "03 Face by KV alone (checkpoint only)", (14, 19)),
    ("Both", "02 Face with more of its look (KV)", (17, 23)),
    ("Look ahead by identity", "08 Look ahead for likeness (identity)", (25, 31)),
)
#: Open values of the nodes at that commit; of those that came later, when they came.
BEFORE = {
    "ApplyImagePrompt": 3,
    "ApplyKVInjection": 7,
    "CLIPLoss": 5,
    "CombineLosses": 4,
    "ConvertEncoder": 5,
    "CropFace": 8,
    "EncodeReference": 2,
    "GuidanceReport": 0,
    "GuidanceSampler": 3,
    "Guider": 4,
    "IdentityLoss": 3,
    "L1Loss": 1,
    "LPIPSLoss": 4,
    "LoadEncoder": 1,
    "LoadFaceAnalysis": 2,
    "PreviewGrid": 6,
    "Shortcut": 1,
}
BEFORE_OF_LATER = {
    "ApplyConcept": 6,
    "CombineReferences": 2,
    "EncodeConceptPrompt": 2,
    "EncodeFace": 1,
    "IdentityScore": 2,
    "LoadConcept": 1,
    "LoadConceptEncoder": 1,
    "LoadNoiseGuide": 1,
    "LoadReference": 1,
    "PeopleLoss": 2,
    "PlaceMasks": 3,
    "PredictConcept": 0,
    "PromptScore": 2,
    "Rank": 2,
    "SaveConcept": 2,
    "SaveReference": 3,
    "TuneConcept": 6,
    "Weights": 3,
}


def size_of(path: Path) -> tuple[int, int]:
    """Nodes and links of a workflow file as it opens; a folded part counts as one node, notes do not."""
    file = json.loads(path.read_text(encoding="utf-8"))
    return sum(node["type"] not in NOTES for node in file["nodes"]), len(file["links"])


def table() -> str:
    """Both tables as Markdown."""
    lines = ["| graph | nodes and links before | now |", "|---|---|---|"]
    for name, file, (nodes, links) in GRAPHS:
        now = size_of(ROOT / "workflows" / f"{file}.json")
        lines.append(f"| {name} | {nodes}, {links} | {now[0]}, {now[1]} |")
    lines += ["", "| node | open values before | now | folded now | sockets now |", "|---|---|---|---|---|"]
    for id, signature in read().items():
        name = id.removeprefix("Lookahead")
        of = [one[3] for one in signature["inputs"]]
        before = BEFORE.get(name, f"{BEFORE_OF_LATER[name]}, later" if name in BEFORE_OF_LATER else "new")
        lines.append(f"| {name} | {before} | {of.count(OPEN)} | {of.count(FOLDED)} | {of.count(SOCKET)} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    """The page's text with the tables as they are counted now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


def main(arguments: list[str]) -> int:
    """Entry point of `python -m lcm_lookahead.tools.node_counts`."""
    text = with_table(PAGE.read_text(encoding="utf-8"))
    with atomic(PAGE) as part:
        part.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
