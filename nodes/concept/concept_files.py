"""The folders of concepts and of their encoders, and what travels as LOOKAHEAD_CONCEPT_ENCODER."""

from __future__ import annotations

import os

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor

from ...lookahead.files.concept_file import read_concept_encoder
from ...lookahead.files.tensors import sha256
from ...lookahead.method.concept import Prediction, average

CONCEPTS = "lookahead_concepts"
ENCODERS = "lookahead"


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
        """The file says this of itself, a line each; hashes, formats and the whole configuration stay in the file."""
        long = ("config", "format", "format_version", "tuning")

        def told(name: str, value: str) -> bool:
            return name not in long and not name.endswith("_hash") and "." not in name and "\n" not in value

        shown = {k: v for k, v in self.about.items() if told(k, v)}
        return "\n".join([self.name, *(f"{k}: {v}" for k, v in sorted(shown.items()))])
