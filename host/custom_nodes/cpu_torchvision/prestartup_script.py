"""Let a torchvision that is built for CUDA be imported beside a torch for CPUs only.

ComfyUI runs this file before it imports its nodes. torchvision bears with compiled operators that do not load, but
registers fake kernels for two of them, whose schemas then do not exist: declaring the schemas is enough. Nothing is
done beside a torch with an accelerator, or where the operators are there.
"""

import torch

if torch.version.cuda is None and torch.version.hip is None:
    for _name in ("nms", "qnms"):
        try:
            torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:  # torchvision has declared it already
            pass
