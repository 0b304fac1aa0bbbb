"""What a run will cost before it runs: trained parameters, memory and work of a step, time, and the files it writes.

The real step is run once on torch's meta device, where tensors have shapes and no values: what it allocates and what it
multiplies is counted as it goes, with the casts of mixed precision and the attention kernels of a GPU. Weights need not
be there. What is added to that (optimiser, context of the device) stands in the tables line by line.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ...cli.assemble import DTYPES, of_mini
from ...lookahead.method.resampler import ResamplerSizes
from ...sdxl import configs, lora
from ...sdxl.encoder import Encoder
from ...sdxl.load import Preview
from ...sdxl.shared_unet import Condition
from ..config import ConfigError
from ..data.folder import cache_folder
from ..data.pairs import DataError, listing
from .config import Config, from_values
from .draws import Draws
from .step import Batch, Step

GB = 1e9
CARDS = {  # GB, dense TFLOP/s of 16-bit matrix products summed in 32 bit, as the makers state them
    "rtx3090": (24, 71),
    "rtx4080": (16, 97),
    "rtx4090": (24, 165),
    "rtx5090": (32, 210),
    "l40s": (48, 362),
    "a100-40": (40, 312),
    "a100": (80, 312),
    "h100": (80, 989),
    "h200": (141, 989),
}
USED = (0.25, 0.45)  # share of that which trainings of SDXL reach, as published
CONTEXT = 0.8e9  # bytes of driver, kernels, and what the allocator loses between blocks: not derived from the run
RECOGNISER = (43_800_000 * 4, 3 * 12.6e9)  # IR-SE50: bytes; forward and backward of one crop
READERS = 3.3e9  # bytes: two text encoders and ViT-H/14 in 16 bit, SDXL's autoencoder in 32
LCM_RANK = 64


@dataclass(frozen=True)
class Cost:
    """Of one step on one of `processes`. parameters: trained, by part; memory: GB at the peak, by part; work: FLOP, by
    loss; disk: GB by file, in all."""

    config: Config
    processes: int
    unet_parameters: int
    parameters: Mapping[str, int]
    memory: Mapping[str, float]
    work: Mapping[str, float]
    disk: Mapping[str, float]

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    def seconds(self, tflops: float) -> tuple[float, float]:
        """Of a step on a card of that many TFLOP/s: where it is used well, and where it is used badly."""
        work = sum(self.work.values()) / (tflops * 1e12)
        return work / USED[1], work / USED[0]


def estimate(config: Config, processes: int = 1) -> Cost:
    """The cost of a configuration on so many processes, which share its batch.

    Raises ConfigError where they cannot share it evenly.
    """
    if processes < 1:
        raise ConfigError(f"processes is {processes}: give at least 1.")
    parts = processes * config.accumulate
    if config.batch % parts:
        raise ConfigError(
            f"batch is {config.batch}, which {parts} processes and parts cannot share evenly: change one."
        )
    rows = config.batch // parts
    one = _one_sample(_key(config))
    total, size = sum(one.parameters.values()), {"fp32": 4, "bf16": 2, "fp16": 2}[config.precision]
    cast = 0 if size == 4 else 2 * total  # copies of the trained weights: the part that does not grow with the batch
    resident = {
        "frozen UNet": size * one.unet,
        "few-step LoRA": size * one.shortcut,
        "preview decoder and recogniser": one.preview and 4 * one.preview + RECOGNISER[0],
        "trained weights, 32 bit": 4 * total,
        "their gradients": 4 * total,
        "AdamW's state": (2 if config.optimiser.eight_bit else 8) * total,
        "a copy of the gradients (norms_every)": 4 * total if one.preview and config.precision != "fp16" else 0,
        "their average (ema)": 4 * total if config.ema else 0,
        "exchange between processes": 4 * total if processes > 1 else 0,
        "readers of pictures and texts (data.keep)": 0 if config.data.source == "mini" or config.data.keep else READERS,
        f"activations, samples at a time: {rows}": cast + rows * (one.peak - 4 * total - cast),
        "the device itself": CONTEXT,
    }
    if config.norms_every == 0:
        del resident["a copy of the gradients (norms_every)"]
    work = {part: config.batch // processes * flop for part, flop in one.work.items()}
    memory = {name: value / GB for name, value in resident.items() if value}
    return Cost(config, processes, one.unet, one.parameters, memory, work, _disk(config, total))


class _Shape(NamedTuple):
    """What the cost of a sample depends on."""

    mini: bool
    size: int
    precision: str
    checkpointing: str
    arm: str
    align: str
    ranks: tuple[int, int]
    depths: tuple[int, ...]


class _Sample(NamedTuple):
    """peak: bytes that the losses of one sample allocate, with gradients; work: FLOP by loss; else parameters."""

    unet: int
    shortcut: int
    preview: int
    parameters: dict[str, int]
    peak: int
    work: dict[str, float]


def _key(config: Config) -> _Shape:
    ranks = (config.model.kv_rank, config.model.export_rank) if config.model.kv else (0, 0)
    mini = of_mini(config) is not None
    size = 128 if config.data.source == "mini" else config.data.size
    ahead = config.lookahead.arm, config.lookahead.align
    depths = tuple(configs.UNET["transformer_layers_per_block"])
    return _Shape(mini, size, config.precision, config.checkpointing, *ahead, ranks, depths)


@lru_cache(maxsize=8)
def _one_sample(shape: _Shape) -> _Sample:
    low, ahead = DTYPES[shape.precision], shape.arm != "none"
    unet, sizes, patches, rank = _mini() if shape.mini else (configs.unet(), ResamplerSizes(), 257, LCM_RANK)
    with torch.device("meta"):
        encoder = Encoder(unet, sizes, *shape.ranks)
        shortcut = lora.build(unet, rank).requires_grad_(False) if shape.arm == "shortcut" else None
        preview = Preview(AutoencoderTiny().requires_grad_(False)) if ahead else None
        for module in (unet, shortcut):
            if module is not None and low != torch.float32:
                nn.Module.to(module, low)  # (diffusers' own warns of what does not matter here)
        values = {"model": {"base": "?", "start": "?", "kv": shape.ranks != (0, 0)}, "data": {"source": "?"}}
        if ahead:
            values["model"] |= {"vae": "?", "recogniser": "?", "shortcut": "?"}
        values |= {"lookahead": {"arm": shape.arm, "align": shape.align}, "checkpointing": shape.checkpointing}
        step = Step(from_values(values), unet, encoder, torch.empty(1, patches, sizes.image_width), shortcut, preview)
    latent = (1, 4, shape.size // 8, shape.size // 8)
    peak, work = _run(step, _batch(step, latent, sizes, patches, shape.size), _draws(latent), low)
    if ahead:
        work["lookahead"] += RECOGNISER[1]
    trained = {name: sum(p.numel() for p in group) for name, group in _parts(encoder).items()}
    return _Sample(_count(unet), _count(shortcut), _count(preview), trained, peak, work)


def _mini() -> tuple[UNet2DConditionModel, ResamplerSizes, int, int]:
    from ...mini.plan import SIZES
    from ...mini.stages.base import build_unet
    from ...mini.stages.image_prompt import Adapter

    with torch.device("meta"):
        unet = build_unet().eval()
        sizes = Adapter(unet).image_proj.sizes
    vision = SIZES["clip_vision"]
    return unet, sizes, 1 + (vision["image_size"] // vision["patch_size"]) ** 2, 16


def _parts(encoder: Encoder) -> dict[str, list[nn.Parameter]]:
    parts = {"Resampler": [*encoder.image_proj.parameters()], "image prompt K, V": [*encoder.ip_adapter.parameters()]}
    return parts | ({"KV encoder": [*encoder.kv.parameters()]} if encoder.kv else {})


def _batch(step: Step, shape: tuple[int, ...], sizes: ResamplerSizes, patches: int, size: int) -> Batch:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    n, config = shape[0], step.unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    text = Condition(empty(n, 77, config.cross_attention_dim), empty(n, pooled), empty(n, 6))
    reference = empty(n, 3, size, size)

    def loss(preview: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (preview - reference).abs().mean((1, 2, 3)), torch.empty(n, dtype=torch.bool, device="meta")

    features = empty(n, patches, sizes.image_width)
    return Batch(["?"] * n, empty(*shape), empty(*shape), text, text, features, loss)


def _draws(shape: tuple[int, ...]) -> Draws:
    n = shape[0]
    kinds = {
        "noise": torch.empty(shape),
        "t": torch.empty(n, dtype=torch.int64),
        "no": torch.empty(n, dtype=torch.bool),
    }
    values = {f.name: kinds.get(f.name.split("_")[0], torch.empty(n)) for f in fields(Draws)}
    return Draws(**{name: value.to("meta") for name, value in values.items()})


def _run(step: Step, batch: Batch, draws: Draws, low: torch.dtype) -> tuple[int, dict[str, float]]:
    """Bytes that the losses of a step allocate at most beyond weights, gradients among them; FLOP of each loss."""
    work: dict[str, float] = {}
    before = [*step.parameters(), *step.buffers(), batch.target, batch.reference, draws.noise]
    with Ledger(before) as ledger, mixed_precision(low) as mixed:
        for part in ("diffusion", "lookahead") if step.config.lookahead.arm != "none" else ("diffusion",):
            loss = step(part, batch, draws).loss
            mixed.backward(loss)
            del loss
            work[part] = ledger.work - sum(work.values())
    return ledger.peak, work


def unet_forward(unet: UNet2DConditionModel, size: int = 1024) -> tuple[float, int]:
    """FLOP of a plain forward pass for one picture of `size` pixels, and bytes that it keeps for backward, in 16 bit.

    unet: without values. Its own checkpointing counts, where it is switched on.
    """
    config, unet = unet.config, unet.to(torch.bfloat16).requires_grad_(False)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    with torch.device("meta"):
        x = torch.empty(1, 4, size // 8, size // 8, dtype=torch.bfloat16, requires_grad=True)
        context = torch.empty(1, 77, config.cross_attention_dim, dtype=torch.bfloat16)
        widths = {"text_embeds": pooled, "time_ids": 6}
        added = {name: torch.empty(1, width, dtype=torch.bfloat16) for name, width in widths.items()}
    own = {p.untyped_storage()._cdata for p in (*unet.parameters(), *unet.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with Ledger() as ledger, mixed_precision(None):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            unet(x, torch.empty(1, device="meta"), context, added_cond_kwargs=added)
    return ledger.work, sum(storage.nbytes() for storage in kept.values())


class Ledger(TorchDispatchMode):
    """Counts what happens within: bytes of the tensors that are made (`live` now, `peak` at most), and `work` in FLOP.

    before: tensors that are there already, whose views are nothing new.
    """

    def __init__(self, before: Iterable[Tensor] = ()):
        super().__init__()
        self.live = self.peak = self.work = 0
        self._fresh: dict[object, bool] = {}
        self._seen: dict[object, tuple[int, object]] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # What an operation gives is a function of the shapes that it gets, and torch finds it out slowly. So the same
        # again is not asked for, where the result is new memory (no view, nothing in place).
        fresh = self._fresh.get(func)
        if fresh is None:
            fresh = self._fresh[func] = not func._schema.is_mutable and not _may_be_a_view(func)
        key = (func, _shapes_of(args), _shapes_of(tuple(kwargs.items()))) if fresh else None
        if key in self._seen:
            work, makes = self._seen[key]
            out = tuple(map(_made, makes)) if isinstance(makes, tuple) else _made(makes)
        else:
            out = func(*args, **kwargs)
            flop = flop_registry.get(func._overloadpacket)
            work = flop(*args, **kwargs, out_val=out) if flop else 0
            if fresh:
                self._seen[key] = work, tuple(map(_fresh, out)) if isinstance(out, tuple) else _fresh(out)
        self.work += work
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _Fresh:
    """How to make a tensor like this one."""

    def __init__(self, tensor: Tensor):
        self.how = (tensor.shape, tensor.stride()), {"dtype": tensor.dtype, "device": tensor.device}

    def __call__(self) -> Tensor:
        return torch.empty_strided(*self.how[0], **self.how[1])


def _fresh(value: object) -> object:
    return _Fresh(value) if isinstance(value, Tensor) else value


def _made(value: object) -> object:
    return value() if isinstance(value, _Fresh) else value


def _may_be_a_view(func: torch._ops.OpOverload) -> bool:
    return func is torch.ops.aten._unsafe_view.default or any(r.alias_info is not None for r in func._schema.returns)


def _shapes_of(value: object) -> object:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(map(_shapes_of, value)) if isinstance(value, tuple | list) else value


class _Mixed(TorchFunctionMode):
    """The casts of torch.autocast on a GPU, which the meta device has not, and the fused attention of one."""

    LOW = {F.linear, torch.conv2d, F.conv2d, torch.matmul, torch.bmm, torch.baddbmm}
    HIGH = {F.group_norm, F.layer_norm, torch.group_norm, torch.layer_norm, F.softmax, torch.softmax}

    def __init__(self, low: torch.dtype | None):
        super().__init__()
        self.low, self._cast = low, {}

    def backward(self, loss: Tensor) -> None:
        """Backward of a scalar, with what is computed again cast like the rest."""
        self._cast.clear()  # weights that were cast: autocast drops them at the end of forward
        # torch's own function suspends this mode. This is what it calls.
        engine, one = torch.autograd.Variable._execution_engine, torch.ones_like(loss)
        engine.run_backward((loss,), (one,), False, False, (), allow_unreachable=True, accumulate_grad=True)

    def __torch_function__(self, func: Callable, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = (self._as(t, self.low) for t in args[:3])
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        if self.low is not None and func in self.LOW:
            args, kwargs = self._all(args, kwargs, self.low)
        elif self.low is not None and func in self.HIGH:
            args, kwargs = self._all(args, kwargs, torch.float32)
        return func(*args, **kwargs)

    def _all(self, args: tuple, kwargs: dict, dtype: torch.dtype) -> tuple[tuple, dict]:
        return tuple(self._as(a, dtype) for a in args), {k: self._as(v, dtype) for k, v in kwargs.items()}

    def _as(self, value: object, dtype: torch.dtype | None) -> object:
        if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if isinstance(value, nn.Parameter) and value.requires_grad:
            if id(value) not in self._cast:
                self._cast[id(value)] = value.to(dtype)
            return self._cast[id(value)]
        return value.to(dtype)


@contextmanager
def mixed_precision(low: torch.dtype | None) -> Iterator[_Mixed]:
    """low: the type of matrix products; None or float32: no casts, the attention alone."""
    with _Mixed(None if low == torch.float32 else low) as mixed:
        yield mixed


def _disk(config: Config, total: int) -> dict[str, float]:
    out, name = Path(config.out), f"{config.name}.safetensors"
    state = (6 if config.optimiser.eight_bit else 12) * total
    state += 4 * total if config.ema else 0
    best = 1 if config.validate_every else 0
    kept, many = f"{config.keep} kept{', the best' * best}, one being written", config.keep + best + 1
    files = {
        f"{out / 'checkpoints'}/step-…/state.pt ({kept})": many * state,
        f"{out / 'checkpoints'}/step-…/{name} ({kept})": many * 4 * total,
        f"{out / name}": 4 * total,
        f"{out / 'log.jsonl'}, skipped.jsonl": 1e3 * config.steps / config.log_every,
    }
    if best:
        pictures = config.validation.people * (1 + len(config.validation.prompts))
        times = config.steps // config.validate_every + 2
        files[f"{out / 'validation'}/step-….png"] = times * pictures * 2 * config.data.size**2  # PNG: 2 bytes a pixel
    if config.data.source != "mini" and config.data.keep:
        known = _pictures(config)
        used = min(2 * config.steps * config.batch, known or 2 * config.steps * config.batch)
        each = 2 * 4 * 4 * (config.data.size // 8) ** 2 + 257 * 1280 * 2 + 77 * 2048 * 2
        files[f"{cache_folder(config.data)} (at most, {used:,} pictures)"] = used * each
    return {name: size / GB for name, size in files.items()}


def _pictures(config: Config) -> int | None:
    """How many there are, where the data is on this machine."""
    try:
        return len(listing(Path(config.data.source), config.data.metadata)[0])
    except DataError:
        return None


def _count(module: nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def describe(cost: Cost, card: str | None = None) -> str:
    """The tables that a dry run and `lookahead estimate` print. card: a name of CARDS, or a number of GB.

    Raises ConfigError for a card that is neither.
    """
    config, chosen = cost.config, cards(card)
    rows = [
        f"{config.steps:,} steps of {config.batch} samples, processes: {cost.processes}, precision: "
        f"{config.precision}, checkpointing: {config.checkpointing}, lookahead: {config.lookahead.arm}",
        "",
        *_table("Trained parameters", {**cost.parameters, "in all": sum(cost.parameters.values())}, ",d"),
        *_table("Memory of a process at most, GB", {**cost.memory, "in all": cost.peak}, ".2f"),
        *_table(
            "Work of a step of a process, TFLOP",
            {k: v / 1e12 for k, v in {**cost.work, "in all": sum(cost.work.values())}.items()},
            ".4g",
        ),
        "Expected time, at 45 and at 25 % of what a card can do (published trainings of SDXL lie between)",
    ]
    for name, (_, tflops) in chosen.items():
        fast, slow = cost.seconds(tflops)
        hours = [config.steps * seconds / 3600 for seconds in (fast, slow)]
        rows.append(f"  {name:14} {fast:8.3g} to {slow:.3g} s a step, {hours[0]:.3g} to {hours[1]:.3g} h in all")
    rows += ["", *_table("Files, GB", {**cost.disk, "in all": sum(cost.disk.values())}, ".3f")]
    if card is not None:
        gigabytes = next(iter(chosen.values()))[0]
        there = gigabytes * 2**30 / GB
        if cost.peak <= there:
            rows.append(f"It fits into {gigabytes} GB, with {there - cost.peak:.1f} to spare.")
        else:
            rows.append(f"It does not fit into {gigabytes} GB: {cost.peak - there:.1f} are missing. What saves memory:")
            rows += [f"  {knob:34} {saved:6.1f}" for knob, saved in savings(cost).items()]
    return "\n".join(rows)


def savings(cost: Cost) -> dict[str, float]:
    """GB that a change of one field of the configuration saves, for those that save something."""
    config, out = cost.config, {}
    each = config.batch // cost.processes
    changes = [
        ("checkpointing", "blocks"),
        ("checkpointing", "all"),
        ("norms_every", 0),
        ("accumulate", each),
        ("ema", 0),
    ]
    for name, value in changes:
        other = estimate(config.model_copy(update={name: value}), cost.processes)
        out[f"{name}={value}"] = cost.peak - other.peak
    if not config.optimiser.eight_bit:
        out["optimiser.eight_bit=true"] = 6 * sum(cost.parameters.values()) / GB
    return {knob: saved for knob, saved in sorted(out.items(), key=lambda item: -item[1]) if saved > 0.05}


def cards(card: str | None) -> dict[str, tuple[int, int]]:
    """GB and TFLOP/s of a card by its name, of those with so many GB, or of some. Raises ConfigError, as `describe`."""
    if card is None:
        return {name: CARDS[name] for name in ("rtx4090", "a100", "h100")}
    if card in CARDS:
        return {card: CARDS[card]}
    if not card.isdecimal():
        raise ConfigError(f"The card {card!r} is not known: give its memory in GB, or one of {', '.join(CARDS)}.")
    same = {name: (int(card), speed) for name, (size, speed) in CARDS.items() if size == int(card)}
    return same or {name: (int(card), CARDS[name][1]) for name in ("rtx4090", "a100")}


def _table(title: str, values: Mapping[str, float], form: str) -> list[str]:
    wide = max(len(name) for name in values) + 2
    return [title, *(f"  {name:{wide}}{value:>14{form}}" for name, value in values.items()), ""]
