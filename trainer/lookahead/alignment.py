"""What keeps previews of the shortcut model close to the base model's pictures, other than a strength drawn at random;
and what keeps the person from changing more than the person.

The paper (arXiv 2404.03620, supplement) compares drawing the LoRA's strength, which it keeps, with score distillation
on the preview and with a consistency loss. Its formulas for these two are not published: what is here is OUR
RECONSTRUCTION, from the publications of each loss. Previews are then by the shortcut model at full strength.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...lookahead.method.guidance import classifier_free_guidance
from ...lookahead.method.schedule import add_noise, ddim_step, preview_latent
from ...sdxl.shared_unet import TextRead
from .draws import Draws

STRIDE, HUBER = 20, 1e-3  # of latent consistency models (arXiv 2310.04378)
GUIDANCE = 5.0  # of the teacher's step

# predict(latents, draws, t, strength): the noise [B, 4, h, w] that is predicted in latents that are at t already.
PredictAtStrength = Callable[[Tensor, Draws, Tensor, float], Tensor]


def score_distillation(predict: PredictAtStrength, alpha_bar: Tensor, latent: Tensor, draws: Draws) -> Tensor:
    """Score distillation (arXiv 2209.14988, eq. 3) on preview latents [B, 4, h, w]: values [B].

    The preview is noised again, to a time step of its own, and the base says in which direction it would rather have
    it: the gradient in `latent` is w(t) (e(z_t) - e), w(t) = 1 - alpha_bar. The value, half that direction's mean
    square, is written so that it has this gradient (divided by the number of elements).
    """
    noise, t = draws.noise_align, draws.t_align
    a = alpha_bar[t].view(-1, 1, 1, 1)
    with torch.no_grad():
        z_t = add_noise(latent, noise, a)
        wanted = latent - (1 - a) * (predict(z_t, replace(draws, noise=noise), t, 0.0) - noise)
    return 0.5 * (latent - wanted).square().mean((1, 2, 3))


def consistency(
    predict: PredictAtStrength, alpha_bar: Tensor, latent: Tensor, z_t: Tensor, t: Tensor, draws: Draws
) -> Tensor:
    """The consistency loss (arXiv 2310.04378, algorithm 1) of preview latents [B, 4, h, w], made from z_t: values [B].

    From z_t the base takes one guided step of DDIM; what the shortcut model previews there is what it should have
    previewed at z_t. Distance: pseudo-Huber.
    """
    everything = torch.ones_like(draws.no_text)
    nothing = replace(draws, no_text=everything, no_image_prompt=everything, no_kv=everything)
    with torch.no_grad():
        e_uncond, e_cond = predict(z_t, nothing, t, 0.0), predict(z_t, draws, t, 0.0)
        e, s = classifier_free_guidance(e_uncond, e_cond, GUIDANCE), (t - STRIDE).clamp(min=0)
        z_s = ddim_step(z_t, e, alpha_bar[t], alpha_bar[s])
        wanted = preview_latent(z_s, predict(z_s, draws, s, 1.0), s, alpha_bar[s])
    return ((latent - wanted).square() + HUBER**2).sqrt().sub(HUBER).mean((1, 2, 3))


def person_alignment(own: Mapping[str, TextRead], plain: Mapping[str, TextRead]) -> tuple[Tensor, Tensor]:
    """PuLID's alignment loss (arXiv 2404.16022, eq. 4 to 6) between two passes over one noisy latent and one text.

    own: what the cross-attentions ask the text with the person in the model; plain: without. Returns values [B]:

    - semantic: the squared difference of Softmax(K Q^T / sqrt(d)) Q, which is for each word the mean query of the
      places that it goes to;
    - layout: the squared difference of the queries themselves.

    Both are means over all cross-attentions. There is no released code of this loss; how it is averaged is ours.
    """
    # Computed again in backward: its intermediates, of 70 attentions in 32 bit, would be a quarter of SDXL's memory.
    both = [
        checkpoint(_differences, read, plain[path], use_reentrant=False, preserve_rng_state=False)
        for path, read in own.items()
    ]
    semantic, layout = (torch.stack(values).mean(0) for values in zip(*both, strict=True))
    return semantic, layout


def _differences(own: TextRead, plain: TextRead) -> tuple[Tensor, Tensor]:
    """Both values [B] of one cross-attention."""
    semantic = (_response(own) - _response(plain)).square().mean((1, 2, 3))
    return semantic, (own.queries.float() - plain.queries.float()).square().mean((1, 2))


def _response(read: TextRead) -> Tensor:
    """For each word the mean query of the places that it goes to: [B, heads, 77, width / heads], in 32 bit."""
    q, k = (t.float().unflatten(-1, (read.heads, -1)).transpose(1, 2) for t in (read.queries, read.keys))
    return torch.softmax(k @ q.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ q
