"""`lookahead study`: people compare two methods' pictures, blind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="study", help="Let people compare two methods' pictures, blind.", no_args_is_help=True)


@app.command()
def make(
    first: Annotated[
        str,
        typer.Argument(
            help="Folder with the pictures of one method; with --evaluation METHOD[@WEIGHT].", show_default=False
        ),
    ],
    second: Annotated[
        str, typer.Argument(help="Folder with those of the other, under the same names.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="New folder that the study is written to.", show_default=False)],
    evaluation: Annotated[
        Path | None,
        typer.Option(help="Folder of a finished `lookahead evaluate`, of whose methods two are compared."),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(
            help="Names of the two methods, with a comma between.",
            show_default="first,second; with --evaluation the methods'",
        ),
    ] = None,
    references: Annotated[
        Path | None, typer.Option(help="Folder with a reference for each picture, under its name.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSON file: name of the picture -> its prompt.")] = None,
    questions: Annotated[str, typer.Option(help="Questions to ask.")] = "identity,prompt,overall",
    repeats: Annotated[
        float, typer.Option(min=0, max=1, help="Share of pairs that are shown twice, sides turned, from 0 to 1.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of the sides and the order.")] = 0,
) -> None:
    """Write the page of a study. Give judges the folder `public` of it, or serve it."""
    from ..evaluation import preference
    from ..lookahead.files.atomic import check_writable

    check_writable(out, folder=True)
    if evaluation and (references or prompts):
        raise preference.StudyError(
            "An evaluation has its references and prompts: leave --references and --prompts out."
        )
    methods = tuple(names.split(",")) if names else (first, second) if evaluation else ("first", "second")
    if len(methods) != 2 or not all(methods):
        raise preference.StudyError(
            f"--names is {names!r}: give two names with a comma between, such as ours,baseline."
        )
    try:
        known = json.loads(prompts.read_text(encoding="utf-8-sig")) if prompts else None
    except ValueError as error:
        raise preference.StudyError(f"--prompts is {prompts}, which is no JSON in UTF-8 ({error}).") from None
    if evaluation:
        pairs = preference.pairs_in(evaluation, first, second)
    else:
        pairs = preference.pairs_of(Path(first), Path(second), references, known)
    page = preference.make_study(out, pairs, methods, questions.split(","), repeats, seed)
    print(f"Written: {page} ({len(pairs)} pairs). Keep {out / 'key.json'} from the judges.")


@app.command()
def serve(
    folder: Annotated[Path, typer.Argument(help="Folder of the study.", show_default=False)],
    port: Annotated[int, typer.Option(help="Port of 127.0.0.1; 0 takes a free one.")] = 0,
) -> None:
    """Serve a study on this machine and collect the answers, until Ctrl+C."""
    from ..evaluation import preference

    if not (folder / "public" / "index.html").is_file():
        raise preference.StudyError(f"{folder} is no study: name the folder that `lookahead study make` wrote.")
    with preference.server(folder, port) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}/   (Ctrl+C ends it)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


@app.command()
def count(
    folder: Annotated[Path, typer.Argument(help="Folder of the study.", show_default=False)],
    files: Annotated[
        list[Path] | None, typer.Argument(help="Answers that judges saved as files.", show_default=False)
    ] = None,
    to: Annotated[Path | None, typer.Option(help="JSON file that the figures are written to.")] = None,
) -> None:
    """Say what the judges chose, with intervals and how far they agree."""
    from ..evaluation import preference
    from ..lookahead.files.atomic import check_writable

    if to:
        check_writable(to)
    verdicts, steady = preference.count(folder, files or [])
    methods = tuple(json.loads((folder / "key.json").read_text(encoding="utf-8"))["methods"])
    print(preference.table(verdicts, methods))
    for judge, share in sorted(steady.items(), key=lambda pair: pair[1]):
        print(f"judge {judge}: {share:.0%} of the repeated pairs answered alike")
    if to:
        to.write_text(json.dumps(preference.as_values(verdicts), indent=1) + "\n", encoding="utf-8")
