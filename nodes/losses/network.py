"""Networks of the losses under the host's memory management, and the pictures and files that they read."""

from __future__ import annotations

import os

import comfy.model_management
import comfy.model_patcher
import folder_paths
import torch
from torch import Tensor, nn

from ...lookahead.losses.cutouts import Cutouts
from ...lookahead.losses.embedding import EmbeddingLoss, embed
from ..folders import file_names, searched
from ..reference.images import split_alpha

FOLDER = "lookahead_losses"
EXTENSIONS = (".safetensors", ".pth", ".pt", ".bin")
AVERAGE, ONE_EACH = "average", "one per picture"


class GradientPatcher(comfy.model_patcher.ModelPatcher):
    """A frozen network of plain torch modules that gradients pass through.

    The host loads and unloads it like any other, with two differences. Its weights are moved outside of inference mode,
    whoever asks for it: weights made in inference mode cannot be saved for backward. And it is loaded whole or not at
    all: only the host's own layers can run while a part of them is elsewhere.
    """

    def __init__(self, network: nn.Module):
        super().__init__(
            network,
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        with torch.inference_mode(False):
            super().load(device_to, force_patch_weights=force_patch_weights, full_load=True)

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        with torch.inference_mode(False):
            super().unpatch_model(device_to, unpatch_weights)

    def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False):
        return 0  # the host then unloads all of it


def pictures_of(image: Tensor) -> Tensor:
    """IMAGE [n, H, W, 1 to 4] in [0, 1] -> [n, 3, H, W] in [-1, 1], float32; what is transparent is white.

    Call it outside of inference mode: what it returns can then take part in gradients.
    """
    return split_alpha(image)[0].movedim(-1, 1) * 2 - 1


def picture_loss(patcher: GradientPatcher, image: Tensor, several: str, views: int) -> EmbeddingLoss:
    """The loss of likeness to pictures; several are averaged or go one to each picture of a batch, in turn."""
    comfy.model_management.load_model_gpu(patcher)
    targets = embed(patcher.model, pictures_of(image).to(patcher.load_device)).to("cpu")
    if several == AVERAGE:
        targets = targets.mean(dim=0, keepdim=True)
    return EmbeddingLoss(patcher.model, targets, Cutouts(views))


def find_file(folder: str, names: tuple[str, ...], wanted: str) -> str:
    """Path of the first file of a model folder whose name begins with one of `names`.

    Raises FileNotFoundError, one sentence: `wanted` says what to get and where from.
    """
    for name in file_names(folder, EXTENSIONS):
        if os.path.basename(name).startswith(names):
            return folder_paths.get_full_path_or_raise(folder, name)
    raise FileNotFoundError(f"{wanted} and put it into {searched(folder_paths.get_folder_paths(folder))}.")


def fingerprint(path: str) -> str:
    """Identifies what a path holds: it is another string once the file was replaced."""
    stat = os.stat(path)
    return f"{path} {stat.st_size} {stat.st_mtime_ns}"
