"""What `make evaluate ARGS=--guidance` compares, and how its intervals are drawn."""

import pytest
import torch
from lcm_lookahead.mini.studies import guidance


@pytest.mark.parametrize("loss", guidance.LOSSES)
def test_arms_differ_in_the_preview_alone(loss):
    nodes = guidance.graph(loss, ["a.png", "b.png"], 0, 5, guidance.ARMS)
    x0, ahead = (nodes[f"{arm} guidance"]["inputs"] for arm in (guidance.X0, guidance.LOOKAHEAD))
    assert {**x0, "shortcut": None} == {**ahead, "shortcut": None}
    x0, ahead = (nodes[f"{arm} shortcut"]["inputs"] for arm in (guidance.X0, guidance.LOOKAHEAD))
    assert (x0["kind"], ahead["kind"]) == ("plain x0", "one-step") and x0["vae"] == ahead["vae"]
    drawn = [nodes[f"{arm} samples"]["inputs"] for arm in guidance.ARMS]
    assert all({**d, "sampler": None} == {**drawn[0], "sampler": None} for d in drawn)


def test_gains_are_paired():
    values = torch.rand(16, generator=torch.Generator().manual_seed(1))
    arms = {guidance.NONE: {"m": values}, guidance.X0: {"m": values + 0.5}, guidance.LOOKAHEAD: {"m": values + 0.75}}
    figures = guidance.intervals(arms)
    assert list(figures[guidance.LOOKAHEAD]["m, gain"]) == pytest.approx([0.75] * 3)
    assert list(figures[guidance.LOOKAHEAD]["m, gain over x0"]) == pytest.approx([0.25] * 3)
    low, high = figures[guidance.NONE]["m"][1:]
    assert high - low > 0.1


def test_pictures_that_share_their_words_are_drawn_together():
    values = (torch.arange(32) // 8 % 2).float()  # the same within each 8
    apart, together = (guidance.intervals({guidance.NONE: {"m": values}}, n)[guidance.NONE]["m"] for n in (1, 8))
    assert apart.value == together.value == 0.5
    assert together.high - together.low > 1.5 * (apart.high - apart.low)
