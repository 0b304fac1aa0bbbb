"""Files that stand at their place whole or not at all, and what an error says in one line."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The block writes to the yielded path beside `path`, which takes its name when the block ends without an error.

    What stood there stays until then, and after an error nothing new is left. The folder must exist.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def first_line(error: BaseException, limit: int = 200) -> str:
    """An error of another package fits into a sentence of ours: its first line without the full stop, at most `limit`
    characters; its class where it says nothing."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")[:limit]
