"""What training made of the encoder: trained encoder files against the one that training starts from, in the real host.

`make evaluate ARGS="--encoders shortcut=a.safetensors shortcut=b.safetensors none=c.safetensors"`: files of one name
are one arm, trained with several seeds. Identity by a recogniser, style by a scorer, neither of which took part in any
training. Writes docs/encoders.md, .json and .jpg.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .common import Problem
from .evaluate import _BOTH, ARMS, STYLES, Arm, _how, draw

BEFORE, BEFORE_KV = "before", "before, with KV"
SIMILARITY, STYLE = "similarity to the own reference", "style accuracy"


def parse(chosen: Sequence[str]) -> dict[str, list[Path]]:
    """NAME=FILE, in turn -> the files of each name."""
    found: dict[str, list[Path]] = {}
    for one in chosen:
        name, equals, file = one.partition("=")
        if not equals or not Path(file).is_file():
            raise Problem(f"--encoders got {one!r}: give NAME=FILE, with the encoder file that a run has written.")
        found.setdefault(name, []).append(Path(file))
    return found


def with_kv(file: Path) -> bool:
    """Whether an encoder file has a trained KV encoder."""
    from ..lookahead import encoder_file

    return bool(encoder_file.read(file).kv)


def arms_of(files: dict[str, list[Path]]) -> tuple[dict[str, Arm], dict[str, str], dict[str, Path]]:
    """Arms for `draw`, one a file and what each arm is compared with; by name of an arm, its baseline; the files by
    their names in the host."""
    arms = {BEFORE: ARMS["image prompt"]}
    baselines, names = {}, {}
    for name, some in files.items():
        for number, file in enumerate(some):
            key = f"{name} {number}.safetensors"
            names[key], kv = file, with_kv(file)
            if kv:
                arms.setdefault(BEFORE_KV, _BOTH)
            baselines[name] = BEFORE_KV if kv else BEFORE
            arms[f"{name}, run {number + 1}"] = replace(_BOTH if kv else ARMS["image prompt"], encoder=key)
    return arms, baselines, names


def scores(faces: Any, drawn: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By arm, similarity to the own reference and whether the style is right: [references, styles] each."""
    import torch

    from ..trainer.mini.faces import STYLES as ALL_STYLES
    from ..trainer.mini.weights import evaluators

    recogniser, scorer = evaluators()
    asked = torch.tensor([ALL_STYLES.index(s) for s in STYLES])
    found = {}
    with torch.no_grad():
        known = recogniser.embed(faces)
        for arm, pictures in drawn.items():
            flat, shape = pictures.flatten(0, 1), pictures.shape[:2]
            similarity = (recogniser.embed(flat).unflatten(0, shape) * known[:, None]).sum(2)
            hits = (scorer(flat)[0].argmax(1).unflatten(0, shape) == asked).float()
            found[arm] = {SIMILARITY: similarity, STYLE: hits}
    return found


def table(found: dict[str, dict[str, Any]], files: dict[str, list[Path]], baselines: dict[str, str]) -> dict[str, Any]:
    """Figures by arm, the runs of an arm together, with paired gains over what training started from."""
    import torch

    from ..trainer.evaluate import share

    def row(runs: list[str], baseline: str | None) -> dict[str, Any]:
        values = {what: torch.cat([found[run][what] for run in runs], 1) for what in (SIMILARITY, STYLE)}
        figures = {what: share(v) for what, v in values.items()}
        figures |= {f"{SIMILARITY}, {style}": share(_of(values[SIMILARITY], i)) for i, style in enumerate(STYLES)}
        figures |= {f"{STYLE}, {style}": share(_of(values[STYLE], i)) for i, style in enumerate(STYLES)}
        if baseline:
            for what, v in values.items():
                figures[f"{what}, gain"] = share(v - found[baseline][what].repeat(1, len(runs)))
        return figures

    rows = {name: row([name], None) for name in (BEFORE, BEFORE_KV) if name in found}
    for name, some in files.items():
        runs = [f"{name}, run {number + 1}" for number in range(len(some))]
        rows[name] = row(runs, baselines[name])
        if len(runs) > 1:
            rows |= {run: row([run], baselines[name]) for run in runs}
    return rows


def _of(values: Any, style: int) -> Any:
    return values[:, style :: len(STYLES)]


def differences(found: dict[str, dict[str, Any]], files: dict[str, list[Path]]) -> dict[str, dict[str, Any]]:
    """Paired differences of arms that follow each other, run by run; of as many runs as both have."""
    import torch

    from ..trainer.evaluate import share

    pairs = {}
    for one, other in zip(list(files), list(files)[1:], strict=False):
        runs = range(1, min(len(files[one]), len(files[other])) + 1)
        pairs[f"{other} - {one}"] = {
            what: share(torch.cat([found[f"{other}, run {n}"][what] - found[f"{one}, run {n}"][what] for n in runs], 1))
            for what in (SIMILARITY, STYLE)
        }
    return pairs


def page(rows: dict[str, Any], pairs: dict[str, Any], references: int) -> str:
    """docs/encoders.md."""
    columns = (SIMILARITY, f"{SIMILARITY}, gain", STYLE, f"{STYLE}, gain")

    def line(name: str, figures: dict[str, Any], wanted: Sequence[str]) -> str:
        return f"| {name} | " + " | ".join(str(figures.get(c, "")) for c in wanted) + " |"

    main = "\n".join(line(name, f, columns) for name, f in rows.items())
    wanted = [f"{what}, {style}" for what in (SIMILARITY, STYLE) for style in STYLES]
    styles = "\n".join(line(name, f, wanted) for name, f in rows.items())
    heads = " | ".join([*(f"similarity, {s}" for s in STYLES), *(f"style, {s}" for s in STYLES)])
    between = "\n".join(line(name, f, (SIMILARITY, STYLE)) for name, f in pairs.items())
    return f"""# What training makes of the encoder, on the mini world

Written by `make evaluate ARGS="--encoders ..."`: {_how(references, STYLES)}
Gains are paired, over the encoder that training starts from (*before*: the mini IP-Adapter Plus Face, image prompt at
weight 1; *with KV*: KV injection without training beside it).

| | similarity | gain | style accuracy | gain |
|---|---|---|---|---|
{main}

| arms | similarity | style accuracy |
|---|---|---|
{between}

By style of the prompt:

| | {heads} |
|---|{"---|" * len(wanted)}
{styles}

![The reference, then each arm under four prompts](encoders.jpg)
"""


def sheet(faces: Any, drawn: dict[str, Any], path: Path, people: int = 6) -> None:
    """A person a block: the reference and, in a row an arm, what it drew under each prompt."""
    import torch
    from PIL import Image

    def row(pictures: Any) -> Any:
        return torch.cat(list(pictures), 2)

    blank = torch.ones_like(faces[0])
    blocks = []
    for n in range(min(people, len(faces))):
        rows = []
        for i, pictures in enumerate(drawn.values()):
            rows.append(row([faces[n] if i == 0 else blank, *pictures[n]]))
        blocks.append(torch.cat(rows, 1))
    lines = [torch.cat(blocks[i : i + 3], 2) for i in range(0, len(blocks) - len(blocks) % 3, 3)]
    grid = (torch.cat(lines, 1).permute(1, 2, 0) * 255).round().byte().numpy()
    Image.fromarray(grid).save(path, quality=85)


def evaluate(references: int, out: Path, chosen: Sequence[str]) -> int:
    """Draw, measure and write: encoders.md, .json and .jpg, into `out`."""
    files = parse(chosen)
    arms, baselines, names = arms_of(files)
    faces, drawn = draw(references, arms, STYLES, names)
    found = scores(faces, drawn)
    rows, pairs = table(found, files, baselines), differences(found, files)
    out.mkdir(parents=True, exist_ok=True)
    sheet(faces, {arm: p for arm, p in drawn.items() if not arm.endswith(", run 2")}, out / "encoders.jpg")
    plain = {name: {k: list(v) for k, v in f.items()} for name, f in {**rows, **pairs}.items()}
    (out / "encoders.json").write_text(json.dumps(plain, indent=1) + "\n")
    text = page(rows, pairs, references)
    (out / "encoders.md").write_text(text)
    print(text)
    return 0
