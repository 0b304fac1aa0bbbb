"""The folders of concepts and of their encoders, and what travels as LOOKAHEAD_CONCEPT_ENCODER."""

from __future__ import annotations

import os

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import folder_paths
import torch
from torch import Tensor

from ...lookahead.files.concept_file import read_concept_encoder
from ...lookahead.files.tensors import sha256
from ...lookahead.method.concept import Prediction, average
from .. import folders
from ..folders import file_names, nothing_chosen, searched

CONCEPTS = "lookahead_concepts"
ENCODERS = "lookahead"


def register_concept_folder() -> None:
    """Make `models/lookahead_concepts` known to the host, beside what users configured for it."""
    folder_paths.add_model_folder_path(CONCEPTS, os.path.join(folder_paths.models_dir, CONCEPTS))


def safetensors_in(folder: str) -> list[str]:
    """Names of the .safetensors files in a folder of models."""
    return file_names(folder, (".safetensors",))


def path_in(folder: str, name: str, what: str) -> str:
    """Path of a file by name. Raises FileNotFoundError, one sentence, naming the folders that were searched."""
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        places = searched(folder_paths.get_folder_paths(folder))
        raise FileNotFoundError(f"There is no {what} {name!r} in {places}: put it into one of these folders.")
    return path


def found(folder: str, name: str | None, what: str) -> bool | str:
    """Says whether a file is there, for a node's validation: True, or a sentence; no name comes by a link, or there is
    no file yet."""
    if not name:
        return nothing_chosen(safetensors_in(folder), what, folder_paths.get_folder_paths(folder), name)
    return folders.found(lambda name: path_in(folder, name, what), name)


def changed(folder: str, name: str | None) -> str:
    """Tells a file from what replaced it, for a node's fingerprint."""
    return folders.fingerprint(lambda name: path_in(folder, name, "file"), name)


class LoadedConceptEncoder:
    """A concept encoder's file ready for use, its network under the host's memory management.

    words: its dictionary, token id -> text; about: its metadata.
    """

    def __init__(self, path: str):
        """Raises EncoderFileError, one sentence, for a file that is none."""
        self.name = os.path.basename(path)
        self.network, self.words, self.about = read_concept_encoder(path, comfy.ops.manual_cast)
        self.digest = sha256(path)
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.network,
            load_device=comfy.model_management.text_encoder_device(),
            offload_device=comfy.model_management.text_encoder_offload_device(),
        )

    @property
    def size(self) -> int:
        """Side in pixels of the square that is looked at: from the file, else 1024 (SDXL)."""
        return int(self.about.get("size", 1024))

    @property
    def blend(self) -> float:
        """The blend of the two paths that the encoder was made for: from the file, else 0.25."""
        return float(self.about.get("blend", 0.25))

    @property
    def reads_unet(self) -> bool:
        """Tells whether it reads what the UNet makes of the picture, beside what the image encoder does."""
        return bool(self.network.sizes.unet_width)

    def predict(self, features: Tensor, seen: Tensor | None = None) -> Prediction:
        """Features of one picture [1, width] give its prediction. seen: those of the UNet at several noise levels
        [levels, unet_width] (`host_features`), where the encoder reads them; then it is averaged over the levels.

        Raises ValueError, one sentence, for features of another width.
        """
        if features.shape[-1] != self.network.sizes.image_width:
            raise ValueError(
                f"The CLIP_VISION gives features of width {features.shape[-1]}, but {self.name} reads "
                f"{self.network.sizes.image_width}: load the image encoder that it was trained with."
            )
        comfy.model_management.load_model_gpu(self.patcher)
        features = features.to(self.patcher.load_device, torch.float32)
        if seen is None:
            return self.network(features)
        return average(self.network(features.expand(len(seen), -1), seen.to(features)))

    def provenance(self) -> str:
        """The file says this of itself, a line each."""
        shown = {k: v for k, v in self.about.items() if k != "config" and "\n" not in v}
        return "\n".join([self.name, *(f"{k}: {v}" for k, v in sorted(shown.items()))])
