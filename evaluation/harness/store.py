"""What is kept of an evaluation: pictures by what they depend on, and raw scores as lines, one file a worker.

    references/NAME.png      who
    pictures/KEY.png         what was drawn; KEY is a hash of all that it depends on
    drawn-0.jsonl            a line a picture: key, arm, person, prompt, seed, seconds, bytes of memory, back end
    scores-0.jsonl           a line a score: key, measure, value, judge
    counts/KEY.json          how many pictures fit into another method's time, as it was found first

A line is written when its picture is there. A run that is killed loses the picture that it was at; a line that was cut
short is not read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ...lookahead.files.atomic import atomic

FORMAT = 1  # another number has everything drawn and scored anew


def digest(*parts: object) -> str:
    """Hash of what something depends on, as it prints."""
    return hashlib.sha256(repr((FORMAT, *parts)).encode()).hexdigest()[:32]


class EvaluationStore:
    """The folder of an evaluation, as one worker sees it. Others' lines are read when it is opened and by `refresh`."""

    def __init__(self, folder: Path, worker: int = 0):
        self.folder, self.worker = folder, worker
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        self.drawn: dict[str, dict[str, Any]] = {}
        self.scores: dict[str, float | None] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read what other workers have kept by now."""
        self.drawn |= {line["key"]: line for line in _lines(self.folder, "drawn")}
        self.scores |= {line["key"]: line["value"] for line in _lines(self.folder, "scores")}

    def picture(self, key: str) -> Path:
        """The file of a picture, whether it is there or not."""
        return self.folder / "pictures" / f"{key}.png"

    def has(self, key: str) -> bool:
        """Tells whether a picture and its line are there."""
        return key in self.drawn and self.picture(key).is_file()

    def keep(self, key: str, image: Image.Image, about: dict[str, Any]) -> None:
        """Keep a picture, then its line."""
        with atomic(self.picture(key)) as part:
            image.save(part, "PNG")
        self.drawn[key] = {"key": key, **about}
        self._append("drawn", self.drawn[key])

    def keep_score(self, key: str, value: float | None, about: dict[str, Any]) -> None:
        """Keep a score."""
        self.scores[key] = value
        self._append("scores", {"key": key, "value": value, **about})

    def count(self, key: str, found: Callable[[], int]) -> int:
        """The number that was found first under this key, by whichever worker."""
        known, path = self.counted(key), self._count(key)
        if known is None:
            path.parent.mkdir(exist_ok=True)
            part = path.with_name(f".{key}.{self.worker}.part")
            part.write_text(json.dumps(found()) + "\n")
            try:
                os.link(part, path)  # whole, and never over another worker's
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                if not path.exists():
                    os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
        return known or int(json.loads(path.read_text()))

    def counted(self, key: str) -> int | None:
        """The number that was found under this key, None where there is none."""
        path = self._count(key)
        return int(json.loads(path.read_text())) if path.exists() else None

    def counted_by_name(self, name: str) -> int | None:
        """The number that an earlier version of this code kept under a name."""
        path = self.folder / "counts.json"
        return json.loads(path.read_text()).get(name) if path.exists() else None

    def _count(self, key: str) -> Path:
        return self.folder / "counts" / f"{key}.json"

    def _append(self, kind: str, line: dict[str, Any]) -> None:
        path = self.folder / f"{kind}-{self.worker}.jsonl"
        text = json.dumps(line, ensure_ascii=False) + "\n"
        with path.open("ab") as file:
            if file.tell() and not _ends_a_line(path):
                text = "\n" + text
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _lines(folder: Path, kind: str) -> Iterator[dict[str, Any]]:
    """The whole lines of all workers' files; one that was cut short by a kill is left out."""
    for path in sorted(folder.glob(f"{kind}-*.jsonl")):
        for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            # (splitlines would cut at U+2028, which JSON may hold)
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and "key" in line:
                yield line
