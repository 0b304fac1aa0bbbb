"""Builds what is there: an archive of the pack alone (.comfyignore) lacks some rooms that pyproject.toml names, among
them the one of the command `lookahead`.

On a package index the README stands without the files around it: there its links and pictures lead to the repository,
whose address is [project.urls] Repository of pyproject.toml, and nothing else.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?![a-z]+:|#)(?P<target>[^)\s]+)\)")


class Build(build_py):
    """Takes the packages whose folders exist."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.packages = [name for name in self.packages if Path(self.get_package_dir(name)).is_dir()]


def commands(root: Path = ROOT) -> list[str]:
    """The commands that are installed: `lookahead`, where its room is there."""
    return ["lookahead = lcm_lookahead.cli.main:main"] if (root / "cli").is_dir() else []


def with_address(text: str, address: str) -> str:
    """Markdown whose links to files of the repository are whole addresses: of pictures the file, of others its page."""

    def whole(match: re.Match[str]) -> str:
        kind = "raw" if match["picture"] else "blob"
        return f"{match['picture']}[{match['text']}]({address}/{kind}/HEAD/{match['target']})"

    return LINK.sub(whole, text)


def readme() -> str:
    """The README as a package index shows it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return with_address((ROOT / "README.md").read_text(encoding="utf-8"), project["urls"]["Repository"])


if __name__ == "__main__":
    setup(
        cmdclass={"build_py": Build},
        entry_points={"console_scripts": commands()},
        long_description=readme(),
        long_description_content_type="text/markdown",
    )
