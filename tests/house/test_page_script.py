"""What the page is served of ours: a script that says again what stands in Python, and help that fits its panel."""

import re
from pathlib import Path

from lcm_lookahead.tools.templates import COLOURS

ROOT = Path(__file__).resolve().parents[2]
PANEL = 40  # letters in a line of code of the help panel, before one has to scroll
SCRIPT = (ROOT / "web" / "lookahead.js").read_text(encoding="utf-8")


def test_every_socket_type_of_ours_has_a_colour_of_its_own():
    types = re.findall(r'io\.Custom\("(LOOKAHEAD_\w+)"\)', (ROOT / "nodes" / "sockets.py").read_text(encoding="utf-8"))
    table = re.search(r"const COLOURS = \{(.*?)\};", SCRIPT, re.S)[1]
    colours = dict(re.findall(r'(\w+): "(#[0-9a-f]{6})"', table))
    assert len(types) > 10 and sorted(colours) == sorted(types)
    assert len(set(colours.values())) == len(colours)


def test_a_new_node_has_the_colour_that_ours_have_in_the_workflows():
    colour, inside = COLOURS["ours"]
    assert f'const NODE_COLOUR = {{ color: "{colour}", bgcolor: "{inside}" }};' in SCRIPT


def formulas(page: Path) -> list[str]:
    """The lines of a help page's formulas: blocks of code with an equals sign, and no list or table around them."""
    blocks = re.findall(r"\n\n((?:    .*\n)+)", page.read_text(encoding="utf-8"))
    return [line[4:] for block in blocks if " = " in block for line in block.splitlines()]


def test_a_formula_in_a_help_page_is_no_wider_than_the_panel():
    found = {page: formulas(page) for page in sorted((ROOT / "web" / "docs").rglob("*.md"))}
    assert len(found[ROOT / "web" / "docs" / "LookaheadGuider.md"]) == 4
    assert {page: lines for page, lines in found.items() if any(len(line) > PANEL for line in lines)} == {}
