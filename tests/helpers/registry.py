"""The archive of the Comfy registry, built by its own tool."""

import os
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def write_archive(path: Path) -> None:
    """Write what the registry's tool would send of this repository, as a zip file."""
    os.environ["DO_NOT_TRACK"] = "1"
    from comfy_cli.file_utils import zip_files

    includes = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["comfy"]["includes"]
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        zip_files(str(path), includes)
    finally:
        os.chdir(before)
