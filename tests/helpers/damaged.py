"""Files that were cut short, at the nodes that load them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sentences import one_sentence


def check_that_nothing_is_kept_of_a_file_cut_short(path: Path, load: Callable[[], Any]) -> None:
    """The node says so in a sentence; of the file's tensors none is left, nor a model or a file; whole, it loads."""
    import comfy.model_management

    def around() -> tuple[list[str], int, int]:
        gc.collect()
        tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
        names = sorted(file.name for file in path.parent.iterdir())
        return names, len(comfy.model_management.current_loaded_models), tensors

    whole = path.read_bytes()
    load()
    before = around()
    for size in (len(whole) // 2, len(whole) - 1, 10, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError) as error:
            load()
        one_sentence(error)
        del error
    assert around() == before
    path.write_bytes(whole)
    load()
