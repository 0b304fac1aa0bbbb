"""What a concept encoder may read of the host's UNet: its down half and middle on the noised picture, means over space.

The host calls patches with each tensor that the down half hands on, and with the middle's output, at which it stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.model_sampling
import torch
from torch import Tensor

from ...lookahead.method.concept import ConceptEncoder
from ...lookahead.method.concept_input import ConceptError
from .clip_words import encode


class _Stopped(Exception):
    """The UNet has come to its middle, and need not go on."""


def looked_at(
    encoder: ConceptEncoder, name: str, model: Any, clip: Any, latents: Tensor, looks: Sequence[int]
) -> Tensor:
    """The UNet makes this of a picture at some time steps, under the empty prompt and one fixed noise, standardised for
    `encoder`: [looks, unet_width].

    latents: [1, 4, h, w] as the VAE gives them. Raises ConceptError, one sentence, for another UNet, and for a model of
    flow matching: its time steps are other noise levels than those whose statistics the encoder has.
    """
    if isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST):
        raise ConceptError(
            f"This MODEL was switched to flow matching, and {name} knows what its UNet makes of a picture under SDXL's "
            "own noise: connect the MODEL of the checkpoint, from before that switch."
        )
    context, pooled = encode(clip, clip.tokenize(""))
    comfy.model_management.load_model_gpu(model)
    base, device = model.model, model.load_device
    z = base.process_latent_in(latents).to(device)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
    t = torch.tensor(looks, device=device)
    sigma = base.model_sampling.sigmas.to(device)[t]
    size = {"width": 8 * z.shape[-1], "height": 8 * z.shape[-2], "crop_w": 0, "crop_h": 0}
    size |= {"target_width": size["width"], "target_height": size["height"]}
    y = base.encode_adm(pooled_output=pooled.to(device), device=device, **size)
    x = z + sigma.view(-1, 1, 1, 1) * noise  # as the host noises: variance exploding
    seen: list[Tensor] = []
    count = len(looks)

    def note(h: Tensor, options: dict[str, Any]) -> Tensor:
        seen.append(h.float().mean((2, 3)))
        return h

    def stop(h: Tensor, *_: Any) -> None:
        note(h, {})
        raise _Stopped

    options = {"patches": {"input_block_patch": [note], "output_block_patch": [stop]}, "cond_or_uncond": [0]}
    rows = {"c_crossattn": context.to(device).expand(count, -1, -1), "y": y.expand(count, -1)}
    try:
        base.apply_model(x, sigma, transformer_options=options, **rows)
    except _Stopped:
        pass
    features = torch.cat(seen, 1)
    if features.shape[1] != encoder.sizes.unet_width:
        raise ConceptError(
            f"This MODEL's UNet gives {features.shape[1]} features, and {name} reads {encoder.sizes.unet_width}: use "
            "the checkpoint that it was trained on."
        )
    return encoder.standardised(features, t)
