"""Every shared workflow, in the real host with the shipped weights, at the mini world's size."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from lcm_lookahead.tools import demo, workflow
from lcm_lookahead.tools.host import Host
from PIL import Image

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
FILES = sorted(WORKFLOWS.glob("*.json"))
BOTH = WORKFLOWS / "image_prompt_and_kv.json"


@contextlib.contextmanager
def host_with_pictures(*arguments):
    with Host(announce=False, arguments=arguments) as running:
        names = ["reference_0.png", "reference_1.png", *workflow.pictures_named(FILES)]
        for name, picture in zip(names, demo.draw_references(len(names)), strict=True):
            picture.save(running.folder("input") / name)
        yield running


@pytest.fixture(scope="module")
def host():
    with host_with_pictures() as running:
        yield running


def draw(host, api, reference):
    """The picture of 8 steps, [128, 128, 3] from 0 to 255."""
    steps = next(node for node in ("BasicScheduler", "KSampler") if workflow.find(api, node))
    api = workflow.override(demo.at_mini_size(api, reference, seed=5), steps, steps=8)
    result = host.run(api).check()
    (image,) = (p for p in result.images if "lookahead" in str(p))
    return np.asarray(Image.open(image).convert("RGB")).astype(float)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_workflow_draws_a_picture_that_follows_its_reference(host, path):
    api = workflow.convert(path, host.object_info())
    one, other = (draw(host, api, f"reference_{number}.png") for number in range(2))
    assert one.shape == (demo.SIZE, demo.SIZE, 3) and one.std() > 20
    assert abs(one - other).mean() > 5


@pytest.mark.parametrize(("flag", "kind"), [("--fp16-unet", torch.float16), ("--bf16-unet", torch.bfloat16)])
def test_a_base_in_16_bit_draws_the_same_picture(host, flag, kind):
    api = workflow.convert(BOTH, host.object_info())
    one, other = (draw(host, api, f"reference_{number}.png") for number in range(2))
    with host_with_pictures(flag) as half:
        drawn = draw(half, api, "reference_0.png")
        assert f"model weight dtype {kind}" in half.log
    assert abs(drawn - one).mean() < 0.3 * abs(other - one).mean()
