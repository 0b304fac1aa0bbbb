"""What a run says of itself: a line for people, the same as JSON lines, and accelerate's trackers."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from tqdm import tqdm

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


class Pace:
    """Times the steps of a run, and apart from them what comes between them now and then (validations, checkpoints).

    now: a clock in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now, self._mark = now, now()  # from which the step under way counts
        self._steps: list[float] = [0, 0.0]  # number and seconds
        self._first = 0.0
        self._pauses: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def pause(self, what: str) -> Iterator[None]:
        """Within it, no step is under way."""
        start = self._now()
        yield
        seconds = self._now() - start
        self._mark += seconds
        self._pauses.setdefault(what, []).append(seconds)

    def stepped(self) -> None:
        """Note the end of a step."""
        seconds, self._mark = self._now() - self._mark, self._now()
        if not self._first:  # in which much is done once: it counts only until there is another
            self._first = seconds
            return
        self._steps = [self._steps[0] + 1, self._steps[1] + seconds]

    def seconds(self) -> float:
        """The mean seconds of a step."""
        return self._steps[1] / self._steps[0] if self._steps[0] else self._first

    def left(self, steps: int, pauses: Mapping[str, int]) -> float:
        """The seconds that so many steps and pauses will take; of a pause that never was nothing is known."""
        known = [(n, self._pauses[what]) for what, n in pauses.items() if what in self._pauses]
        return steps * self.seconds() + sum(n * sum(took) / len(took) for n, took in known)


class Log:
    """The log of one run, in its folder, and its progress. Only the main process writes.

    In a terminal a bar shows the last figures, images a second and the time that is left; where standard output is none
    (a file, a scheduler), each line of the log stands there.
    """

    def __init__(self, folder: Path, config: RunConfig, accelerator: Accelerator, first: int):
        self.folder, self.config, self.accelerator = folder, config, accelerator
        self.main, self.pace, self.shown = accelerator.is_main_process, Pace(), ""
        self.bar: tqdm[NoReturn] | None = None
        self.lines = self.main
        if self.main:
            _cut(folder / "log.jsonl", first)
            if sys.stderr.isatty():
                form = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
                self.bar = tqdm(
                    desc=config.name, initial=first, total=config.steps, bar_format=form, dynamic_ncols=True
                )
                self.lines = not sys.stdout.isatty()
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

    def pause(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Within it, no step is under way: "validations" or "checkpoints"."""
        return self.pace.pause(what)

    def stepped(self, step: int) -> None:
        """Note that a step is done."""
        self.pace.stepped()
        if self.bar is not None:
            rate = self.config.batch / max(self.pace.seconds(), 1e-9)
            self.bar.set_postfix_str(f"{self.shown}{rate:.3g} pictures/s, {self._left(step)} left", refresh=False)
            self.bar.update(step - self.bar.n)

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the figures of a training step, with images a second and peak memory."""
        self.shown = "".join(f"{k} {v:.3g}, " for k, v in figures.items() if not k.startswith("norm"))
        figures = {**figures, "pictures_per_second": self.config.batch / max(self.pace.seconds(), 1e-9)} | memory()
        shown = "  ".join(f"{k} {v:.4g}" for k, v in figures.items())
        line = f"step {step}/{self.config.steps}  {shown}  {self._left(step)} left"
        self._write(step, line if self.lines else None, figures, figures)

    def validation(self, step: int, figures: Mapping[str, float], grid: Path) -> None:
        """Log the figures of a validation; grid: the file with its pictures."""
        shown = "  ".join(f"{k} {v:.4g}" for k, v in figures.items())
        tracked = {f"validation/{k}": v for k, v in figures.items()}
        self._write(step, f"validation after step {step}  {shown}  {grid}", {"validation": dict(figures)}, tracked)

    def skipped(self, step: int, samples: Sequence[str]) -> None:
        """Note a step that was left out because of these samples; without any, because of none alone."""
        if self.main:
            why = ", ".join(samples) or "all losses are, so it is not a single sample"
            self.say(f"Step {step} is left out, because its gradient is not finite: {why}.")
            _append(self.folder / "skipped.jsonl", {"step": step, "samples": list(samples)})

    def say(self, line: str) -> None:
        """A line for people, above the bar where there is one."""
        if self.main and self.bar is not None:
            self.bar.clear()
        if self.main:
            print(line, flush=True)

    def _left(self, step: int) -> str:
        """How long the steps after this one will take, with the validations and checkpoints that come with them."""

        def coming(every: int) -> int:
            return self.config.steps // every - (step - 1) // every + bool(self.config.steps % every) if every else 0

        pauses = {"validations": coming(self.config.validate_every), "checkpoints": coming(self.config.save_every)}
        left = round(self.pace.left(self.config.steps - step, pauses))
        return f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"

    def _write(self, step: int, line: str | None, figures: Mapping[str, object], tracked: Mapping[str, float]) -> None:
        if self.main:
            if line is not None:
                self.say(line)
            _append(self.folder / "log.jsonl", {"step": step, **figures})
        if self.config.trackers:
            self.accelerator.log(dict(tracked), step=step)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
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
    written = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if written == [""]:
        return []
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
