"""The file of a noise guide (`method.noise_guide`): its weights in 16 bit, what it was trained for, and where it comes
from, as safetensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..method.noise_guide import NoiseGuide, NoiseGuideSizes
from .atomic import first_line
from .metadata import shown, stated
from .tensors import LARGEST, EncoderFileError, check_numbers, read_tensors, write_tensors

FORMAT, VERSION = "lcm-lookahead-noise-guide", "2"  # (of version 1, which did not see the goal, none was trained)
SIGNATURE = "recogniser_signature"
SAME = 0.98  # cosine of two answers to the same pattern above which one recogniser gave both (ONNX rounds differently)

# The fields of the metadata, in the order in which they are shown. All values are text.
NOISE_GUIDE_FIELDS = {
    "format": "format name",
    "format_version": "format version",
    "base_model": "base model that the guide was trained on",
    "base_model_hash": "hash of the base model",
    "shortcut": "few-step LoRA of its previews",
    "start": "earliest place in the sampling that it was trained for, 0 pure noise, 1 the finished picture",
    "end": "latest such place",
    "recogniser": "face recogniser whose embeddings it reads",
    "recogniser_licence": "licence of that recogniser",
    "size": "side in pixels of the pictures that it was trained with",
    "data": "training data",
    "data_hash": "hash of the training data",
    "config": "training configuration",
    "steps": "training steps",
}


@dataclass(frozen=True, eq=False)
class NoiseGuideFile:
    """A checked file of a noise guide. network: in 32 bit, frozen; signature [d]: of its recogniser
    (`noise_guide.signature`); start, end: where in the sampling it was trained to act, in [0, 1]."""

    name: str
    network: NoiseGuide
    signature: Tensor
    start: float
    end: float
    metadata: dict[str, str]

    def check_recogniser(self, signature: Tensor, name: str) -> None:
        """Raise EncoderFileError, one sentence, where another recogniser answered; name: of that one."""
        wanted = stated(self.metadata, "recogniser")
        if signature.shape != self.signature.shape or float(F.cosine_similarity(signature, self.signature, 0)) < SAME:
            raise EncoderFileError(
                f"{self.name} was trained with the face recogniser {wanted}, and {name} tells people apart in another "
                "way: choose that recogniser in the identity loss, or a noise guide that was trained with this one."
            )

    def provenance(self) -> str:
        """Describes the file, a line a field."""
        numbers = sum(p.numel() for p in self.network.parameters())
        lines = [f"{self.name}: noise guide, {numbers / 1e6:.1f} million weights"]
        fields = [k for k in NOISE_GUIDE_FIELDS if k not in ("format", "format_version")]
        fields += sorted(k for k in self.metadata if k.startswith("modelspec."))
        known = (k for k in fields if self.metadata.get(k))
        return "\n".join([*lines, *(f"{NOISE_GUIDE_FIELDS.get(k, k)}: {shown(self.metadata, k)}" for k in known)])


def write(path: str | os.PathLike[str], guide: NoiseGuide, signature: Tensor, metadata: Mapping[str, str]) -> None:
    """Write a noise guide in 16 bit, checked first.

    signature [d]: of the recogniser that it was trained with; metadata: text fields of NOISE_GUIDE_FIELDS and of
    modelspec ("modelspec.*"), without the format's own. Raises EncoderFileError where `read` would not accept the
    result, or the place cannot be written.
    """
    if unknown := [k for k in metadata if k not in NOISE_GUIDE_FIELDS and not k.startswith("modelspec.")]:
        raise EncoderFileError(
            f"Files of noise guides have no metadata field {unknown[0]}; known are {', '.join(NOISE_GUIDE_FIELDS)}."
        )
    tensors = {k: v.detach().half().cpu().contiguous() for k, v in guide.state_dict().items()}
    tensors[SIGNATURE] = signature.detach().float().cpu().contiguous()
    metadata = {**metadata, "format": FORMAT, "format_version": VERSION}
    from_tensors(tensors, metadata, Path(path).name)
    write_tensors(path, tensors, metadata)


def read(path: str | os.PathLike[str], operations: ModuleType = nn) -> NoiseGuideFile:
    """Read and check a noise guide; the sizes follow from the shapes. operations: classes of its layers.

    Raises EncoderFileError, one sentence, for a file that is none, is damaged, has other weights than its sizes ask
    for, or states places that are none.
    """
    tensors, metadata = read_tensors(path)
    return from_tensors(tensors, metadata, Path(path).name, operations)


def from_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], name: str, operations: ModuleType = nn
) -> NoiseGuideFile:
    """Check flat tensors as they stand in a file. `name` is used in messages only; errors as in `read`."""
    if metadata.get("format") != FORMAT:
        raise EncoderFileError(
            f"{name} is no noise guide (its format is {stated(metadata, 'format')}): choose a file that `lookahead "
            "guide train` has written."
        )
    if metadata.get("format_version") != VERSION:
        raise EncoderFileError(
            f"{name} has noise guide format version {stated(metadata, 'format_version')}, and this version of the pack "
            f"reads {VERSION}: update the pack, or train the guide anew."
        )
    check_numbers(tensors, name, LARGEST)
    weights = {k: v.float() for k, v in tensors.items()}
    signature = weights.pop(SIGNATURE, torch.empty(0))
    try:
        sizes = NoiseGuideSizes.from_state_dict(weights)
        with torch.device("meta"):
            network = NoiseGuide(sizes, operations)
        network.load_state_dict(weights, assign=True)
    except (KeyError, IndexError, ValueError, RuntimeError, TypeError) as error:  # (TypeError: the length of a number)
        raise EncoderFileError(
            f"{name} is not a whole noise guide ({first_line(error)}): download it again."
        ) from error
    if signature.shape != (sizes.identity,):
        raise EncoderFileError(
            f"{name} reads face embeddings of {sizes.identity} numbers, and its recogniser's signature has shape "
            f"{list(signature.shape)}: it is damaged or was put together from two files."
        )
    start, end = _places(metadata, name)
    return NoiseGuideFile(name, network.eval().requires_grad_(False), signature, start, end, dict(metadata))


def _places(metadata: Mapping[str, str], name: str) -> tuple[float, float]:
    """Where in the sampling the guide may act."""
    try:
        start, end = (float(metadata[key]) for key in ("start", "end"))
        sensible = 0 <= start <= end <= 1
    except (KeyError, ValueError):
        sensible = False
    if not sensible:
        raise EncoderFileError(
            f"{name} states that it acts from {stated(metadata, 'start')} to {stated(metadata, 'end')} of the sampling,"
            " and two numbers from 0 to 1 are needed, the earlier first: download it again."
        )
    return start, end
