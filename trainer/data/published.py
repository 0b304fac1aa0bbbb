"""The layout of the paper's own generated data: one flat metadata.json, what is shown in the names of the files.

    metadata.json                                           {"old woman/vanilla/A_photo_of_…_482.jpg": "old woman"}
    old woman/vanilla/A_photo_of_conceptname_482.jpg        a plain picture, which may be a reference
    old woman/stylized/A_drawing_of_conceptname_9021.jpg    of anything else

A caption is the file's name without the seed, and with `a face` in the place of the person.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

CONCEPT, FACE = "conceptname", "a face"
PLAIN, OTHERS = "vanilla", "stylized"  # folders


def rows(table: Mapping[str, object]) -> Iterator[dict[str, object]]:
    """Gives what a metadata file with a line a picture would say."""
    for file, person in table.items():
        path = PurePosixPath(file.replace("\\", "/"))
        yield {
            "file_name": path.as_posix(),
            "person": str(person),
            "text": caption(path.stem, str(person)),
            "reference": PLAIN in path.parts or OTHERS not in path.parts,
        }


def caption(stem: str, person: str) -> str | None:
    """The caption in a file's name; None where there is nothing but a number."""
    words = stem.replace("_", " ").split()
    if words and words[-1].isdigit():  # the seed
        words.pop()
    said = " ".join(words)
    for who in (CONCEPT, person):
        said = re.sub(rf"(?<!\w)(?:an? )?{re.escape(who)}(?!\w)", FACE, said, flags=re.IGNORECASE)
    return said or None
