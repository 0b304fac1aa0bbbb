"""One run at a time in a folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from .checkpoints import TrainingError

NAME = ".running"  # of the file that is locked
_held: list[TextIO] = []  # files that are locked here


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within it, no other process is alone in that folder, which is made.

    The system forgets it with the process, however that ends; where it knows no locks (some network file systems), it
    holds nobody off.

    Raises TrainingError, one sentence, where a run is under way there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / NAME).open("a+", encoding="utf-8") as file:
        try:
            _lock(file.fileno())
        except BlockingIOError:
            file.seek(0)
            raise TrainingError(
                f"Another run ({file.read().strip() or 'of another process'}) is under way in {folder}: wait until it "
                "has ended, stop it, or give another `out`."
            ) from None
        except OSError:
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        _held.append(file)
        try:
            yield
        finally:
            _held.remove(file)


def _let_go() -> None:
    """In a worker that was forked off, which would hold the lock for a moment after a run that was killed."""
    while _held:
        _held.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def refuse_a_second(folder: Path) -> None:
    """Raises TrainingError, one sentence, where a run of other processes than this one's is under way in a folder."""
    if os.environ.get("RANK", "0") == "0" and (folder / NAME).exists():
        with alone(folder):
            pass


def _lock(file: int) -> None:
    """Raises BlockingIOError where another one has the lock, OSError where there are none."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except PermissionError:
            raise BlockingIOError from None
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
