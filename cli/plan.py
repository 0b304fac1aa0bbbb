"""`lookahead generate --plan`: what a data set will take, and the commands that make it, before anything is drawn.

Work is counted on shapes alone; what finished shards (or an earlier, small set of the same configuration) tell is
measured, and said to be so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..trainer.data.generate.config import GenerateConfig

BYTES_PER_PIXEL = {"jpg": 0.3, "png": 1.6}  # of pictures of which none is there to measure, as --plan says
PER_PICTURE = 1800  # bytes of what a sample's JSON says of one, with an embedding


@dataclass(frozen=True)
class GenerationPlan:
    """work: FLOP of a picture; size: bytes of one; kept: share; measured: what finished shards told, in words; speed:
    pictures a second of one worker, where known."""

    config: GenerateConfig
    work: Mapping[str, float]
    size: float
    kept: float
    measured: str
    speed: float | None


def make_plan(config: GenerateConfig) -> GenerationPlan:
    """Counts and measures. Raises StoreError, or ShardError of a side file that is damaged."""
    from ..trainer.data.shards import shard_name, side_name, times_name
    from ..trainer.data.store import Store
    from ..trainer.data.tars import index_name

    store = Store(config.out)
    there = store.names()
    names = [name for n in range(config.shards) if index_name(name := shard_name(n)) in there]
    size, kept, speed = _assumed(config), 1.0, None
    measured = "nothing is there to measure, so sizes are assumed and all pictures kept: make a shard or two first"
    if names:
        sides = [json.loads(text) for text in store.read([side_name(name) for name in names])]
        generated, good = (sum(side["pictures"][of] for side in sides) for of in ("generated", "kept"))
        size, kept = sum(there[name] or 0 for name in names) / max(1, good), good / max(1, generated)
        measured = (
            f"sizes and the share that is kept are those of {len(names)} finished shards ({generated:,} pictures)"
        )
        times = [json.loads(t) for t in store.read([t for t in map(times_name, names) if t in there])]
        if times:
            speed = sum(t["pictures"] for t in times) / sum(t["seconds"]["all"] for t in times)
    return GenerationPlan(config, work_of(config), size, kept, measured, speed)


def _assumed(config: GenerateConfig) -> float:
    return BYTES_PER_PIXEL[config.files.format] * config.generator.size**2 + PER_PICTURE


def work_of(config: GenerateConfig) -> dict[str, float]:
    """FLOP of a picture by part, counted on torch's meta device. The drawn world computes none to speak of."""
    from ..sdxl import configs
    from ..trainer.lookahead.estimate import unet_forward
    from .bases import known_base

    settings = config.generator
    if settings.kind == "drawn" or settings.base is None:
        return {}
    known = known_base(settings.base)
    folder = known.folder if known else Path(settings.base).expanduser()
    unet = _json(folder / "unet" / "config.json") or configs.UNET
    vae = _json((Path(settings.vae) if settings.vae else folder / "vae") / "config.json") or configs.VAE
    evaluations = settings.steps * (2 if settings.guidance > 1 else 1)
    return {
        "UNet": evaluations * unet_forward(configs.unet(unet), settings.size)[0],
        "autoencoder": decoder_work(vae, settings.size),
    }


def decoder_work(vae: Mapping[str, Any], size: int) -> float:
    """FLOP to decode a picture of `size` pixels. vae: config of an AutoencoderKL or AutoencoderTiny."""
    import torch
    from diffusers import AutoencoderKL, AutoencoderTiny

    from ..trainer.ledger import Ledger

    kind = AutoencoderTiny if vae.get("_class_name") == "AutoencoderTiny" else AutoencoderKL
    with torch.device("meta"), torch.no_grad():
        decoder = kind.from_config({k: v for k, v in vae.items() if k != "_class_name"})
        with Ledger() as ledger:
            decoder.decode(torch.empty(1, 4, size // 8, size // 8))
    return float(ledger.work)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return {k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if k == "_class_name" or k[0] != "_"}


def describe(plan: GenerationPlan, file: Path, prices: Mapping[str, float]) -> str:
    """The plan as text. file: of the configuration, for the commands; prices: of an hour, by card."""
    from ..trainer.lookahead.estimate import CARDS, USED

    config = plan.config
    people = config.shards * config.people_per_shard
    pictures = people * config.prompts.per_person
    lines = [
        f"{people:,} people with {config.prompts.per_person} pictures each: {pictures:,} pictures to generate, "
        f"{plan.kept * pictures:,.0f} to keep ({plan.kept:.0%}).",
        f"{config.shards:,} shards of about {plan.size * plan.kept * pictures / config.shards / 1e6:,.0f} MB, "
        f"{plan.size * plan.kept * pictures / 1e9:,.2f} GB in all.",
        f"({plan.measured}.)",
    ]
    total = sum(plan.work.values())
    if total:
        parts = ", ".join(f"{name} {work / 1e12:.3g}" for name, work in plan.work.items())
        lines += [
            f"Work of a picture: {total / 1e12:.3g} TFLOP ({parts}), counted; "
            f"of all: {total * pictures / 1e18:.3g} EFLOP.",
            "",
            f"{'card':10}{'hours of one GPU':>24}{'cost':>20}",
        ]
        for name, (_, tflops) in CARDS.items():
            hours = [total * pictures / (tflops * 1e12) / share / 3600 for share in (USED[1], USED[0])]
            cost = f"{prices[name] * hours[0]:,.0f} to {prices[name] * hours[1]:,.0f}" if name in prices else ""
            lines.append(f"{name:10}{f'{hours[0]:,.3g} to {hours[1]:,.3g}':>24}{cost:>20}")
        lines += [
            f"(At {USED[1]:.0%} and {USED[0]:.0%} of what the makers state; faces are found on the CPU meanwhile, with "
            "several processes for a fast GPU. These hours are counted, not measured.)",
        ]
    if plan.speed:
        long = pictures / plan.speed / 3600
        lines.append(
            f"At the speed of the worker that made them, {plan.speed:.3g} pictures a second: {long:,.3g} hours."
        )
    engine = f"lookahead generate {file}"
    lines += [
        "",
        "One machine:      " + f"torchrun --nproc-per-node 8 -m lcm_lookahead.cli.main generate {file}",
        "SLURM:            " + f"{engine} launch.engine=slurm launch.partition=gpu launch.tasks=32 launch.workers=8",
        "Ray:              " + f"{engine} launch.engine=ray launch.tasks=32",
        "Elsewhere:        " + f"{engine} out=s3://bucket/{config.name}",
        "To train on it:   " + f"lookahead prepare my.yaml data.source={config.out}",
    ]
    return "\n".join(lines)


def parse_prices(text: str | None) -> dict[str, float]:
    """Prices of an hour of "h100=2.5,a100=1.2". Raises ConfigError."""
    from ..trainer.config import ConfigError
    from ..trainer.lookahead.estimate import CARDS

    prices: dict[str, float] = {}
    for pair in (text or "").split(","):
        card, _, price = pair.strip().partition("=")
        if not card:
            continue
        try:
            prices[card] = float(price)
        except ValueError:
            prices[card] = -1
        if card not in CARDS or prices[card] < 0:
            raise ConfigError(f"--prices has {pair!r}: write card=price, with a card of {', '.join(CARDS)}.")
    return prices
