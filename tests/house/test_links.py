"""What the pages point to exists."""

import re
import tomllib
import urllib.parse
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CHANGELOG.md", "docs/*.md", "web/docs/*.md")


def links(text: str) -> list[str]:
    """Targets of markdown links that are files of this repository."""
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    return [urllib.parse.unquote(t) for t in targets if not re.match(r"[a-z]+:", t)]


@pytest.mark.parametrize("page", [str(p.relative_to(ROOT)) for pattern in PAGES for p in sorted(ROOT.glob(pattern))])
def test_every_link_of_a_page_leads_to_a_file(page):
    path = ROOT / page
    missing = [t for t in links(path.read_text(encoding="utf-8")) if not (path.parent / t).exists()]
    assert not missing, f"{page} points to {missing}"


def test_links_are_found_and_addresses_are_not():
    assert links("[a](b.md) ![c](d/e%20f.png) [f](https://x.y) [g](#h)") == ["b.md", "d/e f.png"]


def addresses(page: Path) -> list[str]:
    """What a help page leads to on the web."""
    return re.findall(r"\]\((https?://[^)\s]+)\)", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", sorted((ROOT / "web" / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_every_help_page_leads_to_a_page_of_the_repository_in_its_last_line_in_every_language(page):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    begin = f"{project['urls']['Repository']}/blob/main/"
    (address,) = addresses(page)
    assert page.read_text(encoding="utf-8").endswith(f"]({address})\n") and address.startswith(begin)
    path, _, heading = address.removeprefix(begin).partition("#")
    titles = re.findall(r"(?m)^#+ (.+)$", (ROOT / path).read_text(encoding="utf-8"))
    assert not heading or heading in {title.lower().replace(" ", "-") for title in titles}
    translations = sorted((page.parent / page.stem).glob("*.md"))
    assert translations and all(addresses(one) == [address] for one in translations)


TEXTS = [
    path
    for pattern in ("README.md", "CONTRIBUTING.md", "Makefile", "docs/*.md", "docs/launch/*", "trainer/configs/*.yaml")
    for path in sorted(ROOT.glob(pattern))
]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_module_and_source_file_that_a_text_names_exists(path):
    text = path.read_text(encoding="utf-8")
    modules = re.findall(r"(?:-m|from|import) lcm_lookahead\.([\w.]+)", text)
    files = re.findall(
        r"(?<![\w/])((?:lookahead|nodes|sdxl|evaluation|trainer|mini|host|cli|tools)/[\w/]+\.(?:py|yaml|json))\b", text
    )
    missing = [m for m in modules if not ROOT.joinpath(*m.split(".")).with_suffix(".py").is_file()]
    missing += [f for f in files if not (ROOT / f).is_file()]
    assert not missing
