"""The trainer: makes the encoder weights that the nodes load."""

from .. import sdxl  # noqa: F401  (first of all: what it cures must be cured before diffusers is imported)
