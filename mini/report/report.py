"""The build's report: every measure with its interval, what the stages' logs tell, and the shipped files' hashes.

A measure is kept in `folder/report/<name>.json` under a key made of the files that it reads, the plan and the source
of the modules that it calls; so a report that was stopped goes on, and a second one is instant.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import platform
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...evaluation.stats import Interval
from ...lookahead.files.atomic import atomic
from ..files import insightface_pack, shipped
from ..plan import WEIGHTS, Plan
from ..stages import clip, stage
from ..stages.face_networks import FaceRecogniser
from ..world import data
from . import measure, measure_controlnet, measure_faces, measure_few_step, measure_found, page
from .measure import Measurement

if TYPE_CHECKING:
    from insightface.app import FaceAnalysis

PACKAGES = ("torch", "diffusers", "transformers", "insightface", "onnxruntime", "safetensors", "numpy")
LIMIT = 75e6  # bytes of all shipped files
Run = Callable[[Path, Plan, Path], Measurement]  # stages' folder, plan, folder of the shipped files


@dataclass(frozen=True)
class Measure:
    """`needs` are the stages whose results it reads, `reads` further files in the stages' folder."""

    title: str
    needs: tuple[str, ...]
    run: Run
    reads: tuple[str, ...] = ()


@cache
def _app(weights: Path) -> FaceAnalysis:
    return insightface_pack.load(weights / "insightface")


def _vae(folder: Path, plan: Plan, weights: Path) -> Measurement:
    return measure.autoencoder(folder, plan)


def _judges(folder: Path, plan: Plan, weights: Path) -> Measurement:
    return measure.judges(folder, plan)


def _base(folder: Path, plan: Plan, weights: Path) -> Measurement:
    return measure.samples(folder, plan)


def _in_samples(folder: Path, plan: Plan, weights: Path) -> Measurement:
    return measure_found.in_samples(folder, plan, _app(weights))


def _captions(folder: Path, plan: Plan, weights: Path) -> Measurement:
    return measure.captions(folder, plan)


def _backbone(folder: Path, plan: Plan, weights: Path) -> Measurement:
    return measure.backbone(folder, plan)


def _previews(folder: Path, plan: Plan, weights: Path) -> Measurement:
    world = measure_few_step.open_world(folder, plan)
    prompts = ["a photo of a face in a forest", "a pencil drawing of a face", "a comic of a face at night"]
    measure_few_step.draw_previews(world, prompts, measure.drawings(folder) / "previews.png")
    figures = measure_few_step.previews(world, plan.report_prompts)
    return Measurement(figures, f"captions of {plan.report_prompts} held-out pictures, half of them long")


def _in_previews(folder: Path, plan: Plan, weights: Path) -> Measurement:
    return measure_found.in_previews(folder, plan, _app(weights))


def _few_steps(folder: Path, plan: Plan, weights: Path) -> Measurement:
    world = measure_few_step.open_world(folder, plan)
    figures = measure_few_step.few_steps(world, plan.report_prompts, finds=measure_few_step.finder(folder))
    return Measurement(figures, f"short captions of {plan.report_prompts} held-out pictures, each with its own noise")


def _spread(folder: Path, plan: Plan, weights: Path) -> Measurement:
    prompts = max(2, plan.report_prompts // 5)
    figures = measure_few_step.spread(measure_few_step.open_world(folder, plan), prompts=prompts)
    return Measurement(figures, f"{prompts} long captions, 6 seeds each")


def _person(folder: Path, plan: Plan, weights: Path) -> Measurement:
    world, n = measure_few_step.open_world(folder, plan), max(2, plan.report_prompts // 2)
    return Measurement(measure_few_step.person(world, n), f"{n} short captions of held-out pictures")


def _faces(folder: Path, plan: Plan, weights: Path) -> Measurement:
    pictures, net = measure.held_out(folder, plan), FaceRecogniser()
    insightface_pack.rounded(net, folder / "face_recogniser.safetensors")  # loads them into it
    figures = measure_faces.report(_app(weights), net, pictures, plan)
    return Measurement(figures, f"{len(pictures)} drawn pictures of {plan.held_out_people} held-out people")


def _two_recognisers(folder: Path, plan: Plan, weights: Path) -> Measurement:
    return measure_found.two_recognisers(folder, plan, _app(weights))


def _controlnet(folder: Path, plan: Plan, weights: Path) -> Measurement:
    people = max(2, plan.report_prompts // 3)
    figures = measure_controlnet.report(folder, measure.held_out(folder, plan), people)
    return Measurement(figures, f"a picture each of {people} held-out people, styles in turn")


def _clip(folder: Path, plan: Plan, weights: Path) -> Measurement:
    pictures = measure.held_out(folder, plan)
    return Measurement(clip.measure(clip.load(folder), pictures), f"{len(pictures)} drawn pictures of held-out people")


_PICTURE = ("base", "vae", "sharpen")
_JUDGES = ("recogniser", "style_scorer")
_PACK = ("detector", "face_recogniser")
_FEW = (*_PICTURE, *_JUDGES, "lcm_lora")
_KEPT = (f"report/{measure.SAMPLES}",)

MEASURES = {
    "vae": Measure("Autoencoder", ("vae", "sharpen", *_JUDGES), _vae),
    "judges": Measure("Evaluation networks", _JUDGES, _judges),
    "base": Measure("Base: samples on short prompts", (*_PICTURE, *_JUDGES), _base),
    "in_samples": Measure(
        "Faces in samples", (*_PICTURE, *_JUDGES, *_PACK), _in_samples, (f"report/{measure.SAMPLES}",)
    ),
    "captions": Measure("Base: attributes of long captions", (*_PICTURE, *_JUDGES, "clip"), _captions),
    "previews": Measure("One-step previews", _FEW, _previews),
    "in_previews": Measure("Faces in one-step previews", (*_FEW, *_PACK), _in_previews),
    "few_steps": Measure("Few steps against many", (*_FEW, "collapsed", "detector"), _few_steps),
    "spread": Measure("How much generators vary", (*_FEW, "collapsed"), _spread),
    "person": Measure("Personal LoRA", (*_FEW, "style_lora"), _person),
    "faces": Measure("Detector and face recogniser through insightface", _PACK, _faces),
    "two_recognisers": Measure("The two recognisers", (*_PACK, *_JUDGES), _two_recognisers),
    "backbone": Measure("Image prompt (the backbone)", (*_PICTURE, *_JUDGES, "image_encoder", "overfit"), _backbone),
    "controlnet": Measure("ControlNet", (*_PICTURE, *_JUDGES, "controlnet"), _controlnet),
    "clip": Measure("Image-text model", ("clip",), _clip),
}


_MODULES = {
    "clip": clip,
    "measure": measure,
    "measure_controlnet": measure_controlnet,
    "measure_faces": measure_faces,
    "measure_few_step": measure_few_step,
    "measure_found": measure_found,
}


@dataclass(frozen=True)
class Claim:
    """A requirement on a build: figures of `measure` whose names match `figure` reach `least` (or exceed it).

    point: its number in the plan for the mini world. Without `least` the figures are only to be reported.
    """

    point: int
    text: str
    measure: str
    figure: str
    least: float | None = None
    strictly: bool = False


CLAIMS = (
    Claim(1, "autoencoder keeps who it is", "vae", r"identity similarity", 0.95),
    Claim(1, "noise of the reconstruction", "vae", r"PSNR in dB, .*"),
    Claim(2, "base draws the style", "base", r"style accuracy", 0.9),
    Claim(2, "base draws the place", "base", r"place accuracy", 0.9),
    Claim(2, "a face in photos of the base", "in_samples", r"face found, photo", 0.95),
    Claim(2, "its landmarks agree with the recogniser's crop", "in_samples", r"landmarks within the limit, photo"),
    Claim(3, "LCM-LoRA foresees better", "previews", r".*LCM-LoRA minus .*: identity cosine", 0.0, True),
    Claim(3, "4 steps within 5 points of 50", "few_steps", r"LCM-LoRA, 4 steps, minus .*: (style|face found)", -0.05),
    Claim(4, "evaluation recogniser", "judges", r"recogniser AUC, photo to styled", 0.98),
    Claim(4, "the loss's recogniser", "two_recognisers", r"face recogniser AUC, photo to styled", 0.98),
    Claim(4, "the two disagree enough", "two_recognisers", r"rank correlation, hard pairs"),
    Claim(5, "detector through insightface", "faces", r"detector (recall|landmark error)"),
    Claim(6, "image prompt keeps who it is", "backbone", r"identity AUC, photo, weight 1", 0.9),
    Claim(6, "style accuracy falls with its weight", "backbone", r"fall of style accuracy .*", 0.0, True),
)


def report(folder: Path, plan: Plan, weights: Path = WEIGHTS) -> Path:
    """Measure what is there and write report.json, report.html and report.md to `folder`; returns the page's path."""
    made = collect(folder, plan, weights)
    _write(folder / "report.json", json.dumps(made, indent=1))
    _write(folder / "report.md", page.markdown(made))
    _write(folder / "report.html", page.page(made, folder / "report"))
    return folder / "report.html"


def collect(folder: Path, plan: Plan, weights: Path = WEIGHTS) -> dict[str, Any]:
    """Everything that the page shows, as plain values."""
    measures = {name: _measured(name, folder, plan, weights) for name in MEASURES}
    files = _files(weights)
    return {
        "claims": [*(row for claim in CLAIMS for row in _rows(claim, measures)), *_claims_of_files(files)],
        "files": files,
        "stages": {s: log for s in _stages() if (log := _log(folder / f"{s}.jsonl"))},
        "measures": measures,
        "plan": asdict(plan),
        "seeds": {"people": data.SEEDS, "samples": measure.SEEDS | {"previews": measure_found.PREVIEWS_SEED}},
        "versions": {"python": platform.python_version()} | {p: v for p in PACKAGES if (v := _version(p))},
        "machine": _machine(),
    }


def _measured(name: str, folder: Path, plan: Plan, weights: Path) -> dict[str, Any]:
    """The measure as plain values, from its file where that is of the same key; or why it is missing."""
    wanted = MEASURES[name]
    missing = [s for s in wanted.needs if not (folder / f"{s}.safetensors").exists()]
    if missing:
        why = f"Not measured: the build has no {' and no '.join(missing)} yet."
        return {"title": wanted.title, "missing": why}
    if absent := [f for f in wanted.reads if not (folder / f).exists()]:
        return {"title": wanted.title, "missing": f"Not measured: there is no {' and no '.join(absent)}."}
    kept = folder / "report" / f"{name}.json"
    key = _key(wanted, folder, plan)
    if kept.exists() and (known := json.loads(kept.read_text()))["key"] == key:
        return known
    print(f"report: {wanted.title}", flush=True)
    started = time.monotonic()
    try:
        result = wanted.run(folder, plan, weights)
    except (ImportError, FileNotFoundError) as error:
        return {"title": wanted.title, "missing": f"Not measured: {str(error).splitlines()[0].rstrip('.')}."}
    except Exception as error:  # hours of training come before: the other measures are still worth having
        traceback.print_exc()
        why = f"Not measured: it failed with {type(error).__name__}: {error}"
        return {"title": wanted.title, "missing": why.rstrip(".") + "."}
    seconds = round(time.monotonic() - started, 1)
    print(f"report: {wanted.title}: done in {seconds / 60:.1f} min", flush=True)
    made = {
        "title": wanted.title,
        "basis": result.basis,
        "figures": {k: _plain(v) for k, v in result.figures.items()},
        "curves": result.curves,
        "seconds": seconds,
        "key": key,
    }
    measure.drawings(folder)
    _write(kept, json.dumps(made, indent=1))
    return made


def _plain(figure: Interval | float) -> dict[str, float | None] | float | None:
    """An interval as a dictionary; what could not be computed (NaN) as None."""

    def number(x: float) -> float | None:
        return float(x) if math.isfinite(x) else None

    return (
        {k: number(v) for k, v in figure._asdict().items()} if isinstance(figure, Interval) else number(float(figure))
    )


def _key(wanted: Measure, folder: Path, plan: Plan) -> str:
    inputs = [folder / f"{s}.safetensors" for s in wanted.needs] + [folder / f for f in wanted.reads]
    calls = inspect.getsource(wanted.run)
    parts = [calls, json.dumps(asdict(plan), sort_keys=True)]
    parts += [inspect.getsource(module) for name, module in _MODULES.items() if f"{name}." in calls]
    parts += [f"{p.name} {_sha256(p)}" for p in inputs]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _sha256(path: Path) -> str:
    about = path.stat()
    return _hash_of(path, about.st_mtime_ns, about.st_size)


@cache
def _hash_of(path: Path, modified: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rows(claim: Claim, measures: dict[str, Any]) -> list[dict[str, Any]]:
    """The claim beside its figures: `met` is None where there is nothing to decide, or nothing measured."""
    about = {"point": claim.point, "claim": claim.text, "least": claim.least, "strictly": claim.strictly}
    figures = measures[claim.measure].get("figures", {})
    rows = []
    for name, figure in figures.items():
        if re.fullmatch(claim.figure, name) and isinstance(figure, dict):
            value, met = figure["value"], None
            if value is not None and claim.least is not None:
                met = value > claim.least if claim.strictly else value >= claim.least
            rows.append(about | {"name": name, "figure": figure, "met": met})
    return rows or [about | {"name": measures[claim.measure]["title"], "figure": None, "met": None}]


def _files(weights: Path) -> list[dict[str, Any]]:
    """The manifest's entries, with `same`: has the file on disk that hash? And files that are planned, not there."""
    there = {entry["file"]: entry for entry in shipped.manifest(weights)}
    out = []
    for line in shipped.table():
        path = weights / line.file
        entry = there.get(line.file, {"file": line.file, "title": line.title})
        same = "sha256" in entry and path.exists() and _sha256(path) == entry["sha256"]
        out.append(entry | {"planned_bytes": line.bytes, "same": same})
    return out


def _claims_of_files(files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is decided over the shipped files; over a part of them, only what is wrong already."""
    total, absent = sum(f.get("bytes", 0) for f in files), [f["file"] for f in files if "sha256" not in f]
    wrong = [f["file"] for f in files if "sha256" in f and not f["same"]]
    names = {"different": wrong, "not there": absent}
    said = "; ".join(f"{k}: {', '.join(v)}" for k, v in names.items() if v) or f"all {len(files)} files"
    matches = False if wrong else None if absent else True
    small = False if total >= LIMIT else None if absent else True
    return [
        {"point": 8, "claim": "shipped files match this page by hash", "name": said, "met": matches},
        {"point": 8, "claim": "all files under 75 MB", "name": f"{total / 1e6:.1f} MB", "met": small},
    ]


def _stages() -> list[str]:
    """All stages, in the order of the table of shipped files."""
    return list(dict.fromkeys(s for line in shipped.table() for s in line.stages))


def _log(path: Path) -> dict[str, Any] | None:
    """Steps, pace, about how long it took, and the loss's curve, from a stage's log. Of a step that was done twice,
    after a stop, the loss is the last one's; the time counts both."""
    if not path.exists():
        return None
    curve, pace, seconds, before = {}, [], 0.0, 0
    for line in map(json.loads, path.read_text().splitlines()):
        step = line["step"]
        seconds += line["seconds_per_step"] * (step - before if step > before else min(step, stage.LOG_STEPS))
        curve[step], before = line["loss"], step
        pace.append(line["seconds_per_step"])
    losses = [[k, _plain(v)] for k, v in sorted(curve.items())]
    ends = {"first_loss": losses[0][1], "last_loss": losses[-1][1]}
    steps = {"steps": losses[-1][0], "seconds_per_step": pace[-1], "best_seconds_per_step": min(pace)}
    return steps | {"minutes": seconds / 60} | ends | {"losses": losses}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    """Of the machine that the report ran on."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    cpu = named[1] if named else platform.processor() or platform.machine()
    return {"CPU": cpu, "cores": os.cpu_count(), "threads of torch": torch.get_num_threads(), "GPU": gpu}


def _write(path: Path, text: str) -> None:
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")
