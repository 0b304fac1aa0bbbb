"""What a run says of itself: a line for people, the same as JSON lines, and accelerate's trackers."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from .checkpoints import TrainingError
from .config import Config

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}


def check_trackers(trackers: Sequence[str]) -> None:
    """Raises TrainingError for a tracker whose package is missing: accelerate would leave it out without a word."""
    for tracker in trackers:
        if not any(importlib.util.find_spec(package) for package in PACKAGES[tracker]):
            raise TrainingError(
                f"The tracker {tracker} needs the package {PACKAGES[tracker][0]}, which is not installed: install it "
                f"with pip, or take {tracker} out of `trackers` (log.jsonl holds the same figures)."
            )


class Log:
    """Of one run, in its folder. Only the main process writes."""

    def __init__(self, folder: Path, config: Config, accelerator: Accelerator, first: int):
        self.folder, self.config, self.accelerator, self.first = folder, config, accelerator, first
        self.main, self.started = accelerator.is_main_process, time.monotonic()
        if self.main:
            _cut(folder / "log.jsonl", first)
        if config.trackers:
            accelerator.init_trackers(config.name, {"configuration": config.model_dump_json()})

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Of a training step. Adds pictures a second and peak memory."""
        pace = (time.monotonic() - self.started) / max(step - self.first, 1)
        figures = {**figures, "pictures_per_second": self.config.batch / pace} | memory()
        shown = "  ".join(f"{k} {v:.4g}" for k, v in figures.items())
        left = int(pace * (self.config.steps - step))
        clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        self._write(step, f"step {step}/{self.config.steps}  {shown}  {clock} left", figures, figures)

    def validation(self, step: int, figures: Mapping[str, float], grid: Path) -> None:
        """Of a validation."""
        shown = "  ".join(f"{k} {v:.4g}" for k, v in figures.items())
        tracked = {f"validation/{k}": v for k, v in figures.items()}
        self._write(step, f"validation after step {step}  {shown}  {grid}", {"validation": dict(figures)}, tracked)

    def skipped(self, step: int, samples: Sequence[str]) -> None:
        """A step that was left out because of these samples; without any, because of none alone."""
        why = ", ".join(samples) or "all losses are, so it is not a single sample"
        print(f"Step {step} is left out, because its gradient is not finite: {why}.", flush=True)
        _append(self.folder / "skipped.jsonl", {"step": step, "samples": list(samples)})

    def _write(self, step: int, line: str, figures: Mapping[str, object], tracked: Mapping[str, float]) -> None:
        if self.main:
            print(line, flush=True)
            _append(self.folder / "log.jsonl", {"step": step, **figures})
        if self.config.trackers:
            self.accelerator.log(dict(tracked), step=step)

    def close(self) -> None:
        if self.config.trackers:
            self.accelerator.end_training()


def memory() -> dict[str, float]:
    """Peak memory of this process in GB: of the GPU, else of the process where the system says it."""
    if torch.cuda.is_available():
        return {"peak_gigabytes": torch.cuda.max_memory_allocated() / 1e9}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}


def _cut(path: Path, step: int) -> None:
    """Lines after the checkpoint that a run goes on from will be written again; without one, all of them."""
    if not step:
        path.unlink(missing_ok=True)
    elif path.exists():
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in lines))


def _append(path: Path, values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        f.write(json.dumps(values) + "\n")
