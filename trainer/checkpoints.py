"""Checkpoints: atomic, rotated, the best one kept; and how a run goes on from the last.

What is in them beside the loop's own state is the recipe's: weights of what it trains, and the file that it exports.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..lookahead.files.atomic import atomic_folder, first_line
from ..lookahead.files.tensors import EncoderFileError
from .config import RunConfig
from .recipe import Recipe


class TrainingError(RuntimeError):
    """Why a run cannot go on, in one sentence."""


@dataclass
class TrainingProgress:
    """A run has come so far: steps done, skipped ones in a row before that, the best validation and its step, and the
    step of the last validation."""

    step: int = 0
    bad: int = 0
    best: float = float("-inf")
    best_step: int = 0
    validated: int = -1

    def count(self, done: int, fault: bool) -> None:
        """Note that so many steps are done, and whether the last one was skipped for a sample's fault."""
        self.step, self.bad = done, self.bad + 1 if fault else 0


@dataclass(frozen=True, eq=False)
class State:
    """All that a run is besides its progress. average: of `recipe.trained`; it is what is exported where there is one.
    scaler: of fp16's gradients. data: `Source.digest`."""

    recipe: Recipe
    optimiser: torch.optim.Optimizer
    average: AveragedModel | None = None
    scaler: torch.amp.GradScaler | None = None
    data: str = ""

    @property
    def exported(self) -> nn.Module:
        return self.recipe.trained if self.average is None else self.average.module

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer | torch.amp.GradScaler]:
        """Names what has a state as state.pt does (in which the trained module is "encoder", whatever it is)."""
        parts: dict[str, nn.Module | torch.optim.Optimizer | torch.amp.GradScaler] = {
            "encoder": self.recipe.trained,
            "optimiser": self.optimiser,
        }
        if self.average is not None:
            parts["average"] = self.average
        if self.scaler is not None:
            parts["scaler"] = self.scaler
        return parts


def surroundings() -> dict[str, str | int]:
    """Lists what the last bits of a run depend on besides its configuration."""
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


def save(folder: Path, config: RunConfig, progress: TrainingProgress, state: State) -> None:
    """Write a checkpoint with its exported file. Of the older ones `config.keep` - 1 stay, and the best.

    Raises TrainingError, one sentence, where it cannot be written; what was there before then stays.
    """
    final = _path(folder, progress.step)
    for left in (folder / "checkpoints").glob("*step-*.part"):  # of a run that was killed while it saved
        shutil.rmtree(left, ignore_errors=True)
    stored: dict[str, object] = {name: each.state_dict() for name, each in state.parts().items()}
    stored |= {"progress": asdict(progress), "config": config.model_dump_json(), "surroundings": surroundings()}
    stored |= {"data": state.data, "base_model_hash": state.recipe.about.get("base_model_hash", "")}
    try:
        with atomic_folder(final, over=True) as part:
            torch.save(stored, part / "state.pt")
            state.recipe.export(part / f"{config.name}.safetensors", state.exported, progress.step)
    except (OSError, RuntimeError, EncoderFileError) as error:  # RuntimeError: torch.save's, of a full disk
        raise TrainingError(
            f"The checkpoint {final} cannot be written ({first_line(error)}): free some space, and give the same "
            "command again, which goes on from the checkpoint before it."
        ) from error
    for old in found(folder)[: -config.keep]:
        if old != _path(folder, progress.best_step):
            shutil.rmtree(old)


def resume(folder: Path, config: RunConfig, state: State, say: Callable[[str], object] = print) -> TrainingProgress:
    """Load the last checkpoint, if there is one.

    Raises TrainingError, one sentence, where it is damaged, of a run with other values, data or base, or further than
    `config.steps`.
    """
    checkpoints = found(folder)
    if not checkpoints:
        return TrainingProgress()
    last = checkpoints[-1]
    try:
        stored = torch.load(last / "state.pt", map_location="cpu", weights_only=True)
        before, progress = json.loads(stored["config"]), TrainingProgress(**stored["progress"])
    except Exception as error:  # a file cut short raises many kinds
        older = f"the run goes on from {checkpoints[-2].name}" if len(checkpoints) > 1 else "the run begins anew"
        raise TrainingError(
            f"{last}/state.pt is damaged ({first_line(error)}): delete the folder {last}, and {older}."
        ) from None
    if progress.step > config.steps:
        raise TrainingError(
            f"The run in {folder} is at step {progress.step}, beyond steps={config.steps}: give at least "
            f"{progress.step}, or another `out` for a new run."
        )
    other = changes(before, config)
    if differs := _differences(other, stored, config, state):
        exported = last / f"{before.get('name', config.name)}.safetensors"  # under the name that the run had then
        start = f" (with model.start={exported} from the weights of this one)"
        raise TrainingError(
            f"The run in {folder} was started with {differs}: bring that back, or, for a new run, give another `out`"
            f"{start if hasattr(config.model, 'start') else ''}."
        )
    if config.SCORING & other.keys():
        progress.best = float("-inf")
    for name, part in state.parts().items():
        part.load_state_dict(stored[name])
    was, here = stored.get("surroundings", {}), surroundings()
    if changed := [f"{k} {was[k]}, now {here[k]}" for k in was if was[k] != here.get(k)]:
        say(f"The last checkpoint was made with {'; '.join(changed)}: the run goes on, but not to the same last bits.")
    return progress


def _differences(
    other: Mapping[str, tuple[Any, Any]],
    stored: Mapping[str, Any],
    config: RunConfig,
    state: State,
) -> str:
    """What of a run may not change and has, for the user; empty where nothing has. other: of `changes`."""
    free = config.free | config.SCORING
    if config.optimiser.schedule != "constant":
        free = free - {"steps"}
    fixed = [f"{name} ({was}, now {now})" for name, (was, now) in other.items() if name not in free]
    if fixed:
        return f"other values of {', '.join(fixed)}"
    if stored.get("data", state.data) != state.data:
        return f"other data than {config.data.source} holds now"
    base = state.recipe.about.get("base_model_hash", "")
    return f"another model than {config.model.base}" if stored.get("base_model_hash", base) != base else ""


def changes(before: Mapping[str, Any], config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Finds the values that differ, (before, now), by dotted name. Of files only the names count, since folders are
    moved."""
    then, now = _leaves(config.named_only(before)), _leaves(config.shareable())
    return {name: (then[name], value) for name, value in now.items() if name in then and then[name] != value}


def _leaves(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        leaves |= _leaves(value, f"{above}{name}.") if isinstance(value, Mapping) else {above + name: value}
    return leaves


def _path(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08}"
