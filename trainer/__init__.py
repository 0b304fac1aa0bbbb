"""The trainer: makes the encoder weights that the nodes load, and the mini world that everything is shown on."""

from .compat import let_torchvision_import

let_torchvision_import()
