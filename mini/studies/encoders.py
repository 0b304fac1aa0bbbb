"""What training made of the encoder: trained encoder files against the one that training starts from.

Files of one name are one arm, trained with several seeds; FILE@0.75 draws with that weight of the image prompt.
Identity by a recogniser, style by a scorer, neither of which took part in any training. Writes encoders.md, .json and
.jpg.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...evaluation.contact_sheet import Cell, contact_sheet
from ...evaluation.stats import Intervals, share
from ...lookahead.files import encoder_file
from ...lookahead.files.tensors import read_tensors, sha256, write_tensors
from ...tools.common import CACHE, Problem, say
from ..files.weights import evaluators
from ..world.faces import STYLES as ALL_STYLES
from ..world.references import reference_faces
from .drawing import BOTH, MEASURED_WITH, ReferenceArm, draw, surroundings
from .study import SIMILARITY, STYLE, STYLES, Table, render, to_image, write_page

# What training starts from: as it is, at other weights (the lower ones are what users and the paper choose to get some
# style back), and with KV injection without training.
BEFORE, BEFORE_KV = "before", "before, KV beside it"
WEIGHTS_TOO = {f"before, weight {weight}": ReferenceArm(image_prompt=weight) for weight in (1.25, 0.75, 0.5)}
BASELINES = {BEFORE: ReferenceArm(image_prompt=1.0), **WEIGHTS_TOO, BEFORE_KV: BOTH}
COMPARED = (BEFORE, *WEIGHTS_TOO)  # gains are over these

#: By arm, similarity to the own reference and whether the style is right, [references, styles] each
ArmScores = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class TrainedEncoder:
    """A trained encoder file, and the weight of the image prompt to draw with."""

    file: Path
    weight: float = 1.0


def parse(chosen: Sequence[str]) -> dict[str, list[TrainedEncoder]]:
    """NAME=FILE or NAME=FILE@WEIGHT, in turn -> the runs of each name."""
    runs: dict[str, list[TrainedEncoder]] = {}
    for one in chosen:
        name, equals, rest = one.partition("=")
        weighed = re.fullmatch(r"(.*)@(\d*\.?\d+)", rest)
        run = TrainedEncoder(Path(weighed[1]), float(weighed[2])) if weighed else TrainedEncoder(Path(rest))
        if not equals or not run.file.is_file():
            raise Problem(
                f"--encoders got {one!r}: give NAME=FILE or NAME=FILE@WEIGHT, with the encoder file of a run."
            )
        if name in BASELINES:
            raise Problem(f"--encoders got {one!r}: {name!r} is what training begins with; give another name.")
        runs.setdefault(name, []).append(run)
    return runs


def with_kv(file: Path) -> bool:
    """Says whether an encoder file has a trained KV encoder."""
    return bool(encoder_file.read(file).kv)


def arms_of(runs: dict[str, list[TrainedEncoder]]) -> tuple[dict[str, ReferenceArm], dict[str, Path]]:
    """Arms for `draw`, the baselines and one a run; the files by their names in the host."""
    arms, names = dict(BASELINES), {}
    for name, of_name in runs.items():
        for number, run in enumerate(of_name):
            key = f"{name} {number}.safetensors"
            names[key] = run.file
            like = BASELINES[BEFORE_KV if with_kv(run.file) else BEFORE]
            arms[f"{name}, run {number + 1}"] = replace(like, encoder=key, image_prompt=run.weight)
    return arms, names


def pictures(
    references: int, arms: dict[str, ReferenceArm], names: dict[str, Path], first: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Draws as `draw` does; what was drawn before, in the same surroundings, is taken from the cache."""
    around = surroundings()

    def place(arm: ReferenceArm) -> Path:
        file = sha256(names[arm.encoder]) if arm.encoder in names else arm.encoder
        key = repr((around, astuple(replace(arm, encoder=file)), first, references))
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


def judge(faces: Tensor, drawn: dict[str, Tensor]) -> ArmScores:
    """Measures what the judges say of faces [n, 3, H, W] and what was drawn of them, [n, styles, 3, H, W] by arm."""
    recogniser, scorer = evaluators()
    asked = torch.tensor([ALL_STYLES.index(s) for s in STYLES])
    scores = {}
    with torch.no_grad():
        targets = recogniser.embed(faces)
        for arm, pictures in drawn.items():
            flat, shape = pictures.flatten(0, 1), pictures.shape[:2]
            similarity = (recogniser.embed(flat).unflatten(0, shape) * targets[:, None]).sum(2)
            hits = (scorer(flat)[0].argmax(1).unflatten(0, shape) == asked).float()
            scores[arm] = {SIMILARITY: similarity, STYLE: hits}
    return scores


def table(scores: ArmScores, files: dict[str, list[TrainedEncoder]]) -> Table:
    """Figures by arm, the runs of an arm together, with paired gains over what training started from."""

    def row(runs: list[str], gains: bool) -> Intervals:
        values = {what: torch.cat([scores[run][what] for run in runs], 1) for what in (SIMILARITY, STYLE)}
        figures = {what: share(v) for what, v in values.items()}
        figures |= {f"{SIMILARITY}, {style}": share(_of(values[SIMILARITY], i)) for i, style in enumerate(STYLES)}
        figures |= {f"{STYLE}, {style}": share(_of(values[STYLE], i)) for i, style in enumerate(STYLES)}
        for what, v in values.items() if gains else ():
            for name in COMPARED:
                figures[f"{what}, over {name}"] = share(v - scores[name][what].repeat(1, len(runs)))
        return figures

    rows = {name: row([name], False) for name in BASELINES}
    for name, encoders in files.items():
        runs = [f"{name}, run {number + 1}" for number in range(len(encoders))]
        rows[name] = row(runs, True)
        if len(runs) > 1:
            rows |= {run: row([run], True) for run in runs}
    return rows


def _of(values: Tensor, style: int) -> Tensor:
    return values[:, style :: len(STYLES)]


def differences(scores: ArmScores, files: dict[str, list[TrainedEncoder]]) -> Table:
    """Paired differences of each arm from those before it, run by run; of as many runs as both have."""
    pairs = {}
    for one, other in itertools.combinations(files, 2):
        runs = range(1, min(len(files[one]), len(files[other])) + 1)
        pairs[f"{other} - {one}"] = {
            what: share(
                torch.cat([scores[f"{other}, run {n}"][what] - scores[f"{one}, run {n}"][what] for n in runs], 1)
            )
            for what in (SIMILARITY, STYLE)
        }
    return pairs


def page(rows: Table, pairs: Table, references: int, first: int = 0) -> str:
    """docs/encoders.md."""
    people = {"references": references, "first": first}
    measures = {"similarity": SIMILARITY, "style": STYLE}
    return render(
        "encoders.md.jinja",
        rows=rows,
        pairs=pairs,
        compared=COMPARED,
        styles=STYLES,
        **people,
        **measures,
        **MEASURED_WITH,
    )


def sheet(faces: Tensor, drawn: dict[str, Tensor], scores: ArmScores, path: Path, people: int = 3) -> None:
    """A row an arm, a person beside the other: the reference and what was drawn under each prompt."""
    rows = []
    for arm, pictures in drawn.items():
        row = []
        for n in range(people):
            row.append(Cell(to_image(faces[n]), arm if n == 0 else ""))
            similarity = scores[arm][SIMILARITY][n].tolist()
            row += [Cell(to_image(p), f"identity {v:+.2f}") for p, v in zip(pictures[n], similarity, strict=True)]
        rows.append(row)
    contact_sheet(["reference", *STYLES] * people, rows, "Before training and after").save(path, quality=85)


def evaluate(references: int, out: Path, trained: Sequence[str], first: int = 0) -> None:
    """Draw, measure and write: encoders.md, .json and .jpg, into `out`.

    trained: NAME=FILE or NAME=FILE@WEIGHT in turn; first: number of the first of the people.
    """
    files = parse(trained)
    faces, drawn = pictures(references, *arms_of(files), first)
    scores = judge(faces, drawn)
    rows, pairs = table(scores, files), differences(scores, files)
    out.mkdir(parents=True, exist_ok=True)
    shown = {arm: p for arm, p in drawn.items() if arm in BASELINES or arm.endswith(", run 1")}
    sheet(faces, shown, scores, out / "encoders.jpg")
    write_page(out, "encoders", rows | pairs, page(rows, pairs, references, first))
