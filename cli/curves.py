"""`lookahead curves`: the curves of training runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def curves(
    folders: Annotated[list[Path], typer.Argument(metavar="OUT", help="Folder `out` of each run.", show_default=False)],
    to: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("curves.png"),
) -> None:
    """Plot the curves of runs. Those still under way are plotted too."""
    from ..lookahead.files.atomic import check_writable
    from ..trainer.curves import curves as plot
    from ..trainer.lookahead.recipe import PANELS
    from ..trainer.noise_guide.recipe import PANELS as GUIDE_PANELS

    check_writable(to)
    print(f"Written: {plot(folders, PANELS | GUIDE_PANELS, to)}")
