"""Pages from templates: the one way in which they are read."""

from __future__ import annotations

from pathlib import Path

import jinja2


def templates(folder: Path, autoescape: bool = False) -> jinja2.Environment:
    """Reads the templates of a folder. A name that a page does not get is an error; lines of statements leave none.

    autoescape: for HTML.
    """
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
