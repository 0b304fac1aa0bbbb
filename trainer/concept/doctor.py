"""A folder of pictures as the training of a concept encoder sees it, looked at before the training."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from ...lookahead.method.concept_input import ConceptError, check_picture
from ...sdxl.images import PictureError, read
from ..progress import progress
from .source import picture_files

SHOWN = 10  # of a kind


@dataclass
class PictureReport:
    """A folder holds this. faults: what is wrong with a picture that cannot be used, a sentence each; small: pictures
    with fewer pixels than they are trained with; copies: pictures that are another one, pixel by pixel."""

    folder: Path
    size: int
    pictures: int = 0
    faults: list[str] = field(default_factory=list)
    small: list[str] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        """Tells whether a training run would stop at one of the pictures."""
        return bool(self.faults)

    def __str__(self) -> str:
        rows = [f"{self.folder}: {self.pictures} pictures, trained with {self.size} pixels a side"]
        for kind, names in (
            ("cannot be used; take them out", self.faults),
            ("are smaller than that, and will be enlarged", self.small),
            ("are another picture pixel by pixel, and count twice", self.copies),
        ):
            if names:
                rows += [f"{len(names)} {kind}:", *(f"  {name}" for name in names[:SHOWN])]
                rows += [f"  and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
        return "\n".join(rows if len(rows) > 1 else [*rows, "Nothing is wrong with them."])


def examine_pictures(folder: Path, size: int, endings: Collection[str]) -> PictureReport:
    """Look at every file of a folder with one of these endings. Raises ConceptDataError, one sentence, where there are
    none."""
    report, seen = PictureReport(folder, size), set()
    for path in progress(picture_files(folder, endings), "Pictures read"):
        name = path.relative_to(folder).as_posix()
        report.pictures += 1
        try:
            pixels = read(path)
            check_picture(pixels.shape[-2], pixels.shape[-1], name)
        except (PictureError, ConceptError) as error:
            report.faults.append(str(error))
            continue
        if min(pixels.shape[-2:]) < size:
            report.small.append(f"{name} ({pixels.shape[2]} x {pixels.shape[1]})")
        digest = hashlib.sha256(pixels.numpy().tobytes()).digest()
        if digest in seen:
            report.copies.append(name)
        seen.add(digest)
    return report
