"""What training made of the encoder: trained encoder files against the one that training starts from, in the real host.

`make evaluate ARGS="--encoders shortcut=a.safetensors shortcut=b.safetensors none=c.safetensors"`: files of one name
are one arm, trained with several seeds; FILE@0.75 draws with that weight of the image prompt. Identity by a
recogniser, style by a scorer, neither of which took part in any training. Writes docs/encoders.md, .json and .jpg.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from ...tools.common import CACHE, ROOT, Problem, say
from ..plan import WEIGHTS
from .reference import _BOTH, ARMS, STYLES, Arm, _how, draw

# What training starts from: as it is, at other weights (the lower ones are what users and the paper choose to get some
# style back), and with KV injection without training.
BEFORE, BEFORE_KV = "before", "before, KV beside it"
WEIGHTS_TOO = {f"before, weight {weight}": Arm(image_prompt=weight) for weight in (1.25, 0.75, 0.5)}
BASELINES = {BEFORE: ARMS["image prompt"], **WEIGHTS_TOO, BEFORE_KV: _BOTH}
COMPARED = (BEFORE, *WEIGHTS_TOO)  # gains are over these
SIMILARITY, STYLE = "similarity to the own reference", "style accuracy"


@dataclass(frozen=True)
class Run:
    """A trained encoder file, and the weight of the image prompt to draw with."""

    file: Path
    weight: float = 1.0


def parse(chosen: Sequence[str]) -> dict[str, list[Run]]:
    """NAME=FILE or NAME=FILE@WEIGHT, in turn -> the runs of each name."""
    found: dict[str, list[Run]] = {}
    for one in chosen:
        name, equals, rest = one.partition("=")
        file, weight = re.fullmatch(r"(.*?)(?:@(\d*\.?\d+))?", rest).groups()
        run = Run(Path(file), float(weight or 1))
        if not equals or not run.file.is_file():
            raise Problem(
                f"--encoders got {one!r}: give NAME=FILE or NAME=FILE@WEIGHT, with the encoder file of a run."
            )
        if name in BASELINES:
            raise Problem(f"--encoders got {one!r}: {name!r} is what training begins with; give another name.")
        found.setdefault(name, []).append(run)
    return found


def with_kv(file: Path) -> bool:
    """Whether an encoder file has a trained KV encoder."""
    from ...lookahead.files import encoder_file

    return bool(encoder_file.read(file).kv)


def arms_of(runs: dict[str, list[Run]]) -> tuple[dict[str, Arm], dict[str, Path]]:
    """Arms for `draw`, the baselines and one a run; the files by their names in the host."""
    arms, names = dict(BASELINES), {}
    for name, some in runs.items():
        for number, run in enumerate(some):
            key = f"{name} {number}.safetensors"
            names[key] = run.file
            like = BASELINES[BEFORE_KV if with_kv(run.file) else BEFORE]
            arms[f"{name}, run {number + 1}"] = replace(like, encoder=key, image_prompt=run.weight)
    return arms, names


def _surroundings() -> str:
    """All besides arm and people that a picture depends on: weights, settings, host and our own sources."""
    files = [
        WEIGHTS / "manifest.json",
        *(ROOT / name for name in ("mini/studies/reference.py", "mini/files/host_models.py")),
    ]
    files += [file for folder in ("lookahead", "nodes", "host") for file in sorted((ROOT / folder).rglob("*.py"))]
    sources = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return repr((sources, os.environ.get("COMFYUI_DIR"), os.environ.get("HOST_VERSION"), STYLES))


def pictures(
    references: int, arms: dict[str, Arm], names: dict[str, Path], first: int = 0
) -> tuple[Any, dict[str, Any]]:
    """As `evaluate.draw`; what was drawn before, in the same surroundings, is taken from the cache."""
    import torch

    from ...lookahead.files.tensors import read_tensors, sha256, write_tensors
    from ..world.references import reference_faces

    surroundings = _surroundings()

    def place(arm: Arm) -> Path:
        file = sha256(names[arm.encoder]) if arm.encoder in names else arm.encoder
        key = repr((surroundings, astuple(replace(arm, encoder=file)), first, references))
        return CACHE / "evaluated" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"

    places = {name: place(arm) for name, arm in arms.items()}
    missing = {name: arm for name, arm in arms.items() if not places[name].exists()}
    say(f"{len(missing)} of {len(arms)} arms are to be drawn")
    if missing:
        needed = {name: file for name, file in names.items() if name in {arm.encoder for arm in missing.values()}}
        for name, drawn in draw(references, missing, STYLES, needed, first)[1].items():
            places[name].parent.mkdir(parents=True, exist_ok=True)
            write_tensors(places[name], {"pictures": (drawn * 255).round().byte()}, {})
    stored = {name: read_tensors(path)[0]["pictures"].to(torch.float32) / 255 for name, path in places.items()}
    return reference_faces(references, first=first), stored


def scores(faces: Any, drawn: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By arm, similarity to the own reference and whether the style is right: [references, styles] each."""
    import torch

    from ..files.weights import evaluators
    from ..world.faces import STYLES as ALL_STYLES

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


def table(found: dict[str, dict[str, Any]], files: dict[str, list[Run]]) -> dict[str, Any]:
    """Figures by arm, the runs of an arm together, with paired gains over what training started from."""
    import torch

    from ...evaluation.stats import share

    def row(runs: list[str], gains: bool) -> dict[str, Any]:
        values = {what: torch.cat([found[run][what] for run in runs], 1) for what in (SIMILARITY, STYLE)}
        figures = {what: share(v) for what, v in values.items()}
        figures |= {f"{SIMILARITY}, {style}": share(_of(values[SIMILARITY], i)) for i, style in enumerate(STYLES)}
        figures |= {f"{STYLE}, {style}": share(_of(values[STYLE], i)) for i, style in enumerate(STYLES)}
        for what, v in values.items() if gains else ():
            for name in COMPARED:
                figures[f"{what}, over {name}"] = share(v - found[name][what].repeat(1, len(runs)))
        return figures

    rows = {name: row([name], False) for name in BASELINES}
    for name, some in files.items():
        runs = [f"{name}, run {number + 1}" for number in range(len(some))]
        rows[name] = row(runs, True)
        if len(runs) > 1:
            rows |= {run: row([run], True) for run in runs}
    return rows


def _of(values: Any, style: int) -> Any:
    return values[:, style :: len(STYLES)]


def differences(found: dict[str, dict[str, Any]], files: dict[str, list[Run]]) -> dict[str, dict[str, Any]]:
    """Paired differences of arms that follow each other, run by run; of as many runs as both have."""
    import torch

    from ...evaluation.stats import share

    pairs = {}
    for one, other in zip(list(files), list(files)[1:], strict=False):
        runs = range(1, min(len(files[one]), len(files[other])) + 1)
        pairs[f"{other} - {one}"] = {
            what: share(torch.cat([found[f"{other}, run {n}"][what] - found[f"{one}, run {n}"][what] for n in runs], 1))
            for what in (SIMILARITY, STYLE)
        }
    return pairs


def page(rows: dict[str, Any], pairs: dict[str, Any], references: int, first: int = 0) -> str:
    """docs/encoders.md."""

    def line(name: str, figures: dict[str, Any], wanted: Sequence[str]) -> str:
        return f"| {name} | " + " | ".join(str(figures.get(c, "")) for c in wanted) + " |"

    def lines(wanted: Sequence[str]) -> str:
        return "\n".join(line(name, f, wanted) for name, f in rows.items())

    def measure(what: str) -> str:
        return lines([what, *(f"{what}, over {name}" for name in COMPARED)])

    heads = " | ".join(f"over *{name}*" for name in COMPARED)
    by_style = {what: lines([f"{what}, {style}" for style in STYLES]) for what in (SIMILARITY, STYLE)}
    between = "\n".join(line(name, f, (SIMILARITY, STYLE)) for name, f in pairs.items())
    if pairs:
        between = f"| arms, one after another | similarity | style accuracy |\n|---|---|---|\n{between}\n\n"
    styles = f"| | {' | '.join(STYLES)} |\n|---|{'---|' * len(STYLES)}"
    return f"""# What training makes of the encoder, on the mini world

Written by `make evaluate ARGS="--encoders ..."`: {_how(references, STYLES)}
They are numbers {first} to {first + references - 1} of the held-out people. Runs of an arm differ in their seed; gains
and differences are paired. *Before* is what training starts from: the mini IP-Adapter Plus Face, which was trained on
photos too long, as the public one, and hardly follows a style; at weight 1, at other weights (the paper has 0.5 too),
and at weight 1 with KV injection without training.

The paper's own figures (its tables 1 and 2, similarity and prompt score over 5,000 photos): adapter at weight 1
.368 and 21.39, at 0.5 .268 and 25.82; trained on consistent data alone .220 and 28.14, with x0 previews .282
and 27.50, with shortcut previews .301 and 27.31, with KV too .345 and 26.33. So in the paper training gives up some
likeness of the adapter at weight 1 for much of the prompt; the lookahead loss and KV bring likeness back.

| similarity to the reference | | {heads} |
|---|---|{"---|" * len(COMPARED)}
{measure(SIMILARITY)}

| style accuracy | | {heads} |
|---|---|{"---|" * len(COMPARED)}
{measure(STYLE)}

{between}Similarity by style of the prompt:

{styles}
{by_style[SIMILARITY]}

Style accuracy by style of the prompt:

{styles}
{by_style[STYLE]}

![The reference, then each arm under four prompts](encoders.jpg)
"""


def sheet(faces: Any, drawn: dict[str, Any], found: dict[str, dict[str, Any]], path: Path, people: int = 3) -> None:
    """A row an arm, a person beside the other: the reference and what was drawn under each prompt."""
    from PIL import Image

    from ...evaluation.contact_sheet import Cell, contact_sheet

    def picture(pixels: Any) -> Image.Image:
        return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())

    rows = []
    for arm, pictures in drawn.items():
        row = []
        for n in range(people):
            row.append(Cell(picture(faces[n]), arm if n == 0 else ""))
            alike = found[arm][SIMILARITY][n].tolist()
            row += [Cell(picture(p), f"identity {v:+.2f}") for p, v in zip(pictures[n], alike, strict=True)]
        rows.append(row)
    contact_sheet(["reference", *STYLES] * people, rows, "Before training and after").save(path, quality=85)


def evaluate(references: int, out: Path, chosen: Sequence[str], begin: int = 0) -> int:
    """Draw, measure and write: encoders.md, .json and .jpg, into `out`."""
    files = parse(chosen)
    faces, drawn = pictures(references, *arms_of(files), begin)
    found = scores(faces, drawn)
    rows, pairs = table(found, files), differences(found, files)
    out.mkdir(parents=True, exist_ok=True)
    first = {arm: p for arm, p in drawn.items() if arm in BASELINES or arm.endswith(", run 1")}
    sheet(faces, first, found, out / "encoders.jpg")
    plain = {name: {k: list(v) for k, v in f.items()} for name, f in {**rows, **pairs}.items()}
    (out / "encoders.json").write_text(json.dumps(plain, indent=1) + "\n")
    text = page(rows, pairs, references, begin)
    (out / "encoders.md").write_text(text)
    print(text)
    return 0
