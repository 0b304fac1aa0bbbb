"""The table of the shipped files (`files.json`) and the record of those that are there (`weights/manifest.json`).

A new file is one line in files.json: its name under `weights/`, the stages that make it, a title, the size that was
planned for it, and under which public name the host finds it ("model", below its models folder), if it does.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..plan import HERE, WEIGHTS

MANIFEST = "manifest.json"
LICENCE = "Apache-2.0"


@dataclass(frozen=True)
class File:
    """One line of the table."""

    file: str
    stages: tuple[str, ...]  # the first one's result is the file, unless weights.py says otherwise
    title: str
    parameters: float  # planned, at most
    bytes: float  # planned, at most
    model: str | None = None  # its name in the host's models folder
    result: str | None = None  # its name in the build's folder, if that is not <first stage>.safetensors


def table() -> list[File]:
    """Every file that is planned, in the order of the build."""
    return [File(**line | {"stages": tuple(line["stages"])}) for line in json.loads((HERE / "files.json").read_text())]


def manifest(weights: Path = WEIGHTS) -> list[dict[str, Any]]:
    """Lists what is there: file, bytes, parameters, sha256, title, licence, stages with their steps, model."""
    path = weights / MANIFEST
    return json.loads(path.read_text()) if path.exists() else []


def write_manifest(folder: Path, weights: Path = WEIGHTS, written: list[str] | None = None) -> None:
    """Record the files under `weights`. Those in `written` (default: all) come from the stages in `folder`, whose logs
    tell their steps; of the others, what was recorded before stays."""
    known = {entry["file"]: entry for entry in manifest(weights)}
    entries = []
    for line in table():
        path = weights / line.file
        if not path.exists():
            continue
        if written is not None and line.file not in written and line.file in known:
            entries.append(known[line.file])
            continue
        entry = {
            "file": line.file,
            "bytes": path.stat().st_size,
            "parameters": parameters(path),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "title": line.title,
            "licence": LICENCE,
            "stages": {name: _steps(folder / f"{name}.jsonl") for name in line.stages},
        }
        entries.append(entry | ({"model": line.model} if line.model else {}))
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    (weights / MANIFEST).write_text(f"[\n{lines}\n]\n")


def _steps(log: Path) -> int | None:
    """The last step that a stage's log tells."""
    return json.loads(log.read_text().splitlines()[-1])["step"] if log.exists() else None


def parameters(path: Path) -> int:
    """Counts the numbers that a file of weights holds."""
    if path.suffix in (".json", ""):
        return 0
    if path.suffix == ".onnx":
        import onnx

        return sum(math.prod(t.dims) for t in onnx.load(path).graph.initializer)
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return sum(math.prod(file.get_slice(k).get_shape()) for k in file.keys())


def size_table(weights: Path = WEIGHTS) -> str:
    """The table that `lookahead mini sizes` prints: planned and real sizes, 1 MB being a million bytes."""
    real = {entry["file"]: entry for entry in manifest(weights)}
    rows = []
    for line in table():
        there = real.get(line.file)
        now = (f"{there['parameters'] / 1e6:.2f} M", f"{there['bytes'] / 1e6:.2f} MB") if there else ("-", "-")
        rows.append((line.file, f"{line.parameters / 1e6:.2f} M", f"{line.bytes / 1e6:.2f} MB", *now))
    planned = sum(line.bytes for line in table())
    rows.append(
        (
            "sum",
            f"{sum(line.parameters for line in table()) / 1e6:.2f} M",
            f"{planned / 1e6:.2f} MB",
            f"{sum(e['parameters'] for e in real.values()) / 1e6:.2f} M",
            f"{sum(e['bytes'] for e in real.values()) / 1e6:.2f} MB",
        )
    )
    rows.insert(0, ("file", "planned", "", "now", ""))
    return "\n".join(f"{a:42}{b:>9}{c:>11}{d:>10}{e:>11}" for a, b, c, d, e in rows)
