"""`lookahead mini`: the mini world, trained, drawn and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="mini", help="Build and measure the mini world: a tiny SDXL on drawn faces.", no_args_is_help=True
)
Quick = Annotated[bool, typer.Option("--quick", help="The plan for development: shorter, and not as good.")]
Folder = Annotated[
    Path | None,
    typer.Option(help="Folder of the stages' results.", show_default=".mini, with --quick .mini-quick"),
]


def folder_of(folder: Path | None, quick: bool) -> Path:
    """The folder of a build; plans are kept apart, since a stage of one must not go on from the other's."""
    from ..mini.plan import BUILD, QUICK_BUILD

    return folder or (QUICK_BUILD if quick else BUILD)


@app.command()
def build(
    quick: Quick = False,
    folder: Folder = None,
    only: Annotated[
        str | None,
        typer.Option(help="Stages to run, separated by commas; a second process can take others.", show_default="all"),
    ] = None,
    export_to: Annotated[
        Path | None, typer.Option(help="Folder that the weights are written to.", show_default="FOLDER/weights")
    ] = None,
) -> None:
    """Train the mini world from nothing. The same command again goes on where it stopped."""
    from ..lookahead.files.atomic import check_writable

    check_writable(folder_of(folder, quick), folder=True)
    if export_to:
        check_writable(export_to, folder=True)
    from ..mini.build import build as run
    from ..mini.build import keep_memory
    from ..mini.plan import FULL, QUICK

    keep_memory()
    run(folder_of(folder, quick), QUICK if quick else FULL, only.split(",") if only else None, export_to)


@app.command()
def sheet(
    people: Annotated[int, typer.Option(min=1, help="People, a row each, at least 1.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the people.")] = 0,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("sheet.png"),
) -> None:
    """Draw a picture sheet: a row a person, a column a style."""
    from ..lookahead.files.atomic import check_writable
    from ..mini.world.sheet import draw_sheet

    check_writable(out)
    draw_sheet(out, people, seed)
    print(f"Drawn: {out}")


@app.command()
def report(
    quick: Quick = False,
    folder: Folder = None,
    weights: Annotated[
        Path | None, typer.Option(help="Folder of the shipped files.", show_default="FOLDER/weights")
    ] = None,
) -> None:
    """Measure a build and write its page; what has not changed since is not measured again."""
    folder = folder_of(folder, quick)
    if not folder.is_dir():
        raise typer.BadParameter(f"there is no folder {folder}: name that of a build with --folder")
    from ..mini.build import keep_memory
    from ..mini.plan import FULL, QUICK
    from ..mini.report.report import report as measure

    keep_memory()
    print(f"Written: {measure(folder, QUICK if quick else FULL, weights or folder / 'weights')}")


@app.command()
def previews(
    prompts: Annotated[int, typer.Option(min=2, help="Captions to draw, at least 2.")] = 64,
    out: Annotated[Path, typer.Option(help="Folder of the page, its figures and pictures.")] = Path("docs"),
) -> None:
    """Measure what one-step previews foresee (figure 2 of the paper), with the shipped files."""
    from ..lookahead.files.atomic import check_writable

    check_writable(out, folder=True)
    from ..mini.build import keep_memory
    from ..mini.report.previews import write

    keep_memory()
    print(f"Written: {write(out, prompts)}")


@app.command()
def example(
    folder: Annotated[Path, typer.Argument(help="New folder that the files are written to.", show_default=False)],
) -> None:
    """Write the mini world under the names in the README's lines of Python, so that they can be tried as they stand.

    \b
    lookahead mini example try
    cd try && python        (and the README's lines)
    """
    from ..lookahead.files.atomic import check_writable
    from ..mini.example import write_example

    check_writable(folder, folder=True)
    print(f"Written: {write_example(folder)}")


@app.command()
def things(
    folder: Folder = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write, a base to name as model.base.", show_default="FOLDER/things")
    ] = None,
) -> None:
    """Merge the LoRA of drawn things into a copy of the mini SDXL: a base that draws them."""
    from ..lookahead.files.atomic import check_writable

    folder = folder_of(folder, quick=False)
    out = out or folder / "things"
    check_writable(out, folder=True)
    from ..mini.files.derived import write_things_base

    print(f"Written: {write_things_base(folder / 'things_lora.safetensors', out)}")


@app.command()
def gate(
    folder: Folder = None,
    samples: Annotated[int, typer.Option(min=1, help="Pictures drawn of each class.")] = 48,
    sheet: Annotated[Path | None, typer.Option(help="PNG of some of them.", show_default="FOLDER/gate.png")] = None,
) -> None:
    """Ask the judge of things whether the base draws each class (in 90 % of samples); ends with 1 where it does not."""
    from ..lookahead.files.atomic import check_writable

    folder = folder_of(folder, quick=False)
    sheet = sheet or folder / "gate.png"
    check_writable(sheet)
    from ..mini.report.gate import GATE, check

    sheet.parent.mkdir(parents=True, exist_ok=True)
    lora, judge = (folder / f"{name}.safetensors" for name in ("things_lora", "things_judge"))
    named = check(lora, judge, samples, sheet)
    if short := [noun for noun, share in named.items() if share < GATE]:
        print(f"The gate is closed: under {GATE:.0%} for {', '.join(short)}.")
        raise typer.Exit(1)
    print(f"The gate is open: {GATE:.0%} or more of every class are named.")


@app.command()
def sizes() -> None:
    """Print the table of the shipped files: planned and real sizes."""
    from ..mini.files.shipped import size_table

    print(size_table())
