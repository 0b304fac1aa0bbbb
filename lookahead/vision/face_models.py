"""A pack of face models in insightface's layout, run by insightface: the detector, and which recogniser it brings.

insightface is imported only when a pack is opened. Left to itself it downloads a pack that it does not find, without
end where a network keeps silent, and answers most mistakes with an AssertionError without words or with no faces at
all; so everything is looked at before it is called.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..files.atomic import first_line
from .faces import Face

if TYPE_CHECKING:
    import numpy as np
    from insightface.app import FaceAnalysis

SIZES = (640, 320, 128)  # pixels a side at which the detector looks: a face that fills the picture is found at 128
THRESHOLD = 0.5
_LICENCE_READ = 10_000  # characters in which the first line of a licence is looked for
_OLDEST = 1  # before it, a detector takes one size only
_RESEARCH = "non-commercial research only (insightface's terms for its pretrained models)"
_KNOWN = {  # by the names of the published packs, which bring no licence file
    "antelopev2": _RESEARCH,
    "buffalo": _RESEARCH,
    "cheetah": _RESEARCH,
    "raccoon": _RESEARCH,
    "auraface": "Apache-2.0 (as its authors publish it)",
}


class FaceModelError(RuntimeError):
    """Says what is wrong with a pack of face models, in one sentence for the user."""


def require_insightface() -> None:
    """Raise ImportError, one sentence that says what to install, where insightface cannot be used."""
    missing = [name for name in ("insightface", "onnxruntime") if not _there(name)]
    if missing:
        raise ImportError(
            f"Finding faces needs insightface and onnxruntime, and ComfyUI's Python has no {' and no '.join(missing)}: "
            "run `pip install insightface onnxruntime` with that Python (onnxruntime-gpu instead, never both, for an "
            "NVIDIA GPU), then restart ComfyUI."
        )
    version = importlib.metadata.version("insightface")
    if int(version.split(".")[0]) < _OLDEST:
        raise ImportError(
            f"insightface {version} is too old, since its detector takes one size only: run `pip install --upgrade "
            "insightface` with ComfyUI's Python, then restart ComfyUI."
        )


def _there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a finder that keeps it away; a module that was put there by hand
        return False


def pack_folder(folder: Path) -> Path | None:
    """The folder that holds a pack's .onnx files: this one, or the only one in it (antelopev2.zip nests them)."""
    if any(folder.glob("*.onnx")):
        return folder
    nested = sorted({path.parent for path in folder.glob("*/*.onnx")})
    return nested[0] if len(nested) == 1 else None


def licence_of(folder: Path) -> str:
    """Says what is known of a pack's licence: the first line of a licence file in it, else what its name tells."""
    for path in sorted(p for p in folder.iterdir() if "licen" in p.name.lower() and p.is_file()):
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = file.read(_LICENCE_READ).split("\n")
        first = next((line.strip() for line in lines if line.strip()), None)
        if first:
            return f"{first[:200]} (see {path.name})"
    name = folder.name.lower()
    by_name = next((licence for prefix, licence in _KNOWN.items() if name.startswith(prefix)), None)
    return by_name or "unknown: the pack holds no licence file; ask where it comes from"


def execution_providers(gpu: bool) -> list[str]:
    """onnxruntime's names of what it shall compute on. Raises FaceModelError where there is no such GPU build."""
    if not gpu:
        return ["CPUExecutionProvider"]
    import onnxruntime

    available = onnxruntime.get_available_providers()
    gpus = ("CUDAExecutionProvider", "ROCMExecutionProvider", "DmlExecutionProvider", "CoreMLExecutionProvider")
    chosen = [name for name in gpus if name in available][:1]
    if not chosen:
        raise FaceModelError(
            "The installed onnxruntime computes on the CPU only: choose cpu, or replace it with onnxruntime-gpu."
        )
    return [*chosen, "CPUExecutionProvider"]


def _pack(folder: Path) -> Path:
    pack = pack_folder(folder.expanduser().absolute())
    if pack is None:
        raise FileNotFoundError(f"There are no .onnx files in {folder}: unpack the models of a face pack into it.")
    return pack


def open_app(folder: Path, gpu: bool = False, threads: int | None = None) -> FaceAnalysis:
    """insightface's own FaceAnalysis over a pack's folder, ready to use, without ever asking the network.

    threads: of onnxruntime, its own choice by default. Raises FileNotFoundError where there is no pack, ImportError
    without insightface, FaceModelError for a pack that it cannot use; one sentence each.
    """
    folder = _pack(folder)
    require_insightface()
    import onnxruntime
    from insightface.app import FaceAnalysis

    options = onnxruntime.SessionOptions()
    if threads:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
    tasks, providers = ["detection", "recognition"], execution_providers(gpu)
    try:
        app = FaceAnalysis(name=str(folder), allowed_modules=tasks, providers=providers, sess_options=options)
    except AssertionError as error:  # its way to say that there is none
        raise FaceModelError(
            f"{folder.name} has no face detector among {_names(folder)}: use a whole pack, such as buffalo_l or "
            "antelopev2."
        ) from error
    except Exception as error:  # onnxruntime has an exception a kind of damage; insightface adds its own
        raise FaceModelError(
            f"{folder.name} cannot be opened ({first_line(error)}): one of {_names(folder)} is damaged or no face "
            "model, so put the pack's own files there again."
        ) from error
    if not getattr(app.det_model, "use_kps", False):
        raise FaceModelError(
            f"The detector of {folder.name} finds no landmarks, which crops and losses need: use a pack whose detector "
            "does, such as buffalo_l or antelopev2."
        )
    app.prepare(ctx_id=0 if gpu else -1, det_size=[(size, size) for size in SIZES])
    return app


class FaceModels:
    """An opened pack: finds faces (`faces.Detector`), and knows its recogniser's file."""

    def __init__(self, folder: Path, gpu: bool = False, threads: int | None = None):
        """Raises what `open_app` raises."""
        app = open_app(folder, gpu, threads)
        self.folder = _pack(folder)
        self.name = folder.name
        self.licence = licence_of(self.folder)
        self.recogniser, self.preprocessing = _recogniser(app)
        self._open = lambda: open_app(self.folder, gpu, threads)
        self._app: FaceAnalysis | None = None
        self._detector = app.det_model  # the recogniser's session is dropped: embeddings are computed in torch

    @property
    def only_size(self) -> int | None:
        """Pixels a side of the only size at which the detector can look, None where it can look at any."""
        fixed = getattr(self._detector, "static_input_size", None)
        return int(fixed[0]) if fixed else None

    def __call__(self, pictures: Tensor) -> list[list[Face]]:
        """As `find`, at the usual sizes."""
        return self.find(pictures)

    def find(self, pictures: Tensor, sizes: Sequence[int] = SIZES, threshold: float = THRESHOLD) -> list[list[Face]]:
        """The faces of each picture [n, 3, h, w] in [0, 1], surest first; what several sizes find is found once.

        sizes: pixels a side at which the detector looks at the whole picture, whole 32s. threshold: the least score.
        """
        wrong = [size for size in sizes if size < 32 or size % 32]
        if wrong or not sizes:
            raise ValueError(
                f"The detection sizes are {list(sizes)}, and each must be a multiple of 32 from 32 on: write for "
                "example 640, 320, 128."
            )
        out: list[list[Face]] = []
        for picture in pictures:
            fit = [size for size in _looked_at(self._detector, sizes) if _leaves_a_row(picture, size)]
            if not fit:
                out.append([])
                continue
            boxes, points = self._detector.detect(as_bgr(picture), input_size=fit, det_thresh=threshold)
            rows = zip(torch.from_numpy(boxes).float(), torch.from_numpy(points).float(), strict=True)
            out.append([Face(box[:4].clone(), five.clone(), float(box[4])) for box, five in rows])
        return out

    def embed(self, pictures: Tensor) -> list[list[tuple[Face, Tensor]]]:
        """The faces of each picture [n, 3, h, w] in [0, 1], surest first, with the unit vector [d] of the pack's own
        recogniser for each, by insightface itself. Raises FaceModelError for a pack without one."""
        if self.recogniser is None:
            raise FaceModelError(
                f"The face pack {self.name} has no recogniser, and face embeddings need one: use a whole pack, such as "
                "buffalo_l."
            )
        self._app = self._app or self._open()  # opened anew, since the session was dropped
        return [
            [
                (
                    Face(
                        torch.from_numpy(face.bbox).float(), torch.from_numpy(face.kps).float(), float(face.det_score)
                    ),
                    torch.from_numpy(face.normed_embedding).float(),
                )
                for face in found
            ]
            for found in find_and_embed(self._app, pictures)
        ]


def as_bgr(picture: Tensor) -> np.ndarray:
    """[3, h, w] in [0, 1], clamped to it -> what insightface reads: bytes [h, w, 3], blue first."""
    import numpy as np

    rgb = (picture.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return np.ascontiguousarray(rgb[:, :, ::-1])


def find_and_embed(app: FaceAnalysis, pictures: Tensor) -> list[list[Any]]:
    """All that insightface itself says of each picture [n, 3, h, w] in [0, 1], best face first: its own `Face`s.

    app: of `open_app`. A strip of which the smallest size leaves no row has no face.
    """
    sizes = _looked_at(app.det_model, SIZES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # skimage's, about a call of insightface's
        return [
            app.get(as_bgr(picture)) if all(_leaves_a_row(picture, size) for size in sizes) else []
            for picture in pictures
        ]


def _looked_at(detector: Any, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Width and height at which a detector looks when it is asked for these sizes: some have one of their own."""
    fixed = getattr(detector, "static_input_size", None)
    return [(int(fixed[0]), int(fixed[1]))] if fixed else [(size, size) for size in dict.fromkeys(sizes)]


def _leaves_a_row(picture: Tensor, size: tuple[int, int]) -> bool:
    """Tells whether something is left of a picture [3, h, w] that insightface makes as large as fits into (width,
    height): of a strip of 4000x3 it is no row, at which its resizing fails."""
    height, width = picture.shape[-2:]
    return size[0] * height >= width and size[1] * width >= height


def _recogniser(app: FaceAnalysis) -> tuple[Path | None, tuple[float, float] | None]:
    """The file of a pack's recogniser, and the mean and deviation in bytes where a manifest states them."""
    model = app.models.pop("recognition", None)
    if model is None:
        return None, None
    stated = getattr(app, "model_package", None) is not None
    return Path(model.model_file), (float(model.input_mean), float(model.input_std)) if stated else None


def _names(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.glob("*.onnx")))
