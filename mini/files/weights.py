"""The mini world's shipped files: from trained stages to `weights/`, and back to networks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..plan import WEIGHTS
from ..stages import stage, vae
from ..stages.face_networks import FaceDetector, FaceRecogniser
from ..stages.networks import EvaluationRecogniser, StyleScorer, ThingJudge
from . import insightface_pack
from .checkpoint import sdxl_checkpoint
from .shipped import LICENCE, File, table, write_manifest

AnyNetwork = TypeVar("AnyNetwork", bound=nn.Module)

CHECKPOINT = "mini_sdxl.safetensors"
CLIP_VISION = "mini_clip_vision.safetensors"
IMAGE_PROMPT = "mini_ip_adapter_plus_face.safetensors"
RECOGNISER = "mini_evaluation_recogniser.safetensors"
STYLE_SCORER = "mini_evaluation_style_scorer.safetensors"
THINGS_JUDGE, THINGS_SCORER = "mini_things_judge.safetensors", "mini_things_scorer.safetensors"
FACE_RECOGNISER = "mini_face_recogniser.safetensors"
LORAS = {  # by the stage that trains it
    "lcm_lora": "mini_lcm_lora.safetensors",
    "collapsed": "mini_collapsed_lora.safetensors",
    "style_lora": "mini_style_lora.safetensors",
}


def export(folder: Path, to: Path) -> list[str]:
    """Write the shipped files (safetensors in 16 bit, public layouts) from the stages' results in `folder`, and the
    manifest; returns their names. A file whose stages are not done is left out."""
    written = []
    for line in table():
        source = folder / (line.result or f"{line.stages[0]}.safetensors")
        needed = {source, *(folder / f"{name}.safetensors" for name in line.stages)}
        if missing := sorted(path.name for path in needed if not path.exists()):
            print(f"{line.file}: not written, the build has no {' and no '.join(missing)} yet", flush=True)
            continue
        if line.file in _OTHERS:
            _OTHERS[line.file](folder, to / line.file)
        elif source.suffix == ".safetensors":
            make = _TENSORS.get(line.file)
            tensors = make(folder) if make else stage.read_tensors(source)
            stage.write_tensors(to / line.file, stage.half(tensors), _metadata(line))
        else:
            (to / line.file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, to / line.file)
        written.append(line.file)
    write_manifest(folder, to, written)
    return written


def _metadata(line: File) -> dict[str, str]:
    title = f"LCM-Lookahead {line.title} (drawn faces, 128 px)"
    return {"format": "pt", "modelspec.title": title, "modelspec.license": LICENCE}


def _checkpoint(folder: Path) -> Mapping[str, Tensor]:
    base = stage.read_tensors(folder / "base.safetensors")
    unet, text_l, text_g = (
        {k.removeprefix(p): v for k, v in base.items() if k.startswith(p)} for p in ("unet.", "text.l.", "text.g.")
    )
    return sdxl_checkpoint(unet, text_l, text_g, vae.load(folder).state_dict())


# Files that are not simply the tensors of a stage's result.
_TENSORS: dict[str, Callable[[Path], Mapping[str, Tensor]]] = {CHECKPOINT: _checkpoint}


def _detector(folder: Path, path: Path) -> None:
    insightface_pack.write_detector(insightface_pack.rounded(FaceDetector(), folder / "detector.safetensors"), path)


def _recogniser(folder: Path, path: Path) -> None:
    net = insightface_pack.rounded(FaceRecogniser(), folder / "face_recogniser.safetensors")
    insightface_pack.write_recogniser(net, path)


# Files that are no safetensors, written by these from the folder of the stages' results.
_OTHERS = {
    insightface_pack.DETECTOR: _detector,
    insightface_pack.RECOGNISER: _recogniser,
    insightface_pack.LICENCE: lambda _, path: insightface_pack.write_licence(path),
}


def face_recogniser(weights: Path = WEIGHTS) -> FaceRecogniser:
    """The identity loss's recogniser in torch, the twin of the one in the insightface pack."""
    return insightface_pack.rounded(FaceRecogniser(), weights / FACE_RECOGNISER)


def read_face_recogniser(path: Path) -> FaceRecogniser | None:
    """The network of a file that holds such a recogniser's weights; None for a file of another layout."""
    if path.suffix != ".safetensors":
        return None
    with torch.device("meta"):
        names = FaceRecogniser().state_dict().keys()
    with safe_open(path, "pt") as file:
        if set(file.keys()) != set(names):
            return None
    return insightface_pack.rounded(FaceRecogniser(), path)


def evaluators(weights: Path = WEIGHTS) -> tuple[EvaluationRecogniser, StyleScorer]:
    """The two networks that only measure, from the shipped files."""
    return _read(EvaluationRecogniser(), weights / RECOGNISER), _read(StyleScorer(), weights / STYLE_SCORER)


def thing_judge(path: Path) -> ThingJudge:
    """The judge of drawn things, from the stage's result or the shipped file."""
    return _read(ThingJudge(), path)


def things_scorer(path: Path) -> StyleScorer:
    """The scorer of styles and places that knows things and faces, from the stage's result or the shipped file."""
    return _read(StyleScorer(), path)


def _read(net: AnyNetwork, path: Path) -> AnyNetwork:
    stored = stage.read_tensors(path)
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in stored.items()})
    net.eval().requires_grad_(False)
    return net
