"""The trainer is imported before diffusers: its cure for torchvision on a CPU torch must come first."""

import lcm_lookahead.trainer  # noqa: F401
