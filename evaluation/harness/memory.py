"""The memory that a picture takes: the peak of a process, as Linux counts it, or of torch on a GPU."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

ANEW = "5"  # what clear_refs takes for: count the peak from the present size on (man proc_pid_clear_refs)


class PeakMemory:
    """Measures the most main memory that a process takes from here on, with all that it has loaded before.

    pid: of the process; None for one that is not known.
    """

    def __init__(self, pid: int | None):
        self._process = Path("/proc") / str(pid)
        try:
            (self._process / "clear_refs").write_text(ANEW)
            self._counted = True
        except OSError:  # another system, another user's process, or none
            self._counted = False

    @property
    def bytes(self) -> int | None:
        """The peak in bytes; None where it cannot be told."""
        if not self._counted:
            return None
        found = re.search(r"^VmHWM:\s+(\d+) kB$", (self._process / "status").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None


class PeakOnGPU:
    """Measures the most memory that torch takes of the GPU from here on, models included."""

    def __init__(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    @property
    def bytes(self) -> int:
        """The peak in bytes."""
        return torch.cuda.max_memory_allocated()


def own_peak(device: torch.device) -> PeakMemory | PeakOnGPU:
    """Begins to measure this process, where it computes on this device."""
    return PeakOnGPU() if device.type == "cuda" else PeakMemory(os.getpid())
