"""What a run will cost before it runs: trained parameters, memory and work of a step, time, and the files it writes.

The real step is run once on torch's meta device, where tensors have shapes and no values: what it allocates and what it
multiplies is counted as it goes, with the casts of mixed precision and the attention kernels of a GPU. Weights need not
be there. What is added to that (optimiser, context of the device) stands in the tables line by line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn

from ...lookahead.method.resampler import ResamplerSizes
from ...sdxl import configs, lora
from ...sdxl.encoder import Encoder
from ...sdxl.load import Preview
from ...sdxl.shared_unet import Condition
from ..config import ConfigError
from ..ledger import Ledger, MixedPrecision
from ..precision import DTYPES
from .config import Config, cache_folder, from_values
from .draws import Draws
from .step import Batch, Step, parts

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
NOTABLE = 0.05  # GB, below which a saving is not worth a word
CONTEXT = 0.8e9  # bytes of driver, kernels, and what the allocator loses between blocks: not derived from the run
RECOGNISER = (43_800_000 * 4, 3 * 12.6e9)  # IR-SE50: bytes; forward and backward of one crop
READERS = 3.3e9  # bytes: two text encoders and ViT-H/14 in 16 bit, SDXL's autoencoder in 32


def _sdxl() -> str:
    return json.dumps(configs.UNET)


@dataclass(frozen=True)
class Shapes:
    """The cost of a run depends on these beside its configuration. The defaults are those of SDXL's public files.

    unet: the config of a UNet2DConditionModel as JSON. resampler, patches: of the image prompt, and how many vectors
    the image encoder gives. lora_rank: of the few-step LoRA. size: pixels a side of a source that draws its images,
    which are not kept on the disk; None: images are read at `data.size`. images: how many there are, where it is known.
    """

    unet: str = field(default_factory=_sdxl)
    resampler: ResamplerSizes = ResamplerSizes()
    patches: int = 257
    lora_rank: int = 64
    size: int | None = None
    images: int | None = None


@dataclass(frozen=True)
class Cost:
    """The cost of one step on one of `processes`. parameters: trained, by part; memory: GB at the peak, by part; work:
    FLOP, by loss; disk: GB by file, in all."""

    config: Config
    shapes: Shapes
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
        """Return the seconds of a step on a card of that many TFLOP/s: where it is used well, and where badly."""
        work = sum(self.work.values()) / (tflops * 1e12)
        return work / USED[1], work / USED[0]


def estimate(config: Config, processes: int = 1, shapes: Shapes | None = None) -> Cost:
    """The cost of a configuration on so many processes, which share its batch.

    Raises ConfigError where they cannot share it evenly.
    """
    if processes < 1:
        raise ConfigError(f"processes is {processes}: give at least 1.")
    shares = processes * config.accumulate
    if config.batch % shares:
        raise ConfigError(
            f"batch is {config.batch}, which {shares} processes and parts cannot share evenly: change one."
        )
    rows, shapes = config.batch // shares, shapes or Shapes()
    one = _one_sample(_key(config, shapes))
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
        "readers of pictures and texts (data.keep)": 0 if shapes.size or config.data.keep else READERS,
        f"activations, samples at a time: {rows}": cast + rows * (one.peak - 4 * total - cast),
        "the device itself": CONTEXT,
    }
    if config.norms_every == 0:
        del resident["a copy of the gradients (norms_every)"]
    work = {part: config.batch // processes * flop for part, flop in one.work.items()}
    memory = {name: value / GB for name, value in resident.items() if value}
    return Cost(config, shapes, processes, one.unet, one.parameters, memory, work, _disk(config, shapes, total))


class _Key(NamedTuple):
    """What the cost of a sample depends on."""

    shapes: Shapes
    size: int
    precision: str
    checkpointing: str
    arm: str
    align: str
    aligns_person: bool
    ranks: tuple[int, int]
    trains_kv: bool


class _Sample(NamedTuple):
    """peak: bytes that the losses of one sample allocate, with gradients; work: FLOP by loss; else parameters."""

    unet: int
    shortcut: int
    preview: int
    parameters: dict[str, int]
    peak: int
    work: dict[str, float]


def _key(config: Config, shapes: Shapes) -> _Key:
    ranks = (config.model.kv_rank, config.model.export_rank) if config.model.kv else (0, 0)
    ahead = config.lookahead.arm, config.lookahead.align, config.lookahead.aligns_person
    size = shapes.size or config.data.size
    return _Key(
        replace(shapes, size=None, images=None),
        size,
        config.precision,
        config.checkpointing,
        *ahead,
        ranks,
        config.optimiser.kv_rate > 0,
    )


@lru_cache(maxsize=8)
def _one_sample(key: _Key) -> _Sample:
    shapes, low, ahead = key.shapes, DTYPES[key.precision], key.arm != "none"
    unet, sizes, patches = configs.unet(json.loads(shapes.unet)), shapes.resampler, shapes.patches
    with torch.device("meta"):
        encoder = Encoder(unet, sizes, *key.ranks)
        encoder.kv.requires_grad_(key.trains_kv)
        shortcut = lora.build(unet, shapes.lora_rank).requires_grad_(False) if key.arm == "shortcut" else None
        preview = Preview(AutoencoderTiny().requires_grad_(False)) if ahead else None
        for module in (unet, shortcut):
            if module is not None and low != torch.float32:
                nn.Module.to(module, low)  # (diffusers' own warns of what does not matter here)
        models = {"base": "?", "start": "?", "kv": key.ranks != (0, 0)}
        if ahead:
            models |= {"vae": "?", "recogniser": "?", "shortcut": "?"}
        values = {"model": models, "data": {"source": "?"}, "checkpointing": key.checkpointing}
        person = {"semantic_alignment": 1.0, "layout_alignment": 1.0} if key.aligns_person else {}
        values |= {"lookahead": {"arm": key.arm, "align": key.align} | person}
        step = Step(from_values(values), unet, encoder, torch.empty(1, patches, sizes.image_width), shortcut, preview)
    latent = (1, 4, key.size // 8, key.size // 8)
    peak, work = _run(step, _batch(step, latent, sizes, patches, key.size), _draws(latent), low)
    if ahead:
        work["lookahead"] += RECOGNISER[1]
    trained = {name: sum(p.numel() for p in group) for name, group in _trained_parts(encoder).items()}
    return _Sample(_count(unet), _count(shortcut), _count(preview), trained, peak, work)


def _trained_parts(encoder: Encoder) -> dict[str, list[nn.Parameter]]:
    parts = {"Resampler": [*encoder.image_proj.parameters()], "image prompt K, V": [*encoder.ip_adapter.parameters()]}
    kv = [p for p in encoder.kv.parameters() if p.requires_grad]
    return parts | ({"KV encoder": kv} if kv else {})


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
    with Ledger(before) as ledger, MixedPrecision(low) as mixed:
        for part in parts(step.config):
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

    with Ledger() as ledger, MixedPrecision(None):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            unet(x, torch.empty(1, device="meta"), context, added_cond_kwargs=added)
    return ledger.work, sum(storage.nbytes() for storage in kept.values())


def _disk(config: Config, shapes: Shapes, total: int) -> dict[str, float]:
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
        files[f"{out / 'validation'}/step-….png"] = (
            times * pictures * 2 * (shapes.size or config.data.size) ** 2
        )  # PNG: 2 bytes a pixel
    if not shapes.size and config.data.keep:
        most = 2 * config.steps * config.batch
        used = min(most, shapes.images or most)
        each = 2 * 4 * 4 * (config.data.size // 8) ** 2 + 257 * 1280 * 2 + 77 * 2048 * 2
        files[f"{cache_folder(config.data)} (at most, {used:,} pictures)"] = used * each
    return {name: size / GB for name, size in files.items()}


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
        ("accumulate", next(n for n in range(max(1, each // config.least_rows), 0, -1) if each % n == 0)),
        ("ema", 0),
    ]
    if config.precision == "fp32":
        changes.append(("precision", "bf16"))
    for name, value in changes:
        other = estimate(config.model_copy(update={name: value}), cost.processes, cost.shapes)
        out[f"{name}={value}"] = cost.peak - other.peak
    if not config.optimiser.eight_bit:
        out["optimiser.eight_bit=true"] = 6 * sum(cost.parameters.values()) / GB
    return {knob: saved for knob, saved in sorted(out.items(), key=lambda item: -item[1]) if saved > NOTABLE}


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
