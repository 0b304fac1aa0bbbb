"""What the stages of the mini world share: a training loop that resumes, and files that are whole or not there.

Random numbers are a function of seed and step (`numbers_of_step`), never of what ran before; so a stage that was
stopped goes on exactly where its last saved step left it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ...lookahead.files.atomic import atomic
from ...lookahead.files.tensors import write_tensors as save_whole
from ...sdxl.precision import has_bfloat16

SAVE_SECONDS = 120
LOG_STEPS = 50


def numbers_of_step(seed: int, step: int) -> torch.Generator:
    """The generator of one step (CPU): the same for the same seed and step, whatever ran before."""
    # torch's CPU generator reads 32 bits of a seed only: both numbers must be mixed into them.
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device) -> torch.autocast:
    """Mixed precision in bfloat16, where the device has it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Save as safetensors through a temporary file, so that `path` is either whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_whole(path, {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata or {})


def read_tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating tensors in 16 bit: how the mini world's weights are shipped."""
    return {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}


def cosine(step: int, steps: int, warmup: int = 100, floor: float = 0.03) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to `floor`."""
    return min(1.0, (step + 1) / warmup) * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(
    name: str,
    folder: Path,
    modules: Mapping[str, nn.Module],
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    rate: float,
    decay: float = 0.01,
    ema: float = 0.0,
    clip: float = 1.0,
    cycles: int = 1,
) -> None:
    """Minimise `loss(step)` over the trainable parameters of `modules`; leaves them trained (averaged if `ema` > 0).

    cycles: the steps are so many runs of equal length, each with a new optimiser, its rate high again, from where the
    one before ended (averaged if `ema` > 0).

    Resumes from `folder/name.state` when that exists. One JSON line every LOG_STEPS steps goes to
    `folder/name.jsonl`, the same figures to the terminal.
    """
    state_path, log_path = folder / f"{name}.state", folder / f"{name}.jsonl"
    parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    optimizer = _optimizer(parameters, rate, decay)
    average = [p.detach().clone() for p in parameters] if ema else []
    first, cycle = 0, math.ceil(steps / cycles)
    if state_path.exists():
        state = torch.load(state_path, map_location=parameters[0].device, weights_only=True)
        first = state["step"]
        for m, saved in zip(modules.values(), state["modules"], strict=True):
            m.load_state_dict(saved)
        optimizer.load_state_dict(state["optimizer"])
        average = state["average"]
        print(f"{name}: goes on at step {first} of {steps}", flush=True)
    started = saved_at = time.monotonic()
    total = 0.0
    for step in range(first, steps):
        if step and step % cycle == 0:
            _put(average, parameters)
            optimizer = _optimizer(parameters, rate, decay)
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine(step % cycle, cycle)
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        if ema:
            keep = min(ema, (1 + step % cycle) / (10 + step % cycle))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - keep)
        total += value.item()
        done, now = step + 1 - first, time.monotonic()
        if (step + 1) % LOG_STEPS == 0 or step + 1 == steps:
            pace = (now - started) / done
            mean, total = total / min(LOG_STEPS, done), 0.0
            _log(log_path, step=step + 1, loss=mean, seconds_per_step=pace)
            left = int(pace * (steps - step - 1))
            eta = f"{left // 60}:{left % 60:02}"
            print(f"{name}: step {step + 1}/{steps}  loss {mean:.4f}  {pace:.3f} s/step  {eta} left", flush=True)
        if now - saved_at > SAVE_SECONDS:
            _save_state(state_path, step + 1, modules.values(), optimizer, average)
            saved_at = now
    # The stage writes its result next and only then removes this (`finish`): a stop in between costs nothing.
    _save_state(state_path, steps, modules.values(), optimizer, average)
    _put(average, parameters)


def _optimizer(parameters: list[nn.Parameter], rate: float, decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=decay, fused=True)


def _put(average: list[Tensor], parameters: list[nn.Parameter]) -> None:
    """Put the averages, where there are any, in the parameters' place."""
    if average:
        for p, a in zip(parameters, average, strict=True):
            p.data.copy_(a)


def finish(name: str, folder: Path) -> None:
    """The stage's result is on disk: its state for resuming is no longer needed."""
    (folder / f"{name}.state").unlink(missing_ok=True)


def _save_state(
    path: Path, step: int, modules: Iterable[nn.Module], optimizer: torch.optim.Optimizer, average: list[Tensor]
) -> None:
    modules = [m.state_dict() for m in modules]
    with atomic(path) as part:
        torch.save({"step": step, "modules": modules, "optimizer": optimizer.state_dict(), "average": average}, part)


def _log(path: Path, **figures: float) -> None:
    with path.open("a") as f:
        f.write(json.dumps(figures) + "\n")
