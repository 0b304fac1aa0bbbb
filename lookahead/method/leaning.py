"""A warm start of the guidance: the noise of a latent leans towards a picture of who is wanted.

Latent optimisation (`latent_optimisation`, LCM-Lookahead, arXiv 2404.03620, section 5.1) begins at noise that knows
nothing of the reference, and its first iterations find again what the reference shows: the colours and the large forms
of a face. Here they are read off it. The shift of the noise is a part of the difference between the latent of a
reference, put where the preview has its face, and the preview; it costs the preview, one evaluation, and no gradient.
Image to image (SDEdit, arXiv 2108.01073) puts the reference in the place of all that is signal, and with it layout and
style; here the signal stays, and the noise leans. This project's own.
"""

from __future__ import annotations

from torch import Tensor

from .noise_guide import Moved, move_noise


def lean_towards(
    z: Tensor, preview: Tensor, goal: Tensor, alpha_bar: Tensor, amount: float, mask: Tensor | None = None
) -> Moved:
    """Move the noise in latents z_t [n, c, h, w] towards latents of what is wanted, on the sphere on which it lies.

    preview: the one-step preview latents of z_t; goal: latents of their shape. amount: the part of their difference
    that the noise moves by, 0 to about 1, in units of the noise's rms: latents have about the same. alpha_bar, mask: as
    of `noise_guide.move_noise`.
    """
    return move_noise(z, amount * (goal.float() - preview.float()), preview, alpha_bar, mask)
