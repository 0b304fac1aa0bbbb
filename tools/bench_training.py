"""What a training step costs: one UNet in three roles and one optimiser step, against the paper's arrangement.

That (read in the authors' public code, and rebuilt here from its description) holds four UNets: KV encoder, decoder,
shortcut model with the few-step LoRA in its weights, and one more to put the LoRA into, which is read from disk and
copied over every fifth iteration; and it takes an optimiser step after each of the two losses. Both compute the same
losses on the same batch. Runs in a process of its own: `python -m lcm_lookahead.tools.bench_training [full]`.
"""

from __future__ import annotations

import copy
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

BATCH, ROUNDS, STEPS = 4, 2, 3
RELOAD_EVERY = 5


@dataclass
class ArmCost:
    """The cost of one arm: seconds of each step, bytes of the UNets' weights, most bytes alive at once."""

    seconds: list[float] = field(default_factory=list)
    weights: int = 0
    peak: int = 0


def measure() -> dict[str, Any]:
    """Both arms in turn on the mini world; each is built anew, so that it stands alone in memory."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    costs = {"one UNet, one step": ArmCost(), "separate UNets, two steps": ArmCost()}
    for _ in range(ROUNDS):
        for arm, cost in zip((_ours, _papers), costs.values(), strict=True):
            step, batch, draws, config = _mini(device)
            iterate, weights = arm(step, batch, draws, config)
            cost.weights = weights
            with _peak(device, cost):
                iterate(0)
            for number in range(STEPS):
                _synchronise(device)
                started = _clock(device)
                iterate(number + 1)
                _synchronise(device)
                cost.seconds.append(_clock(device) - started)
            del step, batch, draws, iterate
            gc.collect()
    arms = {
        name: {"seconds": median(c.seconds), "weights": c.weights, "peak": c.peak + (device.type == "cpu") * c.weights}
        for name, c in costs.items()
    }
    return {"device": str(device), "batch": BATCH, "arms": arms}


def full_size(side: int = 256) -> dict[str, Any]:
    """One step of SDXL with random weights in bfloat16, batch 1: seconds and most memory of the process."""
    import torch

    from ..trainer.gradients import gradients
    from ..trainer.log import memory
    from ..trainer.lookahead.recipe import LookaheadRecipe
    from ..trainer.train import make_optimiser

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step, batch, draws, config = _sdxl(side, device)
    recipe = LookaheadRecipe(config, step)
    optimiser = make_optimiser(config, recipe, device)
    trained = list(step.encoder.parameters())
    started = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16):
        outcomes, _ = gradients(step, recipe.parts, [(batch, draws)], trained)
    torch.nn.utils.clip_grad_norm_(trained, config.optimiser.clip)
    optimiser.step()
    _synchronise(device)
    seconds = time.perf_counter() - started
    missing = sum(p.grad is None or not bool(p.grad.isfinite().all()) for p in trained)
    return {
        "device": str(device),
        "side": side,
        "seconds": seconds,
        "parameters": sum(p.numel() for p in step.unet.parameters()),
        "trained": sum(p.numel() for p in trained),
        "without_gradient": missing,
        "losses": {part: float(outcome.loss) for part, outcome in outcomes.items()},
        **memory(),
    }


def table(report: dict[str, Any]) -> str:
    """The figures of `measure` as lines of Markdown."""
    arms = report["arms"]
    (ours, *_), theirs = arms.values(), list(arms.values())[-1]
    rows = [
        f"| {name} | {1000 * a['seconds']:.0f} ms | {a['weights'] / 1e6:.1f} MB | {a['peak'] / 1e6:.0f} MB |"
        for name, a in arms.items()
    ]
    ratios = " | ".join(f"{theirs[k] / ours[k]:.2f}" for k in ("seconds", "weights", "peak"))
    return "\n".join(
        [
            f"A training step of the mini world on {report['device']}, batch {report['batch']}, 32 bit, no "
            "checkpointing (medians of the time of the processor; both arms in turn, in one run):",
            "",
            "| | step | weights of UNets | peak memory, of these and of all that a step makes |",
            "|---|---|---|---|",
            *rows,
            f"| second over first | {ratios} |",
        ]
    )


def full_table(report: dict[str, Any]) -> str:
    """The figures of `full_size` in a sentence or two."""
    return (
        f"SDXL with random weights ({report['parameters']:,} parameters, {report['trained']:,} trained), both losses "
        f"and AdamW, bfloat16, batch 1, {report['side']}x{report['side']}, blocks checkpointed, on {report['device']}: "
        f"{report['seconds']:.0f} s a step, peak memory {report['peak_gigabytes']:.1f} GB; tensors without a finite "
        f"gradient: {report['without_gradient']}."
    )


# --- the arms


def _ours(step: Any, batch: Any, draws: Any, config: Any) -> tuple[Callable[[int], None], int]:
    import torch

    from ..trainer.gradients import gradients
    from ..trainer.lookahead.recipe import LookaheadRecipe
    from ..trainer.train import make_optimiser

    recipe = LookaheadRecipe(config, step)
    optimiser = make_optimiser(config, recipe, step.alpha_bar.device)
    trained = list(step.encoder.parameters())

    def iterate(_: int) -> None:
        gradients(step, recipe.parts, [(batch, draws)], trained)
        torch.nn.utils.clip_grad_norm_(trained, config.optimiser.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return iterate, _bytes(step.unet) + _bytes(step.shortcut)


class _Separate:
    """What `SharedUNet` offers, by a UNet for each role."""

    def __init__(self, encoder: Any, decoder: Any, fast: Any):
        self.encoding, self.decoding, self.fast = encoder, decoder, fast

    def export(self, *inputs: Any) -> Any:
        return self.encoding.export(*inputs)

    def predict(self, *inputs: Any, reads: Any = None) -> Any:
        *same, shortcut = inputs
        return (self.fast if isinstance(shortcut, type(same[0])) else self.decoding).predict(*same, reads=reads)


def _papers(step: Any, batch: Any, draws: Any, config: Any) -> tuple[Callable[[int], None], int]:
    import torch

    from ..sdxl.shared_unet import SharedUNet
    from ..trainer.lookahead.recipe import LookaheadRecipe
    from ..trainer.train import make_optimiser

    plain, shortcut = step.roles.eject(), step.shortcut
    attention = step.roles.attention
    unets = [plain, *(copy.deepcopy(plain) for _ in range(3))]
    step.roles = _Separate(*(SharedUNet(unet, step.encoder, None, attention).inject() for unet in unets[:3]))
    optimiser = make_optimiser(config, LookaheadRecipe(config, step), step.alpha_bar.device)
    trained = list(step.encoder.parameters())

    def iterate(number: int) -> None:
        if number % RELOAD_EVERY == 0:
            _reload(config, plain, unets[3], unets[2], 0.5)
        for part in ("diffusion", "lookahead"):
            step(part, batch, draws).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, config.optimiser.clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    step.shortcut = None
    del shortcut
    return iterate, sum(map(_bytes, unets))


def _reload(config: Any, base: Any, between: Any, fast: Any, strength: float) -> None:
    """Read the LoRA from disk, put it into one UNet's weights, copy these to another."""
    import torch

    from ..mini.plan import WEIGHTS
    from ..mini.stages import stage
    from ..sdxl import lora

    read = lora.load(stage.read_tensors(WEIGHTS / config.model.shortcut), base)
    with torch.no_grad():
        between.load_state_dict(base.state_dict())
        for path, branch in zip(read.paths, read.branches, strict=True):
            up, down = branch.lora_up.weight.flatten(1), branch.lora_down.weight.flatten(1)
            weight = between.get_submodule(path).weight
            weight += strength * branch.strength * (up @ down).view_as(weight).to(weight)
        fast.load_state_dict(between.state_dict())


# --- what they work on


def _mini(device: Any) -> tuple[Any, Any, Any, Any]:
    from ..cli.assemble import assemble
    from ..trainer.config import CONFIGS
    from ..trainer.lookahead.config import load
    from ..trainer.lookahead.draws import draw

    config = load(CONFIGS / "mini.yaml", [f"batch={BATCH}", "data.people=2", "precision=fp32"])
    recipe, source = assemble(config)
    step = recipe.losses.to(device)
    batch = source.batch(range(BATCH), range(BATCH), device)
    return step, batch, draw(config, range(BATCH), source.latent_shape).to(device), config


def _sdxl(side: int, device: Any) -> tuple[Any, Any, Any, Any]:
    import torch
    from diffusers import AutoencoderTiny

    from ..lookahead.losses.l1 import L1Loss
    from ..lookahead.method.resampler import ResamplerSizes
    from ..sdxl import configs, lora
    from ..sdxl.encoder import Encoder
    from ..sdxl.shared_unet import Condition
    from ..trainer.config import CONFIGS
    from ..trainer.lookahead.config import load
    from ..trainer.lookahead.draws import draw
    from ..trainer.lookahead.step import Batch, Step

    overrides = ["batch=1", "checkpointing=blocks", "precision=bf16", "drop.kv=0", "drop.image_prompt=0", "drop.both=0"]
    config = load(CONFIGS / "sdxl_paper.yaml", overrides)
    torch.manual_seed(0)
    unet = configs.unet().to(torch.bfloat16).to_empty(device=device)
    for name, p in unet.named_parameters():
        if p.ndim == 1:
            p.data.fill_(float("norm" in name and name.endswith("weight")))
        else:
            p.data.uniform_(-1, 1).mul_(p[0].numel() ** -0.5)
    encoder = Encoder(unet, ResamplerSizes(16, 1280, 4, 20, 1280, 2048, 5120)).to(device)
    shortcut = lora.build(unet, 64).to(device, torch.bfloat16).requires_grad_(False)
    decoder = AutoencoderTiny().to(device).eval().requires_grad_(False)
    step = Step(config, unet, encoder, torch.zeros(1, 257, 1280), shortcut, lambda z: decoder.decode(z).sample)
    step.to(device)
    size = torch.tensor([[float(side), side, 0, 0, side, side]])
    text = Condition(torch.randn(1, 77, 2048), torch.randn(1, 1280), size)
    text = Condition(*(getattr(text, name).to(device) for name in ("context", "pooled", "time_ids")))
    target, reference = torch.randn(2, 1, 4, side // 8, side // 8, device=device)
    loss = L1Loss(torch.zeros(1, 3, side, side, device=device))
    batch = Batch(["random"], target, reference, text, text, torch.randn(1, 257, 1280, device=device), loss)
    return step, batch, draw(config, [0], tuple(target.shape[1:])).to(device), config


# --- memory


def _bytes(module: Any) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _clock(device: Any) -> float:
    """Seconds; on a CPU those of this process, since others may be at work there."""
    return time.perf_counter() if device.type == "cuda" else time.process_time()


def _synchronise(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def _peak(device: Any, cost: ArmCost) -> Iterator[None]:
    """Most bytes alive at once: of the GPU, or, on a CPU, of all that is made within."""
    import torch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield
        cost.peak = torch.cuda.max_memory_allocated()
        return
    from ..trainer.ledger import ByteCounter

    with ByteCounter() as counted:
        yield
    cost.peak = counted.peak


if __name__ == "__main__":
    found = full_size() if sys.argv[1:] == ["full"] else measure()
    print("BENCH " + json.dumps(found))
