"""The face models as insightface's model pack: `<root>/models/mini/` with a detector and a recogniser in ONNX.

insightface tells its models apart by shape alone (nine outputs: SCRFD; one of a square input of 112 pixels: ArcFace)
and normalises pictures itself, so neither graph does. The detector's input size is fixed at 128: insightface then
ignores any other `det_size`, at which these weights would find little. There is no manifest.json: insightface would
take its own licence terms for granted beside one.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ...lookahead.vision.face_models import open_app
from ..plan import WEIGHTS
from ..stages import stage
from ..stages.face_networks import CROP, DETECTOR_SIZE, STRIDES, FaceDetector, FaceRecogniser

if TYPE_CHECKING:
    from insightface.app import FaceAnalysis

NAME = "mini"
ROOT = WEIGHTS / "insightface"
_FOLDER = f"insightface/models/{NAME}"  # under weights/
DETECTOR, RECOGNISER, LICENCE = (f"{_FOLDER}/{file}" for file in (f"det_{NAME}.onnx", f"rec_{NAME}.onnx", "LICENSE"))
_LICENCE_TEXT = """\
Apache-2.0, as all of LCM-Lookahead for ComfyUI, whose LICENSE file holds the whole text.

These face models were trained on procedurally drawn faces alone. They show nobody, and are of no use on photographs.
"""
_OPSET = 17  # what onnx2torch reads


def write_detector(net: FaceDetector, path: Path) -> None:
    """Weights are stored in 16 bit and used in 32; `net` is in evaluation mode."""
    names = [f"{kind}_{stride}" for kind in ("score", "bbox", "kps") for stride in STRIDES]
    # Left to itself the exporter melts norms into convolutions, whose weights are then no longer those of 16 bit.
    as_is = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
    _write(net, DETECTOR_SIZE, path, _store_in_16_bit, output_names=names, **as_is)


def write_recogniser(net: FaceRecogniser, path: Path) -> None:
    """In 32 bit, because onnx2torch reads no weights that are converted; `net` is in evaluation mode."""
    any_number = {"input.1": {0: "n"}, "embedding": {0: "n"}}
    _write(net, CROP, path, output_names=["embedding"], dynamic_axes=any_number)


def write_licence(path: Path) -> None:
    """The text that tells whoever opens the pack what it may be used for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_LICENCE_TEXT)


def _write(
    net: nn.Module, size: int, path: Path, change: Callable[[Path], None] | None = None, **options: object
) -> None:
    """Export through torch's older exporter, which needs no further package; the file is whole or not there."""
    if net.training:
        raise ValueError(f"{type(net).__name__} is in training mode: call eval() on it before the export")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    example = torch.zeros(1, 3, size, size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            net, (example,), str(part), input_names=["input.1"], dynamo=False, opset_version=_OPSET, **options
        )
    if change:
        change(part)
    os.replace(part, path)


def _store_in_16_bit(path: Path) -> None:
    """Every larger weight of an ONNX file as float16, with a cast to float32 before its use."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path)
    graph = model.graph
    casts = []
    for weight in graph.initializer:
        if weight.data_type == TensorProto.FLOAT and np.prod(weight.dims) > 1:
            name = weight.name
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), name + ".half"))
            casts.append(helper.make_node("Cast", [name + ".half"], [name], f"cast {name}", to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def rounded(net: nn.Module, path: Path) -> nn.Module:
    """`net` with the weights of a stage's result, rounded to 16 bit as all shipped weights are; ready for use."""
    tensors = stage.half(stage.read_tensors(path))
    net.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})
    return net.eval().requires_grad_(False)


def load(root: Path = ROOT, threads: int = 1) -> FaceAnalysis:
    """insightface's own FaceAnalysis over the pack, on the CPU, ready to use.

    Raises FileNotFoundError where a file is missing: insightface itself would try to download a missing pack.
    """
    folder = root.absolute() / "models" / NAME
    for file in (DETECTOR, RECOGNISER):
        if not (folder / Path(file).name).is_file():
            raise FileNotFoundError(f"no {Path(file).name} in {folder}: the mini world's face models are not there")
    return open_app(folder, threads=threads)
