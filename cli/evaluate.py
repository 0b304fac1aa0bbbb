"""`lookahead evaluate`: methods compared as a protocol says, and the studies of the method on the mini world."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..tools.common import ROOT

if TYPE_CHECKING:
    from ..evaluation.harness.protocol import Protocol


def evaluate(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROTOCOL.yaml [section.key=value] | NAME=FILE[@WEIGHT]",
            help="A protocol, with values that take its own's place. With --encoders and --concepts: files by arm. "
            "With --presets: some of them. With --guidance: losses, which are guided by the preset strong alone.",
            show_default=False,
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Run the protocol with its section `full`.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the protocol needs and costs; draw nothing.")
    ] = False,
    card: Annotated[
        str | None, typer.Option(help="With --dry-run: the GPU to reckon with.", show_default="all")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes of this machine that share a protocol's people, at least 1.")
    ] = 1,
    worker: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Draw and judge every N-th person from the I-th on, counted from 0. With --concepts: begin with every "
            "N-th chunk of concepts, and go on with what no other process has made.",
        ),
    ] = None,
    knobs: Annotated[bool, typer.Option("--knobs", help="Study one knob at a time instead.")] = False,
    guidance: Annotated[
        bool, typer.Option("--guidance", help="Study lookahead guidance against plain x0 and none instead.")
    ] = False,
    presets: Annotated[
        bool,
        typer.Option(
            "--presets", help="Study presets of the guidance, each beside the best of as many noises, instead."
        ),
    ] = False,
    encoders: Annotated[
        bool, typer.Option("--encoders", help="Study trained encoders against what training began with instead.")
    ] = False,
    null_text: Annotated[
        bool, typer.Option("--null-text", help="Study an empty negative prompt against zeros instead.")
    ] = False,
    people: Annotated[
        bool, typer.Option("--people", help="Study guidance by two people in one picture instead.")
    ] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Study the presets by layer, and AdaIN in KV injection, instead.")
    ] = False,
    reference_presets: Annotated[
        bool,
        typer.Option("--reference-presets", help="Study the presets of image prompt, KV injection and guider instead."),
    ] = False,
    concepts: Annotated[
        bool, typer.Option("--concepts", help="Study concept encoders (DATE) against tuning without one instead.")
    ] = False,
    tuning_steps: Annotated[
        str | None,
        typer.Option(
            help="With --concepts: tuning steps to draw at, commas between; FILE@0,12 for an arm.",
            show_default="0,2,5,12,25",
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(help="With --concepts: folder of the base.", show_default="that of `mini things`"),
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option("--baselines/--no-baselines", help="With --concepts: the ways without an encoder too, or not."),
    ] = True,
    references: Annotated[
        int | None,
        typer.Option(
            help="Of a study: held-out people (with --people pairs of them, with --concepts things and people) to "
            "draw, at least 10 (--concepts 6).",
            show_default="100; with --knobs, --null-text or --layers 20, --reference-presets 24, --guidance, --presets "
            "or --encoders 96, --people 48, --concepts 144",
        ),
    ] = None,
    first: Annotated[
        int,
        typer.Option(
            help="With --encoders, --guidance, --presets, --people, --reference-presets: number of the first of the "
            "people, from 0."
        ),
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the page, its figures and pictures.", show_default="the protocol's; docs"),
    ] = None,
) -> None:
    """Compare methods as a protocol says (docs/evaluate.md), or run a study of the method on the mini world.

    The same command again goes on where it stopped. Studies: image prompt, KV injection or lookahead guidance in a real
    ComfyUI. Files of one NAME are one arm, trained with several seeds; FILE@0.75 draws with that weight of the image
    prompt.
    """
    studies = {
        "knobs": knobs,
        "guidance": guidance,
        "presets": presets,
        "people": people,
        "encoders": encoders,
        "null-text": null_text,
        "layers": layers,
        "reference-presets": reference_presets,
        "concepts": concepts,
    }
    chosen = [name for name, on in studies.items() if on]
    if len(chosen) > 1:
        raise typer.BadParameter(f"--{chosen[0]} and --{chosen[1]} are studies of their own: give one of them.")
    given = list(arguments or ())
    if given and not chosen and given[0].endswith((".yaml", ".yml")):
        return by_protocol(given[0], given[1:], full, out, worker, processes, card if dry_run else None, dry_run)
    if (encoders or concepts) != bool(given) and not (presets or guidance):
        raise typer.BadParameter(
            "--encoders and --concepts go with files (NAME=FILE), and files go with one of the two; a protocol is a "
            "file that ends in .yaml."
        )
    from ..lookahead.files.atomic import check_writable

    out = out or ROOT / "docs"
    check_writable(out, folder=True)
    from ..mini.studies.evaluate import ConceptOptions
    from ..mini.studies.evaluate import evaluate as study
    from .generate import asked_worker

    options = None
    if concepts or worker or tuning_steps is not None or base is not None or not baselines:
        options = ConceptOptions(tuning_steps, base, asked_worker(worker) if worker else (0, 1), baselines)
    study(chosen[0] if chosen else "reference", out, references, given, first, options)


def by_protocol(
    path: str,
    overrides: list[str],
    full: bool,
    out: Path | None,
    worker: str | None,
    processes: int,
    card: str | None,
    dry_run: bool,
) -> None:
    """Run a protocol, or its share of a worker; the page is written by whoever finds all of it there."""
    from ..evaluation.harness import protocol as protocols
    from ..evaluation.harness.report import write
    from ..evaluation.harness.run import EvaluationRun
    from .generate import asked_worker
    from .world import world_of

    chosen = [f"out={out}"] if out else []
    protocol = protocols.load(_found(path), [*overrides, *chosen], full)
    if dry_run:
        return print(dry(protocol, path, full, card))
    if processes > 1:
        _in_processes(path, [*overrides, *chosen], full, processes)
        worker = None
    number, workers = asked_worker(worker) if worker else (0, 1)
    run = EvaluationRun(protocol, world_of(protocol), number, workers)
    for warning in run.warnings:
        print(f"Warning: {warning}", file=sys.stderr)
    run.draw()
    run.score()
    if missing := run.missing():
        print(f"{missing} pictures are other workers' and not there or not judged yet: the last one writes the page.")
    else:
        page = write(run)
        print((run.folder / "table.md").read_text(encoding="utf-8"))
        print(f"Written: {page}")


def _found(path: str) -> Path:
    """A protocol's path, or the name of one that ships."""
    from ..evaluation.harness.protocol import PROTOCOLS

    return Path(path) if Path(path).exists() or "/" in path or not (PROTOCOLS / path).exists() else PROTOCOLS / path


def _in_processes(path: str, overrides: list[str], full: bool, processes: int) -> None:
    """Have the people drawn and judged by several processes. What one leaves undone, this one does afterwards."""
    command = [sys.executable, "-m", f"{__package__}.main", "evaluate", path, *overrides, *(["--full"] if full else [])]
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // processes))
    environment = os.environ | {"OMP_NUM_THREADS": threads}  # more threads than cores wait for each other
    running = [subprocess.Popen([*command, "--worker", f"{n}/{processes}"], env=environment) for n in range(processes)]
    try:
        codes = [one.wait() for one in running]
    except BaseException:
        for one in running:
            one.terminate()
        raise
    if any(codes):
        raise SystemExit(next(code for code in codes if code))


def dry(protocol: Protocol, path: str, full: bool, card: str | None) -> str:
    """The dry run of a protocol, as text."""
    from ..evaluation.harness.cost import cost, text
    from ..evaluation.harness.people import count_people
    from ..mini import judges
    from .world import library_of

    people = count_people(protocol.people, {"drawn": judges.DRAWN})
    command = f"lookahead evaluate {path}{' --full' if full else ''}"
    return text(protocol, cost(protocol, library_of(protocol), people), command, card)
