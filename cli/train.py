"""`lookahead train`: a training run."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from .estimate import print_estimate
from .options import Config, Overrides


def train(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the whole configuration and what the run will cost; train nothing.")
    ] = False,
) -> None:
    """Train an encoder. The same command again goes on where it stopped."""
    from pathlib import Path

    import torch
    import yaml

    from ..lookahead.files.atomic import check_writable
    from ..trainer.alone import refuse_a_second
    from ..trainer.lookahead.config import load
    from ..trainer.train import train as train_recipe
    from .assemble import assemble, device

    settings = load(config, overrides or [])
    if dry_run:
        print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
        print_estimate(settings, None, int(os.environ.get("WORLD_SIZE", 1)))
        return
    out = Path(settings.out)
    try:
        check_writable(out, folder=True)
        refuse_a_second(out)  # (and so does the loop, but it begins after what takes long)
        recipe, source = assemble(settings)
        source.prepare(device())
        written = train_recipe(settings, recipe, source)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # else its threads may end the process with SIGABRT
    if written is not None and os.environ.get("RANK", "0") == "0":  # one of several processes
        print(f"Written: {written}")
