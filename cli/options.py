"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path, typer.Argument(help="YAML file of the run, such as trainer/configs/sdxl_24gb.yaml.", show_default=False)
]
Worker = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Do every N-th shard from the I-th on, counted from 0.",
        show_default="as torchrun or SLURM says",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="section.key=value", help="Values that take the file's place.", show_default=False),
]
