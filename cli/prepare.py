"""`lookahead prepare`: what the frozen models see in a run's pictures, made ahead of it."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import ConfigFile, Overrides, Worker


def prepare(
    config: ConfigFile,
    overrides: Overrides = None,
    worker: Worker = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what is missing and how large it is; make nothing.")
    ] = False,
) -> None:
    """Make ahead what a run will read. `lookahead train` does it too; several workers are faster."""
    from ..trainer.config import ConfigError
    from ..trainer.data.source import PictureSource
    from ..trainer.lookahead.config import load
    from .assemble import device, open_models_and_source
    from .generate import asked_worker

    settings = load(config, overrides or [])
    if not settings.data.keep:
        raise ConfigError("data.keep is false, so a run keeps nothing of what the models see: set it to true.")
    source = open_models_and_source(settings)
    if not isinstance(source, PictureSource):
        raise ConfigError(
            "data.source is mini, whose people are drawn as they are asked for: there is no picture to see."
        )
    missing = source.missing()
    if dry_run or not missing.chunks:
        print(missing if missing.chunks else f"Everything that the run will read is in {missing.folder}.")
        return
    source.prepare(device(), asked_worker(worker))
    print(f"Written: {missing.folder}")
