"""`lookahead doctor`: a folder of pictures, seen as a training run sees it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..trainer.data.doctor import Report
    from ..trainer.lookahead.config import Data


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
    from ..trainer.lookahead.config import data_alone, load

    if Path(data).suffix in (".yaml", ".yml"):
        config = load(data, [f"data.{override}" for override in overrides or []])
        settings, pack = config.data, detector or config.model.detector
    else:
        settings, pack = data_alone(data, overrides or []), detector
    report = examined(settings, None if pack is None else str(pack))
    print(report)
    if report.wrong:
        raise SystemExit(1)


def examined(data: Data, pack: str | None) -> Report:
    """Says what a run would make of its data. pack: folder of the detector's pack, None to look for no faces."""
    from ..trainer.data.doctor import examine
    from ..trainer.data.doctor_shards import examine_shards
    from ..trainer.data.sharded import holds_shards
    from .assemble import open_detector

    if holds_shards(data.source):
        return examine_shards(data)
    return examine(data, open_detector(pack) if pack else None, str(pack))
