"""The warm start: a preview that gives way to a latent, under the same noise."""

import pytest
import torch
from lcm_lookahead.lookahead.losses.base import Combined, Showing, showing_in
from lcm_lookahead.lookahead.losses.l1 import L1Loss
from lcm_lookahead.lookahead.method.leaning import lean_towards
from tensors import randn

ALPHA_BAR = torch.tensor([0.05, 0.2])


def state(preview):
    level = ALPHA_BAR.reshape(-1, 1, 1, 1)
    return level.sqrt() * preview + (1 - level).sqrt() * randn(2, 4, 8, 8, seed=3)


def test_nothing_leans_by_nothing_or_towards_what_is_there():
    preview, goal = randn(2, 4, 8, 8, seed=1), randn(2, 4, 8, 8, seed=2)
    z = state(preview)
    assert torch.equal(lean_towards(z, preview, goal, ALPHA_BAR, 0.0), z)
    assert torch.equal(lean_towards(z, preview, preview, ALPHA_BAR, 0.5), z)


def test_by_one_the_latent_is_the_goal_under_the_noise_that_the_preview_was_under():
    preview, goal = randn(2, 4, 8, 8, seed=1), randn(2, 4, 8, 8, seed=2)
    z = state(preview)
    assert torch.allclose(lean_towards(z, preview, goal, ALPHA_BAR, 1.0), state(goal), atol=1e-6)
    half = lean_towards(z, preview, goal, ALPHA_BAR, 0.5)
    assert torch.allclose(half, state((preview + goal) / 2), atol=1e-6)


def test_what_is_masked_keeps_its_bits_and_16_bit_stays_16_bit():
    preview, goal = randn(2, 4, 8, 8, seed=1), randn(2, 4, 8, 8, seed=2)
    z, mask = state(preview), (torch.arange(8) < 4).float().expand(2, 1, 8, 8)
    moved = lean_towards(z, preview, goal, ALPHA_BAR, 0.5, mask)
    assert torch.equal(moved[..., 4:], z[..., 4:]) and not torch.equal(moved[..., :4], z[..., :4])
    assert lean_towards(z.half(), preview.half(), goal.half(), ALPHA_BAR, 0.5, mask).dtype == torch.half


class Shows:
    shows = True

    def __call__(self, preview, rows=None):
        return preview.mean((1, 2, 3)), torch.ones(len(preview), dtype=torch.bool)

    def shown(self, preview, rows=None):
        return preview, preview[:, :1]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 0.0)])
def test_of_combined_losses_the_first_that_counts_and_can_show_is_asked(weights):
    colour, shows = L1Loss(torch.zeros(1, 3, 8, 8)), Shows()
    combined = Combined(((weights[0], colour), (weights[1], shows)))
    assert showing_in(combined) is (shows if weights[1] else None)
    assert showing_in(shows) is shows and showing_in(colour) is None and isinstance(shows, Showing)
