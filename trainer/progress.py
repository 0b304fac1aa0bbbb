"""Progress of what comes before or beside a run: a bar in a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn, TypeVar, cast

from tqdm import tqdm

QUIET = 10  # seconds of work of which nothing is said
SELDOM = 30  # seconds between two lines

T = TypeVar("T")


class _Lines:
    """The file of a bar where there is no terminal: each of its states is a line of standard error."""

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            print(text, file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def progress(work: Iterable[T], what: str, **options: Any) -> tqdm[T]:
    """`work`, with its progress shown once it takes longer than a few seconds; options: of tqdm."""
    return cast("tqdm[T]", tqdm(work, what, **_shown(options)))


def counter(what: str, total: int, **options: Any) -> tqdm[NoReturn]:
    """Shows the progress of work that is counted as it is done, by `update`."""
    return tqdm(None, what, total, **_shown(options))


def _shown(options: Mapping[str, Any]) -> dict[str, Any]:
    elsewhere = {} if sys.stderr.isatty() else {"file": _Lines(), "mininterval": SELDOM, "ncols": 100}
    return {"delay": QUIET, **elsewhere, **options}
