"""`lookahead estimate`: what a training run will cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import options

if TYPE_CHECKING:
    from ..trainer.lookahead.config import Config


def estimate(
    config: options.ConfigFile,
    overrides: options.Overrides = None,
    card: Annotated[
        str | None, typer.Option(help="Memory of the GPU in GB, or its name: rtx4090, a100, h100 ...")
    ] = None,
    processes: Annotated[int, typer.Option(help="GPUs that share the batch, at least 1.")] = 1,
) -> None:
    """Estimate what a run will cost. Memory by part, work, time and files, without training."""
    from ..trainer.lookahead.config import load

    print_estimate(load(config, overrides or []), card, processes)


def print_estimate(config: Config, card: str | None, processes: int) -> None:
    """Print the estimate of a run."""
    from ..trainer.lookahead import estimate as costs
    from .bases import check, shapes

    costs.cards(card)  # before what takes a while
    check(config)
    print(costs.describe(costs.estimate(config, processes, shapes(config)), card))
