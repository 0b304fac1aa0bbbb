"""The `lookahead` command."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

_FOLDERS = ".mini, with --quick .mini-quick"  # apart: a stage of one plan must not go on from the other's


def main(arguments: list[str] | None = None) -> None:
    """Entry point; `arguments` default to the command line's."""
    parser = argparse.ArgumentParser(prog="lookahead", description="Companion tools of LCM-Lookahead for ComfyUI.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train an encoder (the same command again goes on where it stopped)")
    train.add_argument("config", type=Path, help="a YAML file, such as trainer/configs/mini.yaml")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that take the file's place")
    train.add_argument("--dry-run", action="store_true", help="say what the run will cost and write, train nothing")
    estimate = commands.add_parser("estimate", help="what a run will cost: memory by part, work, time, files")
    estimate.add_argument("config", type=Path, help="a YAML file, such as trainer/configs/sdxl_24gb.yaml")
    estimate.add_argument("overrides", nargs="*", metavar="section.key=value", help="values in the file's place")
    estimate.add_argument("--card", help="memory of the card in GB, or its name (rtx4090, a100, h100, ...)")
    estimate.add_argument("--processes", type=int, default=1, help="cards that share the batch (1)")
    curves = commands.add_parser("curves", help="plot the curves of runs, those still under way too")
    curves.add_argument("folders", nargs="+", type=Path, metavar="OUT", help="folder `out` of a run")
    curves.add_argument("--to", type=Path, default=Path("curves.png"), help="the PNG to write (curves.png)")
    _add_convert(commands)
    doctor = commands.add_parser("doctor", help="look at a folder of pictures as a training run would")
    doctor.add_argument("data", type=Path, help="the folder, or the YAML file of a run")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="values of section data (size=768)")
    doctor.add_argument("--detector", type=Path, help="folder of an insightface pack (default: that of the run)")
    mini = commands.add_parser("mini", help="the mini world: a tiny SDXL on drawn faces").add_subparsers(
        dest="task", required=True
    )

    build = mini.add_parser("build", help="train the mini world from nothing (resumes where it was stopped)")
    build.add_argument("--quick", action="store_true", help="for development: shorter, and not as good")
    build.add_argument("--folder", type=Path, help=f"for the stages' results ({_FOLDERS})")
    build.add_argument("--only", help="stages to run, separated by commas; a second process can take others")
    build.add_argument("--export-to", type=Path, help="where the weights go (default: FOLDER/weights)")

    sheet = mini.add_parser("sheet", help="draw a picture sheet: a row a person, a column a style")
    sheet.add_argument("--people", type=int, default=8)
    sheet.add_argument("--seed", type=int, default=0)
    sheet.add_argument("--out", type=Path, default=Path("sheet.png"))

    report = mini.add_parser("report", help="measure a build again (what has not changed is kept) and write its page")
    report.add_argument("--quick", action="store_true", help="the build was a quick one")
    report.add_argument("--folder", type=Path, help=f"of the stages' results ({_FOLDERS})")
    report.add_argument("--weights", type=Path, help="the shipped files (default: FOLDER/weights)")

    mini.add_parser("sizes", help="the table of the shipped files: planned and real sizes")

    chosen = parser.parse_args(arguments)
    if chosen.command == "train":
        _train(chosen.config, chosen.overrides, chosen.dry_run)
        return
    if chosen.command == "estimate":
        return _estimate(chosen.config, chosen.overrides, chosen.card, chosen.processes)
    if chosen.command == "curves":
        return _curves(chosen.folders, chosen.to)
    if chosen.command == "doctor":
        return _doctor(chosen.data, chosen.overrides, chosen.detector)
    if chosen.command == "convert":
        return _convert(chosen)
    if "folder" in chosen and chosen.folder is None:
        chosen.folder = Path(".mini-quick" if chosen.quick else ".mini")
    if chosen.task == "build":
        from ..mini.build import build as run
        from ..mini.build import keep_memory
        from ..mini.plan import FULL, QUICK

        keep_memory()
        only = chosen.only.split(",") if chosen.only else None
        run(chosen.folder, QUICK if chosen.quick else FULL, only, chosen.export_to)
    elif chosen.task == "report":
        from ..mini.build import keep_memory
        from ..mini.plan import FULL, QUICK
        from ..mini.report.report import report as measure

        if not chosen.folder.is_dir():
            parser.error(f"there is no folder {chosen.folder}: name that of a build with --folder")
        keep_memory()
        plan = QUICK if chosen.quick else FULL
        print(f"Written: {measure(chosen.folder, plan, chosen.weights or chosen.folder / 'weights')}")
    elif chosen.task == "sizes":
        from ..mini.files.shipped import size_table

        print(size_table())
    else:
        if chosen.people < 1:
            parser.error(f"--people is {chosen.people}; draw at least 1")
        from ..mini.world.sheet import draw_sheet

        draw_sheet(chosen.out, chosen.people, chosen.seed)
        print(f"Drawn: {chosen.out}")


def _train(path: Path, overrides: list[str], dry_run: bool) -> None:
    import torch
    import yaml

    from ..trainer.lookahead.config import load
    from .assemble import ERRORS, assemble, device

    try:
        config = load(path, overrides)
        if dry_run:
            print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
            return _estimate(path, overrides, None, int(os.environ.get("WORLD_SIZE", 1)))
        from ..trainer.train import TrainingError, train

        try:
            recipe, source = assemble(config)
            source.prepare(device())
            written = train(config, recipe, source)
        except TrainingError as error:
            raise SystemExit(str(error)) from None
        finally:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()  # else its threads may end the process with SIGABRT
    except ERRORS as error:
        raise SystemExit(str(error)) from None
    if written is not None and os.environ.get("RANK", "0") == "0":  # one of several processes
        print(f"Written: {written}")


def _estimate(path: Path, overrides: list[str], card: str | None, processes: int) -> None:
    from ..trainer.config import ConfigError
    from ..trainer.lookahead.config import load
    from ..trainer.lookahead.estimate import cards, describe, estimate
    from .bases import shapes

    try:
        config = load(path, overrides)
        cards(card)  # before what takes a while
        print(describe(estimate(config, processes, shapes(config)), card))
    except ConfigError as error:
        raise SystemExit(str(error)) from None


def _curves(folders: list[Path], to: Path) -> None:
    from ..trainer.checkpoints import TrainingError
    from ..trainer.curves import curves
    from ..trainer.lookahead.recipe import PANELS

    try:
        print(f"Written: {curves(folders, PANELS, to)}")
    except TrainingError as error:
        raise SystemExit(f"lookahead curves: {error}") from None


def _doctor(path: Path, overrides: list[str], pack: Path | None) -> None:
    from ..trainer.data.doctor import examine
    from ..trainer.lookahead.config import data_alone, load
    from .assemble import ERRORS, open_detector

    try:
        if path.suffix in (".yaml", ".yml"):
            config = load(path, [f"data.{override}" for override in overrides])
            data, pack = config.data, pack or config.model.detector
        else:
            data = data_alone(path, overrides)
        report = examine(data, open_detector(str(pack)) if pack else None, str(pack))
    except ERRORS as error:
        raise SystemExit(f"lookahead doctor: {error}") from None
    print(report)
    if report.wrong:
        raise SystemExit(1)


def _add_convert(commands) -> None:
    convert = commands.add_parser(
        "convert", help="make an encoder file of another kind of file, or an IP-Adapter of it"
    )
    convert.add_argument("source", type=Path, help="encoder, stock IP-Adapter Plus or the paper's model_ckpt.pt")
    convert.add_argument("target", type=Path, help="the .safetensors file to write")
    convert.add_argument("--to", choices=("encoder", "ip-adapter"), default="encoder", help="what to make (encoder)")
    convert.add_argument("--base", type=Path, help="SDXL's .safetensors, to compare the paper's checkpoint with")
    convert.add_argument("--precision", default="float16", help='float16, bfloat16, float32 or "as stored" (float16)')


def _convert(chosen: argparse.Namespace) -> None:
    from ..lookahead.files.convert import convert
    from ..lookahead.files.encoder_file import EncoderFileError

    try:
        print(convert(chosen.source, chosen.target, chosen.to, chosen.base, chosen.precision))
    except EncoderFileError as error:
        raise SystemExit(f"lookahead convert: {error}") from None
    print(f"Written: {chosen.target}")


if __name__ == "__main__":
    main()
