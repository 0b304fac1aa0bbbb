"""`lookahead convert`: encoder files of other kinds, and IP-Adapters of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def convert(
    source: Annotated[
        Path,
        typer.Argument(help="Encoder, stock IP-Adapter Plus or the paper's model_ckpt.pt.", show_default=False),
    ],
    target: Annotated[Path, typer.Argument(help=".safetensors file to write.", show_default=False)],
    to: Annotated[Literal["encoder", "ip-adapter"], typer.Option(help="Kind of the new file.")] = "encoder",
    base: Annotated[
        Path | None, typer.Option(help="SDXL's .safetensors file, to compare the paper's checkpoint with.")
    ] = None,
    precision: Annotated[str, typer.Option(help='float16, bfloat16, float32 or "as stored".')] = "float16",
) -> None:
    """Convert encoder files. Of other kinds into ours, or of ours into an IP-Adapter."""
    from ..lookahead.files import convert as files
    from ..lookahead.files.atomic import check_writable

    check_writable(target)
    print(files.convert(source, target, to, base, precision))
    print(f"Written: {target}")
