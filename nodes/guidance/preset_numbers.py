"""The inputs of the guidance sampler that stand for settings, and what settings have beyond them."""

from __future__ import annotations

from typing import Any

from ...lookahead.method.guidance_presets import GuidanceSettings
from ...lookahead.method.latent_optimisation import Optimisation

#: What a preset can have that is no input of the node: a field of `Optimisation` in words
BEYOND = {
    "nesterov": "Nesterov's momentum",
    "decay": "a step size that falls",
    "sphere": "moves on the sphere of the noise",
    "judged": "the best iterates judged again",
    "smoothing": "gradients averaged over several draws",
}


def numbers_of(settings: GuidanceSettings) -> dict[str, Any]:
    """The inputs of the node that stand for settings, which may have more (`beyond_numbers`)."""
    o = settings.optimisation
    return {
        "start": settings.start,
        "iterations": o.iterations,
        "step_size": o.step_size,
        "guided_steps": settings.steps,
        "normalisation": o.normalisation,
        "momentum": o.momentum,
        "clamp": o.clamp,
        "keep_norm": o.keep_norm,
        "keep_best": o.keep_best,
        "time_travel": settings.time_travel,
        "jitter": settings.jitter,
        "best_of": settings.best_of,
        "backward": o.backward,
        "lean": settings.lean,
    }


def beyond_numbers(settings: GuidanceSettings) -> list[str]:
    """Lists in words what settings have that no input of the node says."""
    usual = Optimisation()
    return [word for name, word in BEYOND.items() if getattr(settings.optimisation, name) != getattr(usual, name)]
