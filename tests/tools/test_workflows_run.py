"""Every shared workflow, in the real host with the shipped weights, at the mini world's size."""

from pathlib import Path

import numpy as np
import pytest
from lcm_lookahead.tools import demo, workflow
from lcm_lookahead.tools.host import Host
from PIL import Image

FILES = sorted((Path(__file__).resolve().parents[2] / "workflows").glob("*.json"))


@pytest.fixture(scope="module")
def host():
    with Host(announce=False) as running:
        for number, picture in enumerate(demo.draw_references(2)):
            picture.save(running.folder("input") / f"reference_{number}.png")
        yield running


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_workflow_draws_a_picture_that_follows_its_reference(host, path):
    api = workflow.convert(path, host.object_info())
    drawn = []
    for number in range(2):
        result = host.run(demo.at_mini_size(api, f"reference_{number}.png", seed=5)).check()
        (image,) = (p for p in result.images if "lookahead" in str(p))
        drawn.append(np.asarray(Image.open(image).convert("RGB")).astype(float))
    assert drawn[0].shape == (demo.SIZE, demo.SIZE, 3) and drawn[0].std() > 20
    assert abs(drawn[0] - drawn[1]).mean() > 5
