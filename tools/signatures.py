"""What files and API graphs rely on: the inputs of each node in their order, and its outputs.

python -m lcm_lookahead.tools.signatures            what differs from the record
python -m lcm_lookahead.tools.signatures --write    take what was added into the record

The record is `tests/host/signatures.json`. Workflow files hold values and links by place, API graphs by name. So what
is recorded stays, in its order; what is new comes last. The record cannot be written where that is not so: a renamed
node goes through `nodes/replacements.py`, and its line is taken out of the record by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..host.server import Host
from .common import ROOT, Problem, run_main, say
from .locales import OURS

RECORD = ROOT / "tests" / "host" / "signatures.json"
VALUES = ("BOOLEAN", "COMBO", "FLOAT", "INT", "STRING")  # types of inputs that have a field in the page
OPEN, FOLDED, SOCKET = "open", "folded", "socket"
MOST_OPEN = 5  # values of a node that the page shows before its advanced ones are unfolded

Signature = dict[str, list[list[Any]]]


def signatures(object_info: Mapping[str, Mapping[str, Any]]) -> dict[str, Signature]:
    """The signature of each node of ours.

    An input is [name, type, required or optional, open, folded or socket], with its options behind where they are
    ours; an output is [name, type].

    Args:
        object_info: the host's answer of GET /object_info on a machine without model files, KSampler's too, whose lists
            (samplers, schedulers) are the host's and not recorded.
    """
    of_host = [options_of(spec) for spec in object_info["KSampler"]["input"]["required"].values()]
    found = {}
    for name, node in sorted(object_info.items()):
        if not name.startswith(OURS):
            continue
        inputs = []
        for kind in ("required", "optional"):
            for input_, spec in node["input"].get(kind, {}).items():
                type_ = "COMBO" if isinstance(spec[0], list) else spec[0]
                settings = spec[1] if len(spec) > 1 else {}
                has_field = type_ in VALUES and not settings.get("forceInput")
                how = SOCKET if not has_field else FOLDED if settings.get("advanced") else OPEN
                options = options_of(spec)
                inputs.append([input_, type_, kind, how, *([options] if options and options not in of_host else [])])
        outputs = [list(pair) for pair in zip(node["output_name"], node["output"], strict=True)]
        found[name] = {"inputs": inputs, "outputs": outputs}
    return found


def options_of(spec: list[Any]) -> list[str]:
    """The words that an input lets choose from."""
    return spec[0] if isinstance(spec[0], list) else spec[1].get("options", []) if spec[0] == "COMBO" else []


def broken(recorded: Mapping[str, Signature], now: Mapping[str, Signature]) -> list[str]:
    """Lists what files from before would miss, a line each."""
    found = []
    for name, old in recorded.items():
        if name not in now:
            found.append(f"{name} is gone")
            continue
        new = now[name]
        for kind in ("inputs", "outputs"):
            for place, before in enumerate(old[kind]):
                after = new[kind][place] if place < len(new[kind]) else None
                what = f"{kind[:-1]} {place} of {name}, {before[0]!r},"
                if after is None or not _fits(before, after, kind):
                    found.append(f"{what} of type {before[1]}, is now {'gone' if after is None else after[:2]}")
                elif kind == "inputs":
                    if (before[2], after[2]) == ("optional", "required"):
                        found.append(f"{what} is now required")
                    gone = [word for word in (before[4:] or [[]])[0] if word not in (after[4:] or [[]])[0]]
                    found += [f"{what} has no option {word!r} any more" for word in gone]
        found += [
            f"input {one[0]!r} of {name} is new and required"
            for one in new["inputs"][len(old["inputs"]) :]
            if one[2] == "required"
        ]
    return found


def _fits(before: list[Any], after: list[Any], kind: str) -> bool:
    """Says whether links and values of before go on: a socket of an input may come to take more types."""
    types = [set(str(one[1]).split(",")) for one in (before, after)]
    return before[0] == after[0] and (types[0] == types[1] or (kind == "inputs" and types[0] < types[1]))


def read() -> dict[str, Signature]:
    """The record."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def write(now: Mapping[str, Signature], path: Path = RECORD) -> None:
    """Write the record anew. Raises Problem where something that is recorded would be lost."""
    if path.is_file() and (lost := broken(json.loads(path.read_text(encoding="utf-8")), now)):
        raise Problem("; ".join(lost) + ": files from before rely on it, so put it back; what is new comes last.")
    nodes = []
    for name, node in now.items():
        parts = (
            f'  "{kind}": [\n' + ",\n".join(f"   {json.dumps(one)}" for one in node[kind]) + "\n  ]" for kind in node
        )
        nodes.append(f' "{name}": {{\n' + ",\n".join(parts) + "\n }")
    path.write_text("{\n" + ",\n".join(nodes) + "\n}\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Entry point of `python -m lcm_lookahead.tools.signatures`."""
    parser = argparse.ArgumentParser(prog="tools.signatures", description="Compares the nodes with their record.")
    parser.add_argument("--write", action="store_true", help="take what was added into the record")
    chosen = parser.parse_args(arguments)
    with Host() as host:
        now = signatures(host.object_info())
    if chosen.write:
        write(now)
    recorded = read()
    lost = broken(recorded, now)
    print("\n".join(lost or ["Nothing that files rely on has changed."]))
    if not lost and recorded != now:
        say("The record lacks what is new: write it with --write.")
    return int(recorded != now)


if __name__ == "__main__":
    run_main(main)
