"""What all tools share: the project's folder, one way to report, one way to fail."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Beside the sources, or, where the package is installed without them, in the user's own folder.
CACHE = (
    ROOT / ".cache"
    if (ROOT / "pyproject.toml").is_file()
    else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lcm-lookahead"
)
VENV = ROOT / ".venv"


class Problem(Exception):
    """Something the user can mend; its text is one clear sentence that is shown without a traceback."""


def say(text: str) -> None:
    """One line of progress. Goes to standard error, so that standard output holds results alone."""
    print(text, file=sys.stderr, flush=True)


def venv_python(venv: Path = VENV) -> Path:
    """The interpreter of the project's environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def site_packages(venv: Path = VENV) -> list[Path]:
    """Finds where the environment's packages lie (one folder; none before it is made)."""
    return list(venv.glob("Lib/site-packages" if os.name == "nt" else "lib/python*/site-packages"))


def cpu_torch(venv: Path = VENV) -> bool:
    """Says whether the environment's torch is a build for CPUs only, by its version file: an import takes seconds.

    A ROCm or XPU build counts as an accelerator build, though its CUDA version is None.
    """
    for version in (folder / "torch" / "version.py" for folder in site_packages(venv)):
        if not version.is_file():
            return False
        scope: dict[str, str] = {}
        for line in version.read_text().splitlines():
            name, _, value = line.partition("=")
            scope[name.split(":")[0].strip()] = value.strip()
        return all(scope.get(name, "None") == "None" for name in ("cuda", "hip", "xpu"))
    return False


def disk_full(error: BaseException) -> bool:
    """Says whether an error tells that the disk, or the user's share of it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Let two `make` calls in one folder do the same set-up one after the other."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f"Waiting for another call that is doing the same ({name}) ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_main(main: Callable[[list[str]], int | None]) -> None:
    """Run a tool's `main(arguments)`: a Problem or a full disk becomes one sentence and exit status 1."""
    try:
        status = main(sys.argv[1:]) or 0
    except Problem as problem:
        print(f"error: {problem}", file=sys.stderr, flush=True)
        status = 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        status = 130
    except OSError as error:
        if not disk_full(error):
            raise
        print(f"error: {full_disk_sentence(error.filename)}", file=sys.stderr, flush=True)
        status = 1
    sys.exit(status)


def full_disk_sentence(path: object = None) -> str:
    """The sentence for a full disk."""
    return (
        f"The disk is full (while writing {path or ROOT}): free some space (a set-up needs about 3 GB), then try again."
    )


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start
