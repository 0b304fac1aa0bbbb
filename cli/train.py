"""`lookahead train`: a training run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from .estimate import print_estimate
from .options import ConfigFile, Overrides
from .training import run

if TYPE_CHECKING:
    from ..trainer.recipe import Recipe, Source


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the whole configuration and what the run will cost; train nothing.")
    ] = False,
) -> None:
    """Train an encoder. The same command again goes on where it stopped."""
    import yaml

    from ..trainer.lookahead.config import load
    from .assemble import assemble, device

    settings = load(config, overrides or [])
    if dry_run:
        print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
        print_estimate(settings, None, int(os.environ.get("WORLD_SIZE", 1)))
        return

    def assembled() -> tuple[Recipe, Source]:
        recipe, source = assemble(settings)
        source.prepare(device())
        return recipe, source

    run(settings, assembled)
