"""`lookahead generate`: a data set of consistent people."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from .options import Overrides, Worker

if TYPE_CHECKING:
    from ..trainer.data.generate.config import GenerateConfig
    from ..trainer.data.generate.engine import Engine

NAMES_WARNING = (
    "Warning: `names` makes pictures of real people. Their likeness is theirs: make sure that you may use it, and do "
    "not publish these pictures, or models trained on them, without their consent."
)

PILOT = 50  # people of a pilot that does not say how many


class GenerateCommand(TyperCommand):
    """The command, whose --pilot also stands without a number."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for n, (word, following) in enumerate(zip(args, [*args[1:], ""], strict=True)):
            if word == "--pilot" and not following.isdecimal():
                args[n] = f"--pilot={PILOT}"
        return super().parse_args(ctx, args)


def generate(
    config: Annotated[
        Path,
        typer.Argument(help="YAML file of the set, such as trainer/configs/generate/sdxl.yaml.", show_default=False),
    ],
    overrides: Overrides = None,
    shards: Annotated[
        str | None, typer.Option(metavar="A-B", help="Shards to make, both included.", show_default="all")
    ] = None,
    worker: Worker = None,
    pilot: Annotated[
        int | None,
        typer.Option(
            metavar="[N]",
            min=2,
            help=f"People to try, {PILOT} if not said: write pilot.html, with thresholds, and no shard.",
        ),
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Write report.html of what is there; make nothing.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print disk, GPU hours and commands; make nothing.")] = False,
    prices: Annotated[
        str | None, typer.Option(metavar="h100=2.5,...", help="Prices of a GPU's hour, for --plan.", show_default=False)
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Compare the finished shards with their hashes.")] = False,
) -> None:
    """Generate a data set of consistent people. The same command again goes on where it stopped."""
    from ..lookahead.files.atomic import check_writable
    from ..trainer.data.generate.config import load
    from ..trainer.data.generate.report import write_report
    from ..trainer.data.store import is_remote
    from .engine import read_engine

    settings = load(config, overrides or [])
    if not (verify or plan or is_remote(settings.out)):
        check_writable(Path(settings.out), folder=True)
    if settings.names is not None:
        print(NAMES_WARNING, file=sys.stderr)
    if verify:
        print(f"{verify_shards(settings)} shards are whole.")
    elif plan:
        from .plan import describe, make_plan, parse_prices

        print(describe(make_plan(settings), config, parse_prices(prices)))
    elif report:
        print(f"Written: {write_report(settings)}")
    else:
        if settings.launch.engine != "none" and pilot is None:
            return launch_shards(settings)
        (number, workers), numbers = asked_worker(worker), asked_shards(shards, settings.shards)
        engine = read_engine(settings)
        if pilot is not None:
            return write_pilot(engine, pilot)
        make_shards(engine, numbers[number::workers])
        if not engine.missing(range(settings.shards)):
            print(f"Written: {write_report(settings)}")


def launch_shards(config: GenerateConfig) -> None:
    """Have an engine make what is missing; then, but for SLURM, whose tasks come later, the report."""
    from ..trainer.data.generate.report import write_report
    from ..trainer.data.shards import shard_name
    from ..trainer.data.store import Store
    from ..trainer.data.tars import ShardError, index_name
    from .launch import launch

    launch(config)
    if config.launch.engine == "slurm":
        return print("Submitted. When the job has ended, the same command makes what is missing; --report the report.")
    there = Store(config.out).names()
    if missing := [n for n in range(config.shards) if index_name(shard_name(n)) not in there]:
        raise ShardError(
            f"{len(missing)} of {config.shards} shards are not made, the first is {missing[0]}: the engine's logs say "
            "why; the same command goes on."
        )
    print(f"Written: {write_report(config)}")


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


def make_shards(engine: Engine, numbers: Sequence[int]) -> None:
    """Make what is missing of these shards, with progress on stderr."""
    from ..trainer.progress import counter

    missing, config = engine.missing(numbers), engine.config
    generated = kept = 0
    total = len(missing) * config.people_per_shard * config.prompts.per_person
    if len(missing) < len(numbers):
        print(f"{len(numbers) - len(missing)} of {len(numbers)} shards are finished already.", file=sys.stderr)
    with counter("Pictures drawn", total, unit=" pictures", delay=0, disable=not missing) as bar:

        def count(more: int, good: int) -> None:
            nonlocal generated, kept
            generated, kept = generated + more, kept + good
            bar.set_postfix_str(f"{1 - kept / generated:.1%} rejected", refresh=False)
            bar.update(more)

        for number in missing:
            engine.make_shard(number, count)


def write_pilot(engine: Engine, people: int) -> None:
    """Generate the first people with all thresholds open; print and write which thresholds would keep what share."""
    from ..trainer.data.generate import report

    opened, asked = engine.pilot(range(people))
    page = report.write_pilot(engine.config, opened, asked, engine.about())
    print(report.table_of_thresholds(report.thresholds(engine.config, opened)))
    pictures, kept = (sum(map(len, of)) for of in ([p.pictures for p in asked], [p.kept() for p in asked]))
    print(f"All together, the configuration keeps {kept} of {pictures} pictures. Written: {page}")


def verify_shards(config: GenerateConfig) -> int:
    """Counts the shards. Raises ShardError, one sentence, for one that is damaged."""
    from ..trainer.data.shards import PEOPLE, Shards
    from ..trainer.data.store import Store
    from ..trainer.data.tars import read_index

    shards = Shards(Store(config.out))
    for name in shards.names:
        read_index(shards.store, name, PEOPLE, whole=True)
    return len(shards.names)
