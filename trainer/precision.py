"""What the field `precision` is called by torch and by accelerate."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
