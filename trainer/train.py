"""The training loop. The same command again goes on where a run stopped, and ends with the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator

from .config import Config
from .draws import draw, order
from .export import export
from .source import Source
from .step import Batch, Outcome, Step, gradients

FREE = {"steps", "save_every", "keep", "log_every", "norms_every", "nonfinite_in_a_row"}  # may change in a resumed run
_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class TrainingError(RuntimeError):
    """Why a run cannot go on, in one sentence."""


def train(config: Config, step: Step, source: Source, about: Mapping[str, str] | None = None) -> Path | None:
    """Train `step.encoder`; returns the encoder file, or None where a signal to stop came first.

    All that the run writes lies in the folder `config.out`: checkpoints, each with an encoder file, and log.jsonl.
    """
    accelerator = Accelerator(mixed_precision=_PRECISION[config.precision])
    processes, main = accelerator.num_processes, accelerator.is_main_process
    if config.batch % processes:
        raise TrainingError(f"batch is {config.batch}, and {processes} processes cannot share it evenly: change one.")
    folder, encoder, device = Path(config.out), step.encoder, accelerator.device
    groups, rates = encoder.groups(), config.optimiser
    by_group = {"adapter": rates.adapter_rate, "kv": rates.kv_rate}
    trained = [p for group in groups.values() for p in group]
    optimiser = torch.optim.AdamW(
        [{"params": group, "lr": by_group[name], "rate": by_group[name]} for name, group in groups.items()],
        betas=rates.betas,
        weight_decay=rates.weight_decay,
    )
    wrapped, optimiser = accelerator.prepare(step, optimiser)
    first, bad = _resume(folder, config, encoder, optimiser, device)
    lookahead, started = config.lookahead.arm != "none", time.monotonic()
    with _Stop() as stop:
        for number in range(first, config.steps):
            mine = range(number * config.batch, (number + 1) * config.batch)[accelerator.process_index :: processes]
            batch = source.batch(order(len(source), config.seed, mine), mine, device)
            draws = draw(config, mine, source.latent_shape).to(device)
            for group in optimiser.param_groups:
                group["lr"] = group["rate"] * rates.factor(number, config.steps)
            often = config.norms_every and config.precision != "fp16"  # in which they would be scaled
            measure = bool(often) and number % config.norms_every == 0
            outcomes, norms = gradients(
                wrapped,
                batch,
                draws,
                trained,
                lookahead=lookahead,
                backward=accelerator.backward,
                unsynchronised=lambda: accelerator.no_sync(wrapped),
                measure=measure,
            )
            norm = accelerator.clip_grad_norm_(trained, rates.clip)
            if finite := bool(torch.as_tensor(norm).isfinite()) or config.precision == "fp16":
                optimiser.step()  # (fp16: the gradient scaler decides)
            bad = 0 if finite else _skipped(folder, config, number, bad, batch, outcomes)
            optimiser.zero_grad(set_to_none=True)

            done, leave = number + 1, stop.asked(accelerator)
            if done % config.log_every == 0 or done == config.steps or measure:
                pace = (time.monotonic() - started) / (done - first)
                figures = _figures(accelerator, outcomes) | {f"norm_{k}": float(v) for k, v in norms.items()}
                if main:
                    _log(folder, config, done, figures | {"norm": float(norm)}, pace)
            if main and (done % config.save_every == 0 or done == config.steps or leave):
                _save(folder, config, done, bad, encoder, optimiser, about)
            if leave:
                print(f"Stopped after step {done} of {config.steps}: the same command goes on from there.", flush=True)
                return None
    accelerator.wait_for_everyone()
    result = folder / f"{config.name}.safetensors"
    return export(result, encoder, config, config.steps, about) if main else result


def _figures(accelerator: Accelerator, outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    """What the losses came to, over all processes: losses, share of samples that count, their mean distance."""
    figures = {part: outcome.loss for part, outcome in outcomes.items()}
    if ahead := outcomes.get("lookahead"):
        figures["counted"] = ahead.counts.float().mean()
        figures["distance"] = torch.where(ahead.counts, ahead.values, 0.0).mean()
    figures = {k: float(accelerator.reduce(v, "mean")) for k, v in figures.items()}
    if ahead:
        figures["distance"] = figures["distance"] / figures["counted"] if figures["counted"] else float("nan")
    return figures


def _log(folder: Path, config: Config, step: int, figures: dict[str, float], pace: float) -> None:
    """One line for people, the same figures as JSON."""
    figures = {"step": step} | figures | {"pictures_per_second": config.batch / pace}
    if torch.cuda.is_available():
        figures["peak_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
    left = int(pace * (config.steps - step))
    shown = "  ".join(f"{k} {v:.4g}" for k, v in figures.items() if k != "step")
    print(f"step {step}/{config.steps}  {shown}  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left", flush=True)
    _write_line(folder / "log.jsonl", figures)


def _skipped(folder: Path, config: Config, number: int, bad: int, batch: Batch, outcomes: Mapping[str, Outcome]) -> int:
    """A step whose gradient is not finite is left out, and the samples named. Returns how many came in a row."""
    names = [
        name for i, name in enumerate(batch.names) if not all(bool(o.values[i].isfinite()) for o in outcomes.values())
    ]
    print(
        f"Step {number + 1} is left out, because its gradient is not finite: "
        f"{', '.join(names) or 'all losses are, so it is not a single sample'}.",
        flush=True,
    )
    _write_line(folder / "skipped.jsonl", {"step": number + 1, "samples": names})
    if bad + 1 >= config.nonfinite_in_a_row:
        raise TrainingError(
            f"{bad + 1} steps in a row had no finite gradient: look at the samples in {folder / 'skipped.jsonl'}, or "
            "use precision bf16 or fp32, or lower rates."
        )
    return bad + 1


def _checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first: they get their name when they are complete."""
    return sorted(path for path in (folder / "checkpoints").glob("step-*") if path.suffix != ".part")


def _save(
    folder: Path,
    config: Config,
    step: int,
    bad: int,
    encoder: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    about: Mapping[str, str] | None,
) -> None:
    final = folder / "checkpoints" / f"step-{step:08}"
    part = final.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    state = {"step": step, "bad": bad, "encoder": encoder.state_dict(), "optimiser": optimiser.state_dict()}
    torch.save(state | {"config": config.model_dump_json()}, part / "state.pt")
    export(part / f"{config.name}.safetensors", encoder, config, step, about)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    for old in _checkpoints(folder)[: -config.keep]:
        shutil.rmtree(old)


def _resume(
    folder: Path, config: Config, encoder: torch.nn.Module, optimiser: torch.optim.Optimizer, device: torch.device
) -> tuple[int, int]:
    """Load the last checkpoint, if there is one: the step to go on with, and the skipped ones before it."""
    found = _checkpoints(folder)
    if not found:
        return 0, 0
    state = torch.load(found[-1] / "state.pt", map_location=device, weights_only=True)
    before, now = json.loads(state["config"]), json.loads(config.model_dump_json())
    free = FREE if config.optimiser.schedule == "constant" else FREE - {"steps"}
    if other := [k for k in now if k not in free and before.get(k) != now[k]]:
        raise TrainingError(
            f"The run in {folder} was started with other values of {', '.join(other)}: give those again, or another "
            "`out` for a new run."
        )
    encoder.load_state_dict(state["encoder"])
    optimiser.load_state_dict(state["optimiser"])
    log = folder / "log.jsonl"
    if log.exists():  # lines after the checkpoint will be written again
        lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= state["step"]]
        log.write_text("".join(line + "\n" for line in lines))
    return state["step"], state["bad"]


def _write_line(path: Path, values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        f.write(json.dumps(values) + "\n")


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
        if accelerator.num_processes == 1:
            return self.came
        return bool(accelerator.reduce(torch.tensor(float(self.came), device=accelerator.device)) > 0)
