"""What a run says of itself: a line for people, the same as JSON lines, and accelerate's trackers."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..lookahead.files.atomic import atomic
from .checkpoints import TrainingError
from .config import RunConfig

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}


def check_trackers(trackers: Sequence[str]) -> None:
    """Raises TrainingError for a tracker whose package is missing: accelerate would leave it out without a word."""
    for tracker in trackers:
        if not any(_is_there(package) for package in PACKAGES[tracker]):
            raise TrainingError(
                f"The tracker {tracker} needs the package {PACKAGES[tracker][0]}, which is not installed: install it "
                f"with pip, or take {tracker} out of `trackers` (log.jsonl holds the same figures)."
            )


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # switched off
        return False


class Log:
    """The log of one run, in its folder. Only the main process writes."""

    def __init__(self, folder: Path, config: RunConfig, accelerator: Accelerator, first: int):
        self.folder, self.config, self.accelerator, self.first = folder, config, accelerator, first
        self.main, self.started = accelerator.is_main_process, time.monotonic()
        if self.main:
            _cut(folder / "log.jsonl", first)
        if config.trackers:
            accelerator.init_trackers(
                config.name, {"configuration": json.dumps(config.shareable())}, {"wandb": self._wandb()}
            )

    def _wandb(self) -> dict[str, str]:
        """So that a run that goes on is one run there too, and its files lie in `out`."""
        if not self.main or "wandb" not in self.config.trackers:
            return {}
        path = self.folder / "wandb_run.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:8])
        return {"dir": str(self.folder), "id": path.read_text(), "resume": "allow"}

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the figures of a training step, with images a second and peak memory."""
        pace = (time.monotonic() - self.started) / max(step - self.first, 1)
        figures = {**figures, "pictures_per_second": self.config.batch / pace} | memory()
        shown = "  ".join(f"{k} {v:.4g}" for k, v in figures.items())
        left = int(pace * (self.config.steps - step))
        clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        self._write(step, f"step {step}/{self.config.steps}  {shown}  {clock} left", figures, figures)

    def validation(self, step: int, figures: Mapping[str, float], grid: Path) -> None:
        """Log the figures of a validation; grid: the file with its pictures."""
        shown = "  ".join(f"{k} {v:.4g}" for k, v in figures.items())
        tracked = {f"validation/{k}": v for k, v in figures.items()}
        self._write(step, f"validation after step {step}  {shown}  {grid}", {"validation": dict(figures)}, tracked)

    def skipped(self, step: int, samples: Sequence[str]) -> None:
        """Note a step that was left out because of these samples; without any, because of none alone."""
        if self.main:
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


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, but for a last one that a full disk or a power failure cut short. Raises ValueError for what
    is no log."""
    written = path.read_text(encoding="utf-8").splitlines()
    if written and written[-1].startswith("{") and not written[-1].endswith("}"):
        written.pop()
    return [json.loads(line) for line in written]


def _cut(path: Path, step: int) -> None:
    """Lines after the checkpoint that a run goes on from will be written again; without one, all of them."""
    if not step:
        path.unlink(missing_ok=True)
    elif path.exists():
        with atomic(path) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in lines(path) if line["step"] <= step))


def _append(path: Path, values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as f:
        f.write(json.dumps(values) + "\n")
