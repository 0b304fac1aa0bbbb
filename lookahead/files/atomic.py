"""Files and folders that stand at their place whole or not at all, and what an error says in one line."""

from __future__ import annotations

import os
import shutil
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
    part = _beside(path)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], over: bool = False) -> Iterator[Path]:
    """The block fills the yielded folder beside `path`, which takes its name when the block ends without an error.

    What stood there stays until then, and after an error, which leaves nothing new. Folders above it are made. over: a
    folder that holds something gives way; without, it stays, and OSError is raised.
    """
    path = Path(path)
    part = _beside(path)
    part.mkdir(parents=True)
    try:
        yield part
        if over and path.exists():
            before = _beside(path)
            os.replace(path, before)
            try:
                os.replace(part, path)
            except OSError:  # another process may have put its own there
                if not path.exists():
                    os.replace(before, path)
                raise
            finally:
                shutil.rmtree(before, ignore_errors=True)
        else:
            if path.exists():
                path.rmdir()
            os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")


def check_writable(path: Path, folder: bool = False) -> None:
    """Look whether a file (or a folder) can be written at `path` later, before the work that it is for; makes nothing.

    Raises OSError, one sentence.
    """
    if not folder and path.is_dir():
        raise OSError(f"{path} is a folder, and a file is to be written there: name a file.")
    place = (path if folder else path.parent).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise OSError(f"{place} is a file, and a folder is needed there to write in: name another.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise OSError(f"The folder {place} cannot be written in: name another, or have its permissions changed.")


def first_line(error: BaseException, limit: int = 200) -> str:
    """An error of another package, or of the system, fits into a sentence of ours: its first line without number and
    full stop, at most `limit` characters; its class where it says nothing."""
    text = (isinstance(error, OSError) and error.strerror) or str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")[:limit]
