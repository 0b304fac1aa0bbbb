"""The training loop. The same command again goes on where a run stopped, and ends with the same bits.

It knows no method: what is trained, and by which losses, is the recipe's (`recipe.Recipe`).
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..sdxl.precision import has_bfloat16
from .alone import alone
from .checkpoints import State, TrainingError, TrainingProgress, resume, save
from .config import RunConfig
from .feed import Feed
from .gradients import gradients
from .log import Log, check_trackers
from .memory import out_of_memory, spilled
from .precision import MIXED
from .recipe import Outcome, Recipe, Source, Validator

__all__ = ["TrainingError", "train"]


def train(config: RunConfig, recipe: Recipe, source: Source) -> Path | None:
    """Train `recipe.trained`; returns the exported file, or None where a signal to stop came first.

    All that the run writes lies in the folder `config.out`: checkpoints, each with an exported file, pictures of the
    validations, log.jsonl. Raises TrainingError, one sentence, where it cannot go on.
    """
    check_trackers(config.trackers)
    accelerator = Accelerator(
        mixed_precision=MIXED[config.precision], log_with=list(config.trackers) or None, project_dir=config.out
    )
    _check_processes(accelerator, config)
    try:
        with alone(Path(config.out)) if accelerator.is_main_process else contextlib.nullcontext():
            return _train(accelerator, config, recipe, source)
    except torch.OutOfMemoryError as error:
        raise TrainingError(out_of_memory(config, _savings(recipe, accelerator))) from error


def _savings(recipe: Recipe, accelerator: Accelerator) -> Mapping[str, float]:
    """What would save memory, as far as it can be counted: it must not hide that memory has run out."""
    try:
        return recipe.savings(accelerator.num_processes) if accelerator.is_main_process else {}
    except Exception:
        return {}


def _train(accelerator: Accelerator, config: RunConfig, recipe: Recipe, source: Source) -> Path | None:
    folder, main = Path(config.out), accelerator.is_main_process
    if config.compile:
        recipe.compile()
    losses, optimiser = accelerator.prepare(recipe.losses, make_optimiser(config, recipe, accelerator.device))
    trained = [p for group in optimiser.param_groups for p in group["params"]]
    average = AveragedModel(recipe.trained, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema else None
    state = State(recipe, optimiser, average, accelerator.scaler, source.digest())
    progress = resume(folder, config, state, accelerator.print)
    first = progress.step
    _check_alike(accelerator, trained, first)
    log = Log(folder, config, accelerator, first)
    if config.precision == "bf16" and accelerator.device.type == "cpu" and not has_bfloat16(accelerator.device):
        log.say(
            "precision is bf16, which a CPU below AVX-512 computes many times slower than fp32: give precision=fp32."
        )
    feed = Feed(accelerator, config, source, first)
    validations = _Validations(accelerator, config, recipe, source, state, log)
    with contextlib.closing(log), contextlib.closing(feed), _Stop(main) as stop:
        if progress.validated < first and (not first or validations.due(first)):
            validations.run(progress, stop)  # of what training starts from; or one that a signal to stop left out
        if stop.asked(accelerator):
            log.say(f"Stopped in the validation after step {first}: the same command goes on from there.")
            return None
        for number in range(first, config.steps):
            done = number + 1
            samples = [(batch, recipe.draw(numbers, batch)) for numbers, batch in feed.step()]
            _set_rates(optimiser, config, number)
            measure = _due(config.norms_every, number) and config.precision != "fp16"  # in which they would be scaled
            outcomes, norms = gradients(
                losses,
                recipe.parts,
                samples,
                trained,
                backward=accelerator.backward,
                unsynchronised=lambda: accelerator.no_sync(losses),
                measure=measure,
            )
            norm = accelerator.clip_grad_norm_(trained, config.optimiser.clip)
            leave = stop.asked(accelerator)
            taken, fault = _take_step(accelerator, optimiser, norm, outcomes)
            if taken and average is not None:
                average.update_parameters(recipe.trained)
            if fault:
                log.skipped(done, gather_object(_not_finite([batch for batch, _ in samples], outcomes)))
            progress.count(done, fault)
            if progress.bad >= config.nonfinite_in_a_row:
                raise _too_many_faults(progress.bad, folder)
            log.stepped(done)
            if _due(config.log_every, done) or done == config.steps or measure:
                figures = recipe.figures(outcomes, lambda value: float(accelerator.reduce(value, "mean")))
                figures |= {f"norm_{part}": float(value) for part, value in norms.items()}
                log.figures(done, figures | {"norm": float(norm), "waiting": feed.waiting()})
                _warn_of_spilling(accelerator.device, log.say)
            # (who is told to stop may have little time: it saves at once, and validates when it goes on)
            better = False
            if not leave and validations.due(done):
                better = validations.run(progress, stop)
                leave = stop.asked(accelerator)
            if _due(config.save_every, done):
                _check_alike(accelerator, trained, done)
            if main and (better or _due(config.save_every, done) or done == config.steps or leave):
                with log.pause("checkpoints"):
                    save(folder, config, progress, state)
            if leave:
                log.say(f"Stopped after step {done} of {config.steps}: the same command goes on from there.")
                return None
        accelerator.wait_for_everyone()
    result = folder / f"{config.name}.safetensors"
    return recipe.export(result, state.exported, config.steps) if main else result


def _check_processes(accelerator: Accelerator, config: RunConfig) -> None:
    """Raises TrainingError where the processes cannot share the run."""
    processes = accelerator.num_processes
    if accelerator.device.type == "cpu" and config.precision == "fp16":
        raise TrainingError("precision is fp16, which a CPU does not compute in: give bf16 or fp32.")
    if processes != int(os.environ.get("WORLD_SIZE", 1)):  # each would write over the others' files
        raise TrainingError(
            f"{os.environ['WORLD_SIZE']} processes were started, which do not know of each other, since they have no "
            "GPU: set ACCELERATE_USE_CPU=true to train on CPUs."
        )
    if config.batch % (processes * config.accumulate):
        raise TrainingError(
            f"batch is {config.batch}, and {processes} processes with accumulate {config.accumulate} cannot share it "
            "evenly: change one."
        )
    rows = config.batch // (processes * config.accumulate)
    if rows < config.least_rows:
        raise TrainingError(
            f"batch {config.batch} over {processes} processes with accumulate {config.accumulate} computes {rows} at a "
            f"time, and a loss of this run compares {config.least_rows} or more: raise batch, or lower accumulate or "
            "the number of processes."
        )


def make_optimiser(config: RunConfig, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over the trained tensors, with a rate for each group; in 8 bit by bitsandbytes as an option."""
    settings = config.optimiser
    groups = [{"params": group, "lr": rate, "rate": rate} for group, rate in recipe.groups()]
    common: dict[str, Any] = {"betas": settings.betas, "weight_decay": settings.weight_decay}
    if not settings.eight_bit:
        return torch.optim.AdamW(groups, **common, fused=device.type == "cuda")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise TrainingError(
            "optimiser.eight_bit needs the package bitsandbytes, which is not installed: install it with pip, or set "
            "optimiser.eight_bit=false (whose state takes four times the memory)."
        ) from None
    return AdamW8bit(groups, **common)


def _due(every: int, done: int) -> bool:
    """Whether something that is done every so many steps (0: never) is due at this one."""
    return bool(every) and done % every == 0


def _set_rates(optimiser: torch.optim.Optimizer, config: RunConfig, number: int) -> None:
    for group in optimiser.param_groups:
        group["lr"] = group["rate"] * config.optimiser.factor(number, config.steps)


def _take_step(
    accelerator: Accelerator, optimiser: AcceleratedOptimizer, norm: Tensor, outcomes: Mapping[str, Outcome]
) -> tuple[bool, bool]:
    """Step where the gradient, of this norm, is finite; returns whether it was taken, and whether a sample (or all of
    them) is at fault. All processes decide alike. The gradients are gone afterwards."""
    if accelerator.mixed_precision == "fp16":
        # The gradient scaler leaves out steps until it has found its scale, which is no fault of a sample.
        optimiser.step()
        finite = all(bool(outcome.values.isfinite().all()) for outcome in outcomes.values())
        taken, fault = not optimiser.step_was_skipped, _anywhere(accelerator, not finite)
    else:
        taken = bool(torch.as_tensor(norm).isfinite())
        fault = not taken
        if taken:
            optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return taken, fault


def _too_many_faults(bad: int, folder: Path) -> TrainingError:
    return TrainingError(
        f"{bad} steps in a row had no finite gradient: look at the samples in {folder / 'skipped.jsonl'}; or begin a "
        "new run, with another `out`, in precision bf16 or fp32 or with lower rates."
    )


class _Validations:
    """Pictures and figures of the main process; the others go on and wait at the next exchange."""

    def __init__(
        self, accelerator: Accelerator, config: RunConfig, recipe: Recipe, source: Source, state: State, log: Log
    ) -> None:
        self.accelerator, self.config, self.recipe, self.state, self.log = accelerator, config, recipe, state, log
        self.rows = config.batch // accelerator.num_processes // config.accumulate
        self.validator: Validator | None = None
        if config.validate_every and accelerator.is_main_process:
            self.validator = recipe.validator(source, accelerator.device)
        if self.validator is not None:
            log.say(f"Validation: {recipe.monitor} is measured by {self.validator.by}.")

    def due(self, done: int) -> bool:
        """Whether to validate after so many steps: every `validate_every`, and after the last."""
        return _due(self.config.validate_every, done) or done == self.config.steps

    def run(self, progress: TrainingProgress, stop: _Stop) -> bool:
        """Validate; returns whether it is the best so far, which is noted (but not of what training starts from).

        A signal to stop ends it at once: the run that goes on makes up for it.
        """
        if self.validator is None:
            return False
        done = progress.step
        grid = Path(self.config.out) / "validation" / f"step-{done:08}.png"
        try:
            with self.log.pause("validations"), stop.at_once(), self.accelerator.autocast():
                figures = self.validator(self.state.exported, self.rows, grid)
        except _Stopped:
            return False
        progress.validated = done
        self.log.validation(done, figures, grid)
        value = figures.get(self.recipe.monitor, float("nan"))
        better = done > 0 and value > progress.best
        if better:
            progress.best, progress.best_step = value, done
        return better


def _check_alike(accelerator: Accelerator, trained: Sequence[nn.Parameter], step: int) -> None:
    """Raises TrainingError where the processes are not at one step with the same weights."""
    if accelerator.num_processes == 1:
        return
    weights = torch.stack([p.detach().double().abs().sum() for p in trained]).sum()
    all_ = accelerator.gather(torch.stack([weights.new_tensor(float(step)), weights])[None])
    if (all_ != all_[0]).any():
        raise TrainingError(
            f"The processes are not at the same step with the same weights (steps {all_[:, 0].int().tolist()}): `out` "
            "must be one folder that all of them see; start them anew, and they go on from the last checkpoint."
        )


def _not_finite(batches: Sequence[Any], outcomes: Mapping[str, Outcome]) -> list[str]:
    """Names of the samples that have a value which is not finite."""
    names = [name for batch in batches for name in batch.names]
    return [name for i, name in enumerate(names) if not all(bool(o.values[i].isfinite()) for o in outcomes.values())]


def _warn_of_spilling(device: torch.device, say: Callable[[str], None]) -> None:
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
        if warning := spilled(torch.cuda.memory_reserved(device), there):
            say(warning)


class _Stopped(Exception):
    """A signal to stop came where nothing is lost by leaving at once."""


class _Stop:
    """Within it, SIGTERM and SIGINT let the step under way come to its end, and a second one does not wait for it."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, told: bool) -> None:
        self.told, self.came, self._leave = told, False, False

    def __enter__(self) -> _Stop:
        self._before = {s: signal.signal(s, self._come) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _come(self, *_: object) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True
        if self._leave:
            raise _Stopped
        if self.told:  # not by print, into which the signal may have come
            os.write(2, b"\nStopping after this step, with a checkpoint (again: at once, without one).\n")

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it, a signal raises _Stopped."""
        self._leave = True
        try:
            yield
        finally:
            self._leave = False

    def asked(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop: all leave at the same step."""
        return _anywhere(accelerator, self.came)


def _anywhere(accelerator: Accelerator, here: bool) -> bool:
    """Whether it is so in any process."""
    if accelerator.num_processes == 1:
        return here
    return bool(accelerator.reduce(torch.tensor(float(here), device=accelerator.device)) > 0)
