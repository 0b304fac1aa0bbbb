"""web/lookahead.js says again what stands in Python: the types of our sockets, and the colour of our nodes."""

import re
from pathlib import Path

from lcm_lookahead.tools.templates import COLOURS

ROOT = Path(__file__).resolve().parents[2]
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
