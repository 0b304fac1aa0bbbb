"""The example pictures of the workflows, put where Load Image finds them."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import folder_paths

from ..lookahead.files.atomic import atomic

EXAMPLES = Path(__file__).resolve().parent.parent / "workflows" / "input"


def put_examples(source: Path = EXAMPLES) -> None:
    """Copy the example pictures into the host's input folder, where they are not there yet.

    So every workflow opens with pictures and can be queued at once, and one's own are chosen in the same Load Image. No
    file is overwritten; where the folder cannot be written, a line of the log says so and all else works.
    """
    target = Path(folder_paths.get_input_directory())
    try:
        target.mkdir(parents=True, exist_ok=True)
        for picture in sorted(source.glob("lookahead_*")):
            place = target / picture.name
            if not place.exists():
                with atomic(place) as part:
                    shutil.copyfile(picture, part)
    except OSError as error:
        logging.info(
            "[LCM-Lookahead] the example pictures of the workflows could not be put into %s: %s.",
            target,
            error.strerror,
        )
