"""`lookahead evaluate`: the studies of the method on the mini world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..tools.common import ROOT


def evaluate(
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME=FILE[@WEIGHT]", help="With --encoders: files by arm.", show_default=False),
    ] = None,
    knobs: Annotated[bool, typer.Option("--knobs", help="Study one knob at a time instead.")] = False,
    guidance: Annotated[
        bool, typer.Option("--guidance", help="Study lookahead guidance against plain x0 and none instead.")
    ] = False,
    encoders: Annotated[
        bool, typer.Option("--encoders", help="Study trained encoders against what training began with instead.")
    ] = False,
    references: Annotated[
        int | None,
        typer.Option(
            help="Held-out people to draw, at least 10.",
            show_default="100; with --knobs 20, with --guidance or --encoders 96",
        ),
    ] = None,
    first: Annotated[int, typer.Option(help="With --encoders: number of the first of the people, from 0.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the page, its figures and pictures.", show_default="docs")] = (
        ROOT / "docs"
    ),
) -> None:
    """Measure the method on the mini world.

    Image prompt, KV injection or lookahead guidance in a real ComfyUI, over held-out drawn people.
    Files of one NAME are one arm, trained with several seeds; FILE@0.75 draws with that weight of the image prompt.
    """
    chosen = [name for name, on in {"knobs": knobs, "guidance": guidance, "encoders": encoders}.items() if on]
    if len(chosen) > 1:
        raise typer.BadParameter(f"--{chosen[0]} and --{chosen[1]} are studies of their own: give one of them.")
    if encoders != bool(files):
        raise typer.BadParameter("--encoders goes with files: give both, or neither.")
    from ..lookahead.files.atomic import check_writable

    check_writable(out, folder=True)
    from ..mini.studies.evaluate import evaluate as study

    study(chosen[0] if chosen else "reference", out, references, files or (), first)
