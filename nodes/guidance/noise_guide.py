"""A noise guide in the host: the loaded file, and latents moved by it in one pass."""

from __future__ import annotations

import logging
import os
import weakref
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor

from ...lookahead.files import noise_guide_file
from ...lookahead.losses.base import Combined, Loss
from ...lookahead.losses.identity import IdentityLoss
from ...lookahead.method.noise_guide import guide_noise, signature

NEAR = 1e-3  # how far, as a share, a noise level may lie outside of those that a guide was trained for


class LoadedNoiseGuide:
    """NOISE_GUIDE carries a noise guide, its network under the host's memory management."""

    def __init__(self, path: str | os.PathLike[str]):
        """Raises EncoderFileError, one sentence, for a file that is none."""
        self.file = noise_guide_file.read(path, comfy.ops.manual_cast)
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.file.network,
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )
        self._known: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()  # recognisers that are the guide's own

    def check(self, loss: IdentityLoss, device: torch.device) -> None:
        """Raise EncoderFileError, one sentence, where a loss has another recogniser than the guide was trained with."""
        recogniser = loss.recogniser
        if recogniser not in self._known:
            self.file.check_recogniser(signature(recogniser, recogniser.size, device), recogniser.name)
            self._known.add(recogniser)


def identity_in(loss: Loss) -> IdentityLoss:
    """The identity loss that a loss is or combines. Raises ValueError, one sentence, where there is none, or it has no
    picture of anybody."""
    parts = loss.parts if isinstance(loss, Combined) else ((1.0, loss),)
    found = [part for weight, part in parts if weight and isinstance(part, IdentityLoss)]
    for part in found:
        if part.shows:
            return part
    if found:
        raise ValueError(
            "A noise guide begins with the reference's picture, and Lookahead Identity Loss has none, only a face "
            "embedding: connect a picture at its image, or leave noise_guide open."
        )
    raise ValueError(
        "A noise guide moves the noise towards a person, and the loss names none: connect Lookahead Identity Loss, "
        "alone or through Combine Lookahead Losses, or leave noise_guide open."
    )


@torch.no_grad()
def apply_noise_guide(
    guide: LoadedNoiseGuide,
    loss: IdentityLoss,
    z: Tensor,
    preview: Tensor,
    goal: Tensor,
    place: Tensor,
    alpha_bar: Tensor,
) -> Tensor:
    """Latents z_t [n, c, h, w] moved towards the people of a loss; where nothing moves, the bits stay.

    preview, goal, place, alpha_bar: as in `noise_guide.guide_noise`. Raises EncoderFileError, one sentence, where the
    loss has another recogniser than the guide.
    """
    guide.check(loss, z.device)
    people = loss.references.embeddings
    people = people[torch.arange(len(z)) % len(people)].to(z.device, torch.float32)
    return guide_noise(guide.file.network, z, preview, goal, place, alpha_bar, people).z


def warn_of_level(guide: LoadedNoiseGuide, sampling: Any, sigma: float) -> None:
    """Log a warning where a noise level, in the scale of the host's model sampling, is none of the guide's."""
    file = guide.file
    noisiest, cleanest = (float(sampling.percent_to_sigma(place)) for place in (file.start, file.end))
    if not cleanest * (1 - NEAR) <= sigma <= noisiest * (1 + NEAR):
        logging.warning(
            "[LCM-Lookahead] the noise guide %s was trained to act from %g to %g of the sampling (noise levels %.3g to "
            "%.3g), and this step has noise level %.3g: set start to %g, with 10 steps or more.",
            *(file.name, file.start, file.end, noisiest, cleanest, sigma, file.start),
        )
