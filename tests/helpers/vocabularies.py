"""CLIP's vocabulary, which nearly every test that loads a model reads twice, read once in a session.

A tenth to a third of a second each time, for what never differs: it is known by what the files of its folder hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def read_once() -> Iterator[None]:
    """Gives the same tokenizer where the same files are read in the same way. Nothing of the project changes one."""
    import lcm_lookahead.sdxl  # noqa: F401  (it cures what the next needs)
    from transformers import CLIPTokenizer

    read, known = CLIPTokenizer.from_pretrained, {}

    def from_pretrained(pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> CLIPTokenizer:
        where = Path(pretrained_model_name_or_path) / options.get("subfolder", "")
        if not where.is_dir():
            return read(pretrained_model_name_or_path, *args, **options)
        files = tuple((file.name, hashlib.sha256(file.read_bytes()).digest()) for file in sorted(where.glob("*.*")))
        key = files, args, repr(sorted(options.items()))
        if key not in known:
            known[key] = read(pretrained_model_name_or_path, *args, **options)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CLIPTokenizer, "from_pretrained", from_pretrained)
        yield
