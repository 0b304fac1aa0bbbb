"""The `lookahead` command."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    """Entry point; `arguments` default to the command line's."""
    parser = argparse.ArgumentParser(prog="lookahead", description="Companion tools of LCM-Lookahead for ComfyUI.")
    commands = parser.add_subparsers(dest="command", required=True)
    mini = commands.add_parser("mini", help="the mini world: a tiny SDXL on drawn faces").add_subparsers(
        dest="task", required=True
    )

    build = mini.add_parser("build", help="train the mini world from nothing (resumes where it was stopped)")
    build.add_argument("--quick", action="store_true", help="the first generation: at most 90 minutes on two cores")
    build.add_argument("--folder", type=Path, default=Path(".mini"), help="for the stages' results (%(default)s)")
    build.add_argument("--only", help="stages to run, separated by commas; a second process can take others")
    build.add_argument("--export-to", type=Path, help="where the weights go (default: the package's own)")

    sheet = mini.add_parser("sheet", help="draw a picture sheet: a row a person, a column a style")
    sheet.add_argument("--people", type=int, default=8)
    sheet.add_argument("--seed", type=int, default=0)
    sheet.add_argument("--out", type=Path, default=Path("sheet.png"))

    report = mini.add_parser("report", help="measure a build again (what has not changed is kept) and write its page")
    report.add_argument("--quick", action="store_true", help="the build was a quick one")
    report.add_argument("--folder", type=Path, default=Path(".mini"), help="of the stages' results (%(default)s)")
    report.add_argument("--weights", type=Path, help="the shipped files (default: the package's own)")

    mini.add_parser("sizes", help="the table of the shipped files: planned and real sizes")

    chosen = parser.parse_args(arguments)
    if chosen.task == "build":
        if not chosen.quick:
            parser.error("only the quick build exists in this version: add --quick")
        from .mini.build import build as run
        from .mini.build import keep_memory

        keep_memory()
        run(chosen.folder, only=chosen.only.split(",") if chosen.only else None, export_to=chosen.export_to)
    elif chosen.task == "report":
        from .mini.build import keep_memory
        from .mini.plan import FULL, QUICK, WEIGHTS
        from .mini.report import report as measure

        if not chosen.folder.is_dir():
            parser.error(f"there is no folder {chosen.folder}: name that of a build with --folder")
        keep_memory()
        print(f"Written: {measure(chosen.folder, QUICK if chosen.quick else FULL, chosen.weights or WEIGHTS)}")
    elif chosen.task == "sizes":
        from .mini.shipped import size_table

        print(size_table())
    else:
        if chosen.people < 1:
            parser.error(f"--people is {chosen.people}; draw at least 1")
        from .mini.sheet import draw_sheet

        draw_sheet(chosen.out, chosen.people, chosen.seed)
        print(f"Drawn: {chosen.out}")


if __name__ == "__main__":
    main()
