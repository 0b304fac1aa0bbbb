"""`lookahead doctor`: a folder of pictures, seen as a training run sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    data: Annotated[
        str, typer.Argument(help="Folder of pictures or shards, or the YAML file of a run.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="key=value", help="Values of section data, such as size=768.", show_default=False),
    ] = None,
    detector: Annotated[
        Path | None, typer.Option(help="Folder of an insightface pack.", show_default="that of the run")
    ] = None,
) -> None:
    """Examine a folder of pictures or shards. It is read as a training run would read it; status 1 if something is
    wrong."""
    from ..trainer.data.doctor import examine
    from ..trainer.data.doctor_shards import examine_shards
    from ..trainer.data.sharded import holds_shards
    from ..trainer.lookahead.config import data_alone, load
    from .assemble import open_detector

    if Path(data).suffix in (".yaml", ".yml"):
        config = load(data, [f"data.{override}" for override in overrides or []])
        settings, pack = config.data, detector or config.model.detector
    else:
        settings, pack = data_alone(data, overrides or []), detector
    if holds_shards(settings.source):
        report = examine_shards(settings)
    else:
        report = examine(settings, open_detector(str(pack)) if pack else None, str(pack))
    print(report)
    if report.wrong:
        raise SystemExit(1)
