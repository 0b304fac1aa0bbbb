"""The trainer is imported before diffusers, so that its cure for torchvision on a CPU torch holds (trainer/compat.py)."""

import lcm_lookahead.trainer  # noqa: F401
