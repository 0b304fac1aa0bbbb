"""What the pages point to exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "CHANGELOG.md", "docs/*.md", "web/docs/*.md")


def links(text: str) -> list[str]:
    """Targets of markdown links that are files of this repository."""
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    return [t for t in targets if not re.match(r"[a-z]+:", t)]


@pytest.mark.parametrize("page", [str(p.relative_to(ROOT)) for pattern in PAGES for p in sorted(ROOT.glob(pattern))])
def test_every_link_of_a_page_leads_to_a_file(page):
    path = ROOT / page
    missing = [t for t in links(path.read_text(encoding="utf-8")) if not (path.parent / t).exists()]
    assert not missing, f"{page} points to {missing}"


def test_links_are_found_and_addresses_are_not():
    assert links("[a](b.md) ![c](d/e.png) [f](https://x.y) [g](#h)") == ["b.md", "d/e.png"]
