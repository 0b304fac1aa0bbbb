"""SDXL in diffusers: one UNet, one set of attention processors, for training and inference."""

from .torchvision_cure import let_torchvision_import

let_torchvision_import()
