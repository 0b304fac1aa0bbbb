"""A training run of any recipe, as the commands start it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..trainer.config import RunConfig
    from ..trainer.recipe import Recipe, Source


def run(settings: RunConfig, assemble: Callable[[], tuple[Recipe, Source]]) -> None:
    """Train the recipe that `assemble` gives, with its prepared source, and say what was written.

    Where the run cannot write, or another one is at work in the same place, it is refused before the models are read.
    """
    import torch

    from ..lookahead.files.atomic import check_writable
    from ..trainer.alone import refuse_a_second
    from ..trainer.train import train

    out = Path(settings.out)
    try:
        check_writable(out, folder=True)
        refuse_a_second(out)  # (and so does the loop, but it begins after what takes long)
        recipe, source = assemble()
        written = train(settings, recipe, source)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # else its threads may end the process with SIGABRT
    if written is not None and os.environ.get("RANK", "0") == "0":  # one of several processes
        print(f"Written: {written}")
