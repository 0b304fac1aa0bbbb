"""The training loop. The same command again goes on where a run stopped, and ends with the same bits."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import UNet2DConditionModel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..sdxl.encoder import Encoder
from .checkpoints import Progress, State, TrainingError, resume, save
from .config import Config
from .data.source import Source
from .export import export
from .log import Log, check_trackers
from .lookahead.draws import draw, order
from .lookahead.step import Batch, Outcome, Step, gradients
from .memory import out_of_memory, spilled
from .validate import Probes, Probing, validate

__all__ = ["TrainingError", "train"]

_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def train(config: Config, step: Step, source: Source, about: Mapping[str, str] | None = None) -> Path | None:
    """Train `step.encoder`; returns the encoder file, or None where a signal to stop came first.

    All that the run writes lies in the folder `config.out`: checkpoints, each with an encoder file, pictures of the
    validations, log.jsonl. Raises TrainingError, one sentence, where it cannot go on.
    """
    check_trackers(config.trackers)
    accelerator = Accelerator(
        mixed_precision=_PRECISION[config.precision], log_with=list(config.trackers) or None, project_dir=config.out
    )
    try:
        return _train(accelerator, config, step, source, about)
    except torch.OutOfMemoryError as error:
        raise TrainingError(out_of_memory(config, accelerator.num_processes)) from error


def _train(
    accelerator: Accelerator, config: Config, step: Step, source: Source, about: Mapping[str, str] | None
) -> Path | None:
    processes, main, device = accelerator.num_processes, accelerator.is_main_process, accelerator.device
    if device.type == "cpu" and config.precision == "fp16":
        raise TrainingError("precision is fp16, which a CPU does not compute in: give bf16 or fp32.")
    if processes != int(os.environ.get("WORLD_SIZE", 1)):  # each would write over the others' files
        raise TrainingError(
            f"{os.environ['WORLD_SIZE']} processes were started, which do not know of each other, since they have no "
            "GPU: set ACCELERATE_USE_CPU=true to train on CPUs."
        )
    parts = processes * config.accumulate
    if config.batch % parts:
        raise TrainingError(
            f"batch is {config.batch}, and {processes} processes with accumulate {config.accumulate} cannot share it "
            "evenly: change one."
        )
    folder, encoder, lookahead = Path(config.out), step.encoder, config.lookahead.arm != "none"
    if config.compile:
        compile_blocks(step.unet)
    wrapped, optimiser = accelerator.prepare(step, make_optimiser(config, encoder, device))
    trained = [p for group in optimiser.param_groups for p in group["params"]]
    average = AveragedModel(encoder, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema else None
    state = State(encoder, optimiser, average, accelerator.scaler, source.digest())
    progress = resume(folder, config, state, about, accelerator.print)
    _check_alike(accelerator, trained, progress.step)
    log, first = Log(folder, config, accelerator, progress.step), progress.step
    check = _Validations(accelerator, config, step, source, state, log)
    with contextlib.closing(log), _Stop() as stop:
        if progress.validated < first and (not first or check.due(first) or first == config.steps):
            check.run(progress)  # of what training starts from; or one that a signal to stop left out
        for number in range(first, config.steps):
            mine = range(number * config.batch, (number + 1) * config.batch)[accelerator.process_index :: processes]
            samples = []
            for part in range(config.accumulate):
                some = mine[part :: config.accumulate]
                batch = source.batch(order(len(source), config.seed, some), some, device)
                samples.append((batch, draw(config, some, source.latent_shape).to(device)))
            for group in optimiser.param_groups:
                group["lr"] = group["rate"] * config.optimiser.factor(number, config.steps)
            often = config.norms_every and config.precision != "fp16"  # in which they would be scaled
            measure = bool(often) and number % config.norms_every == 0
            outcomes, norms = gradients(
                wrapped,
                samples,
                trained,
                lookahead=lookahead,
                backward=accelerator.backward,
                unsynchronised=lambda: accelerator.no_sync(wrapped),
                measure=measure,
            )
            norm = accelerator.clip_grad_norm_(trained, config.optimiser.clip)
            done, leave = number + 1, stop.asked(accelerator)
            if config.precision == "fp16":
                # The gradient scaler leaves out steps until it has found its scale, which is no fault of a sample.
                optimiser.step()
                finite = all(bool(outcome.values.isfinite().all()) for outcome in outcomes.values())
                taken, fault = not optimiser.step_was_skipped, _anywhere(accelerator, not finite)
            else:
                taken = bool(torch.as_tensor(norm).isfinite())
                fault = not taken
                if taken:
                    optimiser.step()
            if taken and average is not None:
                average.update_parameters(encoder)
            progress.bad = progress.bad + 1 if fault else 0
            if fault:
                log.skipped(done, gather_object(_not_finite([batch for batch, _ in samples], outcomes)))
            progress.step = done
            optimiser.zero_grad(set_to_none=True)
            if progress.bad >= config.nonfinite_in_a_row:
                raise TrainingError(
                    f"{progress.bad} steps in a row had no finite gradient: look at the samples in "
                    f"{folder / 'skipped.jsonl'}; or begin a new run, with another `out`, in precision bf16 or fp32 or "
                    "with lower rates."
                )
            if done % config.log_every == 0 or done == config.steps or measure:
                figures = _figures(accelerator, outcomes) | {f"norm_{k}": float(v) for k, v in norms.items()}
                log.figures(done, figures | {"norm": float(norm)})
                _warn_of_spilling(device)
            # (who is told to stop may have little time: it saves at once, and validates when it goes on)
            better = not leave and (check.due(done) or done == config.steps) and check.run(progress)
            if done % config.save_every == 0:
                _check_alike(accelerator, trained, done)
            if main and (better or done % config.save_every == 0 or done == config.steps or leave):
                save(folder, config, progress, state, about)
            if leave:
                accelerator.print(f"Stopped after step {done} of {config.steps}: the same command goes on from there.")
                return None
        accelerator.wait_for_everyone()
    result = folder / f"{config.name}.safetensors"
    return export(result, state.exported, config, config.steps, about) if main else result


def make_optimiser(config: Config, encoder: Encoder, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over the trained tensors, with a rate for each group; in 8 bit by bitsandbytes as an option."""
    settings = config.optimiser
    rates = {"adapter": settings.adapter_rate, "kv": settings.kv_rate}
    groups = [{"params": group, "lr": rates[k], "rate": rates[k]} for k, group in encoder.groups().items()]
    common = {"betas": settings.betas, "weight_decay": settings.weight_decay}
    if not settings.eight_bit:
        return torch.optim.AdamW(groups, **common, fused=device.type == "cuda")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise TrainingError(
            "optimiser.eight_bit needs the package bitsandbytes, which is not installed: install it with pip, or set "
            "optimiser.eight_bit=false (which takes 2.6 GB more for SDXL)."
        ) from None
    return AdamW8bit(groups, **common)


def compile_blocks(unet: UNet2DConditionModel, **options: object) -> None:
    """torch.compile of the transformer blocks, all but their attention. options: of `torch.compile`."""
    # A graph for every width of block, role, and need of gradients; the default of 8 is too few for those.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    unet.compile_repeated_blocks(**options)


class _Validations:
    """Pictures and figures of the main process; the others go on and wait at the next exchange."""

    def __init__(
        self, accelerator: Accelerator, config: Config, step: Step, source: Source, state: State, log: Log
    ) -> None:
        self.accelerator, self.config, self.step, self.state, self.log = accelerator, config, step, state, log
        self.rows = config.batch // accelerator.num_processes // config.accumulate
        self.probes: Probes | None = None
        if config.validate_every and accelerator.is_main_process and isinstance(source, Probing):
            self.probes = source.probes(config, accelerator.device)
            print(f"Validation: identity is measured by {self.probes.by}.", flush=True)

    def due(self, done: int) -> bool:
        return bool(self.config.validate_every) and done % self.config.validate_every == 0

    def run(self, progress: Progress) -> bool:
        """Validate; whether this is the best identity so far, which is noted (but not of what training starts from)."""
        if self.probes is None:
            return False
        done = progress.validated = progress.step
        grid = Path(self.config.out) / "validation" / f"step-{done:08}.png"
        with self.accelerator.autocast():
            settings = self.config.validation
            figures = validate(self.step, self.state.exported, self.probes, settings, self.rows, grid)
        self.log.validation(done, figures, grid)
        better = done > 0 and figures.get("identity", float("nan")) > progress.best
        if better:
            progress.best, progress.best_step = figures["identity"], done
        return better


def _check_alike(accelerator: Accelerator, trained: Sequence[torch.Tensor], step: int) -> None:
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


def _figures(accelerator: Accelerator, outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    """What the losses came to, over all processes: losses, share of samples that count, their mean distance."""
    figures = {part: outcome.loss for part, outcome in outcomes.items()}
    if ahead := outcomes.get("lookahead"):
        figures["counted"] = ahead.valid.float().mean()
        figures["distance"] = torch.where(ahead.valid, ahead.values, 0.0).mean()
        if ahead.alignment is not None:
            figures["alignment"] = ahead.alignment.mean()
    figures = {k: float(accelerator.reduce(v, "mean")) for k, v in figures.items()}
    if ahead:
        figures["distance"] = figures["distance"] / figures["counted"] if figures["counted"] else float("nan")
    return figures


def _not_finite(batches: list[Batch], outcomes: Mapping[str, Outcome]) -> list[str]:
    names = [name for batch in batches for name in batch.names]
    return [name for i, name in enumerate(names) if not all(bool(o.values[i].isfinite()) for o in outcomes.values())]


def _warn_of_spilling(device: torch.device) -> None:
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
        if warning := spilled(torch.cuda.memory_reserved(device), there):
            print(warning, flush=True)


class _Stop:
    """Within it, SIGTERM and SIGINT let the step under way come to its end."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __enter__(self) -> _Stop:
        self.came = False
        self._before = {s: signal.signal(s, self._come) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _come(self, *_: object) -> None:
        self.came = True

    def asked(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop: all leave at the same step."""
        return _anywhere(accelerator, self.came)


def _anywhere(accelerator: Accelerator, here: bool) -> bool:
    """Whether it is so in any process."""
    if accelerator.num_processes == 1:
        return here
    return bool(accelerator.reduce(torch.tensor(float(here), device=accelerator.device)) > 0)
