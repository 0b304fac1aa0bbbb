"""One cure for one environment: torch's CPU build beside torchvision's CUDA build (the only one on some registries)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch


def let_torchvision_import() -> None:
    """Declare the two operators whose schemas that torchvision cannot load, so that `import torchvision` works.

    diffusers, transformers and lpips import it. Does nothing where torch has CUDA or torchvision matches torch.
    """
    if torch.version.cuda is not None or torch.version.hip is not None or hasattr(torch.ops.torchvision, "nms"):
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    if "+cu" not in (Path(spec.origin).parent / "version.py").read_text():
        return
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
