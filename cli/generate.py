"""The command that makes a data set of consistent people: models, workers, progress, pilot and report."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..trainer.data.generate.checks import Inspector
    from ..trainer.data.generate.config import GenerateConfig
    from ..trainer.data.generate.engine import Engine
    from ..trainer.data.generate.generators import PictureGenerator

PILOT_PEOPLE = 50
NAMES_WARNING = (
    "Warning: `names` makes pictures of real people. Their likeness is theirs: make sure that you may use it, and do "
    "not publish these pictures, or models trained on them, without their consent."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="a YAML file, such as trainer/configs/generate/mini.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that take the file's place")
    parser.add_argument("--shards", metavar="A-B", help="make these shards alone, both included (default: all)")
    parser.add_argument("--worker", metavar="I/N", help="make every N-th shard from the I-th on, counted from 0")
    parser.add_argument(
        "--pilot",
        type=int,
        nargs="?",
        const=PILOT_PEOPLE,
        metavar="N",
        help="draw N people, and write pilot.html alone",
    )
    parser.add_argument("--report", action="store_true", help="write report.html of what is there, and make nothing")
    parser.add_argument("--verify", action="store_true", help="compare every finished shard with its whole hash")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; `arguments` default to the command line's."""
    parser = argparse.ArgumentParser(prog="lookahead generate", description="Make a data set of consistent people.")
    add_arguments(parser)
    run(parser.parse_args(arguments))


def run(chosen: argparse.Namespace) -> None:
    """Do what the parsed arguments say; ends with one sentence where something is wrong."""
    from ..trainer.data.generate.config import load
    from ..trainer.data.generate.report import write_report
    from .assemble import ERRORS

    try:
        config = load(chosen.config, chosen.overrides)
        if config.names is not None:
            print(NAMES_WARNING, file=sys.stderr)
        if chosen.verify:
            return verify(config)
        if chosen.report:
            print(f"Written: {write_report(config)}")
            return
        numbers, (worker, workers) = asked_shards(chosen.shards, config.shards), asked_worker(chosen.worker)
        engine = read_engine(config)
        if chosen.pilot is not None:
            return pilot(engine, chosen.pilot)
        generate(engine, numbers[worker::workers])
        if len(engine.missing(range(config.shards))) == 0:
            print(f"Written: {write_report(config)}")
    except ERRORS as error:
        raise SystemExit(f"lookahead generate: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(
            "lookahead generate: stopped; the same command goes on with the shards that are missing."
        ) from None


def asked_shards(text: str | None, shards: int) -> range:
    """The shards of "A-B", both included, or all. Raises ConfigError, one sentence."""
    from ..trainer.config import ConfigError

    if text is None:
        return range(shards)
    first, dash, last = text.partition("-")
    try:
        numbers = range(int(first), int(last if dash else first) + 1)
    except ValueError:
        raise ConfigError(f"--shards is {text!r}: write the first and the last, as 0-9.") from None
    if not numbers or numbers.start < 0 or numbers[-1] >= shards:
        raise ConfigError(
            f"--shards is {text!r}, and there are {shards}, from 0 to {shards - 1}: set shards=... for more."
        )
    return numbers


def asked_worker(text: str | None) -> tuple[int, int]:
    """This worker and how many there are: of "I/N", else as torchrun, accelerate or SLURM's array says it."""
    from ..trainer.config import ConfigError
    from ..trainer.data.generate.engine import worker_from_environment

    if text is None:
        return worker_from_environment()
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ConfigError(f"--worker is {text!r}: write its number, from 0, and how many there are, as 0/4.")
    return int(number), int(count)


def generate(engine: Engine, numbers: Sequence[int]) -> None:
    """Make what is missing of these shards, with progress on stderr."""
    from tqdm import tqdm

    missing, config = engine.missing(numbers), engine.config
    generated = kept = 0
    total = len(missing) * config.people_per_shard * config.prompts.per_person
    if len(missing) < len(numbers):
        print(f"{len(numbers) - len(missing)} of {len(numbers)} shards are finished already.", file=sys.stderr)
    with tqdm(total=total, unit=" pictures", mininterval=1 if sys.stderr.isatty() else 30, disable=not missing) as bar:

        def progress(more: int, good: int) -> None:
            nonlocal generated, kept
            generated, kept = generated + more, kept + good
            bar.set_postfix_str(f"{1 - kept / generated:.1%} rejected", refresh=False)
            bar.update(more)

        for number in missing:
            engine.make_shard(number, progress)


def pilot(engine: Engine, people: int) -> None:
    """Draw the first people with all thresholds open, and say which thresholds would keep what share."""
    from ..trainer.data.generate.report import table_of_thresholds, thresholds, write_pilot

    if people < 2:
        raise SystemExit(f"lookahead generate: --pilot is {people}: draw 2 people or more.")
    everyone, asked = engine.pilot(range(people))
    page = write_pilot(engine.config, everyone, asked, engine.about())
    print(table_of_thresholds(thresholds(engine.config, everyone)))
    pictures = sum(len(person.pictures) for person in asked)
    kept = sum(len(person.kept()) for person in asked)
    print(f"All together, the configuration keeps {kept} of {pictures} pictures. Written: {page}")


def verify(config: GenerateConfig) -> None:
    from ..trainer.data.shards import Shards, read_index

    paths = Shards(Path(config.out)).paths
    for path in paths:
        read_index(path, whole=True)
    print(f"{len(paths)} shards are whole.")


def read_engine(config: GenerateConfig) -> Engine:
    """The engine with its models. Raises one of `assemble.ERRORS`."""
    from ..trainer.data.generate.engine import Engine

    where = device()
    return Engine(config, read_generator(config, where), read_inspector(config, where))


def device() -> torch.device:
    """A GPU of this process's own where there are some; nothing is exchanged with other processes."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cpu")


def read_generator(config: GenerateConfig, where: torch.device) -> PictureGenerator:
    from ..trainer.data.generate.generators import read_few_step
    from .bases import known_base

    settings = config.generator
    if settings.kind == "drawn":
        from ..mini.generator import DrawnWorld

        return DrawnWorld(settings.size)
    if base := known_base(settings.base):
        return read_few_step(settings, where, base.folder, base.beside)
    return read_few_step(settings, where)


def read_inspector(config: GenerateConfig, where: torch.device) -> Inspector:
    """What looks at pictures. Where the detector is a known base's own, files are measured for beside that base too."""
    from ..lookahead.vision.face_models import FaceModels
    from ..sdxl.load import found
    from ..trainer.data.generate.checks import Inspector
    from ..trainer.data.generate.config import digest
    from ..trainer.data.generate.generators import digest_files, weights_in
    from ..trainer.data.generate.styles import clip_scorer
    from .assemble import PackDetector, read_recogniser
    from .bases import known_base

    checks, about, hashes = config.checks, {}, []
    base = known_base(checks.detector) if checks.detector else None
    beside = (base.beside,) if base else ()
    detector = recogniser = scorer = None
    if checks.detector is not None:
        folder = base.own["detector"] if base else found("detector", checks.detector, section="checks")
        pack = FaceModels(folder, threads=1 if where.type == "cpu" else None)  # torch has the other cores
        detector = PackDetector(pack)
        about["detector"] = {"name": pack.name, "licence": pack.licence}
        hashes.append(digest_files(sorted(pack.folder.glob("*.onnx"))))
    if checks.recogniser is not None:
        path = found("recogniser", checks.recogniser, *beside, section="checks")
        inside = path.resolve() == (pack.recogniser and pack.recogniser.resolve())
        recogniser = read_recogniser(path, pack.preprocessing if inside else None).to(where)
        licence = pack.licence if inside else base.licence if base else "unknown: ask where the recogniser comes from"
        about["recogniser"] = {"name": path.name, "licence": licence}
        hashes.append(digest_files([path]))
    if checks.clip is not None:
        path = found("clip", checks.clip, *beside, section="checks")
        scorer = clip_scorer(path, config.prompts, where)
        hashes.append(digest_files(weights_in(path)))
    return Inspector(detector, recogniser, scorer, about, digest(hashes))


if __name__ == "__main__":
    main()
