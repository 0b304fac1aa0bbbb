"""Checkpoints: atomic, rotated, the best one kept; and how a run goes on from the last."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from .config import Config
from .encoder import Encoder
from .export import export

# May change in a resumed run: nothing of it changes what is computed, but for the last bits of the rounding.
FREE = {"steps", "save_every", "keep", "log_every", "norms_every", "nonfinite_in_a_row", "validate_every", "trackers"}
FREE |= {"checkpointing", "accumulate", "compile", "out"}


class TrainingError(RuntimeError):
    """Why a run cannot go on, in one sentence."""


@dataclass
class Progress:
    """How far a run is: steps done, skipped ones in a row before that, the best validation and its step."""

    step: int = 0
    bad: int = 0
    best: float = float("-inf")
    best_step: int = 0


@dataclass(frozen=True, eq=False)
class State:
    """All that a run is besides its progress. average: of the encoder; it is what is exported where there is one."""

    encoder: Encoder
    optimiser: torch.optim.Optimizer
    average: nn.Module | None = None

    @property
    def exported(self) -> Encoder:
        return self.encoder if self.average is None else self.average.module

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        parts = {"encoder": self.encoder, "optimiser": self.optimiser}
        return parts if self.average is None else parts | {"average": self.average}


def surroundings() -> dict[str, str | int]:
    """What the last bits of a run depend on besides its configuration."""
    shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    return {
        "threads": torch.get_num_threads(),
        "processes": torch.distributed.get_world_size() if shared else 1,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "torch": str(torch.__version__),
    }


def found(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first: they get their name when they are complete."""
    return sorted(path for path in (folder / "checkpoints").glob("step-*") if path.suffix != ".part")


def save(folder: Path, config: Config, progress: Progress, state: State, about: Mapping[str, str] | None) -> None:
    """Write a checkpoint with its encoder file. Of the older ones `config.keep` - 1 stay, and the best."""
    final = _path(folder, progress.step)
    part = final.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    stored = {name: each.state_dict() for name, each in state.parts().items()}
    stored |= {"progress": asdict(progress), "config": config.model_dump_json(), "surroundings": surroundings()}
    torch.save(stored, part / "state.pt")
    export(part / f"{config.name}.safetensors", state.exported, config, progress.step, about)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    for old in found(folder)[: -config.keep]:
        if old != _path(folder, progress.best_step):
            shutil.rmtree(old)


def resume(folder: Path, config: Config, state: State) -> Progress:
    """Load the last checkpoint, if there is one. Raises TrainingError where it is of another run."""
    checkpoints = found(folder)
    if not checkpoints:
        return Progress()
    stored = torch.load(checkpoints[-1] / "state.pt", map_location="cpu", weights_only=True)
    before, now = json.loads(stored["config"]), json.loads(config.model_dump_json())
    free = FREE if config.optimiser.schedule == "constant" else FREE - {"steps"}
    if other := [k for k in now if k not in free and before.get(k) != now[k]]:
        raise TrainingError(
            f"The run in {folder} was started with other values of {', '.join(other)}: give those again, or another "
            "`out` for a new run."
        )
    was, here = stored.get("surroundings", {}), surroundings()
    if changed := [f"{k} {was[k]}, now {here[k]}" for k in was if was[k] != here.get(k)]:
        print(f"The run was begun with {'; '.join(changed)}: it goes on, but not to the same last bits.", flush=True)
    for name, part in state.parts().items():
        part.load_state_dict(stored[name])
    return Progress(**stored["progress"])


def _path(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08}"
