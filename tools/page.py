"""What ComfyUI's own web page makes of a workflow file, with stand-ins for all files that the shared workflows name.

python -m lcm_lookahead.tools.page workflows/image_prompt.json             what the page has to say against it
python -m lcm_lookahead.tools.page workflows/image_prompt.json --save      write it again as the page saves it
python -m lcm_lookahead.tools.page workflows/image_prompt.json --picture   draw its thumbnail beside it
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from PIL import Image

from ..host.page import Page, page_host, text_of
from ..host.workflow import load, pictures_named
from ..mini.files.host_models import touch_models
from ..mini.world.references import reference_faces
from .common import ROOT, run_main, say


def stand_ins(base: Path) -> None:
    """Put what the shared workflows name into a host's base directory: empty model files (the page reads their names
    alone) and pictures of drawn faces."""
    touch_models(base)
    names = pictures_named(sorted((ROOT / "workflows").glob("*.json")))
    faces = (reference_faces(len(names), size=256) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    for name, pixels in zip(names, faces, strict=True):
        Image.fromarray(pixels).save(base / "input" / name)


def main(arguments: list[str]) -> int:
    """Entry point of `python -m lcm_lookahead.tools.page`."""
    parser = argparse.ArgumentParser(prog="tools.page", description="Shows a workflow file to ComfyUI's own page.")
    parser.add_argument("workflow", type=Path)
    parser.add_argument("--save", action="store_true", help="write the file again as the page saves it")
    parser.add_argument("--picture", action="store_true", help="draw the thumbnail beside the file")
    parser.add_argument("--result", type=Path, help="a picture that the thumbnail shows as the saved one")
    chosen = parser.parse_args(arguments)
    with page_host(stand_ins) as host, Page(host.url) as page:
        page.open(load(chosen.workflow))
        if chosen.save:
            chosen.workflow.write_text(text_of(page.saved()), encoding="utf-8")
            say(f"{chosen.workflow} is written as the page saves it")
        if chosen.result:
            shutil.copy(chosen.result, host.folder("output"))
            page.show_result("SaveImage", chosen.result.name)
        if chosen.picture:
            picture = page.picture()
            picture.thumbnail((1200, 1200))
            picture.save(chosen.workflow.with_suffix(".jpg"), quality=88, optimize=True)
            print(chosen.workflow.with_suffix(".jpg"))
        complaints = page.complaints()
    print("\n".join(complaints) or "The page has nothing to say against it.")
    return 1 if complaints else 0


if __name__ == "__main__":
    run_main(main)
