"""`lookahead claims`: the paper's claims judged by what was measured on the mini world, and measured where missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer


def claims(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Claims to judge or measure; by default all.", show_default=False),
    ] = None,
    run: Annotated[bool, typer.Option("--run", help="Run the commands whose figures are missing.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Page to write.", show_default="docs/evidence.md, where all claims are judged")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Another list of claims.", show_default="the paper's")] = None,
) -> None:
    """Judge the paper's claims by 95 % intervals, and write a page of them.

    Paths in the list of claims start from the folder that this is run in. With --run, figures that are missing are
    measured first; trainings take hours on a CPU. A claim with all of its figures runs nothing, and the same command
    again goes on where it stopped.
    """
    from ..evaluation import claims as listed
    from ..lookahead.files.atomic import atomic, check_writable

    chosen = listed.chosen(listed.read(file or listed.CLAIMS), names or [])
    page = out or (None if names else Path("docs/evidence.md"))
    if page:
        check_writable(page)
    if run:
        listed.run_missing(chosen, Path.cwd(), _lookahead)
    results = listed.judged(chosen, Path.cwd())
    width = max(len(one.name) for one in results)
    for one in results:
        print(f"{one.name:{width}}  {one.verdict:12}  {one.count}  {one.claim.title}")
    if page:
        with atomic(page) as part:
            part.write_text(listed.page(results, Path.cwd(), page.parent), encoding="utf-8")
        print(f"Written: {page}")


def _lookahead(arguments: list[str]) -> None:
    """Run a command of `lookahead` in a process of its own; one that fails ends all, with its own sentence."""
    print(f"\nlookahead {' '.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", f"{__package__}.main", *arguments]).returncode
    if code:
        raise SystemExit(code)
