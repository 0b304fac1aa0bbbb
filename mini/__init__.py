"""The mini world: a tiny SDXL family trained on procedurally drawn faces whose identity is known exactly."""

from .. import sdxl  # noqa: F401  (first of all: what it cures must be cured before diffusers is imported)
