"""A warm start of the guidance: the face of a preview gives way to that of a reference.

Latent optimisation (`latent_optimisation`, LCM-Lookahead, arXiv 2404.03620, section 5.1) begins at a latent that knows
nothing of the reference, and its first iterations find again what the reference shows: the colours and the large forms
of a face. Here they are read off it: what z_t has of its preview becomes, about the head, what it would have of the
reference, put where the preview has its face. It costs the preview, one evaluation, and no gradient. Image to image
(SDEdit, arXiv 2108.01073) does so to all of the picture, with the reference as it lies and with noise that knows
nothing of the prompt; here the place of the face stays, the noise of the run, and what the mask leaves out. This
project's own.
"""

from __future__ import annotations

from torch import Tensor

from .schedule import signal_scale


def lean_towards(
    z: Tensor, preview: Tensor, goal: Tensor, alpha_bar: Tensor, amount: float, mask: Tensor | None = None
) -> Tensor:
    """Return latents z_t [n, c, h, w] whose signal is no longer their preview alone, but in part what is wanted.

    preview: the one-step preview latents of z_t; goal: latents of their shape; alpha_bar: of z_t, [n] or one number;
    amount: the part of the preview that gives way, 0 to 1. mask: [n or 1, 1, h, w], the part of it at each place. The
    noise stays as it is, so that the latents are as noisy as before.
    """
    part = amount if mask is None else amount * mask.to(z)
    shift = part * (goal.float() - preview.float())
    return (z + signal_scale(alpha_bar, z) * shift).to(z)
