"""What a device computes in 16 bit with instructions for it."""

from __future__ import annotations

import torch


def has_bfloat16(device: torch.device) -> bool:
    """Tells whether a device is known to multiply matrices of bfloat16 quickly: a GPU with instructions for it, or a
    CPU from AVX-512 on.

    Below that a CPU does it number by number, some sixty times slower than float32 (measured on AVX2).
    """
    if device.type == "cpu":
        return torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
