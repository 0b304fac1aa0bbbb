"""`lookahead guide`: noise guides, which predict in one pass how lookahead guidance would move the noise."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .training import run

if TYPE_CHECKING:
    from ..trainer.recipe import Recipe, Source

app = typer.Typer(
    name="guide",
    help="Train a noise guide: it predicts how lookahead guidance would move the noise for a person's likeness.",
    no_args_is_help=True,
)


@app.command()
def train(
    config: options.ConfigFile,
    overrides: options.Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the whole configuration and what the run will cost; train nothing.")
    ] = False,
) -> None:
    """Train a noise guide on people's pictures. The same command again goes on where it stopped."""
    import yaml

    from ..trainer.noise_guide.config import NoiseGuideConfig

    settings = NoiseGuideConfig.load(config, overrides or [])
    if dry_run:
        from ..trainer.memory import memory_table
        from ..trainer.noise_guide.estimate import guide_memory, guide_work
        from .bases import check, guide_shapes

        check(settings.reading())
        print(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
        costs = settings, int(os.environ.get("WORLD_SIZE", 1)), guide_shapes(settings)
        print(memory_table("Memory of a process at most", guide_memory(*costs)))
        print(f"Work of a step of a process: {guide_work(*costs) / 1e12:.4g} TFLOP")
        return
    from .assemble import device
    from .assemble_guide import assemble_guide

    def assembled() -> tuple[Recipe, Source]:
        recipe, source = assemble_guide(settings)
        source.prepare(device())
        return recipe, source

    run(settings, assembled)


@app.command()
def doctor(config: options.ConfigFile, overrides: options.Overrides = None) -> None:
    """Examine the pictures of a noise guide's run. Status 1 if something is wrong."""
    from ..trainer.noise_guide.config import NoiseGuideConfig
    from .doctor import examined

    settings = NoiseGuideConfig.load(config, overrides or [])
    report = examined(settings.data, settings.model.detector)
    print(report)
    if report.wrong:
        raise SystemExit(1)
