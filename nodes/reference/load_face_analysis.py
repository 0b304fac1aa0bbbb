"""The node that opens a pack of face models."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ...lookahead.vision.face_models import FaceModels, pack_folder
from ..folders import nothing_chosen, searched, subfolders
from ..schema import schema
from ..sockets import FACE_ANALYSIS

FOLDER = "insightface"
CPU, GPU = "cpu", "gpu"


def packs() -> dict[str, Path]:
    """Every pack by its name: folders of .onnx files in `insightface/models`, or in a configured folder itself."""
    found: dict[str, Path] = {}
    for root in map(Path, folder_paths.get_folder_paths(FOLDER)):
        for place in (root / "models", root):
            for folder in subfolders(place):
                if folder.name != "models" and pack_folder(folder) is not None:
                    found.setdefault(folder.name, folder)
    return found


def places() -> list[str]:
    """The folders in which packs are looked for first."""
    return [os.path.join(path, "models") for path in folder_paths.get_folder_paths(FOLDER)]


def pack_path(name: str) -> Path:
    """The folder of a pack. Raises FileNotFoundError, one sentence, naming the folders that were searched."""
    found = packs()
    if name not in found:
        where = searched(places())
        raise FileNotFoundError(
            f"There is no face pack {name!r} in {where}: unpack one, such as buffalo_l or antelopev2, into a folder of "
            "its name there."
        )
    return found[name]


class LookaheadLoadFaceAnalysis(io.ComfyNode):
    """Pack of face models -> FACE_ANALYSIS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LookaheadLoadFaceAnalysis",
            display_name="Load Lookahead Face Analysis",
            category="lookahead/loaders",
            has_intermediate_output=True,
            description="Opens a pack of insightface's face models, which find faces and tell people apart. Needs the "
            "packages insightface and onnxruntime; nothing is downloaded. Shows the licence of the pack.",
            search_aliases=[
                "insightface",
                "face analysis",
                "face detector",
                "buffalo_l",
                "antelopev2",
                "auraface",
                "faceid",
                "instantid",
                "pulid",
                "face swap",
            ],
            inputs=[
                io.Combo.Input(
                    "pack_name",
                    options=list(packs()),
                    tooltip="A folder of .onnx files in models/insightface/models, such as buffalo_l or antelopev2.",
                ),
                io.Combo.Input(
                    "device",
                    options=[CPU, GPU],
                    default=CPU,
                    tooltip="Where faces are looked for. The cpu is quick enough; gpu needs onnxruntime-gpu, and "
                    "memory that the host does not know of.",
                ),
            ],
            outputs=[
                FACE_ANALYSIS.Output(
                    "FACE_ANALYSIS",
                    display_name="face_analysis",
                    tooltip="For Crop Lookahead Face and Lookahead Identity Loss.",
                ),
                io.String.Output(
                    "LICENCE", display_name="licence", tooltip="What is known of the pack, first of all its licence."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, pack_name: str | None = None) -> bool | str:
        """Say where the pack was looked for, instead of the host's 'value not in list'."""
        if not pack_name:
            return nothing_chosen(list(packs()), "face pack", places(), pack_name)
        try:
            pack_path(pack_name)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, pack_name: str, device: str) -> str:
        """Open again when a file of the pack was replaced."""
        try:
            files = sorted(pack_folder(pack_path(pack_name)).glob("*.onnx"))
            return f"{pack_name} {device} {[(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]}"
        except OSError:
            return pack_name

    @classmethod
    def execute(cls, pack_name: str, device: str = CPU) -> io.NodeOutput:
        models = FaceModels(pack_path(pack_name), gpu=device == GPU)
        lines = [f"{models.name}: licence {models.licence}"]
        lines.append(f"recogniser: {models.recogniser.name if models.recogniser else 'none, it only finds faces'}")
        if models.only_size:
            lines.append(f"its detector looks at {models.only_size} pixels, whatever size is asked for")
        text = "\n".join(lines)
        return io.NodeOutput(models, text, ui=ui.PreviewText(text))
