"""What a first visitor finds in ComfyUI's page."""

import json

from lcm_lookahead.tools.common import ROOT


def test_the_templates_stand_in_the_order_of_their_numbers(page, host):
    names = page.evaluate(f"app.api.getWorkflowTemplates().then(t => t[{json.dumps(host.pack_name)}])")
    assert names == sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
