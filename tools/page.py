"""What ComfyUI's own web page makes of a workflow file, with stand-ins for all files that the shared workflows name.

python -m lcm_lookahead.tools.page my.json                     what the page has to say against it
python -m lcm_lookahead.tools.page my.json --save              write it again as the page saves it
python -m lcm_lookahead.tools.page my.json --picture my.png    draw the graph
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..host.page import Page, page_host, text_of
from ..host.workflow import load
from ..mini.files.host_models import touch_models
from .common import run_main, say


def main(arguments: list[str]) -> int:
    """Entry point of `python -m lcm_lookahead.tools.page`."""
    parser = argparse.ArgumentParser(prog="tools.page", description="Shows a workflow file to ComfyUI's own page.")
    parser.add_argument("workflow", type=Path)
    parser.add_argument("--save", action="store_true", help="write the file again as the page saves it")
    parser.add_argument("--picture", type=Path, help="draw the graph into this file")
    chosen = parser.parse_args(arguments)
    with page_host(touch_models) as host, Page(host.url) as page:
        page.open(load(chosen.workflow))
        if chosen.save:
            chosen.workflow.write_text(text_of(page.saved()), encoding="utf-8")
            say(f"{chosen.workflow} is written as the page saves it")
        if chosen.picture:
            page.picture().save(chosen.picture)
            print(chosen.picture)
        complaints = page.complaints()
    print("\n".join(complaints) or "The page has nothing to say against it.")
    return 1 if complaints else 0


if __name__ == "__main__":
    run_main(main)
