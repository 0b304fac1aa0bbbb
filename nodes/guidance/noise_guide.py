"""A noise guide in the host: the loaded file, and a sampler's state moved by it in one pass."""

from __future__ import annotations

import logging
import os
import weakref
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor

from ...lookahead.files import noise_guide_file
from ...lookahead.losses.base import Combined, Loss
from ...lookahead.losses.identity import IdentityLoss
from ...lookahead.method.noise_guide import guide_noise, signature
from ...lookahead.method.schedule import to_ve, to_vp

if TYPE_CHECKING:
    from .preview import Call, Previewer

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
    """The identity loss that a loss is or combines. Raises ValueError, one sentence, where there is none."""
    if isinstance(loss, IdentityLoss):
        return loss
    for weight, part in loss.parts if isinstance(loss, Combined) else ():
        if weight and isinstance(part, IdentityLoss):
            return part
    raise ValueError(
        "A noise guide moves the noise towards a person, and the loss names none: connect Lookahead Identity Loss, "
        "alone or through Combine Lookahead Losses, or leave noise_guide open."
    )


@torch.no_grad()
def apply_noise_guide(
    guide: LoadedNoiseGuide,
    previewer: Previewer,
    x: Tensor,
    call: Call,
    conds: dict[str, Any],
    loss: Loss,
    mask: Tensor | None = None,
) -> Tensor:
    """The sampler's state x [n, c, h, w] with its noise moved towards the people of the loss; where nothing moves, the
    bits stay. It costs one evaluation of the shortcut model, for the preview that the guide reads.

    previewer, call, conds: of the run, as `GuidedRun.guide` has them, after `previewer.prepare(call)`; mask: [n, 1, h,
    w] in [0, 1], where the latent may move. Raises ValueError or EncoderFileError, one sentence, where the loss names
    no person or has another recogniser.
    """
    identity = identity_in(loss)
    guide.check(identity, x.device)
    _warn_of_level(guide, previewer.guider.inner_model.model_sampling, float(call.sigma.flatten()[0]))
    with previewer.installed():
        preview = previewer.latent(x, call, conds, torch.ones(len(x), device=x.device), grad=False)
    people = identity.references.embeddings
    people = people[torch.arange(len(x)) % len(people)].to(x.device, torch.float32)
    z = to_vp(x, call.sigma)
    moved = guide_noise(guide.file.network, z, preview, 1 / (call.sigma.float() ** 2 + 1), people, mask)
    return x + to_ve(moved.z - z, call.sigma)


def _warn_of_level(guide: LoadedNoiseGuide, sampling: Any, sigma: float) -> None:
    file = guide.file
    noisiest, cleanest = (float(sampling.percent_to_sigma(place)) for place in (file.start, file.end))
    if not cleanest * (1 - NEAR) <= sigma <= noisiest * (1 + NEAR):
        logging.warning(
            "[LCM-Lookahead] the noise guide %s was trained to act from %g to %g of the sampling (noise levels %.3g to "
            "%.3g), and this step has noise level %.3g: set start to %g, with 10 steps or more.",
            *(file.name, file.start, file.end, noisiest, cleanest, sigma, file.start),
        )
